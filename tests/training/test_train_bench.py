"""The training loop beside the Trainer of transformers."""

import importlib.util
import json

import pytest

from isthmus.claims import Ruler
from isthmus.cli.main import main
from isthmus.errors import InvalidInputError, MissingExtraError
from isthmus.systems.text.marian import Marian
from isthmus.training.data import Data, Pair
from isthmus.workbench import train_bench as bench

PAIRS = [Pair("ab " * (1 + n % 20), "cd " * (1 + n % 19)) for n in range(200)]
DATA = Data(PAIRS[:180], PAIRS[180:], "pairs")
THERE = importlib.util.find_spec("accelerate") is not None


@pytest.mark.skipif(not THERE, reason="accelerate is not installed")
def test_both_see_the_same_tokens_in_batches_of_the_same_size() -> None:
    told = Marian.scales["test"]
    lines = bench.train_bench(
        Marian, DATA, told.settings, told.plan, batches=6, repeats=1, ruler=Ruler()
    )
    ours, theirs, grouped = lines
    assert [line.name for line in lines] == [bench.OURS, bench.THEIRS, bench.GROUPED]
    assert ours.rows == pytest.approx(theirs.rows, rel=0.25) and ours.steps == 6
    assert ours.inputs + ours.outputs < theirs.inputs + theirs.outputs
    assert all(line.tokens_per_s > 0 for line in lines) and theirs.speedup.median == 1
    assert grouped.to_dict()["speedup"]["median"] > 0


def test_another_twin_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Marian.scales["test"]
    monkeypatch.setattr(bench, "check_peer", lambda: None)
    monkeypatch.setattr(bench, "shifted", lambda target, pad: target)
    with pytest.raises(bench.MismatchError, match="twin"):
        bench.train_bench(Marian, DATA, told.settings, told.plan, batches=2, repeats=1)


def test_what_is_missing_or_wrong_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = Marian.scales["test"]
    with pytest.raises(InvalidInputError, match="at least 1"):
        bench.train_bench(Marian, DATA, told.settings, told.plan, batches=0)
    if THERE:
        assert main(["bench", "train", "denoiser", "--json"]) == 2
        assert "no twin in transformers" in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="pip install accelerate"):
        bench.check_peer()


@pytest.mark.skipif(not THERE, reason="accelerate is not installed")
def test_the_command_gives_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", "train", "marian", "--scale", "test", "--batches", "2", "--repeats", "1"]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["system"] == "marian" and len(found["lines"]) == 3
