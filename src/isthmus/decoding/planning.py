"""Planning over complete answers: a tree of prefixes, searched for the best reward at the end.

Monte-Carlo tree search with P-UCB and the maximum as backup. A simulation walks down by value and
prior, gives a new node its likely next tokens, has the answer completed from there, and passes the
reward of the whole answer back up.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

Prefix = tuple[int, ...]
Expand = Callable[[Prefix], list[tuple[int, float]]]
"""Next tokens of a prefix and their priors; none where the answer is complete."""

Evaluate = Callable[[Prefix], float]
"""Reward of the answer that a prefix is completed to."""


@dataclass
class Node:
    """A prefix in the tree.

    Attributes:
        prefix: Its tokens.
        prior: Of its last token, among the tokens that were considered.
        visits: Simulations that passed through it; 1 before the first.
        value: Largest return seen below it, or the mean of all.
        kids: Its continuations; None while it is not expanded.
    """

    prefix: Prefix
    prior: float = 1.0
    visits: int = 1
    value: float = 0.0
    total: float = 0.0
    kids: list[Node] | None = field(default=None, repr=False)


def p_ucb(parent: Node, kid: Node, c_base: float, c: float) -> float:
    """``Q + beta(s) P sqrt(ln N(s)) / (1 + n)``, ``beta = ln((N(s) + c_base + 1) / c_base) + c``.

    Args:
        parent: s, visited N(s) times.
        kid: The node behind the token, visited n times.
        c_base: How slowly exploration grows.
        c: How much of it there is.

    Example:
        >>> kid = Node((7,), prior=0.5, visits=2, value=0.25)
        >>> round(p_ucb(Node((), visits=4), kid, 10, 4), 4)  # 0.25 + (ln 1.5 + 4) 0.5 1.1774 / 3
        1.1145
    """
    n = parent.visits
    beta = math.log((n + c_base + 1) / c_base) + c
    seen = kid.visits - 1  # visits start at 1
    return kid.value + beta * kid.prior * math.sqrt(math.log(n)) / (1 + seen)


class Planner:
    """The search.

    Args:
        expand: Next tokens and priors.
        evaluate: Completes a prefix and judges the answer.
        c_base: See :func:`p_ucb`.
        c: See :func:`p_ucb`.
        maximum: Back up the largest return, as programs are judged by their best; off, the mean.

    Attributes:
        root: The empty prefix.
    """

    def __init__(
        self,
        expand: Expand,
        evaluate: Evaluate,
        *,
        c_base: float = 10.0,
        c: float = 4.0,
        maximum: bool = True,
    ) -> None:
        self.expand, self.evaluate = expand, evaluate
        self.c_base, self.c, self.maximum = c_base, c, maximum
        self.root = Node(())

    def simulate(self) -> float:
        """One simulation; returns its reward."""
        path, node = [self.root], self.root
        while node.kids:
            above = node
            node = max(above.kids or (), key=lambda kid: p_ucb(above, kid, self.c_base, self.c))
            path.append(node)
        if node.kids is None:
            node.kids = [Node((*node.prefix, t), p) for t, p in self.expand(node.prefix)]
        reward = self.evaluate(node.prefix)
        for passed in path:
            passed.visits += 1
            passed.total += reward
            mean = passed.total / (passed.visits - 1)
            passed.value = max(passed.value, reward) if self.maximum else mean
        return reward
