"""Speculative sampling: the paper's formulas by hand, and the acceptance they predict."""

import itertools

import pytest
import torch

from isthmus.decoding.acceptance import Lossless
from isthmus.decoding.engine import Request, decode
from isthmus.decoding.law import Law
from isthmus.decoding.policy import Fixed
from isthmus.decoding.stopping import Stopper
from isthmus.decoding.table import TableTarget
from isthmus.errors import InvalidInputError
from isthmus.roles import Shape
from isthmus.systems.speculative.speculative_sampling import (
    Settings,
    SpeculativeSampling,
    acceptance_probability,
    arithmetic_factor,
    best_gamma,
    expected_tokens,
    walltime_factor,
)

TARGET = TableTarget(8, seed=1, sharpness=1.5, order=1)
DRAFT = TableTarget(8, seed=2, sharpness=1.0, order=1)


def answer(gamma: int, new: int = 2000, draft: TableTarget = DRAFT) -> Request:
    drafter = SpeculativeSampling(draft, Settings(num_draft_tokens=gamma))
    request = Request(torch.tensor([0]), Stopper(max_new_tokens=new))
    rounds = decode(
        TARGET,
        [request],
        policy=Fixed(drafter, drafter.default_shape),
        acceptance=Lossless(),
        law=Law(temperature=1.0),
        generator=torch.Generator().manual_seed(0),
    )
    for _ in rounds:
        pass
    return request


def test_first_level_acceptance_is_the_papers_beta() -> None:
    """Averaged over the states that were visited: the share is sum min(p, q), Theorem 3.5."""
    request = answer(1)
    law = [torch.softmax(t.logits(t.state(torch.arange(8)[:, None])), -1) for t in (TARGET, DRAFT)]
    beta = acceptance_probability(law[0], law[1])  # [V] by root token
    text = [0, *request.result.tokens]
    starts = [0, *itertools.accumulate(r.emitted for r in request.result.rounds)]
    rounds = [(r, text[s]) for r, s in zip(request.result.rounds, starts, strict=False) if r.nodes]
    want = sum(float(beta[root]) for _, root in rounds) / len(rounds)
    got = sum(r.accepted for r, _ in rounds) / len(rounds)
    assert abs(got - want) < 4 * (want * (1 - want) / len(rounds)) ** 0.5


def test_a_perfect_draft_model_gives_gamma_plus_one() -> None:
    request = answer(4, new=500, draft=TARGET)
    assert request.result.stats.acceptance_length == 5.0
    assert request.result.stats.target_forwards == 100


def test_gamma_zero_switches_the_method_off() -> None:
    request = answer(0, new=50)
    assert request.result.stats.target_forwards == 50 and request.result.stats.drafted == 0


def test_formulas() -> None:
    alpha, gamma = 0.7, 5
    # eq. 1 as the sum it came from: the i-th token is emitted when i - 1 drafts stood
    by_hand = sum(alpha**i for i in range(gamma + 1))
    assert expected_tokens(alpha, gamma) == pytest.approx(by_hand)
    assert walltime_factor(alpha, gamma, 0.1) == pytest.approx(by_hand / 1.5)
    assert arithmetic_factor(alpha, gamma, 0.2) == pytest.approx((0.2 * 5 + 6) / by_hand)
    assert best_gamma(0.05, 0.1) == 0, "no speed-up where alpha is below the cost"
    table = [walltime_factor(0.8, g, 0.05) for g in range(33)]
    assert best_gamma(0.8, 0.05) == table.index(max(table))


def test_expected_tokens_by_simulation() -> None:
    generator = torch.Generator().manual_seed(0)
    stands = torch.rand(20_000, 4, generator=generator) < 0.6
    emitted = stands.long().cumprod(1).sum(1) + 1
    assert float(emitted.double().mean()) == pytest.approx(expected_tokens(0.6, 4), abs=0.03)


@pytest.mark.parametrize("alpha", [-0.1, 1.1])
def test_bad_alpha(alpha: float) -> None:
    with pytest.raises(InvalidInputError, match="probability"):
        expected_tokens(alpha, 3)


def test_bad_gamma() -> None:
    with pytest.raises(InvalidInputError, match="num_draft_tokens"):
        SpeculativeSampling(DRAFT, Settings(num_draft_tokens=-1))
    assert SpeculativeSampling(DRAFT).default_shape == Shape(4, 4, 1)
