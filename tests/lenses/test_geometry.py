"""Geometry: known clouds, invariances, and skdim's or brute-force values."""

import math

import pytest
import torch

from isthmus.errors import InvalidInputError, UnknownNameError
from isthmus.lenses import geometry as g
from isthmus.lenses.probe import probe


def cloud(n, d, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=draw, dtype=torch.float64)


def turned(z, seed=3):
    return z @ torch.linalg.qr(cloud(z.shape[-1], z.shape[-1], seed))[0]


def test_entropy_of_known_clouds():
    for n, d in ((8, 20), (20, 8)):
        z = torch.eye(max(n, d), dtype=torch.float64)[:n, :d]
        assert float(g.entropy(z)) == pytest.approx(math.log(8))
        assert float(g.entropy(z, 2.0)) == pytest.approx(math.log(8))
        assert float(g.entropy(z, share=True)) == pytest.approx(1.0)
        assert float(g.effective_rank(z)) == pytest.approx(8.0)
    assert float(g.entropy(torch.ones(5, 3))) == pytest.approx(0, abs=1e-9)
    # eigenvalues 9 and 1 of 10
    z = torch.diag(torch.tensor([3.0, 1.0]))
    assert float(g.entropy(z)) == pytest.approx(-0.9 * math.log(0.9) - 0.1 * math.log(0.1))
    roots = [0.75, 0.25]
    assert float(g.effective_rank(z, 1)) == pytest.approx(
        math.exp(-sum(r * math.log(r) for r in roots))
    )
    assert float(g.entropy(z, unit=True)) == pytest.approx(math.log(2))
    assert g.entropy(torch.stack([cloud(6, 4), cloud(6, 4, 1)])).shape == (2,)


def test_turning_and_scaling_change_nothing():
    z = cloud(60, 6) * torch.arange(1.0, 7.0)
    for measure in (
        g.entropy,
        g.effective_rank,
        g.curvature,
        g.anisotropy,
        g.mean_cosine,
        lambda x: g.two_nn(x)[0],
        g.mle_dimension,
    ):
        assert float(measure(7 * turned(z))) == pytest.approx(float(measure(z)), rel=1e-6)


def test_paths():
    line = torch.arange(5.0)[:, None] * torch.tensor([1.0, 2.0, -1.0]) + 4
    assert float(g.curvature(line)) == pytest.approx(0, abs=1e-3)
    square = torch.tensor([[0.0, 0], [1, 0], [1, 1], [0, 1]])
    assert float(g.curvature(square)) == pytest.approx(math.pi / 2)
    back = torch.tensor([[0.0], [1.0], [0.0]])
    assert float(g.curvature(back)) == pytest.approx(math.pi)
    assert float(g.curvature(back, absolute=True)) == pytest.approx(0, abs=1e-6)
    with pytest.raises(InvalidInputError, match="three"):
        g.curvature(back[:2])


def test_a_planted_direction_is_seen_and_can_be_left_out():
    z = cloud(4000, 16)
    z[:, 3] *= 10  # variance 100 of 115
    assert g.anisotropy(z) == pytest.approx(100 / 115, abs=0.01)
    assert g.anisotropy(z, without=1) < 0.1
    pairs = torch.nn.functional.cosine_similarity(z[:50, None], z[None, :50], dim=-1)
    assert g.mean_cosine(z[:50]) == pytest.approx(float((pairs.sum() - 50) / (50 * 49)))


@pytest.mark.parametrize("dimension", [2, 5, 10])
def test_intrinsic_dimension_of_flat_clouds_in_a_wide_space(dimension):
    flat = torch.nn.functional.pad(cloud(2000, dimension), (0, 20 - dimension))
    found, copies = g.two_nn(turned(flat))
    assert found == pytest.approx(dimension, rel=0.06) and copies == 0
    assert g.mle_dimension(turned(flat)) == pytest.approx(dimension, rel=0.16)


def test_a_helix_has_one_dimension_and_copies_are_counted():
    t = torch.rand(1500, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 20
    helix = torch.stack([t.cos(), t.sin(), t / 5], 1)
    assert g.two_nn(torch.cat([helix, helix[:30]])) == (pytest.approx(1, rel=0.06), 30)
    assert g.mle_dimension(helix) == pytest.approx(1, rel=0.06)
    with pytest.raises(InvalidInputError, match="too few"):
        g.two_nn(torch.ones(50, 3))
    with pytest.raises(InvalidInputError, match="20 neighbours"):
        g.mle_dimension(torch.eye(5))


def test_views_that_share_more_score_more():
    z = cloud(60, 12)
    scores = [
        (g.infonce(z, z + s * cloud(60, 12, 1)), g.dime(z, z + s * cloud(60, 12, 1)))
        for s in (0.1, 1.0, 30.0)
    ]
    for each in zip(*scores, strict=True):
        assert each[0] > each[1] > each[2]
    assert scores[2][1] == pytest.approx(0, abs=0.05) and scores[0][0] > 0.95
    noise = torch.stack([z + 0.1 * cloud(60, 12, k) for k in (1, 2, 3)], 1)
    assert g.lidar(noise) > g.lidar(torch.stack([cloud(60, 12, k) for k in (1, 2, 3)], 1)) * 0.9
    planted = torch.zeros(60, 2, 12, dtype=torch.float64)
    planted[..., :4] = cloud(60, 4)[:, None]
    centred = planted - planted.mean(0)
    assert g.lidar(planted) == pytest.approx(float(g.effective_rank(centred[:, 0])), rel=1e-6)
    with pytest.raises(InvalidInputError, match="no pairs"):
        g.dime(z, z[:5])
    with pytest.raises(InvalidInputError, match="two views"):
        g.lidar(z[:, None])


def test_what_has_no_spectrum_is_refused():
    with pytest.raises(InvalidInputError, match="finite"):
        g.entropy(torch.full((3, 3), torch.nan))
    with pytest.raises(InvalidInputError, match="zeros"):
        g.entropy(torch.zeros(3, 3))


def test_probes_read_what_is_there_and_controls_what_is_not():
    x = cloud(400, 8)
    y = (x[:, 2] > 0).int().tolist()
    split = ["train"] * 240 + ["validation"] * 60 + ["test"] * 100
    found = probe(x, y, split, types=[str(i) for i in range(400)])
    assert found.score > 0.93 and found.interval[0] <= found.score <= found.interval[1]
    assert found.majority < 0.65 and found.selectivity is not None and found.selectivity > 0.3
    number = probe(x, (3 * x[:, 1] + 1).tolist(), split, "ridge")
    assert number.score > 0.99 and number.majority < 0.05
    with pytest.raises(InvalidInputError, match="not among the training labels"):
        probe(x, [*y[:-1], 7], split)
    with pytest.raises(InvalidInputError, match="no rows for validation"):
        probe(x, y, ["train"] * 300 + ["test"] * 100)
    with pytest.raises(InvalidInputError, match="differ"):
        probe(x, y[:-1], split)
    with pytest.raises(UnknownNameError, match="ridge"):
        probe(x, y, split, "rigde")
