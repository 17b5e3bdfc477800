"""sigma-MoE: its layer by hand, its losses, its relatives, and a way through it."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from isthmus.cli.main import main
from isthmus.errors import InvalidInputError
from isthmus.nn.moe import MoE, routings
from isthmus.nn.routers import SinkhornRouter, equal_norms
from isthmus.systems.surgery.sigma_moe import (
    Settings,
    SigmaMoe,
    TopKFeedForward,
    arms,
    feed_forward,
    ffn_flops,
)
from isthmus.training.data import Data
from isthmus.training.loop import Plan
from isthmus.training.system import train

TINY = Settings(16, 1, 2, 4, 8, 2, max_length=32, batch_size=8)
TEXTS = Data(["to be or not to be, that is the question. " * 12] * 3, ["to be or not to be. " * 9])


def layer(**changes) -> MoE:
    torch.manual_seed(0)
    return feed_forward(replace(TINY, **changes)).eval()


def test_all_experts_with_weight_one_are_the_dense_layer():
    made, whole = layer(top_k=4), feed_forward(replace(TINY, feed_forward="dense"))
    whole.in_proj.weight.data = made.experts.up_proj.detach().flatten(0, 1)
    whole.out_proj.weight.data = made.experts.down_proj.detach().transpose(0, 1).flatten(1)
    x = torch.randn(9, 16)
    with torch.no_grad():
        made.router.weight.zero_()  # sigmoids of 1/2
        made.router.scale = 2.0
    torch.testing.assert_close(made(x), whole(x), rtol=0, atol=1e-5)


def test_it_is_the_sum_over_the_chosen_by_hand():
    made, x = layer(), torch.randn(5, 16)
    s = torch.sigmoid(x @ made.router.weight.T)
    for i in range(5):
        wanted = sum(
            s[i, e] * made.experts.down_proj[e] @ torch.relu(made.experts.up_proj[e] @ x[i])
            for e in s[i].topk(2).indices
        )
        torch.testing.assert_close(made(x)[i], wanted)


def test_experts_that_are_not_chosen_learn_nothing():
    made, x = layer(top_k=1), torch.randn(1, 16)
    made(x).sum().backward()
    chosen = int((x @ made.router.weight.T).argmax())
    for gradient in (
        made.experts.up_proj.grad,
        made.experts.down_proj.grad,
        made.router.weight.grad,
    ):
        norms = gradient.flatten(1).norm(dim=1)
        assert norms[chosen] > 0 and norms.sum() == norms[chosen]


def test_rows_of_the_router_start_alike():
    weight = torch.randn(6, 40) * torch.arange(1, 7)[:, None]
    before = weight.std()
    equal_norms(weight)
    norms = weight.norm(dim=1)
    torch.testing.assert_close(norms, norms[:1].expand(6))
    torch.testing.assert_close(weight.std(), before)
    rows = layer().router.weight.norm(dim=1)
    torch.testing.assert_close(rows, rows[:1].expand(4))
    # deviations are those of the dense layer: sqrt(2 / (D n)) and sqrt(2 / (E G n))
    big = feed_forward(Settings(64, 2, 2, 8, 32, 2))
    assert float(big.experts.up_proj.detach().std()) == pytest.approx(math.sqrt(2 / 128), rel=0.05)
    assert float(big.experts.down_proj.detach().std()) == pytest.approx(
        math.sqrt(2 / 512), rel=0.05
    )


def test_the_k_largest_units_stay():
    made = TopKFeedForward(3, 5, 2)
    made.in_proj.weight.data = torch.tensor(
        [[1.0, 0, 0], [2, 0, 0], [3, 0, 0], [-9, 0, 0], [0] * 3]
    )
    made.out_proj.weight.data = torch.eye(3, 5)
    assert made(torch.tensor([1.0, 5, 5])).tolist() == [0, 2, 3]


@pytest.mark.parametrize(
    "kind", ["sigma", "renormalised", "switch", "s-base", "top-k", "pkm", "dense"]
)
def test_every_relative_learns_and_counts_its_losses(kind):
    torch.manual_seed(0)
    system = SigmaMoe(replace(TINY, feed_forward=kind))
    learner = system.learner(TEXTS, Plan(1))
    batch = learner.batch(0)
    system.module.eval()  # nothing is left out
    plain = torch.nn.functional.cross_entropy(
        system.module(batch).flatten(0, 1), batch.flatten(), reduction="sum"
    )
    with routings(system.module) as found:
        loss = learner.loss(batch)
    added = float((loss.total - plain).detach()) / batch.numel()
    if kind in ("sigma", "renormalised"):  # -gamma times an entropy, near its maximum
        assert -1e-3 * math.log(4) <= added < -0.8e-3 * math.log(4)
    elif kind == "switch":
        assert 1e-2 <= added < 1.5e-2
    else:
        assert added == pytest.approx(0, abs=1e-6)
    system.module.train()
    learner.loss(batch).total.backward()
    assert all(p.grad is not None for p in system.module.global_layers.parameters())
    assert bool(found) == (kind not in ("top-k", "pkm", "dense"))


def test_balance_by_transport_is_for_training_alone():
    made = layer(feed_forward="s-base")
    assert isinstance(made.router, SinkhornRouter)
    x = torch.randn(64, 16) + 1
    with routings(made) as found:
        made.train()(x)
        held = found["router"].routing.counts
        made.eval()(x)
    assert held.max() < found["router"].routing.counts.max()


def test_a_way_through_it(tmp_path, capsys):
    plan = Plan(60, learning_rate=1e-2, validate_every=60)
    system = train(SigmaMoe, TEXTS, TINY, plan, out=tmp_path / "out")
    last = system.record["validation"][-1]
    assert last["bits_per_byte"] < 4 and 0 < last["least_even"] <= last["usage_entropy"] <= 1
    assert main(["run", str(tmp_path / "out"), "to be or ", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["text"] == "to be or " + said["continuation"] and said["bytes"] == 16
    # the cache says what one forward says
    read = SigmaMoe.from_pretrained(tmp_path / "out")
    ids = torch.tensor([[b + 2 for b in b"to be or "]])
    with torch.no_grad():
        for _ in range(16):
            logits = read.module(torch.cat([ids, torch.zeros(1, 1, dtype=torch.int64)], 1))
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    assert bytes(i - 2 for i in ids[0].tolist() if i > 1).decode() == said["text"]


def test_arms_have_equal_size_and_a_quarter_of_the_work():
    made = arms(True)
    weights = {n: sum(p.numel() for p in SigmaMoe(s).module.parameters()) for n, s in made.items()}
    assert 1 < weights["sigma"] / weights["dense"] < 1.01
    assert len({weights[n] for n in made if n != "dense"}) == 1
    d, f = made["sigma"].hidden_size, made["sigma"].units
    assert ffn_flops(made["dense"]) == 4 * d * f
    assert ffn_flops(made["sigma"]) == d * f + 2 * d * 8  # a quarter, and the router


def test_bad_input():
    with pytest.raises(InvalidInputError, match="feed_forward must be one of"):
        Settings(feed_forward="soft")
    with pytest.raises(InvalidInputError, match="top_k must lie"):
        Settings(top_k=17)
    with pytest.raises(InvalidInputError, match="empty"):
        SigmaMoe(TINY).run("")


def test_product_keys_hold_as_many_numbers_as_the_dense_layer():
    s = SigmaMoe.scales["small"].settings
    made, dense = (feed_forward(replace(s, feed_forward=kind)) for kind in ("pkm", "dense"))
    assert made.values.numel() == sum(p.numel() for p in dense.parameters())
    assert made.heads * made.top_k == s.top_k * s.expert_size
