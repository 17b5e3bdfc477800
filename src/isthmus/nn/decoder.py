"""Decoder layers of our own: rotary attention, gated feed-forward, residual blocks.

Small parts that trained drafters are wired from. An attention reads and writes keys and values
through a *store*, anything with ``update(keys, values) -> (keys, values)``: none in training, a
layer of :class:`isthmus.decoding.draft_cache.DraftCache` while drafting.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn


class Store(Protocol):
    """Where an attention keeps its past."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add keys and values [B, H, N, d]; return all of them [B, H, S + N, d]."""
        ...


@dataclass(frozen=True)
class LayerSizes:
    """Sizes of a decoder layer, named as transformers' configs name them.

    Attributes:
        hidden_size: Width D.
        num_attention_heads: Query heads.
        num_key_value_heads: Key and value heads.
        head_dim: Channels of a head.
        intermediate_size: Width inside the feed-forward.
        rms_norm_eps: Added to the mean square.
        rope_theta: Base of the rotary positions.
    """

    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0

    @classmethod
    def of(cls, config: Any) -> LayerSizes:
        """The sizes of a transformers decoder, so that a drafter's layer is shaped like it."""

        def first(*names: str, default: Any = None) -> Any:
            found = (getattr(config, name, None) for name in names)
            return next((value for value in found if value), default)

        heads = first("decoder_attention_heads", "num_attention_heads", "n_head", "num_heads")
        width = first("d_model", "hidden_size", "n_embd")
        inner = first("decoder_ffn_dim", "intermediate_size", "n_inner", "d_ff", default=4 * width)
        rope = first("rope_parameters", default={})
        return cls(
            hidden_size=int(width),
            num_attention_heads=int(heads),
            num_key_value_heads=int(first("num_key_value_heads", default=heads)),
            head_dim=int(first("head_dim", default=width // heads)),
            intermediate_size=int(inner),
            rms_norm_eps=float(first("rms_norm_eps", default=1e-6)),
            rope_theta=float(rope.get("rope_theta", 10_000.0)),
        )


def rotate(x: torch.Tensor, positions: torch.Tensor, theta: float) -> torch.Tensor:
    """Rotary position embedding (Su et al. 2021, 2104.09864), halves layout as in Llama.

    Args:
        x: Queries or keys [B, H, N, d], d even.
        positions: int64 [B or 1, N]; with several coordinates [B or 1, N, C] each of them turns
            its own part of the channels, d / C of them.
        theta: Base of the frequencies.

    Returns:
        [B, H, N, d].

    Example:
        >>> x = torch.randn(1, 1, 2, 4)
        >>> torch.equal(rotate(x, torch.zeros(1, 2, dtype=torch.int64), 1e4), x)
        True
    """
    if positions.ndim == 3:
        parts = zip(x.chunk(positions.shape[-1], -1), positions.unbind(-1), strict=True)
        return torch.cat([rotate(part, coordinate, theta) for part, coordinate in parts], -1)
    half = x.shape[-1] // 2
    steps = torch.arange(half, device=x.device, dtype=torch.float32)
    angles = positions[:, None, :, None].float() * theta ** (-steps / half)  # [B, 1, N, d/2]
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions.

    Args:
        sizes: Widths and heads; the output is ``hidden_size`` wide.
        input_size: Width of the input, ``hidden_size`` when None.
    """

    def __init__(self, sizes: LayerSizes, input_size: int | None = None) -> None:
        super().__init__()
        self.sizes = sizes
        width, d = input_size or sizes.hidden_size, sizes.head_dim
        self.q_proj = nn.Linear(width, sizes.num_attention_heads * d, bias=False)
        self.k_proj = nn.Linear(width, sizes.num_key_value_heads * d, bias=False)
        self.v_proj = nn.Linear(width, sizes.num_key_value_heads * d, bias=False)
        self.o_proj = nn.Linear(sizes.num_attention_heads * d, sizes.hidden_size, bias=False)

    def forward(
        self,
        x: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor | None = None,
        store: Store | None = None,
    ) -> torch.Tensor:
        """Attend.

        Args:
            x: [B, N, D].
            positions: int64 [B or 1, N], or [B or 1, N, C]; see :func:`rotate`.
            mask: Additive [B or 1, 1, N, S + N]; causal over x itself when None.
            store: The past; without one x is all there is.

        Returns:
            [B, N, D].
        """
        split = (*x.shape[:2], -1, self.sizes.head_dim)
        q, k, v = (
            proj(x).view(split).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        theta = self.sizes.rope_theta
        q, k = rotate(q, positions, theta), rotate(k, positions, theta)
        if store is not None:
            k, v = store.update(k, v)
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None and x.shape[1] > 1,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        result: torch.Tensor = self.o_proj(out.transpose(1, 2).flatten(2))
        return result

    def remember(self, x: torch.Tensor, positions: torch.Tensor, store: Store) -> None:
        """Only store keys and values of x [B, N, D]; nothing is attended to."""
        split = (*x.shape[:2], -1, self.sizes.head_dim)
        k, v = (proj(x).view(split).transpose(1, 2) for proj in (self.k_proj, self.v_proj))
        store.update(rotate(k, positions, self.sizes.rope_theta), v)


class GatedFeedForward(nn.Module):
    """SwiGLU: ``down(silu(gate x) * up x)``.

    Args:
        hidden_size: Width D outside.
        intermediate_size: Width inside.
    """

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [..., D] to [..., D]."""
        out: torch.Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class DecoderLayer(nn.Module):
    """A pre-norm decoder layer of the Llama kind.

    Args:
        sizes: Widths and heads.
        input_norm: Off, the attention reads its input as it is (EAGLE's layer).
        feed_forward: Another feed-forward [.., D] -> [.., D]; SwiGLU when None.
    """

    def __init__(
        self,
        sizes: LayerSizes,
        *,
        input_norm: bool = True,
        feed_forward: nn.Module | None = None,
    ) -> None:
        super().__init__()
        norm = nn.RMSNorm(sizes.hidden_size, sizes.rms_norm_eps)
        self.input_layernorm = norm if input_norm else nn.Identity()
        self.self_attn = Attention(sizes)
        self.post_attention_layernorm = nn.RMSNorm(sizes.hidden_size, sizes.rms_norm_eps)
        self.mlp = feed_forward or GatedFeedForward(sizes.hidden_size, sizes.intermediate_size)

    def forward(
        self,
        x: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor | None = None,
        store: Store | None = None,
    ) -> torch.Tensor:
        """Map x [B, N, D] to [B, N, D]; arguments as for :meth:`Attention.forward`."""
        x = x + self.self_attn(self.input_layernorm(x), positions, mask, store)
        out: torch.Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class ResBlock(nn.Module):
    """``skip(x) + silu(A x + b)`` with A zero at the start, so the block begins as its skip.

    Args:
        width: Width of the output.
        input_size: Width of the input; when it differs, the skip is a learned linear map.
    """

    def __init__(self, width: int, input_size: int | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(input_size or width, width)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        same = input_size is None or input_size == width
        self.skip = nn.Identity() if same else nn.Linear(input_size or width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [..., input_size] to [..., width]."""
        out: torch.Tensor = self.skip(x) + F.silu(self.linear(x))
        return out
