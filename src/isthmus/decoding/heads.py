"""Parts of drafters that guess with heads on the target's last hidden state.

Their whole memory is ``f_t``, the state that the root was chosen from; the tokens drafted since are
all that tells one node from another. Their trees are static: which ranks are worth a node is
counted while the heads are trained (:class:`RankShares`) and filled level by level::

    f_t ──> expand(level) ──> top ranks of each node ──> the next level's tokens ──> expand ...
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from isthmus.decoding.builders import Expand, Level, RankTree, calibrate
from isthmus.decoding.target import HubTarget
from isthmus.decoding.trained import Batch, Fresh, TrainedDrafter
from isthmus.decoding.tree import TokenTree
from isthmus.objectives.distillation import hard_cross_entropy, shifted, soft_cross_entropy
from isthmus.roles import Shape


class FeatureHeads(TrainedDrafter):
    """Base of drafters that remember one feature a row, ``f_t`` at the last verified token.

    Args:
        target: The target.
        settings: The system's settings, with a field ``distil``.
    """

    def __init__(self, target: HubTarget, settings: Any = None) -> None:
        super().__init__(target, settings)
        self.feature = torch.empty(0)  # f_t [B, D]

    def reset(self, batch: int) -> None:
        """No feature yet."""
        target = self.target
        self.feature = torch.zeros(
            batch, self.sizes.hidden_size, device=target.device, dtype=target.state_dtype
        )

    def absorb(self, fresh: Fresh) -> None:
        """Remember the feature of the last verified token."""
        self.remember(fresh, fresh.final)

    def remember(self, fresh: Fresh, states: torch.Tensor) -> None:
        """Remember one of the states [B, M, D] of each row, where there is a new one."""
        new = fresh.valid.any(1)[:, None]
        self.feature = torch.where(new, fresh.at_last(states), self.feature)

    def select_state(self, rows: torch.Tensor) -> None:
        """Keep the given rows."""
        self.feature = self.feature[rows]

    def own_head(self) -> nn.Linear:
        """A trainable copy of the target's head."""
        head = self.target.model.get_output_embeddings()
        mine: nn.Linear = copy.deepcopy(head).to(torch.get_default_dtype())
        mine.weight.data.mul_(self._head_scale)
        return mine.requires_grad_(True)

    def ahead_loss(self, batch: Batch, k: int, logits: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of a guess k tokens past the next one.

        Args:
            batch: The texts.
            k: 0 is the token that the target itself predicts, 1 the one after it.
            logits: At each token i, of ``x_{i+1+k}``, [B, T, V].

        Returns:
            To the target's law with ``distil`` set, to the text itself without; a scalar.
        """
        if self.settings.distil:
            return soft_cross_entropy(shifted(batch.target_logits, k), logits, batch.before(k))
        return hard_cross_entropy(shifted(batch.ids, k + 1), logits, batch.before(k + 1))


class RankShares(nn.Module):
    """How often the candidate of each rank is right at each depth: what shapes a static tree.

    A running mean over the training batches, kept with the weights, so that a drafter carries the
    tree that suits it. Before any training it holds shares of a plain geometric form.

    Args:
        depth: Levels K.
        ranks: Ranks R.

    Example:
        >>> shares = RankShares(depth=2, ranks=2)
        >>> shares.plan(Shape(nodes=3, depth=2, width=2)).parents
        (-1, 0, 0, 1)
    """

    def __init__(self, depth: int, ranks: int = 10) -> None:
        super().__init__()
        falls = 0.8 ** torch.arange(depth)[:, None]
        self.shares: torch.Tensor
        self.register_buffer("shares", falls * 0.5 ** torch.arange(1, ranks + 1))  # [K, R]

    @torch.no_grad()
    def learn(self, batch: Batch, k: int, logits: torch.Tensor) -> None:
        """Count which rank of a guess k tokens past the next is the target's own choice.

        Args:
            batch: The texts.
            k: 1 or more.
            logits: At each token i, of ``x_{i+1+k}``, [B, T, V].
        """
        end = logits.shape[1] - k
        some = slice(0, max(0, end), 4)  # a sort of every place would cost as much as the loss
        choice = batch.target_logits[:, k:][:, some].argmax(-1)
        share = rank_hits(logits[:, some], choice, batch.mask[:, some], self.shares.shape[1])
        self.shares[k - 1].lerp_(share.to(self.shares), 0.03)

    def plan(self, shape: Shape) -> RankTree:
        """The tree of this shape with the most expected accepted tokens."""
        table = self.shares[: shape.depth, : shape.width].clamp(0.0, 1.0).tolist()
        return _calibrated(tuple(map(tuple, table)), shape.nodes)


@lru_cache(maxsize=256)
def _calibrated(table: tuple[tuple[float, ...], ...], nodes: int) -> RankTree:
    """Kept, because a tree is asked for in every round and its links are built once."""
    return RankTree.of(calibrate(torch.tensor(table), nodes))


def rank_hits(
    logits: torch.Tensor, choice: torch.Tensor, mask: torch.Tensor, ranks: int
) -> torch.Tensor:
    """Share of places where the candidate of each rank equals the choice.

    Args:
        logits: [B, T, V].
        choice: int64 [B, T].
        mask: Places that count, bool [B, T].
        ranks: Ranks R; those beyond the vocabulary never hit.

    Returns:
        [R].

    Example:
        >>> logits = torch.tensor([[[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]]])
        >>> rank_hits(logits, torch.tensor([[0, 2]]), torch.ones(1, 2, dtype=torch.bool), 3)
        tensor([0.5000, 0.0000, 0.5000])
    """
    top = logits.topk(min(ranks, logits.shape[-1]), -1).indices
    hits = (top == choice[..., None]) & mask[..., None]
    share = hits.flatten(0, 1).sum(0) / mask.sum().clamp(min=1)
    return torch.nn.functional.pad(share, (0, ranks - len(share)))


@dataclass(frozen=True)
class _Floor:
    """One level of a static tree: whom to expand and where the children go."""

    front: torch.Tensor  # nodes of the level that have children [F]
    above: torch.Tensor  # place of their parents in the front before [F]
    kids: torch.Tensor  # children, in node order [C]
    place: torch.Tensor  # place of each child's parent in this front [C]
    rank: torch.Tensor  # rank of each child [C]
    best: int  # candidates needed


@lru_cache(maxsize=256)
def _floors(plan: RankTree) -> tuple[_Floor, ...]:
    depth, parent = plan.topology.depth[0], plan.topology.parent[0]
    rank = torch.tensor(plan.ranks)
    inner = torch.isin(torch.arange(len(parent)), parent)
    spot = torch.zeros_like(parent)
    front, above, floors = torch.zeros(1, dtype=torch.int64), torch.zeros_like(parent[:1]), []
    for level in range(1, plan.topology.max_depth + 1):
        spot[front] = torch.arange(len(front))
        kids = (depth == level).nonzero()[:, 0]
        place = spot[parent[kids]]
        floors.append(_Floor(front, above, kids, place, rank[kids], int(rank[kids].max()) + 1))
        onward = inner[kids]
        front, above = kids[onward], place[onward]
    return tuple(floors)


def fill_by_level(expand: Expand, roots: torch.Tensor, plan: RankTree) -> TokenTree:
    """Fill a static tree whose candidates depend on the path, one level after the other.

    Args:
        expand: Logits or log-probabilities [B, F, V] of the children of a
            :class:`~isthmus.decoding.builders.Level`'s nodes; only nodes with children are asked
            for. Scores are not given.
        roots: int64 [B].
        plan: The tree.

    Example:
        >>> after = lambda level: (level.tokens[..., None] - torch.arange(9)).abs().neg().float()
        >>> fill_by_level(after, torch.tensor([4]), RankTree.of([(0,), (0, 0)])).tokens.tolist()
        [[4, 4, 4]]
    """
    tokens = roots[:, None].repeat(1, len(plan.parents))
    for depth, floor in enumerate(_floors(plan)):
        front = tokens[:, floor.front]
        above = floor.above.to(roots.device).expand_as(front)
        logits = expand(Level(front, above, torch.zeros(front.shape), depth))
        best = logits.topk(floor.best, -1).indices
        tokens[:, floor.kids] = best[:, floor.place, floor.rank]
    return TokenTree(tokens, plan.topology.to(roots.device))


def beam_paths(
    expand: Expand, roots: torch.Tensor, *, branch: Sequence[int], keep: Sequence[int]
) -> torch.Tensor:
    """Beam search over drafted paths.

    Args:
        expand: Logits [B, F, V] of the children of a :class:`~isthmus.decoding.builders.Level`'s
            nodes.
        roots: int64 [B].
        branch: Children considered for every beam, by level.
        keep: Beams kept at most, by level.

    Returns:
        Paths below the roots, the likeliest first, int64 [B, W, L].

    Example:
        >>> after = lambda level: (level.tokens[..., None] - torch.arange(9)).abs().neg().float()
        >>> beam_paths(after, torch.tensor([8]), branch=(2, 1), keep=(2, 2)).tolist()
        [[[8, 8], [7, 7]]]
    """
    zero = torch.zeros_like(roots)[:, None]
    level = Level(roots[:, None], zero, torch.zeros(len(roots), 1, device=roots.device), 0)
    beams = roots.new_zeros(len(roots), 1, 0)
    for step, (children, width) in enumerate(zip(branch, keep, strict=True)):
        logp = torch.log_softmax(expand(level).float(), -1)
        top = logp.topk(min(children, logp.shape[-1]), -1)
        k = top.values.shape[-1]
        score = (level.score[..., None] + top.values).flatten(1)
        best = score.topk(min(width, score.shape[1]), -1)
        parent = best.indices // k
        token = top.indices.flatten(1).gather(1, best.indices)
        before = beams.gather(1, parent[..., None].expand(-1, -1, step))
        beams = torch.cat([before, token[..., None]], -1)
        level = Level(token, parent, best.values, step + 1)
    return beams
