import pytest
import torch

from isthmus.errors import InvalidInputError
from isthmus.metrics.images import class_accuracy, frechet_distance


def test_distance_agrees_with_the_matrix_root_of_scipy():
    linalg = pytest.importorskip("scipy.linalg")
    generator = torch.Generator().manual_seed(0)
    made = torch.randn(50, 4, generator=generator, dtype=torch.float64)
    real = torch.randn(80, 4, generator=generator, dtype=torch.float64) @ torch.diag(
        torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64)
    )
    s1, s2 = torch.cov(made.T).numpy(), torch.cov(real.T).numpy()
    root = linalg.sqrtm(s1 @ s2).real
    wanted = float((made.mean(0) - real.mean(0)).square().sum()) + (s1 + s2 - 2 * root).trace()
    assert frechet_distance(made, real) == pytest.approx(wanted, rel=1e-9)
    assert frechet_distance(made, made) == pytest.approx(0.0, abs=1e-9)


def test_features_that_never_vary_are_no_trouble():
    made = torch.tensor([[0.0, 1.0], [0.0, 3.0]])
    assert frechet_distance(made, made + torch.tensor([2.0, 0.0])) == pytest.approx(4.0)


def test_accuracy_counts_the_likeliest_class():
    scores = torch.tensor([[0.1, 0.2, 0.7], [0.5, 0.4, 0.1], [0.3, 0.4, 0.3]])
    assert class_accuracy(scores, torch.tensor([2, 1, 1])) == pytest.approx(2 / 3)


@pytest.mark.parametrize("shape", [(1, 3), (4, 2)])
def test_bad_sets_are_refused(shape):
    with pytest.raises(InvalidInputError, match="two or more images"):
        frechet_distance(torch.zeros(shape), torch.zeros(4, 3))
