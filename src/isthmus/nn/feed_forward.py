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
