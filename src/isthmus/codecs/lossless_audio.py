"""Sound without loss: linear prediction of whole numbers, many blocks side by side.

::

    sound ─▶ spans of 64 blocks ─▶ channel by channel
    sample t of all blocks at once:
        prediction = coefficients[block] · (samples before, channel before it: past, now, future)
        context    = running mean of |residual|, a fast and a slow one, as one number
        residual ─▶ the context's table of the bank ─▶ range coder

Each block has its own order and coefficients, integers fitted by least squares; a block begins
without a past, so that all blocks of a span are decoded side by side. A span is a frame: memory
does not grow with the sound. Sound in float32 is coded as the integers that its bits are, put into
the order of the numbers. The tables are those of :mod:`isthmus.codecs.residuals`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import torch

from isthmus.codecs.container import Frame, Header
from isthmus.codecs.rangecoder import Decoder, Encoder, Ints, Table
from isthmus.codecs.residuals import CONTEXTS, SCALES, SHAPES, Bank, choose, context
from isthmus.errors import BrokenFileError, InvalidInputError
from isthmus.roles import Medium, Signal

BLOCK = 4096
"""Samples of a block."""

BLOCKS = 64
"""Blocks of a span."""

ORDERS = (0, 1, 2, 4, 8, 12, 16, 24, 32)
"""How many samples before are looked at."""

ASIDE = 8
"""Samples of the channel before that are looked at on either side of now."""

BITS, PLACES = 16, 15
"""Bits of a coefficient at most, and how many of them may stand behind the point."""

ROUNDS = 2
"""How often a fit is weighed anew."""

MAX_CHANNELS = 64


class LosslessAudio:
    """The codec.

    Example:
        >>> from isthmus.codecs.base import pack, unpack
        >>> import io
        >>> tone = (torch.sin(torch.arange(8000) * 0.05) * 9000).round().to(torch.int32)[None]
        >>> info = {"medium": "audio", "dtype": "int16", "shape": [1, 8000], "rate_hz": 8000}
        >>> file = io.BytesIO()
        >>> pack(LosslessAudio(), Signal(info, [tone]), file).payload < 8000 * 2 // 5
        True
        >>> torch.equal(next(iter(unpack(file.getvalue()).signal.chunks)), tone)
        True
    """

    id = "parts/lossless-audio"
    medium: ClassVar[Medium] = "audio"
    lossless = True
    numerics = "static"
    fields = ("block", "blocks")
    fingerprint = bytes(32)

    def parameters(self, info: Mapping[str, Any], rate: float | None = None) -> dict[str, Any]:
        """Sizes of blocks and spans.

        Raises:
            InvalidInputError: A rate, or sound of a type or of channels that are not coded.
        """
        if rate is not None:
            raise InvalidInputError(f"{self.id} is lossless and has no rate to choose")
        _check(info, InvalidInputError)
        channels = info["shape"][0]
        return {"block": BLOCK, "blocks": max(1, BLOCKS // max(1, channels // 2))}

    def encode(self, signal: Signal, header: Header) -> Iterator[Frame]:
        """A frame for each span; each can be decoded alone."""
        span = header.parameters["block"] * header.parameters["blocks"]
        kind = signal.info["dtype"]
        held: list[Ints] = []
        waiting = 0
        for chunk in signal.chunks:
            held.append(_whole(chunk, kind))
            waiting += chunk.shape[1]
            while waiting >= span:
                joined = np.concatenate(held, 1)
                yield _encode(joined[:, :span], header.parameters["block"])
                held, waiting = [joined[:, span:]], waiting - span
        if waiting:
            yield _encode(np.concatenate(held, 1), header.parameters["block"])

    def decode(self, header: Header, frames: Iterable[Frame]) -> Iterator[torch.Tensor]:
        """A span for each frame."""
        _check(header.signal, BrokenFileError)
        told = header.parameters
        if set(told) != set(self.fields) or not all(type(v) is int for v in told.values()):
            raise BrokenFileError(f"{self.id} has the parameters {', '.join(self.fields)}")
        channels, length = header.signal["shape"]
        if not (64 <= told["block"] <= 1 << 16 and 1 <= told["blocks"] <= 256):
            raise BrokenFileError(f"{self.id} has blocks of 64 to 65536 samples, up to 256 at once")
        span, left = told["block"] * told["blocks"], length
        for frame in frames:
            most = span if left is None else min(span, left)
            sound = _decode(frame, channels, most, told["block"])
            if left is not None:
                left -= sound.shape[1]
            yield _samples(sound, header.signal["dtype"])
            if left == 0:
                return


def _check(info: Mapping[str, Any], error: type[Exception]) -> None:
    if info["dtype"] not in ("int8", "int16", "int24", "int32", "float32"):
        raise error(f"sound of the type {info['dtype']} is not coded; whole numbers or float32 are")
    if info["shape"][0] > MAX_CHANNELS:
        raise error(f"sound has at most {MAX_CHANNELS} channels, got {info['shape'][0]}")


def _whole(chunk: torch.Tensor, kind: str) -> Ints:
    """Samples as integers; the bits of floats in the order of their values."""
    if kind != "float32":
        return chunk.numpy().astype(np.int64)
    raw = np.ascontiguousarray(chunk.numpy(), np.float32).view(np.int32).astype(np.int64)
    return np.where(raw < 0, -(raw & 0x7FFFFFFF) - 1, raw)


def _samples(whole: Ints, kind: str) -> torch.Tensor:
    if kind != "float32":
        return torch.from_numpy(whole.astype(np.int32))
    raw = np.where(whole < 0, (-whole - 1) - (1 << 31), whole).astype(np.int32)
    return torch.from_numpy(raw.view(np.float32))


class Lanes:
    """Blocks side by side: one channel as a matrix of time and blocks, padded at the front.

    Args:
        count: Samples of the span.
        block: Samples of a block.
    """

    def __init__(self, count: int, block: int) -> None:
        self.count, self.block = count, block
        self.lanes = -(-count // block)
        self.last = count - (self.lanes - 1) * block
        self.steps = min(block, count)

    def split(self, channel: Ints) -> Ints:
        """[count] to [steps, lanes]; what a shorter last block lacks is 0."""
        padded = np.zeros(self.lanes * self.block, dtype=np.int64)
        padded[: self.count] = channel
        return np.ascontiguousarray(padded.reshape(self.lanes, self.block).T[: self.steps])

    def join(self, lanes: Ints) -> Ints:
        """The way back."""
        padded = np.zeros((self.lanes, self.block), dtype=np.int64)
        padded[:, : self.steps] = lanes.T
        return padded.reshape(-1)[: self.count]

    def active(self, step: int) -> int:
        """Blocks that have this sample."""
        return self.lanes if step < self.last else self.lanes - 1


def _beside(other: Ints | None, lanes: Lanes) -> Ints:
    """The channel before, around every sample: [steps, lanes, 2 ASIDE + 1], or of width 0."""
    if other is None:
        return np.zeros((lanes.steps, lanes.lanes, 0), dtype=np.int64)
    padded = np.pad(other, ((ASIDE, ASIDE), (0, 0)))
    views = [padded[i : i + lanes.steps] for i in range(2 * ASIDE + 1)]
    return np.stack(views, -1)


def _past(values: Ints, order: int) -> Ints:
    """[steps, lanes, order]: the samples before, the nearest first."""
    padded = np.pad(values, ((order, 0), (0, 0)))
    views = [padded[order - 1 - i : order - 1 - i + len(values)] for i in range(order)]
    return np.stack(views, -1) if views else np.zeros((*values.shape, 0), dtype=np.int64)


def _predicted(features: Ints, coefficients: Ints, places: Ints) -> Ints:
    """Rounded products of features [..., F] and coefficients [..., F] of so many binary places."""
    guess: Ints = ((features * coefficients).sum(-1) + ((1 << places) >> 1)) >> places
    return guess


class Size:
    """Running means of the sizes of residuals, in sixteenths: the contexts of the next ones.

    Args:
        lanes: Blocks.
        start: Where both begin, [lanes].
    """

    def __init__(self, start: Ints) -> None:
        self.fast = start << 8
        self.slow = start << 8

    def contexts(self, lanes: int) -> Ints:
        """Contexts of the next samples, [lanes]."""
        return context((5 * self.fast[:lanes] + 3 * self.slow[:lanes]) >> 11)

    def seen(self, misses: Ints) -> None:
        """Learn from the sizes of residuals [lanes]."""
        n, high = len(misses), misses << 12
        self.fast[:n] += (high - self.fast[:n]) >> 4
        self.slow[:n] += (high - self.slow[:n]) >> 7


def _encode(sound: Ints, block: int) -> Frame:
    channels, count = sound.shape
    lanes = Lanes(count, block)
    coder, plans, symbols, other = Encoder(), [], [], None
    coder.uniform([count & 0xFFF, count >> 12], [1 << 12, 1 << 12])
    for c in range(channels):
        values = lanes.split(sound[c])
        orders, matrix, places = _fit(values, other, lanes)
        features = np.concatenate([_past(values, ORDERS[-1]), _beside(other, lanes)], -1)
        residuals = values - _predicted(features, matrix[None], places)
        starts = _starts(residuals, lanes)
        size, contexts = Size(_roots(starts)), np.zeros_like(residuals)
        misses = np.abs(residuals)
        for t in range(lanes.steps):
            n = lanes.active(t)
            contexts[t, :n] = size.contexts(n)
            size.seen(misses[t, :n])
        alive = np.arange(lanes.steps)[:, None] < np.where(
            np.arange(lanes.lanes) < lanes.lanes - 1, lanes.steps, lanes.last
        )
        tables = choose(residuals[alive], contexts[alive])
        _send(coder, orders, matrix, places, starts, tables, other is not None)
        bank = Bank(tables)
        for t in range(lanes.steps):
            n = lanes.active(t)
            if n:
                bank.encode(coder, residuals[t, :n], contexts[t, :n])
        symbols.append(residuals[alive])
        plans.append(orders)
        other = values
    return Frame.of(_small(np.concatenate(symbols)), coder.finish(), samples=count, reset=True)


def _decode(frame: Frame, channels: int, most: int, block: int) -> Ints:
    coder = Decoder(frame.payload)
    low, high = coder.uniform([1 << 12, 1 << 12]).tolist()
    count = low + (high << 12)
    if not 1 <= count <= most:
        raise BrokenFileError(f"a frame names {count} samples where 1 to {most} are left")
    lanes = Lanes(count, block)
    sound, symbols, other = np.empty((channels, count), dtype=np.int64), [], None
    for c in range(channels):
        matrix, places, starts, tables = _receive(coder, lanes.lanes, other is not None)
        order = ORDERS[-1]
        beside = _beside(other, lanes)
        past = np.zeros((lanes.steps + order, lanes.lanes), dtype=np.int64)
        own = np.ascontiguousarray(matrix[:, :order][:, ::-1].T)  # [order, lanes], oldest first
        aside = (beside * matrix[None, :, order:]).sum(-1)  # [steps, lanes]
        residuals = np.zeros((lanes.steps, lanes.lanes), dtype=np.int64)
        size, bank, half = Size(starts), Bank(tables), (1 << places) >> 1
        for t in range(lanes.steps):
            n = lanes.active(t)
            if not n:
                continue
            found = bank.decode(coder, size.contexts(n))
            guess = (past[t : t + order] * own).sum(0) + aside[t]
            past[t + order, :n] = found + ((guess + half) >> places)[:n]
            residuals[t, :n] = found
            size.seen(np.abs(found))
        other = past[order:]
        if np.abs(other).max() > 1 << 32:
            raise BrokenFileError("a sample lies outside its range")
        alive = np.arange(lanes.steps)[:, None] < np.where(
            np.arange(lanes.lanes) < lanes.lanes - 1, lanes.steps, lanes.last
        )
        symbols.append(residuals[alive])
        sound[c] = lanes.join(other)
    frame.verify(_small(np.concatenate(symbols)))
    return sound


def _small(symbols: Ints) -> Ints:
    """Residuals of 32-bit sound need 33 bits; the check takes the low 32."""
    low: Ints = symbols & 0xFFFFFFFF
    return low


# what a decoder needs to know of a channel ------------------------------------------------------


def _send(
    coder: Encoder,
    orders: Ints,
    matrix: Ints,
    places: Ints,
    starts: Ints,
    tables: np.ndarray,
    stereo: bool,
) -> None:
    """Orders, coefficients by their size in bits and their digits, first sizes, tables used."""
    coder.uniform(orders, np.full(len(orders), len(ORDERS)))
    coder.uniform(places, np.full(len(places), PLACES + 1))
    coder.uniform(starts, np.full(len(starts), SCALES))
    coder.uniform(tables, np.full(len(tables), SCALES * SHAPES))
    for lane, o in enumerate(orders):
        own = matrix[lane, : ORDERS[o]]
        line = np.concatenate([own, matrix[lane, ORDERS[-1] :]]) if stereo else own
        zig = np.where(line < 0, -2 * line - 1, 2 * line)
        bits = np.array([int(z).bit_length() for z in zig], dtype=np.int64)
        coder.table(bits, _LENGTHS)
        deep = bits > 1
        coder.uniform(zig[deep] - (1 << (bits[deep] - 1)), 1 << (bits[deep] - 1))


def _receive(coder: Decoder, lanes: int, stereo: bool) -> tuple[Ints, Ints, Ints, np.ndarray]:
    orders = coder.uniform(np.full(lanes, len(ORDERS)))
    places = coder.uniform(np.full(lanes, PLACES + 1))
    starts = coder.uniform(np.full(lanes, SCALES))
    tables = coder.uniform(np.full(CONTEXTS, SCALES * SHAPES)).astype(np.uint8)
    aside = (2 * ASIDE + 1) * stereo
    matrix = np.zeros((lanes, ORDERS[-1] + aside), dtype=np.int64)
    for lane, o in enumerate(orders):
        count = ORDERS[o] + aside
        bits = coder.table(count, _LENGTHS)
        zig = np.where(bits > 0, 1 << np.maximum(bits - 1, 0), 0).astype(np.int64)
        deep = bits > 1
        zig[deep] += coder.uniform(1 << (bits[deep] - 1))
        line = np.where(zig % 2, -(zig + 1) // 2, zig // 2)
        matrix[lane, : ORDERS[o]] = line[: ORDERS[o]]
        matrix[lane, ORDERS[-1] :] = line[ORDERS[o] :]
    return matrix, places, _roots(starts), tables


_LENGTHS = Table.from_counts(np.ones(18))
"""Bits of a coefficient, 0 to 17, all alike: which are likely depends on the sound."""


def _roots(scales: Ints) -> Ints:
    """Sizes in sixteenths by number: thirds of an octave, rounded down by whole octaves."""
    octave, third = np.divmod(scales, 3)
    size: Ints = ((1 << np.minimum(octave, 40)) * np.array([16, 20, 25])[third]) >> 4
    return size


def _starts(residuals: Ints, lanes: Lanes) -> Ints:
    """The number of the mean size of each block's first residuals after the warm-up."""
    first = np.abs(residuals[ORDERS[-1] : ORDERS[-1] + 256])
    mean = (first if len(first) else np.abs(residuals)).mean(0) * 16
    number = np.rint(3 * np.log2(np.maximum(mean, 1.0)))
    starts: Ints = np.clip(number, 0, SCALES - 1).astype(np.int64)
    return starts


# fitting, by the encoder alone ------------------------------------------------------------------


def _fit(values: Ints, other: Ints | None, lanes: Lanes) -> tuple[Ints, Ints, Ints]:
    """Order, coefficients and their binary places: of the orders, the one that costs least."""
    aside = 0 if other is None else 2 * ASIDE + 1
    most, steps = ORDERS[-1], lanes.steps
    features = np.concatenate([_past(values, most), _beside(other, lanes)], -1)
    x = features.transpose(1, 0, 2).astype(np.float64)  # [lanes, steps, F]
    y = values.T.astype(np.float64)[..., None]
    weight = np.ones((lanes.lanes, steps, 1))
    weight[:, :most] = 0.0 if steps > 4 * most else 1.0
    for _ in range(ROUNDS):
        weighed = (x * weight).transpose(0, 2, 1)
        gram, wanted = weighed @ x, weighed @ y
        scale = np.einsum("lii->l", gram)[:, None, None] / x.shape[-1] + 1e-6
        line = np.linalg.solve(gram + 1e-10 * scale * np.eye(x.shape[-1]), wanted)
        # the coder follows the size of residuals, so loud places shall not rule the fit
        missed = np.abs(y - x @ line)
        weight = (weight > 0) / (_smooth(missed) + 0.5) ** 2
    weighed = (x * weight).transpose(0, 2, 1)
    gram, wanted = weighed @ x, weighed @ y
    best = np.full(lanes.lanes, np.inf)
    orders = np.zeros(lanes.lanes, dtype=np.int64)
    matrix = np.zeros((lanes.lanes, most + aside), dtype=np.int64)
    places = np.zeros(lanes.lanes, dtype=np.int64)
    for number, order in enumerate(ORDERS):
        used = [*range(order), *range(most, most + aside)]
        found = np.zeros((lanes.lanes, most + aside), dtype=np.int64)
        point = np.zeros(lanes.lanes, dtype=np.int64)
        if used:
            part = gram[:, used][:, :, used]
            scale = np.einsum("lii->l", part)[:, None, None] / len(used) + 1e-6
            ridge = 1e-10 * scale * np.eye(len(used))
            line = np.linalg.solve(part + ridge, wanted[:, used])[..., 0]
            largest = np.frexp(np.abs(line).max(1))[1]
            point = np.clip(BITS - largest, 0, PLACES).astype(np.int64)
            whole = np.rint(line * (1 << point)[:, None])
            found[:, used] = np.clip(whole, -(1 << BITS) + 1, (1 << BITS) - 1)
        left = np.abs(y - x @ (found / (1 << point)[:, None])[..., None])
        # Laplace: log2(2 e b) bits a sample, and what the coefficients cost
        bits = np.log2(2 * np.e * (_smooth(left) + 0.2)).sum((1, 2)) + 14 * len(used)
        better = bits < best
        best, orders = np.where(better, bits, best), np.where(better, number, orders)
        matrix[better], places[better] = found[better], point[better]
    return orders, matrix, places


def _smooth(missed: np.ndarray, width: int = 32) -> np.ndarray:
    """Means of residuals [lanes, steps, 1] over what lies around them."""
    summed = np.cumsum(np.pad(missed, ((0, 0), (1, 0), (0, 0))), 1)
    at = np.arange(missed.shape[1])
    low, high = np.maximum(at - width, 0), np.minimum(at + width, missed.shape[1])
    means: np.ndarray = (summed[:, high] - summed[:, low]) / (high - low)[None, :, None]
    return means
