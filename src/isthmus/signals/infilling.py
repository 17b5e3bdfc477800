"""Fill-in-the-middle text: a document cut in three and put in an order that a model can learn.

A model that writes from left to right learns to fill a gap when it is shown what stands before and
behind it first (Bavarian et al., "Efficient Training of Language Models to Fill in the Middle",
2022, arXiv:2207.14255)::

    prefix | middle | suffix   ──▶   PRE prefix SUF suffix MID middle END

Four special tokens, the sentinels, mark the parts. Parts are lists of token ids: a text is cut
between tokens, so that none of them is torn.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from isthmus.errors import InvalidInputError, UnsupportedModelError

SPELLINGS = (
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # CodeGemma, Qwen2.5-Coder
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),  # Code Llama
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
)
"""How models spell the tokens before prefix, suffix and middle."""

ENDS = ("▁<EOT>", "<|file_separator|>")
"""Tokens that end a middle where the end-of-text token does not."""


@dataclass(frozen=True)
class Sentinels:
    """Token ids that mark the parts.

    Attributes:
        prefix: Stands before the prefix (PRE).
        suffix: Stands before the suffix (SUF).
        middle: Stands before the middle (MID).
        end: Ends the middle.
    """

    prefix: int
    suffix: int
    middle: int
    end: int

    @classmethod
    def of(cls, tokenizer: Any) -> Sentinels:
        """Those of a tokenizer of transformers.

        Raises:
            UnsupportedModelError: It has none: its model was not trained to fill in.
        """
        known = {} if tokenizer is None else tokenizer.get_vocab()
        end = next((known[e] for e in ENDS if e in known), getattr(tokenizer, "eos_token_id", None))
        for prefix, suffix, middle in SPELLINGS:
            if end is not None and {prefix, suffix, middle} <= known.keys():
                return cls(known[prefix], known[suffix], known[middle], end)
        raise UnsupportedModelError(
            "this tokenizer has no sentinels for filling in a middle, such as <fim_prefix>; use a "
            "model that was trained to, StarCoder, Code Llama or Qwen2.5-Coder for one"
        )


@dataclass(frozen=True)
class Parts:
    """A document cut in three, as token ids; whole, it is prefix, middle, suffix.

    Attributes:
        prefix: What stands before the gap.
        middle: What fills it.
        suffix: What stands behind it.
        joined: Whether the middle was brought to an end, so that the suffix fits behind it.
    """

    prefix: tuple[int, ...]
    middle: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    joined: bool = True

    @property
    def whole(self) -> tuple[int, ...]:
        """The document."""
        return self.prefix + self.middle + self.suffix


def cut(tokens: Sequence[int], first: int, starts: Sequence[int], rng: random.Random) -> Parts:
    """Cut a document at two random places.

    Args:
        tokens: The document.
        first: Tokens that always belong to the prefix.
        starts: Places where a suffix begins half the time, such as the beginnings of lines.
        rng: Source of draws.

    Raises:
        InvalidInputError: ``first`` is not within the document.
    """
    if not 0 <= first <= len(tokens):
        raise InvalidInputError(f"first must be 0 to {len(tokens)}, got {first}")
    before = rng.randint(first, len(tokens))
    after = rng.randint(before, len(tokens))
    marked = [start for start in starts if start >= before]
    if marked and rng.random() < 0.5:
        after = rng.choice(marked)
    return Parts(tuple(tokens[:before]), tuple(tokens[before:after]), tuple(tokens[after:]))


def join(parts: Parts, marks: Sentinels) -> list[int]:
    """The parts in the order that a model reads them in: prefix, suffix, middle.

    Example:
        >>> join(Parts((1, 2), (3,), (4,)), Sentinels(90, 91, 92, 0))
        [90, 1, 2, 91, 4, 92, 3, 0]
    """
    before = [marks.prefix, *parts.prefix, marks.suffix, *parts.suffix]
    return [*before, marks.middle, *parts.middle, *([marks.end] if parts.joined else [])]


def split(tokens: Sequence[int], marks: Sentinels) -> Parts:
    """The parts of a text in that order; what is not there yet is empty.

    A text without sentinels is a prefix. End tokens and what stands behind them are left out.

    Example:
        >>> split([90, 1, 2, 91, 4, 92, 3, 0], Sentinels(90, 91, 92, 0))
        Parts(prefix=(1, 2), middle=(3,), suffix=(4,), joined=True)
        >>> split([90, 1, 2, 91, 4], Sentinels(90, 91, 92, 0))
        Parts(prefix=(1, 2), middle=(), suffix=(4,), joined=False)
    """
    text = list(tokens)
    if marks.prefix in text:
        text = text[text.index(marks.prefix) + 1 :]
    prefix, suffixed, rest = _parted(text, marks.suffix)
    suffix, _, rest = _parted(rest, marks.middle)
    middle, ended, _ = _parted(rest, marks.end)
    prefix, suffix = (_parted(part, marks.end)[0] for part in (prefix, suffix))
    return Parts(tuple(prefix), tuple(middle), tuple(suffix), ended or not suffixed)


def _parted(tokens: list[int], mark: int) -> tuple[list[int], bool, list[int]]:
    """What stands before the first mark, whether it is there, and what stands behind it."""
    if mark not in tokens:
        return tokens, False, []
    place = tokens.index(mark)
    return tokens[:place], True, tokens[place + 1 :]
