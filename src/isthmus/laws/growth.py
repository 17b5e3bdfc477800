"""How the cost of a token grows: with the model, with what is cached, and with the batch.

Each point is one forward of one new token a row, beside the least time that its bytes and its
arithmetic take (:func:`isthmus.laws.roofline.floor_ms`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from isthmus.decoding.cost import measure_cost
from isthmus.decoding.target import HubTarget
from isthmus.errors import InvalidInputError, require
from isthmus.laws.forwards import COLOURS, check_picture, save
from isthmus.laws.opcount import Footprint
from isthmus.laws.roofline import Roof, dtype_name

CACHED = (128, 512, 1024, 2048)
ROWS = (1, 2, 4, 8, 16, 32)

MARKERS = "os^Dv*"


@dataclass(frozen=True)
class Point:
    """One forward.

    Attributes:
        model: Name of the model.
        weights: Bytes of the weights that a token reads.
        cached: Cached tokens S of each row.
        rows: Rows B, a new token in each.
        measured_ms: Milliseconds of the forward.
        floor_ms: The least that it can take.
    """

    model: str
    weights: int
    cached: int
    rows: int
    measured_ms: float
    floor_ms: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def growth(
    targets: Mapping[str, HubTarget],
    roof: Roof,
    *,
    cached: Sequence[int] = CACHED,
    rows: Sequence[int] = ROWS,
    budget_s: float = 0.5,
) -> list[Point]:
    """Time one new token of each model at every length, and at every batch size.

    Lengths that a model has no room for are left out; batches are timed at the first length.

    Args:
        targets: Models by name.
        roof: The machine.
        cached: Cached tokens, growing.
        rows: Batch sizes, growing.
        budget_s: Repeat each for about this long.

    Raises:
        InvalidInputError: No lengths, or none of them fits a model.
    """
    points = []
    for name, target in targets.items():
        room = (target.max_length or 10**9) - 1
        lengths = [s for s in cached if 1 <= s <= room]
        if not lengths:
            raise InvalidInputError(f"{name} has room for 1 to {room} cached tokens; ask for those")
        footprint, dtype = Footprint.of(target), dtype_name(target.dtype)
        most = 1 if target.max_batch else max(rows)
        sizes = [(s, 1) for s in lengths] + [(lengths[0], b) for b in rows if 1 < b <= most]
        for length, batch in sizes:
            found = measure_cost(target, rows=batch, length=length, nodes=(1,), budget_s=budget_s)
            work = footprint.forward(1, length, batch=batch)
            floor_ms = 1e3 * roof.floor_s(work, dtype)
            measured_ms = 1e3 * found.seconds[1]
            weights = int(footprint.forward(1, 0).bytes)
            points.append(Point(name, weights, length, batch, measured_ms, floor_ms))
    return points


def draw_growth(path: str | Path, points: Sequence[Point], *, title: str = "") -> None:
    """Draw the three curves, floors dashed: a .png, .svg or .pdf file.

    Raises:
        MissingExtraError: matplotlib is not installed.
        InvalidInputError: The file is of another kind.
        BrokenFileError: It cannot be written.
    """
    path = Path(path)
    check_picture(path)
    figure_class: Any = require("matplotlib.figure", "plot").Figure
    figure = figure_class(figsize=(10.5, 3.9), layout="constrained")
    size, length, batch = figure.subplots(1, 3)
    names = list(dict.fromkeys(p.model for p in points))
    least = {name: min(p.cached for p in points if p.model == name) for name in names}
    first = [p for p in points if p.rows == 1 and p.cached == least[p.model]]
    first.sort(key=lambda p: p.weights)
    mib = [p.weights / 2**20 for p in first]
    size.plot(mib, [p.floor_ms for p in first], "--", c="0.25", lw=1.2, label="floor")
    size.plot(mib, [p.measured_ms for p in first], "-", c="0.25", lw=1.2, label="measured")
    for i, name in enumerate(names):
        style = {"c": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "lw": 1.2}
        own = [p for p in points if p.model == name]
        for p in first:
            if p.model == name:
                size.plot([p.weights / 2**20], [p.measured_ms], ls="", label=name, **style)
        longer = [p for p in own if p.rows == 1]
        wider = [p for p in own if p.cached == least[name]]
        for axes, chosen, x in (
            (length, longer, [p.cached for p in longer]),
            (batch, wider, [p.rows for p in wider]),
        ):
            axes.plot(x, [p.measured_ms / p.rows for p in chosen], ms=5, label=name, **style)
            dashed = {**style, "marker": "", "ls": "--"}
            axes.plot(x, [p.floor_ms / p.rows for p in chosen], **dashed)
    labels = ("weights read for a token, MiB", "cached tokens, batch 1", "rows of the batch")
    for axes, label in zip((size, length, batch), labels, strict=True):
        axes.set(xscale="log", yscale="log", xlabel=label)
        axes.grid(which="major", color="0.9")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter("")
    for axes, values in ((length, {p.cached for p in points}), (batch, {p.rows for p in points})):
        axes.set_xticks(sorted(values), [str(v) for v in sorted(values)])
    size.set_ylabel("ms a token")
    size.legend(frameon=False, fontsize=8)
    size.set_title(title, loc="left", fontsize=10)
    batch.set_title("dashed: floor", loc="right", fontsize=9, color="0.25")
    save(figure, path)
