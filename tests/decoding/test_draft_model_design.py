"""Draft model design: the replay equals the engine, the choice follows the clock."""

from dataclasses import replace

import pytest
import tiny

from isthmus.claims import Ruler
from isthmus.decoding.drafters import ModelDrafter
from isthmus.decoding.policy import Fixed
from isthmus.decoding.target import HubTarget
from isthmus.errors import InvalidInputError
from isthmus.roles import Shape
from isthmus.systems.speculative.draft_model_design import (
    Candidate,
    DraftModelDesign,
    Settings,
    hits,
    rank_correlation,
    recipes,
    simulate,
)
from isthmus.workbench._training import build
from isthmus.workbench.bench import answer


def test_the_replay_equals_the_engine() -> None:
    model = tiny.facade("Llama")
    draft = model.draft_model
    assert isinstance(draft, HubTarget)
    rows = [p.tolist() for p in tiny.prompts()]
    plain = answer(model, rows, "none", max_new_tokens=30)
    found = [hits(draft, p, t)[0] for p, t in zip(rows, plain.tokens, strict=True)]
    for gamma in (1, 4):
        policy = Fixed(ModelDrafter(draft), Shape(gamma, gamma, 1))
        engine = answer(model, rows, policy, max_new_tokens=30)
        assert engine.tokens == plain.tokens
        assert simulate(found, gamma) == engine.acceptance_length()
        assert simulate(found, gamma) > 1.05, "the draft model agrees now and then"


def test_simulation_by_hand() -> None:
    assert simulate([[False] * 7], 4) == 1.0
    assert simulate([[True] * 10], 4) == 5.0
    # rounds: TTF | TT(last) and FF | F
    assert simulate([[True, True, False, True, True], [False, False, False]], 4) == 8 / 5


def candidate(name: str, layers: int, step_s: float, tau: float) -> Candidate:
    return Candidate(name, layers, 100, step_s, 3.0, 0.5, {4: tau}, {4: tau / (4 * step_s + 10e-3)})


def test_latency_decides_and_without_it_tau_does() -> None:
    shallow, deep = candidate("shallow", 1, 1e-3, 2.0), candidate("deep", 6, 6e-3, 2.5)
    assert DraftModelDesign().choose([deep, shallow]) is shallow
    assert DraftModelDesign(Settings(latency=False)).choose([deep, shallow]) is deep
    slower = replace(shallow, throughput={4: 1.0})
    assert DraftModelDesign().choose([deep, slower]) is deep


def test_measuring_reports_every_candidate() -> None:
    model = tiny.facade("Llama", "float32")
    draft = model.draft_model
    assert isinstance(draft, HubTarget)
    rows = [p.tolist() for p in tiny.prompts()]
    plain = answer(model, rows, "none", max_new_tokens=12)
    texts = list(zip(rows, plain.tokens, strict=True))
    models = {"same": model.target, "near": draft}
    same, near = DraftModelDesign(Settings(gammas=(2, 3))).measure(
        model.target, models, texts, Ruler(), repeats=1
    )
    assert same.rate == 1.0 and same.tau == {2: 3.0, 3: 4.0}
    assert near.rate < 1.0 and near.tau[3] < 4.0 and near.step_s > 0 and near.layers == 2
    assert same.gamma in (2, 3) and same.best == max(same.throughput.values())


def test_the_candidates_have_one_size() -> None:
    sizes = [sum(p.numel() for p in build(r).parameters()) for r in recipes(1)]
    assert max(sizes) / min(sizes) <= 1.1
    assert [r.num_hidden_layers for r in recipes(1)] == [1, 2, 3, 4, 6]
    assert len({(r.steps, r.batch_size, r.sequence_length) for r in recipes(7)}) == 1


def test_rank_correlation() -> None:
    assert rank_correlation([1, 2, 3, 4], [5, 6, 7, 9]) == 1.0
    assert rank_correlation([1, 2, 3, 4], [9, 7, 6, 5]) == -1.0


def test_bad_input_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="1 or more"):
        DraftModelDesign(Settings(gammas=(0,)))
    with pytest.raises(InvalidInputError, match="no draft model"):
        DraftModelDesign().choose([])
