"""SEANet: convolutions and an LSTM between sound and a few vectors a second, whole or in a stream.

::

    [B, 1, N] ─▶ conv 7 ─▶ (residual, ELU, conv 2s / s) for each stride ─▶ LSTM ─▶ conv 7
    [B, D, T] ─▶ conv 7 ─▶ LSTM ─▶ (ELU, transposed conv 2s x s, residual) ... ─▶ conv 7

After Tagliasacchi et al., "SEANet", 2020, as Défossez et al., "High Fidelity Neural Audio
Compression", 2022 (arXiv 2210.13438), section 3.2, have it. Layers are named as in transformers'
``EncodecModel``, so that its weights load (:func:`from_hub`).

Causal nets pad on the left only, cut transposed convolutions on the right only, and so stream: what
a stream gives is what the whole gives.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

from isthmus.errors import InvalidInputError, MismatchError

States = list[Any]
"""What a stream keeps, one entry for each part that remembers, in the order of the net."""

LOUD = 3.0
"""Spread of what the first layer lets out: ELUs are straight lines for sounds as they come."""

Pad = Literal["constant", "reflect"]


class Conv(nn.Module):
    """A convolution whose output has ``ceil(N / stride)`` places.

    Args:
        inputs: Channels in.
        outputs: Channels out.
        kernel: k.
        stride: s; N is a multiple of it in a stream.
        dilation: d.
        causal: Whether all ``(k - 1) d - (s - 1)`` places of padding are on the left, with
            normalised weights; if not, they are on both sides, and outputs are normalised.
        pad: With zeros, or mirrored.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        stride: int = 1,
        dilation: int = 1,
        *,
        causal: bool = True,
        pad: Pad = "constant",
    ) -> None:
        super().__init__()
        self.causal, self.pad, self.stride = causal, pad, stride
        self.reach = (kernel - 1) * dilation + 1 - stride
        conv = nn.Conv1d(inputs, outputs, kernel, stride, dilation=dilation)
        self.conv = weight_norm(conv) if causal else conv
        self.norm = None if causal else nn.GroupNorm(1, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, N] to [B, outputs, ceil(N / stride)]."""
        more = -x.shape[-1] % self.stride
        right = 0 if self.causal else self.reach // 2
        y: Tensor = self.conv(_padded(x, self.reach - right, right + more, self.pad))
        return y if self.norm is None else self.norm(y)

    def step(self, x: Tensor, states: States, at: int) -> tuple[Tensor, int]:
        """A piece; the last inputs are kept in ``states[at]``."""
        if states[at] is None:
            states[at] = x.new_zeros(*x.shape[:2], self.reach)
        x = torch.cat([states[at], x], -1)
        states[at] = x[..., x.shape[-1] - self.reach :]
        return self.conv(x), at + 1


def _padded(x: Tensor, left: int, right: int, mode: Pad) -> Tensor:
    if mode != "reflect" or not (left or right):
        return F.pad(x, (left, right))
    # a mirror needs more places than it fills
    extra = max(0, max(left, right) - x.shape[-1] + 1)
    y = F.pad(F.pad(x, (0, extra)), (left, right), "reflect")
    return y[..., : y.shape[-1] - extra]


class TransposedConv(nn.Module):
    """A transposed convolution of kernel 2s and stride s, to s places for each.

    Args:
        inputs: Channels in.
        outputs: Channels out.
        stride: s.
        causal: Whether what is too long is cut on the right only.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, *, causal: bool = True) -> None:
        super().__init__()
        self.causal, self.stride = causal, stride
        conv = nn.ConvTranspose1d(inputs, outputs, 2 * stride, stride)
        self.conv = weight_norm(conv) if causal else conv
        self.norm = None if causal else nn.GroupNorm(1, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, T] to [B, outputs, s T]."""
        y: Tensor = self.conv(x)
        if self.norm is not None:
            y = self.norm(y)
        right = self.stride if self.causal else self.stride // 2
        return y[..., self.stride - right : y.shape[-1] - right]

    def step(self, x: Tensor, states: States, at: int) -> tuple[Tensor, int]:
        """A piece; what reaches beyond it is kept."""
        conv = self.conv
        y = F.conv_transpose1d(x, conv.weight, None, self.stride)
        if states[at] is not None:
            y = torch.cat([y[..., : self.stride] + states[at], y[..., self.stride :]], -1)
        done = x.shape[-1] * self.stride
        states[at] = y[..., done:]
        assert conv.bias is not None
        return y[..., :done] + conv.bias[:, None], at + 1


class SkipLSTM(nn.Module):
    """Layers of LSTM, added to what they read.

    Args:
        width: C.
        layers: How many.
    """

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, width, layers)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T] to the same."""
        t = x.permute(2, 0, 1)
        y: Tensor = self.lstm(t)[0] + t
        return y.permute(1, 2, 0)

    def step(self, x: Tensor, states: States, at: int) -> tuple[Tensor, int]:
        """A piece; the state of the cells is kept."""
        t = x.permute(2, 0, 1)
        y, states[at] = self.lstm(t, states[at])
        return (y + t).permute(1, 2, 0), at + 1


class Residual(nn.Module):
    """ELU, conv 3, ELU, conv 1, around which there is a way: itself a conv 1, or nothing.

    Args:
        width: C.
        dilation: Of the first convolution.
        kernel: Of it.
        compress: C over the channels inside.
        skip: Whether the way around is a convolution.
        causal: See :class:`Conv`.
        pad: See there.
    """

    def __init__(
        self,
        width: int,
        dilation: int,
        kernel: int = 3,
        compress: int = 2,
        *,
        skip: bool = True,
        causal: bool = True,
        pad: Pad = "constant",
    ) -> None:
        super().__init__()
        inner = width // compress
        first = Conv(width, inner, kernel, dilation=dilation, causal=causal, pad=pad)
        second = Conv(inner, width, 1, causal=causal, pad=pad)
        self.block = nn.ModuleList([nn.ELU(), first, nn.ELU(), second])
        self.shortcut = Conv(width, width, 1, causal=causal, pad=pad) if skip else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, N] to the same."""
        y = x
        for layer in self.block:
            y = layer(y)
        out: Tensor = self.shortcut(x) + y
        return out

    def step(self, x: Tensor, states: States, at: int) -> tuple[Tensor, int]:
        """A piece; the first convolution remembers."""
        y, at = self.block[1].step(F.elu(x), states, at)  # type: ignore[operator]
        y = self.block[3].conv(F.elu(y))  # type: ignore[operator]
        way = self.shortcut.conv(x) if isinstance(self.shortcut, Conv) else x
        return way + y, at


class _Net(nn.Module):
    """Layers one behind the other, whole or in pieces."""

    layers: nn.ModuleList

    def forward(self, x: Tensor) -> Tensor:
        """The whole."""
        for layer in self.layers:
            x = layer(x)
        return x

    def init_state(self) -> States:
        """The state before the first piece.

        Raises:
            InvalidInputError: The net is not causal, or pads with a mirror.
        """
        if any(
            isinstance(m, Conv) and (not m.causal or m.pad != "constant") for m in self.modules()
        ):
            raise InvalidInputError("only a causal SEANet that pads with zeros can stream")
        kinds = (Conv, TransposedConv, SkipLSTM, Residual)
        return [None] * sum(isinstance(layer, kinds) for layer in self.layers)

    @torch.no_grad()
    def step(self, x: Tensor, states: States) -> tuple[Tensor, States]:
        """Take in a piece, and give what it completes.

        Args:
            x: Of the encoder, [B, 1, N] with N a multiple of the strides' product; of the decoder,
                [B, D, T] of any T.
            states: From the piece before; left as it is.
        """
        if not x.shape[-1]:
            last: Any = self.layers[-1]
            return x.new_zeros(len(x), last.conv.out_channels, 0), states
        states, at = list(states), 0
        for layer in self.layers:
            if isinstance(layer, Conv | TransposedConv | SkipLSTM | Residual):
                x, at = layer.step(x, states, at)
            else:
                x = layer(x)
        return x, states


class SEANetEncoder(_Net):
    """Sound to vectors.

    Args:
        width: C of the first convolution; doubled at every stride.
        dim: D of the vectors.
        strides: From the sound on; (2, 4, 5, 8) is 320 samples a vector.
        channels: Of the sound.
        units: Residual units at every stride, of dilations 1, 2, 4 ...
        lstm: Layers.
        kernel: Of the first convolution.
        last_kernel: Of the last one.
        skip: See :class:`Residual`.
        causal: See :class:`Conv`.
        pad: See there.

    Example:
        >>> net = SEANetEncoder(4, 16)
        >>> net(torch.zeros(1, 1, 640)).shape, net.hop
        (torch.Size([1, 16, 2]), 320)
    """

    def __init__(
        self,
        width: int = 32,
        dim: int = 128,
        strides: Sequence[int] = (2, 4, 5, 8),
        *,
        channels: int = 1,
        units: int = 1,
        lstm: int = 2,
        kernel: int = 7,
        last_kernel: int = 7,
        skip: bool = True,
        causal: bool = True,
        pad: Pad = "constant",
    ) -> None:
        super().__init__()
        self.hop = math.prod(strides)
        how: Any = {"causal": causal, "pad": pad}
        layers: list[nn.Module] = [Conv(channels, width, kernel, **how)]
        for stride in strides:
            layers += [Residual(width, 2**j, skip=skip, **how) for j in range(units)]
            layers += [nn.ELU(), Conv(width, 2 * width, 2 * stride, stride, **how)]
            width *= 2
        layers += [SkipLSTM(width, lstm)] if lstm else []
        layers += [nn.ELU(), Conv(width, dim, last_kernel, **how)]
        self.layers = nn.ModuleList(layers)


class SEANetDecoder(_Net):
    """Vectors to sound; arguments as of :class:`SEANetEncoder`, ``strides`` too in its order."""

    def __init__(
        self,
        width: int = 32,
        dim: int = 128,
        strides: Sequence[int] = (2, 4, 5, 8),
        *,
        channels: int = 1,
        units: int = 1,
        lstm: int = 2,
        kernel: int = 7,
        last_kernel: int = 7,
        skip: bool = True,
        causal: bool = True,
        pad: Pad = "constant",
    ) -> None:
        super().__init__()
        self.hop = math.prod(strides)
        how: Any = {"causal": causal, "pad": pad}
        wide = width * 2 ** len(strides)
        layers: list[nn.Module] = [Conv(dim, wide, kernel, **how)]
        layers += [SkipLSTM(wide, lstm)] if lstm else []
        for stride in reversed(strides):
            layers += [nn.ELU(), TransposedConv(wide, wide // 2, stride, causal=causal)]
            wide //= 2
            layers += [Residual(wide, 2**j, skip=skip, **how) for j in range(units)]
        layers += [nn.ELU(), Conv(width, channels, last_kernel, **how)]
        self.layers = nn.ModuleList(layers)


@torch.no_grad()
def level(encoder: nn.Module, decoder: nn.Module, sounds: Tensor) -> None:
    """Draw weights anew so that nothing fades on the way: few steps of training are wasted then.

    By torch's own start every convolution takes in variance 1 and lets out less than 1/3; behind a
    dozen of them hardly anything of the sound is left. Here weights have variance ``1.44 / fan-in``
    (the ELU takes about as much away), two ways that meet bring half each, and the last layers are
    scaled so that vectors have variance 1 and sounds that of the examples (after Mishkin and Matas,
    "All you need is a good init", 2015). The first layer lets out a spread of :data:`LOUD`: what
    sounds have in common, energy in bands, comes from bent lines, and near 0 an ELU is straight.

    Args:
        encoder: A causal :class:`SEANetEncoder`, whose weights are replaced.
        decoder: The :class:`SEANetDecoder` behind it, too.
        sounds: [B, 1, N], N a multiple of the hop, not silent.

    Raises:
        InvalidInputError: The examples are silent.
    """
    if not sounds.std() > 0:
        raise InvalidInputError("silent examples have no level; give others")
    for net in (encoder, decoder):
        meets = [m for m in net.modules() if isinstance(m, Residual)]
        halves = {id(part) for m in meets for part in (m.block[3], m.shortcut)}
        for part in net.modules():
            if isinstance(part, Conv | TransposedConv):
                _, inputs, kernel = part.conv.weight.shape
                if isinstance(part, TransposedConv):
                    # two places of the kernel meet at every place of the output
                    inputs, kernel = part.conv.in_channels, 2
                gain = 0.72 if id(part) in halves else 1.44
                drawn = torch.randn(part.conv.weight.shape) * (gain / inputs / kernel) ** 0.5
                part.conv.weight = drawn.to(part.conv.weight)
                assert part.conv.bias is not None
                part.conv.bias.zero_()
    start: Any = encoder
    first = start.layers[0]
    first.conv.weight = first.conv.weight * (LOUD / first(sounds).std())
    x = sounds
    for net, wanted in ((encoder, torch.ones(())), (decoder, sounds.std())):
        whole: Any = net
        last = whole.layers[-1]
        last.conv.weight = last.conv.weight * (wanted / net(x).std())
        x = net(x)


def folded(net: nn.Module) -> Any:
    """A copy for use alone, whose normalised weights are computed once."""
    plain: dict[int, Any] = {}  # what a copy takes in the place of a convolution
    for part in net.modules():
        if parametrize.is_parametrized(part, "weight"):
            assert isinstance(part, nn.Conv1d | nn.ConvTranspose1d)
            kind = nn.Conv1d if isinstance(part, nn.Conv1d) else nn.ConvTranspose1d
            sizes = (part.in_channels, part.out_channels, part.kernel_size, part.stride)
            how: Any = {"dilation": part.dilation, "padding": part.padding, "groups": part.groups}
            conv: Any = kind(*sizes, **how)  # type: ignore[arg-type]
            conv.weight, conv.bias = (
                nn.Parameter(part.weight.detach().clone()),
                copy.deepcopy(part.bias),
            )
            plain[id(part)] = conv
    return copy.deepcopy(net, plain).eval().requires_grad_(False)


_CODEBOOK = {"embed": "embed", "embed_avg": "total", "cluster_size": "count", "inited": "ready"}


def from_hub(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of transformers' ``EncodecModel`` under the names of ours.

    Args:
        weights: Its state dict; weights normalised in the old form (``weight_g``) as well.

    Returns:
        Names that begin with ``encoder.``, ``decoder.`` and ``quantizer.``.

    Raises:
        MismatchError: A name that no such model has.
    """
    found = {}
    for name, value in weights.items():
        parts = name.split(".")
        if parts[0] == "quantizer" and len(parts) == 5 and parts[4] in _CODEBOOK:
            new = ".".join([*parts[:3], _CODEBOOK[parts[4]]])
            value = value.reshape(()).bool() if parts[4] == "inited" else value
        elif parts[0] in ("encoder", "decoder") and parts[1] == "layers":
            new = name.replace(".weight_g", ".parametrizations.weight.original0")
            new = new.replace(".weight_v", ".parametrizations.weight.original1")
        else:
            raise MismatchError(f"{name} is no weight of an EncodecModel")
        found[new] = value
    return found
