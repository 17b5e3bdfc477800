"""Real photographs that ship with scikit-image, and patches cut from them.

The pictures are those of :mod:`skimage.data` that its wheel holds: ``astronaut`` and ``rocket``
(NASA, SpaceX; public domain), ``coffee`` and ``chelsea`` (CC0).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from isthmus.errors import InvalidInputError, UnknownNameError, require

NAMES = ("astronaut", "chelsea", "coffee", "rocket")


def photograph(name: str) -> NDArray[np.uint8]:
    """One photograph, red, green and blue [H, W, 3].

    Raises:
        MissingExtraError: scikit-image is not installed.
        UnknownNameError: No such photograph.
    """
    if name not in NAMES:
        raise UnknownNameError("photograph", name, NAMES)
    data: Any = require("skimage.data", "workbench")
    return np.asarray(getattr(data, name)())


def grey_patches(
    size: int, count: int, generator: torch.Generator, names: Sequence[str] = NAMES
) -> torch.Tensor:
    """Square cuttings of the photographs' luma, at places drawn evenly.

    Args:
        size: Side in pixels.
        count: How many, as many from each photograph as from the others, give or take one.
        generator: Draws the places.
        names: The photographs.

    Returns:
        Patches [count, size, size], 0 to 1.

    Raises:
        InvalidInputError: A photograph is smaller than a patch.
    """
    luma = torch.tensor([0.299, 0.587, 0.114])  # ITU-R BT.601
    parts = []
    for i, name in enumerate(names):
        grey = torch.from_numpy(photograph(name).astype(np.float32) / 255) @ luma  # [H, W]
        if min(grey.shape) < size or size < 1:
            raise InvalidInputError(f"{name} has {tuple(grey.shape)} pixels; ask for 1 to that")
        every = grey.unfold(0, size, 1).unfold(1, size, 1)  # [y, x, size, size], a view
        share = len(range(i, count, len(names)))
        y, x = (torch.randint(n, (share,), generator=generator) for n in every.shape[:2])
        parts.append(every[y, x])
    return torch.cat(parts)
