"""The comparison of decoding methods: grids, advice, the off switch, and its metrics by hand."""

import pytest
import tiny

from isthmus.claims import Ruler, Status
from isthmus.decoding.model import Model
from isthmus.decoding.strategies import STRATEGIES, make
from isthmus.metrics.repetition import distinct, divergence, ngrams, repetition
from isthmus.systems.decoding.decoding_methods import (
    GRIDS,
    OFF,
    DecodingMethods,
    Finding,
    Settings,
    examine,
)
from isthmus.workbench._tasks import DatesCourse
from isthmus.workbench.bench import reference_model
from isthmus.workbench.reference import RECIPES

MODEL = tiny.facade("Llama")
PROMPTS = [[5, 6, 7, 5, 6], [3, 4], [9]]


def test_metrics_by_hand():
    assert ngrams([1, 2, 3], 2) == [(1, 2), (2, 3)] and ngrams([1], 2) == []
    assert repetition([[1, 2, 3, 4, 1, 2, 3, 4, 1]], 4) == pytest.approx(2 / 6)
    assert repetition([[1], [1, 1, 1, 1, 1]], 4) == 0.5
    assert repetition([[1]], 4) == 0.0 == distinct([[1]], 2)
    assert distinct([[1, 1, 1]], 2) == 0.5
    # halves of 1 and 2 against all 1: JSD = 1/2 KL(p|m) + 1/2 KL(q|m), m = (3/4, 1/4)
    assert divergence([[1, 2]], [[1]]) == pytest.approx(0.31127812)
    assert divergence([], []) == 0.0 and divergence([[1]], []) == 1.0


def test_grids_name_settings_that_exist():
    for method, grid in GRIDS.items():
        assert grid[0] == {}
        for setting in grid:
            make(method, setting)
    for method, setting in OFF.items():
        make(method, setting)


@pytest.mark.parametrize("method", list(OFF))
def test_switched_off_every_method_is_greedy(method):
    study = DecodingMethods(Settings(steer=False))
    strategy = study.strategy(method, **GRIDS[method][-1])
    got = study.answers(MODEL, PROMPTS, strategy, max_new_tokens=8)
    assert got == study.answers(MODEL, PROMPTS, make("greedy"), max_new_tokens=8)
    on = DecodingMethods().strategy(method, **GRIDS[method][-1])
    assert on != strategy


def test_compare_finds_the_best_setting_and_the_spread():
    study = DecodingMethods(Settings(("greedy", "fsd", "beam", "contrastive-decoding")))
    grids = {"greedy": ({},), "fsd": ({"alpha": 0.0}, {"alpha": 0.9})}

    def score(answers):
        return distinct(answers, 1)

    findings = study.compare(MODEL, PROMPTS, score, grids=grids, max_new_tokens=12)
    greedy, fsd = findings  # beam has no grid
    assert greedy.fixed == greedy.best == fsd.fixed and greedy.spread == 0.0
    assert fsd.best_setting == "alpha=0.9" and fsd.best > fsd.fixed
    assert fsd.spread == pytest.approx(2 * (fsd.best - fsd.fixed) / (fsd.best + fsd.fixed))
    assert len(fsd.answers) == 3 and all(len(a) == 12 for a in fsd.answers)


def test_batches_do_not_sway_answers():
    study = DecodingMethods()
    one, three = (
        study.answers(MODEL, PROMPTS, make("contrastive-search"), max_new_tokens=8, batch=b)
        for b in (1, 3)
    )
    assert one == three


def test_advice():
    def found(method, fixed):
        return Finding(method, fixed, fixed, "", 0.0, [])

    findings = [found("greedy", 0.6), found("beam", 0.6), found("fsd", 0.7), found("top-p", 0.9)]
    study = DecodingMethods()
    assert study.advise("open", findings) == "top-p"
    assert study.advise("closed", findings) == "fsd"
    assert study.advise("closed", findings[:2]) == "greedy"
    drawn = {m for m in STRATEGIES if m in GRIDS and not found(m, 0.0).deterministic}
    assert drawn == {"sample", "top-p", "top-k", "typical", "eta", "mirostat"}


@pytest.fixture(scope="module")
def claims():
    """The claim made small, with methods on and off; the dates model has learned nothing yet."""
    recipe = RECIPES["dates-s"]
    course = DatesCourse(recipe)
    model = course.build().eval()
    model.generation_config = course.generation()
    writer, coder = Model(model, course.tokenizer), reference_model("pycode-t", "pycode-t")
    some = ("greedy", "beam", "sample", "fsd", "contrastive-search", "top-p")
    return [
        examine(DecodingMethods(Settings(some, steer=on)), writer, coder, Ruler(), "test")
        for on in (True, False)
    ]


def test_the_claim_fails_when_methods_do_nothing(claims):
    off = claims[1]
    assert off.status is Status.NOT_REPRODUCED
    missed = {gate.name for gate in off.gates if not gate.passed}
    assert {"rep-4, fsd over greedy", "rep-4, top-p over greedy"} <= missed
    repeats = [row for row in off.rows if row.off is not None]
    assert len(repeats) == 3 and all(row.ours == row.off == row.baseline for row in repeats)


def test_the_claim_tells_methods_apart(claims):
    on = claims[0]
    rows = {row.metric: row for row in on.rows}
    assert rows["rep-4 of continued Python, greedy"].off is None
    for method in ("fsd", "contrastive-search", "top-p"):
        row = rows[f"rep-4 of continued Python, {method}"]
        assert row.ours < row.off == row.baseline
    assert {gate.name for gate in on.gates} >= {"time, beam over greedy", "dates, greedy"}
