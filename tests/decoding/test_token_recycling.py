"""Token recycling: its template, its table, and its mechanism switched off."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.decoding.acceptance import Lossless
from isthmus.decoding.engine import Request, decode
from isthmus.decoding.law import Law
from isthmus.decoding.policy import Fixed
from isthmus.decoding.stopping import Stopper
from isthmus.decoding.stores import EMPTY, AdjacencyStore
from isthmus.decoding.table import TableTarget
from isthmus.systems.speculative.token_recycling import (
    LEVEL_SIZES,
    Settings,
    TokenRecycling,
    template,
)

TARGET = TableTarget(50, seed=3, sharpness=3.0, order=1)


def length(drafter: TokenRecycling, prompt: list[int], new: int = 60) -> float:
    """Acceptance length of one greedy answer."""
    request = Request(torch.tensor(prompt), Stopper(max_new_tokens=new))
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
    return request.result.stats.acceptance_length


def test_level_sizes_are_the_papers() -> None:
    full = template(80)
    assert tuple(len(level) for level in full.levels) == LEVEL_SIZES
    assert sum(LEVEL_SIZES) == 80 and full.topology.max_depth == 6


@pytest.mark.parametrize("k", [1, 2, 5, 8])
@pytest.mark.parametrize("nodes", [1, 2, 3, 7, 16, 40, 80])
def test_template_invariants(nodes: int, k: int) -> None:
    t, full = template(nodes, k), template(80, k)
    n = len(t.parents)
    assert n <= nodes + 1 and t.parents[0] == -1
    assert all(0 <= t.parents[i] < i for i in range(1, n)), "parents come first"
    # the tree for a budget is a prefix of the tree for a larger one
    assert t.parents.tolist() == full.parents[:n].tolist()
    assert t.ranks.tolist() == full.ranks[:n].tolist()
    pairs = list(zip(t.parents.tolist(), t.ranks.tolist(), strict=True))[1:]
    assert len(set(pairs)) == len(pairs), "no successor is asked for twice"
    assert all(rank < k for _, rank in pairs)
    # with a successor of some rank all better ranked siblings are there
    assert all(rank == 0 or (parent, rank - 1) in pairs for parent, rank in pairs)
    assert sorted(i for level in t.levels for i in level.tolist()) == list(range(1, n))
    depth = t.topology.depth[0].tolist()
    for number, level in enumerate(t.levels):
        assert all(depth[i] == number + 1 for i in level.tolist())


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.floats(0, 1))
def test_fill_equals_a_slow_reference(seed: int, nodes: int, holes: float) -> None:
    rng = np.random.default_rng(seed)
    store = AdjacencyStore(20, 8)
    store.table[:] = rng.integers(0, 20, store.table.shape)
    store.table[rng.random(store.table.shape) < holes] = EMPTY
    plan = template(nodes)
    roots = rng.integers(0, 20, 3)
    got = store.fill(roots, plan.parents, plan.ranks, plan.levels)
    for b in range(3):
        want = [int(roots[b])]
        for i in range(1, len(plan.parents)):
            above = want[plan.parents[i]]
            want.append(EMPTY if above == EMPTY else int(store.table[above, plan.ranks[i]]))
        assert got[b].tolist() == want


def test_the_later_update_wins() -> None:
    store = AdjacencyStore(6, 2)
    store.update(np.array([1, 2, 1]), np.array([[0, 1], [2, 3], [4, 5]]))
    assert store.table[1].tolist() == [4, 5] and store.table[2].tolist() == [2, 3]
    logits = torch.zeros(2, 6)
    logits[0, 3], logits[1, 5] = 1.0, 2.0
    store.update_from_logits(torch.tensor([1, 1]), logits)
    assert store.table[1, 0] == 5


def test_a_cold_table_drafts_nothing_and_then_learns() -> None:
    drafter = TokenRecycling()
    assert length(drafter, [1], new=1) == 1.0
    assert drafter.store is not None
    known = (drafter.store.table[:, 0] != EMPTY).nonzero()[0].tolist()
    assert known == [1], "the one token that was scored"
    want = TARGET.logits(TARGET.state(torch.tensor([[1]])))[0].topk(8).indices.tolist()
    assert drafter.store.table[1].tolist() == want


def test_the_mechanism_matters() -> None:
    """On text that repeats, a table that learns drafts well; switched off, it stays random."""
    on = length(TokenRecycling(), [1], new=150)
    off_drafter = TokenRecycling(Settings(recycle=False))
    off = length(off_drafter, [1], new=150)
    assert on > 1.5 and off < on - 0.4
    before = off_drafter.store.table.copy()  # type: ignore[union-attr]
    length(off_drafter, [1])
    assert np.array_equal(before, off_drafter.store.table)  # type: ignore[union-attr]


def test_the_table_is_kept_only_when_asked() -> None:
    keeps, forgets = TokenRecycling(Settings(keep=True)), TokenRecycling()
    cold = length(keeps, [1])
    length(keeps, [2], new=200)
    assert length(keeps, [1]) > cold
    assert length(forgets, [1]) == cold
    length(forgets, [2], new=200)
    assert length(forgets, [1]) == cold


def test_prefill_update_fills_the_prompts_rows() -> None:
    drafter = TokenRecycling(Settings(prefill_update=True))
    prompt = [3, 9, 4, 7, 3, 8]
    length(drafter, prompt, new=1)
    known = (drafter.store.table[:, 0] != EMPTY).nonzero()[0].tolist()  # type: ignore[union-attr]
    assert set(prompt) <= set(known)


def test_a_table_for_another_vocabulary_is_not_kept() -> None:
    drafter = TokenRecycling(Settings(keep=True))
    length(drafter, [1])
    other = TableTarget(9)
    request = Request(torch.tensor([1]), Stopper(max_new_tokens=5))
    for _ in decode(
        other,
        [request],
        policy=Fixed(drafter, drafter.default_shape),
        acceptance=Lossless(),
        law=Law(),
        generator=torch.Generator(),
    ):
        pass
    assert len(drafter.store.table) == 9  # type: ignore[union-attr]
