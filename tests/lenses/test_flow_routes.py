"""Flow routes: terms add up in every architecture, and importances are those of a hand example."""

import pytest
import torch
from test_sites import MAKERS, made

from isthmus.decoding.model import Model
from isthmus.errors import InvalidInputError, UnsupportedModelError
from isthmus.lenses.heads import cost_without, find_heads
from isthmus.lenses.sites import SiteMap, eager, probe_of
from isthmus.lenses.trace import Trace
from isthmus.systems.lenses.flow_routes import FlowRoutes, Settings
from isthmus.testing import check_lens
from isthmus.workbench.induction import induction_model, repeated, with_cancelling_heads

IDS = torch.tensor([5, 9, 33, 9, 12, 40])
NO_HEADS = {"Mamba", "Mamba2", "T5", "Bart", "Marian", "Whisper", "MBart", "Gemma2", "Gemma3"}
ADD_LATER = {"Bert", "Roberta", "GPTNeoX", "Phi"}


@pytest.mark.parametrize("name", sorted(set(MAKERS) - NO_HEADS))
def test_heads_add_up_to_what_attention_gives(name):
    model = made(name)
    probe = probe_of(model)
    sites = SiteMap.of(model, probe)
    for i, each in enumerate(find_heads(model, sites, probe)):
        wanted = {"p": each.pattern, "v": each.source, "o": sites[f"attn_out.{i}"]}
        with eager(model), torch.no_grad(), Trace(model, wanted) as seen:
            model(**probe)
        whole = each.parts(seen["p"], seen["v"], slice(None)).sum((2, 3)) + each.bias
        assert torch.allclose(whole, seen["o"].reshape(whole.shape), atol=1e-6)


@pytest.mark.parametrize("name", sorted(NO_HEADS | ADD_LATER))
def test_other_models_are_refused(name):
    with pytest.raises(UnsupportedModelError):
        FlowRoutes().flows(made(name), IDS)


@pytest.mark.parametrize("name", ["Llama", "GPT2", "OPT", "Mixtral"])
def test_importances_add_up_and_routes_are_nested(name):
    model, lens = made(name), FlowRoutes()
    flows = lens.flows(model, IDS)
    for flow in flows:
        total = flow.heads.sum((1, 2)) + flow.around + flow.bias
        assert torch.allclose(total, torch.ones(6), atol=1e-5) and flow.error < 1e-5
        later = torch.ones(6, 6).triu(1).bool()
        assert float(flow.heads.sum(-1)[later].abs().max()) == 0.0  # nothing from later tokens
    routes = [
        {(e.source, e.target) for e in FlowRoutes(Settings(threshold=tau)).route(flows, 5)}
        for tau in (0.3, 0.05, 0.01)
    ]
    assert routes[0] <= routes[1] <= routes[2] and routes[2]
    assert all(edge[1].split(".")[0] in {"I1", "I2", "A1", "A2", "M1", "M2"} for edge in routes[2])


def test_the_share_of_terms_by_hand():
    # y = (3, 1), |y| = 4; |y - z| is 2 without (2, 0) and 2 without (1, 1): they share evenly.
    lens = FlowRoutes()
    terms = torch.tensor([[[2.0, 0.0], [1.0, 1.0]]])
    assert lens._share(terms, terms.sum(1)).tolist() == [[0.5, 0.5]]
    terms = torch.tensor([[[3.0, 0.0], [0.0, 1.0]]])
    assert lens._share(terms, terms.sum(1)).tolist() == [[0.75, 0.25]]
    size = FlowRoutes(Settings(proximity=False))
    terms = torch.tensor([[[9.0, 0.0], [-9.0, 0.0], [0.0, 2.0]]])
    assert size._share(terms, terms.sum(1)).argmax() == 0
    assert lens._share(terms, terms.sum(1)).argmax() == 2  # large terms that cancel do not matter
    renormalised = FlowRoutes(Settings(threshold=0.3, renormalise=True))
    terms = torch.tensor([[[3.0, 0.0], [0.0, 1.0]]])
    assert renormalised._share(terms, terms.sum(1)).tolist() == [[1.0, 0.0]]


def test_leaving_a_head_out_is_what_the_weights_say():
    model = made("Llama")
    probe = probe_of(model)
    heads = find_heads(model, SiteMap.of(model, probe), probe)
    ids, _ = repeated(2)
    cost = cost_without(model, heads, ids, slice(None))
    weight = model.model.layers[1].self_attn.o_proj.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        whole = model(ids, labels=ids).loss
        weight[:, 8:16] = 0
        without = model(ids, labels=ids).loss
        weight.copy_(kept)
    assert float(cost[1, 1]) == pytest.approx(float(without - whole), abs=1e-5)


def test_the_contract():
    lens = FlowRoutes()
    subject = lens.open("")
    check_lens(lens, subject, "def add(a, b):\n    return a")
    found = lens.explain(subject, "def add(a, b):")
    assert found.graph is not None and found.graph.rows[0] == "embeddings"
    ids = Model(made("Llama"))
    assert "tokens:" in lens.explain(ids, IDS).inputs[0]


def test_the_model_that_repeats_learns_to():
    texts, period = repeated(3, seed=1)
    assert texts.shape == (3, 32)
    for row, n in zip(texts.tolist(), period.tolist(), strict=True):
        assert row[n:] == row[:-n]
    assert induction_model(2).training is False


def test_heads_that_cancel_add_nothing_and_carry_little():
    model = induction_model(2)
    planted = with_cancelling_heads(model)
    ids = repeated(1)[0][0]
    lens, size = FlowRoutes(), FlowRoutes(Settings(proximity=False))
    near, large = (each.importance(each.flows(planted, ids), 31)[1] for each in (lens, size))
    assert float(large[:2].min()) > float(large[2:].max())
    assert float(near[:2].sum()) < 0.5 * float(large[:2].sum())
    attention = planted.model.layers[1].self_attn
    assert torch.allclose(attention.o_proj.weight[:, :16], -attention.o_proj.weight[:, 16:32])


def test_thresholds_are_importances():
    with pytest.raises(InvalidInputError, match="between 0 and 1"):
        FlowRoutes(Settings(threshold=2.0))
