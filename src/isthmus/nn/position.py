"""Where a token stands: fixed waves, and T5's learned bias of attention."""

from __future__ import annotations

import math

import torch
from torch import nn


def sinusoidal(places: int, width: int) -> torch.Tensor:
    """Waves [places, width], all sines before all cosines, as Marian orders them.

    Vaswani et al., "Attention is all you need", 2017, section 3.5, which interleaves the two.

    Example:
        >>> sinusoidal(2, 4)[1].tolist() == [math.sin(1), math.sin(0.01), math.cos(1),
        ...                                  math.cos(0.01)]
        True
    """
    rates = 10_000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.arange(places, dtype=torch.float64)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()[:, : width // 2]], 1).double()


def relative_bucket(
    offset: torch.Tensor, *, bidirectional: bool, buckets: int = 32, distance: int = 128
) -> torch.Tensor:
    """T5's bucket of an offset (place of the key minus that of the query), int64 of any shape.

    Near offsets have buckets of their own, farther ones share buckets of logarithmic width.
    Raffel et al., "Exploring the limits of transfer learning", 2020 (arXiv 1910.10683).

    Example:
        >>> offsets = torch.tensor([-1, 0, 1, 8, -16, 128])
        >>> relative_bucket(offsets, bidirectional=True).tolist()
        [1, 0, 17, 24, 10, 31]
        >>> relative_bucket(-torch.tensor([16, 32, 128]), bidirectional=False).tolist()
        [16, 21, 31]
    """
    if bidirectional:
        buckets //= 2
        base = (offset > 0).long() * buckets
        away = offset.abs()
    else:
        base = torch.zeros_like(offset)
        away = (-offset).clamp(min=0)
    exact = buckets // 2
    ratio = torch.log(away.clamp(min=1).float() / exact) / math.log(distance / exact)
    far = (exact + (ratio * (buckets - exact)).long()).clamp(max=buckets - 1)
    return base + torch.where(away < exact, away, far)


class RelativeBias(nn.Module):
    """One learned number for every head and bucket, added to the scores of attention.

    Args:
        heads: Heads H.
        bidirectional: Whether places to the right have buckets of their own.
    """

    def __init__(self, heads: int, *, bidirectional: bool) -> None:
        super().__init__()
        self.bidirectional = bidirectional
        self.table = nn.Embedding(32, heads)

    def forward(self, queries: int, keys: int) -> torch.Tensor:
        """Bias [1, H, queries, keys] of queries and keys that begin at the same place."""
        device = self.table.weight.device
        offset = torch.arange(keys, device=device) - torch.arange(queries, device=device)[:, None]
        found = self.table(relative_bucket(offset, bidirectional=self.bidirectional))
        bias: torch.Tensor = found.permute(2, 0, 1)[None]
        return bias
