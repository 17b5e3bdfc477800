"""Documents as bags of words: BM25, and sparse vectors that a model has learnt.

A representation maps terms to numbers: counts for BM25, weights where a model made them. The score
of a document is the sum, over the query's terms, of the query's number times the term's weight in
the document; BM25 only says what that weight is.

>>> index = SparseIndex()
>>> index.add(["a", "b"], [bag("read a file"), bag("readLines of two files")])
>>> index.search([bag("read_lines")], k=1)[0]
[['b']]
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from isthmus.errors import InvalidInputError
from isthmus.indexes.base import Arrays, BaseIndex, Floats, Ints, best

Bag = Mapping[str, float]

Weighting = Literal["lucene", "robertson", "atire", "none"]
"""Variant of BM25, which differ in the idf and by a factor; ``none`` takes numbers as weights."""

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+|[^\W\d_a-zA-Z]+")


def words(text: str) -> list[str]:
    """Words of a text or of source code, in lower case; camelCase, snake_case and digits are split.

    Example:
        >>> words("readHTTPLine2(self, max_size) naïve")
        ['read', 'http', 'line', '2', 'self', 'max', 'size', 'na', 'ï', 've']
    """
    return [word.lower() for word in _WORD.findall(text)]


def bag(text: str) -> Counter[str]:
    """Counts of the :func:`words` of a text."""
    return Counter(words(text))


def tf_idf(queries: Iterable[str], documents: Iterable[str]) -> tuple[Floats, Floats]:
    """TF-IDF vectors of queries [Q, V] and documents [N, V] over the words of the documents.

    Example:
        >>> q, d = tf_idf(["b"], ["a b", "a a"])
        >>> bool((d == np.log([[1, 2], [1, 1]], dtype=np.float32)).all())  # b: one of two has it
        True
    """
    bags = [bag(text) for text in documents]
    place = {w: i for i, w in enumerate(dict.fromkeys(w for b in bags for w in b))}
    asked = [bag(text) for text in queries]
    tables = [np.zeros((len(rows), len(place)), np.float32) for rows in (asked, bags)]
    for table, rows in zip(tables, (asked, bags), strict=True):
        for row, counts in zip(table, rows, strict=True):
            for word in counts.keys() & place.keys():
                row[place[word]] = counts[word]
    idf = np.log(len(bags) / (tables[1] > 0).sum(0)).astype(np.float32)
    return tables[0] * idf, tables[1] * idf


class SparseIndex(BaseIndex[Sequence[Bag]]):
    """Documents by the terms they share with the query.

    Args:
        weighting: ``lucene``, ``robertson`` or ``atire``: a variant of BM25 over counts; ``none``:
            a plain inner product.
        k1: How soon repeating a term stops to count.
        b: How much long documents are held back, 0 to 1.
    """

    kind = "sparse"

    def __init__(self, weighting: Weighting = "lucene", k1: float = 1.2, b: float = 0.75) -> None:
        super().__init__()
        if weighting not in get_args(Weighting):
            raise InvalidInputError(
                f"weighting must be {', '.join(get_args(Weighting))}, got {weighting!r}"
            )
        if k1 < 0 or not 0 <= b <= 1:
            raise InvalidInputError(f"k1 must not be negative and b from 0 to 1, got {k1} and {b}")
        self.weighting, self.k1, self.b = weighting, k1, b
        self.terms: dict[str, int] = {}
        self._rows: list[tuple[Ints, Floats]] = []
        self._columns: tuple[Ints, Ints, Floats] | None = None

    def _add(self, count: int, reps: Sequence[Bag]) -> None:
        if len(reps) != count:
            raise InvalidInputError(f"{count} ids for {len(reps)} bags of words")
        values = [np.fromiter(bag.values(), np.float32, len(bag)) for bag in reps]
        if not all(np.isfinite(v).all() and (v >= 0).all() for v in values):
            raise InvalidInputError("the numbers of terms must be finite and not negative")
        for bag_, value in zip(reps, values, strict=True):
            places = [self.terms.setdefault(term, len(self.terms)) for term in bag_]
            self._rows.append((np.array(places, np.int64), value))
        self._columns = None

    @property
    def columns(self) -> tuple[Ints, Ints, Floats]:
        """By term: first entry [V + 1], documents [E], and weights [E]."""
        if self._columns is None:
            lengths = [len(places) for places, _ in self._rows]
            documents = np.repeat(np.arange(len(self._rows)), lengths)
            terms = np.concatenate([p for p, _ in self._rows] or [np.empty(0, np.int64)])
            values = np.concatenate([v for _, v in self._rows] or [np.empty(0, np.float32)])
            order = np.argsort(terms, kind="stable")
            starts = np.zeros(len(self.terms) + 1, np.int64)
            np.cumsum(np.bincount(terms, minlength=len(self.terms)), out=starts[1:])
            weights = self._weights(terms, documents, values.astype(np.float64))
            self._columns = starts, documents[order], weights[order].astype(np.float32)
        return self._columns

    def _weights(
        self, terms: Ints, documents: Ints, values: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        if self.weighting == "none":
            return values
        n = len(self._rows)
        length = np.bincount(documents, values, minlength=n)
        holding = np.bincount(terms, values > 0, minlength=len(self.terms))
        odds = (n - holding + 0.5) / (holding + 0.5)
        with np.errstate(divide="ignore", invalid="ignore"):
            idf = {
                "lucene": np.log1p(odds),
                # where most documents hold a term it would count against them
                "robertson": np.log(np.maximum(odds, 1)),
                "atire": np.log(n / holding),
            }[self.weighting]
        slowed = self.k1 * (1 - self.b + self.b * length / max(length.mean(), 1e-12))
        scaled = values / (values + slowed[documents] + (values == 0))
        factor = self.k1 + 1 if self.weighting == "atire" else 1.0
        weights: NDArray[np.float64] = factor * idf[terms] * scaled
        return weights

    def _search(self, reps: Sequence[Bag], k: int) -> tuple[Ints, Floats]:
        starts, documents, weights = self.columns
        scores = np.zeros((1, len(self)), np.float32)
        places = np.empty((len(reps), k), np.int64)
        values = np.empty((len(reps), k), np.float32)
        for row, query in enumerate(reps):
            scores[:] = 0
            for term in sorted(query.keys() & self.terms.keys()):  # one order of adding up
                entries = slice(starts[self.terms[term]], starts[self.terms[term] + 1])
                scores[0, documents[entries]] += np.float32(query[term]) * weights[entries]
            places[row] = best(scores, k, self.rank)[0]
            values[row] = scores[0, places[row]]
        return places, values

    def _settings(self) -> dict[str, Any]:
        return {"weighting": self.weighting, "k1": self.k1, "b": self.b}

    def _arrays(self) -> Arrays:
        spelled = "\n".join(self.terms)
        if any("\n" in term for term in self.terms):
            raise InvalidInputError("a term that holds a line end cannot be written")
        return {
            "lengths": np.array([len(p) for p, _ in self._rows], np.int64),
            "terms": np.concatenate([p for p, _ in self._rows] or [np.empty(0, np.int64)]),
            "values": np.concatenate([v for _, v in self._rows] or [np.empty(0, np.float32)]),
            "vocabulary": np.frombuffer(spelled.encode(), np.uint8),
        }

    def _restore(self, arrays: Arrays) -> None:
        lengths, terms, values = (arrays[name] for name in ("lengths", "terms", "values"))
        spelled = arrays["vocabulary"].tobytes().decode()
        self.terms = {t: i for i, t in enumerate(spelled.split("\n") if len(terms) else ())}
        fits = lengths.ndim == 1 and (lengths >= 0).all() and lengths.sum() == len(terms)
        inside = not len(terms) or 0 <= terms.min() <= terms.max() < len(self.terms)
        if not fits or not inside or values.shape != terms.shape:
            raise ValueError("terms do not fit the documents")
        cuts = np.cumsum(lengths)[:-1]
        self._rows = list(zip(np.split(terms, cuts), np.split(values, cuts), strict=True))
        self._rows = self._rows if len(lengths) else []

    def _count(self) -> int:
        return len(self._rows)
