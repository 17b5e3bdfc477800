"""Spaces of architectures and their searchers."""

import statistics

import pytest
import torch

from isthmus.errors import InvalidInputError
from isthmus.laws.search import Random, Surrogate, TreeSearch, search
from isthmus.laws.space import (
    Activation,
    Affine,
    BatchNorm,
    Built,
    Chain,
    Choice,
    Concat,
    Conv2d,
    Dropout,
    Hyper,
    MaxPool,
    MaybeSwap,
    Optional,
    Or,
    Repeat,
    Residual,
    Space,
)

BLOCK = Chain(
    Conv2d((4, 8), (3, 5)),
    MaybeSwap(Activation(("relu", "tanh")), BatchNorm()),
    Optional(MaxPool()),
)
NETS = Space(Chain(Repeat(BLOCK, (1, 2)), Affine((10,)), Hyper("rate", (0.1, 0.01))), (1, 8, 8))


def draw(seed):
    return torch.Generator().manual_seed(seed)


def test_as_many_networks_as_are_counted_by_hand():
    block = 2 * 2 * 2 * 2 * 2  # filters, sizes, order, function, pooling
    assert sum(1 for _ in NETS) == (block + block**2) * 2
    tied = Space(Repeat(BLOCK, (0, 1, 2), tied=True), (1, 8, 8))
    assert sum(1 for _ in tied) == 1 + 2 * block
    assert len(set(NETS)) == (block + block**2) * 2


def test_every_choice_is_one_and_every_network_runs():
    x = torch.randn(3, 1, 8, 8, generator=draw(0))
    for seed in range(20):
        picks = NETS.draw(draw(seed))
        for n in range(len(picks)):
            open_ = NETS.at(picks[:n])
            assert isinstance(open_, Choice) and len(open_.values) >= 2
        built = NETS.at(picks)
        assert isinstance(built, Built) and built.shape == (10,)
        assert built.hypers["rate"] in (0.1, 0.01)
        torch.manual_seed(0)
        one = built.make()(x)
        torch.manual_seed(0)
        again = NETS.at(picks).make()(x)
        assert one.shape == (3, 10) and torch.equal(one, again)


def test_parts_of_parts():
    same = Chain(Conv2d((6,)), Activation(), Dropout((0.0, 0.5)))
    space = Space(
        Chain(Conv2d((6,)), Residual(same), Concat(Conv2d((2, 4)), Conv2d((3,), (1,)))), (1, 6, 7)
    )
    built = space.at((0, 1))
    assert built.shape == (7, 6, 7)
    assert built.words[1:5] == ("residual", "conv-6-3-1", "relu", "dropout-0")
    assert built.make()(torch.randn(2, 1, 6, 7, generator=draw(0))).shape == (2, 7, 6, 7)
    tied = Space(Repeat(Affine((4, 8)), (3,), tied=True), (5,)).at((1,))
    assert tied.words == ("affine-8",) * 3
    layers = [m for m in tied.make().modules() if isinstance(m, torch.nn.Linear)]
    assert [m.in_features for m in layers] == [5, 8, 8] and layers[1].weight is not layers[2].weight
    strided = Space(Conv2d((2,), strides=(1, 2)), (1, 7, 8)).at((1,))
    assert strided.make()(torch.zeros(1, 1, 7, 8)).shape[1:] == strided.shape == (2, 4, 4)


def test_what_does_not_fit_is_refused():
    for part, says in (
        (Residual(Affine((3,))), "keeps its shape"),
        (Chain(Affine((3,)), Conv2d((2,))), "needs pictures"),
        (Repeat(MaxPool(), (4,)), "no squares"),
        (Concat(Conv2d((2,)), MaxPool()), "pictures of one size"),
    ):
        with pytest.raises(InvalidInputError, match=says):
            Space(part, (1, 8, 8)).at(())
    space = Space(Affine((1, 2)), (4,))
    with pytest.raises(InvalidInputError, match="0 to 1, not 2"):
        space.at((2,))
    with pytest.raises(InvalidInputError, match="more picks"):
        space.at((0, 0))
    for bad in (
        lambda: Affine(()),
        lambda: Affine((2, 2)),
        lambda: Conv2d((2,), (4,)),
        lambda: Activation(("swish",)),
        Or,
        Concat,
    ):
        with pytest.raises(InvalidInputError):
            bad()
    with pytest.raises(InvalidInputError, match="not proposed"):
        TreeSearch(space).observe((0,), 1.0)


LINE = Space(Chain(*[Hyper(f"x{i}", tuple(range(8))) for i in range(3)]), (1,))


def hill(picks):
    """Best at (6, 1, 4), and neighbours are alike."""
    return 1 - sum(abs(a - b) for a, b in zip(picks, (6, 1, 4), strict=True)) / 18


def test_bisection_is_a_binary_tree_of_the_same_networks():
    searcher = TreeSearch(LINE, bisect=True)
    level = [((), 0, 0)]
    depth = 0
    while searcher._children(level[0]):
        level = [child for node in level for child in searcher._children(node)]
        depth += 1
    assert depth == 9 and sorted(node[0] for node in level) == list(LINE)


def test_the_tree_goes_where_its_rule_says():
    space = Space(Affine((1, 2, 3)), (4,))
    searcher = TreeSearch(space, explore=0.5)
    for _ in range(3):
        picks = searcher.propose(draw(0))
        searcher.observe(picks, (0.2, 0.5, 0.45)[picks[0]])
    # equal counts: the largest mean; then count 2 against 1: 0.5 + sqrt(ln 4) against 0.45 + ...
    assert searcher.propose(draw(0)) == (1,)
    searcher.observe((1,), 0.5)
    assert searcher.propose(draw(0)) == (2,)


@pytest.mark.parametrize(
    "make",
    [
        lambda: TreeSearch(LINE, bisect=True),
        lambda: Surrogate(LINE, candidates=32),
    ],
    ids=["bisection", "surrogate"],
)
def test_searchers_find_more_than_chance(make):
    """Paired over 30 seeds: the best of 48 of 512 networks."""

    def best(searcher, seed):
        return max(score for _, score in search(searcher, hill, 48, draw(seed)))

    gains = [best(make(), seed) - best(Random(LINE), seed) for seed in range(30)]
    error = statistics.stdev(gains) / len(gains) ** 0.5
    assert statistics.mean(gains) > 2 * error


def test_a_surrogate_is_ridge_regression():
    searcher = Surrogate(LINE, longest=1, every=6, ridge=0.5)
    drawn = [LINE.draw(draw(seed)) for seed in range(6)]
    for picks in drawn:
        searcher.observe(picks, hill(picks))
    words = sorted({w for p in drawn for w in LINE.at(p).words})
    x = torch.tensor(
        [[*(float(w in LINE.at(p).words) for w in words), 3.0] for p in drawn], dtype=torch.float64
    )
    y = torch.tensor([hill(p) for p in drawn], dtype=torch.float64)
    weights = torch.linalg.solve(x.T @ x + 0.5 * torch.eye(len(x.T)), x.T @ (y - y.mean()))
    want = float(y.mean() + x[2] @ weights)
    assert searcher.predict(drawn[2]) == pytest.approx(want, abs=1e-9)
