"""Who says the next token: routers decide, at every node of a draft, whether to ask another model.

A router looks at what the model at work says, and never at the other one, which is asked only
where the answer is yes::

    z, h at a node ──router──▶ no:  the model's own law
                              yes: another model is asked  (isthmus.decoding.fusion.Route)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal

import torch

from isthmus.decoding.law import node_prefixes
from isthmus.decoding.state_head import StateHead
from isthmus.decoding.tree import TokenTree
from isthmus.errors import InvalidInputError
from isthmus.roles import Context, Taps


def max_prob(logits: torch.Tensor) -> torch.Tensor:
    """Probability of the likeliest token, [...] from logits [..., V]."""
    return torch.softmax(logits, -1).amax(-1)


def margin(logits: torch.Tensor) -> torch.Tensor:
    """How far the likeliest token is ahead of the next one in probability, [...].

    Example:
        >>> round(float(margin(torch.tensor([0.5, 0.3, 0.2]).log())), 6)
        0.2
    """
    best = torch.softmax(logits, -1).topk(2, -1).values
    return best[..., 0] - best[..., 1]


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """Entropy in nats, [...].

    Example:
        >>> round(float(entropy(torch.zeros(4)).exp()), 6)
        4.0
    """
    log_p = torch.log_softmax(logits, -1)
    return -torch.where(log_p.isfinite(), log_p.exp() * log_p, 0.0).sum(-1)


def top_probabilities(logits: torch.Tensor, k: int) -> torch.Tensor:
    """The k largest probabilities in falling order, [..., k]."""
    return torch.softmax(logits, -1).topk(k, -1).values


class Router(ABC):
    """Decides at every node.

    Attributes:
        taps: Inner states of the model at work that it reads.
    """

    taps = Taps()

    @abstractmethod
    def __call__(self, logits: torch.Tensor, tree: TokenTree, context: Context) -> torch.Tensor:
        """Whether the other model says the token after each node, bool [B, N].

        Args:
            logits: Of the model at work, [B, N, V].
            tree: The draft; without one, the root alone.
            context: What stands; ``context.features`` has the states that ``taps`` asks for.
        """


class Always(Router):
    """Yes."""

    def __call__(self, logits: torch.Tensor, tree: TokenTree, context: Context) -> torch.Tensor:
        """See :class:`Router`."""
        return torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)


class Never(Router):
    """No."""

    def __call__(self, logits: torch.Tensor, tree: TokenTree, context: Context) -> torch.Tensor:
        """See :class:`Router`."""
        return torch.zeros(logits.shape[:-1], dtype=torch.bool, device=logits.device)


class MaxProb(Router):
    """Where the likeliest token has less than this probability.

    Example:
        >>> logits = torch.tensor([[[0.6, 0.4], [0.9, 0.1]]]).log()
        >>> MaxProb(0.7)(logits, None, None).tolist()
        [[True, False]]
    """

    def __init__(self, below: float = 0.5) -> None:
        self.below = below

    def __call__(self, logits: torch.Tensor, tree: TokenTree, context: Context) -> torch.Tensor:
        """See :class:`Router`."""
        return max_prob(logits) < self.below


class Margin(Router):
    """Where the likeliest token is less than this ahead of the next one."""

    def __init__(self, below: float = 0.2) -> None:
        self.below = below

    def __call__(self, logits: torch.Tensor, tree: TokenTree, context: Context) -> torch.Tensor:
        """See :class:`Router`."""
        return margin(logits) < self.below


class Entropy(Router):
    """Where the law has more than this entropy, in nats."""

    def __init__(self, above: float = 1.5) -> None:
        self.above = above

    def __call__(self, logits: torch.Tensor, tree: TokenTree, context: Context) -> torch.Tensor:
        """See :class:`Router`."""
        return entropy(logits) > self.above


class Classifier(Router):
    """Where a fitted head says so.

    Args:
        head: Gives a probability; see :class:`~isthmus.decoding.state_head.StateHead`.
        reads: ``"hidden"``, the last hidden state of the model at work, or ``"top-k"``, its largest
            probabilities in falling order, as many as the head is wide.
        above: Threshold of the probability; 1 is never, and below 0 always.

    Raises:
        InvalidInputError: It can read nothing else.
    """

    def __init__(
        self, head: StateHead, reads: Literal["hidden", "top-k"] = "hidden", above: float = 0.5
    ) -> None:
        if reads not in ("hidden", "top-k"):
            raise InvalidInputError(f"a classifier reads 'hidden' or 'top-k', not {reads!r}")
        self.head, self.reads, self.above = head, reads, above
        self.taps = Taps(final=reads == "hidden")

    @torch.no_grad()
    def __call__(self, logits: torch.Tensor, tree: TokenTree, context: Context) -> torch.Tensor:
        """See :class:`Router`."""
        if self.reads == "top-k":
            seen = top_probabilities(logits, self.head.width)
        else:
            assert context.features is not None and context.features.final is not None
            seen = context.features.final
        sure: torch.Tensor = self.head(seen) > self.above
        return sure.to(logits.device)


class Oracle(Router):
    """Where somebody who knows says so, given the text so far.

    Args:
        says: Given the tokens up to a node, prompt included, int64 [T].
    """

    def __init__(self, says: Callable[[torch.Tensor], bool]) -> None:
        self.says = says

    def __call__(self, logits: torch.Tensor, tree: TokenTree, context: Context) -> torch.Tensor:
        """See :class:`Router`."""
        out = torch.zeros(tree.tokens.numel(), dtype=torch.bool)
        for where, ids in node_prefixes(tree, context):
            out[where.cpu()] = torch.tensor([bool(self.says(row)) for row in ids])
        return out.view(tree.tokens.shape).to(logits.device)
