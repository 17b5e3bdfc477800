import random

import pytest
import tiny
import torch

from isthmus.claims import Ruler
from isthmus.decoding.correction import candidates
from isthmus.decoding.law import Law
from isthmus.decoding.tree import TokenTree, chain_topology
from isthmus.errors import InvalidInputError
from isthmus.roles import Context, Features, Reshape
from isthmus.systems.decoding.deco import Deco, Settings, claim
from isthmus.workbench import captions


def deco(**settings):
    return Deco(tiny.target("Llama"), Settings(**settings), layers=[0, 1])


def test_it_is_a_reshape():
    assert isinstance(deco(), Reshape)


def test_three_layers_by_hand():
    """Logits stand in for states: the head is the identity, so that every number can be checked."""
    part = deco(alpha=0.5, top_p=0.9, top_k=2)
    part.early = type("Early", (), {"layers": (1, 2), "__call__": lambda self, f: f.layers[0]})()
    last = torch.tensor([0.0, 2.0, 1.0, -1.0])
    early = torch.tensor([[3.0, 0.0, 0.0, 9.0], [0.0, 0.0, 4.0, 0.0]])  # two layers
    features = Features(None, {0: early[None, None]})
    law = Law()
    context = Context(
        torch.zeros(1, 1, dtype=torch.long), [1], [1], law, torch.Generator(), [0], None, features
    )
    tree = TokenTree(torch.zeros(1, 1, dtype=torch.long), chain_topology(1))
    got = part(last[None, None], tree, context)[0, 0]
    # V_c = {1, 2}; the sure layer is the second, for token 2; token 3 of the first is not in V_c
    sure = torch.softmax(early[1], -1)[2]
    assert part.anchors.tolist() == [[2]]
    assert got[1:3].tolist() == pytest.approx([2.0, float(1.0 + 0.5 * sure * 4.0)])
    assert got[0] < -1000 and got[3] < -1000


def test_candidates_are_a_nucleus_of_few():
    law = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    assert candidates(law, 0.9, 20).tolist() == [True, True, True, False]
    assert candidates(law, 1.0, 2).tolist() == [True, True, False, False]


@pytest.mark.parametrize("drafter", ["prompt-lookup", "token-recycling"])
def test_drafts_go_with_it_and_off_it_is_greedy(drafter):
    model = tiny.facade("Llama")
    prompts = [p.tolist() for p in tiny.prompts()]

    def tokens(drafter, part):
        law = Law(reshapes=[] if part is None else [part])
        options = {"max_new_tokens": 16, "drafter": drafter, "ignore_end": True}
        return [g.tokens for g in model.generate(prompts, law=law, **options)]

    assert tokens(drafter, deco(alpha=2.0)) == tokens("none", deco(alpha=2.0))
    assert tokens("none", deco(alpha=0.0)) == tokens("none", None)
    alone = [
        model.generate(
            p, law=Law(reshapes=[deco(alpha=2.0)]), max_new_tokens=16, ignore_end=True
        ).tokens
        for p in prompts
    ]
    assert alone == tokens("none", deco(alpha=2.0))


def test_it_is_a_named_strategy():
    model = tiny.facade("Llama")
    prompts = [p.tolist() for p in tiny.prompts()]
    options = {"max_new_tokens": 12, "ignore_end": True}
    layers = {"low": 0.0, "high": 0.5}
    named = model.generate(prompts, strategy="deco", alpha=2.0, **layers, **options)
    law = Law(reshapes=[deco(alpha=2.0)])
    assert [g.tokens for g in named] == [
        g.tokens for g in model.generate(prompts, law=law, **options)
    ]
    off = model.generate(prompts, strategy="deco", alpha=0.0, **layers, **options)
    assert [g.tokens for g in off] == [g.tokens for g in model.generate(prompts, **options)]


@pytest.mark.parametrize(
    ("settings", "words"), [({"top_p": 0.0}, "top_p"), ({"low": 0.9, "high": 0.91}, "no layer")]
)
def test_bad_settings_are_refused(settings, words):
    with pytest.raises(InvalidInputError, match=words):
        Deco(tiny.target("Llama"), Settings(**settings))


def test_hallucination_by_hand():
    scenes = [captions.Scene((0, 3), (0, -1, 3, -1, -1)), captions.Scene((4,), (4,) + (-1,) * 4)]
    found = captions.Hallucination.of(scenes, [[2, 3, 5, 0], [6, 0]])  # names 0, 1, 3 and 4
    assert found == captions.Hallucination(1 / 4, 1 / 2, 1.0)


def test_scenes_have_the_habit_and_counterfactual_ones_break_it():
    rng = random.Random(0)
    even = [captions.scene(rng, habit=True) for _ in range(500)]
    pairs = [o + 1 in s.objects for s in even for o in s.objects if o % 2 == 0]
    assert sum(pairs) / len(pairs) > 0.8
    for one in (captions.counterfactual(rng) for _ in range(100)):
        assert any(o % 2 == 0 and o + 1 not in one.objects for o in one.objects)
        assert captions.named(one.caption) == list(one.objects)
        assert sorted(p for p in one.patches if p >= 0) == list(one.objects)


def test_the_claim_made_small():
    found = claim(Ruler(), "test")
    gates = {gate.name: gate for gate in found.gates}
    assert gates["idea off: CHAIR_i as greedy"].passed
