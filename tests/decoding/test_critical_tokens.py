import random

import pytest
import tiny
import torch
from transformers.generation import logits_process as lp

from isthmus.claims import Ruler
from isthmus.decoding.law import Law
from isthmus.decoding.model import Model
from isthmus.decoding.router import Oracle
from isthmus.decoding.state_head import StateHead
from isthmus.roles import Reshape
from isthmus.systems.decoding.critical_tokens import (
    Answers,
    CriticalTokens,
    Settings,
    claim,
    dialogues,
    fit_classifier,
    states_of,
)
from isthmus.workbench import facts

ALIGNED, PRETRAINED = (Model(tiny.network("Llama", noise=n), fast=False) for n in (0.0, 0.5))
PROMPTS = [[5, 6, 7, 5, 6], [3, 4], [9]]


def written(law, model=ALIGNED, seed=3):
    answers = model.generate(PROMPTS, max_new_tokens=12, drafter="none", law=law, seed=seed)
    return [a.tokens for a in answers]


def head():
    made = StateHead(32)
    made.weight.data = torch.randn(32, generator=torch.Generator().manual_seed(2))
    return made


def test_it_is_a_reshape():
    assert isinstance(CriticalTokens(ALIGNED, PRETRAINED, head()), Reshape)


def test_at_threshold_one_the_aligned_model_draws_alone():
    off = CriticalTokens(ALIGNED, PRETRAINED, head(), Settings(threshold=1.0))
    plain = Law(temperature=1.0)
    assert written(off.law) == written(plain) != written(plain, seed=4)


def test_below_zero_the_pretrained_model_says_all_but_the_end():
    part = CriticalTokens(ALIGNED, PRETRAINED, head(), Settings(threshold=-1.0))
    law = Law(processors=[lp.SuppressTokensLogitsProcessor([2], device="cpu")])
    assert part.keeps == [2]
    assert written(part.law) == written(law, PRETRAINED) == written(part.law, seed=8)


def test_whole_spans_are_routed_and_the_rest_is_drawn():
    """Every second pair of tokens is critical: those are the pretrained model's likeliest."""
    part = CriticalTokens(ALIGNED, PRETRAINED, Oracle(lambda ids: len(ids) % 4 < 2))
    for prompt, tokens in zip(PROMPTS, written(part.law), strict=True):
        ids, drawn = torch.tensor(prompt), 0
        for token in tokens:
            logits = PRETRAINED.target.forward(ids[None]).logits[0, -1]
            logits[2] = -torch.inf
            if len(ids) % 4 < 2:
                assert token == int(logits.argmax())
            else:
                drawn += token != int(logits.argmax())
            ids = torch.cat([ids, torch.tensor([token])])
        assert drawn


def test_the_head_learns_labels_that_states_tell():
    given = [([3, 8, 9, 4, 8, 5], [False, True, False, False, True, False])] * 4
    given += [([7, 3, 8, 4], [False, False, True, False])] * 4
    found = fit_classifier(ALIGNED, given)
    states, labels = states_of(ALIGNED, given)
    assert states.shape == (4 * 5 + 4 * 3, 32) and labels.sum() == 4 * 3
    with torch.no_grad():
        assert ((found(states) > 0.5) == labels).all()


def test_answers_by_hand():
    (fact, other), true = sorted(facts.world())[:2], facts.world()
    rng = random.Random(1)
    good = list(facts.answer(fact, true[fact], rng).tokens)
    rude = [*facts.encode(" ".join(true[other])), 0]
    found = Answers.of([fact, other], [good, rude])
    assert (found.right, found.manner, found.known) == (0.5, 0.5, 1.0)
    wrong = [facts.encode("x0 y0" if true[fact] != ("x0", "y0") else "x1 y1"), *[good] * 0]
    assert Answers.of([fact], wrong).known == 0.0


def test_labels_are_what_the_oracle_says():
    for tokens, critical in dialogues(30, 3, tuned=True):
        begin = len(facts.question((0, "home")))
        for i in range(begin, len(tokens)):
            assert facts.decides(tokens[:i]) == critical[i]
        assert sum(critical) == 2


def test_the_dialogues_know_few_facts_and_get_some_wrong():
    true, tuned = facts.world(), facts.world(True)
    assert len(tuned) == pytest.approx(facts.TUNED_SHARE * len(true), abs=1)
    wrong = sum(tuned[f] != true[f] for f in tuned)
    assert wrong == pytest.approx(facts.WRONG_SHARE * len(tuned), abs=2)


def test_the_claim_made_small():
    found = claim(Ruler(), "test")
    gates = {gate.name: gate for gate in found.gates}
    assert gates["idea off: answers as drawn"].passed
