"""Feed-forward layers of transformers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class FeedForward(nn.Module):
    """``out(drop(act(in x)))``, or gated: ``out(drop(gelu(gate x) * in x))``.

    Args:
        hidden_size: Width D outside.
        intermediate_size: Width inside.
        kind: ``relu``, ``gelu``, ``silu``, or ``gated-gelu`` (its tanh form, as T5 1.1 has it).
        bias: Whether there are biases.
        dropout: Of the inner states, in training.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        kind: str = "relu",
        *,
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.kind = kind
        self.in_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        if kind == "gated-gelu":
            self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.dropout = nn.Dropout(dropout)
        self.out_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [..., D] to [..., D]."""
        inner = self.in_proj(x)
        if self.kind == "gated-gelu":
            inner = F.gelu(self.gate_proj(x), approximate="tanh") * inner
        else:
            inner = getattr(F, self.kind)(inner)
        out: torch.Tensor = self.out_proj(self.dropout(inner))
        return out


class TopKFeedForward(FeedForward):
    """A dense layer of relus, of whose hidden units only the largest are kept.

    Section 3.1 of R. Csordas et al., 2023, arXiv:2310.10837.

    Args:
        hidden_size: Width D.
        intermediate_size: Hidden units.
        kept: How many are kept; with all of them it is the dense layer itself.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, kept: int) -> None:
        super().__init__(hidden_size, intermediate_size, "relu", bias=False)
        self.kept = kept

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [..., D] to [..., D]."""
        inner = self.in_proj(x).relu()
        if self.kept < inner.shape[-1]:
            values, places = inner.topk(self.kept, -1)
            inner = torch.zeros_like(inner).scatter(-1, places, values)
        out: torch.Tensor = self.out_proj(inner)
        return out
