"""One language model of Python in five sizes: same data, same steps, same vocabulary.

What two models of a family say differently, and how that grows with the ratio of their sizes, is
measured on these. The smallest has 45 thousand parameters, each next one two to three times as
many.
"""

from __future__ import annotations

import torch

from isthmus.decoding.model import Model
from isthmus.models.hub import load_checkpoint
from isthmus.workbench._training import Recipe, build
from isthmus.workbench.reference import reference

_SHAPES = ((32, 1), (64, 1), (96, 2), (128, 4), (160, 4))
"""Width and layers."""

SIZES = tuple(
    Recipe(
        f"pycode-size-{number}",
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        head_dim=32,
        intermediate_size=width * 11 // 4,
        vocab_size=1024,
        max_position_embeddings=256,
        batch_size=8,
        sequence_length=256,
        steps=300,
        decay_share=0.4,
    )
    for number, (width, layers) in enumerate(_SHAPES, 1)
)
"""Their recipes, from small to large."""


def family(*, trained: bool = True) -> list[Model]:
    """The models, from small to large, made on first use; or random ones of the same shapes."""
    if not trained:
        generator = torch.Generator().manual_seed(0)
        drawn = [build(recipe).eval() for recipe in SIZES]
        for p in (p for model in drawn for p in model.parameters() if p.ndim > 1):
            p.data.normal_(0.0, 0.2, generator=generator)
        return [Model(model, fast=False) for model in drawn]
    loaded = [load_checkpoint(str(reference(r)), dtype="float32", device="cpu") for r in SIZES]
    return [Model(each.model, each.tokenizer, fast=False) for each in loaded]
