"""``isthmus bench growth``: one new token as models, caches and batches grow."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from test_roofline import ROOF

from isthmus.cli.main import main
from isthmus.decoding.cost import Cost
from isthmus.errors import InvalidInputError
from isthmus.laws import growth as module
from isthmus.laws import roofline
from isthmus.laws.growth import Point, draw_growth, growth
from isthmus.workbench import pycode

sys.path.insert(0, str(Path(__file__).parent.parent / "decoding"))
import tiny


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """A forward takes a millisecond for each row and each cached token."""
    asked: list[tuple[int, int]] = []

    def measured(target: Any, *, rows: int, length: int, nodes: Any, budget_s: float) -> Cost:
        asked.append((length, rows))
        assert tuple(nodes) == (1,)
        return Cost({1: 1e-3 * (rows + length)})

    monkeypatch.setattr(module, "measure_cost", measured)
    return asked


def test_each_axis_is_walked_alone(clock: list[tuple[int, int]]) -> None:
    targets = {name: tiny.target(name, "float32") for name in ("Llama", "Mamba")}
    found = growth(targets, ROOF, cached=(8, 16, 4096), rows=(1, 2, 4))
    assert clock == [(8, 1), (16, 1), (8, 2), (8, 4), (8, 1), (16, 1), (4096, 1)]
    assert [p.measured_ms for p in found[:4]] == pytest.approx([9, 17, 10, 12])
    assert found[1].floor_ms > found[0].floor_ms and found[3].floor_ms > found[0].floor_ms
    assert len({p.weights for p in found if p.model == "Llama"}) == 1
    with pytest.raises(InvalidInputError, match="room for 1 to 127"):
        growth({"Llama": targets["Llama"]}, ROOF, cached=(4096,))


def test_the_curves_are_drawn(tmp_path: Path) -> None:
    points = [
        Point(name, weights, cached, rows, cached * rows / 100, 0.5)
        for name, weights in (("small", 2**22), ("large", 2**28))
        for cached, rows in ((128, 1), (512, 1), (128, 2), (128, 4))
    ]
    draw_growth(tmp_path / "growth.png", points, title="made up")
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InvalidInputError, match="no picture"):
        draw_growth(tmp_path / "growth.txt", points)


def test_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(roofline, "measure", lambda *args, **kwargs: ROOF)
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path))
    options = ["bench", "growth", "-m", "", "--cached", "8", "--cached", "4", "--rows", "3"]
    assert main([*options, "--json"]) == 0
    points = json.loads(capsys.readouterr().out)["points"]
    assert [(p["cached"], p["rows"]) for p in points] == [(4, 1), (8, 1), (4, 3)]
    assert main([*options, "--figure", str(tmp_path / "growth.png")]) == 0
    assert "embedded model" in capsys.readouterr().out
    assert (tmp_path / "growth.png").exists()
    assert main(["bench", "growth", "--rows", "0"]) == 2


def test_prose_prompts_lie_inside_docstrings() -> None:
    class Words:
        """A token a word, kept by number."""

        def __init__(self) -> None:
            self.words: list[str] = []

        def encode(self, text: str, **options: Any) -> list[int]:
            found = text.split()
            self.words += found
            return list(range(len(self.words) - len(found), len(self.words)))

    words = Words()
    (one, two) = pycode.prompts(2, words, 12, prose=True)
    inside = {" ".join(d.split()) for t in pycode.texts("held-out") for d in pycode.docstrings(t)}
    for ids in (one, two):
        assert len(ids) == 12
        assert any(" ".join(words.words[i] for i in ids) in each for each in inside)
