"""CIDEr-D: how much a caption says what other captions of the same thing say.

Vedantam et al., "CIDEr: Consensus-based image description evaluation", 2015 (arXiv 1411.5726), with
the clipping and the length penalty of the D variant, and the constants of its released code.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence

from isthmus.metrics.repetition import ngrams

Words = Sequence[Hashable]
Vector = dict[tuple[Hashable, ...], float]

ORDERS = 4
SIGMA = 6.0
"""Deviation of the penalty of a difference in length, in words."""


class CiderD:
    """CIDEr-D with document frequencies of a corpus.

    Args:
        corpus: The captions of each thing; a phrase counts once a thing. Take training captions:
            those of the test set would leak.

    Example:
        >>> cider = CiderD([["a cat sat down".split()], ["the dog ran".split()]])
        >>> cider.score("a cat sat down".split(), ["a cat sat down".split()])
        10.0
        >>> cider.score([], ["a cat sat down".split()])
        0.0
    """

    def __init__(self, corpus: Iterable[Sequence[Words]]) -> None:
        self.frequency: Counter[tuple[Hashable, ...]] = Counter()
        self.documents = 0
        for captions in corpus:
            self.documents += 1
            seen = {g for c in captions for grams in _counts(c) for g in grams}
            self.frequency.update(seen)

    def score(self, candidate: Words, references: Sequence[Words]) -> float:
        """Mean over references, 0 to 10.

        Args:
            candidate: A caption as words.
            references: Others of the same thing, at least one.
        """
        ours = self._vectors(candidate)
        scores = [self._similarity(ours, self._vectors(r)) for r in references]
        return sum(scores) / len(scores)

    def matrix(self, candidates: Sequence[Words]) -> list[list[float]]:
        """``U[i][j]``: the score of candidate i against candidate j alone."""
        vectors = [self._vectors(c) for c in candidates]
        return [[self._similarity(a, b) for b in vectors] for a in vectors]

    def _vectors(self, words: Words) -> tuple[list[Vector], list[float], int]:
        """Weights of the phrases of each order, their norms, and the length in words."""
        whole = math.log(max(1.0, self.documents))
        vectors: list[Vector] = [
            {g: n * (whole - math.log(max(1.0, self.frequency[g]))) for g, n in grams.items()}
            for grams in _counts(words)
        ]
        norms = [math.sqrt(sum(w * w for w in v.values())) for v in vectors]
        return vectors, norms, len(words)

    @staticmethod
    def _similarity(
        ours: tuple[list[Vector], list[float], int], theirs: tuple[list[Vector], list[float], int]
    ) -> float:
        penalty = math.exp(-((ours[2] - theirs[2]) ** 2) / (2 * SIGMA**2))
        total = 0.0
        for a, b, size_a, size_b in zip(ours[0], theirs[0], ours[1], theirs[1], strict=True):
            if size_a and size_b:
                both = sum(min(w, b[g]) * b[g] for g, w in a.items() if g in b)
                total += both / (size_a * size_b)
        return 10.0 * penalty * total / ORDERS


def _counts(words: Words) -> list[Counter[tuple[Hashable, ...]]]:
    return [Counter(ngrams(words, n)) for n in range(1, ORDERS + 1)]
