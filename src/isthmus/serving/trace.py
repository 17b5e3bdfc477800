"""The rounds of one answer, as the page at ``/`` shows them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from isthmus.roles import RoundTrace


@dataclass(frozen=True)
class TraceRound:
    """One event of ``/api/trace``: a round of the decoding loop.

    Attributes:
        drafter: Who proposed: ``"none"``, a drafter, or ``"constraint"`` for forced text.
        emitted: Texts of the tokens that stand, in order; the last one is the target's own.
        accepted: How many of them were drafted.
        drafted: Texts of all drafted tokens.
        parents: For every drafted token the draft it follows, -1 for the last token before.
        stands: For every drafted token whether it was accepted.
        seconds: Time since the request began.
        forwards: Forwards of the target so far.
        tokens: Tokens so far.
    """

    drafter: str
    emitted: list[str]
    accepted: int
    drafted: list[str]
    parents: list[int]
    stands: list[bool]
    seconds: float
    forwards: int
    tokens: int


def trace_round(
    made: RoundTrace,
    tokens: Sequence[int],
    text: Callable[[int], str],
    *,
    seconds: float,
    forwards: int,
    count: int,
) -> TraceRound:
    """A round of the loop as the page shows it.

    Args:
        made: The round, traced.
        tokens: What it emitted.
        text: Text of a token.
        seconds: See :class:`TraceRound`.
        forwards: See :class:`TraceRound`.
        count: Tokens so far.

    Example:
        >>> made = RoundTrace("d", 3, 1, 2, drafted=(7, 8, 9), parents=(0, 0, 2))
        >>> found = trace_round(made, [8, 5], str, seconds=0.1, forwards=1, count=2)
        >>> found.stands, found.parents, found.emitted
        ([False, True, False], [-1, -1, 1], ['8', '5'])
    """
    drafted, parents = list(made.drafted), [parent - 1 for parent in made.parents]
    stands = [False] * len(drafted)
    at = -1
    for token in tokens[: made.accepted]:  # walk down the accepted path
        for node, (other, parent) in enumerate(zip(drafted, parents, strict=True)):
            if other == token and parent == at and not stands[node]:
                stands[node], at = True, node
                break
    alive = [i for i, token in enumerate(drafted) if token >= 0]
    place = {old: new for new, old in enumerate(alive)}
    return TraceRound(
        made.drafter,
        [text(t) for t in tokens],
        min(made.accepted, len(tokens)),
        [text(drafted[i]) for i in alive],
        [place.get(parents[i], -1) for i in alive],
        [stands[i] for i in alive],
        round(seconds, 4),
        forwards,
        count,
    )
