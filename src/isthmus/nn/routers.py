"""Routers of the mixture-of-experts layer: which expert sees which token.

==================  ============================================================================
``SoftmaxRouter``   experts compete: the k largest of softmax(W x), as they are or renormalised
``SigmoidRouter``   they do not: the k largest of sigmoid(W x), which are also the weights
``SinkhornRouter``  the k largest of a transport plan that gives all experts equal shares
``ExpertChoice``    every expert takes its best tokens
``AnalyticRouter``  computed from one hidden unit of each expert, not learnt
``AllExperts``      everything with weight 1: the layer is a dense feed-forward, cut up
``RandomRouter``    k at random: what a router must beat
``OracleRouter``    the k whose outputs are largest, which takes computing all of them
==================  ============================================================================

Scores are computed in float32 at least. Ties are broken by torch's ``topk``.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus.errors import InvalidInputError
from isthmus.nn.moe import ACTIVATIONS, Context, Experts, Routed, Router, Routing

Weights = Literal["raw", "renormalised"]
"""Probabilities of the chosen experts as they are, or over their sum. The latter is also what a
softmax over the logits of the chosen experts gives."""


def _check_k(top_k: int, num_experts: int) -> None:
    if not 1 <= top_k <= num_experts:
        raise InvalidInputError(
            f"top_k must lie between 1 and the number of experts ({num_experts}), got {top_k}"
        )


def _wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x if x.dtype == torch.float64 else x.float()


def _token_choice(
    scores: Tensor, weights: Tensor, top_k: int, real: Tensor | None, out: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Experts [n, k], their weights, and where they count.

    Args:
        scores: What is compared, [n, E].
        weights: What outputs are multiplied by, [n, E].
        top_k: Experts of a token k.
        real: bool [n], False at padding.
        out: bool [n, E], True where an expert is not to be had.
    """
    if out is not None:
        scores = scores.masked_fill(out, -torch.inf)
    experts = scores.topk(top_k, -1).indices
    where = torch.ones_like(experts, dtype=torch.bool)
    if out is not None:
        where &= ~out.gather(1, experts)
    if real is not None:
        where &= real[:, None]
    return experts, weights.gather(1, experts), where


class LinearRouter(Router):
    """Base of the routers that score experts by a matrix.

    Args:
        hidden_size: Width D.
        num_experts: Experts E.
        top_k: Experts of a token k.

    Attributes:
        weight: W, [E, D].
        bias: Added to scores for the selection only, [E]; moved by
            :func:`isthmus.objectives.balance.move_bias`, not by a gradient.
    """

    def __init__(self, hidden_size: int, num_experts: int, top_k: int) -> None:
        super().__init__(num_experts)
        _check_k(top_k, num_experts)
        self.top_k = top_k
        self.weight = nn.Parameter(torch.randn(num_experts, hidden_size) * hidden_size**-0.5)
        self.bias: Tensor
        self.register_buffer("bias", torch.zeros(num_experts))

    def logits(self, x: Tensor) -> Tensor:
        """Scores [n, E] of x [n, D]."""
        return _wide(F.linear(_wide(x), _wide(self.weight)))


class SoftmaxRouter(LinearRouter):
    """Token choice by a softmax over the experts (Shazeer et al. 2017; Switch with ``top_k=1``).

    Args:
        hidden_size: Width D.
        num_experts: Experts E.
        top_k: Experts of a token k.
        weights: See :data:`Weights`.
        scale: What the weights are multiplied by.

    Raises:
        InvalidInputError: ``top_k`` or ``weights`` is out of range.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        weights: Weights = "raw",
        scale: float = 1.0,
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k)
        if weights not in get_args(Weights):
            raise InvalidInputError(f"weights must be raw or renormalised, got {weights!r}")
        self.weights, self.scale = weights, scale

    def forward(self, x: Tensor, context: Context) -> Routed:
        """Decide where tokens x [n, D] go."""
        logits = self.logits(x)
        p = logits.softmax(-1)
        experts, weights, where = _token_choice(p + self.bias, p, self.top_k, context.real)
        if self.weights == "renormalised":
            weights = weights / weights.sum(-1, keepdim=True)
        routing = Routing.chosen(experts, self.scale * weights, where, self.num_experts)
        return Routed(routing, logits, context.real)


class SigmoidRouter(LinearRouter):
    """Token choice without competition: each score is a sigmoid of its own (Csordas et al. 2023).

    Args:
        hidden_size: Width D.
        num_experts: Experts E.
        top_k: Experts of a token k.
        dropout: In training, share of scores that are left out before the choice.
        scale: What the weights are multiplied by.

    Raises:
        InvalidInputError: A value is out of range.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        dropout: float = 0.0,
        scale: float = 1.0,
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k)
        if not 0 <= dropout < 1:
            raise InvalidInputError(f"dropout must be at least 0 and below 1, got {dropout}")
        self.dropout, self.scale = dropout, scale

    def forward(self, x: Tensor, context: Context) -> Routed:
        """Decide where tokens x [n, D] go."""
        logits = self.logits(x)
        p = logits.sigmoid()
        out = None
        if self.training and self.dropout:
            drawn = torch.rand(p.shape, generator=context.generator).to(p.device)
            out = drawn < self.dropout
        experts, weights, where = _token_choice(p + self.bias, p, self.top_k, context.real, out)
        routing = Routing.chosen(experts, self.scale * weights, where, self.num_experts)
        return Routed(routing, logits, context.real)


def equal_norms(weight: Tensor) -> None:
    """Give all rows one norm and keep the deviation of the whole, in place.

    So the first choices depend on directions alone (Csordas et al. 2023, section 5).
    """
    before = weight.std(unbiased=False)
    weight /= weight.norm(dim=1, keepdim=True)
    weight *= before / weight.std(unbiased=False).clamp(min=1e-12)


def sinkhorn(logits: Tensor, temperature: float = 1.0, iterations: int = 20) -> Tensor:
    """Entropic transport plan between tokens and experts (Cuturi 2013), computed in log space.

    Args:
        logits: Gains [n, E].
        temperature: Weight of the entropy; small values approach a hard assignment.
        iterations: Times that rows and columns are scaled.

    Returns:
        [n, E]; every token's row sums to 1 up to the iterations left out, and every expert's
        column to ``n / E``.

    Raises:
        InvalidInputError: A value is out of range.

    Example:
        >>> plan = sinkhorn(torch.tensor([[9.0, 0.0], [9.0, 0.0]]))
        >>> plan.round(decimals=4).tolist()  # both want expert 0; each gets half of both
        [[0.5, 0.5], [0.5, 0.5]]
    """
    if temperature <= 0 or iterations < 1:
        raise InvalidInputError("sinkhorn needs a positive temperature and at least 1 iteration")
    n, count = logits.shape
    gain = logits / temperature
    column = gain.new_zeros(1, count)
    share = math.log(max(1, n) / count)
    row = gain.new_zeros(n, 1)
    for _ in range(iterations):
        row = -torch.logsumexp(gain + column, 1, keepdim=True)
        column = share - torch.logsumexp(gain + row, 0, keepdim=True)
    return (gain + row + column).exp()


class SinkhornRouter(LinearRouter):
    """Token choice from a balanced plan, weighted by sigmoids (S-BASE; Clark et al. 2022).

    The plan decides in training only, without a gradient; at inference the scores themselves do,
    so that a token does not depend on its batch.

    Args:
        hidden_size: Width D.
        num_experts: Experts E.
        top_k: Experts of a token k.
        temperature: Of :func:`sinkhorn`.
        iterations: Of :func:`sinkhorn`.
    """

    looks_across: ClassVar[bool] = True

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        temperature: float = 1.0,
        iterations: int = 20,
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k)
        self.temperature, self.iterations = temperature, iterations

    def forward(self, x: Tensor, context: Context) -> Routed:
        """Decide where tokens x [n, D] go."""
        logits = self.logits(x)
        scores = logits.detach()
        if self.training:
            real = slice(None) if context.real is None else context.real
            scores = scores.clone()
            scores[real] = sinkhorn(scores[real], self.temperature, self.iterations)
        p = logits.sigmoid()
        experts, weights, where = _token_choice(scores, p, self.top_k, context.real)
        routing = Routing.chosen(experts, weights, where, self.num_experts)
        return Routed(routing, logits, context.real)


class ExpertChoice(LinearRouter):
    """Each expert takes its ``ceil(n k / E)`` best tokens, by softmax(W x) (Zhou et al. 2022).

    A token may be taken by no expert, or by all.
    """

    looks_across: ClassVar[bool] = True

    def forward(self, x: Tensor, context: Context) -> Routed:
        """Decide where tokens x [n, D] go."""
        logits = self.logits(x)
        p = logits.softmax(-1)
        scores, n = p.detach(), len(x)
        if context.real is not None:
            scores = scores.masked_fill(~context.real[:, None], -1.0)
            n = int(context.real.sum())
        take = min(n, math.ceil(n * self.top_k / self.num_experts))
        token = scores.topk(take, 0).indices.T.flatten()  # [E c], sorted by expert
        expert = torch.arange(self.num_experts, device=x.device).repeat_interleave(take)
        routing = Routing.of(
            token, expert, p[token, expert], tokens=len(x), experts=self.num_experts
        )
        return Routed(routing, logits, context.real)


class AnalyticRouter(Router):
    """Scores that are computed, not learnt: the size of one hidden unit of each expert (CMoE).

    ``r_e = abs(act(x . g_e) (x . u_e))`` with rows of unit length, ``s = softmax(r)``; the k
    largest of ``s + bias`` are taken, with weights ``1 + s_e a_e`` (Pei et al. 2025, section 4).

    Args:
        gate: Gate rows g of the units that stand for the experts, [E, D].
        up: Up rows u, [E, D].
        top_k: Experts of a token k.
        activation: A name in :data:`isthmus.nn.moe.ACTIVATIONS`.

    Attributes:
        scale: a, zeros at the start, so that weights are 1 until it is trained.
        bias: For the selection only, [E].
    """

    def __init__(self, gate: Tensor, up: Tensor, top_k: int, activation: str = "silu") -> None:
        super().__init__(len(gate))
        _check_k(top_k, self.num_experts)
        self.top_k, self.activation = top_k, activation
        self.gate: Tensor
        self.up: Tensor
        self.bias: Tensor
        self.register_buffer("gate", F.normalize(gate.detach().float(), dim=-1))
        self.register_buffer("up", F.normalize(up.detach().float(), dim=-1))
        self.register_buffer("bias", torch.zeros(self.num_experts, device=gate.device))
        self.scale = nn.Parameter(torch.zeros(self.num_experts, device=gate.device))

    def logits(self, x: Tensor) -> Tensor:
        """The sizes r [n, E] of x [n, D]."""
        x = _wide(x)
        act = ACTIVATIONS[self.activation]
        return (act(F.linear(x, self.gate)) * F.linear(x, self.up)).abs()

    def forward(self, x: Tensor, context: Context) -> Routed:
        """Decide where tokens x [n, D] go."""
        logits = self.logits(x)
        s = logits.softmax(-1)
        weights = 1 + s * self.scale
        experts, weights, where = _token_choice(s + self.bias, weights, self.top_k, context.real)
        routing = Routing.chosen(experts, weights, where, self.num_experts)
        return Routed(routing, logits, context.real)


class AllExperts(Router):
    """Every token to every expert with weight 1."""

    def forward(self, x: Tensor, context: Context) -> Routed:
        """Decide where tokens x [n, D] go."""
        experts = torch.arange(self.num_experts, device=x.device).expand(len(x), -1)
        weights = torch.ones(experts.shape, device=x.device)
        where = torch.ones_like(experts, dtype=torch.bool)
        if context.real is not None:
            where = where & context.real[:, None]
        return Routed(Routing.chosen(experts, weights, where, self.num_experts), None, context.real)


class RandomRouter(Router):
    """k experts at random, with equal weights.

    Args:
        num_experts: Experts E.
        top_k: Experts of a token k.
        weight: Their weight.
        seed: Seed of the draw, the same at every call, where the context brings no generator.
    """

    def __init__(self, num_experts: int, top_k: int, *, weight: float = 1.0, seed: int = 0) -> None:
        super().__init__(num_experts)
        _check_k(top_k, num_experts)
        self.top_k, self.weight, self.seed = top_k, weight, seed

    def forward(self, x: Tensor, context: Context) -> Routed:
        """Decide where tokens x [n, D] go."""
        generator = context.generator or torch.Generator().manual_seed(self.seed)
        scores = torch.rand(len(x), self.num_experts, generator=generator).to(x.device)
        weights = torch.full_like(scores, self.weight)
        chosen = _token_choice(scores, weights, self.top_k, context.real)
        return Routed(Routing.chosen(*chosen, self.num_experts), None, context.real)


class OracleRouter(Router):
    """The k experts whose outputs are longest, with weight 1: a bound for cheap routers.

    It computes all experts to know them, so it saves nothing.

    Args:
        experts: Those of the layer.
        top_k: Experts of a token k.
    """

    def __init__(self, experts: Experts, top_k: int) -> None:
        super().__init__(experts.num_experts)
        _check_k(top_k, self.num_experts)
        self.top_k = top_k
        self._experts = (experts,)  # theirs, not a part of this module

    def forward(self, x: Tensor, context: Context) -> Routed:
        """Decide where tokens x [n, D] go."""
        (experts,) = self._experts
        parts = [experts.inner(x, e) @ experts.down_proj[e].t() for e in range(self.num_experts)]
        logits = torch.stack([part.norm(dim=-1) for part in parts], -1)
        chosen = _token_choice(logits, torch.ones_like(logits), self.top_k, context.real)
        return Routed(Routing.chosen(*chosen, self.num_experts), logits, context.real)
