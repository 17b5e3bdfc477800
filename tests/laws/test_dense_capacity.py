"""The law of random projections, beside scipy and beside projections that were drawn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import betainc

from isthmus.errors import InvalidInputError
from isthmus.laws.dense_capacity import bound, dimensions, error, margin, projection

QUERY = torch.tensor([1.0, 2.0, 0.0, 1.0])
DOCUMENTS = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0], [2.0, 0.0, 0.0, 0.5]])


@pytest.mark.parametrize("k", [1, 2, 5, 64, 1024])
def test_the_exact_error_is_an_incomplete_beta_function(k: int) -> None:
    mu = np.array([0.001, 0.05, 0.3, 0.7, 0.99])
    np.testing.assert_allclose(
        error(mu, k), betainc(k / 2, k / 2, (1 - mu) / 2), rtol=1e-3, atol=1e-9
    )


@pytest.mark.parametrize("entries", ["normal", "signs"])
@pytest.mark.parametrize("k", [1, 8, 32])
def test_drawn_projections_keep_the_bound(entries: str, k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    for better, worse in ((0, 1), (2, 1), (0, 2)):
        pair = DOCUMENTS[better], DOCUMENTS[worse]
        mu = float(margin(QUERY, *pair))
        pair = pair if mu > 0 else pair[::-1]
        lost, draws = 0, 4000
        for _ in range(draws):
            p = projection(k, 4, entries, generator)
            lost += float((QUERY @ p) @ ((pair[0] - pair[1]) @ p)) <= 0
        spread = 4 * (0.25 / draws) ** 0.5
        assert lost / draws <= bound([abs(mu)], k)[0] + spread
        if entries == "normal":
            assert lost / draws == pytest.approx(error([abs(mu)], k)[0], abs=spread)


def test_margins_by_hand() -> None:
    assert float(margin(QUERY, DOCUMENTS[0], DOCUMENTS[1])) == pytest.approx(1 / 12**0.5)
    assert float(margin(QUERY, DOCUMENTS[0], DOCUMENTS[0])) == 0


def test_more_dimensions_and_larger_margins_help() -> None:
    assert (np.diff(error([0.1, 0.2, 0.4], 64)) < 0).all()
    assert error([0.2], 256)[0] < error([0.2], 64)[0] <= bound([0.2], 64)[0]
    k = dimensions([0.3], 0.01)[0]
    assert bound([0.3], round(k))[0] == pytest.approx(0.01, rel=0.05)
    assert dimensions([0.15], 0.01)[0] > 3 * k


def test_wrong_input() -> None:
    for call in (
        lambda: bound([0.0], 4),
        lambda: error([0.5], 0),
        lambda: dimensions([0.5], 1.0),
        lambda: projection(2, 2, "ones", torch.Generator()),
    ):
        with pytest.raises(InvalidInputError):
            call()
