"""Odd activations, and how much of their power each Hermite polynomial has."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from isthmus.errors import InvalidInputError

_DEGREE = 31
"""Highest Hermite polynomial; what is left of the activation's power is put on the one after."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sign": torch.sign,
    "tanh": torch.tanh,
    "sin": torch.sin,
    "identity": lambda u: u,
}


@functools.cache
def hermite(activation: str) -> dict[int, float]:
    """Squares ``c_l^2`` of an odd activation's coefficients in normalised Hermite polynomials.

    Raises:
        InvalidInputError: It is not odd, or has no linear part; the theory does not hold then.
    """
    if activation == "sign":  # (2/pi) arcsin has the coefficients; the rest is never used
        return {1: 2 / math.pi, 3: 1 - 2 / math.pi}
    nodes, weights = np.polynomial.hermite_e.hermegauss(200)
    weights = weights / weights.sum()
    act = ACTIVATIONS[activation]
    value = act(torch.from_numpy(nodes)).numpy()
    if np.abs(value + act(torch.from_numpy(-nodes)).numpy()).max() > 1e-9:
        raise InvalidInputError(f"{activation} is not odd, which the limits are for")
    before, now, squares = np.zeros_like(nodes), np.ones_like(nodes), {}
    for degree in range(1, _DEGREE + 1):  # h_l = (x h_{l-1} - sqrt(l-1) h_{l-2}) / sqrt(l)
        before, now = now, (nodes * now - math.sqrt(degree - 1) * before) / math.sqrt(degree)
        if degree % 2:
            squares[degree] = float((weights * value * now).sum() ** 2)
    if squares[1] < 1e-9:
        raise InvalidInputError(f"{activation} has no linear part, which the limits need")
    squares[_DEGREE + 2] = max(float((weights * value**2).sum()) - sum(squares.values()), 0.0)
    return squares
