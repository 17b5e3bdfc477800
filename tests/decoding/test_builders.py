"""Tree builders: against brute force over all trees, and their invariants."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.decoding.builders import (
    Growth,
    Level,
    RankTree,
    beam_trie,
    best_first,
    calibrate,
)
from isthmus.decoding.tree import TokenTree
from isthmus.errors import InvalidInputError

V = 4


def law(path: tuple[int, ...], seed: int) -> torch.Tensor:
    """Log-probabilities [V] after a path: another law for every path."""
    generator = torch.Generator().manual_seed(hash((seed, *path)) % 2**31)
    return torch.randn(V, generator=generator, dtype=torch.float64).mul(1.5).log_softmax(-1)


class Paths:
    """Expands a frontier while following the token path of each of its nodes, row by row."""

    def __init__(self, rows: int, seed: int) -> None:
        self.rows, self.seed, self.calls = rows, seed, 0
        self.paths: list[list[tuple[int, ...]]] = [[()] for _ in range(rows)]

    def __call__(self, level: Level) -> torch.Tensor:
        self.calls += 1
        if level.depth:
            links, tokens = level.parent.tolist(), level.tokens.tolist()
            self.paths = [
                [(*self.paths[b][p], t) for p, t in zip(links[b], tokens[b], strict=True)]
                for b in range(self.rows)
            ]
        return torch.stack(
            [torch.stack([law(p, self.seed + b) for p in self.paths[b]]) for b in range(self.rows)]
        )


def scored(tree: TokenTree, b: int, seed: int) -> dict[tuple[int, ...], float]:
    """Token paths of the valid nodes of a row, with their probabilities, in node order."""
    one = tree.row(b)
    paths: list[tuple[int, ...]] = [()]
    out = {}
    for node, parent in enumerate(one.topology.parents_list):
        if node == 0:
            continue
        path = (*paths[parent], int(one.tokens[0, node]))
        paths.append(path)
        if one.alive[0, node]:
            steps = [float(law(path[:i], seed)[path[i]]) for i in range(len(path))]
            out[path] = math.exp(sum(steps))
    return out


def best_by_brute_force(nodes: int, depth: int, seed: int) -> float:
    """The largest sum of path probabilities over all trees of a size."""
    paths = [p for d in range(1, depth + 1) for p in itertools.product(range(V), repeat=d)]
    value = {p: math.exp(sum(float(law(p[:i], seed)[p[i]]) for i in range(len(p)))) for p in paths}
    best = 0.0
    stack: list[tuple[frozenset[tuple[int, ...]], float]] = [(frozenset(), 0.0)]
    seen = set()
    while stack:
        tree, total = stack.pop()
        best = max(best, total)
        if len(tree) == nodes:
            continue
        for parent in [(), *tree]:
            for token in range(V):
                child = (*parent, token)
                larger = tree | {child}
                if len(child) <= depth and child not in tree and larger not in seen:
                    seen.add(larger)
                    stack.append((larger, total + value[child]))
    return best


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("nodes", [1, 2, 3, 4])
def test_best_first_is_the_best_of_all_trees(nodes: int, seed: int) -> None:
    tree = best_first(Paths(1, seed), torch.tensor([0]), nodes=nodes, depth=4, branch=nodes)
    assert tree.nodes == nodes + 1
    ours = sum(scored(tree, 0, seed).values())
    assert ours == pytest.approx(best_by_brute_force(nodes, 4, seed), abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 12), st.integers(1, 5),
    st.integers(1, 4), st.one_of(st.none(), st.integers(1, 4)),
)  # fmt: skip
def test_best_first_invariants(
    seed: int, rows: int, nodes: int, depth: int, branch: int, keep: int | None
) -> None:
    roots = torch.arange(rows)
    tree = best_first(Paths(rows, seed), roots, nodes=nodes, depth=depth, branch=branch, keep=keep)
    assert tree.draw == "point" and tree.q is None
    assert tree.tokens[:, 0].tolist() == roots.tolist()
    assert tree.topology.max_depth <= depth
    for b in range(rows):
        value = scored(tree, b, seed + b)
        assert len(value) == tree.drafted()[b] <= nodes
        # best first, so every prefix of the nodes is the best smaller tree, and a tree
        probs = list(value.values())
        assert all(a >= z - 1e-12 for a, z in itertools.pairwise(probs))
        assert all(p[:-1] in value for p in value if len(p) > 1), "closed under ancestors"
        widths: dict[tuple[int, ...], int] = {}
        for p in value:
            widths[p[:-1]] = widths.get(p[:-1], 0) + 1
        assert max(widths.values()) <= branch
        if keep is not None:
            for level in range(1, depth):
                inner = {p[:-1] for p in value if len(p) == level + 1}
                assert len(inner) <= keep
        # a row among others grows as it does alone
        alone = best_first(
            Paths(1, seed + b), roots[b : b + 1], nodes=nodes, depth=depth, branch=branch, keep=keep
        )
        assert scored(alone, 0, seed + b) == pytest.approx(value)


def test_nothing_is_lost_by_expanding_only_what_is_still_in_the_store() -> None:
    """The same tree as when the whole of every level is expanded."""
    for seed in range(5):
        nodes, depth = 7, 4
        tree = best_first(Paths(1, seed), torch.tensor([0]), nodes=nodes, depth=depth, branch=V)
        paths = [p for d in range(1, depth + 1) for p in itertools.product(range(V), repeat=d)]
        value = {p: math.exp(sum(float(law(p[:i], seed)[p[i]]) for i in range(len(p))))
                 for p in paths}  # fmt: skip
        want = sorted(value, key=lambda p: -value[p])[:nodes]
        assert set(scored(tree, 0, seed)) == set(want)


def test_equal_scores_keep_the_parent_first() -> None:
    """A child that is certain has its parent's score."""
    sure = torch.tensor([0.0, -math.inf, -math.inf])
    tree = best_first(
        lambda level: sure.expand(*level.tokens.shape, 3), torch.tensor([5]),
        nodes=6, depth=4, branch=3,
    )  # fmt: skip
    assert tree.tokens.tolist() == [[5, 0, 0, 0, 0]] and tree.is_chain


def test_banned_tokens_leave_padding_in_their_row_only() -> None:
    laws = torch.tensor([[0.5, 0.3, 0.2], [1.0, 0.0, 0.0]]).log()
    growth = Growth(torch.tensor([7, 8]), nodes=3)
    level = growth.add(laws[:, None], branch=3)
    assert level.valid.tolist() == [[True] * 3, [True, False, False]]
    tree = growth.tree()
    assert tree.drafted() == [3, 1]
    assert growth.expected().tolist() == pytest.approx([1.0, 1.0])
    part, place = growth.frontier()
    assert part.nodes == 4 and place.tolist() == [[1, 2, 3], [1, 0, 0]]


def test_frontier_holds_what_a_draft_model_has_to_score() -> None:
    growth = Growth(torch.tensor([7]), nodes=3)
    growth.add(torch.tensor([[[0.6, 0.3, 0.1]]]).log(), branch=3)
    growth.add(torch.tensor([[[0.9, 0.1, 0.0], [0.4, 0.3, 0.3], [1.0, 0.0, 0.0]]]).log(), branch=2)
    tree, place = growth.frontier()
    # .6 -> .54 stays with its ancestors; .3 is in the tree but needs no second look
    assert growth.tree().tokens.tolist() == [[7, 0, 0, 1]]
    assert tree.tokens.tolist() == [[7, 0, 0]] and place.tolist() == [[2]]


def test_gain_stops_the_growth() -> None:
    flat = torch.full((V,), 1 / V).log()
    calls = []

    def expand(level: Level) -> torch.Tensor:
        calls.append(level.depth)
        return flat.expand(*level.tokens.shape, V)

    best_first(expand, torch.tensor([0]), nodes=8, depth=6, branch=4, gain=0.5)
    # E = 1 after the first level and 1.25 after the second, which does not pay
    assert calls == [0, 1]


def test_best_first_refuses() -> None:
    with pytest.raises(InvalidInputError, match="at least one node"):
        Growth(torch.tensor([0]), 0)
    growth = Growth(torch.tensor([0]), 2)
    with pytest.raises(InvalidInputError, match="do not fit a frontier"):
        growth.add(torch.zeros(1, 2, 3), branch=2)
    with pytest.raises(InvalidInputError, match="branch and keep"):
        growth.add(torch.zeros(1, 1, 3), branch=0)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 5), st.integers(1, 4))
def test_beam_trie_is_the_trie(seed: int, rows: int, width: int, length: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    beams = torch.randint(0, 3, (rows, width, length), generator=generator)
    valid = torch.rand(rows, width, length, generator=generator) < 0.8
    tree = beam_trie(torch.arange(rows), beams, valid)
    for b in range(rows):
        paths = []
        for beam, ok in zip(beams[b].tolist(), valid[b].tolist(), strict=True):
            paths.append(beam[: ok.index(False)] if False in ok else beam)
        want = TokenTree.from_paths(b, paths)
        got = tree.row(b)
        kept = [n for n in range(got.nodes) if got.alive[0, n]]
        assert got.tokens[0, kept].tolist() == want.tokens[0].tolist()
        place = {n: i for i, n in enumerate(kept)} | {-1: -1}
        links = got.topology.parent[0, kept].tolist()
        assert [place[p] for p in links] == want.topology.parent[0].tolist()


def test_beam_trie_of_nothing_and_of_the_wrong_shape() -> None:
    assert beam_trie(torch.tensor([3, 4]), torch.zeros(2, 0, 4, dtype=torch.int64)).nodes == 1
    with pytest.raises(InvalidInputError, match="rows, beams, length"):
        beam_trie(torch.tensor([3]), torch.zeros(2, 1, 4, dtype=torch.int64))


@pytest.mark.parametrize("seed", range(4))
def test_calibrate_takes_the_largest_products(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    accuracy = torch.rand(3, 4, generator=generator).sort(1, descending=True).values / 2
    chosen = calibrate(accuracy, 12)
    table = accuracy.double().tolist()
    value = {
        p: math.prod(table[k][r] for k, r in enumerate(p))
        for d in (1, 2, 3)
        for p in itertools.product(range(4), repeat=d)
    }
    assert [value[p] for p in chosen] == sorted(value.values(), reverse=True)[:12]
    assert all(len(p) == 1 or p[:-1] in chosen[:i] for i, p in enumerate(chosen))


def test_calibrate_of_few_paths_and_bad_tables() -> None:
    assert calibrate(torch.tensor([[0.5, 0.0]]), 9) == [(0,)]
    assert calibrate(torch.tensor([[0.5]]), 0) == []
    for table in (torch.tensor([0.5]), torch.tensor([[1.5]]), torch.tensor([[math.nan]])):
        with pytest.raises(InvalidInputError, match="table"):
            calibrate(table, 3)
    with pytest.raises(InvalidInputError, match="0 or more"):
        calibrate(torch.tensor([[0.5]]), -1)


def test_rank_tree_fills_by_depth_and_rank() -> None:
    static = RankTree.of(calibrate(torch.tensor([[0.6, 0.2], [0.5, 0.1]]), 4))
    candidates = torch.tensor([[[10, 11], [20, 21]], [[12, 13], [22, 23]]])
    tree = static.fill(torch.tensor([1, 2]), candidates)
    assert tree.tokens.tolist() == [[1, 10, 20, 11, 20], [2, 12, 22, 13, 22]]
    assert tree.topology.parent.tolist() == [[-1, 0, 1, 0, 3]]
    assert RankTree.of([(0,), (0, 0)]).topology.is_chain
    with pytest.raises(InvalidInputError, match="more candidates"):
        static.fill(torch.tensor([1]), candidates[:1, :1])
    for paths in ([(0, 0)], [(0,), (0,)], [()], [(-1,)]):
        with pytest.raises(InvalidInputError, match="rank path"):
            RankTree.of(paths)


def test_rank_tree_limits() -> None:
    static = RankTree.of([(0,), (1,), (0, 0), (1, 0), (0, 1), (0, 0, 0)])
    assert static.limit(3, 9, 9) == RankTree.of([(0,), (1,), (0, 0)])
    assert static.limit(9, 1, 9) == RankTree.of([(0,), (1,)])
    assert static.limit(9, 9, 1) == RankTree.of([(0,), (0, 0), (0, 0, 0)])
    assert static.limit(0, 9, 9) == RankTree.of([])
