"""Data sets that the workbench makes, by name, in the shape that training reads.

>>> data("workbench:dates", "pairs").valid[0]
Pair(source='24 апреля 1900 года', target='1900-04-24')
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isthmus.errors import InvalidInputError, UnknownNameError
from isthmus.training.data import Data, Pair, read, read_hub
from isthmus.workbench import codesearch, dates, numbers, pycode
from isthmus.workbench.scene_masks import NAMED, MaskedScene, masked_scenes

PREFIX, HUB = "workbench:", "hub:"


@dataclass(frozen=True)
class Source:
    """A data set of the workbench.

    Attributes:
        kind: Kind of its records.
        make: Makes them; called when they are asked for.
        says: What they are.
    """

    kind: str
    make: Callable[[], Data[Any]]
    says: str


def _dates() -> Data[Pair]:
    def pairs(count: int, split: pycode.Split) -> list[Pair]:
        return [Pair(e.source, e.target) for e in dates.examples(count, split, seed="data")]

    return Data(pairs(60_000, "train"), pairs(1_000, "held-out"), "workbench:dates")


def _pycode(step: int, name: str) -> Data[str]:
    parts = (pycode.texts("train")[::step], pycode.texts("held-out")[::step])
    return Data(*parts, f"{PREFIX}{name}")


def _scenes() -> Data[MaskedScene]:
    return Data(
        masked_scenes(40_000, "train"), masked_scenes(200, "held-out"), "workbench:scene-masks"
    )


def _named_scenes() -> Data[MaskedScene]:
    return Data(
        masked_scenes(20_000, "train", NAMED),
        masked_scenes(500, "held-out", NAMED),
        "workbench:named-scenes",
    )


def _docstrings() -> Data[Pair]:
    train = codesearch.pairs("train")
    known = set(train)
    valid = [p for p in codesearch.pairs("dev") if p not in known]
    return Data(train, valid, "workbench:docstrings")


SOURCES: dict[str, Source] = {
    "dates": Source("pairs", _dates, "dates in fifteen languages and their ISO form"),
    "numbers": Source("pairs", numbers.data, "numbers in words of four languages, and digits"),
    "scene-masks": Source("masks", _scenes, "rendered shapes and the class of every pixel"),
    "named-scenes": Source("pictures", _named_scenes, "small pictures of one shape each"),
    "docstrings": Source(
        "pairs", _docstrings, "first paragraphs of docstrings, and the text or code that follows"
    ),
    "pycode": Source("texts", lambda: _pycode(1, "pycode"), "source of Python's standard library"),
    "pycode-tenth": Source("texts", lambda: _pycode(10, "pycode-tenth"), "every tenth file of it"),
}
"""The data sets by name."""


def data(names: str | Sequence[str], kind: str, *, skip_bad: int = 0) -> Data[Any]:
    """What ``--data`` stands for.

    Args:
        names: ``workbench:NAME``, ``hub:OWNER/NAME``, or files and folders.
        kind: Kind of record that is wanted.
        skip_bad: Records of files that may be left out because they cannot be used.

    Raises:
        UnknownNameError: The workbench has no such data set.
        InvalidInputError: It holds another kind of record.
        BrokenFileError: A file cannot be used.
    """
    names = [names] if isinstance(names, str) else list(names)
    if not any(name.startswith((PREFIX, HUB)) for name in names):
        return read(kind, map(Path, names), skip_bad=skip_bad)
    if len(names) > 1:
        raise InvalidInputError("give one workbench: or hub: data set, or files and folders")
    if names[0].startswith(HUB):
        return read_hub(kind, names[0].removeprefix(HUB))
    name = names[0].removeprefix(PREFIX)
    if name not in SOURCES:
        raise UnknownNameError("workbench data set", name, SOURCES)
    source = SOURCES[name]
    if source.kind != kind:
        fitting = [f"{PREFIX}{n}" for n, s in SOURCES.items() if s.kind == kind]
        raise InvalidInputError(
            f"{names[0]} holds {source.kind}, and {kind} are read here: "
            f"{', '.join(fitting) or 'give files'}"
        )
    return source.make()
