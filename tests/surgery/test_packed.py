"""Packed integers: what was rounded is written down exactly, and transformers reads it back."""

import json
import sys
import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from isthmus.cli.main import main
from isthmus.errors import InvalidInputError, MissingExtraError
from isthmus.folders import EMBEDDED
from isthmus.surgery import packed
from isthmus.surgery.obs import Grid
from isthmus.surgery.packed import export_packed, grid_of
from isthmus.workbench.tokenizer import load_tokenizer


def test_a_grid_is_found_again_and_none_is_invented() -> None:
    draw = torch.Generator().manual_seed(0)
    w = torch.randn(12, 40, generator=draw)
    for bits, symmetric in ((2, True), (3, False), (4, True), (8, False)):
        rounded = Grid.search(w, bits, symmetric=symmetric).round(w.double()).float()
        found = grid_of(rounded, bits)
        assert torch.allclose(found.round(rounded.double()).float(), rounded, rtol=1e-6)
        codes = found.codes(rounded.double())
        assert codes.min() >= 0 and codes.max() < 2**bits
        with pytest.raises(InvalidInputError, match="lie on no grid"):
            grid_of(w, bits)
    assert grid_of(torch.zeros(1, 3), 2).round(torch.zeros(1, 3).double()).abs().sum() == 0
    with pytest.raises(InvalidInputError, match="1 to 8"):
        grid_of(w, 9)


def made(bits: int, symmetric: bool, tied: bool = False) -> tuple[LlamaForCausalLM, list[str]]:
    """A tiny model whose linear layers but the head are rounded."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config).eval()
    paths = [
        n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "layers" in n
    ]
    for path in paths:
        weight = model.get_submodule(path).weight
        with torch.no_grad():
            wide = weight.double()
            weight.copy_(Grid.search(wide, bits, symmetric=symmetric).round(wide))
    return model, paths


@pytest.mark.parametrize(("bits", "tied"), [(3, False), (4, True), (8, False)])
def test_transformers_loads_the_same_numbers(tmp_path: Path, bits: int, tied: bool) -> None:
    pytest.importorskip("compressed_tensors")
    model, paths = made(bits, True, tied)
    export_packed(model, None, paths, bits, tmp_path / "packed")
    model.save_pretrained(tmp_path / "dense")
    size = {n: (tmp_path / n / "model.safetensors").stat().st_size for n in ("packed", "dense")}
    assert size["packed"] < 0.65 * size["dense"]
    said = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert said["format"] == "pack-quantized" and said["ignore"] == ["lm_head"]
    ids = torch.arange(3, 20)[None]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of the package
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
        got = loaded(ids).logits
        assert torch.allclose(got, model(ids).logits, atol=1e-5)
    for path in paths:
        weight = loaded.get_submodule(path).weight
        assert torch.allclose(weight, model.get_submodule(path).weight, rtol=1e-5, atol=1e-8)


def test_what_cannot_be_packed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, paths = made(4, True)
    helpers = "compressed_tensors.compressors.pack_quantized.helpers"
    monkeypatch.setitem(sys.modules, helpers, None)
    with pytest.raises(MissingExtraError, match=r"isthmus\[pack\]"):
        export_packed(model, None, paths, 4, tmp_path / "o")
    monkeypatch.undo()
    pytest.importorskip("compressed_tensors")
    with pytest.raises(InvalidInputError, match="no grid of 3 bits"):
        export_packed(model, None, paths, 3, tmp_path / "o")
    askew, _ = made(4, False)
    with pytest.raises(InvalidInputError, match="symmetric=true"):
        export_packed(askew, None, paths, 4, tmp_path / "o")
    with pytest.raises(InvalidInputError, match=r"no nn\.Linear"):
        export_packed(model, None, ["model.norm"], 4, tmp_path / "o")
    with pytest.raises(InvalidInputError, match="nothing to pack"):
        export_packed(model, None, [], 4, tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_the_door(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What shrink rounds is packed beside its result, and both compute the same."""
    code = Path(packed.__file__).read_text()
    (tmp_path / "texts").mkdir()
    for i in range(12):
        (tmp_path / "texts" / f"{i}.txt").write_text(code[300 * i : 300 * (i + 1)])
    torch.manual_seed(0)
    small = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    LlamaForCausalLM(LlamaConfig(vocab_size=4096, hidden_size=32, **small)).save_pretrained(
        tmp_path / "model"
    )
    load_tokenizer(EMBEDDED / "pycode-t").save_pretrained(tmp_path / "model")
    words = ["shrink", str(tmp_path / "model"), "--method", "optimal-brain-compression"]
    words += ["--data", str(tmp_path / "texts"), "--samples", "8", "--length", "32"]
    words += ["--repeats", "0", "--set", "fast=true", "--set", "kind=quantize", "--budget", "0.25"]
    words += ["-o", str(tmp_path / "o"), "--packed", str(tmp_path / "p")]
    assert main(words) == 2
    assert "symmetric=true" in capsys.readouterr().err
    pytest.importorskip("compressed_tensors")
    assert main([*words, "--set", "symmetric=true"]) == 0
    assert "... as packed integers" in capsys.readouterr().out
    ids = torch.arange(3, 20)[None]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        one, other = (
            AutoModelForCausalLM.from_pretrained(tmp_path / n, dtype=torch.float32)(ids).logits
            for n in ("o", "p")
        )
    assert torch.allclose(one, other, atol=1e-5)
