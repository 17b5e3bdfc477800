"""Retrieval tasks made from the standard library's source: find the code, find the passage.

::

    doc2code   the first paragraph of a docstring  ->  the function, without docstring and comments
    text       the first paragraph of a docstring  ->  what the docstring goes on to say
    long       the same query                      ->  the same passage, hidden among others
    containing a few words in a row, common ones in another tongue  ->  the piece they stand in

A package (``json``, ``asyncio`` ...) belongs wholly to ``train``, ``dev`` or ``test``, by a hash of
its name. Counts move with the Python version; numbers in one table name the corpus digest
(:func:`isthmus.workbench.pycode.digest`).
"""

from __future__ import annotations

import ast
import functools
import hashlib
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal, Self, get_args

from isthmus.errors import InvalidInputError
from isthmus.indexes.base import to_run
from isthmus.indexes.sparse import SparseIndex, bag
from isthmus.metrics.ranking import evaluate
from isthmus.training.data import Pair
from isthmus.workbench import pycode

Part = Literal["train", "dev", "test"]

SHARES = {"train": 75, "dev": 10, "test": 15}
"""Percent of the packages in every part."""

MIN_WORDS, MAX_WORDS = 3, 256
"""Words of a query."""

_LETTERS = re.compile(r"[A-Za-z]+")

MIN_BODY_LINES = 3
MIN_PASSAGE_WORDS = 8


@dataclass(frozen=True)
class Task:
    """A corpus, queries, and which documents answer them.

    Attributes:
        queries: Text of every query by id.
        documents: Text of every document by id.
        qrels: Relevant documents of every query.
    """

    queries: Mapping[str, str]
    documents: Mapping[str, str]
    qrels: Mapping[str, Mapping[str, int]]

    @classmethod
    def of(cls, pairs: Sequence[Pair]) -> Self:
        """Pairs as a task: every target is a document, equal sources are one query."""
        ids = {text: str(i) for i, text in enumerate(dict.fromkeys(p.target for p in pairs))}
        qrels: dict[str, dict[str, int]] = {}
        for pair in pairs:
            qrels.setdefault(pair.source, {})[ids[pair.target]] = 1
        return cls({q: q for q in qrels}, {i: text for text, i in ids.items()}, qrels)

    @property
    def pairs(self) -> list[Pair]:
        """Every query with each of its documents."""
        return [
            Pair(self.queries[query], self.documents[key])
            for query, answers in self.qrels.items()
            for key in answers
        ]


@dataclass(frozen=True)
class Function:
    """A function with a docstring.

    Attributes:
        id: ``path:qualified.name``, with a number where it is defined again.
        part: Part of its package.
        name: Its own name.
        summary: First paragraph of its docstring, on one line.
        code: Its source, unparsed: no docstring, no comments.
    """

    id: str
    part: Part
    name: str
    summary: str
    code: str


@dataclass(frozen=True)
class Passage:
    """Paragraphs of a docstring.

    Attributes:
        id: ``path:qualified.name``, or ``path:`` for that of a module.
        part: Part of its package.
        summary: First paragraph, on one line.
        rest: The other paragraphs; empty where there are none.
    """

    id: str
    part: Part
    summary: str
    rest: str


def part_of(path: PurePosixPath) -> Part:
    """The part that the package of a module belongs to.

    Example:
        >>> part_of(PurePosixPath("json/decoder.py")) == part_of(PurePosixPath("json/tool.py"))
        True
    """
    package = path.parts[0].removesuffix(".py").lstrip("_")  # _pydecimal belongs to pydecimal
    value = hashlib.sha256(f"codesearch/{package}".encode()).digest()
    place = int.from_bytes(value[:8], "big") % 100
    for part in get_args(Part):
        if place < SHARES[part]:
            return part  # type: ignore[no-any-return]
        place -= SHARES[part]
    raise AssertionError("the shares are percents")


Definition = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _definitions(node: ast.AST, name: str = "") -> Iterator[tuple[str, Definition]]:
    """All that may have a docstring in a tree, itself included, by qualified name."""
    if isinstance(node, Definition):
        name = f"{name}.{node.name}".lstrip(".") if not isinstance(node, ast.Module) else name
        yield name, node
    for child in ast.iter_child_nodes(node):
        yield from _definitions(child, name)


@functools.lru_cache(maxsize=1)
def _read() -> tuple[tuple[Function, ...], tuple[Passage, ...]]:
    functions: dict[str, Function] = {}
    passages: dict[str, Passage] = {}
    for path, text in pycode.modules().items():
        part = part_of(path)
        for name, node in _definitions(ast.parse(text)):
            paragraphs = [p for p in (ast.get_docstring(node) or "").split("\n\n") if p.strip()]
            if not paragraphs:
                continue
            key = f"{path}:{name}"
            while key in passages:
                key += "+"
            summary = " ".join(paragraphs[0].split())
            rest = "\n\n".join(paragraphs[1:])
            passages[key] = Passage(key, part, summary, rest)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and _is_usable(node):
                node.body = node.body[1:]
                functions[key] = Function(key, part, node.name, summary, ast.unparse(node))
    return tuple(functions.values()), tuple(passages.values())


def _is_usable(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    if node.name.startswith("__") or len(node.body) < 2:
        return False
    return (node.end_lineno or 0) - node.body[1].lineno + 1 >= MIN_BODY_LINES


def _is_in(own: Part, asked: Part | None) -> bool:
    if asked not in (None, *get_args(Part)):
        raise InvalidInputError(f"part must be {', '.join(get_args(Part))}, got {asked!r}")
    return asked in (None, own)


def functions(part: Part | None = None) -> list[Function]:
    """Functions with a docstring and a body, of a part or of all.

    Raises:
        InvalidInputError: No such part.
        IsthmusError: This interpreter has no standard-library source.
    """
    return [f for f in _read()[0] if _is_in(f.part, part)]


def passages(part: Part | None = None) -> list[Passage]:
    """Docstrings of modules, classes and functions, of a part or of all.

    Raises:
        InvalidInputError: No such part.
        IsthmusError: This interpreter has no standard-library source.
    """
    return [p for p in _read()[1] if _is_in(p.part, part)]


def _task(answers: Iterable[tuple[str, str, str]]) -> Task:
    """A task from (id, query, document); equal queries are one, with several documents."""
    first: dict[str, str] = {}
    queries: dict[str, str] = {}
    documents: dict[str, str] = {}
    qrels: dict[str, dict[str, int]] = {}
    for key, query, document in answers:
        documents[key] = document
        if MIN_WORDS <= len(query.split()) <= MAX_WORDS:
            queries.setdefault(first.setdefault(query, key), query)
            qrels.setdefault(first[query], {})[key] = 1
    return Task(queries, documents, qrels)


def doc2code(part: Part, *, names: bool = True, distractors: bool = False) -> Task:
    """Find the function that a docstring describes.

    Args:
        part: Part of the queries.
        names: Whether functions keep their names, and those of what is theirs; without them it is
            the harder task, as in AdvTest.
        distractors: Search among the functions of all parts.

    Raises:
        InvalidInputError: No such part.
    """
    return _task(
        (
            f.id,
            f.summary if f.part == part else "",
            f.code if names else nameless(f.code),
        )
        for f in functions(None if distractors else part)
    )


def nameless(code: str) -> str:
    r"""A function with its own name, and those of its parameters and locals, replaced.

    Example:
        >>> nameless("def area(width, height): return width * height")
        'def f(v0, v1):\n    return v0 * v1'
    """
    tree = ast.parse(code)
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        own = node.arg if isinstance(node, ast.arg) else ""
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            own = node.id
        if own:
            found.setdefault(own, f"v{len(found)}")
    function = tree.body[0]
    assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
    found[function.name] = function.name = "f"
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            node.arg = found[node.arg]
        elif isinstance(node, ast.Name):
            node.id = found.get(node.id, node.id)
    return ast.unparse(tree)


def text(part: Part) -> Task:
    """Find how a docstring goes on after its first paragraph.

    Raises:
        InvalidInputError: No such part.
    """
    return _task((p.id, p.summary, p.rest) for p in passages(part) if _goes_on(p))


def _goes_on(passage: Passage) -> bool:
    return len(passage.rest.split()) >= MIN_PASSAGE_WORDS


def long(part: Part, words: int, *, seed: int = 0) -> Task:
    """The passages of :func:`text`, each hidden among docstrings of one paragraph.

    Args:
        part: Part of queries and passages; what they are hidden among comes from all parts.
        words: Words of a document; a passage that is longer is cut.
        seed: Seed of what stands around a passage, and where it stands.

    Raises:
        InvalidInputError: No such part, or too few words.
    """
    if words < MIN_PASSAGE_WORDS:
        raise InvalidInputError(f"words must be at least {MIN_PASSAGE_WORDS}, got {words}")
    rng = random.Random(f"{part} {words} {seed}")
    others = [p.summary for p in passages() if not p.rest]
    task = text(part)
    documents = {}
    for key, passage in task.documents.items():
        own = " ".join(passage.split()[:words])
        room = words - len(own.split())
        around: list[str] = []
        while room > 0:
            around.append(" ".join(rng.choice(others).split()[:room]))
            room -= len(around[-1].split())
        around.insert(rng.randint(0, len(around)), own)
        documents[key] = "\n\n".join(around)
    return Task(task.queries, documents, task.qrels)


COMMON = 1000
"""Words of docstrings that another tongue has a word for, the most common ones."""

SPAN = (5, 25)
"""Fewest and most words of a query of :func:`containing`."""


@functools.lru_cache(maxsize=1)
def _running() -> tuple[list[str], frozenset[str]]:
    """The words of all docstrings one after another, and which are common."""
    running = " ".join(f"{p.summary} {p.rest}" for p in passages()).split()
    counts = Counter(_LETTERS.findall(" ".join(running).lower()))
    return running, frozenset(word for word, _ in counts.most_common(COMMON))


def other_tongue(text: str) -> str:
    """A text with its common words spelt backwards; names and rare words stay.

    Example:
        >>> other_tongue("Return the xyzzy")
        'nruter eht xyzzy'
    """
    common = _running()[1]

    def said(match: re.Match[str]) -> str:
        word = match[0].lower()
        return word[::-1] if word in common else match[0]

    return _LETTERS.sub(said, text)


def containing(
    words: int, queries: int, *, documents: int = 500, seed: str = "", tongue: bool = True
) -> Task:
    """Find the piece of text that some words in a row come from, which speak another tongue.

    The task of Luan et al. (2020), section 5, on docstrings, made harder: what a query shares with
    its document by the letter are names and rare words; that common ones mean the same is learnt.

    Args:
        words: Words of a document.
        queries: Queries, each from a document drawn anew.
        documents: Documents, the same for every seed.
        seed: Other seeds give other queries.
        tongue: Off, queries are the words as they stand.

    Raises:
        InvalidInputError: Documents shorter than the longest query, or too few of them.
    """
    running = _running()[0]
    starts = range(0, len(running) - words, words)
    if words < SPAN[1] or documents > len(starts):
        raise InvalidInputError(
            f"of {words} words there are {len(starts)} documents; ask for at most as many, of at "
            f"least {SPAN[1]} words"
        )
    chosen = sorted(random.Random(f"containing {words}").sample(starts, documents))
    texts = {str(s): " ".join(running[s : s + words]) for s in chosen}
    rng = random.Random(f"containing {words} {seed}")
    asked: dict[str, str] = {}
    qrels: dict[str, dict[str, int]] = {}
    for number in map(str, range(queries)):
        span = _span(texts[str(rng.choice(chosen))].split(), rng)
        asked[number] = other_tongue(span) if tongue else span
        qrels[number] = {key: 1 for key, text in texts.items() if span in text}
    return Task(asked, texts, qrels)


def _span(words: list[str], rng: random.Random) -> str:
    size = rng.randint(*SPAN)
    start = rng.randint(0, len(words) - size)
    return " ".join(words[start : start + size])


def spans(words: int, count: int, *, seed: str = "") -> list[Pair]:
    """Pairs to train for :func:`containing`: pieces of text that begin anywhere, a query each.

    Args:
        words: Words of a piece, at least those of the longest query.
        count: Pairs.
        seed: Other seeds give other pairs.
    """
    running = _running()[0]
    rng = random.Random(f"spans {words} {seed}")
    starts = [rng.randrange(len(running) - words) for _ in range(count)]
    pieces = [running[s : s + words] for s in starts]
    return [Pair(other_tongue(_span(piece, rng)), " ".join(piece)) for piece in pieces]


def leak(task: Task) -> float:
    """Share of queries that the names of the functions alone answer, by BM25 at the first place.

    Args:
        task: One of :func:`doc2code`.
    """
    index = SparseIndex()
    index.add(list(task.documents), [bag(i.split(":")[1].split(".")[-1]) for i in task.documents])
    found = index.search([bag(q) for q in task.queries.values()], 1)
    run = to_run(list(task.queries), found)
    hits = {q: d for q, d in run.items() if max(d.values()) > 0}
    return float(evaluate(task.qrels, hits, ["success@1"])["success@1"].mean())


def bm25(task: Task) -> float:
    """MRR@10 of BM25 (Lucene's, k1 1.2, b 0.75), the baseline of every table."""
    index = SparseIndex()
    index.add(list(task.documents), [bag(text) for text in task.documents.values()])
    found = index.search([bag(query) for query in task.queries.values()], 10)
    run = to_run(list(task.queries), found)
    return float(evaluate(task.qrels, run, ["mrr@10"])["mrr@10"].mean())


def pairs(part: Part) -> list[Pair]:
    """Queries and documents of :func:`text` and :func:`doc2code`, to train on.

    Raises:
        InvalidInputError: No such part.
    """
    return text(part).pairs + doc2code(part).pairs
