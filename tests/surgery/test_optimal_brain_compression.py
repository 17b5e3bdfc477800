"""Optimal Brain Compression: a surgery like any other, and exactly least squares on its mask."""

import copy
import sys
from pathlib import Path

import pytest
import torch

from isthmus.claims import Ruler, Status
from isthmus.errors import InvalidInputError
from isthmus.surgery.base import matrix, sites
from isthmus.surgery.calibration import Calibration, Gram, Reservoir, capture
from isthmus.surgery.levels import choose_levels
from isthmus.systems.surgery import optimal_brain_compression as obc
from isthmus.systems.surgery.optimal_brain_compression import OptimalBrainCompression, Settings
from isthmus.testing import check_surgery

sys.path.insert(0, str(Path(__file__).parents[1] / "decoding"))
import tiny


def data(model, rows=8, length=24):
    ids = torch.randint(3, tiny.V, (rows, length), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    if model.config.is_encoder_decoder:
        batch |= {"decoder_input_ids": ids, "decoder_attention_mask": torch.ones_like(ids)}
    return Calibration((batch,), "random")


@pytest.mark.parametrize(
    "name, settings, budget",
    [
        ("Llama", Settings(), 0.5),
        ("GPT2", Settings(pattern="2:4"), 0.5),
        ("T5", Settings(fast=True), 0.7),
        ("Llama", Settings(shares="own"), 0.6),
        ("Llama", Settings(kind="quantize"), 0.25),
        ("Llama", Settings(pattern="4", bits=4), 0.5),
    ],
    ids=str,
)
def test_contract(name, settings, budget):
    model = tiny.network(name, "float32")
    report = check_surgery(OptimalBrainCompression(settings), model, data(model), budget)
    matrices = sum(matrix(model.get_submodule(s.path)).numel() for s in sites(model, "linear"))
    share = report.after.multiply_adds / matrices
    assert share == pytest.approx(1.0 if settings.kind == "quantize" else budget, abs=0.01)
    if settings.kind == "quantize":
        assert 4 < report.after.bits < 6


def test_what_stays_is_least_squares_for_the_inputs_that_the_layer_reads():
    model = tiny.network("Llama", "float32")
    samples = data(model)
    plan = OptimalBrainCompression(Settings(damping=1e-9)).plan(model, samples, 0.5)
    site = next(s for s in sites(model, "linear") if s.path.endswith("down_proj"))
    x = capture(model, [site], samples, lambda: Reservoir(999))[site.path].rows.double()
    before = matrix(model.get_submodule(site.path)).detach().double()
    after = plan.tensors[site.path].double()
    assert (after != 0).double().mean() == pytest.approx(0.5, abs=1e-3)
    for old, new in zip(before, after, strict=True):
        kept = new.nonzero()[:, 0]
        best = torch.linalg.lstsq(x[:, kept], x @ old).solution
        assert torch.allclose(new[kept], best, atol=1e-4)


def test_a_layer_that_loses_less_keeps_less():
    model = copy.deepcopy(tiny.network("Llama", "float32"))
    easy = model.model.layers[0].mlp.down_proj
    with torch.no_grad():
        easy.weight[:, 8:] = 0.0  # all but 8 of its inputs are for nothing
    plan = OptimalBrainCompression(Settings(shares="own")).plan(model, data(model), 0.5)
    kept = {path: note["kept"] / plan.tensors[path].numel() for path, note in plan.notes.items()}
    whole = sum(t.numel() for t in plan.tensors.values())
    assert sum(note["kept"] for note in plan.notes.values()) <= 0.5 * whole
    assert kept["model.layers.0.mlp.down_proj"] <= min(0.3, *kept.values())


def test_levels_are_the_best_there_are():
    draw = torch.Generator().manual_seed(0)
    losses = torch.rand(3, 4, generator=draw).sort(1).values
    costs = torch.tensor([[8.0, 4.0, 2.0, 1.0]]).expand(3, 4)
    chosen = choose_levels(losses, costs, 12.01)
    every = torch.cartesian_prod(*[torch.arange(4)] * 3)
    rows = torch.arange(3)
    fits = costs[rows, every].sum(1) <= 12
    best = losses[rows, every].sum(1)[fits].min()
    assert losses[rows, chosen].sum() == best and costs[rows, chosen].sum() <= 12
    with pytest.raises(InvalidInputError, match="cheapest levels cost 3"):
        choose_levels(losses, costs, 2.0)


def test_what_cannot_be_is_refused_by_name():
    model = tiny.network("Llama", "float32")
    for settings, budget, says in (
        (Settings(kind="quantize"), 0.3, "no whole number of 16 bits"),
        (Settings(pattern="2:4"), 0.4, "2:4 keeps 0.5"),
        (Settings(pattern="4", fast=True), 0.5, "exact pruning only"),
    ):
        with pytest.raises(InvalidInputError, match=says):
            OptimalBrainCompression(settings).plan(model, data(model), budget)
    with pytest.raises(InvalidInputError, match="was shown 8 tokens"):
        OptimalBrainCompression().plan(model, data(model, 1, 8), 0.5)
    with pytest.raises(InvalidInputError, match="kind is one of prune, quantize"):
        Settings(kind="round")
    with pytest.raises(InvalidInputError, match="shares=own"):
        Settings(shares="own", fast=True)


def test_padding_is_in_no_curvature():
    model = tiny.network("Llama", "float32")
    (batch,) = data(model).batches
    longer = {k: torch.nn.functional.pad(v, (0, 5), value=0) for k, v in batch.items()}
    found = sites(model, "linear")[:3]
    one = capture(model, found, Calibration((batch,)), Gram)
    two = capture(model, found, Calibration((longer,)), Gram)
    for path, gram in one.items():
        assert torch.allclose(gram.hessian, two[path].hessian, rtol=1e-4, atol=1e-6)


def test_the_claim_runs(monkeypatch):
    claim = obc.claim(Ruler(), "test")
    assert claim.status in Status and len(claim.rows) == 8
    error = {row.metric: row for row in claim.rows}["layer error, half"]
    assert error.ours < error.baseline * 1.05 and error.ours < error.control < error.off
    # the gates can be missed: with the idea off, nothing is better than nothing
    way = dict.fromkeys(obc._WAYS, Settings(second_order=False))
    monkeypatch.setattr(obc, "_WAYS", way)
    assert obc.claim(Ruler(), "test").status == Status.NOT_REPRODUCED
