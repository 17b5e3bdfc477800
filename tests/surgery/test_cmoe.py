"""CMoE: a surgery like any other; partitions, the computed router, the native twin."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import isthmus.surgery.export as folders
from isthmus.decoding.model import Model
from isthmus.decoding.target import HubTarget
from isthmus.errors import InvalidInputError, UnsupportedModelError
from isthmus.nn.moe import MoE, routings
from isthmus.signals.tokenizer import byte_tokenizer
from isthmus.surgery.base import Steps, sites
from isthmus.surgery.calibration import Calibration, Reservoir, capture
from isthmus.surgery.carve import balanced_clusters, weights_of
from isthmus.systems.surgery.cmoe import Cmoe, Settings
from isthmus.testing import check_surgery
from isthmus.training.drafting import Recipe
from isthmus.training.expert_tuning import tune_layers

sys.path.insert(0, str(Path(__file__).parents[1] / "decoding"))
import tiny

FOUR = Settings(parts=4)


def data(seed=0, rows=6, length=20):
    ids = torch.randint(3, tiny.V, (rows, length), generator=torch.Generator().manual_seed(seed))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    return Calibration((batch,), "random")


@pytest.fixture(scope="module")
def model():
    return tiny.network("Llama", "float32")


@pytest.mark.parametrize(
    "settings", [FOUR, Settings(4, normalised=False, split="random", router="random")], ids=str
)
def test_contract(model, settings):
    report = check_surgery(Cmoe(settings), model, data(), 0.5, tolerance=1e-5)
    assert not report.native and all(0 < c.error < 2 for c in report.changes)
    hidden = sites(model, "ffn")[0].axes["hidden"]
    width = model.config.hidden_size
    assert report.before.active == len(report.changes) * 3 * width * hidden
    # two rows and a scale for each of three experts
    router, scales = (0, 0) if settings.router == "random" else (3 * 2 * width, 3)
    each = report.changes[0].after
    assert each.parameters == 3 * width * hidden + router + scales
    assert each.active == 3 * width * hidden // 2 + router + scales


def test_what_a_plan_says_of_a_layer_is_the_paper_s_recipe(model):
    """Step by step, over again, with loops."""
    plan = Cmoe(replace(FOUR, representative="nearest")).plan(model, data(), 0.5)
    site = sites(model, "ffn")[0]
    weights = weights_of(model, site)
    x = capture(model, [site], data(), lambda: Reservoir(999))[site.path].rows
    unit = F.normalize(x, dim=1)
    gate, up = F.normalize(weights.gate, dim=1), F.normalize(weights.up, dim=1)
    hidden = F.silu(unit @ gate.T) * (unit @ up.T)
    marks = torch.zeros_like(hidden)
    for row, values in zip(marks, hidden, strict=True):
        row[values.abs().topk(10).indices] = 1
    shared, routed = plan.tensors[f"{site.path}/shared"], plan.tensors[f"{site.path}/routed"]
    rate = marks.mean(0)
    rest = [u for u in range(len(rate)) if u not in shared.tolist()]
    assert rate[shared].min() >= rate[rest].max()
    assert sorted([*shared.tolist(), *routed.flatten().tolist()]) == list(range(len(rate)))
    busiest = sorted(rest, key=lambda u: -rate[u])
    wanted = balanced_clusters(marks.T[busiest], marks.T[busiest[:3]])
    assert torch.equal(routed, torch.tensor(busiest)[wanted])
    ours = Cmoe(FOUR).plan(model, data(), 0.5).tensors[f"{site.path}/routed"]
    for same, cluster in zip(ours, routed, strict=True):
        assert sorted(same.tolist()) == sorted(cluster.tolist())
        assert rate[same[0]] == rate[cluster].max()


def test_the_router_is_the_size_of_one_unit_of_each_expert(model):
    changed = copy.deepcopy(model)
    surgeon = Cmoe(FOUR)
    plan = surgeon.plan(model, data(), 0.5)
    surgeon.apply(changed, plan)
    site = sites(model, "ffn")[0]
    layer = changed.get_submodule(site.path)
    assert isinstance(layer, MoE) and layer.router.top_k == 1
    weights = weights_of(model, site)
    x = torch.randn(9, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    first = plan.tensors[f"{site.path}/routed"][:, 0]
    g, u = F.normalize(weights.gate[first], dim=1), F.normalize(weights.up[first], dim=1)
    r = (F.silu(x @ g.T) * (x @ u.T)).abs()
    with routings(layer) as found:
        y = layer(x)
    routing = found["router"].routing
    assert torch.equal(routing.expert[routing.token.argsort()], r.argmax(1))
    assert torch.equal(routing.weight, torch.ones(9))
    layer.router.bias[2] = 9.0  # decides, does not weigh
    there = r.argmax(1) == 2
    torch.testing.assert_close(layer(x)[there], y[there])  # more rows at once round otherwise
    with routings(layer) as found:
        layer(x)
    assert (found["router"].routing.expert == 2).all()


def test_a_carved_model_survives_its_folder(model, tmp_path):
    changed, surgeon = copy.deepcopy(model), Cmoe(FOUR)
    plan = surgeon.plan(model, data(), 0.5, Steps(tmp_path / "steps", "k"))
    report = surgeon.apply(changed, plan)
    folders.export(changed, None, plan, report, tmp_path / "out", original=model)
    again, _ = folders.load_own(tmp_path / "out")
    ids = data(1).batches[0]["input_ids"]
    assert torch.equal(again(input_ids=ids).logits, changed(input_ids=ids).logits)
    wanted = again.generate(ids[:1, :4], max_new_tokens=5, do_sample=False)[0, 4:].tolist()
    engine = Model(HubTarget(again), byte_tokenizer())
    assert engine.generate(ids[0, :4], max_new_tokens=5, drafter="prompt-lookup").tokens == wanted


def test_its_native_twin_routes_much_alike(model):
    surgeon = Cmoe(FOUR)
    whole = surgeon.native(model, surgeon.plan(model, data(), 1.0), data(), "granitemoeshared")
    ids = data(1).batches[0]["input_ids"]
    wanted = model(input_ids=ids).logits
    torch.testing.assert_close(whole(input_ids=ids).logits, wanted, rtol=1e-3, atol=1e-2)
    half = surgeon.native(model, surgeon.plan(model, data(), 0.5), data())
    assert half.config.model_type == "qwen2_moe" and half.config.num_experts_per_tok == 1
    assert (half(input_ids=ids).logits - wanted).norm() < 0.5 * wanted.norm()


def test_a_short_tuning_moves_the_layers_alone_and_lowers_the_loss(model):
    changed, surgeon = copy.deepcopy(model), Cmoe(FOUR)
    surgeon.apply(changed, surgeon.plan(model, data(), 0.5))
    before = {k: v.clone() for k, v in changed.state_dict().items()}
    texts = data(3, 8, 24)
    start = texts.loss(changed)
    recipe = Recipe(steps=12, batch_size=8, learning_rate=1e-2)
    tune_layers(changed, texts.batches[0]["input_ids"], recipe)
    assert texts.loss(changed) < start - 0.05
    moved = {k for k, v in changed.state_dict().items() if not torch.equal(v, before[k])}
    assert moved and all(".mlp." in name for name in moved)
    assert any(name.endswith("router.bias") for name in moved)
    assert any(name.endswith("router.scale") for name in moved)


@pytest.mark.parametrize(
    ("settings", "budget", "says"),
    [
        (FOUR, 0.6, "give one of 0.5, 0.75, 1"),
        (FOUR, 0.25, "leaves one to route"),
        (Settings(parts=4, shared=2), 0.5, "give one of 0.75, 1"),
        (Settings(parts=7), 1.0, "cannot be cut into 7 equal parts"),
    ],
)
def test_budgets_that_cannot_be_met(model, settings, budget, says):
    with pytest.raises(InvalidInputError, match=says):
        Cmoe(settings).plan(model, data(), budget)


def test_bad_input():
    with pytest.raises(InvalidInputError, match="activation or random"):
        Settings(split="kmeans")
    with pytest.raises(InvalidInputError, match="parts is at least 2"):
        Settings(parts=1)
    plain = tiny.network("GPT2", "float32")
    with pytest.raises(UnsupportedModelError, match="biases"):
        Cmoe(FOUR).plan(plain, data(), 0.5)
