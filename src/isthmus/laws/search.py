"""Searchers over a space of architectures: at random, by a tree, and by a model of the scores.

::

    propose(generator) ─▶ picks ─▶ build and train, score ─▶ observe(picks, score) ─▶ ...

All share one interface, after Negrinho and Gordon, 2017 (arXiv:1704.08792), section 4. Scores are
better when larger.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch

from isthmus.errors import InvalidInputError
from isthmus.laws.space import Built, Choice, Picks, Space


class Searcher(Protocol):
    """Says which network to look at next."""

    def propose(self, generator: torch.Generator) -> Picks:
        """Picks of a network."""
        ...

    def observe(self, picks: Picks, score: float) -> None:
        """Learn how good one is."""
        ...


class Random:
    """Uniform at each choice.

    Args:
        space: The space.
    """

    def __init__(self, space: Space) -> None:
        self.space = space

    def propose(self, generator: torch.Generator) -> Picks:
        """See :class:`Searcher`."""
        return self.space.draw(generator)

    def observe(self, picks: Picks, score: float) -> None:
        """Nothing is learnt."""


_Node = tuple[Picks, int, int]
"""Picks, and a range of the next choice's values; 0, 0 where the range is whole."""


class TreeSearch:
    """Monte Carlo tree search: go where scores were good or little was tried, then at random.

    A node is a prefix of picks. The next child maximises its mean score plus
    ``2 c sqrt(2 ln n_parent / n_child)``; one that was never tried comes first.

    Args:
        space: The space.
        bisect: Replace the children of a choice by a binary tree over its values, which are taken
            to be ordered, so that neighbours share what is known of them.
        explore: c; scores that differ by hundredths want a small one.
    """

    def __init__(self, space: Space, *, bisect: bool = False, explore: float = 0.05) -> None:
        self.space, self.bisect, self.explore = space, bisect, explore
        self.seen: dict[_Node, tuple[int, float]] = {}
        self._paths: dict[Picks, list[_Node]] = {}

    def propose(self, generator: torch.Generator) -> Picks:
        """See :class:`Searcher`."""
        node: _Node = ((), 0, 0)
        path = [node]
        while children := self._children(node):
            fresh = [child for child in children if child not in self.seen]
            if fresh:
                node = fresh[int(torch.randint(len(fresh), (), generator=generator))]
                path.append(node)
                break
            log = 2 * math.log(self.seen[node][0])
            node = max(children, key=lambda child: self._promise(child, log))
            path.append(node)
        picks, low, high = node
        if high:  # a range of a choice's values that is not down to one yet
            picks = (*picks, int(torch.randint(low, high, (), generator=generator)))
        picks = self.space.draw(generator, picks)
        self._paths[picks] = path
        return picks

    def observe(self, picks: Picks, score: float) -> None:
        """See :class:`Searcher`; only the path that was walked in the tree is told.

        Raises:
            InvalidInputError: Picks that were not proposed.
        """
        if picks not in self._paths:
            raise InvalidInputError(f"{list(picks)} were not proposed by this search")
        for node in self._paths.pop(picks):
            count, total = self.seen.get(node, (0, 0.0))
            self.seen[node] = (count + 1, total + score)

    def _promise(self, child: _Node, log: float) -> float:
        count, total = self.seen[child]
        return total / count + 2 * self.explore * math.sqrt(log / count)

    def _children(self, node: _Node) -> list[_Node]:
        """Nodes below; none below a network."""
        picks, low, high = node
        if not high:
            found = self.space.at(picks)
            if isinstance(found, Built):
                return []
            low, high = 0, len(found.values)
        if not self.bisect:
            return [((*picks, i), 0, 0) for i in range(low, high)]
        middle = (low + high) // 2
        halves = ((low, middle), (middle, high))
        return [((*picks, a), 0, 0) if b - a == 1 else (picks, a, b) for a, b in halves]


class Surrogate:
    """Ridge regression of scores on runs of words and on depth; the best guess is looked at.

    Args:
        space: The space.
        longest: Words of a run at most.
        candidates: Random networks that a proposal is chosen from.
        wander: How often a random one is proposed instead.
        every: Observations after which it is fitted anew.
        ridge: Weight of the squared coefficients.
    """

    def __init__(
        self,
        space: Space,
        *,
        longest: int = 2,
        candidates: int = 64,
        wander: float = 0.1,
        every: int = 4,
        ridge: float = 1.0,
    ) -> None:
        self.space, self.longest, self.candidates = space, longest, candidates
        self.wander, self.every, self.ridge = wander, every, ridge
        self.looked: dict[Picks, float] = {}
        self._names: dict[tuple[str, ...], int] = {}
        self._weights: torch.Tensor | None = None
        self._mean = 0.0

    def propose(self, generator: torch.Generator) -> Picks:
        """See :class:`Searcher`."""
        if self._weights is None or float(torch.rand((), generator=generator)) < self.wander:
            return self.space.draw(generator)
        drawn = {self.space.draw(generator): None for _ in range(self.candidates)}
        fresh = [picks for picks in drawn if picks not in self.looked] or list(drawn)
        return fresh[int((self._features(fresh) @ self._weights).argmax())]

    def observe(self, picks: Picks, score: float) -> None:
        """See :class:`Searcher`."""
        self.looked[picks] = score
        if len(self.looked) % self.every == 0:
            self._fit()

    def predict(self, picks: Picks) -> float:
        """The score that is expected of a network; the mean of all before the first fit."""
        if self._weights is None:
            return sum(self.looked.values()) / max(1, len(self.looked))
        return self._mean + float(self._features([picks])[0] @ self._weights)

    def _fit(self) -> None:
        for picks in self.looked:
            for run in self._runs(picks):
                self._names.setdefault(run, len(self._names))
        x = self._features(list(self.looked))
        y = torch.tensor(list(self.looked.values()), dtype=torch.float64)
        self._mean = float(y.mean())
        # with fewer networks than runs of words, the dual is the smaller system
        gram = x @ x.T + self.ridge * torch.eye(len(x), dtype=torch.float64)
        self._weights = x.T @ torch.linalg.solve(gram, y - self._mean)

    def _runs(self, picks: Picks) -> list[tuple[str, ...]]:
        found = self.space.at(picks)
        if isinstance(found, Choice):
            raise InvalidInputError(f"{list(picks)} leave {found.name} open")
        words = found.words
        lengths = range(1, self.longest + 1)
        return [words[i : i + n] for n in lengths for i in range(len(words) - n + 1)]

    def _features(self, many: list[Picks]) -> torch.Tensor:
        """How often each known run of words is in each network, and its depth: [N, F + 1]."""
        x = torch.zeros(len(many), len(self._names) + 1, dtype=torch.float64)
        for row, picks in zip(x, many, strict=True):
            runs = self._runs(picks)
            for run in runs:
                if run in self._names:
                    row[self._names[run]] += 1
            row[-1] = sum(len(run) == 1 for run in runs)
        return x


def search(
    searcher: Searcher,
    score: Callable[[Picks], float],
    evaluations: int,
    generator: torch.Generator,
) -> list[tuple[Picks, float]]:
    """Look at networks one after the other.

    Args:
        searcher: Says which.
        score: How good one is, larger is better.
        evaluations: How many are looked at.
        generator: Of all draws.

    Returns:
        Picks and scores, in order.

    Example:
        >>> from isthmus.laws.space import Affine
        >>> space = Space(Affine((1, 2, 3)), (4,))
        >>> looked = search(TreeSearch(space), lambda p: float(p[0]), 5, torch.Generator())
        >>> max(score for _, score in looked)
        2.0
    """
    looked = []
    for _ in range(evaluations):
        picks = searcher.propose(generator)
        looked.append((picks, score(picks)))
        searcher.observe(*looked[-1])
    return looked
