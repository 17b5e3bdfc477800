"""Range coding with tables of integers, so that every machine decodes the same symbols.

Three tiers say what a decoder has to compute alike (``numerics`` of a header):

``static``
    Tables of integer frequencies lie in the model or in the file; which one codes a symbol follows
    from integers. Frequencies go to the coder as multiples of 2^-16 in float64, whose sums are
    exact in any order.
``int``
    A network of whole numbers picks the table (whole numbers below 2^53 in float64 are exact on any
    machine, in any order of summation).
``pinned``
    Probabilities in floating point, rounded to integers on both sides by one function; the encoder
    runs the decoder's own steps. Another machine may round another way: the symbol check of the
    frame tells.

The coder itself is the package ``constriction`` (the extra ``codec``). One coder serves a frame:
each costs up to two words of slack.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from isthmus.errors import BrokenFileError, InvalidInputError, require

Ints = npt.NDArray[np.int64]
PRECISION = 16
TOTAL = 1 << PRECISION
_WIDEST = 34
"""Bits of an escaped value at most."""


def quantise(probabilities: npt.ArrayLike) -> Ints:
    """Whole frequencies of at least 1 that sum to 2^16, nearest to probabilities.

    Args:
        probabilities: [..., K], not negative, at most 2^15 of them; a row of zeros counts as
            uniform.

    Returns:
        int64 [..., K].

    Raises:
        InvalidInputError: Negative or no numbers, or too many.

    Example:
        >>> quantise([0.5, 0.5, 0.0]).tolist()
        [32768, 32767, 1]
    """
    p = np.asarray(probabilities, dtype=np.float64)
    count = p.shape[-1]
    if not 1 <= count <= TOTAL // 2:
        raise InvalidInputError(f"a table has 1 to {TOTAL // 2} symbols, got {count}")
    if not np.isfinite(p).all() or (p < 0).any():
        raise InvalidInputError("probabilities are finite and not negative")
    mass = p.sum(-1, keepdims=True)
    p = np.where(mass > 0, p / np.where(mass > 0, mass, 1), 1 / count)
    counts: Ints = 1 + np.floor(p * (TOTAL - count)).astype(np.int64)
    # what rounding down left over goes to the likeliest symbol
    best = counts.argmax(-1)[..., None]
    rest = TOTAL - counts.sum(-1, keepdims=True)
    np.put_along_axis(counts, best, np.take_along_axis(counts, best, -1) + rest, -1)
    return counts


@dataclass(frozen=True, eq=False)
class Table:
    """Frequencies of the integers from ``low`` on.

    Attributes:
        counts: int64 [K], each at least 1, summing to 2^16. With ``escape`` the last one is of all
            other integers.
        low: Integer of the first.
        escape: Whether integers outside can be coded, by an Elias gamma code.

    Example:
        >>> table = Table.from_counts([3, 0, 1], low=-1)
        >>> [round(table.bits([s]), 2) for s in (-1, 1)]
        [0.42, 2.0]
    """

    counts: Ints
    low: int = 0
    escape: bool = False
    _made: list[Any] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        counts = self.counts
        if counts.ndim != 1 or counts.sum() != TOTAL or (counts < 1).any():
            raise InvalidInputError("a table's frequencies are at least 1 and sum to 65536")

    @classmethod
    def from_counts(cls, counts: npt.ArrayLike, low: int = 0, *, escape: bool = False) -> Table:
        """A table for symbols that were counted; where none was, one is as likely as in 2^16.

        Args:
            counts: [K], of the escape too if there is one.
            low: Integer of the first.
            escape: Whether the last count is that of all other integers.
        """
        return cls(quantise(counts), low, escape)

    @classmethod
    def from_pmf(cls, pmf: npt.ArrayLike, low: int = 0, *, escape: float = 0.0) -> Table:
        """A table for probabilities.

        Args:
            pmf: [K].
            low: Integer of the first.
            escape: Probability of all other integers; 0 leaves them out.
        """
        p = np.asarray(pmf, dtype=np.float64)
        if escape:
            p = np.append(p * (1 - escape), escape)
        return cls(quantise(p), low, bool(escape))

    @property
    def size(self) -> int:
        """Integers that are coded without an escape."""
        return len(self.counts) - self.escape

    @property
    def model(self) -> Any:
        """The table as the coder takes it, or None where it has one symbol."""
        if len(self.counts) == 1:
            return None
        if not self._made:
            self._made.append(_models().Categorical(self.counts / TOTAL, perfect=False))
        return self._made[0]

    def bits(self, symbols: npt.ArrayLike) -> float:
        """What symbols cost.

        Raises:
            InvalidInputError: One lies outside, and there is no escape.
        """
        at, over = _places(np.asarray(symbols, dtype=np.int64).reshape(-1), self)
        bits = float((PRECISION - np.log2(self.counts))[at].sum())
        length = _length(over)
        gamma = length + PRECISION - np.log2(_unary().counts)[length]
        return bits + float(gamma.sum())


def estimate_bits(symbols: npt.ArrayLike, index: npt.ArrayLike, tables: Sequence[Table]) -> float:
    """What :func:`encode_indexed` will need, in bits, without the coder's slack."""
    flat, places = _flat(symbols, index, len(tables))
    return sum(tables[int(t)].bits(flat[places == t]) for t in np.unique(places))


def encode_indexed(symbols: npt.ArrayLike, index: npt.ArrayLike, tables: Sequence[Table]) -> bytes:
    """Code integers, each by the table of its index.

    Args:
        symbols: Integers [...].
        index: Number of a table for each.
        tables: The tables.

    Raises:
        InvalidInputError: An integer outside its table, which has no escape.

    Example:
        >>> table = Table.from_pmf([0.5, 0.4], escape=0.1)
        >>> data = encode_indexed([0, 1, 900], [0, 0, 0], [table])
        >>> decode_indexed(data, [0, 0, 0], [table]).tolist()
        [0, 1, 900]
    """
    coder = Encoder()
    coder.indexed(symbols, index, tables)
    return coder.finish()


def decode_indexed(data: bytes, index: npt.ArrayLike, tables: Sequence[Table]) -> Ints:
    """Integers that :func:`encode_indexed` has coded, in the shape of the index.

    Raises:
        BrokenFileError: The bytes cannot have been coded so. Damaged bytes may also decode to other
            integers without a word: frames have checks for that.
    """
    return Decoder(data).indexed(index, tables)


class Encoder:
    """Codes symbols one lot after the other; the decoder asks for the lots in the same order."""

    def __init__(self) -> None:
        self._coder = _queue().RangeEncoder()

    def table(self, symbols: npt.ArrayLike, table: Table) -> None:
        """Code integers by one table."""
        flat = np.asarray(symbols, dtype=np.int64).reshape(-1)
        self.indexed(flat, np.zeros(len(flat), dtype=np.int64), [table])

    def indexed(
        self, symbols: npt.ArrayLike, index: npt.ArrayLike, tables: Sequence[Table]
    ) -> None:
        """Code integers [...], each by the table of its index [...]."""
        flat, places = _flat(symbols, index, len(tables))
        over = []
        for t, rows in _groups(places, len(tables)):
            at, rest = _places(flat[rows], tables[t])
            over.append(rest)
            if tables[t].model is not None:
                self._coder.encode(np.ascontiguousarray(at, np.int32), tables[t].model)
        rest = np.concatenate(over) if over else np.zeros(0, np.int64)
        if len(rest):
            length = _length(rest)
            self._coder.encode(length.astype(np.int32), _unary().model)
            for digits, width in _digits(rest - (1 << length), length):
                self._coder.encode(digits.astype(np.int32), _models().Uniform(), width)

    def rows(self, symbols: npt.ArrayLike, counts: Ints) -> None:
        """Code integers [N], each by its own row of frequencies [N, K] that sum to 2^16."""
        self._coder.encode(
            np.ascontiguousarray(symbols, np.int32),
            _models().Categorical(perfect=False),
            counts / float(TOTAL),
        )

    def uniform(self, values: npt.ArrayLike, widths: npt.ArrayLike) -> None:
        """Code integers [N], each from 0 to its width less one; widths are 2 to 2^20."""
        flat = np.ascontiguousarray(values, np.int32)
        if len(flat):
            self._coder.encode(flat, _models().Uniform(), np.ascontiguousarray(widths, np.int32))

    def finish(self) -> bytes:
        """The bytes."""
        words = self._coder.get_compressed()
        return bytes(words.astype("<u4").tobytes())


class Decoder:
    """Gives back what an :class:`Encoder` has coded.

    Args:
        data: The bytes.

    Raises:
        BrokenFileError: They are no whole number of words.
    """

    def __init__(self, data: bytes) -> None:
        if len(data) % 4:
            raise BrokenFileError("the file's coded symbols are cut off; they are words of 4 bytes")
        self._coder = _queue().RangeDecoder(np.frombuffer(data, "<u4").astype(np.uint32))

    def table(self, count: int, table: Table) -> Ints:
        """As many integers, by one table."""
        return self.indexed(np.zeros(count, dtype=np.int64), [table])

    def indexed(self, index: npt.ArrayLike, tables: Sequence[Table]) -> Ints:
        """Integers in the shape of an index of tables.

        Raises:
            BrokenFileError: These bytes were not coded so.
        """
        wanted = np.asarray(index, dtype=np.int64)
        places = wanted.reshape(-1)
        out = np.empty(len(places), dtype=np.int64)
        escaped = []
        for t, rows in _groups(places, len(tables)):
            table = tables[t]
            if table.model is None:
                at = np.zeros(len(rows), dtype=np.int64)
            else:
                at = self._decode(table.model, len(rows)).astype(np.int64)
            out[rows] = at + table.low
            if table.escape and (hit := at == table.size).any():
                escaped.append((rows[hit], table))
        if escaped:
            length = self._decode(_unary().model, sum(len(r) for r, _ in escaped)).astype(np.int64)
            value = (1 << length).astype(np.int64)
            for step, width in _widths(length):
                value[step[0]] += (
                    self._decode(_models().Uniform(), width).astype(np.int64) << step[1]
                )
            done = 0
            for rows, table in escaped:
                code = value[done : done + len(rows)] - 1
                done += len(rows)
                below = -(code + 1) // 2
                out[rows] = table.low + np.where(code % 2, below, table.size + code // 2)
        if len(out) and (out.max() >= 1 << 31 or out.min() < -(1 << 31)):
            raise BrokenFileError("the file's coded symbols decode to nonsense; it is damaged")
        return out.reshape(wanted.shape)

    def rows(self, counts: Ints) -> Ints:
        """One integer for each row of frequencies [N, K]."""
        return self._decode(_models().Categorical(perfect=False), counts / float(TOTAL)).astype(
            np.int64
        )

    def uniform(self, widths: npt.ArrayLike) -> Ints:
        """One integer for each width."""
        flat = np.ascontiguousarray(widths, np.int32)
        if not len(flat):
            return np.zeros(0, dtype=np.int64)
        return self._decode(_models().Uniform(), flat).astype(np.int64)

    def _decode(self, *what: Any) -> npt.NDArray[np.int32]:
        try:
            found: npt.NDArray[np.int32] = self._coder.decode(*what)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # the library's panics are no Exceptions
            raise BrokenFileError("the file's coded symbols are damaged") from error
        return found


def _flat(symbols: npt.ArrayLike, index: npt.ArrayLike, tables: int) -> tuple[Ints, Ints]:
    flat = np.asarray(symbols, dtype=np.int64).reshape(-1)
    places = np.asarray(index, dtype=np.int64).reshape(-1)
    if flat.shape != places.shape:
        raise InvalidInputError(f"{len(flat)} symbols and {len(places)} indices; give one for each")
    if len(places) and not (places.min() >= 0 and places.max() < tables):
        raise InvalidInputError(f"an index names no table; there are {tables}")
    return flat, places


def _groups(places: Ints, tables: int) -> list[tuple[int, Ints]]:
    """Tables in order, each with the places of its symbols in order."""
    if tables == 1:
        return [(0, np.arange(len(places)))] if len(places) else []
    order = np.argsort(places, kind="stable")
    ends = np.cumsum(np.bincount(places, minlength=tables))
    starts = [0, *ends[:-1].tolist()]
    return [(t, order[a:b]) for t, (a, b) in enumerate(zip(starts, ends, strict=True)) if b > a]


def _places(flat: Ints, table: Table) -> tuple[Ints, Ints]:
    """Places of symbols in their table, and codes from 1 on of those outside."""
    at = flat - table.low
    out = (at < 0) | (at >= table.size)
    if not out.any():
        return at, at[:0]
    if not table.escape:
        first = int(flat[out][0])
        raise InvalidInputError(
            f"symbol {first} is outside the table, {table.low} to {table.low + table.size - 1}"
        )
    # above, below, above, below ...: 0, 1, 2, 3 ...
    over = at[out]
    code = np.where(over < 0, -2 * over - 1, 2 * (over - table.size))
    return np.where(out, table.size, at), code + 1


def _length(values: Ints) -> Ints:
    """Position of the highest bit."""
    return np.frexp(values.astype(np.float64))[1].astype(np.int64) - 1


def _unary() -> Table:
    """Numbers of bits as an Elias gamma code pays for them: one bit more for each."""
    if not _UNARY:
        _UNARY.append(Table.from_pmf(0.5 ** np.arange(1, _WIDEST + 1)))
    return _UNARY[0]


_UNARY: list[Table] = []


def _widths(length: Ints) -> list[tuple[tuple[Ints, int], npt.NDArray[np.int32]]]:
    """Which values have digits of 12 bits from a place on, the place, and what they count up to."""
    steps = []
    for shift in range(0, _WIDEST, 12):
        rows = np.flatnonzero(length > shift)
        if len(rows):
            width = 1 << np.minimum(length[rows] - shift, 12)
            steps.append(((rows, shift), width.astype(np.int32)))
    return steps


def _digits(rest: Ints, length: Ints) -> list[tuple[Ints, npt.NDArray[np.int32]]]:
    return [((rest[r] >> shift) & (w - 1), w) for (r, shift), w in _widths(length)]


def _models() -> Any:
    return require("constriction", "codec").stream.model


def _queue() -> Any:
    return require("constriction", "codec").stream.queue
