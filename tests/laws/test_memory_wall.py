"""The memory wall: known answers on a made-up machine, trends, and the claim made small."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_roofline import ROOF

from isthmus.claims import Ruler
from isthmus.decoding.model import Model
from isthmus.errors import BrokenFileError, InvalidInputError
from isthmus.laws.opcount import Footprint, count
from isthmus.laws.trends import TABLE, rank_correlation, read_table, trend
from isthmus.systems.laws.memory_wall import MemoryWall, Settings, claim, reading
from isthmus.workbench import untrained

FLAT = replace(ROOF, read=ROOF.read[-1:], launch_s=0.0)


def test_a_generated_token_has_half_a_flop_for_a_byte() -> None:
    """Two FLOPs for each weight of four bytes, and the cache makes it less, never more."""
    model = untrained.decoder(384, 2)
    step = MemoryWall(FLAT).generate(model, 9)
    assert 0.45 < step.work.intensity < 0.5
    assert step.memory_share > 0.99
    assert step.predicted_s == pytest.approx(step.work.bytes / 10e9, rel=0.01)
    weights = Footprint.of(Model(model).target).weights
    assert step.work.flops == pytest.approx(9 * 2 * weights, rel=0.02)
    assert MemoryWall(FLAT).generate(model, 9, cached=500).work.intensity < step.work.intensity


def test_switched_off_only_flops_take_time() -> None:
    model = untrained.decoder(384, 2)
    off = MemoryWall(FLAT, Settings(memory=False)).generate(model, 9)
    on = MemoryWall(FLAT).generate(model, 9)
    assert off.predicted_s == pytest.approx(off.work.flops / 100e9)
    assert off.memory_share == 0.0
    # ridge 10 over intensity 0.5
    assert on.predicted_s / off.predicted_s == pytest.approx(20, rel=0.1)


def test_encoder_and_decoder_are_of_equal_size_and_read_alike() -> None:
    wall = MemoryWall(FLAT)
    reader, writer = untrained.encoder(384, 2), untrained.decoder(384, 2)
    a, b = wall.encode(reader, 256), wall.encode(writer, 256)
    assert a.work.flops == pytest.approx(b.work.flops, rel=0.15)
    assert a.work.intensity > 20 * wall.generate(writer, 256).work.intensity
    ids = torch.ones(1, 8, dtype=torch.int64)
    states = untrained.encoding(reader, 8)()
    assert torch.equal(states[0], reader(ids)[0])


def test_the_middle_step_stands_for_all() -> None:
    wall, model = MemoryWall(FLAT), untrained.decoder(192, 1)
    steps = [wall.generate(model, 1, cached=5 + t).work for t in range(5)]
    whole = wall.generate(model, 5, cached=5).work
    assert whole.flops == sum(w.flops for w in steps)
    assert whole.bytes == pytest.approx(sum(w.bytes for w in steps))


def test_what_is_timed_is_greedy_decoding() -> None:
    model = Model(untrained.decoder(192, 1))
    run = untrained.generating(model.target, 6, 4)
    first, second = run(), run()
    want = model.generate([1, 1, 1, 1, 0], max_new_tokens=6, drafter="none", ignore_end=True)
    assert [int(t) for t in first] == [int(t) for t in second] == want.tokens


def test_reading_touches_every_weight_of_a_step_once() -> None:
    model = untrained.decoder(192, 1)
    read = count(reading(model, 3))
    assert read.flops == 0
    assert read.bytes == pytest.approx(3 * Footprint.of(Model(model).target).weight_bytes, rel=1e-3)


def test_changes_by_hand() -> None:
    """1 GB of float32 weights and a quarter as much cache; arithmetic far away."""
    fast = replace(FLAT, products={"float32": replace(FLAT.peak("float32"), best=1e18)})
    model = Footprint(250e6, 1e9, cache_bytes=0.25e9 / 513)
    gains = MemoryWall(fast).what_if(model, 512)
    assert gains["16-bit weights"] == pytest.approx(1.25 / 0.75)
    assert gains["4-bit weights"] == pytest.approx(1.25 / 0.375)
    assert gains["a quarter of the key and value heads"] == pytest.approx(1.25 / 1.0625)
    assert gains["batch of 8"] == pytest.approx(8 * 1.25 / 3.0)
    assert gains["8 draft tokens that all stand"] == pytest.approx(9, rel=0.01)
    narrow = MemoryWall(fast).what_if(replace(model, weight_bytes=250e6))
    assert "8-bit weights" not in narrow and "4-bit weights" in narrow


def test_a_planted_trend_is_found() -> None:
    years = [2000, 2003, 2004, 2009, 2012, 2020]
    found = trend(years, [7.0 * 3.0 ** ((y - 2000) / 2) for y in years])
    assert found.factor == pytest.approx(3.0) and found.low == pytest.approx(found.high)
    assert found.over(20) == pytest.approx(3.0**10)
    for bad in ([1, 1, 1], [1, 2, 0], [1, 2, float("nan")]):
        with pytest.raises(InvalidInputError, match="three different years"):
            trend([2000, 2002, 2004] if bad != [1, 1, 1] else [2000, 2000, 2002], bad)


def test_order_and_ties() -> None:
    assert rank_correlation([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(0.8)
    assert rank_correlation([1, 2, 3], [9, 5, 2]) == pytest.approx(-1)
    assert rank_correlation([1, 1, 2, 3], [1, 2, 3, 4]) == pytest.approx(0.9487, abs=1e-4)
    assert rank_correlation([1, 1, 1], [1, 2, 3]) == 0.0


def test_the_table_of_machines(tmp_path: Path) -> None:
    rows = json.loads(TABLE.read_text())
    assert all(row["source"] and row["name"] for row in rows)
    found = read_table()
    assert found["tflop_s"].low > found["memory_gb_s"].high, "arithmetic grew faster"
    own = tmp_path / "own.json"
    for text in ("{", "[]", '[{"year": 2000}]', '{"a": 1}'):
        own.write_text(text)
        with pytest.raises((BrokenFileError, InvalidInputError)):
            read_table(own)
    with pytest.raises(BrokenFileError, match="none"):
        read_table(tmp_path / "none.json")


def test_the_claim_made_small() -> None:
    found = claim(Ruler(), "test")
    rows = {row.metric: row for row in found.rows}
    assert found.gates[0].passed, "intensity is counted, not timed"
    prediction = rows["predicted over measured time of generating"]
    assert prediction.ours is not None and prediction.off is not None
    assert 0 < prediction.off < prediction.ours / 2
