"""A slice of the official JSON Schema Test Suite, and how much of it an engine holds.

The files are those of draft 2020-12 as they come with the source of the package jsonschema, under
the MIT licence in ``LICENSE`` beside them: 27 keywords, each a list of groups, each group a schema
with instances that are valid or not.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from isthmus.decoding.constraint import UnsupportedConstraint
from isthmus.errors import BrokenFileError

SUITE = Path(__file__).parent
"""A slice of the official JSON Schema Test Suite, draft 2020-12."""

Group = Mapping[str, Any]
"""A group of the suite: a schema and instances that are valid or not."""

Engine = Callable[[Any], Callable[[str], bool]]
"""From a schema to a judge of whole texts; refuses what it cannot hold."""


@dataclass(frozen=True)
class Coverage:
    """How much of a suite an engine holds.

    Attributes:
        groups: Schemas asked.
        declared: Schemas compiled without refusal.
        exact: Of these, those whose instances are all judged rightly.
        under: Invalid instances let through.
        over: Valid instances refused.

    Example:
        >>> Coverage(groups=4, declared=2, exact=1, under=0, over=1).compliance
        0.5
    """

    groups: int
    declared: int
    exact: int
    under: int
    over: int

    @property
    def compliance(self) -> float:
        """Share of the declared schemas that are held exactly."""
        return self.exact / max(1, self.declared)


@lru_cache
def suite(folder: Path = SUITE) -> tuple[Group, ...]:
    """All groups of a folder in the format of the official suite.

    Raises:
        BrokenFileError: There is none, or a file is damaged.
    """
    try:
        files = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(folder.glob("*.json"))]
        groups = tuple({k: g[k] for k in ("schema", "tests")} for file in files for g in file)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BrokenFileError(f"{folder} is no JSON Schema Test Suite ({error})") from error
    if not groups:
        raise BrokenFileError(f"{folder} holds no files of the JSON Schema Test Suite")
    return groups


def coverage(groups: Iterable[Group], engine: Engine) -> Coverage:
    """Compile every schema and judge its instances.

    Example:
        >>> group = {"schema": True, "tests": [{"data": 1, "valid": True}]}
        >>> coverage([group], lambda schema: lambda text: False)
        Coverage(groups=1, declared=1, exact=0, under=0, over=1)
    """
    count = declared = exact = under = over = 0
    for group in groups:
        count += 1
        try:
            accepts = engine(group["schema"])
        except UnsupportedConstraint:
            continue
        declared += 1
        wrong = [
            test["valid"]
            for test in group["tests"]
            if accepts(json.dumps(test["data"], ensure_ascii=False)) != test["valid"]
        ]
        over += sum(wrong)
        under += len(wrong) - sum(wrong)
        exact += not wrong
    return Coverage(count, declared, exact, under, over)
