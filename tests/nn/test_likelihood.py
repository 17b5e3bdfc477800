"""Likelihoods of latents against scipy and numbers by hand."""

import math

import numpy as np
import pytest
import torch
from scipy.special import expit
from scipy.stats import norm

from isthmus.errors import InvalidInputError
from isthmus.nn.likelihood import (
    SCALES,
    Factorised,
    GaussianConditional,
    bits_of,
    index_of,
    scale_at,
)


def test_normal_masses_are_those_of_scipy() -> None:
    draw = torch.Generator().manual_seed(0)
    value = torch.randint(-30, 30, (500,), generator=draw).double()
    mean, scale = (torch.rand(500, generator=draw).double() * k for k in (4, 20))
    _, bits = GaussianConditional().eval()(value, mean, scale)
    s = scale.clamp(min=0.11).numpy()
    law = norm(mean.numpy(), s)
    # the difference on the smaller side, where scipy's is exact too
    low, high = value.numpy() - 0.5, value.numpy() + 0.5
    mass = np.where(value > mean, law.sf(low) - law.sf(high), law.cdf(high) - law.cdf(low))
    assert np.allclose(2.0 ** -bits.numpy(), np.maximum(mass, 1e-9), rtol=1e-6)


def test_rounding_with_and_without_the_mean() -> None:
    y, mean, scale = torch.tensor([2.9]), torch.tensor([0.6]), torch.tensor([1.0])
    apart, bits = GaussianConditional(whole=False).eval()(y, mean, scale)
    assert apart.item() == pytest.approx(2.6)  # round(2.3) + 0.6
    assert 2 ** -bits.item() == pytest.approx(norm.cdf(2.5) - norm.cdf(1.5), rel=1e-4)
    whole, bits = GaussianConditional().eval()(y, mean, scale)
    assert whole.item() == 3.0
    assert 2 ** -bits.item() == pytest.approx(norm.cdf(2.9) - norm.cdf(1.9), rel=1e-4)
    torch.manual_seed(0)
    noisy, _ = GaussianConditional()(y.expand(1000), mean, scale)
    assert 2.4 <= float(noisy.min()) < 2.45 and 3.35 < float(noisy.max()) <= 3.4


def test_places_of_scales() -> None:
    places = torch.arange(SCALES)
    assert index_of(scale_at(places.double())).tolist() == places.tolist()
    table = np.exp(np.linspace(math.log(0.11), math.log(256), 64))
    assert np.allclose(scale_at(places.double()), table)
    between = torch.from_numpy(np.geomspace(0.05, 300, 97))
    wanted = (table[None, :-1] < between.numpy()[:, None] * (1 - 1e-9)).sum(1)
    assert index_of(between).tolist() == wanted.tolist()


def test_the_factorised_law_by_hand() -> None:
    """One layer: c(x) = sigmoid(softplus(m) x + b)."""
    law = Factorised(1, filters=()).double()
    law.matrices[0].data.fill_(math.log(math.expm1(2.0)))
    law.biases[0].data.fill_(0.3)
    value = torch.tensor([[[-1.0, 0.0, 4.0]]]).double()
    bits = law.eval().bits(value)[0, 0].detach().numpy()
    wanted = [expit(2 * (v + 0.5) + 0.3) - expit(2 * (v - 0.5) + 0.3) for v in (-1, 0, 4)]
    assert np.allclose(2.0**-bits, wanted, rtol=1e-9)


def test_cumulative_laws_never_fall_and_sum_to_one() -> None:
    torch.manual_seed(3)
    law = Factorised(4, init_scale=4.0)
    for p in law.parameters():
        p.data += torch.randn_like(p)
    x = torch.linspace(-60, 60, 2001, dtype=torch.float64).expand(4, -1)
    assert (law.logits(x).diff(dim=1) > 0).all()
    value = torch.arange(-3000, 3001).view(1, 1, -1).expand(1, 4, -1).double()
    assert torch.allclose((2 ** -law.bits(value)).sum(2), torch.ones(1, 4).double(), atol=1e-4)
    low, high = law.tails()
    target = math.log(2e9 - 1)
    assert torch.allclose(law.logits(low[:, None])[:, 0], torch.full((4,), -target).double())
    assert torch.allclose(law.logits(high[:, None])[:, 0], torch.full((4,), target).double())


def test_gradients_of_the_unlikely() -> None:
    far = torch.tensor([40.0], requires_grad=True)
    bits = GaussianConditional.bits(far, torch.zeros(1), torch.ones(1))
    assert bits.item() == pytest.approx(math.log2(1e9))
    p = torch.tensor([1e-30], requires_grad=True)
    bits_of(p).backward()  # the bits fall where p rises: the gradient passes
    assert p.grad is not None and p.grad.item() < 0
    scale = torch.tensor([0.01], requires_grad=True)
    GaussianConditional.bits(torch.tensor([0.0]), torch.zeros(1), scale).backward()
    assert scale.grad is not None and scale.grad.item() == 0.0  # lower still is not better


def test_bad_laws_are_refused() -> None:
    for channels, tail in ((0, 0.1), (1, 0.0), (1, 1.0)):
        with pytest.raises(InvalidInputError, match="1 channel or more"):
            Factorised(channels, tail_mass=tail)
