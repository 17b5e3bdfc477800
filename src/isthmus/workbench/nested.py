"""A nested drafter, drafters of one depth trained for the same compute, and targets of three sizes.

All share the tokenizer of ``pycode-m``. The smaller targets are that model with layers left out,
tuned for a minute so that they write like a model of their size.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from isthmus.decoding.target import HubTarget
from isthmus.errors import InvalidInputError
from isthmus.models.hub import load_checkpoint
from isthmus.models.nested import check_exits, keep_layers, set_exits, sorted_loss
from isthmus.workbench import pycode
from isthmus.workbench._training import Recipe, batches, build
from isthmus.workbench.courses import made
from isthmus.workbench.drafters import target_model
from isthmus.workbench.tokenizer import end_id

EXITS = (1, 2, 4)
"""Exits of the nested drafter, and depths of the separate ones."""

TOKENS = 1_048_576
"""Training tokens of the nested drafter."""

KEPT: dict[str, tuple[int, ...]] = {
    "6 layers": (0, 1, 2, 3, 4, 5),
    "4 layers": (0, 1, 4, 5),
    "2 layers": (0, 5),
}
"""Layers of ``pycode-m`` that each target has."""

EVERY = 4
"""Only every fourth document is read: more than these short trainings get through."""


@dataclass(frozen=True)
class NestedRecipe(Recipe):
    """A language model that learns to answer after several of its layers.

    Attributes:
        exits: They; the last one is the last layer.
        kept: Layers of ``pycode-m`` to begin with; none begins with fresh weights.
    """

    exits: tuple[int, ...] = EXITS
    kept: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "exits", check_exits(self.exits, self.num_hidden_layers))
        object.__setattr__(self, "kept", tuple(self.kept))

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return super().as_dict() | {"exits": list(self.exits), "kept": list(self.kept)}


class NestedCourse:
    """Packed text and the loss summed over the exits.

    Args:
        recipe: Sizes, exits and seed.
    """

    def __init__(self, recipe: NestedRecipe) -> None:
        self.recipe = recipe
        self.tokenizer = target_model().tokenizer
        self.end = end_id(self.tokenizer)

    def build(self) -> Any:
        """A Llama whose config tells its exits."""
        if self.recipe.kept:
            model = keep_layers(target_model().target.model, self.recipe.kept)
        else:
            model = build(self.recipe, token_id=self.end)
        set_exits(model, self.recipe.exits)
        return model

    def batches(self, start: int) -> Iterator[Tensor]:
        """Token ids [B, T + 1]."""
        return batches(_documents(), self.recipe, self.end, start)

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        """See :func:`isthmus.models.nested.sorted_loss`."""
        return sorted_loss(model, batch, self.recipe.exits)


@functools.lru_cache(maxsize=1)
def _documents() -> list[NDArray[np.int32]]:
    encode = target_model().tokenizer.backend_tokenizer.encode_batch_fast
    found = encode(pycode.texts("train")[::EVERY], add_special_tokens=False)
    return [np.array(each.ids, dtype=np.int32) for each in found]


def recipe_of(exits: Sequence[int], tokens: int = TOKENS) -> NestedRecipe:
    """The drafter with these exits; its training costs what its share of the compute allows.

    The three separate drafters together get the compute of the nested one: a forward of theirs
    evaluates the head once, its forward once an exit.

    Args:
        exits: :data:`EXITS`, or one depth.
        tokens: Training tokens of the nested drafter.
    """
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "num_attention_heads": 2,
        "head_dim": 32,
        "intermediate_size": 176,
        "vocab_size": 1024,
        "batch_size": 8,
        "sequence_length": 256,
    }
    layer = 4 * 64 * 64 + 3 * 64 * 176
    head = 64 * 1024
    nested = EXITS[-1] * layer + len(EXITS) * head
    apart = sum(depth * layer + head for depth in EXITS)
    share = 1.0 if len(exits) > 1 else nested / apart
    steps = max(1, round(tokens * share / (8 * 256)))
    name = "nested-" + "-".join(map(str, exits))
    return NestedRecipe(
        name=name, num_hidden_layers=exits[-1], steps=steps, exits=tuple(exits), **sizes
    )


def drafter(exits: Sequence[int] = EXITS, tokens: int = TOKENS) -> HubTarget:
    """A drafter with these exits as a target, trained on first use."""
    return _load(recipe_of(exits, tokens))


def target(name: str, steps: int = 100) -> HubTarget:
    """A target by name, tuned on first use where layers were left out.

    Args:
        name: A name in :data:`KEPT`.
        steps: Tuning steps of 2,048 tokens.

    Raises:
        InvalidInputError: No such target.
    """
    if name not in KEPT:
        raise InvalidInputError(f"the targets are {', '.join(KEPT)}; there is no {name!r}")
    layers, whole = KEPT[name], target_model().target
    assert isinstance(whole, HubTarget)
    if len(layers) == whole.num_layers:
        return whole
    recipe = NestedRecipe(
        name=f"pycode-m-{len(layers)}",
        hidden_size=128,
        num_hidden_layers=len(layers),
        num_attention_heads=4,
        head_dim=32,
        intermediate_size=352,
        vocab_size=1024,
        batch_size=8,
        sequence_length=256,
        steps=steps,
        warmup_steps=10,
        muon_lr=0.005,
        adam_lr=0.001,
        decay_share=0.7,
        exits=(len(layers),),
        kept=layers,
    )
    return _load(recipe)


def _load(recipe: NestedRecipe) -> HubTarget:
    course = NestedCourse(recipe)
    corpus = f"{pycode.digest()}/{EVERY}"
    folder = made(recipe, course, course.tokenizer, corpus=corpus, end=course.end)
    model = load_checkpoint(str(folder), dtype="float32", device="cpu").model
    return HubTarget(model)
