"""Mutated ``.ist`` files: each is refused with one clear line or decoded, and nothing else happens.

:mod:`isthmus.testing.fuzz` is the command.

Mutations are plain ones (bytes flipped, cut, doubled, put in), which the checksums catch, and
*sealed* ones, where the checksums are made to fit again: frames swapped or left out, numbers of the
header changed, bytes of payloads changed. Those reach the codecs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import signal
import struct
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from isthmus.codecs.base import unpack
from isthmus.codecs.container import DATA, RESET, leb
from isthmus.codecs.frames import parts, samples_of, sealed
from isthmus.errors import IsthmusError


@dataclass
class Report:
    """What became of mutated files.

    Attributes:
        refused: Errors of isthmus by type.
        same: Files that decoded to what the original decodes to.
        other: Files that decoded to something else: possible only where checksums were made to fit.
        failures: What must not happen: another error, a hang, a message of several lines.
        slowest_s: Longest time one file took, in seconds of the processor.
        grown: Bytes that the process needs more at its peak than before.
    """

    refused: Counter[str] = field(default_factory=Counter)
    same: int = 0
    other: int = 0
    failures: list[str] = field(default_factory=list)
    slowest_s: float = 0.0
    grown: int = 0

    def __str__(self) -> str:
        whole = sum(self.refused.values()) + self.same + self.other + len(self.failures)
        kinds = ", ".join(f"{name} {n}" for name, n in self.refused.most_common())
        return (
            f"{whole} files: {sum(self.refused.values())} refused ({kinds}), {self.same} decoded "
            f"as before, {self.other} decoded otherwise, {len(self.failures)} failures; slowest "
            f"{self.slowest_s:.2f} s, memory grew by {self.grown / 2**20:.0f} MiB"
        )


class Hang(BaseException):
    """A file took too long; no ``except Exception`` may swallow it."""


def mutate(data: bytes, rng: random.Random) -> bytes:
    """A damaged or hostile relative of a file.

    Args:
        data: A whole file.
        rng: Source of the draws.
    """
    plain = (_flip, _flip, _cut, _insert, _drop, _double)
    crafted = (_payload, _payload, _frames, _numbers, _numbers, _lengths)
    changed = rng.choice(plain + crafted)(data, rng)
    return rng.choice(plain)(changed, rng) if rng.random() < 0.1 and changed else changed


def _flip(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        place = rng.randrange(len(out))
        out[place] = rng.choice((out[place] ^ 1 << rng.randrange(8), rng.randrange(256), 0, 255))
    return bytes(out)


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def _insert(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data) + 1)
    return data[:place] + rng.randbytes(rng.choice((1, 4, 100))) + data[place:]


def _drop(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data))
    return data[:place] + data[place + rng.choice((1, 4, 30)) :]


def _double(data: bytes, rng: random.Random) -> bytes:
    first, last = sorted((rng.randrange(len(data)), rng.randrange(len(data) + 1)))
    return data[:last] + data[first:last] + data[last:]


def _payload(data: bytes, rng: random.Random) -> bytes:
    """Bytes of payloads, under checksums that fit."""
    head, frames, width = parts(data)
    if not frames:
        return _flip(data, rng)
    number = rng.randrange(len(frames))
    kind, payload = frames[number]
    keep = width if kind in (DATA, RESET) and rng.random() < 0.8 else 0
    body = payload[keep:]
    if body:
        body = rng.choice((_flip, _flip, _cut, _insert, _drop))(body, rng)
    frames[number] = (rng.choice((kind, kind, kind, 0, 1, 2, 3)), payload[:keep] + body)
    return sealed(head, frames, width, samples_of(data))


def _frames(data: bytes, rng: random.Random) -> bytes:
    """Frames left out, doubled, swapped, or a wrong count of samples."""
    head, frames, width = parts(data)
    samples = samples_of(data)
    what = rng.randrange(4)
    if frames and what == 0:
        del frames[rng.randrange(len(frames))]
    elif frames and what == 1:
        frames.insert(rng.randrange(len(frames) + 1), rng.choice(frames))
    elif len(frames) > 1 and what == 2:
        i, j = rng.sample(range(len(frames)), 2)
        frames[i], frames[j] = frames[j], frames[i]
    else:
        samples = rng.choice((0, samples + 1, 1 << 40))
    return sealed(head, frames, width, samples)


def _numbers(data: bytes, rng: random.Random) -> bytes:
    """Values of the header, under a checksum that fits."""
    head, frames, width = parts(data)
    if width == 2:  # its struct
        out = bytearray(head)
        place = rng.randrange(8, len(out))
        out[place] = rng.randrange(256)
        return sealed(bytes(out), frames, width, samples_of(data))
    start = 13 + head[12] + 32
    values = json.loads(head[start + 4 :])
    spots: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        for key in value if isinstance(value, dict) else range(len(value)):
            spots.append((value, key))
            if isinstance(value[key], dict | list):
                walk(value[key])

    walk(values)
    holder, key = rng.choice(spots)
    old = holder[key] if isinstance(holder[key], int) else 1
    holder[key] = rng.choice(
        (0, 1, -1, old + 1, old * 2, max(0, old - 1), 255)
        if rng.random() < 0.6
        else (1 << 16, 1 << 24, 1 << 28, 1 << 40, "x", None, [1], {})
    )
    text = json.dumps(values, sort_keys=True, separators=(",", ":")).encode()
    head = head[:start] + struct.pack("<I", len(text)) + text
    return sealed(head, frames, width, samples_of(data))


def _lengths(data: bytes, rng: random.Random) -> bytes:
    """A frame that claims another length, or a header that does."""
    head, frames, width = parts(data)
    if frames and rng.random() < 0.7:
        out = head + zlib.crc32(head).to_bytes(4, "little")[:width]
        for index, (kind, payload) in enumerate(frames):
            claimed = rng.choice((len(payload), len(payload) + 1, 1 << 20, 1 << 33, 0))
            out += bytes([kind]) + leb(index) + leb(claimed) + payload + bytes(width)
        return out
    start = 13 + head[12] + (8 if width == 2 else 32)
    length = struct.pack("<I", rng.choice((0, 1, 1 << 16, 1 << 31, 0xFFFFFFFF)))
    return sealed(head[:start] + length + head[start + 4 :], frames, width, samples_of(data))


def digest(data: bytes, **how: Any) -> str:
    """A hash of all that a file decodes to.

    Args:
        data: The file.
        **how: As for :func:`~isthmus.codecs.base.unpack`.
    """
    opened = unpack(data, **how)
    state = hashlib.sha256(json.dumps(opened.signal.info, sort_keys=True).encode())
    for chunk in opened.signal.chunks:
        state.update(chunk.contiguous().numpy().tobytes())
    return state.hexdigest()


@contextlib.contextmanager
def alarm(limit_s: float) -> Iterator[None]:
    """Raise :class:`Hang` in a block that takes longer; main thread only, and not on Windows."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def ring(*_: object) -> None:
        raise Hang

    old = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def fuzz(
    files: Sequence[bytes],
    count: int,
    *,
    seed: int = 0,
    limit_s: float = 60.0,
    decode: Callable[[bytes], str] = digest,
    report: Callable[[int, Report], None] | None = None,
) -> Report:
    """Decode mutated files.

    Args:
        files: Whole files to mutate.
        count: How many mutations.
        seed: Of the draws.
        limit_s: Longest time for one file.
        decode: Makes a hash of what a file decodes to.
        report: Called after each, with its number.
    """
    rng, found = random.Random(seed), Report()
    truth = [decode(f) for f in files]
    before = _peak()
    for number in range(count):
        which = rng.randrange(len(files))
        bad = mutate(files[which], rng)
        started = time.process_time()
        try:
            with alarm(limit_s):
                got = decode(bad)
            if got == truth[which]:
                found.same += 1
            else:
                found.other += 1
        except IsthmusError as error:
            found.refused[type(error).__name__] += 1
            if "\n" in str(error):
                found.failures.append(f"{number}: several lines: {error}")
        except (Exception, Hang) as error:  # what a decoder must never raise
            found.failures.append(f"{number}: {type(error).__name__}: {str(error)[:200]}")
        found.slowest_s = max(found.slowest_s, time.process_time() - started)
        found.grown = max(0, _peak() - before)
        if report is not None:
            report(number, found)
    return found


def _peak() -> int:
    """Largest resident memory of this process so far, in bytes."""
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024
