"""Numbers of a cloud of vectors Z [N, D]: entropy, rank, curvature, dimension, invariance.

All are computed in float64. Spectra are those of the smaller of Z Z' and Z' Z, whose eigenvalues
other than 0 are the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from isthmus.errors import InvalidInputError


def spectrum(z: Tensor, *, unit: bool = False) -> Tensor:
    """Eigenvalues of Z Z', largest first, as shares of their sum [..., min(N, D)].

    Args:
        z: [..., N, D], not centred.
        unit: Whether rows are brought to length 1 first.

    Raises:
        InvalidInputError: Fewer than two axes, a value that is not finite, or only zeros.
    """
    if z.ndim < 2 or not bool(z.isfinite().all()):
        raise InvalidInputError("a cloud has rows and columns of finite numbers")
    z = z.double()
    if unit:
        z = z / z.norm(dim=-1, keepdim=True).clamp(min=1e-30)
    gram = z @ z.mT if z.shape[-2] <= z.shape[-1] else z.mT @ z
    values = torch.linalg.eigvalsh(gram).flip(-1).clamp(min=0)
    total = values.sum(-1, keepdim=True)
    if bool((total == 0).any()):
        raise InvalidInputError("a cloud of zeros has no spectrum")
    shares: Tensor = values / total
    return shares


def entropy(z: Tensor, order: float = 1.0, *, unit: bool = False, share: bool = False) -> Tensor:
    """Matrix-based entropy, nats [...].

    ``log(sum_i l_i^a) / (1 - a)`` of the eigenvalues ``l_i``; at a = 1, ``-sum l_i log l_i``.

    Args:
        z: [..., N, D].
        order: a.
        unit: Whether rows are brought to length 1 first.
        share: Whether it is divided by the most it can be, ``log min(N, D)``.

    Example:
        >>> round(float(entropy(torch.eye(8))), 6) == round(math.log(8), 6)
        True
        >>> abs(float(entropy(torch.ones(8, 3)))) < 1e-9
        True
    """
    values = spectrum(z, unit=unit)
    if order == 1:
        found: Tensor = -torch.xlogy(values, values).sum(-1)
    else:
        found = values.pow(order).sum(-1).log() / (1 - order)
    return found / math.log(values.shape[-1]) if share else found


def effective_rank(z: Tensor, power: Literal[1, 2] = 2) -> Tensor:
    """How many directions a cloud fills: exp of the entropy of its singular values.

    Args:
        z: [..., N, D].
        power: Of the singular values: 2 agrees with :func:`entropy`, 1 is the form of Roy and
            Vetterli (2007).
    """
    values = spectrum(z)
    if power == 1:
        values = values.sqrt() / values.sqrt().sum(-1, keepdim=True)
    return (-torch.xlogy(values, values).sum(-1)).exp()


def curvature(z: Tensor, *, absolute: bool = False) -> Tensor:
    """Mean angle between steps that follow each other along a path, radians [...].

    0 for a straight line, pi where every step goes back.

    Args:
        z: [..., T, D], at least three places.
        absolute: Whether a step back counts as straight.

    Raises:
        InvalidInputError: Fewer than three places.

    Example:
        >>> line = torch.arange(5.0)[:, None] * torch.tensor([1.0, 2.0])
        >>> round(float(curvature(line)), 5)
        0.0
        >>> round(float(curvature(torch.tensor([[0.0], [1.0], [0.0], [1.0]]))), 5)
        3.14159
    """
    if z.shape[-2] < 3:
        raise InvalidInputError("a path bends only with three places or more")
    steps = z.double().diff(dim=-2)
    steps = steps / steps.norm(dim=-1, keepdim=True).clamp(min=1e-30)
    cosine = (steps[..., 1:, :] * steps[..., :-1, :]).sum(-1)
    cosine = cosine.abs() if absolute else cosine
    angle: Tensor = cosine.clamp(-1, 1).arccos().mean(-1)
    return angle


def anisotropy(z: Tensor, *, without: int = 0) -> float:
    """Share of the variance along the one direction that has most: s_1^2 / sum s_i^2, centred.

    Args:
        z: [N, D].
        without: Columns of the largest variance to leave out first; one outlier can be it all.
    """
    z = z.double() - z.double().mean(0)
    if without:
        z = z[:, z.var(0).argsort(descending=True)[without:]]
    return float(spectrum(z)[0])


def mean_cosine(z: Tensor) -> float:
    """Mean cosine between different rows, not centred."""
    unit = z.double() / z.double().norm(dim=-1, keepdim=True).clamp(min=1e-30)
    n = len(unit)
    return float((unit.sum(0).square().sum() - n) / (n * (n - 1)))


def two_nn(z: Tensor, *, discard: float = 0.1) -> tuple[float, int]:
    """Intrinsic dimension by the two nearest neighbours, and how many copies were left out.

    Source: E. Facco et al., "Estimating the intrinsic dimension of datasets by a minimal
    neighborhood information", 2017.

    Args:
        z: [N, D].
        discard: Share of the largest ratios that the fit leaves out.

    Raises:
        InvalidInputError: Fewer than ten different rows.
    """
    unique = torch.unique(z.double(), dim=0)
    if len(unique) < 10:
        raise InvalidInputError(f"{len(unique)} different vectors are too few for a dimension")
    near = _nearest(unique, 2)
    ratio = (near[:, 1] / near[:, 0]).log().sort().values
    kept = int(len(ratio) * (1 - discard))
    below = torch.arange(1, len(ratio) + 1, dtype=torch.float64) / len(ratio)
    x, y = ratio[:kept], -torch.log1p(-below[:kept])
    return float((x * y).sum() / (x * x).sum()), len(z) - len(unique)


def mle_dimension(z: Tensor, k: int = 20) -> float:
    """Intrinsic dimension by the distances of k neighbours, averaged as inverses.

    Source: E. Levina, P. Bickel, 2004; the average is that of D. MacKay and Z. Ghahramani, 2005.

    Args:
        z: [N, D], more than k different rows.
        k: Neighbours.

    Raises:
        InvalidInputError: Too few rows.
    """
    unique = torch.unique(z.double(), dim=0)
    if len(unique) <= k or k < 3:
        raise InvalidInputError(f"{len(unique)} different vectors do not have {k} neighbours each")
    near = _nearest(unique, k).log()
    inverse = (near[:, -1:] - near[:, :-1]).sum(1) / (k - 2)
    return float(1 / inverse.mean())


def _nearest(z: Tensor, k: int, rows: int = 512) -> Tensor:
    """Distances of the k nearest others [N, k]."""
    found = []
    for part in torch.split(z, rows):
        far = torch.cdist(part, z, compute_mode="donot_use_mm_for_euclid_dist")
        found.append(far.topk(k + 1, largest=False).values[:, 1:])
    return torch.cat(found)


# two views of the same things --------------------------------------------------------------------


def infonce(a: Tensor, b: Tensor, temperature: float = 0.1) -> float:
    """How well a view finds its pair: ``1 - loss / log N``; 1 is always, 0 is by chance.

    Args:
        a: One view [N, D].
        b: The other one, in the same order.
        temperature: Of the cosines.

    Raises:
        InvalidInputError: Shapes differ, or fewer than two rows.
    """
    _paired(a, b)
    one, two = (x.double() / x.double().norm(dim=-1, keepdim=True).clamp(min=1e-30) for x in (a, b))
    scores = one @ two.T / temperature
    loss = -(scores.log_softmax(1).diagonal() + scores.log_softmax(0).diagonal()).mean() / 2
    return float(1 - loss / math.log(len(a)))


def dime(a: Tensor, b: Tensor, *, pairings: int = 10, seed: int = 0) -> float:
    """Difference of matrix-based entropies: what two views share beyond chance, nats.

    The joint entropy (of the elementwise product of the two Gram matrices) of random pairings,
    less that of the true one.

    Source: O. Skean et al., "DiME: Maximizing Mutual Information by a Difference of Matrix-Based
    Entropies", 2023.

    Args:
        a: One view [N, D].
        b: The other one, in the same order.
        pairings: Random pairings.
        seed: Of them.

    Raises:
        InvalidInputError: Shapes differ, or fewer than two rows.
    """
    _paired(a, b)
    one, two = (_kernel(x) for x in (a, b))
    draw = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(a), generator=draw) for _ in range(pairings)]
    apart = torch.stack([_joint(one, two[p][:, p]) for p in orders]).mean()
    return float(apart - _joint(one, two))


def lidar(views: Tensor, *, delta: float = 1e-4) -> float:
    """Effective rank of what tells things apart, given several views of each.

    Source: V. Thilak et al., "LiDAR: Sensing Linear Probing Performance in Joint Embedding SSL
    Architectures", 2023.

    Args:
        views: [N, Q, D], Q views of each of N things.
        delta: Added to the diagonal of the scatter within things.

    Raises:
        InvalidInputError: Fewer than two things or views.
    """
    if views.ndim != 3 or min(views.shape[:2]) < 2:
        raise InvalidInputError("LiDAR needs two views or more of two things or more")
    z = views.double()
    centre = z.mean(1)
    between = centre - centre.mean(0)
    within = (z - centre[:, None]).flatten(0, 1)
    inside = within.T @ within / len(within) + delta * torch.eye(z.shape[2], dtype=torch.float64)
    values, vectors = torch.linalg.eigh(inside)
    white = between @ (vectors * values.rsqrt()) @ vectors.T
    return float(entropy(white).exp())


def _paired(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape or a.ndim != 2 or len(a) < 2:
        raise InvalidInputError(
            f"views {list(a.shape)} and {list(b.shape)} are no pairs; give two of the same N >= 2"
        )


def _kernel(z: Tensor) -> Tensor:
    """Cosines of rows that are centred, so that what all share counts for nothing [N, N]."""
    z = z.double() - z.double().mean(0)
    z = z / z.norm(dim=-1, keepdim=True).clamp(min=1e-30)
    return z @ z.T


def _joint(one: Tensor, two: Tensor) -> Tensor:
    values = torch.linalg.eigvalsh(one * two).clamp(min=0)  # a product of Gram matrices is one
    values = values / values.sum()
    found: Tensor = -torch.xlogy(values, values).sum()
    return found


METRICS: dict[str, Callable[[Tensor], Tensor]] = {
    "entropy": lambda z: entropy(z, share=True),
    "effective rank": effective_rank,
    "curvature": curvature,
}
"""Of one text's path [..., T, D], by name."""
