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
from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Capacity:
    """What random projections keep of a ranking by words.

    Attributes:
        margin: Median normalised margin of the pairs.
        lost: By dimensions k: share of orders lost, as drawn.
        exact: The same by the law of normal projections.
        excess: Largest share lost above the bound, over k and tenths of the pairs by margin.
    """

    margin: float
    lost: dict[int, float]
    exact: dict[int, float]
    excess: float

    def needed(self, agreement: float = 0.95) -> float:
        """Dimensions that keep this share of orders, between those tried in log2 k."""
        ks = sorted(self.lost)
        kept = [1 - self.lost[k] for k in ks]
        return float(2 ** np.interp(agreement, np.maximum.accumulate(kept), np.log2(ks)))


def measure(
    queries: torch.Tensor,
    documents: torch.Tensor,
    ks: Sequence[int],
    *,
    draws: int = 4,
    seed: int = 0,
) -> Capacity:
    """Project queries and documents, and see which orders are lost.

    Pairs are the best document of a query against each of the next hundred.

    Args:
        queries: [Q, V].
        documents: [N, V].
        ks: Dimensions, rising.
        draws: Projections.
        seed: Seed of the projections.
    """
    scores = queries @ documents.T
    best, rows = scores.topk(min(101, len(documents)), 1)
    own = (best[:, 0] > 0).nonzero()[:, 0]
    pairs = []
    for q in own.tolist():
        below = rows[q, 1:][best[q, 1:] < best[q, 0]]
        pairs.append(torch.stack([torch.full_like(below, q), rows[q, 0].expand_as(below), below]))
    q, d1, d2 = torch.cat(pairs, 1)
    # margins from norms and products alone: |a - b|^2 = |a|^2 - 2 <a, b> + |b|^2
    norms, products = documents.square().sum(1), documents @ documents.T
    gap = (norms[d1] - 2 * products[d1, d2] + norms[d2]).clamp(min=1e-12).sqrt()
    mu = ((scores[q, d1] - scores[q, d2]) / (queries.norm(dim=1)[q] * gap)).clamp(1e-6, 1)
    generator = torch.Generator().manual_seed(seed)
    lost = {k: torch.zeros(len(q)) for k in ks}
    for _ in range(draws):
        drawn = projection(max(ks), queries.shape[1], "normal", generator)
        a, b, done = queries @ drawn, documents @ drawn, 0
        kept = torch.zeros(len(a), len(b))
        for k in ks:  # the first k columns are a projection to k dimensions
            kept += a[:, done:k] @ b[:, done:k].T
            done = k
            lost[k] += (kept[q, d1] <= kept[q, d2]).float() / draws
    tenths = torch.chunk(mu.argsort(), 10)
    margins = mu.double().numpy()
    excess = max(
        float(lost[k][part].mean() - bound(margins[part.numpy()], k).mean())
        for k in ks
        for part in tenths
    )
    some = margins[:: max(1, len(margins) // 500)]
    return Capacity(
        margin=float(np.median(margins)),
        lost={k: float(v.mean()) for k, v in lost.items()},
        exact={k: float(error(some, k).mean()) for k in ks},
        excess=excess,
    )


def _margins(margins: ArrayLike, k: int) -> Floats:
    mu = np.asarray(margins, np.float64)
    if k < 1 or not ((mu > 0) & (mu <= 1)).all():
        raise InvalidInputError("margins must lie in (0, 1], and k must be at least 1")
    return mu
