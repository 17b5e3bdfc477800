"""Train a drafter for a frozen target.

The target reads every batch once and its inner states are what the drafter learns from; nothing of
them is kept on disk. The order of the data and every noise follow from the seed and the step alone,
so an interrupted run goes on with the very same numbers. While it trains, the acceptance length of
a greedy draft chain is measured on held-out text by the real decoding loop, and the best weights
so far are what is kept.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from isthmus.decoding.acceptance import Lossless
from isthmus.decoding.engine import Request, decode
from isthmus.decoding.law import Law
from isthmus.decoding.policy import Fixed
from isthmus.decoding.stopping import Stopper
from isthmus.decoding.trained import Batch, TrainedDrafter, target_fingerprint
from isthmus.errors import InvalidInputError, MismatchError
from isthmus.roles import Shape
from isthmus.training import state_file
from isthmus.training.seeds import batch_generator


@dataclass(frozen=True)
class Recipe:
    """How a drafter is trained.

    Attributes:
        steps: Optimiser steps.
        batch_size: Texts a step.
        sequence_length: Tokens of a text.
        learning_rate: Peak of AdamW's rate; it rises linearly and falls as a cosine to a tenth.
        warmup_share: Share of the steps over which it rises.
        clip_norm: Largest norm of the gradient.
        validate_every: Steps between two validations; the last step always has one.
        seed: Seed of initial weights, data order and noise.
    """

    steps: int = 600
    batch_size: int = 12
    sequence_length: int = 96
    learning_rate: float = 2e-3
    warmup_share: float = 0.05
    clip_norm: float = 1.0
    validate_every: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        whole = (self.steps, self.batch_size, self.sequence_length, self.validate_every)
        if min(whole) < 1 or self.learning_rate <= 0:
            raise InvalidInputError(
                "steps, batch_size, sequence_length, validate_every and learning_rate must be "
                f"positive, got {self}"
            )

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        warm = max(1, round(self.warmup_share * self.steps))
        if step < warm:
            return self.learning_rate * (step + 1) / warm
        share = (step - warm) / max(1, self.steps - warm)
        return self.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * share)))


@dataclass(frozen=True)
class Progress:
    """What a run reports after each step.

    Attributes:
        step: Steps taken.
        steps: Steps in all.
        loss: Loss of the last batch.
        acceptance_length: Latest validation, or None before the first.
        seconds: Time spent in training, earlier sessions included.
    """

    step: int
    steps: int
    loss: float
    acceptance_length: float | None
    seconds: float


def windows(
    documents: Sequence[Sequence[int] | NDArray[np.int32]], length: int, end: int
) -> torch.Tensor:
    """Documents joined by an end token and cut into texts of equal length.

    Args:
        documents: Token ids of each document.
        length: Tokens T of a text.
        end: Token between two documents.

    Returns:
        int32 [W, T].

    Raises:
        InvalidInputError: They do not fill one text.
    """
    parts = [np.asarray([*d, end], dtype=np.int32) for d in documents]
    stream = np.concatenate(parts) if parts else np.empty(0, np.int32)
    count = len(stream) // length
    if count < 1:
        raise InvalidInputError(
            f"the data hold {len(stream)} tokens, fewer than one text of {length}; give more text"
        )
    return torch.from_numpy(stream[: count * length].reshape(count, length).copy())


class DraftTraining:
    """One run, resumable at the exact step.

    Args:
        drafter: What is trained, bound to its target; on the target's device, in float32.
        texts: Training texts, int [W, T].
        held_out: Texts for validation, int [W, T]; the first third of each is the prompt.
        recipe: How.
        state: File that keeps the unfinished run; None keeps nothing.

    Raises:
        InvalidInputError: The texts do not fit the recipe or the target.
        MismatchError: ``state`` belongs to another run.
        BrokenFileError: ``state`` is damaged.
    """

    def __init__(
        self,
        drafter: TrainedDrafter,
        texts: torch.Tensor,
        held_out: torch.Tensor,
        recipe: Recipe,
        state: Path | None = None,
    ) -> None:
        if texts.ndim != 2 or texts.shape[1] != recipe.sequence_length:
            raise InvalidInputError(
                f"texts must be [texts, {recipe.sequence_length}], got {list(texts.shape)}"
            )
        longest = drafter.target.max_length
        if longest is not None and recipe.sequence_length > longest:
            raise InvalidInputError(
                f"texts of {recipe.sequence_length} tokens are longer than the target's context "
                f"of {longest}; set sequence_length to at most that"
            )
        if int(texts.max()) >= drafter.target.vocab_size:
            raise InvalidInputError("the texts hold token ids outside the target's vocabulary")
        self.drafter, self.texts, self.held_out, self.recipe = drafter, texts, held_out, recipe
        self.state = state
        self.parameters = [p for p in drafter.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.0
        )
        self.step, self.seconds, self.loss = 0, 0.0, float("nan")
        self.best = -1.0
        self.curve: list[list[float]] = []
        self.best_weights: dict[str, torch.Tensor] = {}
        if state is not None and state.exists():
            self._load(state)

    @property
    def identity(self) -> str:
        """What a run is: system, settings, recipe, target and data."""
        parts = {
            "system": self.drafter.name,
            "settings": asdict(self.drafter.settings),
            "recipe": asdict(self.recipe),
            "target": target_fingerprint(self.drafter.target),
            "texts": [*self.texts.shape, int(self.texts.long().sum())],
        }
        return json.dumps(parts, sort_keys=True)

    def run(self, report: Callable[[Progress], None] | None = None) -> TrainedDrafter:
        """Train to the end and return the drafter with its best weights.

        Raises:
            KeyboardInterrupt: Interrupted; the state was saved first.
        """
        try:
            while self.step < self.recipe.steps:
                begin = time.perf_counter()
                self._take_step()
                if self.step % self.recipe.validate_every == 0 or self.step == self.recipe.steps:
                    self._validate()
                self.seconds += time.perf_counter() - begin
                if report is not None:
                    latest = self.curve[-1][2] if self.curve else None
                    now = (self.step, self.recipe.steps, self.loss, latest, self.seconds)
                    report(Progress(*now))
        except KeyboardInterrupt:
            self._save()
            raise
        self.drafter.load_state_dict(self.best_weights)
        self.drafter.training_record = {
            "recipe": asdict(self.recipe),
            "seconds": round(self.seconds, 1),
            "curve": self.curve,  # step, loss, acceptance length
            "acceptance_length": self.best,
            "tokens_seen": self.step * self.recipe.batch_size * self.recipe.sequence_length,
        }
        if self.state is not None:
            self.state.unlink(missing_ok=True)
        return self.drafter.eval()

    def _take_step(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate(self.step)
        self.drafter.train()
        loss = self.drafter.loss(self._batch(self.step))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.loss = float(loss.detach())
        self.step += 1

    def _batch(self, step: int) -> Batch:
        device = self.drafter.target.device
        count, size = len(self.texts), self.recipe.batch_size
        rows = []
        for index in range(step * size, (step + 1) * size):
            epoch, place = divmod(index, count)
            order = np.random.default_rng([self.recipe.seed, epoch]).permutation(count)
            rows.append(int(order[place]))
        ids = self.texts[rows].long().to(device)
        generator = batch_generator(self.recipe.seed, step, device)
        batch = read(self.drafter, ids, generator)
        return replace(batch, progress=step / self.recipe.steps)

    @torch.no_grad()
    def _validate(self) -> None:
        length = acceptance_length(self.drafter, self.held_out)
        self.curve.append([self.step, round(self.loss, 4), round(length, 4)])
        if length > self.best:
            self.best = length
            weights = self.drafter.state_dict()
            self.best_weights = {k: v.detach().clone() for k, v in weights.items()}
        self._save()

    def _save(self) -> None:
        if self.state is None:
            return
        tensors = {f"now.{k}": v for k, v in self.drafter.state_dict().items()}
        tensors |= {f"best.{k}": v for k, v in self.best_weights.items()}
        for i, p in enumerate(self.parameters):
            moments = self.optimizer.state.get(p, {})
            tensors |= {f"adam.{i}.{k}": v for k, v in moments.items()}
        note = {
            "identity": self.identity,
            "step": self.step,
            "seconds": self.seconds,
            "loss": self.loss if math.isfinite(self.loss) else None,
            "best": self.best,
            "curve": self.curve,
        }
        copies = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
        state_file.write(self.state, copies, note)

    def _load(self, path: Path) -> None:
        tensors, note = state_file.read(path)
        if note["identity"] != self.identity:
            raise MismatchError(
                f"the unfinished run in {path} has another recipe, target or data; delete that "
                "file to begin anew, or repeat the command it was started with"
            )

        under = partial(state_file.under, tensors)
        self.drafter.load_state_dict(under("now."))
        self.best_weights = under("best.")
        for i, p in enumerate(self.parameters):
            moments = under(f"adam.{i}.")
            if moments:
                self.optimizer.state[p] = {
                    k: v if k == "step" else v.to(p.device) for k, v in moments.items()
                }
        self.step, self.seconds = int(note["step"]), float(note["seconds"])
        self.loss = float("nan") if note["loss"] is None else float(note["loss"])
        self.best, self.curve = float(note["best"]), note["curve"]


@torch.no_grad()
def read(drafter: TrainedDrafter, ids: torch.Tensor, generator: torch.Generator) -> Batch:
    """Run the frozen target over texts and keep what the drafter taps.

    Args:
        drafter: Bound to its target.
        ids: int64 [B, T].
        generator: Passed on to the loss.
    """
    target = drafter.target
    inputs = {k: v.expand(len(ids), *v.shape[1:]) for k, v in target.probe_inputs().items()}
    encoded = target.encode(**inputs) if inputs else None
    past = target.empty_cache() if drafter.reads_cache else None
    scores = target.forward(ids, encoded=encoded, taps=drafter.taps, cache=past)
    assert scores.features is not None
    mask = torch.ones_like(ids, dtype=torch.bool)
    past = getattr(past, "self_attention_cache", past)
    return Batch(ids, mask, scores.features, scores.logits.float(), generator, past)


def acceptance_length(
    drafter: TrainedDrafter,
    held_out: torch.Tensor,
    *,
    shape: Shape | None = None,
    new_tokens: int = 16,
    rows: int = 64,
) -> float:
    """Tokens per target forward of greedy decoding after held-out prompts.

    Args:
        drafter: Bound to its target.
        held_out: Texts, int [W, T]; the first third of each is the prompt.
        shape: What to draft a round; a chain of 4 when None.
        new_tokens: Tokens to write after each prompt.
        rows: Texts used at most; decoded as one batch.
    """
    run = greedy_drafting(drafter, held_out, shape=shape, new_tokens=new_tokens, rows=rows)
    return run.acceptance_length


@dataclass(frozen=True)
class Drafting:
    """How drafts fared over some texts.

    Attributes:
        acceptance_length: Tokens per target forward.
        drafted: Draft tokens verified per target forward.
    """

    acceptance_length: float
    drafted: float


@torch.no_grad()
def greedy_drafting(
    drafter: TrainedDrafter,
    held_out: torch.Tensor,
    *,
    shape: Shape | None = None,
    new_tokens: int = 16,
    rows: int = 64,
) -> Drafting:
    """Greedy decoding after held-out prompts; arguments as for :func:`acceptance_length`."""
    was_training = drafter.training
    target = drafter.target
    chosen = held_out[:rows].long()
    prompt = max(2, held_out.shape[1] // 3)
    requests = [Request(text[:prompt], Stopper(max_new_tokens=new_tokens)) for text in chosen]
    inputs = {k: v.expand(len(chosen), *v.shape[1:]) for k, v in target.probe_inputs().items()}
    rounds = decode(
        target,
        requests,
        policy=Fixed(drafter, shape or Shape(4, 4, 1)),
        acceptance=Lossless(),
        law=Law(),
        generator=torch.Generator(target.device).manual_seed(0),
        inputs=inputs,
    )
    for _ in rounds:
        pass
    drafter.train(was_training)
    emitted = sum(len(r.result.tokens) for r in requests)
    forwards = sum(r.result.stats.target_forwards for r in requests)
    return Drafting(emitted / forwards, sum(r.result.stats.drafted for r in requests) / forwards)
