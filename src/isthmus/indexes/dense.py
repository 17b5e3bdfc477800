"""One vector a document: exact search by blocks, small vectors, and a graph of neighbours.

>>> index = DenseIndex()
>>> index.add(["a", "b"], [[1.0, 0.0], [0.6, 0.8]])
>>> index.search([[0.0, 1.0]], k=1)
([['b']], array([[0.8]], dtype=float32))
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from isthmus.errors import InvalidInputError, require
from isthmus.indexes.base import Arrays, BaseIndex, Floats, Ints, best, positive, vectors

BLOCK = 16_384
"""Documents scored at a time."""

ROWS = 256
"""Queries scored at a time."""

Precision = Literal["float32", "int8", "binary"]


class DenseIndex(BaseIndex[Any]):
    """Documents by the inner product of their vector with the query's.

    Args:
        precision: How vectors are kept: ``float32``; ``int8``, a quarter of the bytes, each
            dimension scaled by its largest value among the first documents that were added; or
            ``binary``, the signs alone, a 32nd. Queries stay float32.
        graph: Search a graph of neighbours (HNSW, extra ``retrieve``) instead of everything:
            faster for many documents, and it may miss some; :meth:`recall` says how many.
        connectivity: Neighbours of a node of the graph.
        expansion: Nodes that a search of the graph keeps in view; more find more.

    Attributes:
        exact: Whether the best documents are found for certain, by the vectors that were added.
    """

    kind = "dense"

    def __init__(
        self,
        precision: Precision = "float32",
        graph: bool = False,
        connectivity: int = 16,
        expansion: int = 64,
    ) -> None:
        super().__init__()
        if precision not in get_args(Precision):
            raise InvalidInputError(
                f"precision must be {', '.join(get_args(Precision))}, got {precision!r}"
            )
        positive({"connectivity": connectivity, "expansion": expansion})
        self.precision, self.graph = precision, graph
        self.connectivity, self.expansion = connectivity, expansion
        self.exact = precision == "float32" and not graph
        self.width: int | None = None
        self._parts: list[NDArray[Any]] = []
        self._scale: Floats | None = None
        self._graph: Any = None

    @property
    def nbytes(self) -> int:
        """Bytes of the vectors."""
        return sum(part.nbytes for part in self._parts)

    def recall(self, reps: Any, k: int = 10) -> float:
        """Share of the k best by exact search of the kept vectors that :meth:`search` finds."""
        queries = vectors(reps, self.width)
        found = self._search(queries, min(k, len(self)))[0]
        truth = self._scan(queries, min(k, len(self)))[0]
        shared = [len(set(a) & set(b)) for a, b in zip(found.tolist(), truth.tolist(), strict=True)]
        return sum(shared) / truth.size

    def _add(self, count: int, reps: Any) -> None:
        new = vectors(reps, self.width)
        if len(new) != count:
            raise InvalidInputError(f"{count} ids for {len(new)} vectors")
        self.width, self._graph = new.shape[1], None
        if self.precision == "int8" and self._scale is None:
            self._scale = np.maximum(np.abs(new).max(0), 1e-12).astype(np.float32) / 127
        self._parts.append(self._small(new))

    def _small(self, new: Floats) -> NDArray[Any]:
        small: NDArray[Any] = new
        if self.precision == "binary":
            small = np.packbits(new > 0, axis=1)
        elif self._scale is not None:
            small = np.clip(np.rint(new / self._scale), -127, 127).astype(np.int8)
        return small

    def _stored(self) -> NDArray[Any]:
        if len(self._parts) > 1:
            self._parts = [np.concatenate(self._parts)]
        return self._parts[0]

    def _large(self, part: NDArray[Any]) -> Floats:
        """Kept vectors as float32; the scale of int8 is on the query's side."""
        if self.precision == "binary":
            bits = np.unpackbits(part, axis=1, count=self.width)
            return bits.astype(np.float32) * 2 - 1
        large: Floats = part.astype(np.float32, copy=False)
        return large

    def _search(self, reps: Any, k: int) -> tuple[Ints, Floats]:
        queries = vectors(reps, self.width)
        return self._walk(queries, k) if self.graph else self._scan(queries, k)

    def _scan(self, queries: Floats, k: int) -> tuple[Ints, Floats]:
        """Every document, by blocks; memory does not grow with their number."""
        stored, scale = self._stored(), self._scale
        places = np.empty((len(queries), k), np.int64)
        scores = np.empty((len(queries), k), np.float32)
        for row in range(0, len(queries), ROWS):
            some = queries[row : row + ROWS]
            some = some if scale is None else some * scale
            kept = np.empty((len(some), 0), np.int64)
            values = np.empty((len(some), 0), np.float32)
            for start in range(0, len(stored), BLOCK):
                new = some @ self._large(stored[start : start + BLOCK]).T  # [q, block]
                here = np.arange(start, start + new.shape[1])
                values = np.concatenate([values, new], 1)
                kept = np.concatenate([kept, np.broadcast_to(here, new.shape)], 1)
                # ranks differ by row once blocks are merged
                columns = np.stack(
                    [
                        best(v[None], min(k, len(v)), self.rank[p])[0]
                        for v, p in zip(values, kept, strict=True)
                    ]
                )
                values = np.take_along_axis(values, columns, 1)
                kept = np.take_along_axis(kept, columns, 1)
            places[row : row + ROWS], scores[row : row + ROWS] = kept, values
        return places, scores

    def _walk(self, queries: Floats, k: int) -> tuple[Ints, Floats]:
        """The graph, then exact scores of what it found."""
        if self._graph is None:
            self._graph = self._built()
        stored = self._stored()
        scale = 1.0 if self._scale is None else self._scale
        found = self._graph.search(queries * scale, k, threads=1, exact=False)
        places = np.asarray(found.keys, np.int64).reshape(len(queries), -1)
        if places.shape[1] < k or (np.asarray(found.counts) < k).any():
            return self._scan(queries, k)  # it reached fewer documents than asked for
        scores = np.stack(
            [self._large(stored[p]) @ q for p, q in zip(places, queries * scale, strict=True)]
        ).astype(np.float32)
        order = np.stack(
            [np.lexsort((self.rank[p], -s)) for p, s in zip(places, scores, strict=True)]
        )
        return np.take_along_axis(places, order, 1), np.take_along_axis(scores, order, 1)

    def _built(self) -> Any:
        library = require("usearch.index", "retrieve")
        graph = library.Index(
            ndim=self.width,
            metric="ip",
            dtype="f32",
            connectivity=self.connectivity,
            expansion_search=self.expansion,
        )
        # one thread, so that the same documents give the same graph
        graph.add(np.arange(len(self)), self._large(self._stored()), threads=1)
        return graph

    def _settings(self) -> dict[str, Any]:
        return {
            "precision": self.precision,
            "graph": self.graph,
            "connectivity": self.connectivity,
            "expansion": self.expansion,
        }

    def _arrays(self) -> Arrays:
        if not self._parts:
            raise InvalidInputError("the index is empty; add documents first")
        arrays: Arrays = {"vectors": self._stored(), "width": np.array([self.width], np.int64)}
        return arrays if self._scale is None else {**arrays, "scale": self._scale}

    def _restore(self, arrays: Arrays) -> None:
        stored, width = arrays["vectors"], int(arrays["width"][0])
        kind = {"float32": np.float32, "int8": np.int8, "binary": np.uint8}[self.precision]
        columns = -(-width // 8) if self.precision == "binary" else width
        if stored.dtype != kind or stored.shape[1:] != (columns,):
            raise ValueError(f"vectors of {stored.dtype} {list(stored.shape)}")
        if self.precision == "int8":
            self._scale = arrays["scale"]
            if self._scale.shape != (width,):
                raise ValueError("the scale does not fit the vectors")
        self._parts, self.width = [stored], width

    def _count(self) -> int:
        return len(self._stored())
