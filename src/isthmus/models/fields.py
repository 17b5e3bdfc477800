"""Networks that are a video: pictures grow out of a few numbers, block by block.

::

    time t ──position code──▶ MLP ────────────┐
    frame ──strided ConvNeXt─▶ embedding e_t ─┴▶ 1x1 ─▶ UpBlock x stages ─▶ 3x3, tanh ─▶ picture

Fields of Chen et al.: NeRV ("NeRV: Neural Representations for Videos", 2021, arXiv:2110.13903)
grows a picture out of its time, HNeRV (arXiv:2304.02633) out of an embedding that an encoder makes
of the picture itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus.errors import InvalidInputError


def position_code(places: Tensor, levels: int = 80, base: float = 1.25) -> Tensor:
    """``sin(base^i pi t), cos(base^i pi t)`` for i below ``levels``.

    Args:
        places: t, float [T], from 0 to 1.
        levels: Frequencies.
        base: Ratio of one frequency to the one before; the defaults are NeRV's.

    Returns:
        float32 [T, 2 levels]: all sines, then all cosines.

    Example:
        >>> position_code(torch.tensor([0.25]), 2, 2.0).round(decimals=3).abs().tolist()
        [[0.7070000171661377, 1.0, 0.7070000171661377, 0.0]]
    """
    angles = places.float()[:, None] * math.pi * base ** torch.arange(levels)
    return torch.cat([angles.sin(), angles.cos()], 1)


class UpBlock(nn.Module):
    """Convolution to ``stride^2`` times the channels, pixel shuffle, GELU.

    Args:
        inputs: Channels.
        outputs: Channels of the result.
        stride: How much larger a picture gets.
        kernel: Side of the convolution, odd.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs * stride * stride, kernel, padding=kernel // 2)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] to [B, outputs, stride H, stride W]."""
        return F.gelu(F.pixel_shuffle(self.conv(x), self.stride))


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of pictures [B, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7, norm, four times the width and back, added to what came in.

    Liu et al., "A ConvNet for the 2020s", 2022, arXiv:2201.03545, Figure 4, without layer scale.

    Args:
        width: Channels.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.spread = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = ChannelNorm(width)
        self.up, self.down = nn.Conv2d(width, 4 * width, 1), nn.Conv2d(4 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, width, H, W], the same shape."""
        out: Tensor = x + self.down(F.gelu(self.up(self.norm(self.spread(x)))))
        return out


class FrameEncoder(nn.Sequential):
    """Pictures [B, 3, H, W] to embeddings [B, outputs, H / P, W / P], P the product of strides.

    Args:
        strides: Of the stages.
        width: Channels inside.
        outputs: Channels of an embedding.
    """

    def __init__(self, strides: Sequence[int], width: int, outputs: int) -> None:
        stages: list[nn.Module] = []
        for i, stride in enumerate(strides):
            last = i == len(strides) - 1
            out = outputs if last else width
            stages += [
                nn.Conv2d(3 if i == 0 else width, out, stride, stride),
                ChannelNorm(out),
                ConvNeXtBlock(out),
            ]
        super().__init__(*stages)


@dataclass(frozen=True)
class Blocks:
    """How a decoder of pictures is built.

    Attributes:
        width: Channels C before the first block.
        strides: Of the blocks.
        kernels: Largest side of a convolution; the i-th block has ``min(first + 2 i, kernels)``.
        first: Side of the first block's convolution.
        reduce: Channels become fewer by this factor in every block.
        floor: But not fewer than this.
    """

    width: int
    strides: tuple[int, ...]
    kernels: int = 5
    first: int = 1
    reduce: float = 1.2
    floor: int = 12

    @property
    def channels(self) -> list[int]:
        """Before the first block, and after each.

        Example:
            >>> Blocks(48, (4, 2, 2), reduce=2.0).channels
            [48, 24, 12, 12]
        """
        out = [self.width]
        for _ in self.strides:
            out.append(max(self.floor, round(out[-1] / self.reduce)))
        return out


class FieldDecoder(nn.Module):
    """Blocks that grow, and a head: what both kinds of field share.

    Args:
        blocks: How it is built.
    """

    def __init__(self, blocks: Blocks) -> None:
        super().__init__()
        pairs = zip(blocks.channels, blocks.channels[1:], blocks.strides, strict=False)
        self.blocks = nn.Sequential(
            *(
                UpBlock(a, b, stride, min(blocks.first + 2 * i, blocks.kernels))
                for i, (a, b, stride) in enumerate(pairs)
            )
        )
        self.head = nn.Conv2d(blocks.channels[-1], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] to pictures [B, 3, P h, P w] from 0 to 1."""
        out: Tensor = (torch.tanh(self.head(self.blocks(x))) + 1) / 2
        return out


class ContentField(nn.Module):
    """HNeRV's: pictures out of embeddings.

    Args:
        blocks: Of the decoder.
        embedding: Channels of an embedding.
    """

    def __init__(self, blocks: Blocks, embedding: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(embedding, blocks.width, 1)
        self.decoder = FieldDecoder(blocks)

    def forward(self, embeddings: Tensor) -> Tensor:
        """[B, embedding, h, w] to pictures."""
        out: Tensor = self.decoder(self.stem(embeddings))
        return out


class TimeField(nn.Module):
    """NeRV's: pictures out of their times.

    Args:
        blocks: Of the decoder.
        hidden: Width of the MLP.
        grid: h and w before the first block.
        levels: Frequencies of the position code.
    """

    def __init__(
        self, blocks: Blocks, hidden: int, grid: tuple[int, int], levels: int = 80
    ) -> None:
        super().__init__()
        self.levels, self.grid = levels, grid
        self.up = nn.Linear(2 * levels, hidden)
        self.out = nn.Linear(hidden, blocks.width * grid[0] * grid[1])
        self.decoder = FieldDecoder(blocks)

    def forward(self, times: Tensor) -> Tensor:
        """Times [B] from 0 to 1 to pictures."""
        x = F.gelu(self.out(F.gelu(self.up(position_code(times, self.levels)))))
        out: Tensor = self.decoder(x.view(len(times), -1, *self.grid))
        return out


def size(module: nn.Module) -> int:
    """Numbers in a module."""
    return sum(p.numel() for p in module.parameters())


def budget(total: int, build: Callable[[int], nn.Module], most: int = 1024) -> int:
    """The width at which a network comes closest to a number of parameters.

    Args:
        total: Parameters.
        build: A network of a width; its size grows with the width. It is built without memory.
        most: Largest width.

    Raises:
        InvalidInputError: The smallest network is more than twice as large.

    Example:
        >>> budget(110, lambda width: nn.Linear(10, width, bias=False))
        11
    """

    def count(width: int) -> int:
        with torch.device("meta"):
            return size(build(width))

    low, high = 1, most
    if count(low) > 2 * total:
        raise InvalidInputError(
            f"{total} parameters are too few: the smallest network has {count(low)}; allow more "
            "bits, or give longer or smaller pictures"
        )
    while low < high:  # the first width that is large enough
        middle = (low + high) // 2
        low, high = (low, middle) if count(middle) >= total else (middle + 1, high)
    return low if low == 1 or count(low) - total <= total - count(low - 1) else low - 1


def strides_for(height: int, width: int) -> tuple[int, ...]:
    """Strides of 4 and 2 whose product leaves the shorter side 2 to 4 places long.

    Example:
        >>> strides_for(48, 64), strides_for(720, 1280), strides_for(9, 5)
        ((4, 2, 2), (4, 4, 4, 4), (2,))
    """
    doublings = max(1, int(math.log2(max(2, min(height, width) / 2))))
    stages = min(doublings, max(3, -(-doublings // 2)))
    fours = doublings - stages
    return (4,) * fours + (2,) * (stages - fours)
