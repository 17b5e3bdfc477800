import math

import pytest
import tiny
import torch
from scipy.stats import kendalltau

import isthmus
from isthmus.claims import Ruler
from isthmus.decoding.beam import BeamSearch
from isthmus.decoding.search import search
from isthmus.decoding.table import TableTarget
from isthmus.errors import InvalidInputError
from isthmus.roles import Hypothesis
from isthmus.systems.decoding.likelihood_utility import (
    Alignment,
    LikelihoodUtility,
    Settings,
    ValueRanker,
    claim,
    comments,
    kendall,
    noisy,
)


def hypothesis(tokens, logprob):
    return Hypothesis(tuple(tokens), logprob, logprob)


def test_kendall_is_that_of_scipy():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        a, b = torch.randint(0, 5, (2, 12), generator=generator).tolist()
        assert kendall(a, b) == pytest.approx(kendalltau(a, b).statistic)


def test_a_planted_agreement_is_found_within_inputs_and_not_across():
    # better answers are likelier within each input; across inputs it is the other way round
    rows = [[hypothesis([v], base + 0.1 * v) for v in range(4)] for base in (-1.0, -50.0, -100.0)]
    worth = [lambda tokens, more=10 * i: tokens[0] + more for i in range(3)]
    found = LikelihoodUtility.measure(rows, worth)
    assert found.taus == (1.0, 1.0, 1.0) and found.left_out == 0
    same = LikelihoodUtility.measure(rows, [lambda tokens: 1.0] * 3)
    assert same == Alignment((), (), 3) and same.median == 0


def test_advice_follows_the_agreement():
    study = LikelihoodUtility(None)
    high, none = Alignment((0.5,), (0.5,), 0), Alignment((0.0,), (0.0,), 0)
    assert study.advise(high, True) == "beam"
    assert study.advise(none, True) == "value-guided beam"
    assert study.advise(none, False) == "sample"


def best(study, prompt, length, value=None):
    return study.beam([prompt], length, value)[0][0].tokens


def test_without_a_say_of_the_value_it_is_beam_search():
    model = tiny.facade("Llama")
    prompt = tiny.prompts()[0].tolist()
    plain, off = LikelihoodUtility(model), LikelihoodUtility(model, Settings(share=0.0))
    assert best(off, prompt, 5, lambda t: t[0] / 100) == best(plain, prompt, 5)


@pytest.mark.parametrize("wanted", [(4, 0, 3), (1, 2, 2)])
def test_a_perfect_value_alone_finds_the_best_answer_of_a_small_tree(wanted):
    def value(tokens):
        return sum(a == b for a, b in zip(tokens, wanted, strict=False)) / 3

    target = TableTarget(5, seed=2, sharpness=2.0, order=2)
    beam = BeamSearch(5**3, ranker=ValueRanker(value, share=1.0))  # all texts of three tokens
    assert search(target, [torch.tensor([3, 1])], beam, max_new_tokens=3)[0][0].tokens == wanted


def test_noise_is_the_same_for_the_same_text_and_one_is_only_noise():
    value = noisy(lambda tokens: 0.25, 0.5)
    assert value([1, 2]) == value([1, 2]) != value([2, 1])
    pure = [noisy(lambda tokens: 1.0, 1.0)([i]) for i in range(400)]
    assert 0.45 < sum(pure) / 400 < 0.55 and all(0 <= p < 1 for p in pure)
    assert noisy(lambda tokens: 0.25, 0.0)([3]) == 0.25


def test_characters_in_comments_by_hand():
    model = isthmus.load()
    tokens = model.encode("x = 1  # one\ny\n").tolist()
    assert comments(model)(tokens) == pytest.approx(5 / 15)
    assert comments(model)([]) == 0


@pytest.mark.parametrize("settings", [Settings(share=1.5), Settings(width=0)])
def test_bad_settings_are_refused(settings):
    with pytest.raises(InvalidInputError, match="share must be"):
        LikelihoodUtility(None, settings)


def test_the_claim_made_small():
    found = claim(Ruler(), "test")
    gates = {gate.name: gate for gate in found.gates}
    assert gates["idea off: gain over the beam"].passed
    assert all(row.ours is None or math.isfinite(row.ours) for row in found.rows)
