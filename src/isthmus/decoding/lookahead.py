"""Contrastive search: look one token ahead and avoid states that the text has been in.

Su et al., "A Contrastive Framework for Neural Text Generation", 2202.06417. Among the k likeliest
tokens the one of the largest ``(1 - alpha) p(v) - alpha max_j cos(h_v, h_j)`` is taken, where h_v
is the last hidden state once v has been fed. Feeding them is a tree of one level below every node,
scored on top of what is being scored anyway.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from isthmus.decoding.reshape import History
from isthmus.decoding.tree import TokenTree, Topology
from isthmus.errors import InvalidInputError, UnsupportedModelError
from isthmus.roles import Context, Target


class ContrastiveSearch(History):
    """Scores of contrastive search at the k candidates of each node, -inf elsewhere.

    Args:
        k: Candidates.
        alpha: Share of the penalty; 0 is greedy decoding.

    Raises:
        InvalidInputError: A number is out of range.
        UnsupportedModelError: From ``begin``, for a model that scores no trees.
    """

    def __init__(self, k: int = 5, alpha: float = 0.6) -> None:
        super().__init__()
        if k < 1 or not 0.0 <= alpha <= 1.0:
            raise InvalidInputError(f"k must be at least 1 and alpha within 0 and 1: {k}, {alpha}")
        self.k, self.alpha = k, alpha
        self._most = 1024

    def begin(self, context: Context, target: Target, **inputs: Any) -> None:
        """Take the states of the prompts."""
        if target.reach != "tree":
            raise UnsupportedModelError(
                f"contrastive search looks ahead with trees, and this model scores a "
                f"{target.reach} at a time; choose another strategy"
            )
        self._most = target.max_nodes
        super().begin(context, target, **inputs)

    def __call__(self, logits: torch.Tensor, tree: TokenTree, context: Context) -> torch.Tensor:
        """See :class:`isthmus.roles.Reshape`."""
        now, past, known = self.look(tree, context)
        top = torch.softmax(logits, -1).topk(min(self.k, logits.shape[-1]))
        ahead = F.normalize(self.ahead(tree, top.indices, context), dim=-1)  # [B, N, k, D]
        own = torch.einsum("bnkd,bmd->bnkm", ahead, F.normalize(now, dim=-1))
        seen = tree.topology.ancestors.expand(tree.batch, -1, -1)[:, :, None]
        worst = own.masked_fill(~seen, -1.0).amax(-1)
        if past.shape[1]:
            before = torch.einsum("bnkd,btd->bnkt", ahead, F.normalize(past, dim=-1))
            before = before.masked_fill(~known[:, None, None], -1.0)
            worst = torch.maximum(worst, before.amax(-1))
        score = (1 - self.alpha) * top.values - self.alpha * worst.to(logits)
        score = score.masked_fill(top.values == 0, -torch.inf)
        return torch.full_like(logits, -torch.inf).scatter(-1, top.indices, score)

    def ahead(self, tree: TokenTree, candidates: torch.Tensor, context: Context) -> torch.Tensor:
        """Last hidden states [B, N, k, D] after candidates [B, N, k] at each node."""
        assert context.session is not None
        n, k = candidates.shape[1:]
        room = max(1, (self._most + 1 - n) // k)  # nodes that are looked at together
        states = []
        for first in range(0, n, room):
            part = candidates[:, first : first + room]
            below = torch.arange(first, first + part.shape[1]).repeat_interleave(k)
            parent = tree.topology.parent.cpu()
            parent = torch.cat([parent, below.expand(len(parent), -1)], 1)
            topology = Topology.of(parent[0].tolist()) if len(parent) == 1 else Topology(parent)
            valid = None
            if tree.valid is not None:
                valid = F.pad(tree.valid, (0, len(below)), value=True)
            # the tree itself stays in front, so that its paths can still be kept
            wide = TokenTree(
                torch.cat([tree.tokens, part.flatten(1)], 1),
                topology.to(tree.tokens.device),
                valid,
            )
            features = context.session.score(wide, taps=self.taps).features
            assert features is not None and features.final is not None
            states.append(features.final[:, n:].reshape(*part.shape, -1))
        return torch.cat(states, 1)
