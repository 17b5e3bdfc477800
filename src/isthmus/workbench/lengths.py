"""Lengths spread like those of speech corpora, and how much of their batches is padding."""

from __future__ import annotations

from typing import Any

import numpy as np

from isthmus.training.buckets import Buckets2D, BucketSampler, Profile, batch_sizes


def cost(seconds: Any, tokens: Any) -> Any:
    """Relative cost of examples: linear maps and attention of encoder and decoder, [N].

    Example:
        >>> cost(8.0, 20.0)  # 100 frames: 4000 + 625 + 1000 + 20 + 200
        5845.0
    """
    t, u = 12.5 * seconds, tokens  # frames behind a subsampling by 8
    return 40 * t + t**2 / 16 + 50 * u + 0.05 * u**2 + 0.1 * t * u


def spread(count: int = 20_000, seed: int = 0) -> tuple[Any, Any]:
    """Seconds and tokens of as many examples, [N] each."""
    rng = np.random.default_rng(seed)
    seconds = np.exp(rng.normal(1.9, 0.75, 2 * count))
    seconds = seconds[(seconds >= 0.5) & (seconds <= 40)][:count]
    tokens = np.round(seconds * rng.normal(3.5, 1, count)) + rng.geometric(0.2, count)
    return seconds, np.maximum(1, tokens)


def waste(seconds: Any, tokens: Any, parts: int, subparts: int) -> Profile:
    """Padding in buckets whose batches cost as much as four of the longest.

    Args:
        seconds: [N].
        tokens: [N].
        parts: Buckets by duration; 0 is none: 16 examples are drawn at random.
        subparts: Buckets by tokens in each.
    """
    bucket, sizes = np.zeros(len(seconds), np.int64), [16]
    if parts:
        buckets = Buckets2D.estimate(seconds, tokens, parts, subparts)
        bucket, cap = buckets.assign(seconds, tokens), 4 * cost(seconds.max(), tokens.max())
        sizes = batch_sizes(buckets.bounds, lambda i, o, n: n * cost(i, o) <= cap, tolerance=0)
    return Profile.of(seconds, tokens, BucketSampler(bucket, sizes).epoch(), cost)
