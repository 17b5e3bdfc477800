"""A scaling law beside its runs, as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from isthmus.errors import require
from isthmus.laws.fit import ScalingLaw
from isthmus.laws.forwards import COLOURS, check_picture, save

_REACH = 10.0
"""How far beyond the runs the curve is drawn."""


def draw_law(path: str | Path, law: ScalingLaw, *, title: str = "") -> None:
    """Draw runs, law and interval; the quarter of the largest runs is ringed.

    With one variable, loss against it, up to ten times beyond the runs (shaded). With several,
    measured against fitted losses: points on the line are told exactly.

    Args:
        path: A .png, .svg or .pdf file.
        law: What :func:`isthmus.laws.fit.fit` gave.
        title: Above the picture; the law's equation when empty.

    Raises:
        MissingExtraError: matplotlib is not installed.
        InvalidInputError: The file is of another kind.
        BrokenFileError: It cannot be written.
    """
    path = Path(path)
    check_picture(path)
    figure_class: Any = require("matplotlib.figure", "plot").Figure
    ticker: Any = require("matplotlib.ticker", "plot")
    figure = figure_class(figsize=(7.2, 4.8), layout="constrained")
    axes = figure.subplots()
    runs = law.runs
    large = runs.split()[1]
    if len(runs.variables) == 1:
        name = runs.variables[0]
        least, most = runs.x.min(), runs.x.max()
        x = np.geomspace(least, _REACH * most, 120)
        told = law.predict({name: x})
        low, high = [v.low for v in told], [v.high for v in told]
        axes.fill_between(x, low, high, color=COLOURS[0], alpha=0.2, lw=0, label="95 % interval")
        axes.plot(x, [v.value for v in told], c=COLOURS[0], lw=1.6, label="law")
        axes.axvspan(most, x[-1], color="0.5", alpha=0.12, lw=0, label="beyond the runs")
        axes.plot(runs.x[:, 0], runs.loss, "o", c="0.25", ms=5, label="runs")
        axes.plot(large.x[:, 0], large.loss, "o", mfc="none", mec=COLOURS[1], ms=10)
        axes.set(xscale="log", yscale="log", xlabel=name, ylabel="loss", xlim=(least / 1.1, x[-1]))
    else:
        told = law.predict(dict(zip(runs.variables, runs.x.T, strict=True)))
        fitted = np.array([v.value for v in told])
        both = np.concatenate([fitted, runs.loss])
        ends = (both.min() / 1.02, both.max() * 1.02)
        axes.plot(ends, ends, c="0.25", lw=1, label="exact")
        axes.plot(fitted, runs.loss, "o", c=COLOURS[0], ms=5, label="runs")
        sizes = dict(zip(runs.variables, large.x.T, strict=True))
        largest = [v.value for v in law.predict(sizes)]
        axes.plot(largest, large.loss, "o", mfc="none", mec=COLOURS[1], ms=10)
        axes.set(xscale="log", yscale="log", xlabel="fitted loss", ylabel="measured loss")
    axes.plot([], [], "o", mfc="none", mec=COLOURS[1], ms=10, label="largest quarter")
    for axis in (axes.yaxis, *((axes.xaxis,) if len(runs.variables) > 1 else ())):
        low, high = sorted(axis.get_view_interval())
        if high < 10 * low:  # a decade has too few powers of ten to read values off
            axis.set_major_locator(ticker.MaxNLocator(5, steps=(1, 2, 5, 10)))
            axis.set_minor_locator(ticker.NullLocator())
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("{x:.3g}")
        axis.set_tick_params(which="minor", labelsize=7)
    axes.grid(which="major", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    axes.set_title(title or str(law), loc="left", fontsize=10)
    save(figure, path)
