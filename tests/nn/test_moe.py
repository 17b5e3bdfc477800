"""The mixture-of-experts layer: every router against the dense formula, and what each promises."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from isthmus.errors import InvalidInputError
from isthmus.nn.decoder import GatedFeedForward
from isthmus.nn.feed_forward import FeedForward
from isthmus.nn.moe import (
    Capacity,
    Context,
    Experts,
    MoE,
    Routed,
    Router,
    Routing,
    Slots,
    given,
    routings,
)
from isthmus.nn.routers import (
    AllExperts,
    AnalyticRouter,
    ExpertChoice,
    RandomRouter,
    SigmoidRouter,
    SinkhornRouter,
    SoftmaxRouter,
    sinkhorn,
)

D, E, K, N = 6, 4, 2, 11


def router(kind: str) -> Router:
    torch.manual_seed(2)
    return {
        "softmax": lambda: SoftmaxRouter(D, E, K),
        "renormalised": lambda: SoftmaxRouter(D, E, K, weights="renormalised", scale=2.0),
        "sigmoid": lambda: SigmoidRouter(D, E, K, dropout=0.6),
        "sinkhorn": lambda: SinkhornRouter(D, E, K),
        "expert choice": lambda: ExpertChoice(D, E, K),
        "analytic": lambda: AnalyticRouter(torch.randn(E, D), torch.randn(E, D), K),
        "all": lambda: AllExperts(E),
        "random": lambda: RandomRouter(E, K),
    }[kind]()


KINDS = (
    "softmax", "renormalised", "sigmoid", "sinkhorn", "expert choice", "analytic", "all", "random",
)  # fmt: skip


def dense(layer: MoE, x: torch.Tensor, slots: Slots) -> torch.Tensor:
    """The formula, in plain einsums over all experts and slots."""
    into = torch.einsum("nes,nd->esd", slots.dispatch, x)
    gate, up = torch.einsum("esd,efd->esf", into, layer.experts.gate_up_proj).chunk(2, -1)
    out = torch.einsum("esf,edf->esd", nn.functional.silu(gate) * up, layer.experts.down_proj)
    return torch.einsum("nes,esd->nd", slots.combine, out)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [False, True])
def test_every_router_is_its_dense_form(kind, training):
    layer = MoE(Experts(E, D, 5), router(kind), allow_noncausal=True).train(training)
    x = torch.randn(N, D)
    for real in (None, torch.arange(N) < 8):
        context = Context(real, generator=torch.Generator().manual_seed(1))
        with routings(layer) as found:
            y = layer(x, context)
        routing = found["router"].routing
        torch.testing.assert_close(y, dense(layer, x, routing.slots()), rtol=1e-5, atol=1e-6)
        assert (routing.expert.diff() >= 0).all()
        if real is not None:  # padding goes nowhere
            assert routing.token.max() < 8 and not y[8:].any()
        per_token = torch.bincount(routing.token, minlength=N)[:8]
        if kind == "all":
            assert (per_token == E).all()
        elif kind == "expert choice":
            assert (routing.counts == math.ceil((N if real is None else 8) * K / E)).all()
        elif kind == "sigmoid" and training:
            assert (per_token <= K).all() and (per_token < K).any()
        else:
            assert (per_token == K).all()


class Soft(Router):
    """A dense router, as a later file may bring one: slots are means of tokens."""

    def forward(self, x, context):
        even = torch.full((len(x), self.num_experts, 2), 1 / len(x))
        return Routed(Slots(even, even))


def test_a_dense_router_fits_the_same_layer():
    layer, x = MoE(Experts(E, D, 5), Soft(E)), torch.randn(N, D)
    slots = layer.router(x, Context()).routing
    torch.testing.assert_close(layer(x), dense(layer, x, slots))


@pytest.mark.parametrize("gated", [True, False])
def test_all_experts_are_the_dense_feed_forward(gated):
    if gated:
        whole = GatedFeedForward(D, 8)
        into = torch.cat(
            [whole.gate_proj.weight.view(E, 2, D), whole.up_proj.weight.view(E, 2, D)], 1
        )
    else:
        whole = FeedForward(D, 8, "relu", bias=False)
        into = whole.in_proj.weight.view(E, 2, D)
    down = (whole.down_proj if gated else whole.out_proj).weight
    experts = Experts(E, D, 2, "silu" if gated else "relu", gated=gated)
    experts.into.data.copy_(into)
    experts.down_proj.data.copy_(down.view(D, E, 2).transpose(0, 1))
    x = torch.randn(2, 7, D)
    torch.testing.assert_close(MoE(experts, AllExperts(E))(x), whole(x), rtol=0, atol=1e-5)
    shared = MoE(experts, AllExperts(E), shared=whole)
    torch.testing.assert_close(shared(x), 2 * whole(x), rtol=0, atol=1e-5)


def test_a_token_does_not_depend_on_its_batch():
    """Dropless token choice; routers that look across are refused in causal models."""
    x = torch.randn(3, D)
    other = torch.cat([x, torch.randn(5, D)])
    for kind in ("softmax", "sigmoid", "analytic"):
        layer = MoE(Experts(E, D, 5), router(kind)).eval()
        torch.testing.assert_close(layer(other)[:3], layer(x), rtol=0, atol=1e-6)
    for kind in ("expert choice", "sinkhorn"):
        with pytest.raises(InvalidInputError, match="allow_noncausal"):
            MoE(Experts(E, D, 5), router(kind))


@pytest.mark.parametrize("kind", ["renormalised", "sigmoid", "analytic"])
def test_gradients_are_those_of_finite_differences(kind):
    layer = MoE(Experts(E, D, 3), router(kind).eval()).double()
    x, y = torch.randn(5, D).double(), torch.randn(5, D).double()
    (layer(x) * y).sum().backward()
    with torch.no_grad():
        for name, p in layer.named_parameters():
            way, values = torch.randn_like(p), []
            for step in (1e-6, -1e-6):
                p += step * way
                values.append(float((layer(x) * y).sum()))
                p -= step * way
            by_hand = (values[0] - values[1]) / 2e-6
            assert by_hand == pytest.approx(float((p.grad * way).sum()), rel=1e-5, abs=1e-7), name


def test_softmax_weights():
    made = SoftmaxRouter(2, 3, 2)
    made.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    x = torch.tensor([[math.log(6.0), math.log(3.0)]])  # probabilities 0.6, 0.3, 0.1
    raw = made(x, Context()).routing
    assert raw.expert.tolist() == [0, 1]
    torch.testing.assert_close(raw.weight, torch.tensor([0.6, 0.3]))
    made.weights, made.scale = "renormalised", 2.0
    torch.testing.assert_close(made(x, Context()).routing.weight, torch.tensor([4 / 3, 2 / 3]))
    made.bias += torch.tensor([0.0, 0.0, 0.45])  # decides, but does not weigh
    found = made(x, Context()).routing
    assert found.expert.tolist() == [0, 2]
    torch.testing.assert_close(found.weight, torch.tensor([12 / 7, 2 / 7]))


def test_a_sinkhorn_plan_has_equal_shares():
    logits = 3 * torch.randn(64, E)
    plan = sinkhorn(logits, 0.5, 100)
    torch.testing.assert_close(plan.sum(1), torch.ones(64), rtol=0, atol=1e-3)
    torch.testing.assert_close(plan.sum(0), torch.full((E,), 16.0), rtol=0, atol=1e-3)
    # n = E and a low temperature: the best assignment, found here by trying all
    gains = torch.randn(4, 4)
    best = max(itertools.permutations(range(4)), key=lambda p: sum(gains[range(4), p]).item())
    assert sinkhorn(gains, 0.01, 500).argmax(1).tolist() == list(best)
    layer = SinkhornRouter(D, E, 1, temperature=0.05, iterations=100).train()
    x = torch.randn(40, D) + 2  # lopsided
    free = torch.bincount(layer.logits(x).argmax(1), minlength=E)
    held = layer(x, Context()).routing.counts
    assert held.max() <= 12 < free.max()
    assert torch.equal(layer.eval()(x, Context()).routing.counts, free)


def test_full_experts_drop_whom_they_are_told_to():
    token = torch.tensor([0, 1, 2, 0, 1, 2])
    expert = torch.tensor([0, 0, 0, 1, 0, 1])
    weight = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.9, 0.6])
    rank = torch.tensor([0, 0, 0, 1, 1, 1])
    routing = Routing.of(token, expert, weight, rank, tokens=3, experts=2)
    kept = {
        how: [(int(t), round(float(w), 1)) for t, w in zip(r.token, r.weight, strict=True)]
        for how in ("position", "probability", "rank+probability")
        for r in [routing.limited(2, how)]
    }
    assert kept["position"] == [(0, 0.1), (1, 0.2), (0, 0.4), (2, 0.6)]
    assert kept["probability"] == [(2, 0.3), (1, 0.9), (0, 0.4), (2, 0.6)]
    assert kept["rank+probability"] == [(1, 0.2), (2, 0.3), (0, 0.4), (2, 0.6)]
    drawn = routing.limited(1, "random", torch.Generator().manual_seed(0))
    assert drawn.counts.tolist() == [1, 1]
    assert Capacity(1.0, minimum=0).of(routing) == 3 and Capacity(1.0).of(routing) == 4


def test_capacity_holds_in_training_alone_unless_told():
    x = torch.randn(N, D)
    layer = MoE(Experts(E, D, 5), router("softmax"), capacity=Capacity(0.2, minimum=1)).train()
    whole = MoE(layer.experts, layer.router)
    limited = layer.router(x, Context()).routing.limited(2)
    torch.testing.assert_close(layer(x), dense(layer, x, limited.slots()))
    assert not torch.allclose(layer(x), whole(x))
    torch.testing.assert_close(layer.eval()(x), whole(x))
    layer.capacity = Capacity(0.2, minimum=1, inference=True)
    assert not torch.allclose(layer(x), whole(x))


def test_what_is_given_reaches_layers_deep_inside():
    layer = MoE(Experts(E, D, 5), router("softmax"))
    net, x = nn.Sequential(nn.Identity(), layer), torch.randn(N, D)
    with given(net, Context(torch.arange(N) < 3)):
        assert not net(x)[3:].any()
    assert net(x)[3:].any()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: SoftmaxRouter(D, E, 5), "top_k must lie between 1"),
        (lambda: SoftmaxRouter(D, E, 1, weights="some"), "raw or renormalised"),
        (lambda: SigmoidRouter(D, E, 1, dropout=1.0), "dropout"),
        (lambda: AllExperts(0), "at least 1 expert"),
        (lambda: Experts(E, D, 5, "tanh"), "activation must be one of"),
        (lambda: Experts(E, D, 0), "at least 1"),
        (lambda: MoE(Experts(3, D, 5), AllExperts(E)), "knows 4 experts, there are 3"),
        (lambda: Capacity(0.0), "positive factor"),
        (lambda: Capacity(drop="last"), "drop must be one of"),
        (lambda: sinkhorn(torch.zeros(2, 2), 0.0), "positive temperature"),
    ],
)
def test_bad_input(make, says):
    with pytest.raises(InvalidInputError, match=says):
        make()
