"""Losses that keep all experts of a mixture in use, and one way that needs no loss.

All take what routers decided (:class:`isthmus.nn.moe.Routed`) and leave padding out. With several
processes a loss is that of a process's own tokens; counts that move a bias are summed over them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from isthmus.errors import InvalidInputError
from isthmus.nn.moe import Routed, Routing


def _logits(routed: Routed) -> Tensor:
    if routed.logits is None:
        raise InvalidInputError("this router has no scores to balance")
    return routed.logits if routed.real is None else routed.logits[routed.real]


def entropy(routed: Routed) -> Tensor:
    """Negative entropy of the mean law over the experts (Csordas et al. 2023, section 5).

    ``sum_e p_e log p_e`` with p the mean over the batch of softmax(logits), computed in log space.
    It is least, ``-log E``, where all experts are used alike *on average*; a single token may be
    as sure as it likes.

    Returns:
        Scalar in nats.

    Example:
        >>> sure = torch.tensor([[99.0, 0.0], [0.0, 99.0]])
        >>> round(float(entropy(Routed(None, sure))), 4), round(-math.log(2), 4)
        (-0.6931, -0.6931)
    """
    logits = _logits(routed)
    mean = torch.logsumexp(logits.log_softmax(-1), 0) - math.log(max(1, len(logits)))
    return (mean.exp() * mean).sum()


def switch(routed: Routed) -> Tensor:
    """``E sum_e f_e P_e``: share of first choices times mean probability (Switch, 2021, eq. 4).

    It is 1 where both are even.

    Raises:
        InvalidInputError: The routing is no sparse one.
    """
    if not isinstance(routed.routing, Routing):
        raise InvalidInputError("the switch loss counts tokens, which a dense routing has none of")
    logits, routing = _logits(routed), routed.routing
    first = torch.bincount(routing.expert[routing.rank == 0], minlength=routing.experts)
    share = first / first.sum().clamp(min=1)
    return routing.experts * (share * logits.softmax(-1).mean(0)).sum()


def importance(routed: Routed) -> Tensor:
    """Squared coefficient of variation of the summed probabilities (Shazeer et al. 2017, eq. 6)."""
    total = _logits(routed).softmax(-1).sum(0)
    return total.var(unbiased=False) / total.mean().square()


def z_loss(routed: Routed) -> Tensor:
    """Mean squared log-partition, which keeps logits small (Zoph et al. 2022, eq. 5)."""
    return torch.logsumexp(_logits(routed), -1).square().mean()


@torch.no_grad()
def move_bias(bias: Tensor, routing: Routing, rate: float = 1e-3) -> None:
    """Balance without a loss: ``b_e += rate sign(mean load - load_e)``, in place.

    Wang et al. 2024 (2408.15664). Loads are summed over processes.

    Args:
        bias: What a router adds to its scores for the selection only, [E].
        routing: What it decided.
        rate: Size of a step.

    Example:
        >>> bias, one = torch.zeros(2), torch.tensor([0, 0, 0, 1])
        >>> move_bias(bias, Routing.of(one, one, one.float(), tokens=2, experts=2))
        >>> [round(b, 4) for b in bias.tolist()]
        [-0.001, 0.001]
    """
    load = routing.counts.to(bias.dtype)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(load)
    bias += rate * torch.sign(load.mean() - load)


@torch.no_grad()
def usage(routings: Iterable[Routing]) -> Tensor:
    """Share of all choices that each expert got, over several batches, [E].

    Raises:
        InvalidInputError: There is nothing to count.
    """
    counts = [r.counts for r in routings]
    if not counts:
        raise InvalidInputError("no routing was given")
    total = torch.stack(counts).sum(0).float()
    return total / total.sum().clamp(min=1)


def usage_entropy(share: Tensor) -> float:
    """Entropy of shares [E] over its maximum ``log E``: 1 is even use, 0 is one expert only.

    Example:
        >>> usage_entropy(torch.tensor([0.5, 0.5])), usage_entropy(torch.tensor([1.0, 0.0]))
        (1.0, 0.0)
    """
    if len(share) == 1:
        return 1.0
    return abs(float(torch.special.entr(share.double()).sum()) / math.log(len(share)))
