"""``isthmus generate --input``: answers to a file of prompts."""

from __future__ import annotations

import json
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from isthmus.cli.generate import fusion
from isthmus.cli.output import console, print_error, quiet_transformers
from isthmus.errors import BrokenFileError, InvalidInputError


def answer_file(
    source: Path,
    output: Path,
    *,
    engine: str,
    workers: int,
    batch_size: int,
    load: dict[str, Any],
    options: dict[str, Any],
    fuse: tuple[tuple[str, ...], str] = ((), "auto"),
) -> int:
    """Answer every line of a file.

    Args:
        source: JSON lines; "-" is standard input.
        output: JSON lines in the order of the input; "-" is standard output.
        engine: ``"local"`` or ``"ray"``.
        workers: Workers of the Ray cluster.
        batch_size: Rows at work at most.
        load: Arguments of :func:`isthmus.load`.
        options: Arguments of :meth:`isthmus.decoding.model.Model.generate_many`.
        fuse: Models that speak along, and how.

    Returns:
        The exit code: 2 where some lines could not be answered.

    Raises:
        IsthmusError: Bad input; the message says what to do.
    """
    quiet_transformers()
    from isthmus.decoding.jobs import Journal, answers, answers_on_ray, read_lines

    if batch_size < 1 or workers < 0:
        raise InvalidInputError("batch-size must be at least 1 and workers 0 or more")
    text = _read(source)
    lines = read_lines(text.splitlines(), "standard input" if str(source) == "-" else str(source))
    seed = options.pop("seed")
    settings = {k: v for k, v in {**load, **options, "seed": seed}.items() if k != "device"}
    if "constraint" in options:
        settings["constraint"] = vars(options["constraint"])
    if fuse[0]:
        if engine != "local":
            raise InvalidInputError("--fuse goes with --engine local only")
        settings["fuse"] = fuse
    seed = secrets.randbits(32) if seed is None else seed
    journal = None if str(output) == "-" else Journal(output, text, settings, seed)
    if journal is not None:
        seed, done = journal.seed, journal.done
        left = [line for line in lines if line.number not in done]
    else:
        left = lines
    make, asked = partial(_load, **load), {"batch_size": batch_size, "seed": seed, **options}
    found: Iterator[tuple[int, dict[str, Any]]] = iter(())
    if left and engine == "ray":
        found = answers_on_ray(make, left, workers=workers, **asked)
    elif left:
        if fuse[0]:
            places = {k: load[k] for k in ("dtype", "device")}
            asked["fuse"] = fusion(fuse[0], fuse[1], **places)
        found = answers(make(), left, **asked)
    order = [line.number for line in left]
    write = _in_order(order) if journal is None else journal.add
    failed: list[int] = []
    start, tokens, kept = time.perf_counter(), 0, len(lines) - len(left)
    try:
        for number, row in _shown(found, len(lines), kept):
            write(number, row)
            tokens += row["new_tokens"]
            failed += [number] if row["finish_reason"] == "error" else []
        if journal is not None:
            journal.publish()
    except KeyboardInterrupt:
        if journal is not None:
            print(
                f"interrupted: {len(journal.done)} of {len(lines)} answers are kept in "
                f"{journal.path}; run the same command again to go on",
                file=sys.stderr,
            )
        return 130
    finally:
        if journal is not None:
            journal.close()
    seconds = time.perf_counter() - start
    before = f" ({kept} were there already)" if kept else ""
    print(
        f"[{options['drafter']}] {len(lines)} answers{before}, {tokens} tokens in {seconds:.2f} s "
        f"({tokens / max(seconds, 1e-9):.1f} tokens/s)",
        file=sys.stderr,
    )
    if failed:
        named = ", ".join(map(str, sorted(failed)[:10])) + (", ..." if len(failed) > 10 else "")
        print_error(f"{len(failed)} of {len(lines)} lines could not be answered: {named}")
    return 2 if failed else 0


def _load(source: str, **options: Any) -> Any:
    """Load a model that reads text; also called in the processes of a cluster."""
    from isthmus.api import load

    quiet_transformers()
    model = load(source, **options)
    if model.tokenizer is None:
        raise InvalidInputError("this checkpoint has no tokenizer, so it cannot read text prompts")
    return model


def _read(source: Path) -> str:
    if str(source) == "-":
        return sys.stdin.read()
    try:
        return source.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BrokenFileError(f"{source} cannot be read as text ({error})") from error


def _in_order(numbers: list[int]) -> Callable[[int, dict[str, Any]], None]:
    """Write to standard output in the order of the input; an early answer waits."""
    waiting: dict[int, dict[str, Any]] = {}
    line = iter(numbers)
    head = [next(line, 0)]

    def write(number: int, row: dict[str, Any]) -> None:
        waiting[number] = row
        while head[0] in waiting:
            print(json.dumps(waiting.pop(head[0]), ensure_ascii=False), flush=True)
            head[0] = next(line, 0)

    return write


def _shown(
    found: Iterator[tuple[int, dict[str, Any]]], total: int, kept: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Pass answers on beside a progress bar, where somebody looks at it."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    screen = console(stderr=True)
    columns = (
        TextColumn("answers"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:.0f} tokens/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=screen, disable=not screen.is_terminal) as progress:
        task = progress.add_task("", total=total, completed=kept, rate=0.0)
        start, tokens = time.perf_counter(), 0
        for number, row in found:
            tokens += row["new_tokens"]
            progress.update(task, advance=1, rate=tokens / (time.perf_counter() - start))
            yield number, row
