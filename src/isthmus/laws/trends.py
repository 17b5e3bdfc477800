"""Growth by year, growth towards a bound, and whether two lists are in the same order."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from isthmus.errors import BrokenFileError, InvalidInputError

TABLE = Path(__file__).parent / "hardware.json"
"""Peak arithmetic, memory bandwidth and interconnect of accelerators by year, with sources."""


@dataclass(frozen=True)
class Trend:
    """How something grows.

    Attributes:
        factor: Growth in two years.
        low: Lower end of the 95 % interval.
        high: Upper end.
    """

    factor: float
    low: float
    high: float

    def over(self, years: float) -> float:
        """Growth in so many years.

        Example:
            >>> 535 < Trend(3.0 / 1.6, 1.5, 2.0).over(20) < 540
            True
        """
        return float(self.factor ** (years / 2))


def trend(years: Sequence[float], values: Sequence[float], *, seed: int = 0) -> Trend:
    """Fit exponential growth; the interval comes from fits to 2,000 draws of the points.

    Raises:
        InvalidInputError: There are fewer than three different years, or a value is not above 0.

    Example:
        >>> round(trend([2000, 2002, 2004, 2006], [1, 3, 9, 27]).over(4), 6)
        9.0
    """
    x, y = np.asarray(years, dtype=float), np.asarray(values, dtype=float)
    if len(set(years)) < 3 or len(x) != len(y) or not (np.isfinite(y).all() and y.min() > 0):
        raise InvalidInputError(
            "a trend needs values above 0 in at least three different years; add rows to the table"
        )

    def fit(chosen: Any) -> float:
        slope = np.polyfit(x[chosen] - x.mean(), np.log(y[chosen]), 1)[0]
        return float(np.exp(2 * slope))

    draw = np.random.default_rng(seed)
    draws = [draw.integers(0, len(x), len(x)) for _ in range(2000)]
    fits = [fit(rows) for rows in draws if len(set(x[rows])) > 1]
    low, high = np.percentile(fits, (2.5, 97.5)).tolist()
    return Trend(fit(slice(None)), low, high)


def read_table(path: str | Path = TABLE) -> dict[str, Trend]:
    """Trends of a table: a JSON list of rows with year, tflop_s, memory_gb_s and link_gb_s.

    Raises:
        BrokenFileError: The file cannot be read or is no such table.
    """
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
        columns = {
            name: [float(row[name]) for row in rows]
            for name in ("year", "tflop_s", "memory_gb_s", "link_gb_s")
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BrokenFileError(
            f"{path} is no table of machines ({error}); see {TABLE} for one"
        ) from error
    years = columns.pop("year")
    return {name: trend(years, values) for name, values in columns.items()}


@dataclass(frozen=True)
class Saturation:
    """The law ``y = b - a x ** -gamma``: growth towards a bound.

    Attributes:
        a: How far below the bound y is at x = 1.
        gamma: How fast it comes near.
        b: The bound.
        r2: Share of the variance of the points that the law explains.
    """

    a: float
    gamma: float
    b: float
    r2: float

    def __call__(self, x: float) -> float:
        """Value of the law."""
        return float(self.b - self.a * x**-self.gamma)


def saturation(x: Sequence[float], y: Sequence[float], *, least: float = 0.05) -> Saturation:
    """Fit growth towards a bound by least squares.

    For each gamma the rest is linear, so gammas are tried on a grid and then on a finer one.

    Args:
        x: Above 0, at least three different ones.
        y: As many.
        least: Lower bound of a, gamma and b.

    Raises:
        InvalidInputError: There are too few points.

    Example:
        >>> law = saturation([1, 2, 4, 16], [0.1, 0.2, 0.25, 0.2875])
        >>> [round(v, 3) for v in (law.a, law.gamma, law.b, law.r2)]
        [0.2, 1.0, 0.3, 1.0]
    """
    xs, ys = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if len(xs) != len(ys) or len(set(x)) < 3 or xs.min() <= 0:
        raise InvalidInputError("this law needs values at three or more different x above 0")

    def at(gamma: float) -> tuple[float, float, float, float]:
        u = xs**-gamma
        spread = float(((u - u.mean()) ** 2).sum())
        slope = float(((u - u.mean()) * (ys - ys.mean())).sum()) / max(spread, 1e-300)
        a = max(least, -slope)
        b = float((ys + a * u).mean())
        if b < least:
            b = least
            a = max(least, float(((b - ys) * u).sum() / (u * u).sum()))
        return float(((b - a * u - ys) ** 2).sum()), a, gamma, b

    coarse = np.geomspace(least, 20.0, 300)
    place = int(np.argmin([at(float(g))[0] for g in coarse]))
    fine = np.linspace(coarse[max(place - 1, 0)], coarse[min(place + 1, 299)], 4001)
    error, a, gamma, b = min(at(float(g)) for g in fine)
    whole = float(((ys - ys.mean()) ** 2).sum())
    return Saturation(a, gamma, b, 1.0 - error / whole if whole else 0.0)


def rank_correlation(a: Iterable[float], b: Iterable[float]) -> float:
    """Spearman's rank correlation, ties sharing their rank; 0 where a list has no order at all.

    Example:
        >>> round(rank_correlation([1, 2, 3, 4], [10, 30, 20, 40]), 6)
        0.8
    """
    ranks = []
    for values in (a, b):
        x = np.array(list(values), dtype=float)
        ranks.append((x[:, None] > x).sum(1) + (x[:, None] >= x).sum(1))
    if any(len(set(each)) < 2 for each in ranks):
        return 0.0
    return float(np.asarray(np.corrcoef(ranks))[0, 1])
