"""Policies: who drafts, and how much, decided before anything is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from isthmus.decoding.cost import Cost
from isthmus.roles import PLAIN, Context, Drafter, Shape, Step, Target

GAIN = 1.05
"""Drafting must promise this much more than plain decoding; less is noise of the estimates."""


class Fixed:
    """Always the same drafter and shape.

    Args:
        drafter: Who drafts, or None for plain decoding.
        shape: How much.
    """

    def __init__(self, drafter: Drafter | None = None, shape: Shape = PLAIN) -> None:
        self.drafter, self.shape = drafter, shape

    def begin(self, context: Context, target: Target, **inputs: Any) -> None:
        """See :class:`isthmus.roles.Policy`."""
        if self.drafter is not None:
            self.drafter.begin(context, target, **inputs)

    def decide(self, context: Context, limit: Shape) -> tuple[Drafter | None, Shape]:
        """The fixed choice within the limit."""
        return self.drafter, self.shape.capped(limit.nodes, limit.depth, limit.width)

    def observe(self, step: Step, drafter: Drafter | None) -> None:
        """Pass the round on."""
        if self.drafter is not None:
            self.drafter.observe(step)

    def select(self, rows: Sequence[int]) -> None:
        """Pass the selection on."""
        if self.drafter is not None:
            self.drafter.select(rows)


class Auto:
    """Pick drafter and tree size for the most tokens per second on this machine.

    For every drafter and size it keeps a running mean of emitted tokens per round; the price of a
    round is the measured forward time of that many nodes (renewed by every round) plus the
    measured drafting time. A tree's first n nodes are a tree too, so one round at size N also
    says what every smaller size would have emitted: no exploration is needed below. Every
    ``survey`` rounds the drafters take turns at full size, less and less often while plain
    decoding wins. Plain decoding is the arm of size 0.

    Args:
        drafters: Candidates.
        cost: Forward time by number of nodes.
        sizes: Draft nodes to choose from.
        survey: Rounds between two surveys.
        memory: Rounds that the running means remember.
        depth: Levels at most.
    """

    def __init__(
        self,
        drafters: Sequence[Drafter],
        cost: Cost,
        *,
        sizes: Sequence[int] = (2, 4, 8, 16, 24, 32, 48, 64),
        survey: int = 24,
        memory: float = 24.0,
        depth: int = 16,
    ) -> None:
        self.drafters, self.cost, self.survey, self.depth = list(drafters), cost, survey, depth
        self.sizes = sorted(sizes)
        # a drafter may be a candidate and part of a union; it starts and learns once
        parts = [p for d in self.drafters for p in getattr(d, "drafters", [d])]
        self._parts: list[Drafter] = list({id(p): p for p in parts}.values())
        self._keep = 1.0 - 1.0 / memory
        # emitted tokens and really drafted nodes of a round, by drafter and size
        self.emitted = [[1.5 for _ in self.sizes] for _ in self.drafters]
        self.nodes = [[float(s) for s in self.sizes] for _ in self.drafters]
        self.draft_s = [0.0 for _ in self.drafters]
        self.seen = [0 for _ in self.drafters]
        self._round, self._turn = 0, 0
        self._gap = self._next = survey
        self._idle = False

    def begin(self, context: Context, target: Target, **inputs: Any) -> None:
        """See :class:`isthmus.roles.Policy`."""
        for part in self._parts:
            part.begin(context, target, **inputs)

    def rate(self, drafter: int, size: int) -> float:
        """Expected tokens per second of a drafter at ``sizes[size]``."""
        seconds = self.cost(1 + self.nodes[drafter][size]) + self.draft_s[drafter]
        return self.emitted[drafter][size] / seconds

    def widest(self) -> int:
        """Index of the largest size whose forward costs at most four plain ones."""
        limit = 4.0 * self.cost(1)
        return max((i for i, s in enumerate(self.sizes) if self.cost(1 + s) <= limit), default=0)

    def decide(self, context: Context, limit: Shape) -> tuple[Drafter | None, Shape]:
        """The best arm, or a drafter's turn at full size."""
        if limit.nodes == 0 or not self.drafters:
            return None, PLAIN
        self._round += 1
        unseen = [i for i, n in enumerate(self.seen) if n < 2]
        if unseen:
            choice, size = unseen[0], self.widest()
        elif self._round >= self._next:
            self._turn += 1
            choice, size = self._turn % len(self.drafters), self.widest()
            # while plain decoding wins, ask less and less often
            self._gap = min(2 * self._gap, 16 * self.survey) if self._idle else self.survey
            self._next = self._round + self._gap
        else:
            arms = [
                (self.rate(d, s), d, s)
                for d in range(len(self.drafters))
                for s in range(len(self.sizes))
            ]
            best, choice, size = max(arms)
            self._idle = best * self.cost(1) < GAIN
            if self._idle:
                return None, PLAIN
        shape = Shape(self.sizes[size], self.depth, limit.width)
        return self.drafters[choice], shape.capped(limit.nodes, limit.depth, limit.width)

    def observe(self, step: Step, drafter: Drafter | None) -> None:
        """Update the means of every size up to the one that was drafted; let drafters learn."""
        self.cost.observe(step.tree.nodes * step.tree.batch, step.score_s)
        if drafter is not None:
            self._learn(self.drafters.index(drafter), step)
        for part in self._parts:
            part.observe(step)

    def _learn(self, index: int, step: Step) -> None:
        self.seen[index] += 1
        fresh = 1.0 / self.seen[index]
        keep = min(self._keep, 1.0 - fresh)
        self.draft_s[index] = keep * self.draft_s[index] + (1 - keep) * step.draft_s
        paths = step.verdict.path.tolist()
        rows = len(paths)
        drafted = sum(step.tree.drafted()) / rows
        for i, size in enumerate(self.sizes):
            if size > max(step.shape.nodes, self.sizes[0]):
                break
            emitted = sum(1 + sum(0 < node <= size for node in path) for path in paths) / rows
            self.emitted[index][i] = keep * self.emitted[index][i] + (1 - keep) * emitted
            nodes = min(float(size), drafted)
            self.nodes[index][i] = keep * self.nodes[index][i] + (1 - keep) * nodes

    def select(self, rows: Sequence[int]) -> None:
        """Pass the selection on."""
        for part in self._parts:
            part.select(rows)
