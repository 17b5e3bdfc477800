"""One mixture-of-experts layer for all routers.

::

    X [n, D] --router(X, context)--> routing --> sorted by expert --> experts --> weighted sum --> Y
       |                                                                                      +
       `----------------------------------- shared(X) ----------------------------------------'

A router gives one of two forms. A sparse one lists pairs of token and expert (:class:`Routing`). A
dense one mixes tokens into slots and slots into tokens (:class:`Slots`)::

    Y_i = sum over e, j of C[i, e, j] f_e(sum over k of D[k, e, j] X_k) + shared(X_i)

Every sparse routing has a dense form, :meth:`Routing.slots`, which tests compare it with. Experts
are kept as the fused tensors that transformers 5 has, and run one after another, each on a
contiguous slice of the tokens sorted by expert. Nothing is dropped unless a :class:`Capacity` is
given.

Where the layer stands deep inside a model, :func:`given` hands it what a router may need besides
the hidden states (padding, token ids), and :func:`routings` collects what the routers decided, for
balance losses and reports.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus.errors import InvalidInputError

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu-tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}
"""Activations of experts by name."""

Drop = Literal["position", "random", "probability", "rank+probability"]
"""Which tokens go first where an expert is full: by their place in the batch, at random, by the
weight that the router gives them, or all first choices before all second ones."""


@dataclass(frozen=True)
class Context:
    """What a router may know besides the hidden states.

    Attributes:
        real: bool [n], False at padding, which is sent nowhere; all tokens are real when None.
        tokens: Ids of the tokens, int64 [n], for routers that look them up.
        experts: Experts that something outside the layer has chosen, int64 [n] or [n, k].
        generator: Source of what is drawn.
    """

    real: Tensor | None = None
    tokens: Tensor | None = None
    experts: Tensor | None = None
    generator: torch.Generator | None = None


@dataclass(frozen=True)
class Slots:
    """A dense routing.

    Attributes:
        dispatch: D, what each slot of each expert is mixed of, [n, E, s].
        combine: C, what each token is mixed of, [n, E, s].
    """

    dispatch: Tensor
    combine: Tensor


@dataclass(frozen=True)
class Routing:
    """A sparse routing: R pairs of a token and an expert, sorted by expert.

    Attributes:
        token: int64 [R].
        expert: int64 [R], not falling.
        weight: What the expert's output is multiplied by, [R].
        rank: Which of its token's choices it is, counted from 0, int64 [R].
        tokens: Number of tokens n, padding included.
        experts: Number of experts E.
    """

    token: Tensor
    expert: Tensor
    weight: Tensor
    rank: Tensor
    tokens: int
    experts: int

    @classmethod
    def of(
        cls,
        token: Tensor,
        expert: Tensor,
        weight: Tensor,
        rank: Tensor | None = None,
        *,
        tokens: int,
        experts: int,
    ) -> Routing:
        """Sort pairs by expert; those of one expert stay in their order."""
        order = expert.argsort(stable=True)
        rank = torch.zeros_like(token) if rank is None else rank
        return cls(token[order], expert[order], weight[order], rank[order], tokens, experts)

    @classmethod
    def chosen(cls, experts: Tensor, weights: Tensor, where: Tensor, count: int) -> Routing:
        """Token choice: the k experts of each token.

        Args:
            experts: int64 [n, k], best first.
            weights: [n, k].
            where: bool [n, k], False where a choice does not count.
            count: Number of experts E.
        """
        token, rank = where.nonzero(as_tuple=True)
        return cls.of(
            token, experts[where], weights[where], rank, tokens=len(experts), experts=count
        )

    @cached_property
    def counts(self) -> Tensor:
        """Tokens of each expert, int64 [E]."""
        return torch.bincount(self.expert, minlength=self.experts)

    @cached_property
    def place(self) -> Tensor:
        """Place of each pair among those of its expert, int64 [R]."""
        starts = self.counts.cumsum(0) - self.counts
        return torch.arange(len(self.token), device=self.token.device) - starts[self.expert]

    def slots(self) -> Slots:
        """The dense form: slot j of expert e holds the j-th token of it."""
        size = (self.tokens, self.experts, max(1, int(self.counts.max()) if self.experts else 0))
        dispatch = self.weight.new_zeros(size)
        dispatch[self.token, self.expert, self.place] = 1
        combine = self.weight.new_zeros(size)
        combine = combine.index_put((self.token, self.expert, self.place), self.weight)
        return Slots(dispatch, combine)

    def limited(
        self, capacity: int, drop: Drop = "position", generator: torch.Generator | None = None
    ) -> Routing:
        """Drop what exceeds a number of tokens for each expert.

        Args:
            capacity: Tokens that an expert takes at most.
            drop: Who goes first.
            generator: Source of a random order.

        Example:
            >>> one = torch.tensor([0, 1, 2])
            >>> weight = torch.tensor([0.2, 0.9, 0.5])
            >>> full = Routing.of(one, one * 0, weight, tokens=3, experts=1)
            >>> full.limited(2).token.tolist(), full.limited(2, "probability").token.tolist()
            ([0, 1], [1, 2])
        """
        if drop == "random":
            key = torch.rand(self.weight.shape, generator=generator).to(self.weight.device)
        elif drop == "position":
            key = self.token.to(self.weight.dtype)
        else:
            key = -self.weight.detach()
        order = key.argsort(stable=True)
        if drop == "rank+probability":
            order = order[self.rank[order].argsort(stable=True)]
        order = order[self.expert[order].argsort(stable=True)]
        # the k-th pair of an expert in this order stands where its k-th pair stands
        kept = order[self.place < capacity].sort().values
        return Routing(
            self.token[kept], self.expert[kept], self.weight[kept], self.rank[kept],
            self.tokens, self.experts,
        )  # fmt: skip


@dataclass(frozen=True)
class Routed:
    """What a router decided.

    Attributes:
        routing: Where the tokens go.
        logits: Scores that it was decided by, [n, E]; None where there are none.
        real: bool [n], False at padding; None where there is none.
    """

    routing: Routing | Slots
    logits: Tensor | None = None
    real: Tensor | None = None


class Router(nn.Module):
    """Base of the routers.

    Args:
        num_experts: Experts E.

    Attributes:
        looks_across: Whether where one token goes depends on other tokens, later ones included.

    Raises:
        InvalidInputError: There is no expert.
    """

    looks_across: ClassVar[bool] = False

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        if num_experts < 1:
            raise InvalidInputError(f"a layer has at least 1 expert, got {num_experts}")
        self.num_experts = num_experts

    def forward(self, x: Tensor, context: Context) -> Routed:
        """Decide where tokens x [n, D] go."""
        raise NotImplementedError


@dataclass(frozen=True)
class Capacity:
    """How many tokens an expert takes: ``ceil(factor R / E)`` of R pairs.

    Attributes:
        factor: Times the even share.
        minimum: Tokens that every expert takes in any case.
        drop: Who goes first where an expert is full.
        inference: Whether it holds outside training too.

    Raises:
        InvalidInputError: A value is out of range.
    """

    factor: float = 1.25
    minimum: int = 4
    drop: Drop = "position"
    inference: bool = False

    def __post_init__(self) -> None:
        if self.factor <= 0 or self.minimum < 0:
            raise InvalidInputError("a capacity has a positive factor and a minimum of 0 or more")
        if self.drop not in get_args(Drop):
            raise InvalidInputError(
                f"drop must be one of {', '.join(get_args(Drop))}, got {self.drop!r}"
            )

    def of(self, routing: Routing) -> int:
        """Tokens that an expert takes at most."""
        share = self.factor * len(routing.token) / routing.experts
        return max(self.minimum, math.ceil(share - 1e-9))


class Experts(nn.Module):
    """E feed-forwards of one shape, ``down(act(up x))`` or, gated, ``down(act(gate x) * up x)``.

    Args:
        num_experts: Experts E.
        hidden_size: Width D outside.
        intermediate_size: Width f of each expert.
        activation: A name in :data:`ACTIVATIONS`.
        gated: Whether there is a gate; then ``gate_up_proj`` [E, 2 f, D] holds gates and ups as
            transformers 5 does, otherwise ``up_proj`` is [E, f, D]. ``down_proj`` is [E, D, f].

    Raises:
        InvalidInputError: No such activation, or a size below 1.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        activation: str = "silu",
        *,
        gated: bool = True,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise InvalidInputError(
                f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}"
            )
        if min(num_experts, hidden_size, intermediate_size) < 1:
            raise InvalidInputError("experts, their width and the hidden size must be at least 1")
        self.activation, self.gated = activation, gated
        self.num_experts, self.intermediate_size = num_experts, intermediate_size
        width = (2 if gated else 1) * intermediate_size
        name = "gate_up_proj" if gated else "up_proj"
        into = nn.Parameter(torch.randn(num_experts, width, hidden_size) * hidden_size**-0.5)
        self.register_parameter(name, into)
        out = torch.randn(num_experts, hidden_size, intermediate_size) * intermediate_size**-0.5
        self.down_proj = nn.Parameter(out)

    @property
    def into(self) -> Tensor:
        """The first matrices, [E, f or 2 f, D]."""
        return self.get_parameter("gate_up_proj" if self.gated else "up_proj")

    def inner(self, x: Tensor, expert: int) -> Tensor:
        """Hidden units [..., f] of one expert on x [..., D]."""
        hidden = F.linear(x, self.into[expert])
        act = ACTIVATIONS[self.activation]
        if not self.gated:
            return act(hidden)
        gate, up = hidden.chunk(2, -1)
        return act(gate) * up

    def forward(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """Outputs of tokens that are sorted by expert.

        Args:
            x: [R, D].
            counts: How many of them belong to each expert; their sum is R.

        Returns:
            [R, D].
        """
        parts = [
            F.linear(self.inner(part, expert), self.down_proj[expert])
            for expert, part in enumerate(torch.split(x, list(counts)))
            if len(part)
        ]
        return torch.cat(parts) if parts else x.new_zeros(0, self.down_proj.shape[1])


class MoE(nn.Module):
    """The layer.

    Args:
        experts: What computes.
        router: What decides.
        shared: A feed-forward [.., D] -> [.., D] that every token passes too.
        capacity: How many tokens an expert takes; all of them when None.
        allow_noncausal: Whether the router may look at later tokens. In a causal model that leaks
            what is to be predicted, and makes a token depend on its batch.

    Attributes:
        context: What the router is told; set by :func:`given`.

    Raises:
        InvalidInputError: Router and experts differ in number, or the router looks across.

    Example:
        >>> from isthmus.nn.routers import AllExperts
        >>> layer = MoE(Experts(2, 1, 1, "relu", gated=False), AllExperts(2))
        >>> layer.experts.up_proj.data = torch.tensor([[[1.0]], [[-1.0]]])
        >>> layer.experts.down_proj.data = torch.tensor([[[2.0]], [[5.0]]])
        >>> layer(torch.tensor([[[3.0], [-4.0]]])).flatten().tolist()  # 2 relu(x) + 5 relu(-x)
        [6.0, 20.0]
    """

    def __init__(
        self,
        experts: Experts,
        router: Router,
        shared: nn.Module | None = None,
        *,
        capacity: Capacity | None = None,
        allow_noncausal: bool = False,
    ) -> None:
        super().__init__()
        if experts.num_experts != router.num_experts:
            raise InvalidInputError(
                f"the router knows {router.num_experts} experts, there are {experts.num_experts}"
            )
        if router.looks_across and not allow_noncausal:
            raise InvalidInputError(
                f"{type(router).__name__} looks at other tokens, later ones included, which a "
                "causal model must not; pass allow_noncausal=True where that is meant"
            )
        self.experts, self.router, self.shared = experts, router, shared
        self.capacity = capacity
        self.context = Context()

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        """Map x [..., D] to [..., D].

        Args:
            x: Hidden states; all but the last axis are tokens.
            context: What the router is told, for this call only.
        """
        flat = x.reshape(-1, x.shape[-1])
        context = context or self.context
        routing = self.router(flat, context).routing
        if isinstance(routing, Slots):
            y = self._mixed(flat, routing)
        else:
            y = self._sorted(flat, self._limited(routing, context))
        if self.shared is not None:
            y = y + self.shared(flat)
        return y.view(x.shape)

    def _limited(self, routing: Routing, context: Context) -> Routing:
        limit = self.capacity
        if limit is None or not (self.training or limit.inference):
            return routing
        return routing.limited(limit.of(routing), limit.drop, context.generator)

    def _sorted(self, x: Tensor, routing: Routing) -> Tensor:
        out = self.experts(x[routing.token], routing.counts.tolist())
        out = out * routing.weight.to(out.dtype)[:, None]
        return x.new_zeros(x.shape, dtype=out.dtype).index_add(0, routing.token, out)

    def _mixed(self, x: Tensor, slots: Slots) -> Tensor:
        size = slots.dispatch.shape[2]
        inputs = torch.einsum("nes,nd->esd", slots.dispatch.to(x.dtype), x)
        out = self.experts(inputs.flatten(0, 1), [size] * self.experts.num_experts)
        return torch.einsum(
            "nes,esd->nd", slots.combine.to(out.dtype), out.view(*inputs.shape[:2], -1)
        )


@contextmanager
def given(module: nn.Module, context: Context) -> Iterator[None]:
    """Tell every layer inside a module what its router may know, for the calls within."""
    layers = [m for m in module.modules() if isinstance(m, MoE)]
    before = [layer.context for layer in layers]
    for layer in layers:
        layer.context = context
    try:
        yield
    finally:
        for layer, old in zip(layers, before, strict=True):
            layer.context = old


@contextmanager
def routings(module: nn.Module) -> Iterator[dict[str, Routed]]:
    """Collect what the routers inside a module decide in the calls within, by their path.

    Example:
        >>> from isthmus.nn.routers import AllExperts
        >>> net = nn.Sequential(MoE(Experts(3, 4, 2), AllExperts(3)))
        >>> with routings(net) as found:
        ...     _ = net(torch.zeros(5, 4))
        >>> {name: routed.routing.counts.tolist() for name, routed in found.items()}
        {'0.router': [5, 5, 5]}
    """
    found: dict[str, Routed] = {}

    def keep(name: str) -> Callable[[Any, Any, Any], None]:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            found[name] = output

        return hook

    handles = [
        part.register_forward_hook(keep(name))
        for name, part in module.named_modules()
        if isinstance(part, Router)
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


class SharedExpert(nn.Module):
    """One expert that all tokens pass: a feed-forward of any activation, gated or not.

    Args:
        hidden_size: Width D outside.
        intermediate_size: Width inside.
        activation: A name in :data:`ACTIVATIONS`.
        gated: As for :class:`Experts`, whose tensors it has, with E = 1.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        activation: str = "silu",
        *,
        gated: bool = True,
    ) -> None:
        super().__init__()
        self.experts = Experts(1, hidden_size, intermediate_size, activation, gated=gated)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., D] to [..., D]."""
        out: Tensor = self.experts(x.reshape(-1, x.shape[-1]), [x.shape[:-1].numel()])
        return out.view(x.shape)
