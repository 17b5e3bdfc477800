"""Systems trained once at a scale, for ``isthmus run SLUG`` and for claims, kept in the cache."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from isthmus.errors import UnknownNameError
from isthmus.folders import kept
from isthmus.training.data import Data
from isthmus.training.loop import Plan, Progress
from isthmus.training.system import CONFIG, Scale, TrainedSystem, train


def scale_of(system: type[TrainedSystem], name: str) -> Scale:
    """A system's scale by name.

    Raises:
        UnknownNameError: It has no such scale.
    """
    if name not in system.scales:
        raise UnknownNameError("scale", name, system.scales)
    return system.scales[name]


def at_hand(system: type[TrainedSystem], report: Callable[[Progress], None] | None = None) -> Path:
    """Folder of a trained system: the one in the package, or else trained now at the scale small.

    Args:
        system: Its class.
        report: Called after every step of a training.
    """
    return system.embedded() or trained(system, report=report)


def trained(
    system: type[TrainedSystem],
    scale: str = "small",
    *,
    settings: Any = None,
    plan: Plan | None = None,
    data: Data[Any] | None = None,
    report: Callable[[Progress], None] | None = None,
) -> Path:
    """Folder of a trained system, trained now if it has not been.

    Args:
        system: Its class.
        scale: ``test``, ``small`` or ``paper``: what the arguments below default to.
        settings: Other settings.
        plan: Another training.
        data: Other data.
        report: Called after every step of a training.

    Raises:
        UnknownNameError: No such scale.
    """
    chosen = scale_of(system, scale)
    settings = settings or chosen.settings
    plan = plan or chosen.plan
    key = {
        "system": system.name,
        "settings": asdict(settings),
        "plan": asdict(plan),
        "data": chosen.data if data is None else data.fingerprint,
        # another program trains another system
        "source": hashlib.sha256(Path(inspect.getfile(system)).read_bytes()).hexdigest(),
    }
    with kept("systems", f"{system.name}-{scale}", key) as folder:
        if not (folder / CONFIG).exists():
            if data is None:
                # not above: what is trained already opens seconds sooner without all data sets
                from isthmus.workbench.data import data as named_data

                data = named_data(chosen.data, system.reads)
            train(system, data, settings, plan, out=folder, report=report)
        return folder
