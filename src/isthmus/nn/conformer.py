"""Conformer encoders: attention for what is far, convolution for what is near.

::

    [B, M, F] ─▶ subsample x8 ─▶ blocks ─▶ [B, T, D]

    FastConformer:  x + FF/2 ─▶ + attention ─▶ + convolution ─▶ + FF/2 ─▶ norm
    E-Branchformer: x + FF/2 ─▶ + merge(attention, gated convolution) ─▶ + FF/2 ─▶ norm

After Gulati et al., 2020 (arXiv 2005.08100), Rekesh et al., "Fast Conformer", 2023 (arXiv
2305.05084) and Kim et al., "E-Branchformer", 2022 (arXiv 2210.00077). Parameters are named as in
transformers' ``ParakeetEncoder``, whose weights load by :func:`from_parakeet`. Frames beyond the
length of a row change nothing within it.

For streams a conformer is causal: its convolutions reach back only, and attention, in chunks of a
given number of frames, reaches to the end of the chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from isthmus.errors import InvalidInputError, UnknownNameError
from isthmus.nn.feed_forward import FeedForward

Norm = Literal["layer", "batch"]
Between = Callable[[int, torch.Tensor], torch.Tensor]
"""Changes the state [B, T, D] that leaves a block, given its number from 1 on."""


def valid_mask(lengths: torch.Tensor, size: int) -> torch.Tensor:
    """True within each row's length, bool [B, size].

    Example:
        >>> valid_mask(torch.tensor([1, 2]), 2).tolist()
        [[True, False], [True, True]]
    """
    return torch.arange(size, device=lengths.device) < lengths[:, None]


def chunk_mask(length: int, chunk: int, device: torch.device | None = None) -> torch.Tensor:
    """True where the key is not in a later chunk than the query, bool [T, T].

    Example:
        >>> chunk_mask(4, 2).int().tolist()
        [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    """
    number = torch.arange(length, device=device) // chunk
    return number[:, None] >= number


def relative_positions(length: int, width: int, like: torch.Tensor) -> torch.Tensor:
    """Sinusoids of the distances T - 1 to 1 - T, sines and cosines in turn, [2 T - 1, D]."""
    distance = torch.arange(length - 1, -length, -1, device=like.device, dtype=torch.float32)
    rates = torch.arange(0, width, 2, device=like.device, dtype=torch.float32)
    angle = distance[:, None] / 10000 ** (rates / width)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1).to(like.dtype)


@dataclass
class Cache:
    """What a block keeps of the frames before: enough to go on as if they were still there.

    Attributes:
        attended: What entered the attention, the last L frames, [B, L, D].
        convolved: What entered the depthwise convolution, the last k - 1 frames, [B, k - 1, D].
    """

    attended: torch.Tensor
    convolved: torch.Tensor


def limited_mask(
    queries: torch.Tensor, keys: torch.Tensor, left: int, right: int, *, regular: bool = False
) -> torch.Tensor:
    """Which frames may look at which, where both sides are limited.

    Chunks of ``right`` + 1 frames see themselves and ``left`` frames before them; so nothing sees
    beyond its chunk, however many blocks there are. ``regular`` gives each frame its own limits,
    which add up from block to block.

    Args:
        queries: Numbers of the frames that look, int64 [T].
        keys: Numbers of those that are looked at [K]; those below 0 do not exist.
        left: L, a multiple of ``right`` + 1 unless ``regular``.
        right: R.
        regular: See above.

    Returns:
        bool [T, K].

    Raises:
        InvalidInputError: The limits do not fit.

    Example:
        >>> place = torch.arange(4)
        >>> limited_mask(place, place, 2, 1).int().tolist()
        [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
        >>> limited_mask(place, place, 2, 1, regular=True).int().tolist()
        [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1], [0, 1, 1, 1]]
    """
    size = right + 1
    if right < 0 or left < 0 or (left % size and not regular):
        raise InvalidInputError(
            f"the frames before are a multiple of the chunk, got {left} and chunks of {size}; "
            f"take {left // size * size if right >= 0 <= left else 0} or other chunks"
        )
    query, key = queries[:, None], keys[None]
    if regular:
        return (key >= 0) & (key >= query - left) & (key <= query + right)
    chunk = query.div(size, rounding_mode="floor")
    return (key >= 0) & (key >= chunk * size - left) & (key < (chunk + 1) * size)


class RelativeAttention(nn.Module):
    """Self-attention with the relative positions of Transformer-XL.

    Args:
        width: D.
        heads: H.
        dropout: On the weights.
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.1) -> None:
        super().__init__()
        if width % heads:
            raise InvalidInputError(f"{heads} heads do not divide a width of {width}")
        self.heads, self.dropout = heads, dropout
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.o_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.relative_k_proj = nn.Linear(width, width, bias=False)
        self.bias_u = nn.Parameter(torch.zeros(heads, width // heads))
        self.bias_v = nn.Parameter(torch.zeros(heads, width // heads))

    def forward(
        self,
        x: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor | None,
        before: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend.

        Args:
            x: [B, T, D].
            positions: [2 (C + T) - 1, D].
            mask: True where a query may look at a key, bool, broadcast to [B, H, T, C + T]; None
                is everywhere.
            before: What entered for the C frames before these, [B, C, D].

        Returns:
            [B, T, D].
        """
        batch, _, width = x.shape
        seen = x if before is None else torch.cat([before, x], 1)
        q, k, v = (
            proj(of).view(batch, of.shape[1], self.heads, -1)
            for proj, of in ((self.q_proj, x), (self.k_proj, seen), (self.v_proj, seen))
        )
        distance = self.relative_k_proj(positions).view(-1, self.heads, width // self.heads)
        scaled = (q + self.bias_v) * (width // self.heads) ** -0.5
        by_distance = scaled.transpose(1, 2) @ distance.permute(1, 2, 0)  # [B, H, T, R]
        by_key = shift(by_distance) if before is None else shift_late(by_distance)
        if mask is not None:
            by_key = torch.where(mask, by_key, torch.finfo(x.dtype).min)
        mixed = F.scaled_dot_product_attention(
            (q + self.bias_u).transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=by_key,
            dropout_p=self.dropout if self.training else 0.0,
        )
        y: torch.Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return y


def shift(scores: torch.Tensor) -> torch.Tensor:
    """From scores by distance, T - 1 to 1 - T, to scores by key: [..., T, 2 T - 1] to [..., T, T].

    Example:
        >>> shift(torch.tensor([[1.0, 0.0, -1.0], [1.0, 0.0, -1.0]]))
        tensor([[ 0., -1.],
                [ 1.,  0.]])
    """
    length, scores = scores.shape[-2], scores.contiguous()
    row = scores.shape[-1] - 1  # each row begins one place before the one above it
    strides = *scores.stride()[:-2], row, 1
    return scores.as_strided(
        (*scores.shape[:-1], length), strides, scores.storage_offset() + length - 1
    )


def shift_late(scores: torch.Tensor) -> torch.Tensor:
    """As :func:`shift`, for the last T of K frames: [..., T, 2 K - 1] to [..., T, K].

    Example:
        >>> shift_late(torch.tensor([[1.0, 0.0, -1.0]]))  # the second of two frames
        tensor([[1., 0.]])
    """
    length, size = scores.shape[-2], (scores.shape[-1] + 1) // 2
    query = torch.arange(length, device=scores.device)[:, None]
    index = length - 1 - query + torch.arange(size, device=scores.device)  # [T, K]
    return scores.gather(-1, index.expand(*scores.shape[:-2], -1, -1))


class Convolution(nn.Module):
    """Pointwise, GLU, depthwise, norm, SiLU, pointwise.

    Args:
        width: D.
        kernel: Odd.
        norm: ``layer``, or ``batch`` as published, whose statistics see the padding.
        causal: Whether it reaches back only.
    """

    def __init__(
        self, width: int, kernel: int = 9, norm: Norm = "layer", *, causal: bool = False
    ) -> None:
        super().__init__()
        if kernel % 2 == 0:
            raise InvalidInputError(f"the kernel is odd, got {kernel}")
        self.before = kernel - 1 if causal else 0
        self.pointwise_conv1 = nn.Conv1d(width, 2 * width, 1)
        padding = 0 if causal else kernel // 2
        self.depthwise_conv = nn.Conv1d(width, width, kernel, padding=padding, groups=width)
        self.norm = nn.BatchNorm1d(width) if norm == "batch" else nn.LayerNorm(width)
        self.pointwise_conv2 = nn.Conv1d(width, width, 1)

    def forward(
        self, x: torch.Tensor, valid: torch.Tensor | None, cache: Cache | None = None
    ) -> torch.Tensor:
        """[B, T, D] to the same; ``valid`` is bool [B, T] or None, the cache is renewed."""
        h = _within(F.glu(_pointwise(self.pointwise_conv1, x)), valid)
        if cache is None:
            h = F.pad(h, (0, 0, self.before, 0))
        else:
            h = torch.cat([cache.convolved, h], 1)
            cache.convolved = h[:, h.shape[1] - self.before :]
        h = _depthwise(self.depthwise_conv, h)
        if isinstance(self.norm, nn.BatchNorm1d):
            h = self.norm(h.transpose(1, 2)).transpose(1, 2)
        else:
            h = self.norm(h)
        return _pointwise(self.pointwise_conv2, F.silu(h))


def _within(x: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """[B, T, D] with zeros beyond the valid frames bool [B, T]; None says that there are none."""
    return x if valid is None else x.masked_fill(~valid[..., None], 0.0)


def _pointwise(conv: nn.Conv1d, x: torch.Tensor) -> torch.Tensor:
    """A convolution over one frame is a linear map: [B, T, D] to [B, T, E]."""
    return F.linear(x, conv.weight.squeeze(-1), conv.bias)


def _depthwise(conv: nn.Conv1d, x: torch.Tensor) -> torch.Tensor:
    """[B, T, D] to the same, as a picture of one row: its channels may lie last, uncopied."""
    y = F.conv2d(
        x.transpose(1, 2)[:, :, None],
        conv.weight[:, :, None],
        conv.bias,
        padding=(0, int(conv.padding[0])),
        groups=conv.groups,
    )
    return y[:, :, 0].transpose(1, 2)


class ConformerBlock(nn.Module):
    """One block of a FastConformer.

    Args:
        width: D.
        heads: H.
        kernel: Of the depthwise convolution.
        inner: Width within the feed-forwards; 4 D when 0.
        norm: See :class:`Convolution`.
        dropout: Behind every part.
        causal: Whether the convolution reaches back only.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kernel: int = 9,
        inner: int = 0,
        norm: Norm = "layer",
        dropout: float = 0.1,
        *,
        causal: bool = False,
    ) -> None:
        super().__init__()
        inner, self.dropout = inner or 4 * width, dropout
        self.feed_forward1 = FeedForward(width, inner, "silu", dropout=dropout)
        self.self_attn = RelativeAttention(width, heads, dropout)
        self.conv = Convolution(width, kernel, norm, causal=causal)
        self.feed_forward2 = FeedForward(width, inner, "silu", dropout=dropout)
        self.norm_feed_forward1, self.norm_self_att = nn.LayerNorm(width), nn.LayerNorm(width)
        self.norm_conv, self.norm_feed_forward2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.norm_out = nn.LayerNorm(width)

    def pass_on(self) -> None:
        """Let nothing leave the parts: on top of blocks that have learnt, it spoils nothing."""
        ends = self.feed_forward1.out_proj, self.self_attn.o_proj, self.feed_forward2.out_proj
        for last in (*ends, self.conv.pointwise_conv2):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)  # type: ignore[arg-type]

    def forward(
        self,
        x: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor | None,
        valid: torch.Tensor | None,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        """[B, T, D] to the same; see :class:`RelativeAttention` and :class:`Convolution`.

        With a cache the frames go on where those before them ended, and the cache is renewed.
        """

        def drop(y: torch.Tensor) -> torch.Tensor:
            return F.dropout(y, self.dropout, self.training)

        x = torch.add(x, drop(self.feed_forward1(self.norm_feed_forward1(x))), alpha=0.5)
        h = self.norm_self_att(x)
        before = None if cache is None else cache.attended
        x = x + drop(self.self_attn(h, positions, mask, before))
        if cache is not None:
            both = torch.cat([cache.attended, h], 1)
            cache.attended = both[:, both.shape[1] - cache.attended.shape[1] :]
        x = x + drop(self.conv(self.norm_conv(x), valid, cache))
        x = torch.add(x, drop(self.feed_forward2(self.norm_feed_forward2(x))), alpha=0.5)
        y: torch.Tensor = self.norm_out(x)
        return y


class GatedConvolution(nn.Module):
    """cgMLP: linear, GELU, one half times the convolved other half, linear.

    Args:
        width: D.
        inner: Width within, even.
        kernel: Odd.
    """

    def __init__(self, width: int, inner: int, kernel: int = 31) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(width, inner), nn.Linear(inner // 2, width)
        self.norm = nn.LayerNorm(inner // 2)
        self.conv = nn.Conv1d(
            inner // 2, inner // 2, kernel, padding=kernel // 2, groups=inner // 2
        )
        nn.init.normal_(self.conv.weight, std=1e-6)
        nn.init.ones_(self.conv.bias)  # type: ignore[arg-type]  # starts as a gate that is open

    def forward(self, x: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
        """[B, T, D] to the same; ``valid`` is bool [B, T] or None."""
        kept, gate = F.gelu(self.enter(x)).chunk(2, -1)
        gate = _within(self.norm(gate), valid)
        y: torch.Tensor = self.leave(kept * _depthwise(self.conv, gate))
        return y


class EBranchformerBlock(nn.Module):
    """One block of an E-Branchformer: attention and gated convolution side by side, then merged.

    Args:
        width: D.
        heads: H.
        kernel: Of the convolutions.
        inner: Width within feed-forwards and the gated convolution; 4 D when 0.
        dropout: Behind every part.
    """

    def __init__(
        self, width: int, heads: int, kernel: int = 31, inner: int = 0, dropout: float = 0.1
    ) -> None:
        super().__init__()
        inner, self.dropout = inner or 4 * width, dropout
        self.feed_forward1 = FeedForward(width, inner, "silu", dropout=dropout)
        self.self_attn = RelativeAttention(width, heads, dropout)
        self.gated = GatedConvolution(width, inner, kernel)
        both = 2 * width
        self.merge_conv = nn.Conv1d(both, both, kernel, padding=kernel // 2, groups=both)
        self.merge = nn.Linear(both, width)
        self.feed_forward2 = FeedForward(width, inner, "silu", dropout=dropout)
        self.norm_feed_forward1, self.norm_self_att = nn.LayerNorm(width), nn.LayerNorm(width)
        self.norm_gated, self.norm_feed_forward2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.norm_out = nn.LayerNorm(width)

    def forward(
        self,
        x: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor | None,
        valid: torch.Tensor | None,
    ) -> torch.Tensor:
        """[B, T, D] to the same; see :class:`RelativeAttention` and :class:`Convolution`."""

        def drop(y: torch.Tensor) -> torch.Tensor:
            return F.dropout(y, self.dropout, self.training)

        x = torch.add(x, drop(self.feed_forward1(self.norm_feed_forward1(x))), alpha=0.5)
        far = drop(self.self_attn(self.norm_self_att(x), positions, mask))
        near = drop(self.gated(self.norm_gated(x), valid))
        both = _within(torch.cat([far, near], -1), valid)
        both = both + _depthwise(self.merge_conv, both)
        x = x + drop(self.merge(both))
        x = torch.add(x, drop(self.feed_forward2(self.norm_feed_forward2(x))), alpha=0.5)
        y: torch.Tensor = self.norm_out(x)
        return y


def _alone(lengths: torch.Tensor, size: int) -> bool:
    """Whether there is one row, and nothing behind its end: it needs no masks."""
    return len(lengths) == 1 and not lengths.is_meta and int(lengths) == size


class Subsampling(nn.Module):
    """Strided convolutions over time and frequency: fewer, wider frames.

    The first is a full one, further ones are depthwise and pointwise.

    Args:
        mels: M.
        width: D.
        factor: 2, 4, 8 ...
        channels: Of the convolutions.
        causal: Whether they reach back only: frame t sees no further than frame ``factor t``.
    """

    def __init__(
        self,
        mels: int,
        width: int,
        factor: int = 8,
        channels: int = 256,
        *,
        causal: bool = False,
    ) -> None:
        super().__init__()
        self.causal = causal
        halvings = int(math.log2(factor)) if factor > 1 else 0
        if 2**halvings != factor or not halvings:
            raise InvalidInputError(f"subsampling is by 2, 4, 8 ..., got {factor}")
        pad = 0 if causal else 1, 1  # of time, of frequency
        layers: list[nn.Module] = [nn.Conv2d(1, channels, 3, 2, pad), nn.ReLU()]
        for _ in range(halvings - 1):
            layers += [
                nn.Conv2d(channels, channels, 3, 2, pad, groups=channels),
                nn.Conv2d(channels, channels, 1),
                nn.ReLU(),
            ]
        self.layers = nn.ModuleList(layers)
        for _ in range(halvings):
            mels = -(-mels // 2)
        self.linear = nn.Linear(channels * mels, width)
        self.halvings = halvings

    def lengths(self, frames: torch.Tensor) -> torch.Tensor:
        """Frames behind the layer."""
        for _ in range(self.halvings):
            frames = (frames - 1) // 2 + 1
        return frames

    def forward(
        self, features: torch.Tensor, frames: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """From [B, M, F] and valid frames [B] to [B, T, D] and valid frames [B]."""
        alone = _alone(frames, features.shape[2])
        h = features if alone else features * valid_mask(frames, features.shape[2])[:, None]
        h = h.transpose(1, 2)[:, None]  # [B, 1, F, M]
        h = h.contiguous(memory_format=torch.channels_last)  # depthwise: 1.5 times the speed
        for layer in self.layers:
            if self.causal and isinstance(layer, nn.Conv2d) and layer.stride[0] == 2:
                h = F.pad(h, (0, 0, 2, 0))
            h = layer(h)
            if isinstance(layer, nn.Conv2d):
                if layer.stride[0] == 2:
                    frames = (frames - 1) // 2 + 1
                if not alone:
                    h = h * valid_mask(frames, h.shape[2])[:, None, :, None]
        return self.linear(h.transpose(1, 2).flatten(2)), frames


class Conformer(nn.Module):
    """Subsampling and blocks.

    Args:
        mels: M.
        width: D.
        depth: Blocks.
        heads: H.
        block: ``conformer`` or ``e-branchformer``.
        kernel: Of the depthwise convolutions.
        inner: Width within the feed-forwards; 4 D when 0.
        factor: Of the subsampling.
        channels: Of the subsampling.
        norm: ``layer`` or ``batch``, of ``conformer``.
        dropout: Behind every part.
        scale_input: Whether what enters the first block is multiplied by sqrt(D), as in NeMo.
        causal: Whether convolutions reach back only; of ``conformer``.
        chunk: Frames behind the subsampling that attention sees at once, with all before them; 0
            is all frames.

    Raises:
        UnknownNameError: There is no such block.
        InvalidInputError: Sizes do not fit, or an ``e-branchformer`` is to be causal.
    """

    def __init__(
        self,
        mels: int,
        width: int,
        depth: int,
        heads: int,
        *,
        block: str = "conformer",
        kernel: int = 9,
        inner: int = 0,
        factor: int = 8,
        channels: int = 256,
        norm: Norm = "layer",
        dropout: float = 0.1,
        scale_input: bool = False,
        causal: bool = False,
        chunk: int = 0,
    ) -> None:
        super().__init__()
        if block not in ("conformer", "e-branchformer"):
            raise UnknownNameError("block", block, ("conformer", "e-branchformer"))
        if chunk < 0 or (causal and block != "conformer"):
            raise InvalidInputError(
                f"a chunk has 0 frames or more, got {chunk}, and only a conformer may be causal"
            )
        self.width, self.dropout, self.chunk = width, dropout, chunk
        self.scale = math.sqrt(width) if scale_input else 1.0
        self.subsampling = Subsampling(mels, width, factor, channels, causal=causal)
        self.layers = nn.ModuleList(
            ConformerBlock(width, heads, kernel, inner, norm, dropout, causal=causal)
            if block == "conformer"
            else EBranchformerBlock(width, heads, kernel, inner, dropout)
            for _ in range(depth)
        )

    def forward(
        self,
        features: torch.Tensor,
        frames: torch.Tensor,
        *,
        prefix: torch.Tensor | None = None,
        between: Between | None = None,
        limits: tuple[int, int] | None = None,
        regular: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode.

        Args:
            features: [B, M, F].
            frames: Valid frames [B].
            prefix: States [B, P, D] that precede the frames.
            between: Called with the number and the state of every block.
            limits: L and R of :func:`limited_mask`; None looks as far as ``chunk`` allows.
            regular: See there.

        Returns:
            States [B, P + T, D] and how many of each row are valid [B].
        """
        x, lengths = self.subsampling(features, frames)
        if prefix is not None:
            x, lengths = torch.cat([prefix, x], 1), lengths + prefix.shape[1]
        x = F.dropout(x * self.scale, self.dropout, self.training)
        positions = relative_positions(x.shape[1], self.width, x)
        valid = mask = None
        if not _alone(lengths, x.shape[1]):
            valid = valid_mask(lengths, x.shape[1])
            mask = valid[:, None, None] & valid[:, None, :, None]
        if self.chunk:
            seen = chunk_mask(x.shape[1], self.chunk, x.device)
            mask = seen if mask is None else mask & seen
        if limits is not None:
            place = torch.arange(x.shape[1], device=x.device)
            seen = limited_mask(place, place, *limits, regular=regular)
            mask = seen if mask is None else mask & seen
        for number, layer in enumerate(self.layers, 1):
            x = layer(x, positions, mask, valid)
            if between is not None:
                x = between(number, x)
        return x, lengths


def from_parakeet(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of transformers' ``ParakeetEncoder`` under the names they have here."""
    return {
        name.replace(".linear1.", ".in_proj.").replace(".linear2.", ".out_proj."): value
        for name, value in weights.items()
    }
