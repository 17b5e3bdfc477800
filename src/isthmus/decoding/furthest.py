"""Candidates from the target's own last law, and the one accepted furthest: a relaxed rule."""

from __future__ import annotations

from dataclasses import replace

import torch

from isthmus.decoding.acceptance import Lossless, Rejection
from isthmus.decoding.drafters import gumbel_top_k
from isthmus.decoding.tree import TokenTree
from isthmus.roles import Context, Verdict


class FurthestRoot:
    """Of several first candidates from the target's own law, keep the one accepted furthest.

    What the rejections left of the target's law at the last accepted node is known from its
    forward, so the round draws no final token there: the next round takes candidates from that law
    instead. Choosing among them by what follows prefers text that is easy to draft: the law is
    *not* kept, unless there is but one candidate.

    Attributes:
        known: Law of the next token of each row [B, V]; NaN where the last token was drawn after
            a rejection at the root, so that nothing is known yet.
    """

    lossless = False

    def __init__(self) -> None:
        self.known: torch.Tensor | None = None
        self._rows = torch.zeros(0, dtype=torch.bool)
        self._exact, self._rule = Lossless(), Rejection()

    def first(
        self, probs: torch.Tensor, width: int, context: Context
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Laws [B, 1, V] and candidates [B, 1, k] of the first level."""
        fresh = torch.multinomial(probs[:, 0], width, True, generator=context.generator)
        self._rows = torch.zeros(len(probs), dtype=torch.bool, device=probs.device)
        if self.known is not None:
            self._rows = ~self.known.isnan().any(1)
            law = torch.where(self._rows[:, None], self.known, probs[:, 0].to(self.known.dtype))
            ours = gumbel_top_k(law.log(), width, context.generator)
            fresh = torch.where(self._rows[:, None], ours, fresh)
            probs = law[:, None].to(probs.dtype)
        return probs, fresh[:, None]

    def accept(self, tree: TokenTree, logits: torch.Tensor, context: Context) -> Verdict:
        """See :class:`isthmus.roles.Acceptance`."""
        if context.law.greedy:
            return self._exact.accept(tree, logits, context)
        law = context.law.probs(logits, tree, context).double()
        every = torch.arange(tree.batch, device=law.device)
        if tree.nodes == 1:
            if self.known is not None:
                law[:, 0] = torch.where(self.known.isnan(), law[:, 0], self.known)
            self.known = None
            token = torch.multinomial(law[:, 0], 1, generator=context.generator)[:, 0]
            return Verdict(torch.zeros_like(token)[:, None], token)
        usual = self._rule.verify(tree, law, context.generator)
        path, left = usual.path, self._left()
        if bool(self._rows.any()):
            tries = [self._below(tree, law, child, context) for child in range(self._width(tree))]
            longest = max(t[0].shape[1] for t in (*tries, (path, left)))
            paths = torch.stack([_pad(t[0], longest) for t in tries])  # [k, B, D]
            best = (paths >= 0).sum(-1).argmax(0)  # among equals the first one drawn
            path = torch.where(self._rows[:, None], paths[best, every], _pad(path, longest))
            lefts = torch.stack([t[1] for t in tries])
            left = torch.where(self._rows[:, None], lefts[best, every], left)
        depth = (path >= 0).sum(1) - 1
        # the last accepted token is emitted as the final one: what follows it has a known law
        last = path.gather(1, depth[:, None])
        kept = depth > 0
        token = torch.where(kept, tree.tokens.gather(1, last)[:, 0], usual.token)
        steps = torch.arange(path.shape[1], device=path.device)
        cut = torch.where(steps < depth.clamp(min=1)[:, None], path, -1)
        self.known = torch.where(kept[:, None], left, torch.nan)
        return Verdict(cut[:, : int(depth.max().clamp(min=1))], token)

    def _left(self) -> torch.Tensor:
        """What the rejections left of the target's law at the end of the path, [B, V]."""
        assert self._rule.residual is not None
        return self._rule.residual

    @staticmethod
    def _width(tree: TokenTree) -> int:
        return int((tree.topology.parent[0] == 0).sum())

    def _below(
        self, tree: TokenTree, law: torch.Tensor, child: int, context: Context
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Accepted path when the given first-level child is taken as true, and what is left."""
        node = child + 1
        under = tree.topology.ancestors[:, :, node].clone()
        under[:, 0] = True
        sure = torch.zeros_like(law[:, :1]).scatter(2, tree.tokens[:, node : node + 1, None], 1.0)
        assert tree.q is not None
        only = replace(
            tree, valid=under & tree.alive, q=torch.cat([sure.to(tree.q), tree.q[:, 1:]], 1)
        )
        verdict = self._rule.verify(only, torch.cat([sure, law[:, 1:]], 1), context.generator)
        return verdict.path, self._left()


def _pad(path: torch.Tensor, width: int) -> torch.Tensor:
    return torch.nn.functional.pad(path, (0, width - path.shape[1]), value=-1)
