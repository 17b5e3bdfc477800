"""Training of a model after a cut, with the cut kept: what was removed does not come back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from isthmus.errors import InvalidInputError
from isthmus.surgery.base import Report
from isthmus.surgery.calibration import Calibration
from isthmus.training.drafting import Recipe
from isthmus.training.tuning import tune


def tune_cut(
    model: Any,
    cut: Report,
    data: Calibration,
    steps: int,
    *,
    rate: float = 1e-4,
    seed: int = 0,
    report: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train all weights of a model that was cut, in place.

    Matrices of the places that the cut changed keep their zeros, and with them every mask, N:M
    pattern included. Modules stay as they are, so experts stay carved and layers stay away.

    Args:
        model: As ``apply`` left it, in float32; in eval mode again afterwards.
        cut: What ``apply`` reported.
        data: Samples with labels; one batch a step, in an order that follows from the seed.
        steps: Steps.
        rate: Peak of the learning rate.
        seed: Of the order and of dropout.
        report: Called with the steps taken and the last loss.

    Returns:
        The loss of every step, nats a token.

    Raises:
        InvalidInputError: No steps, the samples have no labels, or weights were rounded to a grid,
            which training would leave.
        DivergedError: The loss is not finite.
    """
    if any(c.after.bits < c.before.bits for c in cut.changes):
        raise InvalidInputError(
            f"{cut.method} rounded weights to a grid, and tuning would move them off it; "
            "tune only what was pruned"
        )
    if steps < 1:
        raise InvalidInputError(f"tuning takes 1 step or more, not {steps}")
    places = tuple(f"{change.path}." for change in cut.changes)
    model.requires_grad_(True)
    hooks = []
    for name, weight in model.named_parameters():
        if weight.ndim > 1 and name.startswith(places) and bool((weight == 0).any()):
            hooks.append(weight.register_hook(_masked(weight.detach() != 0)))

    def loss(rows: Tensor, noise: torch.Generator) -> Tensor:
        del noise
        value, tokens = data.summed_loss(model, int(rows))
        return value / max(tokens, 1)

    recipe = Recipe(steps=steps, batch_size=1, learning_rate=rate, seed=seed)
    try:
        # Adam moves a weight whose gradient was always 0 by exactly 0.
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return tune(model, torch.arange(len(data.batches))[:, None], loss, recipe, report)
    finally:
        for hook in hooks:
            hook.remove()
        model.eval().requires_grad_(False)


def _masked(kept: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda gradient: gradient * kept
