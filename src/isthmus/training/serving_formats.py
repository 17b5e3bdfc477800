"""Trained drafters as folders that serving engines load: ``config.json`` and ``model.safetensors``.

A format is one function in :data:`FORMATS`, from a drafter to its config and tensors::

    drafter ──FORMATS[name]──> (config, tensors) ──export──> folder/config.json
                                                             folder/model.safetensors

The engines draft chains with these files; trees are drafted here only.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from isthmus.decoding.trained import TrainedDrafter
from isthmus.errors import InvalidInputError, UnknownNameError
from isthmus.folders import published, writable

FILES = ("config.json", "model.safetensors")
Writer = Callable[[Any], tuple[dict[str, Any], dict[str, torch.Tensor]]]


def medusa(drafter: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The ``medusa`` of vLLM: residual blocks with bias and one LM head for each of K heads.

    Raises:
        InvalidInputError: The drafter is no Medusa, or its LM heads have a bias, which this format
            has no place for.
    """
    _only(drafter, "medusa", "medusa")
    settings = drafter.settings
    tensors = {}
    for i, (blocks, head) in enumerate(zip(drafter.blocks, drafter.lm_heads, strict=True)):
        if head.bias is not None:
            raise InvalidInputError(
                "the target's LM head has a bias, which the format 'medusa' cannot hold"
            )
        tensors[f"lm_heads.{i}.weight"] = head.weight
        for j, block in enumerate(blocks):
            tensors[f"blocks.{i}.layers.{j}.weight"] = block.linear.weight
            tensors[f"blocks.{i}.layers.{j}.bias"] = block.linear.bias
    vocab_size = drafter.target.vocab_size
    # vLLM renames every key with "num" and "heads" in it to num_heads, so there must be only one
    config = {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "hidden_size": drafter.sizes.hidden_size,
        "vocab_size": vocab_size,
        "truncated_vocab_size": vocab_size,
        "num_heads": settings.heads,
        "num_hidden_layers": settings.blocks,
        "max_paths": settings.nodes + 1,
        "topk": 10,
        "medusa_fc_bias": True,
        "original_lm_head": False,
    }
    return config, tensors


def mlp_speculator(drafter: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """``mlp_speculator`` of text-generation-inference and of vLLM up to its older engine.

    Raises:
        InvalidInputError: The drafter is no combined speculator, or a part of it is switched off,
            which this format cannot say.
    """
    _only(drafter, "combined-speculators", "mlp_speculator")
    settings = drafter.settings
    if not (settings.use_state and settings.use_tokens):
        raise InvalidInputError(
            "the format 'mlp_speculator' knows speculators with both inputs only; train one with "
            "use_state and use_tokens on"
        )
    names = {"emb": drafter.emb, "proj": drafter.proj, "ln": drafter.ln, "head": drafter.lm_heads}
    tensors = {
        f"speculator.{name}.{key}": value
        for name, modules in names.items()
        for key, value in modules.state_dict().items()  # what is tied is there once
    }
    config = {
        "architectures": ["MLPSpeculatorPreTrainedModel"],
        "model_type": "mlp_speculator",
        "vocab_size": drafter.target.vocab_size,
        "emb_dim": drafter.sizes.hidden_size,
        "inner_dim": drafter.inner,
        "n_predict": settings.stages,
        "top_k_tokens_per_head": list(settings.top_k),
        "n_candidates": settings.candidates,
        "tie_weights": settings.tie_weights,
        "scale_input": settings.scale_input,
    }
    return config, tensors


def eagle(drafter: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The layout of EAGLE's own checkpoints, which vLLM loads as method ``eagle``.

    Embedding and LM head are the target's and are not written.

    Raises:
        InvalidInputError: The drafter is no EAGLE of the first kind with its idea on, or was
            trained for a target that this layout does not fit.
    """
    _only(drafter, "eagle", "eagle")
    settings = drafter.settings
    if settings.fused_layers or not (settings.shifted_token and settings.use_token):
        raise InvalidInputError(
            "the format 'eagle' holds drafters that read the last hidden state and the token one "
            "step ahead; use 'eagle3' for fused layers"
        )
    body = drafter.body
    tensors = {"fc.weight": body.fc.weight}
    for name, value in body.layer.state_dict().items():
        tensors[f"layers.0.{name}"] = value
    config = _llama(drafter, "eagle") | {"architectures": ["LlamaForCausalLM"], "bias": False}
    return config, tensors


def eagle3(drafter: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """``eagle3`` of the speculators library, with the target's whole vocabulary.

    Raises:
        InvalidInputError: The drafter is no EAGLE with fused layers, or was trained for a target
            that this layout does not fit.
    """
    _only(drafter, "eagle", "eagle3")
    settings = drafter.settings
    if not (settings.fused_layers and settings.shifted_token and settings.use_token):
        raise InvalidInputError(
            "the format 'eagle3' holds drafters that read three layers and the token one step "
            "ahead; train one with fused_layers, rollout=5, feature_weight=0 and token_weight=1"
        )
    return _speculator(drafter, "eagle3", "Eagle3DraftModel", max(1, settings.rollout))


def peagle(drafter: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """``peagle`` of the speculators library: EAGLE-3's layer with mask slots, one pass a draft.

    The learned mask token takes the embedding of a token that is never drafted from: padding, or
    the end of a text.

    Raises:
        InvalidInputError: The drafter has no fused layers or a mask token for each slot, or was
            trained for a target that this layout does not fit.
    """
    _only(drafter, "parallelspec", "peagle")
    settings = drafter.settings
    if not settings.fused_layers or settings.own_slots:
        raise InvalidInputError(
            "the format 'peagle' holds drafters with three fused layers and one mask token; train "
            "one with fused_layers, own_slots=false, feature_weight=0 and token_weight=1"
        )
    config, tensors = _speculator(drafter, "peagle", "PEagleDraftModel", settings.levels)
    target = drafter.target.config
    mask = target.pad_token_id
    if mask is None:
        mask = (
            target.eos_token_id[0]
            if isinstance(target.eos_token_id, list)
            else (target.eos_token_id)
        )
    if mask is None:
        raise InvalidInputError(
            "the format 'peagle' needs a token to stand for the mask; set pad_token_id in the "
            "target's config"
        )
    table = tensors["embed_tokens.weight"].detach().clone()
    table[mask] = drafter.mask_token[0].detach().to(table)
    tensors["embed_tokens.weight"] = table
    tensors["mask_hidden"] = drafter.mask_hidden.view(1, 1, -1)
    return config | {"mask_token_id": int(mask), "embed_requires_grad": True}, tensors


def _speculator(
    drafter: Any, kind: str, architecture: str, tokens: int
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Config and tensors that ``eagle3`` and ``peagle`` share."""
    body, target = drafter.body, drafter.target
    name = getattr(target.model, "name_or_path", "")
    if not name:
        raise InvalidInputError(
            f"the format {kind!r} names the target, which was not loaded from a checkpoint; set "
            "model.config._name_or_path"
        )
    tensors = {"embed_tokens.weight": target.model.get_input_embeddings().weight}
    whole = ("fc.", "norm.", "lm_head.")
    for key, value in body.state_dict().items():
        tensors[key if key.startswith(whole) else f"layers.0.{key}"] = value
    config = {
        "architectures": [architecture],
        "speculators_model_type": kind,
        "speculators_version": "0.9.0",
        "speculators_config": {
            "algorithm": kind,
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {
                    "proposal_type": "greedy",
                    "speculative_tokens": tokens,
                    "verifier_accept_k": 1,
                    "accept_tolerance": 0.0,
                }
            ],
            "verifier": {
                "name_or_path": str(name),
                "architectures": list(target.model.config.architectures or [])
                or [type(target.model).__name__],
            },
        },
        "transformer_layer_config": _llama(drafter, kind),
        "draft_vocab_size": target.vocab_size,
        "target_hidden_size": None,
        "eagle_aux_hidden_state_layer_ids": list(body.layers),
        # the residual is the condensed state itself; readers disagree on what a missing field means
        "norm_before_residual": False,
        "norm_before_fc": False,
        "fc_norm": False,
        "norm_output": False,
        "embed_requires_grad": False,
        "tie_word_embeddings": False,
    }
    return config, tensors


def _llama(drafter: Any, format: str) -> dict[str, Any]:
    """The config of a Llama of one layer with the drafter's sizes.

    Raises:
        InvalidInputError: The target is one that engines do not draft for in this way.
    """
    from transformers import LlamaConfig

    sizes, target = drafter.sizes, drafter.target
    if (
        target.encoder_decoder
        or drafter.head(torch.zeros(sizes.hidden_size).to(target.state_dtype)).any()
    ):
        raise InvalidInputError(
            f"the format {format!r} is for decoder-only targets whose head has no bias"
        )
    config = LlamaConfig(
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_hidden_layers=1,
        num_attention_heads=sizes.num_attention_heads,
        num_key_value_heads=sizes.num_key_value_heads,
        head_dim=sizes.head_dim,
        vocab_size=target.vocab_size,
        rms_norm_eps=sizes.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": sizes.rope_theta},
        max_position_embeddings=target.max_length or 2048,
        bos_token_id=target.config.bos_token_id,
        eos_token_id=target.config.eos_token_id,
        pad_token_id=target.config.pad_token_id,
        tie_word_embeddings=False,
    )
    # releases before 5 read the base of the rotary positions from a field of its own
    return config.to_dict() | {"rope_theta": sizes.rope_theta}


FORMATS: dict[str, Writer] = {
    "eagle": eagle,
    "eagle3": eagle3,
    "medusa": medusa,
    "mlp_speculator": mlp_speculator,
    "peagle": peagle,
}
"""What :func:`export` can write."""


def export(drafter: TrainedDrafter, format: str, folder: str | Path) -> None:
    """Write a trained drafter in another engine's format.

    Args:
        drafter: A trained drafter.
        format: A name in :data:`FORMATS`.
        folder: Where to; made if need be. An earlier export in it is replaced.

    Raises:
        UnknownNameError: No such format.
        InvalidInputError: The drafter has no such format, or the folder holds something else.
        BrokenFileError: The folder cannot be written.
    """
    if format not in FORMATS:
        raise UnknownNameError("format", format, FORMATS)
    config, tensors = FORMATS[format](drafter)
    folder = Path(folder)
    with writable(folder.parent):
        if folder.exists() and not {p.name for p in folder.iterdir()} <= set(FILES):
            raise InvalidInputError(f"{folder} holds something else; choose a new folder")
    with published(folder) as part:
        plain = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
        save_file(plain, part / FILES[1], metadata={"format": "pt"})
        kinds = {
            str(v.dtype).removeprefix("torch.") for v in plain.values() if v.is_floating_point()
        }
        (part / FILES[0]).write_text(json.dumps(config | {"torch_dtype": min(kinds)}, indent=1))


def _only(drafter: Any, system: str, format: str) -> None:
    """Refuse any other system.

    Raises:
        InvalidInputError: It is another one.
    """
    name = getattr(drafter, "name", type(drafter).__name__)
    if name != system:
        raise InvalidInputError(
            f"this {name} drafter cannot be written as {format!r}, which holds {system} drafters; "
            "it runs in isthmus only unless another format takes it"
        )
