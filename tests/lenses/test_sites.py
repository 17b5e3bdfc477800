"""Traces and site maps: values are where they are said to be, in twenty architectures."""

import sys
from pathlib import Path

import pytest
import torch
import transformers as tf
from torch import nn

from isthmus.errors import InvalidInputError, UnknownNameError, UnsupportedModelError
from isthmus.lenses.sites import SiteMap, eager, probe_of
from isthmus.lenses.trace import Intervene, Site, Trace, project_out, replaced, zero

sys.path.insert(0, str(Path(__file__).parents[1] / "decoding"))
import tiny

_ENCODER = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
MAKERS = {
    **tiny.MAKERS,
    "Bert": lambda: tf.BertForSequenceClassification(tf.BertConfig(**_ENCODER)),
    "Roberta": lambda: tf.RobertaForMaskedLM(tf.RobertaConfig(**_ENCODER)),
    "Gemma2": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**tiny._GROUPED, head_dim=8)),
    "OPT": lambda: tf.OPTForCausalLM(
        tf.OPTConfig(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=48,
            word_embed_proj_dim=32,
        )
    ),
    "Mixtral": lambda: tf.MixtralForCausalLM(
        tf.MixtralConfig(**tiny._GROUPED, num_local_experts=4)
    ),
    "MBart": lambda: tf.MBartForConditionalGeneration(tf.MBartConfig(**tiny._PAIR)),
}
AFTER = {"Bart", "Marian", "Bert", "Roberta"}
PARALLEL = {"GPTNeoX", "Phi"}


def made(name):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MAKERS[name]().eval()


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_what_a_layer_adds_is_found_in(name):
    model = made(name)
    probe = probe_of(model)
    sites = SiteMap.of(model, probe)
    wanted = sites.sites()
    with torch.no_grad(), Trace(model, wanted) as seen:
        model(**probe)
    for prefix, stack in sites.stacks.items():
        assert len(stack) == 2 and stack.error < 1e-5
        assert stack.norm_after == (name in AFTER)
        dot = f"{prefix}." if prefix else ""
        for i in range(2):
            parts = ("attn_out", "cross_out", "mlp_out", "mixer_out")
            here = [f"{dot}{k}.{i}" for k in parts if f"{dot}{k}.{i}" in wanted]
            expected = 1 if "Mamba" in name else 3 if prefix == "dec" else 2
            assert len(here) == expected
            pre, post = seen[f"{dot}resid_pre.{i}"], seen[f"{dot}resid_post.{i}"]
            total = pre + sum(seen[k].reshape(pre.shape) for k in here)
            if not stack.norm_after:
                assert torch.allclose(total, post, atol=1e-5)
            has_middle = f"{dot}resid_mid.{i}" in wanted
            assert has_middle == (name not in PARALLEL and "Mamba" not in name)
    if sites.logits_error is not None:
        assert sites.logits_error < 1e-5


def test_pictures_have_sites_too():
    config = tf.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=16,
        patch_size=4,
    )
    model = tf.ViTForImageClassification(config).eval()
    with pytest.raises(UnsupportedModelError, match="give a probe"):
        probe_of(model)
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    sites = SiteMap.of(model, {"pixel_values": pixels})
    assert sites["final_norm"].module == "vit.layernorm"
    assert list(sites.residuals()) == ["resid.0", "resid.1", "resid.2"]


def test_a_layer_whose_parts_do_not_add_up_is_refused_by_name():
    config = tf.GraniteConfig(**tiny._GROUPED, residual_multiplier=0.5)
    model = tf.GraniteForCausalLM(config).eval()
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.0: no sum"):
        SiteMap.of(model, probe_of(model))
    with pytest.raises(UnsupportedModelError, match="no stack"):
        SiteMap.of(nn.Linear(2, 2).eval(), {})


def test_unknown_sites_are_refused_with_the_near_name():
    model = made("Llama")
    sites = SiteMap.of(model, probe_of(model))
    with pytest.raises(UnknownNameError, match=r"attn_out\.1"):
        _ = sites["atn_out.1"]
    with pytest.raises(UnknownNameError, match="stack"):
        sites.residuals("enc")
    with pytest.raises(UnknownNameError, match="module"):
        Trace(model, {"x": Site("model.layer.0")})


def test_zeroing_a_part_takes_it_out_and_hooks_go_away():
    model = made("Llama")
    probe = probe_of(model)
    sites = SiteMap.of(model, probe)
    before = model(**probe).logits
    wanted = {k: sites[k] for k in ("resid_pre.0", "resid_mid.0", "attn_out.0")}
    without = Intervene(model, {sites["attn_out.0"]: zero})
    with torch.no_grad(), without, Trace(model, wanted) as seen:
        model(**probe)
    assert torch.allclose(seen["resid_mid.0"], seen["resid_pre.0"])
    with torch.no_grad(), Trace(model, wanted) as seen:
        model(**probe)
    with torch.no_grad(), Intervene(model, {sites["attn_out.0"]: replaced(seen["attn_out.0"])}):
        assert torch.equal(model(**probe).logits, before)
    assert torch.equal(model(**probe).logits, before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    other = Intervene(model, {sites["attn_out.0"]: replaced(torch.zeros(1))})
    with pytest.raises(InvalidInputError, match="cannot take the place"), other:
        model(**probe)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_direction_is_projected_out():
    value = torch.tensor([[3.0, 4.0]])
    assert project_out(torch.tensor([2.0, 0.0]))(value).tolist() == [[0.0, 4.0]]


def test_gradients_reach_a_trace_that_keeps_them():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)).eval()
    with Trace(model, {"mid": Site("0")}, grad=True) as seen:
        out = model(torch.ones(1, 2))
    (slope,) = torch.autograd.grad(out.sum(), seen["mid"])
    assert torch.equal(slope, model[1].weight)


def test_values_computed_twice_or_never_are_not_taken_for_one():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU()).eval()
    with Trace(model, {"mid": Site("0")}) as seen:
        model(torch.ones(1, 2))
        model(torch.ones(1, 2))
    assert len(seen.calls["mid"]) == 2
    with pytest.raises(UnsupportedModelError, match="2 times"):
        _ = seen["mid"]
    with Trace(model, {"mid": Site("0")}) as seen:
        pass
    with pytest.raises(UnsupportedModelError, match="0 times"):
        _ = seen["mid"]
    with pytest.raises(UnknownNameError):
        _ = seen["other"]


def test_models_that_drop_out_are_refused():
    with pytest.raises(InvalidInputError, match=r"model\.eval"):
        Trace(nn.Sequential(nn.Dropout(0.5)).train(), {})


def test_patterns_show_while_attention_is_eager_only():
    model = made("Llama")
    model.set_attn_implementation("sdpa")
    site = Site("model.layers.0.self_attn", item=1)
    with eager(model), torch.no_grad(), Trace(model, {"pattern": site}) as seen:
        model(**probe_of(model))
    assert torch.allclose(seen["pattern"].sum(-1), torch.ones(1, 4, 8))
    assert model.config._attn_implementation == "sdpa"
