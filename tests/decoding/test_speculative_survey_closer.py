"""The guide: replay against the engine, advice on made-up statistics, exclusions."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from isthmus.decoding.acceptance import Coupled
from isthmus.decoding.cost import Cost
from isthmus.decoding.drafters import ModelDrafter, PromptLookup
from isthmus.decoding.policy import Fixed
from isthmus.decoding.tree import TokenTree
from isthmus.errors import InvalidInputError, UnknownNameError
from isthmus.roles import Shape
from isthmus.systems.speculative import speculative_survey_closer as closer
from isthmus.systems.speculative.speculative_survey_closer import (
    METHODS,
    Probe,
    Settings,
    SpeculativeSurveyCloser,
    Trial,
)
from isthmus.workbench.bench import answer
from isthmus.workbench.replay import ReplayTarget, Text, copy_rate, record, replay
from isthmus.workbench.survey import measure_batch

CHEAP = Cost({1: 1.0, 32: 1.5})
FLAT = {name: Trial(1.1, 9.0, 0.0) for name in METHODS}
ROWS = [p.tolist() for p in tiny.prompts()]


def probe(cost: Cost = CHEAP, batch: int = 1, **trials: Trial) -> Probe:
    """Made-up statistics in which every method can work."""
    changed = {name.replace("_", "-"): t for name, t in trials.items()}
    return Probe(cost, batch, {**FLAT, **changed}, vocabularies_match=True)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_replayed_rounds_are_the_engines(temperature: float) -> None:
    model = tiny.facade("Llama")
    assert model.draft_model is not None
    texts = record(model, ROWS, max_new_tokens=24, temperature=temperature, seed=5)
    assert [len(t.answer) for t in texts] == [24] * 3
    for policy in (
        Fixed(PromptLookup(), Shape(5, 5, 1)),
        Fixed(ModelDrafter(model.draft_model), Shape(3, 3, 1)),
    ):
        found = replay(policy, texts, temperature=temperature, seed=5)
        engine = answer(
            model,
            ROWS,
            policy,
            max_new_tokens=24,
            acceptance=Coupled(5) if temperature else None,
            temperature=temperature,
        )
        assert [r.tokens for r in found] == engine.tokens == [t.answer.tolist() for t in texts]
        assert [r.stats.target_forwards for r in found] == engine.forwards


def test_nodes_beside_the_text_get_what_followed_their_token_before() -> None:
    ids = torch.tensor([3, 1, 2, 1, 4, 2])
    text = Text(ids, 4, torch.eye(6)[ids[1:]])
    session = ReplayTarget(text).session(1)
    session.prefill([ids[:3]])
    tree = TokenTree.from_paths(1, [[4, 2], [2, 5], [5]])
    got = session.score(tree).logits[0].argmax(-1).tolist()
    nodes = dict(zip(tree.tokens[0].tolist(), got, strict=True))
    assert nodes[1] == 4, "the root stands in the text"
    assert nodes[4] == 2
    assert got[tree.tokens[0].tolist().index(2)] == 1, "beside the text: 2 was followed by 1"
    session.keep(torch.tensor([[0, 1]]))
    assert session.lengths == [5]


def test_the_best_method_of_made_up_statistics_is_advised() -> None:
    guide = SpeculativeSurveyCloser()
    for name in METHODS:
        tried = probe(**{name.replace("-", "_"): Trial(3.0, 9.0, 0.1)})
        advice = guide.advise(tried)
        assert advice.choice == name and next(iter(advice.ranked)) == name
        # 3 tokens in a round of cost(9) + 0.1 against 1 token in a round of 1
        assert advice.ranked[name] == pytest.approx(3.0 / (CHEAP(9) + 0.1))
        assert advice.options == {"drafter": name, "num_draft_tokens": METHODS[name].nodes}
        assert any(METHODS[name].path in reason for reason in advice.reasons)
    slow = probe(aded=Trial(3.0, 9.0, 2.5))
    assert guide.advise(slow).choice == "none" and not guide.advise(slow).excluded, (
        "drafting time counts"
    )


def test_batches_multiply_the_time_of_stores_and_not_that_of_models() -> None:
    one, many = probe(batch=1), replace(probe(batch=8), draft_growth=1.5)
    trial = Trial(2.0, 9.0, 0.5)
    assert one.speedup("aded", trial) == pytest.approx(2 / (CHEAP(9) + 0.5))
    assert many.speedup("aded", trial) == pytest.approx(2 / (CHEAP(9) + 4.0))
    assert many.speedup("speculative-sampling", trial) == pytest.approx(2 / (CHEAP(9) + 0.75))


def test_exclusions_fire(monkeypatch: pytest.MonkeyPatch) -> None:
    guide, good = SpeculativeSurveyCloser(), Trial(3.0, 9.0, 0.0)
    base = Probe(CHEAP, 1, dict.fromkeys(METHODS, good), vocabularies_match=True)
    assert not guide.advise(base).excluded
    assert set(guide.advise(replace(base, reach="step")).excluded) == set(METHODS)
    assert guide.advise(replace(base, reach="step")).choice == "none"
    chains = guide.advise(replace(base, reach="chain"))
    assert set(chains.excluded) == {n for n, m in METHODS.items() if m.tree}
    alone = guide.advise(replace(base, vocabularies_match=None)).excluded
    assert alone == {"speculative-sampling": "there is no draft model"}
    other = guide.advise(replace(base, vocabularies_match=False)).excluded
    assert "another vocabulary" in other["speculative-sampling"]
    assert list(guide.advise(replace(base, tokenizer=False)).excluded) == ["aded"]
    bound = replace(base, cost=Cost({1: 1.0, 4: 4.0, 32: 32.0}))
    assert guide.advise(bound).choice == "none"
    assert all("compute-bound" in why for why in guide.advise(bound).excluded.values())
    lossy = {**METHODS, "aded": replace(METHODS["aded"], lossless=False)}
    monkeypatch.setattr(closer, "METHODS", lossy)
    assert "exact" in guide.advise(base).excluded["aded"]
    relaxed = SpeculativeSurveyCloser(Settings(exact=False))
    assert not relaxed.advise(base).excluded


def test_switched_off_published_figures_decide() -> None:
    off = SpeculativeSurveyCloser(Settings(measure=False))
    tried = probe(aded=Trial(3.0, 9.0, 0.0))
    assert off.advise(tried).choice == "speculative-sampling"
    assert SpeculativeSurveyCloser().advise(tried).choice == "aded"


def test_copy_rate_by_hand() -> None:
    logits = torch.zeros(1, 1)
    assert copy_rate(Text(torch.tensor([1, 2, 3, 4, 1, 2, 3, 4]), 7, logits)) == 1.0
    assert copy_rate(Text(torch.tensor([1, 2, 3, 4, 5, 6]), 3, logits)) == 0.0
    cycle = np.tile([1, 2, 3, 4], 5)
    assert copy_rate(Text(torch.from_numpy(cycle), 8, logits)) == 1.0


def test_probing_a_model_gives_everything() -> None:
    model = tiny.facade("Llama", "float32")
    assert model.draft_model is not None
    policies: Any = {"prompt-lookup": Fixed(PromptLookup(), Shape(4, 4, 1))}
    cost, growth = measure_batch(model, 2)
    assert cost(1) > 0 and growth >= 1.0
    guide = SpeculativeSurveyCloser(Settings(tokens=10))
    found = guide.probe(model, ROWS, batch=2, policies=policies, costs=(cost, growth))
    assert found.trials["prompt-lookup"].tau >= 1.0 and found.reach == "tree"
    assert 0 <= found.copy_rate <= 1 and 0 < found.entropy < np.log(tiny.V)
    assert found.vocabularies_match and not found.tokenizer
    advice = guide.advise(found)
    assert set(advice.excluded) >= {"aded", "token-recycling", "speculative-sampling"}


def test_bad_input_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="at least 1"):
        SpeculativeSurveyCloser(Settings(gain=0.5))
    with pytest.raises(UnknownNameError, match="token-recycling"):
        SpeculativeSurveyCloser().advise(Probe(CHEAP, 1, {"token-recycler": Trial(1, 1, 0)}))
    with pytest.raises(InvalidInputError, match="encoder"):
        record(tiny.facade("T5"), ROWS, max_new_tokens=4)
