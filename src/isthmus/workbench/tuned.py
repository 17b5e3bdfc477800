"""Fine-tuned copies of the reference models: made on first use, cached by what they are.

A system that tunes its target has a class method ``fine_tuning(model, settings) -> Loss``. It may
change the copy first (a new token, a record in its config) and says which of its settings matter
for the weights in ``tuning_settings``. The control of all of them is ``tuned(None)``: the same
tokens with the plain loss.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from isthmus import registry
from isthmus.decoding.model import Model
from isthmus.decoding.trained import target_fingerprint
from isthmus.errors import BrokenFileError
from isthmus.folders import kept, published
from isthmus.models.hub import load_checkpoint, no_progress_bars
from isthmus.roles import Acceptance, Policy
from isthmus.training.drafting import Recipe
from isthmus.training.tuning import (
    add_placeholder,
    held_out_loss,
    label_loss,
    logits_of,
    next_tokens,
    tune,
)
from isthmus.workbench import pycode
from isthmus.workbench._training import loss_curve
from isthmus.workbench.bench import Answers
from isthmus.workbench.drafters import TARGET, target_model, texts

RECIPE = Recipe(steps=150, batch_size=12, sequence_length=96, learning_rate=1e-3)
"""How reference models are tuned unless a claim says otherwise."""

CARD = "isthmus.json"


def tuned(
    slug: str | None, settings: Any = None, *, recipe: Recipe = RECIPE, base: str = TARGET
) -> Model:
    """A tuned copy of a reference model, trained now if it was not before.

    Args:
        slug: A system with ``fine_tuning``; None tunes with the plain next-token loss.
        settings: Its settings; the paper's when None.
        recipe: How it is tuned.
        base: Reference model that is copied.

    Returns:
        The model in float32 on the CPU, with its tokenizer.
    """
    system: Any = None if slug is None else registry.load(slug)
    if slug is not None and settings is None:
        settings = registry.load_module(registry.find(slug)).Settings()
    words = {} if system is None else {n: getattr(settings, n) for n in system.tuning_settings}
    parts = {
        "system": slug,
        "settings": words,
        "recipe": {k: v for k, v in vars(recipe).items() if k != "validate_every"},
        "base": target_fingerprint(target_model(base).target),
    }
    with kept("tuned", slug or "plain", parts) as folder:
        if not (folder / CARD).exists():
            _train(folder, system, settings, recipe, base, parts)
    checkpoint = load_checkpoint(str(folder), dtype="float32", device="cpu")
    return Model(checkpoint.model, checkpoint.tokenizer, fast=False)


def with_placeholder(model: Model) -> Model:
    """A model with one more token that it never learned: the control of placeholders.

    Plain tuning never reads the placeholder, so adding it afterwards gives the same weights.
    """
    hub = copy.deepcopy(model.target.model)
    add_placeholder(hub)
    return Model(hub, model.tokenizer, fast=False)


def card(model: Model) -> dict[str, Any]:
    """How a tuned model came to be: settings, recipe, training curve, held-out loss."""
    folder = Path(model.target.model.name_or_path)
    try:
        return dict(json.loads((folder / CARD).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise BrokenFileError(f"{folder / CARD} cannot be read; delete its folder") from error


def _train(
    folder: Path, system: Any, settings: Any, recipe: Recipe, base: str, parts: dict[str, Any]
) -> None:
    origin = target_model(base)
    model = copy.deepcopy(origin.target.model)
    if system is None:

        def loss(ids: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
            return label_loss(logits_of(model, ids), next_tokens(ids))

    else:
        loss = system.fine_tuning(model, settings)
    with Console(stderr=True).status("") as status:

        def report(step: int, value: float) -> None:
            status.update(f"tuning {folder.name}: {step}/{recipe.steps}, {value:.3f}")

        losses = tune(model, texts(base, recipe.sequence_length), loss, recipe, report)
    held_out = texts(base, recipe.sequence_length, "held-out")
    record = {
        **parts,
        "curve": loss_curve(losses),
        "held_out_nats": round(held_out_loss(model, held_out), 4),
    }
    with published(folder) as part:  # what is there already is damaged: it has no card
        with no_progress_bars():
            model.save_pretrained(part)
        if origin.tokenizer is not None:
            origin.tokenizer.save_pretrained(part)
        (part / CARD).write_text(json.dumps(record, indent=1), encoding="utf-8")


def answer_together(
    model: Model,
    prompts: Sequence[Any],
    policy: str | Policy,
    *,
    max_new_tokens: int,
    seed: int = 0,
    acceptance: Acceptance | None = None,
    **sampling: Any,
) -> Answers:
    """Decode prompts as one batch, ignoring end tokens, and keep the counts of each."""
    results = model.generate(
        [torch.as_tensor(p, dtype=torch.int64) for p in prompts],
        max_new_tokens=max_new_tokens,
        drafter=policy,
        acceptance=acceptance,
        ignore_end=True,
        seed=seed,
        **sampling,
    )
    return Answers(
        [r.tokens for r in results],
        [r.stats.acceptance_length for r in results],
        [r.stats.target_forwards for r in results],
    )


@torch.no_grad()
def agreement(model: Model, prompt: torch.Tensor, tokens: Sequence[int]) -> list[bool]:
    """Whether each token is the model's likeliest one after what stands before it.

    What a lossy method is judged by: token by token, so that one other word does not count as a
    wholly other answer.

    Args:
        model: The model that decoded.
        prompt: int64 [T].
        tokens: What was written after it.
    """
    ids = torch.cat([prompt, torch.tensor(list(tokens))])
    choice = model.target.forward(ids[None]).logits[0, len(prompt) - 1 : -1].argmax(-1)
    same: list[bool] = (choice == ids[len(prompt) :]).tolist()
    return same


def docstring_prompts(count: int, tokenizer: Any, length: int) -> list[list[int]]:
    """At most ``count`` prompts from held-out files that end where a docstring begins."""
    found = []
    for text in pycode.texts("held-out"):
        place = text.find('    """', len(text) // 3)
        part = text[max(0, place - 16 * length) : place + 7] if place > 0 else ""
        ids = tokenizer.encode(part, add_special_tokens=False)
        if len(ids) >= length:
            found.append(ids[-length:])
        if len(found) == count:
            break
    return found
