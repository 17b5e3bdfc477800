"""Long sound to be heard as it arrives, and what hearing it costs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from isthmus.signals.audio import Recording
from isthmus.training.data import Spoken
from isthmus.workbench.speech import RATE, corpus


def number_streams(count: int, most_s: float, seed: int = 2) -> list[Spoken]:
    """Held-out numbers one after another, in faint noise.

    Args:
        count: Streams.
        most_s: Seconds of the longest, roughly; the shortest has half as many.
        seed: Of numbers, lengths and noise.
    """
    generator = torch.Generator().manual_seed(seed)
    wanted = most_s * (0.5 + 0.5 * torch.rand(count, generator=generator))
    numbers = iter(corpus("numbers", "held-out", int(count * most_s), seed=seed))
    found: list[Spoken] = []
    for length in (wanted * RATE).tolist():
        parts: list[torch.Tensor] = []
        texts: list[str] = []
        while sum(map(len, parts)) < length:  # a number takes at least half a second
            utterance = next(numbers)
            parts += [utterance.samples, torch.zeros(RATE // 4)]
            texts.append(utterance.line.target)
        sound = torch.cat(parts)
        sound = sound + 1e-3 * torch.randn(len(sound), generator=generator)
        found.append(Spoken(Recording(samples=sound), ", ".join(texts)))
    return found


def multiply_adds(work: Callable[[], object]) -> float:
    """Multiply-adds of the matrix products and convolutions of some work.

    Example:
        >>> a, b = torch.ones(2, 3), torch.ones(3, 5)
        >>> multiply_adds(lambda: a @ b)
        30.0
    """
    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops() / 2)
