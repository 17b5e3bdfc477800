"""How well a translation model of dates aligns: the year comes from the year, the day from the day.

Each digit of an ISO date comes from one field of the date as people write it, and the `dates` data
set knows where that stands. A target token is aligned wrongly where the source token that a head
looks at most lies outside of the fields that the target token writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from isthmus.models.encoder_decoder import EncoderDecoder
from isthmus.training.guided_alignment import aligned
from isthmus.training.text import padded_ids
from isthmus.workbench.dates import Example, fields


def overlaps(offsets: Sequence[tuple[int, int]], spans: Sequence[range]) -> torch.Tensor:
    """Which tokens have a character of which span, bool [T, N].

    Args:
        offsets: First character of every token, and the one behind its last.
        spans: Characters.

    Example:
        >>> overlaps([(0, 2), (2, 3), (3, 3)], [range(1, 3)]).flatten().tolist()
        [True, True, False]
    """
    first, last = torch.tensor(offsets).unbind(1)
    begin, end = torch.tensor([[s.start, s.stop] for s in spans]).unbind(1)
    found: torch.Tensor = (first[:, None] < end) & (last[:, None] > begin)
    return found & (last > first)[:, None]


def alignment_error(network: EncoderDecoder, tokenizer: Any, examples: Sequence[Example]) -> float:
    """Share of target tokens whose source is sought in another field, by the head that is tapped.

    The right answer is given; tokens that write no field, such as the end, do not count.

    Args:
        network: The model.
        tokenizer: Of both sides.
        examples: Dates.
    """
    wrong = counted = 0
    encode = tokenizer.backend_tokenizer.encode_batch
    for start in range(0, len(examples), 64):
        some = examples[start : start + 64]
        sides = [e.source for e in some], [e.target for e in some]
        weights = aligned(network, *(padded_ids(tokenizer, side, 0) for side in sides))
        best = weights.argmax(-1)
        for row, (example, source, target) in enumerate(
            zip(some, *(encode(side) for side in sides), strict=True)
        ):
            spans = fields(example)
            read = overlaps(source.offsets, [span for span, _ in spans])  # [S, 3]
            written = overlaps(target.offsets, [span for _, span in spans])  # [T, 3]
            right = (read[best[row, : len(written)]] & written).any(1)
            counts = written.any(1)
            counted += int(counts.sum())
            wrong += int((counts & ~right).sum())
    return wrong / counted
