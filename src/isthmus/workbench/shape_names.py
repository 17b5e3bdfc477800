"""Pictures of one shape on a grey ground, its mask, and a small vision transformer that names it.

The eight kinds of :mod:`isthmus.workbench.scene_masks`; hue is a hint, the outline settles it. The
mask says which patches show the shape, so a map of relevance can be held against it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus.models.picture_classifier import PictureClassifier
from isthmus.training.seeds import batch_generator
from isthmus.workbench._training import Recipe
from isthmus.workbench.courses import made
from isthmus.workbench.pycode import Split
from isthmus.workbench.scene_masks import SHAPES, Spec, masked_scenes
from isthmus.workbench.tokenizer import word_tokenizer

SPEC = Spec(
    side=48, shapes=(1, 1), radius=(0.16, 0.28), noise=4.0, thin=0.0, shading=True, hue=0.05
)
PATCH = 6
TRAINING = 6000
"""Pictures of the training set."""

RECIPE = Recipe(
    "shape-names",
    hidden_size=96,
    num_hidden_layers=6,
    num_attention_heads=4,
    head_dim=24,
    intermediate_size=192,
    steps=450,
    batch_size=32,
    sequence_length=(SPEC.side // PATCH) ** 2 + 1,
    vocab_size=len(SHAPES),
    adam_lr=1e-3,
    warmup_steps=40,
    decay_share=0.5,
)
"""A vision transformer of half a million parameters."""


@dataclass(frozen=True)
class Shapes:
    """Pictures.

    Attributes:
        pictures: uint8 [N, 3, side, side].
        names: Class of each, int64 [N].
        object: Which patches the shape covers by a quarter or more, bool [N, patches].
    """

    pictures: Tensor
    names: Tensor
    object: Tensor


def shapes(count: int, split: Split = "held-out") -> Shapes:
    """The first pictures of a split."""
    scenes = masked_scenes(count, split, SPEC)
    drawn = [scene.draw() for scene in scenes]
    masks = torch.stack([mask for _, mask in drawn])
    cover = F.avg_pool2d((masks > 0).float()[:, None], PATCH).flatten(1)
    names = torch.tensor([scene.name - 1 for scene in scenes])
    return Shapes(torch.stack([picture for picture, _ in drawn]), names, cover >= 0.25)


def pixels(pictures: Tensor) -> Tensor:
    """What the network reads: uint8 0 to 255 as floats -2 to 2."""
    return pictures.float() / 63.75 - 2


class ShapeCourse:
    """Pictures, mirrored by chance, and their names.

    Args:
        recipe: Sizes and seed.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def build(self) -> PictureClassifier:
        """A network with fresh weights."""
        r = self.recipe
        return PictureClassifier(
            list(SHAPES),
            width=r.hidden_size,
            layers=r.num_hidden_layers,
            heads=r.num_attention_heads,
            patch=PATCH,
            side=SPEC.side,
            hidden=r.intermediate_size,
            seed=r.seed,
        )

    def batches(self, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Pixels [B, 3, side, side] and names [B] of each step."""
        known = shapes(min(TRAINING, self.recipe.steps * self.recipe.batch_size), "train")
        for step in itertools.count(start):
            draw = batch_generator(self.recipe.seed, step)
            rows = torch.randint(len(known.names), (self.recipe.batch_size,), generator=draw)
            flips = torch.rand(2, generator=draw) < 0.5
            given = pixels(known.pictures[rows])
            yield given.flip([i + 2 for i in range(2) if flips[i]]), known.names[rows]

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Mean cross-entropy."""
        return F.cross_entropy(model(batch[0]).logits, batch[1])


@functools.lru_cache(maxsize=2)
def shape_model(recipe: Recipe = RECIPE) -> PictureClassifier:
    """The network that names shapes, trained in a few minutes on first use."""
    few = shapes(4)
    state = hashlib.sha256(few.pictures.numpy().tobytes() + few.names.numpy().tobytes())
    names = word_tokenizer(list(SHAPES))
    folder = made(recipe, ShapeCourse(recipe), names, corpus=state.hexdigest())
    with contextlib.redirect_stdout(io.StringIO()):  # huggingface_hub prints where it reads from
        model: PictureClassifier = PictureClassifier.from_pretrained(str(folder))
    return model.eval()


def tiny() -> Recipe:
    """The same in seconds, for tests: it has learnt next to nothing."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return replace(
        RECIPE, name="shape-names-t", steps=2, batch_size=2, intermediate_size=16, **sizes
    )
