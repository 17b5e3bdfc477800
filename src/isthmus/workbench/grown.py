"""Reference models of realistic size, made in seconds: a trained one grown with the same outputs.

::

    pycode-t (9M) ─▶ width x k, intermediate x k' ─▶ blocks with zero outputs ─▶ bf16 checkpoint

Such a model writes what the small one writes, so acceptance is that of a trained model, and a
forward reads every weight of the large one, so its cost is that of its size. What it cannot stand
for: quality at its size, and drafters that skip layers or channels of the target itself, for which
half of it is free to leave out. Factors are powers of two: the weights of the small model come
through in 16 bits without rounding.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from isthmus.errors import BrokenFileError
from isthmus.folders import kept, published
from isthmus.models.hub import load_checkpoint, no_progress_bars
from isthmus.surgery.resize import decoalesce_width, insert_blocks


@dataclass(frozen=True)
class Growth:
    """How a grown reference model is made.

    Attributes:
        name: Its name.
        base: The trained reference model that it grows from.
        factor: Multiplies hidden size and heads.
        intermediate_factor: Multiplies the intermediate size.
        num_hidden_layers: Blocks afterwards.
        max_position_embeddings: Context limit afterwards. The base was trained on shorter texts:
            beyond those only the cost is real.
    """

    name: str
    base: str
    factor: int
    intermediate_factor: int
    num_hidden_layers: int
    max_position_embeddings: int = 4096


_GROWTHS = (
    Growth("pycode-100m", "pycode-t", 2, 2, 20),
    Growth("pycode-500m", "pycode-t", 4, 4, 24),
)

GROWTHS: Mapping[str, Growth] = MappingProxyType({growth.name: growth for growth in _GROWTHS})
"""All grown reference models by name."""


def grown(growth: Growth, base: Path) -> Path:
    """Return the folder of a grown model, making it first if need be.

    Args:
        growth: What to make.
        base: Folder of the base model.

    Returns:
        A folder of the cache with a transformers checkpoint (bf16), the base's tokenizer and
        ``card.json`` (parameters, the growth, and the base's card).

    Raises:
        BrokenFileError: The base is damaged, or the cache folder cannot be written.
        UnsupportedModelError: The base cannot grow with the same outputs.
    """
    try:
        digest = hashlib.sha256((base / "model.safetensors").read_bytes()).hexdigest()
        card = json.loads((base / "card.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BrokenFileError(f"the reference model in {base} cannot be read ({error})") from error
    with kept("reference", growth.name, [asdict(growth), digest]) as folder:
        if (folder / "card.json").exists():
            return folder
        checkpoint = load_checkpoint(str(base), dtype="bfloat16", device="cpu")
        model: Any = decoalesce_width(
            checkpoint.model, growth.factor, intermediate_factor=growth.intermediate_factor
        )
        model = insert_blocks(model, growth.num_hidden_layers)
        model.config.max_position_embeddings = growth.max_position_embeddings
        with published(folder) as new, no_progress_bars():
            model.save_pretrained(new)
            checkpoint.tokenizer.save_pretrained(new)
            parameters = sum(p.numel() for p in model.parameters())
            note = {"name": growth.name, "parameters": parameters, "growth": asdict(growth)}
            text = json.dumps(note | {"base": card}, indent=2) + "\n"
            (new / "card.json").write_text(text, encoding="utf-8")
    return folder
