"""Truncations of the law before a draw: transformers' warpers as reshapes, and mirostat.

A truncation keeps the likelier part of the vocabulary. Those that look at one law alone are
transformers' own (:func:`typical`, :func:`epsilon`, :func:`eta`, :func:`top_h`); ``top_k``,
``top_p`` and ``min_p`` are options of :class:`isthmus.decoding.law.Law`. Mirostat steers how much
is kept by how surprising the text has been.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from transformers.generation import logits_process as lp

from isthmus.decoding.reshape import Pure, Trail
from isthmus.decoding.tree import TokenTree
from isthmus.errors import InvalidInputError
from isthmus.roles import Context, Stage, Target


class Warp(Pure):
    """A row-wise logits processor of transformers with its turn after the temperature.

    Args:
        warper: Called as ``warper(ids, scores [R, V])``; it must look at the scores only.
    """

    stage: Stage = "truncate"

    def __init__(self, warper: Any) -> None:
        self.warper = warper

    def __call__(self, logits: torch.Tensor, tree: TokenTree, context: Context) -> torch.Tensor:
        """See :class:`isthmus.roles.Reshape`."""
        flat = logits.flatten(0, 1)
        out: torch.Tensor = self.warper(tree.tokens.new_zeros(len(flat), 1), flat)
        return out.view_as(logits)


def typical(mass: float = 0.95) -> Warp:
    """The smallest set with this mass, tokens of a surprise nearest the entropy first."""
    return Warp(lp.TypicalLogitsWarper(_inside("mass", mass)))


def epsilon(least: float = 3e-4) -> Warp:
    """Tokens of at least this probability."""
    return Warp(lp.EpsilonLogitsWarper(_inside("epsilon", least)))


def eta(least: float = 3e-4, device: str | torch.device = "cpu") -> Warp:
    """Tokens of at least ``min(e, sqrt(e) exp(-entropy))``."""
    return Warp(lp.EtaLogitsWarper(_inside("epsilon", least), device=str(device)))


def top_h(share: float = 0.4) -> Warp:
    """The likeliest of 100 tokens whose ``-p log p`` add up to this share of the entropy."""
    return Warp(lp.TopHLogitsWarper(_inside("h", share, one=True)))


def _inside(name: str, value: float, *, one: bool = False) -> float:
    if not (0.0 < value < 1.0 or (one and value == 1.0)):
        raise InvalidInputError(
            f"{name} must be above 0 and {'at most' if one else 'below'} 1, got {value}"
        )
    return value


RANKS = 100
"""Ranks that mirostat fits its Zipf law to."""


def zipf_exponent(logprobs: torch.Tensor) -> torch.Tensor:
    """Exponent s of a Zipf law fitted to the likeliest tokens of log-probabilities [..., V].

    ``s = sum t_i b_i / sum t_i^2`` with ``t_i = ln((i + 2) / (i + 1))`` and
    ``b_i = ln(p_i / p_(i+1))`` over the first ranks (Basu et al. 2020, eq. 30).

    Example:
        >>> law = -2.0 * torch.arange(1, 200).double().log()  # p_i proportional to i^-2
        >>> round(float(zipf_exponent(law)), 6)
        2.0
    """
    best = logprobs.topk(min(RANKS + 1, logprobs.shape[-1])).values
    steps = torch.arange(best.shape[-1] - 1, device=best.device, dtype=best.dtype)
    t = ((steps + 2) / (steps + 1)).log()
    b = best[..., :-1] - best[..., 1:]
    known = best[..., 1:].isfinite()
    top, bottom = torch.where(known, b * t, 0.0).sum(-1), torch.where(known, t * t, 0.0).sum(-1)
    return top / bottom.clamp(min=1e-12)


class Mirostat(Trail[float]):
    """Keep the surprise of the text near a target (Basu et al. 2020, 2007.14966).

    A running bound mu starts at ``2 tau`` and moves by ``eta`` times the difference between the
    surprise of each token, ``-log2 p`` under the law before the cut, and ``tau``. Version 1 turns
    mu into a number of tokens k through a Zipf law; version 2 drops tokens more surprising than
    mu. The likeliest token always stays. On a draft every node has the mu of its own path.

    Args:
        tau: Surprise aimed at, in bits.
        eta: Learning rate.
        version: 1 or 2.

    Raises:
        InvalidInputError: A number is out of range.
    """

    def __init__(self, tau: float = 3.0, eta: float = 1.0, version: Literal[1, 2] = 1) -> None:
        super().__init__()
        if tau <= 0.0 or eta < 0.0 or version not in (1, 2):
            raise InvalidInputError(
                f"mirostat needs tau > 0, eta >= 0 and version 1 or 2, got {tau}, {eta}, {version}"
            )
        self.tau, self.eta, self.version = tau, eta, version

    def begin(self, context: Context, target: Target, **inputs: Any) -> None:
        """Start every row at ``2 tau``."""
        del target, inputs
        for request in context.requests:
            self.states[request] = 2.0 * self.tau
            self._held.pop(request, None)

    def stood(self, state: float, row: int, nodes: list[int], token: int) -> float:
        """The bound after the token."""
        del state  # the path through the tree started from it
        surprise = -float(self._logprobs[row, nodes[-1], token]) / math.log(2.0)
        return float(self._mu[row, nodes[-1]]) - self.eta * (surprise - self.tau)

    def __call__(self, logits: torch.Tensor, tree: TokenTree, context: Context) -> torch.Tensor:
        """See :class:`isthmus.roles.Reshape`."""
        self.settle(context)
        self.hold(tree, context)
        self._logprobs = logprobs = torch.log_softmax(logits, -1)
        start = [self.states[request] for request in context.requests]
        self._mu = mu = self.bounds(logprobs, tree, logits.new_tensor(start))
        if self.version == 2:
            cut = -logprobs / math.log(2.0) > mu[..., None]
        else:
            order = logprobs.sort(dim=-1, descending=True, stable=True).indices
            ranks = torch.empty_like(order).scatter_(
                -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
            )
            cut = ranks >= self.count(logprobs, mu)[..., None]
        best = torch.zeros_like(cut).scatter_(-1, logprobs.argmax(-1, keepdim=True), True)
        return logits.masked_fill(cut & ~best, -torch.inf)

    def bounds(self, logprobs: torch.Tensor, tree: TokenTree, start: torch.Tensor) -> torch.Tensor:
        """Bound mu [B, N] at every node from that of each root [B]."""
        if tree.nodes == 1:
            return start[:, None]
        parent = tree.topology.parent.expand(tree.batch, -1).clamp(min=0)
        said = logprobs.gather(1, parent[..., None].expand_as(logprobs))
        surprise = -said.gather(2, tree.tokens[..., None])[..., 0] / math.log(2.0)
        # a banned token's own surprise is infinite; it never stands
        change = self.eta * (surprise.clamp(max=1e4) - self.tau)
        change[:, 0] = 0.0
        above = tree.topology.ancestors.to(change).expand(tree.batch, -1, -1)
        return start[:, None] - (above @ change[..., None])[..., 0]

    def count(self, logprobs: torch.Tensor, mu: torch.Tensor) -> torch.Tensor:
        """Tokens k [B, N] whose Zipf law has cross-entropy mu (eq. 35)."""
        s = zipf_exponent(logprobs).clamp(min=1e-3)
        e = s - 1.0
        flat = e.abs() < 1e-4  # the limit of e / (1 - V^-e)
        safe = torch.where(flat, 1.0, e)
        size = float(logprobs.shape[-1])
        share = torch.where(flat, 1.0 / math.log(size), safe / (1.0 - size**-safe))
        k = ((share.log() + mu * math.log(2.0)) / s).exp()
        return k.nan_to_num(nan=1.0).clamp(1.0, size).round()
