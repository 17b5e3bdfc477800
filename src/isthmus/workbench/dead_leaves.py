"""Dead leaves: shapes of all sizes that lie on each other, as statistics of photographs have it.

A leaf hides what lies below it, and leaves of radius r are as many as r^-3: edges, flat places and
details occur at every scale, as in pictures of the world, and there is no end of them to learn
from. Each leaf here has a colour, a slope of light, and a piece of a photograph's grain.

A. Lee, D. Mumford, J. Huang, "Occlusion models for natural images", 2001; for learning, R. Achddou
et al., "Synthetic images as a regularity prior for image restoration neural networks", 2021.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from isthmus.workbench.photographs import photograph

LEAVES = 500
"""Leaves of a picture; what is left open at the end is black."""

LEAST, MOST = 3.0, 260.0
"""Radii in pixels, before the picture is halved."""

GRAINS = ("brick", "grass", "gravel", "camera", "coins")


@dataclass(frozen=True)
class DeadLeaves:
    """One picture; a record of the kind ``pictures``.

    Attributes:
        seed: Of all draws.
        side: Rows and columns.
    """

    seed: int
    side: int = 256

    def picture(self) -> Tensor:
        """The picture, uint8 [3, side, side]; drawn twice as large, so that edges are soft.

        Example:
            >>> DeadLeaves(0, 32).picture().shape
            torch.Size([3, 32, 32])
        """
        draw, side = np.random.default_rng([7, self.seed]), 2 * self.side
        made = np.zeros((side, side, 3), np.float32)
        # r^-3 between the limits, by its inverse distribution
        u = draw.random(LEAVES)
        radii = (LEAST**-2 + u * (MOST**-2 - LEAST**-2)) ** -0.5
        wide = draw.random(LEAVES) < 0.25
        radii[wide] = np.exp(draw.uniform(np.log(20), np.log(MOST), wide.sum()))
        for radius in radii:
            _leaf(made, float(radius), draw)
        flat = torch.from_numpy(made).permute(2, 0, 1)[None]
        small = F.avg_pool2d(flat, 2)[0].round().clamp(0, 255)
        return small.to(torch.uint8)


def _leaf(made: NDArray[np.float32], radius: float, draw: np.random.Generator) -> None:
    """Lay an ellipse or a polygon with soft corners on what is there."""
    side, (y, x) = len(made), draw.uniform(0, len(made), 2)
    top, bottom = max(0, int(y - radius)), min(side, int(y + radius) + 1)
    left, right = max(0, int(x - radius)), min(side, int(x + radius) + 1)
    down = (np.arange(top, bottom, dtype=np.float32)[:, None] - y) / radius
    across = (np.arange(left, right, dtype=np.float32)[None] - x) / radius
    angle, thin = draw.uniform(0, np.pi), draw.uniform(1, 3)
    along = np.cos(angle) * across + np.sin(angle) * down
    beside = (np.cos(angle) * down - np.sin(angle) * across) * thin
    power = draw.choice([1.0, 2.0, 2.0, 6.0])  # a rhombus, an ellipse, nearly a box
    inside = np.abs(along) ** power + np.abs(beside) ** power < 1
    colour = np.clip(_colour(draw), 0, 255)
    light = (along * draw.normal(0, 20))[..., None]
    grain = _grain(inside.shape[0], inside.shape[1], draw)[..., None] * abs(draw.normal(0, 0.5))
    place = made[top:bottom, left:right]
    place[inside] = (colour + light + grain)[inside]


def _colour(draw: np.random.Generator) -> NDArray[np.float32]:
    """A brightness of any kind and a colour that is seldom strong."""
    grey, strength = draw.uniform(0, 255), abs(draw.normal(0, 25))
    away = draw.normal(size=3)
    away -= away.mean()
    found: NDArray[np.float32] = (grey + strength * away).astype(np.float32)
    return found


def _grain(high: int, wide: int, draw: np.random.Generator) -> NDArray[np.float32]:
    """A cutting of a photograph's brightness without its mean, [high, wide]."""
    grey = _grey(str(draw.choice(GRAINS)))
    top = int(draw.integers(0, max(1, grey.shape[0] - high)))
    left = int(draw.integers(0, max(1, grey.shape[1] - wide)))
    cut = grey[top : top + high, left : left + wide]
    if cut.shape != (high, wide):
        cut = np.pad(cut, ((0, high - cut.shape[0]), (0, wide - cut.shape[1])), "reflect")
    found: NDArray[np.float32] = cut - cut.mean()
    return found


@lru_cache
def _grey(name: str) -> NDArray[np.float32]:
    found: Any = photograph(name).astype(np.float32).mean(2)
    grey: NDArray[np.float32] = found
    return grey
