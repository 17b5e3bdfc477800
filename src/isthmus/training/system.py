"""What systems that are trained share: scales, files, and the way from data to a trained system.

::

    settings, data ──untrained()──▶ system ──learner(data, plan)──▶ Trainer ──▶ system, trained
                                       │
            save_pretrained / from_pretrained, run(input)

A system says at each scale what it is trained on and how (:class:`Scale`), how it is made for a
data set, and what a step of learning is (:class:`~isthmus.roles.Learner`). The loop, its
checkpoints and its processes are :mod:`isthmus.training.loop`'s.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from isthmus import folders
from isthmus.errors import BrokenFileError, MismatchError
from isthmus.folders import digest, published
from isthmus.roles import Learner
from isthmus.settings import tuples
from isthmus.training.data import Data
from isthmus.training.loop import Plan, Progress, State, Trainer

CONFIG, WEIGHTS = "isthmus.json", "model.safetensors"


@dataclass(frozen=True)
class Scale:
    """How a system is trained at one scale.

    Attributes:
        settings: The system's settings.
        plan: The training.
        data: What it is trained on: ``workbench:NAME``, or a data set of the hub.
    """

    settings: Any
    plan: Plan
    data: str


@dataclass(frozen=True)
class Answer:
    """What a system makes of an input.

    Attributes:
        text: What a person reads.
        record: The same as plain data, for ``--json``.
        save: Writes the result to a file in its own medium; None where the text is all.
    """

    text: str
    record: dict[str, Any] = field(default_factory=dict)
    save: Callable[[Path], None] | None = None


class TrainedSystem:
    """Base of the systems that are trained as a whole.

    A subclass sets the class attributes, :meth:`learner` and :meth:`run`. What it takes from its
    data set it reads in :meth:`untrained`, and whatever it needs besides settings and weights (a
    tokenizer, a vocabulary) it writes and reads in :meth:`write_files` and :meth:`read_files`.

    Attributes:
        name: The slug.
        reads: Kind of record it is trained on, a name in :data:`isthmus.training.data.KINDS`.
        settings_type: A frozen dataclass.
        scales: ``test`` (seconds), ``small`` (minutes on two cores) and ``paper``.
        module: What is trained.
        settings: Its settings.
        record: How it was trained: scale, steps, validation curve.
    """

    role: ClassVar[str] = "trained"
    name: ClassVar[str]
    reads: ClassVar[str]
    settings_type: ClassVar[type]
    scales: ClassVar[Mapping[str, Scale]]

    module: nn.Module
    settings: Any

    def __init__(self, settings: Any) -> None:
        self.settings = settings
        self.record: dict[str, Any] = {}

    # what a system fills in ------------------------------------------------------------------

    @classmethod
    def untrained(cls, settings: Any, data: Data[Any]) -> Self:
        """A new system for a data set; weights are drawn from torch's generator."""
        del data
        return cls(settings)

    def learner(self, data: Data[Any], plan: Plan) -> Learner:
        """What the loop trains: batches, loss and validation over ``self.module``."""
        raise NotImplementedError

    def run(self, given: str) -> Answer:
        """Make something of one input: a text, or the path of a file.

        Raises:
            InvalidInputError: It is of a kind that the system does not read.
        """
        raise NotImplementedError

    def write_files(self, folder: Path) -> None:
        """Write weights, and whatever else :meth:`read_files` needs."""
        weights = {k: v.detach().cpu().contiguous() for k, v in self.module.state_dict().items()}
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})

    @classmethod
    def read_files(cls, settings: Any, folder: Path) -> Self:
        """A system with the weights of a folder."""
        return cls(settings).load_weights(folder)

    def load_weights(self, folder: Path) -> Self:
        """Fill ``self.module`` with the weights of a folder; see :meth:`read_files`."""
        self.module.load_state_dict(load_file(folder / WEIGHTS))
        self.module.eval()
        return self

    # files ------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the system, replacing an older one in that folder as a whole.

        Raises:
            InvalidInputError: The folder holds something else.
            BrokenFileError: It cannot be written.
        """
        folder = Path(folder)
        folders.check_replaceable(folder, (CONFIG,), "trained system")
        with published(folder) as part:
            self.write_files(part)
            config = {
                "system": self.name,
                "settings": asdict(self.settings),
                "sha256": digest(part / WEIGHTS),
                "training": self.record,
            }
            (part / CONFIG).write_text(json.dumps(config, indent=1))

    @classmethod
    def embedded(cls) -> Path | None:
        """Folder of the one that comes with isthmus, if one does."""
        folder = folders.EMBEDDED / cls.name
        return folder if (folder / CONFIG).exists() else None

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read a system that was trained.

        Raises:
            BrokenFileError: A file is missing, truncated or altered.
            MismatchError: It is another system.
        """
        folder = Path(folder)
        config = read_config(folder)
        if config["system"] != cls.name:
            raise MismatchError(f"{folder} holds {config['system']}, not {cls.name}")
        try:
            if digest(folder / WEIGHTS) != config["sha256"]:
                raise BrokenFileError(
                    f"{folder / WEIGHTS} was altered or cut short; train the system again"
                )
            system = cls.read_files(cls.settings_type(**tuples(config["settings"])), folder)
        except (OSError, SafetensorError, TypeError, RuntimeError, KeyError) as error:
            first = str(error).strip().splitlines()[0]
            raise BrokenFileError(f"the system in {folder} cannot be read ({first})") from error
        system.record = config.get("training", {})
        return system


def read_config(folder: Path) -> dict[str, Any]:
    """The ``isthmus.json`` of a trained system's folder.

    Raises:
        BrokenFileError: It is missing or damaged.
    """
    return folders.read_record(folder / CONFIG, ("system", "settings", "sha256"), "system")


def train(
    system: type[TrainedSystem],
    data: Data[Any],
    settings: Any,
    plan: Plan,
    *,
    out: str | Path | None = None,
    report: Callable[[Progress], None] | None = None,
    **devices: Any,
) -> TrainedSystem:
    """Make a system for a data set and train it.

    Args:
        system: Its class.
        data: What it learns from and is judged by.
        settings: Its settings.
        plan: How it is trained.
        out: Folder to write, by rank 0 of several processes. The unfinished run is kept beside
            it, so the same call goes on where an interrupted one stopped, and metrics go into
            ``out.metrics.jsonl``. None keeps nothing.
        report: Called after every step.
        **devices: ``accelerator``, ``devices``, ``nodes`` and ``strategy`` of
            :class:`~isthmus.training.loop.Trainer`.

    Returns:
        The system with its best weights.

    Raises:
        InvalidInputError: ``out`` holds something else.
        KeyboardInterrupt: Ctrl-C; the run was written down first.
    """
    if out is not None:  # before minutes are spent
        out = Path(out)
        folders.check_replaceable(out, (CONFIG,), "trained system")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        made = system.untrained(settings, data)
    learner = made.learner(data, plan)
    trainer = Trainer(
        learner,
        plan,
        state=None if out is None else out.with_name(f"{out.name}.unfinished.safetensors"),
        metrics=None if out is None else metrics_file(out),
        **devices,
    )
    state: State = trainer.run(report)
    made.record = {
        "data": data.name,
        "records": [len(data.train), len(data.valid)],
        "steps": state.step,
        "best_step": state.best_step,
        "seconds": round(state.seconds, 1),
        "seed": plan.seed,
        "validation": state.curve,
    }
    if profile := getattr(learner, "profile", None):  # of batches of like lengths
        made.record["batches"] = profile.to_dict()
    if out is not None and trainer.fabric.is_global_zero:
        made.save_pretrained(out)
    return made


def metrics_file(out: Path) -> Path:
    """Where the metrics of the system that is written to ``out`` are logged."""
    return out.with_name(f"{out.name}.metrics.jsonl")
