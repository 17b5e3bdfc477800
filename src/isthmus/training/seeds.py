"""Draws of a batch that follow from numbers alone, so that a resumed training repeats them."""

from __future__ import annotations

import torch

_STRIDE = 1_000_003
"""More than a training has batches, and small: of a seed torch keeps the lower 32 bits."""


def draw_seed(seed: int, part: int) -> int:
    """One number for a training's seed and the number of a batch.

    Example:
        >>> draw_seed(2, 5)
        2000011
    """
    return seed * _STRIDE + part


def batch_generator(seed: int, part: int, device: str | torch.device = "cpu") -> torch.Generator:
    """Generator of what is drawn for one batch.

    Args:
        seed: Of the training.
        part: Number of the batch, from 0; a second kind of draws may count down from -1.
        device: Where it draws.

    Example:
        >>> a, b, c = (batch_generator(s, p).initial_seed() for s, p in ((0, 7), (0, 7), (1, 7)))
        >>> a == b, a == c
        (True, False)
    """
    return torch.Generator(device).manual_seed(draw_seed(seed, part))
