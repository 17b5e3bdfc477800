"""A bank of tables for what a predictor misses: scales a third of an octave apart, two shapes.

A residual r of table j is coded as r >> shift by a table of two-sided geometric decay, and its low
``shift`` bits as they are. All frequencies come out of integer arithmetic, so every machine has the
same bank. A coder says for each context which table serves it (a byte), and contexts follow from an
expected size of the residual, an integer that both sides compute.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from isthmus.codecs.rangecoder import TOTAL, Decoder, Encoder, Ints, Table

SCALES = 96
"""Scales of 2^(j/3) / 256."""

SHAPES = 2
SIZE = SCALES * SHAPES
CONTEXTS = 72

_REACH = 240


@lru_cache(maxsize=1)
def _roots() -> tuple[int, ...]:
    """Least integers of which the cube is at least 2^k."""
    out = []
    for k in range(SCALES + 1):
        n = max(1, round(2 ** (k / 3)) - 1)
        while n**3 < 2**k:
            n += 1
        out.append(n)
    return tuple(out)


@lru_cache(maxsize=SIZE)
def entry(number: int) -> tuple[Table, int]:
    """Table and shift of a number of the bank.

    Example:
        >>> table, shift = entry(2 * 36)  # a mean of 16
        >>> shift, table.low, table.escape
        (0, -211, True)
    """
    scale, shape = divmod(number, SHAPES)
    units = _roots()[scale]
    shift = max(0, units.bit_length() - 13)
    mean = max(1, units >> shift)
    widest = 3 * mean + 2 if shape else mean
    reach = min(_REACH, 3 + widest * 13 // 256)
    weights = [0] * (reach + 2)
    # m / (m + 256) decays to a mean of about m / 256; a tail three times as wide may be mixed in
    for part, m in ((12, mean), (4, widest)):
        mass = (part << 60) * 256 // (m + 256)
        for k in range(reach + 2):
            weights[k] += mass
            mass = mass * m // (m + 256)
    # what lies beyond the reach, the sum of a geometric series
    tail = 2 * weights[reach + 1] * (widest + 256) // 256
    line = [*weights[reach:0:-1], *weights[: reach + 1], tail]
    whole, room = sum(line), TOTAL - len(line)
    counts = np.array([1 + w * room // whole for w in line], dtype=np.int64)
    counts[reach] += TOTAL - counts.sum()
    return Table(counts, -reach, escape=True), shift


def context(expected: Ints) -> Ints:
    """Contexts of residuals of an expected size, in sixteenths: thirds of an octave."""
    roots = np.array(_roots()[1:CONTEXTS], dtype=np.int64)
    return np.searchsorted(roots, expected + 1, side="right").astype(np.int64)


def choose(residuals: Ints, contexts: Ints, sample: int = 4096) -> np.ndarray:
    """The table that codes the residuals of each context best.

    Args:
        residuals: [N].
        contexts: [N].
        sample: Residuals of a context that are looked at.

    Returns:
        uint8 [CONTEXTS]; contexts that do not occur get the table of their scale.
    """
    chosen = np.minimum(np.arange(CONTEXTS) + 12, SCALES - 1).astype(np.uint8) * SHAPES
    order = np.argsort(contexts, kind="stable")
    ends = np.cumsum(np.bincount(contexts, minlength=CONTEXTS))
    for c in range(CONTEXTS):
        rows = order[ends[c - 1] if c else 0 : ends[c]]
        if not len(rows):
            continue
        some = residuals[rows[:: -(-len(rows) // sample)]]
        mean = np.abs(some).mean() * 256
        near = round(3 * np.log2(mean)) if mean > 1 else 0
        scales = range(max(0, min(near - 4, SCALES - 1)), max(1, min(near + 4, SCALES)))
        numbers = [s * SHAPES + shape for s in scales for shape in range(SHAPES)]
        values, counts = np.unique(some, return_counts=True)
        chosen[c] = min(numbers, key=lambda n: cost(values, counts, n))
    return chosen


def cost(values: Ints, counts: Ints, number: int) -> float:
    """Bits of values that occur so often, by one table of the bank."""
    table, shift = entry(number)
    at = (values >> shift) - table.low
    out = (at < 0) | (at >= table.size)
    bits = 16 - np.log2(table.counts)[np.where(out, table.size, at)] + shift
    bits = bits + np.where(out, 2 * np.log2(np.abs(at - table.size // 2) + 2.0), 0)
    return float((bits * counts).sum())


class Bank:
    """The bank at work in one frame.

    Args:
        chosen: Number of a table for each context, [CONTEXTS].
    """

    def __init__(self, chosen: np.ndarray) -> None:
        entries = [entry(int(n)) for n in chosen]
        self.tables = [e[0] for e in entries]
        self.shifts = np.array([e[1] for e in entries], dtype=np.int64)
        self._deep = bool(self.shifts.any())

    def encode(self, coder: Encoder, residuals: Ints, contexts: Ints) -> None:
        """Code residuals [N] by their contexts [N]."""
        if not self._deep:
            coder.indexed(residuals, contexts, self.tables)
            return
        shift = self.shifts[contexts]
        coder.indexed(residuals >> shift, contexts, self.tables)
        deep = shift > 0
        width = 1 << shift[deep]
        coder.uniform(residuals[deep] & (width - 1), width)

    def decode(self, coder: Decoder, contexts: Ints) -> Ints:
        """Residuals [N] of contexts [N]."""
        high = coder.indexed(contexts, self.tables)
        if not self._deep:
            return high
        shift = self.shifts[contexts]
        deep = shift > 0
        out = high << shift
        out[deep] += coder.uniform(1 << shift[deep])
        return out
