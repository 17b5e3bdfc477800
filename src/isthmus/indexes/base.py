"""What all indexes share: ids, the best k with ties in a fixed order, and files.

An index on disk is a folder: ``index.json`` (kind, settings, digest), ``ids.json`` and
``index.safetensors``. It is written as a whole, and read only if every part fits the others.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from isthmus.errors import BrokenFileError, InvalidInputError, MismatchError
from isthmus.folders import check_replaceable, digest, published

CONFIG, IDS, TENSORS = "index.json", "ids.json", "index.safetensors"
MAX_JSON = 2**31
"""Largest JSON file of an index that is read."""

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Arrays = dict[str, NDArray[Any]]
R = TypeVar("R")


class BaseIndex(Generic[R]):
    """Documents under ids, searched by representations of the kind R.

    Attributes:
        kind: Its name on disk.
        exact: Whether a search finds the best documents for certain.
        ids: Ids in the order they were added.
    """

    kind: ClassVar[str]
    exact: bool = True

    def __init__(self) -> None:
        self.ids: list[str] = []
        self._known: set[str] = set()
        self._rank: Ints | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def add(self, ids: Sequence[str], reps: R) -> None:
        """Add documents.

        Args:
            ids: Their ids, new to the index.
            reps: Their representations, one an id.

        Raises:
            InvalidInputError: An id is there already, or the numbers do not fit.
        """
        seen = set(ids)
        twice = next((i for i in ids if i in self._known), None)
        if twice is not None or len(seen) < len(ids):
            which = f"; {twice!r} is there already" if twice is not None else ""
            raise InvalidInputError(f"every document needs an id of its own{which}")
        self._add(len(ids), reps)
        self.ids += list(ids)
        self._known |= seen
        self._rank = None

    def search(self, reps: R, k: int = 10) -> tuple[list[list[str]], Floats]:
        """The best documents of every query; equal scores in the order of ids.

        Args:
            reps: Queries.
            k: Documents; all, where there are fewer.

        Returns:
            Ids [Q][k] and scores float32 [Q, k], falling.

        Raises:
            InvalidInputError: The index is empty, or k is not positive.
        """
        if k < 1:
            raise InvalidInputError(f"k must be at least 1, got {k}")
        if not self.ids:
            raise InvalidInputError("the index is empty; add documents first")
        places, scores = self._search(reps, min(k, len(self.ids)))
        return [[self.ids[p] for p in row] for row in places.tolist()], scores

    @property
    def rank(self) -> Ints:
        """Place of every document in the order of ids, int64 [N]."""
        if self._rank is None:
            order = sorted(range(len(self.ids)), key=self.ids.__getitem__)
            self._rank = np.empty(len(order), np.int64)
            self._rank[order] = np.arange(len(order))
        return self._rank

    # what a kind fills in ----------------------------------------------------------------------

    def _add(self, count: int, reps: R) -> None:
        raise NotImplementedError

    def _search(self, reps: R, k: int) -> tuple[Ints, Floats]:
        raise NotImplementedError

    def _settings(self) -> dict[str, Any]:
        """What its constructor takes."""
        raise NotImplementedError

    def _arrays(self) -> Arrays:
        raise NotImplementedError

    def _restore(self, arrays: Arrays) -> None:
        """Take arrays over; :class:`ValueError` or :class:`KeyError` where they do not fit."""
        raise NotImplementedError

    # files -------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write the index, replacing an older one in that folder as a whole.

        Raises:
            InvalidInputError: The folder holds something else.
            BrokenFileError: It cannot be written.
        """
        folder = Path(folder)
        check_replaceable(folder, (CONFIG,), "index")
        with published(folder) as part:
            save_file(self._arrays(), part / TENSORS)
            (part / IDS).write_text(json.dumps(self.ids), encoding="utf-8")
            told = {
                "kind": self.kind,
                "settings": self._settings(),
                "documents": len(self.ids),
                "sha256": {name: digest(part / name) for name in (TENSORS, IDS)},
            }
            (part / CONFIG).write_text(json.dumps(told, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read an index.

        Raises:
            BrokenFileError: A file is missing, truncated or altered.
            MismatchError: It is an index of another kind.
        """
        folder = Path(folder)
        told = read_json(folder / CONFIG)
        if not isinstance(told, dict) or not {"kind", "settings", "sha256"} <= set(told):
            raise BrokenFileError(f"{folder / CONFIG} is damaged; build the index again")
        if told["kind"] != cls.kind:
            raise MismatchError(f"{folder} holds an index of kind {told['kind']}, not {cls.kind}")
        try:
            for name, expected in told["sha256"].items():
                if name not in (TENSORS, IDS) or digest(folder / name) != expected:
                    raise ValueError(f"{name} was altered or cut short")
            index = cls(**told["settings"])
            index._restore(load_file(folder / TENSORS))
            ids = read_json(folder / IDS)
            if not isinstance(ids, list) or not all(isinstance(i, str) for i in ids):
                raise ValueError("ids are no list of strings")
            if len(ids) != index._count() or len(set(ids)) != len(ids):
                raise ValueError(f"{len(ids)} ids for {index._count()} documents")
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BrokenFileError(
                f"the index in {folder} is damaged ({error}); build it again"
            ) from error
        index.ids, index._known = ids, set(ids)
        return index

    def _count(self) -> int:
        """Documents that the arrays hold."""
        raise NotImplementedError


def best(scores: NDArray[Any], k: int, rank: Ints) -> Ints:
    """Columns of the k best scores of every row, falling; equal ones by rank.

    Args:
        scores: [Q, N].
        k: At most N.
        rank: Which of two columns with equal scores comes first, [N].

    Example:
        >>> best(np.array([[1.0, 3.0, 1.0, 0.0]]), 2, np.array([3, 2, 1, 0])).tolist()
        [[1, 2]]
    """
    n = scores.shape[1]
    least = np.partition(scores, n - k, axis=1)[:, n - k]
    out = np.empty((len(scores), k), np.int64)
    for row, (values, low) in enumerate(zip(scores, least, strict=True)):
        near = np.flatnonzero(values >= low)
        out[row] = near[np.lexsort((rank[near], -values[near]))[:k]]
    return out


def vectors(reps: Any, width: int | None = None) -> Floats:
    """Vectors as finite float32 [N, D], from an array or a tensor.

    Raises:
        InvalidInputError: They are of another shape, or a value is not finite.
    """
    if hasattr(reps, "detach"):
        reps = reps.detach().float().cpu().numpy()
    found = np.ascontiguousarray(reps, np.float32)
    if found.ndim != 2 or not found.shape[1] or width not in (None, found.shape[1]):
        wanted = f"[N, {width or 'D'}]"
        raise InvalidInputError(f"vectors must have shape {wanted}, got {list(found.shape)}")
    if not np.isfinite(found).all():
        raise InvalidInputError("a vector holds a value that is not finite")
    return found


def read_json(path: Path) -> Any:
    """JSON of a file of bounded size.

    Raises:
        BrokenFileError: It is missing, too large, or no JSON.
    """
    try:
        if path.stat().st_size > MAX_JSON:
            raise BrokenFileError(f"{path} is larger than {MAX_JSON >> 30} GiB; that is no index")
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BrokenFileError(f"{path.parent} holds no index ({path.name} is missing)") from None
    except (OSError, ValueError, RecursionError) as error:
        raise BrokenFileError(f"{path} is damaged ({error}); build the index again") from error


def to_run(
    queries: Sequence[str], found: tuple[Sequence[Sequence[str]], Floats]
) -> dict[str, dict[str, float]]:
    """What a search found, as a run of :mod:`isthmus.metrics.ranking`.

    Example:
        >>> to_run(["q"], ([["b", "a"]], np.array([[2.0, 1.0]], np.float32)))
        {'q': {'b': 2.0, 'a': 1.0}}
    """
    return {
        query: dict(zip(ids, scores.tolist(), strict=True))
        for query, ids, scores in zip(queries, *found, strict=True)
    }


def positive(settings: Mapping[str, float]) -> None:
    """Refuse settings that are not positive numbers.

    Raises:
        InvalidInputError: One is not.
    """
    for name, value in settings.items():
        if not value > 0:
            raise InvalidInputError(f"{name} must be positive, got {value}")
