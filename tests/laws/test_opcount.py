"""Counted operations against closed forms, and closed forms against hand arithmetic."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

from isthmus.decoding.target import HubTarget
from isthmus.errors import InvalidInputError
from isthmus.laws.opcount import Footprint, Work, count, matmul, training
from isthmus.models.hub import cache_argument

sys.path.insert(0, str(Path(__file__).parent.parent / "decoding"))
import tiny

WIDE = {
    "vocab_size": 2048,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
}


def meta_llama(**changes: Any) -> Any:
    with torch.device("meta"):
        return tf.LlamaForCausalLM(tf.LlamaConfig(**(WIDE | changes))).eval()


def footprint(kv_heads: int = 16) -> Footprint:
    """The Llama above by hand: 4 layers, 64 numbers a head, float32."""
    layer = 2 * 1024 * 1024 + 2 * 1024 * 64 * kv_heads + 3 * 1024 * 2816
    weights = 4 * layer + 2048 * 1024
    return Footprint(
        weights,
        4 * weights,
        row_bytes=4 * 1024,
        cache_bytes=4 * 2 * kv_heads * 64 * 4,
        attention=4 * 2 * 1024,
    )


def run(model: Any, nodes: int, cached: int = 0) -> Any:
    cache = tf.DynamicCache()
    if cached:
        mask = torch.zeros(1, 1, cached, cached, device="meta")
        ids = torch.zeros(1, cached, dtype=torch.int64, device="meta")
        model(ids, attention_mask=mask, **{cache_argument(model): cache})
    ids = torch.zeros(1, nodes, dtype=torch.int64, device="meta")
    mask = torch.zeros(1, 1, nodes, cached + nodes, device="meta")
    return count(model, ids, attention_mask=mask, **{cache_argument(model): cache})


def test_a_product_is_counted_as_its_closed_form() -> None:
    a, b = torch.ones(7, 11), torch.ones(11, 13)
    assert count(torch.mm, a, b).total == matmul(7, 11, 13)
    half = count(torch.mm, a.bfloat16(), b.bfloat16())
    assert half.bytes == matmul(7, 11, 13, itemsize=2).bytes
    assert training(matmul(7, 11, 13)).flops == 3 * 2 * 7 * 11 * 13


def test_what_moves_and_what_does_not() -> None:
    x = torch.zeros(8, 8)
    table = nn.Embedding(1000, 8)
    rows = torch.tensor([3, 5])
    assert count(lambda: x.view(64).t().unsqueeze(0)).bytes == 0
    assert count(lambda: torch.empty(5, 5)).bytes == 0
    assert count(x.add_, 1.0).bytes == 2 * 256, "in place: read and written"
    assert count(x.copy_, torch.ones(8, 8)).bytes == 2 * 256, "what was there is not read"
    assert count(x.zero_).bytes == 256
    assert count(torch.add, x, x).bytes == 2 * 256, "one tensor twice is read once"
    assert count(torch.add, x, torch.ones(8, 1).expand(8, 8)).bytes == 256 + 32 + 256
    assert count(table, rows).bytes == 2 * 8 + 2 * 2 * 32, "rows are read, not tables"
    linear = nn.Linear(8, 8)
    assert count(linear, x).bytes == 3 * 256 + 32
    with torch.inference_mode():
        assert count(linear, x).flops == 2 * 8**3


@pytest.mark.parametrize("kv_heads", [16, 4])
def test_a_decoder_step_within_two_percent(kv_heads: int) -> None:
    model = meta_llama(num_key_value_heads=kv_heads)
    want = footprint(kv_heads).forward(1, 16)
    got = run(model, 1, 16)
    assert got.flops == pytest.approx(want.flops, rel=0.02)
    assert got.bytes == pytest.approx(want.bytes, rel=0.02)
    assert {"LlamaForCausalLM.lm_head", "LlamaForCausalLM.model.layers.3.mlp.up_proj"} <= {
        op.module for op in got.ops
    }


def test_a_prompt_and_a_tree_within_two_percent() -> None:
    model = meta_llama()
    for nodes, cached in ((512, 0), (16, 256)):
        assert run(model, nodes, cached).flops == pytest.approx(
            footprint().forward(nodes, cached).flops, rel=0.02
        )


def test_an_encoder_within_two_percent() -> None:
    config = tf.BertConfig(
        vocab_size=512,
        hidden_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=1024,
    )
    with torch.device("meta"):
        model = tf.BertModel(config, add_pooling_layer=False).eval()
    ids = torch.zeros(1, 128, dtype=torch.int64, device="meta")
    mask = torch.zeros(1, 1, 128, 128, device="meta")
    weights = 2 * (4 * 256 * 256 + 2 * 256 * 1024)
    want = Footprint(weights, 4 * weights, attention=2 * 2 * 256).forward(128)
    assert count(model, ids, attention_mask=mask).flops == pytest.approx(want.flops, rel=0.02)


def test_the_footprint_of_a_target_agrees_with_what_it_runs() -> None:
    for name in ("Llama", "GPT2", "Qwen3"):
        target = tiny.target(name)
        found = Footprint.of(target)
        table = count(target.forward, torch.ones(1, 24, dtype=torch.int64))
        # norms are multiplied, too, but not by a matrix
        assert found.forward(24).flops == pytest.approx(table.flops, rel=0.05), name


def test_the_footprint_by_hand() -> None:
    llama = Footprint.of(tiny.target("Llama"))
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32
    assert llama.weights == 2 * layer + 32 + 64 * 32, "the head is read, the embeddings are not"
    assert llama.weight_bytes == 8 * llama.weights
    assert (llama.row_bytes, llama.cache_bytes) == (32 * 8, 2 * 2 * 2 * 8 * 8)
    assert llama.attention == 2 * 2 * 32
    assert llama.window is None and Footprint.of(tiny.target("Mistral")).window == 5


def test_of_a_mixture_the_active_experts_count() -> None:
    config = tf.MixtralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=1,
    )
    found = Footprint.of(HubTarget(tf.MixtralForCausalLM(config).eval()))
    expert, rest = 3 * 16 * 24, 4 * 16 * 16 + 4 * 16 + 3 * 16 + 32 * 16
    assert found.weights == expert + rest, "one expert, attention, router, norms and head"


@pytest.mark.parametrize("name", ["T5", "Bart"])
def test_of_an_encoder_decoder_the_decoder_counts(name: str) -> None:
    target = tiny.target(name)
    found = Footprint.of(target)
    everything = sum(p.numel() for p in target.model.parameters())
    assert 0 < found.weights < everything / 1.5
    every_token = count(
        target.forward,
        torch.ones(1, 1, dtype=torch.int64),
        encoded=target.encode(**target.probe_inputs()),
    )
    once = [
        op
        for op in every_token.ops
        if op.module.endswith((".EncDecAttention.k", ".encoder_attn.k_proj"))
    ]
    assert once, "a step without a cache computes keys and values of the source"
    source = 2 * 2 * 5 * 32 * 32 * 2  # two layers, keys and values, 5 tokens
    assert found.forward(1, source=5).flops == pytest.approx(every_token.flops - source, rel=0.05)
    longer = found.forward(1, 4, source=100).bytes - found.forward(1, 4, source=10).bytes
    assert longer == 90 * found.source_bytes > 0


def test_a_batch_shares_the_weights() -> None:
    one, four = footprint().forward(1, 64), footprint().forward(1, 64, batch=4)
    assert four.flops == 4 * one.flops
    assert four.bytes - one.bytes == 3 * (footprint().cache_bytes * 65 + 4096)


def test_generation_is_the_sum_of_its_steps() -> None:
    steps = footprint().generation(10, 3)
    assert steps == [
        footprint().forward(10),
        footprint().forward(1, 10),
        footprint().forward(1, 11),
    ]
    assert sum(steps, Work(0, 0)).flops > 12 * 2 * footprint().weights


@pytest.mark.parametrize(
    "options", [{"nodes": 0}, {"nodes": 1, "batch": 0}, {"nodes": 1, "cached": -1}]
)
def test_nothing_to_compute_is_refused(options: dict[str, int]) -> None:
    with pytest.raises(InvalidInputError, match="at least one token"):
        footprint().forward(**options)
