"""Short texts with a label each, to probe vectors with: four tasks from the offline data.

===========  ==============================================  ==================  ============
task         text                                            label               split by
===========  ==============================================  ==================  ============
package      beginning of a docstring                        its package         file
identifier   a name of the standard library, alone           what it names       name
depth        some lines of code                              depth of the last   file
language     a written date                                  its language        date
===========  ==============================================  ==================  ============

The small language models have read the files before; they have never seen a label.
"""

from __future__ import annotations

import ast
import hashlib
import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from isthmus.errors import UnknownNameError
from isthmus.workbench import dates, pycode

PARTS = ("train", "validation", "test")
PACKAGES = (
    "asyncio",
    "distutils",
    "email",
    "idlelib",
    "importlib",
    "lib2to3",
    "tkinter",
    "unittest",
    "xml",
)
DEEPEST = 4
"""Depths from here on are one label."""


@dataclass(frozen=True)
class Labelled:
    """Texts of a task.

    Attributes:
        texts: The texts.
        labels: The label of each.
        split: The part of each, of :data:`PARTS`.
    """

    texts: tuple[str, ...]
    labels: tuple[str, ...]
    split: tuple[str, ...]


def task(name: str, counts: tuple[int, int, int] = (600, 200, 300), seed: int = 0) -> Labelled:
    """Texts of a task, as many of each part, or all where there are fewer.

    Args:
        name: One of :data:`TASKS`.
        counts: Of training, validation and test.
        seed: Other seeds choose others.

    Raises:
        UnknownNameError: No such task.
    """
    if name not in TASKS:
        raise UnknownNameError("probing task", name, list(TASKS))
    by_part: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for group, text, label in TASKS[name](sum(counts)):
        by_part[_part(f"{name}/{group}")].append((text, label))
    rows: list[tuple[str, str, str]] = []
    known: set[str] = set()
    for part, count in zip(PARTS, counts, strict=True):
        found = sorted(set(by_part[part]))
        random.Random(f"labelled/{name}/{part}/{seed}").shuffle(found)
        if part != "train":  # what training does not show cannot be told
            found = [row for row in found if row[1] in known]
        rows += [(text, label, part) for text, label in found[:count]]
        known |= {label for _, label, _ in rows} if part == "train" else set()
    texts, labels, split = zip(*rows, strict=True)
    return Labelled(texts, labels, split)


def noisy(text: str, seed: str) -> str:
    """A text with one word in three split, mistyped, or with two letters swapped.

    Example:
        >>> noisy("return the value", "1") != noisy("return the value", "2")
        True
    """
    rng = random.Random(f"noisy/{seed}/{text}")
    words = text.split(" ")
    for i, word in enumerate(words):
        if len(word) < 2 or (rng.random() > 1 / 3 and len(words) > 1):
            continue
        at = rng.randrange(len(word) - 1)
        kind = rng.randrange(3)
        if kind == 0:
            words[i] = f"{word[:at]} {word[at:]}" if at else f"{word[:1]} {word[1:]}"
        elif kind == 1:
            words[i] = word[:at] + _beside(word[at], rng) + word[at + 1 :]
        else:
            words[i] = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return " ".join(words)


_KEYS = ("1234567890", "qwertyuiop", "asdfghjkl", "zxcvbnm")


def _beside(letter: str, rng: random.Random) -> str:
    """A key next to it."""
    for row in _KEYS:
        at = row.find(letter.lower())
        if at >= 0:
            return row[max(0, min(len(row) - 1, at + rng.choice((-1, 1))))]
    return letter


def _part(group: str) -> str:
    """Six tenths train, two validate, two test."""
    value = int.from_bytes(hashlib.sha256(group.encode()).digest()[:4], "big") % 10
    return PARTS[0 if value < 6 else 1 if value < 8 else 2]


def _package(count: int) -> list[tuple[str, str, str]]:
    found: list[tuple[str, str, str]] = []
    for path, text in pycode.modules().items():
        if path.parts[0] in PACKAGES:
            long = [words for words in pycode.docstrings(text) if len(words) >= 40]
            found += [(str(path), " ".join(w[:160].split()), path.parts[0]) for w in long]
    return found


def _identifier(count: int) -> list[tuple[str, str, str]]:
    kinds: dict[str, set[str]] = defaultdict(set)
    for text in list(pycode.modules().values())[::3]:  # names enough, and parsing is slow
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                kinds[node.name].add("class")
            elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                kinds[node.name].add("function")
            elif isinstance(node, ast.arg):
                kinds[node.arg].add("argument")
            elif isinstance(node, ast.alias):
                kinds[node.name].add("import")
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                kinds[node.id].add("variable")
    told = [(name, name, min(kind)) for name, kind in sorted(kinds.items()) if len(kind) == 1]
    by_kind: dict[str, list[tuple[str, str, str]]] = defaultdict(list)
    for row in told:
        by_kind[row[2]].append(row)
    draw = random.Random("labelled/identifier")
    return [row for rows in by_kind.values() for row in draw.sample(rows, min(len(rows), count))]


def _depth(count: int) -> list[tuple[str, str, str]]:
    rng = random.Random("labelled/depth")
    found: list[tuple[str, str, str]] = []
    for path, text in pycode.modules().items():
        lines = [line for line in text.splitlines() if line.strip()]
        for _ in range(max(1, 4 * count // 600)):
            if len(lines) < 8:
                continue
            at = rng.randrange(len(lines) - 4)
            window = lines[at : at + 4]
            depth = (len(window[-1]) - len(window[-1].lstrip(" "))) // 4
            found.append((str(path), "\n".join(window), str(min(depth, DEEPEST))))
    return found


def _language(count: int) -> list[tuple[str, str, str]]:
    drawn = dates.examples(2 * count, "train", seed="labelled")
    return [(each.target, each.source, each.language) for each in drawn]


TASKS: dict[str, Callable[[int], list[tuple[str, str, str]]]] = {
    "package": _package,
    "identifier": _identifier,
    "depth": _depth,
    "language": _language,
}
"""What draws group, text and label of each task."""
