"""Rate and distortion: points of a codec, the Bjontegaard rate between two curves, a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from isthmus.errors import InvalidInputError, require
from isthmus.laws.forwards import COLOURS, check_picture, save

Floats = npt.NDArray[np.float64]

OVERLAP = 0.25
"""Share of both curves' qualities that must be common for a comparison to mean anything."""


@dataclass(frozen=True)
class Point:
    """One codec at one setting, over some signals.

    Attributes:
        rate: Bits per pixel, or kbit/s.
        quality: Larger is better: PSNR in dB, say. Infinite where nothing is lost.
        encode_s: Seconds that encoding took.
        decode_s: Seconds that decoding took.
        label: The setting.
        more: Other measures by name.
    """

    rate: float
    quality: float
    encode_s: float = 0.0
    decode_s: float = 0.0
    label: str = ""
    more: Mapping[str, float] = field(default_factory=dict)


def bd_rate(anchor: Sequence[Point], test: Sequence[Point]) -> float:
    """How much more rate a codec takes than another at equal quality, in percent.

    The mean difference of log rates over the common interval of qualities; between its points a
    curve is a monotone cubic (PCHIP), as Bjontegaard's measure is computed today.

    Args:
        anchor: At least 4 points of the codec to compare with.
        test: At least 4 points of the other.

    Returns:
        Negative where the other takes less.

    Raises:
        InvalidInputError: Too few points, a quality that does not rise with the rate, or too little
            overlap.

    Example:
        >>> curve = [Point(r, q) for r, q in ((0.1, 28), (0.2, 31), (0.4, 34), (0.8, 37))]
        >>> cheaper = [Point(0.8 * p.rate, p.quality) for p in curve]
        >>> round(bd_rate(curve, cheaper), 6)  # by hand: 20 % less at every quality
        -20.0
    """
    (q1, r1), (q2, r2) = _curve(anchor), _curve(test)
    low, high = max(q1[0], q2[0]), min(q1[-1], q2[-1])
    union = max(q1[-1], q2[-1]) - min(q1[0], q2[0])
    if high - low < OVERLAP * union:
        raise InvalidInputError(
            f"the curves share {max(0.0, high - low):.2f} of {union:.2f} in quality, less than "
            f"{OVERLAP:.0%}; measure settings of closer quality"
        )
    at = np.linspace(low, high, 4001)
    difference = _pchip(q2, r2, at) - _pchip(q1, r1, at)
    mean = float(np.trapezoid(difference, at)) / (high - low)
    return 100 * (float(np.exp(mean)) - 1)


def _curve(points: Sequence[Point]) -> tuple[Floats, Floats]:
    """Qualities that rise, and the logarithms of their rates."""
    if len(points) < 4:
        raise InvalidInputError(f"a curve has at least 4 points to be compared, got {len(points)}")
    line = sorted(points, key=lambda p: p.rate)
    quality = np.array([p.quality for p in line], dtype=np.float64)
    if not np.isfinite(quality).all() or (np.diff(quality) <= 0).any() or line[0].rate <= 0:
        raise InvalidInputError("qualities must be finite and rise with the rate to be compared")
    return quality, np.log([p.rate for p in line])


def _pchip(x: Floats, y: Floats, at: Floats) -> Floats:
    """Monotone cubic through points (Fritsch and Carlson), with slopes of three points at ends."""
    step, slope = np.diff(x), np.diff(y) / np.diff(x)
    inner = np.zeros(len(x))
    w1, w2 = 2 * step[1:] + step[:-1], step[1:] + 2 * step[:-1]
    same = slope[:-1] * slope[1:] > 0
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = (w1 + w2) / (w1 / slope[:-1] + w2 / slope[1:])
    inner[1:-1] = np.where(same, mean, 0.0)
    for end, (h0, h1), (s0, s1) in (
        (0, step[:2], slope[:2]),
        (-1, step[:-3:-1], slope[:-3:-1]),
    ):
        d = ((2 * h0 + h1) * s0 - h0 * s1) / (h0 + h1)
        if d * s0 <= 0:
            d = 0.0
        elif s0 * s1 <= 0 and abs(d) > 3 * abs(s0):
            d = 3 * s0
        inner[end] = d
    k = np.clip(np.searchsorted(x, at, side="right") - 1, 0, len(x) - 2)
    t = (at - x[k]) / step[k]
    a, b = y[k], y[k + 1]
    da, db = inner[k] * step[k], inner[k + 1] * step[k]
    out: Floats = (
        (1 + 2 * t) * (1 - t) ** 2 * a
        + t * (1 - t) ** 2 * da
        + t**2 * (3 - 2 * t) * b
        + t**2 * (t - 1) * db
    )
    return out


def draw(
    path: str | Path,
    curves: Mapping[str, Sequence[Point]],
    *,
    rate: str = "bits per pixel",
    quality: str = "PSNR, dB",
    title: str = "",
) -> None:
    """Draw codecs: a line for each, rate against quality; marks at the top lose nothing.

    Args:
        path: A .png, .svg or .pdf file.
        curves: Points by the codec's name.
        rate: What the axis of rates says.
        quality: What the axis of qualities says.
        title: Above the picture.

    Raises:
        MissingExtraError: matplotlib is not installed.
        InvalidInputError: The file is of another kind.
        BrokenFileError: It cannot be written.
    """
    path = Path(path)
    check_picture(path)
    figure_class: Any = require("matplotlib.figure", "plot").Figure
    figure = figure_class(figsize=(7.6, 5.0), layout="constrained")
    axes = figure.subplots()
    marks = "osD^vP*X<>"
    finite = [p.quality for line in curves.values() for p in line if np.isfinite(p.quality)]
    top = max(finite, default=1.0) + 2
    for number, (name, points) in enumerate(curves.items()):
        line = sorted(points, key=lambda p: p.rate)
        lossy = [p for p in line if np.isfinite(p.quality)]
        exact = [p for p in line if not np.isfinite(p.quality)]
        colour, mark = COLOURS[number % len(COLOURS)], marks[number % len(marks)]
        if lossy:
            x, y = [p.rate for p in lossy], [p.quality for p in lossy]
            axes.plot(x, y, marker=mark, c=colour, ms=5, lw=1.6, label=name)
        for p in exact:
            axes.plot(p.rate, top, mark, mfc="none", mec=colour, ms=8, label=f"{name} (exact)")
    axes.set(xscale="log", xlabel=rate, ylabel=quality, title=title)
    axes.grid(True, which="both", alpha=0.25)
    axes.legend(fontsize=8, frameon=False)
    save(figure, path)
