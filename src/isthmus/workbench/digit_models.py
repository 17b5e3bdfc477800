"""Models that paint the digits of :mod:`isthmus.workbench.digits`, trained on first use."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus.decoding.target import HubTarget
from isthmus.models.guided_decoder import GuidedDecoder
from isthmus.models.hub import load_checkpoint
from isthmus.training.seeds import batch_generator
from isthmus.workbench._training import Recipe, build, nats
from isthmus.workbench.courses import made
from isthmus.workbench.digits import CLASSES, LEVELS, SIDE, digest, pictures, prompts
from isthmus.workbench.tokenizer import word_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

RECIPE = Recipe(
    "digits-raster",
    hidden_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    head_dim=16,
    intermediate_size=176,
    steps=600,
    batch_size=32,
    sequence_length=SIDE * SIDE,
    vocab_size=LEVELS + CLASSES,
    max_position_embeddings=SIDE * SIDE + 1,
    decay_share=0.5,
)
"""P6: a Llama of 0.2M parameters that paints a digit pixel by pixel in raster order."""


def tokenizer() -> PreTrainedTokenizerFast:
    """One word a token."""
    return word_tokenizer(
        [*(f"g{i}" for i in range(LEVELS)), *(f"digit{i}" for i in range(CLASSES))]
    )


def drawn(recipe: Recipe, start: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Training pictures int64 [B, 8, 8] and their digits [B] of each step from ``start`` on."""
    grids, digits = pictures("train")
    for step in itertools.count(start):
        generator = batch_generator(recipe.seed, step)
        rows = torch.randint(len(grids), (recipe.batch_size,), generator=generator)
        yield grids[rows], digits[rows]


class RasterCourse:
    """A digit's token, then its pixels in raster order, and a loss on the pixels.

    Args:
        recipe: Sizes and seed.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def build(self) -> Any:
        """A Llama with fresh weights."""
        return build(self.recipe)

    def batches(self, start: int) -> Iterator[Tensor]:
        """Token ids [B, 65]."""
        for grids, digits in drawn(self.recipe, start):
            yield torch.cat([prompts(digits), grids.flatten(1)], 1)

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        """Mean nats per pixel."""
        return nats(model, batch)


def raster(recipe: Recipe = RECIPE) -> Path:
    """Folder of the model that paints in raster order, trained on first use."""
    return made(recipe, RasterCourse(recipe), tokenizer(), corpus=digest())


def raster_target(recipe: Recipe = RECIPE) -> HubTarget:
    """The same model, ready to decode."""
    return HubTarget(load_checkpoint(str(raster(recipe)), dtype="float32", device="cpu").model)


GUIDED = replace(RECIPE, name="digits-guided", rope_theta=100.0)
"""The same sizes and lessons for a decoder that paints in any order."""

CLASS_DROPOUT = 0.1
"""Share of lessons without a digit, for guidance."""


class GuidedCourse:
    """Pictures in random orders of their pixels, one in ten without its digit.

    Args:
        recipe: Sizes and seed.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def build(self) -> GuidedDecoder:
        """A guided decoder with fresh weights."""
        recipe = self.recipe
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)  # torch's layers draw their weights from here
            return GuidedDecoder(
                LEVELS,
                CLASSES,
                SIDE,
                recipe.hidden_size,
                recipe.num_hidden_layers,
                recipe.num_attention_heads,
                recipe.intermediate_size,
                recipe.rope_theta,
            )

    def batches(self, start: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Pixels [B, 64], digits [B] and orders [B, 64] of each step."""
        for step, (grids, digits) in enumerate(drawn(self.recipe, start), start):
            generator = batch_generator(self.recipe.seed, -step - 1)
            order = torch.rand(len(grids), SIDE * SIDE, generator=generator).argsort(1)
            silent = torch.rand(len(grids), generator=generator) < CLASS_DROPOUT
            yield grids.flatten(1), digits.masked_fill(silent, CLASSES), order

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Mean nats per pixel."""
        tokens, digits, order = batch
        logits = model(tokens, digits, order)
        return F.cross_entropy(logits.flatten(0, 1), tokens.gather(1, order).flatten())


def guided(recipe: Recipe = GUIDED) -> GuidedDecoder:
    """The model that paints in any order, trained on first use."""
    folder = made(recipe, GuidedCourse(recipe), tokenizer(), corpus=digest())
    model: GuidedDecoder = GuidedDecoder.from_pretrained(str(folder))
    return model.eval()


@torch.no_grad()
def pixel_loss(model: nn.Module) -> float:
    """Nats per pixel of held-out pictures."""
    grids, digits = pictures("held-out")
    return float(nats(model, torch.cat([prompts(digits), grids.flatten(1)], 1)))
