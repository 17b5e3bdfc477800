"""``isthmus shrink`` as a person meets it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import isthmus
from isthmus import api
from isthmus.cli import shrink
from isthmus.cli.main import main
from isthmus.errors import BrokenFileError
from isthmus.models.hub import load_checkpoint
from isthmus.surgery import export
from isthmus.surgery.base import Change, Cost, Plan, Report, fingerprint
from isthmus.surgery.calibration import Calibration
from isthmus.systems.surgery.optimal_brain_compression import OptimalBrainCompression as Surgeon
from isthmus.workbench import dates
from making import untaught_coder

OBC = ["--method", "optimal-brain-compression", "--set", "fast=true"]
FEW = ["--samples", "8", "--length", "32", "--repeats", "1"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of code that has learnt nothing."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return untaught_coder(folder, "bfloat16")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for i in range(24):
        lines = [f"value_{i}_{j} = call_{(i * j) % 11}({i + j}, '{j * 7 % 13}')" for j in range(24)]
        (folder / f"{i}.txt").write_text("\n".join(lines))
    return folder


def test_the_whole_way(
    model: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {p.name: p.read_bytes() for p in model.iterdir()}
    out = tmp_path / "out"
    words = ["shrink", str(model), *OBC, *FEW, "--budget", "0.5", "--data", str(texts)]
    assert main([*words, "-o", str(out)]) == 0
    said = capsys.readouterr().out
    assert "loss, nats/token" in said and "32 tokens" in said and f"written to {out}" in said
    assert "0.5 of the weights" in said and "held out" in said
    assert {p.name: p.read_bytes() for p in model.iterdir()} == before
    assert not list(tmp_path.glob(".*")), "work is left behind"
    loaded = AutoModelForCausalLM.from_pretrained(out)
    weight = loaded.model.layers[0].mlp.up_proj.weight
    assert weight.dtype == torch.bfloat16 and abs(float((weight == 0).float().mean()) - 0.5) < 0.01
    record = json.loads((out / "surgery.json").read_text())
    assert record["plan"]["budget"] == 0.5 and record["method"] == "optimal-brain-compression"
    assert len(isthmus.load(out).generate("def", max_new_tokens=4, ignore_end=True).tokens) == 4
    # what was shrunk may be replaced, and tells what it is
    assert main([*words, "-o", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["after"]["bytes"] == export.file_bytes(out)
    assert found["report"]["after"]["parameters"] * 2 == found["report"]["before"]["parameters"]


def test_an_interrupted_run_goes_on(
    model: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: object
) -> None:
    """The layers that were done are not done again, and neither is a complete plan."""
    done: list[int] = []
    one_layer = Surgeon.shrink

    def count(self: Surgeon, *arguments: object) -> object:
        done.append(1)
        if len(done) == stop_at:
            raise KeyboardInterrupt
        return one_layer(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Surgeon, "shrink", count)
    words = ["shrink", str(model), *OBC, *FEW[:-1], "0", "--budget", "0.5", "--data", str(texts)]
    words += ["-o", str(tmp_path / "out")]
    stop_at = 6
    assert main(words) == 130 and not (tmp_path / "out").exists()
    stop_at = 0
    monkeypatch.setattr(export, "export", _stop)
    assert main(words) == 130
    assert len(done) == 6 + 14 - 5
    monkeypatch.undo()
    monkeypatch.setattr(Surgeon, "plan", _stop)
    assert main(words) == 0 and (tmp_path / "out" / "surgery.json").exists()


def _stop(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_what_cannot_be_is_one_line(
    model: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.tex").write_text("x")
    one = tmp_path / "one.txt"
    one.write_text((texts / "3.txt").read_text() * 2)
    words = {"--budget": "0.5", "--data": str(texts), "-o": str(tmp_path / "out")}
    for change, says in (
        ({"--budget": "1.5"}, "a budget of 1.5 is impossible"),
        ({"--method": "decoderlens"}, "decoderlens shrinks no model"),
        ({"--method": "optimal-brain"}, "did you mean 'optimal-brain-compression'"),
        ({"-o": str(taken)}, "holds something that is no model that isthmus shrank"),
        ({"-o": str(model)}, "is no model that isthmus shrank"),
        ({"--evaluate": str(texts), "--data": str(texts / "19.txt") + "x"}, "19.txtx"),
        ({"--set": "speed=9"}, "no setting 'speed'"),
        ({"--method": "asymmetric-pruning"}, "no encoder and decoder"),
        ({"--data": "workbench:dates"}, "holds pairs, and texts are read here"),
    ):
        asked = {"--method": OBC[1], "--set": "fast=true"} | words | change
        if asked["--method"] != OBC[1]:
            del asked["--set"]
        flat = [word for pair in asked.items() for word in pair]
        assert main(["shrink", str(model), *FEW, *flat]) == 2, says
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ") and says in error
    # the same text in both parts
    double = tmp_path / "double"
    double.mkdir()
    for i in range(24):
        (double / f"{i}.txt").write_text((texts / "0.txt").read_text())
    words["--data"] = str(double)
    flat = [word for pair in words.items() for word in pair]
    assert main(["shrink", str(model), *OBC, *FEW, *flat]) == 2
    assert "is in both" in capsys.readouterr().err


def test_an_encoder_decoder_loses_layers_and_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = dates.tokenizer()
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=16,
        num_layers=2,
        num_decoder_layers=4,
        num_heads=2,
        d_kv=8,
        d_ff=24,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "whole")
    tokenizer.save_pretrained(tmp_path / "whole")
    rows = [f"{e.source}\t{e.target}" for e in dates.examples(80, "train", seed="shrink")]
    (tmp_path / "dates.tsv").write_text("\n".join(rows))
    words = ["shrink", str(tmp_path / "whole"), "--method", "asymmetric-pruning", *FEW]
    words += ["--budget", "0.25", "--data", str(tmp_path / "dates.tsv"), "-o", str(tmp_path / "o")]
    assert main([*words, "--set", "choice=greedy", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["after"]["bytes"] < found["before"]["bytes"]
    assert found["report"]["changes"][0]["path"] == "decoder.block"
    model = isthmus.load(tmp_path / "o")
    assert model.target.model.config.num_decoder_layers == 1
    assert len(model.generate("1 May 2020", max_new_tokens=5, ignore_end=True).tokens) == 5


def test_a_shape_of_its_own_loads_in_isthmus_only(model: Path, tmp_path: Path) -> None:
    """What transformers has no model for is the original and a plan."""
    checkpoint = load_checkpoint(str(model), dtype="float32", device="cpu")
    surgeon = export.surgeon("optimal-brain-compression", {"fast": "true"})
    weight = checkpoint.model.model.layers[0].mlp.up_proj.weight.detach()
    path = "model.layers.0.mlp.up_proj"
    plan = Plan(
        "optimal-brain-compression",
        0.5,
        fingerprint(checkpoint.model),
        settings={"kind": "prune", "bits": 0, "fast": True},
        notes={path: {"kept": 0, "error": 1.0}},
        tensors={path: torch.zeros_like(weight)},
    )
    change = Change(path, Cost(1, 1, 1, 16.0), Cost(0, 0, 0, 16.0))
    report = Report("optimal-brain-compression", (change,), native=False)
    small = copy.deepcopy(checkpoint.model)
    surgeon.apply(small, plan)
    out = tmp_path / "own"
    export.export(
        small,
        checkpoint.tokenizer,
        plan,
        report,
        out,
        original=checkpoint.model,
        dtype=torch.bfloat16,
    )
    assert not (out / "config.json").exists() and export.is_own(out)
    loaded = isthmus.load(out)
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        assert torch.allclose(loaded.target.model(ids).logits, small(ids).logits, atol=1e-5)
    assert len(loaded.generate("def", max_new_tokens=3, ignore_end=True).tokens) == 3
    (out / "plan.safetensors").write_bytes(b"x")
    with pytest.raises(BrokenFileError, match="altered"):
        isthmus.load(out)


def test_a_result_without_a_fast_forward_is_compared_without_one(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a cut would look slow because of the engine that it cannot use."""

    def loaded(source: str | Path, **options: Any) -> Any:
        if source != "after":
            return load(source, **options)
        module = load_checkpoint(str(model), dtype="float32", device="cpu").model
        module.model.layers[0].mlp.register_forward_hook(lambda m, a, out: out * 0.5)
        return isthmus.Model(module)

    load = isthmus.load
    monkeypatch.setattr(api, "load", loaded)
    ids = torch.arange(3, 20)[None]
    data = Calibration(({"input_ids": ids, "attention_mask": torch.ones_like(ids)},))
    found = shrink._speeds(str(model), "after", data, 1, "cpu")
    assert {"32 tokens", "32 tokens, torch", "first token, torch", "note"} <= found.keys()
    assert found["32 tokens"]["after_ms"] == found["32 tokens, torch"]["after_ms"]
    again = shrink._speeds(str(model), str(model), data, 1, "cpu")
    assert "note" not in again and "32 tokens, torch" not in again
