"""How sure is sure enough: a threshold of confidence from what was right and what was not.

Two Beta laws are fitted to the confidences of guesses, one to those that were confirmed and one to
the others; the threshold is where a confirmation becomes likely enough (Bae et al. 2023,
2310.05424, sec. 4.3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

GRID = tuple(0.3 + 0.6 * i / 9 for i in range(10))
"""Thresholds to choose from."""


@dataclass
class Calibrator:
    """Two Beta laws of the confidence, where the parts agree and where they do not (eq. 3, 4).

    Attributes:
        agreed: Confidences of early tokens that the deep layers confirmed.
        differed: Those of the others.
    """

    agreed: list[float] = field(default_factory=list)
    differed: list[float] = field(default_factory=list)

    def threshold(self, certainty: float, default: float) -> float:
        """The smallest grid point where agreement is likelier than ``certainty``."""
        if len(self.agreed) < 2 or len(self.differed) < 2:
            return default
        yes, no = beta_by_moments(self.agreed), beta_by_moments(self.differed)
        weight = len(self.agreed) / (len(self.agreed) + len(self.differed))
        for point in GRID:
            good = weight * beta_density(point, *yes)
            bad = (1 - weight) * beta_density(point, *no)
            if good > certainty * (good + bad):
                return point
        return GRID[-1]


def beta_by_moments(values: Sequence[float]) -> tuple[float, float]:
    """Parameters of the Beta law with the mean and variance of numbers in [0, 1].

    Example:
        >>> a, b = beta_by_moments([0.25, 0.75])
        >>> round(a, 6), round(b, 6)
        (1.5, 1.5)
    """
    mean = min(max(sum(values) / len(values), 1e-3), 1 - 1e-3)
    variance = sum((v - mean) ** 2 for v in values) / len(values)
    size = mean * (1 - mean) / max(variance, 1e-6) - 1  # alpha + beta
    size = max(size, 1e-3)
    return mean * size, (1 - mean) * size


def beta_density(x: float, alpha: float, beta: float) -> float:
    """Density of a Beta law in (0, 1).

    Example:
        >>> beta_density(0.3, 1.0, 1.0)
        1.0
    """
    log = math.lgamma(alpha + beta) - math.lgamma(alpha) - math.lgamma(beta)
    return math.exp(log + (alpha - 1) * math.log(x) + (beta - 1) * math.log1p(-x))
