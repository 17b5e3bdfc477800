"""Tree search over a table of successors: likely continuations, and some that are unlike.

PUCT as in Monte-Carlo tree search: a simulation walks down by value and prior weight, expands the
leaf it reaches, rolls out by weighted sampling and passes the score back up. Nodes are rows of
lists, not objects, because a search runs before every forward of the target.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from isthmus.decoding.stores import Lookup


class Puct:
    """Tree search over the table: likely sentences, and some that are unlike.

    Args:
        lookup: Successors of the last tokens, best first, and their weights.
        source: Draws of the roll-outs.
        depth: Tokens of a sentence.
        c1: First exploration constant.
        c2: Second exploration constant.

    Attributes:
        tokens: Token of every searched node, the root first.
        parents: Its parent, -1 for the root.
        contexts: The last tokens at it, itself included.
        visits: How often a simulation passed through it.
        total: Sum of the scores of these simulations.
        prior: Weight of the step that led to it.
        kids: Its successors; None while it is not expanded.

    Example:
        >>> table = {(0,): ([1, 2], [0.9, 0.1])}
        >>> search = Puct(lambda at: table.get(at, ([], [])), random.Random(0), depth=1)
        >>> search.run((0,), iterations=11)
        >>> search.tokens, search.visits
        ([0, 1, 2], [11, 9, 1])
    """

    def __init__(
        self,
        lookup: Lookup,
        source: random.Random,
        *,
        depth: int = 4,
        c1: float = 32.0,
        c2: float = 8.0,
    ) -> None:
        self.lookup, self.source, self.depth, self.c1, self.c2 = lookup, source, depth, c1, c2
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.contexts: list[tuple[int, ...]] = []
        self.visits: list[int] = []
        self.total: list[float] = []
        self.prior: list[float] = []
        self.kids: list[list[int] | None] = []

    def path(self, node: int) -> list[int]:
        """Tokens from below the root to a node."""
        out: list[int] = []
        while node:
            out.append(self.tokens[node])
            node = self.parents[node]
        return out[::-1]

    def run(self, last: tuple[int, ...], iterations: int) -> None:
        """Simulate sentences that go on from the last tokens."""
        self.tokens, self.parents, self.contexts = [last[-1]], [-1], [last]
        self.visits, self.total, self.prior, self.kids = [0], [0.0], [0.0], [None]
        for _ in range(iterations):
            node, depth, score = 0, 0, 1.0
            kids = self.kids[0]
            while kids:
                node = self.select(node, kids)
                depth += 1
                score += self.prior[node]
                kids = self.kids[node]
            if depth < self.depth and kids is None:
                self.expand(node)
            score += self.roll_out(self.contexts[node], self.depth - depth)
            while node >= 0:
                self.visits[node] += 1
                self.total[node] += score
                node = self.parents[node]

    def select(self, node: int, kids: Sequence[int]) -> int:
        """The child with the largest Q + U; one that was never visited comes first.

        U = (c1 + ln((N + c2 + 1) / c2)) P sqrt(N) / (1 + n), with N visits of the node itself.
        """
        if len(kids) == 1:
            return kids[0]
        visits, n = self.visits, self.visits[node]
        scale = math.sqrt(n) * (self.c1 + math.log((n + self.c2 + 1) / self.c2))
        best, chosen = -math.inf, kids[0]
        for kid in kids:
            seen = visits[kid]
            if not seen:
                return kid
            value = self.total[kid] / seen + scale * self.prior[kid] / (1 + seen)
            if value > best:
                best, chosen = value, kid
        return chosen

    def expand(self, node: int) -> None:
        """Give a leaf all its successors at once."""
        at = self.contexts[node]
        tokens, weights = self.lookup(at)
        start = len(self.tokens)
        self.kids[node] = list(range(start, start + len(tokens)))
        for token, weight in zip(tokens, weights, strict=True):
            self.tokens.append(token)
            self.parents.append(node)
            self.contexts.append((*at[1:], token))
            self.visits.append(0)
            self.total.append(0.0)
            self.prior.append(weight)
            self.kids.append(None)

    def roll_out(self, at: tuple[int, ...], length: int) -> float:
        """Sum of weights along a sentence drawn from the table."""
        score = 0.0
        for _ in range(length):
            tokens, weights = self.lookup(at)
            if not tokens:
                break
            (pick,) = self.source.choices(range(len(tokens)), weights)
            score += weights[pick]
            at = (*at[1:], tokens[pick])
        return score
