"""What a lens found: named arrays, tables and graphs, with the checks that they passed.

An explanation prints as text, is drawn by matplotlib, and becomes one HTML file that needs no
network and no scripts (:mod:`isthmus.lenses.page`). It is kept as safetensors and JSON.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import nn

from isthmus import folders
from isthmus.errors import BrokenFileError, InvalidInputError, MismatchError, require

_RECORD, _VALUES = "explanation.json", "arrays.safetensors"
_PICTURE = "(picture)"
_WIDE = 28
"""Characters that a label may have in a terminal."""


@dataclass(frozen=True)
class Check:
    """An identity that a lens must satisfy.

    Attributes:
        name: What is compared.
        value: How far apart the two sides are.
        tolerance: How far they may be.
    """

    name: str
    value: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the identity holds; not for NaN."""
        return self.value <= self.tolerance

    def __str__(self) -> str:
        sign, word = ("<=", "holds") if self.passed else (">", "FAILED")
        return f"{self.name}: {self.value:.2g} {sign} {self.tolerance:.2g}, {word}"


@dataclass(frozen=True)
class Array:
    """Numbers whose axes have names and labels.

    Attributes:
        values: One or two axes.
        axes: Name of each axis.
        labels: Labels of each axis, as many as it is long.
        signed: Whether 0 is the middle of the colours; otherwise it is their beginning.

    Raises:
        InvalidInputError: Names or labels do not fit the values, or a value is NaN.
    """

    values: NDArray[Any]
    axes: tuple[str, ...]
    labels: tuple[tuple[str, ...], ...]
    signed: bool = False

    def __post_init__(self) -> None:
        shape = tuple(len(each) for each in self.labels)
        if self.values.ndim not in (1, 2) or len(self.axes) != self.values.ndim:
            raise InvalidInputError("an array of an explanation has one or two named axes")
        if shape != self.values.shape:
            raise InvalidInputError(f"labels for {shape} do not fit values {self.values.shape}")
        if np.isnan(self.values).any():
            raise InvalidInputError("a value is not a number; a lens must not explain with it")


@dataclass(frozen=True)
class Edge:
    """A weighted edge between two nodes of a graph."""

    source: str
    target: str
    weight: float
    label: str = ""


@dataclass(frozen=True)
class Graph:
    """A layered graph.

    Attributes:
        nodes: Place of every node: column (token) and row (depth, 0 at the bottom).
        edges: Edges between them; a pair may have several.
        columns: Labels of the columns.
        rows: Labels of the rows, bottom first.
    """

    nodes: Mapping[str, tuple[int, int]]
    edges: Sequence[Edge]
    columns: tuple[str, ...]
    rows: tuple[str, ...]


@dataclass(frozen=True)
class Explanation:
    """The result of a lens.

    Attributes:
        method: Slug of the lens.
        model: Class of the model, its parameters, and the digest of its weights.
        inputs: What was looked at, as a person reads it.
        target: What is explained.
        arrays: Arrays by name; the first one is the picture.
        tables: Records by the name of the table.
        checks: Identities.
        graph: Nodes and edges, where the lens finds some.
        params: Settings of the lens.
        seconds: Time that it took.
        picture: What was looked at, uint8 [H, W, 3]; arrays over ``row`` and ``column`` lie on it.
    """

    method: str
    model: Mapping[str, Any]
    inputs: Sequence[str]
    target: str
    arrays: Mapping[str, Array] = field(default_factory=dict)
    tables: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    checks: Sequence[Check] = ()
    graph: Graph | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    picture: NDArray[np.uint8] | None = None

    def __post_init__(self) -> None:
        shape = () if self.picture is None else self.picture.shape
        if shape and (len(shape) != 3 or shape[2] != 3 or self.picture.dtype != np.uint8):  # type: ignore[union-attr]
            raise InvalidInputError("the picture of an explanation is uint8 [H, W, 3]")

    @property
    def trusted(self) -> bool:
        """Whether every identity holds."""
        return all(check.passed for check in self.checks)

    def require(self) -> Explanation:
        """This explanation, if every identity holds.

        Raises:
            MismatchError: One does not.
        """
        failed = [str(check) for check in self.checks if not check.passed]
        if failed:
            raise MismatchError(
                f"{self.method} does not explain this model: {'; '.join(failed)}; "
                "its numbers would mean nothing, so there is no picture of them"
            )
        return self

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        arrays = {n: asdict(a) | {"values": a.values.tolist()} for n, a in self.arrays.items()}
        checks = [asdict(c) | {"passed": c.passed} for c in self.checks]
        picture = None if self.picture is None else self.picture.tolist()
        return asdict(self) | {"arrays": arrays, "checks": checks, "picture": picture}

    def __str__(self) -> str:
        lines = [f"{self.method}: {self.target}", *(f"  {check}" for check in self.checks)]
        for name, rows in self.tables.items():
            lines += ["", name, *_text_table(rows)]
        if not self.tables:
            for name, array in self.arrays.items():
                lines += ["", name, *_text_array(array)]
        return "\n".join(lines)

    def top(self, name: str, count: int = 5) -> list[tuple[str, float]]:
        """The largest values of an array, by magnitude, with their labels.

        Raises:
            InvalidInputError: No array of that name.
        """
        array = self._array(name)
        order = np.argsort(-np.abs(array.values), axis=None, kind="stable")[:count]
        found = []
        for flat in order:
            place = np.unravel_index(flat, array.values.shape)
            words = [labels[i] for labels, i in zip(array.labels, place, strict=True)]
            found.append((", ".join(words), float(array.values[place])))
        return found

    def compare(self, other: Explanation, name: str, count: int = 5) -> dict[str, float]:
        """How alike two explanations rank: Spearman's correlation, and overlap of the top ones.

        Raises:
            InvalidInputError: The arrays are missing, or of other shapes.
        """
        mine, theirs = self._array(name).values.ravel(), other._array(name).values.ravel()
        if mine.shape != theirs.shape:
            raise InvalidInputError(f"{name} has {len(mine)} values here, {len(theirs)} there")
        ranks = [np.argsort(np.argsort(each)) for each in (mine, theirs)]
        tops = [set(np.argsort(-np.abs(each))[:count]) for each in (mine, theirs)]
        return {
            "spearman": float(np.corrcoef(ranks[0], ranks[1])[0, 1]),
            "overlap": len(tops[0] & tops[1]) / min(count, len(mine)),
        }

    def _array(self, name: str) -> Array:
        if name not in self.arrays:
            raise InvalidInputError(f"no array {name!r}; there are {', '.join(self.arrays)}")
        return self.arrays[name]

    # pictures and files ----------------------------------------------------------------------

    def figure(self, name: str = "") -> Any:
        """A matplotlib figure of one array; the first one by default.

        Raises:
            InvalidInputError: No array of that name.
            MissingExtraError: matplotlib is not installed.
        """
        array = self._array(name or next(iter(self.arrays), ""))
        figure_class: Any = require("matplotlib.figure", "plot").Figure
        figure = figure_class(figsize=_size(array), layout="constrained")
        axes = figure.subplots()
        if array.values.ndim == 1:
            colours = ["#0072b2" if v >= 0 else "#d55e00" for v in array.values]
            axes.bar(range(len(array.values)), array.values, color=colours)
            axes.set_xticks(range(len(array.labels[0])), array.labels[0], rotation=60, ha="right")
            axes.set(xlabel=array.axes[0], ylabel=name or next(iter(self.arrays)))
            axes.spines[["top", "right"]].set_visible(False)
        else:
            top = float(np.abs(array.values).max()) or 1.0
            low = -top if array.signed else min(0.0, float(array.values.min()))
            high = top if array.signed else float(array.values.max())
            shown = axes.imshow(
                array.values,
                cmap="PuOr_r" if array.signed else "cividis",
                vmin=low,
                vmax=high,
                aspect="auto",
                interpolation="nearest",
            )
            figure.colorbar(shown, ax=axes, label=name or next(iter(self.arrays)))
            axes.set_yticks(range(len(array.labels[0])), array.labels[0])
            axes.set_xticks(range(len(array.labels[1])), array.labels[1], rotation=60, ha="right")
            axes.set(ylabel=array.axes[0], xlabel=array.axes[1])
        failed = [str(check) for check in self.checks if not check.passed]
        axes.set_title("; ".join(failed) or f"{self.method}: {self.target}", loc="left", fontsize=9)
        return figure

    def html(self, path: str | Path | None = None) -> str:
        """One page that holds everything; written to a file when a path is given.

        Raises:
            BrokenFileError: The file cannot be written.
        """
        from isthmus.lenses.page import page

        text = page(self)
        if path is not None:
            folders.replace_text(Path(path), text)
        return text

    def save(self, folder: str | Path) -> None:
        """Write the explanation, replacing an older one in that folder as a whole.

        Raises:
            InvalidInputError: The folder holds something else.
            BrokenFileError: It cannot be written.
        """
        folder = Path(folder)
        folders.check_replaceable(folder, (_RECORD,), "explanation")
        record = asdict(self)
        arrays = record.pop("arrays")
        values = {name: np.ascontiguousarray(a.values) for name, a in self.arrays.items()}
        record["picture"] = self.picture is not None
        if self.picture is not None:
            values[_PICTURE] = np.ascontiguousarray(self.picture)
        record["arrays"] = {
            name: {k: v for k, v in each.items() if k != "values"} for name, each in arrays.items()
        }
        with folders.published(folder) as part:
            save_file(values, part / _VALUES)
            record["sha256"] = folders.digest(part / _VALUES)
            (part / _RECORD).write_text(json.dumps(record, indent=1))

    @classmethod
    def load(cls, folder: str | Path) -> Explanation:
        """Read an explanation that was saved.

        Raises:
            BrokenFileError: A file is missing or damaged.
        """
        folder = Path(folder)
        record = folders.read_record(
            folder / _RECORD, ("method", "arrays", "sha256"), "explanation"
        )
        try:
            if folders.digest(folder / _VALUES) != record.pop("sha256"):
                raise BrokenFileError(f"{folder / _VALUES} was altered or cut short")
            values = load_file(folder / _VALUES)
            record["arrays"] = {
                name: Array(
                    values[name],
                    tuple(each["axes"]),
                    tuple(tuple(labels) for labels in each["labels"]),
                    each["signed"],
                )
                for name, each in record["arrays"].items()
            }
            record["picture"] = values[_PICTURE] if record.get("picture") else None
            record["checks"] = [Check(**each) for each in record["checks"]]
            if record["graph"] is not None:
                graph = record["graph"]
                record["graph"] = Graph(
                    {name: (int(x), int(y)) for name, (x, y) in graph["nodes"].items()},
                    [Edge(**edge) for edge in graph["edges"]],
                    tuple(graph["columns"]),
                    tuple(graph["rows"]),
                )
            return cls(**record)
        except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
            raise BrokenFileError(f"the explanation in {folder} cannot be read: {error}") from error


def identity(model: nn.Module) -> dict[str, Any]:
    """Class, parameters and digest of the weights of a model."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(-1).numpy().tobytes())
    return {
        "class": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "sha256": digest.hexdigest(),
    }


def visible(token: str) -> str:
    """A token as a person can see it: spaces, line breaks and word marks shown."""
    marks = {"\u0120": "\u00b7", "\u2581": "\u00b7", "\u010a": "\u21b5", "\n": "\u21b5"}
    shown = "".join(marks.get(c, c) for c in token).replace(" ", "\u00b7").replace("\t", "\u21e5")
    return shown if shown else "\u2205"


def shown(value: Any) -> str:
    """A value of a table as a person reads it."""
    if value is None:
        return "\u2013"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _size(array: Array) -> tuple[float, float]:
    if array.values.ndim == 1:
        return (max(4.0, min(0.35 * len(array.values) + 1.5, 16.0)), 3.6)
    rows, columns = array.values.shape
    return (max(4.5, min(0.42 * columns + 2.5, 18.0)), max(3.0, min(0.32 * rows + 1.6, 14.0)))


def _cut(value: Any) -> str:
    text = shown(value)
    return text if len(text) <= _WIDE else f"{text[: _WIDE - 1]}\u2026"


def _text_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if not rows:
        return ["  (none)"]
    heads = list(rows[0])
    cells = [[_cut(row.get(head, "")) for head in heads] for row in rows]
    widths = [max(len(h), *(len(c[i]) for c in cells)) for i, h in enumerate(heads)]
    lines = [heads, *cells]
    return [
        "  " + "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]


def _text_array(array: Array) -> list[str]:
    if array.values.ndim == 1:
        return _text_table(
            [
                {array.axes[0]: label, "value": float(v)}
                for label, v in zip(array.labels[0], array.values, strict=True)
            ]
        )
    head = f"{array.axes[0]} \\ {array.axes[1]}"
    names = [f"{j} {label}" for j, label in enumerate(array.labels[1])]  # labels may come twice
    return _text_table(
        [
            {head: label, **{n: float(v) for n, v in zip(names, row, strict=True)}}
            for label, row in zip(array.labels[0], array.values, strict=True)
        ]
    )
