"""Relaxed acceptance rules: nearly right is good enough, and the output says that it changed."""

from __future__ import annotations

import math

import torch

from isthmus.decoding.tree import TokenTree
from isthmus.errors import InvalidInputError
from isthmus.roles import Context, Verdict


class TopBeta:
    """A draft token stands if the target ranks it high and likes it nearly as much as its best.

    The rule of SpecDec (Xia et al. 2022, 2203.16487, eq. 4): among the ``beta`` best, and its log
    probability at most ``tolerance`` below the best one's. At the first failure the target's best
    token is emitted. With ``beta = 1`` this is greedy acceptance.

    Args:
        beta: Ranks that still pass, at least 1.
        tolerance: Largest gap in nats, the paper's tau.

    Raises:
        InvalidInputError: A value is out of range; from ``accept``, the tree is no chain or the
            law is not greedy.

    Example:
        >>> TopBeta(3, 1.0).lossless, TopBeta(1, 1.0).lossless
        (False, True)
    """

    def __init__(self, beta: int = 3, tolerance: float = 1.0) -> None:
        if beta < 1 or not tolerance >= 0.0:
            raise InvalidInputError(
                f"top-beta needs beta >= 1 and tolerance >= 0, got {beta} and {tolerance}"
            )
        self.beta, self.tolerance = beta, tolerance
        self.lossless = beta == 1

    def accept(self, tree: TokenTree, logits: torch.Tensor, context: Context) -> Verdict:
        """See :class:`isthmus.roles.Acceptance`."""
        if not tree.is_chain or not context.law.greedy:
            raise InvalidInputError("top-beta acceptance is for chains and greedy decoding only")
        law = context.law.logits(logits, tree, context)  # [B, N, V]
        best = law.max(-1)
        if not math.isfinite(float(best.values.sum())):
            raise InvalidInputError("the target's logits are not finite; try --dtype float32")
        own = law[:, :-1].gather(-1, tree.tokens[:, 1:, None])  # [B, N - 1, 1]
        rank = (law[:, :-1] > own).sum(-1)
        gap = best.values[:, :-1] - own[..., 0]  # of logits, so of log probabilities
        passes = (rank < self.beta) & (gap <= self.tolerance)
        if self.beta == 1:  # ties fall where greedy decoding lets them fall
            passes = tree.tokens[:, 1:] == best.indices[:, :-1]
        passes &= tree.alive[:, 1:]
        count = 1 + passes.long().cumprod(1).sum(1)  # the root and what stands below it
        steps = torch.arange(int(count.max()), device=count.device)
        path = torch.where(steps < count[:, None], steps, -1)
        return Verdict(path, best.indices.gather(1, count[:, None] - 1)[:, 0])
