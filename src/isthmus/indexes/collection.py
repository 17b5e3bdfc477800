"""Documents that are searched by their words and, with a model, by their meaning.

::

    documents ─┬─ words ──▶ BM25 ────────────────────────────┬─ ranks ──▶ hybrid
               ├─ embed ──▶ vectors ────────┬─ scores added ─┘
               └─ weigh ──▶ learned terms ──┘

On disk a collection is a folder: ``collection.json``, the documents as ``documents.jsonl``, and an
index in each of ``sparse``, ``dense`` and ``learned`` that it has. It is written as a whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np

from isthmus.errors import BrokenFileError, InvalidInputError, MismatchError
from isthmus.folders import check_replaceable, digest, published
from isthmus.indexes.base import read_json, to_run
from isthmus.indexes.dense import DenseIndex
from isthmus.indexes.fusion import fuse
from isthmus.indexes.sparse import SparseIndex, bag
from isthmus.metrics.ranking import ranked
from isthmus.signals.text import SUFFIXES, read_text

CONFIG, DOCUMENTS = "collection.json", "documents.jsonl"
PROBE = "the same text under the same model has the same vector"
DEPTH = 100
"""Documents that each index hands over to be fused."""

Mode = Literal["auto", "sparse", "dense", "learned", "hybrid"]
Embed = Callable[[Sequence[str], str], Any]
"""From texts and ``query`` or ``document`` to vectors [N, D]."""
Weigh = Callable[[Sequence[str], str], Sequence[Mapping[str, float]]]
"""From texts and ``query`` or ``document`` to the weights of the terms that each stands for."""


@dataclass(frozen=True)
class Hit:
    """A document that was found.

    Attributes:
        id: Its id.
        score: Its score; only scores of one search compare.
        text: Its text.
    """

    id: str
    score: float
    text: str


class Collection:
    """Documents, an index of their words, and where there is a model what it makes of them.

    Args:
        documents: Texts by id.
        embed: Makes vectors.
        weigh: Weighs terms; with neither, words alone are searched.
        model: Name of what makes them, which is written down.
        graph: Whether vectors are searched by a graph of neighbours; see
            :class:`~isthmus.indexes.dense.DenseIndex`.

    Raises:
        InvalidInputError: There is no document.

    Example:
        >>> documents = {"a": "a cat sat", "b": "the dog lay"}
        >>> collection = Collection(documents, weigh=lambda texts, side: [
        ...     {"animal": float(len(text))} for text in texts])
        >>> collection.search("pet", mode="learned")[0]  # 3 x 11 against 3 x 9
        Hit(id='b', score=33.0, text='the dog lay')
    """

    def __init__(
        self,
        documents: Mapping[str, str],
        embed: Embed | None = None,
        *,
        weigh: Weigh | None = None,
        model: str = "",
        graph: bool = False,
    ) -> None:
        if not documents:
            raise InvalidInputError("a collection needs at least one document")
        self.documents, self.model = dict(documents), model
        self.embed, self.weigh = embed, weigh
        ids, texts = list(documents), list(documents.values())
        self.sparse = SparseIndex()
        self.sparse.add(ids, [bag(text) for text in texts])
        self.dense: DenseIndex | None = None
        self.learned: SparseIndex | None = None
        if embed is not None:
            self.dense = DenseIndex(graph=graph)
            self.dense.add(ids, embed(texts, "document"))
        if weigh is not None:
            self.learned = SparseIndex("none")
            self.learned.add(ids, weigh(texts, "document"))
        self._probe = self._probed()

    def _probed(self) -> list[float]:
        """A few numbers that another model would not make."""
        if self.embed is not None:
            return [float(x) for x in np.asarray(self.embed([PROBE], "document"))[0][:16]]
        if self.weigh is not None:
            return sorted(map(float, self.weigh([PROBE], "document")[0].values()))[-16:]
        return []

    def search(self, query: str, k: int = 10, *, mode: Mode = "auto") -> list[Hit]:
        """The best documents for a query.

        Args:
            query: Words.
            k: Documents at most; those that share no word with the query are no hits of
                ``sparse``, and those that share no term none of ``learned``.
            mode: ``sparse`` is BM25, ``dense`` the inner product of vectors, ``learned`` that of
                the weights that a model gives to terms; ``hybrid`` adds up the scores of the
                latter two, which were learnt together, and fuses them with BM25 by reciprocal
                ranks; ``auto`` is hybrid where there is a model.

        Raises:
            InvalidInputError: The query is empty, k is not positive, or there is no such index.
        """
        if mode not in get_args(Mode):
            raise InvalidInputError(f"mode must be {', '.join(get_args(Mode))}, got {mode!r}")
        if not query.strip():
            raise InvalidInputError("the query is empty; give some words")
        if mode == "auto":
            mode = "sparse" if self.dense is None and self.learned is None else "hybrid"
        depth = k if mode != "hybrid" else max(k, DEPTH)
        runs: list[dict[str, dict[str, float]]] = []
        made: list[dict[str, dict[str, float]]] = []
        if mode in ("sparse", "hybrid"):
            runs.append(_shared(to_run([""], self.sparse.search([bag(query)], depth))))
        if mode in ("dense", "hybrid") and self.dense is not None and self.embed is not None:
            made.append(to_run([""], self.dense.search(self.embed([query], "query"), depth)))
        if mode in ("learned", "hybrid") and self.learned is not None and self.weigh is not None:
            made.append(to_run([""], self.learned.search(self.weigh([query], "query"), depth)))
        if mode != "sparse" and not made:
            what = "learned weights" if mode == "learned" else "vectors"
            raise InvalidInputError(
                f"this collection has no {what}; build it with isthmus index --model MODEL"
            )
        if made:  # zeros count in the sum, but alone they are no hits
            runs.append(_shared(made[0]) if mode == "learned" else fuse(made))
        scores = fuse(runs, method="rrf")[""] if mode == "hybrid" else runs[0][""]
        best = ranked(scores, "ascending")[:k]
        return [Hit(d, scores[d], self.documents[d]) for d in best]

    def save(self, folder: str | Path) -> None:
        """Write the collection, replacing an older one in that folder as a whole.

        Raises:
            InvalidInputError: The folder holds something else.
            BrokenFileError: It cannot be written.
        """
        folder = Path(folder)
        check_replaceable(folder, (CONFIG,), "collection")
        with published(folder) as part:
            lines = (
                json.dumps({"id": i, "text": text}, ensure_ascii=False)
                for i, text in self.documents.items()
            )
            (part / DOCUMENTS).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            self.sparse.save(part / "sparse")
            made = {"dense": self.dense, "learned": self.learned}
            for name, index in made.items():
                if index is not None:
                    index.save(part / name)
            told = {
                "documents": len(self.documents),
                "model": self.model,
                "indexes": [name for name, index in made.items() if index is not None],
                "probe": self._probe,
                "sha256": digest(part / DOCUMENTS),
            }
            (part / CONFIG).write_text(json.dumps(told, indent=1), encoding="utf-8")

    @classmethod
    def load(
        cls,
        folder: str | Path,
        embed: Callable[[str], Embed | None] | None = None,
        weigh: Callable[[str], Weigh | None] | None = None,
    ) -> Self:
        """Read a collection.

        Args:
            folder: Where it is.
            embed: From the name of a model to what makes vectors; without it, queries find none.
            weigh: From the name of a model to what weighs terms; likewise.

        Raises:
            BrokenFileError: A file is missing, truncated or altered.
            MismatchError: The model makes other vectors than when the collection was written.
        """
        folder = Path(folder)
        told = read_json(folder / CONFIG)
        if not isinstance(told, dict) or not {"documents", "model", "sha256"} <= set(told):
            raise BrokenFileError(f"{folder / CONFIG} is damaged; build the index again")
        new = cls.__new__(cls)
        try:
            if digest(folder / DOCUMENTS) != told["sha256"]:
                raise ValueError(f"{DOCUMENTS} was altered or cut short")
            with (folder / DOCUMENTS).open(encoding="utf-8") as file:
                rows = [json.loads(line) for line in file]
            new.documents = {row["id"]: row["text"] for row in rows}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BrokenFileError(
                f"the collection in {folder} is damaged ({error}); build it again"
            ) from error
        new.model, new._probe = told["model"], told["probe"]
        new.embed, new.dense, new.weigh, new.learned = None, None, None, None
        # older collections have vectors where they have a model
        names = told.get("indexes", ["dense"] if new.model else [])
        new.sparse = SparseIndex.load(folder / "sparse")
        indexes: list[Any] = [new.sparse]
        if "dense" in names:
            new.dense = DenseIndex.load(folder / "dense")
            indexes.append(new.dense)
            new.embed = embed(new.model) if embed is not None else None
        if "learned" in names:
            new.learned = SparseIndex.load(folder / "learned")
            indexes.append(new.learned)
            new.weigh = weigh(new.model) if weigh is not None else None
        if any(index.ids != list(new.documents) for index in indexes):
            raise BrokenFileError(f"the indexes in {folder} hold other documents; build it again")
        if new.embed is not None or ("dense" not in names and new.weigh is not None):
            found = new._probed()
            if len(found) != len(new._probe) or not np.allclose(found, new._probe, atol=1e-3):
                raise MismatchError(
                    f"{new.model} makes other vectors than when {folder} was built; build it again"
                )
        return new


def _shared(run: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """A run without documents that share nothing with their query."""
    return {query: {d: s for d, s in found.items() if s > 0} for query, found in run.items()}


def read_documents(paths: Iterable[Path], *, words: int = 0) -> dict[str, str]:
    """Documents of files and folders by id.

    Args:
        paths: Text files, whose id is their path (below a folder that is given, their path in
            it); ``.jsonl`` files with a field ``"text"`` and perhaps ``"id"`` a line; and folders
            of such files.
        words: Cut documents into passages of so many words, with ids ``ID#1``, ``ID#2`` ...; 0
            cuts nothing.

    Raises:
        BrokenFileError: A file cannot be read; file and line are named.
        InvalidInputError: There is no document, or two have one id.
    """
    found: dict[str, str] = {}
    for path in paths:
        files = [path]
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
        for file in files:
            name = file.relative_to(path).as_posix() if path.is_dir() else file.as_posix()
            for key, text in _documents(file, name):
                if key in found or f"{key}#1" in found:
                    raise InvalidInputError(f"two documents have the id {key!r}, one in {file}")
                if text.strip():
                    found |= _passages(key, text, words)
    if not found:
        raise InvalidInputError(f"no text in {' '.join(map(str, paths)) or 'nothing'}")
    return found


def _passages(key: str, text: str, words: int) -> dict[str, str]:
    cut = text.split() if words else []
    if len(cut) <= words:
        return {key: text}
    parts = [" ".join(cut[s : s + words]) for s in range(0, len(cut), words)]
    return {f"{key}#{number}": part for number, part in enumerate(parts, 1)}


def _documents(file: Path, name: str) -> Iterator[tuple[str, str]]:
    whole = read_text(file)
    if file.suffix != ".jsonl":
        yield name, whole
        return
    for number, line in enumerate(whole.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            text, key = row["text"], row.get("id", f"{name}:{number}")
            if not isinstance(text, str):
                raise TypeError
        except (ValueError, KeyError, TypeError, AttributeError):
            raise BrokenFileError(
                f'{file}, line {number}: needs a JSON object with a string "text"'
            ) from None
        yield str(key), text
