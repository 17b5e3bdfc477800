"""The picture of a training run, drawn from its metrics file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from isthmus.errors import require


def plot(metrics: Path, picture: Path) -> None:
    """Draw loss, learning rate and every validation metric over the steps.

    Args:
        metrics: JSON lines, as :class:`~isthmus.training.loop.Trainer` writes them.
        picture: PNG file to write.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    require("matplotlib", "plot")
    from matplotlib.figure import Figure

    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    checks = [line for line in lines if "validation" in line]
    names = list(checks[0]["validation"]) if checks else []
    curves: list[tuple[str, list[Any], list[Any]]] = [
        (name, [s["step"] for s in steps], [s[name] for s in steps])
        for name in ("loss", "learning_rate")
    ] + [
        (f"validation {n}", [c["step"] for c in checks], [c["validation"][n] for c in checks])
        for n in names
    ]
    figure = Figure(figsize=(4 * len(curves), 3), layout="constrained")
    for i, (name, x, y) in enumerate(curves, 1):
        axes = figure.add_subplot(1, len(curves), i)
        axes.plot(x, y, marker="." if len(x) < 30 else "")
        axes.set_title(name.replace("_", " "))
        axes.set_xlabel("step")
    figure.savefig(picture, dpi=100)
