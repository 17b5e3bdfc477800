"""One encoder, two readers: CTC, and a transducer whose predictor is an LSTM over the text.

::

    features ─▶ Conformer ─┬─▶ CTC head
                           ├─▶ W tanh(W_h h_t + W_s s_u) ─▶ blank or a token
    text so far ─▶ LSTM ───┘
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from isthmus.nn.conformer import Conformer


@dataclass(frozen=True)
class Predicted:
    """Where the predictor stands.

    Attributes:
        out: What it says after the last token, [B, P].
        hidden: Of the LSTM, [1, B, P].
        cell: Of the LSTM, [1, B, P].
    """

    out: torch.Tensor
    hidden: torch.Tensor
    cell: torch.Tensor


class HybridTransducer(nn.Module):
    """Encoder and both readers; plays :class:`~isthmus.roles.FrameScorer`.

    Args:
        encoder: Of width D.
        vocab: Tokens V; 0 is the blank, and begins texts.
        predictor: P, of the LSTM.
        joint: Width of the joint network.
        dropout: Of the predictor's output.
    """

    def __init__(
        self, encoder: Conformer, vocab: int, predictor: int, joint: int, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.encoder, self.dropout = encoder, dropout
        self.ctc = nn.Linear(encoder.width, vocab)
        self.embedding = nn.Embedding(vocab, predictor)
        self.lstm = nn.LSTM(predictor, predictor, batch_first=True)
        self.from_sound, self.from_text = (
            nn.Linear(encoder.width, joint),
            nn.Linear(predictor, joint),
        )
        self.head = nn.Linear(joint, vocab)

    def joined(self, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Logits [B, T, U + 1, V] of states [B, T, D] and the text int64 [B, U]."""
        read = self.lstm(self.embedding(F.pad(targets, (1, 0))))[0]
        read = F.dropout(read, self.dropout, self.training)
        inner = self.from_sound(states)[:, :, None] + self.from_text(read)[:, None]
        logits: torch.Tensor = self.head(inner.tanh())
        return logits

    def start(self, batch: int) -> Predicted:
        """See :class:`~isthmus.roles.FrameScorer`."""
        none = self.head.weight.new_zeros(1, batch, self.lstm.hidden_size)
        return self._read(torch.zeros(batch, dtype=torch.int64), none, none)

    def hear(self, frames: torch.Tensor, lengths: torch.Tensor, state: Predicted) -> Predicted:
        """The predictor does not look at the sound."""
        return state

    def score(self, frames: torch.Tensor, state: Predicted) -> torch.Tensor:
        """See :class:`~isthmus.roles.FrameScorer`."""
        inner = self.from_sound(frames) + self.from_text(state.out)[:, None]
        log_probs: torch.Tensor = self.head(inner.tanh()).log_softmax(-1)
        return log_probs

    def advance(self, tokens: torch.Tensor, where: torch.Tensor, state: Predicted) -> Predicted:
        """See :class:`~isthmus.roles.FrameScorer`."""
        new, there = self._read(tokens, state.hidden, state.cell), where[:, None]
        return Predicted(
            torch.where(there, new.out, state.out),
            torch.where(there, new.hidden, state.hidden),
            torch.where(there, new.cell, state.cell),
        )

    def _read(self, tokens: torch.Tensor, hidden: torch.Tensor, cell: torch.Tensor) -> Predicted:
        out, (hidden, cell) = self.lstm(self.embedding(tokens)[:, None], (hidden, cell))
        return Predicted(out[:, 0], hidden, cell)
