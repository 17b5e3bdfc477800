"""DecoderLens: the last layer is the model itself, and padding changes nothing."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as tf

from isthmus.decoding.model import Model
from isthmus.errors import UnsupportedModelError
from isthmus.systems.lenses.decoderlens import Decoderlens, Settings
from isthmus.testing import check_lens
from isthmus.workbench import reference

sys.path.insert(0, str(Path(__file__).parents[1] / "decoding"))
import tiny

LENS = Decoderlens(Settings(max_new_tokens=6))
SOURCE = torch.tensor([5, 9, 33, 7, 12, 2])


def model(name: str) -> Model:
    if name != "MBart":
        return Model(tiny.network(name, "float32"), fast=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = tf.MBartForConditionalGeneration(tf.MBartConfig(**tiny._PAIR, init_std=0.1))
        return Model(module.eval())


@pytest.mark.parametrize("name", ["T5", "Bart", "Marian", "MBart"])
def test_the_last_layer_reads_as_the_model_writes(name):
    reading = LENS.read(model(name), SOURCE)
    assert len(reading.texts) == 3 and len(reading.answer) == 6
    assert reading.texts[-1].equal(reading.answer)
    assert reading.scores.shape == (3, 6)
    # Greedily chosen tokens are the likeliest under the last layer.
    assert float(reading.scores[-1].min()) > -torch.log(torch.tensor(64.0))
    assert not torch.allclose(reading.scores[0], reading.scores[-1])


@pytest.mark.parametrize("name", ["T5", "Bart", "MBart"])
def test_the_states_are_those_that_the_decoder_reads(name):
    inside = model(name)
    inputs = {"input_ids": SOURCE[None], "attention_mask": torch.ones(1, 6, dtype=torch.int64)}
    states = LENS.states(inside, inputs)
    with torch.no_grad():
        own = inside.target.model.get_encoder()(**inputs).last_hidden_state
    assert torch.allclose(states[-1:], own, atol=1e-5)
    padded = {k: torch.nn.functional.pad(v, (0, 3)) for k, v in inputs.items()}
    assert torch.allclose(LENS.states(inside, padded)[:, :6], states, atol=1e-5)


def test_without_the_final_norm_the_decoder_reads_another_scale():
    bare = Decoderlens(Settings(final_norm=False, max_new_tokens=6))
    inside = model("MBart")
    inputs = {"input_ids": SOURCE[None], "attention_mask": torch.ones(1, 6, dtype=torch.int64)}
    assert not torch.allclose(bare.states(inside, inputs)[1], LENS.states(inside, inputs)[1])


def test_models_without_an_encoder_are_refused():
    with pytest.raises(UnsupportedModelError, match="no encoder"):
        LENS.read(model("Llama"), SOURCE)


def test_the_contract_on_a_model_with_a_tokenizer():
    recipe = replace(
        reference.RECIPES["dates-deep"],
        name="dates-deep-t",
        steps=12,
        batch_size=8,
        hidden_size=24,
        num_attention_heads=1,
        head_dim=24,
        intermediate_size=32,
    )
    lens = Decoderlens(Settings(max_new_tokens=8))
    subject = lens.open(str(reference.reference(recipe, progress=False)))
    check_lens(lens, subject, "4 mai 1950")
    found = lens.explain(subject, "4 mai 1950")
    assert [row["layer"] for row in found.tables["what the decoder reads"]][-2:] == [
        "layer 6",
        "zeros",
    ]
