"""Files of transformers' ``ViTMAEForPreTraining``, written from and read into our own parts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn

from isthmus.errors import BrokenFileError
from isthmus.nn.patches import sincos2d

WEIGHTS = "model.safetensors"

MODULES = {
    "encoder.embed.projection": "vit.embeddings.patch_embeddings.projection",
    "encoder.norm": "vit.layernorm",
    "predictor.embed": "decoder.decoder_embed",
    "predictor.norm": "decoder.decoder_norm",
    "predictor.predict": "decoder.decoder_pred",
    "encoder.blocks": "vit.encoder.layer",
    "predictor.blocks": "decoder.decoder_layers",
}
BLOCK = {
    "norm1": "layernorm_before",
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.out_proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "feed_forward.in_proj": "intermediate.dense",
    "feed_forward.out_proj": "output.dense",
}
TOKENS = {
    "encoder.class_token": "vit.embeddings.cls_token",
    "predictor.mask_token": "decoder.mask_token",
    "placeholder": "placeholder",
}

FIELDS = {
    "side": "image_size",
    "patch": "patch_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "decoder_width": "decoder_hidden_size",
    "decoder_layers": "decoder_num_hidden_layers",
    "decoder_heads": "decoder_num_attention_heads",
    "mask_ratio": "mask_ratio",
    "norm_pixels": "norm_pix_loss",
}
"""What a system calls a size, and its name in a configuration of transformers."""


def file_name(name: str) -> str:
    """The name that a weight of a masked image model has in a file of transformers.

    Example:
        >>> file_name("encoder.blocks.3.attention.q_proj.bias")
        'vit.encoder.layer.3.attention.attention.query.bias'
    """
    if name in TOKENS:
        return TOKENS[name]
    ours = next(m for m in MODULES if name.startswith(f"{m}."))
    rest = name.removeprefix(f"{ours}.")
    if not ours.endswith(".blocks"):
        return f"{MODULES[ours]}.{rest}"
    number, _, inner = rest.partition(".")
    part, _, kind = inner.rpartition(".")
    return f"{MODULES[ours]}.{number}.{BLOCK[part]}.{kind}"


def write(
    folder: Path, module: nn.Module, config: Mapping[str, Any], grid: tuple[int, int]
) -> None:
    """Write weights and configuration.

    Args:
        folder: Where.
        module: A :class:`~isthmus.models.masked_image.MaskedImageModel`.
        config: Fields of the configuration: sizes, mask ratio, kind of target.
        grid: Rows and columns of patches, for the positions, which transformers stores.
    """
    weights = {}
    for name, value in module.state_dict().items():
        token = name in TOKENS
        weights[file_name(name)] = (
            value.detach().cpu()[None, None] if token else value.detach().cpu()
        )
    for name, width in (
        ("vit.embeddings.position_embeddings", config["hidden_size"]),
        ("decoder.decoder_pos_embed", config["decoder_hidden_size"]),
    ):
        weights[name] = sincos2d(grid, width, class_token=True, axis_first="column")[None]
    whole = {name: value.contiguous() for name, value in weights.items()}
    save_file(whole, folder / WEIGHTS, metadata={"format": "pt"})
    fixed = {
        "architectures": ["ViTMAEForPreTraining"],
        "model_type": "vit_mae",
        "layer_norm_eps": 1e-6,
        "intermediate_size": 4 * config["hidden_size"],
        "decoder_intermediate_size": 4 * config["decoder_hidden_size"],
    }
    (folder / "config.json").write_text(json.dumps(fixed | dict(config), indent=1))


def config(folder: Path) -> dict[str, Any]:
    """The configuration of a folder.

    Raises:
        BrokenFileError: There is none, or it is one of another model.
    """
    path = folder / "config.json"
    try:
        found = dict(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise BrokenFileError(f"{path} cannot be read; give a folder of ViTMAE") from error
    for name in ("", "decoder_"):
        width = found.get(f"{name}hidden_size", 0)
        if found.get("model_type") != "vit_mae" or found[f"{name}intermediate_size"] != 4 * width:
            raise BrokenFileError(
                f"{path} is of the model {found.get('model_type')}; vit_mae with feed-forward "
                "layers four times as wide is read"
            )
    return found


def fill(module: nn.Module, folder: Path) -> None:
    """Read the weights of a folder into a masked image model.

    Raises:
        KeyError: A weight is missing.
        RuntimeError: One has another size.
    """
    # transformers 5.24 writes another name of these blocks than it published
    found = {
        name.replace("decoder.decoder_encoder.layer.", "decoder.decoder_layers."): value
        for name, value in load_file(folder / WEIGHTS).items()
    }
    module.load_state_dict(
        {
            name: found[file_name(name)].flatten() if name in TOKENS else found[file_name(name)]
            for name in module.state_dict()
        }
    )
