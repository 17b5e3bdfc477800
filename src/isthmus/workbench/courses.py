"""Small models that a claim trains for itself: one course each, made on first use, then cached.

The counterpart of :mod:`isthmus.workbench.reference` for networks that are neither a plain
language model nor one of its tasks: the :class:`~isthmus.workbench._training.Course` says what is
built, read and minimised, the :class:`~isthmus.workbench._training.Trainer` is the same.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from isthmus.errors import BrokenFileError
from isthmus.folders import cache_folder, kept, published
from isthmus.models.hub import no_progress_bars
from isthmus.workbench._training import Course, Progress, Recipe, Trainer, loss_curve

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
    with kept("courses", recipe.name, [recipe.as_dict(), corpus]) as folder:
        if not (folder / CARD).exists():
            state = cache_folder() / "unfinished" / folder.name
            _train(folder, state, recipe, course, tokenizer, corpus, end)
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
    record = {
        "recipe": recipe.as_dict(),
        "curve": loss_curve(losses),
        "seconds": round(trainer.seconds, 1),
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
    }
    with published(folder) as part:  # what is there already is damaged: it has no card
        with no_progress_bars():
            trainer.model.cpu().save_pretrained(part)
        tokenizer.save_pretrained(part)
        (part / CARD).write_text(json.dumps(record, indent=1), encoding="utf-8")
    shutil.rmtree(state, ignore_errors=True)
