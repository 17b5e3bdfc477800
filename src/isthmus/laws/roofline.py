"""What a machine can do, and the least time that a forward takes on it.

Two numbers bound every forward: the machine reads so many bytes and multiplies so many numbers a
second (Williams, Waterman and Patterson, Roofline, 2009). Below the *ridge*, in FLOPs per byte,
memory decides; above it arithmetic does::

    FLOP/s |          ________________ peak
           |        /.
           |      /  .
           |    /    .  <- read bandwidth x intensity
           |  /      .
           +---------+---------------- FLOPs per byte
                   ridge

Everything here is measured on the machine at hand, with its spread; nothing is looked up.
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from isthmus.decoding.target import HubTarget
from isthmus.errors import InvalidInputError
from isthmus.folders import kept, writable
from isthmus.laws.opcount import Footprint, Op, OpTable, Work

MIN_REPEATS = 5
"""Fewer timings than this show no spread."""

NOISY = 2.0
"""Spread p90 / p10 of one and the same work above which a machine counts as shared."""

SIZES = (512, 1024, 2048, 4096)
"""Sides of the square matrices that are multiplied."""

MIB = 2**20


@dataclass(frozen=True)
class Reading:
    """A measured rate, per second.

    Attributes:
        best: The fastest repeat: other programs only ever make work slower, so this is the roof.
        median: Median of the repeats.
        low: Lower quartile.
        high: Upper quartile.
        spread: 90th over 10th percentile.
    """

    best: float
    median: float
    low: float
    high: float
    spread: float = 1.0

    @classmethod
    def of(cls, amount: float, seconds: Sequence[float]) -> Reading:
        """The rate of an amount of work that took so many seconds in each repeat.

        Raises:
            InvalidInputError: There are too few repeats, or the clock saw no time pass.

        Example:
            >>> Reading.of(8.0, [1.0, 2.0, 2.0, 2.0, 4.0]).median
            4.0
        """
        if len(seconds) < MIN_REPEATS or min(seconds) <= 0:
            raise InvalidInputError(
                f"a reading takes {MIN_REPEATS} repeats that the clock can see, got {len(seconds)}"
                f" of at least {min(seconds, default=0.0):g} s; repeat more, or time more work"
            )
        p10, low, median, high, p90, best = np.percentile(
            amount / np.asarray(seconds, dtype=float), (10, 25, 50, 75, 90, 100)
        ).tolist()
        return cls(best, median, low, high, p90 / p10)

    @property
    def noisy(self) -> bool:
        """Whether the repeats differ so much that somebody else was using the machine."""
        return self.spread > NOISY


@dataclass(frozen=True)
class Roof:
    """What a machine can do.

    Attributes:
        device: Name of the processor.
        kind: ``"cpu"`` or ``"cuda"``.
        threads: Threads of torch; 1 on a GPU.
        torch: Version of torch.
        read: Read bandwidth in bytes/s by the bytes that are read again and again, ascending:
            what fits into a cache is read faster. The last one is main memory.
        products: Matrix products in FLOP/s by dtype.
        launch_s: Seconds of starting an operation that has nothing to do.
    """

    device: str
    kind: str
    threads: int
    torch: str
    read: tuple[tuple[int, Reading], ...]
    products: Mapping[str, Reading]
    launch_s: float = 0.0

    @property
    def noisy(self) -> bool:
        """Whether memory or arithmetic was measured on a machine that others were using."""
        return any(r.noisy for r in (self.read[-1][1], *self.products.values()))

    @property
    def memory(self) -> Reading:
        """Read bandwidth of main memory in bytes/s."""
        return self.read[-1][1]

    def bandwidth(self, size: float = math.inf) -> Reading:
        """Read bandwidth in bytes/s when ``size`` bytes are read again and again.

        Example:
            >>> cache, memory = Reading(9, 9, 9, 9), Reading(5, 5, 5, 5)
            >>> roof = Roof("", "cpu", 1, "", ((1, cache), (4, memory)), {})
            >>> roof.bandwidth(2).best, roof.bandwidth().best
            (7.0, 5)
        """
        if size >= self.read[-1][0]:
            return self.memory
        places = [math.log(at) for at, _ in self.read]
        values = np.array([tuple(asdict(r).values()) for _, r in self.read])
        at = math.log(max(size, 1.0))
        return Reading(*(float(np.interp(at, places, column)) for column in values.T))

    def peak(self, dtype: str) -> Reading:
        """Matrix products in FLOP/s for numbers stored in a dtype.

        Where a wider dtype is multiplied faster, a kernel may widen the numbers on the way.

        Raises:
            InvalidInputError: Neither the dtype nor a wider one was measured.
        """
        width = _itemsize(dtype)
        able = [r for name, r in self.products.items() if name == dtype or _itemsize(name) > width]
        if not able:
            raise InvalidInputError(
                f"matrix products in {dtype} were not measured, only {', '.join(self.products)}; "
                "measure the machine with this dtype"
            )
        return max(able, key=lambda r: r.best)

    def ridge(self, dtype: str) -> float:
        """FLOPs per byte above which arithmetic decides, data in main memory."""
        return self.peak(dtype).best / self.memory.best

    def attainable(self, intensity: float, dtype: str) -> float:
        """FLOP/s that work of an intensity in FLOPs per byte can reach, data in main memory."""
        return min(self.peak(dtype).best, intensity * self.memory.best)

    def floor_s(self, work: Work, dtype: str, *, size: float | None = None) -> float:
        """The least seconds of some work.

        Args:
            work: What is to be done.
            dtype: How its numbers are stored.
            size: Bytes that are read again and again, the work's own when None.
        """
        bandwidth = self.bandwidth(work.bytes if size is None else size)
        return max(work.bytes / bandwidth.best, work.flops / self.peak(dtype).best)

    def bound(self, work: Work, dtype: str, *, size: float | None = None) -> str:
        """What decides the least time of some work: ``"memory"`` or ``"compute"``."""
        arithmetic_s = work.flops / self.peak(dtype).best
        return "compute" if self.floor_s(work, dtype, size=size) <= arithmetic_s else "memory"

    def without_wall(self) -> Roof:
        """The same machine with a memory that costs nothing: what FLOPs alone predict."""
        free = Reading(*[math.inf] * 4)
        return replace(self, read=tuple((size, free) for size, _ in self.read))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self) | {"noisy": self.noisy}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Roof:
        """What :meth:`to_dict` gave, read back.

        Raises:
            InvalidInputError: Something is missing or of the wrong kind.
        """
        try:
            roof = cls(
                str(values["device"]),
                str(values["kind"]),
                int(values["threads"]),
                str(values["torch"]),
                tuple((int(size), Reading(**r)) for size, r in values["read"]),
                {str(name): Reading(**r) for name, r in values["products"].items()},
                float(values["launch_s"]),
            )
            rates = [r.best for r in (*dict(roof.read).values(), *roof.products.values())]
            if not roof.read or not all(math.isfinite(rate) and rate > 0 for rate in rates):
                raise ValueError("rates must be above 0")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InvalidInputError(
                f"this is no measured machine ({error}); measure again"
            ) from error
        return roof


def measure(
    device: str | torch.device = "cpu", *, dtypes: Sequence[str] = (), budget_s: float = 6.0
) -> Roof:
    """Measure this machine: some seconds on a CPU, with the threads that torch has.

    Reading is timed as a sum, which touches every byte once; on a CPU over arrays from 1 MiB to
    four times the last cache, on a GPU over 1 GiB with its cache flushed in between. Matrix
    products are squares of growing size, the fastest of them kept.

    Args:
        device: Where.
        dtypes: dtypes of the matrix products; float32 and bfloat16, on a GPU float16 too, when
            none is given.
        budget_s: Repeat for about this long; each piece is repeated 5 times at least.
    """
    where = torch.device(device)
    names = tuple(dtypes) or ("float32", "bfloat16", *(("float16",) if where.type != "cpu" else ()))
    read: list[tuple[int, Reading]] = []
    sizes = _read_sizes(where)
    for size in reversed(sizes):
        x = torch.ones(size // 4, device=where)
        again = max(1, 8 * MIB // size) if where.type == "cpu" else 1

        def reading(x: torch.Tensor = x, again: int = again) -> None:
            for _ in range(again):
                x.sum()

        seconds = timings(reading, where, budget_s=budget_s / 3 / len(sizes))
        found = Reading.of(size * again, seconds)
        if read and found.best < read[0][1].best:
            found = read[0][1]  # less is never read slower: that was the start of the threads
        read.insert(0, (size, found))
    products = {name: _products(name, where, budget_s / 3 / len(names)) for name in names}
    one = torch.ones(1, device=where)

    def empty() -> None:
        for _ in range(1000):
            torch.neg(one, out=one)

    launch_s = min(timings(empty, where, budget_s=budget_s / 20)) / 1000
    cpu = where.type == "cpu"
    return Roof(
        _processor() if cpu else torch.cuda.get_device_name(where),
        where.type,
        torch.get_num_threads() if cpu else 1,
        torch.__version__,
        tuple(read),
        products,
        launch_s,
    )


def roof_of(device: str | torch.device = "cpu", *, fresh: bool = False) -> Roof:
    """This machine, from the user's cache folder or measured and kept there.

    A reading that was noisy is taken again.

    Args:
        device: Where.
        fresh: Measure now, whatever is kept.

    Raises:
        BrokenFileError: The cache folder cannot be written.
    """
    where = torch.device(device)
    cpu = where.type == "cpu"
    name = _processor() if cpu else torch.cuda.get_device_name(where)
    key = [name, os.cpu_count() if cpu else 1, torch.get_num_threads(), torch.__version__]
    with kept("roofs", where.type, key) as folder:
        path = folder.with_suffix(".json")
        if not fresh:
            try:
                roof = Roof.from_dict(json.loads(path.read_text(encoding="utf-8")))
                if not roof.noisy:
                    return roof
            except (OSError, ValueError):
                pass  # absent or damaged: measure
        roof = measure(where)
        with writable(path.parent):
            part = path.with_suffix(".part")
            part.write_text(json.dumps(roof.to_dict(), indent=1), encoding="utf-8")
            part.replace(path)
    return roof


def timings(
    run: Callable[[], object],
    device: str | torch.device = "cpu",
    *,
    budget_s: float = 1.0,
    repeats: int = 5,
) -> list[float]:
    """Time a function: on a CPU by the clock, on a GPU by its own events.

    On a GPU the cache is flushed before each repeat, and clocks are left as they are.

    Args:
        run: The function.
        device: Where it runs.
        budget_s: Repeat for about this long.
        repeats: Repeat at least this often; on a GPU 30 times after 10 for warming up.

    Returns:
        Seconds of each repeat.

    Raises:
        InvalidInputError: Fewer than 5 repeats are asked for.
    """
    if repeats < MIN_REPEATS:
        raise InvalidInputError(
            f"{repeats} repeats show no spread; time at least {MIN_REPEATS} of them"
        )
    where = torch.device(device)
    gpu = where.type == "cuda"
    for _ in range(10 if gpu else 2):
        run()
    flush = None
    if gpu:
        cache = torch.cuda.get_device_properties(where).L2_cache_size
        flush = torch.empty(max(2 * cache, 64 * MIB), dtype=torch.uint8, device=where)
    seconds: list[float] = []
    begin = time.perf_counter()
    least = max(repeats, 30) if gpu else repeats
    while len(seconds) < least or (
        time.perf_counter() - begin < budget_s and len(seconds) < 100 * least
    ):
        if flush is not None:
            flush.zero_()
            event: Any = torch.cuda.Event
            start, end = event(enable_timing=True), event(enable_timing=True)
            start.record(torch.cuda.current_stream(where))
            run()
            end.record(torch.cuda.current_stream(where))
            end.synchronize()
            seconds.append(start.elapsed_time(end) / 1e3)
        else:
            started = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - started)
    return seconds


def floor_ms(
    target: HubTarget,
    nodes: int,
    cached: int,
    roof: Roof,
    *,
    batch: int = 1,
    source: int = 0,
) -> float:
    """The least milliseconds of one forward of a target.

    Weights are read once in the dtype they are stored in, of the embeddings only the rows that are
    looked up, keys and values once for each row; all of it at the bandwidth of the caches where
    it fits into them.

    Args:
        target: The model; see :class:`isthmus.laws.opcount.Footprint`.
        nodes: Tokens N that are computed.
        cached: Tokens S that are cached.
        roof: The machine.
        batch: Rows B.
        source: Tokens of the encoder's output, where there is one.
    """
    work = Footprint.of(target).forward(nodes, cached, batch=batch, source=source)
    return 1e3 * roof.floor_s(work, dtype_name(target.dtype))


def dtype_name(dtype: torch.dtype) -> str:
    """Name of a dtype without its module, for example ``"float32"``."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Prediction:
    """The least time of a counted run, operation by operation.

    Attributes:
        ops: The operations.
        seconds: The least seconds of each, those of starting it included.
        bounds: What decides each: ``"memory"``, ``"compute"`` or ``"launch"``.
        usual_s: Seconds of the whole at the lower quartiles of the machine's rates: what can be
            had three times in four.
    """

    ops: tuple[Op, ...]
    seconds: tuple[float, ...]
    bounds: tuple[str, ...]
    usual_s: float

    @property
    def total_s(self) -> float:
        """Seconds of the whole run."""
        return sum(self.seconds)

    def share(self, bound: str) -> float:
        """Share of the time in which ``bound`` decides."""
        parts = zip(self.seconds, self.bounds, strict=True)
        return sum(s for s, name in parts if name == bound) / self.total_s

    def efficiency(self, measured_s: float) -> float:
        """Predicted over measured seconds: 1 is the roof."""
        return self.total_s / measured_s


def roofline(table: OpTable, roof: Roof, dtype: str = "float32") -> Prediction:
    """Predict the time of a counted run: each operation as fast as the machine allows.

    An operation takes ``max(flops / peak, bytes / bandwidth)`` and the time of starting it. Data
    is taken to come from main memory.

    Args:
        table: Result of :func:`isthmus.laws.opcount.count`.
        roof: The machine.
        dtype: How the numbers are stored.
    """
    peak, memory = roof.peak(dtype), roof.memory
    seconds, bounds = [], []
    usual_s = 0.0
    for op in table.ops:
        parts = {
            "memory": op.bytes / memory.best,
            "compute": op.flops / peak.best,
            "launch": op.calls * roof.launch_s,
        }
        bounds.append(max(parts, key=lambda name: parts[name]))
        seconds.append(max(parts["memory"], parts["compute"]) + parts["launch"])
        usual_s += max(op.bytes / memory.low, op.flops / peak.low) + parts["launch"]
    return Prediction(table.ops, tuple(seconds), tuple(bounds), usual_s)


def _products(name: str, where: torch.device, budget_s: float) -> Reading:
    """The fastest size of square; sizes go up while there is time for them."""
    dtype = getattr(torch, name)
    best: Reading | None = None
    begin = time.perf_counter()
    for n in SIZES if where.type != "cpu" else (128, 256, *SIZES):
        a = torch.ones(n, n, dtype=dtype, device=where)
        seconds = timings(lambda a=a: torch.mm(a, a), where, budget_s=0.1)  # type: ignore[misc]
        found = Reading.of(2.0 * n**3, seconds)
        if best is None or found.best > best.best:
            best = found
        # the next size is eight times the work
        if time.perf_counter() - begin + 8 * 7 * min(seconds) > budget_s:
            break
    assert best is not None
    return best


def _read_sizes(where: torch.device) -> list[int]:
    if where.type != "cpu":
        return [1024 * MIB]
    last = min(1024 * MIB, max(256 * MIB, 4 * _last_cache_bytes()))
    return [MIB << k for k in range(0, 20, 2) if MIB << k < last] + [last]


def _last_cache_bytes() -> int:
    """Bytes of the last cache level of the first core, 32 MiB where it is not told."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text(encoding="ascii").strip()
        if text[:-1].isdigit() and text[-1:] in units:
            sizes.append(int(text[:-1]) * units[text[-1]])
    return max(sizes, default=32 * MIB)


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _itemsize(dtype: str) -> int:
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype):
        raise InvalidInputError(f"{dtype!r} is no dtype of torch; use float32 or bfloat16")
    return found.itemsize
