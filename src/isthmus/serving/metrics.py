"""Counts of a server in Prometheus' text format (version 0.0.4)."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import defaultdict
from pathlib import Path

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

Labels = tuple[tuple[str, str], ...]


class Metrics:
    """Counters and histograms of one server."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counters: dict[str, dict[Labels, float]] = defaultdict(lambda: defaultdict(float))
        self._buckets: dict[str, list[int]] = defaultdict(lambda: [0] * (len(SECONDS) + 1))
        self._sums: dict[str, float] = defaultdict(float)
        self._help: dict[str, str] = {}

    def add(self, name: str, help: str, amount: float = 1, **labels: str) -> None:
        """Add to a counter; its name ends in ``_total``."""
        with self._lock:
            self._help[name] = help
            self._counters[name][tuple(sorted(labels.items()))] += amount

    def observe(self, name: str, help: str, seconds: float) -> None:
        """Add to a histogram of seconds."""
        with self._lock:
            self._help[name] = help
            self._buckets[name][bisect_left(SECONDS, seconds)] += 1
            self._sums[name] += seconds

    def render(self, gauges: dict[str, tuple[str, float]]) -> str:
        """The text that is scraped.

        Args:
            gauges: Help and value of what is read off now, by name.

        Example:
            >>> metrics = Metrics()
            >>> metrics.add("x_total", "Things.", kind="a")
            >>> print(metrics.render({"y": ("Now.", 2)}))
            # HELP x_total Things.
            # TYPE x_total counter
            x_total{kind="a"} 1
            # HELP y Now.
            # TYPE y gauge
            y 2
            <BLANKLINE>
        """
        lines = []
        with self._lock:
            for name, values in self._counters.items():
                lines += [f"# HELP {name} {self._help[name]}", f"# TYPE {name} counter"]
                lines += [f"{name}{_labels(k)} {v:g}" for k, v in sorted(values.items())]
            for name, counts in self._buckets.items():
                lines += [f"# HELP {name} {self._help[name]}", f"# TYPE {name} histogram"]
                total = 0
                for bound, n in zip((*map(str, SECONDS), "+Inf"), counts, strict=True):
                    total += n
                    lines.append(f'{name}_bucket{{le="{bound}"}} {total}')
                lines += [f"{name}_sum {self._sums[name]:g}", f"{name}_count {total}"]
        for name, (help, value) in gauges.items():
            lines += [f"# HELP {name} {help}", f"# TYPE {name} gauge", f"{name} {value:g}"]
        return "\n".join(lines) + "\n"


def _labels(labels: Labels) -> str:
    if not labels:
        return ""
    escaped = ((k, v.replace("\\", "\\\\").replace('"', '\\"')) for k, v in labels)
    return "{" + ",".join(f'{k}="{v}"' for k, v in escaped) + "}"


def resident_bytes() -> float:
    """Resident size of this process, 0 where it cannot be read."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0.0
    return pages * 4096.0
