"""Tuning after a cut: the loss falls, what was removed stays removed, a killed run goes on."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import isthmus
from isthmus.cli.main import main
from isthmus.errors import BrokenFileError, InvalidInputError
from isthmus.surgery import export, tuning
from isthmus.surgery.base import Change, Cost, Report
from isthmus.surgery.calibration import Calibration
from isthmus.systems.surgery.optimal_brain_compression import OptimalBrainCompression as Surgeon
from making import untaught_coder

FEW = ["--samples", "32", "--length", "32", "--repeats", "0", "--tune", "30", "--rate", "0.01"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of code that has learnt nothing, and texts."""
    folder = tmp_path_factory.mktemp("tuned")
    untaught_coder(folder / "model")
    (folder / "texts").mkdir()
    for i in range(24):
        lines = [f"value_{i}_{j} = call_{(i * j) % 11}({i + j}, '{j * 7 % 13}')" for j in range(24)]
        (folder / "texts" / f"{i}.txt").write_text("\n".join(lines))
    return folder


def words(place: Path, out: Path, method: str, *settings: str) -> list[str]:
    named = [word for each in settings for word in ("--set", each)]
    data = ["--budget", "0.5", "--data", str(place / "texts"), "-o", str(out), "--method", method]
    return ["shrink", str(place / "model"), *data, *FEW, *named]


def test_zeros_stay_and_the_loss_falls(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {p.name: p.read_bytes() for p in (place / "model").iterdir()}
    asked = words(place, tmp_path / "o", "optimal-brain-compression", "pattern=2:4", "fast=true")
    assert main([*asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["after"]["loss"] < found["cut"]["loss"] - 0.5 and found["tuned"] == 30
    assert {p.name: p.read_bytes() for p in (place / "model").iterdir()} == before
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "o")
    whole = AutoModelForCausalLM.from_pretrained(place / "model")
    for name, weight in model.named_parameters():
        if "_proj" in name:
            assert ((weight.view(-1, 4) == 0).sum(1) >= 2).all(), f"{name} is 2:4 no more"
            assert float((weight == 0).float().mean()) == pytest.approx(0.5, abs=0.01)
        assert not torch.equal(weight, whole.get_parameter(name)), f"{name} did not learn"
    assert json.loads((tmp_path / "o" / "surgery.json").read_text())["tuned"] == 30
    assert main(asked) == 0
    said = capsys.readouterr().out
    assert "... after the cut, before 30 steps" in said


def test_a_killed_tuning_goes_on(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the training, the plan is used again; killed after it, the training is, too."""
    whole = words(place, tmp_path / "whole", "optimal-brain-compression", "fast=true")
    assert main(whole) == 0
    asked = words(place, tmp_path / "o", "optimal-brain-compression", "fast=true")
    loss = Calibration.summed_loss
    calls: list[int] = []

    def killed(self: Calibration, model: torch.nn.Module, batch: int) -> object:
        if model.training:
            calls.append(batch)
            if len(calls) == 5:
                raise KeyboardInterrupt
        return loss(self, model, batch)

    monkeypatch.setattr(Calibration, "summed_loss", killed)
    assert main(asked) == 130 and not (tmp_path / "o").exists()
    monkeypatch.setattr(Surgeon, "plan", _stop)
    monkeypatch.setattr(export, "export", _stop)
    assert main(asked) == 130 and len(calls) == 5 + 30
    monkeypatch.undo()
    monkeypatch.setattr(tuning, "tune_cut", _stop)
    assert main(asked) == 0
    one, other = (AutoModelForCausalLM.from_pretrained(tmp_path / n) for n in ("o", "whole"))
    for name, weight in one.named_parameters():
        assert torch.equal(weight, other.get_parameter(name)), "as if it had not been killed"


def _stop(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("method", ["cmoe", "scap"])
def test_a_shape_of_its_own_keeps_what_it_learnt(
    place: Path, tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = words(place, tmp_path / "o", method, *(["parts=4"] if method == "cmoe" else []))
    assert main([*asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["after"]["loss"] < found["cut"]["loss"] - 0.5
    model = isthmus.load(tmp_path / "o").target.model
    if method == "cmoe":
        assert type(model.model.layers[0].mlp).__name__ == "MoE"
    with (tmp_path / "o" / "tuned.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(BrokenFileError, match="altered"):
        isthmus.load(tmp_path / "o")


def test_what_cannot_be_tuned_is_refused(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for settings, more, says in (
        (["kind=quantize"], [], "off their grid"),
        (["pattern=2:4", "bits=4"], [], "off their grid"),
        ([], ["--tune", "-1"], "tune takes steps"),
        ([], ["--rate", "0"], "rate is above 0"),
    ):
        asked = words(place, tmp_path / "o", "optimal-brain-compression", *settings)
        for name, value in zip(more[::2], more[1::2], strict=True):
            asked[asked.index(name) + 1] = value
        assert main(asked) == 2
        assert says in capsys.readouterr().err
    data = Calibration(({"input_ids": torch.arange(4)[None]},))
    model = torch.nn.Linear(2, 2)
    with pytest.raises(InvalidInputError, match="no labels"):
        tuning.tune_cut(model, Report("x", ()), data, 1)
    with pytest.raises(InvalidInputError, match="1 step or more"):
        tuning.tune_cut(model, Report("x", ()), data, 0)
    change = Change("a", Cost(1, 1, 1, 16.0), Cost(1, 1, 1, 4.0))
    with pytest.raises(InvalidInputError, match="off it"):
        tuning.tune_cut(model, Report("x", (change,)), data, 1)
