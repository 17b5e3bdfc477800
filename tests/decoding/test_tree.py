"""Token trees against slow references in plain Python."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.decoding.tree import Draw, TokenTree, Topology, merge, stack
from isthmus.errors import InvalidInputError

Rows = list[dict[tuple[int, ...], int]]


@st.composite
def trees(draw: Any, batch: int = 2, shared: bool | None = None) -> TokenTree:
    """A tree with ragged rows: parents anywhere before, some nodes invalid, perhaps with q."""
    n = draw(st.integers(1, 9))
    alike = draw(st.booleans()) if shared is None else shared
    rows = 1 if alike else batch
    parents = [[-1, *(draw(st.integers(0, i - 1)) for i in range(1, n))] for _ in range(rows)]
    tokens = [[draw(st.integers(0, 6)) for _ in range(n)] for _ in range(batch)]
    valid = None
    if draw(st.booleans()):
        valid = torch.tensor(
            [[i == 0 or draw(st.booleans()) for i in range(n)] for _ in range(batch)]
        )
    kind: Draw = draw(st.sampled_from(["point", "iid", "without"])) if n > 1 else "point"
    q = None if kind == "point" else torch.rand(batch, n, 7)
    return TokenTree(torch.tensor(tokens), Topology(torch.tensor(parents)), valid, kind, q)


def path(tree: TokenTree, row: int, node: int) -> list[int]:
    """Nodes from the root to a node."""
    parents = tree.topology.parent.expand(tree.batch, -1)[row].tolist()
    out = [node]
    while parents[out[-1]] >= 0:
        out.append(parents[out[-1]])
    return out[::-1]


def living(tree: TokenTree) -> list[list[tuple[int, ...]]]:
    """Token paths of the nodes of each row that count, in node order."""
    out = []
    for row in range(tree.batch):
        own = []
        for node in range(tree.nodes):
            nodes = path(tree, row, node)
            if tree.valid is None or all(bool(tree.valid[row, i]) for i in nodes):
                own.append(tuple(tree.tokens[row, nodes].tolist()))
        out.append(own)
    return out


def check(tree: TokenTree) -> None:
    """What was derived from the parents, perhaps in passing, is what follows from them."""
    fresh = Topology(tree.topology.parent)
    for name in ("depth", "ancestors", "children"):
        kept, made = getattr(tree.topology, name), getattr(fresh, name)
        rows = max(len(kept), len(made))
        alive = tree.alive.view(tree.batch, tree.nodes)
        kept, made = (t.expand(tree.batch, *t.shape[1:]) for t in (kept, made))
        assert rows and torch.equal(kept[alive], made[alive]), name
    assert tree.topology.is_chain == fresh.is_chain
    assert bool(tree.alive[:, 0].all())


@settings(max_examples=150, deadline=None)
@given(trees())
def test_topology(tree: TokenTree) -> None:
    parents = tree.topology.parent.expand(tree.batch, -1).tolist()
    ancestors = tree.topology.ancestors.expand(tree.batch, -1, -1)
    depth = tree.topology.depth.expand(tree.batch, -1)
    children = tree.topology.children.expand(tree.batch, -1, -1)
    deepest = 0
    for row in range(tree.batch):
        for node in range(tree.nodes):
            nodes = path(tree, row, node)
            assert ancestors[row, node].nonzero()[:, 0].tolist() == sorted(nodes)
            assert int(depth[row, node]) == len(nodes) - 1
            deepest = max(deepest, len(nodes) - 1)
            kids = [i for i in range(tree.nodes) if parents[row][i] == node]
            assert [c for c in children[row, node].tolist() if c >= 0] == kids
    assert tree.topology.max_depth == deepest
    assert tree.topology.is_chain == all(p == list(range(-1, tree.nodes - 1)) for p in parents)
    assert tree.drafted() == [len(own) - 1 for own in living(tree)]


@settings(max_examples=150, deadline=None)
@given(trees(), st.data())
def test_prune(tree: TokenTree, data: st.DataObject) -> None:
    keep = torch.tensor(
        [[i == 0 or data.draw(st.booleans()) for i in range(tree.nodes)] for _ in range(tree.batch)]
    )
    closed = torch.tensor(
        [
            [all(bool(keep[r, i]) for i in path(tree, r, n)) for n in range(tree.nodes)]
            for r in range(tree.batch)
        ]
    )
    if not torch.equal(keep, closed):
        with pytest.raises(InvalidInputError, match="every ancestor"):
            tree.prune(keep)
    before = living(TokenTree(tree.tokens, tree.topology, closed & tree.alive, "point"))
    pruned = tree.prune(closed)
    check(pruned)
    assert living(pruned) == before
    assert pruned.draw == tree.draw
    if tree.q is not None:
        assert pruned.q is not None
        for row in range(tree.batch):
            olds = [n for n in range(tree.nodes) if bool(closed[row, n] & tree.alive[row, n])]
            news = [n for n in range(pruned.nodes) if bool(pruned.alive[row, n])]
            assert torch.equal(tree.q[row, olds], pruned.q[row, news])


@settings(max_examples=150, deadline=None)
@given(trees(), st.integers(0, 9), st.integers(0, 9))
def test_limit(tree: TokenTree, nodes: int, depth: int) -> None:
    limited = tree.limit(nodes=nodes, depth=depth)
    check(limited)
    want = []
    for row in range(tree.batch):
        own = []
        for node in range(min(tree.nodes, nodes + 1)):
            above = path(tree, row, node)
            if bool(tree.alive[row, node]) and len(above) - 1 <= depth:
                own.append(tuple(tree.tokens[row, above].tolist()))
        want.append(own)
    assert living(limited) == want


@settings(max_examples=100, deadline=None)
@given(trees())
def test_first_chain(tree: TokenTree) -> None:
    chain = tree.first_chain()
    assert chain.is_chain
    for row in range(tree.batch):
        parents = tree.topology.parent.expand(tree.batch, -1)[row].tolist()
        node, want = 0, [0]
        while node in parents:
            node = parents.index(node)
            want.append(node)
        want = [n for n in want if bool(tree.alive[row, n])]
        got = living(chain)[row][-1]
        assert list(got) == tree.tokens[row, want].tolist()
        if chain.q is not None and tree.q is not None:
            assert torch.equal(chain.q[row, : len(want)], tree.q[row, want])


@settings(max_examples=100, deadline=None)
@given(trees(), st.sets(st.integers(0, 6), max_size=3))
def test_below(tree: TokenTree, ends: set[int]) -> None:
    cut = tree.below(torch.tensor(sorted(ends), dtype=torch.int64))
    check(cut)
    want = [[tokens for tokens in own if not set(tokens[1:-1]) & ends] for own in living(tree)]
    assert living(cut) == want


@settings(max_examples=100, deadline=None)
@given(trees(batch=1), trees(batch=1))
def test_merge(a: TokenTree, b: TokenTree) -> None:
    a, b = (TokenTree(t.tokens, t.topology, t.valid) for t in (a, b))
    b.tokens[0, 0] = a.tokens[0, 0]
    both = merge(a, b)
    check(both)
    got = living(both)[0]
    assert set(got) == set(living(a)[0]) | set(living(b)[0])
    assert len(got) == len(set(got)), "siblings of a merged tree are unlike"


@settings(max_examples=100, deadline=None)
@given(st.lists(trees(batch=1), min_size=1, max_size=3))
def test_stack(parts: list[TokenTree]) -> None:
    parts = [TokenTree(t.tokens, t.topology, t.valid) for t in parts]
    both = stack(parts)
    check(both)
    assert living(both) == [living(t)[0] for t in parts]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), max_size=4), max_size=6))
def test_from_paths(paths: list[list[int]]) -> None:
    tree = TokenTree.from_paths(9, paths)
    want = {(9, *p[:i]) for p in paths for i in range(len(p) + 1)} | {(9,)}
    got = living(tree)[0]
    assert set(got) == want and len(got) == len(want)
    depth = tree.topology.depth[0].tolist()
    assert depth == sorted(depth), "breadth first"
    parents = tree.topology.parent[0].tolist()
    assert parents == sorted(parents), "siblings stand together"


@pytest.mark.parametrize(
    "parents", [[[0, 0]], [[-1, 1]], [[-1, 2, 0]], [[-1, -1]], [[-1, 0, -2]], [[]]]
)
def test_bad_parents_are_refused(parents: list[list[int]]) -> None:
    with pytest.raises(InvalidInputError):
        Topology(torch.tensor(parents, dtype=torch.int64))


def test_bad_shapes_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="do not fit a topology"):
        TokenTree(torch.zeros(2, 3, dtype=torch.int64), Topology.of([-1, 0]))
    with pytest.raises(InvalidInputError, match="do not fit a topology"):
        TokenTree(torch.zeros(3, 2, dtype=torch.int64), Topology(torch.tensor([[-1, 0]] * 2)))


def test_merge_and_stack_refuse_drawn_trees() -> None:
    drawn = TokenTree.chain(torch.tensor([1]), torch.tensor([[2]]), q=torch.ones(1, 1, 4) / 4)
    point = TokenTree.from_paths(1, [[2]])
    with pytest.raises(InvalidInputError, match="only chosen trees"):
        merge(drawn, point)
    with pytest.raises(InvalidInputError, match="share the root"):
        merge(point, TokenTree.from_paths(2, [[2]]))
    with pytest.raises(InvalidInputError, match="chosen trees"):
        stack([drawn, point])


def test_ascii() -> None:
    tree = TokenTree.from_paths(0, [[1, 2], [1, 3], [4]])
    assert tree.to_ascii(list("abcde")).splitlines() == [
        "a",
        "├─ b",
        "│  ├─ d",
        "│  └─ e",
        "└─ c",
    ]
