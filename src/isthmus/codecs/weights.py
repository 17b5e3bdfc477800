"""Weights of networks as bytes: uniform quantisers whose symbols go through the range coder.

::

    tensor ─quantise─▶ symbols; lows and scales in half precision
                         └─ laws: counts, or one of the bank ─▶ one range coder for all ─▶ bytes

Everything a decoder needs but names and shapes is in the bytes: those follow from the network. Laws
are whole numbers, so any machine decodes the same symbols.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from isthmus.codecs.container import leb, unleb
from isthmus.codecs.rangecoder import TOTAL, Decoder, Encoder, Table
from isthmus.codecs.residuals import SCALES, SHAPES, Bank, cost
from isthmus.errors import BrokenFileError, InvalidInputError

SHARE = 0.02
"""Statistics may be this share of the elements (HNeRV, arXiv:2304.02633)."""


@dataclass(frozen=True)
class Quantised:
    """A tensor in whole numbers.

    Attributes:
        symbols: From 0 to 2^bits - 1, int64, of the tensor's shape.
        low: Of symbol 0, float16; one number, or one for each place along ``axis``.
        scale: Between two symbols, float16, of the same shape.
        axis: Along which statistics differ; None where there is one pair.
    """

    symbols: Tensor
    low: Tensor
    scale: Tensor
    axis: int | None = None

    def tensor(self) -> Tensor:
        """The weights again, float32."""
        return self.symbols.float() * self.scale.float() + self.low.float()


def quantise(tensor: Tensor, bits: int) -> Quantised:
    """Whole numbers for a tensor: of all maps whose statistics are few, the one that errs least.

    Args:
        tensor: Of any shape, finite.
        bits: 1 to 12.

    Raises:
        InvalidInputError: A weight is no finite number, or too large for half precision.

    Example:
        >>> found = quantise(torch.tensor([0.0, 1.0, 3.0]), 2)
        >>> found.symbols.tolist(), found.tensor().tolist()
        ([0, 1, 3], [0.0, 1.0, 3.0])
    """
    if not 1 <= bits <= 12:
        raise InvalidInputError(f"weights take 1 to 12 bits, not {bits}")
    x = tensor.detach().float()
    if not x.numel() or not bool(torch.isfinite(x).all()) or float(x.abs().max()) > 6e4:
        raise InvalidInputError("weights are finite numbers below 6e4, at least one of them")
    axes: list[int | None] = [None]
    axes += [a for a in range(x.ndim) if 2 * x.shape[a] <= SHARE * x.numel()]
    found = [_along(x, bits, axis) for axis in axes]
    return min(found, key=lambda q: float((q.tensor() - x).abs().mean()))


def _along(x: Tensor, bits: int, axis: int | None) -> Quantised:
    kept = [d for d in range(x.ndim) if d != axis]
    low = (x.amin(kept, keepdim=True) if kept else x).half()
    high = x.amax(kept, keepdim=True) if kept else x
    scale = ((high - low.float()) / ((1 << bits) - 1)).clamp(min=6e-8).half()
    symbols = ((x - low.float()) / scale.float()).round().clamp(0, (1 << bits) - 1)
    return Quantised(symbols.long(), low, scale, axis)


def pack(tensors: Mapping[str, Quantised]) -> bytes:
    """Bytes of tensors, in the order of their names; statistics and laws are among them."""
    head, coder = b"", Encoder()
    for name in sorted(tensors):
        one = tensors[name]
        flat = one.symbols.reshape(-1).numpy()
        head += bytes([0 if one.axis is None else one.axis + 1])
        for numbers in (one.low, one.scale):
            head += numbers.reshape(-1).numpy().astype("<f2").tobytes()
        counts = np.bincount(flat)
        table = Table.from_counts(counts)
        listed = b"\x00" + leb(len(counts)) + b"".join(leb(int(n)) for n in counts)
        centre = int(np.rint(flat.mean()))
        values, times = np.unique(flat - centre, return_counts=True)
        number = min(range(SCALES * SHAPES), key=lambda n: cost(values, times, n))
        if 8 * len(listed) + table.bits(flat) <= 32 + cost(values, times, number):
            head += listed
            coder.table(flat, table)
        else:
            head += b"\x01" + leb(centre) + bytes([number])
            Bank(np.array([number])).encode(coder, flat - centre, np.zeros(len(flat), np.int64))
    return leb(len(head)) + head + coder.finish()


def unpack(data: bytes, shapes: Mapping[str, Sequence[int]]) -> dict[str, Quantised]:
    """Tensors that :func:`pack` has written.

    Args:
        data: The bytes.
        shapes: Shape of each tensor by its name.

    Raises:
        BrokenFileError: The bytes are damaged, or of other tensors.
    """
    length, at = unleb(data, 0)
    end = at + length
    if end > len(data):
        raise BrokenFileError("the weights in the file are cut off")
    coder, out = Decoder(data[end:]), {}
    for name in sorted(shapes):
        shape = tuple(shapes[name])
        if at >= end:
            raise BrokenFileError("the file holds fewer weights than its network has")
        axis = data[at] - 1 if data[at] else None
        if axis is not None and axis >= len(shape):
            raise BrokenFileError("the weights in the file are of another shape")
        many = 1 if axis is None else shape[axis]
        if at + 1 + 4 * many >= end:
            raise BrokenFileError("the weights in the file are cut off")
        stats = np.frombuffer(data, "<f2", 2 * many, at + 1).astype(np.float16)
        if not np.isfinite(stats).all():
            raise BrokenFileError("the weights in the file are no numbers")
        wide = [many if d == axis else 1 for d in range(len(shape))]
        low, scale = (torch.from_numpy(s.copy()).view(wide) for s in np.split(stats, 2))
        kind, at = data[at + 1 + 4 * many], at + 2 + 4 * many
        size = int(np.prod(shape))
        if kind == 0:
            levels, at = unleb(data, at)
            if not 1 <= levels <= TOTAL >> 4:
                raise BrokenFileError("the weights in the file have too many levels")
            counts = np.zeros(levels, np.int64)
            for k in range(levels):
                counts[k], at = unleb(data, at)
            symbols = coder.table(size, Table.from_counts(counts))
        elif kind == 1 and at + 1 < end:
            centre, at = unleb(data, at)
            if data[at] >= SCALES * SHAPES:
                raise BrokenFileError("the weights in the file have an unknown law")
            bank, at = Bank(np.array([data[at]])), at + 1
            symbols = bank.decode(coder, np.zeros(size, np.int64)) + centre
        else:
            raise BrokenFileError("the weights in the file have an unknown law")
        out[name] = Quantised(torch.from_numpy(symbols).view(shape), low, scale, axis)
    if at != end:
        raise BrokenFileError("the file holds other weights than its network has")
    return out


def by_groups(tensor: Tensor, bits: int, group: int = 64) -> tuple[Tensor, float]:
    """Round to nearest in groups, as most quantisers of language models do.

    Args:
        tensor: [..., C]; groups run along the last axis.
        bits: Of a weight.
        group: Weights that share a low and a scale of 16 bits each.

    Returns:
        The weights again, and bits a weight with the statistics counted.

    Raises:
        InvalidInputError: The tensor cannot be cut into such groups.
    """
    if tensor.numel() % group:
        raise InvalidInputError(f"{list(tensor.shape)} cannot be cut into groups of {group}")
    found = _along(tensor.detach().float().reshape(-1, group), bits, 0)
    return found.tensor().view(tensor.shape), bits + 32 / group
