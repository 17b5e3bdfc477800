"""The limit of two-layer autoencoders: closed forms against sampling, brute force and descent."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from isthmus.errors import InvalidInputError, UnknownNameError
from isthmus.laws.hermite import ACTIVATIONS, hermite
from isthmus.systems.laws.two_layer_autoencoder import Settings, TwoLayerAutoencoder, whiten
from isthmus.workbench.photographs import grey_patches, photograph

QUICK = Settings(steps=300)


def rows(units: int, size: int, seed: int = 0) -> torch.Tensor:
    drawn = torch.randn(
        units, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return torch.nn.functional.normalize(drawn, dim=1)


def test_the_limit_has_the_values_of_the_paper():
    study = TwoLayerAutoencoder()
    told = [study.limit(r) for r in (0.0, 0.25, 0.5, 1.0, 1.5, 2.0)]
    assert told == pytest.approx([1, 0.8408, 0.6817, 0.3634, 0.2756, 0.2220], abs=5e-5)
    linear = TwoLayerAutoencoder(Settings(activation="identity"))
    assert linear.limit(0.5) == pytest.approx(0.5) and linear.limit(1.0) == pytest.approx(0.0)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("tied", [False, True])
def test_the_expected_error_is_what_samples_show(activation, tied):
    study = TwoLayerAutoencoder(Settings(activation=activation, tied=tied))
    encoder = rows(6, 4)
    decoder = study.decoder(encoder)
    x = torch.randn(400_000, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    shown = ACTIVATIONS[activation](x @ encoder.T) @ decoder.T - x
    expected = study.risk(encoder, decoder)
    assert float(shown.square().mean()) == pytest.approx(float(expected), abs=4e-3)


@pytest.mark.parametrize("tied", [False, True])
def test_no_decoder_is_better_than_the_one_told(tied):
    study = TwoLayerAutoencoder(Settings(tied=tied))
    encoder = rows(5, 4)
    decoder = study.decoder(encoder)
    at = study.risk(encoder, decoder)
    draw = torch.Generator().manual_seed(2)
    for _ in range(20):
        change = encoder.T if tied else torch.randn(4, 5, generator=draw, dtype=torch.float64)
        for step in (-1e-3, 1e-3):
            assert study.risk(encoder, decoder + step * change) > at


def test_the_kernel_is_finite_in_slope_where_rows_are_the_same():
    encoder = rows(1, 4).repeat(2, 1).requires_grad_()
    kernel = TwoLayerAutoencoder().kernel(encoder)
    assert torch.allclose(kernel, torch.ones(2, 2, dtype=torch.float64))
    assert kernel.diagonal().tolist() == [1.0, 1.0]
    for name in ACTIVATIONS:
        study = TwoLayerAutoencoder(Settings(activation=name))
        (slope,) = torch.autograd.grad(study.kernel(far := rows(3, 4).requires_grad_()).sum(), far)
        assert slope.isfinite().all()


@pytest.mark.parametrize(("tied", "rate"), [(False, 0.5), (True, 0.5), (False, 1.0), (False, 1.5)])
def test_descent_reaches_the_limit_and_drawn_rows_do_not(tied, rate):
    settings = replace(QUICK, tied=tied)
    study, off = (TwoLayerAutoencoder(replace(settings, learn=on)) for on in (True, False))
    limit, reached, drawn = (
        study.limit(rate),
        *(
            float(each.risk(coder.encoder, coder.decoder))
            for each in (study, off)
            for coder in (each.solve(16, round(16 * rate)),)
        ),
    )
    assert limit - 1e-9 <= reached < limit + 0.004
    assert drawn > limit + 0.02
    assert reached > 2.0 ** (-2 * rate)


def test_a_network_on_samples_comes_near_the_limit_and_codes_in_bits():
    draw = torch.Generator().manual_seed(0)
    x, fresh = torch.randn(20_000, 8, generator=draw), torch.randn(5_000, 8, generator=draw)
    study = TwoLayerAutoencoder(Settings(steps=400, learning_rate=0.01))
    coder = study.fit(x, 8)
    assert set(coder.encode(fresh).unique().tolist()) == {-1.0, 1.0}
    assert coder.error(fresh) == pytest.approx(study.limit(1.0), abs=0.03)
    assert coder.encoder.norm(dim=1).tolist() == pytest.approx([1.0] * 8)
    tied = TwoLayerAutoencoder(replace(study.settings, tied=True)).fit(x, 4)
    assert tied.error(fresh) == pytest.approx(study.limit(0.5), abs=0.03)


def test_units_are_shared_out_as_a_search_would():
    study = TwoLayerAutoencoder()
    variances = [5.0, 1.5, 0.4]
    for units in (0.5, 1.0, 1.7, 3.2, 6.0):
        told = study.share(variances, units)
        assert sum(told) == pytest.approx(units)

        def error(rates):
            return sum(v * study.limit(r) for v, r in zip(variances, rates, strict=True))

        grid = np.linspace(0, units, 101)
        searched = min(
            error((a, b, max(units - a - b, 0.0)))
            for a in grid
            for b in grid
            if a + b <= units + 1e-9
        )
        assert error(told) <= searched + 1e-9


def test_hermite_coefficients_add_up_to_the_power():
    for name in ("tanh", "sin", "identity"):
        x = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        squares = hermite(name)
        value = ACTIVATIONS[name](x)
        assert sum(squares.values()) == pytest.approx(float(value.square().mean()), rel=0.01)
        assert squares[1] == pytest.approx(float((value * x).mean()) ** 2, rel=0.01)
    assert hermite("sin")[1] == pytest.approx(math.exp(-1))


def test_whitened_samples_are_white_and_lose_flat_directions():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(5_000, 3, generator=draw) @ torch.tensor([[2.0, 1, 0], [0, 1, 0], [0, 0, 0]])
    white = whiten(x + 7)
    assert white.shape == (5_000, 2)
    assert torch.allclose(white.T @ white / 5_000, torch.eye(2), atol=1e-3)


def test_photographs_give_patches():
    assert photograph("astronaut").shape == (512, 512, 3)
    a, b = (grey_patches(8, 10, torch.Generator().manual_seed(0)) for _ in range(2))
    assert a.shape == (10, 8, 8) and torch.equal(a, b)
    assert 0 <= float(a.min()) < float(a.max()) <= 1
    with pytest.raises(UnknownNameError, match="photograph"):
        photograph("astronaut2")
    with pytest.raises(InvalidInputError, match="pixels"):
        grey_patches(4_000, 1, torch.Generator())


def test_what_the_theory_is_not_for_is_refused(monkeypatch):
    study = TwoLayerAutoencoder()
    with pytest.raises(UnknownNameError, match="did you mean"):
        TwoLayerAutoencoder(Settings(activation="sing"))
    monkeypatch.setitem(ACTIVATIONS, "relu", torch.relu)
    monkeypatch.setitem(ACTIVATIONS, "square", torch.square)
    for name in ("relu", "square"):
        with pytest.raises(InvalidInputError, match="is not odd"):
            TwoLayerAutoencoder(Settings(activation=name))
    with pytest.raises(InvalidInputError, match="whiten them"):
        study.fit(torch.randn(100, 4, generator=torch.Generator().manual_seed(0)) * 3, 4)
    with pytest.raises(InvalidInputError, match=r"samples \[N, d\]"):
        study.fit(torch.zeros(4), 2)
    for call in (
        lambda: study.limit(-1.0),
        lambda: study.solve(0, 3),
        lambda: study.solve(4, 0),
        lambda: study.share([1.0, 0.0], 1.0),
    ):
        with pytest.raises(InvalidInputError):
            call()
