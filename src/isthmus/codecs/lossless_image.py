"""Pictures without loss: linear predictors learnt for the picture, decoded along diagonals.

::

    band of rows ─▶ planes G R B A ─▶ tiles, all at once
    pixel (x, y) of a tile has its turn at x + 4 y: 18 neighbours above and left are known
        class      = how rough the neighbours are, 4 of them
        prediction = coefficients[class] · (neighbours, 3 x 3 of the planes before)
        context    = expected |residual| = weights · (residuals around, differences around)
        residual ─▶ the context's table of the bank ─▶ range coder

Coefficients, weights and the choice of tables are fitted by the encoder and travel as integers;
the decoder computes with integers only. Numbers per band, so memory does not grow with the picture.
Tables of the bank are the probability model; :mod:`isthmus.codecs.residuals`. Drawings and pictures
of screens repeat themselves exactly, which predictors do not see: a band of those may be an
embedded lossless WebP picture instead, where that is smaller.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch

from isthmus.codecs.container import EMBEDDED, Frame, Header
from isthmus.codecs.rangecoder import Decoder, Encoder, Ints
from isthmus.codecs.residuals import CONTEXTS, Bank, choose, context
from isthmus.errors import BrokenFileError, InvalidInputError, require
from isthmus.roles import Medium, Signal

TILE = 512
BAND = 1 << 20
"""Pixels of a band, about."""

DRAWN = 2.5
"""Bits a value below which a band may be a drawing."""

SPARSE = 100
"""Different values below which it may be one as well."""

MARGIN, SLOPE = 4, 4

#: Neighbours (rows, columns) that are known when a pixel has its turn, nearest first.
BEFORE = (
    *((0, -1), (-1, 0), (-1, -1), (-1, 1), (0, -2), (-2, 0), (-1, -2), (-2, -1), (-2, 1)),
    *((-1, 2), (-2, -2), (-2, 2), (0, -3), (-3, 0), (-1, -3), (-1, 3), (-3, -1), (-3, 1)),
)
#: In planes that are known as a whole, the pixel itself first.
AROUND = ((0, 0), (0, -1), (-1, 0), (0, 1), (1, 0), (-1, -1), (-1, 1), (1, -1), (1, 1))

ROUGH = (((0, -1), (-1, -1)), ((-1, 0), (-1, -1)), ((-1, 0), (-1, 1)))
STEEP = (*ROUGH, ((0, -1), (0, -2)), ((-1, 0), (-2, 0)))
"""Differences that tell how rough a place is."""

ONE, FINE = 12, 8
"""Binary places of coefficients and of weights."""


@dataclass(frozen=True)
class Shape:
    """How much a predictor looks at.

    Attributes:
        before: Neighbours in the same plane.
        around: Neighbours in each plane before.
        classes: Classes of roughness.
        errors: Neighbours whose residuals tell the size of the next one.
    """

    before: int
    around: int
    classes: int
    errors: int


#: The first needs no numbers in the file, for pictures of a few pixels.
SHAPES = (Shape(3, 4, 1, 4), Shape(6, 5, 1, 4), Shape(18, 9, 4, 10))


@dataclass
class Plan:
    """What a decoder needs to know of a plane: integers that the encoder has fitted.

    Attributes:
        shape: Number of the shape.
        edges: Where classes of roughness begin, [classes - 1].
        coefficients: [classes, features], in units of 2^-12.
        weights: [features of the size], in units of 2^-8 sixteenths; the last is added.
        tables: Number of a table for each context, [CONTEXTS].
    """

    shape: int
    edges: Ints
    coefficients: Ints
    weights: Ints
    tables: np.ndarray

    def pack(self) -> bytes:
        """The bytes in a frame."""
        if not self.shape:
            return b"\0"
        numbers = (self.edges, self.coefficients, self.weights)
        body = b"".join(n.astype("<i4" if n is self.edges else "<i2").tobytes() for n in numbers)
        return bytes([self.shape]) + body + self.tables.tobytes()

    @classmethod
    def unpack(cls, data: bytes, at: int, planes: int) -> tuple[Plan, int]:
        """A plan from the bytes of a frame, and where it ends.

        Raises:
            BrokenFileError: There is none.
        """
        if at >= len(data) or data[at] >= len(SHAPES):
            raise BrokenFileError("a plan of a plane is malformed")
        number = data[at]
        at += 1
        if not number:
            return _preset(planes), at
        shape = SHAPES[number]
        features, sizes = _widths(shape, planes)
        counts = (shape.classes - 1, shape.classes * features, sizes)
        need = 4 * counts[0] + 2 * counts[1] + 2 * counts[2] + CONTEXTS
        if at + need > len(data):
            raise BrokenFileError("a plan of a plane is cut off")
        found = []
        for count, kind in zip(counts, ("<i4", "<i2", "<i2"), strict=True):
            part = np.frombuffer(data, kind, count, at)
            at += part.nbytes
            found.append(part.astype(np.int64))
        tables = np.frombuffer(data, np.uint8, CONTEXTS, at)
        if tables.max() >= 192:
            raise BrokenFileError("a plan names a table that is not there")
        matrix = found[1].reshape(shape.classes, features)
        return cls(number, found[0], matrix, found[2], tables), at + CONTEXTS


def _widths(shape: Shape, planes: int) -> tuple[int, int]:
    """Features of a prediction and of a size."""
    return shape.before + planes * shape.around, shape.errors + len(STEEP) + planes * 9 + 1


def _preset(planes: int) -> Plan:
    """A plan that is not fitted: 3/4 (left + above) - 1/2 corner, on the difference of planes."""
    shape = SHAPES[0]
    features, sizes = _widths(shape, planes)
    own = np.array([3072, 3072, -2048])
    line = np.zeros(features, dtype=np.int64)
    line[:3] = own
    if planes:
        start = 3 + (planes - 1) * shape.around
        # the other plane's own miss under the same rule, its corner left out
        line[start : start + 3] = (1 << ONE, -2048, -2048)
    weights = np.zeros(sizes, dtype=np.int64)
    weights[:4] = (4 << FINE, 4 << FINE, 2 << FINE, 2 << FINE)
    weights[shape.errors : shape.errors + 3] = 2 << FINE
    weights[-1] = 4 << FINE
    chosen = np.minimum((np.arange(CONTEXTS) + 12) * 2, 190).astype(np.uint8)
    return Plan(0, np.zeros(0, dtype=np.int64), line[None], weights, chosen)


class Grid:
    """A band cut into tiles, each with a margin, laid out flat so that neighbours are offsets.

    Args:
        rows: Height of the band.
        columns: Width.
    """

    def __init__(self, rows: int, columns: int) -> None:
        self.rows, self.columns = rows, columns
        high, wide = min(TILE, rows), min(TILE, columns)
        down, across = -(-rows // high), -(-columns // wide)
        self.stride = wide + 2 * MARGIN
        each = (high + 2 * MARGIN) * self.stride
        self.size = down * across * each
        y, x = np.divmod(np.arange(rows * columns, dtype=np.int64), columns)
        tile = y // high * across + x // wide
        iy, ix = y % high, x % wide
        #: Place of every pixel, in raster order.
        self.place: Ints = tile * each + (iy + MARGIN) * self.stride + ix + MARGIN
        turn = ix + SLOPE * iy
        #: Pixels in the order in which they are coded, and where each turn ends.
        self.order: Ints = np.argsort(turn, kind="stable")
        self.ends: Ints = np.cumsum(np.bincount(turn)).astype(np.int64)

    def offsets(self, steps: Iterable[tuple[int, int]]) -> Ints:
        """Distances in the flat layout."""
        return np.array([dy * self.stride + dx for dy, dx in steps], dtype=np.int64)

    def spread(self, plane: Ints, fill: int) -> Ints:
        """A plane [rows x columns] laid out flat; margins hold a constant."""
        flat = np.full(self.size, fill, dtype=np.int64)
        flat[self.place] = plane
        return flat


class Plane:
    """What is known of one plane while it is coded, and how it is predicted.

    Args:
        grid: The layout.
        plan: The plan.
        values: The plane, flat, pixels that are not known yet being the margin's.
        misses: Its residuals, flat, as far as known.
        others: Values and sizes of residuals of the planes before, the nearest last.
        most: Largest value.
    """

    def __init__(
        self,
        grid: Grid,
        plan: Plan,
        values: Ints,
        misses: Ints,
        others: list[tuple[Ints, Ints]],
        most: int,
    ) -> None:
        shape = SHAPES[plan.shape]
        self.plan, self.values, self.misses, self.others = plan, values, misses, others
        self.most, self.base = most, (most + 1) // 2
        self.before = grid.offsets(BEFORE[: shape.before])
        self.around = grid.offsets(AROUND[: shape.around])
        self.errors = grid.offsets(BEFORE[: shape.errors])
        self.nine = grid.offsets(AROUND)
        self.steep = [grid.offsets(pair) for pair in STEEP]

    def features(self, at: Ints) -> Ints:
        """Values around places [N], less the middle: [N, F]."""
        parts = [self.values[at[:, None] + self.before]]
        parts += [values[at[:, None] + self.around] for values, _ in self.others]
        found: Ints = np.concatenate(parts, 1) - self.base
        return found

    def roughness(self, at: Ints) -> Ints:
        """[N]."""
        e = len(self.errors)
        found: Ints = self.sizes(at)[:, e : e + len(ROUGH)].sum(1)
        return found

    def sizes(self, at: Ints) -> Ints:
        """What tells the size of a residual: [N, G], the last one 1."""
        v = self.values
        parts = [self.misses[at[:, None] + self.errors]]
        parts += [np.abs(v[at + a] - v[at + b])[:, None] for a, b in self.steep]
        parts += [misses[at[:, None] + self.nine] for _, misses in self.others]
        return np.concatenate([*parts, np.ones((len(at), 1), dtype=np.int64)], 1)

    def predict(self, at: Ints) -> tuple[Ints, Ints]:
        """Predictions of pixels at places [N] and the contexts of their residuals."""
        sizes, plan = self.sizes(at), self.plan
        features = self.features(at)
        if len(plan.edges):
            e = len(self.errors)
            kinds = np.searchsorted(plan.edges, sizes[:, e : e + 3].sum(1), side="right")
            summed = (features * plan.coefficients[kinds]).sum(1)
        else:
            summed = features @ plan.coefficients[0]
        guess = ((summed + (1 << (ONE - 1))) >> ONE) + self.base
        expected = (sizes @ plan.weights) >> FINE
        return np.clip(guess, 0, self.most), context(np.maximum(expected, 0))


class LosslessImage:
    """The codec.

    Args:
        drawings: Whether bands may be embedded WebP pictures where those are smaller.

    Example:
        >>> from isthmus.codecs.base import pack, unpack
        >>> import io
        >>> ramp = torch.arange(64 * 64).view(1, 64, 64).remainder(64).to(torch.uint8)
        >>> signal = Signal({"medium": "image", "dtype": "uint8", "shape": [1, 64, 64]}, [ramp])
        >>> file = io.BytesIO()
        >>> pack(LosslessImage(), signal, file).payload < 64 * 64 // 16
        True
        >>> torch.equal(next(iter(unpack(file.getvalue()).signal.chunks)), ramp)
        True
    """

    id = "parts/lossless-image"
    medium: ClassVar[Medium] = "image"
    lossless = True
    numerics = "static"
    fields = ()
    fingerprint = bytes(32)

    def __init__(self, *, drawings: bool = True) -> None:
        self.drawings = drawings

    def parameters(self, info: Mapping[str, Any], rate: float | None = None) -> dict[str, Any]:
        """None: everything follows from the shape.

        Raises:
            InvalidInputError: A rate, or a picture of more than 8 planes or 2^20 columns.
        """
        if rate is not None:
            raise InvalidInputError(f"{self.id} is lossless and has no rate to choose")
        _check(info, InvalidInputError)
        return {}

    def encode(self, signal: Signal, header: Header) -> Iterator[Frame]:
        """A frame for each band."""
        planes, height, width = signal.info["shape"]
        rows, most = _rows(width), _most(signal.info)
        held: list[np.ndarray] = []
        waiting = seen = 0
        for chunk in signal.chunks:
            held.append(chunk.numpy().astype(np.int64).reshape(planes, -1, width))
            waiting += held[-1].shape[1]
            while waiting >= rows or (held and seen + waiting == height and waiting):
                whole = np.concatenate(held, 1)
                band, rest = whole[:, :rows], whole[:, rows:]
                held, waiting = ([rest] if rest.shape[1] else []), rest.shape[1]
                seen += band.shape[1]
                if band.min() < 0 or band.max() > most:
                    raise InvalidInputError(f"the picture has values beyond 0 to {most}")
                yield _encode(band, most, self.drawings)
        if waiting or seen != height:
            raise InvalidInputError(f"the picture has {seen + waiting} rows and names {height}")

    def decode(self, header: Header, frames: Iterable[Frame]) -> Iterator[torch.Tensor]:
        """A band for each frame."""
        _check(header.signal, BrokenFileError)
        if header.parameters:
            raise BrokenFileError(f"{self.id} has no parameters")
        planes, height, width = header.signal["shape"]
        most, dtype = _most(header.signal), header.signal["dtype"]
        source = iter(frames)
        for top in range(0, height, _rows(width)):
            frame = next(source, None)
            if frame is None:
                return
            rows = min(_rows(width), height - top)
            if frame.kind == EMBEDDED:
                band = _drawn(frame.payload, planes, rows, width)
            else:
                band = _decode(frame, planes, rows, width, most)
            kind = torch.uint8 if dtype == "uint8" else torch.int32
            yield torch.from_numpy(band).to(kind)


def _check(info: Mapping[str, Any], error: type[Exception]) -> None:
    planes, height, width = info["shape"]
    if info["dtype"] not in ("uint8", "uint16") or planes > 8 or width > 1 << 20 or height is None:
        raise error("pictures of 8 or 16 bits, up to 8 planes and 2^20 columns are coded here")


def _rows(width: int) -> int:
    """Rows of a band: about so many pixels, the margins of its tiles counted."""
    return max(1, BAND // (width + 2 * MARGIN * -(-width // TILE)))


def _most(info: Mapping[str, Any]) -> int:
    return 255 if info["dtype"] == "uint8" else 65535


def _order(planes: int) -> list[int]:
    """Green first: it knows most of the others."""
    return [1, 0, *range(2, planes)] if planes >= 3 else list(range(planes))


def _encode(band: np.ndarray, most: int, drawings: bool) -> Frame:
    """The best of the shapes that a band of this size may have, or a drawing."""
    planes, rows, columns = band.shape
    grid = Grid(rows, columns)
    pixels = rows * columns
    tried = [n for n in range(len(SHAPES)) if pixels < 1 << 15 or n == len(SHAPES) - 1]
    tried = [n for n in tried if pixels * planes > (0, 100, 2000)[n]]
    best = min((_encoded(band, grid, n, most) for n in tried), key=lambda f: len(f.payload))
    plain = 8 * len(best.payload) < DRAWN * pixels * planes or len(np.unique(band)) < SPARSE
    if drawings and most == 255 and plain:
        data = _draw(band)
        if data and len(data) < len(best.payload):
            return Frame(data, kind=EMBEDDED, samples=rows)
    return best


def _draw(band: np.ndarray) -> bytes:
    """The band as a lossless WebP picture; nothing where that cannot hold it."""
    planes, rows, columns = band.shape
    if planes not in (1, 3, 4) or max(rows, columns) > 16_383:
        return b""
    pixels = np.moveaxis(band.astype(np.uint8), 0, -1)
    if planes == 1:
        pixels = pixels.repeat(3, -1)
    out = io.BytesIO()
    picture = require("PIL.Image", "codec").fromarray(np.ascontiguousarray(pixels))
    picture.save(out, "WEBP", lossless=True, quality=100, method=4, exact=True)
    return out.getvalue()


def _drawn(data: bytes, planes: int, rows: int, columns: int) -> np.ndarray:
    """The band in an embedded picture.

    Raises:
        BrokenFileError: It is another one.
    """
    library = require("PIL.Image", "codec")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its size, which is looked at right here
            with library.open(io.BytesIO(data), formats=("WEBP",)) as picture:
                if picture.size != (columns, rows):  # before anything is decoded
                    raise BrokenFileError(f"an embedded picture has the size {picture.size}")
                pixels = np.asarray(picture.convert("RGBA" if planes == 4 else "RGB"))
    except (OSError, SyntaxError, library.DecompressionBombError) as error:
        raise BrokenFileError(f"an embedded picture cannot be read ({error})") from error
    return np.moveaxis(pixels, -1, 0)[:planes].astype(np.int64)


def _encoded(band: np.ndarray, grid: Grid, number: int, most: int) -> Frame:
    coder, plans, others, symbols = Encoder(), [], [], []  # type: ignore[var-annotated]
    base = (most + 1) // 2
    for p in _order(len(band)):
        flat = band[p].reshape(-1)
        values, misses = grid.spread(flat, base), np.zeros(grid.size, dtype=np.int64)
        plan = _fit_values(grid, values, others, number, most)
        plane = Plane(grid, plan, values, misses, others, most)
        guesses = np.concatenate([plane.predict(at)[0] for at in _pieces(grid.place)])
        residuals = flat - guesses
        misses[grid.place] = np.abs(residuals)
        contexts = _fit_sizes(grid, plane, residuals, number)
        bank = Bank(plan.tables)
        for begin, end in zip([0, *grid.ends[:-1]], grid.ends, strict=True):
            turn = grid.order[begin:end]
            if len(turn):
                bank.encode(coder, residuals[turn], contexts[turn])
        plans.append(plan.pack())
        symbols.append(residuals)
        others = [*others, (values, misses)][-2:]
    data = b"".join(plans) + coder.finish()
    return Frame.of(np.concatenate(symbols), data, samples=grid.rows, reset=True)


def _decode(frame: Frame, planes: int, rows: int, columns: int, most: int) -> np.ndarray:
    grid, at, plans = Grid(rows, columns), 0, []
    for before in range(planes):
        plan, at = Plan.unpack(frame.payload, at, min(before, 2))
        plans.append(plan)
    coder, others, symbols = Decoder(frame.payload[at:]), [], []  # type: ignore[var-annotated]
    band = np.empty((planes, rows * columns), dtype=np.int64)
    for p, plan in zip(_order(planes), plans, strict=True):
        values = np.full(grid.size, (most + 1) // 2, dtype=np.int64)
        misses = np.zeros(grid.size, dtype=np.int64)
        plane, bank = Plane(grid, plan, values, misses, others, most), Bank(plan.tables)
        residuals = np.empty(rows * columns, dtype=np.int64)
        for begin, end in zip([0, *grid.ends[:-1]], grid.ends, strict=True):
            turn = grid.order[begin:end]
            if not len(turn):
                continue
            place = grid.place[turn]
            guess, contexts = plane.predict(place)
            found = bank.decode(coder, contexts)
            values[place] = guess + found
            misses[place] = np.abs(found)
            residuals[turn] = found
        band[p] = values[grid.place]
        symbols.append(residuals)
        others = [*others, (values, misses)][-2:]
    frame.verify(np.concatenate(symbols))
    if band.min() < 0 or band.max() > most:
        raise BrokenFileError("a pixel lies outside its range")
    return band.reshape(planes, rows, columns)


# fitting, by the encoder alone ------------------------------------------------------------------


def _pieces(places: Ints, size: int = 1 << 16) -> list[Ints]:
    return [places[i : i + size] for i in range(0, len(places), size)]


@lru_cache(maxsize=4)
def _sample(count: int, most: int = 150_000) -> Ints:
    """Which pixels a fit looks at."""
    every = -(-count // most)
    return np.arange(0, count, every, dtype=np.int64)


def _fit_values(
    grid: Grid, values: Ints, others: list[tuple[Ints, Ints]], number: int, most: int
) -> Plan:
    """Edges and coefficients: least absolute residuals, by weighted least squares three times."""
    plan = _preset(len(others))
    if not number:
        return plan
    shape = SHAPES[number]
    width, sizes = _widths(shape, len(others))
    plan = Plan(
        number,
        np.zeros(0, dtype=np.int64),
        np.zeros((shape.classes, width), dtype=np.int64),
        np.zeros(sizes, dtype=np.int64),
        plan.tables.copy(),
    )
    plane = Plane(grid, plan, values, np.zeros(grid.size, dtype=np.int64), others, most)
    at = grid.place[_sample(len(grid.place))]
    features, truth = plane.features(at).astype(np.float64), values[at] - plane.base
    kinds = np.zeros(len(at), dtype=np.int64)
    if shape.classes > 1:
        rough = plane.roughness(at)
        share = np.arange(1, shape.classes) / shape.classes
        plan.edges = np.quantile(rough, share).astype(np.int64) + 1
        kinds = np.searchsorted(plan.edges, rough, side="right")
    whole = _solve(features, truth)
    for k in range(shape.classes):
        rows = kinds == k
        line = _solve(features[rows], truth[rows]) if rows.sum() > 4 * width else whole
        plan.coefficients[k] = np.clip(np.rint(line * (1 << ONE)), -32768, 32767)
    return plan


def _solve(features: np.ndarray, truth: np.ndarray) -> np.ndarray:
    weight = np.ones(len(truth))
    line = np.zeros(features.shape[1])
    for _ in range(3):
        weighed = features * weight[:, None]
        gram = weighed.T @ features + 10 * np.eye(features.shape[1])
        line = np.linalg.solve(gram, weighed.T @ truth)
        weight = 1 / np.maximum(np.abs(truth - features @ line), 1.0)
    return line


def _fit_sizes(grid: Grid, plane: Plane, residuals: Ints, number: int) -> Ints:
    """Weights of the expected size and tables of its contexts, into the plan; all contexts."""
    plan = plane.plan
    if number:
        rows = _sample(len(residuals))
        sizes = plane.sizes(grid.place[rows]).astype(np.float64)
        plan.weights = np.clip(
            np.rint(_positive(sizes, np.abs(residuals[rows])) * (16 << FINE)), 0, 32767
        ).astype(np.int64)
    contexts = np.concatenate([plane.predict(at)[1] for at in _pieces(grid.place)])
    if number:
        plan.tables = choose(residuals, contexts)
    return contexts


def _positive(features: np.ndarray, truth: np.ndarray, rounds: int = 200) -> np.ndarray:
    """Least squares without negative coefficients, one coefficient after the other."""
    gram = features.T @ features
    gram[np.diag_indices_from(gram)] += 1e-3 * (1 + np.trace(gram) / len(gram))
    wanted, line = features.T @ truth, np.zeros(len(gram))
    for _ in range(rounds):
        for i in range(len(line)):
            line[i] = max(0.0, line[i] + (wanted[i] - gram[i] @ line) / gram[i, i])
    return line
