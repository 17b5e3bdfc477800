"""Carve experts out of trained dense feed-forward layers.

::

    feed-forward, F units --Split--> shared units [S] and E experts of m units, S + E m = F
            |                              |
            |  carve: the layer becomes an nn.moe.MoE in the same model (any router)
            `  moe_export.to_native: the model becomes one of transformers' own mixtures

The hidden units of a feed-forward layer add up, so their sum may be cut anywhere: with every
expert active and weights of 1 the carved layer is the dense one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus.errors import InvalidInputError, UnsupportedModelError, require
from isthmus.nn.moe import ACTIVATIONS, Experts, MoE, Router, SharedExpert
from isthmus.surgery.base import Site, activation, matrix


@dataclass(frozen=True)
class Split:
    """Which hidden units go where.

    Attributes:
        shared: Units that every token passes, int64 [S].
        routed: Units of each expert, int64 [E, m].
    """

    shared: Tensor
    routed: Tensor

    def check(self, hidden: int) -> None:
        """Make sure that every unit has exactly one place.

        Raises:
            InvalidInputError: One is missing, or there twice.
        """
        units = torch.cat([self.shared, self.routed.flatten()]).sort().values
        if units.tolist() != list(range(hidden)):
            raise InvalidInputError(
                f"a split must place each of {hidden} hidden units exactly once; it places "
                f"{len(units)}, {len(set(units.tolist()))} of them different"
            )


def share_out(
    hidden: int, shared: int, experts: int, generator: torch.Generator | None = None
) -> Split:
    """Units in their order, or drawn: the first ``shared`` parts, then one part for each expert.

    Args:
        hidden: Units F.
        shared: Parts that are shared.
        experts: Routed experts E, of one part each.
        generator: Source of the order; that of the layer when None.

    Raises:
        InvalidInputError: F cannot be cut into equal parts.

    Example:
        >>> split = share_out(6, 1, 2)
        >>> split.shared.tolist(), split.routed.tolist()
        ([0, 1], [[2, 3], [4, 5]])
    """
    size = part_size(hidden, shared + experts)
    order = torch.arange(hidden)
    if generator is not None:
        order = order[torch.randperm(hidden, generator=generator)]
    return Split(order[: shared * size], order[shared * size :].view(experts, size))


def part_size(hidden: int, parts: int) -> int:
    """Units of a part.

    Raises:
        InvalidInputError: They cannot be cut into equal parts.
    """
    if parts < 1 or hidden % parts:
        near = [d for d in range(1, hidden + 1) if hidden % d == 0 and d <= 4 * max(parts, 1)]
        raise InvalidInputError(
            f"{hidden} hidden units cannot be cut into {parts} equal parts; "
            f"{', '.join(map(str, near))} would do"
        )
    return hidden // parts


def balanced_clusters(points: Tensor, centroids: Tensor, iterations: int = 1) -> Tensor:
    """K-means whose clusters are equally large, by linear assignment on l1 distances.

    Args:
        points: [U, N]; memory grows with U^2.
        centroids: Where clusters start, [E, N]; E divides U.
        iterations: Assignments; centroids become means between them.

    Returns:
        Points of each cluster, int64 [E, U / E], the one nearest to the cluster's mean first.

    Raises:
        InvalidInputError: E does not divide U.
        MissingExtraError: scipy is not installed.

    Example:
        >>> points = torch.tensor([[0.0], [9.0], [1.0], [8.0], [2.0], [7.0]])
        >>> balanced_clusters(points, torch.tensor([[0.0], [9.0]])).tolist()
        [[2, 0, 4], [3, 1, 5]]
    """
    assignment = require("scipy.optimize", "shrink").linear_sum_assignment
    points, centroids = points.float(), centroids.float()
    size = part_size(len(points), len(centroids))
    found = torch.empty(0)
    for _ in range(max(1, iterations)):
        cost = torch.cdist(points, centroids, p=1)  # [U, E]
        columns = cost.repeat_interleave(size, 1).double().numpy()
        _, chosen = assignment(columns)
        found = torch.from_numpy(chosen).argsort(stable=True).view(len(centroids), size)
        centroids = points[found].mean(1)
    far = (points[found] - centroids[:, None]).abs().sum(-1)  # [E, U / E]
    return found.gather(1, far.argsort(stable=True, dim=1))


@dataclass(frozen=True)
class Weights:
    """The matrices of a feed-forward layer, ``down(act(gate x) * up x)`` or ``down(act(up x))``.

    Attributes:
        gate: [F, D], or None.
        up: [F, D].
        down: [D, F].
        activation: A name in :data:`isthmus.nn.moe.ACTIVATIONS`.
    """

    gate: Tensor | None
    up: Tensor
    down: Tensor
    activation: str

    def rows(self, units: Tensor) -> tuple[Tensor, Tensor]:
        """First matrix [f or 2 f, D] and last one [D, f] of some units."""
        up = self.up[units]
        into = up if self.gate is None else torch.cat([self.gate[units], up])
        return into, self.down[:, units]


def weights_of(model: nn.Module, site: Site) -> Weights:
    """The matrices of a feed-forward site.

    Raises:
        UnsupportedModelError: It has biases, or an activation that experts do not have.
    """
    modules = {name: model.get_submodule(path) for name, path in site.parts.items()}
    if any(getattr(m, "bias", None) is not None for m in modules.values()):
        raise UnsupportedModelError(f"{site.path} has biases, which experts do not have")
    found = {name: matrix(m).detach() for name, m in modules.items()}
    gate = found.get("gate")
    if "gate_up" in found:
        gate, found["up"] = found["gate_up"].chunk(2)
    act, x = activation(model, site), torch.linspace(-6, 6, 101)
    names = [n for n, f in ACTIVATIONS.items() if torch.allclose(f(x), act(x), atol=1e-6)]
    if not names:
        raise UnsupportedModelError(
            f"the activation of {site.path} is none of {', '.join(ACTIVATIONS)}"
        )
    return Weights(gate, found["up"], found["down"], names[0])


def carved(weights: Weights, split: Split, router: Router) -> MoE:
    """The layer of experts that a split makes of a dense one.

    Args:
        weights: Of the dense layer.
        split: Where its units go.
        router: What decides.

    Raises:
        InvalidInputError: The split does not place each unit once, or the router knows another
            number of experts.
    """
    hidden, width = weights.up.shape
    split.check(hidden)
    count, size = split.routed.shape
    with torch.random.fork_rng(devices=[]):
        experts = Experts(count, width, size, weights.activation, gated=weights.gate is not None)
    _fill(experts, weights, split.routed)
    shared = kept(weights, split.shared) if len(split.shared) else None
    return MoE(experts, router, shared).to(weights.up)


def kept(weights: Weights, units: Tensor) -> SharedExpert:
    """The dense layer that some hidden units make on their own."""
    gated = weights.gate is not None
    with torch.random.fork_rng(devices=[]):
        made = SharedExpert(weights.up.shape[1], len(units), weights.activation, gated=gated)
    _fill(made.experts, weights, units[None])
    return made.to(weights.up)


@torch.no_grad()
def _fill(module: Experts, weights: Weights, units: Tensor) -> None:
    for expert, chosen in enumerate(units):
        into, down = weights.rows(chosen)
        module.into[expert].copy_(into)
        module.down_proj[expert].copy_(down)


def carve(model: nn.Module, site: Site, split: Split, router: Router) -> MoE:
    """Put a carved layer in the place of a dense one; see :func:`carved`."""
    layer = carved(weights_of(model, site), split, router).train(model.training)
    model.set_submodule(site.path, layer)
    return layer


def fit_linear_router(x: Tensor, wanted: Tensor, steps: int = 60) -> Tensor:
    """A matrix whose softmax comes nearest to given laws over experts, by cross-entropy.

    Args:
        x: Hidden states [N, D].
        wanted: Laws [N, E], for example what a router chose, evenly.
        steps: Of L-BFGS.

    Returns:
        [E, D].
    """
    x = x.detach().float()
    scale = x.square().mean().sqrt().clamp(min=1e-12)
    weight = torch.zeros(wanted.shape[1], x.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=steps, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(F.linear(x / scale, weight), wanted.float())
        value = value + 1e-4 * weight.square().mean()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return (weight / scale).detach()
