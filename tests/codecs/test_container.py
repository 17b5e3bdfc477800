"""The container: what is written is read, and nothing else is."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from isthmus.codecs import container
from isthmus.codecs.container import (
    EMBEDDED,
    TEXT,
    Frame,
    Header,
    Limits,
    Reader,
    checksum,
    fingerprint,
    leb,
    pack_header,
    write,
)
from isthmus.errors import BrokenFileError, DesyncError, InvalidInputError

SOUND = {"medium": "audio", "dtype": "int16", "shape": [2, 30], "rate_hz": 16000}
HEADER = Header("parts/some", bytes(range(32)), SOUND, {"order": 3, "kind": "a"})
SYMBOLS = ([1, -2, 3], [70_000], [])
FRAMES = [
    Frame.of(SYMBOLS[0], b"first", samples=10, reset=True),
    Frame.of(SYMBOLS[1], b"second" * 40, samples=20),
    Frame(b"words", kind=TEXT),
    Frame(b"other", kind=EMBEDDED),
    Frame.of(SYMBOLS[2], b""),
]
SHORT = Header("parts/some", bytes(range(32)), SOUND, {"a": 3, "b": 300}, compact=True)


def made(header: Header = HEADER, frames: list[Frame] = FRAMES, fields: Any = ()) -> bytes:
    out = io.BytesIO()
    size = write(out, header, frames, fields)
    assert size == len(out.getvalue())
    return out.getvalue()


def again(data: bytes, **how: Any) -> tuple[Header, list[Frame], Reader]:
    reader = Reader(data, **how)
    return reader.header, list(reader), reader


def test_what_is_written_is_read() -> None:
    header, frames, reader = again(made())
    assert replace(header, size=0) == HEADER
    assert [f.payload for f in frames] == [f.payload for f in FRAMES]
    assert [f.kind for f in frames] == [1, 0, 2, 3, 0] and reader.samples == 30
    for frame, symbols in zip([frames[0], frames[1], frames[4]], SYMBOLS, strict=True):
        assert not frame.verified
        frame.verify(symbols)
        assert frame.verified
        with pytest.raises(DesyncError, match="decode with the version and model"):
            frame.verify([*symbols, 5])


def test_the_bytes_are_those_of_the_table() -> None:
    """The layout by hand: magic, versions and flags, id, fingerprint, JSON, CRC, one frame."""
    header = Header("a/b", bytes(32), {"medium": "bytes", "dtype": "uint8", "shape": [4]})
    data = made(header, [Frame.of([7], b"xy", samples=4)])
    text = (
        b'{"entropy":{"numerics":"static"},"frames":null,"parameters":{},'
        b'"signal":{"dtype":"uint8","medium":"bytes","shape":[4]}}'
    )
    head = b"\x89IST\r\n\x1a\n" + b"\x01\x01\x08\x00" + b"\x03a/b" + bytes(32)
    head += struct.pack("<I", len(text)) + text
    head += struct.pack("<I", zlib.crc32(head))
    frame = b"\x00\x00\x06" + struct.pack("<I", zlib.crc32(b"\x07\0\0\0")) + b"xy"
    crc = struct.pack("<I", zlib.crc32(frame))
    end = b"\xff\x01\x06\x01\x04" + struct.pack("<I", zlib.crc32(crc))
    assert data == head + frame + crc + end + struct.pack("<I", zlib.crc32(end))


def test_the_short_profile_is_short() -> None:
    frames = [Frame.of([5, 6], b"z" * 20, samples=30)]
    data = made(SHORT, frames, ("a", "b"))
    assert len(data) - 20 < 70 < 150 < len(made(replace(SHORT, compact=False), frames)) - 20
    header, found, _ = again(data, fields=lambda _: ("a", "b"))
    assert header.signal == SOUND and header.parameters == SHORT.parameters
    assert header.fingerprint == SHORT.fingerprint[:8] and header.entropy["numerics"] == "static"
    found[0].verify([5, 6])
    with pytest.raises(DesyncError):
        found[0].verify([5, 7])
    for odd in (
        replace(SHORT, signal={**SOUND, "colour": "red"}),
        replace(SHORT, parameters={"a": 1}),
        replace(SHORT, parameters={"a": 1, "b": -1}),
    ):
        with pytest.raises(InvalidInputError, match="write the full profile"):
            made(odd, frames, ("a", "b"))


@pytest.mark.parametrize("short", [False, True])
def test_every_flipped_bit_and_every_cut_is_seen(short: bool) -> None:
    header, fields = (SHORT, ("a", "b")) if short else (HEADER, ())
    frames = FRAMES if not short else [Frame.of([5, 6], b"z" * 20, samples=30)]
    data = made(header, frames, fields)
    for place in range(len(data)):
        with pytest.raises(BrokenFileError):
            again(data[:place], fields=lambda _: fields)
        for bit in range(8):
            bad = bytearray(data)
            bad[place] ^= 1 << bit
            # minor versions and the high byte of the flags are advice, but under the checksum too
            with pytest.raises(BrokenFileError):
                again(bytes(bad), fields=lambda _: fields)


def sealed(change: Callable[[bytearray], None]) -> bytes:
    """A header that was changed and got a fitting checksum."""
    head = bytearray(pack_header(HEADER)[:-4])
    change(head)
    return bytes(head) + struct.pack("<I", zlib.crc32(head)) + made()[len(head) + 4 :]


def spoken(**values: Any) -> bytes:
    """A header with another JSON text."""
    head = pack_header(HEADER)
    start = 8 + 4 + 1 + len(HEADER.codec) + 32
    old = json.loads(head[start + 4 : -4])
    text = values.pop("text", None) or json.dumps(
        {**old, **values}, sort_keys=True, separators=(",", ":")
    )
    raw = head[:start] + struct.pack("<I", len(text)) + text.encode()
    return raw + struct.pack("<I", zlib.crc32(raw)) + made()[len(head) :]


def flagged(value: int) -> bytes:
    return sealed(lambda h: h.__setitem__(10, value))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "no .ist file"),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), "no .ist file"),
        (sealed(lambda h: h.__setitem__(8, 2)), "of version 2"),
        (flagged(0x80), "not known here"),
        (flagged(HEADER.lossless | 1 | 8), "contradict"),
        (flagged(0), "contradict"),
        (sealed(lambda h: h.__setitem__(13, ord("A"))), "malformed codec id"),
        (sealed(lambda h: h.__setitem__(12, 65)), "malformed codec id"),
        (spoken(text="[" * 60_000), "canonical"),
        (spoken(text=" {}"), "canonical"),
        (spoken(text='{"signal":NaN}'), "canonical"),
        (spoken(frames=-1), "number of frames"),
        (spoken(parameters={"x": 1.5}), "canonical"),
        (spoken(signal={**SOUND, "shape": [2, 0]}), "at least 1"),
        (spoken(signal={**SOUND, "shape": [2, -5]}), "at least 1"),
        (spoken(signal={**SOUND, "shape": [2, True]}), "canonical"),
        (spoken(signal={**SOUND, "shape": [1 << 40, 1 << 40]}), "samples; at most"),
        (spoken(signal={**SOUND, "shape": [[2], 3]}), "at least 1"),
        (spoken(signal={**SOUND, "shape": 5}), "no shape"),
        (spoken(signal={**SOUND, "shape": [5]}), "2"),
        (spoken(signal={**SOUND, "medium": "smell"}), "smell"),
        (spoken(signal={**SOUND, "rate_hz": 0}), "sample rate"),
        (spoken(entropy={"numerics": "dreamt"}), "numerics"),
        (spoken(entropy={"numerics": ["static"]}), "numerics"),
        (spoken(frames=3), "more than the 3 frames"),
        (spoken(frames=9), "names 9"),
        (made() + b"x", "after its end"),
    ],
)
def test_hostile_headers_are_refused_in_one_line(data: bytes, says: str) -> None:
    with pytest.raises(BrokenFileError, match=says) as caught:
        again(data)
    assert "\n" not in str(caught.value)


def packed(kind: int, index: int, payload: bytes, length: int | None = None) -> bytes:
    body = bytes([kind]) + leb(index) + leb(len(payload) if length is None else length) + payload
    return body + struct.pack("<I", zlib.crc32(body))


@pytest.mark.parametrize(
    ("frames", "says"),
    [
        (packed(0, 1, b"1234abc"), "frame 1 where frame 0"),
        (packed(7, 0, b"1234abc"), "unknown type 7"),
        (packed(0, 0, b"123"), "without the check"),
        (packed(0, 0, b"1234", 5), "cut off"),
        (packed(0, 0, b"1234", 1 << 27), "at most"),
        (packed(0, 0, b"1234") + packed(0, 0, b"1234"), "frame 0 where frame 1"),
        (b"\x00\xff\xff\xff\xff\xff\xff", "malformed number"),
        (b"\x00\x80\x00" + bytes(20), "malformed number"),
        (packed(255, 0, leb(1) + leb(0) + bytes(4)), "does not fit"),
        (packed(255, 0, b"\xff" * 12), "malformed end"),
        (packed(255, 0, leb(0) + leb(0) + bytes(5)), "does not fit"),
    ],
)
def test_hostile_frames_are_refused(frames: bytes, says: str) -> None:
    with pytest.raises(BrokenFileError, match=says):
        again(pack_header(HEADER) + frames)


def test_what_comes_before_a_damage_can_be_had() -> None:
    data = made()
    cut = data[: len(data) - 40]
    _, frames, reader = again(cut, allow_partial=True)
    assert 0 < len(frames) < len(FRAMES) and "cut off" in reader.damage
    assert reader.samples is None


def test_limits_are_the_readers() -> None:
    with pytest.raises(BrokenFileError, match="claims 60 samples; at most 59"):
        again(made(), limits=Limits(samples=59))
    with pytest.raises(BrokenFileError, match="frame of 244 bytes; at most 100"):
        again(made(), limits=Limits(payload=100))


@pytest.mark.parametrize(
    "header",
    [
        replace(HEADER, codec="Some/Thing"),
        replace(HEADER, codec="../etc"),
        replace(HEADER, fingerprint=b"short"),
        replace(HEADER, parameters={"x": 0.5}),
        replace(HEADER, parameters={"x": "y" * 70_000}),
        replace(HEADER, signal={**SOUND, "shape": [2, 0]}),
    ],
)
def test_what_has_no_room_in_a_header_is_refused(header: Header) -> None:
    with pytest.raises(InvalidInputError):
        made(header)


def test_a_fingerprint_is_of_values_and_not_of_their_order() -> None:
    a, b = torch.arange(6.0).view(2, 3), torch.tensor(3, dtype=torch.int64)
    first = fingerprint({"x": 1, "y": 2}, {"a": a, "b": b})
    assert first == fingerprint({"y": 2, "x": 1}, {"b": b, "a": a}) and len(first) == 32
    others = [
        fingerprint({"x": 1}, {"a": a, "b": b}),
        fingerprint({"x": 1, "y": 2}, {"a": a.view(3, 2), "b": b}),
        fingerprint({"x": 1, "y": 2}, {"a": a.half(), "b": b}),
        fingerprint({"x": 1, "y": 2}, {"a": a + 1e-6, "b": b}),
        fingerprint({"x": 1, "y": 2}, {"c": a, "b": b}),
    ]
    assert len({first, *others}) == 6


def test_checks_of_symbols_do_not_depend_on_their_type() -> None:
    assert (
        checksum(torch.tensor([1, -1])) == checksum([1, -1]) == checksum(torch.tensor([[1], [-1]]))
    )
    assert container.MAGIC[0] > 127 and b"\r\n" in container.MAGIC
