"""The training loop beside the Trainer of transformers: the same weights, batches and precision.

Both learn from the same examples once, as many to a batch; each in its own way puts them together.
Tokens a second count what is text, not what is padding.
"""

from __future__ import annotations

import copy
import importlib.util
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from isthmus.claims import Ratio, Ruler, ratio
from isthmus.errors import InvalidInputError, MismatchError, MissingExtraError
from isthmus.models.encoder_decoder import shifted
from isthmus.training.data import Data
from isthmus.training.loop import Plan, Trainer
from isthmus.training.text_to_text import TextToText

OURS, THEIRS, GROUPED = "isthmus", "transformers Trainer", "transformers Trainer, by length"

Example = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Line:
    """One contestant.

    Attributes:
        name: Who.
        tokens_per_s: Tokens of sources and targets, without padding, in the median repeat.
        speedup: Against the plain Trainer, repeat by repeat.
        inputs: Share of the padded sources that is padding.
        outputs: The same of the targets.
        rows: Examples of a batch, on average.
        steps: Optimiser steps of a repeat.
    """

    name: str
    tokens_per_s: float
    speedup: Ratio
    inputs: float
    outputs: float
    rows: float
    steps: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


class Tally:
    """Counts tokens and padding of batches as they are made."""

    def __init__(self) -> None:
        self.padded, self.real, self.rows, self.batches = [0, 0], [0, 0], 0, 0

    def note(self, pair: Sequence[torch.Tensor], pads: tuple[int, int]) -> None:
        """Count a batch: sources [B, S] and targets [B, T], and what pads them."""
        for side, ids in enumerate(pair):
            self.padded[side] += ids.numel()
            self.real[side] += int((ids != pads[side]).sum())
        self.rows, self.batches = self.rows + len(pair[0]), self.batches + 1


def check_peer() -> None:
    """Refuse where the Trainer of transformers cannot run.

    Raises:
        MissingExtraError: It needs accelerate, which is not installed.
    """
    if importlib.util.find_spec("accelerate") is None:
        raise MissingExtraError(
            "the Trainer of transformers needs 'accelerate', which is not installed; "
            "run: pip install accelerate"
        )


def train_bench(
    system: type[TextToText],
    data: Data[Any],
    settings: Any,
    plan: Plan,
    *,
    batches: int = 60,
    repeats: int = 5,
    ruler: Ruler | None = None,
) -> list[Line]:
    """Time training with our loop and with the Trainer of transformers.

    Args:
        system: A system that turns text into text.
        data: What it learns from.
        settings: Its settings.
        plan: Rate, clipping and seed; the optimiser is AdamW for all, in float32.
        batches: Batches of ours whose examples make up a repeat.
        repeats: Timed repeats after one warm-up.
        ruler: Times them.

    Raises:
        MissingExtraError: accelerate is not installed.
        InvalidInputError: There is no batch, or no repeat.
        MismatchError: The twin in transformers has another loss.
    """
    if batches < 1 or repeats < 1:
        raise InvalidInputError("batches and repeats must be at least 1")
    check_peer()
    ruler = ruler or Ruler()
    plan = replace(
        plan, steps=batches, optimizer="adamw", precision="32-true", accumulate=1, ema=0.0,
        schedule="linear", validate_every=batches, save_every=batches, log_every=10,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        made = system.untrained(settings, data)
    pad, learner = made.module.config.pad_id, made.learner(data, plan)
    learner.validate = dict  # type: ignore[method-assign]  # steps are timed
    ours, pairs = Tally(), list[Example]()
    for part in range(batches):
        batch = learner.batch(part)
        ours.note(batch, (pad, pad))
        sides = ([row[row != pad] for row in side] for side in batch)
        pairs += zip(*sides, strict=True)
    smoothing = float(getattr(settings, "label_smoothing", 0.0))
    twin = copy.deepcopy(made.module.to_hf())
    _check_twin(made.module, twin, learner.batch(0), pad)
    rows = max(1, round(ours.rows / ours.batches))
    tallies = {OURS: ours, THEIRS: Tally(), GROUPED: Tally()}

    def loop() -> None:
        Trainer(learner, plan).run()

    def peer(name: str) -> Callable[[], None]:
        def run() -> None:
            tallies[name] = Tally()
            _theirs(twin, pairs, pad, rows, plan, smoothing, name == GROUPED, tallies[name])

        return run

    runs = {THEIRS: peer(THEIRS), OURS: loop, GROUPED: peer(GROUPED)}
    timings = ruler.compare(runs, repeats=repeats)
    tokens = sum(ours.real)
    found = []
    for name, tally in tallies.items():
        inputs, outputs = (1 - r / p for r, p in zip(tally.real, tally.padded, strict=True))
        faster = ratio(timings[THEIRS], timings[name])
        mean = tally.rows / tally.batches
        speed = tokens / timings[name].median_s
        found.append(Line(name, speed, faster, inputs, outputs, mean, tally.batches))
    return found


@torch.no_grad()
def _check_twin(module: Any, twin: Any, batch: Sequence[torch.Tensor], pad: int) -> None:
    source, target = batch
    module.eval()
    logits = module(source, shifted(target, pad))
    keep = target != pad
    mine = torch.nn.functional.cross_entropy(logits[keep], target[keep])
    labels = target.masked_fill(~keep, -100)
    theirs = twin(input_ids=source, attention_mask=(source != pad).long(), labels=labels).loss
    if abs(float(mine) - float(theirs)) > 1e-3 * float(theirs):
        raise MismatchError(f"the twin in transformers has a loss of {theirs}, ours {mine}")


def _theirs(
    twin: Any,
    pairs: Sequence[Example],
    pad: int,
    rows: int,
    plan: Plan,
    smoothing: float,
    grouped: bool,
    tally: Tally,
) -> None:
    """One epoch of the Trainer over the pairs."""
    import transformers

    def collate(chosen: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        source = pad_sequence([x["input_ids"] for x in chosen], True, pad)
        labels = pad_sequence([x["labels"] for x in chosen], True, -100)
        tally.note((source, labels), (pad, -100))
        inputs = shifted(labels.masked_fill(labels == -100, pad), pad)
        return {
            "input_ids": source,
            "attention_mask": (source != pad).long(),
            "labels": labels,
            "decoder_input_ids": inputs,
        }

    with tempfile.TemporaryDirectory() as place:
        arguments = transformers.TrainingArguments(
            place,
            num_train_epochs=1,
            per_device_train_batch_size=rows,
            learning_rate=plan.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=plan.warmup_steps,
            adam_beta1=plan.betas[0],
            adam_beta2=plan.betas[1],
            weight_decay=plan.weight_decay,
            max_grad_norm=plan.clip_norm,
            label_smoothing_factor=smoothing,
            train_sampling_strategy="group_by_length" if grouped else "random",
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            seed=plan.seed,
        )
        records = [{"input_ids": source, "labels": target} for source, target in pairs]
        trainer = transformers.Trainer(
            twin, arguments, train_dataset=records, data_collator=collate,
            callbacks=[],
        )  # fmt: skip
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
