"""Learning-rate schedules: the factor of the peak rate at every step.

A schedule is a function of the step and the number of steps alone, so an interrupted run needs no
state of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from isthmus.errors import UnknownNameError

Schedule = Callable[[int, int, int], float]
"""From the step (counted from 0), the warm-up steps and all steps to a factor of the peak rate."""


def _rise(step: int, warmup: int) -> float:
    return min(1.0, (step + 1) / max(1, warmup))


def _share(step: int, warmup: int, steps: int) -> float:
    """How far the way from the end of the warm-up to the last step is gone, 0 to 1."""
    return min(1.0, max(0, step - warmup) / max(1, steps - warmup))


def constant(step: int, warmup: int, steps: int) -> float:
    """Flat after the warm-up."""
    del steps
    return _rise(step, warmup)


def linear(step: int, warmup: int, steps: int) -> float:
    """A straight line to 0."""
    return _rise(step, warmup) * (1 - _share(step, warmup, steps))


def cosine(step: int, warmup: int, steps: int) -> float:
    """Half a cosine to a tenth of the peak.

    Example:
        >>> [round(cosine(s, 2, 10), 3) for s in (0, 1, 2, 6, 10)]
        [0.5, 1.0, 1.0, 0.55, 0.1]
    """
    share = _share(step, warmup, steps)
    return _rise(step, warmup) * (0.1 + 0.45 * (1 + math.cos(math.pi * share)))


def cosine_from_half(step: int, warmup: int, steps: int) -> float:
    """From half the peak to the peak, then half a cosine to a two-thousandth (nanoT5).

    Example:
        >>> [cosine_from_half(s, 4, 12) for s in (0, 2, 4, 12)]
        [0.5, 0.75, 1.0, 0.0005]
    """
    if step < warmup:
        return 0.5 + 0.5 * step / warmup
    share = _share(step, warmup, steps)
    return 0.0005 + 0.9995 * 0.5 * (1 + math.cos(math.pi * share))


def inverse_sqrt(step: int, warmup: int, steps: int) -> float:
    """Peak at the end of the warm-up, then ``sqrt(warmup / step)`` (Vaswani et al., 2017).

    Example:
        >>> [inverse_sqrt(s, 4, 0) for s in (0, 3, 15)]
        [0.25, 1.0, 0.5]
    """
    del steps
    warm = max(1, warmup)
    return min((step + 1) / warm, math.sqrt(warm / (step + 1)))


def poly(step: int, warmup: int, steps: int) -> float:
    """``(1 - share)^0.9``, the schedule of segmentation models (DeepLab)."""
    return float(_rise(step, warmup) * (1 - _share(step, warmup, steps)) ** 0.9)


def plateau(step: int, warmup: int, steps: int) -> float:
    """Flat, and linear to 0 over the last three tenths (warm-up, stable, decay)."""
    fall = (steps - step) / max(1.0, 0.3 * steps)
    return min(_rise(step, warmup), max(0.0, fall))


def two_plateaus(step: int, warmup: int, steps: int) -> float:
    """:func:`plateau` over each half, for what learns in two stages of which the first then stays.

    Example:
        >>> [round(two_plateaus(s, 1, 20), 2) for s in (0, 8, 9, 10, 18, 19)]
        [1.0, 0.67, 0.33, 1.0, 0.67, 0.33]
    """
    half = steps // 2
    late = step >= half
    return plateau(step - half * late, warmup, steps - half if late else max(1, half))


SCHEDULES: dict[str, Schedule] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "cosine-from-half": cosine_from_half,
    "inverse-sqrt": inverse_sqrt,
    "poly": poly,
    "plateau": plateau,
    "two-plateaus": two_plateaus,
}


def schedule(name: str) -> Schedule:
    """The schedule of that name.

    Raises:
        UnknownNameError: There is none.
    """
    if name not in SCHEDULES:
        raise UnknownNameError("schedule", name, SCHEDULES)
    return SCHEDULES[name]
