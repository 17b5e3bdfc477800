"""Transform coding with learned parts: an autoencoder of pictures and the law of its latents.

::

    x ──g_a──▶ y ──round──▶ y^ ──g_s──▶ x^
               │            ▲ bits, by a normal law of each element
               h_a          │ mean, place in the table of standard deviations
               ▼            │
               z ──round──▶ z^ ──prior──▶ ┘ ◀── latents of earlier pictures, or none

The prior is of whole numbers (:mod:`isthmus.nn.whole_net`): what it says of means and deviations is
the same on every machine. Latents are rounded as they are, so what a picture is decoded to does not
depend on the prior.

Hyperprior: J. Balle et al., 2018, arXiv:1802.01436; D. Minnen et al., 2018, arXiv:1809.02736.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus.errors import InvalidInputError
from isthmus.nn.likelihood import Factorised, GaussianConditional, index_of, scale_at
from isthmus.nn.whole_net import WholeConv, WholeConvolution, WholeNet, rounded, run

HYPER = 4
"""How many times coarser z is than y, along each side."""

FRACTIONS = 8
"""A mean is a whole number of such parts."""

REACH = 255
"""Latents beyond this look like it to the prior."""

_LITTLE = 0.1
"""How large the last convolutions beside the waves begin: more is noise that costs decibels."""

_START = 8.0
"""How much larger z begins, so that rounding leaves something of it."""

_PAST = 1 / 8
"""What one unit of an earlier latent counts inside the prior."""

_INDEX = 1 / 8
"""What one place of the table counts while the prior is trained."""


def pad_to(x: Tensor, multiple: int) -> Tensor:
    """Pictures [B, C, H, W] with edges repeated to sides that a number divides.

    Example:
        >>> pad_to(torch.zeros(1, 3, 30, 64), 32).shape
        torch.Size([1, 3, 32, 64])
    """
    height, width = x.shape[-2:]
    return F.pad(x, (0, -width % multiple, 0, -height % multiple), mode="replicate")


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.GELU(), nn.Conv2d(width, width, 3, 1, 1), nn.GELU(), nn.Conv2d(width, width, 3, 1, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.body(x)
        return out


def cosines(latents: int, channels: int, side: int) -> Tensor:
    """The lowest waves of a block of pixels, [latents, channels, side, side], orthonormal.

    The planes of three colours are mixed to grey and two differences, which get half the waves.

    Example:
        >>> w = cosines(12, 3, 4).flatten(1)
        >>> bool(torch.allclose(w @ w.T, torch.eye(12), atol=1e-6)), float(w[0, 0])  # 1 / sqrt 48
        (True, 0.1443375...)
    """
    at = (torch.arange(side) + 0.5) * math.pi / side
    wave = torch.cos(torch.arange(side)[:, None] * at) * (2 / side) ** 0.5
    wave[0] /= 2**0.5
    planes = torch.eye(channels)
    if channels == 3:
        planes = torch.tensor([[1.0, 1, 1], [1, -1, 0], [1, 1, -2]])
        planes = planes / planes.norm(dim=1, keepdim=True)
    places = [(c, u, v) for c in range(channels) for u in range(side) for v in range(side)]
    places.sort(key=lambda p: ((p[1] ** 2 + p[2] ** 2 + (p[0] > 0)) * (4 if p[0] else 1), p))
    rows = [planes[c][:, None, None] * wave[u][:, None] * wave[v] for c, u, v in places[:latents]]
    return torch.stack(rows)


class Analysis(nn.Module):
    """g_a: convolutions of stride 2, beside a shortcut that begins as a block cosine transform.

    Args:
        channels: C.
        width: N, channels inside.
        latents: M.
        stages: Halvings.
        gain: How many times the waves of pixels of 0 to 1 latents begin as; steps of a gain-th.
        steady: Whether what is added to the waves is made small behind its weights, not in them:
            steps of Adam, alike for all weights, then change it little.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        latents: int,
        stages: int,
        gain: float = 12.0,
        steady: bool = False,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for stage in range(stages):
            layers += [nn.Conv2d(width if stage else channels, width, 5, 2, 2), nn.GELU()]
        last = nn.Conv2d(width, latents, 3, 1, 1)
        self.share = _LITTLE if steady else 1.0
        last.weight.data *= _LITTLE / self.share
        self.body = nn.Sequential(*layers, _Residual(width), last)
        side = 1 << stages
        self.shortcut = nn.Conv2d(channels, latents, side, side)
        _start(self.shortcut, cosines(latents, channels, side) * gain)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, M, H / 2^stages, W / 2^stages]."""
        y: Tensor = self.share * self.body(x) + self.shortcut(x)
        return y


class Synthesis(nn.Module):
    """g_s: convolutions and pixel shuffles, the way back of :class:`Analysis`.

    Args:
        channels: C.
        width: N, channels inside.
        latents: M.
        stages: Doublings.
        gain: Of the latents, see :class:`Analysis`.
        steady: See :class:`Analysis`; the gain is divided by behind the weights as well.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        latents: int,
        stages: int,
        gain: float = 12.0,
        steady: bool = False,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(latents, width, 3, 1, 1), _Residual(width)]
        for stage in range(stages):
            out = channels if stage == stages - 1 else width
            last = nn.Conv2d(width, 4 * out, 3, 1, 1)
            layers += [nn.GELU(), last, nn.PixelShuffle(2)]
        self.share, self.scale = (_LITTLE, 1 / gain) if steady else (1.0, 1.0)
        last.weight.data *= _LITTLE / gain / (self.share * self.scale)
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]
        self.body = nn.Sequential(*layers)
        side = 1 << stages
        self.shortcut = nn.ConvTranspose2d(latents, channels, side, side)
        _start(self.shortcut, cosines(latents, channels, side) / gain / self.scale)

    def forward(self, y: Tensor) -> Tensor:
        """[B, M, h, w] to [B, C, h 2^stages, w 2^stages]."""
        x: Tensor = self.scale * (self.share * self.body(y) + self.shortcut(y))
        return x


def _start(layer: Any, weight: Tensor) -> None:
    with torch.no_grad():
        layer.weight.zero_()[: len(weight)] = weight
        layer.bias.zero_()


@dataclass(frozen=True, eq=False)
class WholePrior:
    """A prior of whole numbers, ready to run.

    Attributes:
        spatial: Layers over z.
        temporal: Layers over earlier latents.
        fusion: Layers over both.
        mean: Layers that give means, in parts of a whole number.
        linear: Layers over earlier latents that give what is added to them.
        index: Layers that give places in the table.
    """

    spatial: list[WholeConv]
    temporal: list[WholeConv]
    fusion: list[WholeConv]
    mean: list[WholeConv]
    linear: list[WholeConv]
    index: list[WholeConv]

    def __call__(self, z: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        """Means and places, int64 [B, M, h, w], of whole z [B, Cz, h/4, w/4], past [B, 2M, h, w].

        Past latents that are not there are zeros.
        """
        seen, past = run(self.spatial, z.clamp(-REACH, REACH)), past.clamp(-REACH, REACH)
        if self.temporal:
            seen = torch.cat([seen, run(self.temporal, past)], 1)
        fused = run(self.fusion, seen)
        mean = run(self.mean, fused)
        if self.linear:
            mean = mean + run(self.linear, past)
        return mean.long(), run(self.index, fused).long()

    def tensors(self) -> dict[str, Tensor]:
        """What it is made of, as integers."""
        return {
            f"{name}.{number}.{key}": value
            for name in self.__dataclass_fields__
            for number, layer in enumerate(getattr(self, name))
            for key, value in layer.tensors().items()
        }

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> WholePrior:
        """What :meth:`tensors` has come from."""
        found: dict[str, dict[int, dict[str, Tensor]]] = {n: {} for n in cls.__dataclass_fields__}
        for name, value in tensors.items():
            part, number, key = name.split(".")
            found[part].setdefault(int(number), {})[key] = value
        return cls(*([WholeConv.of(p[k]) for k in sorted(p)] for p in found.values()))


class Prior(nn.Module):
    """From z and two earlier latents to the law of each element of y.

    Args:
        latents: M.
        hyper: Channels of z.
        width: Channels inside.
        temporal: Whether it looks at earlier latents.
    """

    def __init__(self, latents: int, hyper: int, width: int, temporal: bool = True) -> None:
        super().__init__()
        self.spatial = WholeNet(
            [
                WholeConvolution(hyper, 4 * width, step_in=1.0, shuffle=2),
                WholeConvolution(width, 4 * width, shuffle=2),
            ]
        )
        far = (1 << 15) - 1
        wide: dict[str, Any] = {"step_out": 1 / FRACTIONS, "low": -far, "high": far}
        self.temporal = self.linear = None
        if temporal:
            straight = WholeConvolution(2 * latents, latents, 3, step_in=1.0, **wide)
            with torch.no_grad():  # half of the latent before
                straight.conv.weight.zero_()[range(latents), range(latents), 1, 1] = 0.5
            self.linear = WholeNet([straight])
            first = WholeConvolution(2 * latents, 2 * width, 5, step_in=_PAST)
            self.temporal = WholeNet(
                [first, WholeConvolution(2 * width, width), WholeConvolution(width, width)]
            )
        inputs = width * (1 + temporal)
        self.fusion = WholeNet([WholeConvolution(inputs, 2 * width, 3)])
        mean = WholeConvolution(2 * width, latents, 1, **wide)
        index = WholeConvolution(2 * width, latents, 1, step_out=_INDEX, high=63)
        nn.init.constant_(index.conv.bias, 2.5)  # type: ignore[arg-type]  # a deviation of 1.3
        for head in (mean, index):
            nn.init.normal_(head.conv.weight, std=0.05 / (2 * width) ** 0.5)
        self.mean, self.index = WholeNet([mean]), WholeNet([index])

    def forward(self, z: Tensor, past: Tensor, exact: bool = False) -> tuple[Tensor, Tensor]:
        """Means and standard deviations [B, M, h, w].

        Args:
            z: [B, Cz, h/4, w/4].
            past: The two latents before, the latest first, [B, 2M, h, w]; zeros where none are.
            exact: Compute on the grids of the whole numbers.
        """
        seen, past = self.spatial(z.clamp(-REACH, REACH), exact), past.clamp(-REACH, REACH)
        if self.temporal is not None:
            seen = torch.cat([seen, self.temporal(past * _PAST, exact)], 1)
        fused = self.fusion(seen, exact)
        mean = self.mean(fused, exact)
        if self.linear is not None:
            mean = mean + self.linear(past, exact)
        return mean, scale_at(self.index(fused, exact) / _INDEX)

    def frozen(self) -> WholePrior:
        """The same in whole numbers."""
        names = WholePrior.__dataclass_fields__
        parts = (getattr(self, name) for name in names)
        return WholePrior(*([] if part is None else part.frozen() for part in parts))


class Hyperprior(nn.Module):
    """The law of latents: z of a factorised law, and y of normal laws that the prior gives.

    Args:
        latents: M.
        hyper: Channels of z.
        width: Channels of the nets.
        temporal: Whether earlier latents help.
    """

    def __init__(self, latents: int, hyper: int, width: int, temporal: bool = True) -> None:
        super().__init__()
        last = nn.Conv2d(width, hyper, 5, 2, 2)
        last.weight.data *= _START
        self.h_a = nn.Sequential(
            nn.Conv2d(latents, width, 3, 1, 1),
            nn.GELU(),
            nn.Conv2d(width, width, 5, 2, 2),
            nn.GELU(),
            last,
        )
        self.latents, self.hyper = latents, hyper
        self.factorised = Factorised(hyper)
        self.prior = Prior(latents, hyper, width, temporal)
        self.conditional = GaussianConditional()

    def no_past(self, y: Tensor) -> Tensor:
        """What stands for earlier latents where there are none: zeros [B, 2M, h, w], or nothing."""
        planes = 2 * self.latents if self.prior.temporal is not None else 0
        return y.new_zeros(len(y), planes, *y.shape[2:])

    @torch.no_grad()
    def begin(self, y: Tensor) -> None:
        """Let the law of each channel begin as wide as some latents [B, M, h, w] are."""
        last: Any = self.prior.index.layers[-1]
        last.conv.bias.copy_(index_of(y.std((0, 2, 3))) * _INDEX)

    def forward(
        self, y: Tensor, past: Tensor, exact: bool = True, step: Tensor | float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Values of latents [B, M, h, w], bits of each, and bits of each element of z.

        Args:
            y: Latents; sides divisible by :data:`HYPER`.
            past: See :meth:`Prior.forward`.
            exact: Keep the prior on the grids of whole numbers, as coding will.
            step: What latents are divided by before they are rounded, a number or [B, 1, 1, 1];
                z and the nets know nothing of it, means and deviations shrink with them.
        """
        z = self.h_a(y)
        noisy, z_bits = self.factorised(z)
        mean, scale = self.prior(rounded(z) if exact else noisy, past, exact)
        value, y_bits = self.conditional(y / step, mean / step, scale / step)
        return value, y_bits, z_bits


class TransformCodec(nn.Module):
    """Autoencoder and law.

    Args:
        channels: Planes of a picture.
        width: N.
        latents: M.
        stages: Halvings of the picture.
        hyper: Channels of z.
        prior_width: Channels of the nets of the law.
        temporal: Whether earlier latents help.
        gain: Of the latents, see :class:`Analysis`.
        steady: See there.

    Raises:
        InvalidInputError: No halving.

    Example:
        >>> codec = TransformCodec(3, 4, 2, 2, 2, 4).eval()
        >>> x, bits = codec(torch.zeros(1, 3, 32, 48))
        >>> x.shape, bits.shape, codec.multiple
        (torch.Size([1, 3, 32, 48]), torch.Size([1]), 16)
    """

    def __init__(
        self,
        channels: int,
        width: int,
        latents: int,
        stages: int,
        hyper: int,
        prior_width: int,
        temporal: bool = True,
        gain: float = 12.0,
        steady: bool = False,
    ) -> None:
        super().__init__()
        if stages < 1:
            raise InvalidInputError(f"a picture is halved at least once, not {stages} times")
        self.g_a = Analysis(channels, width, latents, stages, gain, steady)
        self.g_s = Synthesis(channels, width, latents, stages, gain, steady)
        self.law = Hyperprior(latents, hyper, prior_width, temporal)
        self.multiple = HYPER << stages
        """What sides of pictures have to be divisible by."""

    def forward(
        self,
        x: Tensor,
        past: Tensor | None = None,
        exact: bool = True,
        step: Tensor | float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Pictures [B, C, H, W] of 0 to 1, coded by themselves, and the bits of each [B].

        The synthesis sees rounded latents, with a straight-through gradient. Latents are rounded
        to multiples of ``step``, a number or one for each picture [B, 1, 1, 1].
        """
        y = self.g_a(x - 0.5)
        past = self.law.no_past(y) if past is None else past
        _, y_bits, z_bits = self.law(y, past, exact, step)
        out: Tensor = self.g_s(rounded(y / step) * step) + 0.5
        return out, y_bits.flatten(1).sum(1) + z_bits.flatten(1).sum(1)


def rate_distortion(x: Tensor, out: Tensor, bits: Tensor, trade: float) -> Tensor:
    """``lambda 255^2 MSE + bits / pixel``, summed over the pixels of all pictures.

    Args:
        x: Pictures [B, C, H, W] of 0 to 1.
        out: What came back.
        bits: Bits of each, [B].
        trade: lambda.

    Example:
        >>> x = torch.zeros(1, 3, 2, 2)
        >>> float(rate_distortion(x, x + 1 / 255, torch.tensor([8.0]), 0.5))  # 4 (0.5 + 8 / 4)
        10.0
    """
    pixels = x.shape[0] * x.shape[-2] * x.shape[-1]
    return trade * 255**2 * F.mse_loss(out, x) * pixels + bits.sum()
