import pytest
import torch

from isthmus.errors import InvalidInputError
from isthmus.metrics.images import class_accuracy, frechet_distance, ms_ssim, scales_of


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


def test_one_scale_agrees_with_scikit_image():
    metrics = pytest.importorskip("skimage.metrics")
    generator = torch.Generator().manual_seed(0)
    one = torch.randint(0, 256, (2, 3, 40, 37), generator=generator, dtype=torch.uint8)
    noise = torch.randint(-30, 31, one.shape, generator=generator)
    other = (one.int() + noise).clamp(0, 255).to(torch.uint8)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    wanted = [
        metrics.structural_similarity(a.numpy(), b.numpy(), data_range=255, **options)
        for a, b in zip(one.reshape(-1, 40, 37), other.reshape(-1, 40, 37), strict=True)
    ]
    assert ms_ssim(one, other, scales=1) == pytest.approx(sum(wanted) / 6, abs=1e-5)


def test_scales_are_those_of_the_halved_pictures():
    """Three scales by hand: contrast at two of them, everything at the third, weights to one."""
    metrics = pytest.importorskip("skimage.metrics")
    generator = torch.Generator().manual_seed(1)
    one = torch.randint(0, 256, (1, 1, 48, 64), generator=generator).double()
    other = (one + 20 * torch.randn(one.shape, generator=generator)).clamp(0, 255).round()
    assert scales_of(48, 64) == 3
    weights = [w / (0.0448 + 0.2856 + 0.3001) for w in (0.0448, 0.2856, 0.3001)]
    wanted, a, b = 1.0, one, other
    for scale, weight in enumerate(weights):
        # contrast and structure alone are similarity where means are taken for equal
        window = torch.exp(-((torch.arange(11).double() - 5) ** 2) / 4.5)
        window = torch.outer(window, window) / window.sum() ** 2
        x, y = (torch.nn.functional.unfold(i, 11)[0].T for i in (a, b))
        w = window.flatten()
        m, n = x @ w, y @ w
        c = ((x - m[:, None]) * (y - n[:, None])) @ w
        v, u = (x - m[:, None]).square() @ w, (y - n[:, None]).square() @ w
        part = (2 * c + 58.5225) / (v + u + 58.5225)
        if scale == 2:
            part = part * (2 * m * n + 6.5025) / (m * m + n * n + 6.5025)
            flat = [i[0, 0].numpy() for i in (a, b)]
            options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
            whole = metrics.structural_similarity(*flat, data_range=255, **options)
            assert float(part.mean()) == pytest.approx(whole, abs=1e-6)
        wanted *= float(part.mean()) ** weight
        a, b = (torch.nn.functional.avg_pool2d(i, 2) for i in (a, b))
    assert ms_ssim(one, other) == pytest.approx(wanted, abs=1e-5)
    assert ms_ssim(one, one) == 1.0


def test_pictures_that_are_too_small_are_named():
    small = torch.zeros(1, 10, 40, dtype=torch.uint8)
    for pair in ((small, small), (torch.zeros(1, 20, 20), torch.zeros(1, 20, 21))):
        with pytest.raises(InvalidInputError, match="MS-SSIM of"):
            ms_ssim(*pair)
    with pytest.raises(InvalidInputError, match="3 scale"):
        ms_ssim(torch.zeros(1, 40, 40), torch.zeros(1, 40, 40), scales=3)
