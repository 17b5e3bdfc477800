"""Trained drafters of the reference models: made on first use, cached by what they are.

Claims that compare drafters train each of them once, on the same texts in the same order.
"""

from __future__ import annotations

import functools
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from rich.console import Console

from isthmus import registry
from isthmus.decoding.model import Model
from isthmus.decoding.policy import Fixed
from isthmus.decoding.trained import TrainedDrafter, target_fingerprint
from isthmus.errors import BrokenFileError, MismatchError
from isthmus.folders import kept
from isthmus.roles import Shape
from isthmus.training.drafting import DraftTraining, Progress, Recipe, windows
from isthmus.workbench import pycode, sums
from isthmus.workbench.bench import reference_model
from isthmus.workbench.reference import RECIPES
from isthmus.workbench.tokenizer import end_id

TARGET = "pycode-m"
"""The target of claims that train several drafters."""


def target_model(name: str = TARGET) -> Model:
    """The reference target in float32; one object a process, so that drafters can share it."""
    return _target_model(name)


@functools.lru_cache(maxsize=2)
def _target_model(name: str) -> Model:
    return reference_model(name)


def texts(name: str = TARGET, length: int = 96, split: str = "train") -> torch.Tensor:
    """Windows of what a model was trained on, in its own tokens, int32 [W, length]."""
    return _texts(name, length, split)


@functools.lru_cache(maxsize=4)
def _texts(name: str, length: int, split: str) -> torch.Tensor:
    tokenizer = target_model(name).tokenizer
    documents = _documents(name, "train" if split == "train" else "held-out")
    encodings = tokenizer.backend_tokenizer.encode_batch_fast(documents, add_special_tokens=False)
    cut = windows([e.ids for e in encodings], length, end_id(tokenizer))
    # held-out windows lie file by file; a fixed shuffle makes any prefix a fair sample
    order = np.random.default_rng(0).permutation(len(cut))
    return cut[torch.from_numpy(order)]


def _documents(name: str, split: pycode.Split) -> list[str]:
    """The pycode corpus, or worked problems for a model of the ``sums`` task."""
    if getattr(RECIPES.get(name), "task", "") == "sums":
        count = 8_000 if split == "train" else 1_000
        return [problem.text() for problem in sums.problems(count, split)]
    return list(pycode.texts(split))


def reference_drafter(
    slug: str, settings: Any = None, *, recipe: Recipe | None = None, target: str = TARGET
) -> TrainedDrafter:
    """A drafter of a reference model, trained now if it was not before.

    Args:
        slug: A system whose class is a :class:`~isthmus.decoding.trained.TrainedDrafter`.
        settings: Its settings; the paper's when None.
        recipe: How it is trained; the default of :class:`~isthmus.training.drafting.Recipe`.
        target: Reference model it is trained for.

    Returns:
        The drafter, bound to ``target_model(target).target``.
    """
    recipe = recipe or Recipe()
    model = target_model(target)
    hub: Any = model.target
    torch.manual_seed(recipe.seed)  # torch's layers draw their weights from the global generator
    drafter: TrainedDrafter = registry.load(slug)(hub, settings)
    key = {
        "settings": asdict(drafter.settings),
        "recipe": asdict(recipe),
        "target": target_fingerprint(hub),
        "shapes": {k: list(v.shape) for k, v in drafter.state_dict().items()},
    }
    with kept("drafters", slug, key) as folder:
        try:
            return type(drafter).from_pretrained(folder, hub)
        except (BrokenFileError, MismatchError):
            pass  # not there yet, or damaged: train it
        run = DraftTraining(
            drafter,
            texts(target, recipe.sequence_length),
            texts(target, recipe.sequence_length, "held-out"),
            recipe,
            folder.with_name(f"{folder.name}.run.safetensors"),
        )
        with Console(stderr=True).status("") as status:

            def report(now: Progress) -> None:
                tau = "" if now.acceptance_length is None else f", {now.acceptance_length:.2f}"
                status.update(f"training {slug}: {now.step}/{now.steps}, {now.loss:.3f}{tau}")

            run.run(report)
        drafter.save_pretrained(folder)
    return drafter


def same_answers(drafter: TrainedDrafter, shape: Shape, count: int, name: str = TARGET) -> int:
    """How many of ``count`` greedy answers of 16 tokens are those of plain decoding."""
    prompts = [text[:32] for text in texts(name, split="held-out")[:count].long()]
    plain, got = (
        target_model(name).generate(prompts, drafter=policy, max_new_tokens=16, ignore_end=True)
        for policy in ("none", Fixed(drafter, shape))
    )
    return sum(a.tokens == b.tokens for a, b in zip(got, plain, strict=True))


def curve_note(*drafters: TrainedDrafter) -> str:
    """One sentence for a claim: how far each drafter's validation curve still rose at the end."""
    parts, rising = [], []
    for drafter in drafters:
        lengths = [float(point[2]) for point in drafter.training_record["curve"]][-2:]
        parts.append(f"{drafter.name} {' to '.join(f'{x:.2f}' for x in lengths)}")
        if lengths[-1] - lengths[0] > 0.05 or len(lengths) < 2:
            rising.append(drafter.name)
    end = f"still rising: {', '.join(rising)}" if rising else "all flat"
    return f"Validation over the last third of the training: {'; '.join(parts)} ({end})."
