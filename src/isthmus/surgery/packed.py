"""Rounded weights as a file of integers, which transformers and vLLM load: compressed-tensors.

The format ``pack-quantized`` keeps of a matrix W [R, C] its codes, packed without gaps into int32
words a row, and a scale for each row. transformers makes a dense matrix of them on loading, so the
file is smaller and the memory is not; vLLM runs it packed (not tried here). Only grids with 0 in
the middle are written: transformers 5.24 with compressed-tensors 0.20 refuses the packed zeros of
others. Half of four (2:4) has no such format any more: readers dropped ``sparse-24``.

The grid is read off the weights. Any grid on which they all lie writes them down faithfully.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from isthmus.errors import InvalidInputError, require
from isthmus.folders import check_replaceable, published, replace_text
from isthmus.surgery.obs import Grid

MARK = "isthmus_packed.json"
"""File that tells a folder of a packed model."""

_NEAR = 1e-3
"""How far from a whole number a code may lie in float32."""


def grid_of(weight: Tensor, bits: int) -> Grid:
    """The coarsest grid of each row on which all its weights lie.

    Args:
        weight: W [R, C].
        bits: Bits a code, 1 to 8.

    Raises:
        InvalidInputError: Bits out of range, or a row lies on no such grid.

    Example:
        >>> grid = grid_of(torch.tensor([[-0.5, 0.0, 1.0]]), 2)
        >>> grid.scale.tolist(), grid.codes(torch.tensor([[-0.5, 1.0]])).tolist()
        ([[0.5]], [[0.0, 3.0]])
    """
    if not 1 <= bits <= 8:
        raise InvalidInputError(f"codes that are packed have 1 to 8 bits, not {bits}")
    levels, w = 2**bits, weight.detach().double()
    largest = w.abs().amax(1, keepdim=True)
    largest = torch.where(largest == 0, 1.0, largest)
    scale = torch.zeros_like(largest)
    for steps in range(1, levels):
        tried = largest / steps
        codes = w / tried
        span = codes.amax(1, keepdim=True).clamp(min=0) - codes.amin(1, keepdim=True).clamp(max=0)
        off = (codes - codes.round()).abs().amax(1, keepdim=True)
        fits = (off < _NEAR) & (span < levels - 1 + _NEAR) & (scale == 0)
        scale = torch.where(fits, tried, scale)
    if bool((scale == 0).any()):
        row = int((scale == 0).nonzero()[0, 0])
        raise InvalidInputError(f"the weights of row {row} lie on no grid of {bits} bits")
    whole = (w / scale).round()
    middle = levels // 2
    low, high = whole.amin(1, keepdim=True), whole.amax(1, keepdim=True)
    central = bool((low >= -middle).all()) and bool((high < middle).all())
    zero = torch.full_like(scale, middle) if central else -low.clamp(max=0)
    return Grid(scale, zero, levels)


def export_packed(
    model: Any, tokenizer: Any, paths: Sequence[str], bits: int, folder: str | Path
) -> None:
    """Write a model of transformers whose linear layers were rounded, as packed integers.

    Args:
        model: In float32.
        tokenizer: Its tokenizer, or None.
        paths: Modules that were rounded, such as those of a plan; all others stay as they are.
        bits: Bits a weight, 1 to 8.
        folder: Where to; an older export is replaced as a whole.

    Raises:
        InvalidInputError: A module is no ``nn.Linear``, or its weights lie on no grid of so many
            bits with 0 in the middle; or there are no modules; or the folder holds something else.
        BrokenFileError: The folder cannot be written.
        MissingExtraError: compressed-tensors is not installed.
    """
    pack = require("compressed_tensors.compressors.pack_quantized.helpers", "pack").pack_to_int32
    check_replaceable(Path(folder), (MARK,), "packed model")
    if not paths:
        raise InvalidInputError("no module was rounded, so there is nothing to pack")
    linear = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    other = [path for path in paths if path not in linear]
    if other:
        raise InvalidInputError(f"{other[0]} is no nn.Linear, and only those are packed")
    grids = {path: grid_of(linear[path].weight, bits) for path in paths}
    middle = 2 ** (bits - 1)
    askew = [path for path, grid in grids.items() if bool((grid.zero != middle).any())]
    if askew:
        raise InvalidInputError(
            f"{askew[0]} was rounded to a grid whose middle is not 0, which transformers does not "
            "load packed; round with symmetric=true"
        )
    tensors = {k: v for k, v in model.state_dict().items() if k not in _tied(model)}
    for path, grid in grids.items():
        weight = tensors.pop(f"{path}.weight")
        codes = grid.codes(weight.double()) - middle
        tensors[f"{path}.weight_packed"] = pack(codes.to(torch.int8), bits)
        tensors[f"{path}.weight_scale"] = grid.scale.float()
        tensors[f"{path}.weight_shape"] = torch.tensor(weight.shape)
    scheme = {
        "format": "pack-quantized",  # otherwise readers guess it from the bits
        "targets": [f"re:^{path.replace('.', chr(92) + '.')}$" for path in paths],
        "weights": {
            "num_bits": bits,
            "type": "int",
            "symmetric": True,
            "strategy": "channel",
        },
    }
    with published(Path(folder)) as new:
        model.config.save_pretrained(new)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(new)
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
        config = json.loads((new / "config.json").read_text())
        config["quantization_config"] = {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": scheme},
            "ignore": sorted(set(linear) - set(paths)),
        }
        replace_text(new / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
        replace_text(new / MARK, json.dumps({"format": "pack-quantized", "bits": bits}) + "\n")
        kept = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        save_file(kept, new / "model.safetensors", metadata={"format": "pt"})


def _tied(model: Any) -> set[str]:
    """Names of weights that are others by another name."""
    seen: dict[int, str] = {}
    again: set[str] = set()
    for name, value in model.state_dict().items():
        if seen.setdefault(value.data_ptr(), name) != name and value.numel():
            again.add(name)
    return again
