"""Carved models as mixtures that transformers knows.

====================  ======================================================================
``mixtral``           no shared expert
``granitemoeshared``  a shared expert
``qwen2_moe``         a shared expert behind a gate, which is set to a half and made up for
``glm4_moe``          one too; sigmoid scores, and a bias that decides without weighing
====================  ======================================================================

All weigh the chosen experts by normalised scores. With every expert active the new model must
compute what the dense one does; that is checked before it is handed out.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from isthmus.errors import InvalidInputError, UnsupportedModelError
from isthmus.nn.moe import Context, Router
from isthmus.surgery.base import Site, sites
from isthmus.surgery.calibration import Calibration, Reservoir, capture
from isthmus.surgery.carve import Split, Weights, fit_linear_router, weights_of

Target = Literal["mixtral", "granitemoeshared", "qwen2_moe", "glm4_moe"]
"""Model types that carved models can be written as. Shared units of GLM-4 MoE are a multiple of
those of an expert."""

_PROBE, _TOKENS = 24, 2**14
_FLAT = 1e-2
"""Largest logit of an exported router: softmax weights over the chosen are then even to a percent,
and which experts are chosen does not depend on it."""


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


@torch.no_grad()
def fitted(
    model: Any,
    splits: Sequence[Split],
    routers: Sequence[Router],
    data: Calibration,
    top_k: int,
    target: Target = "qwen2_moe",
) -> Any:
    """A native mixture for routers that no native one has: linear ones that choose alike.

    Args:
        model: The dense model.
        splits: One for each layer.
        routers: Routers of whatever kind, one for each layer; each chooses ``top_k`` experts.
        data: Tokens that linear routers are fitted on, at the inputs of the dense layers.
        top_k: Experts of a token.
        target: As what; chosen experts are weighted evenly.
    """
    places, matrices = sites(model, "ffn"), []
    read = capture(model, places, data, lambda: Reservoir(_TOKENS))
    for site, split, router in zip(places, splits, routers, strict=True):
        x = read[site.path].rows
        chosen: Any = router(x, Context()).routing
        wanted = torch.zeros(len(x), len(split.routed))
        wanted[chosen.token, chosen.expert] = 1 / top_k
        with torch.enable_grad():
            matrices.append(fit_linear_router(x, wanted))
    return to_native(model, splits, matrices, top_k, target, even=True)


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
