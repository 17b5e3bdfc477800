"""Policies: who drafts, and how much, decided before anything is drawn."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from isthmus.decoding.cost import Cost, Costs
from isthmus.decoding.goodput import Line, Means
from isthmus.decoding.tree import TokenTree, stack
from isthmus.roles import PLAIN, Context, Drafter, Extendable, Shape, Step, Target

SIZES = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Draft nodes to choose from."""

WIDE, CHAIN = 0, 1
"""Shapes to choose from: the drafter's own tree, or the chain of its first children."""

RETHINK = 4
"""Rounds that a choice to draft stands: weighing the arms takes as long as a small forward."""

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

    @property
    def reads_logits(self) -> bool:
        """Whether logits are looked at in :meth:`observe`."""
        return self.drafter is not None

    def begin(self, context: Context, target: Target, **inputs: Any) -> None:
        """See :class:`isthmus.roles.Policy`."""
        if self.drafter is not None:
            self.drafter.begin(context, target, **inputs)

    def extend(self, context: Context, target: Target, **inputs: Any) -> None:
        """Pass the rows on."""
        if self.drafter is not None:
            cast(Extendable, self.drafter).extend(context, target, **inputs)

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


class Cut:
    """A drafter whose chains are cut to a length of each row, set before they are drawn.

    Args:
        drafter: Who drafts; only the chain of first children is used.

    Attributes:
        lengths: Draft tokens of each row at most, [B].
    """

    def __init__(self, drafter: Drafter) -> None:
        self.drafter, self.name = drafter, drafter.name
        self.begin, self.observe, self.select = drafter.begin, drafter.observe, drafter.select
        self.extend: Any = getattr(drafter, "extend", None)
        self.lengths: NDArray[np.int64] = np.zeros(0, dtype=np.int64)

    def propose(self, context: Context, shape: Shape) -> TokenTree:
        """The drafter's chains; what is longer than a row's length is padding there."""
        tree = self.drafter.propose(context, shape).first_chain()
        limit = torch.from_numpy(self.lengths).to(tree.tokens.device)
        if int(limit.min()) >= tree.nodes - 1:
            return tree
        return tree.prune(tree.topology.depth <= limit[:, None], closed=True)


class Mixed:
    """Every row of a batch is drafted for by the drafter that suits it.

    Args:
        drafters: Drafters of chosen trees.
        rows: Which of them drafts for each row.
    """

    def __init__(self, drafters: Sequence[Drafter], rows: Sequence[int]) -> None:
        self.drafters, self.rows = list(drafters), list(rows)
        self.name = "|".join(self.drafters[d].name for d in sorted(set(rows)))
        self.begin = self.observe = self.select = self._outside

    def propose(self, context: Context, shape: Shape) -> TokenTree:
        """One tree a row, padded to the largest."""
        trees = {d: self.drafters[d].propose(context, shape) for d in set(self.rows)}
        own = [trees[d].row(b) for b, d in enumerate(self.rows)]
        return stack([tree.limit(nodes=shape.nodes, depth=shape.depth) for tree in own])

    def _outside(self, *given: Any, **inputs: Any) -> None:
        """The policy, which owns the drafters, tells them itself."""


@dataclass
class _Shadow:
    """A draft that was never scored: what is written later says how it would have fared."""

    drafter: int
    rows: list[int]
    tokens: list[list[int]]
    parents: list[list[int]]
    alive: list[list[bool]]
    starts: list[int]

    def path(self, place: int, text: list[int]) -> list[int]:
        """Nodes of one tree that the text followed, root first."""
        alive, parents = self.alive[place], self.parents[place]
        child = {
            (parents[i], token): i for i, token in enumerate(self.tokens[place]) if i and alive[i]
        }
        path = [0]
        for token in text:
            node = child.get((path[-1], token))
            if node is None:
                break
            path.append(node)
        return path

    def select(self, rows: Sequence[int]) -> None:
        """Keep the drafts of the given rows, which are numbered anew."""
        number = {old: new for new, old in enumerate(rows)}
        stay = [place for place, row in enumerate(self.rows) if row in number]
        self.rows = [number[self.rows[place]] for place in stay]
        for name in ("tokens", "parents", "alive", "starts"):
            setattr(self, name, [getattr(self, name)[place] for place in stay])


class Auto:
    """Pick drafter, shape and size of each round's draft for the most tokens per second.

    For every request, drafter, shape and size there is a running mean of the tokens that a round
    emits, drawn to the mean over earlier requests (:class:`isthmus.decoding.goodput.Means`); it is
    carried from call to call, greedy and sampled decoding apart. A round costs the measured
    forward time of that many nodes in a batch of that many rows, renewed by every round, plus
    measured drafting and bookkeeping: as the batch grows, the draft shrinks, down to nothing.
    Rows of a batch share the size, as a forward is as wide as its widest row, but each gets its
    own drafter. Plain decoding is the arm of size 0.

    What an arm would emit is mostly learned for nothing:

    * a tree's first n nodes are a tree too, and the first children are a chain, so one round says
      what every smaller size would have emitted;
    * a ``pure`` drafter (its ``propose`` draws nothing and changes nothing) is asked now and then
      without its draft being scored: the text that is written next shows what would have stood.

    Other drafters take turns at a larger size, as long as that has cost less than 2 % of the time.
    While plain decoding wins, drafters that are ``lazy`` (their ``observe`` may miss rounds) see
    one round in four.

    Args:
        drafters: Candidates.
        cost: Forward time by number of nodes, for one row or by rows.
        sizes: Draft nodes to choose from.
        survey: Rounds between two surveys while drafting pays.
        memory: Rounds that the running means remember.
        depth: Levels at most.
        clock: Seconds now; replaced in tests.
    """

    def __init__(
        self,
        drafters: Sequence[Drafter],
        cost: Cost | Costs,
        *,
        sizes: Sequence[int] = SIZES,
        survey: int = 24,
        memory: float = 24.0,
        depth: int = 16,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.clock = clock
        self.drafters, self.survey, self.depth = list(drafters), survey, depth
        self.costs = Costs(cost) if isinstance(cost, Cost) else cost
        self.sizes = np.array(sorted(sizes))
        # a drafter may be a candidate and part of a union; it starts and learns once
        parts = [p for d in self.drafters for p in getattr(d, "drafters", [d])]
        self._parts: list[Drafter] = list({id(p): p for p in parts}.values())
        self._pure = [i for i, d in enumerate(self.drafters) if getattr(d, "pure", False)]
        self._others = [i for i in range(len(self.drafters)) if i not in self._pure]
        self._memory = memory
        self._by_law: dict[bool, Means] = {}
        self.draft_s = [Line() for _ in self.drafters]
        self.own_s = Line()
        self._branches = np.zeros(len(self.drafters), dtype=bool)
        self._asked = dict.fromkeys(self._others, 0)
        self._spent = self._lost = 0.0
        self._debt = {True: 0.0, False: 0.0}
        self._turn = self._round = self._idle = 0
        self._start(greedy=True, rows=0)

    def _start(self, greedy: bool, rows: int) -> None:
        if greedy not in self._by_law:
            # tokens of a round, chance that anything is drafted, nodes if so
            start = np.ones((3, len(self.drafters), 2, len(self.sizes)))
            start[2] = self.sizes
            self._by_law[greedy] = Means(start, weight=3.0, memory=self._memory)
        self._greedy, self.seen = greedy, self._by_law[greedy]
        self.seen.begin(rows)
        self._shadows: list[_Shadow] = []
        self._gap, self._next = 8, self._round + 1
        self._survey = self._round + self.survey
        self._choice: tuple[list[int], int, int] | None = None
        self._plan: tuple[list[int], int, bool] | None = None
        self._fresh, self._limit, self._clock = True, PLAIN, self.clock()
        self._thought_s, self._chosen = 0.0, self._round - RETHINK

    def begin(self, context: Context, target: Target, **inputs: Any) -> None:
        """See :class:`isthmus.roles.Policy`."""
        self.costs.prepare(context.batch)
        self._start(context.law.greedy, context.batch)
        for part in self._parts:
            part.begin(context, target, **inputs)

    def extend(self, context: Context, target: Target, **inputs: Any) -> None:
        """More rows; they begin with what was learned from all before them."""
        self.seen.join(context.batch)
        self._fresh = True
        # old answers may have been too near their end to look ahead
        self._next = min(self._next, self._round + self._gap)
        for part in self._parts:
            cast(Extendable, part).extend(context, target, **inputs)

    def widest(self, rows: int = 1) -> int:
        """The largest size whose forward costs at most two and a half plain ones."""
        cost = self.costs.of(rows)
        fits = [int(s) for s in self.sizes if cost(1 + int(s)) <= 2.5 * cost(1)]
        return max(fits, default=int(self.sizes[0]))

    def decide(self, context: Context, limit: Shape) -> tuple[Drafter | None, Shape]:
        """The best arm, or the turn of a drafter that must be watched at work."""
        self._clock, self._plan, self._limit = self.clock(), None, limit
        self._thought_s = 0.0
        if limit.nodes == 0 or not self.drafters:
            return None, PLAIN
        turn = self._due()
        if turn is not None:
            size, width = self.widest(context.batch), WIDE
            rows = [turn] * context.batch
        else:
            stale = self._choice is None or len(self._choice[0]) != context.batch
            if self._fresh and (stale or self._round - self._chosen >= RETHINK):
                plain = self._choice is None
                self._choice, self._fresh = self._choose(context.batch, doubt=plain), False
                self._chosen = self._round
                if plain and self._choice is None and self._choose(context.batch, doubt=False):
                    self._next = min(self._next, self._round + 6)  # promising: look again soon
                self._thought_s = self.clock() - self._clock
            if self._choice is None:
                return None, PLAIN
            rows, width, size = self._choice
        self._plan = rows, width, turn is not None
        shape = Shape(size, self.depth, 1 if width == CHAIN else limit.width)
        shape = shape.capped(limit.nodes, limit.depth, limit.width)
        if len(set(rows)) == 1:
            return self.drafters[rows[0]], shape
        return Mixed(self.drafters, rows), shape

    def _due(self) -> int | None:
        """A drafter whose draft has to be scored to be judged, if it is its turn."""
        for drafter, asked in self._asked.items():
            if asked == 0:
                return drafter
        if not self._others or self._round < self._survey or self._lost > 0.02 * self._spent:
            return None
        return self._others[self._turn % len(self._others)]

    def _choose(self, rows: int, *, doubt: bool) -> tuple[list[int], int, int] | None:
        """Drafter of each row, shape and size of the largest goodput; None for plain decoding."""
        tokens, hit, nodes = self.seen.estimate().swapaxes(0, 1)  # [B, drafter, shape, size] each
        if doubt:
            # what was hardly seen is believed by halves: one lucky draft is no reason to change
            known = self.seen.known()[:, 0]
            tokens = 1.0 + (tokens - 1.0) * known / (known + 2.0)
        # groups of drafters: each alone, and pairs from which every row takes the better one
        groups = [(d, d) for d in range(len(self.drafters))]
        if rows > 1:
            groups += list(combinations(self._pure, 2))
        one, two = np.array(groups).T
        other = tokens[:, two] > tokens[:, one]  # [B, group, shape, size], as all below
        tokens, hit, nodes = (np.where(other, f[:, two], f[:, one]) for f in (tokens, hit, nodes))
        some = 1.0 - (1.0 - hit).prod(0)  # chance that any row is drafted for
        width = 1.0 + nodes.max(0)
        cost = self.costs.of(rows)
        plain_s = cost(1)
        draft_s = np.stack([line(self.sizes) for line in self.draft_s])  # [drafter, size]
        drafting_s = draft_s[one] + draft_s[two] * (one != two)[:, None]
        seconds = plain_s + some * (cost.many(width) - plain_s) + drafting_s[:, None]
        seconds += self.own_s(rows * (1.0 + some * (width - 1.0)))
        goodput = tokens.sum(0) / seconds
        chains = ~(self._branches[one] | self._branches[two])
        goodput[chains, CHAIN] = 0.0  # the same as WIDE
        group, shape, size = np.unravel_index(int(goodput.argmax()), goodput.shape)
        # drafting that has cost time so far must promise more
        gain = GAIN + 20.0 * self._debt[self._greedy] / max(self._spent, 1e-9)
        if goodput[group, shape, size] <= gain * rows / (plain_s + self.own_s(rows)):
            return None
        chosen = np.where(other[:, group, shape, size], two[group], one[group])
        return chosen.tolist(), int(shape), int(self.sizes[size])

    def observe(self, step: Step, drafter: Drafter | None) -> None:
        """Learn what the round cost and what would have stood; let drafters learn."""
        rows, batched = step.tree.batch, step.tree.nodes * step.tree.batch
        self._round += 1
        cost = self.costs.of(rows)
        cost.observe(step.tree.nodes, step.score_s)
        self._idle = 0 if drafter is not None else self._idle + 1
        skip = self._idle > 32 and self._idle % 4
        for part in self._parts:
            if not (skip and getattr(part, "lazy", False)):
                part.observe(step)
        if drafter is not None and self._plan is not None:
            self._learn(step, *self._plan)
        own_s = max(0.0, self.clock() - self._clock - step.draft_s - step.score_s)
        self.own_s.observe(batched, own_s)
        own_s = min(own_s, 3.0 * self.own_s(batched))  # a pause of the machine is no bookkeeping
        seconds = step.draft_s + step.score_s + own_s
        self._spent += seconds
        if self._plan is not None:
            plain_s = cost(1) + self.own_s(rows)
            gained = (1.0 + sum(step.accepted) / rows) * plain_s - seconds
            if self._plan[2]:
                self._turn += 1
                self._asked[self._plan[0][0]] += 1
                self._survey = self._round + self.survey
                self._lost += max(0.0, -gained)
            elif drafter is not None:
                self._debt[self._greedy] = max(0.0, self._debt[self._greedy] - gained)
        self._plan = None
        if self._pure and self._limit.nodes and self._round >= self._next:
            self._look(step.context)

    def _learn(self, step: Step, rows: list[int], width: int, turn: bool) -> None:
        asked = step.shape.nodes
        asked_for = set(rows)
        for d in asked_for:
            # choosing among drafters is not drafting
            self.draft_s[d].observe(asked, (step.draft_s - self._thought_s) / len(asked_for))
        if step.shape.depth < min(self.depth, asked):
            return  # cut short by the end of the answer: it says nothing about the drafter
        tree = step.tree
        parents = tree.topology.parent.expand(tree.batch, -1).tolist()
        alive = tree.alive.tolist()
        paths = [[n for n in path if n >= 0] for path in step.verdict.path.tolist()]
        self._record(range(len(rows)), rows, parents, alive, paths, asked, width)

    def _record(
        self,
        rows: Sequence[int],
        drafters: list[int],
        parents: list[list[int]],
        alive: list[list[bool]],
        paths: list[list[int]],
        asked: int,
        width: int,
    ) -> None:
        """Enter what every size up to ``asked`` would have emitted, one draft for each row."""
        values = np.zeros_like(self.seen.total)
        counts = np.zeros_like(values)
        inside = self.sizes <= asked
        for i, (b, d) in enumerate(zip(rows, drafters, strict=True)):
            total = sum(alive[i]) - 1
            first: dict[int, int] = {}
            for node, above in enumerate(parents[i]):
                if node and alive[i][node]:
                    first.setdefault(above, node)
            line = [0]
            while line[-1] in first:
                line.append(first[line[-1]])
            along = sum(x == y for x, y in zip(line, paths[i], strict=False)) - 1
            self._branches[d] |= total > len(line) - 1
            # the nodes of a path are in order, so those below a size are counted by bisection
            stood = np.searchsorted(np.array(paths[i]), self.sizes, side="right") - 1
            values[b, 0, d, WIDE], values[b, 0, d, CHAIN] = stood, np.minimum(along, self.sizes)
            values[b, 0, d] += 1.0
            values[b, 1, d] = total > 0
            values[b, 2, d, WIDE] = np.minimum(self.sizes, total)
            values[b, 2, d, CHAIN] = np.minimum(self.sizes, len(line) - 1)
            shapes = [WIDE, CHAIN] if width == WIDE else [CHAIN]
            counts[b, :2, d, shapes] = inside
            counts[b, 2, d, shapes] = inside * (total > 0)
        self.seen.observe(values, counts)
        self._fresh = True

    def _look(self, context: Context) -> None:
        """Judge the drafts that were not scored by what was written since, and make new ones."""
        largest = min(int(self.sizes[-1]), self._limit.nodes)
        for shadow in self._shadows:
            paths = [
                shadow.path(i, context.ids[b, start : context.lengths[b]].tolist())
                for i, (b, start) in enumerate(zip(shadow.rows, shadow.starts, strict=True))
            ]
            who, most = [shadow.drafter] * len(paths), int(self.sizes[-1])
            self._record(shadow.rows, who, shadow.parents, shadow.alive, paths, most, WIDE)
        # at the start of an answer, and while drafting pays, all have their say
        every = not self._shadows or not self._idle
        self._turn += 1
        turns = self._pure if every else [self._pure[self._turn % len(self._pure)]]
        self._shadows = []
        depth = min(self.depth, self._limit.depth)
        if depth < self.depth:
            self._next = self._round + 10**9  # too near the end to see enough
            return
        for d in turns:
            begin = self.clock()
            tree = self.drafters[d].propose(context, Shape(largest, depth, self._limit.width))
            tree = tree.limit(nodes=largest, depth=depth)
            self.draft_s[d].observe(largest, self.clock() - begin)
            parents = tree.topology.parent.expand(tree.batch, -1).tolist()
            tokens, alive = tree.tokens.tolist(), tree.alive.tolist()
            rows = list(range(tree.batch))
            self._shadows.append(_Shadow(d, rows, tokens, parents, alive, [*context.lengths]))
        # less and less often, least so while plain decoding wins
        self._gap = min(self._gap * 3 // 2, 2 * self.survey if self._idle else self.survey)
        self._next = self._round + self._gap

    def select(self, rows: Sequence[int]) -> None:
        """Pass the selection on."""
        self.seen.select(rows)
        for shadow in self._shadows:
            shadow.select(rows)
        self._fresh = True
        for part in self._parts:
            part.select(rows)
