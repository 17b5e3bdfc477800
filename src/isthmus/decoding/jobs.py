"""Answers to a file of prompts: JSON lines in, JSON lines out, resumable.

A line of the input is an object with the field ``prompt`` and, where wanted, ``id``,
``max_new_tokens`` and ``seed``. A line of the output holds ``id`` (the number of the input line
where it has none), ``text``, ``finish_reason``, ``prompt_tokens`` and ``new_tokens``; a prompt that
cannot be answered has the reason ``"error"`` and the field ``error``.

Answers finish out of order. They are written as they come to a journal beside the output, each
with the number of its line, so that an interruption loses none of them; when all are there, they
are put in the order of the input and appear as the output file, whole.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from isthmus import cluster
from isthmus.decoding.generation import Generation
from isthmus.decoding.model import Model, Prompt
from isthmus.errors import BrokenFileError, InvalidInputError, MismatchError

FIELDS = {"prompt": (str,), "id": (str, int), "max_new_tokens": (int,), "seed": (int,)}
"""Fields of an input line, and their kinds."""

SHARE = 8
"""Lines that a worker of a cluster gets at once, in batches: its places stay filled that long."""


@dataclass(frozen=True)
class Line:
    """One line of the input.

    Attributes:
        number: Its number, from 1.
        id: What its answer is called.
        prompt: What is asked.
    """

    number: int
    id: str | int
    prompt: Prompt


def read_lines(lines: Iterable[str], name: str) -> list[Line]:
    """Read prompts, one JSON object a line; blank lines are passed over.

    Args:
        lines: The lines.
        name: What to call them in messages.

    Raises:
        InvalidInputError: A line is no such object, or there is none; it is named by its number.

    Example:
        >>> read_lines(['{"prompt": "def f(", "id": "a"}'], "prompts.jsonl")[0].id
        'a'
    """
    found = []
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            given = json.loads(text)
        except json.JSONDecodeError as error:
            raise InvalidInputError(
                f"{name}, line {number}: no JSON ({error.msg} at column {error.colno})"
            ) from error
        if not isinstance(given, dict):
            raise InvalidInputError(f'{name}, line {number}: give an object like {{"prompt": ...}}')
        for field, value in given.items():
            if field not in FIELDS:
                raise InvalidInputError(
                    f"{name}, line {number}: unknown field {field!r}; it takes {', '.join(FIELDS)}"
                )
            if not isinstance(value, FIELDS[field]) or isinstance(value, bool):
                kinds = " or ".join(kind.__name__ for kind in FIELDS[field])
                raise InvalidInputError(f"{name}, line {number}: {field!r} must be of type {kinds}")
        if not given.get("prompt"):
            raise InvalidInputError(f"{name}, line {number}: there is no 'prompt', or it is empty")
        if given.get("max_new_tokens", 1) < 1:
            raise InvalidInputError(f"{name}, line {number}: 'max_new_tokens' must be at least 1")
        prompt = Prompt(given["prompt"], given.get("max_new_tokens"), given.get("seed"))
        found.append(Line(number, given.get("id", number), prompt))
    if not found:
        raise InvalidInputError(f'{name} holds no prompts; give lines like {{"prompt": "..."}}')
    return found


def answer(line: Line, result: Generation) -> dict[str, Any]:
    """The output line of an answer."""
    row = {
        "id": line.id,
        "text": result.text,
        "finish_reason": result.finish_reason,
        "prompt_tokens": result.prompt_tokens,
        "new_tokens": result.stats.new_tokens,
    }
    return row | ({"error": result.notes[-1]} if result.finish_reason == "error" else {})


def answers(
    model: Model, lines: Sequence[Line], *, seed: int, **options: Any
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Answer lines with continuous batching.

    Args:
        model: The model.
        lines: What is asked.
        seed: Key of the draws of all lines without a seed of their own; each has its own noise,
            whichever lines it is answered with.
        options: As for :meth:`isthmus.decoding.model.Model.generate_many`.

    Yields:
        Number of a line and its answer, as they finish.
    """
    prompts = (
        Prompt(p.prompt, p.max_new_tokens, seed * 1_000_003 + n if p.seed is None else p.seed)
        for n, p in ((line.number, line.prompt) for line in lines)
    )
    for place, result in model.generate_many(prompts, **options):
        yield lines[place].number, answer(lines[place], result)


def _answerer(make: Callable[[], Model], options: dict[str, Any]) -> cluster.Work:
    """What a worker of a cluster does: its model is made here."""
    model = make()

    def work(items: list[Any]) -> Iterator[Any]:
        lines = [Line(number, name, Prompt(*prompt)) for number, name, prompt in items]
        return answers(model, lines, **options)

    return work


def answers_on_ray(
    make: Callable[[], Model],
    lines: Sequence[Line],
    *,
    batch_size: int,
    workers: int = 0,
    **options: Any,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Answer lines on a Ray cluster, the one at ``RAY_ADDRESS`` or one on this machine.

    Args:
        make: Loads the model in a worker.
        lines: What is asked.
        batch_size: Rows at work in each worker at most.
        workers: Workers, each with its own copy of the model; one for each GPU of the cluster, or
            one for each machine, when 0.
        options: As for :func:`answers`.

    Yields:
        Number of a line and its answer, in blocks as workers finish them.

    Raises:
        MissingExtraError: Ray is not installed.
    """
    items = [[line.number, line.id, list(vars(line.prompt).values())] for line in lines]
    work = partial(_answerer, make, {"batch_size": batch_size, **options})
    found = cluster.spread(work, items, block=SHARE * batch_size, workers=workers)
    yield from map(tuple, found)


class Journal:
    """Answers that are finished, in a file beside the output.

    The first line says what was asked; it has to stay the same when a job goes on.

    Args:
        output: The file that will hold all answers.
        lines: The text of the input.
        settings: Whatever changes an answer, as plain data.
        seed: Key of the draws; that of an earlier run is kept.

    Attributes:
        path: The journal.
        seed: As given, or as it was.
        done: Numbers of the lines that have an answer.

    Raises:
        InvalidInputError: The output is there already.
        MismatchError: The journal is that of another job.
        BrokenFileError: The journal is damaged, or cannot be read or written.
    """

    def __init__(self, output: Path, lines: str, settings: dict[str, Any], seed: int) -> None:
        self.output, self.path = output, output.with_name(f"{output.name}.part")
        if output.exists():
            raise InvalidInputError(f"{output} is there already; remove it or choose another name")
        self._header = {
            "input": hashlib.sha256(lines.encode()).hexdigest(),
            "settings": settings,
            "seed": seed,
        }
        self._places: dict[int, int] = {}  # where the answer to a line begins
        self._file: BinaryIO | None = None  # opened with the first answer
        with self._writing():
            whole = self._whole()
            if not os.access(output.parent, os.W_OK):
                raise PermissionError(0, "no folder that can be written")
        self._length = len(whole)
        self.seed = self._check(whole) if whole else seed

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise BrokenFileError(
                f"{self.path} cannot be written ({error.strerror}); choose another --output"
            ) from error

    def _whole(self) -> bytes:
        """The finished lines of an earlier run."""
        if not self.path.exists():
            return b""
        text = self.path.read_bytes()
        return text[: text.rfind(b"\n") + 1]

    def _check(self, whole: bytes) -> int:
        """Read an earlier run's answers; returns its seed."""
        place = 0
        for number, text in enumerate(whole.splitlines(keepends=True), 1):
            try:
                row = json.loads(text)
                if number == 1:
                    before = dict(row["settings"]), row["input"], int(row["seed"])
                else:
                    self._places[int(row["line"])] = place
            except (ValueError, KeyError, TypeError) as error:
                raise BrokenFileError(
                    f"{self.path}, line {number} is damaged; remove the file to begin anew"
                ) from error
            place += len(text)
        settings, digest, seed = before
        if digest != self._header["input"]:
            raise MismatchError(
                f"the input has changed since {self.path} was begun; give the same prompts, or "
                "remove that file to begin anew"
            )
        now = json.loads(json.dumps(self._header["settings"]))
        for name in sorted({*settings, *now}):
            if settings.get(name) != now.get(name):
                raise MismatchError(
                    f"{self.path} was begun with {name} {settings.get(name)!r}, not "
                    f"{now.get(name)!r}; give the same settings, or remove that file"
                )
        return seed

    @property
    def done(self) -> set[int]:
        """Numbers of the lines that have an answer."""
        return set(self._places)

    def add(self, number: int, row: dict[str, Any]) -> None:
        """Write the answer to a line.

        Raises:
            BrokenFileError: The journal cannot be written.
        """
        with self._writing():
            if self._file is None:
                self._file = self.path.open("ab")
                self._file.truncate(self._length)  # a half-written line is written again
                self._file.seek(self._length)
                if not self._length:
                    self._write(self._header)
            place = self._file.tell()
            self._write({"line": number, **row})
        self._places[number] = place

    def _write(self, row: dict[str, Any]) -> None:
        assert self._file is not None
        self._file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        self._file.flush()

    def publish(self) -> None:
        """Put all answers in the order of the input; they become the output, and the journal goes.

        Raises:
            BrokenFileError: The output cannot be written.
        """
        self.close()
        part = self.output.with_name(f".{self.output.name}.{os.getpid()}")
        try:
            with self.path.open("rb") as journal, part.open("w", encoding="utf-8") as out:
                for _, place in sorted(self._places.items()):
                    journal.seek(place)
                    row = json.loads(journal.readline())
                    del row["line"]
                    out.write(json.dumps(row, ensure_ascii=False) + "\n")
            part.replace(self.output)
            self.path.unlink()
        except OSError as error:
            raise BrokenFileError(
                f"{self.output} cannot be written ({error.strerror}); all answers are in "
                f"{self.path}, run the same command again"
            ) from error
        finally:
            part.unlink(missing_ok=True)

    def close(self) -> None:
        """Let go of the journal; what is in it stays."""
        if self._file is not None:
            self._file.close()
