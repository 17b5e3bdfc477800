"""How good images are: what a classifier says of them, how features are spread, how alike."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from isthmus.errors import InvalidInputError

WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Of the scales of MS-SSIM, finest first (Wang, Simoncelli and Bovik 2003)."""

SIDE, SIGMA = 11, 1.5
"""Of the Gaussian window."""

MIDDLE = 128
"""Taken from all values, so that their squares fit into single precision."""


def psnr(truth: torch.Tensor, other: torch.Tensor, peak: float = 255.0) -> torch.Tensor:
    """Peak signal-to-noise ratio of each picture in dB, 100 for equal ones.

    Args:
        truth: [N, C, H, W].
        other: Likewise.
        peak: The largest value.

    Returns:
        float64 [N].

    Example:
        >>> x = torch.zeros(1, 1, 2, 2, dtype=torch.uint8)
        >>> round(float(psnr(x, x + 1)), 2)  # 20 log10(255)
        48.13
    """
    error = (truth.double() - other.double()).square().flatten(1).mean(1) / peak**2
    return -10 * error.clamp(min=1e-10).log10()


def scales_of(height: int, width: int) -> int:
    """Scales of MS-SSIM that a size has room for: five where the smaller side exceeds 160.

    Returns:
        0 to 5; 0 where the window does not fit.

    Example:
        >>> scales_of(161, 300), scales_of(160, 300), scales_of(11, 11), scales_of(10, 99)
        (5, 4, 1, 0)
    """
    side = min(height, width)
    return sum(side > (SIDE - 1) << scale for scale in range(len(WEIGHTS)))


def ms_ssim(truth: torch.Tensor, other: torch.Tensor, *, scales: int = 0) -> float:
    """Multi-scale structural similarity, the mean over planes and images; 1 for equal ones.

    Local contrast and structure are compared at every scale and brightness at the coarsest, each
    raised to its weight, through an 11x11 Gaussian window of sigma 1.5; between scales pairs of
    pixels are averaged. With fewer than five scales their weights are scaled to sum to one, and the
    measure is called MS-SSIM-3 and the like; with one it is SSIM.

    Args:
        truth: Images of 8 bits [..., C, H, W].
        other: Images of the same shape.
        scales: 1 to 5; as many as there is room for when 0.

    Raises:
        InvalidInputError: Different shapes, or too small for the scales.

    Example:
        >>> dark, light = torch.full((2, 1, 200, 200), 50), torch.full((2, 1, 200, 200), 100)
        >>> low = (0.01 * 255) ** 2  # by hand: only brightness differs, at the coarsest scale
        >>> wanted = ((2 * 50 * 100 + low) / (50**2 + 100**2 + low)) ** 0.1333
        >>> abs(ms_ssim(dark, light) - wanted) < 1e-4
        True
    """
    room = scales_of(*truth.shape[-2:])
    scales = scales or room
    if truth.shape != other.shape or not 1 <= scales <= room:
        raise InvalidInputError(
            f"MS-SSIM of {scales} scale(s) compares images of one shape with sides above "
            f"{(SIDE - 1) << max(0, scales - 1)}, got {list(truth.shape)} and {list(other.shape)}"
        )
    at = torch.arange(SIDE, dtype=torch.float64) - SIDE // 2
    line = torch.exp(-(at**2) / (2 * SIGMA**2))
    line = (line / line.sum()).float()
    x, y = (i.reshape(-1, 1, *i.shape[-2:]) for i in (truth, other))
    weights = torch.tensor(WEIGHTS[:scales], dtype=torch.float64)
    weights = weights if scales == len(WEIGHTS) else weights / weights.sum()
    total = 0.0
    for a, b in zip(torch.split(x, 4), torch.split(y, 4), strict=True):  # in little memory
        a, b = a.float() - MIDDLE, b.float() - MIDDLE
        found = torch.ones(len(a), dtype=torch.float64)
        for scale in range(scales):
            if scale:
                a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
            bright, shape = _similar(a, b, line)
            part = bright * shape if scale == scales - 1 else shape
            found *= part.double().mean((1, 2, 3)).clamp(min=0) ** weights[scale]
        total += float(found.sum())
    return total / len(x)


def _similar(
    a: torch.Tensor, b: torch.Tensor, line: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Similarity of brightness, and of contrast and structure, at every place of the window."""

    def blurred(x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(F.conv2d(x, line.view(1, 1, -1, 1)), line.view(1, 1, 1, -1))

    low, high = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    m, n = blurred(a), blurred(b)
    v, w, c = blurred(a * a) - m * m, blurred(b * b) - n * n, blurred(a * b) - m * n
    m, n = m + MIDDLE, n + MIDDLE
    return (2 * m * n + low) / (m * m + n * n + low), (2 * c + high) / (v + w + high)


def class_accuracy(scores: torch.Tensor, wanted: torch.Tensor) -> float:
    """Share of images in which a classifier sees the class that was asked for.

    Args:
        scores: Of each class, [N, C].
        wanted: int64 [N].

    Example:
        >>> class_accuracy(torch.tensor([[0.9, 0.1], [0.8, 0.2]]), torch.tensor([0, 1]))
        0.5
    """
    return float((scores.argmax(1) == wanted).double().mean())


def frechet_distance(made: torch.Tensor, real: torch.Tensor) -> float:
    """Distance of two normal laws fitted to features (Heusel et al. 2017, 1706.08500).

    ``|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))``, with covariances over N - 1. With few images it
    is too large; compare equal numbers.

    Args:
        made: Features of made images [N, D].
        real: Features of real ones [M, D].

    Raises:
        InvalidInputError: A set has fewer than two images, or their features differ in width.

    Example:
        >>> made = torch.tensor([[1.0], [3.0]])  # mean 2, variance 2
        >>> round(frechet_distance(made, 2 * made), 6)  # 2^2 + (sqrt 2 - sqrt 8)^2
        6.0
    """
    if min(len(made), len(real)) < 2 or made.shape[1:] != real.shape[1:]:
        raise InvalidInputError(
            "a Frechet distance needs two sets of two or more images with features of one width, "
            f"got {tuple(made.shape)} and {tuple(real.shape)}"
        )
    (m1, s1), (m2, s2) = (_moments(x.double()) for x in (made, real))
    values, vectors = torch.linalg.eigh(s1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ s2 @ root).clamp(min=0).sqrt().sum()
    return float((m1 - m2).square().sum() + s1.trace() + s2.trace() - 2 * cross)


def _moments(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    centred = features - features.mean(0)
    return features.mean(0), centred.T @ centred / (len(features) - 1)
