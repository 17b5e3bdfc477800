import numpy as np
import pytest
import tiny
import torch
from scipy.optimize import curve_fit

from isthmus.claims import Ruler
from isthmus.decoding.model import Model
from isthmus.decoding.router import Margin
from isthmus.errors import InvalidInputError
from isthmus.laws.trends import saturation
from isthmus.metrics.classification import auroc
from isthmus.systems.decoding.fs_gen import FsGen, Settings, claim, closed, learnt, most

SMALL, LARGE = (Model(tiny.network("Llama", noise=n), fast=False) for n in (0.0, 0.5))
PROMPTS = [[5, 6, 7, 5, 6], [3, 4, 9, 9, 2]]


def alone(model, new=9):
    answers = model.generate(PROMPTS, max_new_tokens=new, drafter="none", ignore_end=True)
    return torch.tensor([a.tokens for a in answers])


def test_with_itself_there_is_nothing_to_change():
    trace = FsGen(SMALL, SMALL).write(PROMPTS, 9)
    assert trace.frequency == 0.0 and torch.equal(trace.tokens, alone(SMALL))


def test_never_is_the_small_model_and_always_the_large_one():
    off = FsGen(SMALL, LARGE, Settings(consult=False)).write(PROMPTS, 9)
    assert torch.equal(off.tokens, alone(SMALL)) and off.frequency == 0.0
    assert not off.asked.any()
    on = FsGen(SMALL, LARGE).write(PROMPTS, 9)
    assert torch.equal(on.tokens, alone(LARGE)) and on.asked.all()


def test_the_record_is_that_of_fresh_forwards_along_the_fused_text():
    trace = FsGen(SMALL, LARGE, Settings(top=5)).write(PROMPTS, 9, Margin(0.002))
    assert 0 < trace.asked.float().mean() < 1
    for b, prompt in enumerate(PROMPTS):
        ids = torch.tensor(prompt)
        for t, token in enumerate(trace.tokens[b]):
            z, other = (m.target.forward(ids[None]).logits[0, -1] for m in (SMALL, LARGE))
            p = z.softmax(-1)
            best = p.topk(5).values
            torch.testing.assert_close(trace.top[b, t], best)
            assert float(trace.entropy[b, t]) == pytest.approx(-float((p * p.log()).sum()))
            unsure = bool(best[0] - best[1] < 0.002)
            assert bool(trace.asked[b, t]) == unsure
            assert int(trace.small[b, t]) == int(z.argmax())
            assert int(token) == int((other if unsure else z).argmax())
            ids = torch.cat([ids, token[None]])


def test_the_contrast_goes_from_the_large_model_away_from_the_small_one():
    exact = FsGen(SMALL, LARGE, Settings("contrastive", beta=1.0)).write(PROMPTS, 9)
    assert torch.equal(exact.tokens, alone(LARGE))
    trace = FsGen(SMALL, LARGE, Settings("contrastive", beta=3.0, alpha=0.01)).write(PROMPTS, 9)
    ids = torch.tensor(PROMPTS[0])
    for token in trace.tokens[0]:
        z, other = (m.target.forward(ids[None]).logits[0, -1] for m in (SMALL, LARGE))
        scores = z + 3.0 * (other - z)
        scores[other < other.max() + torch.tensor(0.01).log()] = -torch.inf
        assert int(token) == int(scores.argmax())
        ids = torch.cat([ids, token[None]])
    with pytest.raises(InvalidInputError, match="beta"):
        FsGen(SMALL, LARGE, Settings(beta=0.5))


def test_the_law_of_ratios_is_that_of_scipy():
    rng = np.random.default_rng(0)
    x = np.geomspace(1.3, 40, 12)
    planted = 0.45 - 0.3 * x**-0.7
    law = saturation(x.tolist(), planted.tolist())
    assert (law.a, law.gamma, law.b) == pytest.approx((0.3, 0.7, 0.45), abs=2e-3)
    assert law.r2 == pytest.approx(1.0) and law(2.0) == pytest.approx(
        0.45 - 0.3 * 2**-0.7, abs=1e-4
    )
    noisy = planted + rng.normal(0, 0.01, len(x))
    law = saturation(x.tolist(), noisy.tolist())
    (a, gamma, b), _ = curve_fit(
        lambda x, a, g, b: b - a * x**-g, x, noisy, p0=(0.3, 0.5, 0.4), bounds=(0.05, 20)
    )
    assert (law.a, law.gamma, law.b) == pytest.approx((a, gamma, b), abs=5e-3)


def test_auroc_is_a_share_of_pairs():
    generator = torch.Generator().manual_seed(1)
    scores = torch.randint(0, 5, (40,), generator=generator)
    yes = torch.rand(40, generator=generator) < 0.4
    pairs = [float(a > b) + 0.5 * float(a == b) for a in scores[yes] for b in scores[~yes]]
    assert auroc(scores, yes) == pytest.approx(sum(pairs) / len(pairs))
    assert np.isnan(auroc(scores, torch.ones(40, dtype=torch.bool)))


def test_the_gap_and_the_least_sure_part():
    assert most(torch.tensor([[0.1, 0.9], [0.5, 0.2]]), 0.5).tolist() == [
        [False, True],
        [True, False],
    ]
    small, large, truth = torch.tensor([1, 2, 3]), torch.tensor([4, 2, 5]), torch.tensor([4, 2, 3])
    assert closed(small, large, truth, torch.tensor([True, True, False])) == (1.0, 0.0)


def test_a_head_finds_what_the_top_probabilities_tell():
    trace = FsGen(SMALL, LARGE, Settings(top=5)).write(PROMPTS * 3, 12)
    assert 0.0 <= learnt(trace) <= 1.0


def test_the_claim_made_small():
    found = claim(Ruler(), "test")
    gates = {gate.name: gate for gate in found.gates}
    assert gates["idea off: collaboration frequency"].passed
    assert found.rows[-1].ours == 1.0
