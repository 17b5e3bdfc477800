"""Policies: within the limit, and `auto` finds what pays."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from isthmus.decoding.acceptance import Lossless
from isthmus.decoding.cost import Cost
from isthmus.decoding.drafters import ModelDrafter, PromptLookup
from isthmus.decoding.engine import Request, decode
from isthmus.decoding.law import Law
from isthmus.decoding.policy import Auto, Fixed
from isthmus.decoding.stopping import Stopper
from isthmus.decoding.table import TableTarget
from isthmus.decoding.tree import TokenTree, stack
from isthmus.roles import PLAIN, Context, Shape, Step
from isthmus.testing import check_policy

TARGET = TableTarget(11, seed=3, sharpness=2.0, order=2)
FREE = Cost({1: 1.0, 64: 1.01})
DEAR = Cost({1: 1.0, 2: 2.0, 64: 64.0})


def auto(cost: Cost, **options: Any) -> Auto:
    return Auto([PromptLookup(), ModelDrafter(TARGET)], cost, **options)


@pytest.mark.parametrize("cost", [FREE, DEAR], ids=["free", "dear"])
def test_contract_of_auto(cost: Cost) -> None:
    check_policy(auto(cost, survey=5))


def test_contract_of_fixed() -> None:
    check_policy(Fixed())
    check_policy(Fixed(PromptLookup(), Shape(6, 6, 1)))
    check_policy(Fixed(ModelDrafter(TARGET, branching=(2, 2)), Shape(9, 3, 2)))


def test_the_contract_sees_planted_faults() -> None:
    class Greedy(Fixed):
        def decide(self, context: Context, limit: Shape) -> Any:
            return self.drafter, self.shape

    with pytest.raises(AssertionError, match="limit"):
        check_policy(Greedy(PromptLookup(), Shape(6, 6, 1)))

    class Deaf(Fixed):
        def select(self, rows: Any) -> None:
            pass

    with pytest.raises((AssertionError, ValueError, IndexError, RuntimeError)):
        check_policy(Deaf(ModelDrafter(TARGET), Shape(4, 4, 1)))


class Timed:
    """`auto` on a machine that takes exactly the seconds of its cost, and drafts for nothing."""

    def __init__(self, policy: Auto) -> None:
        self.policy = policy
        self.begin, self.decide, self.select = policy.begin, policy.decide, policy.select

    def observe(self, step: Step, drafter: Any) -> None:
        seconds = self.policy.costs.of(step.tree.batch)(step.tree.nodes)
        self.policy.observe(replace(step, draft_s=0.0, score_s=seconds), drafter)


def rounds_of(policy: Any, new: int = 120) -> Any:
    request = Request(torch.tensor([1, 2, 3]), Stopper(max_new_tokens=new))
    rounds = decode(
        TARGET,
        [request],
        policy=policy,
        acceptance=Lossless(),
        law=Law(temperature=0.7),
        generator=torch.Generator().manual_seed(0),
    )
    for _ in rounds:
        pass
    return request.result


def test_auto_finds_the_drafter_that_is_right() -> None:
    late = [r.drafter for r in rounds_of(Timed(auto(FREE)), 800).rounds[10:]]
    assert late.count("draft-model") > 0.7 * len(late)


def test_auto_drops_to_plain_decoding_when_drafting_does_not_pay() -> None:
    class Useless:
        name = "useless"

        def begin(self, *args: Any, **inputs: Any) -> None:
            pass

        def propose(self, context: Context, shape: Shape) -> TokenTree:
            token = TARGET.logits(TARGET.state(context.row(0)[None])).argmin(-1)
            return TokenTree.chain(context.roots(), token[:, None].expand(-1, shape.depth))

        observe = select = begin

    policy = Timed(Auto([Useless()], DEAR))
    names = [r.drafter for r in rounds_of(policy).rounds]
    assert names[10:].count("none") > 0.9 * len(names[10:])


class Clock:
    """Seconds that pass only when somebody says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Oracle:
    """Drafts what a greedy target will say, in some rows, for a price; elsewhere the opposite.

    Args:
        name: Name.
        right: Rows in which it is right.
        width: Children of a node; the right one comes last.
        clock: Moved on by ``price`` with every draft.
    """

    pure = True

    def __init__(
        self,
        name: str,
        right: tuple[int, ...],
        *,
        width: int = 1,
        clock: Clock | None = None,
        price: float = 0.0,
    ) -> None:
        self.name, self.right, self.width = name, right, width
        self.clock, self.price = clock, price
        self.observed = self.proposed = 0

    def begin(self, *args: Any, **inputs: Any) -> None:
        pass

    def observe(self, step: Step) -> None:
        self.observed += 1

    def select(self, rows: Any) -> None:
        pass

    def propose(self, context: Context, shape: Shape) -> TokenTree:
        self.proposed += 1
        if self.clock is not None:
            self.clock.now += self.price
        rows = []
        for b in range(context.batch):
            state = TARGET.state(context.row(b)[None])
            paths, line = [], []
            for _ in range(min(shape.depth, max(1, shape.nodes // self.width))):
                order = TARGET.logits(state)[0].argsort(descending=True)
                good = int(order[0] if context.requests[b] in self.right else order[-1])
                others = [int(t) for t in order[1 : min(self.width, shape.width)]]
                paths += [[*line, t] for t in (*others, good)]
                line.append(good)
                state = TARGET.push(state, torch.tensor([good]))
            rows.append(TokenTree.from_paths(int(context.row(b)[-1]), paths))
        return stack(rows).limit(nodes=shape.nodes, depth=shape.depth)


class Machine:
    """`auto` on a machine with its own clock: a forward takes what ``price`` says."""

    def __init__(self, policy: Auto, clock: Clock, price: Cost) -> None:
        self.policy, self.clock, self.price = policy, clock, price
        self.begin, self.select = policy.begin, policy.select
        self.asked: list[tuple[str, Shape]] = []

    def decide(self, context: Context, limit: Shape) -> Any:
        self.start = self.clock.now
        drafter, shape = self.policy.decide(context, limit)
        self.asked.append((drafter.name if drafter else "none", shape))
        return drafter, shape

    def observe(self, step: Step, drafter: Any) -> None:
        draft_s = self.clock.now - self.start
        score_s = self.price(step.tree.nodes * step.tree.batch)
        self.clock.now += score_s
        self.policy.observe(replace(step, draft_s=draft_s, score_s=score_s), drafter)


def machine(drafters: Any, price: Cost, clock: Clock, **options: Any) -> Machine:
    known = Cost(price.seconds)  # the policy learns on a copy of its own
    policy = Auto(drafters, known, clock=clock, sizes=(2, 4, 8), depth=8, **options)
    return Machine(policy, clock, price)


def answers(policy: Any, rows: int, new: int = 80, law: Law | None = None) -> list[Any]:
    prompts = ([1, 2, 3], [4, 5], [6, 7, 8], [9, 1])[:rows]
    requests = [Request(torch.tensor(p), Stopper(max_new_tokens=new)) for p in prompts]
    rounds = decode(
        TARGET,
        requests,
        policy=policy,
        acceptance=Lossless(),
        law=law or Law(),
        generator=torch.Generator().manual_seed(0),
    )
    for _ in rounds:
        pass
    return [r.result for r in requests]


STEP = Cost({1: 1.0, 2: 1.8, 16: 2.0, 64: 4.0})
"""A forward of two tokens costs much more than one of one, and more nodes little more."""


def test_each_row_of_a_batch_gets_the_drafter_that_suits_it() -> None:
    clock = Clock()
    price = Cost({1: 1.0, 64: 1.2, 256: 1.6})
    even, odd = Oracle("even", (0,)), Oracle("odd", (1,))
    run = machine([even, odd], price, clock, survey=4)
    results = answers(run, 2, 120)
    late = [name for name, _ in run.asked[12:]]
    assert late.count("even|odd") > 0.8 * len(late)
    plain = answers(Fixed(), 2, 120)
    assert [r.tokens for r in results] == [r.tokens for r in plain]
    alone = answers(Fixed(even, Shape(8, 8)), 2, 120)
    forwards, both = (max(r.stats.target_forwards for r in got) for got in (alone, results))
    assert forwards == 120 and both < 60, "one drafter leaves the other row to plain decoding"


def test_a_drafter_is_judged_without_a_forward_being_spent_on_it() -> None:
    clock = Clock()
    wrong = Oracle("wrong", ())
    run = machine([wrong], STEP, clock)
    answers(run, 1, 200)
    assert wrong.proposed > 3 and {name for name, _ in run.asked} == {"none"}
    right = Oracle("right", (0,))
    run = machine([right], STEP, clock)
    answers(run, 1, 200)
    names = [name for name, _ in run.asked]
    assert names[0] == "none" and names[20:].count("right") >= len(names[20:]) - 1


def test_a_chain_is_chosen_where_the_first_child_is_right_and_a_tree_where_it_is_not() -> None:
    price = Cost({1: 1.0, 2: 1.1, 4: 1.3, 8: 1.9, 16: 3.0, 64: 9.0})

    class First(Oracle):
        def propose(self, context: Context, shape: Shape) -> TokenTree:
            line = super().propose(context, Shape(shape.depth, shape.depth, 1))
            if shape.width == 1:
                return line.limit(nodes=shape.nodes)
            path = line.tokens[0, 1:].tolist()
            wrong = [(t + 1) % 11 for t in path]
            # breadth takes half of the nodes
            paths = [p for i, t in enumerate(wrong) for p in ([*path[: i + 1]], [*path[:i], t])]
            tree = TokenTree.from_paths(int(line.tokens[0, 0]), paths)
            return tree.limit(nodes=shape.nodes, depth=shape.depth)

    def widths(drafter: Any) -> list[int]:
        run = machine([drafter], price, Clock(), survey=4)
        answers(run, 1, 160)
        return [shape.width for name, shape in run.asked[20:] if name != "none"]

    chains = widths(First("first", (0,)))
    assert chains.count(1) > 0.8 * len(chains) > 0
    trees = widths(Oracle("last", (0,), width=2))
    assert trees.count(1) < 0.2 * len(trees)


def test_auto_is_never_clearly_slower_than_plain_decoding() -> None:
    for law in (Law(), Law(temperature=1.0)):
        clock = Clock()
        drafters = [
            Oracle("wrong", (), clock=clock, price=0.1),
            ModelDrafter(TableTarget(11, seed=9, sharpness=2.0, order=2)),
            PromptLookup(),
        ]
        results = answers(machine(drafters, STEP, clock), 1, 240, law)
        assert clock.now < 1.06 * sum(len(r.tokens) for r in results)


def test_lazy_drafters_rest_while_plain_decoding_wins() -> None:
    lazy, busy = Oracle("lazy", ()), Oracle("busy", ())
    lazy.lazy = True  # type: ignore[attr-defined]
    answers(machine([lazy, busy], STEP, Clock()), 1, 300)
    assert busy.observed == 300 and lazy.observed < 120


def test_what_was_learned_is_carried_on_greedy_and_sampled_apart() -> None:
    clock = Clock()
    run = machine([Oracle("right", (0,))], STEP, clock)
    answers(run, 1, 100)
    run.asked.clear()
    answers(run, 1, 30)
    assert run.asked[0][0] == "right", "the second call begins where the first one ended"
    run.asked.clear()
    answers(run, 1, 30, Law(temperature=1.0))
    assert run.asked[0][0] == "none", "sampled decoding has figures of its own"


def test_cost_keeps_its_order_when_a_small_forward_meets_a_busy_machine() -> None:
    cost = Cost({1: 1.0, 8: 1.2, 64: 4.0})
    for _ in range(50):
        cost.observe(1, 3.0)
    times = list(cost.seconds.values())
    assert times == sorted(times) and cost(1) == pytest.approx(3.0, rel=0.05)
    for _ in range(80):
        cost.observe(8, 1.0)
    assert cost(1) <= cost(8) == pytest.approx(1.0, rel=0.05)
    many = cost.many(np.array([1.0, 3.0, 8.0, 128.0]))
    assert many.tolist() == pytest.approx([cost(n) for n in (1, 3, 8, 128)])


def test_auto_without_drafters_or_room() -> None:
    context = Context(torch.tensor([[1]]), [1], [1], Law(), torch.Generator(), [0])
    assert Auto([], FREE).decide(context, Shape(9, 9, 9)) == (None, PLAIN)
    assert auto(FREE).decide(context, PLAIN) == (None, PLAIN)


def test_cost_interpolates_and_is_never_cheaper_for_more() -> None:
    cost = Cost({1: 1.0, 2: 0.9, 4: 3.0})
    assert cost(1) == 1.0 and cost(2) == 1.0 and cost(3) == 2.0 and cost(4) == 3.0
    assert cost(8) == 6.0
