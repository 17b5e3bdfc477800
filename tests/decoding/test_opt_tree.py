"""OPT-Tree: the best of all trees, its threshold, and the static tree it is compared with."""

import itertools
import math
from typing import Any

import pytest
import tiny
import torch

from isthmus.decoding.acceptance import Lossless
from isthmus.decoding.cost import Cost
from isthmus.decoding.drafters import ModelDrafter
from isthmus.decoding.engine import Request, decode
from isthmus.decoding.law import Law
from isthmus.decoding.policy import Fixed
from isthmus.decoding.stopping import Stopper
from isthmus.decoding.table import TableTarget
from isthmus.decoding.tree import TokenTree
from isthmus.errors import InvalidInputError
from isthmus.roles import Context, Shape, Step
from isthmus.systems.speculative.opt_tree import (
    OptTree,
    Settings,
    binary,
    chain,
    gain_that_pays,
    template,
)
from isthmus.testing import check_drafter, string_test

V = 4
TARGET = TableTarget(V, seed=1, sharpness=1.5)
DRAFT = TableTarget(V, seed=1, sharpness=1.1)
PROMPT = (0, 1, 2)


def propose(drafter: ModelDrafter, shape: Shape, law: Law | None = None) -> TokenTree:
    """The first tree below a prompt."""
    context = Context(
        torch.tensor([PROMPT]), [3], [3], law or Law(), torch.Generator().manual_seed(0), [0]
    )
    drafter.begin(context, TARGET)
    return drafter.propose(context, shape)


def values(target: TableTarget, depth: int) -> dict[tuple[int, ...], float]:
    """Path probability of every path below the prompt."""
    out = {}
    for d in range(1, depth + 1):
        for path in itertools.product(range(V), repeat=d):
            ids = torch.tensor([[*PROMPT, *path]])
            laws = [
                torch.softmax(target.logits(target.state(ids[:, : 3 + i])), -1)[0] for i in range(d)
            ]
            out[path] = math.prod(float(laws[i][path[i]]) for i in range(d))
    return out


def paths_of(tree: TokenTree) -> set[tuple[int, ...]]:
    paths: list[tuple[int, ...]] = [()]
    for node, parent in enumerate(tree.topology.parents_list[1:], 1):
        paths.append((*paths[parent], int(tree.tokens[0, node])))
    return set(paths[1:])


def all_trees(nodes: int) -> Any:
    """Every ancestor-closed set of that many paths."""
    level: set[frozenset[tuple[int, ...]]] = {frozenset()}
    for _ in range(nodes):
        level = {
            tree | {(*parent, token)}
            for tree in level
            for parent in [(), *tree]
            for token in range(V)
            if (*parent, token) not in tree
        }
    return level


@pytest.mark.parametrize("nodes", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", [1, 2])
def test_the_best_of_all_trees(nodes: int, seed: int) -> None:
    draft = TableTarget(V, seed=seed, sharpness=1.2)
    value = values(draft, nodes)
    best = max(math.fsum(value[p] for p in tree) for tree in all_trees(nodes))
    drafter = OptTree(draft, Settings(nodes=nodes, gain=0.0))
    paths = paths_of(propose(drafter, Shape(nodes, nodes, nodes)))
    assert len(paths) == nodes and all(p[:-1] in paths for p in paths if len(p) > 1)
    assert math.fsum(value[p] for p in paths) == pytest.approx(best, abs=1e-9)
    assert drafter.expected == pytest.approx([best], abs=1e-6)


def test_five_nodes_by_the_largest_values() -> None:
    value = values(DRAFT, 4)
    want = sorted(value, key=lambda p: -value[p])[:5]
    assert paths_of(propose(OptTree(DRAFT, Settings(gain=0.0)), Shape(5, 5, 5))) == set(want)


def test_the_threshold_ends_the_tree() -> None:
    """A level is drafted only while the one before added more than the gain."""
    value = values(DRAFT, 4)
    by_depth = [
        math.fsum(sorted((v for p, v in value.items() if len(p) <= d), reverse=True)[:6])
        for d in range(5)
    ]
    for gain in (0.0, 0.05, 0.2, 0.4, 0.7):
        depth = 0
        while depth < 4:
            depth += 1
            if by_depth[depth] - by_depth[depth - 1] <= gain:
                break
        drafter = OptTree(DRAFT, Settings(nodes=6, gain=gain))
        propose(drafter, Shape(6, 4, 6))
        assert drafter.expected == pytest.approx([by_depth[depth]], abs=1e-6)


def test_contract_off_and_on() -> None:
    model = TableTarget(11, seed=4, sharpness=1.5, order=2)
    check_drafter(
        lambda: OptTree(model, Settings(nodes=12)), shapes=(Shape(6, 2, 3), Shape(4, 4, 1))
    )
    check_drafter(
        lambda: OptTree(model, Settings(nodes=12, adaptive=False)), shapes=(Shape(6, 2, 3),)
    )


class Uneven(TableTarget):
    """Sure of itself after some prefixes, at a loss after others."""

    def logits(self, state: torch.Tensor) -> torch.Tensor:
        return super().logits(state) * (0.5 + 1.5 * (state % 3 == 0).double())[..., None]


def test_the_mechanism_matters() -> None:
    """Where q = p, E is the expected number of accepted tokens, and no static tree reaches it."""
    model = Uneven(40, seed=1, sharpness=1.5)

    class Watched(OptTree):
        def propose(self, context: Context, shape: Shape) -> TokenTree:
            tree = super().propose(context, shape)
            promised.append(sum(self.expected) / context.batch)
            return tree

        def observe(self, step: Step) -> None:
            kept.append(sum(step.accepted) / step.tree.batch)
            super().observe(step)

    mean = {}
    for adaptive in (True, False):
        promised: list[float] = []
        kept: list[float] = []
        drafter = Watched(model, Settings(nodes=14, gain=0.0, adaptive=adaptive))
        requests = [Request(torch.tensor(PROMPT), Stopper(max_new_tokens=200)) for _ in range(100)]
        rounds = decode(
            model,
            requests,
            policy=Fixed(drafter, Shape(14, 14, 14)),
            acceptance=Lossless(),
            law=Law(temperature=1.0),
            generator=torch.Generator().manual_seed(0),
        )
        for _ in zip(range(25), rounds, strict=False):
            pass
        mean[adaptive] = sum(kept) / len(kept)
        if adaptive:
            assert mean[True] == pytest.approx(sum(promised) / len(promised), abs=0.08)
    assert mean[True] > 1.05 * mean[False] > 0.5


def test_sampling_keeps_the_law() -> None:
    target = TableTarget(5, seed=1, sharpness=1.2, end_token=4)
    drafter = OptTree(TableTarget(5, seed=2), Settings(nodes=6, gain=0.0))
    law = Law(temperature=0.8, top_p=0.9)
    result = string_test(Fixed(drafter, Shape(6, 3, 6)), target=target, law=law, rows=3000)
    assert result.p > 1e-4 and result.impossible == 0 and result.acceptance_length > 1.3


@pytest.mark.parametrize("name", ["Llama", "T5"])
def test_greedy_output_of_a_network(name: str) -> None:
    drafter = OptTree(tiny.target(name, "float64", noise=0.3), Settings(nodes=9, gain=0.1))
    got = tiny.generate(name, "float64", Fixed(drafter, drafter.default_shape), 12, [0, 1, 2])
    for row, result in enumerate(got):
        tiny.assert_same(
            name, "float64", row, result.tokens, tiny.reference(name, "float64", 12)[row]
        )
    assert sum(r.stats.accepted for r in got) > 0


def test_static_trees() -> None:
    assert chain(3).parents == (-1, 0, 1, 2)
    assert binary(14).topology.depth[0].bincount().tolist() == [1, 2, 4, 8]
    full, small = template(30), template(14)
    assert small.parents == full.parents[:15] and small.ranks == full.ranks[:15]
    tree = propose(OptTree(DRAFT, Settings(adaptive=False)), Shape(5, 5, 5))
    plan = template(5).limit(5, 5, 4)
    paths: list[tuple[int, ...]] = [()]
    for node, parent in enumerate(plan.parents[1:], 1):
        ids = torch.tensor([[*PROMPT, *paths[parent]]])
        order = DRAFT.logits(DRAFT.state(ids))[0].argsort(descending=True)
        paths.append((*paths[parent], int(order[plan.ranks[node]])))
    assert paths_of(tree) == set(paths[1:])


def test_what_a_level_must_pay() -> None:
    assert gain_that_pays(Cost({1: 1.0, 3: 2.0}), Cost({1: 8.0}), 2) == 0.1875


@pytest.mark.parametrize("bad", [{"nodes": 0}, {"depth": 0}, {"gain": -0.1}])
def test_bad_settings_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match="OPT-Tree needs"):
        OptTree(DRAFT, Settings(**bad))
