"""Does a decoder draw from the law it promises? Joint strings against enumerated probabilities."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from isthmus.decoding.acceptance import Lossless
from isthmus.decoding.engine import Request, decode
from isthmus.decoding.stopping import Stopper
from isthmus.decoding.table import TableTarget
from isthmus.roles import Acceptance, Law, Policy


def goodness_of_fit(counts: Sequence[float], expected: Sequence[float]) -> float:
    """Pearson's chi-square test; cells that expect fewer than 5 are pooled.

    Args:
        counts: Observed counts.
        expected: Expected counts of the same cells; both sum to the same number.

    Returns:
        Probability of a deviation at least this large under the expected law; 1.0 when a single
        cell is left.

    Example:
        >>> goodness_of_fit([50, 50], [50.0, 50.0])
        1.0
        >>> goodness_of_fit([80, 20], [50.0, 50.0]) < 1e-8
        True
    """
    seen, hoped = [], []
    small_seen = small_hoped = 0.0
    for count, mean in zip(counts, expected, strict=True):
        if mean < 5.0:
            small_seen, small_hoped = small_seen + count, small_hoped + mean
        else:
            seen.append(float(count))
            hoped.append(float(mean))
    if small_hoped >= 5.0 or not seen:
        seen.append(small_seen)
        hoped.append(small_hoped)
    elif small_seen or small_hoped:
        seen[-1] += small_seen
        hoped[-1] += small_hoped
    if len(seen) < 2:
        return 1.0
    statistic = sum((s - h) ** 2 / h for s, h in zip(seen, hoped, strict=True))
    half = torch.tensor([(len(seen) - 1) / 2.0, statistic / 2.0], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


@dataclass(frozen=True)
class StringTest:
    """Outcome of :func:`string_test`.

    Attributes:
        p: Probability of a deviation at least this large if the law is kept.
        impossible: Answers that came out although the law excludes them.
        strings: Answers with a probability above 0.
        acceptance_length: Mean tokens emitted per target forward.
    """

    p: float
    impossible: int
    strings: int
    acceptance_length: float


def string_test(
    policy: Policy,
    *,
    target: TableTarget,
    law: Law,
    acceptance: Acceptance | None = None,
    prompt: Sequence[int] = (0, 1, 2, 1, 0, 1),
    tokens: int = 3,
    rows: int = 4000,
    seed: int = 0,
) -> StringTest:
    """Decode one prompt in many identical rows and compare the answers with their true law.

    The joint law of whole answers is tested, not that of single tokens: mistakes of the cache
    show from the second token on.

    Args:
        policy: Who drafts and how much.
        target: A target whose law can be enumerated.
        law: The sampling law.
        acceptance: The acceptance rule; the exact one when None.
        prompt: Token ids.
        tokens: New tokens.
        rows: Rows decoded at once.
        seed: Seed of every draw.
    """
    ends = [] if target.end_token is None else [target.end_token]
    requests = [
        Request(torch.tensor(list(prompt)), Stopper(max_new_tokens=tokens, end_tokens=ends))
        for _ in range(rows)
    ]
    rule = acceptance or Lossless()
    rounds = decode(
        target,
        requests,
        policy=policy,
        acceptance=rule,
        law=law,
        generator=torch.Generator().manual_seed(seed),
    )
    for _ in rounds:
        pass
    truth = target.truth(prompt, tokens, law)
    counts = Counter(tuple(r.result.tokens) for r in requests)
    possible = [answer for answer, p in truth.items() if p > 0.0]
    impossible = sum(n for answer, n in counts.items() if truth.get(answer, 0.0) <= 0.0)
    p = goodness_of_fit(
        [counts[answer] for answer in possible], [rows * truth[answer] for answer in possible]
    )
    forwards = sum(r.result.stats.target_forwards for r in requests)
    emitted = sum(r.result.stats.new_tokens for r in requests)
    return StringTest(p, impossible, len(possible), emitted / max(1, forwards))
