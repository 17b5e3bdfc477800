"""A grid of small trainings that can be stopped and gone on with, kept as a line of JSON each.

The file is what :func:`isthmus.laws.fit.read_runs` and ``isthmus law fit`` read. Small runs come
first, so that a sweep that was stopped has all the runs that were cheap.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from isthmus.errors import BrokenFileError, DivergedError
from isthmus.folders import replace_text, writable

Record = dict[str, Any]


@dataclass(frozen=True)
class Sweep:
    """Trainings of many configurations, each done once.

    Args:
        path: File of JSON lines. A line holds a configuration, what :attr:`train` told of it,
            ``seconds``, and ``diverged``.
        train: Trains one configuration; returns what was measured, as plain data. ``loss`` must be
            among it; a ``loss`` that is not finite, or a refusal of the training loop because of
            one, marks the run as diverged.
        cost: What a configuration costs, in any unit: the order of the runs.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "runs.jsonl"
        >>> sweep = Sweep(path, lambda c: {"loss": 1 / c["n"]}, cost=lambda c: c["n"])
        >>> [run["loss"] for run in sweep.run([{"n": 4}, {"n": 2}])]
        [0.5, 0.25]
        >>> len(sweep.run([{"n": 8}, {"n": 2}], budget_s=0))  # nothing more may be trained
        1
    """

    path: Path
    train: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    cost: Callable[[Mapping[str, Any]], float]

    def run(
        self,
        configs: Iterable[Mapping[str, Any]],
        *,
        budget_s: float = math.inf,
        report: Callable[[Record], None] | None = None,
    ) -> list[Record]:
        """Train what the file does not have yet, the cheapest first.

        Args:
            configs: Plain data each; together with what they are trained on, all that decides a
                run.
            budget_s: No run begins that would end after so many seconds, judged by the cost of the
                dearest run so far.
            report: Called with every run as it ends.

        Returns:
            The runs of these configurations, the cheapest first; fewer where the budget ended.

        Raises:
            BrokenFileError: The file is no file of runs, or cannot be written.
        """
        wanted = sorted((json.loads(json.dumps(dict(c))) for c in configs), key=self.cost)
        with writable(self.path.parent):
            lock = FileLock(f"{self.path}.lock")
        with lock:
            kept = read(self.path)
            begin, pace = time.perf_counter(), 0.0
            found = []
            for config in wanted:
                run = next((k for k in kept if k["config"] == config), None)
                if run is None:
                    cost, spent = self.cost(config), time.perf_counter() - begin
                    if spent + pace * cost >= budget_s:
                        break
                    run = self._one(config)
                    pace = run["seconds"] / cost
                    kept.append(run)
                    replace_text(self.path, "".join(json.dumps(k) + "\n" for k in kept))
                    if report is not None:
                        report(run)
                found.append(run)
            return found

    def _one(self, config: Mapping[str, Any]) -> Record:
        begin = time.perf_counter()
        try:
            told = dict(self.train(config))
        except DivergedError as error:
            told = {"loss": None, "reason": str(error)}
        seconds = time.perf_counter() - begin
        diverged = told["loss"] is None or not math.isfinite(told["loss"])
        return {
            **config,
            **({**told, "loss": None} if diverged else told),
            "seconds": round(seconds, 3),
            "diverged": diverged,
            "config": dict(config),
        }


def read(path: Path) -> list[Record]:
    """The runs of a file; none where there is no file.

    Raises:
        BrokenFileError: It is no file of runs.
    """
    if not path.exists():
        return []
    try:
        runs = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise BrokenFileError(f"{path} cannot be read as runs: {error}") from error
    if not all(isinstance(run, dict) and {"config", "diverged"} <= set(run) for run in runs):
        raise BrokenFileError(f"{path} holds lines that are no runs of a sweep; name another file")
    return runs
