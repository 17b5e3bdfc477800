"""Carving: the cut-up layer is the layer, and transformers loads what is written."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, BertModel

from isthmus.errors import InvalidInputError, MissingExtraError, UnsupportedModelError
from isthmus.nn.moe import Context
from isthmus.nn.routers import AllExperts, SoftmaxRouter
from isthmus.surgery.base import sites
from isthmus.surgery.carve import (
    Split,
    balanced_clusters,
    carve,
    fit_linear_router,
    share_out,
    weights_of,
)
from isthmus.surgery.moe_export import to_native

F = 24
TARGETS = ("mixtral", "granitemoeshared", "qwen2_moe", "glm4_moe")


def dense(kind: str = "llama", **changes):
    torch.manual_seed(3)
    sizes = {
        "vocab_size": 61, "hidden_size": 16, "intermediate_size": F, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5_000.0},
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    config = AutoConfig.for_model(kind, **sizes | changes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.3)
        else:
            torch.nn.init.uniform_(p, 0.5, 1.5)
    return model.eval()


def logits(model) -> torch.Tensor:
    ids = torch.arange(30).view(2, 15) % 61
    with torch.no_grad():
        return model(input_ids=ids).logits


def splits(shared: int, experts: int, layers: int = 2) -> list[Split]:
    draw = torch.Generator().manual_seed(5)
    return [share_out(F, shared, experts, draw) for _ in range(layers)]


@pytest.mark.parametrize("kind", ["llama", "phi3"])
def test_a_carved_layer_with_all_experts_is_the_dense_one(kind):
    model = dense(kind)
    before = logits(model)
    for site, split in zip(sites(model, "ffn"), splits(1, 5), strict=True):
        layer = carve(model, site, split, AllExperts(5))
        assert layer.experts.down_proj.shape == (5, 16, 4)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5 * float(before.abs().max()))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_native_mixture_with_all_experts_is_the_dense_model_and_reloads(target, kind, tmp_path):
    if kind == "qwen2" and target == "mixtral":
        with pytest.raises(UnsupportedModelError, match="cannot be written as mixtral"):
            to_native(dense(kind), splits(0, 6), target=target)  # biases of q, k, v
        return
    if kind == "qwen2" and target == "granitemoeshared":
        with pytest.raises(UnsupportedModelError, match="o_proj"):
            to_native(dense(kind), splits(2, 4), target=target)
        return
    model = dense(kind)
    before = logits(model)
    made = to_native(model, splits(0 if target == "mixtral" else 2, 4 + 2 * (target == "mixtral")),
                     target=target)  # fmt: skip
    assert made.config.model_type == target
    atol = 1e-5 * float(before.abs().max())
    torch.testing.assert_close(logits(made), before, rtol=0, atol=atol)
    made.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert type(again) is type(made) and torch.equal(logits(again), logits(made))
    ids = torch.tensor([[4, 5, 6]])
    whole = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(again.generate(ids, max_new_tokens=8, do_sample=False), whole)


@pytest.mark.parametrize("target", TARGETS)
def test_a_native_mixture_computes_what_the_carved_model_does(target):
    """Two of the experts: softmax weights normalised over them, times 2, or even ones."""
    parts = splits(0 if target == "mixtral" else 1, 5 + (target == "mixtral"))
    count = len(parts[0].routed)
    torch.manual_seed(7)
    routers = [torch.randn(count, 16) for _ in parts]
    made = to_native(dense(), parts, routers, 2, target)
    even = to_native(dense(), parts, routers, 2, target, even=True)
    ours = dense()
    for site, split, matrix in zip(sites(ours, "ffn"), parts, routers, strict=True):
        router = SoftmaxRouter(16, count, 2, weights="renormalised", scale=2.0)
        router.weight.data = matrix
        carve(ours, site, split, router)
    if target == "glm4_moe":  # sigmoids instead
        assert not torch.allclose(logits(ours), logits(made), atol=1e-3)
    else:
        torch.testing.assert_close(logits(ours), logits(made), rtol=1e-4, atol=1e-4)
    for layer in ours.model.layers:
        layer.mlp.router.weight.data *= 1e-3
    found, wanted = logits(even), logits(ours)
    assert (found - wanted).norm() < 0.03 * wanted.norm()


def test_a_bias_goes_into_glm_alone():
    parts, biases = splits(1, 5), [torch.tensor([0.0, 9, 0, 0, 8])] * 2
    made = to_native(dense(), parts, None, 2, "glm4_moe", biases=biases)
    chosen = made.model.layers[0].mlp.gate(torch.randn(7, 16))[2].sort(-1).values
    assert (chosen == torch.tensor([1, 4])).all()
    with pytest.raises(InvalidInputError, match="glm4_moe has one"):
        to_native(dense(), parts, None, 2, "qwen2_moe", biases=biases)


def test_balanced_clusters_are_the_best_of_all_equal_ones():
    torch.manual_seed(0)
    points = torch.randn(6, 3)
    centroids = points[[0, 3]]
    found = balanced_clusters(points, centroids)
    cost = torch.cdist(points, centroids, p=1)

    def total(first) -> float:
        rest = [i for i in range(6) if i not in first]
        return float(cost[list(first), 0].sum() + cost[rest, 1].sum())

    best = min(itertools.combinations(range(6), 3), key=total)
    assert sorted(found[0].tolist()) == list(best)
    assert sorted(found.flatten().tolist()) == list(range(6))
    for cluster in found:  # the first one stands for it
        far = (points[cluster] - points[cluster].mean(0)).abs().sum(1)
        assert far[0] == far.min()


def test_a_linear_router_learns_what_is_linear():
    torch.manual_seed(0)
    true, x = torch.randn(4, 8), torch.randn(600, 8)
    wanted = torch.nn.functional.one_hot((x @ true.T).argmax(1), 4).float()
    fitted = SoftmaxRouter(8, 4, 1)
    fitted.weight.data = fit_linear_router(x[:500], wanted[:500])
    chosen = fitted(x[500:], Context()).routing
    order = chosen.token.argsort()
    assert (chosen.expert[order] == wanted[500:].argmax(1)).float().mean() > 0.9


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: share_out(24, 1, 6), r"24 hidden units cannot be cut into 7 .* 6, 8, 12"),
        (lambda: to_native(dense(), splits(1, 5), target="mixtral"), "mixtral has no shared"),
        (lambda: to_native(dense(), splits(0, 6)), "write mixtral"),
        (lambda: to_native(dense(), splits(1, 5, 1)), "one split for each of 2"),
        (lambda: to_native(dense(), splits(1, 5), top_k=6, routers=[torch.zeros(5, 16)] * 2),
         "top_k must lie between 1 and 5"),
        (lambda: to_native(dense(), splits(1, 5), [torch.zeros(5, 9)] * 2), "5 x 16"),
        (lambda: to_native(dense(), splits(1, 5), target="switch"), "target must be one of"),
        (lambda: to_native(dense(), [Split(torch.arange(4), torch.arange(20).view(5, 4))] * 2),
         "exactly once; it places 24, 20"),
    ],
)  # fmt: skip
def test_bad_input(make, says):
    with pytest.raises(InvalidInputError, match=says):
        make()


def test_models_that_cannot_be_carved_say_why():
    bert = BertModel(BertConfig(vocab_size=31, hidden_size=16, num_hidden_layers=1,
                                num_attention_heads=2, intermediate_size=F)).eval()  # fmt: skip
    with pytest.raises(UnsupportedModelError, match="has biases"):
        weights_of(bert, sites(bert, "ffn")[0])
    scaled = dense("gemma", head_dim=8, hidden_activation="gelu_pytorch_tanh")
    with pytest.raises(UnsupportedModelError, match=r"else than a Llama|not laid out"):
        to_native(scaled, splits(1, 5))


def test_clusters_without_scipy_say_which_extra_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(MissingExtraError, match=r"isthmus\[shrink\]"):
        balanced_clusters(torch.randn(4, 2), torch.randn(2, 2))
