"""Phrase tables and log-linear choice: translation as it was before networks wrote whole sentences.

A table counts what phrases were translated to. A sentence is a row of phrases; its hypotheses are
ranked by ``sum_n w_n f_n``, the weights tuned on a grid (Och and Ney, "Discriminative training and
maximum entropy models for statistical machine translation", 2002).
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from isthmus.training.data import Pair


@dataclass(frozen=True)
class PhraseTable:
    """A phrase table by counting.

    Attributes:
        targets: Counted targets of each source.
        sources: Counted sources of each target.
    """

    targets: Mapping[str, Counter[str]]
    sources: Mapping[str, Counter[str]]

    @classmethod
    def count(cls, pairs: Sequence[Pair]) -> PhraseTable:
        """Count phrase pairs, as often as they occur."""
        targets: dict[str, Counter[str]] = defaultdict(Counter)
        sources: dict[str, Counter[str]] = defaultdict(Counter)
        for source, target in pairs:
            targets[source][target] += 1
            sources[target][source] += 1
        return cls(targets, sources)

    def features(self, source: str, target: str) -> tuple[float, float]:
        """Logarithms of p(target | source) and p(source | target) by relative frequency."""
        there, back = self.targets[source], self.sources[target]
        return (
            math.log(there[target] / there.total()),
            math.log(back[source] / back.total()),
        )


Hypothesis = tuple[tuple[str, ...], tuple[float, ...]]
"""Targets of a sentence's phrases, and its features."""


def best_lists(
    table: PhraseTable,
    sentences: Sequence[Sequence[str]],
    scores: Mapping[Pair, float],
    size: int = 20,
) -> list[list[Hypothesis]]:
    """Likeliest combinations of phrase translations by the table, with all three features."""
    lists = []
    for sentence in sentences:
        options = [list(table.targets[phrase]) for phrase in sentence]
        hypotheses = []
        for chosen in itertools.product(*options):
            counted = [table.features(s, t) for s, t in zip(sentence, chosen, strict=True)]
            told = sum(scores[Pair(s, t)] for s, t in zip(sentence, chosen, strict=True))
            sums = [sum(column) for column in zip(*counted, strict=True)]
            hypotheses.append((chosen, (*sums, told)))
        lists.append(sorted(hypotheses, key=lambda h: -h[1][0] - h[1][1])[:size])
    return lists


def accuracy(
    lists: Sequence[Sequence[Hypothesis]],
    answers: Sequence[tuple[str, ...]],
    weights: Sequence[float],
) -> float:
    """Share of sentences whose best hypothesis by sum_n w_n f_n is right."""
    right = 0
    for hypotheses, answer in zip(lists, answers, strict=True):
        chosen = max(
            hypotheses, key=lambda h: sum(w * f for w, f in zip(weights, h[1], strict=True))
        )
        right += chosen[0] == answer
    return right / len(lists)


def reachable(lists: Sequence[Sequence[Hypothesis]], answers: Sequence[tuple[str, ...]]) -> float:
    """Share of sentences whose right translation is in their list."""
    there = (a in {h[0] for h in some} for some, a in zip(lists, answers, strict=True))
    return sum(there) / len(lists)


def tuned(
    lists: Sequence[Sequence[Hypothesis]], answers: Sequence[tuple[str, ...]], *, network: bool
) -> tuple[float, ...]:
    """Weights of the features that are best on these sentences, of a grid."""
    grid = (0.0, 0.1, 0.3, 1.0, 3.0)
    options = itertools.product((1.0,), grid, grid if network else (0.0,))
    return max(options, key=lambda w: accuracy(lists, answers, w))
