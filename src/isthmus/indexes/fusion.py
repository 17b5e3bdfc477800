"""Several runs of the same queries made one.

>>> sparse, dense = {"q": {"a": 2.0, "b": 1.0}}, {"q": {"b": 0.9, "c": 0.1}}
>>> fuse([sparse, dense], weights=[1.0, 2.0])["q"]  # what a run did not find gets its lowest score
{'a': 2.2, 'b': 2.8, 'c': 1.2}
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, get_args

import numpy as np

from isthmus.errors import InvalidInputError
from isthmus.metrics.ranking import Qrels, Run, evaluate, ranked

Method = Literal["weighted", "rrf"]
Scaling = Literal["none", "min-max", "z-score"]


def fuse(
    runs: Sequence[Run],
    *,
    method: Method = "weighted",
    weights: Sequence[float] | None = None,
    scaling: Scaling = "none",
    constant: float = 60.0,
) -> dict[str, dict[str, float]]:
    """One run out of several.

    Args:
        runs: Runs of the same queries.
        method: ``weighted``: weighted sum of scores; a document that a run did not find gets the
            lowest score that this run gave to the query (0 where it found nothing). ``rrf``:
            weighted sum of ``1 / (constant + rank)``, nothing for what was not found.
        weights: One a run; 1 each when None.
        scaling: Of each run's scores for a query, before they are weighted: to 0..1, or to mean 0
            and deviation 1.
        constant: Of ``rrf``; the larger, the less the first ranks stand out.

    Raises:
        InvalidInputError: There is no run, or numbers of weights and runs differ.
    """
    weights = [1.0] * len(runs) if weights is None else list(weights)
    if not runs or len(weights) != len(runs):
        raise InvalidInputError(f"every run needs a weight; got {len(runs)} and {len(weights)}")
    if method not in get_args(Method) or scaling not in get_args(Scaling):
        raise InvalidInputError(
            f"method is weighted or rrf, scaling none, min-max or z-score; got {method}, {scaling}"
        )
    queries = list(dict.fromkeys(query for run in runs for query in run))
    fused: dict[str, dict[str, float]] = {}
    for query in queries:
        found = [run.get(query, {}) for run in runs]
        documents = dict.fromkeys(d for scores in found for d in scores)
        totals = dict.fromkeys(documents, 0.0)
        for scores, weight in zip(found, weights, strict=True):
            if method == "rrf":
                places = {d: r for r, d in enumerate(ranked(scores, "ascending"), 1)}
                for d, rank in places.items():
                    totals[d] += weight / (constant + rank)
                continue
            scaled = _scaled(scores, scaling)
            lowest = min(scaled.values(), default=0.0)
            for d in documents:
                totals[d] += weight * scaled.get(d, lowest)
        fused[query] = totals
    return fused


def _scaled(scores: Mapping[str, float], scaling: Scaling) -> Mapping[str, float]:
    if scaling == "none" or not scores:
        return scores
    values = np.fromiter(scores.values(), np.float64, len(scores))
    if scaling == "min-max":
        low, width = values.min(), float(np.ptp(values))
    else:
        low, width = values.mean(), float(values.std())
    return {d: float(s - low) / (width or 1.0) for d, s in scores.items()}


def best_weight(
    first: Run,
    second: Run,
    qrels: Qrels,
    grid: Iterable[float],
    *,
    measure: str = "mrr@10",
    scaling: Scaling = "none",
) -> float:
    """Weight of the second run beside a weight 1 of the first one, chosen on development queries.

    Args:
        first: A run.
        second: Another one.
        qrels: What is relevant to the development queries; never those that are reported.
        grid: Weights to try; of equally good ones the first.
        measure: What should be high.
        scaling: As for :func:`fuse`.

    Example:
        >>> sparse, dense = {"q": {"a": 2.0, "b": 1.0}}, {"q": {"b": 1.0, "a": 0.0}}
        >>> best_weight(sparse, dense, {"q": {"b": 1}}, [0, 0.5, 2])
        2
    """

    def quality(weight: float) -> float:
        run = fuse([first, second], weights=[1.0, weight], scaling=scaling)
        return float(evaluate(qrels, run, [measure])[measure].mean())

    return max(grid, key=quality)
