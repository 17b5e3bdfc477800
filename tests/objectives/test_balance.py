"""Balance losses: values by hand."""

from __future__ import annotations

import math

import pytest
import torch

from isthmus.errors import InvalidInputError
from isthmus.nn.moe import Context, Routed, Routing, Slots
from isthmus.nn.routers import RandomRouter, SoftmaxRouter
from isthmus.objectives import balance


def routed(logits: torch.Tensor, real: torch.Tensor | None = None) -> Routed:
    made = SoftmaxRouter(logits.shape[1], logits.shape[1], 1)
    made.weight.data = torch.eye(logits.shape[1])
    with torch.no_grad():
        return made(logits, Context(real))


def test_even_use_is_the_least_of_every_loss():
    even = routed(9 * torch.eye(4).repeat(3, 1))  # every token sure, all experts alike
    assert float(balance.entropy(even)) == pytest.approx(-math.log(4), abs=1e-5)
    assert float(balance.switch(even)) == pytest.approx(1, abs=1e-5)
    assert float(balance.importance(even)) == pytest.approx(0, abs=1e-5)
    one = routed(torch.tensor([[50.0, 0, 0, 0]]).repeat(5, 1))
    assert float(balance.entropy(one)) == pytest.approx(0, abs=1e-5)
    assert float(balance.switch(one)) == pytest.approx(4, abs=1e-4)
    assert float(balance.importance(one)) == pytest.approx(3, abs=1e-4)
    assert float(balance.z_loss(one)) == pytest.approx(2500, rel=1e-4)


def test_the_entropy_is_of_the_mean_and_not_of_each_token():
    logits = torch.randn(7, 3)
    mean = logits.softmax(-1).mean(0)
    by_hand = (mean * mean.log()).sum()
    torch.testing.assert_close(balance.entropy(routed(logits)), by_hand)


def test_padding_counts_nowhere():
    logits = torch.randn(9, 3)
    real = torch.arange(9) < 6
    for loss in (balance.entropy, balance.switch, balance.importance, balance.z_loss):
        torch.testing.assert_close(loss(routed(logits, real)), loss(routed(logits[:6])))


def test_a_bias_brings_lopsided_use_into_balance():
    torch.manual_seed(0)
    made = SoftmaxRouter(3, 4, 1)
    x = torch.randn(400, 3) + 1
    before = balance.usage([made(x, Context()).routing])
    for _ in range(400):
        balance.move_bias(made.bias, made(x, Context()).routing, 5e-3)
    after = balance.usage([made(x, Context()).routing])
    assert balance.usage_entropy(after) > 0.99 > balance.usage_entropy(before)


def test_what_cannot_be_balanced():
    x = torch.zeros(2, 3)
    with pytest.raises(InvalidInputError, match="no scores"):
        balance.entropy(RandomRouter(3, 1)(x, Context()))
    with pytest.raises(InvalidInputError, match="dense"):
        balance.switch(Routed(Slots(x, x), x))
    with pytest.raises(InvalidInputError, match="no routing"):
        balance.usage([])
    only = Routing.of(*torch.zeros(2, 1, dtype=torch.int64), torch.ones(1), tokens=1, experts=1)
    assert balance.usage_entropy(balance.usage([only])) == 1
