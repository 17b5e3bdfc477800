"""Rendered scenes with a class for every pixel, and scenes with one shape to name.

Shapes of eight kinds lie over each other on a shaded grey ground, in any size and turn. A kind has
a typical hue, from which a shape strays as far as the spec says: colour is a hint, or none, and the
outline settles it. Three kinds (star, ring, wire) are thin, so that boundaries matter. A scene is a
function of its spec, split and index; nothing is stored, and pictures are drawn when asked for.
"""

from __future__ import annotations

import colorsys
import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from isthmus.errors import InvalidInputError
from isthmus.workbench.pycode import Split

Plane = NDArray[np.float32]


@dataclass(frozen=True)
class Spec:
    """What scenes look like.

    Attributes:
        side: Height and width in pixels.
        shapes: Fewest and most shapes.
        radius: Smallest and largest radius of a shape, in sides.
        noise: Standard deviation of the grain, in grey levels.
        thin: Share of scenes that have a thin shape for certain.
        shading: Whether ground and shapes are shaded.
        hue: Standard deviation of a shape's hue around that of its kind, in turns; kinds are an
            eighth of a turn apart.
    """

    side: int
    shapes: tuple[int, int]
    radius: tuple[float, float]
    noise: float
    thin: float
    shading: bool
    hue: float


SEGMENTS = Spec(
    side=96, shapes=(2, 5), radius=(0.13, 0.27), noise=4.0, thin=0.5, shading=True, hue=0.035
)
"""Scenes of several shapes, for segmentation."""

NAMED = Spec(
    side=32, shapes=(1, 1), radius=(0.38, 0.46), noise=36.0, thin=0.0, shading=False, hue=1.0
)
"""Scenes of one shape that fills most of the ground, for classification: what is hidden follows
from what is seen, once the kind of shape is known, but for much grain, which nothing foretells."""


def _circle(x: Plane, y: Plane, r: float) -> Any:
    return np.hypot(x, y) - r


def _square(x: Plane, y: Plane, r: float) -> Any:
    return np.maximum(abs(x), abs(y)) - 0.85 * r


def _triangle(x: Plane, y: Plane, r: float) -> Any:
    return np.maximum(abs(x) * 0.866 - y * 0.5, y) - 0.5 * r


def _cross(x: Plane, y: Plane, r: float) -> Any:
    x, y = abs(x), abs(y)
    return np.maximum(np.maximum(x, y) - r, np.minimum(x, y) - 0.3 * r)


def _crescent(x: Plane, y: Plane, r: float) -> Any:
    return np.maximum(np.hypot(x, y) - r, 0.8 * r - np.hypot(x - 0.6 * r, y))


def _star(x: Plane, y: Plane, r: float) -> Any:
    away, angle = np.hypot(x, y), np.arctan2(y, x)
    angle = abs((angle + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
    # the edge from a tip (r, 0) to the notch beside it, at 0.4 r and a tenth of a turn
    ex, ey = 0.4 * r * np.cos(np.pi / 5) - r, 0.4 * r * np.sin(np.pi / 5)
    return ((away * np.cos(angle) - r) * ey - away * np.sin(angle) * ex) / np.hypot(ex, ey)


def _ring(x: Plane, y: Plane, r: float) -> Any:
    return abs(np.hypot(x, y) - 0.84 * r) - 0.16 * r


def _wire(x: Plane, y: Plane, r: float) -> Any:
    wave = 0.35 * r * np.sin(3.2 * x / r)
    return np.maximum(abs(y - wave) * 0.8 - 0.11 * r, abs(x) - r)


SHAPES: dict[str, Callable[[Plane, Plane, float], Any]] = {
    "circle": _circle,
    "star": _star,
    "square": _square,
    "ring": _ring,
    "triangle": _triangle,
    "wire": _wire,
    "cross": _cross,
    "crescent": _crescent,
}
"""Distance to the outline in pixels, negative inside, by name; kinds of like hue look unlike."""

THIN = (1, 3, 5)
"""Numbers of the thin shapes."""

CLASSES = ("background", *SHAPES)
"""Names of the classes of a mask."""


@dataclass(frozen=True)
class MaskedScene:
    """A scene; a record of the kinds ``pictures`` and ``masks``.

    Attributes:
        spec: What scenes look like.
        split: ``"train"`` or ``"held-out"``.
        index: Its number.
    """

    spec: Spec
    split: Split
    index: int

    def picture(self) -> Tensor:
        """The picture, uint8 [3, side, side]."""
        return self.draw()[0]

    def mask(self) -> Tensor:
        """The class of every pixel, uint8 [side, side]."""
        return self.draw()[1]

    @property
    def name(self) -> int:
        """Number of the class of its first shape."""
        return int(_kinds(self.spec, _source(self))[0]) + 1

    def draw(self) -> tuple[Tensor, Tensor]:
        """Picture and mask.

        Example:
            >>> picture, mask = MaskedScene(SEGMENTS, "train", 0).draw()
            >>> picture.shape, picture.dtype, bool(mask.max() <= 8)
            (torch.Size([3, 96, 96]), torch.uint8, True)
        """
        return _drawn(self)


def masked_scenes(count: int, split: Split = "train", spec: Spec = SEGMENTS) -> list[MaskedScene]:
    """The first scenes of a split.

    Raises:
        InvalidInputError: The count is below 1, or there is no such split.
    """
    if count < 1 or split not in ("train", "held-out"):
        raise InvalidInputError(
            f"scenes need a count of 1 or more and a split of 'train' or 'held-out', got {count} "
            f"and {split!r}"
        )
    return [MaskedScene(spec, split, i) for i in range(count)]


def named_scenes(count: int, split: Split = "train") -> tuple[Tensor, Tensor]:
    """Pictures of one shape each, uint8 [B, 3, 32, 32], and its number among the shapes [B]."""
    scenes = masked_scenes(count, split, NAMED)
    return torch.stack([s.picture() for s in scenes]), torch.tensor([s.name - 1 for s in scenes])


@functools.lru_cache(maxsize=2)  # a picture and its mask are asked for one after the other
def _drawn(scene: MaskedScene) -> tuple[Tensor, Tensor]:
    spec, rng = scene.spec, _source(scene)
    kinds = _kinds(spec, rng)
    side = spec.side
    ground = rng.uniform(40, 215) + rng.uniform(-20, 20, 3)
    slope = rng.uniform(-40, 40, (3, 2)) * spec.shading
    ramp = np.linspace(-1, 1, side, dtype=np.float32)
    picture = ground[:, None, None] + slope[:, :1, None] * ramp[:, None]
    picture = (picture + slope[:, 1:, None] * ramp).astype(np.float32)
    mask = np.zeros((side, side), np.uint8)
    distances = list(SHAPES.values())
    for kind in kinds:
        r = side * rng.uniform(*spec.radius)
        cx, cy = rng.uniform(0.8 * r, side - 0.8 * r, 2)
        turn, shade = rng.uniform(0, 2 * np.pi), rng.uniform(-0.2, 0.2) * spec.shading
        colour = _colour(kind, spec.hue, rng)
        x0, x1 = max(0, int(cx - r - 1)), min(side, int(cx + r + 2))
        y0, y1 = max(0, int(cy - r - 1)), min(side, int(cy + r + 2))
        dx = np.arange(x0, x1, dtype=np.float32)[None] + np.float32(0.5 - cx)
        dy = np.arange(y0, y1, dtype=np.float32)[:, None] + np.float32(0.5 - cy)
        c, s = np.float32(np.cos(turn)), np.float32(np.sin(turn))
        u, v = c * dx + s * dy, c * dy - s * dx
        d = distances[kind](u, v, r)
        cover = np.clip(0.5 - d, 0, 1).astype(np.float32)
        lit = (1 + np.float32(shade / r) * u) * colour[:, None, None]
        window = picture[:, y0:y1, x0:x1]
        window += cover * (lit - window)
        mask[y0:y1, x0:x1][d <= 0] = kind + 1
    picture += rng.standard_normal(picture.shape, np.float32) * np.float32(spec.noise)
    pixels = np.clip(picture + 0.5, 0, 255).astype(np.uint8)
    return torch.from_numpy(pixels), torch.from_numpy(mask)


def _source(scene: MaskedScene) -> np.random.Generator:
    text = f"scene masks/{scene.spec}/{scene.split}/{scene.index}"
    return np.random.default_rng(list(hashlib.sha256(text.encode()).digest()[:16]))


def _kinds(spec: Spec, rng: np.random.Generator) -> NDArray[np.int64]:
    kinds = rng.integers(0, len(SHAPES), rng.integers(spec.shapes[0], spec.shapes[1] + 1))
    if rng.random() < spec.thin:
        kinds[-1] = rng.choice(THIN)  # the last one lies on top
    return kinds


def _colour(kind: int, spread: float, rng: np.random.Generator) -> Any:
    """A full colour, [3]: grounds are grey, so shapes stand out."""
    hue = (kind / len(SHAPES) + spread * rng.standard_normal()) % 1.0
    colour = colorsys.hsv_to_rgb(hue, rng.uniform(0.6, 1.0), rng.uniform(0.6, 1.0))
    return np.array(colour, np.float32) * 255
