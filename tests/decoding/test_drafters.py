"""Drafters that are parts: the contract, its power, and what each must do by itself."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from isthmus.decoding.acceptance import Lossless
from isthmus.decoding.drafters import ModelDrafter, PromptLookup, Union
from isthmus.decoding.engine import Request, decode
from isthmus.decoding.law import Law
from isthmus.decoding.policy import Fixed
from isthmus.decoding.stopping import Stopper
from isthmus.decoding.table import TableTarget
from isthmus.decoding.tree import TokenTree, Topology
from isthmus.errors import InvalidInputError, MismatchError, UnsupportedModelError
from isthmus.roles import Context, Shape
from isthmus.systems.speculative.token_recycling import TokenRecycling
from isthmus.testing import check_drafter

TARGET = TableTarget(11, seed=3, sharpness=2.0, order=2)


def model() -> TableTarget:
    return TableTarget(11, seed=3, sharpness=1.6, order=2)


PARTS: dict[str, Callable[[], Any]] = {
    "prompt-lookup": PromptLookup,
    "chain": lambda: ModelDrafter(model()),
    "iid": lambda: ModelDrafter(model(), branching=(3, 2)),
    "without": lambda: ModelDrafter(model(), branching=(3, 2), draw="without"),
    "point": lambda: ModelDrafter(model(), branching=(3, 2), draw="point"),
}


@pytest.mark.parametrize("name", PARTS)
def test_contract(name: str) -> None:
    shapes = (Shape(4, 4, 1), Shape(2, 5, 1), Shape(7, 2, 3))
    check_drafter(PARTS[name], target=TARGET, shapes=shapes)


@pytest.mark.parametrize("draw", ["iid", "without"])
def test_contract_on_a_network(draw: Any) -> None:
    """A draft model with a real cache: rejected tokens must be forgotten, late ones fed."""
    check_drafter(
        lambda: ModelDrafter(tiny.target("Llama", noise=0.3), branching=(2, 2), draw=draw),
        target=tiny.target("Llama"),
        shapes=(Shape(3, 3, 1), Shape(6, 2, 2)),
    )


class Broken(ModelDrafter):
    """A drafter with one planted fault."""

    def __init__(self, fault: str) -> None:
        draw: Any = "without" if fault in ("siblings", "order") else "iid"
        super().__init__(model(), branching=(3, 2), draw=draw)
        self.fault = fault

    def propose(self, context: Context, shape: Shape) -> TokenTree:
        fault = self.fault
        if fault == "large":
            shape = Shape(shape.nodes + 1, shape.depth + 1, shape.width)
        if fault == "width":
            shape = Shape(shape.nodes, shape.depth, shape.width + 1)
        tree = super().propose(context, shape)
        tokens, q = tree.tokens.clone(), tree.q
        if fault == "root":
            tokens[:, 0] = (tokens[:, 0] + 1) % 11
        if fault == "vocabulary":
            tokens[:, -1] = 11
        if fault == "siblings" and tree.nodes > 2:
            tokens[:, 2] = tokens[:, 1]
        if fault == "sum" and q is not None:
            q = q * 1.01
        if fault == "support" and q is not None:
            q = q.clone()
            q[:, 0] = q[:, 0].scatter(1, tokens[:, 1:2], 0.0)
            q[:, 0] /= q[:, 0].sum(-1, keepdim=True)
        if fault == "law" and q is not None:
            q = torch.softmax(q.clamp(min=1e-9).log() * 0.6, -1) * (q > 0)
            q = q / q.sum(-1, keepdim=True).clamp(min=1e-9)
        if fault == "order" and tree.nodes > 2:
            tokens[:, 1:3] = tokens[:, 1:3].sort(1).values
        if fault == "seed" and not context.law.greedy:
            torch.rand(1, generator=context.generator)
            tokens[:, 1] = int(torch.randint(0, 11, (1,)))
        if fault == "context":
            context.ids[:, 0] = 0
        return TokenTree(tokens, tree.topology, tree.valid, tree.draw, q)


@pytest.mark.parametrize(
    "fault",
    [
        "large",
        "width",
        "root",
        "vocabulary",
        "siblings",
        "sum",
        "support",
        "law",
        "order",
        "seed",
        "context",
    ],
)
def test_the_contract_sees_planted_faults(fault: str) -> None:
    with pytest.raises(AssertionError):
        check_drafter(lambda: Broken(fault), target=TARGET, shapes=(Shape(4, 4, 1), Shape(7, 2, 3)))


def test_the_contract_sees_a_stale_cache() -> None:
    """Rejected tokens that stay in the draft model's cache shift all that follow."""

    class Stale(ModelDrafter):
        def observe(self, step: Any) -> None:
            self._start = list(step.context.lengths)

    with pytest.raises(AssertionError):
        check_drafter(lambda: Stale(model()), target=TARGET, shapes=(Shape(4, 4, 1),))


def length(drafter: Any, new: int = 80) -> float:
    """Acceptance length of one sampled answer of the table target with chains of four."""
    request = Request(torch.tensor([1, 2, 3]), Stopper(max_new_tokens=new))
    rounds = decode(
        TARGET,
        [request],
        policy=Fixed(drafter, Shape(4, 4, 1)),
        acceptance=Lossless(),
        law=Law(temperature=0.5),
        generator=torch.Generator().manual_seed(2),
    )
    for _ in rounds:
        pass
    return request.result.stats.acceptance_length


def test_a_draft_model_that_is_the_target_is_always_right() -> None:
    """Full acceptance in every round: the cache takes in its own last draft token too."""
    assert length(ModelDrafter(TARGET), new=81) == pytest.approx(81 / 17)


@pytest.mark.parametrize(
    ("ids", "n", "want"),
    [
        ([1, 2, 3, 1, 2], 3, [3, 1, 2]),
        ([1, 2, 9, 1, 2, 7, 1, 2], 1, [7]),  # the latest occurrence
        ([5, 1, 2, 3, 8, 1, 2, 4, 5, 1, 2], 2, [3, 8]),  # a longer suffix counts more
        ([1, 2, 3, 4], 3, []),
        ([4], 3, []),
        ([7, 7, 7], 3, [7]),
        ([1, 2, 1], 0, []),
    ],
)
def test_prompt_lookup(ids: list[int], n: int, want: list[int]) -> None:
    assert PromptLookup().continuation(np.array(ids), n).tolist() == want


def test_prompt_lookup_reads_the_source() -> None:
    """Where there is an encoder, its text is looked through too."""
    drafter = PromptLookup()
    context = Context(
        torch.tensor([[0, 8], [0, 5]]), [2, 2], [1, 1], Law(), torch.Generator(), [0, 1]
    )
    source = torch.tensor([[7, 8, 9, 6], [4, 5, 6, 3]])
    drafter.begin(context, TARGET, input_ids=source)
    tree = drafter.propose(context, Shape(2, 2, 1))
    assert tree.tokens.tolist() == [[8, 9, 6], [5, 6, 3]]
    drafter.select([1])
    context.ids, context.lengths = context.ids[1:], [2]
    assert drafter.propose(context, Shape(2, 2, 1)).tokens.tolist() == [[5, 6, 3]]


@pytest.mark.parametrize(("high", "low"), [(0, 0), (2, 3), (3, 0)])
def test_prompt_lookup_refuses_bad_sizes(high: int, low: int) -> None:
    with pytest.raises(InvalidInputError, match="min_ngram"):
        PromptLookup(high, low)


def test_a_recurrent_draft_model_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="recurrent state"):
        ModelDrafter(tiny.target("Mamba2"))


def test_another_vocabulary_is_refused() -> None:
    drafter = ModelDrafter(TableTarget(700))
    context = Context(torch.tensor([[1]]), [1], [1], Law(), torch.Generator(), [0])
    with pytest.raises(MismatchError, match="must share the target's vocabulary"):
        drafter.begin(context, TARGET)


@pytest.mark.parametrize("size", [9, 14])
def test_padding_rows_of_the_vocabulary_are_fitted(size: int) -> None:
    """Heads padded to another width: the ids that only one of them has are never drafted."""
    check_drafter(
        lambda: ModelDrafter(TableTarget(size, seed=4, order=1)),
        target=TARGET,
        shapes=(Shape(4, 4, 1),),
        prompts=((0, 1, 2, 0, 1), (3, 1)),
    )


@pytest.mark.parametrize("branching", [(), (0,), (2, -1)])
def test_bad_branching(branching: tuple[int, ...]) -> None:
    with pytest.raises(InvalidInputError, match="branching"):
        ModelDrafter(model(), branching=branching)


def test_a_draft_model_with_a_shorter_context_stops_in_time() -> None:
    short = TableTarget(11, seed=3, order=2, max_length=10)
    assert length(ModelDrafter(short), new=40) >= 1.0


def test_topology_of_the_draft() -> None:
    context = Context(torch.tensor([[1, 2]]), [2], [2], Law(), torch.Generator(), [0])
    drafter = ModelDrafter(model(), branching=(3, 2, 1))
    drafter.begin(context, TARGET)
    tree = drafter.propose(context, Shape(100, 3, 100))
    want = Topology.of([-1, 0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 5, 6, 7, 8, 9])
    assert torch.equal(tree.topology.parent, want.parent)


def test_a_union_keeps_the_contract_and_its_order() -> None:
    check_drafter(lambda: Union([PromptLookup(min_ngram=2), TokenRecycling()]))
    target = TableTarget(vocab_size=6, seed=3, order=1, sharpness=3.0)
    union = Union([PromptLookup(min_ngram=2), TokenRecycling()])
    ids = torch.tensor([[1, 2, 3, 4, 1, 2]])
    context = Context(ids, [6], [6], Law(), torch.Generator(), [0])
    union.begin(context, target)
    tree = union.propose(context, Shape(8, 4))
    assert tree.tokens[0, 1:5].tolist() == [3, 4, 1, 2]  # what followed "1 2" before
    chain = union.propose(context, Shape(2, 2, 1))
    assert chain.is_chain and chain.tokens[0].tolist() == [2, 3, 4]
