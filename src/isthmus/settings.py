"""Settings: frozen dataclasses, read from strings as people give them and from JSON."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from isthmus.errors import InvalidInputError

S = TypeVar("S")


def pairs(words: Sequence[str], option: str = "--set") -> dict[str, str]:
    """Split ``name=value`` words.

    Raises:
        InvalidInputError: A word is no such pair.

    Example:
        >>> pairs(["width=4", "kind=a=b"])
        {'width': '4', 'kind': 'a=b'}
    """
    found = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name.strip():
            raise InvalidInputError(f"{option} takes name=value, got {word!r}")
        found[name.strip()] = value.strip()
    return found


def changed(settings: S, given: Mapping[str, str], owner: str = "") -> S:
    """Settings with some fields set from strings, as a command line gives them.

    Args:
        settings: A frozen dataclass.
        given: Values by the name of their field; JSON, or a bare word.
        owner: Whose settings they are, for messages.

    Raises:
        InvalidInputError: No such field, or a value of the wrong kind.

    Example:
        >>> @dataclasses.dataclass(frozen=True)
        ... class Size:
        ...     width: int = 4
        ...     kernels: tuple[int, ...] = (3, 5)
        >>> changed(Size(), {"width": "8", "kernels": "[7]"})
        Size(width=8, kernels=(7,))
    """
    known: Any = settings
    names = [f.name for f in dataclasses.fields(known)]
    values: dict[str, Any] = {}
    for name, text in given.items():
        if name not in names:
            whose = owner or type(settings).__name__
            raise InvalidInputError(
                f"no setting {name!r}; {whose} has: {', '.join(names) or 'none'}"
            )
        now = getattr(settings, name)
        value: Any = text
        if not isinstance(now, str):
            with contextlib.suppress(ValueError):
                value = json.loads(text)
        wrong = now is not None and not isinstance(value, (type(now), int, list))
        if wrong or (isinstance(now, bool) and not isinstance(value, bool)):
            raise InvalidInputError(f"{name} takes values like {now!r}, got {text!r}")
        values[name] = value
    changed_settings: S = dataclasses.replace(known, **tuples(values))
    return changed_settings


def tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON knows lists only, settings hold tuples."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
