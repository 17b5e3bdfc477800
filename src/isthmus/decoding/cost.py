"""What a forward of N nodes costs on this machine, measured once and kept."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from isthmus.decoding.target import HubTarget
from isthmus.decoding.tree import TokenTree, Topology, chain_topology
from isthmus.errors import InvalidInputError
from isthmus.folders import cache_folder
from isthmus.roles import Session

NODES = (1, 2, 4, 8, 16, 32, 64)

DEAREST = 8.0
"""Forwards of one node a row that a wider forward of a batch may cost to be timed further."""


class Cost:
    """Seconds of a target forward by number of nodes, interpolated between measured counts.

    Args:
        seconds: Measured seconds by node count; must hold 1.

    Example:
        >>> Cost({1: 1.0, 3: 2.0})(2.0)
        1.5
    """

    def __init__(self, seconds: Mapping[int, float]) -> None:
        self._nodes = sorted(seconds)
        # a larger forward is never cheaper; the rest is noise of the clock
        self._times: list[float] = []
        for nodes in self._nodes:
            self._times.append(max(seconds[nodes], self._times[-1] if self._times else 0.0))

    @property
    def seconds(self) -> dict[int, float]:
        """Seconds by node count, as they are known now."""
        return dict(zip(self._nodes, self._times, strict=True))

    def observe(self, nodes: float, seconds: float) -> None:
        """Learn from a forward that really ran.

        A machine that is busy is slow at every size, so most of a surprise moves all sizes alike
        and the rest what is near in size; single outliers are clipped.
        """
        factor = min(3.0, max(0.33, seconds / self(nodes)))
        for i, known in enumerate(self._nodes):
            distance = abs(math.log2(known / max(nodes, 1.0)))
            self._times[i] *= factor ** (0.15 + 0.05 * math.exp(-distance))
        # a larger forward is still never cheaper; what was seen last is trusted most
        near = min(
            range(len(self._nodes)), key=lambda i: abs(math.log2(self._nodes[i] / max(nodes, 1.0)))
        )
        for i in range(near + 1, len(self._times)):
            self._times[i] = max(self._times[i], self._times[i - 1])
        for i in range(near - 1, -1, -1):
            self._times[i] = min(self._times[i], self._times[i + 1])

    def __call__(self, nodes: float) -> float:
        """Seconds of a forward of that many nodes, root included."""
        xs, ys = self._nodes, self._times
        for i in range(1, len(xs)):
            if nodes <= xs[i]:
                share = (nodes - xs[i - 1]) / (xs[i] - xs[i - 1])
                return ys[i - 1] + max(0.0, share) * (ys[i] - ys[i - 1])
        return ys[-1] * nodes / xs[-1]

    def many(self, nodes: NDArray[np.float64]) -> NDArray[np.float64]:
        """Seconds of forwards of all the given sizes, any shape."""
        last = self._nodes[-1]
        inside = np.interp(nodes, self._nodes, self._times)
        beyond = self._times[-1] * nodes / last
        return np.where(nodes > last, beyond, inside)


class Costs:
    """Seconds of a forward by rows of the batch and nodes a row: one curve for 1, 2, 4 ... rows.

    A curve says how a forward of that many rows grows with the nodes of each, which decides
    whether drafting pays: the more rows, the sooner a wider forward costs what it computes.

    Args:
        single: The curve of one row.
        measure: Measures the curve of more rows; without it they cost what as many nodes of one
            row do.

    Example:
        >>> costs = Costs(Cost({1: 1.0, 4: 4.0}))
        >>> costs.of(2)(1), costs.of(2)(2)
        (2.0, 4.0)
    """

    def __init__(self, single: Cost, measure: Callable[[int], Cost] | None = None) -> None:
        self._curves, self._measure, self._measured = {1: single}, measure, {1}

    def prepare(self, rows: int) -> None:
        """Measure the curve of a batch that is about to begin, if it is not known."""
        near = _power_of_two(rows)
        if self._measure is not None and near not in self._measured:
            self._curves[near] = self._measure(near)
            self._measured.add(near)

    def of(self, rows: int) -> Cost:
        """Seconds by nodes a row, of batches of about so many rows."""
        near = _power_of_two(rows)
        if near not in self._curves:
            # as the nearest curve that was measured, scaled as one row with as many nodes
            known = min(self._measured, key=lambda r: abs(math.log2(r / near)))
            base, single = self._curves[known], self._curves[1]
            self._curves[near] = Cost(
                {n: base(n) * single(near * n) / single(known * n) for n in NODES}
            )
        return self._curves[near]


def _power_of_two(rows: int) -> int:
    return 1 << round(math.log2(max(1, rows)))


@dataclass(frozen=True)
class Machine:
    """Seconds of forwards, linear in the tokens cached and in the tokens computed.

    Attributes:
        target: Seconds per cached token, per computed token, and per forward of the target.
        draft: The same of the draft model; zeros for a drafter that costs nothing.
    """

    target: tuple[float, float, float]
    draft: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def __post_init__(self) -> None:
        if min(*self.target, *self.draft) < 0 or sum(self.target) == 0:
            raise InvalidInputError("a machine's coefficients are 0 or more, and not all 0")

    def score_s(self, context: float, batched: float) -> float:
        """Seconds of a target forward of ``batched`` tokens on ``context`` cached ones."""
        a, b, c = self.target
        return a * context + b * batched + c

    def draft_s(self, context: float, lengths: NDArray[np.int64]) -> float:
        """Seconds of drafting ``lengths`` [R] tokens, one forward a level."""
        a, b, c = self.draft
        levels = int(lengths.max(initial=0))
        share = context / max(1, len(lengths))
        # requests whose draft is long enough take part in a level
        return a * share * float(lengths.sum()) + b * float(lengths.sum()) + c * levels


def measure_cost(
    target: HubTarget,
    *,
    rows: int = 1,
    length: int = 128,
    nodes: Sequence[int] = (),
    budget_s: float = 1.5,
) -> Cost:
    """Time forwards of some numbers of nodes a row, interleaved.

    Args:
        target: The model to time.
        rows: Rows of the batch, of unlike length.
        length: Cached tokens while timing.
        nodes: Nodes a row, growing; 1, 2, 4 ... 64 when none are given.
        budget_s: Stop repeating after this many seconds (each count is timed at least once, but
            for those that can hardly pay: more than ``DEAREST`` forwards of one node).
    """
    nodes = [n for n in nodes or NODES if target.reach != "step" or n == 1]
    length = max(1, min(length, (target.max_length or 10**9) - max(nodes) - 2))
    session = _session(target, rows)
    session.prefill([torch.zeros(length - b % 2, dtype=torch.int64) for b in range(rows)])
    trees = {}
    for n in nodes:
        star = Topology.of([-1, *[0] * (n - 1)]) if target.reach == "tree" and n > 2 else None
        tree = TokenTree(torch.zeros(rows, n, dtype=torch.int64), star or chain_topology(n))
        trees[n] = tree.to(target.device)
    samples: dict[int, list[float]] = {n: [] for n in nodes}
    nothing = torch.full((rows, 1), -1, device=target.device)
    begin, alone = time.perf_counter(), math.inf
    for repeat in range(12):
        for n, tree in trees.items():
            if target.device.type == "cuda":
                torch.cuda.synchronize(target.device)
            start = time.perf_counter()
            session.score(tree)
            if target.device.type == "cuda":
                torch.cuda.synchronize(target.device)
            seconds = time.perf_counter() - start
            if repeat or n != nodes[0]:
                samples[n].append(seconds)
            if target.recurrent:
                session.keep(torch.zeros(1, 1, dtype=torch.int64))
            else:
                session.keep(nothing)
            alone = seconds if n == nodes[0] else alone
            if rows > 1 and seconds > DEAREST * alone:
                trees = {k: tree for k, tree in trees.items() if k <= n}
                break
        if repeat >= (1 if rows == 1 else 3) and time.perf_counter() - begin > budget_s:
            break
    # the fastest: other programs only ever make a forward slower
    return Cost({n: min(s) for n, s in samples.items() if s})


def _session(target: HubTarget, rows: int) -> Session:
    inputs = target.probe_inputs().items()
    return target.session(rows, **{k: v.expand(rows, *v.shape[1:]) for k, v in inputs})


def forward_times(
    target: HubTarget, rows: Sequence[int], nodes: Sequence[int], cached: Sequence[int]
) -> list[tuple[float, float, float]]:
    """Time forwards of every size: (cached tokens, computed tokens, seconds)."""
    out = []
    for b in rows:
        for length in cached:
            session = _session(target, b)
            session.prefill([torch.zeros(length, dtype=torch.int64)] * b)
            nothing = torch.full((b, 0), -1, dtype=torch.int64, device=target.device)
            for n in nodes:
                tokens = torch.zeros(b, n, dtype=torch.int64, device=target.device)
                tree = TokenTree(tokens, chain_topology(n)).to(target.device)
                seconds = []
                for _ in range(4):
                    begin = time.perf_counter()
                    float(session.score(tree).logits[0, 0, 0])  # waits for the device
                    seconds.append(time.perf_counter() - begin)
                    session.keep(nothing)
                out.append((float(b * length), float(b * n), min(seconds)))
    return out


def measure_machine(
    target: HubTarget, draft: HubTarget | None = None, *, rows: Sequence[int] = (1, 4, 16)
) -> Machine:
    """Fit the coefficients of a target and its draft model on timed forwards."""
    fits = []
    for model, nodes in ((target, (1, 2, 4, 6)), (draft, (1, 2))):
        if model is None:
            fits.append((0.0, 0.0, 0.0))
            continue
        longest = (model.max_length or 10**9) - max(nodes)
        cached = sorted({max(1, min(length, longest)) for length in (32, 160)})
        measured = np.array(forward_times(model, rows, nodes, cached))
        features = np.stack([measured[:, 0], measured[:, 1], np.ones(len(measured))], 1)
        fit = np.linalg.lstsq(features, measured[:, 2], rcond=None)[0]
        if fit[0] < 0:  # short caches cost nothing that the clock could see
            fit[1:] = np.linalg.lstsq(features[:, 1:], measured[:, 2], rcond=None)[0]
        fits.append((max(float(fit[0]), 0.0), max(float(fit[1]), 0.0), max(float(fit[2]), 0.0)))
    return Machine(*fits)


def cost(target: HubTarget, rows: int = 1) -> Cost:
    """The cost of a target by nodes a row, read from the cache folder or measured and kept there.

    A folder that cannot be written only means that the next run measures again.
    """
    name = _fingerprint(target) + (f"-{rows}" if rows > 1 else "")
    path = cache_folder() / "cost" / f"{name}.json"
    try:
        known = {int(k): float(v) for k, v in json.loads(path.read_text()).items()}
        if 1 in known and all(math.isfinite(v) and v > 0 for v in known.values()):
            return Cost(known)
    except (OSError, ValueError, AttributeError, TypeError):
        pass  # absent or damaged: measure again
    measured = measure_cost(target, rows=rows)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps(measured.seconds))
        part.replace(path)
    except OSError:
        pass
    return measured


def _fingerprint(target: HubTarget) -> str:
    device = target.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    parts = (
        target.description,
        type(target).__name__ + getattr(target, "weights", ""),
        str(target.dtype),
        str(device),
        name,
        str(os.cpu_count()),
        str(torch.get_num_threads()),
        torch.__version__,
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]
