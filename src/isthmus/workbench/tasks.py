"""Small prompt tasks for comparing decoders: how well drafting works depends on the text.

Each task gives prompts of token ids. Text comes from the held-out files of
:mod:`isthmus.workbench.pycode` or is generated; nothing here was trained on.

=============  ====================================================================
``continue``   go on with a held-out Python file
``docstring``  write the body below a held-out function's head and docstring
``quote``      repeat an excerpt that stands in the prompt (copying)
``dates``      go on with a table of dates in two notations (far from the corpus)
``numbers``    go on with a table of numbers and their squares (far from the corpus)
=============  ====================================================================
"""

from __future__ import annotations

import ast
import datetime
import functools
import random
from collections.abc import Callable

from isthmus.errors import InvalidInputError, UnknownNameError
from isthmus.workbench import pycode

PROMPT_TOKENS = 96
"""Tokens of a prompt at most."""

QUOTED_TOKENS = 64
"""Tokens of the excerpt that ``quote`` repeats."""


def prompts(task: str, count: int, tokenizer: pycode.Encoder, *, seed: int = 0) -> list[list[int]]:
    """Prompts of one task.

    Args:
        task: A name in :data:`TASKS`.
        count: How many, at least 1.
        tokenizer: Any tokenizer with the ``encode`` of transformers.
        seed: Other seeds give other prompts.

    Returns:
        Token ids of each prompt, at most :data:`PROMPT_TOKENS` long.

    Raises:
        UnknownNameError: No such task.
        InvalidInputError: ``count`` is below 1, or the held-out files hold too little for it.
    """
    if task not in TASKS:
        raise UnknownNameError("task", task, TASKS)
    if count < 1:
        raise InvalidInputError(f"count must be at least 1, got {count}")
    # a string, so that two tasks of one seed do not draw the same numbers
    return TASKS[task](count, tokenizer, random.Random(f"{task}/{seed}"))


def _continue(count: int, tokenizer: pycode.Encoder, source: random.Random) -> list[list[int]]:
    return pycode.prompts(count, tokenizer, PROMPT_TOKENS, seed=source.randrange(2**32))


def _quote(count: int, tokenizer: pycode.Encoder, source: random.Random) -> list[list[int]]:
    size = QUOTED_TOKENS
    excerpts = pycode.prompts(count, tokenizer, size, seed=source.randrange(2**32))
    again = tokenizer.encode("\n\n# The same lines again:\n", add_special_tokens=False)
    room = PROMPT_TOKENS - size - len(again)
    return [[*excerpt, *again, *excerpt[:room]] for excerpt in excerpts]


def _docstring(count: int, tokenizer: pycode.Encoder, source: random.Random) -> list[list[int]]:
    heads = list(_all_heads())
    source.shuffle(heads)
    found = []
    for head in heads:
        ids = tokenizer.encode(head, add_special_tokens=False)
        if 24 <= len(ids) <= PROMPT_TOKENS:
            found.append(ids)
        if len(found) == count:
            return found
    raise InvalidInputError(f"the held-out files hold only {len(found)} functions for 'docstring'")


@functools.lru_cache(maxsize=1)
def _all_heads() -> tuple[str, ...]:
    return tuple(head for text in pycode.texts("held-out") for head in _heads(text))


def _heads(text: str) -> list[str]:
    """Heads of functions with their docstrings, up to the indentation of the first line."""
    lines = text.splitlines(keepends=True)
    found = []
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) and len(node.body) > 1:
            end = node.body[0].end_lineno or node.lineno
            head = "".join(lines[node.lineno - 1 : end])
            found.append(head + " " * node.body[0].col_offset)
    return found


def _dates(count: int, tokenizer: pycode.Encoder, source: random.Random) -> list[list[int]]:
    def line() -> str:
        day = datetime.date(1950, 1, 1) + datetime.timedelta(days=source.randrange(36_000))
        return f"{day.isoformat()} | {day.day} {day:%B %Y}\n"

    return _lines(count, tokenizer, line)


def _numbers(count: int, tokenizer: pycode.Encoder, source: random.Random) -> list[list[int]]:
    def line() -> str:
        n = source.randrange(10, 1000)
        return f"{n} {n * n} {n + n}\n"

    return _lines(count, tokenizer, line)


def _lines(count: int, tokenizer: pycode.Encoder, line: Callable[[], str]) -> list[list[int]]:
    """Prompts of as many whole lines as there is room for."""
    found = []
    for _ in range(count):
        ids: list[int] = []
        while True:
            more = tokenizer.encode(line(), add_special_tokens=False)
            if ids and len(ids) + len(more) > PROMPT_TOKENS:
                break
            ids += more[:PROMPT_TOKENS]
        found.append(ids)
    return found


TASKS: dict[str, Callable[[int, pycode.Encoder, random.Random], list[list[int]]]] = {
    "continue": _continue,
    "docstring": _docstring,
    "quote": _quote,
    "dates": _dates,
    "numbers": _numbers,
}
"""All tasks by name."""
