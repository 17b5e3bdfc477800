"""Sampled answers have the target's law, whoever drafts: joint strings against enumeration."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from test_acceptance import NoResidual
from test_law import LAWS

from isthmus import registry
from isthmus.decoding.acceptance import Coupled, Match, Rejection
from isthmus.decoding.drafters import ModelDrafter, PromptLookup
from isthmus.decoding.engine import Request, decode
from isthmus.decoding.law import Law
from isthmus.decoding.policy import Fixed
from isthmus.decoding.stopping import Stopper
from isthmus.decoding.table import TableTarget
from isthmus.decoding.tree import TokenTree, Topology
from isthmus.roles import Context, Policy, Shape, Step
from isthmus.testing import string_test

V, END = 5, 4
TARGET = TableTarget(V, seed=1, sharpness=1.2, end_token=END)
CHAIN, TREE = Shape(3, 3, 1), Shape(20, 2, 3)


def draft(**options: Any) -> ModelDrafter:
    return ModelDrafter(TableTarget(V, seed=2, sharpness=1.0), **options)


class Adversary:
    """Drafts with the target at hand: always wrong, always right, or in the worst order.

    Args:
        kind: ``"wrong"`` proposes the least likely token, ``"right"`` the most likely one,
            ``"reversed"`` all tokens, the least likely first.
    """

    name = "adversary"

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def begin(self, context: Context, target: Any, **inputs: Any) -> None:
        pass

    def propose(self, context: Context, shape: Shape) -> TokenTree:
        states = torch.zeros(context.batch, dtype=torch.int64)
        lengths = torch.tensor(context.lengths)
        for length in sorted(set(context.lengths)):
            rows = (lengths == length).nonzero()[:, 0]
            states[rows] = TARGET.state(context.ids[rows, :length])
        if self.kind == "reversed":
            order = TARGET.logits(states).argsort(-1)
            tokens = torch.cat([context.roots()[:, None], order, order[:, [1, 0]]], 1)
            return TokenTree(tokens, Topology.of([-1, *[0] * V, 1, 1]))
        drafted = []
        for _ in range(min(shape.depth, shape.nodes)):
            logits = TARGET.logits(states)
            token = logits.argmin(-1) if self.kind == "wrong" else logits.argmax(-1)
            drafted.append(token)
            states = TARGET.push(states, token)
        return TokenTree.chain(context.roots(), torch.stack(drafted, 1))

    def observe(self, step: Step) -> None:
        pass

    def select(self, rows: Sequence[int]) -> None:
        pass


def recycling() -> Policy:
    return Fixed(registry.load("token-recycling")(), Shape(12, 3, 3))


DRAFTERS: dict[str, Callable[[], Policy]] = {
    "none": Fixed,
    "chain": lambda: Fixed(draft(), CHAIN),
    "chain-unprocessed": lambda: Fixed(draft(process=False), CHAIN),
    "iid-tree": lambda: Fixed(draft(branching=(3, 2)), TREE),
    "without-tree": lambda: Fixed(draft(branching=(3, 2), draw="without"), TREE),
    "point-tree": lambda: Fixed(draft(branching=(3, 2), draw="point"), TREE),
    "prompt-lookup": lambda: Fixed(PromptLookup(), CHAIN),
    "token-recycling": recycling,
    "always-wrong": lambda: Fixed(Adversary("wrong"), CHAIN),
    "always-right": lambda: Fixed(Adversary("right"), CHAIN),
}
WARPERS = ["temperature", "top-k", "top-p", "min-p", "repetition", "custom"]


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("warper", WARPERS)
def test_joint_law(warper: str, drafter: str) -> None:
    law = Law(**LAWS[warper])
    # processors that read the prefix are called node by node
    rows = 800 if drafter == "token-recycling" or warper in ("repetition", "custom") else 2000
    result = string_test(DRAFTERS[drafter](), target=TARGET, law=law, rows=rows)
    assert result.impossible == 0
    assert result.p > 1e-4, result
    # what is never accepted tests nothing; stores find little in three tokens
    if drafter == "none" or drafter == "always-wrong":
        assert result.acceptance_length < 1.2
    elif drafter not in ("prompt-lookup", "token-recycling"):
        assert result.acceptance_length > 1.2


def test_worst_order_of_siblings() -> None:
    policy = Fixed(Adversary("reversed"), Shape(20, 2, 5))
    target = TableTarget(V, seed=1, sharpness=1.2)  # no end token: all rows have one length
    result = string_test(policy, target=target, law=Law(temperature=0.8), tokens=1, rows=3000)
    assert result.p > 1e-4 and result.impossible == 0


@pytest.mark.parametrize("draw", ["iid", "without"])
def test_a_draft_model_that_is_the_target(draw: Any) -> None:
    """p = q everywhere: every draft stands, and the residual is never a law."""
    policy = Fixed(ModelDrafter(TARGET, branching=(2, 1), draw=draw), TREE)
    result = string_test(policy, target=TARGET, law=Law(temperature=1.0), rows=3000)
    assert result.p > 1e-4 and result.impossible == 0
    assert result.acceptance_length > 2.0


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        (NoResidual(), {}),
        (NoResidual(), {"branching": (3, 2)}),
        (Rejection(renormalise=False), {"branching": (3, 2), "draw": "without"}),
    ],
    ids=["chain", "iid", "without"],
)
def test_broken_rules_are_seen(rule: Any, options: dict[str, Any]) -> None:
    result = string_test(
        Fixed(draft(**options), TREE),
        target=TARGET,
        law=Law(temperature=1.0),
        acceptance=rule,
        rows=4000,
    )
    assert result.p < 1e-4


class Picky(ModelDrafter):
    """Discards drawn tokens because of their value, which S6 of the theory forbids."""

    def propose(self, context: Context, shape: Shape) -> TokenTree:
        tree = super().propose(context, shape)
        if tree.q is None or tree.nodes == 1:
            return tree
        drawn = tree.q[:, 0].gather(1, tree.tokens[:, 1:2])
        keep = torch.ones_like(tree.tokens, dtype=torch.bool)
        keep[:, 1:] = drawn > 0.25
        return tree.prune(keep)


def test_discarding_drawn_tokens_by_value_is_seen() -> None:
    policy = Fixed(Picky(TARGET), CHAIN)
    result = string_test(policy, target=TARGET, law=Law(temperature=1.0), rows=4000)
    assert result.p < 1e-10


def test_stopping_after_a_drawn_token_by_value_is_fine() -> None:
    """Keep it, draw nothing below it: a decision that was made before the next draw."""

    class Careful(ModelDrafter):
        def propose(self, context: Context, shape: Shape) -> TokenTree:
            tree = super().propose(context, shape)
            if tree.q is None or tree.nodes < 3:
                return tree
            drawn = tree.q[:, 0].gather(1, tree.tokens[:, 1:2])
            keep = torch.ones_like(tree.tokens, dtype=torch.bool)
            keep[:, 2:] = drawn > 0.25
            return tree.prune(keep)

    policy = Fixed(Careful(TARGET), CHAIN)
    result = string_test(policy, target=TARGET, law=Law(temperature=1.0), rows=4000)
    assert result.p > 1e-4 and result.impossible == 0


def test_a_chosen_tree_verified_as_if_drawn_is_seen() -> None:
    """Top-k children handed over with q: not the law that they came from."""

    class Pretender(ModelDrafter):
        def propose(self, context: Context, shape: Shape) -> TokenTree:
            tree = super().propose(context, shape)
            top = tree.q[:, 0].topk(3).indices  # type: ignore[index]
            tokens = torch.cat([tree.tokens[:, :1], top], 1)
            q = tree.q[:, :1].expand(-1, 4, -1)  # type: ignore[index]
            return TokenTree(tokens, Topology.of([-1, 0, 0, 0]), None, "without", q)

    policy = Fixed(Pretender(TableTarget(V, seed=2)), TREE)
    result = string_test(policy, target=TARGET, law=Law(temperature=1.0), rows=3000)
    assert result.p < 1e-10
    honest = Fixed(draft(branching=(3,), draw="point"), Shape(3, 1, 3))
    law = Law(temperature=1.0)
    result = string_test(honest, target=TARGET, law=law, acceptance=Match(), rows=3000)
    assert result.p > 1e-4


@pytest.mark.parametrize("warper", ["temperature", "top-p", "custom"])
def test_coupled_strings_do_not_depend_on_the_drafter(warper: str) -> None:
    def strings(policy: Policy) -> list[list[int]]:
        requests = [
            Request(
                torch.tensor([0, 1, 2, b % V]), Stopper(max_new_tokens=12 + b, end_tokens=[END])
            )
            for b in range(12)
        ]
        rounds = decode(
            TARGET,
            requests,
            policy=policy,
            acceptance=Coupled(seed=5),
            law=Law(**LAWS[warper]),
            generator=torch.Generator().manual_seed(0),
        )
        for _ in rounds:
            pass
        return [r.result.tokens for r in requests]

    want = strings(Fixed())
    assert len({tuple(s) for s in want}) > 5
    for name in ("chain", "iid-tree", "point-tree", "prompt-lookup", "token-recycling"):
        assert strings(DRAFTERS[name]()) == want, name


def test_coupled_drafting_agrees_often() -> None:
    """The draft model takes part in the noise: at least (1 - TV) / (1 + TV) of its tokens stand."""
    close = ModelDrafter(TableTarget(V, seed=1, sharpness=1.0))  # the target, a little flatter
    request = Request(torch.tensor([0, 1]), Stopper(max_new_tokens=300))
    rounds = decode(
        TARGET,
        [request],
        policy=Fixed(close, CHAIN),
        acceptance=Coupled(seed=5),
        law=Law(temperature=1.0),
        generator=torch.Generator(),
    )
    for _ in rounds:
        pass
    assert request.result.stats.acceptance_length > 2.5


def test_truth_is_a_law() -> None:
    for name, options in LAWS.items():
        truth = TARGET.truth([0, 1, 2], 3, Law(**options))
        assert abs(sum(truth.values()) - 1.0) < 1e-12, name
        assert all(END not in answer[:-1] for answer in truth)
    open_ended = TableTarget(3, seed=4)
    assert len(open_ended.truth([0], 2, Law(temperature=1.0))) == 9
    assert len(open_ended.truth([0], 2, Law(temperature=1.0), end_token=0)) == 7
