"""The surgeon's formulas, against brute force and least squares."""

import itertools

import pytest
import torch

from isthmus.errors import InvalidInputError, UnsupportedModelError
from isthmus.surgery.obs import (
    Curvature,
    Grid,
    Removal,
    check_sum,
    gptq,
    increase,
    prune,
    quantize,
    refit,
    removal,
    sparsegpt,
)


def layer(rows=4, columns=12, tokens=200, seed=0):
    """A matrix and correlated inputs."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=draw, dtype=torch.float64)
    x = torch.randn(tokens, columns, generator=draw, dtype=torch.float64) @ mix
    w = torch.randn(rows, columns, generator=draw, dtype=torch.float64)
    return w, x, 2 * x.T @ x / tokens


def test_one_weight_is_the_cheapest_of_all_and_the_rest_is_optimal():
    w, x, h = layer(1, 6)
    curvature = Curvature.of(h, len(x), damping=0.0)
    order = removal(w, curvature)
    errors = []
    for p in range(6):
        keep = [i for i in range(6) if i != p]
        best = torch.linalg.lstsq(x[:, keep], x @ w[0]).solution
        errors.append(float(((x[:, keep] @ best - x @ w[0]) ** 2).mean()))
    assert int(order.order[0, 0]) == errors.index(min(errors))
    assert float(order.costs[0, 0]) == pytest.approx(min(errors), rel=1e-8)


def test_every_prefix_is_least_squares_and_never_beats_the_best_mask():
    w, x, h = layer(1, 6, seed=3)
    curvature = Curvature.of(h, len(x), damping=0.0)
    order = removal(w, curvature)
    for gone in range(1, 6):
        counts = torch.tensor([gone])
        keep = order.mask(counts, 6)[0].nonzero()[:, 0]
        best = torch.linalg.lstsq(x[:, keep], x @ w[0]).solution
        new = refit(w, order.mask(counts, 6), curvature)
        assert torch.allclose(new[0, keep], best, atol=1e-8)
        error = float(((x @ new[0] - x @ w[0]) ** 2).mean())
        assert order.cost(counts) == pytest.approx(error, rel=1e-8)
        brute = min(
            float(
                ((x[:, s] @ torch.linalg.lstsq(x[:, s], x @ w[0]).solution - x @ w[0]) ** 2).mean()
            )
            for s in map(list, itertools.combinations(range(6), 6 - gone))
        )
        assert brute <= error + 1e-12


@pytest.mark.parametrize("kind", [{}, {"block": 4}, {"pattern": (2, 4)}], ids=str)
def test_stepwise_weights_are_least_squares_on_the_mask(kind):
    """The updates of each step, carried out one by one, end where the one solve ends."""
    w, x, h = layer()
    curvature = Curvature.of(h, len(x))
    order = removal(w, curvature, **kind)
    size, steps = kind.get("block", 1), order.order.shape[1]
    half = steps if "pattern" in kind else steps // 2
    new, inverse = w.clone(), curvature.inverse.expand(4, 12, 12).clone()
    for row, step in itertools.product(range(4), range(half)):
        p = [int(order.order[row, step]) * size + i for i in range(size)]
        own = torch.linalg.inv(inverse[row][p][:, p])
        move = inverse[row][:, p] @ own
        assert float(order.costs[row, step]) == pytest.approx(
            float(new[row, p] @ own @ new[row, p]) / 2, rel=1e-8
        )
        new[row] -= move @ new[row, p]
        new[row, p] = 0
        inverse[row] -= move @ inverse[row][p]
    counts = torch.full((4,), half)
    mask = order.mask(counts, 12)
    solved = refit(w, mask, curvature)
    assert torch.allclose(new * mask, solved, atol=1e-10)
    assert order.cost(counts) == pytest.approx(increase(w, solved, curvature.hessian), rel=1e-8)
    if "pattern" in kind:
        assert mask.view(4, 3, 4).sum(-1).eq(2).all()
    if "block" in kind:
        assert (mask.view(4, 3, 4).sum(-1) % 4 == 0).all()


def test_the_cheapest_weights_of_all_rows_go():
    order = Removal(
        torch.tensor([[0, 1], [1, 0]]), torch.tensor([[1.0, 9.0], [2.0, 3.0]], dtype=torch.float64)
    )
    assert order.counts(3).tolist() == [1, 2]
    assert order.mask(order.counts(3), 2).tolist() == [[False, True], [False, False]]
    assert order.curve().tolist() == [0, 1, 3, 6, 15]
    with pytest.raises(InvalidInputError, match="5 of 4"):
        order.counts(5)


@pytest.mark.parametrize("symmetric", [False, True])
def test_rounding_one_weight_is_the_known_formula_and_the_outlier_goes_first(symmetric):
    w, x, h = layer(3, 8, seed=1)
    curvature = Curvature.of(h, len(x))
    grid = Grid.search(w, 3, symmetric=symmetric)
    new = quantize(w, curvature, grid)
    assert torch.equal(grid.round(new), new), "not on the grid"
    # by hand, weight after weight
    for row in range(3):
        left, inverse = w[row].clone(), curvature.inverse.clone()
        own, open_ = grid.rows(slice(row, row + 1)), list(range(8))
        for _ in range(8):
            error = left - own.round(left[None])[0]
            far = max(open_, key=lambda i: float(error[i].abs()))
            cheap = min(open_, key=lambda i: float(error[i] ** 2 / inverse[i, i]))
            p = far if float(error[far].abs()) > float(own.scale) * (0.5 + 1e-9) else cheap
            value = left[p] - error[p]
            assert float(value) == pytest.approx(float(new[row, p]), abs=1e-9)
            left -= error[p] / inverse[p, p] * inverse[:, p]
            inverse -= torch.outer(inverse[:, p], inverse[p]) / inverse[p, p]
            open_.remove(p)


def test_pruned_weights_stay_zero_when_the_others_are_rounded():
    w, x, h = layer(4, 16, seed=2)
    curvature = Curvature.of(h, len(x))
    refitted, mask = prune(w, curvature, 0.6)
    grid = Grid.search(refitted, 4)
    new = quantize(refitted, curvature, grid, mask)
    assert not new[~mask].any() and torch.equal(grid.round(new)[mask], new[mask])
    plain = torch.where(mask, grid.round(refitted), 0.0)
    assert increase(w, new, h) < increase(w, plain, h)


def test_exact_beats_column_order_beats_magnitude():
    w, x, h = layer(32, 48, 4000, seed=5)
    curvature = Curvature.of(h, len(x))
    exact, _ = prune(w, curvature, 0.5)
    column, _ = sparsegpt(w, curvature, 0.5, width=16)
    small = w.abs() >= w.abs().flatten().median()
    assert increase(w, exact, h) < increase(w, column, h) < increase(w, w * small, h)
    grid = Grid.search(w, 3)
    errors = [increase(w, f(w, curvature, grid), h) for f in (quantize, gptq)]
    assert errors[0] < errors[1] < increase(w, grid.round(w), h)
    four, mask = sparsegpt(w, curvature, 0.5, pattern=(2, 4))
    assert mask.view(32, 12, 4).sum(-1).eq(2).all() and not four[~mask].any()


def test_a_grid_by_hand():
    grid = Grid.search(torch.tensor([[0.0, 1.0, 2.0, 3.0]]), 2)
    assert grid.codes(torch.tensor([[-5.0, 1.2, 9.0]])).tolist() == [[0, 1, 3]]
    assert grid.round(torch.tensor([[1.2]])).tolist() == [[1.0]]
    even = Grid.search(torch.tensor([[-1.0, 0.0, 1.0]]), 4, symmetric=True)
    assert float(even.round(torch.zeros(1, 1))) == 0.0
    zeros = Grid.search(torch.zeros(1, 3), 4)
    assert float(zeros.round(torch.zeros(1, 3)).abs().max()) == 0.0
    with pytest.raises(InvalidInputError, match="1 to 16 bits"):
        Grid.search(torch.zeros(1, 3), 0)


def test_alike_and_dead_inputs_are_damped_and_reported():
    w, x, _ = layer()
    x[:, 5] = 0.0
    x[:, 6] = x[:, 7]
    h = 2 * x.T @ x / len(x)
    curvature = Curvature.of(h, len(x), damping=0.0)
    assert curvature.damping >= 0.01 and curvature.dead.nonzero().flatten().tolist() == [5]
    new, _ = prune(w, curvature, 0.5)
    assert torch.isfinite(new).all() and not new[:, 5].any()
    with pytest.raises(InvalidInputError, match="q_proj has 12 inputs and was shown 11 tokens"):
        Curvature.of(h, 11, name="q_proj")
    with pytest.raises(UnsupportedModelError, match="too alike"):
        Curvature.of(h - 1e6 * torch.eye(12), 200)
    with pytest.raises(InvalidInputError, match="not finite"):
        Curvature.of(h * torch.nan, 200)
    with pytest.raises(UnsupportedModelError, match="precision was lost"):
        check_sum(1.0, w, torch.zeros_like(w), curvature)


def test_bad_groups_and_sizes_are_refused():
    w, x, h = layer(1, 6)
    curvature = Curvature.of(h, len(x))
    with pytest.raises(InvalidInputError, match="groups of 4"):
        removal(w, curvature, pattern=(2, 4))
    with pytest.raises(InvalidInputError, match="fast=true"):
        removal(torch.zeros(1, 9000), curvature)
