"""Whole folders made small and whole again, on this machine or on a cluster.

Each file becomes one beside or below another folder, in the same place of the tree::

    photos/a.png        ──encode──▶ small/a.png.ist        ──decode──▶ back/a.png
    photos/trip/b.jpg               small/trip/b.jpg.ist               back/trip/b.jpg.png

What is there already is kept, so a run that was interrupted goes on; a file that cannot be coded
does not hold up the others.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from isthmus import cluster
from isthmus.codecs.base import TrainedCodec, fields_of, lookup
from isthmus.codecs.container import Reader
from isthmus.errors import InvalidInputError, IsthmusError
from isthmus.signals import image, video
from isthmus.signals.files import SOUNDS, medium_of
from isthmus.workbench import coding
from isthmus.workbench.trained import at_hand

SUFFIX = ".ist"

KEEPERS = {
    **dict.fromkeys((".jpg", ".jpeg"), ".png"),
    **dict.fromkeys((".mp3", ".ogg", ".oga", ".opus"), ".wav"),
    **dict.fromkeys((".avi", ".mov", ".m4v"), ".mkv"),
}
"""What is put behind a suffix whose format would lose something, or is not written."""

SUFFIXES = {"audio": SOUNDS, "image": image.SUFFIXES, "video": video.SUFFIXES}
PLAIN = {"audio": ".wav", "image": ".png", "video": ".mkv"}
"""What is put behind a name that says nothing of its medium."""


@dataclass(frozen=True)
class Coded:
    """What became of one file.

    Attributes:
        given: The file.
        out: The file that was written; empty where it could not be.
        before: Bytes of the file.
        after: Bytes of what was written.
        codec: Id of the codec.
        error: Why nothing was written, in one line.
    """

    given: str
    out: str = ""
    before: int = 0
    after: int = 0
    codec: str = ""
    error: str = ""


@dataclass(frozen=True)
class Job:
    """What there is to do in a folder.

    Attributes:
        left: Files, and where each goes.
        kept: Files whose output is there already.
        others: Files that are none of a codec's.
        work: Makes what codes a list of such pairs, as plain data.
    """

    left: list[tuple[str, str]]
    kept: int
    others: int
    work: Callable[[], cluster.Work]

    def run(
        self, engine: Literal["local", "ray"] = "local", *, workers: int = 0
    ) -> Iterator[Coded]:
        """Code the files.

        Args:
            engine: ``"local"``, one by one in this process, or ``"ray"``, whose machines have to
                see the same folders.
            workers: Workers of the cluster; one for each core when 0.

        Yields:
            Files as they are finished.

        Raises:
            MissingExtraError: Ray is not installed.
        """
        items = [list(pair) for pair in self.left]
        if not items:
            return
        if engine == "ray":
            found = cluster.spread(self.work, items, block=1, workers=workers, each="core")
        else:
            found = iter(self.work()(items))
        yield from (Coded(**one) for one in found)


def encode_folder(
    given: str | Path,
    out: str | Path,
    *,
    codec: str = "",
    rate: float | None = None,
    quality: float | None = None,
    model: str | Path | None = None,
    report: Callable[[Any], None] | None = None,
) -> Job:
    """Find the sounds, pictures and films of a folder and of those below it, to encode them.

    Args:
        given: The folder.
        out: The folder for the ``.ist`` files.
        codec: As for :func:`~isthmus.workbench.coding.encode`; files of another medium are left.
        rate: Wanted rate.
        quality: Wanted quality.
        model: Folder of a trained codec.
        report: Called after every step of a training, which happens now where there has to be one.

    Raises:
        InvalidInputError: There is no such folder, nothing to code in it, or the codec does not
            take these options.
        UnknownNameError: No such codec.
    """
    wanted, codec = None, codec or coding.trained_in(model)
    if codec:
        system: Any = lookup(codec)
        if model is None and issubclass(system, TrainedCodec):
            model = at_hand(system, report)  # once, and not in every worker
        medium = coding.ready(codec, model, quality).medium  # bytes: it says itself what it takes
        wanted = medium if medium in SUFFIXES else None

    def place(path: Path) -> str | None:
        try:
            medium = medium_of(path)
        except InvalidInputError:
            return None
        return path.name + SUFFIX if wanted in (None, medium) else None

    work = functools.partial(_encoder, codec, None if model is None else str(model), quality, rate)
    return _job(given, out, place, work, wanted or "sound, pictures or films")


def decode_folder(
    given: str | Path, out: str | Path, *, model: str | Path | None = None, partial: bool = False
) -> Job:
    """Find the ``.ist`` files of a folder and of those below it, to decode them.

    Args:
        given: The folder.
        out: The folder for the decoded files. They are called as before they were encoded; where
            that format would lose something, another suffix follows (:data:`KEEPERS`).
        model: Folder of the trained codec that wrote them.
        partial: Write what comes before a damage.

    Raises:
        InvalidInputError: There is no such folder, or no such file in it.
    """
    options = {"model": None if model is None else str(model), "partial": partial}

    def place(path: Path) -> str | None:
        return _restored(path) if path.suffix == SUFFIX else None

    work = functools.partial(_decoder, options)
    return _job(given, out, place, work, f"{SUFFIX} files")


def _restored(path: Path) -> str:
    """The name of what an .ist file becomes."""
    name = path.name.removesuffix(SUFFIX)
    try:
        with Reader(path, allow_partial=True, fields=fields_of) as reader:
            medium = str(reader.header.signal["medium"])
    except IsthmusError:
        return name  # decoding it will say what is wrong
    suffix = Path(name).suffix.lower()
    if suffix in SUFFIXES.get(medium, ()):
        return name + KEEPERS.get(suffix, "")
    return name + PLAIN.get(medium, "")


def _job(
    given: str | Path,
    out: str | Path,
    place: Callable[[Path], str | None],
    work: Callable[[], cluster.Work],
    what: str,
) -> Job:
    given, out = Path(given), Path(out)
    if not given.is_dir():
        raise InvalidInputError(f"{given} is no folder")
    if out.exists() and not out.is_dir():
        raise InvalidInputError(f"{out} is a file; a folder becomes a folder")
    left, kept, others = [], 0, 0
    for path in sorted(given.rglob("*")):
        below = path.relative_to(given)
        if not path.is_file() or any(part.startswith(".") for part in below.parts):
            continue
        name = place(path)
        if name is None:
            others += 1
            continue
        target = out / below.with_name(name)
        if target.exists():
            kept += 1
        else:
            left.append((str(path), str(target)))
    if not left and not kept:
        raise InvalidInputError(f"{given} holds no {what}")
    return Job(left, kept, others, work)


def _encoder(
    codec: str, model: str | None, quality: float | None, rate: float | None
) -> cluster.Work:
    # a codec is read from disk once, and not for every file
    ready = functools.cache(lambda name: coding.ready(name, model, quality))

    def one(given: Path, out: Path) -> str:
        name = codec or coding.default(given, rate)
        return coding.encode(given, out, rate=rate, codec=ready(name)).codec

    return functools.partial(_each, one)


def _decoder(options: dict[str, Any]) -> cluster.Work:
    def one(given: Path, out: Path) -> str:
        return coding.decode(given, out, **options).codec.id

    return functools.partial(_each, one)


def _each(one: Callable[[Path, Path], str], items: Iterable[list[str]]) -> Iterator[dict[str, Any]]:
    for given, out in items:
        target = Path(out)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            codec = one(Path(given), target)
            sizes = Path(given).stat().st_size, target.stat().st_size
            yield asdict(Coded(given, out, *sizes, codec))
        except (IsthmusError, OSError) as error:
            yield asdict(Coded(given, error=str(error)))
