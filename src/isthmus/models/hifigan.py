"""HiFi-GAN: between sound and a few vectors a second, every rate with eyes of several widths.

::

    [B, D, T] ─▶ conv 7 ─▶ (leaky ReLU, transposed conv, fusion) for each stride ─▶ conv 7 ─▶ tanh
    [B, 1, N] ─▶ conv 7 ─▶ (leaky ReLU, conv, fusion, normalised) for each stride ─▶ conv 3

    fusion: the mean of residual blocks, one for each kernel size, over several dilations each

After Kong et al., "HiFi-GAN", 2020 (arXiv 2010.05646), section 2.2, and for the mirrored encoder
Yang et al., "HiFi-Codec", 2023 (arXiv 2305.02765). Nothing is causal. Layers of the generator are
named as in transformers' ``SpeechT5HifiGan``, so that its weights load (:func:`from_hub`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from isthmus.errors import InvalidInputError, MismatchError

SLOPE = 0.1
"""Of the leaky ReLUs."""

_BRANCH = 0.5
"""Spread that a residual branch begins with, beside a way around it of spread 1."""


def _conv(inputs: int, outputs: int, kernel: int, dilation: int = 1) -> nn.Module:
    """A convolution of weights that are normalised, to as many places."""
    padding = (kernel - 1) // 2 * dilation
    conv = nn.Conv1d(inputs, outputs, kernel, dilation=dilation, padding=padding)
    normalised: nn.Module = weight_norm(conv)
    return normalised


def _kernel(stride: int) -> tuple[int, int]:
    """Kernel and padding of a layer that changes the rate, from N places to s N or N / s."""
    kernel = 2 * stride + stride % 2
    return kernel, (kernel - stride) // 2


class ResidualBlock(nn.Module):
    """For each dilation: leaky ReLU, dilated conv, leaky ReLU, conv, and a way around them.

    Args:
        width: C.
        kernel: k, odd.
        dilations: Of the first convolution of each pair.
    """

    def __init__(self, width: int, kernel: int, dilations: Sequence[int]) -> None:
        super().__init__()
        self.convs1 = nn.ModuleList(_conv(width, width, kernel, d) for d in dilations)
        self.convs2 = nn.ModuleList(_conv(width, width, kernel) for _ in dilations)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, N] to the same."""
        for first, second in zip(self.convs1, self.convs2, strict=True):
            x = x + second(F.leaky_relu(first(F.leaky_relu(x, SLOPE)), SLOPE))
        return x


def _block_reach(kernels: Sequence[int], dilations: Sequence[int]) -> int:
    return (max(kernels) - 1) // 2 * (sum(dilations) + len(dilations))


class _Net(nn.Module):
    """What generator and encoder share.

    Attributes:
        hop: Samples of a vector.
        reach: How many vectors away something may be to count: a vector for a place of the sound,
            or the sound for a vector, but for the encoder's normalisation, which sees all.
    """

    def __init__(
        self,
        width: int,
        strides: Sequence[int],
        kernels: Sequence[int],
        dilations: Sequence[int],
    ) -> None:
        super().__init__()
        if not strides or not kernels or min(*strides, *dilations) < 1:
            raise InvalidInputError("HiFi-GAN has strides, kernels and dilations of 1 or more")
        if any(k % 2 == 0 or k < 1 for k in kernels):
            raise InvalidInputError(f"kernels of residual blocks are odd, got {list(kernels)}")
        self.hop, self.sizes = math.prod(strides), len(kernels)
        self.widths = [width * 2**i for i in range(len(strides) + 1)]

    def _reach(self, strides: Sequence[int], inner: int, outer: int, last: int) -> int:
        """From the sound on: a block at the rate before (inner) or after a change of it (outer)."""
        reach = 3.0
        for stride in strides:
            kernel, padding = _kernel(stride)
            reach = (reach + inner + kernel - padding) / stride + outer
        return math.ceil(reach + last)

    def _blocks(self, kernels: Sequence[int], dilations: Sequence[int], widths: Any) -> Any:
        return nn.ModuleList(ResidualBlock(c, k, dilations) for c in widths for k in kernels)

    def _fused(self, x: Tensor, stage: int) -> Tensor:
        """The mean of a stage's blocks (section 2.2: multi-receptive-field fusion)."""
        blocks: Any = self.resblocks
        norms: Any = getattr(self, "norms", None)
        total = torch.zeros_like(x)
        for i in range(stage * self.sizes, (stage + 1) * self.sizes):
            y = blocks[i](x)
            total = total + (y if norms is None else norms[i](y))
        return total / self.sizes


class HiFiGANGenerator(_Net):
    """Vectors to sound within [-1, 1].

    Args:
        dim: D of the vectors.
        width: C next to the sound; doubled at every stride away from it.
        strides: From the sound on; (8, 5, 4, 2) is 320 samples a vector.
        kernels: Sizes of the blocks of a fusion.
        dilations: Of every block.

    Raises:
        InvalidInputError: A size is out of range.

    Example:
        >>> net = HiFiGANGenerator(16, 4, (4, 2), (3, 5), (1, 2))
        >>> net(torch.zeros(1, 16, 3)).shape, net.hop
        (torch.Size([1, 1, 24]), 8)
    """

    def __init__(
        self,
        dim: int = 512,
        width: int = 32,
        strides: Sequence[int] = (2, 4, 5, 8),
        kernels: Sequence[int] = (3, 7, 11),
        dilations: Sequence[int] = (1, 3, 5),
    ) -> None:
        super().__init__(width, strides, kernels, dilations)
        wide = self.widths[::-1]
        self.conv_pre = _conv(dim, wide[0], 7)
        self.upsampler = nn.ModuleList()
        for a, b, stride in zip(wide, wide[1:], reversed(strides), strict=False):
            kernel, padding = _kernel(stride)
            up = nn.ConvTranspose1d(a, b, kernel, stride, padding=padding)
            self.upsampler.append(weight_norm(up))
        self.resblocks = self._blocks(kernels, dilations, wide[1:])
        self.conv_post = _conv(width, 1, 7)
        self.reach = self._reach(strides, _block_reach(kernels, dilations), 0, 3)

    def forward(self, z: Tensor) -> Tensor:
        """[B, D, T] to [B, 1, hop T]."""
        x: Tensor = self.conv_pre(z)
        for stage, up in enumerate(self.upsampler):
            x = self._fused(up(F.leaky_relu(x, SLOPE)), stage)
        x = self.conv_post(F.leaky_relu(x))  # of slope 0.01, as published
        return torch.tanh(x)


class HiFiGANEncoder(_Net):
    """Sound to vectors; arguments as of :class:`HiFiGANGenerator`.

    Every block's output is normalised over time in groups of 16 channels.
    """

    def __init__(
        self,
        dim: int = 512,
        width: int = 32,
        strides: Sequence[int] = (2, 4, 5, 8),
        kernels: Sequence[int] = (3, 7, 11),
        dilations: Sequence[int] = (1, 3, 5),
    ) -> None:
        super().__init__(width, strides, kernels, dilations)
        wide = self.widths
        self.conv_pre = _conv(1, width, 7)
        self.downsampler = nn.ModuleList()
        for a, b, stride in zip(wide, wide[1:], strides, strict=False):
            kernel, padding = _kernel(stride)
            self.downsampler.append(weight_norm(nn.Conv1d(a, b, kernel, stride, padding)))
        self.resblocks = self._blocks(kernels, dilations, wide[1:])
        self.norms = nn.ModuleList(
            nn.GroupNorm(c // 16 if c % 16 == 0 else 1, c, eps=1e-6)
            for c in wide[1:]
            for _ in kernels
        )
        self.conv_post = _conv(wide[-1], dim, 3)
        self.reach = self._reach(strides, 0, _block_reach(kernels, dilations), 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 1, N] to [B, D, N / hop]; N is a multiple of the hop."""
        x = self.conv_pre(x)
        for stage, down in enumerate(self.downsampler):
            x = self._fused(down(F.leaky_relu(x, SLOPE)), stage)
        y: Tensor = self.conv_post(F.leaky_relu(x))
        return y


@torch.no_grad()
def level(encoder: HiFiGANEncoder, decoder: HiFiGANGenerator, sounds: Tensor) -> None:
    """Scale weights so that nothing fades or grows on the way: few steps of training are wasted.

    One pass goes through both nets; each convolution is scaled as it is met until it lets out
    spread 1, a residual branch half of that, and the last one the spread of the sounds (after
    Mishkin and Matas, "All you need is a good init", 2015). Biases begin at 0.

    Args:
        encoder: Its weights are scaled.
        decoder: Reads what the encoder gives; scaled, too.
        sounds: [B, 1, N], N a multiple of the hop, not silent.

    Raises:
        InvalidInputError: The examples are silent.

    Example:
        >>> nets = HiFiGANEncoder(8, 2, (4,), (3,), (1,)), HiFiGANGenerator(8, 2, (4,), (3,), (1,))
        >>> level(*nets, torch.randn(2, 1, 400))
        >>> nets[0](torch.randn(2, 1, 4000)).std().round(decimals=1).item()
        1.0
    """
    if not sounds.std() > 0:
        raise InvalidInputError("silent examples have no level; give others")
    hooks, wanted = [], {id(decoder.conv_post): float(sounds.std())}
    for net in (encoder, decoder):
        for part in net.modules():
            if isinstance(part, ResidualBlock):
                wanted |= dict.fromkeys(map(id, part.convs2), _BRANCH)

    def scaled(part: Any, given: Any, out: Tensor) -> Tensor:
        factor = wanted.get(id(part), 1.0) / out.std().clamp(min=1e-12)
        part.parametrizations.weight.original0.mul_(factor)
        return out * factor

    for net in (encoder, decoder):
        for part in net.modules():
            if isinstance(part, nn.Conv1d | nn.ConvTranspose1d):
                assert part.bias is not None
                part.bias.zero_()
                hooks.append(part.register_forward_hook(scaled))
    try:
        decoder(encoder(sounds))
    finally:
        for hook in hooks:
            hook.remove()


def from_hub(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of transformers' ``SpeechT5HifiGan`` under the names of :class:`HiFiGANGenerator`.

    Args:
        weights: Its state dict, weights not normalised. ``mean`` and ``scale`` of its inputs are
            left out: apply them before.

    Raises:
        MismatchError: A name that no such model has.
    """
    found = {}
    for name, value in weights.items():
        part, _, kind = name.rpartition(".")
        if name in ("mean", "scale"):
            continue
        if part.split(".")[0] not in ("conv_pre", "upsampler", "resblocks", "conv_post"):
            raise MismatchError(f"{name} is no weight of a SpeechT5HifiGan")
        if kind == "weight":  # a length for each row, and directions
            found[f"{part}.parametrizations.weight.original0"] = value.norm(
                dim=(1, 2), keepdim=True
            )
            found[f"{part}.parametrizations.weight.original1"] = value
        else:
            found[name] = value
    return found
