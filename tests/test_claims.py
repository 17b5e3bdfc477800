"""Gates decide, the ledger loses nothing, and the ruler is fair."""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from isthmus import __version__
from isthmus.claims import (
    Claim,
    Entry,
    Gate,
    Ledger,
    Provenance,
    Row,
    Ruler,
    Status,
    Timing,
    judge,
    ratio,
    shipped_ledger,
)
from isthmus.errors import BrokenFileError, InvalidInputError

PASSES = Gate("speed-up", 2.0, ">=", 1.5)
FAILS = Gate("speed-up", 1.2, ">=", 1.5)


def a_claim(slug: str = "made-up", **changes: object) -> Claim:
    claim = Claim(
        slug=slug,
        statement="Twice as fast.",
        paper_figure="2.0x (Table 3)",
        rows=(Row("speed-up", "x", 1.0, 2.0, 1.0, note="median | of 5"),),
        scale="small",
        device="cpu",
        status=Status.REPRODUCED,
        notes=("A note.",),
        gates=(PASSES,),
        seeds=(0, 1),
    )
    return replace(claim, **changes)  # type: ignore[arg-type]


# Gates and statuses


@pytest.mark.parametrize(
    ("value", "op", "bound", "passed"),
    [
        (1.0, ">=", 1.0, True),
        (1.0, ">", 1.0, False),
        (1.0, "<=", 1.0, True),
        (1.0, "<", 1.0, False),
        (1.0, "==", 1.0, True),
        (float("nan"), "<", 1.0, False),
        (float("nan"), ">=", 1.0, False),
        (float("inf"), ">=", 1.0, False),
        (None, ">=", 0.0, False),
    ],
)
def test_gate(value: float | None, op: str, bound: float, passed: bool) -> None:
    assert Gate("g", value, op, bound).passed is passed  # type: ignore[arg-type]


def test_gate_refuses_what_it_cannot_judge() -> None:
    with pytest.raises(InvalidInputError, match="op must be one of"):
        Gate("g", 1.0, "!=", 1.0)  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="finite"):
        Gate("g", 1.0, ">=", float("nan"))


def test_judge() -> None:
    assert judge([PASSES, PASSES]) is Status.REPRODUCED
    assert judge([PASSES, FAILS]) is Status.NOT_REPRODUCED
    assert judge([FAILS], [PASSES]) is Status.DIRECTION_ONLY
    assert judge([FAILS], [PASSES, FAILS]) is Status.NOT_REPRODUCED
    with pytest.raises(InvalidInputError, match="without gates"):
        judge([])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gates": (PASSES, FAILS)}, "calls itself reproduced but misses: speed-up"),
        ({"gates": ()}, "shows no gate"),
        ({"status": Status.NOT_TESTABLE_HERE}, "give the reason"),
        ({"status": "fine"}, "status must be one of"),
        ({"scale": "huge"}, "scale must be one of"),
    ],
)
def test_contradictory_claims_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        a_claim(**changes)


# Ledger


def test_record_and_read_back(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.json")
    assert ledger.read() == {}
    ledger.check_writable()
    assert list(tmp_path.iterdir()) == []
    ledger.record(a_claim("b"))
    entry = ledger.record(a_claim("a"), Provenance.gather(seeds=(0, 1), seconds=12.34))
    again = ledger.read()
    assert list(again) == ["a", "b"]
    assert again["a"] == entry
    assert entry.claim == a_claim("a")
    assert entry.provenance.seconds == 12.3
    assert entry.provenance.isthmus == __version__
    assert entry.provenance.cpu
    assert list(tmp_path.iterdir()) == [ledger.path]
    values = json.loads(ledger.path.read_text())
    assert values["schema"] == 1
    assert values["claims"]["a"]["gates"][0]["passed"] is True


def test_record_replaces_the_earlier_claim_only(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.json")
    ledger.record(a_claim("a"))
    ledger.record(a_claim("b"))
    ledger.record(a_claim("a", status=Status.NOT_REPRODUCED, gates=(FAILS,)))
    assert [e.claim.status.value for e in ledger.read().values()] == [
        "not-reproduced",
        "reproduced",
    ]


def test_numbers_of_numpy_and_values_that_are_none(tmp_path: Path) -> None:
    import numpy as np

    row = Row("loss", "nats", float("inf"), float(np.float64(1.5)), float("nan"))
    gate = Gate("loss", np.float32(1.5), "<", 2.0)  # type: ignore[arg-type]
    claim = a_claim(rows=(row,), gates=(gate,), seeds=(np.int64(3),))
    kept = Ledger(tmp_path / "l.json").record(claim).claim
    assert kept.rows == (Row("loss", "nats", None, 1.5, None),)
    assert kept.seeds == (3,)


FOREIGN = {
    "cut off": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "not JSON": lambda text: "hello",
    "a list": lambda text: "[]",
    "no ledger": lambda text: "{}",
    "newer schema": lambda text: text.replace('"schema": 1', '"schema": 2'),
    "claims is a list": lambda text: '{"schema": 1, "claims": []}',
    "no table": lambda text: '{"schema": 1, "claims": {"a": 3}}',
    "missing field": lambda text: text.replace('"statement"', '"sentence"'),
    "wrong kind": lambda text: text.replace('"seconds": 0.0', '"seconds": "long"'),
    "unknown status": lambda text: text.replace('"status": "reproduced"', '"status": "good"'),
    "contradiction": lambda text: text.replace('"bound": 1.5', '"bound": 9.0'),
    "no number": lambda text: text.replace('"bound": 1.5', '"bound": NaN'),
    "bool for number": lambda text: text.replace('"baseline": 1.0', '"baseline": true'),
    "very deep": lambda text: "[" * 100_000,
    "not UTF-8": lambda text: "\udcff",
}


@pytest.mark.parametrize("damage", FOREIGN)
def test_a_broken_ledger_is_named_and_never_overwritten(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "ledger.json"
    Ledger(path).record(a_claim())
    text = FOREIGN[damage](path.read_text())
    path.write_text(text, errors="surrogateescape")
    before = path.read_bytes()
    for attempt in (
        Ledger(path).read,
        Ledger(path).check_writable,
        lambda: Ledger(path).record(a_claim("b")),
    ):
        with pytest.raises(BrokenFileError) as caught:
            attempt()
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400 + len(str(path))
    assert path.read_bytes() == before


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "ledger.json"
    with path.open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(BrokenFileError, match="larger than 32 MiB"):
        Ledger(path).read()


def test_unwritable_paths_are_found_before_the_measurement(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "no" / "ledger.json", tmp_path / "file" / "ledger.json", tmp_path):
        with pytest.raises(BrokenFileError):
            Ledger(path).check_writable()
        with pytest.raises(BrokenFileError):
            Ledger(path).record(a_claim())


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write all")
def test_write_protection_is_respected(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.json")
    ledger.record(a_claim())
    ledger.path.chmod(0o444)
    with pytest.raises(BrokenFileError, match="write-protected"):
        ledger.check_writable()


def test_an_interrupted_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = Ledger(tmp_path / "ledger.json")
    ledger.record(a_claim("a"))
    before = ledger.path.read_bytes()

    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ledger.record(a_claim("b"))
    assert ledger.path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [ledger.path]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    real = tmp_path / "real.json"
    link = tmp_path / "ledger.json"
    link.symlink_to(real)
    Ledger(link).record(a_claim())
    assert link.is_symlink()
    assert list(Ledger(real).read()) == ["made-up"]


def test_the_rendering_beside_is_kept_in_step(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.json")
    ledger.record(a_claim("a"))
    page = tmp_path / "ledger.md"
    assert not page.exists()
    page.write_text("old")
    ledger.record(a_claim("b"))
    assert page.read_text() == ledger.render()
    assert "2 reproduced." in ledger.render()
    assert "| speed-up | x | 1 | 2 | 1 | median \\| of 5 |" in ledger.render()
    assert "| speed-up | 2 | >= 1.5 | passed |" in ledger.render()


def test_shipped_ledger_and_its_page_agree() -> None:
    ledger = shipped_ledger()
    ledger.read()
    page = Path(__file__).parents[1] / "docs" / "ledger.md"
    if page.exists():
        beside = Ledger(page.with_suffix(".json"))
        assert page.read_text(encoding="utf-8") == beside.render(), (
            "docs/ledger.md is not what docs/ledger.json renders to"
        )


def test_entry_survives_json() -> None:
    claim = a_claim(status=Status.NOT_TESTABLE_HERE, reason="needs 8 GPUs", rows=(), gates=())
    entry = Entry(claim, Provenance.gather(seeds=claim.seeds))
    assert Entry.from_json(claim.slug, json.loads(json.dumps(entry.to_json()))) == entry


# Ruler


class FakeClock:
    """Advances only by the work that the contestants do."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def work(self, durations: Iterator[float]) -> Callable[[], None]:
        def run() -> None:
            assert not gc.isenabled()
            self.now += next(durations)

        return run


def test_ruler_against_values_computed_by_hand() -> None:
    clock = FakeClock()
    baseline = clock.work(iter([9.0, 2.0, 4.0, 6.0]))
    ours = clock.work(iter([9.0, 1.0, 1.0, 2.0]))
    timings = Ruler(clock=clock).compare({"baseline": baseline, "ours": ours}, repeats=3)
    assert list(timings) == ["baseline", "ours"]
    assert timings["baseline"] == Timing((2.0, 4.0, 6.0))
    assert timings["ours"].samples_s == (1.0, 1.0, 2.0)
    assert timings["baseline"].median_s == 4.0
    assert timings["baseline"].min_s == 2.0
    assert timings["baseline"].max_s == 6.0
    # Pairs: 2/1, 4/1, 6/2. The ratio of the medians would be 4.
    speedup = ratio(timings["baseline"], timings["ours"])
    assert (speedup.median, speedup.low, speedup.high) == (3.0, 2.0, 4.0)
    assert str(speedup) == "3.00x [2.00, 4.00]"


def test_ruler_interleaves_and_rotates() -> None:
    order = []
    steps = []
    ruler = Ruler(progress=lambda name, done, total: steps.append((name, done, total)))
    names = ["a", "b", "c"]
    ruler.compare({name: lambda n=name: order.append(n) for name in names}, repeats=4, warmup=0)
    assert "".join(order) == "abcbcacababc"
    assert steps == [(name, done, 12) for done, name in enumerate(order)]


def test_ruler_hides_a_slowing_machine() -> None:
    class Tiring(FakeClock):
        def spend(self, seconds: float) -> Callable[[], None]:
            def run() -> None:
                self.now += seconds * (1 + 0.01 * (self.now - 100.0))

            return run

    clock = Tiring()
    timings = Ruler(clock).compare({"two": clock.spend(2.0), "one": clock.spend(1.0)}, repeats=20)
    assert ratio(timings["two"], timings["one"]).median == pytest.approx(2.0, rel=0.02)


@pytest.mark.parametrize("enabled", [True, False])
def test_ruler_leaves_garbage_collection_as_it_was(enabled: bool) -> None:
    was = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()

        def fails() -> None:
            raise RuntimeError("stop")

        with pytest.raises(RuntimeError):
            Ruler().compare({"x": fails})
        assert gc.isenabled() is enabled
        Ruler().compare({"x": lambda: None}, repeats=1)
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if was else gc.disable)()


def test_ruler_and_ratio_refuse_nonsense() -> None:
    for contestants, repeats, warmup in (({}, 5, 1), ({"a": list}, 0, 1), ({"a": list}, 1, -1)):
        with pytest.raises(InvalidInputError, match="the ruler needs"):
            Ruler().compare(contestants, repeats=repeats, warmup=warmup)
    with pytest.raises(InvalidInputError, match="not from one run"):
        ratio(Timing((1.0,)), Timing((1.0, 2.0)))
    with pytest.raises(InvalidInputError, match="no measurable time"):
        ratio(Timing((1.0,)), Timing((0.0,)))


def test_import_is_light() -> None:
    code = "import sys, isthmus.claims; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "numpy"} & set(run.stdout.split())
