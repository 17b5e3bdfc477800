"""Linear chains: the best path, its score, and the best path through every edge.

A chain has T places with K states each and a score for every step from a state to one of the next
place. All functions take ``edges`` [B, T - 1, K, K], float, where ``edges[b, t, i, j]`` belongs to
state i at place t and j at place t + 1, and ``start`` [B, K], scores of the states at place 0
(zeros when None). A score of -inf forbids a step.

What is added up over paths is the semiring: ``"max"`` takes the best path, ``"sum"`` the
log-sum-exp of all of them. Messages are prefix products of the edge matrices in that semiring.
They are computed place by place, or with ``scan=True`` by an odd-even scan (Hillis and Steele
1986; Blelloch 1990) of 2 log2 T rounds, each of them parallel over the places, at K times the work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

from isthmus.errors import InvalidInputError

Semiring = Literal["max", "sum"]


def _checked(edges: torch.Tensor, start: torch.Tensor | None) -> torch.Tensor:
    """The scores of place 0, [B, K]."""
    if edges.ndim != 4 or edges.shape[2] != edges.shape[3] or not edges.is_floating_point():
        raise InvalidInputError(
            f"edges must be floats [B, T - 1, K, K], got {edges.dtype} {list(edges.shape)}"
        )
    batch, _, states, _ = edges.shape
    if start is None:
        return edges.new_zeros(batch, states)
    if start.shape != (batch, states):
        raise InvalidInputError(
            f"start must be [B, K] = {[batch, states]} for these edges, got {list(start.shape)}"
        )
    return start


def _add(scores: torch.Tensor, dim: int, semiring: Semiring) -> torch.Tensor:
    """Sum of a semiring; where every path is forbidden it is -inf with a gradient of zero."""
    if semiring == "max":
        return scores.amax(dim)
    if semiring != "sum":
        raise InvalidInputError(f"semiring must be 'max' or 'sum', got {semiring!r}")
    top = scores.amax(dim, keepdim=True).detach()
    dead = top == -torch.inf
    total = (scores - top.masked_fill(dead, 0.0)).exp().sum(dim, keepdim=True)
    whole = top + total.masked_fill(dead, 1.0).log()
    return whole.squeeze(dim)


def _scan(
    items: torch.Tensor, product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """All prefix products of N items along dim 1, for any associative product."""
    count = items.shape[1]
    if count < 2:
        return items
    odd = _scan(product(items[:, : count - 1 : 2], items[:, 1::2]), product)  # places 1, 3, ...
    even = product(odd[:, : (count - 1) // 2], items[:, 2::2])  # places 2, 4, ...
    out = torch.empty_like(items)
    out[:, 0], out[:, 1::2], out[:, 2::2] = items[:, 0], odd, even
    return out


def messages(
    edges: torch.Tensor,
    start: torch.Tensor | None = None,
    *,
    semiring: Semiring = "sum",
    scan: bool = False,
) -> torch.Tensor:
    """Paths from place 0 that end in each state, added up: the forward messages.

    Args:
        edges: See the module.
        start: See the module.
        semiring: ``"max"`` or ``"sum"``.
        scan: Logarithmic depth instead of place by place.

    Returns:
        [B, T, K].

    Raises:
        InvalidInputError: The shapes do not fit, or there is no such semiring.

    Example:
        >>> edges = torch.tensor([[[[1.0, 5.0], [2.0, 0.0]]]])
        >>> messages(edges, torch.tensor([[0.0, 3.0]]), semiring="max").tolist()
        [[[0.0, 3.0], [5.0, 5.0]]]
    """
    found = _checked(edges, start)
    if scan:

        def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return _add(a[..., :, :, None] + b[..., None, :, :], -2, semiring)

        later = _add(found[:, None, :, None] + _scan(edges, product), -2, semiring)
        return torch.cat([found[:, None], later], 1)
    steps = [found]
    for place in range(edges.shape[1]):
        steps.append(_add(steps[-1][:, :, None] + edges[:, place], 1, semiring))
    return torch.stack(steps, 1)


def backward_messages(
    edges: torch.Tensor, *, semiring: Semiring = "sum", scan: bool = False
) -> torch.Tensor:
    """Paths from each state to the last place, added up, [B, T, K]; see :func:`messages`."""
    return messages(edges.flip(1).mT, semiring=semiring, scan=scan).flip(1)


def total(
    edges: torch.Tensor, start: torch.Tensor | None = None, *, semiring: Semiring = "sum"
) -> torch.Tensor:
    """Score of the best path, or of all paths together (the log-partition), [B]."""
    return _add(messages(edges, start, semiring=semiring)[:, -1], -1, semiring)


def edge_marginals(
    edges: torch.Tensor,
    start: torch.Tensor | None = None,
    *,
    semiring: Semiring = "sum",
    scan: bool = False,
) -> torch.Tensor:
    """Paths through each edge, added up: with ``"max"`` the max-marginals.

    Under ``"sum"`` the exponential of the result less :func:`total` is the probability of the edge.

    Returns:
        [B, T - 1, K, K], log-scores; arguments and errors as for :func:`messages`.

    Example:
        >>> edges = torch.tensor([[[[1.0, 5.0], [2.0, 0.0]], [[0.0, -1.0], [0.0, 0.0]]]])
        >>> edge_marginals(edges, semiring="max").tolist()
        [[[[1.0, 5.0], [2.0, 0.0]], [[2.0, 1.0], [5.0, 5.0]]]]
    """
    before = messages(edges, start, semiring=semiring, scan=scan)[:, :-1]
    after = backward_messages(edges, semiring=semiring, scan=scan)[:, 1:]
    return before[..., :, None] + edges + after[..., None, :]


def viterbi(
    edges: torch.Tensor, start: torch.Tensor | None = None, *, scan: bool = False
) -> torch.Tensor:
    """The best path; of equal ones that of the lowest states.

    Where every path is forbidden the answer is some path; :func:`total` then is -inf.

    Returns:
        State at each place, int64 [B, T]; arguments and errors as for :func:`messages`.

    Example:
        >>> viterbi(torch.tensor([[[[1.0, 5.0], [2.0, 0.0]], [[0.0, -1.0], [0.0, 2.0]]]])).tolist()
        [[0, 1, 1]]
    """
    after = backward_messages(edges, semiring="max", scan=scan)
    first = (_checked(edges, start) + after[:, 0]).argmax(1)[:, None]  # [B, 1]
    onward = (edges + after[:, 1:, None, :]).argmax(-1)  # best successor, [B, T - 1, K]
    if scan:  # a map of states after another is a product, too
        reached = _scan(onward, lambda a, b: b.gather(-1, a))
        where = first[:, None].expand(-1, reached.shape[1], -1)
        return torch.cat([first, reached.gather(-1, where)[..., 0]], 1)
    path = [first]
    for place in range(edges.shape[1]):
        path.append(onward[:, place].gather(1, path[-1]))
    return torch.cat(path, 1)
