"""The sparse autoencoder: a planted dictionary is found, and only with few codes kept."""

import dataclasses

import pytest
import torch

from isthmus.errors import BrokenFileError, InvalidInputError
from isthmus.lenses.sae import (
    SaeRecipe,
    SparseAutoencoder,
    _left_over,
    geometric_median,
    train_sae,
)

RECIPE = SaeRecipe(atoms=32, active=3, steps=500, batch_size=256, learning_rate=3e-3)


@pytest.fixture(scope="module")
def planted():
    """Atoms [32, 24], and vectors that are sums of three of them and a shift."""
    draw = torch.Generator().manual_seed(0)
    atoms = torch.randn(32, 24, generator=draw)
    atoms /= atoms.norm(dim=1, keepdim=True)
    chosen = torch.rand(6000, 32, generator=draw).topk(3).indices
    weights = 1 + torch.rand(6000, 3, generator=draw)
    x = torch.zeros(6000, 32).scatter(1, chosen, weights) @ atoms
    return atoms, 7 * (x + 0.5)


def found(atoms, sae):
    """Mean over the planted atoms of the cosine to the nearest one that was learnt."""
    return float((atoms @ sae.atoms.T).amax(1).mean())


def test_a_planted_dictionary_is_recovered_and_only_with_few_codes(planted):
    atoms, x = planted
    sae = train_sae(x[:5000], RECIPE)
    fit = sae.measure(x[5000:])
    assert found(atoms, sae) >= 0.95
    assert fit.unexplained <= 0.1 and fit.active == 3 and fit.dead == 0
    assert torch.allclose(sae.atoms.norm(dim=1), torch.ones(32), atol=1e-5)
    assert ((sae.encode(x[:50]) != 0).sum(1) == 3).all()
    assert float(fit.firing.sum()) == pytest.approx(3, abs=1e-5)
    # the idea off: all codes kept explains everything and finds nothing
    off = train_sae(x[:5000], dataclasses.replace(RECIPE, active=32, steps=300))
    assert off.measure(x[5000:]).unexplained < 0.01 and found(atoms, off) < 0.95
    one = train_sae(x[:5000], dataclasses.replace(RECIPE, active=1, steps=200))
    assert one.measure(x[5000:]).unexplained > 0.3


def test_dead_codes_and_they_alone_learn_what_is_left_over():
    recipe = SaeRecipe(atoms=3, active=1, dead_after=10)
    sae = SparseAutoencoder(2, 3, 1)
    with torch.no_grad():
        sae.atoms.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]))
        sae.encoder.copy_(sae.atoms)
    x = torch.tensor([[3.0, 0.5], [3.0, -0.5]])
    rest = torch.tensor([[0.0, 0.5], [0.0, -0.5]])
    before = sae.before(x)
    # with code 1 alone the second row is told -0.5, which is right; no dead code tells nothing
    for quiet in ([0, 10, 0], [0, 0, 10], [0, 10, 10]):
        loss = _left_over(sae, before, rest, torch.tensor(quiet), recipe)
        assert float(loss.detach()) == pytest.approx(0, abs=1e-6)
    assert float(_left_over(sae, before, rest, torch.tensor([9, 9, 9]), recipe)) == 0
    half = _left_over(sae, before, rest * 2, torch.tensor([0, 10, 10]), recipe)
    assert float(half.detach()) == pytest.approx(0.25)  # half of what is left is told
    half.backward()
    assert sae.atoms.grad[0].abs().sum() == 0 and (sae.atoms.grad[1:].abs().sum(1) > 0).all()
    off = dataclasses.replace(recipe, auxiliary=0.0)
    assert float(_left_over(sae, before, rest * 2, torch.tensor([0, 10, 10]), off)) == 0


def test_the_same_seed_gives_the_same_numbers_and_a_file_keeps_them(planted, tmp_path):
    _, x = planted
    recipe = dataclasses.replace(RECIPE, steps=5)
    sae, again = (train_sae(x, recipe) for _ in range(2))
    assert torch.equal(sae.atoms, again.atoms)
    sae.save(tmp_path / "sae", {"site": "resid_post.1"})
    loaded, notes = SparseAutoencoder.load(tmp_path / "sae")
    assert torch.equal(loaded(x[:9]), sae(x[:9])) and notes == {"site": "resid_post.1"}
    assert float(loaded.scale) != 1
    (tmp_path / "sae" / "sae.safetensors").write_bytes(b"x")
    with pytest.raises(BrokenFileError, match="altered"):
        SparseAutoencoder.load(tmp_path / "sae")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "a.tex").write_text("x")
    with pytest.raises(InvalidInputError, match="sparse autoencoder"):
        sae.save(tmp_path / "thesis")


def test_a_median_lies_where_far_points_do_not_pull():
    points = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0], [0.5, 0.5], [99.0, 0.5]])
    middle = geometric_median(points)
    assert float((middle - 0.5).abs().max()) < 0.05 and float(points.mean(0)[0]) > 10


def test_what_cannot_be_trained_is_refused():
    with pytest.raises(InvalidInputError, match="cannot be kept"):
        SaeRecipe(atoms=4, active=5)
    with pytest.raises(InvalidInputError, match="cannot be kept"):
        train_sae(torch.randn(9, 2), SaeRecipe(active=17))
    with pytest.raises(InvalidInputError, match="at least 1"):
        SaeRecipe(steps=0)
    with pytest.raises(InvalidInputError, match="equal"):
        train_sae(torch.ones(9, 4), RECIPE)
    with pytest.raises(InvalidInputError, match="finite"):
        train_sae(torch.tensor([[1.0, float("nan")]] * 3), RECIPE)
