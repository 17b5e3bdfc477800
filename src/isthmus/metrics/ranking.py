"""How good rankings are: nDCG, MRR, MAP, recall, success and precision, with trec_eval's meaning.

``qrels`` says which documents are relevant to a query and how much, ``run`` which documents a
system found and with what score::

    qrels = {"q1": {"d3": 1}}            run = {"q1": {"d1": 0.9, "d3": 0.4}}

Every measure gives one value a query, so that two systems are compared query by query
(:func:`paired_bootstrap`). Both sides are read and written in TREC's formats.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from isthmus.errors import BrokenFileError, InvalidInputError, UnknownNameError

Qrels = Mapping[str, Mapping[str, int]]
Run = Mapping[str, Mapping[str, float]]
Floats = NDArray[np.float64]

Gain = Literal["linear", "exponential"]
"""What a relevance r is worth to nDCG: r, as in trec_eval, or ``2^r - 1``."""

Ties = Literal["descending", "ascending"]
"""Order by id of documents with equal scores; trec_eval's is descending."""


def ranked(scores: Mapping[str, float], ties: Ties = "descending") -> list[str]:
    """Documents by falling score.

    Example:
        >>> ranked({"a": 1.0, "b": 2.0, "c": 1.0})
        ['b', 'c', 'a']
    """
    ids = sorted(scores, reverse=ties == "descending")
    return sorted(ids, key=lambda i: -scores[i])


# each measure sees relevances in rank order, cut at k, and all relevances of the query, falling


def _ndcg(found: Floats, ideal: Floats, k: int) -> float:
    discount = 1 / np.log2(np.arange(2, max(len(found), len(ideal[:k])) + 2))
    best = ideal[:k] @ discount[: len(ideal[:k])]
    return float(found @ discount[: len(found)] / best)


def _mrr(found: Floats, ideal: Floats, k: int) -> float:
    del ideal, k
    hits = np.flatnonzero(found > 0)
    return 1 / (1 + float(hits[0])) if len(hits) else 0.0


def _map(found: Floats, ideal: Floats, k: int) -> float:
    del k
    hits = np.flatnonzero(found > 0)
    precisions = np.arange(1, len(hits) + 1) / (hits + 1)
    return float(precisions.sum()) / len(ideal)


def _recall(found: Floats, ideal: Floats, k: int) -> float:
    del k
    return float((found > 0).sum()) / len(ideal)


def _success(found: Floats, ideal: Floats, k: int) -> float:
    del ideal, k
    return float((found > 0).any())


def _precision(found: Floats, ideal: Floats, k: int) -> float:
    del ideal
    return float((found > 0).sum()) / k


MEASURES: dict[str, Callable[[Floats, Floats, int], float]] = {
    "ndcg": _ndcg,
    "mrr": _mrr,
    "map": _map,
    "recall": _recall,
    "success": _success,
    "precision": _precision,
}
"""The measures by name; ``NAME@K`` looks at the first K documents."""


def evaluate(
    qrels: Qrels,
    run: Run,
    measures: Sequence[str] = ("ndcg@10", "mrr@10", "recall@100"),
    *,
    gain: Gain = "linear",
    ties: Ties = "descending",
) -> dict[str, Floats]:
    """Every measure of every query of ``qrels``, in its order.

    Args:
        qrels: Relevance of documents; 0 and below is not relevant.
        run: Scores of documents found. A query that is not in it, or found nothing, counts 0;
            queries that nobody judged are left out.
        measures: ``NAME`` or ``NAME@K``, names in :data:`MEASURES`; precision needs a K.
        gain: What relevance is worth to nDCG.
        ties: Order of equal scores.

    Returns:
        float64 [Q] a measure.

    Raises:
        UnknownNameError: No such measure.
        InvalidInputError: A query has no relevant document, a K is not positive, or a score is
            not a number.

    Example:
        >>> values = evaluate({"q": {"a": 1, "b": 1}}, {"q": {"x": 3, "a": 2, "b": 1}}, ["map"])
        >>> values["map"].round(4).tolist()  # (1/2 + 2/3) / 2
        [0.5833]
    """
    if not qrels:
        raise InvalidInputError("there are no queries to evaluate; qrels are empty")
    asked = {name: _parsed(name) for name in measures}
    rows: dict[str, list[float]] = {name: [] for name in asked}
    for query, judged in qrels.items():
        ideal = np.sort([r for r in judged.values() if r > 0])[::-1].astype(np.float64)
        if not len(ideal):
            raise InvalidInputError(
                f"query {query!r} has no relevant document, so no ranking of it is good or bad; "
                "leave it out of the qrels"
            )
        scores = run.get(query, {})
        if not np.isfinite(list(scores.values())).all():
            raise InvalidInputError(f"a score of query {query!r} is not a finite number")
        found = np.array([max(0, judged.get(d, 0)) for d in ranked(scores, ties)], np.float64)
        for name, (measure, k) in asked.items():
            cut, best = found[:k], ideal
            if measure is _ndcg and gain == "exponential":
                cut, best = 2**cut - 1, 2**ideal - 1
            rows[name].append(measure(cut, best, k))
    return {name: np.array(values) for name, values in rows.items()}


def _parsed(name: str) -> tuple[Callable[[Floats, Floats, int], float], int]:
    match = re.fullmatch(r"([a-z]+)(?:@(\d+))?", name)
    if not match or match[1] not in MEASURES:
        raise UnknownNameError("measure", name, MEASURES, hint="add @K to look at K documents")
    if match[2] is None and match[1] == "precision":
        raise InvalidInputError("precision needs a number of documents, for example precision@5")
    k = int(match[2]) if match[2] else 2**31
    if k < 1:
        raise InvalidInputError(f"{name!r} looks at no document; K must be at least 1")
    return MEASURES[match[1]], k


class Difference(NamedTuple):
    """A mean difference and its interval."""

    mean: float
    low: float
    high: float


def paired_bootstrap(
    ours: ArrayLike,
    theirs: ArrayLike,
    *,
    samples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Difference:
    """Mean of ``ours - theirs`` over queries, with an interval by drawing queries anew.

    Args:
        ours: One value a query, [Q].
        theirs: Those of the other system, same queries.
        samples: Draws.
        level: Share of draws within the interval.
        seed: Seed of the draws.

    Raises:
        InvalidInputError: The two are not of one length, or empty.

    Example:
        >>> paired_bootstrap([0.5, 0.5], [0.25, 0.25])
        Difference(mean=0.25, low=0.25, high=0.25)
    """
    a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise InvalidInputError(
            f"values are compared query by query; got {list(a.shape)} and {list(b.shape)}"
        )
    gaps = a - b
    drawn = np.random.default_rng(seed).integers(0, len(gaps), (samples, len(gaps)))
    low, high = np.quantile(gaps[drawn].mean(1), [(1 - level) / 2, (1 + level) / 2])
    return Difference(float(gaps.mean()), float(low), float(high))


def read_qrels(path: str | Path) -> dict[str, dict[str, int]]:
    """Read TREC qrels: ``query 0 document relevance`` a line.

    Raises:
        BrokenFileError: The file cannot be read; file and line are named.
    """
    found: dict[str, dict[str, int]] = {}
    for number, words in _rows(Path(path), 4):
        try:
            found.setdefault(words[0], {})[words[2]] = int(words[3])
        except ValueError:
            raise BrokenFileError(f"{path}, line {number}: {words[3]!r} is no relevance") from None
    return found


def read_run(path: str | Path) -> dict[str, dict[str, float]]:
    """Read a TREC run: ``query Q0 document rank score name`` a line; ranks are not used.

    Raises:
        BrokenFileError: The file cannot be read; file and line are named.
    """
    found: dict[str, dict[str, float]] = {}
    for number, words in _rows(Path(path), 6):
        try:
            found.setdefault(words[0], {})[words[2]] = float(words[4])
        except ValueError:
            raise BrokenFileError(f"{path}, line {number}: {words[4]!r} is no score") from None
    return found


def _rows(path: Path, columns: int) -> list[tuple[int, list[str]]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BrokenFileError(f"{path} cannot be read as TREC text ({error})") from error
    rows = [(n, line.split()) for n, line in enumerate(lines, 1) if line.strip()]
    for number, words in rows:
        if len(words) != columns:
            raise BrokenFileError(
                f"{path}, line {number}: needs {columns} columns, it has {len(words)}"
            )
    return rows


def write_qrels(path: str | Path, qrels: Qrels) -> None:
    """Write TREC qrels.

    Raises:
        InvalidInputError: An id holds a space.
        BrokenFileError: The file cannot be written.
    """
    _write(path, [(q, "0", d, str(r)) for q, judged in qrels.items() for d, r in judged.items()])


def write_run(path: str | Path, run: Run, name: str = "isthmus") -> None:
    """Write a TREC run.

    Raises:
        InvalidInputError: An id holds a space.
        BrokenFileError: The file cannot be written.
    """
    _write(
        path,
        [
            (query, "Q0", d, str(rank), repr(float(scores[d])), name)
            for query, scores in run.items()
            for rank, d in enumerate(ranked(scores), 1)
        ],
    )


def _write(path: str | Path, rows: Sequence[tuple[str, ...]]) -> None:
    path = Path(path)
    for row in rows:
        for word in row:
            if not word or len(word.split()) != 1:
                raise InvalidInputError(f"TREC files have no room for the id {word!r}")
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text("".join(f"{' '.join(row)}\n" for row in rows), encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise BrokenFileError(f"{path} cannot be written ({error.strerror})") from error
