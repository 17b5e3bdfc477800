"""How much a text repeats itself, and how far its n-grams are from those of other texts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import TypeVar

G = TypeVar("G", bound=Hashable)


def ngrams(tokens: Sequence[G], n: int) -> list[tuple[G, ...]]:
    """All n-grams of a text in order, of tokens, words or characters; none where it is shorter."""
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def repetition(texts: Iterable[Sequence[int]], n: int = 4) -> float:
    """rep-n: share of n-grams that stood in the same text before, mean over texts (Su et al. 2022).

    Texts without an n-gram are left out; 0 where none is left.

    Example:
        >>> repetition([[1, 2, 1, 2, 1]], 2)  # 12 21 12 21
        0.5
    """
    shares = [1.0 - len(set(grams)) / len(grams) for t in texts if (grams := ngrams(t, n))]
    return sum(shares) / len(shares) if shares else 0.0


def distinct(texts: Iterable[Sequence[int]], n: int = 2) -> float:
    """distinct-n: different n-grams over all n-grams of all texts together (Li et al. 2016).

    Example:
        >>> distinct([[1, 2, 3], [1, 2, 4]], 2)  # 12 23 24 of four
        0.75
    """
    grams = [gram for text in texts for gram in ngrams(text, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def divergence(
    texts: Iterable[Sequence[int]], references: Iterable[Sequence[int]], n: int = 1
) -> float:
    """Jensen-Shannon divergence in bits between the n-grams of two sets of texts, 0 to 1.

    Example:
        >>> divergence([[1, 1]], [[1, 1, 1]]), divergence([[1]], [[2]])
        (0.0, 1.0)
    """
    ours, theirs = (
        Counter(gram for text in side for gram in ngrams(text, n)) for side in (texts, references)
    )
    if not ours or not theirs:
        return 0.0 if not ours and not theirs else 1.0
    total = 0.0
    for side in (ours, theirs):
        size = sum(side.values())
        for gram, count in side.items():
            p = count / size
            middle = (ours[gram] / ours.total() + theirs[gram] / theirs.total()) / 2
            total += p * math.log2(p / middle) / 2
    return total
