"""Multi-head attention with any mask or bias, over itself or over a memory."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class Kept:
    """Keys and values that one attention keeps from call to call, both [B, H, S, d].

    Attributes:
        keys: None before the first call.
        values: Likewise.
    """

    keys: torch.Tensor | None = None
    values: torch.Tensor | None = None

    @property
    def both(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, after the first call."""
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    def extend(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Put further ones behind."""
        if self.keys is not None and self.values is not None:
            keys = torch.cat([self.keys, keys], 2)
            values = torch.cat([self.values, values], 2)
        self.keys, self.values = keys, values


class MultiHeadAttention(nn.Module):
    """``softmax(scale q k^T + mask) v``, with projections.

    Args:
        hidden_size: Width D outside.
        heads: Heads H.
        head_dim: Channels of a head; ``hidden_size / heads`` when None.
        bias: Whether projections have biases.
        scaled: Whether scores are divided by the root of ``head_dim``; T5 leaves that to its
            initial weights.
        dropout: Of the attention's weights, in training.

    Attributes:
        tap_pattern: The pattern [B, H, T, S] passes here while a hook is on it; otherwise a fused
            kernel is used, which has none.
    """

    def __init__(
        self,
        hidden_size: int,
        heads: int,
        head_dim: int | None = None,
        *,
        bias: bool = True,
        scaled: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.head_dim = head_dim or hidden_size // heads
        self.scale = 1 / math.sqrt(self.head_dim) if scaled else 1.0
        inner = heads * self.head_dim
        self.q_proj = nn.Linear(hidden_size, inner, bias=bias)
        self.k_proj = nn.Linear(hidden_size, inner, bias=bias)
        self.v_proj = nn.Linear(hidden_size, inner, bias=bias)
        self.out_proj = nn.Linear(inner, hidden_size, bias=bias)
        self.tap_pattern = nn.Identity()

    def forward(
        self,
        x: torch.Tensor,
        memory: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        *,
        causal: bool = False,
        kept: Kept | None = None,
    ) -> torch.Tensor:
        """Attend from x [B, T, D] to a memory [B, S, D], or to x itself.

        Args:
            x: Where queries come from.
            memory: Where keys and values come from; x when None.
            mask: Added to the scores, or bool with True where attention goes; broadcast to
                [B, H, T, S].
            causal: Every place sees itself and what is before it; without ``mask``.
            kept: From earlier calls. Over itself, x sees what is kept and is added to it; a memory
                is projected by the first call only.

        Returns:
            [B, T, D].
        """
        q = self._heads(self.q_proj(x))
        if kept is not None and memory is not None and kept.keys is not None:
            k, v = kept.both
        else:
            of = x if memory is None else memory
            k, v = self._heads(self.k_proj(of)), self._heads(self.v_proj(of))
            if kept is not None:
                kept.extend(k, v)
                k, v = kept.both
        if self.tap_pattern._forward_hooks or self.tap_pattern._forward_pre_hooks:
            mixed = self._shown(q, k, v, mask, causal)
        else:
            mixed = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                dropout_p=self.dropout if self.training else 0.0,
                is_causal=causal,
                scale=self.scale,
            )
        out: torch.Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return out

    def _shown(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        causal: bool,
    ) -> torch.Tensor:
        """The same without the fused kernel: [B, H, T, d]."""
        scores = q @ k.mT * self.scale
        if causal:
            later = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(later, -torch.inf)
        if mask is not None:
            hides = mask.dtype == torch.bool
            scores = scores.masked_fill(~mask, -torch.inf) if hides else scores + mask
        pattern = self.tap_pattern(F.dropout(scores.softmax(-1), self.dropout, self.training))
        mixed: torch.Tensor = pattern @ v
        return mixed

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        """[B, S, H d] to [B, H, S, d]."""
        return x.view(*x.shape[:2], self.heads, self.head_dim).transpose(1, 2)
