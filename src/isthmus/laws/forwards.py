"""Forwards of a target beside the least time they can take, as numbers and as a picture."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isthmus.decoding.cost import measure_cost
from isthmus.decoding.target import HubTarget
from isthmus.errors import InvalidInputError, require
from isthmus.folders import writable
from isthmus.laws.opcount import Footprint, Work
from isthmus.laws.roofline import Roof, dtype_name

CACHED = (128, 512, 2048)
"""Cached tokens that forwards are timed on."""

ROOM = 66
"""Tokens that the largest timed forward takes after the cached ones."""

PICTURES = (".png", ".svg", ".pdf")

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
"""Of Okabe and Ito, told apart by colour-blind eyes."""


@dataclass(frozen=True)
class Forward:
    """One size of forward.

    Attributes:
        nodes: Tokens N computed.
        cached: Tokens S cached.
        work: The least that it has to do.
        floor_ms: The least milliseconds of that work on the machine.
        measured_ms: Milliseconds measured, lower quartile of the repeats.
        limit: What decides the floor: ``"memory"`` or ``"compute"``.
    """

    nodes: int
    cached: int
    work: Work
    floor_ms: float
    measured_ms: float
    limit: str

    @property
    def efficiency(self) -> float:
        """Floor over measured time: 1 is the roof."""
        return self.floor_ms / self.measured_ms

    @property
    def binds(self) -> str:
        """What most of the measured time goes to: the limit, or ``"overhead"`` above it."""
        return self.limit if self.efficiency >= 0.5 else "overhead"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "nodes": self.nodes,
            "cached": self.cached,
            "flops": self.work.flops,
            "bytes": self.work.bytes,
            "floor_ms": self.floor_ms,
            "measured_ms": self.measured_ms,
            "efficiency": self.efficiency,
            "limit": self.limit,
            "binds": self.binds,
        }


def forwards(
    target: HubTarget, roof: Roof, *, cached: Sequence[int] = (), budget_s: float = 4.0
) -> list[Forward]:
    """Time forwards of 1, 2, 4 ... 64 tokens and set them beside their floors.

    Args:
        target: The model.
        roof: The machine.
        cached: Cached tokens S; those of :data:`CACHED` that fit when none is given.
        budget_s: Repeat for about this long at each length.

    Raises:
        InvalidInputError: A cache is longer than the model's context.
    """
    most = max(1, (target.max_length or 10**9) - ROOM)
    lengths = list(cached) or [s for s in CACHED if s <= most] or [most]
    if not 1 <= min(lengths) <= max(lengths) <= most:
        raise InvalidInputError(
            f"this model has room for 1 to {most} cached tokens and a tree after them, got "
            f"{', '.join(map(str, lengths))}"
        )
    source = 0
    if target.encoder_decoder:
        source = target.encode(**target.probe_inputs())["encoder_outputs"][0].shape[1]
    footprint, dtype = Footprint.of(target), dtype_name(target.dtype)
    found = []
    for length in lengths:
        measured = measure_cost(target, length=length, budget_s=budget_s).seconds
        for nodes, seconds in measured.items():
            work = footprint.forward(nodes, length, source=source)
            floor_ms = 1e3 * roof.floor_s(work, dtype)
            limit = roof.bound(work, dtype)
            found.append(Forward(nodes, length, work, floor_ms, 1e3 * seconds, limit))
    return found


def draw(
    path: str | Path, roof: Roof, points: Sequence[Forward], dtype: str, *, title: str = ""
) -> None:
    """Draw forwards under the roof of the machine, both axes logarithmic.

    Args:
        path: Where to: a .png, .svg or .pdf file.
        roof: The machine.
        points: The forwards.
        dtype: How the numbers of the model are stored.
        title: Words above the picture.

    Raises:
        MissingExtraError: matplotlib is not installed.
        InvalidInputError: The file is of another kind.
        BrokenFileError: It cannot be written.
    """
    path = Path(path)
    check_picture(path)
    figure_class: Any = require("matplotlib.figure", "plot").Figure
    figure = figure_class(figsize=(7.2, 4.8), layout="constrained")
    axes = figure.subplots()
    axes.set(xscale="log", yscale="log")
    size = max(p.work.bytes for p in points)
    peak = roof.peak(dtype).best / 1e9
    reads = [(roof.memory.best / 1e9, "memory", "-")]
    if roof.bandwidth(size).best > 1.1 * roof.memory.best:
        reads.append((roof.bandwidth(size).best / 1e9, "cache", "--"))
    rates = [p.work.flops / p.measured_ms / 1e6 for p in points]
    places = [p.work.intensity for p in points]
    left, right = min(places) / 2, 3 * max(*places, peak / reads[0][0])
    bottom, top = min(*rates, left * reads[0][0]) / 2, peak * 3
    axes.set(xlim=(left, right), ylim=(bottom, top))
    for rate, _, style in reads:
        axes.plot([left, peak / rate, right], [left * rate, peak, peak], style, c="0.25", lw=1.5)
    axes.text(right / 1.1, peak * 1.1, f"{peak:.3g} GFLOP/s", ha="right", color="0.25", fontsize=9)
    for i, length in enumerate(dict.fromkeys(p.cached for p in points)):
        chosen = [k for k, p in enumerate(points) if p.cached == length]
        colour = COLOURS[i % len(COLOURS)]
        x, y = [places[k] for k in chosen], [rates[k] for k in chosen]
        axes.plot(x, y, "o-", c=colour, ms=5, lw=1, label=f"{length} cached tokens")
        if i == 0:
            for k in chosen:
                axes.annotate(
                    str(points[k].nodes),
                    (places[k], rates[k]),
                    xytext=(5, -11),
                    textcoords="offset points",
                    color=colour,
                    fontsize=8,
                )
    axes.set_xlabel("arithmetic intensity, FLOP per byte")
    axes.set_ylabel("GFLOP/s")
    axes.grid(which="major", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False, fontsize=9, title="numbers: tokens a forward")
    axes.set_title(title, loc="left", fontsize=11)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    figure.draw_without_rendering()  # the slope on paper is known once the layout is
    (x0, y0), (x1, y1) = axes.transData.transform([(1, 1), (10, 10)])
    for rate, name, _ in reads:
        axes.text(
            *(left * 1.3, left * 1.3 * rate * 1.15, f"{name}, {rate:.3g} GB/s"),
            rotation=math.degrees(math.atan2(y1 - y0, x1 - x0)),
            rotation_mode="anchor",
            color="0.25",
            fontsize=9,
        )
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    """Write a picture as a whole.

    Raises:
        BrokenFileError: It cannot be written.
    """
    with writable(path.parent):
        part = path.with_name(f".{path.name}.{os.getpid()}.part{path.suffix}")
        try:
            figure.savefig(part, dpi=160)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def check_picture(path: str | Path) -> None:
    """Make sure, before a long measurement, that its picture can be drawn.

    Raises:
        MissingExtraError: matplotlib is not installed.
        InvalidInputError: The file is of another kind than a picture.
    """
    if Path(path).suffix.lower() not in PICTURES:
        raise InvalidInputError(f"{path} is no picture; give a name with {', '.join(PICTURES)}")
    require("matplotlib.figure", "plot")
