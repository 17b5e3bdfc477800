"""Batches of examples of like lengths, in two dimensions, as large as memory allows.

An example has two lengths, that of its input (seconds, frames, tokens) and that of its output.
Buckets cut the examples by the first length into parts of equal total input, and each part by the
second into parts of equal total output; every bucket has its own batch size. After Zelasko et al.,
"Training and Inference Efficiency of Encoder-Decoder Speech Models", 2025 (arXiv 2503.05931).

The order of batches follows from the seed and the number of a batch alone, so a run that goes on in
the middle of an epoch needs no state, and all processes take batches of one bucket at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from isthmus.errors import InvalidInputError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def _cuts(lengths: Floats, parts: int) -> Floats:
    """Upper edges that cut ascending lengths into parts of equal sums; equal edges are one."""
    total = lengths.cumsum()
    ends = np.searchsorted(total, total[-1] * np.arange(1, parts + 1) / parts * (1 - 1e-12))
    edges: Floats = np.unique(lengths[np.minimum(ends, len(lengths) - 1)])
    return edges


@dataclass(frozen=True)
class Buckets2D:
    """Buckets by their upper edges.

    Attributes:
        edges: For every part of the inputs its upper edge, and the upper edges of the outputs in
            it, ascending.

    Example:
        >>> buckets = Buckets2D(((4.0, (2.0, 8.0)), (9.0, (5.0,))))
        >>> buckets.assign([3, 3, 3, 9, 10], [2, 3, 9, 5, 1]).tolist()
        [0, 1, -1, 2, -1]
        >>> buckets.assign([3, 3], [2, 9], strict=False).tolist()
        [0, -1]
    """

    edges: tuple[tuple[float, tuple[float, ...]], ...]

    @classmethod
    def estimate(
        cls, inputs: ArrayLike, outputs: ArrayLike, parts: int = 30, subparts: int = 2
    ) -> Buckets2D:
        """Edges that fit a sample of lengths.

        Args:
            inputs: Lengths of the inputs, [N], positive.
            outputs: Lengths of the outputs, [N].
            parts: Parts of equal total input.
            subparts: Parts of equal total output in each.

        Raises:
            InvalidInputError: There are no lengths, or one is negative or not finite.
        """
        ins, outs = _lengths(inputs, outputs)
        if parts < 1 or subparts < 1:
            raise InvalidInputError(f"parts must be at least 1, got {parts} and {subparts}")
        tops = _cuts(np.sort(ins), parts)
        part = np.searchsorted(tops, ins)
        edges = []
        for index, top in enumerate(tops):
            inside = np.sort(outs[part == index])
            if not len(inside):
                continue
            cuts = _cuts(inside, subparts) if inside.sum() else inside[-1:]
            edges.append((float(top), tuple(map(float, cuts))))
        return cls(tuple(edges))

    @property
    def bounds(self) -> list[tuple[float, float]]:
        """Longest input and output of every bucket."""
        return [(top, out) for top, outs in self.edges for out in outs]

    def assign(self, inputs: ArrayLike, outputs: ArrayLike, *, strict: bool = True) -> Ints:
        """Bucket of every example, -1 where it fits none.

        Args:
            inputs: Lengths [N].
            outputs: Lengths [N].
            strict: Look only at the first part whose inputs fit; else at longer ones, too.
        """
        ins, outs = _lengths(inputs, outputs)
        bounds = np.array(self.bounds)
        fits = (ins[:, None] <= bounds[:, 0]) & (outs[:, None] <= bounds[:, 1])  # [N, buckets]
        if strict:
            tops = np.array([top for top, _ in self.edges])
            own = np.searchsorted(tops, ins)  # == len(tops) where too long
            owner = np.repeat(np.arange(len(tops)), [len(outs) for _, outs in self.edges])
            fits &= owner == own[:, None]
        found: Ints = np.where(fits.any(1), fits.argmax(1), -1)
        return found


def _lengths(inputs: ArrayLike, outputs: ArrayLike) -> tuple[Floats, Floats]:
    ins, outs = np.asarray(inputs, np.float64), np.asarray(outputs, np.float64)
    if ins.shape != outs.shape or ins.ndim != 1 or not len(ins):
        raise InvalidInputError(
            f"lengths come in pairs, [N] and [N], got {list(ins.shape)} and {list(outs.shape)}"
        )
    if not (np.isfinite(ins) & np.isfinite(outs) & (ins > 0) & (outs >= 0)).all():
        raise InvalidInputError("inputs must have positive finite lengths, outputs not negative")
    return ins, outs


def outliers(
    inputs: ArrayLike, outputs: ArrayLike, buckets: Buckets2D, sigmas: float = 4.0
) -> NDArray[np.bool_]:
    """Examples with far more output for their input than others of their part: mostly bad labels.

    Args:
        inputs: Lengths [N].
        outputs: Lengths [N].
        buckets: Their parts decide who is compared with whom.
        sigmas: Standard deviations above the mean.

    Returns:
        bool [N].
    """
    ins, outs = _lengths(inputs, outputs)
    part = np.searchsorted(np.array([top for top, _ in buckets.edges]), ins)
    rate = outs / ins
    bad = np.zeros(len(ins), bool)
    for index in np.unique(part):
        inside = part == index
        bad[inside] = rate[inside] > rate[inside].mean() + sigmas * rate[inside].std()
    return bad


def batch_sizes(
    bounds: Sequence[tuple[float, float]],
    fits: Callable[[float, float, int], bool],
    start: int = 32,
    tolerance: float = 0.05,
) -> list[int]:
    """The largest batch of every bucket that fits, found by trying.

    From the last bucket down: double while it fits, halve while it does not, then bisect. Each
    search starts at twice the answer of the one before.

    Args:
        bounds: Longest input and output of every bucket.
        fits: Whether a batch of examples of these lengths, and of that many, fits: a step of
            training with running out of memory caught, or a formula.
        start: First size to try.
        tolerance: Stop once the size that fits is this near the one that does not.

    Raises:
        InvalidInputError: A single example does not fit.

    Example:
        >>> batch_sizes([(1, 1), (10, 2)], lambda i, o, n: n * (i + o) <= 100, tolerance=0)
        [50, 8]
    """
    sizes: list[int] = []
    size = start
    for longest, output in reversed(bounds):
        good, bad = 0, 0
        while not (good and bad):
            if fits(longest, output, size):
                good, size = size, size * 2
            elif size == 1:
                raise InvalidInputError(
                    f"one example of lengths {longest:g} and {output:g} does not fit; leave out "
                    "longer ones or take a smaller model"
                )
            else:
                bad, size = size, size // 2
        while bad - good > 1 and (bad - good) / bad > tolerance:
            middle = (good + bad) // 2
            good, bad = (middle, bad) if fits(longest, output, middle) else (good, middle)
        sizes.append(good)
        size = 2 * good
    return sizes[::-1]


class BucketSampler:
    """Rows of every batch, epoch after epoch.

    Args:
        bucket: Bucket of every row, [N]; rows of bucket -1 are left out.
        sizes: Rows of a batch, one number a bucket.
        seed: Seed of the order.
        ranks: Processes; batches ``ranks i .. ranks i + ranks - 1`` are of one bucket.

    Attributes:
        parts: Batches of an epoch.

    Raises:
        InvalidInputError: Every row is left out.

    Example:
        >>> sampler = BucketSampler([0, 1, 0, 1, 0, -1], [2, 2])
        >>> sorted(len(sampler.rows(part)) for part in range(sampler.parts))
        [1, 2, 2]
    """

    def __init__(
        self, bucket: ArrayLike, sizes: Sequence[int], seed: int = 0, ranks: int = 1
    ) -> None:
        self._bucket, self._sizes = np.asarray(bucket, np.int64), sizes
        self._seed, self._ranks = seed, ranks
        self._members = [np.flatnonzero(self._bucket == b) for b in range(len(sizes))]
        whole = [size * ranks for size in sizes]
        counts = [-(-len(m) // w) for m, w in zip(self._members, whole, strict=True)]
        self.parts = sum(counts) * ranks
        if not self.parts:
            raise InvalidInputError("every example is left out; widen the buckets")
        self._epoch = -1
        self._order: list[Ints] = []

    def rows(self, part: int) -> Ints:
        """Rows of the batch of that number, counted over all epochs and processes."""
        epoch, place = divmod(part, self.parts)
        if epoch != self._epoch:
            rng = np.random.default_rng([self._seed, epoch])
            groups: list[Ints] = []
            for members, size in zip(self._members, self._sizes, strict=True):
                if len(members):
                    cuts = range(size * self._ranks, len(members), size * self._ranks)
                    groups += np.split(rng.permutation(members), cuts)
            rng.shuffle(groups)
            self._order, self._epoch = groups, epoch
        group, rank = divmod(place, self._ranks)
        return self._order[group][rank :: self._ranks]


def padding(lengths: ArrayLike, batches: Sequence[Ints]) -> float:
    """Share of what is computed that is padding, ``1 - sum of lengths / sum of padded lengths``.

    Example:
        >>> round(padding([1, 3, 4], [np.array([0, 1]), np.array([2])]), 2)
        0.2
    """
    each = np.asarray(lengths, np.float64)
    padded = sum(float(each[rows].max()) * len(rows) for rows in batches)
    return 1 - sum(float(each[rows].sum()) for rows in batches) / padded
