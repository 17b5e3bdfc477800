"""Convolutions of whole numbers, which every machine computes alike.

::

    training   x ──▶ conv, clamp ──▶ ...          floating point, with or without the grid
    frozen     n ──▶ conv of whole numbers ──▶ floor((acc m + 2^(s-1)) / 2^s) ──▶ clamp ──▶ ...

Weights are 8-bit, activations a few bits more or less, and all of them are whole numbers held in
float64, where every sum below 2^53 is exact: in any order, with any library, on any chip. A network
that picks the tables of an entropy coder has to be of this kind, or an encoder and a decoder on
unlike machines come apart (the black squares of learned codecs).

Up-sampling is pixel shuffle: a transposed convolution would be no different in exactness and worse
in its checkered artefacts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus.errors import InvalidInputError

HIDDEN = 1 / 32
"""What one unit of a hidden activation counts; 8 bits reach from 0 to 8."""


class _Bounded(torch.autograd.Function):
    """Clamping whose gradient also passes where a step along it would lead back inside."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.limits = low, high
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (x,), (low, high) = ctx.saved_tensors, ctx.limits
        shut = ((x < low) & (gradient > 0)) | ((x > high) & (gradient < 0))
        return gradient.masked_fill(shut, 0.0), None, None


def bounded(x: Tensor, low: float, high: float = float("inf")) -> Tensor:
    """Clamped values whose gradient passes inside, and outside where it leads back.

    Args:
        x: [...].
        low: Least value.
        high: Largest value.

    Example:
        >>> x = torch.tensor([0.0, 0.0], requires_grad=True)
        >>> (bounded(x, 1.0) * torch.tensor([1.0, -1.0])).sum().backward()
        >>> x.grad.tolist()  # a step down the first would lead away from 1
        [0.0, -1.0]
    """
    found: Tensor = _Bounded.apply(x, low, high)  # type: ignore[no-untyped-call]
    return found


def rounded(x: Tensor) -> Tensor:
    """The nearest whole number, with the gradient of x (straight through)."""
    return x + (x.round() - x).detach()


@dataclass(frozen=True, eq=False)
class WholeConv:
    """A convolution of whole numbers, ready to run; tensors are float64 and hold whole numbers.

    Attributes:
        weight: [C', C, k, k], from -127 to 127.
        bias: [C'].
        multiplier: [C'], from 2^14 to 2^15.
        shift: [C'], powers of two: what a sum times its multiplier is divided by.
        low: Least value that comes out.
        high: Largest value that comes out.
        shuffle: Factor of the pixel shuffle that follows.
    """

    weight: Tensor
    bias: Tensor
    multiplier: Tensor
    shift: Tensor
    low: int
    high: int
    shuffle: int = 1

    def __call__(self, x: Tensor) -> Tensor:
        """Whole numbers float64 [B, C, H, W] to [B, C' / shuffle^2, H shuffle, W shuffle].

        Example:
            >>> ones, three = torch.ones(1, dtype=torch.float64), torch.full((1, 1, 1, 1), 3.0)
            >>> double = WholeConv(three.double(), 0 * ones, 2**14 * ones, 2**15 * ones, 0, 9)
            >>> double(torch.tensor([[[[-1.0, 2.0, 3.0, 9.0]]]]).double()).tolist()  # 3 x / 2
            [[[[0.0, 3.0, 5.0, 9.0]]]]
        """
        acc = F.conv2d(x, self.weight, padding=self.weight.shape[-1] // 2)
        shift = self.shift[:, None, None]
        scaled = (acc + self.bias[:, None, None]) * self.multiplier[:, None, None]
        return F.pixel_shuffle(
            torch.floor((scaled + shift / 2) / shift).clamp(self.low, self.high), self.shuffle
        )

    def tensors(self) -> dict[str, Tensor]:
        """What it is made of, as integers for a file."""
        limits = torch.tensor([self.low, self.high, self.shuffle])
        return {
            "weight": self.weight.to(torch.int8),
            "bias": self.bias.long(),
            "multiplier": self.multiplier.to(torch.int32),
            "shift": torch.frexp(self.shift).exponent - 1,
            "limits": limits,
        }

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> WholeConv:
        """What :meth:`tensors` has come from."""
        low, high, shuffle = tensors["limits"].tolist()
        one = torch.ones(len(tensors["shift"]), dtype=torch.float64)
        shift = torch.ldexp(one, tensors["shift"])
        weight, bias, multiplier = (tensors[n].double() for n in ("weight", "bias", "multiplier"))
        return cls(weight, bias, multiplier, shift, low, high, shuffle)


class WholeConvolution(nn.Module):
    """A convolution that is trained in floating point and frozen to whole numbers.

    Args:
        inputs: Channels C.
        outputs: Channels that come out, before shuffling.
        kernel: Side k, odd.
        step_in: What one unit of the input counts.
        step_out: What one unit of the output counts.
        low: Least whole number that comes out; 0 makes a rectifier.
        high: Largest whole number that comes out.
        shuffle: Factor of a pixel shuffle after it.

    Raises:
        InvalidInputError: An even kernel, or outputs that cannot be shuffled.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 3,
        *,
        step_in: float = HIDDEN,
        step_out: float = HIDDEN,
        low: int = 0,
        high: int = 255,
        shuffle: int = 1,
    ) -> None:
        super().__init__()
        if kernel % 2 == 0 or outputs % shuffle**2:
            raise InvalidInputError(
                f"a kernel is odd and {shuffle**2} divides the outputs, got {kernel} and {outputs}"
            )
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)
        nn.init.kaiming_uniform_(self.conv.weight, nonlinearity="relu")
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]
        self.steps, self.limits, self.shuffle = (step_in, step_out), (low, high), shuffle

    def forward(self, x: Tensor, exact: bool = False) -> Tensor:
        """Values [B, C, H, W], in real units, to values.

        Args:
            x: The input.
            exact: Keep weights and activations on their grids (fake quantisation): up to the
                rounding of multipliers, what the frozen network computes.
        """
        (low, high), out = self.limits, self.steps[1]
        if not exact:
            y = bounded(self.conv(x), low * out, high * out)
        else:
            grid, bias = self._grid(), self.conv.bias
            weight = rounded(self.conv.weight / grid) * grid
            unit = grid.flatten() * self.steps[0]
            y = F.conv2d(x, weight, rounded(bias / unit) * unit, padding=self.conv.padding)  # type: ignore[operator,arg-type]
            y = bounded(rounded(y / out), low, high) * out
        return F.pixel_shuffle(y, self.shuffle)

    def _grid(self) -> Tensor:
        """What one unit of a weight counts, [C', 1, 1, 1]."""
        return self.conv.weight.detach().abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-6) / 127

    @torch.no_grad()
    def frozen(self) -> WholeConv:
        """The same in whole numbers."""
        grid = self._grid().double()
        weight = (self.conv.weight.double() / grid).round()
        unit = grid.flatten() * self.steps[0]
        bias = (self.conv.bias.double() / unit).round().clamp(-(2.0**31), 2.0**31)  # type: ignore[union-attr]
        part, exponent = torch.frexp(unit / self.steps[1])  # of 1/2 to 1, and a power of two
        multiplier = (part * 2**15).round()
        shift = torch.ldexp(torch.ones_like(part), 15 - exponent)
        return WholeConv(weight, bias, multiplier, shift, *self.limits, self.shuffle)


class WholeNet(nn.Module):
    """Convolutions one after the other.

    Args:
        layers: The convolutions; what one gives out, the next takes in.

    Example:
        >>> net = WholeNet([WholeConvolution(1, 4, step_in=1.0, shuffle=2)])
        >>> net(torch.zeros(1, 1, 3, 5)).shape, run(net.frozen(), torch.zeros(1, 1, 3, 5)).shape
        (torch.Size([1, 1, 6, 10]), torch.Size([1, 1, 6, 10]))
    """

    def __init__(self, layers: Sequence[WholeConvolution]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, exact: bool = False) -> Tensor:
        """See :meth:`WholeConvolution.forward`."""
        for layer in self.layers:
            x = layer(x, exact)
        return x

    def frozen(self) -> list[WholeConv]:
        """The same in whole numbers."""
        return [layer.frozen() for layer in self.layers]  # type: ignore[operator]


@torch.no_grad()
def run(layers: Sequence[WholeConv], x: Tensor) -> Tensor:
    """Whole numbers [B, C, H, W] through frozen layers, float64."""
    x = x.double()
    for layer in layers:
        x = layer(x)
    return x
