"""Maps between widths and depths: what they keep, what they do not, and what they refuse."""

import copy
from typing import Any

import pytest
import torch
import transformers as tf

from decoding.tiny import fresh, network
from isthmus.errors import InvalidInputError, MismatchError, UnsupportedModelError
from isthmus.surgery import resize
from isthmus.surgery.resize import Pairing

IDS = torch.arange(5, 29)[None]
FAMILIES = ("Llama", "Qwen3", "Mistral")


def tied(dtype: torch.dtype = torch.float32) -> Any:
    """A random decoder whose output head is its embedding table."""
    config = copy.deepcopy(network("Llama").config)
    config.tie_word_embeddings = True
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return tf.LlamaForCausalLM(config).eval().to(dtype)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def distance(a: Any, b: Any) -> float:
    """Largest difference of two models' logits, as a share of the largest logit."""
    return float((logits(a) - logits(b)).abs().max() / logits(a).abs().max())


def same_weights(a: Any, b: Any) -> bool:
    theirs = dict(b.named_parameters())
    return all(torch.equal(p, theirs[name]) for name, p in a.named_parameters())


@pytest.mark.parametrize("pairing", ["far", "near"])
@pytest.mark.parametrize("name", [*FAMILIES, "tied"])
def test_coalescing_undoes_decoalescing(name: str, pairing: Pairing) -> None:
    model = tied() if name == "tied" else network(name, "float32")
    wide = resize.decoalesce_width(model, 2, intermediate_factor=4, pairing=pairing)
    back = resize.coalesce_width(wide, 2, intermediate_factor=4, pairing=pairing)
    assert same_weights(model, back)
    deep = resize.decoalesce_depth(model, 2, pairing=pairing)
    assert deep.config.num_hidden_layers == 4
    assert same_weights(model, resize.coalesce_depth(deep, 2, pairing=pairing))
    thrice = resize.decoalesce_depth(resize.decoalesce_width(model, 3, pairing=pairing), 3)
    back = resize.coalesce_width(resize.coalesce_depth(thrice, 3), 3, pairing=pairing)
    theirs = dict(back.named_parameters())  # thirds are rounded
    assert all(torch.allclose(p, theirs[n], rtol=1e-6) for n, p in model.named_parameters())


@pytest.mark.parametrize("pairing", ["far", "near"])
@pytest.mark.parametrize("name", [*FAMILIES, "tied"])
def test_width_keeps_the_outputs(name: str, pairing: Pairing) -> None:
    model = tied() if name == "tied" else network(name, "float32")
    wide = resize.decoalesce_width(model, 3, intermediate_factor=2, pairing=pairing)
    config = wide.config
    assert (config.hidden_size, config.intermediate_size, config.head_dim) == (96, 96, 8)
    assert (config.num_attention_heads, config.num_key_value_heads) == (12, 6)
    assert wide.model.layers[0].self_attn.q_proj.weight.shape == (96, 96)
    assert distance(model, wide) < 2e-6
    assert torch.equal(logits(model).argmax(-1), logits(wide).argmax(-1))


def test_each_part_of_the_width_map_matters() -> None:
    model = tied()
    wide = resize.decoalesce_width(model, 2)
    unscaled = copy.deepcopy(wide)
    unscaled.model.norm.weight.data *= 2  # what a tied head needs
    assert distance(model, unscaled) > 0.1
    summed = copy.deepcopy(wide)
    summed.model.layers[0].mlp.down_proj.weight.data *= 2  # what reading two copies needs
    assert distance(model, summed) > 1e-3


def test_sixteen_bits_lose_nothing_by_powers_of_two() -> None:
    model = tied(torch.bfloat16)
    wide = resize.decoalesce_width(model, 2, intermediate_factor=4)
    assert wide.dtype == torch.bfloat16
    assert distance(model.float(), wide.float()) < 2e-6


def test_depth_by_zero_outputs_is_exact_and_by_copies_is_not() -> None:
    for name in FAMILIES:
        model = network(name, "float32")
        deep = resize.insert_blocks(model, 5)
        assert deep.config.num_hidden_layers == len(deep.model.layers) == 5
        assert torch.equal(logits(model), logits(deep))
        assert distance(model, resize.decoalesce_depth(model, 2)) > 0.01
    silent = [not layer.mlp.down_proj.weight.any() for layer in deep.model.layers]
    assert silent == [False, True, True, False, True]
    assert all(layer.mlp.up_proj.weight.any() for layer in deep.model.layers)


def test_kinds_of_blocks_go_along() -> None:
    model = network("Qwen3", "float32")
    model = copy.deepcopy(model)
    model.config.layer_types = ["full_attention", "sliding_attention"]
    model.config.sliding_window = 4
    model.config.use_sliding_window = True
    model = resize.interpolate(model, model, 0.5)  # made anew with that config
    deep = resize.insert_blocks(model, 4)
    assert deep.config.layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 2
    with pytest.raises(UnsupportedModelError, match="several kinds"):
        resize.coalesce_depth(model, 2)


def test_a_halved_model_is_smaller_and_its_parameters_are_averages() -> None:
    model = network("Llama", "float64")
    small = resize.coalesce_depth(resize.coalesce_width(model, 2), 2)
    config = small.config
    assert (config.hidden_size, config.num_attention_heads, config.num_hidden_layers) == (16, 2, 1)
    assert logits(small).shape == logits(model).shape
    first, last = (layer.input_layernorm.weight for layer in model.model.layers)
    wanted = (first[:16] + first[16:] + last[:16] + last[16:]) / 4
    assert torch.allclose(small.model.layers[0].input_layernorm.weight, wanted)
    # one value by hand: o_proj [out, in] averages two outputs and sums two inputs
    weight = torch.stack([layer.self_attn.o_proj.weight for layer in model.model.layers]).mean(0)
    by_hand = (weight[0, 0] + weight[0, 16] + weight[16, 0] + weight[16, 16]) / 2
    assert torch.isclose(small.model.layers[0].self_attn.o_proj.weight[0, 0], by_hand)


def test_the_model_stays_as_it_is() -> None:
    model = fresh("Llama", "float32")
    before = copy.deepcopy(model)
    for made in (
        resize.decoalesce_width(model, 1),
        resize.insert_blocks(model, 3),
        resize.coalesce_depth(model, 1),
        resize.interpolate(model, model, 0.0),
    ):
        for p in made.parameters():
            p.data.fill_(7)
    assert same_weights(before, model)
    assert before.config.to_dict() == model.config.to_dict()


def test_interpolation_lies_between_and_tells_copies_apart() -> None:
    old, other = network("Llama", "float32"), network("Llama", "float32", noise=0.1)
    assert same_weights(old, resize.interpolate(old, other, 0.0))
    assert same_weights(other, resize.interpolate(old, other, 1.0))
    quarter = resize.interpolate(old, other, 0.25).lm_head.weight
    assert torch.allclose(quarter, 0.75 * old.lm_head.weight + 0.25 * other.lm_head.weight)
    with pytest.raises(InvalidInputError, match="between 0 and 1"):
        resize.interpolate(old, other, 1.5)
    with pytest.raises(MismatchError, match="differ in shape"):
        resize.interpolate(old, resize.coalesce_width(old, 2), 0.5)


def test_schemes_that_do_not_divide_are_refused() -> None:
    model = network("Llama", "float32")
    with pytest.raises(InvalidInputError, match="hidden_size is 32, which 3 does not divide"):
        resize.coalesce_width(model, 3)
    with pytest.raises(InvalidInputError, match="num_key_value_heads is 2, which 4"):
        resize.coalesce_width(model, 4)  # heads stay whole
    with pytest.raises(InvalidInputError, match="intermediate_size is 48, which 5"):
        resize.coalesce_width(model, 2, intermediate_factor=5)
    with pytest.raises(InvalidInputError, match="number of blocks is 2, which 4"):
        resize.coalesce_depth(model, 4)
    with pytest.raises(InvalidInputError, match="must be at least 1"):
        resize.decoalesce_width(model, 0)
    with pytest.raises(InvalidInputError, match="cannot grow to 1"):
        resize.insert_blocks(model, 1)


@pytest.mark.parametrize("name", ["Gemma3", "Phi", "GPT2", "T5", "Mamba"])
def test_other_architectures_are_refused_by_name(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match="knows Llama-type decoders"):
        resize.decoalesce_width(network(name, "float32"), 2)


def test_a_model_that_would_change_is_caught_by_the_probe() -> None:
    # its embeddings are scaled by the hidden size
    config = tf.GemmaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, intermediate_size=48, pad_token_id=0,
    )  # fmt: skip
    with pytest.raises(UnsupportedModelError, match="would change its outputs"):
        resize.decoalesce_width(tf.GemmaForCausalLM(config).eval(), 2)
