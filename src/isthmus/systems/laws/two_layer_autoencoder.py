"""Two-layer autoencoders: the least error that one bit a unit allows, and gradients that reach it.

Paper: A. Shevchenko, K. Kögler, H. Hassani, M. Mondelli, "Fundamental Limits of Two-layer
    Autoencoders, and Achieving Them with Gradient Methods", 2022, arXiv:2212.13468
Idea: For Gaussian data and a code ``sign(B x)`` the best mean squared error of a linear decoder is
    known in closed form at every rate, and gradient descent on the encoder attains it.
Differs: Adam with rows put back to unit length after each step instead of gradient flow. The
    decoder that is best for an encoder is solved for, not descended to, when the data's law is
    known. Rows for unequal variances are shared out by the paper's limit; the optimal rotation
    inside a block is not searched for.

    x ~ N(0, I_d) [d] ──B, unit rows──> n numbers ──sigma──> code [n] ──A──> x^ [d]     rate r = n/d
    risk / d = 1 + (tr(A' A K) - 2 c_1 tr(A B)) / d,   K = sum_l c_l^2 (B B')^l elementwise
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from isthmus.claims import Claim, Gate, Row, Ruler, Scale, judge
from isthmus.errors import InvalidInputError, UnknownNameError
from isthmus.laws.hermite import ACTIVATIONS, hermite
from isthmus.workbench.photographs import grey_patches


@dataclass(frozen=True)
class Settings:
    """Settings.

    Attributes:
        activation: sigma, a name of :data:`ACTIVATIONS`; ``sign`` makes a code of one bit a unit.
        tied: Whether the decoder is ``beta B'``, one number besides the encoder.
        learn: Whether the encoder is learnt; off, it stays as drawn, and only the decoder fits.
        steps: Steps of Adam.
        learning_rate: Of Adam; falls to 0 along a cosine.
        batch_size: Samples a step, where the data's law is not known.
        temperature: tau, where the gradient of ``sign(u)`` is taken to be that of ``tanh(u/tau)``.
    """

    activation: str = "sign"
    tied: bool = False
    learn: bool = True
    steps: int = 1_500
    learning_rate: float = 0.03
    batch_size: int = 512
    temperature: float = 1.0


@dataclass(frozen=True)
class Coder:
    """An encoder and its decoder.

    Attributes:
        encoder: B [n, d], rows of unit length.
        decoder: A [d, n].
        activation: sigma.
    """

    encoder: Tensor
    decoder: Tensor
    activation: str

    def encode(self, x: Tensor) -> Tensor:
        """Code [N, n] of samples [N, d]."""
        return ACTIVATIONS[self.activation](x @ self.encoder.T)

    def decode(self, code: Tensor) -> Tensor:
        """Samples [N, d] of a code [N, n]."""
        return code @ self.decoder.T

    def error(self, x: Tensor) -> float:
        """Mean squared error a number, of samples [N, d]."""
        return float((self.decode(self.encode(x)) - x).square().mean())


class TwoLayerAutoencoder:
    """The limit at every rate, and coders that come near it.

    Args:
        settings: See :class:`Settings`.

    Raises:
        UnknownNameError: No such activation.

    Example:
        At one bit a number, 1 - 2/pi is left:

        >>> round(TwoLayerAutoencoder().limit(1.0), 4)
        0.3634
    """

    role: ClassVar[str] = "study"

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        if self.settings.activation not in ACTIVATIONS:
            raise UnknownNameError("activation", self.settings.activation, list(ACTIVATIONS))
        self.coefficients = hermite(self.settings.activation)
        self.power = float(sum(self.coefficients.values()))  # E sigma(g)^2

    @property
    def loss_factor(self) -> float:
        """``t = E sigma^2 / c_1^2``: what the activation costs; 1 for a linear one."""
        return self.power / self.coefficients[1]

    def limit(self, rate: float) -> float:
        """Least mean squared error a number at a rate ``r = n/d`` (theorems 4.2 and 4.3).

        Raises:
            InvalidInputError: A rate below 0.
        """
        if rate < 0:
            raise InvalidInputError(f"a rate is units over numbers, 0 or more, not {rate}")
        t = self.loss_factor
        return 1 - rate / t if rate <= 1 else 1 - rate / (rate + t - 1)

    def share(self, variances: Sequence[float], units: float) -> list[float]:
        """Units for each coordinate of given variance, so that the sum of errors is least.

        The limit is convex in the rate, so units go where the next one takes most: all rates
        above 0 have one slope ``variance * |limit'|``, found by bisection (theorem 5.1's
        water-filling).

        Args:
            variances: Of the coordinates, above 0.
            units: n, to be shared out.

        Raises:
            InvalidInputError: A variance that is not above 0.

        Example:
            >>> [round(r, 3) for r in TwoLayerAutoencoder().share([4.0, 1.0], 1.0)]
            [1.0, 0.0]
        """
        spread = np.asarray(variances, dtype=float)
        if spread.ndim != 1 or not len(spread) or spread.min() <= 0:
            raise InvalidInputError("give variances above 0; leave out coordinates without any")
        t = self.loss_factor

        def rates(slope: float, full: bool) -> np.ndarray:
            # Up to rate 1 the slope is variance/t; beyond, variance (t-1)/(r + t - 1)^2.
            steep = spread / t >= slope if full else spread / t > slope
            beyond = np.sqrt(spread * (t - 1) / slope) - (t - 1)
            return np.where(steep, np.maximum(1.0, beyond), 0.0)

        low, high = 1e-12 * spread.min(), 2 * spread.max() / t
        for _ in range(200):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if rates(middle, True).sum() >= units else (low, middle)
        least, most = rates(high, False), rates(low, True)
        gap = most.sum() - least.sum()
        weight = (units - least.sum()) / gap if gap > 0 else 0.0
        return [float(v) for v in least + min(weight, 1.0) * (most - least)]

    # what a coder costs ----------------------------------------------------------------------

    def kernel(self, encoder: Tensor) -> Tensor:
        """K [n, n], covariance of the code's units for Gaussian data."""
        gram = encoder @ encoder.T
        eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        off = gram.clamp(-1, 1) * (1 - eye)  # arcsin has infinite slope at 1: fix the diagonal
        if self.settings.activation == "sign":
            kernel = (2 / math.pi) * torch.asin(off)
        else:
            kernel = torch.zeros_like(off)
            for degree, square in sorted(self.coefficients.items(), reverse=True):
                kernel = kernel + square * off**degree
        return kernel * (1 - eye) + self.power * eye

    def decoder(self, encoder: Tensor) -> Tensor:
        """The best A [d, n] for an encoder: ``c_1 B' K^-1``, or ``beta B'`` when tied."""
        first = math.sqrt(self.coefficients[1])
        kernel = self.kernel(encoder)
        if not self.settings.tied:
            best: Tensor = first * torch.linalg.solve(kernel, encoder).T
            return best
        power = (kernel * (encoder @ encoder.T)).sum()
        return first * encoder.square().sum() / power * encoder.T

    def risk(self, encoder: Tensor, decoder: Tensor) -> Tensor:
        """Expected squared error a number, for ``x ~ N(0, I)``."""
        cross = math.sqrt(self.coefficients[1]) * (decoder.T * encoder).sum()
        power = ((decoder @ self.kernel(encoder)) * decoder).sum()
        return 1 + (power - 2 * cross) / encoder.shape[1]

    # learning --------------------------------------------------------------------------------

    def solve(self, size: int, units: int, seed: int = 0) -> Coder:
        """Descend on the expected error itself.

        Args:
            size: d, numbers of a sample.
            units: n, units of the code.
            seed: Of the encoder's first weights.

        Raises:
            InvalidInputError: No numbers, or no units.
        """
        weights = _rows(size, units, seed, torch.float64)

        def error() -> Tensor:
            encoder = functional.normalize(weights, dim=1)
            return self.risk(encoder, self.decoder(encoder))

        self._descend([weights], error)
        encoder = weights.detach()
        return Coder(encoder, self.decoder(encoder), self.settings.activation)

    def fit(self, samples: Tensor, units: int, seed: int = 0) -> Coder:
        """Descend on samples, whose law is not known; code and gradient are those of a network.

        Args:
            samples: Whitened, [N, d].
            units: n, units of the code.
            seed: Of the first weights and of the batches.

        Raises:
            InvalidInputError: Samples of another shape, no units, or not white.
        """
        if samples.ndim != 2 or len(samples) < 2:
            raise InvalidInputError(f"give samples [N, d], not {list(samples.shape)}")
        power = float(samples.square().mean())
        if not 0.9 < power < 1.1:
            raise InvalidInputError(
                f"samples need mean square 1, not {power:.3g}; whiten them, see whiten()"
            )
        s = self.settings
        weights = _rows(samples.shape[1], units, seed, samples.dtype)
        first = math.sqrt(self.coefficients[1]) / self.power
        decoder = (first * weights.detach().T).clone().requires_grad_()
        draw = torch.Generator().manual_seed(seed)
        scale = torch.tensor(first, dtype=samples.dtype, requires_grad=True)
        act = ACTIVATIONS[s.activation]

        def error() -> Tensor:
            x = samples[torch.randint(len(samples), (s.batch_size,), generator=draw)]
            encoder = functional.normalize(weights, dim=1)
            u = x @ encoder.T
            code = act(u)
            if s.activation == "sign":  # straight through: the value of sign, the slope of tanh
                soft = torch.tanh(u / s.temperature)
                code = soft + (code - soft).detach()
            out = code @ (scale * encoder if s.tied else decoder.T)
            return functional.mse_loss(out, x)

        self._descend([weights, scale if s.tied else decoder], error)
        last = scale * weights.T if s.tied else decoder
        return Coder(weights.detach(), last.detach(), s.activation)

    def _descend(self, weights: list[Tensor], error: Callable[[], Tensor]) -> None:
        """Adam; rows of the first, the encoder, are put back to unit length after every step.

        Errors are functions of the rows' directions, so that gradients are tangent: a part along
        the row would fill Adam's second moment and be undone by the projection.
        """
        s = self.settings
        learnt = weights if s.learn else weights[1:]
        if not learnt:
            return
        adam = torch.optim.Adam(learnt, lr=s.learning_rate)
        fall = torch.optim.lr_scheduler.CosineAnnealingLR(adam, s.steps)
        for _ in range(s.steps):
            adam.zero_grad()
            error().backward()  # type: ignore[no-untyped-call]
            adam.step()
            fall.step()
            with torch.no_grad():
                weights[0].copy_(functional.normalize(weights[0], dim=1))


def _rows(size: int, units: int, seed: int, dtype: torch.dtype) -> Tensor:
    if size < 1 or units < 1:
        raise InvalidInputError(f"a code needs numbers and units, got {size} and {units}")
    draw = torch.Generator().manual_seed(seed)
    drawn = torch.randn(units, size, generator=draw, dtype=dtype)
    return functional.normalize(drawn, dim=1).requires_grad_()


def whiten(samples: Tensor, floor: float = 1e-6) -> Tensor:
    """Rotate and scale samples [N, d] to unit covariance, without directions of no variance.

    Args:
        samples: Centred or not.
        floor: Directions with less than this share of the largest variance are left out.

    Returns:
        Samples [N, d'] of mean 0 and covariance I.
    """
    centred = (samples - samples.mean(0)).double()
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
    kept = values > floor * values[-1]
    white: Tensor = centred @ vectors[:, kept] / values[kept].sqrt()
    return white.to(samples.dtype)


RATES = (0.25, 0.5, 1.0, 1.5, 2.0)


def claim(ruler: Ruler, scale: Scale = "small") -> Claim:
    """Coders from the expected error, from samples and from photographs, beside the limit."""
    del ruler  # nothing is timed
    small = scale != "test"
    size, steps = (64, 1_500) if small else (12, 150)
    study = TwoLayerAutoencoder(Settings(steps=steps))
    off = TwoLayerAutoencoder(replace(study.settings, learn=False))
    rows: list[Row] = []

    def row(name: str, limit: float, ours: float, off: float | None, rate: float) -> None:
        least = 2.0 ** (-2 * rate)
        rows.append(Row(f"error at {rate:g} bits{name}", "of variance", limit, ours, off, least))

    from_limit, drawn = [], 0.0
    for rate in RATES:
        ours, as_drawn = (
            float(each.risk(coder.encoder, coder.decoder))
            for each in (study, off)
            for coder in (each.solve(size, round(rate * size)),)
        )
        from_limit.append(abs(ours - study.limit(rate)))
        drawn = abs(as_drawn - study.limit(rate)) if rate == 1 else drawn
        row("", study.limit(rate), ours, as_drawn, rate)
    draw = torch.Generator().manual_seed(1)
    wide = 100 if small else 12
    network = TwoLayerAutoencoder(Settings(steps=4_000 if small else 100, learning_rate=0.003))
    gaussian = torch.randn(200_000 if small else 2_000, wide, generator=draw)
    patches = whiten(grey_patches(8, 120_000 if small else 2_000, draw).flatten(1))
    even = whiten(functional.normalize(patches, dim=1))
    sources = (
        ("samples", (0.5, 1.0, 1.5), gaussian, torch.randn(20_000, wide, generator=draw)),
        ("photographs", (0.25, 0.5, 1.0), patches[::2], patches[1::2]),
        ("photographs of even contrast", (0.25, 0.5, 1.0), even[::2], even[1::2]),
    )
    far: dict[str, float] = {}
    for name, rates, learnt, judged in sources:
        for asked in rates:
            units = round(asked * learnt.shape[1])
            rate = units / learnt.shape[1]
            ours = network.fit(learnt, units).error(judged)
            far[name] = max(far.get(name, 0.0), abs(ours - network.limit(rate)))
            row(f", {name}", network.limit(rate), ours, None, rate)
    above = min((r.ours or 0.0) - (r.ceiling or 0.0) for r in rows)
    gates = (
        Gate("farthest from the formula", max(from_limit), "<=", 0.003),
        Gate("encoder as drawn, from the formula at 1 bit", drawn, ">", 0.003),
        Gate("farthest from the formula, samples", far["samples"], "<=", 0.02),
        Gate("farthest from the formula, photographs", far["photographs"], "<=", 0.03),
        Gate("least error above that of any code of the rate", above, ">", 0.0),
    )
    return Claim(
        slug="two-layer-autoencoder",
        statement="Gradient descent on a two-layer autoencoder with one bit a unit reaches the "
        "least error that Gaussian data allow it, and photographs' patches behave alike.",
        paper_figure="gradient methods meet the limit 1 - 2r/pi up to rate 1 and "
        "1 - r/(r + pi/2 - 1) beyond (theorems 4.2 and 4.3, figures 1 to 4)",
        rows=tuple(rows),
        scale=scale,
        device="cpu",
        status=judge(gates, gates[:2]),
        reason=""
        if gates[3].passed
        else "the contrast of photographs' patches varies, which a code of signs cannot tell",
        gates=gates,
        seeds=(0, 1),
        notes=(
            f"d = {size} for the expected error, {wide} for samples, {patches.shape[1]} for 8x8 "
            "patches",
            "even contrast: the same patches at one norm each, whitened once more; no gate",
            "baseline: the formula; off: the encoder as drawn; ceiling: 2^-2r, of any code",
            "patches are judged on other places of the same photographs than were learnt from",
        ),
    )
