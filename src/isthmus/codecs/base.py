"""Codecs by name, and the way of a signal into a file and back.

::

    signal ──pack(codec, signal, file)──▶ .ist ──unpack(file)──▶ header, signal
                                                   │ lookup(id)    a registry, never a file's word
                                                   └ find(id, fingerprint)   cache, folder

A codec that is trained is a :class:`TrainedCodec`; which weights a file needs, its fingerprint
says.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import torch

from isthmus import registry
from isthmus.codecs.container import TEXT, Frame, Header, Limits, Reader, fingerprint, write
from isthmus.errors import BrokenFileError, InvalidInputError, MismatchError, UnknownNameError
from isthmus.folders import cache_folder
from isthmus.roles import Codec, Medium, Signal
from isthmus.training.system import CONFIG, Answer, TrainedSystem, read_config

PARTS = {
    "parts/lossless-image": "isthmus.codecs.lossless_image:LosslessImage",
    "parts/learned-image": "isthmus.codecs.learned_image:LearnedImage",
    "parts/lossless-audio": "isthmus.codecs.lossless_audio:LosslessAudio",
    "parts/av1": "isthmus.codecs.films:Av1",
    "parts/ffv1": "isthmus.codecs.films:Ffv1",
    "parts/lossless-h264": "isthmus.codecs.films:LosslessH264",
}
"""Codecs that are parts rather than published systems: ``module:class`` by id."""

FAMILIES = ("codecs", "compression")
"""Families whose systems may be codecs."""

NO_MODEL = bytes(32)
"""The fingerprint of a codec that needs no model."""

#: Axis of a chunk along which the chunks of a signal follow each other.
RUNNING = {"audio": 1, "image": 1, "video": 0, "bytes": 0}


class TrainedCodec(TrainedSystem):
    """Base of the codecs that are trained: a :class:`~isthmus.training.system.TrainedSystem` too.

    A subclass sets the class attributes of :class:`~isthmus.roles.Codec`, and ``parameters``,
    ``encode`` and ``decode``.

    Attributes:
        mends: Whether it makes up for frames that did not arrive (:attr:`Frame.lost
            <isthmus.codecs.container.Frame.lost>`), where a damaged file is read in part.
    """

    role: ClassVar[str] = "codec"
    family: ClassVar[str]
    medium: ClassVar[Medium]
    lossless: ClassVar[bool] = False
    numerics: ClassVar[str] = "static"
    fields: ClassVar[tuple[str, ...]] = ()
    mends: ClassVar[bool] = False

    @property
    def id(self) -> str:
        """``family/slug``."""
        return f"{self.family}/{self.name}"

    @property
    def fingerprint(self) -> bytes:
        """SHA-256 of what a decoder needs."""
        return fingerprint(self.decode_config(), self.decode_tensors())

    def decode_config(self) -> dict[str, Any]:
        """Settings that decoding depends on; all of them, unless a codec knows better."""
        return asdict(self.settings)

    def decode_tensors(self) -> Mapping[str, torch.Tensor]:
        """Tensors that decoding depends on; all of them, unless a codec knows better."""
        return self.module.state_dict()

    def parameters(self, info: Mapping[str, Any], rate: float | None = None) -> dict[str, Any]:
        """See :class:`~isthmus.roles.Codec`."""
        raise NotImplementedError

    def encode(self, signal: Signal, header: Header) -> Iterator[Frame]:
        """See :class:`~isthmus.roles.Codec`."""
        raise NotImplementedError

    def decode(self, header: Header, frames: Iterable[Frame]) -> Iterator[torch.Tensor]:
        """See :class:`~isthmus.roles.Codec`."""
        raise NotImplementedError

    def open(self, path: Path) -> Signal:
        """The signal in a file of one's own.

        Raises:
            InvalidInputError: A codec of files that nobody else reads.
        """
        from isthmus.signals.files import open_signal

        return open_signal(path, exact=self.lossless)

    def run(self, given: str) -> Answer:
        """Code a file; saved, it is an ``.ist`` file."""
        out = io.BytesIO()
        sizes = pack(self, self.open(Path(given)), out)
        text = f"{given}: {sizes.file} bytes ({sizes.payload} without headers)"

        def save(path: Path) -> None:
            path.write_bytes(out.getvalue())

        return Answer(text, asdict(sizes), save)


# by name ------------------------------------------------------------------------------------------


def ids() -> list[str]:
    """Ids of all codecs; nothing is imported but the systems of two families."""
    found = list(PARTS)
    for family in FAMILIES:
        for slug in registry.slugs(family):
            role = getattr(registry.load(slug), "role", None)
            found += [f"{family}/{slug}"] * (role == "codec")
    return found


def lookup(name: str) -> type:
    """The class of a codec.

    Args:
        name: Its id, or the part behind the stroke.

    Raises:
        UnknownNameError: There is none of that name.
    """
    family, _, slug = name.rpartition("/")
    for own, place in PARTS.items():
        if name in (own, own.split("/")[1]):
            module, _, cls = place.partition(":")
            found: type = getattr(importlib.import_module(module), cls)
            return found
    for each in FAMILIES:
        if family in ("", each) and slug in registry.slugs(each):
            system = registry.load(slug)
            if getattr(system, "role", None) == "codec":
                return system
    raise UnknownNameError("codec", name, ids())


def trainable(name: str) -> type:
    """The class of a system, or of a codec that is no system but is trained like one.

    Args:
        name: A slug, or the name of the codec.

    Raises:
        UnknownNameError: There is none of that name.
    """
    own = lookup(name) if f"parts/{name}" in PARTS else None
    return own if own and issubclass(own, TrainedCodec) else registry.load(name)


def fields_of(name: str) -> tuple[str, ...]:
    """Names of the parameters of a codec, for compact headers.

    Args:
        name: Its id.

    Raises:
        UnknownNameError: No such codec.
    """
    return tuple(lookup(name).fields)  # type: ignore[attr-defined]


def find(name: str, mark: bytes, folder: str | Path | None = None) -> Codec:
    """The codec that can decode a file.

    Args:
        name: Its id.
        mark: The fingerprint of its model, or the first 8 bytes of it.
        folder: Of a trained codec, to take instead of those that are known.

    Raises:
        UnknownNameError: No such codec.
        MismatchError: No model with this fingerprint is at hand.
    """
    system: Any = lookup(name)
    codecs: Iterable[Any]
    if not issubclass(system, TrainedSystem):
        codecs = [system()]
    elif folder is not None:
        codecs = [system.from_pretrained(folder)]
    else:
        codecs = known(system)
    seen = []
    for codec in codecs:
        own: bytes = codec.fingerprint
        if own[: len(mark)] == mark:
            found: Codec = codec
            return found
        seen.append(own.hex()[:8])
    at_hand = f"at hand: {', '.join(seen[:5])}" if seen else "none is at hand"
    raise MismatchError(
        f"{name} with the model {mark.hex()[:8]} is needed ({at_hand}); give the folder of that "
        "model with --model, or use the version of isthmus that wrote the file"
    )


def known(system: Any) -> Iterator[Any]:
    """Models of a trained codec that lie at hand: the one in the package, those in the cache."""
    cached = sorted((cache_folder() / "systems").glob(f"{system.name}-*"))
    for folder in (system.embedded(), *cached):
        if folder is not None and (folder / CONFIG).exists():
            with contextlib.suppress(BrokenFileError, MismatchError):
                if read_config(folder)["system"] == system.name:
                    yield system.from_pretrained(folder)


# files --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """What a signal became.

    Attributes:
        codec: Id of the codec.
        file: Bytes of the whole file.
        payload: Bytes of the frames' payloads alone, checks of symbols not counted.
        frames: Frames.
        samples: Length of the signal along its running axis: samples, rows or pictures.
        notes: What of the file does not come along, in words.
    """

    codec: str
    file: int
    payload: int
    frames: int
    samples: int
    notes: tuple[str, ...] = ()


def pack(
    codec: Codec,
    signal: Signal,
    file: BinaryIO,
    *,
    rate: float | None = None,
    compact: bool = False,
) -> Sizes:
    """Write a signal.

    Args:
        codec: How.
        signal: What; its chunks are taken one at a time.
        file: Open for writing bytes.
        rate: Wanted rate, of a codec that has a choice.
        compact: Write the short header.

    Raises:
        InvalidInputError: The codec cannot code this signal.
    """
    if signal.medium != codec.medium:
        raise InvalidInputError(f"{codec.id} codes {codec.medium}, and this is {signal.medium}")
    header = Header(
        codec.id,
        codec.fingerprint,
        signal.info,
        codec.parameters(signal.info, rate),
        {"numerics": codec.numerics, "precision": 16},
        lossless=codec.lossless,
        compact=compact,
    )
    payload = count = samples = 0

    def frames() -> Iterator[Frame]:
        nonlocal payload, count, samples
        for frame in codec.encode(signal, header):
            payload, count = payload + len(frame.payload), count + 1
            samples += frame.samples
            yield frame

    total = write(file, header, frames(), codec.fields)
    return Sizes(codec.id, total, payload, count, samples, tuple(getattr(signal, "notes", ())))


@dataclass
class Opened:
    """A file on its way back.

    Attributes:
        reader: The file.
        codec: What decodes it.
        signal: What comes out, chunk by chunk.
        texts: Text frames met so far.
    """

    reader: Reader
    codec: Codec
    signal: Signal
    texts: list[str] = field(default_factory=list)


def unpack(
    file: str | Path | bytes | BinaryIO,
    *,
    codec: Codec | None = None,
    folder: str | Path | None = None,
    limits: Limits | None = None,
    allow_partial: bool = False,
) -> Opened:
    """Read a file; chunks are decoded as they are asked for.

    Args:
        file: A path, bytes, or a seekable file.
        codec: The codec, where it is at hand; it is looked up otherwise.
        folder: Of the trained codec, if it is not one that is known.
        limits: What is accepted.
        allow_partial: Give what comes before a damage; ``reader.damage`` says what it was.

    Raises:
        BrokenFileError: A damaged or hostile file.
        DesyncError: While chunks are taken: the model is not the one that wrote the file.
        UnknownNameError: No such codec.
        MismatchError: Its model is not at hand.
    """
    reader = Reader(file, limits, allow_partial=allow_partial, fields=fields_of)
    header = reader.header
    try:
        if codec is None:
            codec = find(header.codec, header.fingerprint, folder)
        elif codec.id != header.codec:
            raise MismatchError(f"{reader.name} was written by {header.codec}, not by {codec.id}")
        elif codec.fingerprint[: len(header.fingerprint)] != header.fingerprint:
            raise MismatchError(
                f"{reader.name} needs the model {header.fingerprint.hex()[:8]}, this one is "
                f"{codec.fingerprint.hex()[:8]}"
            )
        if codec.medium != header.signal["medium"] or codec.lossless != header.lossless:
            raise BrokenFileError(f"{reader.name} says of itself what {codec.id} is not")
        if codec.numerics != header.entropy["numerics"]:
            raise BrokenFileError(f"{reader.name} has numerics that {codec.id} never has")
    except BaseException:
        reader.close()
        raise
    reader.mending = allow_partial and getattr(codec, "mends", False)
    opened = Opened(reader, codec, Signal(header.signal, ()))
    opened.signal.chunks = _chunks(opened)
    return opened


def _chunks(opened: Opened) -> Iterator[torch.Tensor]:
    """What the codec makes of the frames, held against what the header says."""
    reader, header, codec = opened.reader, opened.reader.header, opened.codec
    shape, axis = header.signal["shape"], RUNNING.get(header.signal["medium"])
    frames, done = _data(opened), 0
    try:
        for chunk in codec.decode(header, frames):
            fits = len(chunk.shape) == len(shape) and all(
                i == axis or wanted in (None, got)
                for i, (wanted, got) in enumerate(zip(shape, chunk.shape, strict=True))
            )
            done += chunk.shape[axis] if axis is not None else chunk.numel()
            if not fits or (axis is not None and shape[axis] is not None and done > shape[axis]):
                raise BrokenFileError(f"{reader.name} decodes to another shape than it names")
            yield chunk
        for _ in frames:
            raise BrokenFileError(f"{reader.name} has more frames than its signal needs")
    except (
        ArithmeticError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
        struct.error,
    ) as error:
        if isinstance(error, InvalidInputError):
            raise BrokenFileError(f"{reader.name} decodes to nonsense: {error}") from error
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BrokenFileError(f"{reader.name} decodes to nonsense ({first})") from error
    finally:
        reader.close()
    if reader.damage:
        return
    wanted = shape[axis] if axis is not None else header.samples
    if done != reader.samples or wanted not in (None, done):
        raise BrokenFileError(f"{reader.name} decodes to another length than it names")


def _data(opened: Opened) -> Iterator[Frame]:
    for frame in opened.reader:
        if frame.kind == TEXT:
            opened.texts.append(frame.payload.decode("utf-8", "replace"))
        else:
            yield frame
