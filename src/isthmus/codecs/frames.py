"""``.ist`` files taken apart into header and frames, and put together so that checksums fit again.

For trials of what loss and damage do; :mod:`isthmus.codecs.container` reads and writes files.
"""

from __future__ import annotations

import contextlib
import struct
import zlib
from collections.abc import Sequence

from isthmus.codecs.container import COMPACT, END, leb, unleb
from isthmus.errors import IsthmusError


def parts(data: bytes) -> tuple[bytes, list[tuple[int, bytes]], int]:
    """Header, frames as kind and payload (the end left out), and bytes of a checksum.

    Args:
        data: A file that is whole.
    """
    compact = data[10] & COMPACT
    at = 13 + data[12] + (8 if compact else 32)
    width = 2 if compact else 4
    if compact:
        # the struct has no length: the end of the header is where its checksum fits
        while zlib.crc32(data[:at]).to_bytes(4, "little")[:2] != data[at : at + 2]:
            at += 1
    else:
        at += 4 + struct.unpack("<I", data[at : at + 4])[0]
    head, at = data[:at], at + width
    frames = []
    while at < len(data):
        kind = data[at]
        _, at = unleb(data, at + 1)
        length, at = unleb(data, at)
        frames.append((kind, data[at : at + length]))
        at += length + width
    return head, frames[:-1], width


def sealed(head: bytes, frames: Sequence[tuple[int, bytes]], width: int, samples: int) -> bytes:
    """A file whose checksums fit.

    Args:
        head: The header without its checksum.
        frames: Kind and payload of each.
        width: Bytes of a checksum.
        samples: What the end frame says.
    """
    out = head + zlib.crc32(head).to_bytes(4, "little")[:width]
    over = 0
    for index, (kind, payload) in enumerate(frames):
        body = bytes([kind]) + leb(index) + leb(len(payload)) + payload
        crc = zlib.crc32(body).to_bytes(4, "little")[:width]
        over = zlib.crc32(crc, over)
        out += body + crc
    tail = leb(len(frames)) + leb(samples) + over.to_bytes(4, "little")
    body = bytes([END]) + leb(len(frames)) + leb(len(tail)) + tail
    return out + body + zlib.crc32(body).to_bytes(4, "little")[:width]


def samples_of(data: bytes) -> int:
    """The sample count of a whole file's end frame."""
    width = 2 if data[10] & COMPACT else 4
    for start in range(len(data) - width - 8, 0, -1):
        if data[start] != END:
            continue
        with contextlib.suppress(IsthmusError):
            _, at = unleb(data, start + 1)
            length, at = unleb(data, at)
            if at + length + width == len(data):
                _, at = unleb(data, at)
                return unleb(data, at)[0]
    return 0
