"""A feed-forward layer that looks its output up among n^2 values by two keys of n each.

After G. Lample et al., "Large Memory Layers with Product Keys", 2019, arXiv:1907.05242; the relu
instead of a softmax is that of R. Csordas et al., 2023, arXiv:2310.10837. The score of value (i, j)
is the sum of two scores, so its largest ones lie among the k largest of either side::

    x ──▶ query of a head, in halves ──▶ n scores a side ──k best──▶ k^2 sums ──k best──▶ values
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus.errors import InvalidInputError

Scores = Literal["softmax", "relu"]


class ProductKeys(nn.Module):
    """Product-key memory.

    Args:
        hidden_size: Width D.
        side: Keys a side, n; there are n^2 values.
        top_k: Values k that each head takes.
        heads: Heads; they share the values.
        key_size: Numbers of a key; the queries of a head have twice as many.
        scores: What the chosen scores become before they weigh the values.

    Raises:
        InvalidInputError: A size is below 1, k is above n, or no such scores.

    Example:
        >>> layer = ProductKeys(2, 2, 1, heads=1, key_size=1, scores="relu")
        >>> with torch.no_grad():
        ...     _ = layer.query.weight.copy_(torch.eye(2))
        ...     _ = layer.keys.copy_(torch.tensor([[[[1.0], [-1.0]], [[1.0], [2.0]]]]))
        ...     _ = layer.values.copy_(torch.arange(8.0).view(4, 2))
        >>> layer(torch.tensor([[3.0, 1.0]])).tolist()  # (3 * 1 + 1 * 2) times value (0, 1)
        [[10.0, 15.0]]
    """

    def __init__(
        self,
        hidden_size: int,
        side: int,
        top_k: int,
        *,
        heads: int = 4,
        key_size: int = 32,
        scores: Scores = "softmax",
    ) -> None:
        super().__init__()
        if min(hidden_size, side, top_k, heads, key_size) < 1 or top_k > side:
            raise InvalidInputError(
                f"sizes are at least 1 and top_k at most the {side} keys a side, got "
                f"hidden_size={hidden_size}, top_k={top_k}, heads={heads}, key_size={key_size}"
            )
        if scores not in get_args(Scores):
            raise InvalidInputError(
                f"scores must be one of {', '.join(get_args(Scores))}, got {scores!r}"
            )
        self.side, self.top_k, self.heads, self.scores = side, top_k, heads, scores
        self.query = nn.Linear(hidden_size, heads * 2 * key_size, bias=False)
        self.keys = nn.Parameter(torch.randn(heads, 2, side, key_size) * key_size**-0.5)
        self.values = nn.Parameter(torch.randn(side * side, hidden_size) * hidden_size**-0.5)

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Values that each head takes of x [N, D], and their scores; both [N, H, k]."""
        queries = self.query(x).view(len(x), self.heads, 2, -1)
        sides = torch.einsum("nhsd,hskd->nhsk", queries, self.keys)  # [N, H, 2, n]
        best = sides.topk(self.top_k, -1)
        first, second = best.values.unbind(2)
        sums = (first[..., :, None] + second[..., None, :]).flatten(2)  # [N, H, k^2]
        rows, columns = best.indices.unbind(2)
        places = (rows[..., :, None] * self.side + columns[..., None, :]).flatten(2)
        chosen = sums.topk(self.top_k, -1)
        return places.gather(-1, chosen.indices), chosen.values

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., D] to [..., D]."""
        places, scores = self.choose(x.reshape(-1, x.shape[-1]))
        weights = scores.softmax(-1) if self.scores == "softmax" else scores.relu()
        out = F.embedding_bag(
            places.flatten(1),
            self.values,
            mode="sum",
            per_sample_weights=weights.flatten(1).to(self.values),
        )
        return out.view(x.shape)
