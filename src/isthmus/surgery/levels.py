"""Which layer may shrink how much, when all share one budget."""

from __future__ import annotations

import torch
from torch import Tensor

from isthmus.errors import InvalidInputError

_UNITS = 10_000


def choose_levels(losses: Tensor, costs: Tensor, budget: float) -> list[int]:
    """One level a layer, with the least loss in all that the budget allows: a dynamic program.

    Costs are counted in ten-thousandths of the budget and rounded up, so that the budget holds; a
    choice that spends it to the last unit may be passed over for that.

    Args:
        losses: What each level of each layer loses [L, K].
        costs: What it costs [L, K], not negative.
        budget: What all may cost together.

    Returns:
        The level of each layer.

    Raises:
        InvalidInputError: Even the cheapest levels cost more.

    Example:
        >>> losses = torch.tensor([[0.0, 1.0], [0.0, 5.0]])
        >>> choose_levels(losses, torch.tensor([[2.0, 1.0], [2.0, 1.0]]), 3.2)
        [1, 0]
    """
    units = torch.ceil(costs.double() / budget * _UNITS - 1e-6).long()
    best = torch.full((_UNITS + 1,), torch.inf, dtype=torch.float64)
    best[0] = 0.0
    chosen = []
    for loss, price in zip(losses.double(), units, strict=True):
        options = torch.full((len(price), _UNITS + 1), torch.inf, dtype=torch.float64)
        for level, step in enumerate(price.tolist()):
            if step <= _UNITS:
                options[level, step:] = best[: _UNITS + 1 - step] + loss[level]
        best, level_of = options.min(0)
        chosen.append((level_of, price))
    spent = int(best.argmin())
    if not bool(torch.isfinite(best[spent])):
        raise InvalidInputError(
            f"a budget of {budget:g} is impossible: the cheapest levels cost "
            f"{float(costs.amin(1).sum()):g}"
        )
    found = []
    for level_of, price in reversed(chosen):
        found.append(int(level_of[spent]))
        spent -= int(price[found[-1]])
    return found[::-1]
