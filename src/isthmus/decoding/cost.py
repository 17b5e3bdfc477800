"""What a forward of N nodes costs on this machine, measured once and kept."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Mapping

import torch

from isthmus.decoding.target import HubTarget
from isthmus.decoding.tree import TokenTree, Topology, chain_topology
from isthmus.folders import cache_folder

NODES = (1, 2, 4, 8, 16, 32, 64)


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
        """Learn from a forward that really ran: what is near in size moves most.

        A first measurement may have met a busy machine, and caches grow; single outliers are
        clipped.
        """
        factor = min(3.0, max(0.33, seconds / self(nodes)))
        for i, known in enumerate(self._nodes):
            distance = abs(math.log2(known / max(nodes, 1.0)))
            self._times[i] *= factor ** (0.2 * math.exp(-distance))

    def __call__(self, nodes: float) -> float:
        """Seconds of a forward of that many nodes, root included."""
        xs, ys = self._nodes, self._times
        for i in range(1, len(xs)):
            if nodes <= xs[i]:
                share = (nodes - xs[i - 1]) / (xs[i] - xs[i - 1])
                return ys[i - 1] + max(0.0, share) * (ys[i] - ys[i - 1])
        return ys[-1] * nodes / xs[-1]


def measure_cost(target: HubTarget, *, length: int = 128, budget_s: float = 1.5) -> Cost:
    """Time forwards of 1, 2, 4 ... 64 nodes, interleaved.

    Args:
        target: The model to time.
        length: Cached tokens while timing.
        budget_s: Stop repeating after this many seconds (each count is timed at least once).
    """
    nodes = [n for n in NODES if target.reach != "step" or n == 1]
    length = min(length, (target.max_length or 10**9) - 66)
    session = target.session(1, **target.probe_inputs())
    session.prefill([torch.zeros(max(1, length), dtype=torch.int64)])
    trees = {}
    for n in nodes:
        star = Topology.of([-1, *[0] * (n - 1)]) if target.reach == "tree" and n > 2 else None
        tree = TokenTree(torch.zeros(1, n, dtype=torch.int64), star or chain_topology(n))
        trees[n] = tree.to(target.device)
    samples: dict[int, list[float]] = {n: [] for n in nodes}
    nothing = torch.full((1, 1), -1, device=target.device)
    begin = time.perf_counter()
    for repeat in range(12):
        for n, tree in trees.items():
            if target.device.type == "cuda":
                torch.cuda.synchronize(target.device)
            start = time.perf_counter()
            session.score(tree)
            if target.device.type == "cuda":
                torch.cuda.synchronize(target.device)
            if repeat or n != nodes[0]:
                samples[n].append(time.perf_counter() - start)
            if target.recurrent:
                session.keep(torch.zeros(1, 1, dtype=torch.int64))
            else:
                session.keep(nothing)
        if repeat and time.perf_counter() - begin > budget_s:
            break
    # the lower quartile: other programs only ever make a forward slower
    return Cost({n: sorted(s)[len(s) // 4] for n, s in samples.items()})


def cost(target: HubTarget) -> Cost:
    """The cost of a target, read from the user's cache folder or measured and kept there.

    A folder that cannot be written only means that the next run measures again.
    """
    path = cache_folder() / "cost" / f"{_fingerprint(target)}.json"
    try:
        known = {int(k): float(v) for k, v in json.loads(path.read_text()).items()}
        if 1 in known and all(math.isfinite(v) and v > 0 for v in known.values()):
            return Cost(known)
    except (OSError, ValueError, AttributeError, TypeError):
        pass  # absent or damaged: measure again
    measured = measure_cost(target)
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
        target.model.config.to_json_string(use_diff=False),
        str(target.dtype),
        str(device),
        name,
        str(os.cpu_count()),
        str(torch.get_num_threads()),
        torch.__version__,
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]
