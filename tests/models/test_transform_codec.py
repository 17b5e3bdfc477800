"""The autoencoder and its law: what training sees, and what does not depend on the prior."""

import pytest
import torch

from isthmus.errors import InvalidInputError
from isthmus.models.transform_codec import TransformCodec, WholePrior, pad_to, rate_distortion


def codec(temporal: bool = True) -> TransformCodec:
    torch.manual_seed(0)
    return TransformCodec(3, 8, 4, 2, 2, 8, temporal)


def test_gradients_reach_all_parts() -> None:
    made, x = codec().train(), torch.rand(2, 3, 32, 32)
    y = made.g_a(x)
    past = torch.cat([y, y], 1).detach().round() * 9 + 1
    for exact in (False, True):
        made.zero_grad()
        out, bits = made(x, past, exact)
        rate_distortion(x, out, bits, 0.01).backward()
        for name, p in made.named_parameters():
            assert p.grad is not None and float(p.grad.abs().sum()) > 0, (exact, name)


@torch.no_grad()
def test_pixels_depend_on_latents_alone() -> None:
    made, x = codec().eval(), torch.rand(1, 3, 32, 32)
    y = made.g_a(x - 0.5)
    out, bits = made(x)
    other, more = made(x, torch.full((1, 8, 8, 8), 30.0))
    assert torch.equal(out, other) and not torch.equal(bits, more)
    assert torch.allclose(out, made.g_s(y.round()) + 0.5)


@torch.no_grad()
def test_without_time_the_past_is_ignored() -> None:
    made, x = codec(False).eval(), torch.rand(1, 3, 32, 32)
    assert torch.equal(made(x)[1], made(x, torch.full((1, 8, 8, 8), 30.0))[1])
    prior = made.law.prior.frozen()
    assert prior.temporal == []
    z = torch.zeros(1, 2, 2, 2)
    assert prior(z, torch.zeros(1, 8, 8, 8))[0].shape == (1, 4, 8, 8)


@torch.no_grad()
def test_the_frozen_prior_says_what_the_trained_one_says() -> None:
    made = codec().eval().law.prior
    z, past = torch.randn(1, 2, 4, 4).mul(4).round(), torch.randn(1, 8, 16, 16).mul(4).round()
    mean, scale = made(z, past, True)
    units, index = WholePrior.of(made.frozen().tensors())(z, past)
    assert float((units / 8 - mean).abs().max()) <= 1 / 8
    assert float(((units / 8) == mean).double().mean()) > 0.98
    places = (scale / 0.11).log() / 0.12305479932808386
    assert float((places.round().long() == index).double().mean()) > 0.98


def test_padding_repeats_edges() -> None:
    x = torch.arange(6.0).view(1, 1, 2, 3)
    padded = pad_to(x, 4)
    assert padded[0, 0].tolist() == [[0, 1, 2, 2], [3, 4, 5, 5], [3, 4, 5, 5], [3, 4, 5, 5]]
    assert pad_to(padded, 4) is not None and pad_to(padded, 4).shape == padded.shape


def test_no_halving_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="halved at least once"):
        TransformCodec(3, 8, 4, 0, 2, 8)
