"""Advice: known values of the formulas, ranking, refusals, and the claim made small."""

from dataclasses import replace

import pytest
from test_roofline import ROOF

from isthmus.claims import Ruler
from isthmus.decoding.model import Model
from isthmus.errors import InvalidInputError
from isthmus.laws.advice import (
    Workload,
    advise,
    best_chain,
    chain_gain,
    expected_tokens,
    largest_batch,
    page_waste,
    time_to_first_s,
    token_s,
)
from isthmus.laws.opcount import Footprint
from isthmus.systems.laws.inference_optimization import (
    InferenceOptimization,
    Settings,
    acceptance_of,
    claim,
    techniques,
)
from isthmus.workbench import untrained

FLAT = replace(ROOF, read=ROOF.read[-1:], launch_s=0.0)

#: 1 GB of float32 weights, 1 MB of cache a token, no attention to speak of.
MODEL = Footprint(250e6, 1e9, cache_bytes=1e6)


def test_the_formulas_have_their_known_values() -> None:
    assert float(expected_tokens(0.8, 4)) == pytest.approx(3.3616)
    assert chain_gain(0.8, 4, 0.0) == pytest.approx(3.3616)
    assert chain_gain(0.8, 4, 0.05, 1.1) == pytest.approx(3.3616 / 1.3)
    gains = [chain_gain(0.8, g, 0.1) for g in range(17)]
    assert best_chain(0.8, 0.1) == gains.index(max(gains)) == 6
    assert best_chain(0.2, 0.5) == 0, "a slow drafter that is mostly wrong is left out"
    assert best_chain(1.0, 0.0) == 16
    for a in (0.1, 0.5, 0.93):
        assert acceptance_of(float(expected_tokens(a, 3)), 3) == pytest.approx(a, abs=1e-6)


def test_the_cache_of_a_known_model() -> None:
    """A 7B model of 32 layers and 32 heads of 128 in 16 bits: half a MiB a token."""
    llama = Footprint(6.74e9, 13.48e9, cache_bytes=2 * 32 * 32 * 128 * 2)
    assert llama.cache_bytes == 512 * 1024
    assert largest_batch(llama, 4096, 24e9) == 4
    assert largest_batch(llama, 4096, 13e9) == 0
    grouped = replace(llama, cache_bytes=llama.cache_bytes / 4)
    assert largest_batch(grouped, 4096, 24e9) == 19
    for bad in (
        (llama, 0, 24e9),
        (llama, 1, float("inf")),
        (replace(llama, cache_bytes=0), 1, 1e9),
    ):
        with pytest.raises(InvalidInputError, match="finite memory"):
            largest_batch(*bad)
    assert page_waste(32, 16) == 0.0 and page_waste(33, 16) == pytest.approx(15 / 48)


def test_reading_is_bound_by_arithmetic_and_writing_by_memory() -> None:
    assert token_s(MODEL, FLAT, 0, dtype="float32") == pytest.approx(1.001e9 / 10e9)
    assert time_to_first_s(MODEL, FLAT, 1000, dtype="float32") == pytest.approx(5.0)
    unfused = time_to_first_s(MODEL, FLAT, 1000, dtype="float32", heads=144)
    assert unfused - 5.0 == pytest.approx(8 * 144 * 1e6 * 4 / 10e9)


def test_ranking_by_hand() -> None:
    found = {t.name: t for t in advise(MODEL, FLAT, Workload(prompt=1, new=1001))}
    # 1000 steps on 501 cached tokens in the middle, and one of one token
    whole, narrow = 1.502 * 1000 + 1.001, (0.5 + 0.502) * 1000 + 0.501
    assert found["16-bit weights"].gain == pytest.approx(whole / narrow, rel=1e-3)
    assert found["half the layers"].gain == pytest.approx(2.0)
    assert found["batch of 8"].gain < 1, "a batch makes one request slower"
    assert "speculative decoding" not in found
    many = advise(MODEL, FLAT, Workload(prompt=1, new=101, goal="throughput"))
    names = [t.name for t in many]
    assert names[0] == "batch of 32" and names.index("batch of 8") < names.index("16-bit weights")
    assert [t.known for t in many] == sorted((t.known for t in many), reverse=True)


def test_memory_and_measurements_overrule_predictions() -> None:
    workload = Workload(prompt=100, new=900, goal="throughput", memory_bytes=10e9)
    found = advise(MODEL, FLAT, workload, measured={"4-bit weights": 0.3})
    assert [t.name for t in found if not t.fits] == ["batch of 32"] == [found[-1].name]
    narrow = next(t for t in found if t.name == "4-bit weights")
    assert narrow.gain > 1 > narrow.known == 0.3
    assert found.index(narrow) == len(found) - 2


def test_speculation_is_advised_where_it_pays() -> None:
    def gain(**options: float) -> float:
        work = Workload(10, 1000, **options)  # type: ignore[arg-type]
        return next(t.gain for t in advise(MODEL, FLAT, work) if t.name == "speculative decoding")

    # seven nodes are 1.05 times the FLOPs that the roof allows in the time of one, or less
    assert gain(acceptance=0.8, draft_cost=0.1) == pytest.approx(chain_gain(0.8, 6, 0.1), rel=0.02)
    assert gain(acceptance=0.1, draft_cost=1.0) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "bad",
    [
        {"prompt": 0},
        {"new": 0},
        {"goal": "fun"},
        {"acceptance": 1.2},
        {"draft_cost": -1.0},
        {"memory_bytes": 0.0},
    ],
)
def test_a_workload_out_of_range_is_refused(bad: dict[str, object]) -> None:
    with pytest.raises(InvalidInputError):
        Workload(**({"prompt": 5, "new": 5} | bad))  # type: ignore[arg-type]


def test_the_guide_reads_a_real_model_and_its_switch_matters() -> None:
    target = Model(untrained.decoder(384, 2)).target
    workload = Workload(64, 64)
    on = {t.name: t.gain for t in InferenceOptimization(FLAT).advise(target, workload)}
    blind = InferenceOptimization(FLAT, Settings(memory=False)).advise(target, workload)
    off = {t.name: t.gain for t in blind}
    assert on["16-bit weights"] > 1.5 and off["16-bit weights"] == pytest.approx(1.0)
    assert off["batch of 8"] == pytest.approx(1 / 8)
    told = InferenceOptimization(FLAT).advise(target, workload, {"half the layers": 9.0})
    assert told[0].name == "half the layers"


def test_what_is_predicted_for_what_is_timed() -> None:
    before, pairs = techniques((384, 2), (4, 16, 64), 2)
    assert {p.without for p in pairs.values()} == set(before)
    guide, blind = InferenceOptimization(FLAT), InferenceOptimization(FLAT, Settings(memory=False))
    predicted = {name: pair.gain(guide) for name, pair in pairs.items()}
    assert predicted["16-bit weights"] == pytest.approx(2.0, rel=0.01)
    assert predicted["batch of 8"] == pytest.approx(8, rel=0.1)
    assert predicted["half the width"] > 3.5 and predicted["fused attention"] > 1
    assert 1.5 < predicted["half the layers"] < 2
    assert pairs["16-bit weights"].gain(blind) == pytest.approx(1.0)
    assert pairs["fused attention"].gain(blind) == pytest.approx(1.0)


def test_the_claim_made_small() -> None:
    found = claim(Ruler(), "test")
    rows = {row.metric: row for row in found.rows}
    assert sum(metric.startswith("speed-up") for metric in rows) == 8
    for row in found.rows[:8]:
        assert row.baseline is not None
        if "speculative" not in row.metric:  # whether a draft model pays, the machine decides
            assert row.baseline > 1, f"{row.metric} is predicted to help"
        assert row.ours is not None and row.ours > 0
    assert rows["speed-up, 16-bit weights"].off == pytest.approx(1.0)
