"""Grown reference models: size of their own, answers of the small model."""

import json
from pathlib import Path

import pytest
import torch

import isthmus
from isthmus.errors import BrokenFileError, UnknownNameError
from isthmus.workbench import pycode, reference
from isthmus.workbench.grown import GROWTHS, Growth, grown


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))


def test_a_grown_model_answers_as_its_base_and_is_made_once() -> None:
    growth = Growth("tiny-growth", "pycode-t", 2, 1, 8, max_position_embeddings=2048)
    base = reference.reference("pycode-t")
    folder = grown(growth, base)
    card = json.loads((folder / "card.json").read_text())
    small, large = (isthmus.load(each, dtype="float32") for each in (base, folder))
    weights = list(large.target.model.parameters())
    assert card["parameters"] == sum(p.numel() for p in weights) > 2 * 8_933_440
    assert card["growth"]["num_hidden_layers"] == 8
    assert card["base"]["held_out"]["nats_per_token"] > 0
    assert large.target.max_length == 2048
    # neither denormal numbers nor blocks that cost nothing
    tiny = torch.finfo(torch.float32).tiny
    assert all(float(p.detach().abs()[p != 0].min()) > tiny for p in weights if p.any())
    zeros = [p.shape for p in weights if not p.any()]
    assert sorted(zeros) == [(640, 640)] * 2 + [(640, 896)] * 2
    prompt = torch.tensor(pycode.prompts(1, small.tokenizer, 48)[0])
    answers = [m.generate(prompt, max_new_tokens=24, drafter="none") for m in (small, large)]
    assert answers[0].tokens == answers[1].tokens
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert grown(growth, base) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp


def test_names_of_grown_models() -> None:
    assert {"pycode-100m", "pycode-500m"} == set(GROWTHS) <= set(reference.NAMES)
    for growth in GROWTHS.values():
        assert growth.base in reference.RECIPES
    with pytest.raises(UnknownNameError, match="pycode-100m"):
        reference.reference("pycode-100")


def test_a_damaged_base_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(BrokenFileError, match="cannot be read"):
        grown(GROWTHS["pycode-100m"], tmp_path)
