"""Laws of a network as whole frequencies, by one rule for who writes and who reads (``pinned``).

::

    logits ─▶ multiples of 2^-8 ─▶ whole numbers from a table of exp ─▶ frequencies, sum 2^16

All but the first arrow is exact in whole numbers. Writer and reader run the same steps in the same
shapes on one thread, so the first gives the same on one machine; on another one, a logit that lies
on an edge may fall to the other side, and the check of the symbols tells.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from isthmus.codecs.rangecoder import TOTAL, Ints
from isthmus.errors import InvalidInputError

GRID = 256
"""Steps of a logit between two whole numbers."""

_SPAN = 14 * GRID
"""Logits that lie farther below the largest count as if they lay there."""

_EXP = np.array([math.floor(math.exp(-k / GRID) * (1 << 24) + 0.5) for k in range(_SPAN + 1)])


def frequencies(logits: torch.Tensor) -> Ints:
    """Frequencies of at least 1 that sum to 2^16.

    Args:
        logits: [..., K] with K up to 2^15.

    Returns:
        int64 [..., K].

    Raises:
        InvalidInputError: A logit is no finite number, or there are too many.

    Example:
        >>> frequencies(torch.tensor([1.0, 1.0])).tolist()
        [32768, 32768]
    """
    values = logits.detach().double().numpy()
    if not 1 <= values.shape[-1] <= TOTAL // 2 or not np.isfinite(values).all():
        raise InvalidInputError(f"a law is of 1 to {TOTAL // 2} finite logits")
    grid = np.rint(values * GRID).astype(np.int64)
    weight = _EXP[np.minimum(grid.max(-1, keepdims=True) - grid, _SPAN)]
    free = TOTAL - values.shape[-1]
    counts: Ints = 1 + weight * free // weight.sum(-1, keepdims=True)
    best = counts.argmax(-1)[..., None]
    rest = TOTAL - counts.sum(-1, keepdims=True)
    np.put_along_axis(counts, best, np.take_along_axis(counts, best, -1) + rest, -1)
    return counts


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums in one order: a single thread, as long as the block runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
