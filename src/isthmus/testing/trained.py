"""The contract of a trained system: it resumes to the same weights, and survives its files."""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import torch

from isthmus.roles import Learner
from isthmus.training.data import KINDS, Data
from isthmus.training.loop import Plan, Progress, Trainer
from isthmus.training.system import TrainedSystem, train


def check_trained(
    system: type[TrainedSystem], data: Data[Any], *, settings: Any = None, plan: Plan | None = None
) -> None:
    """Check that a system keeps the contract of :class:`isthmus.training.system.TrainedSystem`.

    It says what it is at three scales; weights and batches follow from their seeds; a run that is
    interrupted ends in the weights of one that is not; what is written is read back bit for bit.

    Args:
        system: Its class.
        data: A few records of its kind.
        settings: Small ones; those of the scale ``test`` when None.
        plan: Of at least 4 steps; that of the scale ``test`` when None.

    Raises:
        AssertionError: The contract is broken; the message says where.
    """
    assert system.reads in KINDS, f"it reads {system.reads}, which is no kind of data"
    assert {"test", "small", "paper"} <= set(system.scales), f"scales: {set(system.scales)}"
    for name, scale in system.scales.items():
        assert type(scale.settings) is system.settings_type, f"settings of the scale {name}"
    told = system.scales["test"]
    settings, plan = settings or told.settings, plan or told.plan
    assert plan.steps >= 4, "give a plan of at least 4 steps"

    first, second = (_made(system, settings, data) for _ in range(2))
    _same(first.module.state_dict(), second.module.state_dict(), "one seed, two sets of weights")
    learner = first.learner(data, plan)
    assert isinstance(learner, Learner), "learner() must give a Learner"
    json.dumps(learner.identity)
    _same(_flat(learner.batch(3)), _flat(learner.batch(3)), "one number, two batches")

    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "out"
        straight = train(system, data, settings, plan, out=out)
        for check in straight.record["validation"]:
            assert all(math.isfinite(v) for v in check.values()), f"validation: {check}"
        _interrupt(_made(system, settings, data).learner(data, plan), plan, Path(place) / "state")
        resumed = _made(system, settings, data)
        Trainer(resumed.learner(data, plan), plan, state=Path(place) / "state").run()
        weights = straight.module.state_dict()
        _same(weights, resumed.module.state_dict(), "a resumed run ends in other weights")
        read = system.from_pretrained(out)
        _same(weights, read.module.state_dict(), "weights change on their way through a file")
        assert read.settings == settings and read.record == straight.record


def _made(system: type[TrainedSystem], settings: Any, data: Data[Any]) -> TrainedSystem:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return system.untrained(settings, data)


def _interrupt(learner: Learner, plan: Plan, state: Path) -> None:
    """Train half the way, as if the process had been killed there."""
    run = Trainer(learner, plan, state=state)

    def stop(now: Progress) -> None:
        if now.step == plan.steps // 2 + 1:
            raise KeyboardInterrupt

    try:
        run.run(stop)
    except KeyboardInterrupt:
        return


def _flat(batch: Any) -> dict[str, torch.Tensor]:
    """Tensors of a batch, whatever holds them."""
    if isinstance(batch, torch.Tensor):
        return {"": batch}
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        batch = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    if not isinstance(batch, (dict, list, tuple)):
        return {}
    parts = batch.items() if isinstance(batch, dict) else enumerate(batch)
    return {f"{k}.{n}": t for k, part in parts for n, t in _flat(part).items()}


def _same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], says: str) -> None:
    assert a.keys() == b.keys(), says
    for name in a:
        assert torch.equal(a[name], b[name]), f"{says}: {name}"
