"""Rates at equal quality, against scipy and by hand; the picture."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from scipy.interpolate import PchipInterpolator

from isthmus.errors import InvalidInputError
from isthmus.laws.rd import Point, _pchip, bd_rate, draw


def curve(rates: list[float], qualities: list[float]) -> list[Point]:
    return [Point(r, q) for r, q in zip(rates, qualities, strict=True)]


def test_the_cubic_is_that_of_scipy() -> None:
    rng = np.random.default_rng(0)
    for size in (3, 4, 7):
        x = np.cumsum(rng.uniform(0.5, 2, size))
        y = np.cumsum(rng.uniform(-0.2, 1, size))
        at = np.linspace(x[0], x[-1], 200)
        assert np.allclose(_pchip(x, y, at), PchipInterpolator(x, y)(at), atol=1e-12)


def test_rates_at_equal_quality() -> None:
    one = curve([0.1, 0.25, 0.5, 1.1, 2.0], [27, 30, 33, 37, 40])
    assert bd_rate(one, one) == pytest.approx(0.0, abs=1e-9)
    dear = [Point(1.5 * p.rate, p.quality) for p in one]
    assert bd_rate(one, dear) == pytest.approx(50.0, abs=1e-6)
    assert bd_rate(dear, one) == pytest.approx(100 / 1.5 - 100, abs=1e-6)
    # the same curve measured at other settings: log rate is a line in quality here
    line = [Point(math.exp(q / 10), q) for q in (30.0, 32, 35, 38)]
    other = [Point(0.9 * math.exp(q / 10), q) for q in (31.0, 33, 36, 37)]
    assert bd_rate(line, other) == pytest.approx(-10.0, abs=1e-6)


@pytest.mark.parametrize(
    ("rates", "qualities", "says"),
    [
        ([1.0, 2, 3], [30.0, 31, 32], "at least 4"),
        ([1.0, 2, 3, 4], [30.0, 32, 31, 33], "rise with the rate"),
        ([1.0, 2, 3, 4], [30.0, 31, 32, math.inf], "finite"),
        ([1.0, 2, 3, 4], [60.0, 61, 62, 63], "share 0.00"),
    ],
)
def test_what_cannot_be_compared(rates: list[float], qualities: list[float], says: str) -> None:
    with pytest.raises(InvalidInputError, match=says):
        bd_rate(curve([0.1, 0.2, 0.4, 0.8], [28, 31, 34, 37]), curve(rates, qualities))


def test_a_picture(tmp_path: Path) -> None:
    one = curve([0.1, 0.2, 0.4, 0.8], [28, 31, 34, 37])
    draw(tmp_path / "x.png", {"a": one, "b": [Point(9.0, math.inf)]})
    assert (tmp_path / "x.png").stat().st_size > 5000
    with pytest.raises(InvalidInputError, match="is no picture"):
        draw(tmp_path / "x.txt", {"a": one})
