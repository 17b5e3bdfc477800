"""The first RNN encoder-decoder: a phrase through one vector.

Cho et al., "Learning phrase representations using RNN encoder-decoder for statistical machine
translation", 2014 (arXiv 1406.1078), appendix A.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from isthmus.nn.recurrent import DeepOutput, GatedUnit

PAD = 0
"""Id of padding, which also stands before the first target token."""


class PhraseNetwork(nn.Module):
    """A gated unit that reads a phrase, and one that writes another from a single vector.

    Args:
        vocab_size: Tokens V of both sides together.
        hidden_size: Width D of both units and of the vector.
        rank: Width of the embeddings, and rank of the output matrix.
        maxout: Maxout units.
        told: Off, the writer is told nothing of what was read.
    """

    def __init__(
        self, vocab_size: int, hidden_size: int, rank: int, maxout: int, told: bool = True
    ) -> None:
        super().__init__()
        d = hidden_size
        self.told = told
        self.source = nn.Embedding(vocab_size, rank)
        self.target = nn.Embedding(vocab_size, rank)
        self.reader = GatedUnit(rank, d)  # reset before the matrix
        self.writer = GatedUnit(rank, d, d, reset_before=False)
        self.summarise = nn.Linear(d, d, bias=False)
        self.begin = nn.Linear(d, d, bias=False)
        self.out = DeepOutput((d, rank, d), maxout, rank, vocab_size)
        for name, weight in self.named_parameters():
            if "from_state" in name or "from_reset" in name:
                for block in torch.split(weight.data, d):
                    nn.init.orthogonal_(block)
            else:  # 0.01 in the paper, at fan-ins of 100 to 1000; the same share of smaller ones
                nn.init.normal_(weight, std=0.3 * weight.shape[-1] ** -0.5)

    def encode(self, source: torch.Tensor) -> torch.Tensor:
        """Summaries c [B, D] of phrases int64 [B, S]."""
        states = self.reader(self.source(source), mask=source != PAD)
        summary = torch.tanh(self.summarise(states[:, -1]))
        return summary if self.told else torch.zeros_like(summary)

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Logits [B, T, V] of targets int64 [B, T], each token given those before it."""
        return self.step(self.encode(source), F.pad(target[:, :-1], (1, 0)))[0]

    def step(
        self, summary: torch.Tensor, before: torch.Tensor, state: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [B, T, V] after more tokens int64 [B, T], and the last state [B, D]."""
        state = torch.tanh(self.begin(summary)) if state is None else state
        y = self.target(before)
        states = self.writer(y, state, summary)
        logits: torch.Tensor = self.out(states, y, summary[:, None])
        return logits, states[:, -1]
