"""Lines of words seen through noise, and a recogniser that reads them letter by letter.

A line is the first sentence of a docstring in small letters. Noise takes a letter for one of its
look-alikes. The recogniser knows what the noise does and which letter follows which, both counted
from a few hundred lines; it knows no word.
"""

from __future__ import annotations

import functools
import random
import re
import string

import torch

from isthmus.decoding.bytevocab import ByteVocab
from isthmus.decoding.table import TableTarget
from isthmus.workbench import pycode
from isthmus.workbench.pycode import Split

LETTERS = string.ascii_lowercase + " "
END = len(LETTERS)
"""Id of the token that begins and ends a line."""

ALIKE = 3
"""Letters that one is taken for."""

SHOWN = 300
"""Lines that the recogniser is counted from."""


@functools.lru_cache(maxsize=2)
def lines(split: Split) -> tuple[str, ...]:
    """First sentences of docstrings, 20 to 40 letters each, each once."""
    found: list[str] = []
    for text in pycode.texts(split):
        sentences = re.findall(r'"""([A-Z][a-z]+(?: [a-z]+)+)\.', text)
        found += [s.lower() for s in sentences if 20 <= len(s) <= 40]
    return tuple(dict.fromkeys(found))


def blurred(line: str, noise: float, rng: random.Random) -> str:
    """A line in which every letter is taken for a look-alike with a probability."""
    return "".join(rng.choice(_alike()[c]) if rng.random() < noise else c for c in line)


@functools.lru_cache(maxsize=1)
def _alike() -> dict[str, str]:
    rng = random.Random(0)
    return {c: "".join(rng.sample(LETTERS.replace(c, ""), ALIKE)) for c in LETTERS}


def vocab() -> ByteVocab:
    """Bytes under the recogniser's tokens."""
    return ByteVocab.of([c.encode() for c in LETTERS])


@functools.lru_cache(maxsize=4)
def _counted(noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of what is seen of a letter, and of a letter after another or the start."""
    rng = random.Random(1)
    seen, after = torch.full((END, END), 0.1), torch.full((END + 1, END), 0.5)
    for line in rng.sample(lines("train"), min(SHOWN, len(lines("train")))):
        last = END
        for letter, shown in zip(line, blurred(line, noise, rng), strict=True):
            this = LETTERS.index(letter)
            seen[this, LETTERS.index(shown)] += 1
            after[last, this] += 1
            last = this
    return (seen / seen.sum(1, keepdim=True)).log(), (after / after.sum(1, keepdim=True)).log()


class Recogniser(TableTarget):
    """A model of the letters of one line that was seen through noise.

    Args:
        seen: The line as it was seen.
        noise: How noisy the lines were that the recogniser is counted from.

    Example:
        >>> Recogniser("a b", 0.3).vocab_size
        28
    """

    def __init__(self, seen: str, noise: float) -> None:
        super().__init__(END + 1)
        channel, self._after = _counted(noise)
        self._channel = channel[:, [LETTERS.index(c) for c in seen]].T  # [T, letters]

    def push(self, state: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """State after one more token: how many letters stand, and the last token."""
        base = END + 2
        place = torch.where(state == 0, 0, state // base + 1)
        return place * base + tokens + 1

    def logits(self, state: torch.Tensor) -> torch.Tensor:
        """Logits [..., V]; the line ends when all that was seen has been read."""
        place, last = state // (END + 2), (state % (END + 2) - 1).clamp(0, END)
        inside = place < len(self._channel)
        heard = self._channel[place.clamp(max=len(self._channel) - 1)] + self._after[last]
        out = torch.full((*state.shape, END + 1), -torch.inf, dtype=torch.float64)
        out[..., :END] = torch.where(inside[..., None], heard.double(), -torch.inf)
        out[..., END] = torch.where(inside, -torch.inf, 0.0).double()
        return out


def word_error_rate(said: str, meant: str) -> tuple[int, int]:
    """Words to be changed, added or left out, and words that were meant.

    Example:
        >>> word_error_rate("read the lines", "read a line of text")
        (4, 5)
    """
    a, b = said.split(), meant.split()
    row = list(range(len(b) + 1))
    for i, word in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (word != other))
    return row[-1], len(b)
