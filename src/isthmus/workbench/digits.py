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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from isthmus.decoding.target import HubTarget
from isthmus.errors import require
from isthmus.metrics.images import class_accuracy, frechet_distance
from isthmus.models.guided_decoder import GuidedDecoder
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


@dataclass(frozen=True)
class Digit:
    """A digit with all its 17 levels, as a picture to train on."""

    values: tuple[int, ...]

    def pixels(self) -> Tensor:
        """Levels 0 to 16, uint8 [1, 8, 8]."""
        return torch.tensor(self.values, dtype=torch.uint8).view(1, SIDE, SIDE)

    def picture(self) -> Tensor:
        """The same as grey, uint8 [3, 8, 8]."""
        return (self.pixels().int() * 255 // 16).to(torch.uint8).expand(3, -1, -1).contiguous()


JUDGED = 397
"""Digits that only claims of codecs look at."""


def whole(part: Literal["learn", "stop", "judged"]) -> Tensor:
    """Digits with all their levels, uint8 [N, 8, 8]: 1,260 to learn from, 140, and 397.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    data: Any = require("sklearn.datasets", "workbench").load_digits()
    grids = torch.from_numpy(data.images).to(torch.uint8)
    order = torch.randperm(len(grids), generator=torch.Generator().manual_seed(0))
    judged, rest = order[:JUDGED], order[JUDGED:]
    return grids[{"learn": rest[140:], "stop": rest[:140], "judged": judged}[part]]


def records(part: Literal["learn", "stop"]) -> list[Digit]:
    """The same as records."""
    return [Digit(tuple(grid.flatten().tolist())) for grid in whole(part)]


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
            generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 - step - 1)
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
