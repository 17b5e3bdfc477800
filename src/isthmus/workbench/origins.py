"""The `origins` data set: dates and numbers, translated both ways, natural or not on either side.

A law of translation depends on where a test set comes from. Here, by name:

* ``source-natural``: a date or a number as people write it, to digits. One right answer.
* ``target-natural``: digits and a language, to what people would write. A date has several right
  answers, so that no model reaches a loss of zero.
* ``machine-made``: as ``source-natural``, but every letter of the source may be dropped or doubled.
"""

from __future__ import annotations

import random
from typing import Literal, get_args

from isthmus.errors import UnknownNameError
from isthmus.training.data import Pair
from isthmus.workbench import dates, numbers

Origin = Literal["source-natural", "target-natural", "machine-made"]
"""Which side of a pair people would have written."""

ORIGINS: tuple[Origin, ...] = get_args(Origin)

LANGUAGES = ("cs", "de", "en", "es", "fi", "fr", "nl", "pl", "ru", "sv")
"""Of the dates; numbers are in the four of :data:`isthmus.workbench.numbers.LANGUAGES`."""

NOISE = 0.08
"""Probability that a letter of a machine-made source is dropped, and that it is doubled."""


def pairs(count: int, origin: Origin, *, held_out: bool = False, seed: int | str = 0) -> list[Pair]:
    """Draw pairs, dates and numbers alike.

    Args:
        count: How many.
        origin: A name of :data:`ORIGINS`.
        held_out: Of the dates and numbers that are kept from training, in every language.
        seed: Other seeds give other pairs.

    Raises:
        UnknownNameError: No such origin.

    Example:
        >>> [pair.source for pair in pairs(2, "target-natural", seed=4)]
        ['fr 2094-04-24', 'sv 86']
    """
    if origin not in ORIGINS:
        raise UnknownNameError("origin", origin, ORIGINS)
    rng = random.Random(f"origins/{origin}/{held_out}/{seed}")
    split: Literal["train", "held-out"] = "held-out" if held_out else "train"
    half = count - count // 2
    written = [
        (each.source, each.target, each.language)
        for each in dates.examples(half, split, seed=f"{origin}/{seed}", languages=LANGUAGES)
    ]
    spelt = list[tuple[str, str, str]]()
    while len(spelt) < count // 2:
        number, language = rng.randrange(10 ** rng.randint(1, 4)), rng.choice([*numbers.LANGUAGES])
        if numbers.is_held_out(number) == held_out:
            spelt.append((numbers.spell(number, language), str(number), language))
    both = [each for two in zip(written, spelt, strict=False) for each in two] + written[
        len(spelt) :
    ]
    if origin == "target-natural":
        return [Pair(f"{language} {digits}", words) for words, digits, language in both]
    if origin == "machine-made":
        return [Pair(_noisy(words, rng), digits) for words, digits, _ in both]
    return [Pair(words, digits) for words, digits, _ in both]


def _noisy(text: str, rng: random.Random) -> str:
    draws = [rng.random() for _ in text]
    return "".join(
        "" if draw < NOISE and c.isalpha() else 2 * c if draw > 1 - NOISE and c.isalpha() else c
        for c, draw in zip(text, draws, strict=True)
    )
