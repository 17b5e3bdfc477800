"""chrF: how many groups of characters a text shares with what people wrote.

M. Popovic, "chrF: character n-gram F-score for automatic MT evaluation", 2015; counted over a whole
set of texts, as sacrebleu counts it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from isthmus.metrics.repetition import ngrams

ORDER, BETA = 6, 2.0
"""Longest group of characters, and how much more a miss weighs than an addition."""

_Counts = list[tuple[int, int, int]]  # by order: groups of the text, of the reference, in both


def _counts(text: str, reference: str) -> _Counts:
    found = []
    ours, theirs = ("".join(side.split()) for side in (text, reference))
    for n in range(1, ORDER + 1):
        a, b = (Counter(ngrams(side, n)) for side in (ours, theirs))
        found.append((a.total(), b.total(), (a & b).total()))
    return found


def _score(counts: _Counts) -> float:
    """F of mean precision and mean recall, over the orders that both sides have, 0 to 100."""
    both = [(common / ours, common / theirs) for ours, theirs, common in counts if ours and theirs]
    p, r = (sum(side) / len(both) for side in zip(*both, strict=True)) if both else (0.0, 0.0)
    below = BETA**2 * p + r
    return 100 * (1 + BETA**2) * p * r / below if below else 0.0


def chrf(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """chrF2 of texts, 0 to 100; of several references of a text the nearest one counts.

    Args:
        texts: What was written.
        references: What would be right, one or more for each text.

    Example:
        >>> chrf(["abc"], [["abc", "xyz"]]), chrf(["abc"], [["xyz"]])
        (100.0, 0.0)
    """
    total: _Counts = [(0, 0, 0)] * ORDER
    for text, some in zip(texts, references, strict=True):
        best = max((_counts(text, reference) for reference in some), key=_score)
        total = [(a + x, b + y, c + z) for (a, b, c), (x, y, z) in zip(total, best, strict=True)]
    return _score(total)
