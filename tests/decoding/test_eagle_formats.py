"""EAGLE, EAGLE-3 and P-EAGLE as serving engines read them: names, shapes, dtypes, and sums."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import trained_checks as checks
from safetensors.torch import load_file
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from isthmus.decoding.target import HubTarget
from isthmus.errors import InvalidInputError
from isthmus.systems.speculative import eagle, jakiro, parallelspec
from isthmus.training.serving_formats import export

THREE: dict[str, Any] = {
    "fused_layers": (0, 1, 2),
    "feature_weight": 0.0,
    "token_weight": 1.0,
    "noise": 0.0,
}


def named(drafter: Any) -> Any:
    """The drafter on a target that came from somewhere."""
    target = copy.copy(drafter.target)
    target.model = tiny.fresh("Llama", "float32")
    target.model.config._name_or_path = target.model.name_or_path = "somebody/tiny"
    drafter.target = target
    return drafter


def written(drafter: Any, format: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    export(drafter, format, folder)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


def layer_of(config: dict[str, Any], tensors: dict[str, Any], width: int) -> Any:
    """transformers' own Llama layer with the written weights, and its rotary positions."""
    llama = LlamaConfig(**config)
    llama._attn_implementation = "eager"
    layer = LlamaDecoderLayer(llama, 0)
    for name in ("q_proj", "k_proj", "v_proj"):
        old = getattr(layer.self_attn, name)
        setattr(layer.self_attn, name, torch.nn.Linear(width, old.out_features, bias=False))
    own = {k.removeprefix("layers.0."): v for k, v in tensors.items() if k.startswith("layers.0.")}
    missing, unexpected = layer.load_state_dict(own, strict=False)
    assert set(missing) <= {"input_layernorm.weight"} and set(unexpected) <= {"hidden_norm.weight"}
    return layer, LlamaRotaryEmbedding(llama)


def attended(layer: Any, rotary: Any, x: torch.Tensor) -> torch.Tensor:
    count = x.shape[1]
    places = rotary(x, torch.arange(count)[None])
    low = torch.full((count, count), -1e30).triu(1)[None, None]
    return layer.self_attn(x, position_embeddings=places, attention_mask=low)[0]


@torch.no_grad()
def test_eagle(tmp_path: Path) -> None:
    drafter = named(checks.make(eagle.Eagle, dtype="float32"))
    config, tensors = written(drafter, "eagle", tmp_path / "e")
    assert config["model_type"] == "llama" and config["num_hidden_layers"] == 1
    assert config["bias"] is False and config["torch_dtype"] == "float32"
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10_000.0
    shapes = {k: list(v.shape) for k, v in tensors.items()}
    assert shapes == {
        "fc.weight": [32, 64],
        "layers.0.self_attn.q_proj.weight": [32, 32],
        "layers.0.self_attn.k_proj.weight": [16, 32],
        "layers.0.self_attn.v_proj.weight": [16, 32],
        "layers.0.self_attn.o_proj.weight": [32, 32],
        "layers.0.post_attention_layernorm.weight": [32],
        "layers.0.mlp.gate_proj.weight": [48, 32],
        "layers.0.mlp.up_proj.weight": [48, 32],
        "layers.0.mlp.down_proj.weight": [32, 48],
    }
    assert {v.dtype for v in tensors.values()} == {torch.float32}
    layer, rotary = layer_of(config, tensors, 32)
    embedded, feature = torch.randn(2, 7, 32), torch.randn(2, 7, 32)
    x = torch.cat([embedded, feature], -1) @ tensors["fc.weight"].T
    x = x + attended(layer, rotary, x)
    want = x + layer.mlp(layer.post_attention_layernorm(x))
    got = drafter.body(embedded, feature, torch.arange(7)[None])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["eagle3", "peagle"])
def test_speculators(tmp_path: Path, kind: str) -> None:
    if kind == "eagle3":
        drafter = named(
            checks.make(eagle.Eagle, eagle.Settings(**THREE, rollout=4), dtype="float32")
        )
    else:
        settings = parallelspec.Settings(**THREE, own_slots=False, levels=5)
        drafter = named(checks.make(parallelspec.Parallelspec, settings, dtype="float32"))
    config, tensors = written(drafter, kind, tmp_path / kind)
    inner = config["transformer_layer_config"]
    method = config["speculators_config"]["proposal_methods"][0]
    assert "model_type" not in config and inner["model_type"] == "llama"
    assert config["speculators_model_type"] == config["speculators_config"]["algorithm"] == kind
    assert method["speculative_tokens"] == {"eagle3": 4, "peagle": 5}[kind]
    assert config["speculators_config"]["verifier"]["name_or_path"] == "somebody/tiny"
    assert config["speculators_config"]["verifier"]["architectures"] == ["LlamaForCausalLM"]
    assert inner["vocab_size"] == config["draft_vocab_size"] == 64
    assert config["eagle_aux_hidden_state_layer_ids"] == [0, 1, 2]
    assert config["norm_before_residual"] is False
    shapes = {k: list(v.shape) for k, v in tensors.items()}
    more = {"mask_hidden": [1, 1, 96]} if kind == "peagle" else {}
    assert shapes == more | {
        "embed_tokens.weight": [64, 32],
        "fc.weight": [32, 96],
        "layers.0.hidden_norm.weight": [32],
        "layers.0.input_layernorm.weight": [32],
        "layers.0.post_attention_layernorm.weight": [32],
        "layers.0.self_attn.q_proj.weight": [32, 64],
        "layers.0.self_attn.k_proj.weight": [16, 64],
        "layers.0.self_attn.v_proj.weight": [16, 64],
        "layers.0.self_attn.o_proj.weight": [32, 32],
        "layers.0.mlp.gate_proj.weight": [48, 32],
        "layers.0.mlp.up_proj.weight": [48, 32],
        "layers.0.mlp.down_proj.weight": [32, 48],
        "norm.weight": [32],
        "lm_head.weight": [64, 32],
    }
    assert {v.dtype for v in tensors.values()} == {torch.float32}

    # the forward as those engines have it, from the files alone
    layer, rotary = layer_of(inner, tensors, 64)
    norm = copy.deepcopy(layer.input_layernorm)
    norm.weight.copy_(tensors["layers.0.hidden_norm.weight"])
    tokens, taps = torch.tensor([[5, 9, 7, 3]]), torch.randn(1, 4, 96)
    count = 4
    if kind == "peagle":  # the last two rows are slots
        mask = config["mask_token_id"]
        assert mask == 0 and config["embed_requires_grad"] is True
        tokens, count = torch.tensor([[5, 9, mask, mask]]), 2
        taps = torch.cat([taps[:, :2], tensors["mask_hidden"].expand(1, 2, -1)], 1)
    g = taps @ tensors["fc.weight"].T
    e = tensors["embed_tokens.weight"][tokens]
    x = g + attended(layer, rotary, torch.cat([layer.input_layernorm(e), norm(g)], -1))
    x = x + layer.mlp(layer.post_attention_layernorm(x))
    norm.weight.copy_(tensors["norm.weight"])
    want = norm(x) @ tensors["lm_head.weight"].T

    feature = drafter.body.fc(taps)
    embedded = drafter.embed(tokens)
    if kind == "peagle":
        slot = torch.tensor([[0, 0, 1, 2]])
        wrong = torch.full_like(feature, 9.0)
        feature = torch.cat([feature[:, :count], wrong[:, count:]], 1)
        embedded, feature = drafter.slot_rows(slot, embedded, feature)
    got = drafter.logits(drafter.body(embedded, feature, torch.arange(4)[None]))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_refusals(tmp_path: Path) -> None:
    plain = checks.make(eagle.Eagle, dtype="float32")
    three = checks.make(eagle.Eagle, eagle.Settings(**THREE), dtype="float32")
    slots = checks.make(parallelspec.Parallelspec, dtype="float32")
    for drafter, format, why in (
        (plain, "eagle3", "fused_layers"),
        (three, "eagle", "eagle3"),
        (three, "peagle", "parallelspec"),
        (slots, "peagle", "own_slots"),
        (checks.make(jakiro.Jakiro), "eagle", "jakiro"),
        (checks.make(eagle.Eagle, eagle.Settings(shifted_token=False)), "eagle", "ahead"),
        (three, "eagle3", "_name_or_path"),
        (checks.make(eagle.Eagle, name="Bart"), "eagle", "decoder-only"),
    ):
        with pytest.raises(InvalidInputError, match=why):
            export(drafter, format, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    assert isinstance(plain.target, HubTarget)
