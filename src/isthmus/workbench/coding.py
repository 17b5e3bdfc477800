"""Files made small and whole again: what ``isthmus encode``, ``decode`` and ``inspect`` do.

>>> import isthmus, tempfile, torch
>>> from isthmus.signals.image import read_pixels, write_pixels
>>> folder = Path(tempfile.mkdtemp())
>>> picture = torch.arange(48, dtype=torch.uint8).view(1, 6, 8)
>>> write_pixels(folder / "a.png", picture)
>>> isthmus.encode(folder / "a.png", folder / "a.ist").codec
'parts/lossless-image'
>>> _ = isthmus.decode(folder / "a.ist", folder / "b.png")
>>> torch.equal(read_pixels(folder / "b.png"), picture)
True
"""

from __future__ import annotations

import inspect as inspection
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from isthmus.codecs.base import RUNNING, Opened, Sizes, TrainedCodec, lookup, pack, unpack
from isthmus.codecs.container import DATA, EMBEDDED, RESET, TEXT, Limits, Reader
from isthmus.errors import InvalidInputError, IsthmusError
from isthmus.roles import Codec, Signal
from isthmus.signals.files import medium_of, open_signal, replaced, save_signal
from isthmus.training.loop import Progress
from isthmus.training.system import read_config

DEFAULTS = {
    "audio": "parts/lossless-audio",
    "image": "parts/lossless-image",
    "video": "parts/av1",
}
"""What codes a medium when nobody asks for another codec: films lose something, the others do not.
"""

SMALL = 1 << 16
"""Numbers of a signal below which the header counts, and is written short where it can be."""

WITH_LOSS = {"audio": "codecs/hificodec", "image": "parts/learned-image"}
"""What codes a medium in their place when a rate is asked for and no codec."""

Heard = Callable[[int, int | None], None]
"""Told how much of a signal is done, along its running axis, and how much there is."""


def encode(
    given: str | Path,
    out: str | Path,
    *,
    codec: str | Codec = "",
    rate: float | None = None,
    quality: float | None = None,
    model: str | Path | None = None,
    heard: Heard | None = None,
    report: Callable[[Progress], None] | None = None,
) -> Sizes:
    """Write sound, a picture or a film as an ``.ist`` file; what was there is replaced whole.

    Args:
        given: The file.
        out: The ``.ist`` file.
        codec: Name of a codec, or one at hand; when empty, that of ``model``, or one of
            :data:`DEFAULTS`, or with a rate of :data:`WITH_LOSS`. A codec that has to be trained is
            trained at the scale small the first time.
        rate: Wanted rate of a codec that has a choice, at most.
        quality: Wanted quality, 0 to 100, of a codec that has such a choice.
        model: Folder of a trained codec.
        heard: Told about the progress.
        report: Called after every step of a training.

    Raises:
        InvalidInputError: The codec does not code this file, or ``out`` is the file itself.
        BrokenFileError: The file cannot be read, or ``out`` not written.
        UnknownNameError: No such codec.
    """
    given, out = Path(given), Path(out)
    _apart(given, out)
    if isinstance(codec, str):
        name = codec or trained_in(model) or default(given, rate)
        codec = ready(name, model, quality, report)
    elif quality is not None:
        raise InvalidInputError("a codec at hand has its quality already")
    own: Callable[[Path], Signal] | None = getattr(codec, "open", None)
    if own is not None and codec.medium == "video" and medium_of(given) != "video":
        raise InvalidInputError(f"{codec.id} codes video, and {given} is {medium_of(given)}")
    signal = own(given) if own is not None else open_signal(given, exact=codec.lossless)
    axis, total = _length(signal)
    numbers = 1
    for n in signal.info["shape"]:
        numbers *= n or SMALL
    signal.chunks = _told(signal.chunks, axis, heard, total)
    with replaced(out) as part, part.open("wb") as file:
        plain = not set(signal.info) - {"medium", "dtype", "shape", "rate_hz"}
        compact = numbers < SMALL and plain and _countable(codec, signal, rate)
        return pack(codec, signal, file, rate=rate, compact=compact)


def decode(
    given: str | Path,
    out: str | Path,
    *,
    model: str | Path | None = None,
    partial: bool = False,
    limits: Limits | None = None,
    heard: Heard | None = None,
) -> Opened:
    """Write what an ``.ist`` file holds as a file for others; what was there is replaced whole.

    Args:
        given: The ``.ist`` file.
        out: The file; its suffix says the format.
        model: Folder of the trained codec that wrote it, if it is not one that is known here.
        partial: Write what comes before a damage; ``reader.damage`` of the result says what it was.
        limits: What is accepted.
        heard: Told about the progress.

    Raises:
        BrokenFileError: It is damaged, or ``out`` cannot be written.
        MismatchError: Its model is not at hand.
        InvalidInputError: The format of ``out`` cannot hold the signal, or ``out`` is the file.
    """
    given, out = Path(given), Path(out)
    _apart(given, out)
    opened = unpack(given, folder=model, limits=limits, allow_partial=partial)
    signal = opened.signal
    try:
        own: Callable[[Signal, Path, Path], None] | None = getattr(opened.codec, "save", None)
        if signal.medium != medium_of(out) and not (signal.medium == "bytes" and own is not None):
            raise InvalidInputError(f"{given} holds {signal.medium}; {out} is no name for that")
        axis, total = _length(signal)
        signal.chunks = _told(signal.chunks, axis, heard, total)
        if own is not None and signal.medium in ("video", "bytes"):
            with replaced(out) as part:
                own(signal, part, out)
        else:
            save_signal(out, signal, exact=opened.codec.lossless)
    finally:
        opened.reader.close()
    return opened


def inspect(given: str | Path) -> dict[str, Any]:
    """What an ``.ist`` file says and whether it is whole, as plain data; nothing is decoded.

    Args:
        given: The file.

    Raises:
        BrokenFileError: Its header cannot be read.
    """
    from isthmus.codecs.base import fields_of, find

    with Reader(given, allow_partial=True, fields=fields_of) as reader:
        header, kinds, payload, texts = reader.header, Counter[str](), 0, []
        names = {DATA: "data", RESET: "data from which decoding can begin", TEXT: "text"}
        for frame in reader:
            kinds[names.get(frame.kind, "embedded")] += 1
            if frame.kind in (DATA, RESET, EMBEDDED):
                payload += len(frame.payload)
            else:
                texts.append(frame.payload.decode("utf-8", "replace"))
        try:
            find(header.codec, header.fingerprint)
            model = "none is needed" if not any(header.fingerprint) else "at hand"
        except IsthmusError as error:
            model = str(error)
        return {
            "codec": header.codec,
            "signal": dict(header.signal),
            "lossless": header.lossless,
            "parameters": dict(header.parameters),
            "entropy": dict(header.entropy),
            "fingerprint": header.fingerprint.hex(),
            "model": model,
            "bytes": reader.size,
            "header_bytes": header.size,
            "payload_bytes": payload,
            "frames": dict(kinds),
            "texts": texts,
            "length": reader.samples,
            "damage": reader.damage,
        }


def default(given: str | Path, rate: float | None = None) -> str:
    """Name of the codec of a file when nobody asks for one.

    Args:
        given: The file.
        rate: Wanted rate; losing nothing has none to choose.
    """
    medium = medium_of(given)
    return DEFAULTS[medium] if rate is None else WITH_LOSS.get(medium, DEFAULTS[medium])


def trained_in(model: str | Path | None) -> str:
    """Name of the system in a folder, or nothing without a folder.

    Raises:
        BrokenFileError: The folder holds none.
    """
    return "" if model is None else str(read_config(Path(model))["system"])


def ready(
    name: str,
    model: str | Path | None = None,
    quality: float | None = None,
    report: Callable[[Progress], None] | None = None,
) -> Codec:
    """A codec that is ready to encode.

    Args:
        name: Its id, or the part behind the stroke.
        model: Folder of a trained codec; one is trained at the scale small when there is none.
        quality: Wanted quality, of a codec that has such a choice.
        report: Called after every step of a training, also one on the file that is coded.

    Raises:
        UnknownNameError: No such codec.
        InvalidInputError: It has no quality to choose, or is not trained.
    """
    system: Any = lookup(name)
    choice = {} if quality is None else {"quality": quality}
    if choice and "quality" not in inspection.signature(system).parameters:
        raise InvalidInputError(f"{name} has no quality to choose; leave --quality out")
    made: Any
    if issubclass(system, TrainedCodec):
        if model is None:
            from isthmus.workbench.trained import at_hand  # a door that trains nothing opens sooner

            model = at_hand(system, report)
        made = system.from_pretrained(model)
    else:
        if model is not None:
            raise InvalidInputError(f"{name} is not trained; leave --model out")
        made = system(**choice)
        if getattr(system, "fits_each_file", False):
            made.report = report
    codec: Codec = made
    return codec


def _apart(given: Path, out: Path) -> None:
    if out.exists() and given.exists() and out.samefile(given):
        raise InvalidInputError(f"{out} is the file that is read; choose another name")


def _countable(codec: Codec, signal: Signal, rate: float | None) -> bool:
    """Whether a short header has room for a codec's parameters."""
    if signal.medium != codec.medium:
        return False  # which pack() refuses
    values = codec.parameters(signal.info, rate)
    return set(values) == set(codec.fields) and all(
        type(v) is int and v >= 0 for v in values.values()
    )


def _length(signal: Signal) -> tuple[int | None, int | None]:
    axis = RUNNING.get(signal.medium)
    return axis, None if axis is None else signal.info["shape"][axis]


def _told(
    chunks: Iterable[torch.Tensor], axis: int | None, heard: Heard | None, total: int | None
) -> Iterator[torch.Tensor]:
    """The chunks, and word of each."""
    done = 0
    for chunk in chunks:
        yield chunk
        done += chunk.shape[axis] if axis is not None else 0
        if heard is not None:
            heard(done, total)
