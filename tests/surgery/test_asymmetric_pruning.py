"""Asymmetric pruning: what is left is the whole model that leaves the others out."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

from isthmus.claims import Ruler
from isthmus.decoding.model import Model
from isthmus.errors import InvalidInputError, UnknownNameError, UnsupportedModelError
from isthmus.lenses.sites import stacks
from isthmus.surgery.base import fingerprint
from isthmus.surgery.blocks import bypassed, evenly, greedy, keep_blocks
from isthmus.surgery.calibration import Calibration
from isthmus.systems.surgery import asymmetric_pruning as ap
from isthmus.systems.surgery.asymmetric_pruning import AsymmetricPruning, Settings
from isthmus.testing import check_surgery

sys.path.insert(0, str(Path(__file__).parents[1] / "decoding"))
import tiny


def deep(name):
    """A tiny model of four layers on either side."""
    model = tiny.network(name, "float32")
    config = copy.deepcopy(model.config)
    for field in ("encoder_layers", "decoder_layers", "num_layers", "num_decoder_layers"):
        if hasattr(config, field):
            setattr(config, field, 4)
    if not config.is_encoder_decoder:
        config.num_hidden_layers = 4
    if getattr(config, "layer_types", None):
        config.layer_types = ["sliding_attention", "full_attention"] * 2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return type(model)(config).eval()


def data(rows=4):
    ids = torch.randint(3, tiny.V, (rows, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    both = {"input_ids": ids, "attention_mask": mask, "labels": ids}
    return Calibration((both | {"decoder_input_ids": ids, "decoder_attention_mask": mask},))


@pytest.mark.parametrize("name", ["T5", "Bart"])
@pytest.mark.parametrize("choice", ["even", "greedy"])
def test_contract(name, choice):
    report = check_surgery(AsymmetricPruning(Settings(choice=choice)), deep(name), data())
    (change,) = report.changes
    assert change.after.parameters * 2 == pytest.approx(change.before.parameters, rel=0.02)


@pytest.mark.parametrize("name", ["T5", "Bart"])
def test_what_is_left_reloads_and_writes_the_same(name, tmp_path):
    model = deep(name)
    keep_blocks(model, {"dec": [1, 3], "enc": [1, 2]})  # without the first, which has T5's bias
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    (batch,) = data()
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    wanted = loaded.generate(batch["input_ids"][:1], max_new_tokens=6, do_sample=False)[0]
    ours = Model(model, fast=False).generate(
        batch["input_ids"][0], max_new_tokens=6, drafter="none", ignore_end=True
    )
    plain = Model(loaded, fast=False).generate(
        batch["input_ids"][0], max_new_tokens=6, drafter="none", ignore_end=True
    )
    assert list(ours.tokens) == list(plain.tokens)
    assert ours.tokens[: len(wanted) - 1] == wanted[1:].tolist()[: len(ours.tokens)]


@pytest.mark.parametrize("name", ["Llama", "GPT2", "Gemma3"])
def test_removal_is_leaving_out_in_decoders_too(name):
    model = deep(name)
    ids = data().batches[0]["input_ids"]
    gone = [stacks(model)[""][i] for i in (0, 2)]
    with torch.no_grad():
        with bypassed(model, gone):
            wanted = model(input_ids=ids, use_cache=False).logits
        keep_blocks(model, {"": [1, 3]})
        assert torch.allclose(model(input_ids=ids).logits, wanted, atol=1e-5)
    assert len(stacks(model)[""]) == 2 == model.config.num_hidden_layers


def test_keeping_all_changes_nothing():
    model = deep("Bart")
    before = fingerprint(model)
    keep_blocks(model, {"dec": [0, 1, 2, 3]})
    assert fingerprint(model) == before


def test_the_greedy_choice_is_the_least_harmful_one():
    model, given = deep("Bart"), data()
    plan = AsymmetricPruning(Settings(choice="greedy")).plan(model, given, 0.75)
    losses = []
    for path in stacks(model)["dec"]:
        with bypassed(model, [path]):
            losses.append(given.loss(model))
    (gone,) = {0, 1, 2, 3} - set(plan.notes["keep"]["dec"])
    assert gone == losses.index(min(losses)) and plan.notes["losses"][0] == min(losses)
    assert plan.notes["gaps"][0] == pytest.approx(sorted(losses)[1] - min(losses))
    with pytest.raises(InvalidInputError, match="cannot be left out"):
        greedy("ab", lambda gone: 0.0, 2, allowed=lambda gone: len(gone) < 2)


def test_both_sides_and_one_side():
    model, given = deep("Bart"), data()
    both = AsymmetricPruning(Settings("both", "greedy")).plan(model, given, 0.5)
    assert {s: len(k) for s, k in both.notes["keep"].items()} == {"enc": 2, "dec": 2}
    assert AsymmetricPruning(Settings("encoder")).plan(model, given, 0.5).notes["keep"] == {
        "enc": [0, 3]
    }
    assert [evenly(6, n) for n in (1, 2, 4, 6)] == [[0], [0, 5], [0, 2, 3, 5], list(range(6))]


def test_what_cannot_be_is_refused_by_name():
    model, given = deep("Bart"), data()
    for budget, says in ((0.1, "keeps no layers of 4"), (0.9, "keeps all layers of 4")):
        with pytest.raises(InvalidInputError, match=says):
            AsymmetricPruning().plan(model, given, budget)
    with pytest.raises(UnsupportedModelError, match="no encoder and decoder"):
        AsymmetricPruning().plan(tiny.network("Llama", "float32"), given, 0.5)
    with pytest.raises(InvalidInputError, match="keep at least one"):
        keep_blocks(model, {"dec": []})
    with pytest.raises(UnknownNameError, match="stack"):
        keep_blocks(model, {"middle": [0]})
    with pytest.raises(InvalidInputError, match="side is one of"):
        Settings(side="left")
    scaled = deep("GPT2")
    scaled.config.scale_attn_by_inverse_layer_idx = True
    with pytest.raises(UnsupportedModelError, match="depend on their number"):
        keep_blocks(scaled, {"": [0]})


def test_the_claim_runs(monkeypatch, tmp_path):
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path))
    claim = ap.claim(Ruler(), "test")
    assert claim.rows[0].baseline != claim.rows[0].ours != claim.rows[0].off
    assert claim.rows[-1].ours > 0 and len(claim.gates) == 4


def test_gates_fail_with_the_idea_off():
    nats = dict.fromkeys((*ap._CELLS, "6+2, from scratch"), 0.5) | {"6+6": 0.1}
    exact = dict.fromkeys(nats, 0.5)
    on = ap._judged(
        nats | {"6+2": 0.2, "6+2, greedy": 0.2}, exact, {"6+1": 3.0, "1+6": 1.0}, "test"
    )
    off = ap._judged(nats, exact, {"6+1": 1.0, "1+6": 3.0}, "test")
    assert (str(on.status), str(off.status)) == ("reproduced", "not-reproduced")
