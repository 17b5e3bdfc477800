"""Several vectors a document: late interaction.

``sum``: ``s(q, d) = sum_i max_j <q_i, d_j>`` (MaxSim). ``max``: ``max_ij <q_i, d_j>``, for queries
of one vector the same.

>>> index = MultiVectorIndex()
>>> index.add(["a", "b"], [[[1.0, 0.0], [0.0, 2.0]], [[1.0, 1.0]]])
>>> index.search([[[1.0, 0.0], [0.0, 1.0]]], k=2)  # a: 1 + 2, b: 1 + 1
([['a', 'b']], array([[3., 2.]], dtype=float32))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np

from isthmus.errors import InvalidInputError
from isthmus.indexes.base import Arrays, BaseIndex, Floats, Ints, best, vectors

Interaction = Literal["sum", "max"]


class MultiVectorIndex(BaseIndex[Sequence[Any]]):
    """Documents by the best match among their vectors; every document is looked at.

    Args:
        interaction: ``sum`` over the query's vectors, or the ``max`` of them.
    """

    kind = "multi-vector"

    def __init__(self, interaction: Interaction = "sum") -> None:
        super().__init__()
        if interaction not in get_args(Interaction):
            raise InvalidInputError(f"interaction must be sum or max, got {interaction!r}")
        self.interaction = interaction
        self.width: int | None = None
        self._parts: list[Floats] = []
        self._lengths: list[int] = []

    @property
    def nbytes(self) -> int:
        """Bytes of the vectors."""
        return sum(part.nbytes for part in self._parts)

    def _add(self, count: int, reps: Sequence[Any]) -> None:
        if len(reps) != count:
            raise InvalidInputError(f"{count} ids for {len(reps)} documents")
        new, width = [], self.width
        for rep in reps:
            new.append(vectors(rep, width))
            width = new[-1].shape[1]
        if not all(map(len, new)):
            raise InvalidInputError("a document needs at least one vector")
        self.width = width
        self._parts += new
        self._lengths += map(len, new)

    def _search(self, reps: Sequence[Any], k: int) -> tuple[Ints, Floats]:
        self._parts = [np.concatenate(self._parts)] if len(self._parts) > 1 else self._parts
        starts = np.concatenate([[0], np.cumsum(self._lengths)[:-1]])
        scores = np.empty((1, len(self)), np.float32)
        places = np.empty((len(reps), k), np.int64)
        values = np.empty((len(reps), k), np.float32)
        for row, rep in enumerate(reps):
            query = vectors(rep, self.width)
            if not len(query):
                raise InvalidInputError("a query needs at least one vector")
            matches = np.maximum.reduceat(query @ self._parts[0].T, starts, axis=1)  # [n, N]
            scores[0] = matches.sum(0) if self.interaction == "sum" else matches.max(0)
            places[row] = best(scores, k, self.rank)[0]
            values[row] = scores[0, places[row]]
        return places, values

    def _settings(self) -> dict[str, Any]:
        return {"interaction": self.interaction}

    def _arrays(self) -> Arrays:
        if not self._parts:
            raise InvalidInputError("the index is empty; add documents first")
        return {"vectors": np.concatenate(self._parts), "lengths": np.array(self._lengths)}

    def _restore(self, arrays: Arrays) -> None:
        stored, lengths = arrays["vectors"], arrays["lengths"]
        if stored.ndim != 2 or stored.dtype != np.float32 or lengths.ndim != 1:
            raise ValueError(f"vectors of {stored.dtype} {list(stored.shape)}")
        if (lengths < 1).any() or lengths.sum() != len(stored):
            raise ValueError("vectors do not fit the documents")
        self._parts, self.width = [stored], stored.shape[1]
        self._lengths = lengths.tolist()

    def _count(self) -> int:
        return len(self._lengths)
