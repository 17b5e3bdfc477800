"""PEARL: its two modes step by step, no token twice, and the law kept."""

from typing import Any

import pytest
import tiny
import torch

from isthmus.decoding.acceptance import Coupled, Lossless
from isthmus.decoding.cost import Cost
from isthmus.decoding.engine import Request, decode
from isthmus.decoding.law import Law
from isthmus.decoding.overlap import NoBonus, elapsed
from isthmus.decoding.policy import Fixed
from isthmus.decoding.stopping import Stopper
from isthmus.decoding.table import TableTarget
from isthmus.errors import InvalidInputError
from isthmus.systems.speculative.pearl import ARMS, Pearl, Settings
from isthmus.testing import check_drafter, check_policy, string_test

V, END = 5, 4
TARGET = TableTarget(V, seed=1, sharpness=1.2, end_token=END)
DRAFT = TableTarget(V, seed=2, sharpness=1.0)


class Chart(TableTarget):
    """Continues with the next number; a draft model errs at the given lengths.

    Args:
        wrong: Lengths of the prefix after which another token is the likeliest.
    """

    def __init__(self, wrong: tuple[int, ...] = ()) -> None:
        super().__init__(97)
        self.wrong = wrong

    def push(self, state: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return (state // 1000 + 1) * 1000 + tokens

    def logits(self, state: torch.Tensor) -> torch.Tensor:
        length, token = state // 1000, state % 1000
        wrong = torch.isin(length, torch.tensor(self.wrong, dtype=torch.int64)).long()
        return 20.0 * torch.nn.functional.one_hot((token + 1 + wrong) % 97, 97).double()


def steps(
    wrong: tuple[int, ...], settings: Settings, tokens: int
) -> tuple[list[tuple[int, int, int]], list[tuple[int, int]], list[int]]:
    """Clock entries, (accepted, emitted) of every round, and the text."""
    policy = Pearl(Chart(wrong), settings)
    request = Request(torch.tensor([0]), Stopper(max_new_tokens=tokens))
    rounds = decode(
        Chart(),
        [request],
        policy=policy,
        acceptance=policy.acceptance,
        law=Law(),
        generator=torch.Generator(),
    )
    for _ in rounds:
        pass
    shown = [(r.accepted, r.emitted) for r in request.result.rounds]
    return policy.window.rounds, shown, request.result.tokens


def test_the_modes_when_everything_is_accepted() -> None:
    """One token is pre-verified, then whole windows follow each other: no bonus, no gap."""
    clock, shown, text = steps((), Settings(window=3), 13)
    assert text == list(range(1, 14))
    assert [e for _, e in shown] == [1, 3, 3, 3, 3]
    assert clock[:4] == [(0, 3, 1), (0, 3, 3), (0, 3, 3), (0, 3, 3)]


def test_the_modes_when_a_token_is_rejected() -> None:
    """A rejection at n emits the target's token there and drops what was drafted ahead."""
    # prefix lengths: token k is predicted after k tokens, so the draft's token 4 is wrong
    clock, shown, text = steps((4,), Settings(window=3), 14)
    assert text == list(range(1, 15))
    # 1 | 2 3 4x -> two accepted and the target's 4 | back to pre-verify: 5 | 6 7 8 | 9 10 11 ...
    assert [e for _, e in shown][:5] == [1, 3, 1, 3, 3]
    assert clock[:4] == [(0, 3, 1), (0, 3, 3), (0, 3, 1), (0, 3, 3)]
    # the first token is wrong: the mode stays pre-verify
    clock, shown, _ = steps((1,), Settings(window=3), 9)
    assert [e for _, e in shown][:3] == [1, 1, 3] and [n for *_, n in clock][:3] == [1, 1, 3]


def test_the_ablations_step_by_step() -> None:
    clock, shown, _ = steps((), Settings(window=3, pre_verify=False), 12)
    assert [e for _, e in shown] == [3, 3, 3, 3] and clock[:2] == [(3, 3, 4), (0, 3, 4)]
    clock, shown, _ = steps((), Settings(window=3, post_verify=False), 12)
    # 1 is pre-verified; 2, 3 are tested alone, and a bonus follows, for nothing is drafted ahead
    assert [e for _, e in shown] == [1, 3, 1, 3, 1, 3] and clock[:2] == [(0, 3, 1), (0, 0, 3)]
    clock, shown, _ = steps((), Settings(window=3, pre_verify=False, post_verify=False), 12)
    assert [e for _, e in shown] == [4, 4, 4] and clock[0] == (3, 0, 4)


def test_the_clock() -> None:
    cost = Cost({1: 4.0, 5: 4.0})
    assert elapsed([(0, 3, 1), (0, 5, 3)], 1.0, cost) == 4.0 + 5.0
    assert elapsed([(3, 0, 4)], 1.0, cost) == 7.0
    assert elapsed([(0, 3, 1)], 1.0, cost, contention=1.0) == 7.0


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("window", [1, 3])
def test_joint_law(arm: str, window: int) -> None:
    policy = Pearl(DRAFT, Settings(window, ARMS[arm].pre_verify, ARMS[arm].post_verify))
    law = Law(temperature=0.8, top_p=0.9)
    result = string_test(
        policy, target=TARGET, law=law, acceptance=policy.acceptance, tokens=4, rows=700
    )
    assert result.p > 1e-4 and result.impossible == 0
    # alone in its window and never pre-verified, a token takes a round
    assert result.acceptance_length > 1.0 or (arm, window) == ("no pre-verify", 1)


def test_a_bonus_beside_the_continuation_is_seen() -> None:
    """Double emission: the bonus token is emitted and the draft ahead is kept all the same."""

    class Doubled(Pearl):
        def observe(self, step: Any, drafter: Any) -> None:
            window = self.window
            streams = list(window._stream)
            super().observe(step, drafter)
            for b, stream in enumerate(streams):
                row = step.context.row(b)
                dropped = window.ahead[b] and len(window._stream[b]) == 0 and len(stream) > 2
                if dropped and torch.equal(row[-2:-1], stream[:1]):
                    window._stream[b] = stream[1:]
                    window._laws[b] = [torch.softmax(torch.zeros(V), -1)] * len(stream[1:])

    policy = Doubled(DRAFT, Settings(window=3))
    result = string_test(
        policy, target=TARGET, law=Law(temperature=1.0), acceptance=Lossless(), tokens=4, rows=1500
    )
    assert result.p < 1e-4


@pytest.mark.parametrize(
    "law", [Law(temperature=0.9), Law(temperature=1.0, repetition_penalty=1.3)]
)
def test_coupled_answers_do_not_depend_on_the_arm(law: Law) -> None:
    def strings(policy: Any, rule: Any) -> list[list[int]]:
        requests = [
            Request(torch.tensor([0, b % V, 1]), Stopper(max_new_tokens=9 + b, end_tokens=[END]))
            for b in range(6)
        ]
        rounds = decode(
            TARGET,
            requests,
            policy=policy,
            acceptance=rule,
            law=law,
            generator=torch.Generator().manual_seed(0),
        )
        for _ in rounds:
            pass
        return [r.result.tokens for r in requests]

    want = strings(Fixed(), Coupled(5))
    for arm in ARMS.values():
        policy = Pearl(DRAFT, Settings(3, arm.pre_verify, arm.post_verify))
        assert strings(policy, NoBonus(policy.window, Coupled(5))) == want


@pytest.mark.parametrize("arm", ["pearl", "no pre-verify", "off"])
def test_contract(arm: str) -> None:
    model = TableTarget(11, seed=3, sharpness=1.5, order=2)
    settings = Settings(3, ARMS[arm].pre_verify, ARMS[arm].post_verify)
    check_policy(Pearl(model, settings), tokens=24)
    if arm == "pearl":
        check_drafter(lambda: Pearl(model, settings).window, shapes=(Pearl(model).shape,))


def test_the_mechanism_matters() -> None:
    """With a good draft model both in parallel beat drafting first and verifying then."""
    cost = Cost({1: 4.0})

    def time_of(settings: Settings) -> float:
        rounds, _, text = steps(tuple(range(7, 60, 9)), settings, 60)
        assert text == list(range(1, 61))
        return elapsed([(s, b, 1) for s, b, _ in rounds], 1.0, cost)

    times = {arm: time_of(Settings(4, s.pre_verify, s.post_verify)) for arm, s in ARMS.items()}
    assert times["pearl"] <= min(times.values()) and times["off"] > 1.3 * times["pearl"]


@pytest.mark.parametrize("name", ["Llama", "T5"])
def test_greedy_output_of_a_network(name: str) -> None:
    policy = Pearl(tiny.target(name, "float64", noise=0.3), Settings(window=3))
    got = tiny.generate(name, "float64", policy, 12, [0, 1, 2])
    for row, result in enumerate(got):
        want = tiny.reference(name, "float64", 12)[row]
        tiny.assert_same(name, "float64", row, result.tokens, want)
        assert result.lossless
    assert sum(r.stats.accepted for r in got) > 0


def test_for_model_and_bad_settings() -> None:
    model = tiny.facade("Llama", "float64")
    policy = Pearl.for_model(model)
    assert 1 <= policy.shape.nodes <= 100
    with pytest.raises(InvalidInputError, match="at least 1"):
        Pearl(DRAFT, Settings(window=0))

    class NoDraft:
        draft_model = None

    with pytest.raises(InvalidInputError, match="draft model"):
        Pearl.for_model(NoDraft())
