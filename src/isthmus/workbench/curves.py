"""How fast something learns: CPU time against held-out loss."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from isthmus.training.loop import Plan, Trainer

Curve = list[tuple[float, float]]
"""CPU seconds of all steps until a validation, and the loss that it found."""


def cpu_curve(learner: Any, plan: Plan, held_out: Callable[[], float]) -> Curve:
    """Train, and note the CPU time of this process whenever the plan validates.

    Args:
        learner: What learns; its own validation is left out.
        plan: How.
        held_out: The loss; the time that it takes does not count.
    """
    curve, aside, begin = Curve(), 0.0, time.process_time()

    def validate() -> dict[str, float]:
        nonlocal aside
        now = time.process_time()
        curve.append((now - begin - aside, held_out()))
        aside += time.process_time() - now
        return {"loss": curve[-1][1]}

    learner.validate = validate
    Trainer(learner, replace(plan, patience=0)).run()
    return curve


def reached(curve: Curve, loss: float) -> float | None:
    """When a curve first reaches a loss, on the line between two points; None is never.

    Example:
        >>> reached([(1.0, 3.0), (2.0, 1.0)], 2.0), reached([(1.0, 3.0)], 2.0)
        (1.5, None)
    """
    before = (0.0, math.inf)
    for now in curve:
        if now[1] <= loss:
            (t, above), (u, below) = before, now
            return u if math.isinf(above) else t + (u - t) * (above - loss) / (above - below)
        before = now
    return None
