"""Nested drafters on recorded texts: what any policy of exits would have drafted, and at what cost.

Greedy decoding follows the target's text, so one forward of the drafter over that text tells how
every policy fares on it, and thousands of policies can be compared at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from isthmus.decoding.target import HubTarget
from isthmus.models.nested import exit_logits, exits_of

NEVER = 2.0
"""A threshold that no confidence reaches: the exit is passed by and its head is not run."""


def confidence(logits: torch.Tensor) -> torch.Tensor:
    """Largest probability [...] of logits [..., V]."""
    return torch.softmax(logits.float(), -1).amax(-1)


@dataclass(frozen=True)
class Record:
    """What each exit would have said at every place of texts that a target wrote.

    As long as drafts stand, the drafter's prefix is the target's text, so one forward tells where
    any policy would have been right.

    Attributes:
        right: Whether its likeliest token is the target's, bool [E, R, T].
        sure: How confident it was, [E, R, T].
        layers: Parameters read between one exit and the next, [E].
        head: Parameters of the head.
    """

    right: NDArray[np.bool_]
    sure: NDArray[np.float64]
    layers: NDArray[np.float64]
    head: float


@torch.no_grad()
def record(model: HubTarget, texts: torch.Tensor, start: int) -> Record:
    """Look at texts int64 [R, start + T] with every exit of a drafter."""
    exits = exits_of(model.config)
    right, sure = [], []
    for logits in exit_logits(model.model, texts, exits):
        logits = logits[:, start - 1 : -1]
        right.append((logits.argmax(-1) == texts[:, start:]).numpy())
        sure.append(confidence(logits).double().numpy())
    steps = np.diff((0, *exits))
    layer, head = _sizes(model)
    layers = np.asarray(steps * layer, dtype=np.float64)
    return Record(np.stack(right), np.stack(sure), layers, head)


def _sizes(model: HubTarget) -> tuple[float, float]:
    """Parameters of a layer and of the head: what a forward of one token reads."""
    layer = sum(p.numel() for p in model.layers[0].parameters())
    return float(layer), float(model.model.get_output_embeddings().weight.numel())


def forward_cost(model: HubTarget) -> float:
    """Parameters that one forward of a target reads."""
    layer, head = _sizes(model)
    return layer * model.num_layers + head


def speedups(
    seen: Record,
    target: float,
    thresholds: Sequence[Sequence[float]],
    stops: Sequence[float],
    lengths: Sequence[int],
) -> NDArray[np.float64]:
    """Predicted speed-up of policies: tokens per target forward's worth of parameters read.

    A forward costs the parameters that it reads, however many tokens it holds. What is drafted
    after a wrong token is charged as what the drafter would do on the right prefix.

    Args:
        seen: The drafter on the texts.
        target: Parameters that a target forward reads.
        thresholds: Confidence that each exit asks for, [P, E]; the last column is 0.
        stops: A draft ends after a token less sure than this, [P].
        lengths: Draft tokens at most, [P].

    Returns:
        [P].
    """
    rates = np.array(thresholds)
    leaves = seen.sure[None] >= rates[:, :, None, None]  # [P, E, R, T]
    exit_at = leaves.argmax(1)  # the first exit that is sure, [P, R, T]
    price = np.cumsum(seen.layers)[None] + np.cumsum(rates <= 1, 1) * seen.head  # [P, E]
    each = np.arange(len(rates))[:, None, None]
    rows, places = (np.arange(n) for n in seen.right.shape[1:])
    hit = seen.right[exit_at, rows[:, None], places]  # [P, R, T]
    sure = seen.sure[exit_at, rows[:, None], places]
    price = price[each, exit_at] / target
    length, p = len(places), each[:, :, 0]
    stop, gamma = np.array(stops)[:, None], np.array(lengths)[:, None]
    at = np.zeros(hit.shape[:2], dtype=np.int64)
    spent = np.zeros(len(rates))
    while bool((at < length).any()):
        going = at < length
        spent += going.sum(1)  # one target forward a round
        standing, accepted = going.copy(), np.zeros_like(at)
        for step in range(int(gamma.max())):
            place = np.minimum(at + step, length - 1)
            going = going & (at + step < length - 1) & (step < gamma)  # the last needs no draft
            if not bool(going.any()):
                break
            spent += np.where(going, price[p, rows, place], 0).sum(1)
            standing = standing & going & hit[p, rows, place]
            accepted += standing
            going = going & (sure[p, rows, place] >= stop)
        at = np.minimum(at + accepted + 1, length)
    found: NDArray[np.float64] = hit.shape[1] * length / spent
    return found
