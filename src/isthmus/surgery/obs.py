r"""Optimal Brain Surgeon, exactly: which weights go or are rounded, and what the rest becomes.

A linear layer W [R, C] reads inputs X [C, N]; its rows do not depend on each other. The error
``||W X - W' X||^2 / N`` is ``1/2 dW H dW^T`` summed over rows, with ``H = 2 X X^T / N`` for all.
Taking out a block P of a row w (one weight, or several) costs, and moves the others by, ::

    cost  = 1/2 e_P^T ([H^-1]_PP)^-1 e_P                e_P = w_P - q_P, and q = 0 to prune
    delta =  - H^-1[:, P] ([H^-1]_PP)^-1 e_P
    H^-1 <-  H^-1 - H^-1[:, P] ([H^-1]_PP)^-1 H^-1[P, :]         P is gone from the problem

The cheapest goes first. A row is run to its end once, which records in what order its weights go
and at what cost; any number of weights is then a prefix of that order, over all rows by sorted
costs, and the weights that stay are one least-squares solve.

Source: E. Frantar, S. P. Singh and D. Alistarh, "Optimal Brain Compression", 2022,
arXiv:2208.11580, sections 4 to 6. The variants in column order are E. Frantar and D. Alistarh,
"SparseGPT", 2023, arXiv:2301.00774, and E. Frantar and others, "GPTQ", 2022, arXiv:2210.17323.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from isthmus.errors import InvalidInputError, UnsupportedModelError
from isthmus.surgery.base import Site
from isthmus.surgery.calibration import Calibration, Gram, capture

MOST_INPUTS = 8192
"""Inputs of a layer beyond which R C^3 operations are refused; use the column order there."""

_DAMPING, _TRIES = 0.01, 3
_BUDGET_BYTES = 2**27
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Curvature:
    """H of a layer, ready for use.

    Attributes:
        hessian: H with damping on its diagonal, float64 [C, C].
        inverse: Its inverse.
        dead: Inputs that were always 0, bool [C]; their weights become 0.
        damping: What was added to the diagonal, as a share of its mean.
    """

    hessian: Tensor
    inverse: Tensor
    dead: Tensor
    damping: float

    @classmethod
    def of(
        cls, hessian: Tensor, tokens: int, *, damping: float | None = None, name: str = "a layer"
    ) -> Curvature:
        """Damp and invert.

        Args:
            hessian: ``2 X X^T / N`` [C, C], as :class:`~isthmus.surgery.calibration.Gram` gives it.
            tokens: N.
            damping: Share of the mean diagonal that is added to it; None is 0.01, and asks for at
                least as many tokens as inputs.
            name: Of the layer, for messages.

        Raises:
            InvalidInputError: Fewer tokens than inputs, or numbers that are not finite.
            UnsupportedModelError: H cannot be inverted.
        """
        h = hessian.detach().to("cpu", torch.float64, copy=True)
        inputs = len(h)
        if not bool(torch.isfinite(h).all()):
            raise InvalidInputError(f"{name} reads values that are not finite")
        if damping is None and tokens < inputs:
            raise InvalidInputError(
                f"{name} has {inputs} inputs and was shown {tokens} tokens; give more calibration "
                "data, or choose a damping"
            )
        dead = h.diagonal() == 0
        h.diagonal()[dead] = 1.0
        share = _DAMPING if damping is None else damping
        mean = float(h.diagonal()[~dead].mean()) if not bool(dead.all()) else 0.0
        rounding = inputs * torch.finfo(h.dtype).eps
        for _ in range(_TRIES + 1):
            damped = h.clone()
            damped.diagonal()[~dead] += share * mean
            factor, failed = torch.linalg.cholesky_ex(damped)
            # what others leave of an input: of a copy only rounding, on some processors above 0
            left = factor.diagonal().square() / damped.diagonal()
            if not int(failed) and bool((left > rounding).all()):
                inverse = torch.cholesky_inverse(factor)
                if bool((inverse.diagonal() > 0).all()) and bool(torch.isfinite(inverse).all()):
                    return cls(damped, inverse, dead, share)
            share = max(share, _DAMPING / 10) * 10
        raise UnsupportedModelError(
            f"the inputs of {name} ({inputs}, shown {tokens} tokens) are too alike to invert their "
            f"second moments, even with {share / 10:g} of their mean added; give more calibration "
            "data"
        )


def curvatures(
    model: nn.Module, places: Sequence[Site], data: Calibration, damping: float | None = None
) -> Callable[[Site], Curvature]:
    """The curvature of each site on demand, from the model as it is at that moment.

    Sites of one layer are captured in one run and held together; those before are let go.

    Args:
        model: In eval mode.
        places: Sites of the kind ``linear``.
        data: Samples.
        damping: See :meth:`Curvature.of`.
    """
    grams: dict[str, Gram] = {}

    def curvature(site: Site) -> Curvature:
        if site.path not in grams:
            grams.clear()
            here = [s for s in places if (s.stack, s.layer) == (site.stack, site.layer)]
            grams.update(capture(model, here, data, Gram))
        gram = grams[site.path]
        return Curvature.of(gram.hessian, gram.count, damping=damping, name=site.path)

    return curvature


def increase(before: Tensor, after: Tensor, hessian: Tensor) -> float:
    """Error of a layer, ``1/2 dW H dW^T`` over all rows: mean squared error of its outputs.

    Example:
        >>> increase(torch.ones(1, 2), torch.zeros(1, 2), 2 * torch.eye(2))
        2.0
    """
    change = (before - after).double()
    return float(((change @ hessian.double()) * change).sum() / 2)


@dataclass(frozen=True)
class Removal:
    """In what order the weights of each row go.

    Attributes:
        order: Blocks (of one column, mostly) in the order they go, int64 [R, S].
        costs: What each adds to the error, float64 [R, S].
        block: Columns of a block.
    """

    order: Tensor
    costs: Tensor
    block: int = 1

    def counts(self, removed: int) -> Tensor:
        """How many blocks of each row go, so that this many go in all: the cheapest, int64 [R].

        Raises:
            InvalidInputError: There are not so many.
        """
        if not 0 <= removed <= self.costs.numel():
            raise InvalidInputError(f"{removed} of {self.costs.numel()} blocks cannot be removed")
        chosen = self.costs.flatten().argsort(stable=True)[:removed]
        return torch.bincount(chosen // self.costs.shape[1], minlength=len(self.costs))

    def mask(self, counts: Tensor, columns: int) -> Tensor:
        """Which weights stay, once that many blocks of each row are gone, bool [R, C]."""
        gone = torch.arange(self.order.shape[1]) < counts[:, None]
        kept = torch.ones(len(self.order), columns // self.block, dtype=torch.bool)
        kept.scatter_(1, self.order, ~gone)
        return kept.repeat_interleave(self.block, 1)

    def cost(self, counts: Tensor) -> float:
        """Sum of the costs of those blocks."""
        gone = torch.arange(self.order.shape[1]) < counts[:, None]
        return float((self.costs * gone).sum())

    def curve(self) -> Tensor:
        """Error after the 0, 1, 2 ... cheapest blocks of all rows, float64 [R * S + 1]."""
        steps = self.costs.flatten().sort(stable=True).values
        return torch.cat([steps.new_zeros(1), steps.cumsum(0)])


def removal(
    weight: Tensor, curvature: Curvature, *, block: int = 1, pattern: tuple[int, int] | None = None
) -> Removal:
    """Take the weights of every row out, cheapest first.

    Args:
        weight: W [R, C].
        curvature: Of the layer's inputs.
        block: Neighbouring columns that go together.
        pattern: (n, m): until n of every m neighbours are gone; else until all are.

    Raises:
        InvalidInputError: Columns do not divide by the block or the pattern, or there are too many.
        UnsupportedModelError: The numbers have run out of precision.

    Example:
        >>> curvature = Curvature.of(torch.eye(3), 3, damping=0.0)
        >>> removal(torch.tensor([[3.0, -1.0, 2.0]]), curvature).order
        tensor([[1, 2, 0]])
    """
    rows, columns = weight.shape
    size = block if pattern is None else pattern[1]
    if columns % size or (pattern is not None and block != 1):
        raise InvalidInputError(f"{columns} columns cannot be taken in groups of {size}")
    check_inputs(columns)
    steps = columns // block if pattern is None else columns * pattern[0] // pattern[1]
    order = torch.zeros(rows, steps, dtype=torch.int64)
    costs = torch.zeros(rows, steps, dtype=torch.float64)
    for part in _batches(rows, columns):
        state = _Rows(_without_dead(weight[part], curvature), curvature.inverse, block)
        taken = torch.zeros(len(state.w), columns // size, dtype=torch.int64)
        for step in range(steps):
            state.compact()
            cost = state.costs(state.w).masked_fill(~state.live, math.inf)
            if pattern is not None:
                full = taken.gather(1, state.index // size) >= pattern[0]
                cost.masked_fill_(full, math.inf)
            lowest, at = cost.min(1)
            column = state.index.gather(1, at[:, None])
            order[part, step], costs[part, step] = column[:, 0], lowest
            taken.scatter_add_(1, column // size * (pattern is not None), torch.ones_like(column))
            state.remove(at, state.w)
    return Removal(order, costs, block)


def refit(weight: Tensor, mask: Tensor, curvature: Curvature) -> Tensor:
    """The best weights where only some may be other than 0: least squares, row by row.

    Args:
        weight: W [R, C].
        mask: Which may, bool [R, C].
        curvature: Of the layer's inputs.

    Returns:
        float64 [R, C].
    """
    new = torch.zeros(weight.shape, dtype=torch.float64)
    for part in _batches(*weight.shape):
        w, keep = _without_dead(weight[part], curvature), mask[part]
        system = _restricted(curvature.hessian, keep)
        wanted = (w @ curvature.hessian) * keep
        new[part] = torch.linalg.solve(system, wanted[..., None])[..., 0] * keep
    return new


def prune(
    weight: Tensor,
    curvature: Curvature,
    keep: float,
    *,
    block: int = 1,
    pattern: tuple[int, int] | None = None,
    order: Removal | None = None,
) -> tuple[Tensor, Tensor]:
    """Remove weights and refit the others.

    Args:
        weight: W [R, C].
        curvature: Of the layer's inputs.
        keep: Share of the weights that stay, over all rows; a pattern decides it itself.
        block: Neighbouring columns that go together.
        pattern: (n, m): n of every m neighbours go.
        order: A finished :func:`removal`.

    Returns:
        New weights, float64 [R, C], and which stay, bool [R, C].

    Raises:
        UnsupportedModelError: The costs do not add up to the error.
    """
    order = order or removal(weight, curvature, block=block, pattern=pattern)
    rows, steps = order.order.shape
    if pattern is not None:
        counts = torch.full((rows,), steps)
    else:
        counts = order.counts(rows * steps - round(keep * rows * steps))
    mask = order.mask(counts, weight.shape[1])
    new = refit(weight, mask, curvature)
    check_sum(order.cost(counts), _without_dead(weight, curvature), new, curvature)
    return new, mask


def smallest(weight: Tensor, keep: float, pattern: tuple[int, int] | None = None) -> Tensor:
    """Which weights stay if the smallest go, of the layer or of every m neighbours, bool [R, C].

    Example:
        >>> smallest(torch.tensor([[3.0, -1.0], [0.5, 2.0]]), 0.5)
        tensor([[ True, False],
                [False,  True]])
    """
    size = weight.abs().flatten()[None]
    gone = size.numel() - round(keep * size.numel())
    if pattern is not None:
        gone, size = pattern[0], weight.abs().view(-1, pattern[1])
    order = size.argsort(dim=1, stable=True)[:, :gone]
    return torch.ones_like(size, dtype=torch.bool).scatter(1, order, False).view_as(weight)


def check_sum(cost: float, before: Tensor, after: Tensor, curvature: Curvature) -> None:
    """Compare the sum of what removals cost with the error of the result.

    Raises:
        UnsupportedModelError: They differ: precision was lost on the way.
    """
    error = increase(before, after, curvature.hessian)
    whole = increase(before, torch.zeros_like(before), curvature.hessian)
    if abs(error - cost) > _TOLERANCE * max(error, 1e-6 * whole):
        raise UnsupportedModelError(
            f"the removals cost {cost:.6g}, and the layer is off by {error:.6g}: precision was "
            "lost; choose more damping"
        )


# rounding ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """Values that the weights of each row may take: ``(code - zero) * scale``.

    Attributes:
        scale: [R, 1], positive.
        zero: The code of 0, whole numbers [R, 1].
        levels: Codes are 0 to ``levels`` - 1.
    """

    scale: Tensor
    zero: Tensor
    levels: int

    @classmethod
    def search(
        cls,
        weight: Tensor,
        bits: int,
        *,
        symmetric: bool = False,
        exponent: float = 2.4,
        steps: int = 100,
        shrink: float = 0.2,
    ) -> Grid:
        """The grid of each row that rounds best among shrunk ranges.

        Args:
            weight: W [R, C].
            bits: Bits a code, 1 to 16.
            symmetric: Whether 0 lies in the middle.
            exponent: Of the errors that are summed.
            steps: Ranges from the whole one down to none.
            shrink: Smallest range tried.

        Raises:
            InvalidInputError: Bits out of range.
        """
        if not 1 <= bits <= 16:
            raise InvalidInputError(f"weights are rounded to 1 to 16 bits, not {bits}")
        w, levels = weight.double(), 2**bits
        low, high = w.amin(1, keepdim=True).clamp(max=0), w.amax(1, keepdim=True).clamp(min=0)
        if symmetric:
            high = torch.maximum(high, -low)
            low = -high
        empty = low == high
        low, high = torch.where(empty, -1.0, low), torch.where(empty, 1.0, high)
        best = cls((high - low) / (levels - 1), low, levels)._anchored(low, symmetric)
        lowest = (best.round(w) - w).abs().pow(exponent).sum(1, keepdim=True)
        for i in range(1, round(steps * (1 - shrink))):
            share = 1 - i / steps
            grid = cls(share * (high - low) / (levels - 1), low, levels)
            grid = grid._anchored(share * low, symmetric)
            error = (grid.round(w) - w).abs().pow(exponent).sum(1, keepdim=True)
            better = error < lowest
            lowest = torch.where(better, error, lowest)
            best = cls(
                torch.where(better, grid.scale, best.scale),
                torch.where(better, grid.zero, best.zero),
                levels,
            )
        return best

    def codes(self, w: Tensor) -> Tensor:
        """Nearest codes, as whole numbers of the dtype of the weights."""
        return (torch.round(w / self.scale) + self.zero).clamp(0, self.levels - 1)

    def round(self, w: Tensor) -> Tensor:
        """Nearest values."""
        return (self.codes(w) - self.zero) * self.scale

    def rows(self, part: slice) -> Grid:
        """The grid of some rows."""
        return replace(self, scale=self.scale[part], zero=self.zero[part])

    def _anchored(self, low: Tensor, symmetric: bool) -> Grid:
        zero = torch.full_like(low, self.levels // 2) if symmetric else (-low / self.scale).round()
        return replace(self, zero=zero)


def quantize(
    weight: Tensor, curvature: Curvature, grid: Grid, mask: Tensor | None = None
) -> Tensor:
    """Round the weights of every row, one after the other, the others making up for each.

    The cheapest goes first; but a weight that has drifted out of the grid, by more than half a
    step, goes at once, before it drifts further.

    Args:
        weight: W [R, C]; with a mask, already refitted.
        curvature: Of the layer's inputs.
        grid: Of the rows, fitted before.
        mask: Weights that are not removed, bool [R, C].

    Returns:
        Values of the grid (0 where removed), float64 [R, C].

    Raises:
        UnsupportedModelError: The numbers have run out of precision.
    """
    rows, columns = weight.shape
    check_inputs(columns)
    new = torch.zeros(rows, columns, dtype=torch.float64)
    keep = torch.ones(rows, columns, dtype=torch.bool) if mask is None else mask
    for part in _batches(rows, columns):
        own, kept = grid.rows(part), keep[part]
        inverse = curvature.inverse
        if mask is not None:
            inverse = torch.linalg.inv(_restricted(curvature.hessian, kept))
        state = _Rows(_without_dead(weight[part], curvature) * kept, inverse, 1)
        state.live &= kept
        result = torch.zeros(kept.shape, dtype=torch.float64)
        for _ in range(int(kept.sum(1).max()) if len(kept) else 0):
            state.compact()
            rounded = own.round(state.w)
            error = state.w - rounded
            far = error.abs().masked_fill(~state.live, -1.0)
            worst, at_worst = far.max(1)
            cost = state.costs(error).masked_fill(~state.live, math.inf)
            lowest, at = cost.min(1)
            at = torch.where(worst > own.scale[:, 0] * (0.5 + 1e-9), at_worst, at)
            some = torch.isfinite(lowest)  # rows with fewer weights are done
            column, value = state.index.gather(1, at[:, None]), rounded.gather(1, at[:, None])
            result.scatter_(1, column, torch.where(some[:, None], value, result.gather(1, column)))
            state.remove(at, error * some[:, None])
        new[part] = result
    return new


# in the order of columns ------------------------------------------------------------------------


def sparsegpt(
    weight: Tensor,
    curvature: Curvature,
    keep: float,
    *,
    pattern: tuple[int, int] | None = None,
    width: int = 128,
) -> tuple[Tensor, Tensor]:
    """Prune column by column: all rows share one factor of H^-1, at the cost of R C^2.

    Args:
        weight: W [R, C].
        curvature: Of the layer's inputs.
        keep: Share that stays, in every ``width`` columns.
        pattern: (n, m): n of every m neighbours go.
        width: Columns whose mask is chosen at once.

    Returns:
        New weights, float64 [R, C], and which stay.
    """
    w = _without_dead(weight, curvature)
    upper = torch.linalg.cholesky(curvature.inverse, upper=True)
    mask = torch.ones_like(w, dtype=torch.bool)
    for start in range(0, w.shape[1], width):
        here = slice(start, min(start + width, w.shape[1]))
        if pattern is None:
            score = (w[:, here] / upper.diagonal()[here]) ** 2
            gone = score.numel() - round(keep * score.numel())
            flat = torch.ones(score.numel(), dtype=torch.bool)
            flat[score.flatten().argsort(stable=True)[:gone]] = False
            mask[:, here] = flat.view_as(score)
        for i in range(here.start, here.stop):
            if pattern is not None and i % pattern[1] == 0:
                group = slice(i, i + pattern[1])
                score = (w[:, group] / upper.diagonal()[group]) ** 2
                mask[:, group] = mask[:, group].scatter(
                    1, score.argsort(dim=1, stable=True)[:, : pattern[0]], False
                )
            error = w[:, i] * ~mask[:, i] / upper[i, i]
            w[:, i:] -= error[:, None] * upper[i, i:]
            w[:, i] *= mask[:, i]
    return w * mask, mask


def gptq(weight: Tensor, curvature: Curvature, grid: Grid, mask: Tensor | None = None) -> Tensor:
    """Round column by column.

    Args:
        weight: W [R, C].
        curvature: Of the layer's inputs.
        grid: Of the rows.
        mask: Weights that are not removed.

    Returns:
        Values of the grid, float64 [R, C].
    """
    w = _without_dead(weight, curvature)
    upper = torch.linalg.cholesky(curvature.inverse, upper=True)
    new = torch.zeros_like(w)
    for i in range(w.shape[1]):
        new[:, i] = grid.round(w[:, i : i + 1])[:, 0]
        if mask is not None:
            new[:, i] *= mask[:, i]
        error = (w[:, i] - new[:, i]) / upper[i, i]
        w[:, i:] -= error[:, None] * upper[i, i:]
    return new


# ------------------------------------------------------------------------------------------------


class _Rows:
    """Some rows at work: their weights, and an H^-1 for each, without what is gone.

    Args:
        w: [B, C].
        inverse: H^-1 [C, C], or one for each row.
        block: Columns that go together.
    """

    def __init__(self, w: Tensor, inverse: Tensor, block: int) -> None:
        self.w, self.block = w, block
        self.inverse = inverse.expand(len(w), *inverse.shape[-2:]).clone()
        groups = w.shape[1] // block
        self.index = torch.arange(groups).expand(len(w), groups)
        self.live = torch.ones(len(w), groups, dtype=torch.bool)
        self._whole = groups

    def costs(self, error: Tensor) -> Tensor:
        """What each block costs [B, L], for errors [B, L * block]."""
        if self.block == 1:
            return error**2 / (2 * self.inverse.diagonal(dim1=1, dim2=2))
        batch, size = len(error), self.block
        e = error.view(batch, -1, size)
        tiles = self.inverse.view(batch, e.shape[1], size, e.shape[1], size)
        tiles = tiles.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)  # [B, L, c, c]
        cost: Tensor = (e * torch.linalg.solve(tiles, e[..., None])[..., 0]).sum(-1) / 2
        return cost

    def remove(self, at: Tensor, error: Tensor) -> None:
        """Take one block out of each row; the others make up for its error [B, L * block]."""
        batch, width = self.w.shape
        where = at[:, None] * self.block + torch.arange(self.block)  # [B, c]
        rows = self.inverse.gather(1, where[..., None].expand(-1, -1, width))  # [B, c, L]
        own = rows.gather(2, where[:, None, :].expand(-1, self.block, -1))
        if float(own.diagonal(dim1=1, dim2=2).min()) <= 0:
            raise UnsupportedModelError(
                "the inverse second moments lost their precision; choose more damping"
            )
        e = error.gather(1, where)
        scaled = rows / own if self.block == 1 else torch.linalg.solve(own, rows)
        self.w -= torch.einsum("bc,bcl->bl", e, scaled)
        self.inverse.baddbmm_(rows.transpose(1, 2), scaled, alpha=-1)
        self.w.scatter_(1, where, 0.0)
        wide = where[..., None].expand(-1, -1, width)
        self.inverse.scatter_(1, wide, 0.0)
        self.inverse.scatter_(2, wide.transpose(1, 2), 0.0)
        one = torch.ones(batch, self.block, dtype=self.w.dtype)
        self.inverse.diagonal(dim1=1, dim2=2).scatter_(1, where, one)
        self.live = self.live.scatter(1, at[:, None], False)

    def compact(self) -> None:
        """Leave out what is gone in all rows, an eighth of the whole at a time."""
        most = int(self.live.sum(1).max())
        if most > self.live.shape[1] - max(self._whole // 8, 1) or not most:
            return
        stay = self.live.int().argsort(dim=1, descending=True, stable=True)[:, :most].sort(1).values
        columns = (stay[..., None] * self.block + torch.arange(self.block)).flatten(1)
        self.w = self.w.gather(1, columns)
        wide = columns[..., None].expand(-1, -1, self.inverse.shape[2])
        self.inverse = self.inverse.gather(1, wide)
        self.inverse = self.inverse.gather(2, columns[:, None].expand(-1, columns.shape[1], -1))
        self.index, self.live = self.index.gather(1, stay), self.live.gather(1, stay)


def _restricted(hessian: Tensor, keep: Tensor) -> Tensor:
    """H of the weights that each row keeps, 1 on the diagonal of the others, [B, C, C]."""
    system = hessian * keep[:, :, None] * keep[:, None, :]
    system.diagonal(dim1=1, dim2=2).add_((~keep).double())
    return system


def _without_dead(weight: Tensor, curvature: Curvature) -> Tensor:
    return weight.detach().to("cpu", torch.float64) * ~curvature.dead


def _batches(rows: int, columns: int) -> Iterator[slice]:
    """Rows whose matrices fit into the budget of memory together."""
    size = max(1, _BUDGET_BYTES // (columns * columns * 8))
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def check_inputs(columns: int, name: str = "a layer") -> None:
    """Refuse a layer that takes too long.

    Raises:
        InvalidInputError: More than :data:`MOST_INPUTS` inputs.
    """
    if columns > MOST_INPUTS:
        raise InvalidInputError(
            f"{name} of {columns} inputs takes too long exactly (at most {MOST_INPUTS}); choose "
            "the column order (fast=true)"
        )
