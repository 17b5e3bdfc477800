"""Small models that a claim trains for itself: one course each, made on first use, then cached.

The counterpart of :mod:`isthmus.workbench.reference` for networks that are neither a plain
language model nor one of its tasks: the :class:`~isthmus.workbench._training.Course` says what is
built, read and minimised, the :class:`~isthmus.workbench._training.Trainer` is the same.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from rich.console import Console
from transformers.utils import logging

from isthmus.errors import BrokenFileError
from isthmus.folders import cache_folder
from isthmus.workbench._training import Course, Progress, Recipe, Trainer

CARD = "card.json"


def made(recipe: Recipe, course: Course, tokenizer: Any, *, corpus: str, end: int = 0) -> Path:
    """The folder of a model, trained now if it was not before.

    Args:
        recipe: What decides the weights, given the data.
        course: What to train.
        tokenizer: Published beside the weights.
        corpus: Digest of the data.
        end: Id of the end-of-text token.

    Returns:
        A folder with a float32 checkpoint of transformers, its tokenizer and ``card.json``.

    Raises:
        BrokenFileError: The cache folder cannot be written.
        KeyboardInterrupt: Training was interrupted; the next call goes on from there.
    """
    key = json.dumps([recipe.as_dict(), corpus], sort_keys=True)
    name = f"{recipe.name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    folder = cache_folder() / "courses" / name
    state = cache_folder() / "unfinished" / name
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{name}.lock")):
            if not (folder / CARD).exists():
                _train(folder, state, recipe, course, tokenizer, corpus, end)
    except OSError as error:
        raise BrokenFileError(
            f"cannot write to {str(folder)!r} ({error.strerror or error}); "
            "set ISTHMUS_CACHE to a folder that can be written"
        ) from error
    return folder


def card(folder: Path) -> dict[str, Any]:
    """How a model was made: its recipe, the loss along the way, and the seconds it took.

    Raises:
        BrokenFileError: The card is missing or altered.
    """
    try:
        return dict(json.loads((folder / CARD).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise BrokenFileError(f"{folder / CARD} cannot be read; delete its folder") from error


def _train(
    folder: Path,
    state: Path,
    recipe: Recipe,
    course: Course,
    tokenizer: Any,
    corpus: str,
    end: int,
) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    trainer = Trainer(
        recipe, (), end=end, corpus=corpus, directory=state, device=device, course=course
    )
    losses: list[float] = []
    with Console(stderr=True).status("") as status:

        def report(now: Progress) -> None:
            losses.append(now.loss)
            status.update(f"training {recipe.name}: {now.step}/{now.steps}, {now.loss:.3f}")

        trainer.run(report)
    block = max(1, len(losses) // 10)
    curve = [
        round(sum(losses[i : i + block]) / len(losses[i : i + block]), 4)
        for i in range(0, len(losses), block)
    ]
    record = {
        "recipe": recipe.as_dict(),
        "curve": curve,
        "seconds": round(trainer.seconds, 1),
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
    }
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        trainer.model.cpu().save_pretrained(part)
        tokenizer.save_pretrained(part)
        (part / CARD).write_text(json.dumps(record, indent=1), encoding="utf-8")
        part.chmod(0o755)
        if folder.exists():  # damaged: it had no card
            shutil.rmtree(folder)
        part.rename(folder)
        shutil.rmtree(state, ignore_errors=True)
    finally:
        if bars:
            logging.enable_progress_bar()
        shutil.rmtree(part, ignore_errors=True)
