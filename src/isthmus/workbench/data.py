"""Data sets that the workbench makes, by name, in the shape that training reads.

>>> data("workbench:dates", "pairs").valid[0]
Pair(source='9 grudnia 2064 r.', target='2064-12-09')
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from isthmus.errors import InvalidInputError, UnknownNameError
from isthmus.signals.audio import Recording
from isthmus.training.data import Data, Noisy, Pair, Spoken, Translated, read, read_hub
from isthmus.workbench import (
    codesearch,
    dates,
    digits,
    moving,
    numbers,
    pycode,
    scenes,
    speech,
    voices,
)
from isthmus.workbench.coded_scenes import coded_scenes
from isthmus.workbench.dead_leaves import DeadLeaves
from isthmus.workbench.photographs import cuttings
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

    return Data(pairs(60_000, "train"), pairs(1_000, "held-out"))


def _pycode(step: int) -> Data[str]:
    return Data(pycode.texts("train")[::step], pycode.texts("held-out")[::step])


def _spoken(kind: str, count: int = 3000, held_out: int = 200) -> Data[Spoken]:
    def spoken(split: speech.Split, number: int) -> list[Spoken]:
        heard = speech.corpus(kind, split, number)
        return [Spoken(Recording(samples=u.samples), u.line.target) for u in heard]

    return Data(spoken("train", count), spoken("held-out", held_out))


def series(split: speech.Split, count: int, seed: int = 1) -> list[Spoken]:
    """Numbers read one after another, each by a voice of its own: 1 to 4, few more often.

    Args:
        split: ``train``, ``held-out`` (other numbers) or ``accent``.
        count: How many series.
        seed: Other seeds draw others.
    """
    draw = random.Random(f"series/{split}" + (f"/{seed}" if seed != 1 else ""))
    sizes = draw.choices(range(1, 5), [1 / k for k in range(1, 5)], k=count)
    heard = iter(speech.corpus("numbers", split, sum(sizes), seed=seed))
    found = []
    for size in sizes:
        each = [next(heard) for _ in range(size)]
        parts = [each[0].samples]
        for utterance in each[1:]:
            pause = torch.zeros(int(draw.uniform(0.1, 0.4) * speech.RATE))
            parts += [pause, utterance.samples]
        text = ", ".join(u.line.target for u in each)
        found.append(Spoken(Recording(samples=torch.cat(parts)), text))
    return found


def _series(count: int = 3000, held_out: int = 300) -> Data[Spoken]:
    return Data(series("train", count), series("held-out", held_out))


def _translated(kind: str, count: int, held_out: int) -> Data[Translated]:
    def translated(split: speech.Split, number: int) -> list[Translated]:
        heard = speech.corpus(kind, split, number)
        return [
            Translated(Recording(samples=u.samples), u.line.language, u.line.text, u.line.target)
            for u in heard
        ]

    return Data(translated("train", count), translated("held-out", held_out))


def _noisy(count: int, held_out: int) -> Data[Noisy]:
    def pairs(split: speech.Split, number: int) -> list[Noisy]:
        return [
            Noisy(Recording(samples=noisy), Recording(samples=clean))
            for noisy, clean in speech.noisy("docs", split, number)
        ]

    return Data(pairs("train", count), pairs("accent", held_out))


def _scenes() -> Data[MaskedScene]:
    return Data(masked_scenes(40_000, "train"), masked_scenes(200, "held-out"))


def _named_scenes() -> Data[MaskedScene]:
    return Data(
        masked_scenes(20_000, "train", NAMED),
        masked_scenes(500, "held-out", NAMED),
    )


def _photographs(leaves: int, most: int | None = None) -> Data[Any]:
    train: list[Any] = [*cuttings("train")[:most]]
    return Data(train + [DeadLeaves(seed) for seed in range(leaves)], cuttings("held-out")[:most])


def _docstrings() -> Data[Pair]:
    train = codesearch.pairs("train")
    known = set(train)
    valid = [p for p in codesearch.pairs("dev") if p not in known]
    return Data(train, valid)


SOURCES: dict[str, Source] = {
    "dates": Source("pairs", _dates, "dates in fifteen languages and their ISO form"),
    "numbers": Source("pairs", numbers.data, "numbers in words of four languages, and digits"),
    "scene-masks": Source("masks", _scenes, "rendered shapes and the class of every pixel"),
    "named-scenes": Source("pictures", _named_scenes, "small pictures of one shape each"),
    "scenes-64": Source(
        "pictures",
        lambda: Data(coded_scenes(8000), coded_scenes(32, "held-out")),
        "shapes on plain grounds, 64 by 64 pixels",
    ),
    "scenes-64-few": Source(
        "pictures",
        lambda: Data(coded_scenes(60), coded_scenes(20, "held-out")),
        "a few of them",
    ),
    "photographs": Source(
        "pictures", lambda: _photographs(300), "photographs and dead leaves, 256 by 256 pixels"
    ),
    "photographs-few": Source("pictures", lambda: _photographs(4, 8), "a few of them"),
    "scenes": Source(
        "pictures",
        lambda: Data(scenes.sheets(8_000), scenes.sheets(200, "held-out")),
        "one to three shapes on white, 32 by 32 pixels",
    ),
    "rare-scenes": Source(
        "pictures",
        lambda: Data(scenes.sheets(8_000, rare=0.02), scenes.sheets(200, "held-out", rare=0.02)),
        "the same, two in a hundred with a mark in two corners",
    ),
    "digits": Source(
        "pictures",
        lambda: Data(digits.records("learn"), digits.records("stop")),
        "handwritten digits of 8 by 8 pixels and 17 levels",
    ),
    "moving": Source("clips", moving.data, "pans over photographs, and digits that fly"),
    "moving-few": Source("clips", lambda: moving.data(60, 6), "a few of them"),
    "docstrings": Source(
        "pairs", _docstrings, "first paragraphs of docstrings, and the text or code that follows"
    ),
    "pycode": Source("texts", lambda: _pycode(1), "source of Python's standard library"),
    "pycode-tenth": Source("texts", lambda: _pycode(10), "every tenth file of it"),
    "noisy": Source("noisy", lambda: _noisy(400, 24), "speech in white, pink, brown noise and hum"),
    "noisy-few": Source("noisy", lambda: _noisy(40, 4), "a tenth of it"),
    "speech-numbers": Source("spoken", lambda: _spoken("numbers"), "spoken numbers, in words"),
    "speech-series": Source("spoken", _series, "one to four spoken numbers in a row"),
    "speech-series-few": Source("spoken", lambda: _series(60, 20), "a few of them"),
    "speech-dates": Source("spoken", lambda: _spoken("dates"), "spoken dates and their ISO form"),
    "speech-sentences": Source("spoken", lambda: _spoken("sentences"), "sentences of 36 words"),
    "speech-docs": Source(
        "spoken", lambda: _spoken("docs", 1500, 24), "sentences of documents, any words"
    ),
    "speech-voices": Source(
        "spoken", voices.data, "eight voices, several sentences of one voice in a recording"
    ),
    "speech-few": Source("spoken", lambda: _spoken("sentences", 60, 20), "a few of them"),
    "speech-multi": Source(
        "translated", lambda: _translated("multi", 3000, 200), "days in three languages"
    ),
    "speech-multi-few": Source("translated", lambda: _translated("multi", 60, 20), "a few of them"),
    "speech-dates-said": Source(
        "translated", lambda: _translated("dates", 4000, 200), "spoken dates, and both forms"
    ),
    "speech-dates-few": Source("translated", lambda: _translated("dates", 60, 20), "a few of them"),
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
    return replace(source.make(), name=names[0])
