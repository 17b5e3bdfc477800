"""The encoder-decoder against transformers, its parts against values computed by hand."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

import isthmus
from isthmus.errors import InvalidInputError, UnsupportedModelError
from isthmus.models.encoder_decoder import Config, EncoderDecoder, shifted
from isthmus.nn.attention import MultiHeadAttention

SIZES = {
    "hidden_size": 16,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "num_attention_heads": 2,
    "head_dim": 8,
    "intermediate_size": 24,
}


def made(config: Config) -> EncoderDecoder:
    torch.manual_seed(0)
    return EncoderDecoder(config).eval()


def batch():
    generator = torch.Generator().manual_seed(1)
    source = torch.randint(2, 50, (3, 40), generator=generator)
    source[1, 20:] = 0
    target = torch.randint(2, 50, (3, 35), generator=generator)
    return source, shifted(target, 0)


@pytest.mark.parametrize("row", [Config.t5, Config.marian])
def test_transformers_computes_the_same_logits(row, tmp_path):
    ours = made(row(50, **SIZES))
    twin = ours.to_hf()
    source, target = batch()
    told = {"attention_mask": (source != 0).long(), "decoder_input_ids": target}
    with torch.no_grad():
        logits = ours(source, target)
        torch.testing.assert_close(twin(source, **told).logits, logits, atol=1e-5, rtol=1e-5)
        twin.save_pretrained(tmp_path)
        again = tf.AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
        torch.testing.assert_close(again(source, **told).logits, logits, atol=1e-5, rtol=1e-5)
        back = EncoderDecoder.from_hf(again)
        assert back.config == ours.config
        torch.testing.assert_close(back(source, target), logits)


def test_the_twin_holds_the_same_parameters():
    ours = made(Config.t5(50, **SIZES))
    twin = ours.to_hf()
    with torch.no_grad():
        ours.head.weight.mul_(2)
    assert twin.lm_head.weight is ours.head.weight and twin.shared.weight is ours.embedding.weight


def test_a_marian_of_random_weights_that_transformers_made_is_read():
    config = tf.MarianConfig(
        vocab_size=50,
        d_model=16,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        activation_function="silu",
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=1,
        scale_embedding=True,
    )
    theirs = tf.MarianMTModel(config).eval()
    source, target = batch()
    told = {"attention_mask": (source != 0).long(), "decoder_input_ids": target}
    with torch.no_grad():
        ours = EncoderDecoder.from_hf(theirs)(source, target)
        torch.testing.assert_close(ours, theirs(source, **told).logits, atol=1e-5, rtol=1e-5)


def test_places_can_be_chosen_and_padding_changes_nothing():
    ours = made(Config.marian(50, **SIZES)).double()
    source, target = batch()
    where = torch.rand(target.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    with torch.no_grad():
        whole = ours(source, target)
        torch.testing.assert_close(ours(source, target, where), whole[where])
        wider = torch.nn.functional.pad(source, (0, 5))
        torch.testing.assert_close(ours(wider, target), whole)
        later = torch.nn.functional.pad(target, (0, 3))
        torch.testing.assert_close(ours(source, later)[:, : target.shape[1]], whole)


def test_the_engine_decodes_the_twin_as_full_recomputation_does():
    ours = made(Config.marian(48, **SIZES))
    source = torch.arange(2, 20)
    model = isthmus.Model(ours.to_hf())
    found = model.generate(source, max_new_tokens=12, drafter="none", ignore_end=True).tokens
    answer: list[int] = []
    with torch.no_grad():
        for _ in range(12):
            logits = ours(source[None], torch.tensor([[0, *answer]]))
            answer.append(int(logits[0, -1].argmax()))
    assert found == answer


def test_what_transformers_cannot_hold_is_refused():
    with pytest.raises(UnsupportedModelError, match="no model of this configuration"):
        made(Config(50, norm="rms", **SIZES)).to_hf()
    with pytest.raises(UnsupportedModelError, match="bart model is not read"):
        config = tf.BartConfig(vocab_size=8, d_model=16, encoder_layers=1, decoder_layers=1)
        EncoderDecoder.from_hf(tf.BartForConditionalGeneration(config))
    with pytest.raises(InvalidInputError, match="longer than max_length=8"):
        made(Config.marian(50, **{**SIZES, "max_length": 8}))(*batch())
    with pytest.raises(InvalidInputError, match="must be even"):
        Config(50, hidden_size=7)


def test_attention_is_a_mean_of_values_where_all_scores_are_equal():
    attention = MultiHeadAttention(4, 2)
    with torch.no_grad():
        attention.q_proj.weight.zero_()
        attention.q_proj.bias.zero_()
    x = torch.randn(1, 5, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([True, True, False, True, False])
    expected = attention.out_proj(attention.v_proj(x[:, mask]).mean(1, keepdim=True))
    torch.testing.assert_close(
        attention(x, mask=mask[None, None, None]), expected.expand(-1, 5, -1)
    )
    first = attention(x, causal=True)[:, 0]
    torch.testing.assert_close(first, attention.out_proj(attention.v_proj(x[:, 0])))


def test_t5_draws_its_initial_weights_as_published():
    config = Config.t5(400, **{**SIZES, "hidden_size": 64, "head_dim": 32})
    ours = made(config)
    layer = ours.decoder.layers[0]
    for weight, deviation in [
        (ours.embedding.weight, 1.0),
        (ours.head.weight, 1.0),
        (layer.cross_attention.inner.q_proj.weight, (64 * 32) ** -0.5),
        (layer.self_attention.inner.k_proj.weight, 64**-0.5),
        (layer.self_attention.inner.out_proj.weight, 64**-0.5),
        (layer.feed_forward.inner.gate_proj.weight, 64**-0.5),
        (layer.feed_forward.inner.out_proj.weight, 24**-0.5),
    ]:
        assert float(weight.detach().std()) == pytest.approx(deviation, rel=0.1)
    assert layer.cross_attention.inner.scale == 1.0
