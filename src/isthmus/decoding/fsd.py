"""Frustratingly simple decoding: an anti-model of the text so far, against repetition.

Yang et al., "A Frustratingly Simple Decoding Method for Neural Text Generation", 2305.12675. Among
the k likeliest tokens the one of the largest ``(1 - alpha) p(v) - alpha pen(v)`` is taken. The
penalty is the prediction of an n-gram model of the prefix (``FSD``), or how much the last hidden
states are like those that were followed by v before (``FSDVec``).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from isthmus.decoding.law import node_prefixes
from isthmus.decoding.reshape import History, Pure
from isthmus.decoding.tree import TokenTree
from isthmus.errors import InvalidInputError
from isthmus.roles import Context, Stage


def ngram_penalty(
    ids: torch.Tensor, candidates: torch.Tensor, n: int = 3, beta: float = 0.9
) -> torch.Tensor:
    """Prediction of a smoothed n-gram model of each prefix for some tokens.

    From order n down: where v was seen after the context, ``r beta count / (total + 1)`` is added
    and r, which starts at 1, becomes ``r (1 - beta)``; last, ``r count / total`` of single tokens.

    Args:
        ids: Prefixes, int64 [R, T].
        candidates: Tokens v, int64 [R, k].
        n: Longest n-gram.
        beta: Weight of the longest context.

    Returns:
        Penalties [R, k], 0 to 1.

    Example:
        >>> ids = torch.tensor([[7, 8, 9, 7, 8]])
        >>> p = ngram_penalty(ids, torch.tensor([[9, 7]]), n=3)  # 7 8 and 8 came before 9
        >>> [round(x, 4) for x in p[0].tolist()]  # .9/2 + .1*.9/2 + .01*1/5 and 2/5
        [0.497, 0.4]
    """
    length = ids.shape[1]
    out = torch.zeros(candidates.shape, device=ids.device)
    rest = torch.ones_like(out)
    for order in range(min(n - 1, length - 1), 0, -1):
        windows = ids.unfold(1, order, 1)[:, :-1]  # [R, T - order, order]
        here = (windows == ids[:, None, -order:]).all(-1)
        follows = ids[:, None, order:] == candidates[:, :, None]
        count = (follows & here[:, None]).sum(-1)
        seen = count > 0
        share = count / (here.sum(1)[:, None] + 1)
        out = torch.where(seen, out + rest * beta * share, out)
        rest = torch.where(seen, rest * (1 - beta), rest)
    return out + rest * (ids[:, None] == candidates[:, :, None]).sum(-1) / length


def _weigh(
    logits: torch.Tensor, top: tuple[torch.Tensor, torch.Tensor], penalty: torch.Tensor, a: float
) -> torch.Tensor:
    """Scores at the candidates, -inf elsewhere."""
    values, index = top
    score = ((1 - a) * values - a * penalty.to(values)).masked_fill(values == 0, -torch.inf)
    return torch.full_like(logits, -torch.inf).scatter(-1, index, score)


def _check(k: int, alpha: float, n: int) -> None:
    if k < 1 or not 0.0 <= alpha <= 1.0 or n < 1:
        raise InvalidInputError(
            f"k and n must be at least 1 and alpha within 0 and 1, got k={k}, n={n}, alpha={alpha}"
        )


class FSD(Pure):
    """FSD with an n-gram model of the prefix, each node by its own path.

    Args:
        n: Longest n-gram.
        k: Candidates.
        beta: Weight of the longest context.
        alpha: Share of the penalty; 0 is greedy decoding.

    Raises:
        InvalidInputError: A number is out of range.
    """

    stage: Stage = "truncate"

    def __init__(self, n: int = 3, k: int = 5, beta: float = 0.9, alpha: float = 0.6) -> None:
        _check(k, alpha, n)
        if not 0.0 <= beta <= 1.0:
            raise InvalidInputError(f"beta must be within 0 and 1, got {beta}")
        self.n, self.k, self.beta, self.alpha = n, k, beta, alpha

    def __call__(self, logits: torch.Tensor, tree: TokenTree, context: Context) -> torch.Tensor:
        """See :class:`isthmus.roles.Reshape`."""
        values, index = torch.softmax(logits, -1).topk(min(self.k, logits.shape[-1]))
        flat = index.flatten(0, 1)
        penalty = values.new_zeros(flat.shape)
        for where, ids in node_prefixes(tree, context):
            got = ngram_penalty(ids, flat[where], self.n, self.beta)
            penalty[where] = got.to(penalty)
        return _weigh(logits, (values, index), penalty.view_as(values), self.alpha)


class FSDVec(History):
    """FSD with the last n - 1 hidden states in place of the last n - 1 tokens.

    The penalty of v is the largest cosine between them and those at an earlier position that was
    followed by v, and 0 where there is none or it is negative.

    Args:
        n: One more than the states that are compared; at least 2.
        k: Candidates.
        alpha: Share of the penalty; 0 is greedy decoding.

    Raises:
        InvalidInputError: A number is out of range.
    """

    def __init__(self, n: int = 2, k: int = 5, alpha: float = 0.4) -> None:
        super().__init__()
        _check(k, alpha, n - 1)
        self.n, self.k, self.alpha = n, k, alpha

    def __call__(self, logits: torch.Tensor, tree: TokenTree, context: Context) -> torch.Tensor:
        """See :class:`isthmus.roles.Reshape`."""
        now, past, known = self.look(tree, context)
        values, index = torch.softmax(logits, -1).topk(min(self.k, logits.shape[-1]))
        before = past.shape[1]
        keys = self.windows(now, past, known, tree)  # [B, T + N, (n - 1) D]
        like = torch.einsum("bne,bse->bns", keys[:, before:], keys)
        penalty = values.new_zeros(values.shape)
        if before:
            ids = context.ids[:, 1 : before + 1].to(index.device)
            match = (ids[:, None, None] == index[..., None]) & known[:, None, None]
            penalty = torch.where(match, like[:, :, None, :before], 0.0).amax(-1).clamp(min=0.0)
        if tree.nodes > 1:  # on a draft, every node below the root follows its parent
            parent = tree.topology.parent.expand(tree.batch, -1).clamp(min=0)
            after = like[:, :, before:].gather(2, parent[:, None].expand(-1, tree.nodes, -1))
            above = tree.topology.ancestors.expand(tree.batch, -1, -1).clone()
            above[:, :, 0] = False
            match = (tree.tokens[:, None, None] == index[..., None]) & above[:, :, None]
            own = torch.where(match, after[:, :, None], 0.0).amax(-1)
            penalty = torch.maximum(penalty, own.to(penalty))
        return _weigh(logits, (values, index), penalty, self.alpha)

    def windows(
        self, now: torch.Tensor, past: torch.Tensor, known: torch.Tensor, tree: TokenTree
    ) -> torch.Tensor:
        """The last n - 1 states at every position, as one normed vector: [B, T + N, (n - 1) D]."""
        b, before = past.shape[:2]
        states = torch.cat([past, now], 1)
        if self.n == 2:
            return F.normalize(states, dim=-1)
        # where the position before each one stands; the last one is the zero of all beginnings
        blank = states.shape[1]
        parent = tree.topology.parent.expand(b, -1) + before
        root = torch.where(known.any(1), known.sum(1) - 1, blank)
        parent = torch.cat([root[:, None], parent[:, 1:]], 1)
        line = torch.arange(-1, before - 1, device=now.device).expand(b, -1)
        line = torch.where(line < 0, blank, line)
        step = torch.cat([line, parent, torch.full_like(root, blank)[:, None]], 1)
        padded = F.pad(states, (0, 0, 0, 1))
        place = torch.arange(blank, device=now.device).expand(b, -1)
        parts = []
        for _ in range(self.n - 1):
            where = place[..., None].expand(-1, -1, padded.shape[-1])
            parts.append(padded.gather(1, where))
            place = step.gather(1, place)
        return F.normalize(torch.cat(parts, -1), dim=-1)
