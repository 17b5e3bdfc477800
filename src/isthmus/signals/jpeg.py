"""The syntax of baseline JPEG files (ITU-T T.81): headers off and on, and where a stream breaks.

::

    file ──parse──▶ header (SOI ... SOS) │ scan (Huffman codes, restart markers) │ EOI
                      └ sizes, tables           └──read──▶ units, where it breaks ──mend──▶ a file

Writers with fixed tables put the same header before every picture of one size, so a program that
knows it keeps the scan alone. A scan that a model wrote may break anywhere: :func:`read` tolerates
that and says where and why, and :func:`mend` fills the rest with flat blocks, so that any decoder
shows what came before.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from isthmus.errors import BrokenFileError, InvalidInputError

EOI = b"\xff\xd9"

_REFUSED = {
    0xC1: "extended sequential",
    0xC2: "progressive",
    0xC3: "lossless",
    0xC9: "arithmetic-coded",
    0xCA: "arithmetic-coded",
    0xCC: "arithmetic-coded",
    0xDC: "of a height that is told late",
}
_MARKER = re.compile(rb"\xff+[^\x00\xff]")

Codes = dict[int, int]
"""Symbols by code, with a 1 before the code so that its length shows."""


@dataclass(frozen=True)
class Component:
    """A plane of colour.

    Attributes:
        across: Blocks of a unit side by side.
        down: Blocks of a unit on top of each other.
        dc: Huffman codes of the first coefficients.
        ac: Huffman codes of the others.
    """

    across: int
    down: int
    dc: Codes = field(repr=False)
    ac: Codes = field(repr=False)


@dataclass(frozen=True)
class Jpeg:
    """A file, taken apart.

    Attributes:
        header: All bytes before the scan.
        scan: The scan's bytes, stuffing and restart markers included.
        height: Rows.
        width: Columns.
        components: In the order of the scan.
        restart: Units between two restart markers; 0 where there are none.
    """

    header: bytes = field(repr=False)
    scan: bytes = field(repr=False)
    height: int
    width: int
    components: tuple[Component, ...]
    restart: int

    @property
    def data(self) -> bytes:
        """The whole file."""
        return self.header + self.scan + EOI

    @property
    def units(self) -> int:
        """Minimum coded units of the picture."""
        across, down = self.unit
        return -(-self.width // across) * -(-self.height // down)

    @property
    def unit(self) -> tuple[int, int]:
        """Columns and rows of a unit."""
        if len(self.components) == 1:  # T.81, A.2.2: a single plane is not interleaved
            return 8, 8
        return (
            8 * max(c.across for c in self.components),
            8 * max(c.down for c in self.components),
        )

    @property
    def blocks(self) -> list[Component]:
        """The plane of each block of a unit."""
        if len(self.components) == 1:
            return list(self.components)
        return [c for c in self.components for _ in range(c.across * c.down)]


@dataclass(frozen=True)
class Scan:
    """What could be read of a scan.

    Attributes:
        ends: For each unit that was read, the number of bytes that belong to it and those before
            it alone; bits that share a byte with the next unit are left out.
        whole: Whether all units are there and nothing behind them.
        at: Byte of the scan at which it breaks; its length where it does not.
        why: What is wrong there; empty where nothing is.
        kept: Whole segments, and the bits of the units of the one that broke.
    """

    ends: tuple[int, ...]
    whole: bool
    at: int
    why: str
    kept: tuple[tuple[bytes, ...], str] = field(repr=False, default=((), ""))

    @property
    def units(self) -> int:
        """Units that could be read."""
        return len(self.ends)


# headers ------------------------------------------------------------------------------------------


def parse(data: bytes, *, partial: bool = False) -> Jpeg:
    """Take a file apart; ``parse(data).data == data``.

    Args:
        data: The file.
        partial: Take a file whose end is missing: all that is there is its scan.

    Raises:
        BrokenFileError: It is no JPEG file, is cut off, or has a marker that is not known.
        InvalidInputError: A JPEG file of another kind than baseline with one scan.
    """
    if data[:2] != b"\xff\xd8":
        raise BrokenFileError("this is no JPEG file: it does not begin with FF D8")
    tables: dict[int, Codes] = {}
    at, frame, restart = 2, None, 0
    while True:
        if at + 4 > len(data):
            raise BrokenFileError(f"the JPEG file is cut off in its header, at byte {len(data)}")
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if data[at] != 0xFF:
            raise BrokenFileError(f"byte {at} of the JPEG file should begin a marker")
        body = data[at + 4 : at + 2 + length]
        if marker in _REFUSED:
            raise InvalidInputError(
                f"this JPEG file is {_REFUSED[marker]}; only baseline files are read, so save it "
                "again without that"
            )
        known = marker in (0xC0, 0xC4, 0xDA, 0xDB, 0xDD, 0xFE) or 0xE0 <= marker <= 0xEF
        if not known:
            raise BrokenFileError(f"the JPEG file has the unknown marker FF {marker:02X} at {at}")
        if length < 2 or len(body) != length - 2:
            raise BrokenFileError(f"the JPEG file is cut off in its header, at byte {len(data)}")
        at += 2 + length
        if marker == 0xC0:
            frame = _frame(body)
        elif marker == 0xC4:
            tables |= _tables(body)
        elif marker == 0xDD:
            if len(body) != 2:
                raise BrokenFileError("the JPEG file has a restart interval of a wrong length")
            restart = int.from_bytes(body, "big")
        elif marker == 0xDA:
            break
    if frame is None:
        raise BrokenFileError("the JPEG file has a scan before its size")
    components = _scanned(body, frame, tables)
    end = len(data)
    for found in _MARKER.finditer(data, at):
        if not 0xD0 <= found.group()[-1] <= 0xD7:
            end = found.start()
            break
    if data[end : end + 2] == b"\xff\xda" or data[end : end + 2] == b"\xff\xc4":
        raise InvalidInputError("this JPEG file has several scans; only one is read")
    if data[end:] != EOI and not partial:
        raise BrokenFileError(
            f"the JPEG file is cut off, at byte {end}"
            if end >= len(data)
            else f"the JPEG file has {len(data) - end} bytes at {end} where FF D9 should end it"
        )
    scan = data[at:] if partial and data[end:] != EOI else data[at:end]
    return Jpeg(data[:at], scan, frame[0], frame[1], components, restart)


def _frame(body: bytes) -> tuple[int, int, dict[int, tuple[int, int]]]:
    """Height, width, and the sampling of each component."""
    if len(body) < 6 or len(body) != 6 + 3 * body[5] or body[0] != 8:
        raise BrokenFileError("the JPEG file has a frame header that makes no sense")
    height, width = int.from_bytes(body[1:3], "big"), int.from_bytes(body[3:5], "big")
    parts = [body[i : i + 3] for i in range(6, len(body), 3)]
    found = {p[0]: (p[1] >> 4, p[1] & 15) for p in parts}
    good = all(1 <= a <= 4 and 1 <= b <= 4 for a, b in found.values())
    if not height or not width or not 1 <= len(found) == body[5] <= 4 or not good:
        raise BrokenFileError("the JPEG file has a frame header that makes no sense")
    return height, width, found


def _tables(body: bytes) -> dict[int, Codes]:
    """Huffman codes by class and number (T.81, annex C)."""
    made: dict[int, Codes] = {}
    at = 0
    while at < len(body):
        counts = body[at + 1 : at + 17]
        symbols = body[at + 17 : at + 17 + sum(counts)]
        if len(counts) != 16 or len(symbols) != sum(counts) or body[at] & 0xEE not in (0, 2):
            raise BrokenFileError("the JPEG file has a Huffman table that makes no sense")
        code, taken, codes = 0, 0, {}
        for length, count in enumerate(counts, 1):
            for symbol in symbols[taken : taken + count]:
                codes[1 << length | code] = symbol
                code += 1
            if code > 1 << length:
                raise BrokenFileError("the JPEG file has a Huffman table that makes no sense")
            taken, code = taken + count, code << 1
        made[body[at]] = codes
        at += 17 + len(symbols)
    return made


def _scanned(
    body: bytes,
    frame: tuple[int, int, dict[int, tuple[int, int]]],
    tables: dict[int, Codes],
) -> tuple[Component, ...]:
    """Components in the order of the scan, with their tables."""
    count = body[0] if body else 0
    if len(body) != 4 + 2 * count or not count:
        raise BrokenFileError("the JPEG file has a scan header that makes no sense")
    if count != len(frame[2]):
        raise InvalidInputError("this JPEG file has several scans; only one is read")
    found = []
    for i in range(count):
        name, which = body[1 + 2 * i], body[2 + 2 * i]
        dc, ac = tables.get(which >> 4), tables.get(0x10 | which & 15)
        if name not in frame[2] or dc is None or ac is None:
            raise BrokenFileError("the JPEG file has a scan without its tables")
        found.append(Component(*frame[2][name], dc, ac))
    return tuple(found)


# scans --------------------------------------------------------------------------------------------


class _Break(Exception):  # noqa: N818
    """Where a segment breaks, in bits, and why."""

    def __init__(self, bit: int, why: str) -> None:
        super().__init__(why)
        self.bit, self.why = bit, why


class _Bits:
    """Bits of a segment between two markers, without the zeros that are stuffed behind FF."""

    def __init__(self, stuffed: bytes) -> None:
        self.raw = stuffed.replace(b"\xff\x00", b"\xff")
        self.at = 0

    def symbol(self, codes: Codes) -> int:
        """Read a Huffman code."""
        begin = self.at >> 3
        window = int.from_bytes(self.raw[begin : begin + 4].ljust(4, b"\x00"), "big")
        room = 32 - (self.at & 7)
        for length in range(1, 17):
            code = 1 << length | (window >> room - length) & ((1 << length) - 1)
            if code in codes:
                self.skip(length)
                return codes[code]
        raise _Break(self.at, "no Huffman code begins so")

    def skip(self, count: int) -> None:
        """Step over bits."""
        if self.at + count > 8 * len(self.raw):
            raise _Break(8 * len(self.raw), "the segment ends within a block")
        self.at += count

    def text(self, end: int) -> str:
        """The first bits as ones and zeros."""
        return "".join(f"{b:08b}" for b in self.raw[: -(-end // 8)])[:end]


def _block(bits: _Bits, codes: Component) -> None:
    """Step over a block (T.81, F.2.2)."""
    at, size = bits.at, bits.symbol(codes.dc)
    if size > 11:
        raise _Break(at, "a first coefficient of more than 11 bits")
    bits.skip(size)
    place = 1
    while place < 64:
        at, symbol = bits.at, bits.symbol(codes.ac)
        run, size = symbol >> 4, symbol & 15
        if not size and run != 15:
            if run:
                raise _Break(at, "a run that baseline files do not have")
            return
        place += run + 1
        if place > 64:
            raise _Break(at, "a coefficient behind the 64th")
        bits.skip(size)


def read(jpeg: Jpeg, scan: bytes) -> Scan:
    """Read a scan as far as it makes sense; nothing is refused.

    Args:
        jpeg: A file whose header belongs to the scan.
        scan: Its bytes, or others.
    """
    blocks, total = jpeg.blocks, jpeg.units
    each = jpeg.restart or total
    ends: list[int] = []
    done: list[bytes] = []
    begin = 0
    for number in range(-(-total // each)):
        found = _MARKER.search(scan, begin)
        end = found.start() if found else len(scan)
        segment = scan[begin:end]
        bits, kept = _Bits(segment), 0
        try:
            for _ in range(min(each, total - number * each)):
                for codes in blocks:
                    _block(bits, codes)
                kept = bits.at
                ends.append(begin + _stuffed(segment, bits.raw, kept // 8))
            if 8 * len(bits.raw) - kept >= 8:
                raise _Break(kept, "bytes behind the last block")
        except _Break as broken:
            at = begin + _stuffed(segment, bits.raw, broken.bit // 8)
            return Scan(tuple(ends), False, at, broken.why, (tuple(done), bits.text(kept)))
        ends[-1] = end  # its padding belongs to it
        done.append(segment)
        last = len(ends) == total
        wanted = b"" if last else bytes([0xFF, 0xD0 + number % 8])
        if (scan[end:] if last else scan[end : end + 2]) != wanted:
            why = "a marker behind the last block" if last else "no restart marker of its number"
            return Scan(tuple(ends), False, end, why, (tuple(done), ""))
        begin = end + 2
    return Scan(tuple(ends), True, len(scan), "", (tuple(done), ""))


def _stuffed(segment: bytes, raw: bytes, count: int) -> int:
    """Bytes of a segment that hold the first ones of its bytes without stuffing."""
    return min(len(segment), count + raw.count(b"\xff", 0, count))


def mend(jpeg: Jpeg, scan: bytes) -> bytes:
    """A file that shows what can be read of a scan, and flat blocks from there on.

    Args:
        jpeg: A file whose header belongs to the scan.
        scan: Its bytes, or others.

    Returns:
        The file as it would be, where nothing is wrong.

    Raises:
        InvalidInputError: The tables of the header have no code for a flat block.
    """
    found = read(jpeg, scan)
    if found.whole:
        return jpeg.header + scan + EOI
    flat = "".join(_code(c.dc) + _code(c.ac) for c in jpeg.blocks)
    total, each = jpeg.units, jpeg.restart or jpeg.units
    segments, bits = list(found.kept[0]), found.kept[1]
    left = found.units - len(segments) * each  # units whose bits are kept
    while len(segments) * each < total:
        count = min(each, total - len(segments) * each)
        bits += flat * (count - max(0, left))
        bits += "1" * (-len(bits) % 8)
        raw = int(bits, 2).to_bytes(len(bits) // 8, "big")
        segments.append(raw.replace(b"\xff", b"\xff\x00"))
        bits, left = "", 0
    made = segments[0]
    for number, segment in enumerate(segments[1:]):
        made += bytes([0xFF, 0xD0 + number % 8]) + segment
    return jpeg.header + made + EOI


def _code(codes: Codes) -> str:
    """The code of the symbol 0: no change, or the end of a block."""
    for code, symbol in codes.items():
        if not symbol:
            return f"{code:b}"[1:]
    raise InvalidInputError("the tables of this JPEG file have no code for a flat block")
