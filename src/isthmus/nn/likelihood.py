"""How likely the whole numbers of a latent are: laws to train with, and to freeze into tables.

::

    training   y + U(-1/2, 1/2)  ──▶ bits of each element, differentiable
    otherwise  round(y)          ──▶ bits of each element, what a range coder needs

Likelihoods are floored at 1e-9, with a gradient that passes where it would raise them.

Factorised: J. Balle et al., "Variational image compression with a scale hyperprior", 2018,
arXiv:1802.01436, section 6.1. Gaussian: D. Minnen et al., 2018, arXiv:1809.02736.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus.errors import InvalidInputError
from isthmus.nn.whole_net import bounded

LEAST = 1e-9
"""Smallest likelihood."""

SCALES = 64
FIRST, LAST = 0.11, 256.0
"""Smallest and largest standard deviation of the table; 64 of them, evenly apart in logarithms."""

STEP = math.log(LAST / FIRST) / (SCALES - 1)
"""Logarithm of the ratio of two neighbours in the table."""


def bits_of(likelihood: Tensor) -> Tensor:
    """Bits, finite and with a gradient however unlikely."""
    return -torch.log2(bounded(likelihood, LEAST))


def noised(y: Tensor, training: bool) -> Tensor:
    """Whole numbers, or y with the noise that stands for rounding while training."""
    return y + torch.rand_like(y) - 0.5 if training else y.round()


def scale_at(index: Tensor) -> Tensor:
    """Standard deviations at places of the table, which need not be whole numbers.

    Example:
        >>> [round(float(s), 4) for s in scale_at(torch.tensor([0.0, 63.0]))]
        [0.11, 256.0]
    """
    return FIRST * torch.exp(index * STEP)


def index_of(scale: Tensor) -> Tensor:
    """The first place of the table that is no smaller than a standard deviation, int64 [...].

    Example:
        >>> index_of(torch.tensor([0.01, 0.11, 0.12, 1e9])).tolist()
        [0, 0, 1, 63]
    """
    place = torch.log(scale.double().clamp(min=FIRST) / FIRST) / STEP
    return (place - 1e-6).ceil().clamp(0, SCALES - 1).long()


class GaussianConditional(nn.Module):
    """Normal laws over a unit: ``Phi((1/2 - d) / s) - Phi((-1/2 - d) / s)`` with d = abs(y - mu).

    Args:
        whole: Outside training, round y itself and leave the mean to the table; off, round y - mu
            and add mu again, which needs tables of mean 0 only.

    Example:
        >>> law = GaussianConditional().eval()
        >>> y, bits = law(torch.tensor([0.3]), torch.tensor([0.0]), torch.tensor([1.0]))
        >>> y.tolist(), round(float(2**-bits), 4)  # within half a standard deviation: 0.3829
        ([0.0], 0.3829)
    """

    def __init__(self, whole: bool = True) -> None:
        super().__init__()
        self.whole = whole

    def forward(self, y: Tensor, mean: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Latents [...], means and standard deviations to values and their bits [...]."""
        if self.training or self.whole:
            value = noised(y, self.training)
        else:
            value = (y - mean).round() + mean
        return value, self.bits(value, mean, scale)

    @staticmethod
    def bits(value: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
        """Bits of values as they are."""
        far, unit = (value - mean).abs(), math.sqrt(2) * bounded(scale, FIRST)
        # Phi(x) = erfc(-x / sqrt 2) / 2; on this side of the mean, both are small and exact
        return bits_of((torch.erfc((far - 0.5) / unit) - torch.erfc((far + 0.5) / unit)) / 2)


class Factorised(nn.Module):
    """A law of its own for each channel, the same everywhere in it, of no given shape.

    A cumulative law is a net of one input that cannot fall: ``x <- softplus(M_k) x + b_k``, then
    ``x <- x + tanh(a_k) tanh(x)`` but for the last; its sigmoid is c, and p(n) is
    ``c(n + 1/2) - c(n - 1/2)``.

    Args:
        channels: C.
        filters: Widths of the net.
        init_scale: How wide laws begin.
        tail_mass: Mass beyond the reach of the tables.

    Raises:
        InvalidInputError: No channels, or a mass that is none.
    """

    def __init__(
        self,
        channels: int,
        filters: Sequence[int] = (3, 3, 3, 3),
        init_scale: float = 10.0,
        tail_mass: float = 1e-9,
    ) -> None:
        super().__init__()
        if channels < 1 or not 0 < tail_mass < 1:
            raise InvalidInputError(
                f"give 1 channel or more and a tail between 0 and 1, not {channels}, {tail_mass}"
            )
        self.channels, self.tail_mass = channels, tail_mass
        widths = (1, *filters, 1)
        scale = init_scale ** (1 / (len(filters) + 1))
        self.matrices, self.biases, self.factors = (nn.ParameterList() for _ in range(3))
        for a, b in itertools.pairwise(widths):
            start = math.log(math.expm1(1 / scale / b))
            self.matrices.append(nn.Parameter(torch.full((channels, b, a), start)))
            self.biases.append(nn.Parameter(torch.rand(channels, b, 1) - 0.5))
        for b in filters:
            self.factors.append(nn.Parameter(torch.zeros(channels, b, 1)))

    def logits(self, x: Tensor) -> Tensor:
        """Logits of the cumulative laws at places [C, N]."""
        y = x[:, None]
        for k, (matrix, bias) in enumerate(zip(self.matrices, self.biases, strict=True)):
            y = F.softplus(matrix.to(x)) @ y + bias.to(x)
            if k < len(self.factors):
                y = y + torch.tanh(self.factors[k].to(x)) * torch.tanh(y)
        return y[:, 0]

    def bits(self, value: Tensor) -> Tensor:
        """Bits of values [B, C, ...] as they are."""
        rows = value.movedim(1, 0).reshape(self.channels, -1)
        low, high = self.logits(rows - 0.5), self.logits(rows + 0.5)
        # on the side where both sigmoids are small, their difference is exact
        sign = -torch.sign(low + high).detach()
        mass = (torch.sigmoid(sign * high) - torch.sigmoid(sign * low)).abs()
        shape = (self.channels, value.shape[0], *value.shape[2:])
        return bits_of(mass).reshape(shape).movedim(0, 1)

    def forward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Latents [B, C, ...] to values and their bits."""
        value = noised(y, self.training)
        return value, self.bits(value)

    @torch.no_grad()
    def tails(self) -> tuple[Tensor, Tensor]:
        """Places [C] below and above which half the tail mass lies each, by bisection."""
        target = math.log(2 / self.tail_mass - 1)
        found = []
        for wanted in (-target, target):
            low = torch.full((self.channels, 1), -(2.0**20), dtype=torch.float64)
            high = -low
            for _ in range(60):
                middle = (low + high) / 2
                below = self.logits(middle) < wanted
                low, high = torch.where(below, middle, low), torch.where(below, high, middle)
            found.append(low[:, 0])
        return found[0], found[1]

    @torch.no_grad()
    def masses(self, reach: int) -> list[tuple[int, list[float]]]:
        """For each channel the first whole number within its tails, and masses from there on.

        Args:
            reach: Whole numbers farther than this from 0 are left out.
        """
        low, high = self.tails()
        out = []
        for c in range(self.channels):
            first = max(-reach, min(reach, math.floor(float(low[c]))))
            last = max(first, min(reach, math.ceil(float(high[c]))))
            grid = torch.arange(first, last + 1, dtype=torch.float64)
            rows = grid.expand(self.channels, -1)
            below, above = (self.logits(rows + side)[c].sigmoid() for side in (-0.5, 0.5))
            out.append((first, (above - below).tolist()))
        return out
