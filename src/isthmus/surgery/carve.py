"""Carve experts out of trained dense feed-forward layers.

::

    feed-forward, F units --Split--> shared units [S] and E experts of m units, S + E m = F
            |                              |
            |  carve: the layer becomes an nn.moe.MoE in the same model (any router)
            `  to_native: the model becomes one of transformers' own mixtures (linear router)

The hidden units of a feed-forward layer add up, so their sum may be cut anywhere: with every
expert active and weights of 1 the carved layer is the dense one. That is checked on each native
export before it is handed out.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus.errors import InvalidInputError, UnsupportedModelError, require
from isthmus.nn.moe import ACTIVATIONS, Experts, MoE, Router, SharedExpert
from isthmus.surgery.base import Site, activation, matrix, sites

Target = Literal["mixtral", "granitemoeshared", "qwen2_moe", "glm4_moe"]
"""Model types that carved models can be written as. Mixtral has no shared expert; GLM-4 MoE scores
by sigmoids and carries a bias for the selection; its shared units are a multiple of an expert's."""

_PROBE = 24
_FLAT = 1e-2
"""Largest logit of an exported router: softmax weights over the chosen are then even to a percent,
and which experts are chosen does not depend on it."""


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
    assignment = require("scipy.optimize", "law").linear_sum_assignment
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


@torch.no_grad()
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
    gated = weights.gate is not None

    def filled(module: Experts, units: Tensor) -> None:
        for expert, chosen in enumerate(units):
            into, down = weights.rows(chosen)
            module.into[expert].copy_(into)
            module.down_proj[expert].copy_(down)

    with torch.random.fork_rng(devices=[]):
        experts = Experts(count, width, size, weights.activation, gated=gated)
        shared = None
        if len(split.shared):
            shared = SharedExpert(width, len(split.shared), weights.activation, gated=gated)
    filled(experts, split.routed)
    if shared is not None:
        filled(shared.experts, split.shared[None])
    return MoE(experts, router, shared).to(weights.up)


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


def to_native(
    model: Any,
    splits: Sequence[Split],
    routers: Sequence[Tensor] | None = None,
    top_k: int | None = None,
    target: Target = "qwen2_moe",
    *,
    biases: Sequence[Tensor] | None = None,
    even: bool = False,
) -> Any:
    """Write a dense Llama-type model, carved, as a mixture of experts that transformers knows.

    Chosen experts are weighted by their normalised scores times k, so that the weights of all
    experts together are what they are in the dense layer.

    Args:
        model: The dense model: Llama, Mistral, Qwen 2 and what else is laid out alike.
        splits: One for each layer, all of equal sizes.
        routers: Matrices [E, D], one for each layer; zeros when None.
        top_k: Experts of a token; all when None.
        target: As what.
        biases: Added to scores for the selection, [E] for each layer; GLM-4 MoE only.
        even: Shrink the routers until the chosen experts are weighted alike, to a percent. Which
            are chosen does not change.

    Returns:
        A model of transformers in eval mode, of the dtype of the old one.

    Raises:
        InvalidInputError: Splits or routers that do not go together or with the target.
        UnsupportedModelError: The model is laid out otherwise; with all experts active, the new
            model computed something else.
    """
    if target not in get_args(Target):
        raise InvalidInputError(f"target must be one of {', '.join(get_args(Target))}")
    places = sites(model, "ffn")
    if len(splits) != len(places) or len({s.routed.shape for s in splits}) != 1:
        raise InvalidInputError(
            f"give one split for each of {len(places)} layers, all of equal sizes"
        )
    weights = [weights_of(model, site) for site in places]
    for w, split in zip(weights, splits, strict=True):
        split.check(len(w.up))
    count, width = splits[0].routed.shape[0], weights[0].up.shape[1]
    _check_shared(target, splits)
    zeros = [torch.zeros(count, width)] * len(places)
    if biases is not None and target != "glm4_moe":
        raise InvalidInputError(f"{target} has no bias for the selection; glm4_moe has one")
    if routers is not None and [tuple(r.shape) for r in routers] != [(count, width)] * len(places):
        raise InvalidInputError(f"routers must be matrices of {count} x {width}, one a layer")
    probe = _built(model, target, places, weights, splits, zeros, count, None)
    _check_equal(model, probe)
    if routers is None and top_k in (None, count) and biases is None:
        return probe
    chosen = list(routers or zeros)
    if even:
        norms = [r.norm(dim=1).max().clamp(min=1e-12) * math.sqrt(width) for r in chosen]
        chosen = [r * (_FLAT / n) for r, n in zip(chosen, norms, strict=True)]
    k = count if top_k is None else top_k
    if not 1 <= k <= count:
        raise InvalidInputError(f"top_k must lie between 1 and {count}, got {k}")
    return _built(model, target, places, weights, splits, chosen, k, biases)


def _check_shared(target: Target, splits: Sequence[Split]) -> None:
    shared = {len(s.shared) for s in splits}
    size = splits[0].routed.shape[1]
    if len(shared) != 1:
        raise InvalidInputError("layers share different numbers of units; give equal splits")
    units = shared.pop()
    if target == "mixtral" and units:
        raise InvalidInputError(
            "mixtral has no shared expert; write granitemoeshared, qwen2_moe or glm4_moe"
        )
    if target != "mixtral" and not units:
        raise InvalidInputError(f"{target} has a shared expert; write mixtral where there is none")
    if target == "glm4_moe" and units % size:
        raise InvalidInputError(
            f"glm4_moe shares whole experts of {size} units, not {units}; write qwen2_moe"
        )


def _config(model: Any, target: Target, split: Split, k: int) -> Any:
    """The configuration of the new model."""
    from transformers import AutoConfig

    old = model.config
    count, size = split.routed.shape
    names = (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings",
        "initializer_range", "rms_norm_eps", "tie_word_embeddings", "rope_parameters",
        "bos_token_id", "eos_token_id", "pad_token_id",
    )  # fmt: skip
    given = {n: copy.deepcopy(getattr(old, n)) for n in names if getattr(old, n, None) is not None}
    given.setdefault("head_dim", old.hidden_size // old.num_attention_heads)
    biased = model.get_submodule("model.layers.0.self_attn.q_proj").bias is not None
    window = getattr(old, "sliding_window", None)
    if not getattr(old, "use_sliding_window", True):
        window = None
    if window is not None and target != "mixtral":
        raise UnsupportedModelError(f"{target} has no sliding window, and the model has one")
    own: dict[str, Any]
    if target == "mixtral":
        own = {
            "intermediate_size": size,
            "num_local_experts": count,
            "num_experts_per_tok": k,
            "sliding_window": window,
        }
    elif target == "granitemoeshared":
        own = {
            "intermediate_size": size,
            "shared_intermediate_size": len(split.shared),
            "num_local_experts": count,
            "num_experts_per_tok": k,
            "attention_bias": biased,
            "embedding_multiplier": 1.0,
            "logits_scaling": 1.0,
            "residual_multiplier": 1.0,
            "attention_multiplier": given["head_dim"] ** -0.5,
        }
    elif target == "qwen2_moe":
        own = {
            "intermediate_size": size,
            "moe_intermediate_size": size,
            "shared_expert_intermediate_size": len(split.shared),
            "num_experts": count,
            "num_experts_per_tok": k,
            "norm_topk_prob": True,
            "qkv_bias": biased,
        }
    else:
        own = {
            "intermediate_size": size,
            "moe_intermediate_size": size,
            "n_shared_experts": len(split.shared) // size,
            "n_routed_experts": count,
            "num_experts_per_tok": k,
            "norm_topk_prob": True,
            "routed_scaling_factor": float(k),
            "first_k_dense_replace": 0,
            "num_nextn_predict_layers": 0,
            "use_qk_norm": False,
            "attention_bias": biased,
            "partial_rotary_factor": 1.0,
            "n_group": 1,
            "topk_group": 1,
        }
        if count < 2:
            raise InvalidInputError("glm4_moe needs at least 2 routed experts")
        given["rope_parameters"] = {**given["rope_parameters"], "partial_rotary_factor": 1.0}
    return AutoConfig.for_model(target, **given, **own)


def _layer_state(
    target: Target, w: Weights, split: Split, router: Tensor, k: int, bias: Tensor | None
) -> dict[str, Tensor]:
    """Tensors of one layer, by their names in it."""
    pairs = [w.rows(units) for units in split.routed]
    into, down = (torch.stack(part) for part in zip(*pairs, strict=True))
    # softmax weights are normalised over the chosen, so each expert is k times as large
    down = down if target == "glm4_moe" else k * down
    own = "block_sparse_moe" if target == "granitemoeshared" else "mlp"
    gate = "router" if target == "granitemoeshared" else "gate"
    state = {
        f"{own}.experts.gate_up_proj": into,
        f"{own}.experts.down_proj": down,
        f"{own}.{gate}.weight": router.to(into),
    }
    if target == "glm4_moe":
        none = torch.zeros(len(router))
        state["mlp.gate.e_score_correction_bias"] = none if bias is None else bias.float()
    if target == "mixtral":
        return state
    both, last = w.rows(split.shared)
    if target == "granitemoeshared":
        return state | {
            "shared_mlp.input_linear.weight": both,
            "shared_mlp.output_linear.weight": last,
        }
    name = "mlp.shared_expert" if target == "qwen2_moe" else "mlp.shared_experts"
    first, second = both.chunk(2)
    state |= {f"{name}.gate_proj.weight": first, f"{name}.up_proj.weight": second}
    if target == "qwen2_moe":  # its gate of 0 is a sigmoid of 1/2
        state |= {
            f"{name}.down_proj.weight": 2 * last,
            "mlp.shared_expert_gate.weight": torch.zeros(1, last.shape[0]).to(last),
        }
    else:
        state[f"{name}.down_proj.weight"] = last
    return state


def _built(
    model: Any,
    target: Target,
    places: Sequence[Site],
    weights: Sequence[Weights],
    splits: Sequence[Split],
    routers: Sequence[Tensor],
    k: int,
    biases: Sequence[Tensor] | None,
) -> Any:
    from transformers import AutoModelForCausalLM

    if any(w.gate is None for w in weights):
        raise UnsupportedModelError("only gated feed-forward layers can be written natively")
    dropped = tuple(f"{site.path}." for site in places)
    state: dict[str, Tensor] = {
        name: value for name, value in model.state_dict().items() if not name.startswith(dropped)
    }
    for i, site in enumerate(places):
        above = site.path.rpartition(".")[0]
        bias = None if biases is None else biases[i]
        own = _layer_state(target, weights[i], splits[i], routers[i], k, bias)
        state |= {f"{above}.{name}": value for name, value in own.items()}
    try:
        config = _config(model, target, splits[0], k)
        with torch.random.fork_rng(devices=[]):
            made = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
        made.load_state_dict(state)
    except (RuntimeError, AttributeError) as error:
        first = str(error).strip().splitlines()
        raise UnsupportedModelError(
            f"{type(model).__name__} is not laid out like a Llama and cannot be written as "
            f"{target}: {' '.join(line.strip() for line in first[:2])}"
        ) from error
    made.generation_config = copy.deepcopy(model.generation_config)
    return made.to(model.device).eval()


@torch.no_grad()
def _check_equal(model: Any, made: Any) -> None:
    """Compare with the dense model, all experts active, on a probe.

    Raises:
        UnsupportedModelError: They differ by more than rounding.
    """
    ids = torch.arange(1, 1 + _PROBE, device=model.device)[None] * 7919 % model.config.vocab_size
    before, after = (m(input_ids=ids).logits.double() for m in (model, made))
    error = float((before - after).abs().max() / before.abs().max())
    if not error <= 64 * torch.finfo(model.dtype).eps ** 0.75:
        raise UnsupportedModelError(
            f"{type(model).__name__} computes something else than a Llama does: written as "
            f"{type(made).__name__} its outputs change by {error:.1e} of the largest logit"
        )


def split_tensors(splits: Mapping[str, Split]) -> dict[str, Tensor]:
    """Splits by module path as tensors of a plan."""
    found = {}
    for path, split in splits.items():
        found[f"{path}/shared"], found[f"{path}/routed"] = split.shared, split.routed
    return found
