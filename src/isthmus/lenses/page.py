"""An explanation as one HTML file: no scripts, no network, every word escaped."""

from __future__ import annotations

import base64
import struct
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isthmus.lenses.explanation import Array, Explanation, Graph, shown, visible

_PAGE = 500
"""Rows of a heat map that are open at once; the others are folded away, not left out."""

_EVEN = ((0.0, "#f7fbff"), (0.5, "#6baed6"), (1.0, "#08306b"))
_SIGNED = ((0.0, "#b35806"), (0.5, "#f7f7f7"), (1.0, "#542788"))
"""Colours of ColorBrewer (Blues, PuOr), told apart by colour-blind eyes."""

_STYLE = """
:root { color-scheme: light dark; --line: #8888; --soft: #8882; --node: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --node: #56b4e9; } }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; }
h1 { font-size: 1.3rem; margin: 0 0 .2rem; } h2 { font-size: 1.05rem; margin: 1.6rem 0 .4rem; }
h2::first-letter { text-transform: uppercase; }
p, dl { margin: .3rem 0; } .soft { opacity: .75; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; }
th { font-weight: 600; text-align: left; padding: .15rem .5rem; white-space: pre; }
td { padding: .15rem .5rem; border-bottom: 1px solid var(--soft); white-space: nowrap; }
table.heat td { border: 1px solid var(--soft); text-align: right; min-width: 2.6rem;
  font-variant-numeric: tabular-nums; }
table.heat thead th { vertical-align: bottom; text-align: right; }
table.heat th:first-child { text-align: left; }
.words { line-height: 2.1; margin: .3rem 0 .6rem; }
.words span { padding: .2rem .35rem; border-radius: .25rem; white-space: pre; }
.scale { display: flex; align-items: center; gap: .5rem; font-size: .8rem; margin: .35rem 0; }
.scale i { width: 12rem; height: .7rem; border: 1px solid var(--line); }
.pair { display: flex; flex-wrap: wrap; gap: 1.2rem; align-items: flex-start; }
figure { margin: 0; } figcaption { font-size: .8rem; }
.failed { background: #d55e00; color: #fff; padding: .4rem .7rem; border-radius: .3rem; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
.passed::before { content: "\\2713\\00a0"; } .bar { background: var(--node); height: .8rem; }
.bar.less { background: #d55e00; }
svg text { fill: currentColor; font: 11px system-ui, sans-serif; }
svg line.guide { stroke: var(--soft); } svg path { fill: none; stroke: var(--node); }
svg line.edge { stroke: var(--node); stroke-opacity: .55; }
svg circle { fill: var(--node); }
"""


def page(found: Explanation) -> str:
    """The page of an explanation."""
    title = escape(f"{found.method}: {found.target}")
    parts = [
        "<!doctype html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
        '<meta name="viewport" content="width=device-width">',
        f"<style>{_STYLE}</style></head><body>",
        f"<h1>{title}</h1>",
    ]
    failed = [check for check in found.checks if not check.passed]
    parts += [f'<p class="failed">{escape(str(check))}</p>' for check in failed]
    model = found.model
    about = str(model.get("class", "?"))
    if model.get("parameters"):
        about += f", {model['parameters']:,} parameters"
    if model.get("sha256"):
        about += f", weights {model['sha256'][:12]}"
    parts.append(f'<p class="soft">{escape(about)}</p>')
    parts += [f"<p>{escape(each)}</p>" for each in found.inputs]
    if found.graph is not None:
        parts += ["<h2>Routes</h2>", _graph(found.graph)]
    for name, rows in found.tables.items():
        parts += [f"<h2>{escape(name)}</h2>", _table(rows)]
    for name, array in found.arrays.items():
        parts.append(f"<h2>{escape(name)}</h2>")
        if array.values.ndim == 1:
            parts += [_words(array)] if array.axes == ("token",) else []
            parts.append(_bars(array))
        elif found.picture is not None and array.axes == ("row", "column"):
            parts.append(_over(array, found.picture))
        else:
            parts.append(_heat(array))
    passed = [check for check in found.checks if check.passed]
    if passed:
        parts.append("<h2>Checks</h2>")
        parts += [f'<p class="passed">{escape(str(check))}</p>' for check in passed]
    settings = ", ".join(f"{k} = {v}" for k, v in found.params.items())
    foot = f"{settings}{'; ' if settings else ''}{found.seconds:.2g} s"
    parts.append(f'<p class="soft">{escape(foot)}</p></body></html>')
    return "\n".join(parts) + "\n"


def colour(value: float, low: float, high: float, signed: bool) -> tuple[str, str]:
    """Background and text colour of a value.

    Example:
        >>> colour(0.0, -2.0, 2.0, True)
        ('#f7f7f7', '#000')
        >>> colour(1.0, 0.0, 1.0, False)
        ('#08306b', '#fff')
    """
    stops = _SIGNED if signed else _EVEN
    at = 0.5 if high <= low else min(max((value - low) / (high - low), 0.0), 1.0)
    place = [stop for stop, _ in stops]
    channels = [[int(c[i : i + 2], 16) for _, c in stops] for i in (1, 3, 5)]
    rgb = [round(float(np.interp(at, place, channel))) for channel in channels]
    light = 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]  # ITU-R BT.601
    return "#" + "".join(f"{c:02x}" for c in rgb), "#000" if light > 140 else "#fff"


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return "<p>none</p>"
    head = "".join(f"<th>{escape(str(key))}</th>" for key in rows[0])
    lines = [f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>']
    for row in rows:
        cells = "".join(f"<td>{escape(shown(value))}</td>" for value in row.values())
        lines.append(f"<tr>{cells}</tr>")
    return "\n".join([*lines, "</tbody></table></div>"])


def _range(array: Array) -> tuple[float, float]:
    top = float(np.abs(array.values).max()) if array.values.size else 1.0
    if array.signed:
        return -top, top
    return min(0.0, float(array.values.min(initial=0.0))), float(array.values.max(initial=0.0))


def _heat(array: Array) -> str:
    low, high = _range(array)
    columns = "".join(f"<th>{_label(label)}</th>" for label in array.labels[1])
    corner = f"<th>{escape(array.axes[0])} \\ {escape(array.axes[1])}</th>"
    blocks = []
    for start in range(0, len(array.values), _PAGE):
        lines = [
            f'<div class="scroll"><table class="heat"><thead><tr>{corner}{columns}</tr></thead>'
        ]
        for i in range(start, min(start + _PAGE, len(array.values))):
            cells = []
            for j, value in enumerate(array.values[i]):
                back, front = colour(float(value), low, high, array.signed)
                tip = f"{array.labels[0][i]}, {array.labels[1][j]}: {value:.6g}"
                cells.append(
                    f'<td style="background:{back};color:{front}" title="{escape(tip)}">'
                    f"{value:.2g}</td>"
                )
            lines.append(f"<tr><th>{_label(array.labels[0][i])}</th>{''.join(cells)}</tr>")
        block = "\n".join([*lines, "</table></div>"])
        if start:
            block = f"<details><summary>rows from {start + 1}</summary>{block}</details>"
        blocks.append(block)
    return "\n".join([*blocks, _scale(low, high, array.signed)])


def _label(text: str) -> str:
    """A label as it is; only what would not be seen is made visible."""
    return escape(text if text.strip() else visible(text))


def _scale(low: float, high: float, signed: bool) -> str:
    """Which colour stands for how much."""
    stops = ", ".join(c for _, c in (_SIGNED if signed else _EVEN))
    return (
        f'<div class="scale"><span>{low:.3g}</span>'
        f'<i style="background:linear-gradient(to right, {stops})"></i>'
        f"<span>{high:.3g}</span></div>"
    )


def _words(array: Array) -> str:
    """Tokens as running text, each on the colour of its number."""
    low, high = _range(array)
    spans = []
    for label, value in zip(array.labels[0], array.values, strict=True):
        back, front = colour(float(value), low, high, array.signed)
        spans.append(
            f'<span style="background:{back};color:{front}" title="{value:.6g}">{_label(label)}'
            "</span>"
        )
    return f'<div class="words">{" ".join(spans)}</div>{_scale(low, high, array.signed)}'


def _over(array: Array, picture: NDArray[np.uint8]) -> str:
    """The picture, the map over it, and the grid alone, side by side; then the numbers."""
    rows, columns = array.values.shape
    size = 260
    high = round(size * picture.shape[0] / picture.shape[1])
    data = base64.b64encode(_png(picture)).decode()
    image = (
        f'<image width="{size}" height="{high}" preserveAspectRatio="none" '
        f'style="image-rendering:pixelated" href="data:image/png;base64,{data}"/>'
    )
    low, top = _range(array)
    w, h = size / columns, high / rows
    cells: dict[str, list[str]] = {"over": [], "alone": []}
    for i, row in enumerate(array.values):
        for j, value in enumerate(row):
            back, _ = colour(float(value), low, top, array.signed)
            part = (value - low) / (top - low) if top > low else 0.0
            at = f'x="{j * w:.2f}" y="{i * h:.2f}" width="{w:.2f}" height="{h:.2f}"'
            tip = f"<title>{i + 1}, {j + 1}: {value:.6g}</title>"
            # What is relevant shows; what is not is veiled.
            veil = f'fill="#000" fill-opacity="{0.85 * (1 - part**0.5):.2f}"'
            cells["over"].append(f"<rect {at} {veil}>{tip}</rect>")
            cells["alone"].append(f'<rect {at} fill="{back}">{tip}</rect>')
    drawn = {
        "picture": image,
        "lit where it is high": image + "".join(cells["over"]),
        "map": "".join(cells["alone"]),
    }
    figures = [
        f'<figure><svg role="img" aria-label="{caption}" width="{size}" height="{high}" '
        f'viewBox="0 0 {size} {high}" shape-rendering="crispEdges">'
        f"{inside}</svg><figcaption>{caption}</figcaption></figure>"
        for caption, inside in drawn.items()
    ]
    numbers = f"<details><summary>numbers</summary>{_heat(array)}</details>"
    told = _scale(low, top, array.signed)
    return "\n".join(['<div class="pair">', *figures, "</div>", told, numbers])


def _png(picture: NDArray[np.uint8]) -> bytes:
    """A PNG file of uint8 [H, W, 3]."""
    height, width, _ = picture.shape

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)

    lines = np.concatenate(
        [np.zeros((height, 1), np.uint8), picture.reshape(height, -1)], 1
    )  # filter 0 before every line
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = (
        chunk(b"IHDR", head),
        chunk(b"IDAT", zlib.compress(lines.tobytes(), 9)),
        chunk(b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _bars(array: Array) -> str:
    top = float(np.abs(array.values).max(initial=0.0)) or 1.0
    lines = ['<div class="scroll"><table>']
    for label, value in zip(array.labels[0], array.values, strict=True):
        width = 100 * abs(float(value)) / top
        less = " less" if value < 0 else ""
        lines.append(
            f'<tr><th>{_label(label)}</th><td class="number">{value:.4g}</td>'
            f'<td style="width:24rem"><div class="bar{less}" style="width:{width:.1f}%"></div>'
            "</td></tr>"
        )
    return "\n".join([*lines, "</table></div>"])


def _graph(graph: Graph) -> str:
    """Columns are tokens, rows are depth, upward; the wider a curve, the heavier the edge."""
    wide, high, left, foot = 86, 46, 90, 60
    width = left + wide * max(len(graph.columns), 1)
    height = foot + high * max(len(graph.rows), 1)

    def place(node: str) -> tuple[float, float]:
        column, row = graph.nodes[node]
        return left + wide * (column + 0.5), height - foot - high * (row + 0.5)

    lines = [
        f'<div class="scroll"><svg role="img" aria-label="graph" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}">'
    ]
    for row, label in enumerate(graph.rows):
        y = height - foot - high * (row + 0.5)
        lines.append(f'<line class="guide" x1="{left}" x2="{width}" y1="{y}" y2="{y}"/>')
        lines.append(f'<text x="4" y="{y + 4}">{escape(label)}</text>')
    for column, label in enumerate(graph.columns):
        x = left + wide * (column + 0.5)
        lines.append(
            f'<text x="{x}" y="{height - foot + 20}" text-anchor="middle">{_label(label)}</text>'
        )
    heaviest = max((abs(edge.weight) for edge in graph.edges), default=1.0) or 1.0
    seen: Counter[tuple[str, str]] = Counter()
    for edge in graph.edges:
        (x0, y0), (x1, y1) = place(edge.source), place(edge.target)
        bend = (y0 - y1) / 2
        nth = seen[edge.source, edge.target]
        seen[edge.source, edge.target] += 1
        # An edge that passes a row by, and the second one of a pair, lie beside the straight line.
        past = x0 == x1 and y0 - y1 > 1.5 * high
        aside = -16.0 if past and not nth else 14.0 * nth
        tip = f"{edge.source} to {edge.target}: {edge.weight:.4g} {edge.label}".strip()
        lines.append(
            f'<path d="M{x0},{y0} C{x0 + aside},{y0 - bend} {x1 + aside},{y1 + bend} {x1},{y1}" '
            f'stroke-width="{0.6 + 5 * abs(edge.weight) / heaviest:.2f}" stroke-opacity="0.55">'
            f"<title>{escape(tip)}</title></path>"
        )
    for node in graph.nodes:
        x, y = place(node)
        lines.append(f'<circle cx="{x}" cy="{y}" r="4"><title>{escape(node)}</title></circle>')
    lines.append("</svg></div>")
    lines.append(
        '<div class="scale"><svg width="150" height="16" viewBox="0 0 150 16">'
        '<line class="edge" x2="45" y1="8" y2="8" stroke-width="1.1"/>'
        '<line class="edge" x1="100" x2="145" y1="8" y2="8" stroke-width="5.6"/></svg>'
        f"<span>edges of weight {0.1 * heaviest:.2g} and {heaviest:.2g}</span></div>"
    )
    edges = sorted(graph.edges, key=lambda e: -abs(e.weight))
    rows = [{"from": e.source, "to": e.target, "weight": e.weight, "by": e.label} for e in edges]
    folded = f"<details><summary>{len(rows)} edges</summary>{_table(rows)}</details>"
    return "\n".join([*lines, folded])
