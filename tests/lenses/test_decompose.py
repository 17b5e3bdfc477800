"""Decompositions: sums of hand examples, exactness in a linear model, and refusals."""

import pytest
import torch
import transformers as tf
from test_sites import made
from torch import nn

from isthmus.errors import InvalidInputError, UnknownNameError, UnsupportedModelError
from isthmus.lenses.decompose import ACTIVATIONS, Decomposition, norm_scale
from isthmus.lenses.sites import probe_of
from isthmus.lenses.wiring import Wiring
from isthmus.models.vision_transformer import Block

DOUBLE = torch.float64
ENCODER = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "num_labels": 3,
}
MAKERS = {
    "Bert": lambda: tf.BertForSequenceClassification(tf.BertConfig(**ENCODER)),
    "BertMLM": lambda: tf.BertForMaskedLM(tf.BertConfig(**ENCODER, hidden_act="relu")),
    "Roberta": lambda: tf.RobertaForSequenceClassification(tf.RobertaConfig(**ENCODER)),
    "PreNorm": lambda: tf.RobertaPreLayerNormForSequenceClassification(
        tf.RobertaPreLayerNormConfig(**ENCODER)
    ),
    "DistilBert": lambda: tf.DistilBertForSequenceClassification(
        tf.DistilBertConfig(vocab_size=64, dim=32, n_layers=2, n_heads=4, hidden_dim=48)
    ),
    "GPT2": lambda: tf.GPT2ForSequenceClassification(
        tf.GPT2Config(
            vocab_size=64, n_embd=32, n_layer=2, n_head=4, pad_token_id=0, bos_token_id=1,
            eos_token_id=1,
        )
    ),
}  # fmt: skip


def model(name: str):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = MAKERS[name]()
        with torch.no_grad():  # fresh biases are 0 and fresh weights small: nothing to share
            for p in found.parameters():
                p.mul_(4) if p.ndim == 2 else p.add_(0.1 * torch.randn_like(p))
    return found.double().eval()


def parts(n=2, t=4, d=6, share="absdot"):
    x = torch.randn(n, t, d, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    return x, Decomposition.of_tokens(x, share)


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_parts_add_up_at_every_layer_and_to_the_logits(name):
    inside = model(name)
    probe = probe_of(inside)
    wiring = Wiring(inside, probe)
    ids = torch.tensor([[5, 9, 33, 7, 12], [6, 9, 9, 40, 3]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    seen, logits = wiring.trace(inputs)
    for share, bend in (("absdot", "origin"), ("source", "tangent"), ("equal", "origin")):
        x = wiring.start(seen, 0, share)
        for i in range(2):
            x = wiring.through(x, i, seen, bend)
            assert x.error(seen[f"post.{i}"]) < 1e-12
        scores = wiring.above(x, seen["post.1"], bend)
        assert scores.error(logits.reshape(scores.total().shape)) < 1e-12
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in inside.modules())


def test_parts_are_the_exact_contributions_in_a_linear_model():
    # Values and feed-forwards without biases, no activation, patterns that do not depend on the
    # tokens, norms that do nothing: then a token's part is what the model computes of it alone.
    inside = model("Roberta")
    with torch.no_grad():
        for name, p in inside.named_parameters():
            if "query" in name or "key" in name or name.endswith("bias"):
                p.zero_()
            if "LayerNorm" in name:
                p.fill_(float(name.endswith("weight")))

    class Same(nn.Module):
        weight = None

        def forward(self, x):
            return x

    for layer in inside.roberta.encoder.layer:
        layer.intermediate.intermediate_act_fn = Same()
    x = torch.randn(1, 4, 32, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    heads = torch.full((1, 4, 4, 4), 0.25, dtype=DOUBLE)
    layer = inside.roberta.encoder.layer[0]
    value, out = layer.attention.self.value.weight, layer.attention.output.dense.weight
    one, two = layer.intermediate.dense.weight, layer.output.dense.weight

    def whole(y):  # without norms
        mid = y.mean(1, keepdim=True).expand_as(y) @ value.T @ out.T + y
        return mid @ one.T @ two.T + mid

    d = Decomposition.of_tokens(x)
    carried = (d.values @ value.T).unflatten(-1, (4, 8))
    mid = d.attend(heads, carried, out.T.unflatten(0, (4, 8))) + d
    inner = mid.linear(one.T).bend("identity", mid.total() @ one.T)
    got = inner.linear(two.T) + mid
    for s in range(4):
        alone = torch.zeros_like(x)
        alone[:, s] = x[:, s]
        assert torch.allclose(got.values[:, :, s], whole(alone), atol=1e-10)


def test_biases_are_shared_as_they_say():
    b = torch.tensor([1.0, 0.0], dtype=DOUBLE)
    x = torch.tensor([[[[3.0, 4.0], [-1.0, 0.0]]]], dtype=DOUBLE)  # sizes 5 and 1, along b 3 and 1
    for share, want in (
        ("absdot", [3 / 4, 1 / 4]),
        ("norm", [5 / 6, 1 / 6]),
        ("equal", [1 / 2, 1 / 2]),
        ("first", [1.0, 0.0]),
        ("source", [0.0, 1.0]),
    ):
        added = Decomposition(x, share).plus(b).values - x
        assert added[0, 0, :, 0].tolist() == pytest.approx(want)
        assert float(added[..., 1].abs().max()) == 0
    across = Decomposition(x).plus(torch.zeros(2, dtype=DOUBLE))
    assert torch.equal(across.values, x)  # nothing to share, nothing divided by 0
    assert Decomposition.of_tokens(x[:, 0], "source").values.shape == (1, 2, 3, 2)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_lines_go_through_what_the_activation_gives_also_at_zero(activation):
    z = torch.tensor([[[0.0, 1e-9, -2.0, 3.0]]], dtype=DOUBLE)
    x = Decomposition(torch.stack([2 * z, -z], 2))
    for how in ("origin", "tangent"):
        bent = x.bend(activation, z, how)
        assert torch.allclose(bent.total(), ACTIVATIONS[activation](z), atol=1e-12)
        assert bool(bent.values.isfinite().all())
    # at 0 the slope is the limit: a half for gelu, not something by an epsilon
    apart = Decomposition(torch.tensor([[[[2.0], [-2.0]]]], dtype=DOUBLE))
    slope = apart.bend("gelu", torch.zeros(1, 1, 1, dtype=DOUBLE)).values[0, 0, 0, 0] / 2
    assert float(slope) == pytest.approx(0.5)


def test_norms_keep_the_sum_and_other_modules_are_refused():
    x, d = parts()
    for norm in (nn.LayerNorm(6), nn.RMSNorm(6, eps=1e-6), nn.LayerNorm(6, bias=False)):
        nn.init.uniform_(norm.weight, 0.5, 2.0)
        norm.double()
        with torch.no_grad():
            assert d.norm(norm, x).error(norm(x)) < 1e-12
            assert norm_scale(norm, x)[1] == isinstance(norm, nn.LayerNorm)
    with pytest.raises(InvalidInputError, match="neither LayerNorm"):
        d.norm(nn.Linear(6, 6).double(), x)


def test_what_is_put_together_otherwise_is_refused_by_name():
    with pytest.raises(UnsupportedModelError, match=r"layers\.0: its mlp_out"):
        Wiring(made("Llama"), probe_of(made("Llama")))
    with pytest.raises(UnsupportedModelError, match="side by side"):
        Wiring(made("Phi"), probe_of(made("Phi")))
    with pytest.raises(UnsupportedModelError, match="one stack"):
        Wiring(made("T5"), probe_of(made("T5")))
    inside = MAKERS["Bert"]().eval()
    inside.classifier = nn.Sequential(inside.classifier, nn.Softmax(-1))
    with pytest.raises(UnsupportedModelError, match=r"to the logits; it was lost after classif"):
        Wiring(inside, probe_of(inside))
    with pytest.raises(UnknownNameError, match="absdot"):
        Decomposition.of_tokens(torch.ones(1, 1, 1), "absdot ")
    with pytest.raises(UnknownNameError, match="origin"):
        parts()[1].bend("relu", parts()[0], "origine")


def test_our_own_attention_shows_its_pattern_to_a_hook_and_only_then():
    block = Block(8, 2, 16).eval()
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    tap, seen = block.attention.tap_pattern, []
    mask = torch.tensor([True, True, False, True, True])[None]
    for arguments in ({}, {"mask": mask}, {"mask": mask.float()}, {"causal": True}):
        fused = block.attention(x, **arguments)
        handle = tap.register_forward_hook(lambda m, a, out: seen.append(out.detach()))
        shown = block.attention(x, **arguments)
        handle.remove()
        assert torch.allclose(fused, shown, atol=1e-6)
        assert torch.allclose(seen[-1].sum(-1), torch.ones(2, 2, 5), atol=1e-6)
    assert len(seen) == 4 and float(seen[1][..., 2].max()) == 0
    assert float(seen[3].triu(1).abs().max()) == 0
