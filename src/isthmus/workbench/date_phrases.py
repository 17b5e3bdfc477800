"""The `date-phrases` data set: a date in German, French or Dutch, and any English way to write it.

A small translation: each source has several right answers, whose parts stand at different places.
A model that chooses every character on its own mixes them up. Dates are held out as in
:mod:`isthmus.workbench.dates`, whose tokenizer (one token a character) is used.

Two encoder-decoders of one recipe learn it: ``order`` 4 is a Markov transformer
(:mod:`isthmus.models.markov`), and an order beyond the longest text a plain decoder.
"""

from __future__ import annotations

import datetime
import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isthmus.models.markov import markov_loss
from isthmus.workbench import dates
from isthmus.workbench._tasks import DatesCourse, TaskRecipe
from isthmus.workbench.courses import made
from isthmus.workbench.pycode import Split

SOURCES = (("de", 2), ("fr", 2), ("nl", 1))
"""Languages and their forms with the day of the week."""

FORMS = (
    "{w}, {d} {month} {y}",
    "{w}, {month} {d}, {y}",
    "{w} the {d}{th} of {month} {y}",
    "{d} {month} {y}, {w}",
    "{month} {d}, {y}, a {w}",
)
"""English ways to write a date; fields as in :class:`isthmus.workbench.dates.Language`, and ``th``.

The last characters of a beginning, and where it ends, tell which way it goes on: a text that mixes
two ways is then a mistake of the model, or of the search, and not of a short memory as such."""

LONGEST = 40
"""Characters of an English date at most."""


@dataclass(frozen=True)
class Phrase:
    """A date to be written in English.

    Attributes:
        source: As people write it.
        targets: All right answers.
    """

    source: str
    targets: tuple[str, ...]


def english(date: datetime.date) -> tuple[str, ...]:
    """All ways to write a date.

    Example:
        >>> ways = english(datetime.date(2021, 3, 4))
        >>> ways[1], ways[2]
        ('Thursday, March 4, 2021', 'Thursday the 4th of March 2021')
    """
    told = dates.LANGUAGES["en"]
    day = date.day
    ending = {1: "st", 2: "nd", 3: "rd"}.get(day % 10 if day // 10 != 1 else 0, "th")
    values = {"w": told.weekdays[date.weekday()], "month": told.months[date.month - 1]}
    return tuple(form.format(d=day, th=ending, y=date.year, **values) for form in FORMS)


def phrases(count: int, split: Split = "held-out", *, seed: int | str = 0) -> list[Phrase]:
    """Draw dates to be written in English.

    Args:
        count: How many.
        split: ``"train"`` or ``"held-out"``.
        seed: Other seeds give other dates.
    """
    rng = random.Random(f"date-phrases/{split}/{seed}")
    drawn = []
    for example in dates.examples(count, split, seed=f"date-phrases/{seed}"):
        date = datetime.date.fromisoformat(example.target)
        language, form = rng.choice(SOURCES)
        drawn.append(Phrase(dates.write(date, language, form), english(date)))
    return drawn


@dataclass(frozen=True)
class PhraseRecipe(TaskRecipe):
    """Sizes, and how far back the decoder sees.

    Attributes:
        order: M, tokens that the next one may depend on.
    """

    order: int = 4


SIZES: dict[str, Any] = {
    "task": "dates",
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "encoder_layers": 2,
    "num_attention_heads": 3,
    "head_dim": 32,
    "intermediate_size": 192,
    "vocab_size": 96,
    "batch_size": 64,
    "sequence_length": 24,
    "max_position_embeddings": 64,
    "steps": 1000,
    "decay_share": 0.4,
}

MARKOV = PhraseRecipe(name="date-phrases-markov", order=4, **SIZES)
"""0.4 million parameters, of every order up to 4."""

PLAIN = PhraseRecipe(name="date-phrases", order=63, **SIZES)
"""The same with a decoder that sees everything before."""


def tiny(recipe: PhraseRecipe) -> PhraseRecipe:
    """The same in seconds, for tests: it has learnt next to nothing."""
    return replace(
        recipe,
        name=f"{recipe.name}-t",
        hidden_size=24,
        num_attention_heads=1,
        head_dim=24,
        steps=30,
        batch_size=8,
    )


class PhrasesCourse(DatesCourse):
    """Sources and one of their answers, cut by barriers at random.

    Args:
        recipe: Sizes, order and seed.
    """

    recipe: PhraseRecipe

    def build(self) -> Any:
        """An mBART that says its order."""
        model: Any = super().build()
        model.config.markov_order = self.recipe.order
        model.generation_config = self.generation()
        return model

    def batches(self, start: int) -> Iterator[tuple[Tensor, ...]]:
        """Sources, their masks, decoder inputs, labels, and the offset of each row's barriers."""
        recipe, step = self.recipe, start
        while True:
            seed = f"{recipe.seed}/{step}"
            rng = random.Random(seed)
            drawn = [
                dates.Example(phrase.source, rng.choice(phrase.targets), "en")
                for phrase in phrases(recipe.batch_size, "train", seed=seed)
            ]
            # a text that fits into one block has nothing to be cut
            last = recipe.order if recipe.order < LONGEST else 0
            offset = torch.tensor([rng.randint(0, last) for _ in drawn])
            step += 1
            yield (*self.collate(drawn), offset)

    def loss(self, model: Any, batch: Sequence[Tensor]) -> Tensor:
        """Mean nats per character of the answers."""
        source, mask, target, labels, offset = batch
        found = markov_loss(model, source, mask, target, labels, offset, order=self.recipe.order)
        return found.total / found.weight


def reference(recipe: PhraseRecipe) -> Path:
    """Folder of a trained model, made on first use."""
    key = hashlib.sha256(repr((SOURCES, FORMS, dates.digest())).encode()).hexdigest()
    course = PhrasesCourse(recipe)
    return made(recipe, course, course.tokenizer, corpus=key, end=course.end)
