"""Latents as bytes: tables of integers, frozen from the laws that were trained.

::

    Factorised ──counted once──▶ a table a channel, in the model's file          (``static``)
    normal laws ──+ - x / alone──▶ tables of every scale and mean, made anywhere  (``static``)
    WholePrior(z, past) ──▶ which table                                           (``int``)

    HyperCoder.compress(y, z, past) ──▶ payload ──▶ HyperCoder.decompress(payload, shape, past)

What a table is made of and which one is taken are whole numbers on both sides, so files travel
between machines. Values beyond a table are escaped.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from isthmus.codecs.rangecoder import TOTAL, Decoder, Encoder, Ints, Table, estimate_bits
from isthmus.errors import BrokenFileError, InvalidInputError
from isthmus.models.transform_codec import FRACTIONS, HYPER, Hyperprior, WholePrior
from isthmus.nn.likelihood import FIRST, SCALES, STEP, Factorised

RATIO = 1.1309463943519327
"""Of two neighbouring scales: a constant, since exp differs between libraries in its last bit."""

_DENSITY = 0.3989422804014327
"""1 / sqrt(2 pi)."""

_REACH = 255
"""Whole numbers a table holds on each side of 0, at most."""

_FAR = 5.0
"""Deviations beyond which nothing is left: 6e-7, a 26th of the smallest frequency."""


@lru_cache(maxsize=SCALES)
def scale(index: int) -> float:
    """A standard deviation of the table, by multiplication alone.

    Example:
        >>> round(scale(63), 6)
        256.0
    """
    return FIRST if index == 0 else scale(index - 1) * RATIO


@lru_cache(maxsize=SCALES * FRACTIONS)
def gaussian_table(index: int, part: int = 0) -> Table:
    """The table of a normal law of a scale whose mean lies ``part`` parts above 0.

    Frequencies follow from sums, products and quotients, which IEEE 754 rounds alike everywhere.

    Args:
        index: Of the scale.
        part: From 0 to :data:`~isthmus.models.transform_codec.FRACTIONS` - 1.

    Raises:
        InvalidInputError: There is no such table.

    Example:
        >>> table = gaussian_table(0)  # nearly all of it is 0
        >>> table.low, table.size, round(table.bits([0]), 3)
        (-2, 6, 0.0)
    """
    if not (0 <= index < SCALES and 0 <= part < FRACTIONS):
        raise InvalidInputError(
            f"there are tables of {SCALES} scales and {FRACTIONS} parts, not ({index}, {part})"
        )
    s, mean = scale(index), part / FRACTIONS
    reach = min(_REACH, 1 + math.ceil(_FAR * s))
    edges = (np.arange(-reach, reach + 3) - 0.5 - mean) / s
    x = np.clip(edges, -_FAR, _FAR)
    # Phi(x) - 1/2 by its power series, whose terms x^(2k+1) / (2^k k! (2k+1)) alternate
    power, total, square = x.copy(), x.copy(), x * x
    for k in range(1, 60):
        power = power * square / (2 * k)
        total = total + (power if k % 2 == 0 else -power) / (2 * k + 1)
    inner = np.diff(total * _DENSITY)
    inner = np.maximum(inner, 0.0)
    # whole weights; what is left of the mass is the escape's
    weights = np.floor(inner * 2.0**40).astype(np.int64)
    weights = np.append(weights, max(0, (1 << 40) - int(weights.sum())))
    room = TOTAL - len(weights)
    counts = 1 + weights * room // int(weights.sum())
    counts[int(counts[:-1].argmax())] += TOTAL - int(counts.sum())
    return Table(counts, -reach, escape=True)


class _Gaussian(Sequence[Table]):
    """All tables of normal laws, scale by scale, each made when it is needed."""

    def __len__(self) -> int:
        return SCALES * FRACTIONS

    @overload
    def __getitem__(self, at: int) -> Table: ...

    @overload
    def __getitem__(self, at: slice) -> Sequence[Table]: ...

    def __getitem__(self, at: int | slice) -> Any:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        return gaussian_table(*divmod(at, FRACTIONS))


GAUSSIAN: Sequence[Table] = _Gaussian()
"""Tables by ``index * FRACTIONS + part``."""


def factorised_tables(law: Factorised) -> list[Table]:
    """A table a channel; it belongs into the model's file, since it comes of floating point.

    Raises:
        InvalidInputError: The law is no law any more (it diverged).

    Example:
        >>> law = Factorised(2)
        >>> [table.escape for table in factorised_tables(law)]
        [True, True]
    """
    found = []
    for low, masses in law.masses(_REACH):
        if not np.isfinite(masses).all():
            raise InvalidInputError("the factorised law is not finite; train the model again")
        inside = np.maximum(masses, 0.0)
        rest = min(0.5, max(1 / TOTAL, 1 - float(inside.sum())))
        found.append(Table.from_pmf(inside, low, escape=rest))
    return found


Law = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Means and places in the table of z and past; see :class:`WholePrior`."""


@dataclass(frozen=True)
class Scaled:
    """A prior of latents that are divided by a step, in whole numbers again.

    Attributes:
        prior: Of the latents as they are.
        level: The step is 2^(level / 8).
        wider: Places in the table by which laws are wider, int64 [M, 1, 1] or one for all.
    """

    prior: Law
    level: int
    wider: Tensor | int = 0

    def __call__(self, z: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`~isthmus.models.transform_codec.WholePrior`."""
        mean, index = self.prior(z, past)
        fewer = round(self.level * math.log(2) / 8 / STEP)  # places in the table of deviations
        part = round(2 ** (16 - self.level / 8))
        return (mean * part + (1 << 15)) >> 16, (index - fewer + self.wider).clamp(0, SCALES - 1)


class HyperCoder:
    """A hyperprior's law at work: latents to bytes and back.

    Args:
        tables: Of z, one a channel.
        prior: Picks the table of each element of y; a :class:`WholePrior` where it is written.
    """

    def __init__(self, tables: Sequence[Table], prior: Law) -> None:
        self.tables, self.prior = list(tables), prior

    @classmethod
    def freeze(cls, law: Hyperprior) -> HyperCoder:
        """Integers of a law that was trained."""
        return cls(factorised_tables(law.factorised), law.prior.frozen())

    def knowing(self, z: Tensor, past: Tensor) -> HyperCoder:
        """The coder of all that has this z and past: the prior is run once, for any step."""
        said = self.prior(z, past)
        return HyperCoder(self.tables, lambda *_: said)

    def at(self, level: int, wider: Tensor | int = 0) -> HyperCoder:
        """The coder of latents that are divided by 2^(level / 8) before they are rounded.

        Args:
            level: See there.
            wider: Places in the table by which laws are wider, int64 [M, 1, 1] or one for all.
        """
        return HyperCoder(self.tables, Scaled(self.prior, level, wider))

    def tensors(self) -> dict[str, Tensor]:
        """What it is made of, integers all, for the model's file and fingerprint."""
        lengths = torch.tensor([len(t.counts) for t in self.tables])
        counts = torch.from_numpy(np.concatenate([t.counts for t in self.tables]))
        lows = torch.tensor([t.low for t in self.tables])
        tables = {"z.lengths": lengths, "z.counts": counts.to(torch.int32), "z.lows": lows}
        prior: Any = self.prior
        return tables | {f"prior.{k}": v for k, v in prior.tensors().items()}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> HyperCoder:
        """What :meth:`tensors` has come from.

        Raises:
            BrokenFileError: It has not.
        """
        try:
            ends = np.cumsum([0, *tensors["z.lengths"].tolist()]).tolist()
            values: Any = tensors["z.counts"].long().numpy()
            spans = zip(itertools.pairwise(ends), tensors["z.lows"].tolist(), strict=True)
            tables = [Table(values[a:b], low, escape=True) for (a, b), low in spans]
            mine = {k[6:]: v for k, v in tensors.items() if k.startswith("prior.")}
            return cls(tables, WholePrior.of(mine))
        except (KeyError, ValueError, RuntimeError) as error:
            raise BrokenFileError(f"the entropy model is damaged ({error})") from error

    # ------------------------------------------------------------------------------------------

    def compress(self, y: Tensor, z: Tensor, past: Tensor) -> bytes:
        """Bytes of latents.

        Args:
            y: Whole numbers [B, M, h, w].
            z: Whole numbers [B, Cz, h/4, w/4].
            past: Whole numbers [B, 2M, h, w].
        """
        coder = Encoder()
        coder.indexed(*self._z(z), self.tables)
        coder.indexed(*self._y(y, z, past), GAUSSIAN)
        return coder.finish()

    def decompress(self, data: bytes, shape: Sequence[int], past: Tensor) -> tuple[Tensor, Tensor]:
        """Latents int64 [B, M, h, w] of bytes, and z.

        Args:
            data: What :meth:`compress` gave.
            shape: Of y.
            past: The very latents that it was given; others lead to nonsense, which the check of
                a frame's symbols finds.

        Raises:
            BrokenFileError: The bytes cannot have been coded so.
        """
        batch, _, high, wide = shape
        coder = Decoder(data)
        like = torch.zeros(batch, len(self.tables), high // HYPER, wide // HYPER, dtype=torch.int64)
        z = torch.from_numpy(coder.indexed(channels_of(like), self.tables))
        mean, index = self.prior(z, past)
        whole, tables = _tables(mean, index)
        return torch.from_numpy(coder.indexed(tables, GAUSSIAN)) + whole, z

    def bits(self, y: Tensor, z: Tensor, past: Tensor) -> float:
        """What :meth:`compress` will need, without the coder's slack."""
        first = estimate_bits(*self._z(z), self.tables)
        return first + estimate_bits(*self._y(y, z, past), GAUSSIAN)

    def _z(self, z: Tensor) -> tuple[Ints, Ints]:
        return z.long().numpy(), channels_of(z)

    def _y(self, y: Tensor, z: Tensor, past: Tensor) -> tuple[Ints, Ints]:
        whole, tables = _tables(*self.prior(z, past))
        return (y.long() - whole).numpy(), tables


def channels_of(z: Tensor) -> Ints:
    """The channel of each element of [B, C, ...], which is the number of its table."""
    places = torch.arange(z.shape[1]).view(1, -1, *[1] * (z.ndim - 2))
    found: Ints = places.expand(z.shape).numpy()
    return found


def _tables(mean: Tensor, index: Tensor) -> tuple[Tensor, Ints]:
    """Whole parts of means, and the tables of scales and what is left of the means."""
    whole = mean.div(FRACTIONS, rounding_mode="floor")
    return whole, (index * FRACTIONS + mean - whole * FRACTIONS).numpy()
