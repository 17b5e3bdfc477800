"""SCAP: identities by hand, modes against scipy, the contract, files, and a claim of seconds."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
from scipy.stats import gaussian_kde

from isthmus.claims import Ruler
from isthmus.errors import InvalidInputError
from isthmus.nn.sparse_gemv import ThresholdedLinear
from isthmus.surgery.base import sites
from isthmus.surgery.calibration import Calibration
from isthmus.surgery.export import export
from isthmus.surgery.inputs import Trial, density_mode, feed_forward_groups, skipped_units
from isthmus.systems.surgery.scap import Scap, Settings, claim
from isthmus.testing import check_surgery


def llama() -> tf.LlamaForCausalLM:
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=60,
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=12,
    )
    model = tf.LlamaForCausalLM(config).eval()
    for p in model.parameters():
        if p.ndim > 1:
            p.data.mul_(8)
    return model


def samples(rows: int = 8, length: int = 24, pad: int = 0) -> Calibration:
    ids = torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    if pad:
        ids[:, -pad:], mask[:, -pad:] = 0, 0
    batches = [
        {"input_ids": i, "attention_mask": m, "labels": i}
        for i, m in zip(ids.split(4), mask.split(4), strict=True)
    ]
    return Calibration(tuple(batches), "random")


def test_inputs_near_the_mode_count_as_the_mode() -> None:
    torch.manual_seed(1)
    dense = torch.nn.Linear(20, 12)
    layer = ThresholdedLinear.of(dense.weight, dense.bias)
    x = torch.randn(5, 20) + 0.7
    for mode in (0.0, 0.7, -3.0):
        layer.set(mode, 0.0)  # nothing is skipped: the dense layer, whatever the mode
        with torch.no_grad():
            torch.testing.assert_close(layer(x), dense(x), rtol=1e-5, atol=1e-5)
            layer.set(mode, 0.5)
            near = torch.where((x - mode).abs() <= 0.5, mode, x)
            torch.testing.assert_close(layer(x), dense(near), rtol=1e-5, atol=1e-5)
            one = layer(x[:1])  # sparse, where the batch was dense
            torch.testing.assert_close(one, dense(near[:1]), rtol=1e-5, atol=1e-5)
    with pytest.raises(InvalidInputError, match="threshold must be 0 or more"):
        layer.set(0.0, -1.0)


@pytest.mark.parametrize("bandwidth", [0.5, 0.1])
def test_the_densest_place_is_that_of_scipy(bandwidth: float) -> None:
    rng = np.random.default_rng(3)
    x = np.concatenate([rng.normal(-0.1, 0.05, 600), rng.exponential(1.0, 400)])
    at = np.linspace(x.min(), x.max(), 4001)
    wanted = at[gaussian_kde(x, bandwidth)(at).argmax()]
    found = density_mode(torch.tensor(x), bandwidth)
    assert found == pytest.approx(wanted, abs=2 * np.ptp(x) / 2000)
    assert density_mode(torch.ones(4)) == 1.0


def test_the_contract_and_the_sparsity_that_was_asked_for() -> None:
    model, data = llama(), samples()
    report = check_surgery(Scap(Settings(rounds=3)), model, data, 0.6)
    skipped = 1 - report.after.active / report.before.active
    assert skipped == pytest.approx(0.4, abs=0.02) and not report.native
    assert report.after.parameters == report.before.parameters
    plan = Scap(Settings(rounds=3)).plan(model, data, 0.6)
    for note in plan.notes["sites"].values():
        assert note["sparsity"] == pytest.approx(note["wanted"], abs=0.02)
    changed = copy.deepcopy(model)
    Scap().apply(changed, plan)
    mlp = changed.model.layers[0].mlp
    assert (mlp.gate_proj.mode, mlp.gate_proj.threshold) == (
        mlp.up_proj.mode,
        mlp.up_proj.threshold,
    )


def test_centring_finds_what_mode_zero_does_not() -> None:
    # hidden units behind a GELU, most of them at its floor
    x = torch.nn.functional.gelu(
        torch.randn(400, 32, generator=torch.Generator().manual_seed(2)) - 1
    )
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(4))
    mode, _, error = Scap().threshold(x, weight, 0.6)
    _, _, off = Scap(Settings(centre=False)).threshold(x, weight, 0.6)
    assert -0.17 < mode < -0.05 and error < 0.5 * off


def test_padding_is_in_no_statistic() -> None:
    model, data = llama(), samples(pad=6)
    whole = samples()
    cut = replace(data, batches=tuple({k: v[:, :-6] for k, v in b.items()} for b in whole.batches))
    wanted, found = (Scap(Settings(ratio=1.0)).plan(model, d, 0.5).notes for d in (cut, data))
    for path, note in wanted["sites"].items():
        assert found["sites"][path]["threshold"] == pytest.approx(note["threshold"], rel=1e-4)


def test_only_the_last_matrix_and_other_families() -> None:
    torch.manual_seed(0)
    model = tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=60, n_embd=24, n_layer=2, n_head=2)).eval()
    data = samples()
    plan = Scap(Settings(inputs=False)).plan(model, data, 0.75)  # half of a half
    assert [p.rsplit(".", 1)[1] for p in plan.notes["sites"]] == ["c_proj"] * 2
    assert all(n["sparsity"] == pytest.approx(0.5, abs=0.02) for n in plan.notes["sites"].values())
    report = Scap().apply(copy.deepcopy(model), plan)
    assert report.after.active < report.before.active
    with pytest.raises(InvalidInputError, match=r"budget of 0\.4 cannot be met"):
        Scap(Settings(inputs=False)).plan(model, data, 0.4)
    with pytest.raises(InvalidInputError, match="scap needs 1 round"):
        Settings(rounds=0)


def test_it_is_saved_loaded_and_says_when_data_is_too_little(tmp_path: Path) -> None:
    model, data = llama(), samples()
    plan = Scap().plan(model, data, 0.5)
    changed = copy.deepcopy(model)
    report = Scap().apply(changed, plan)
    export(changed, None, plan, report, tmp_path / "out", original=model)
    sites_read = plan.notes["sites"]
    for note in sites_read.values():
        note["sparsity"] = 0.0
    off = Scap().apply(copy.deepcopy(model), plan)
    assert any("calibrate on more data" in note for note in off.notes)
    ids = data.batches[0]["input_ids"]
    base = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "base").eval()
    from isthmus.surgery.base import Plan

    Scap().apply(base, Plan.load(tmp_path / "out"))
    with torch.no_grad():
        assert torch.equal(base(input_ids=ids).logits, changed(input_ids=ids).logits)


def test_the_baseline_skips_units_by_their_gate() -> None:
    model, data = llama(), samples()
    site = sites(model, "ffn")[1]
    mlp, seen = model.get_submodule(site.path), []
    handle = model.get_submodule(site.parts["down"]).register_forward_pre_hook(
        lambda m, a: seen.append(a[0].detach())
    )
    ids = data.batches[0]["input_ids"]
    with skipped_units(model, data, 0.7), torch.no_grad():
        seen.clear()
        model(input_ids=ids)
        assert float((seen[0] == 0).float().mean()) == pytest.approx(0.7, abs=0.05)
    handle.remove()
    assert not mlp.act_fn._forward_hooks
    groups = feed_forward_groups(model)
    assert len(groups) == 4 and sum(g.weights for g in groups) == 2 * 3 * 24 * 48
    trial = Trial(model, groups)
    assert all(v == 0 for v in trial.sparsity(data).values())


def test_the_claim_runs_at_test_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path))
    found = claim(Ruler(), "test")
    first, *behind = (row for row in found.rows if "loss" in row.metric)
    assert first.baseline is not None and first.ours is not None and first.ours < 8
    assert len(behind) == 7 and all(row.baseline == row.off for row in behind)
    assert any("decoding" in row.metric and row.ours for row in found.rows)
