"""The training loop: one explicit loop for everything that learns.

What is trained plays :class:`isthmus.roles.Learner`; how it is trained is a :class:`Plan`. A step::

    gradient  <- sum over micro-batches and processes of the loss, over what it is the sum of
    clip, optimiser step at the rate of the schedule, moving average
    every so often: validate, keep the best, write the run down

Losses are sums with their weights (tokens, frames, pixels), divided once by the weight of the whole
step: neither accumulation nor the number of processes changes what is learnt. Data and noise
follow from the seed and the step alone, so a run that is interrupted, even killed, goes on with the
very same numbers.

Precision, devices and processes are Lightning Fabric's (the extra ``train``): several processes by
``torchrun``, data-parallel or sharded.
"""

from __future__ import annotations

import atexit
import dataclasses
import hashlib
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from torch import nn

from isthmus.errors import BrokenFileError, DivergedError, InvalidInputError, MismatchError, require
from isthmus.roles import Learner
from isthmus.training.optimizers import optimizer
from isthmus.training.schedules import schedule
from isthmus.training.seeds import draw_seed
from isthmus.training.state_file import read, under, write

Precision = Literal["32-true", "bf16-mixed", "bf16-true", "64-true"]


@dataclass(frozen=True)
class Plan:
    """How something is trained.

    Attributes:
        steps: Optimiser steps.
        optimizer: ``adamw``, ``adam``, ``adamw-scale``, ``adafactor``, ``adadelta``, ``sgd`` or
            ``em``.
        learning_rate: Its peak.
        schedule: ``cosine``, ``linear``, ``constant``, ``inverse-sqrt`` or another of
            :data:`~isthmus.training.schedules.SCHEDULES`.
        warmup_steps: Steps over which the rate rises.
        betas: Decay of the moments; the first is SGD's momentum.
        weight_decay: Decoupled, of matrices only.
        clip_norm: Largest norm of the gradient; 0 is none.
        accumulate: Micro-batches a step.
        ema: Decay of the moving average of the weights that is validated and kept; 0 is none.
        validate_every: Steps between two validations; the last step always has one.
        save_every: Steps between two checkpoints besides.
        log_every: Steps between two lines of the metrics.
        patience: Validations without a new best after which training ends; 0 is never.
        precision: ``32-true``, ``bf16-mixed``, ``bf16-true`` or ``64-true``.
        seed: Seed of weights, data order and noise.

    Raises:
        InvalidInputError: A value is out of range.
    """

    steps: int
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    schedule: str = "cosine"
    warmup_steps: int = 0
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    accumulate: int = 1
    ema: float = 0.0
    validate_every: int = 200
    save_every: int = 200
    log_every: int = 10
    patience: int = 0
    precision: Precision = "32-true"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "accumulate", "validate_every", "save_every", "log_every"):
            if getattr(self, name) < 1:
                raise InvalidInputError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("warmup_steps", "weight_decay", "clip_norm", "patience"):
            if getattr(self, name) < 0:
                raise InvalidInputError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if not 0 <= self.ema < 1:
            raise InvalidInputError(f"ema must be at least 0 and below 1, got {self.ema}")
        if self.learning_rate <= 0:
            raise InvalidInputError(f"learning_rate must be positive, got {self.learning_rate}")
        if self.precision not in ("32-true", "bf16-mixed", "bf16-true", "64-true"):
            raise InvalidInputError(
                f"precision must be 32-true, bf16-mixed, bf16-true or 64-true, got {self.precision}"
            )
        schedule(self.schedule)

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        return self.learning_rate * schedule(self.schedule)(step, self.warmup_steps, self.steps)


@dataclass
class State:
    """Where a run stands: everything but tensors.

    Attributes:
        step: Steps taken.
        seconds: Time spent in steps and validations.
        best: Best value of the metric that decides, None before the first validation.
        best_step: The step it was reached at.
        waited: Validations since then.
        curve: One entry a validation: ``step`` and its metrics.
    """

    step: int = 0
    seconds: float = 0.0
    best: float | None = None
    best_step: int = 0
    waited: int = 0
    curve: list[dict[str, float]] = dataclasses.field(default_factory=list)


@dataclass(frozen=True)
class Progress:
    """What a run reports after each step.

    Attributes:
        step: Steps taken.
        steps: Steps in all.
        loss: Mean loss of the step.
        seconds: Time spent, earlier sessions included.
        validation: Metrics, where this step had a validation.
    """

    step: int
    steps: int
    loss: float
    seconds: float
    validation: dict[str, float] | None = None


class Trainer:
    """One run, resumable at the exact step.

    Args:
        learner: What is trained; its module is in place when a run ends, with the best weights.
        plan: How.
        state: File that keeps the unfinished run (safetensors); None keeps nothing.
        metrics: File of JSON lines, one every ``log_every`` steps and one a validation.
        accelerator: ``auto``, ``cpu``, ``cuda`` ...
        devices: Processes on this machine; under torchrun, as it was told.
        nodes: Machines.
        strategy: ``auto``, ``ddp``, or ``fsdp``, which shards weights, gradients and moments.

    Raises:
        MissingExtraError: Lightning Fabric is not installed.
        MismatchError: ``state`` belongs to another run.
        BrokenFileError: ``state`` is damaged.
    """

    def __init__(
        self,
        learner: Learner,
        plan: Plan,
        *,
        state: Path | None = None,
        metrics: Path | None = None,
        accelerator: str = "cpu",
        devices: int = 1,
        nodes: int = 1,
        strategy: Literal["auto", "ddp", "fsdp"] = "auto",
    ) -> None:
        self.learner, self.plan, self.path, self.metrics = learner, plan, state, metrics
        self.fabric = _fabric(plan.precision, accelerator, devices, nodes, strategy)
        self.fabric.launch()
        if self.fabric.world_size > 1:
            # a process that ends with its connections open now and then aborts (gloo)
            atexit.register(_disconnect)
        self.module = learner.module
        wrapped = self.fabric.setup_module(self.module)
        self.optimizer = self.fabric.setup_optimizers(
            optimizer(
                plan.optimizer,
                wrapped.parameters(),
                lr=plan.learning_rate,
                betas=plan.betas,
                weight_decay=plan.weight_decay,
            )
        )
        learner.module = wrapped
        self.parameters: list[Any] = [p for p in wrapped.parameters() if p.requires_grad]
        self.average = [p.detach().clone() for p in self.parameters] if plan.ema else []
        self.best: dict[str, torch.Tensor] = {}
        self.state = State()
        self.stopping = False
        if state is not None and state.exists():
            self._load(state)

    @property
    def identity(self) -> dict[str, Any]:
        """What a run is: its learner, plan and shapes; a resumed run must have the same."""
        shapes = sorted((name, list(p.shape)) for name, p in self.module.named_parameters())
        digest = hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:16]
        plan = {k: v for k, v in dataclasses.asdict(self.plan).items() if k != "log_every"}
        said = {"learner": self.learner.identity, "plan": plan, "shapes": digest}
        plain: dict[str, Any] = json.loads(json.dumps(said))
        return plain

    def run(self, report: Callable[[Progress], None] | None = None) -> State:
        """Train to the end; the learner's module then holds the best weights, in eval mode.

        Args:
            report: Called after every step.

        Raises:
            KeyboardInterrupt: Ctrl-C or SIGTERM; the step was finished and the run written down.
            DivergedError: The loss is not finite; what was written down before stays.
        """
        plan, state = self.plan, self.state
        self._trim_metrics()
        with _deferred_signals() as interrupted:
            while state.step < plan.steps and not self.stopping:
                begin = time.perf_counter()
                loss, norm, extra = self._step()
                state.step += 1
                last = state.step == plan.steps
                validation = None
                if last or state.step % plan.validate_every == 0:
                    validation = self._validate()
                state.seconds += time.perf_counter() - begin
                if last or state.step % plan.log_every == 0:
                    self._log(
                        {
                            "step": state.step,
                            "loss": loss,
                            "learning_rate": plan.rate(state.step - 1),
                            "gradient_norm": norm,
                            "seconds": round(state.seconds, 3),
                            **extra,
                        }
                    )
                if validation is not None:
                    self._log({"step": state.step, "validation": validation})
                if report is not None and self.fabric.is_global_zero:
                    report(Progress(state.step, plan.steps, loss, state.seconds, validation))
                if validation is not None or state.step % plan.save_every == 0 or interrupted:
                    self._save()
                if interrupted:
                    raise KeyboardInterrupt
        self._finish()
        return state

    def _step(self) -> tuple[float, float, dict[str, float]]:
        """Take one step; returns loss, gradient norm, and metrics of the learner."""
        plan, fabric, state = self.plan, self.fabric, self.state
        ranks, rank = fabric.world_size, fabric.global_rank
        for group in self.optimizer.param_groups:
            group["lr"] = plan.rate(state.step)
        self.learner.module.train()
        sums: dict[str, torch.Tensor] = {}
        parts = ranks * plan.accumulate
        for micro in range(plan.accumulate):
            part = state.step * parts + micro * ranks + rank
            batch = fabric.to_device(self.learner.batch(part))
            with self._noise(part), self._unsynchronised(micro < plan.accumulate - 1):
                loss = self.learner.loss(batch)
                fabric.backward(loss.total)
            told = {"loss": loss.total.detach(), "weight": loss.weight, **loss.sums}
            for name, value in told.items():
                value = torch.as_tensor(value, dtype=torch.float64, device=fabric.device)
                sums[name] = sums.get(name, torch.zeros_like(value)) + value
        names = sorted(sums)
        total = fabric.all_reduce(torch.stack([sums[name] for name in names]), reduce_op="sum")
        found = dict(zip(names, total.tolist(), strict=True))
        weight, value = found.pop("weight"), found.pop("loss")
        if weight <= 0:
            raise InvalidInputError(f"nothing in the batch of step {state.step + 1} has a loss")
        if not math.isfinite(value):
            self._refuse("loss", value)
        # data-parallel gradients are means over processes; what is wanted is sum over weight
        grads = [p.grad for p in self.parameters if p.grad is not None]
        torch._foreach_mul_(grads, ranks / weight)
        norm = torch.nn.utils.get_total_norm(grads)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        if not math.isfinite(float(norm)):
            self._refuse("gradient", float(norm))
        if plan.clip_norm and float(norm) > plan.clip_norm:
            torch._foreach_mul_(grads, plan.clip_norm / (float(norm) + 1e-6))
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average:
            with torch.no_grad():
                torch._foreach_lerp_(self.average, self.parameters, 1 - plan.ema)
        return value / weight, float(norm), {k: v / weight for k, v in found.items()}

    def _refuse(self, what: str, value: float) -> None:
        self.optimizer.zero_grad()
        there = self.path is not None and self.path.exists()
        kept = f"; {self.path} keeps the run as it was before" if there else ""
        raise DivergedError(
            f"the {what} of step {self.state.step + 1} is not finite ({value}); lower "
            f"learning_rate or look at the data{kept}"
        )

    @contextmanager
    def _noise(self, part: int) -> Iterator[None]:
        """Dropout and the like draw from a seed of this part of the run, and leave no trace."""
        cuda = [self.fabric.device] if self.fabric.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            torch.manual_seed(draw_seed(self.plan.seed, part))
            yield

    def _unsynchronised(self, enabled: bool) -> Any:
        return self.fabric.no_backward_sync(self.learner.module, enabled=enabled)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The moving average in the place of the weights."""
        if not self.average:
            yield
            return
        held = [p.detach().clone() for p in self.parameters]
        _copy_all(self.parameters, self.average)
        try:
            yield
        finally:
            _copy_all(self.parameters, held)

    def _validate(self) -> dict[str, float]:
        state, learner = self.state, self.learner
        with self._averaged():
            learner.module.eval()
            with torch.no_grad(), self._noise(-1):
                found = {name: float(value) for name, value in learner.validate().items()}
            state.curve.append({"step": state.step, **found})
            decisive = next(iter(found.values()), None)
            better = decisive is None or (
                math.isfinite(decisive)
                and (
                    state.best is None
                    or (decisive < state.best if learner.lower_is_better else decisive > state.best)
                )
            )
            state.waited = 0 if better else state.waited + 1
            if better:
                state.best, state.best_step = decisive, state.step
                self.best = self.weights()
        self.stopping = bool(self.plan.patience) and state.waited >= self.plan.patience
        return found

    def weights(self) -> dict[str, torch.Tensor]:
        """All weights, whole, on the CPU; every process has to ask for them."""
        return {k: _whole(v) for k, v in self.module.state_dict().items()}

    def _finish(self) -> None:
        if self.best:
            self._put(self.best)
        self.learner.module = self.module.eval()
        if self.path is not None and self.fabric.is_global_zero:
            self.path.unlink(missing_ok=True)

    def _put(self, weights: dict[str, torch.Tensor]) -> None:
        for name, value in self.module.state_dict().items():
            _fill(value, weights[name])

    def _save(self) -> None:
        if self.path is None:
            return
        tensors = {f"now.{k}": v for k, v in self.weights().items()}
        tensors |= {f"best.{k}": v for k, v in self.best.items()}
        for i, parameter in enumerate(self.parameters):
            if self.average:
                tensors[f"average.{i}"] = _whole(self.average[i])
            for name, value in self.optimizer.optimizer.state[parameter].items():
                tensors[f"moments.{i}.{name}"] = _whole(value)
        if not self.fabric.is_global_zero:
            return
        note = {"identity": self.identity, "state": dataclasses.asdict(self.state)}
        write(self.path, tensors, note)

    def _load(self, path: Path) -> None:
        tensors, note = read(path)
        mine, theirs = self.identity, note["identity"]
        if mine != theirs:
            changed = [k for k in mine if mine[k] != theirs.get(k)]
            raise MismatchError(
                f"the unfinished run in {path} has another {' and '.join(changed)}; repeat the "
                "command it was started with, or delete that file to begin anew"
            )

        self._put(under(tensors, "now."))
        self.best = under(tensors, "best.")
        for i, parameter in enumerate(self.parameters):
            if self.average:
                _fill(self.average[i], tensors[f"average.{i}"])
            moments = under(tensors, f"moments.{i}.")
            if moments:
                self.optimizer.optimizer.state[parameter] = {
                    name: value if value.ndim == 0 else _like(parameter, value)
                    for name, value in moments.items()
                }
        self.state = State(**note["state"])
        if self.state.step >= self.plan.steps:
            self.stopping = True

    def _log(self, line: dict[str, Any]) -> None:
        if self.metrics is None or not self.fabric.is_global_zero:
            return
        try:
            self.metrics.parent.mkdir(parents=True, exist_ok=True)
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise BrokenFileError(f"{self.metrics} cannot be written ({error.strerror})") from error

    def _trim_metrics(self) -> None:
        """Lines behind the step that a run goes on from are written again."""
        if self.metrics is None or not self.metrics.exists() or not self.fabric.is_global_zero:
            return
        kept = []
        for line in self.metrics.read_text().splitlines(keepends=True):
            try:
                if json.loads(line)["step"] <= self.state.step:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                continue  # half a line of a run that was killed
        part = self.metrics.with_suffix(".part")
        part.write_text("".join(kept))
        part.replace(self.metrics)


def _whole(value: Any) -> torch.Tensor:
    """A tensor that may be sharded, whole and on the CPU, in memory of its own."""
    whole = value.full_tensor() if hasattr(value, "full_tensor") else value
    copy: torch.Tensor = whole.detach().cpu().contiguous().clone()
    return copy


def _like(model: Any, value: torch.Tensor) -> torch.Tensor:
    """A whole tensor, placed and sharded as another one is."""
    value = value.to(model.device)
    if hasattr(model, "full_tensor") and value.shape == model.shape:
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value, model.device_mesh, model.placements)
    return value


@torch.no_grad()
def _fill(into: torch.Tensor, value: torch.Tensor) -> None:
    into.copy_(_like(into, value))


@torch.no_grad()
def _copy_all(into: list[torch.Tensor], source: list[torch.Tensor]) -> None:
    for to, value in zip(into, source, strict=True):  # sharded tensors have no _foreach_copy_
        to.copy_(value)


def _fabric(precision: str, accelerator: str, devices: int, nodes: int, strategy: str) -> Any:
    fabric = require("lightning_fabric", "train")
    chosen: Any = strategy
    if strategy == "fsdp":
        parallel = require("lightning_fabric.strategies", "train")
        chosen = parallel.ModelParallelStrategy(
            parallelize_fn=_shard, data_parallel_size=devices * nodes, tensor_parallel_size=1
        )
    return fabric.Fabric(
        accelerator=accelerator,
        devices=devices,
        num_nodes=nodes,
        strategy=chosen,
        precision=precision,
    )


def _disconnect() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _shard(module: nn.Module, mesh: Any) -> nn.Module:
    """Shard the layers of every list of layers, then what is left."""
    from torch.distributed.fsdp import fully_shard

    data = mesh["data_parallel"]
    for part in module.modules():
        if isinstance(part, nn.ModuleList):
            for layer in part:
                fully_shard(layer, mesh=data)
    fully_shard(module, mesh=data)
    return module


@contextmanager
def _deferred_signals() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM are noted, and acted on between two steps."""
    noted: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        del frame
        if noted:  # asked twice: at once
            raise KeyboardInterrupt
        noted.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield noted
        return
    before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
