"""Policies: within the limit, and `auto` finds what pays."""

from dataclasses import replace
from typing import Any

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
from isthmus.decoding.tree import TokenTree
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
        seconds = self.policy.cost(step.tree.nodes * step.tree.batch)
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


def test_auto_without_drafters_or_room() -> None:
    context = Context(torch.tensor([[1]]), [1], [1], Law(), torch.Generator(), [0])
    assert Auto([], FREE).decide(context, Shape(9, 9, 9)) == (None, PLAIN)
    assert auto(FREE).decide(context, PLAIN) == (None, PLAIN)


def test_cost_interpolates_and_is_never_cheaper_for_more() -> None:
    cost = Cost({1: 1.0, 2: 0.9, 4: 3.0})
    assert cost(1) == 1.0 and cost(2) == 1.0 and cost(3) == 2.0 and cost(4) == 3.0
    assert cost(8) == 6.0
