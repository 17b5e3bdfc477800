"""The `digits` data set: 8 by 8 pictures of handwritten digits as grids of grey levels.

scikit-learn's digits (UCI, 1,797 pictures) with their 17 levels halved to 9, one token a pixel.
Tokens 0 to 8 are grey levels, 9 to 18 ask for a digit. Every fifth picture is held out. The judge
is a small perceptron that was shown the other pictures; its hidden layer gives the features in
which made and real pictures are compared.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from isthmus.decoding.target import HubTarget
from isthmus.errors import require
from isthmus.metrics.images import class_accuracy, frechet_distance
from isthmus.models.hub import load_checkpoint
from isthmus.workbench._training import Recipe, build, nats
from isthmus.workbench.courses import made
from isthmus.workbench.pycode import Split
from isthmus.workbench.tokenizer import word_tokenizer

SIDE, LEVELS, CLASSES = 8, 9, 10
HELD_OUT = 5
"""One picture in so many is held out."""

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


@functools.lru_cache(maxsize=1)
def _all() -> tuple[Tensor, Tensor]:
    data: Any = require("sklearn.datasets", "workbench").load_digits()
    return torch.from_numpy(data.images // 2).long(), torch.from_numpy(data.target).long()


def pictures(split: Split) -> tuple[Tensor, Tensor]:
    """Grey levels int64 [N, 8, 8] and digits int64 [N].

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    grids, digits = _all()
    held_out = torch.arange(len(grids)) % HELD_OUT == 0
    chosen = held_out if split == "held-out" else ~held_out
    return grids[chosen], digits[chosen]


def digest() -> str:
    """What the data set is, in a few letters."""
    grids, digits = _all()
    return hashlib.sha256(grids.numpy().tobytes() + digits.numpy().tobytes()).hexdigest()


def prompts(digits: Tensor) -> Tensor:
    """Tokens that ask for digits: int64 [B, 1] from int64 [B]."""
    return LEVELS + digits[:, None]


def tokenizer() -> PreTrainedTokenizerFast:
    """One word a token."""
    return word_tokenizer(
        [*(f"g{i}" for i in range(LEVELS)), *(f"digit{i}" for i in range(CLASSES))]
    )


def drawn(recipe: Recipe, start: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Training pictures int64 [B, 8, 8] and their digits [B] of each step from ``start`` on."""
    grids, digits = pictures("train")
    for step in itertools.count(start):
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
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


@torch.no_grad()
def pixel_loss(model: nn.Module) -> float:
    """Nats per pixel of held-out pictures."""
    grids, digits = pictures("held-out")
    return float(nats(model, torch.cat([prompts(digits), grids.flatten(1)], 1)))


class Judge:
    """A perceptron that tells digits apart; made in a second, the same for everybody.

    Args:
        seed: Of its weights and the order of its lessons.
    """

    def __init__(self, seed: int = 0) -> None:
        grids, digits = pictures("train")
        perceptron: Any = require("sklearn.neural_network", "workbench").MLPClassifier
        self._net = perceptron(
            (64,), alpha=1e-2, max_iter=500, random_state=seed, n_iter_no_change=10
        )
        self._net.fit(grids.flatten(1).numpy() / (LEVELS - 1), digits.numpy())
        self._real = self.features(pictures("held-out")[0])

    def features(self, grids: Tensor) -> Tensor:
        """The hidden layer, float64 [N, 64], of pictures [N, 8, 8]."""
        weight, bias = (torch.from_numpy(x[0]) for x in (self._net.coefs_, self._net.intercepts_))
        return (grids.flatten(1).double() / (LEVELS - 1) @ weight + bias).relu()

    def accuracy(self, grids: Tensor, digits: Tensor) -> float:
        """Share of pictures [N, 8, 8] in which it sees the digit [N] that was asked for."""
        weight, bias = (torch.from_numpy(x[1]) for x in (self._net.coefs_, self._net.intercepts_))
        return class_accuracy(self.features(grids) @ weight + bias, digits)

    def distance(self, grids: Tensor) -> float:
        """Frechet distance of pictures [N, 8, 8] from the held-out ones, in its features."""
        return frechet_distance(self.features(grids), self._real)
