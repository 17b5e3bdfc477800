"""Trained drafters of the reference models: made on first use, cached by what they are.

Claims that compare drafters train each of them once, on the same texts in the same order.
"""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from rich.console import Console

from isthmus import registry
from isthmus.decoding.model import Model
from isthmus.decoding.trained import TrainedDrafter, target_fingerprint
from isthmus.errors import BrokenFileError, MismatchError
from isthmus.folders import cache_folder
from isthmus.training.drafting import DraftTraining, Progress, Recipe, windows
from isthmus.workbench import pycode
from isthmus.workbench.bench import reference_model
from isthmus.workbench.tokenizer import end_id

TARGET = "pycode-m"
"""The target of claims that train several drafters."""


@functools.lru_cache(maxsize=2)
def target_model(name: str = TARGET) -> Model:
    """The reference target in float32; one object a process, so that drafters can share it."""
    return reference_model(name)


@functools.lru_cache(maxsize=4)
def texts(name: str = TARGET, length: int = 96, split: str = "train") -> torch.Tensor:
    """Windows of the pycode corpus in a model's own tokens, int32 [W, length]."""
    tokenizer = target_model(name).tokenizer
    documents = pycode.texts("train" if split == "train" else "held-out")
    encodings = tokenizer.backend_tokenizer.encode_batch_fast(documents, add_special_tokens=False)
    cut = windows([e.ids for e in encodings], length, end_id(tokenizer))
    # held-out windows lie file by file; a fixed shuffle makes any prefix a fair sample
    order = np.random.default_rng(0).permutation(len(cut))
    return cut[torch.from_numpy(order)]


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
    key = json.dumps(
        {
            "settings": asdict(drafter.settings),
            "recipe": asdict(recipe),
            "target": target_fingerprint(hub),
            "shapes": {k: list(v.shape) for k, v in drafter.state_dict().items()},
        },
        sort_keys=True,
    )
    name = f"{slug}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    folder = cache_folder() / "drafters" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{name}.lock")):
        try:
            return type(drafter).from_pretrained(folder, hub)
        except (BrokenFileError, MismatchError):
            pass  # not there yet, or damaged: train it
        run = DraftTraining(
            drafter,
            texts(target, recipe.sequence_length),
            texts(target, recipe.sequence_length, "held-out"),
            recipe,
            folder.with_name(f"{name}.run.safetensors"),
        )
        with Console(stderr=True).status("") as status:

            def report(now: Progress) -> None:
                tau = "" if now.acceptance_length is None else f", {now.acceptance_length:.2f}"
                status.update(f"training {slug}: {now.step}/{now.steps}, {now.loss:.3f}{tau}")

            run.run(report)
        drafter.save_pretrained(folder)
    return drafter


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
