import dataclasses
import math
from itertools import product

import pytest
import torch

from isthmus.claims import Ruler, Status
from isthmus.errors import InvalidInputError
from isthmus.models.pattern_lm import PatternLM
from isthmus.systems.codecs import stack_and_delay
from isthmus.systems.codecs.stack_and_delay import OFF, Settings, StackAndDelay, claim
from isthmus.workbench.level_codes import LevelLaw, bits, least_nats, taught


def test_bad_settings():
    for wrong in ({"order": "heap"}, {"delay": 0}, {"stride": 0}):
        with pytest.raises(InvalidInputError, match="stack-and-delay needs"):
            StackAndDelay(dataclasses.replace(Settings(), **wrong))
    with pytest.raises(InvalidInputError, match="1 or more"):
        StackAndDelay().write(PatternLM(2, 4, 8, 1, 2), 0, 3, seed=0)


def test_codes_of_one_step_are_far_apart_and_not_with_the_idea_off():
    made = {}
    for settings in (Settings(), OFF):
        pattern = StackAndDelay(settings).pattern(4, 48)
        step = pattern.step[pattern.row_of]
        times = [(step == s).nonzero()[:, 1] for s in range(pattern.steps)]
        made[settings] = min(int(t.sort().values.diff().min()) for t in times if len(t) > 1)
    assert made == {Settings(): 9, OFF: 1}  # d times the stride


def test_draws_follow_the_model():
    """A model without layers to speak of has the law of its offsets."""
    model = PatternLM(2, 3, 8, 1, 2)
    torch.nn.init.zeros_(model.head)
    p = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])
    model.offset.data = p.log()
    made = StackAndDelay(Settings(delay=1, stride=2)).write(model, 500, 8, seed=3)
    share = torch.nn.functional.one_hot(made, 3).float().mean((0, 2))
    assert torch.allclose(share, p, atol=0.03)
    assert torch.equal(made, StackAndDelay(Settings("flat")).write(model, 500, 8, seed=3))


def test_the_law_is_a_law_and_its_draws_follow_it():
    law = LevelLaw(2, 2, strength=1.5, seed=4)
    every = torch.tensor(list(product(range(2), repeat=4))).view(16, 2, 2)
    p = (-law.nats(every).sum((1, 2))).exp()
    assert float(p.sum()) == pytest.approx(1, abs=1e-5)
    drawn = law.draw(20_000, 2, seed=5).flatten(1)
    share = torch.bincount((drawn * torch.tensor([8, 4, 2, 1])).sum(1), minlength=16) / 20_000
    assert torch.allclose(share, p, atol=0.015)


@pytest.mark.parametrize("order", ["flat", "parallel", "delay", "stack", "stack-delay"])
def test_the_least_cost_of_an_order_by_counting_all_matrices(order):
    law = LevelLaw(3, 2, strength=1.5, seed=4)
    pattern = StackAndDelay(Settings(order, delay=1, stride=2)).pattern(3, 3)
    every = torch.tensor(list(product(range(2), repeat=9))).view(-1, 3, 3)
    p = (-law.nats(every).double().sum((1, 2))).exp()
    codes, shown = law.draw(3, 3, seed=1), pattern.visible().view(3, 3, 3, 3)
    found = least_nats(law, codes, pattern)
    for b, k, t in product(range(3), repeat=3):
        fits = (every == codes[b])[:, shown[k, t]].all(1)
        same = fits & (every[:, k, t] == codes[b, k, t])
        assert float((-found[b, k, t]).exp()) == pytest.approx(float(p[same].sum() / p[fits].sum()))


def test_stack_delay_can_cost_what_flat_does_and_delay_cannot():
    law = LevelLaw(3, 4)
    codes = law.draw(40, 15, seed=1)
    flat, late, ours = (
        float(least_nats(law, codes, StackAndDelay(Settings(o)).pattern(3, 15)).mean())
        for o in ("flat", "delay", "stack-delay")
    )
    assert ours == pytest.approx(flat, rel=1e-3)
    assert late > 1.05 * flat


def test_a_model_learns_the_law_down_to_its_entropy():
    law = LevelLaw(2, 3, strength=2.0, seed=1)
    held = law.draw(60, 8, seed=3)
    pattern = StackAndDelay(Settings("flat")).pattern(2, 8)
    model = taught(pattern, law.draw(800, 8, seed=2), 3, steps=120, width=32, layers=2)
    least = float(law.nats(held).sum((1, 2)).mean()) / math.log(2)
    found = float(bits(model, pattern, held).mean())
    assert 0.97 * least < found < 1.12 * least < 0.9 * 16 * math.log2(3)


def test_the_claim_at_the_scale_test(monkeypatch):
    found = claim(Ruler(), "test")
    gates = {gate.name: gate for gate in found.gates}
    assert gates["orders that are exact for 2 to 8 levels"].passed
    assert len(found.rows) == 6
    monkeypatch.setitem(stack_and_delay.ARMS, "flat", Settings("delay"))
    assert not stack_and_delay._exact(2, 12)
    assert found.status in list(Status)
