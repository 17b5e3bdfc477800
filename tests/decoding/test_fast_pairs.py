"""The fast target of encoder-decoder models: the same function, bit-identical in any group."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from tiny import _PAIR, CONTEXT, MAKERS, V

from isthmus.decoding.fast import FastTarget, alike, best_target, join_sources
from isthmus.decoding.model import Model
from isthmus.decoding.native import Stored
from isthmus.decoding.target import HubTarget
from isthmus.decoding.tree import TokenTree, Topology
from isthmus.errors import InvalidInputError
from isthmus.roles import Taps
from isthmus.testing.targets import check_target

_T5: dict[str, Any] = {
    "vocab_size": V,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
}
_SCALED: dict[str, Any] = {**_PAIR, "max_position_embeddings": CONTEXT, "scale_embedding": True}

PAIRS: dict[str, Callable[[], Any]] = {
    "T5": MAKERS["T5"],
    "T5 gated": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(**_T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    ),
    "MT5": lambda: tf.MT5ForConditionalGeneration(tf.MT5Config(**_T5)),
    "Bart": MAKERS["Bart"],
    "MBart": lambda: tf.MBartForConditionalGeneration(tf.MBartConfig(**_SCALED)),
    "Marian": lambda: tf.MarianMTModel(tf.MarianConfig(**_SCALED, activation_function="swish")),
    "Pegasus": lambda: tf.PegasusForConditionalGeneration(tf.PegasusConfig(**_SCALED)),
}


def make(name: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(3)
    model = PAIRS[name]()
    for key, tensor in (*model.named_parameters(), *model.named_buffers()):
        if key.endswith("bias"):  # zero in a fresh model
            torch.nn.init.normal_(tensor, std=0.3)
    return model.to(dtype).eval()


def sources(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(3, V, (n,), generator=generator) for n in lengths]


def padded(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    width = max(len(r) for r in rows)
    ids = [torch.nn.functional.pad(r, (0, width - len(r))) for r in rows]
    mask = [torch.arange(width) < len(r) for r in rows]
    return {"input_ids": torch.stack(ids), "attention_mask": torch.stack(mask).long()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*PAIRS, "Whisper"])
def test_numbers_do_not_depend_on_how_tokens_are_grouped(name: str, dtype: torch.dtype) -> None:
    model = MAKERS[name]().to(dtype).eval() if name == "Whisper" else make(name, dtype)
    target = best_target(model)
    assert isinstance(target, FastTarget), target.why_general
    assert (target.encoder is None) == (name == "Whisper")
    assert check_target(target, rounds=5) == 0.0  # not one bit


@pytest.mark.parametrize("name", PAIRS)
def test_a_tree_in_a_ragged_batch_is_what_the_model_says(name: str) -> None:
    model = make(name)
    fast, general = FastTarget(model), HubTarget(model)
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randint(0, V, (n,), generator=generator) for n in (9, 2, 24)]
    tokens = torch.randint(0, V, (3, 6), generator=generator)
    tree = TokenTree(tokens, Topology(torch.tensor([[-1, 0, 0, 1, 1, 3]])))
    taps = Taps(final=True, layers=(0, 1, 2))
    inputs, more = padded(sources(7, 19, 4)), padded(sources(23))
    found = []
    for target in (fast, general):
        session = target.session(3, **inputs)
        session.prefill(rows)
        first = session.score(tree, taps=taps)
        session.keep(torch.tensor([[0, 1, 4], [0, 2, -1], [0, 1, 3]]))
        other = target.session(1, **more)
        other.prefill([rows[1]])
        joined = session.fork([2, 0]).join(other)
        again = joined.score(TokenTree.root(tokens[:, 1]), taps=taps)
        found.append([first.logits, again.logits])
        for scores in (first, again):
            assert scores.features is not None
            found[-1] += [scores.features.final, *scores.features.layers.values()]
    assert len(found[0]) == 10
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", PAIRS)
def test_greedy_text_is_that_of_transformers_whoever_drafts(name: str) -> None:
    model = make(name)
    ours = Model(model)
    assert isinstance(ours.target, FastTarget)
    for rows in (sources(11), sources(9, 3, 14)):
        want = model.generate(
            **padded(rows), max_new_tokens=40, do_sample=False, num_beams=1, eos_token_id=None
        )[:, 1:].tolist()
        for drafter in ("none", "prompt-lookup", "token-recycling"):
            out = ours.generate(rows, max_new_tokens=40, drafter=drafter, ignore_end=True)
            assert [o.tokens for o in out] == want, drafter


@pytest.mark.parametrize("name", ["T5 gated", "Marian"])
def test_bfloat16_weights_give_the_float32_text_of_the_same_weights(name: str) -> None:
    model = make(name, torch.bfloat16)
    rows = sources(6, 9, 15)
    options: dict[str, Any] = {"max_new_tokens": 30, "drafter": "none", "ignore_end": True}
    compact = Model(model)
    batch = [o.tokens for o in compact.generate(rows, **options)]
    assert batch == [compact.generate(row, **options).tokens for row in rows]
    many = dict(compact.generate_many(rows * 3, batch_size=2, **options))
    assert [many[i].tokens for i in range(9)] == batch * 3
    wide = Model(model.float(), fast=False).generate(rows, **options)
    assert batch == [o.tokens for o in wide]


def test_a_source_row_does_not_depend_on_its_neighbours() -> None:
    target = FastTarget(make("T5"))
    rows = sources(5, 17)
    together = target.encode(**padded(rows))["encoder_outputs"][0]
    alone = target.encode(input_ids=rows[0][None])["encoder_outputs"][0]
    assert torch.equal(together[:1, :5], alone)
    left = torch.nn.functional.pad(rows[0], (4, 0))[None]  # tokens that are not seen come first
    mask = (torch.arange(9) >= 4).long()[None]
    shifted = target.encode(input_ids=left, attention_mask=mask)["encoder_outputs"][0]
    torch.testing.assert_close(shifted[:, 4:], alone, rtol=1e-4, atol=1e-5)


def test_sources_of_unlike_lengths_are_encoded_apart() -> None:
    """Groups of like length give the states and the texts of each source alone."""
    target = FastTarget(make("T5"))
    rows = sources(70, 9, 64, 31, 9, 70)
    given = padded(rows)
    found = alike(given["input_ids"], given["attention_mask"])
    assert [(r.tolist(), w) for r, w in found] == [([0, 5], 70), ([2, 3], 64), ([1, 4], 9)]
    together = target.encode(**given)["encoder_outputs"][0]
    for row, states in zip(rows, together, strict=True):
        alone = target.encode(input_ids=row[None])["encoder_outputs"][0][0]
        assert torch.equal(states[: len(row)], alone)
    model = Model(target)
    options = {"max_new_tokens": 8, "drafter": "none", "ignore_end": True}
    texts = [r.tokens for r in model.generate(rows, **options)]
    assert texts == [model.generate([row], **options)[0].tokens for row in rows]


def test_encoder_outputs_of_the_model_may_be_given() -> None:
    model = make("Marian", torch.bfloat16)
    target = FastTarget(model)
    (row,) = sources(8)
    with torch.no_grad():
        encoded = model.get_encoder()(row[None])
    root = TokenTree.root(torch.tensor([1]))
    got = target.session(1, encoder_outputs=encoded).score(root).logits
    want = target.session(1, input_ids=row[None]).score(root).logits
    assert float((got - want).abs().max() / want.std()) < 0.05
    again = target.forward(root.tokens, encoded=target.encode(input_ids=row[None])).logits
    assert float((again - want).abs().max() / want.std()) < 0.05
    with pytest.raises(InvalidInputError, match="needs encoder inputs"):
        target.session(1)


def test_int8_takes_the_encoder_along() -> None:
    torch.manual_seed(0)
    config = {**_SCALED, "d_model": 64, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    target = FastTarget(tf.MarianMTModel(tf.MarianConfig(**config)).eval())
    inputs, root = padded(sources(9)), TokenTree.root(torch.tensor([1]))
    before = target.session(1, **inputs)
    logits = before.score(root).logits
    target.to_int8()
    after = target.session(1, **inputs)
    assert not torch.equal(
        before.encoded["encoder_outputs"][0], after.encoded["encoder_outputs"][0]
    )
    assert 0 < float((after.score(root).logits - logits).abs().max() / logits.std()) < 0.2
    assert check_target(target) == 0.0


def test_a_decoder_with_parts_of_its_own_is_left_to_transformers() -> None:
    config = tf.UMT5Config(**_T5)  # a table of relative positions in every layer
    target = best_target(tf.UMT5ForConditionalGeneration(config).eval())
    assert type(target) is HubTarget and "relative_attention_bias" in target.why_general


def test_sources_are_joined_by_hand() -> None:
    def source(length: int, live: list[int] | None) -> Stored:
        keys = torch.arange(float(length)).reshape(1, 1, 1, length, 1)
        seen = None if live is None else torch.tensor([live], dtype=torch.int32)
        return Stored(keys, -keys, length, torch.tensor([length if live is None else 1]), seen)

    both = join_sources(source(2, None), source(3, [2, 0, 1]))
    assert both.keys.flatten().tolist() == [0, 1, 0, 0, 1, 2]
    assert both.values[0, 1].flatten().tolist() == [0, -1, -2]
    assert both.lengths.tolist() == [2, 1] and both.used == 3
    assert both.live is not None and both.live.tolist() == [[0, 1, 0], [2, 0, 1]]
