"""The digits data set and its judge."""

import sys
from dataclasses import replace

import pytest
import torch

from isthmus.errors import MissingExtraError
from isthmus.workbench import digit_models, digits


def test_without_scikit_learn_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    digits._all.cache_clear()
    with pytest.raises(MissingExtraError, match=r"isthmus\[workbench\]"):
        digits.pictures("train")


@pytest.fixture
def sklearn():
    return pytest.importorskip("sklearn")


def test_pictures(sklearn):
    (train, _), (held_out, wanted) = digits.pictures("train"), digits.pictures("held-out")
    assert (len(train), len(held_out)) == (1437, 360)
    assert train.shape[1:] == (8, 8) and train.min() == 0 and train.max() == 8
    whole = sklearn.datasets.load_digits()
    assert torch.equal(held_out[7], torch.from_numpy(whole.images[35] // 2).long())
    assert wanted[7] == whole.target[35]


def test_lessons_depend_on_the_step_alone(sklearn):
    course = digit_models.RasterCourse(digit_models.RECIPE)
    source = course.batches(0)
    next(source)
    later = next(source)
    assert torch.equal(later, next(course.batches(1)))
    assert later.shape == (32, 65)
    assert (later[:, 0] >= digits.LEVELS).all() and (later[:, 1:] < digits.LEVELS).all()


def test_the_judge_knows_digits_and_dislikes_noise(sklearn):
    judge, (grids, wanted) = digits.Judge(), digits.pictures("held-out")
    assert judge.accuracy(grids, wanted) > 0.95
    flat = grids.flatten(1).numpy() / 8
    assert judge.accuracy(grids, wanted) == judge._net.score(flat, wanted.numpy())
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(9, (360, 8, 8), generator=generator)
    assert judge.distance(digits.pictures("train")[0]) < 3
    assert judge.distance(noise) > 10 * judge.distance(digits.pictures("train")[0])


def test_the_model_learns(sklearn, tmp_path, monkeypatch):
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path))
    target = digit_models.raster_target(replace(digit_models.RECIPE, steps=12, batch_size=8))
    assert digit_models.pixel_loss(target.model) < 2.2  # log 19 = 2.94


def test_any_order_learns_too(sklearn, tmp_path, monkeypatch):
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path))
    model = digit_models.guided(replace(digit_models.GUIDED, steps=12, batch_size=8))
    grids, wanted = digits.pictures("held-out")
    course = digit_models.GuidedCourse(digit_models.GUIDED)
    _, shown, order = next(course.batches(3))
    assert torch.equal(order.sort(1).values[0], torch.arange(64))
    assert 0 < (shown == digits.CLASSES).sum() < 12  # some lessons keep the digit to themselves
    assert torch.equal(order, next(digit_models.GuidedCourse(digit_models.GUIDED).batches(3))[2])
    raster = torch.arange(64).expand(len(grids), -1)
    with torch.no_grad():
        loss = course.loss(model, (grids.flatten(1), wanted, raster))
    assert float(loss) < 2.1  # log 9 = 2.20
