"""The ``.ist`` file: a header that says what is inside, frames with checksums, an end.

::

    magic │ major minor flags │ id │ fingerprint │ header │ CRC
    type index length payload CRC   (a data frame's payload opens with the check of its symbols)
    ...
    255  index length (frames, samples, CRC of the CRCs) CRC

Everything is little-endian. A reader believes nothing: sizes are bounded before they are used,
every byte is under a checksum, and the only names a file may give are looked up in a registry.
Two profiles: the full one has a JSON header of up to 64 KiB and 32-bit checks; the compact one, for
signals of a few hundred bits, has numbers only, an 8-byte fingerprint and 16-bit checks.
"""

from __future__ import annotations

import io
import json
import math
import re
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from isthmus.errors import BrokenFileError, DesyncError, InvalidInputError

MAGIC = bytes.fromhex("89495354 0d0a1a0a")
MAJOR, MINOR = 1, 1
STREAMING, LOSSLESS, ADAPTIVE, EXACT, COMPACT = 1, 2, 4, 8, 16
DATA, RESET, TEXT, EMBEDDED, END = 0, 1, 2, 3, 255
_LOST, _MOST_LOST = -1, 256

MAX_HEADER = 64 << 10
_ID = re.compile(r"[a-z0-9-]{1,48}/[a-z0-9-]{1,48}")
_KNOWN = STREAMING | LOSSLESS | ADAPTIVE | EXACT | COMPACT
_KINDS = (DATA, RESET, TEXT, EMBEDDED)

MEDIA = ("audio", "image", "video", "tensor", "bytes")
DTYPES = ("uint8", "uint16", "int8", "int16", "int24", "int32", "float32", "float16", "float64")
NUMERICS = ("static", "int", "pinned")
"""What this build can decode; see :mod:`isthmus.codecs.rangecoder`."""

#: Numbers that a compact header may carry besides medium, dtype and shape.
_EXTRA = ("rate_hz",)


@dataclass(frozen=True)
class Limits:
    """What a reader accepts.

    Attributes:
        samples: Samples of a signal of known length.
        payload: Bytes of a frame.
    """

    samples: int = 1 << 28
    payload: int = 1 << 26


@dataclass(frozen=True)
class Header:
    """What a file says before its first frame.

    Attributes:
        codec: Id of the codec, ``family/slug``.
        fingerprint: Of its model, 32 bytes (8 where a compact file was read).
        signal: Medium, dtype, shape and what else describes the signal.
        parameters: Of the codec.
        entropy: ``numerics``, and the ``precision`` of the tables in bits.
        frames: How many follow, where the writer knew.
        lossless: Whether every bit comes back.
        compact: Which profile.
        minor: Minor version of the format.
        size: Bytes of the header in the file; 0 before it is written.
    """

    codec: str
    fingerprint: bytes
    signal: Mapping[str, Any]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    entropy: Mapping[str, Any] = field(default_factory=lambda: {"numerics": "static"})
    frames: int | None = None
    lossless: bool = False
    compact: bool = False
    minor: int = MINOR
    size: int = 0

    @property
    def samples(self) -> int | None:
        """Numbers in the signal; None for a length that nobody knew."""
        shape = self.signal["shape"]
        return None if None in shape else math.prod(shape)


@dataclass
class Frame:
    """One frame.

    Attributes:
        payload: Its bytes, without the check of its symbols.
        check: CRC32 of its symbols, or the low bits of it.
        kind: ``DATA``, ``RESET`` (data that need nothing before them), ``TEXT`` or ``EMBEDDED``.
        samples: Samples along time, or pixels, that it holds; counted by the writer.
        bits: Width of the check.
        verified: Whether the decoder has compared its symbols.
        lost: It did not arrive; a codec that mends is told so, by :attr:`Reader.mending`.
    """

    payload: bytes
    check: int = 0
    kind: int = DATA
    samples: int = 0
    bits: int = 32
    verified: bool = False
    lost: bool = False

    @classmethod
    def of(cls, symbols: Any, payload: bytes, *, samples: int = 0, reset: bool = False) -> Frame:
        """A data frame.

        Args:
            symbols: All that the decoder will decode from it, as integers, in any shape.
            payload: The bytes.
            samples: See the attribute.
            reset: Whether decoding may begin here.
        """
        return cls(payload, checksum(symbols), RESET if reset else DATA, samples)

    def verify(self, symbols: Any) -> None:
        """Compare decoded symbols with those that were coded.

        Raises:
            DesyncError: They are others.
        """
        if (checksum(symbols) ^ self.check) & ((1 << self.bits) - 1):
            raise DesyncError(
                "the frame is whole but decodes to other symbols than were coded: encoder and "
                "decoder disagree on the model; decode with the version and model that wrote it"
            )
        self.verified = True


def checksum(symbols: Any) -> int:
    """CRC32 of integers as little-endian int32.

    Example:
        >>> checksum([1, 2, 3]) == zlib.crc32(bytes([1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0]))
        True
    """
    values = symbols.numpy() if isinstance(symbols, torch.Tensor) else np.asarray(symbols)
    return zlib.crc32(np.ascontiguousarray(values.astype("<i4", copy=False)).data)


def fingerprint(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> bytes:
    """SHA-256 of what a decoder needs: its settings, and its tensors in the order of their names.

    Encoders, discriminators and optimisers stay outside, so that training them anew keeps old
    files readable.

    Args:
        config: Plain data.
        tensors: By name; any shape and type.

    Returns:
        32 bytes.
    """
    import hashlib

    state = hashlib.sha256(json.dumps(config, sort_keys=True, separators=(",", ":")).encode())
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        shape = ",".join(map(str, value.shape))
        state.update(f"\n{name} {str(value.dtype).removeprefix('torch.')} [{shape}]\n".encode())
        array = value.reshape(-1).view(torch.uint8).numpy() if value.numel() else np.empty(0)
        state.update(np.ascontiguousarray(array).data)
    return state.digest()


# writing ----------------------------------------------------------------------------------------


def write(
    file: BinaryIO, header: Header, frames: Iterable[Frame], fields: Sequence[str] = ()
) -> int:
    """Write a whole file.

    Args:
        file: Open for writing bytes.
        header: What it says first.
        frames: Taken one at a time, so a long signal never lies in memory.
        fields: The codec's names of its parameters, for the compact profile.

    Returns:
        Bytes written.

    Raises:
        InvalidInputError: A header that cannot be written.
    """
    head = pack_header(header, fields)
    file.write(head)
    total, count, samples, over = len(head), 0, 0, 0
    bits = 16 if header.compact else 32
    for frame in frames:
        check = (frame.check & ((1 << bits) - 1)).to_bytes(bits // 8, "little")
        body = (check if frame.kind in (DATA, RESET) else b"") + frame.payload
        packed, crc = _pack(frame.kind, count, body, bits)
        file.write(packed)
        over = zlib.crc32(crc, over)
        total, count, samples = total + len(packed), count + 1, samples + frame.samples
    packed, _ = _pack(END, count, leb(count) + leb(samples) + over.to_bytes(4, "little"), bits)
    file.write(packed)
    return total + len(packed)


def _pack(kind: int, index: int, payload: bytes, bits: int) -> tuple[bytes, bytes]:
    body = bytes([kind]) + leb(index) + leb(len(payload)) + payload
    crc = zlib.crc32(body).to_bytes(4, "little")[: bits // 8]
    return body + crc, crc


def pack_header(header: Header, fields: Sequence[str] = ()) -> bytes:
    """The bytes of a header.

    Raises:
        InvalidInputError: An id, a fingerprint or a value that the format has no room for.
    """
    if not _ID.fullmatch(header.codec) or len(header.codec) > 64:
        raise InvalidInputError(f"a codec's id is family/slug, not {header.codec!r}")
    if len(header.fingerprint) != 32:
        raise InvalidInputError(f"a fingerprint has 32 bytes, not {len(header.fingerprint)}")
    _check_signal(header.signal, InvalidInputError)
    numerics = header.entropy.get("numerics")
    flags = STREAMING * (header.samples is None) | LOSSLESS * header.lossless
    flags |= EXACT * (numerics in ("static", "int")) | COMPACT * header.compact
    name = header.codec.encode()
    out = MAGIC + struct.pack("<BBH", MAJOR, MINOR, flags) + bytes([len(name)]) + name
    if header.compact:
        out += header.fingerprint[:8] + _struct(header, fields)
        return out + zlib.crc32(out).to_bytes(4, "little")[:2]
    values = {
        "signal": dict(header.signal),
        "parameters": dict(header.parameters),
        "entropy": dict(header.entropy),
        "frames": header.frames,
    }
    text = _canonical(values)
    if not _plain(values):
        raise InvalidInputError("a header holds integers, strings, lists and None only")
    if len(text) > MAX_HEADER:
        raise InvalidInputError(f"a header has at most {MAX_HEADER} bytes, got {len(text)}")
    out += header.fingerprint + struct.pack("<I", len(text)) + text
    return out + zlib.crc32(out).to_bytes(4, "little")


def _struct(header: Header, fields: Sequence[str]) -> bytes:
    """Medium, dtype, shape, rate, entropy and parameters as numbers."""
    s = header.signal
    odd = set(s) - {"medium", "dtype", "shape", *_EXTRA}
    if (
        odd
        or set(header.parameters) != set(fields)
        or not all(type(header.parameters[f]) is int and header.parameters[f] >= 0 for f in fields)
    ):
        raise InvalidInputError(
            "a compact header holds a medium, a dtype, a shape, a rate and whole numbers for the "
            f"parameters {', '.join(fields) or '(none)'}; write the full profile"
        )
    out = bytes([MEDIA.index(s["medium"]), DTYPES.index(s["dtype"]), len(s["shape"])])
    for n in s["shape"]:
        out += leb(0 if n is None else n)
    for name in _EXTRA:
        out += leb(s.get(name, 0))
    entropy = header.entropy
    out += bytes([NUMERICS.index(entropy["numerics"]), int(entropy.get("precision", 0))])
    return out + b"".join(leb(header.parameters[f]) for f in fields)


def _canonical(values: Any) -> bytes:
    return json.dumps(
        values, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    ).encode()


def _plain(value: Any, depth: int = 0) -> bool:
    """Whether a value consists of integers, strings, None, lists and objects, not too deep."""
    if depth > 6:
        return False
    if isinstance(value, dict):
        return all(isinstance(k, str) and _plain(v, depth + 1) for k, v in value.items())
    if isinstance(value, list | tuple):
        return all(_plain(v, depth + 1) for v in value)
    return value is None or (isinstance(value, int | str) and not isinstance(value, bool))


def leb(number: int) -> bytes:
    r"""A number as LEB128: seven bits a byte, the lowest first.

    Example:
        >>> leb(300)
        b'\xac\x02'
    """
    if not 0 <= number < 1 << 63:
        raise InvalidInputError(f"numbers in a file lie from 0 to 2^63 - 1, got {number}")
    out = bytearray()
    while True:
        number, low = number >> 7, number & 127
        out.append(low | (128 if number else 0))
        if not number:
            return bytes(out)


# reading ----------------------------------------------------------------------------------------


def unleb(data: bytes, at: int) -> tuple[int, int]:
    """The number that begins at a place, and the place after it.

    Raises:
        BrokenFileError: There is no such number.

    Example:
        >>> unleb(leb(300) + b"x", 0)
        (300, 2)
    """
    value = 0
    for place in range(9):
        if at + place >= len(data):
            break
        byte = data[at + place]
        value |= (byte & 127) << (7 * place)
        if byte < 128:
            return value, at + place + 1
    raise BrokenFileError("a number in the file is malformed")


class Reader:
    """A file that is read: the header at once, frames as they are asked for.

    Args:
        file: A path, bytes, or a seekable file.
        limits: What is accepted.
        allow_partial: Frames before a damage are given, and :attr:`damage` says what came after
            them, instead of an error.
        fields: Names of a codec's parameters by its id, for compact files.

    Attributes:
        header: What the file says first.
        size: Bytes of the whole file.
        samples: The sample count of the end frame, once it has been reached.
        damage: Why the frames ended early, or what the first loss was, with ``allow_partial``.
        mending: Set it, and damaged or missing data frames come as lost ones, those after them as
            they are.

    Raises:
        BrokenFileError: It is no such file, or a damaged or hostile one.
    """

    def __init__(
        self,
        file: str | Path | bytes | BinaryIO,
        limits: Limits | None = None,
        *,
        allow_partial: bool = False,
        fields: Callable[[str], Sequence[str]] = lambda _: (),
    ) -> None:
        self.limits = limits or Limits()
        self.allow_partial = allow_partial
        self.name, self._own = "the file", False
        if isinstance(file, str | Path):
            self.name = str(file)
            try:
                self._file: BinaryIO = Path(file).open("rb")  # noqa: SIM115
            except OSError as error:
                raise BrokenFileError(f"{file} cannot be read ({error.strerror})") from error
            self._own = True
        else:
            self._file = io.BytesIO(file) if isinstance(file, bytes) else file
        self.samples: int | None = None
        self.damage, self.mending = "", False
        try:
            start = self._file.tell()
            self.size = self._file.seek(0, io.SEEK_END) - start
            self._file.seek(start)
            self._left = self.size
            self.header = self._header(fields)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file, if it was opened here."""
        if self._own:
            self._file.close()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Frame]:
        """Frames in order, checked; after the last one the end frame and the end of the file."""
        count, over, bits = 0, 0, 16 if self.header.compact else 32
        while True:
            try:
                kind, payload, crc = self._frame(count, bits)
                if kind == END:
                    self._end(payload, count, over)
                    return
                if count == self.header.frames:
                    raise self._broken(f"has more than the {count} frames it names")
            except BrokenFileError as error:
                if not self.allow_partial:
                    raise
                self.damage = self.damage or str(error)
                return
            over = zlib.crc32(crc, over)
            count += 1
            if kind == _LOST:
                yield Frame(b"", bits=bits, lost=True)
                continue
            frame = Frame(payload, kind=kind, bits=bits)
            if kind in (DATA, RESET):
                frame.check = int.from_bytes(payload[: bits // 8], "little")
                frame.payload = payload[bits // 8 :]
            yield frame

    def _broken(self, why: str) -> BrokenFileError:
        return BrokenFileError(f"{self.name} {why}")

    def _take(self, count: int, what: str) -> bytes:
        """The next bytes; never more than the file has."""
        if count > self._left:
            raise self._broken(f"is cut off in {what}")
        got = self._file.read(count)
        if len(got) != count:
            raise self._broken(f"is cut off in {what}")
        self._left -= count
        return got

    def _number(self, what: str, seen: bytearray, longest: int = 5) -> int:
        value = 0
        for place in range(longest):
            byte = self._take(1, what)[0]
            seen.append(byte)
            value |= (byte & 127) << (7 * place)
            if byte < 128:
                if byte == 0 and place:
                    break
                return value
        raise self._broken(f"has a malformed number in {what}")

    def _header(self, fields: Callable[[str], Sequence[str]]) -> Header:
        seen = bytearray(self._take(min(8, self._left), "its first bytes"))
        if bytes(seen) != MAGIC:
            raise self._broken("is no .ist file; give one made by isthmus encode")
        fixed = self._take(5, "its header")
        seen += fixed
        major, minor, flags, length = struct.unpack("<BBHB", fixed)
        if major != MAJOR:
            raise self._broken(f"is of version {major}, and {MAJOR} is read here; update isthmus")
        if (flags & 0xFF) & ~_KNOWN:
            raise self._broken(f"needs what is not known here (flags {flags:#06x}); update isthmus")
        if not 3 <= length <= 64:
            raise self._broken("has a malformed codec id")
        raw = self._take(length, "its header")
        seen += raw
        name = raw.decode("ascii", "replace")
        if not _ID.fullmatch(name):
            raise self._broken("has a malformed codec id")
        compact = bool(flags & COMPACT)
        mark = self._take(8 if compact else 32, "its header")
        seen += mark
        if compact:
            values = self._numbers(seen, fields(name))
            bits = 2
        else:
            raw = self._take(4, "its header")
            seen += raw
            (length,) = struct.unpack("<I", raw)
            if length > MAX_HEADER:
                raise self._broken(f"claims a header of {length} bytes; at most {MAX_HEADER}")
            text = self._take(length, "its header")
            seen += text
            values, bits = {}, 4
        crc = self._take(bits, "its header")
        if crc != zlib.crc32(seen).to_bytes(4, "little")[:bits]:
            raise self._broken("has a damaged header")
        if not compact:
            values = self._json(text)
        try:
            _check_signal(values["signal"], BrokenFileError)
        except BrokenFileError as error:
            raise self._broken(str(error)) from error
        header = Header(
            name,
            mark,
            values["signal"],
            values["parameters"],
            values["entropy"],
            values["frames"],
            bool(flags & LOSSLESS),
            compact,
            minor,
            self.size - self._left,
        )
        self._check(header, flags)
        return header

    def _json(self, text: bytes) -> dict[str, Any]:
        try:
            values = json.loads(text)
            good = _canonical(values) == text and _plain(values)
        except (ValueError, RecursionError):
            good = False
        if (
            not good
            or not isinstance(values, dict)
            or set(values) != {"signal", "parameters", "entropy", "frames"}
            or not all(isinstance(values[k], dict) for k in ("signal", "parameters", "entropy"))
        ):
            raise self._broken("has a header that is not in the canonical form")
        frames = values["frames"]
        if frames is not None and (type(frames) is not int or frames < 0):
            raise self._broken("has a malformed number of frames")
        return dict(values)

    def _numbers(self, seen: bytearray, fields: Sequence[str]) -> dict[str, Any]:
        """The fixed struct of a compact header."""
        raw = self._take(3, "its header")
        seen += raw
        medium, dtype, dims = raw
        if medium >= len(MEDIA) or dtype >= len(DTYPES) or not 1 <= dims <= 8:
            raise self._broken("has a malformed header")
        shape = [self._number("its header", seen) for _ in range(dims)]
        signal: dict[str, Any] = {"medium": MEDIA[medium], "dtype": DTYPES[dtype]}
        signal["shape"] = [n or None for n in shape]
        for name in _EXTRA:
            if value := self._number("its header", seen):
                signal[name] = value
        raw = self._take(2, "its header")
        seen += raw
        if raw[0] >= len(NUMERICS):
            raise self._broken("has a malformed header")
        entropy = {"numerics": NUMERICS[raw[0]], "precision": raw[1]}
        parameters = {name: self._number("its header", seen, 9) for name in fields}
        return {"signal": signal, "parameters": parameters, "entropy": entropy, "frames": None}

    def _check(self, header: Header, flags: int) -> None:
        """What the header promises must be possible here."""
        numerics = header.entropy.get("numerics")
        if numerics not in NUMERICS:
            raise self._broken(
                f"needs numerics {str(numerics)[:40]!r}, which this build does not have; it has "
                f"{', '.join(NUMERICS)}"
            )
        if bool(flags & EXACT) != (numerics in ("static", "int")):
            raise self._broken("has flags that contradict its header")
        known = math.prod(n for n in header.signal["shape"] if n is not None)
        if known > self.limits.samples:
            raise self._broken(
                f"claims {known} samples; at most {self.limits.samples} are accepted here"
            )
        if bool(flags & STREAMING) != (header.samples is None):
            raise self._broken("has flags that contradict its header")

    def _frame(self, index: int, bits: int) -> tuple[int, bytes, bytes]:
        if not self._left:
            raise self._broken(f"has no end: it was cut off after frame {index}")
        begin, left = self._file.tell(), self._left
        seen = bytearray(self._take(1, f"frame {index}"))
        kind = seen[0]
        if kind not in (*_KINDS, END):
            raise self._broken(f"has a frame {index} of the unknown type {kind}")
        found = self._number(f"frame {index}", seen)
        if found != index:
            error = self._broken(f"has frame {found} where frame {index} should be")
            if not (self.mending and index < found < index + _MOST_LOST):
                raise error
            self.damage = self.damage or str(error)
            self._file.seek(begin)  # what came is of a later turn
            self._left = left
            return _LOST, b"", b""
        length = self._number(f"frame {index}", seen)
        if length > self.limits.payload:
            raise self._broken(
                f"claims a frame of {length} bytes; at most {self.limits.payload} are accepted"
            )
        if kind in (DATA, RESET) and length < bits // 8:
            raise self._broken(f"has a frame {index} without the check of its symbols")
        payload = self._take(length, f"frame {index}")
        crc = self._take(bits // 8, f"frame {index}")
        if crc != zlib.crc32(payload, zlib.crc32(seen)).to_bytes(4, "little")[: bits // 8]:
            error = self._broken(f"has a damaged frame {index}")
            if not (self.mending and kind in (DATA, RESET)):
                raise error
            self.damage = self.damage or str(error)
            return _LOST, b"", crc
        return kind, payload, crc

    def _end(self, payload: bytes, count: int, over: int) -> None:
        try:
            frames, at = unleb(payload, 0)
            samples, at = unleb(payload, at)
        except BrokenFileError as error:
            raise self._broken(f"has a malformed end ({error})") from error
        whole = payload[at:]
        if len(whole) != 4 or frames != count or int.from_bytes(whole, "little") != over:
            raise self._broken("has an end that does not fit its frames")
        if self.header.frames not in (None, count):
            raise self._broken(f"has {count} frames and names {self.header.frames}")
        if self._left:
            raise self._broken(f"has {self._left} bytes after its end")
        self.samples = samples


def _check_signal(signal: Mapping[str, Any], error: type[Exception]) -> None:
    """Medium, dtype and shape must be there and make sense."""
    if signal.get("medium") not in MEDIA or signal.get("dtype") not in DTYPES:
        raise error(
            f"names the medium {str(signal.get('medium'))[:40]!r} of "
            f"{str(signal.get('dtype'))[:40]!r}; known are {', '.join(MEDIA)}"
        )
    shape = signal.get("shape")
    if not isinstance(shape, list) or not 1 <= len(shape) <= 8:
        raise error("names no shape of 1 to 8 dimensions")
    if any(n is not None and (type(n) is not int or n < 1) for n in shape):
        raise error(f"names the shape {str(shape)[:80]}; every length is at least 1")
    dims = {"audio": 2, "image": 3, "video": 4, "bytes": 1}.get(signal["medium"])
    if dims not in (None, len(shape)):
        raise error(f"names a shape of {len(shape)} dimensions; {signal['medium']} has {dims}")
    rate = signal.get("rate_hz")
    if signal["medium"] == "audio" and (type(rate) is not int or not 0 < rate < 1 << 31):
        raise error("names no sample rate")
