"""How good made images are: what a classifier says of them, and how its features are spread."""

from __future__ import annotations

import torch

from isthmus.errors import InvalidInputError


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
