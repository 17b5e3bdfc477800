"""From frame-wise scores of a CTC model to texts: the best path, or a beam over prefixes.

A path has one token a frame; its text is the path without repeats, then without blanks. The best
path is one path of the text it gives; the prefix beam sums over all paths of a text, with one sum
for those that end in a blank and one for the others, since only the former may repeat a token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from isthmus.errors import InvalidInputError
from isthmus.objectives.ctc import BLANK

LanguageModel = Callable[[tuple[int, ...]], float]
"""Log-probability of the last token of a prefix given those before it."""


@dataclass(frozen=True)
class Transcript:
    """A text found in a row of frames.

    Attributes:
        tokens: Without blanks.
        logprob: Of the best path (:func:`greedy`), or of all paths of the text that the beam kept.
        score: What texts are ranked by: ``logprob`` plus what a language model says.
        frames: Frame at which each token was first emitted.
    """

    tokens: tuple[int, ...]
    logprob: float
    score: float
    frames: tuple[int, ...]


def greedy(log_probs: torch.Tensor, lengths: torch.Tensor) -> list[Transcript]:
    """The text of the best path.

    Args:
        log_probs: [B, T, V].
        lengths: Valid frames [B].

    Example:
        >>> path = torch.tensor([[1, 1, 0, 1, 2, 0]])
        >>> scores = torch.nn.functional.one_hot(path, 3).float().log_softmax(-1)
        >>> found = greedy(scores, torch.tensor([6]))[0]
        >>> found.tokens, found.frames
        ((1, 1, 2), (0, 3, 4))
    """
    best, path = log_probs.max(-1)
    fresh = path != BLANK
    fresh[:, 1:] &= path[:, 1:] != path[:, :-1]
    found = []
    for row, new, score, length in zip(path, fresh, best, lengths.tolist(), strict=True):
        frames = new[:length].nonzero()[:, 0]
        total = float(score[:length].sum())
        found.append(Transcript(tuple(row[frames].tolist()), total, total, tuple(frames.tolist())))
    return found


def prefix_beam(
    log_probs: torch.Tensor,
    width: int = 16,
    candidates: int = 0,
    *,
    language_model: LanguageModel | None = None,
    weight: float = 0.5,
    bonus: float = 0.0,
) -> list[Transcript]:
    """Texts of one row by their total probability, best first.

    Args:
        log_probs: [T, V], the valid frames.
        width: Prefixes kept after each frame; 0 keeps all, and the sums are then exact.
        candidates: Tokens tried at each frame; 0 tries all.
        language_model: Scores a prefix as it grows; its sum is kept apart from the acoustic ones.
        weight: Of the language model.
        bonus: Added for every token.

    Raises:
        InvalidInputError: There is no frame, or a number is negative.

    Example:
        >>> scores = torch.tensor([[0.6, 0.4], [0.6, 0.4]]).log()
        >>> [(t.tokens, round(math.exp(t.logprob), 2)) for t in prefix_beam(scores)]
        [((1,), 0.64), ((), 0.36)]
    """
    if log_probs.ndim != 2 or not len(log_probs) or width < 0 or candidates < 0:
        raise InvalidInputError(
            f"a prefix beam takes scores [T, V] and numbers from 0, got {list(log_probs.shape)}, "
            f"width {width} and {candidates} candidates"
        )
    vocab = log_probs.shape[1]
    top = log_probs.topk(min(candidates or vocab, vocab), -1)
    blanks = log_probs[:, BLANK].tolist()
    # prefix -> log p of its paths that end in a blank, and of those that do not
    beam: dict[tuple[int, ...], tuple[float, float]] = {(): (0.0, -math.inf)}
    told: dict[tuple[int, ...], float] = {(): 0.0}
    when: dict[tuple[int, ...], tuple[int, ...]] = {(): ()}

    def said(prefix: tuple[int, ...]) -> float:
        if language_model is None:
            return bonus * len(prefix)
        if prefix not in told:
            told[prefix] = said(prefix[:-1]) + weight * language_model(prefix) + bonus
        return told[prefix]

    def rank(item: tuple[tuple[int, ...], tuple[float, float]]) -> float:
        return _plus(*item[1]) + said(item[0])

    for frame, (values, tokens) in enumerate(
        zip(top.values.tolist(), top.indices.tolist(), strict=True)
    ):
        grown: dict[tuple[int, ...], tuple[float, float]] = {}
        entered: dict[tuple[int, ...], tuple[int, ...]] = {}

        def add(prefix: tuple[int, ...], ends_blank: float, ends_token: float) -> None:
            old = grown.get(prefix, (-math.inf, -math.inf))  # noqa: B023
            grown[prefix] = _plus(old[0], ends_blank), _plus(old[1], ends_token)  # noqa: B023

        offered = dict(zip(tokens, values, strict=True))
        for prefix, (in_blank, in_token) in beam.items():
            last = prefix[-1] if prefix else BLANK
            total = _plus(in_blank, in_token)
            stays = in_token + offered[last] if prefix and last in offered else -math.inf
            add(prefix, total + blanks[frame], stays)
            for token, value in offered.items():
                if token == BLANK:
                    continue
                longer = (*prefix, token)
                new = (in_blank if token == last else total) + value
                if new == -math.inf:
                    continue
                if longer not in beam or new > _plus(*beam[longer]):
                    entered[longer] = (*when[prefix], frame)
                add(longer, -math.inf, new)
        kept = sorted(grown.items(), key=rank, reverse=True)[: width or None]
        beam = dict(kept)
        when = {prefix: entered.get(prefix) or when[prefix] for prefix in beam}
    return [
        Transcript(prefix, _plus(*sums), rank((prefix, sums)), when[prefix])
        for prefix, sums in sorted(beam.items(), key=rank, reverse=True)
    ]


def _plus(a: float, b: float) -> float:
    """log(exp(a) + exp(b))."""
    high, low = (a, b) if a > b else (b, a)
    return high if low == -math.inf else high + math.log1p(math.exp(low - high))


def windows(length: int, size: int, context: int) -> list[tuple[int, int, int, int]]:
    """Overlapping windows over a long sound, and the part of each that is used.

    What lies within ``context`` of an inner edge of a window is left to its neighbour.

    Args:
        length: Of the sound.
        size: Of a window, more than twice the context.
        context: See above.

    Returns:
        Start and end of each window, and of its used part; the used parts follow one another.

    Raises:
        InvalidInputError: The windows are too small for their context.

    Example:
        >>> windows(10, 6, 1)
        [(0, 6, 0, 5), (4, 10, 5, 10)]
    """
    if context < 0 or size <= 2 * context:
        raise InvalidInputError(
            f"a window is longer than twice its context, got {size} and {context}"
        )
    found, start = [], 0
    while start + size < length:
        used = 0 if start == 0 else start + context
        found.append((start, start + size, used, start + size - context))
        start += size - 2 * context
    return [*found, (start, max(length, start), 0 if start == 0 else start + context, length)]
