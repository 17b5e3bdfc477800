"""Claims, the ledger that keeps them, and the ruler that times them.

A :class:`Claim` is what a paper says, measured again: rows that put the method beside its baseline
and beside itself with the idea switched off, gates that decide, and a status that follows from
them. A :class:`Ledger` is a JSON file with the last measured claim of every system and where it
was measured (:class:`Provenance`). A :class:`Ruler` is the only clock: baseline and method run
in turn in one process, so that a slow spell of the machine hits both::

    isthmus claim SLUG
          │  calls
          ▼
    system module: claim(ruler, scale) ── ruler.compare({...}) ──▶ {name: Timing}
          │  returns                                                   │ ratio(a, b)
          ▼                                                            ▼
    Claim(rows, gates, status = judge(gates, direction_gates))  "1.8x [1.7, 1.9]"
          │
          ▼
    Ledger.record ──▶ docs/ledger.json ──▶ docs/ledger.md

Every system's module has a function ``claim(ruler, scale="small") -> Claim``.

>>> judge([Gate("speed-up", 1.8, ">=", 1.5)]).value
'reproduced'
>>> judge([Gate("speed-up", 1.2, ">=", 1.5)], [Gate("speed-up", 1.2, ">", 1.0)]).value
'direction-only'
"""

import contextlib
import dataclasses
import datetime
import gc
import importlib.metadata
import json
import math
import operator
import os
import platform
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args

from isthmus import __version__, folders
from isthmus.errors import BrokenFileError, InvalidInputError

__all__ = [
    "Claim",
    "Entry",
    "Gate",
    "Ledger",
    "Op",
    "Provenance",
    "Ratio",
    "Row",
    "Ruler",
    "Scale",
    "Status",
    "Timing",
    "judge",
    "ratio",
    "render_entry",
    "shipped_ledger",
]

#: Size at which a claim was measured: seconds, minutes on two CPU cores, or minutes on one GPU.
Scale = Literal["test", "small", "small-gpu"]

#: Comparisons that a gate may use.
Op = Literal[">=", ">", "<=", "<", "=="]

_OPS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    ">": operator.gt,
    "<=": operator.le,
    "<": operator.lt,
    "==": operator.eq,
}
_T = TypeVar("_T")
_SCHEMA = 1
_MAX_BYTES = 32 * 2**20


class Status(StrEnum):
    """What became of a claim."""

    REPRODUCED = "reproduced"
    DIRECTION_ONLY = "direction-only"
    NOT_REPRODUCED = "not-reproduced"
    NOT_TESTABLE_HERE = "not-testable-here"


@dataclass(frozen=True)
class Gate:
    """One condition that a claim has to meet.

    Attributes:
        name: What is compared.
        value: The measured value; None where none came out, which meets no condition.
        op: One of ``>=``, ``>``, ``<=``, ``<``, ``==``.
        bound: What the value is held against.

    Raises:
        InvalidInputError: The comparison is unknown, or the bound is no finite number.
    """

    name: str
    value: float | None
    op: Op
    bound: float

    def __post_init__(self) -> None:
        if self.op not in _OPS:
            raise InvalidInputError(f"gate {self.name!r}: op must be one of {', '.join(_OPS)}")
        if not math.isfinite(self.bound):
            raise InvalidInputError(f"gate {self.name!r}: the bound must be finite")

    @property
    def passed(self) -> bool:
        """Whether the condition holds; a value that is not a finite number meets none."""
        if self.value is None or not math.isfinite(self.value):
            return False
        return bool(_OPS[self.op](self.value, self.bound))


def judge(gates: Sequence[Gate], direction_gates: Sequence[Gate] = ()) -> Status:
    """Turn gates into a status.

    Args:
        gates: All must pass for the claim to count as reproduced.
        direction_gates: All must pass for it to count as right in direction but not in size. With
            none given, a claim that misses a gate is not reproduced.

    Returns:
        ``REPRODUCED``, ``DIRECTION_ONLY`` or ``NOT_REPRODUCED``.

    Raises:
        InvalidInputError: There is no gate: nothing measured, nothing reproduced.
    """
    if not gates:
        raise InvalidInputError("a claim without gates cannot be judged; give at least one Gate")
    if all(gate.passed for gate in gates):
        return Status.REPRODUCED
    if direction_gates and all(gate.passed for gate in direction_gates):
        return Status.DIRECTION_ONLY
    return Status.NOT_REPRODUCED


@dataclass(frozen=True)
class Row:
    """One measured line of a claim; the columns share the metric and the unit.

    Attributes:
        metric: What was measured, for example ``"acceptance length"``.
        unit: Its unit, for example ``"tokens/forward"``; ``""`` for a pure number.
        baseline: The value without the method; None where it cannot be measured.
        ours: The value with the method.
        off: The value with the method in place and its idea switched off.
        ceiling: The best value that is possible at all, where it is known.
        control: The value of a method that should *not* work, where there is one.
        note: What a reader needs to know to understand the row, for example a spread.

    A value that is infinite or not a number is kept as None in the ledger.
    """

    metric: str
    unit: str
    baseline: float | None
    ours: float | None
    off: float | None
    ceiling: float | None = None
    control: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Claim:
    """What a paper says, and what came out here.

    Attributes:
        slug: The system.
        statement: What is claimed, in one sentence, as it was tested here.
        paper_figure: The paper's own figure with its place, for example ``"2.0x (Table 3)"``.
        rows: What was measured.
        scale: Size it was measured at.
        device: ``"cpu"`` or ``"cuda"``.
        status: What became of it; see :func:`judge`.
        reason: Why it is not testable here, or why it came out differently.
        notes: Anything else a reader should know, one sentence each.
        gates: The conditions that decided.
        seeds: Seeds of all draws.

    Raises:
        InvalidInputError: The status contradicts the gates, or a reason is missing.
    """

    slug: str
    statement: str
    paper_figure: str
    rows: tuple[Row, ...]
    scale: Scale
    device: str
    status: Status
    reason: str = ""
    notes: tuple[str, ...] = ()
    gates: tuple[Gate, ...] = ()
    seeds: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.scale not in get_args(Scale):
            raise InvalidInputError(
                f"claim {self.slug!r}: scale must be one of {', '.join(get_args(Scale))}, "
                f"not {self.scale!r}"
            )
        if self.status not in list(Status):
            raise InvalidInputError(
                f"claim {self.slug!r}: status must be one of {', '.join(Status)}, "
                f"not {self.status!r}"
            )
        missed = [gate.name for gate in self.gates if not gate.passed]
        if self.status == Status.REPRODUCED and missed:
            raise InvalidInputError(
                f"claim {self.slug!r} calls itself reproduced but misses: {', '.join(missed)}"
            )
        if self.status == Status.REPRODUCED and not self.gates:
            raise InvalidInputError(
                f"claim {self.slug!r} calls itself reproduced but shows no gate that passed"
            )
        if self.status == Status.NOT_TESTABLE_HERE and not self.reason:
            raise InvalidInputError(f"claim {self.slug!r} is not testable here: give the reason")


@dataclass(frozen=True)
class Provenance:
    """Where, when and with what a claim was measured.

    Attributes:
        cpu: Model of the processor.
        cores: Cores that this process may use.
        gpu: Model of the accelerator, or ``""``.
        python: Version of Python.
        torch: Version of torch.
        transformers: Version of transformers.
        isthmus: Version of isthmus.
        seeds: Seeds of all draws.
        date: Day of the measurement (UTC), as ``2026-01-31``.
        seconds: Duration of the whole measurement in seconds.
    """

    cpu: str
    cores: int
    gpu: str
    python: str
    torch: str
    transformers: str
    isthmus: str
    seeds: tuple[int, ...]
    date: str
    seconds: float

    @classmethod
    def gather(cls, *, seeds: Sequence[int] = (), seconds: float = 0.0) -> "Provenance":
        """Look at this machine and the installed packages; imports none of them.

        Args:
            seeds: Seeds that the measurement used.
            seconds: How long it took, in seconds.

        Returns:
            The provenance of a measurement that ended just now.
        """
        return cls(
            cpu=_cpu_model(),
            cores=_cores(),
            gpu=_gpu_model(),
            python=platform.python_version(),
            torch=_installed("torch"),
            transformers=_installed("transformers"),
            isthmus=__version__,
            seeds=tuple(seeds),
            date=datetime.datetime.now(datetime.UTC).date().isoformat(),
            seconds=round(seconds, 1),
        )


@dataclass(frozen=True)
class Entry:
    """One line of the ledger: a claim and its provenance."""

    claim: Claim
    provenance: Provenance

    def to_json(self) -> dict[str, Any]:
        """The entry as plain JSON values, without the slug that it is filed under."""
        values: dict[str, Any] = _plain(self.claim)
        del values["slug"], values["seeds"]
        for gate, shown in zip(self.claim.gates, values["gates"], strict=True):
            shown["passed"] = gate.passed
        values["provenance"] = _plain(self.provenance)
        return values

    @classmethod
    def from_json(cls, slug: str, values: object) -> "Entry":
        """Read an entry back.

        Args:
            slug: The name it is filed under.
            values: What :meth:`to_json` gave.

        Returns:
            The entry.

        Raises:
            InvalidInputError: Something is missing, unknown, of the wrong kind or contradictory.
        """
        table = dict(_table(values, "entry"))
        provenance = _read(Provenance, table.pop("provenance", None), "provenance")
        gates = []
        for index, raw in enumerate(_list(table.pop("gates", None), "gates")):
            gate = dict(_table(raw, f"gates[{index}]"))
            gate.pop("passed", None)
            gates.append(_read(Gate, gate, f"gates[{index}]"))
        rows = [
            _read(Row, raw, f"rows[{index}]")
            for index, raw in enumerate(_list(table.pop("rows", None), "rows"))
        ]
        status = table.get("status")
        if status not in list(Status):
            raise InvalidInputError(f"status is {status!r}")
        table |= {
            "slug": slug,
            "status": Status(cast(str, status)),
            "rows": tuple(rows),
            "gates": tuple(gates),
            "seeds": provenance.seeds,
        }
        return cls(_read(Claim, table, "entry"), provenance)


class Ledger:
    """The file that holds the last measured claim of every system.

    A rendering that lies beside it (same name, ``.md``) is kept in step with every record.

    Args:
        path: The JSON file; it need not exist yet.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def read(self) -> dict[str, Entry]:
        """Read and check the whole file.

        Returns:
            Entries by slug, sorted; empty where there is no file yet.

        Raises:
            BrokenFileError: The file cannot be read, is cut off, or is no ledger.
        """
        try:
            if self.path.stat().st_size > _MAX_BYTES:
                raise BrokenFileError(
                    f"{self.path} is larger than {_MAX_BYTES >> 20} MiB; that is no ledger"
                )
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return {}
        except (OSError, UnicodeDecodeError) as error:
            raise BrokenFileError(f"{self.path} cannot be read as a ledger: {error}") from error
        try:
            values = json.loads(text, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise BrokenFileError(
                f"{self.path} is cut off or is not JSON ({error}); restore it or give another path"
            ) from error
        if not isinstance(values, dict) or not {"schema", "claims"} <= values.keys():
            raise BrokenFileError(
                f"{self.path} is no isthmus ledger (no 'schema' and 'claims'); give another path"
            )
        if values["schema"] != _SCHEMA or not isinstance(values["claims"], dict):
            raise BrokenFileError(
                f"{self.path} has ledger schema {values['schema']!r}; this isthmus reads "
                f"{_SCHEMA}; update isthmus or give another path"
            )
        entries = {}
        for slug in sorted(values["claims"]):
            try:
                entries[slug] = Entry.from_json(slug, values["claims"][slug])
            except InvalidInputError as error:
                raise BrokenFileError(
                    f"{self.path}: the claim of {slug!r} is damaged ({error}); restore the file "
                    "or give another path"
                ) from error
        return entries

    def check_writable(self) -> None:
        """Make sure, before a long measurement begins, that its result can be kept.

        Raises:
            BrokenFileError: The file is damaged, or it or its folder cannot be written.
        """
        self.read()
        try:
            if self.path.is_dir():
                raise IsADirectoryError("it is a folder")
            if self.path.exists() and not os.access(self.path, os.W_OK):
                raise PermissionError("the file is write-protected")
            probe = folders.temporary(self.path)
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise BrokenFileError(
                f"ledger {self.path} cannot be written: {error.strerror or error}; give another "
                "path with --ledger"
            ) from error

    def record(self, claim: Claim, provenance: Provenance | None = None) -> Entry:
        """Keep a claim in place of the system's earlier one.

        The new file is written under a temporary name and then renamed, so an interruption leaves
        the old one whole.

        Args:
            claim: What was measured.
            provenance: Where and when; gathered now if None.

        Returns:
            The new entry.

        Raises:
            BrokenFileError: The present file is damaged (it is left as it is), or the new one
                cannot be written.
        """
        measured = Entry(claim, provenance or Provenance.gather(seeds=claim.seeds))
        # Through JSON and back: what is written has been read once, and the rendering made from it
        # is the one that a later reader of the file gets.
        entry = Entry.from_json(claim.slug, json.loads(json.dumps(measured.to_json())))
        entries = self.read() | {claim.slug: entry}
        folders.replace_text(self.path, dump(entries))
        beside = self.path.with_suffix(".md")
        if beside.exists() and beside != self.path:
            folders.replace_text(beside, render(entries))
        return entry

    def render(self) -> str:
        """The ledger as a Markdown page.

        Returns:
            A table of all systems, then a section for each.

        Raises:
            BrokenFileError: The file cannot be read as a ledger.
        """
        return render(self.read())


def shipped_ledger() -> Ledger:
    """The ledger that came with this isthmus.

    Returns:
        That of the checkout if isthmus runs from one, else the copy inside the installed package.
    """
    package = Path(__file__).parent
    checkout = package.parents[1] / "docs" / "ledger.json"
    if package.parent.name == "src" and checkout.exists():
        return Ledger(checkout)
    return Ledger(package / "ledger.json")


def dump(entries: Mapping[str, Entry]) -> str:
    """The text of a ledger file.

    Args:
        entries: Entries by slug.

    Returns:
        JSON with a stable order, one trailing newline.
    """
    claims = {slug: entries[slug].to_json() for slug in sorted(entries)}
    values = {"schema": _SCHEMA, "claims": claims}
    return json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def render(entries: Mapping[str, Entry]) -> str:
    """Write entries as a Markdown page.

    Args:
        entries: Entries by slug.

    Returns:
        A table of all systems, then a section for each.
    """
    lines = [
        "# Ledger",
        "",
        "The last measured claim of every system: what the paper reports, what came out here, and "
        "on which machine. This page is written by `isthmus claim`; do not edit it.",
        "",
    ]
    if not entries:
        return "\n".join([*lines, "No claim has been measured yet.", ""])
    counts = Counter(entry.claim.status for entry in entries.values())
    lines += [", ".join(f"{counts[s]} {s.value}" for s in Status if counts[s]) + ".", ""]
    lines += ["| System | Status | Scale | Device | Measured |", "|---|---|---|---|---|"]
    for slug in sorted(entries):
        claim, provenance = entries[slug].claim, entries[slug].provenance
        lines.append(
            f"| {slug} | {claim.status.value} | {claim.scale} | {claim.device} "
            f"| {provenance.date} |"
        )
    for slug in sorted(entries):
        lines += ["", f"## {slug}", "", render_entry(entries[slug]).rstrip("\n")]
    return "\n".join(lines) + "\n"


def render_entry(entry: Entry) -> str:
    """Write one entry as Markdown, without a heading.

    Args:
        entry: A claim with its provenance.

    Returns:
        The statement, the paper's figure, the measured rows, the gates and the machine.
    """
    claim, provenance = entry.claim, entry.provenance
    lines = [claim.statement, "", f"- Paper: {claim.paper_figure}"]
    reason = f". {claim.reason}" if claim.reason else ""
    lines.append(f"- Here: **{claim.status.value}**{reason}")
    if claim.rows:
        # Ceiling and control are rare; a column that no row fills is left out.
        columns = [
            name
            for name in ("baseline", "ours", "off", "ceiling", "control")
            if name in ("baseline", "ours", "off")
            or any(getattr(row, name) is not None for row in claim.rows)
        ]
        head = ["metric", "unit", *columns, "note"]
        lines += ["", f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
        for row in claim.rows:
            cells = [row.metric, row.unit, *(number(getattr(row, c)) for c in columns), row.note]
            lines.append(f"| {' | '.join(_cell(cell) for cell in cells)} |")
    if claim.gates:
        lines += ["", "| gate | measured | demanded | |", "|---|---|---|---|"]
        for gate in claim.gates:
            lines.append(
                f"| {_cell(gate.name)} | {number(gate.value)} | {gate.op} {number(gate.bound)} "
                f"| {'passed' if gate.passed else 'missed'} |"
            )
    if claim.notes:
        lines += ["", *(f"- {note}" for note in claim.notes)]
    where = provenance.cpu + (f" with {provenance.gpu}" if provenance.gpu else "")
    seeds = f", seeds {', '.join(map(str, provenance.seeds))}" if provenance.seeds else ""
    lines += [
        "",
        f"Measured {provenance.date} at scale {claim.scale} on {claim.device} ({where}, "
        f"{provenance.cores} cores) in {provenance.seconds:.0f} s; isthmus {provenance.isthmus}, "
        f"torch {provenance.torch}, transformers {provenance.transformers}, "
        f"Python {provenance.python}{seeds}.",
    ]
    return "\n".join(lines) + "\n"


def number(value: float | None) -> str:
    """Show a measured value with four significant digits.

    Args:
        value: The value; None stands for one that was not measured.

    Returns:
        The digits, or a dash.

    >>> number(1234567.0), number(0.0123456), number(3), number(None)
    ('1,234,567', '0.01235', '3', '-')
    """
    if value is None:
        return "-"
    if math.isfinite(value) and (value == int(value) or abs(value) >= 1000):
        return f"{value:,.0f}"
    return f"{value:.4g}"


@dataclass(frozen=True)
class Ratio:
    """How two timings compare: the median of the paired ratios and their spread.

    Attributes:
        median: Median over the repeats.
        low: Smallest ratio of any repeat.
        high: Largest ratio of any repeat.
    """

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f}x [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class Timing:
    """Durations of one contestant, in the order of the repeats.

    Attributes:
        samples_s: Duration of each repeat in seconds.
    """

    samples_s: tuple[float, ...]

    @property
    def median_s(self) -> float:
        """Median duration in seconds."""
        return statistics.median(self.samples_s)

    @property
    def min_s(self) -> float:
        """Shortest duration in seconds."""
        return min(self.samples_s)

    @property
    def max_s(self) -> float:
        """Longest duration in seconds."""
        return max(self.samples_s)


def ratio(numerator: Timing, denominator: Timing) -> Ratio:
    """Compare two contestants of one run, repeat by repeat.

    ``ratio(baseline, ours)`` is the speed-up of ours.

    Args:
        numerator: Timing whose durations are divided.
        denominator: Timing from the same call of :meth:`Ruler.compare`.

    Returns:
        Median and range of the ratios of the durations that belong to one repeat.

    Raises:
        InvalidInputError: The timings have different numbers of repeats, or the clock was too
            coarse to see the denominator.

    >>> str(ratio(Timing((2.0, 3.0, 4.0)), Timing((1.0, 1.0, 2.0))))
    '2.00x [2.00, 3.00]'
    """
    if len(numerator.samples_s) != len(denominator.samples_s):
        raise InvalidInputError(
            f"timings of {len(numerator.samples_s)} and {len(denominator.samples_s)} repeats are "
            "not from one run"
        )
    if min(denominator.samples_s) <= 0:
        raise InvalidInputError("a repeat took no measurable time; do more work in each repeat")
    pairs = zip(numerator.samples_s, denominator.samples_s, strict=True)
    ratios = [top / bottom for top, bottom in pairs]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))


@dataclass
class Ruler:
    """Times several contestants fairly: interleaved, warmed up, garbage collection off.

    In each repeat every contestant runs once, and the order rotates from repeat to repeat, so that
    neither a slow spell of the machine nor the place in the order favours one of them. Work queued
    on a CUDA device is waited for before the clock is read.

    Attributes:
        clock: Gives the time in seconds; replaced in tests.
        progress: Called before each run with the contestant's name, the number of finished runs
            and the number of all runs; None keeps quiet.
    """

    clock: Callable[[], float] = time.perf_counter
    progress: Callable[[str, int, int], None] | None = field(default=None)

    def compare(
        self,
        contestants: Mapping[str, Callable[[], object]],
        repeats: int = 5,
        warmup: int = 1,
    ) -> dict[str, Timing]:
        """Time functions against each other.

        Args:
            contestants: Functions without arguments by name; what they return is dropped.
            repeats: Timed runs of each.
            warmup: Runs of each that come first and are not timed.

        Returns:
            A timing for each name, in the order given. Samples of the same index belong to the
            same repeat: compare them with :func:`ratio`.

        Raises:
            InvalidInputError: There is nothing to time.
        """
        if not contestants or repeats < 1 or warmup < 0:
            raise InvalidInputError(
                f"the ruler needs a contestant, repeats >= 1 and warmup >= 0, not "
                f"{len(contestants)} contestants, repeats {repeats} and warmup {warmup}"
            )
        names = list(contestants)
        samples: dict[str, list[float]] = {name: [] for name in names}
        done, total = 0, (warmup + repeats) * len(names)
        collecting = gc.isenabled()
        try:
            for repeat in range(-warmup, repeats):
                # Collected between the repeats instead of at some random point inside one.
                gc.enable()
                gc.collect()
                gc.disable()
                first = repeat % len(names)
                for name in names[first:] + names[:first]:
                    if self.progress is not None:
                        self.progress(name, done, total)
                    duration_s = self._time(contestants[name])
                    if repeat >= 0:
                        samples[name].append(duration_s)
                    done += 1
        finally:
            if collecting:
                gc.enable()
            else:
                gc.disable()
        return {name: Timing(tuple(samples[name])) for name in names}

    def _time(self, run: Callable[[], object]) -> float:
        _wait_for_device()
        start = self.clock()
        run()
        _wait_for_device()
        return self.clock() - start


def _cuda() -> Any:
    """The CUDA module of torch if this process already uses it, else None."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return torch.cuda
    return None


def _wait_for_device() -> None:
    cuda = _cuda()
    if cuda is not None:
        cuda.synchronize()


def _gpu_model() -> str:
    cuda = _cuda()
    return "" if cuda is None else str(cuda.get_device_name())


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        for line in text.splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _plain(value: Any) -> Any:
    """Dataclasses, sequences, enums, and numbers of NumPy or torch as JSON values."""
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str):
        return None if value is None else str(value)
    try:
        return operator.index(value)
    except TypeError:
        value = float(value)
        return value if math.isfinite(value) else None


def _table(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidInputError(f"{where} is no table")
    return cast(dict[str, Any], value)


def _list(value: object, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise InvalidInputError(f"{where} is no list")
    return value


def _read(kind: type[_T], value: object, where: str) -> _T:
    """Build a flat dataclass from a table, each field checked against its annotation."""
    table = _table(value, where)
    fields = {f.name: f for f in dataclasses.fields(cast(Any, kind))}
    for name in table.keys() - fields.keys():
        raise InvalidInputError(f"{where} has an unknown field {name!r}")
    checked: dict[str, Any] = {}
    for name, spec in fields.items():
        if name not in table:
            if spec.default is dataclasses.MISSING:
                raise InvalidInputError(f"{where} lacks {name!r}")
            continue
        item = table[name]
        if not _fits(item, spec.type):
            raise InvalidInputError(f"{where}.{name} is {item!r:.60}")
        checked[name] = tuple(item) if isinstance(item, list) else item
    return kind(**checked)


def _fits(value: object, annotation: object) -> bool:
    """Whether a JSON value may stand in a field of this annotation."""
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    if annotation is float:
        return numeric
    if annotation == float | None:
        return numeric or value is None
    if annotation is int:
        return numeric and isinstance(value, int)
    if annotation == tuple[int, ...] or annotation == tuple[str, ...]:
        item = int if annotation == tuple[int, ...] else str
        return isinstance(value, list | tuple) and all(isinstance(v, item) for v in value)
    if annotation in (tuple[Row, ...], tuple[Gate, ...]):
        return isinstance(value, tuple)
    return isinstance(value, str)


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
