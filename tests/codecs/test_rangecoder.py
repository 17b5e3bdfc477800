"""The range coder: exact tables, escapes, real sizes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.codecs.rangecoder import (
    TOTAL,
    Decoder,
    Encoder,
    Table,
    decode_indexed,
    encode_indexed,
    estimate_bits,
    quantise,
)
from isthmus.errors import BrokenFileError, InvalidInputError


def laplace(scale: float, reach: int = 20) -> Table:
    return Table.from_pmf(
        np.exp(-np.abs(np.arange(-reach, reach + 1)) / scale), -reach, escape=1e-3
    )


def test_sizes_are_those_of_the_estimate() -> None:
    rng = np.random.default_rng(0)
    tables = [laplace(s) for s in (0.3, 1.0, 3.0, 9.0)]
    index = rng.integers(0, 4, (300, 70))
    symbols = np.rint(rng.laplace(0, np.array([0.3, 1, 3, 9])[index])).astype(np.int64)
    data = encode_indexed(symbols, index, tables)
    assert np.array_equal(decode_indexed(data, index, tables), symbols)
    estimate = estimate_bits(symbols, index, tables)
    assert estimate * 0.995 - 64 <= 8 * len(data) <= estimate * 1.005 + 64


def test_a_rare_symbol_costs_sixteen_bits() -> None:
    """By hand: one in 65536 is 16 bits; a thousand of them are 2000 bytes."""
    table = Table.from_counts([TOTAL - 1, 1])
    assert table.bits([1]) == 16.0
    assert 1998 <= len(encode_indexed(np.ones(1000), np.zeros(1000), [table])) <= 2006


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(-(2**31), 2**31 - 1), st.integers(0, 2)), min_size=0, max_size=60
    )
)
def test_escapes_reach_every_integer(pairs: list[tuple[int, int]]) -> None:
    tables = [laplace(1.0), Table.from_pmf([1.0], 3, escape=0.5), laplace(4.0, 2)]
    symbols, index = [p[0] for p in pairs], [p[1] for p in pairs]
    data = encode_indexed(symbols, index, tables)
    assert decode_indexed(data, index, tables).tolist() == symbols
    assert 8 * len(data) <= estimate_bits(symbols, index, tables) * 1.005 + 64


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=300))
def test_frequencies_sum_and_none_is_lost(pmf: list[float]) -> None:
    counts = quantise(pmf)
    assert counts.sum() == TOTAL and counts.min() >= 1
    if sum(pmf) > 1e-6:
        assert np.abs(counts / TOTAL - np.array(pmf) / sum(pmf)).max() < 2 * len(pmf) / TOTAL


def test_lots_come_back_in_their_order() -> None:
    rng = np.random.default_rng(1)
    counts = quantise(rng.dirichlet(np.ones(7), 50))
    rows = rng.integers(0, 7, 50)
    coder = Encoder()
    coder.table([5, 5], Table.from_pmf([1.0], 5))
    coder.rows(rows, counts)
    coder.table([1, 0, 99], laplace(1.0))
    data = coder.finish()
    back = Decoder(data)
    assert back.table(2, Table.from_pmf([1.0], 5)).tolist() == [5, 5]
    assert np.array_equal(back.rows(counts), rows)
    assert back.table(3, laplace(1.0)).tolist() == [1, 0, 99]


def test_damaged_words_are_an_error_or_other_symbols() -> None:
    """Never a crash: the coder's own panics come out as errors of ours."""
    rng = np.random.default_rng(2)
    tables = [laplace(s) for s in (0.5, 2.0)]
    index = rng.integers(0, 2, 400)
    data = encode_indexed(rng.integers(-60, 60, 400), index, tables)
    for _ in range(300):
        bad = bytearray(data[: 4 * int(rng.integers(0, len(data) // 4 + 1))])
        for place in rng.integers(0, max(1, len(bad)), 3) if bad else []:
            bad[place] ^= 1 << int(rng.integers(8))
        try:
            assert decode_indexed(bytes(bad), index, tables).shape == index.shape
        except BrokenFileError:
            continue
    with pytest.raises(BrokenFileError, match="cut off"):
        decode_indexed(data[:-1], index, tables)


def test_bad_tables_and_symbols_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="symbol 9 is outside the table, 0 to 1"):
        encode_indexed([9], [0], [Table.from_counts([1, 1])])
    with pytest.raises(InvalidInputError, match="names no table"):
        encode_indexed([0], [1], [Table.from_counts([1, 1])])
    with pytest.raises(InvalidInputError, match="one for each"):
        encode_indexed([0, 1], [0], [Table.from_counts([1, 1])])
    with pytest.raises(InvalidInputError, match="sum to 65536"):
        Table(np.array([1, 2]))
    for pmf in ([-1.0, 2.0], [float("nan")], [], np.ones(40_000)):
        with pytest.raises(InvalidInputError):
            quantise(pmf)
