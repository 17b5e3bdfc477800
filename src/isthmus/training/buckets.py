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
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from isthmus.errors import InvalidInputError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
T = TypeVar("T")


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


class KeptBytes:
    """Bytes that autograd keeps for the way back in a step of training, by lengths and rows.

    Every row of the same lengths adds the same, so one row and two are measured. On the meta device
    that computes nothing: only sizes count.

    Args:
        step: The loss of a batch of these lengths, and of that many rows.

    Example:
        >>> weight = torch.ones(4, requires_grad=True)
        >>> kept = KeptBytes(lambda i, o, n: (weight * torch.ones(n, int(i), 4)).sum())
        >>> kept(5, 1, 3)  # 15 places of 16 bytes
        240
        >>> batch_sizes([(5, 1), (10, 1)], lambda *of: kept(*of) <= 16_000, tolerance=0)
        [200, 100]
    """

    def __init__(self, step: Callable[[float, float, int], torch.Tensor]) -> None:
        self.step = step
        self._known: dict[tuple[float, float], tuple[int, int]] = {}

    def __call__(self, longest: float, output: float, rows: int) -> int:
        """See the class."""
        of = longest, output
        if of not in self._known:
            one = saved_bytes(lambda: self.step(*of, 1))
            self._known[of] = one, saved_bytes(lambda: self.step(*of, 2)) - one
        first, more = self._known[of]
        return first + (rows - 1) * more


def survives(
    step: Callable[[float, float, int], torch.Tensor],
) -> Callable[[float, float, int], bool]:
    """Whether a GPU has the memory for a step of training, found by taking it.

    Args:
        step: The loss of a batch of these lengths, and of that many rows.

    Returns:
        What :func:`batch_sizes` asks.
    """

    def fits(longest: float, output: float, rows: int) -> bool:
        try:
            step(longest, output, rows).backward()  # type: ignore[no-untyped-call]
        except torch.OutOfMemoryError:
            return False
        return True

    return fits


def saved_bytes(step: Callable[[], object]) -> int:
    """Bytes that autograd keeps for the way back from what a function computes."""
    kept: dict[int, int] = {}  # one storage is often saved more than once

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()  # data on the meta device have no address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = step()  # alive till the end: freed memory would be counted twice
    del result
    return sum(kept.values())


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

    def epoch(self) -> list[Ints]:
        """Rows of all batches of the first epoch."""
        return [self.rows(part) for part in range(self.parts)]


def padding(lengths: ArrayLike, batches: Sequence[Ints]) -> float:
    """Share of what is computed that is padding, ``1 - sum of lengths / sum of padded lengths``.

    Example:
        >>> round(padding([1, 3, 4], [np.array([0, 1]), np.array([2])]), 2)
        0.2
    """
    each = np.asarray(lengths, np.float64)
    padded = sum(float(each[rows].max()) * len(rows) for rows in batches)
    return 1 - sum(float(each[rows].sum()) for rows in batches) / padded


@dataclass(frozen=True)
class Profile:
    """What the batches of an epoch are made of.

    Attributes:
        batches: Batches.
        rows: Examples of a batch, on average.
        inputs: Share of the padded inputs that is padding.
        outputs: The same of the outputs.
        cost: The same of what computing them costs.
        left_out: Examples that are in no batch.
    """

    batches: int
    rows: float
    inputs: float
    outputs: float
    cost: float
    left_out: int = 0

    @classmethod
    def of(
        cls,
        inputs: ArrayLike,
        outputs: ArrayLike,
        batches: Sequence[Ints],
        cost: Callable[[Floats, Floats], Floats] = lambda i, o: i + o,
    ) -> Profile:
        """Profile batches.

        Args:
            inputs: Lengths [N].
            outputs: Lengths [N].
            batches: Rows of each batch.
            cost: Of examples of these lengths; each is charged its own and what it is padded to.

        Example:
            >>> print(Profile.of([1, 3, 4], [1, 1, 1], [np.array([0, 1]), np.array([2])]))
            1.5 records on average; padding 20.0% of inputs, 0.0% of outputs, 15.4% of cost
        """
        ins, outs = _lengths(inputs, outputs)
        used = np.concatenate(batches)
        tops = np.array([[ins[rows].max(), outs[rows].max()] for rows in batches])
        padded = (np.array([len(rows) for rows in batches]) * cost(tops[:, 0], tops[:, 1])).sum()
        return cls(
            len(batches),
            len(used) / len(batches),
            padding(ins, batches),
            padding(outs, batches),
            float(1 - cost(ins[used], outs[used]).sum() / padded),
            len(ins) - len(used),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {name: round(value, 4) for name, value in asdict(self).items()}

    def __str__(self) -> str:
        said = (
            f"{self.rows:.1f} records on average; padding {self.inputs:.1%} of inputs, "
            f"{self.outputs:.1%} of outputs, {self.cost:.1%} of cost"
        )
        return f"{said}; {self.left_out} records left out" if self.left_out else said


class Ahead(Generic[T]):
    """Makes the next batch in a thread while the last one is used.

    Args:
        make: The batch of a number, from that number alone.

    Attributes:
        ahead: Off, batches are made when they are asked for.

    Example:
        >>> ahead = Ahead(lambda part: part**2)
        >>> [ahead(part) for part in (3, 5, 7)]
        [9, 25, 49]
    """

    def __init__(self, make: Callable[[int], T]) -> None:
        self.make, self.ahead = make, True
        self._pool: ThreadPoolExecutor | None = None
        self._coming: tuple[int, Future[T]] | None = None
        self._last: int | None = None

    def __call__(self, part: int) -> T:
        """The batch of that number."""
        if not self.ahead:
            return self.make(part)
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "batches")
        made = self._coming
        found = made[1].result() if made and made[0] == part else self.make(part)
        step = 1 if self._last is None else max(1, part - self._last)  # processes take turns
        self._last = part
        self._coming = part + step, self._pool.submit(self.make, part + step)
        return found
