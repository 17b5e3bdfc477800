"""How much of a meaning a text gets wrong."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

Slots = Mapping[str, Collection[str]]
"""Values by slot; a slot with a list has several."""


def slot_errors(wanted: Slots, said: Slots) -> int:
    """Values that a text misses, adds, or says wrongly (which is both, and counts once).

    Example:
        >>> slot_errors({"food": ["thai"], "near": ["cafe"]}, {"food": ["fast"], "price": ["low"]})
        3
    """
    total = 0
    for slot in wanted.keys() | said.keys():
        right, given = set(wanted.get(slot, ())), set(said.get(slot, ()))
        total += max(len(right - given), len(given - right))
    return total


def slot_error_rate(pairs: Iterable[tuple[Slots, Slots]]) -> float:
    """SER: slot errors of all texts over the values that they should say (Wen et al. 2015).

    Args:
        pairs: What each text should say, and what it says.

    Example:
        >>> slot_error_rate([({"food": ["thai"], "near": ["cafe"]}, {"food": ["thai"]})])
        0.5
    """
    wrong = count = 0
    for wanted, said in pairs:
        wrong += slot_errors(wanted, said)
        count += sum(len(set(values)) for values in wanted.values())
    return wrong / count if count else 0.0
