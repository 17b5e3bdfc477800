"""``isthmus bench roofline``: floors beside measured forwards, and the picture."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from test_roofline import ROOF

from isthmus.cli.main import main
from isthmus.decoding.cost import Cost
from isthmus.errors import BrokenFileError, InvalidInputError, MissingExtraError
from isthmus.laws import forwards as module
from isthmus.laws import roofline
from isthmus.laws.forwards import Forward, draw, forwards
from isthmus.laws.opcount import Work

sys.path.insert(0, str(Path(__file__).parent.parent / "decoding"))
import tiny


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Forwards take a millisecond a token; the lengths that were asked for."""
    lengths: list[int] = []

    def measured(target: Any, *, length: int, budget_s: float) -> Cost:
        lengths.append(length)
        return Cost({n: n * 1e-3 for n in (1, 2, 4)})

    monkeypatch.setattr(module, "measure_cost", measured)
    return lengths


def test_forwards_and_what_binds_them(clock: list[int]) -> None:
    found = forwards(tiny.target("Llama", "float32"), ROOF, cached=[8, 16])
    assert clock == [8, 16]
    assert [(f.cached, f.nodes) for f in found] == [(s, n) for s in (8, 16) for n in (1, 2, 4)]
    assert all(f.binds == "overhead" and f.measured_ms == pytest.approx(f.nodes) for f in found)
    assert found[0].efficiency == pytest.approx(found[0].floor_ms)
    near = Forward(1, 8, Work(1, 1), 0.6, 1.0, "memory")
    assert near.binds == "memory" and near.efficiency == 0.6


def test_lengths_that_fit_are_chosen_and_others_refused(clock: list[int]) -> None:
    target = tiny.target("Llama", "float32")
    assert target.max_length == 128
    forwards(target, ROOF)
    assert clock == [62], "what leaves room for the largest tree"
    for bad in ([63], [0], [8, 9000]):
        with pytest.raises(InvalidInputError, match="1 to 62 cached tokens"):
            forwards(target, ROOF, cached=bad)
    forwards(tiny.target("Mamba", "float32"), ROOF)
    assert clock[1:] == [128, 512, 2048]


def test_an_encoder_decoder_reads_its_source(clock: list[int]) -> None:
    (one, *_) = forwards(tiny.target("Bart", "float32"), ROOF, cached=[8])
    assert one.work.bytes > 0 and one.floor_ms > 0


def points() -> list[Forward]:
    return [Forward(n, s, Work(n * 1e6, 1e6), 0.1, 0.2, "memory") for s in (1, 2) for n in (1, 4)]


def test_a_picture_is_drawn_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "pictures" / "roof.png"
    draw(path, ROOF, points(), "float32", title="made up")
    before = path.read_bytes()
    assert before.startswith(b"\x89PNG") and len(before) > 10_000

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(BrokenFileError, match="No space left"):
        draw(path, ROOF, points(), "float32")
    assert [p.name for p in path.parent.iterdir()] == ["roof.png"] and path.read_bytes() == before
    with pytest.raises(InvalidInputError, match=r"roof.txt is no picture; give a name with .png"):
        draw(tmp_path / "roof.txt", ROOF, points(), "float32")


def test_without_matplotlib_the_command_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match="plot"):
        module.check_picture("roof.png")
    assert main(["bench", "roofline", "--figure", "roof.png"]) == 2
    assert "pip install 'isthmus[plot]'" in capsys.readouterr().err


def test_the_command(
    clock: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(roofline, "roof_of", lambda device, fresh: ROOF)
    words = ["bench", "roofline", "--cached", "32", "--dtype", "float32"]
    assert main([*words, "--figure", str(tmp_path / "roof.svg")]) == 0
    shown = capsys.readouterr().out
    assert "10.0 GB/s" in shown and "floor ms" in shown and "55%" in shown
    assert (tmp_path / "roof.svg").stat().st_size > 1000
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["machine"]["ridge"] == 10.0
    assert [row["nodes"] for row in found["forwards"]] == [1, 2, 4]
    assert found["forwards"][0]["floor_ms"] > 0
    assert main([*words[:2], "--cached", "-1"]) == 2
    assert "cached tokens" in capsys.readouterr().err
    assert main([*words, "--figure", "roof.txt"]) == 2
    assert "is no picture" in capsys.readouterr().err
