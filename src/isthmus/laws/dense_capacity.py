"""How many dimensions a vector needs to keep a ranking.

Documents 1 and 2 are ordered by inner product with a query. What is left of their order in k
dimensions depends on the normalised margin alone::

    mu = <q, d1 - d2> / (|q| |d1 - d2|)

the cosine of the angle between the query and the difference. A random projection with independent
normal entries loses the order with the probability of :func:`error`; of that, and of random signs,
``4 exp(-k/2 (mu^2/2 - mu^3/3))`` is an upper bound. After Luan, Eisenstein, Toutanova and Collins,
"Sparse, Dense, and Attentional Representations for Text Retrieval", 2020 (arXiv 2005.00181).
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from isthmus.errors import InvalidInputError

Floats = NDArray[np.float64]
Entries = Literal["normal", "signs"]


def margin(query: torch.Tensor, better: torch.Tensor, worse: torch.Tensor) -> torch.Tensor:
    """Normalised margins mu in [-1, 1], of vectors [..., V]; 0 where the documents are equal.

    Example:
        >>> q, a, b = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0]), torch.tensor([0.0, 0.0])
        >>> round(float(margin(q, a, b)), 4)
        0.7071
    """
    gap = better - worse
    size = query.norm(dim=-1) * gap.norm(dim=-1)
    found: torch.Tensor = (query * gap).sum(-1) / size.clamp(min=1e-12)
    return found


def bound(margins: ArrayLike, k: int) -> Floats:
    """Largest probability that k random dimensions lose an order, at most 1.

    Args:
        margins: mu, positive.
        k: Dimensions.

    Example:
        >>> bound([0.5], 100).round(4)  # 4 exp(-50 (1/8 - 1/24))
        array([0.062])
    """
    mu = _margins(margins, k)
    found: Floats = np.minimum(1, 4 * np.exp(-k / 2 * (mu**2 / 2 - mu**3 / 3)))
    return found


def dimensions(margins: ArrayLike, error: float) -> Floats:
    """Dimensions that keep an order except with probability ``error``, by the bound.

    Example:
        >>> dimensions([0.5], 0.062).round()
        array([100.])
    """
    if not 0 < error < 1:
        raise InvalidInputError(f"error must lie between 0 and 1, got {error}")
    mu = _margins(margins, 1)
    found: Floats = 2 / (mu**2 / 2 - mu**3 / 3) * math.log(4 / error)
    return found


def error(margins: ArrayLike, k: int, points: int = 4096) -> Floats:
    """Probability that a normal projection to k dimensions loses an order, exactly.

    Products of pairs with correlation mu sum to less than 0 as often as a point of the sphere in
    k + 1 dimensions lies within the angle ``arccos mu`` of the pole: the share of a cap,
    ``int_0^{arccos mu} sin^(k-1) / int_0^pi sin^(k-1)``.

    Args:
        margins: mu, positive.
        k: Dimensions.
        points: Points of the integrals.

    Example:
        >>> error([0.5], 1).round(4)  # 60 of 180 degrees
        array([0.3333])
    """
    mu = _margins(margins, k)

    def area(top: Floats) -> Floats:
        middle = (np.arange(points) + 0.5) / points
        angle = top[..., None] * middle
        found: Floats = (np.sin(angle) ** (k - 1)).mean(-1) * top
        return found

    found: Floats = area(np.arccos(mu)) / area(np.array(math.pi))
    return found


def projection(k: int, width: int, entries: Entries, generator: torch.Generator) -> torch.Tensor:
    """A random projection, float32 [V, k], that keeps inner products in the mean.

    Args:
        k: Dimensions.
        width: V.
        entries: ``normal``, or random ``signs`` (Rademacher).
        generator: Source of the draws.
    """
    if entries == "normal":
        drawn = torch.randn(width, k, generator=generator)
    elif entries == "signs":
        drawn = torch.randint(0, 2, (width, k), generator=generator) * 2.0 - 1
    else:
        raise InvalidInputError(f"entries must be normal or signs, got {entries!r}")
    return drawn / math.sqrt(k)


def _margins(margins: ArrayLike, k: int) -> Floats:
    mu = np.asarray(margins, np.float64)
    if k < 1 or not ((mu > 0) & (mu <= 1)).all():
        raise InvalidInputError("margins must lie in (0, 1], and k must be at least 1")
    return mu
