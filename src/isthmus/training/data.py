"""Records to train on, read from files that people have.

What a system reads is a *kind* of record. A kind is a function from one file to its records, so a
new medium adds one entry to :data:`KINDS`::

    texts   one document           .txt .md .rst .py (a file each), .jsonl with a field "text"
    pairs   a source and its target .tsv .csv (two columns), .jsonl with "source" and "target",
                                    and "alignment" where an aligner has found it
    pictures  a picture             .png .jpg ... (a file each)
    clips   moving pictures         .mp4 .mkv ... (a file each)
    masks   a picture and its mask  x.jpg and x.mask.png, or images/x.jpg and masks/x.png
    spoken  sound and its text      .tsv .csv (file, text), .jsonl with "audio" and "text"
    noisy   sound, noisy and clean  .tsv .csv (two files), .jsonl with "noisy" and "clean"
    translated  sound, its text and a translation  .jsonl with "audio", "language", "text",
                                                   "translation"

A record that cannot be used is reported with its file and line; a given number of them may be left
out instead.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, NamedTuple, Self, TypeVar

from isthmus.errors import BrokenFileError, InvalidInputError, UnknownNameError, require
from isthmus.signals import image, video
from isthmus.signals.audio import Recording
from isthmus.signals.clips import ClipFile
from isthmus.signals.text import read_text

R = TypeVar("R")

HELD_OUT = 20
"""Every record of this number is held out, where nobody says which are."""


class Pair(NamedTuple):
    """A source text and its target text."""

    source: str
    target: str


class Aligned(Pair):
    """A pair of which it is known what in the target comes from where in the source.

    Args:
        source: The source.
        target: The target.
        spans: Characters of the source, and those of the target that come from them.

    Example:
        >>> Aligned.by_words("vier Katzen", "four cats", "0-0 1-1").spans
        ((range(0, 4), range(0, 4)), (range(5, 11), range(5, 9)))
    """

    spans: tuple[tuple[range, range], ...]

    def __new__(cls, source: str, target: str, spans: Iterable[tuple[range, range]] = ()) -> Self:
        """A pair, with the spans beside it."""
        made = super().__new__(cls, source, target)
        made.spans = tuple(spans)
        return made

    def __repr__(self) -> str:
        """All three: it is what a fingerprint is made of."""
        return f"Aligned({self.source!r}, {self.target!r}, {self.spans!r})"

    @classmethod
    def by_words(cls, source: str, target: str, links: str) -> Self:
        """From what aligners write.

        Args:
            source: The source.
            target: The target.
            links: Numbers of words that belong together, ``source-target``, from 0; words are what
                stands between blanks.

        Raises:
            InvalidInputError: A link is none, or there is no such word.
        """
        words = [
            [range(*word.span()) for word in re.finditer(r"\S+", side)] for side in (source, target)
        ]
        spans = []
        for link in links.split():
            told = re.fullmatch(r"([0-9]+)-([0-9]+)", link)
            places = [int(number) for number in told.groups()] if told else []
            if not told or any(n >= len(side) for n, side in zip(places, words, strict=True)):
                raise InvalidInputError(
                    f"{link!r} is no link; SOURCE-TARGET are numbers of words from 0, of "
                    f"{len(words[0])} and {len(words[1])} words here"
                )
            spans.append((words[0][places[0]], words[1][places[1]]))
        return cls(source, target, spans)


class Spoken(NamedTuple):
    """A recording and what is said in it."""

    sound: Recording
    text: str


class Translated(NamedTuple):
    """A recording, what is said in it and in which language, and a translation."""

    sound: Recording
    language: str
    text: str
    translation: str


class Noisy(NamedTuple):
    """A noisy recording and the clean one, sample by sample."""

    noisy: Recording
    clean: Recording


@dataclass(frozen=True)
class Data(Generic[R]):
    """Records to learn from and held-out ones to judge by.

    Attributes:
        train: Records to learn from.
        valid: Held-out records.
        name: What they are, for people.
        left_out: Records that could not be used.
    """

    train: Sequence[R]
    valid: Sequence[R]
    name: str = ""
    left_out: tuple[str, ...] = field(default=(), repr=False)

    @property
    def fingerprint(self) -> str:
        """A hash of all records."""
        state = hashlib.sha256()
        for part in (self.train, self.valid):
            state.update(f"{len(part)}:".encode())
            for record in part:
                state.update(repr(record).encode(errors="surrogatepass"))
        return state.hexdigest()[:16]


class BadRecord(ValueError):  # noqa: N818
    """Why a record cannot be used; the reader's caller adds file and line."""


Line = tuple[int, Any]
"""A line number, and its record or the :class:`BadRecord` that says why there is none."""


def _document(path: Path) -> Iterator[Line]:
    if path.suffix == ".jsonl":
        yield from _objects(path, lambda o: _text(o, "text"))
    elif text := read_text(path).strip():
        yield 1, text


def _pairs(path: Path, first: str = "source", second: str = "target") -> Iterator[Line]:
    if path.suffix == ".jsonl":
        yield from _objects(path, lambda o: _pair(o, first, second))
        return
    if path.suffix == ".csv":
        rows: Iterator[tuple[int, list[str]]] = (
            (reader.line_num, row) for reader in [csv.reader(_lines(path))] for row in reader
        )
    else:
        rows = ((n, s.split("\t")) for n, s in enumerate(_lines(path), 1))
    for number, row in rows:
        if not any(row):
            continue
        if len(row) != 2 or not all(cell.strip() for cell in row):
            yield number, BadRecord(f"needs two columns, {first} and {second}; it has {len(row)}")
        else:
            yield number, Pair(*(cell.strip() for cell in row))


def _pair(told: dict[str, Any], first: str, second: str) -> Pair:
    pair = Pair(_text(told, first), _text(told, second))
    if "alignment" not in told:
        return pair
    try:
        return Aligned.by_words(*pair, _text(told, "alignment"))
    except InvalidInputError as error:
        raise BadRecord(str(error)) from error


def _picture(path: Path) -> Iterator[Line]:
    try:
        image.size_of(path)
        yield 1, image.PictureFile(path)
    except BrokenFileError as error:
        yield 1, BadRecord(str(error))


def _clip(path: Path) -> Iterator[Line]:
    try:
        video.open_video(path)
        yield 1, ClipFile(path)
    except (BrokenFileError, InvalidInputError) as error:
        yield 1, BadRecord(str(error))


def _masked(path: Path) -> Iterator[Line]:
    if path.stem.endswith(".mask") or path.parent.name == "masks":
        return
    beside = path.with_name(f"{path.stem}.mask.png")
    apart = path.parent.parent / "masks" / f"{path.stem}.png"
    try:
        mask = beside if beside.exists() else apart
        if not mask.exists():
            raise BadRecord(f"has no mask; it is looked for in {beside.name} and {apart}")
        sizes = image.size_of(path), image.size_of(mask)
        if sizes[0] != sizes[1]:
            raise BadRecord(f"is {sizes[0]} pixels high and wide, its mask {mask} {sizes[1]}")
        yield 1, image.MaskedFiles(path, mask)
    except BrokenFileError as error:
        yield 1, BadRecord(str(error))
    except BadRecord as error:
        yield 1, error


def _spoken(path: Path) -> Iterator[Line]:
    yield from _with_sound(path, _pairs(path, "audio", "text"), lambda s, t: Spoken(s(), t))


def _noisy(path: Path) -> Iterator[Line]:
    yield from _with_sound(path, _pairs(path, "noisy", "clean"), lambda s, t: Noisy(s(), s(t)))


def _translated(path: Path) -> Iterator[Line]:
    fields = ("audio", "language", "text", "translation")
    rows = _objects(path, lambda o: tuple(_text(o, name) for name in fields))
    for number, row in rows:
        if isinstance(row, BadRecord):
            yield number, row
        else:
            yield from _with_sound(
                path,
                iter([(number, row)]),
                lambda s, _, rest=row[1:]: Translated(s(), *rest),  # type: ignore[misc]
            )


def _with_sound(
    path: Path, rows: Iterator[Line], record: Callable[[Callable[..., Recording], str], Any]
) -> Iterator[Line]:
    """Records whose first text names a sound file, beside the manifest or absolute."""
    for number, row in rows:
        if isinstance(row, BadRecord):
            yield number, row
            continue

        def sound(name: str = row[0]) -> Recording:
            file = path.parent / name
            if not file.is_file():
                raise BadRecord(f"there is no sound file {file}")
            return Recording(file)

        try:
            yield number, record(sound, row[1])
        except BadRecord as error:
            yield number, error


@dataclass(frozen=True)
class Kind:
    """A kind of record.

    Attributes:
        read: Numbered records of one file.
        suffixes: Files of a folder that are read.
        says: What a file has to hold, for messages.
    """

    read: Callable[[Path], Iterator[Line]]
    suffixes: tuple[str, ...]
    says: str


KINDS: dict[str, Kind] = {
    "texts": Kind(_document, (".txt", ".md", ".rst", ".py", ".jsonl"), 'texts, or .jsonl: "text"'),
    "pairs": Kind(
        _pairs, (".tsv", ".csv", ".jsonl"), 'two columns, or .jsonl: "source" and "target"'
    ),
    "pictures": Kind(_picture, image.SUFFIXES, "picture files"),
    "clips": Kind(_clip, video.SUFFIXES, "video files"),
    "masks": Kind(_masked, image.SUFFIXES, "x.jpg and x.mask.png, or images/x.jpg and masks/x.png"),
    "spoken": Kind(
        _spoken, (".tsv", ".csv", ".jsonl"), 'file and text, or .jsonl: "audio" and "text"'
    ),
    "translated": Kind(
        _translated, (".jsonl",), '.jsonl: "audio", "language", "text", "translation"'
    ),
    "noisy": Kind(_noisy, (".tsv", ".csv", ".jsonl"), 'two files, or .jsonl: "noisy" and "clean"'),
}
"""The kinds by name."""


def read(kind: str, paths: Iterable[Path], *, skip_bad: int = 0) -> Data[Any]:
    """Records of files and folders; every twentieth is held out.

    Args:
        kind: A name in :data:`KINDS`.
        paths: Files, and folders, which are searched in name order. A folder with files named
            ``valid.*`` or ``valid`` beside ``train`` is split as it says.
        skip_bad: Records that may be left out because they cannot be used.

    Raises:
        UnknownNameError: No such kind.
        BrokenFileError: A file cannot be read, or more records than ``skip_bad`` cannot be used;
            the message names file and line.
        InvalidInputError: Fewer than two records.
    """
    if kind not in KINDS:
        raise UnknownNameError("kind of data", kind, KINDS)
    bad: list[str] = []
    train: list[Any] = []
    valid: list[Any] = []
    paths = list(paths)
    for path in paths:
        files = _files(kind, path)
        split = any(_is_valid(f, path) for f in files)
        for file in files:
            into = valid if split and _is_valid(file, path) else train
            for number, record in KINDS[kind].read(file):
                if not isinstance(record, BadRecord):
                    into.append(record)
                    continue
                bad.append(f"{file}, line {number}: {record}")
                if len(bad) > skip_bad:
                    more = "" if not skip_bad else f" ({len(bad)} records are bad)"
                    raise BrokenFileError(
                        f"{bad[-1]}{more}; mend it, or leave such records out with --skip-bad N"
                    )
    if not valid and len(train) > 1:
        every = min(HELD_OUT, len(train))
        valid = train[every - 1 :: every]
        train = [r for i, r in enumerate(train) if i % every != every - 1]
    if not train or not valid:
        raise InvalidInputError(
            f"{' '.join(map(str, paths)) or 'nothing'} holds {len(train) + len(valid)} records of "
            f"the kind {kind} ({KINDS[kind].says}); at least 2 are needed"
        )
    return Data(train, valid, " ".join(p.name for p in paths), tuple(bad))


def read_hub(kind: str, name: str, fields: Mapping[str, str] | None = None) -> Data[Any]:
    """Records of a data set of the Hugging Face hub, or of one that ``datasets`` finds on disk.

    Args:
        kind: ``texts`` or ``pairs``.
        name: ``owner/name`` or ``owner/name:configuration``.
        fields: Which column is ``text``, or ``source`` and ``target``, if not those of that name.

    Raises:
        MissingExtraError: The package ``datasets`` is not installed.
        InvalidInputError: It has no such columns, or another kind is asked for.
    """
    wanted = {"texts": ("text",), "pairs": ("source", "target")}.get(kind)
    if wanted is None:
        raise InvalidInputError(f"hub data sets are read as texts or pairs, not as {kind}")
    library = require("datasets", "hub")
    name, _, configuration = name.partition(":")
    splits = library.load_dataset(name, configuration or None)
    columns = [(fields or {}).get(w, w) for w in wanted]

    def records(split: Any) -> list[Any]:
        missing = [c for c in columns if c not in split.column_names]
        if missing:
            raise InvalidInputError(
                f"{name} has no column {missing[0]!r}; it has {', '.join(split.column_names)}"
            )
        rows = zip(*(split[c] for c in columns), strict=True)
        return [Pair(*row) if kind == "pairs" else row[0] for row in rows]

    train = records(splits["train"])
    held = next((s for s in ("validation", "valid", "test") if s in splits), "")
    if held:
        return Data(train, records(splits[held]), name)
    return Data([r for i, r in enumerate(train) if i % HELD_OUT], train[::HELD_OUT], name)


def _files(kind: str, path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    suffixes = KINDS[kind].suffixes
    return sorted(p for p in path.rglob("*") if p.suffix.lower() in suffixes and p.is_file())


def _is_valid(file: Path, root: Path) -> bool:
    """Whether a file of a folder says that it is held out."""
    if file == root:
        return False
    first = file.relative_to(root).parts[0]
    return first.split(".")[0] in ("valid", "validation")


def _lines(path: Path) -> list[str]:
    return read_text(path).split("\n")


def _objects(path: Path, record: Callable[[dict[str, Any]], Any]) -> Iterator[Line]:
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            if not isinstance(value, dict):
                raise BadRecord("not a JSON object")
            yield number, record(value)
        except BadRecord as error:
            yield number, error
        except ValueError:
            yield number, BadRecord("not JSON")


def _text(record: dict[str, Any], name: str) -> str:
    value = record.get(name)
    if not isinstance(value, str) or not value.strip():
        raise BadRecord(f'needs a field "{name}" with a string')
    return value
