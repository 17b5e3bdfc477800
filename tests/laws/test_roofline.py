"""The roofline: arithmetic on a made-up machine, and what is measured on this one."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from isthmus.errors import BrokenFileError, InvalidInputError
from isthmus.laws import roofline
from isthmus.laws.opcount import Footprint, Op, OpTable, Work, count
from isthmus.laws.roofline import Reading, Roof, floor_ms, measure, roof_of, timings

sys.path.insert(0, str(Path(__file__).parent.parent / "decoding"))
import tiny


def flat(rate: float) -> Reading:
    return Reading(rate, rate, rate, rate)


#: 10 GB/s from memory, 40 from the cache, 100 GFLOP/s in float32 and 1 in bfloat16.
ROOF = Roof(
    "made-up",
    "cpu",
    1,
    "2",
    ((10**6, flat(40e9)), (10**8, flat(10e9))),
    {"float32": flat(100e9), "bfloat16": flat(1e9)},
    1e-6,
)


def test_a_reading_and_its_spread() -> None:
    reading = Reading.of(6.0, [1.0, 2.0, 3.0, 3.0, 6.0])
    assert (reading.low, reading.median, reading.high, reading.best) == (2.0, 2.0, 3.0, 6.0)
    assert reading.noisy and not Reading.of(6.0, [1.0, 1.1, 1.2, 1.3, 1.4]).noisy
    for samples in ([1.0] * 4, [], [1.0, 1.0, 0.0, 1.0, 1.0]):
        with pytest.raises(InvalidInputError, match="5 repeats"):
            Reading.of(1.0, samples)
    with pytest.raises(InvalidInputError, match="no spread"):
        timings(lambda: None, repeats=3)


def test_ridge_and_roof() -> None:
    assert ROOF.ridge("float32") == 10.0
    assert ROOF.attainable(1.0, "float32") == 10e9
    assert ROOF.attainable(50.0, "float32") == 100e9
    assert ROOF.memory.best == 10e9


def test_narrow_numbers_may_be_widened() -> None:
    """A machine without bfloat16 units is no slower than its float32, for numbers read as bf16."""
    assert ROOF.peak("bfloat16") == ROOF.peak("float32") == ROOF.peak("int8")
    with pytest.raises(InvalidInputError, match="float64 were not measured, only float32"):
        ROOF.peak("float64")
    with pytest.raises(InvalidInputError, match="no dtype"):
        ROOF.peak("float31")


def test_what_fits_into_a_cache_is_read_faster() -> None:
    assert ROOF.bandwidth(1000).best == 40e9
    assert ROOF.bandwidth(10**7).best == pytest.approx(25e9)
    assert ROOF.bandwidth(10**9).best == 10e9
    light, heavy = Work(0, 10**6), Work(0, 10**9)
    assert ROOF.floor_s(light, "float32") == pytest.approx(1e6 / 40e9)
    assert ROOF.floor_s(light, "float32", size=10**9) == pytest.approx(1e6 / 10e9)
    assert ROOF.floor_s(heavy, "float32") == 0.1


def test_the_prediction_of_a_counted_run() -> None:
    """A synthetic table: memory 1 s, compute 2 s, and a thousand starts of nothing."""
    table = OpTable(
        (
            Op(10**9, 10**10, "mv", calls=1),
            Op(2 * 10**11, 10**6, "mm", calls=1),
            Op(0, 0, "view", calls=1000),
        )
    )
    found = roofline.roofline(table, ROOF)
    assert found.bounds == ("memory", "compute", "launch")
    assert found.total_s == pytest.approx(3.001002)
    assert found.share("memory") == pytest.approx(1 / 3, rel=1e-3)
    assert found.efficiency(6.002004) == pytest.approx(0.5)
    assert found.usual_s == pytest.approx(found.total_s)
    noisy = replace(ROOF, read=((1, Reading(10e9, 9e9, 5e9, 9.5e9, 4.0)),))
    wide = roofline.roofline(table, noisy)
    assert noisy.noisy and wide.usual_s > 3.9 > wide.total_s, "the interval is carried along"


def test_the_floor_of_a_target_by_hand() -> None:
    target = tiny.target("Llama", "float32")
    footprint = Footprint.of(target)
    seven = footprint.weight_bytes + 8 * footprint.cache_bytes + footprint.row_bytes
    assert floor_ms(target, 1, 7, ROOF) == pytest.approx(1e3 * seven / 40e9)
    slow = replace(ROOF, products={"float32": flat(1e6)})
    flops = 2 * 16 * footprint.weights + 2 * footprint.attention * 16 * 23
    assert floor_ms(target, 16, 7, slow) == pytest.approx(1e3 * flops / 1e6)
    assert slow.bound(footprint.forward(16, 7), "float32") == "compute"
    assert ROOF.bound(footprint.forward(1, 7), "float32") == "memory"
    half = tiny.target("Llama", "bfloat16")
    assert floor_ms(half, 1, 7, ROOF) == pytest.approx(floor_ms(target, 1, 7, ROOF) / 2, rel=1e-6)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small arrays and squares: the code is under test, not this machine."""
    monkeypatch.setattr(roofline, "SIZES", ())
    monkeypatch.setattr(roofline, "_read_sizes", lambda where: [2**16, 2**20])


def test_this_machine(quick: None) -> None:
    roof = measure(dtypes=["float32"], budget_s=0.3)
    assert roof.kind == "cpu" and roof.threads == torch.get_num_threads() and roof.device
    assert 1e7 < roof.memory.median < 1e13 and 1e6 < roof.peak("float32").median < 1e15
    assert roof.bandwidth(1).best >= roof.memory.best, "less is never read slower"
    assert roof.memory.low <= roof.memory.median <= roof.memory.high
    assert 1e-8 < roof.launch_s < 1e-2
    a = torch.ones(64, 64)
    assert roofline.roofline(count(torch.mm, a, a), roof).total_s > roof.launch_s


def test_the_cache_has_the_sizes_of_this_machine() -> None:
    sizes = roofline._read_sizes(torch.device("cpu"))
    assert sizes == sorted(set(sizes)) and sizes[-1] >= 4 * min(
        roofline._last_cache_bytes(), 256 * roofline.MIB
    )
    assert roofline._read_sizes(torch.device("cuda")) == [1024 * roofline.MIB]


def test_a_machine_is_measured_once(
    quick: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path))
    calls = []

    def fake(where: torch.device) -> Roof:
        calls.append(where)
        return replace(ROOF, launch_s=len(calls) * 1e-6)

    monkeypatch.setattr(roofline, "measure", fake)
    assert roof_of() == roof_of() and len(calls) == 1
    assert roof_of(fresh=True).launch_s == roof_of().launch_s == 2e-6
    (file,) = tmp_path.rglob("*.json")
    assert Roof.from_dict(json.loads(file.read_text())) == roof_of()
    for damage in ("{", "{}", file.read_text().replace("40000000000.0", "-1")):
        file.write_text(damage)
        assert roof_of().memory.best == 10e9
    assert len(calls) == 5
    noisy = replace(ROOF, products={"float32": Reading(1e9, 1e9, 1e9, 1e9, 3.0)})
    file.write_text(json.dumps(noisy.to_dict()))
    assert not roof_of().noisy and len(calls) == 6, "a noisy reading is taken again"


def test_an_interrupted_write_leaves_the_old_reading(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path))
    monkeypatch.setattr(roofline, "measure", lambda where: ROOF)
    roof_of()
    (file,) = tmp_path.rglob("*.json")
    before = file.read_bytes()

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(BrokenFileError, match="No space left"):
        roof_of(fresh=True)
    assert file.read_bytes() == before
