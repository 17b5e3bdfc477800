"""SmartSpec: the best length by hand, the simulator's books, and the policy in the engine."""

import numpy as np
import pytest
import torch

from isthmus.decoding.acceptance import Lossless
from isthmus.decoding.cost import Machine
from isthmus.decoding.drafters import ModelDrafter
from isthmus.decoding.engine import Request, decode
from isthmus.decoding.goodput import Fit, Means, expected_tokens
from isthmus.decoding.law import Law
from isthmus.decoding.policy import Cut, Fixed
from isthmus.decoding.serving_simulator import Always, Load, poisson_load, simulate
from isthmus.decoding.stopping import Stopper
from isthmus.decoding.table import TableTarget
from isthmus.errors import InvalidInputError
from isthmus.roles import Context, Shape
from isthmus.systems.speculative.smartspec import (
    Goodput,
    Settings,
    Smartspec,
    common_length,
    own_lengths,
)
from isthmus.testing import check_policy
from isthmus.testing.statistics import string_test

TARGET = TableTarget(11, seed=3, sharpness=2.0, order=2)
ROOMY = Machine((0.0, 0.01, 1.0), (0.0, 0.0, 0.05))
BUSY = Machine((0.0, 1.0, 0.0), (0.0, 0.0, 0.05))


def test_expected_tokens_is_the_sum_of_its_chances() -> None:
    for a in (0.0, 0.3, 0.9, 1.0):
        for k in (0, 1, 5):
            assert expected_tokens(a, k) == pytest.approx(1 + sum(a**i for i in range(1, k + 1)))
    with pytest.raises(InvalidInputError, match="0 and 1"):
        expected_tokens(1.2, 3)
    with pytest.raises(InvalidInputError, match="0 tokens or more"):
        expected_tokens(0.5, -1)


@pytest.mark.parametrize("rate", [0.2, 0.6, 0.85])
@pytest.mark.parametrize("rows", [1, 7])
def test_the_common_length_is_the_argmax_by_hand(rate: float, rows: int) -> None:
    machine = Machine((1e-5, 0.02, 0.5), (1e-6, 0.001, 0.04))
    context = 100.0 * rows

    def goodput(k: int) -> float:
        tokens = rows * (1 - rate ** (k + 1)) / (1 - rate)
        draft = 1e-6 * context * k + 0.001 * rows * k + 0.04 * k
        return tokens / (draft + 1e-5 * context + 0.02 * rows * (k + 1) + 0.5)

    best = max(range(9), key=goodput)
    assert common_length(np.full(rows, rate), machine, context, 8) == best
    assert common_length(np.full(rows, rate), BUSY, context, 8) == 0


def test_own_lengths_equal_an_exhaustive_search() -> None:
    machine = Machine((0.0, 0.12, 1.0), (0.0, 0.01, 0.02))
    rates = np.array([0.9, 0.3, 0.6])

    def goodput(lengths: np.ndarray) -> float:
        tokens = expected_tokens(rates, lengths).sum()
        seconds = machine.draft_s(0, lengths) + machine.score_s(0, 3 + lengths.sum())
        return float(tokens / seconds)

    every = [np.array(k) for k in np.ndindex(5, 5, 5)]
    found = own_lengths(rates, machine, 0, 4)
    assert goodput(found) == pytest.approx(max(goodput(k) for k in every), rel=0.02)
    assert found[0] > found[2] >= found[1]


def test_rates_count_what_was_tried_and_start_from_the_average() -> None:
    goodput = Goodput(ROOMY)
    goodput.join(2)
    start = goodput.rates.estimate()[0]
    for _ in range(60):
        # the first request: all 3 stand, nothing fell; the second: the first one fell
        goodput.observe(np.array([3, 3]), np.array([3, 0]))
    high, low = goodput.rates.estimate()
    assert high > 0.95 and low < 0.1 < start
    goodput.join(1)
    assert low < goodput.rates.estimate()[2] < high, "a new request begins with the average"


def test_it_looks_again_after_drafting_nothing() -> None:
    goodput = Goodput(BUSY, Settings(explore=5))
    goodput.join(3)
    sums = [int(goodput.lengths(0.0, 3, 8).sum()) for _ in range(10)]
    assert sums == [0, 0, 0, 0, 1, 0, 0, 0, 0, 1]


def test_switched_off_it_drafts_the_same_at_any_load() -> None:
    for machine in (BUSY, ROOMY):
        goodput = Goodput(machine, Settings(adapt=False))
        goodput.join(2)
        assert goodput.lengths(0.0, 2, 8).tolist() == [5, 5]


@pytest.mark.parametrize("arm", [Always(0), Always(3), Goodput(ROOMY)], ids=["0", "3", "goodput"])
def test_the_simulator_loses_no_token_and_no_second(arm: Always | Goodput) -> None:
    load = poisson_load(80, 0.05, rates=[0.3, 0.8], output=20, seed=1)
    served = simulate(load, ROOMY, arm, places=4)
    assert served.tokens == load.outputs.sum()
    assert served.busy_s + served.idle_s == pytest.approx(served.finish_s)
    assert (served.latency_s > 0).all()
    if isinstance(arm, Always) and arm.length == 0:
        assert served.drafted == 0


def test_the_simulator_by_hand() -> None:
    """One request of 5 tokens, all drafts stand but the third: rounds of 3 and 2 tokens."""
    stands = np.ones((1, 6), dtype=bool)
    stands[0, 2] = False
    load = Load(np.array([2.0]), np.array([10]), np.array([5]), stands)
    served = simulate(load, Machine((0.0, 0.0, 1.0), (0.0, 0.0, 0.1)), Always(4), places=1)
    # prefill 1; then 4 drafts and a forward emit 3; then 1 draft (2 are left) and a forward
    assert served.steps == 2 and served.drafted == 5 and served.idle_s == 2.0
    assert served.latency_s[0] == pytest.approx(1.0 + 1.4 + 1.1)


def test_all_arms_meet_the_same_luck_and_goodput_is_never_far_from_the_best() -> None:
    machine = Machine((0.0, 0.02, 0.4), (0.0, 0.0, 0.02))
    for rho in (0.2, 1.2):
        full = 32 / machine.score_s(0, 32)
        load = poisson_load(200, rho * full / 40, rates=[0.6], output=40)
        arms = [simulate(load, machine, Always(k), places=32).mean_latency_s() for k in (0, 1, 5)]
        ours = simulate(load, machine, Goodput(machine), places=32).mean_latency_s()
        assert ours <= 1.06 * min(arms)
        assert max(arms) > 1.15 * ours, "no fixed length suits both loads"


def test_contract() -> None:
    check_policy(Smartspec())
    for per_request in (False, True):
        settings = Settings(per_request=per_request)
        check_policy(Smartspec(ModelDrafter(TARGET), settings, ROOMY))


@pytest.mark.parametrize("per_request", [False, True])
def test_lossless(per_request: bool) -> None:
    truth, guess = TableTarget(5, seed=1), TableTarget(5, seed=2)
    policy = Smartspec(ModelDrafter(guess), Settings(per_request=per_request), ROOMY)
    test = string_test(policy, target=truth, law=Law(temperature=0.8, top_p=0.9), rows=3000)
    assert test.p > 1e-4 and test.impossible == 0


def test_cut_gives_every_row_its_length() -> None:
    cut = Cut(ModelDrafter(TARGET))
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    context = Context(ids, [3, 3], [3, 3], Law(), torch.Generator(), [0, 1])
    cut.begin(context, TARGET)
    cut.lengths = np.array([3, 1])
    tree = cut.propose(context, Shape(3, 3, 1))
    assert tree.drafted() == [3, 1]


def test_in_the_engine_a_busy_machine_drafts_next_to_nothing() -> None:
    class Timed:
        """The engine on a machine that takes exactly the seconds of its coefficients."""

        def __init__(self, machine: Machine) -> None:
            self.machine = machine
            self.inner = Smartspec(ModelDrafter(TARGET), None, machine)
            self.begin, self.select = self.inner.begin, self.inner.select
            self.decide = self.inner.decide

        def observe(self, step, drafter) -> None:  # type: ignore[no-untyped-def]
            from dataclasses import replace

            batched = step.tree.nodes * step.tree.batch
            seconds = self.machine.score_s(0, batched)
            self.inner.observe(replace(step, draft_s=0.0, score_s=seconds), drafter)

    def drafted(machine: Machine) -> int:
        request = Request(torch.tensor([1, 2, 3]), Stopper(max_new_tokens=120))
        for _ in decode(
            TARGET,
            [request],
            policy=Timed(machine),
            acceptance=Lossless(),
            law=Law(temperature=0.7),
            generator=torch.Generator().manual_seed(0),
        ):
            pass
        return request.result.stats.drafted

    # a draft model that is the target itself: everything stands, and only the price differs
    assert drafted(Machine((0.0, 0.001, 1.0))) > 90
    assert drafted(Machine((0.0, 3.0, 0.001))) < 15


def test_means_and_fit_recover_what_is_planted() -> None:
    means = Means(np.zeros(2), weight=1.0)
    means.begin(1)
    for _ in range(200):
        means.observe([[2.0, 7.0]], [[1.0, 0.0]])
    assert means.estimate()[0] == pytest.approx([2.0, 0.0], abs=0.1)
    assert means.prior == pytest.approx([2.0, 0.0], abs=0.1)
    fit, rng = Fit([0.0, 0.0, 0.0]), np.random.default_rng(0)
    for _ in range(300):
        x = [rng.uniform(0, 500), rng.integers(1, 50), 1.0]
        fit.observe(x, 2e-5 * x[0] + 1e-3 * x[1] + 0.01)
    assert fit.coefficients == pytest.approx([2e-5, 1e-3, 0.01], rel=0.02)
    with pytest.raises(InvalidInputError, match="0 or more"):
        Machine((-1.0, 0.0, 1.0))
    with pytest.raises(InvalidInputError, match="acceptance rates"):
        poisson_load(5, 1.0, rates=[1.5])
    with pytest.raises(InvalidInputError, match="num_draft_tokens"):
        Settings(num_draft_tokens=-1)
    assert isinstance(Fixed().drafter, type(None))
