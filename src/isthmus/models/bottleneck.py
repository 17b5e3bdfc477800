"""Weak decoders that force a text through one vector, and bags of words that the rest predicts.

::

    first state h [B, D] ──────────┐ keys: h, e(x_1) + p_1, e(x_2) + p_2 ...
                                   ▼
    queries h + p_i ──attention, row i blind to x_i and to half the rest──▶ x_i, every i
    other states ──head──▶ [B, T, V] ──max over places──▶ u [B, V] ──▶ the bag of words

After Xiao et al., "RetroMAE", 2022 (arXiv 2205.12035), section 3.3, and "RetroMAE v2", 2022
(arXiv 2211.08769), section 3. Decoders are for pretraining only.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from isthmus.errors import InvalidInputError

ABSENT = -1000.0
"""Score of every word at a place that does not count."""


def enhanced_mask(
    present: torch.Tensor,
    rate: float,
    *,
    patterns: int = 256,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """What every row of the enhanced decoder sees, bool [B, T, T], drawn anew for each text.

    Row i sees place 0 and each other place with probability ``1 - rate``, never itself nor
    padding. Row 0 predicts nothing.

    Args:
        present: Which places hold a token, bool [B, T]; place 0 does.
        rate: Share of places hidden from a row.
        patterns: Patterns drawn for a text; rows share them in turn where it is longer.
        generator: Source of the draws; torch's own when None.

    Raises:
        InvalidInputError: The rate is no share, or there is no pattern.

    Example:
        >>> enhanced_mask(torch.tensor([[True, True, True, False]]), 0.0)[0].int().tolist()
        [[0, 1, 1, 0], [1, 0, 1, 0], [1, 1, 0, 0], [1, 1, 1, 0]]
    """
    if not 0 <= rate <= 1 or patterns < 1:
        raise InvalidInputError(
            f"the rate is from 0 to 1 and patterns at least 1, got {rate} and {patterns}"
        )
    b, t = present.shape
    count, device = min(patterns, t), present.device
    drawn = torch.rand(b, count, t, generator=generator, device=device) >= rate
    seen = drawn[:, torch.arange(t, device=device) % count]  # [B, T, T]
    seen[:, :, 0] = True
    return seen & present[:, None] & ~torch.eye(t, dtype=torch.bool, device=device)


class EnhancedDecoder(nn.Module):
    """One layer whose every place rebuilds its token from the vector and its own view of the rest.

    Args:
        hidden_size: Width D.
        num_heads: Attention heads.

    Raises:
        InvalidInputError: The width is no multiple of the heads.
    """

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        if num_heads < 1 or hidden_size % num_heads:
            raise InvalidInputError(f"a width of {hidden_size} has no {num_heads} equal heads")
        self.num_heads = num_heads
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key = nn.Linear(hidden_size, hidden_size)
        self.value = nn.Linear(hidden_size, hidden_size)
        self.out = nn.Linear(hidden_size, hidden_size)
        self.norm, self.last_norm = nn.LayerNorm(hidden_size), nn.LayerNorm(hidden_size)
        self.feed_forward = nn.Sequential(
            nn.Linear(hidden_size, 4 * hidden_size),
            nn.GELU(),
            nn.Linear(4 * hidden_size, hidden_size),
        )

    def forward(
        self,
        vector: torch.Tensor,
        tokens: torch.Tensor,
        places: torch.Tensor,
        seen: torch.Tensor,
    ) -> torch.Tensor:
        """States of places 1 to T - 1, for the head that the encoder has.

        Args:
            vector: h of every text, [B, D].
            tokens: e(x) + p of the clean tokens, [B, T, D]; h takes the place of the first one.
            places: p, embeddings of the places, [T, D].
            seen: See :func:`enhanced_mask`, [B, T, T].

        Returns:
            [B, T - 1, D].

        Raises:
            InvalidInputError: Shapes do not fit, or there is nothing to predict.
        """
        b, t, d = tokens.shape
        if t < 2 or vector.shape != (b, d) or places.shape != (t, d) or seen.shape != (b, t, t):
            raise InvalidInputError(
                f"tokens [B, T >= 2, D] {list(tokens.shape)} do not fit a vector "
                f"{list(vector.shape)}, places {list(places.shape)}, mask {list(seen.shape)}"
            )
        asked = vector[:, None] + places[1:]  # H1, eq. 6: [B, T - 1, D]
        known = torch.cat([vector[:, None], tokens[:, 1:]], 1)  # H2, eq. 7
        q, k, v = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in (self.query(asked), self.key(known), self.value(known))
        )
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None, 1:])  # eq. 8
        x = self.norm(asked + self.out(mixed.transpose(1, 2).flatten(2)))
        y: torch.Tensor = self.last_norm(x + self.feed_forward(x))
        return y


def word_scores(
    states: torch.Tensor,
    counted: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    *,
    block: int = 16,
) -> torch.Tensor:
    """The largest score u of every word over the places of a text, [B, V].

    Scores [B, T, V] are never all in memory: they are made, and made again in the backward pass,
    for a block of places at a time.

    Args:
        states: [B, T, D].
        counted: Which places count, bool [B, T]; neither padding nor special tokens should.
        head: From states to scores of V words.
        block: Places at a time.

    Raises:
        InvalidInputError: The block is empty, or shapes do not fit.

    Example:
        >>> states = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [9.0, 9.0]]])
        >>> word_scores(states, torch.tensor([[True, True, False]]), lambda x: x, block=1).tolist()
        [[1.0, 2.0]]
    """
    if block < 1 or states.shape[:2] != counted.shape or not states.shape[1]:
        raise InvalidInputError(
            f"states {list(states.shape)} and places {list(counted.shape)} must fit, and a block "
            f"be at least 1, got {block}"
        )

    def largest(x: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
        return head(x).masked_fill(~inside[..., None], ABSENT).amax(1)

    best: torch.Tensor | None = None
    for x, inside in zip(
        torch.split(states, block, 1), torch.split(counted, block, 1), strict=True
    ):
        one = checkpoint(largest, x, inside, use_reentrant=False)
        best = one if best is None else torch.maximum(best, one)
    assert best is not None
    return best


def bag_loss(scores: torch.Tensor, ids: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """Sum over texts of ``-sum_w p(w) log softmax(u)_w``, p their normalised bags of words.

    Args:
        scores: u, [B, V].
        ids: Tokens, int64 [B, T].
        counted: Which of them are in the bag, bool [B, T]; a text without any adds nothing.

    Example:
        >>> ids, all_ = torch.tensor([[0, 0, 0, 1]]), torch.ones(1, 4, dtype=torch.bool)
        >>> u = torch.tensor([[0.75, 0.25]]).log()
        >>> round(float(bag_loss(u, ids, all_)), 4)  # -3/4 log 3/4 - 1/4 log 1/4, the least
        0.5623
    """
    p = torch.zeros_like(scores).scatter_add_(1, ids, counted.to(scores.dtype))
    p = p / p.sum(1, keepdim=True).clamp(min=1)
    return -(p * F.log_softmax(scores, 1)).sum()
