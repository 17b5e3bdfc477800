"""The `captions` data set: name what five patches show, by a model with a prior planted in it.

A scene is a set of objects of :data:`OBJECTS` kinds on five patches, some of them empty; its
caption names the objects in order. A first course learns it from scenes without any habit, with the
head on early layers, too. A second one trains nothing but the last block, on scenes with a habit
(kind 2k comes with kind 2k + 1) whose patches are mostly wrong: the block learns to go by habit. So
the layers below know what is there, and the last one says what usually is.
"""

from __future__ import annotations

import hashlib
import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from isthmus.decoding.law import Law
from isthmus.decoding.model import Model
from isthmus.models.hub import load_checkpoint
from isthmus.workbench._training import IGNORED, Recipe, build
from isthmus.workbench.courses import made
from isthmus.workbench.tokenizer import word_tokenizer

OBJECTS, PATCHES = 12, 5
HABIT = 0.95
"""How often kind 2k + 1 stands beside kind 2k in the scenes of the second course."""

BLUR = 0.35
"""Share of the patches that show something else in the second course."""

END = "<|end|>"
EARLY = (3, 4, 5)
"""Layers whose states the head is trained on besides the last; of six."""

RECIPE = Recipe(
    "captions",
    hidden_size=64,
    num_hidden_layers=6,
    num_attention_heads=4,
    head_dim=16,
    intermediate_size=160,
    steps=900,
    batch_size=96,
    sequence_length=16,
    vocab_size=2 + 2 * OBJECTS + 1,
    max_position_embeddings=32,
)


@dataclass(frozen=True)
class Scene:
    """What is to be named.

    Attributes:
        objects: Kinds, in order.
        patches: What stands on each patch, -1 for nothing.
    """

    objects: tuple[int, ...]
    patches: tuple[int, ...]

    @property
    def prompt(self) -> list[int]:
        """Tokens of the patches, and the one that asks for the caption."""
        return [2 + OBJECTS + 1 + p for p in self.patches] + [1]

    @property
    def description(self) -> list[int]:
        """The prompt with the names in the place of the patches."""
        return described(self.caption)

    @property
    def caption(self) -> list[int]:
        """Tokens of the names."""
        return [2 + o for o in self.objects]


def described(caption: Sequence[int]) -> list[int]:
    """A prompt of names, filled up with empty patches, so that it is as long as any other."""
    names = [t for t in caption if 2 <= t < 2 + OBJECTS][:PATCHES]
    return [*names, *[2 + OBJECTS] * (PATCHES - len(names)), 1]


def named(tokens: list[int]) -> list[int]:
    """Kinds that a caption names; whatever is no name is passed over."""
    return [t - 2 for t in tokens if 2 <= t < 2 + OBJECTS]


def scene(rng: random.Random, *, habit: bool = False) -> Scene:
    """Draw a scene of one to four kinds.

    Args:
        rng: Source of draws.
        habit: Whether kinds come in pairs.
    """
    objects = set(rng.sample(range(OBJECTS), rng.randint(1, 4)))
    if habit:
        for kind in sorted(objects):
            partner = kind + 1 if kind % 2 == 0 else None
            if partner is not None and len(objects) < PATCHES and rng.random() < HABIT:
                objects.add(partner)
    return place(objects, rng)


def counterfactual(rng: random.Random) -> Scene:
    """Draw a scene against the habit: some kind 2k is there and kind 2k + 1 is not."""
    while True:
        found = scene(rng)
        if any(o % 2 == 0 and o + 1 not in found.objects for o in found.objects):
            return found


def place(objects: set[int], rng: random.Random) -> Scene:
    """Put objects on patches."""
    patches = [*objects, *[-1] * (PATCHES - len(objects))]
    rng.shuffle(patches)
    return Scene(tuple(sorted(objects)), tuple(patches))


def tokenizer() -> PreTrainedTokenizerFast:
    """One word a token: names, and what patches show."""
    words = [END, "?", *(f"o{i}" for i in range(OBJECTS)), "empty"]
    words += [f"p{i}" for i in range(OBJECTS)]
    return word_tokenizer(words)


@dataclass(frozen=True)
class Hallucination:
    """How captions differ from what is there.

    Attributes:
        chair_i: Share of the named objects that are not there.
        chair_s: Share of the captions that name such an object.
        recall: Share of the objects that are named.
    """

    chair_i: float
    chair_s: float
    recall: float

    @classmethod
    def of(cls, scenes: Sequence[Scene], said: Sequence[list[int]]) -> Hallucination:
        """Compare captions, as tokens, with their scenes."""
        false = [
            [k for k in named(tokens) if k not in one.objects]
            for one, tokens in zip(scenes, said, strict=True)
        ]
        count = sum(len(named(tokens)) for tokens in said)
        kept = [
            len({*named(tokens)} & {*one.objects}) / len(one.objects)
            for one, tokens in zip(scenes, said, strict=True)
        ]
        return cls(
            sum(map(len, false)) / max(1, count),
            sum(map(bool, false)) / len(scenes),
            statistics.fmean(kept),
        )


def measure(model: Model, scenes: Sequence[Scene], reshape: Any = None) -> Hallucination:
    """Greedy captions of scenes, under a reshape or plainly."""
    law = Law(reshapes=[] if reshape is None else [reshape])
    made = model.generate([one.prompt for one in scenes], max_new_tokens=8, drafter="none", law=law)
    return Hallucination.of(scenes, [g.tokens for g in made])


class CaptionsCourse:
    """Scenes without a habit, or the last block on blurred scenes with one.

    Args:
        recipe: Sizes and seed.
        start: The model of the first course; None is the first course itself.
        describes: Whether every other prompt of the first course holds names for patches.
    """

    def __init__(self, recipe: Recipe, start: Any = None, *, describes: bool = False) -> None:
        self.recipe, self.start, self.describes = recipe, start, describes

    def build(self) -> Any:
        """A Llama with fresh weights, or the given one, of which only the last block moves."""
        if self.start is None:
            return build(self.recipe)
        for name, parameter in self.start.named_parameters():
            if f".layers.{self.recipe.num_hidden_layers - 1}." not in name:
                parameter.register_hook(torch.zeros_like)  # the trainer wants every gradient
        return self.start

    def batches(self, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Token ids and labels, int64 [B, T]."""
        step, habit = start, self.start is not None
        while True:
            rng = random.Random(f"{self.recipe.seed}/{habit}/{step}")
            rows = []
            for row in range(self.recipe.batch_size):
                drawn = scene(rng, habit=habit)
                prompt, said = drawn.prompt, [*drawn.caption, 0]
                if self.describes and not habit and row % 2:
                    prompt = drawn.description
                if habit:
                    for i in range(PATCHES):
                        if rng.random() < BLUR:
                            prompt[i] = 2 + OBJECTS + rng.randint(0, OBJECTS)
                rows.append((prompt + said, [IGNORED] * len(prompt) + said))
            width = max(len(ids) for ids, _ in rows)
            ids = torch.tensor([a + [0] * (width - len(a)) for a, _ in rows])
            labels = torch.tensor([b + [IGNORED] * (width - len(b)) for _, b in rows])
            step += 1
            yield ids, labels

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Mean nats per token; in the first course also those of the head on early layers."""
        ids, labels = batch
        out = model(input_ids=ids[:, :-1], use_cache=False, output_hidden_states=True)
        wanted = labels[:, 1:].flatten()
        loss = F.cross_entropy(out.logits.flatten(0, 1), wanted)
        if self.start is not None:
            return loss
        inner: Any = model
        for layer in EARLY:
            early = inner.lm_head(inner.model.norm(out.hidden_states[layer]))
            loss = loss + F.cross_entropy(early.flatten(0, 1), wanted) / len(EARLY)
        return loss


def reference(recipe: Recipe = RECIPE, *, describes: bool = False) -> Path:
    """Folder of the model with the planted prior, made on first use.

    Args:
        recipe: Sizes, steps and seed of the first course.
        describes: Whether it also learns to caption from a description.
    """
    if describes:
        recipe = replace(recipe, name=f"{recipe.name}-describing", steps=recipe.steps * 3 // 2)
    key = hashlib.sha256(repr((OBJECTS, PATCHES, EARLY)).encode()).hexdigest()
    course = CaptionsCourse(recipe, describes=describes)
    honest = made(recipe, course, tokenizer(), corpus=key)
    start = load_checkpoint(str(honest), dtype="float32").model
    habit = replace(recipe, name=f"{recipe.name}-habit", steps=max(20, recipe.steps * 4 // 9))
    key = f"{key}, {HABIT}, {BLUR}"
    return made(habit, CaptionsCourse(habit, start), tokenizer(), corpus=key)
