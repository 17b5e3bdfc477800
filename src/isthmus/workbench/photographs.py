"""Real photographs that ship with scikit-image and scikit-learn, and pieces cut from them.

Those of :mod:`skimage.data` that its wheel holds: ``astronaut``, ``hubble_deep_field`` (NASA) and
``rocket`` (SpaceX), in the public domain; ``coffee``, ``chelsea``, ``camera``, ``retina``,
``brick``, ``grass`` and ``gravel`` (CC0); ``coins``, ``immunohistochemistry`` and ``moon`` (no
known restrictions). Those of scikit-learn, ``china`` and ``flower``, are for judging alone
(D. Buechele and Vultilion, CC BY 2.0).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from isthmus.errors import InvalidInputError, UnknownNameError, require

NAMES = ("astronaut", "chelsea", "coffee", "rocket")

MORE = (
    *("brick", "camera", "coins", "grass", "gravel", "moon"),  # grey
    *("hubble_deep_field", "immunohistochemistry", "retina"),
)

JUDGED = ("coffee", "china", "flower")
"""What no codec of photographs has learnt from."""

SIDE = 256
"""Of a cutting."""


def photograph(name: str) -> NDArray[np.uint8]:
    """One photograph, red, green and blue [H, W, 3].

    Raises:
        MissingExtraError: scikit-image, or scikit-learn, is not installed.
        UnknownNameError: No such photograph.
    """
    if name not in {*NAMES, *MORE, *JUDGED}:
        raise UnknownNameError("photograph", name, (*NAMES, *MORE, *JUDGED[1:]))
    found: Any
    if name in ("china", "flower"):
        data: Any = require("sklearn.datasets", "workbench")
        found = data.load_sample_image(f"{name}.jpg")
    else:
        data = require("skimage.data", "workbench")
        found = np.asarray(getattr(data, name)())
    return np.repeat(found[..., None], 3, 2) if found.ndim == 2 else found


@dataclass(frozen=True)
class Cutting:
    """A piece of a photograph; a record of the kind ``pictures``.

    Attributes:
        name: Of the photograph.
        top: Its first row.
        left: Its first column.
        side: Rows and columns at most.
    """

    name: str
    top: int = 0
    left: int = 0
    side: int = SIDE

    def picture(self) -> torch.Tensor:
        """The piece, uint8 [3, H, W].

        Example:
            >>> Cutting("chelsea", 256, 256).picture().shape
            torch.Size([3, 44, 195])
        """
        whole = _whole(self.name)
        piece = whole[self.top : self.top + self.side, self.left : self.left + self.side]
        return torch.from_numpy(piece.copy()).permute(2, 0, 1).contiguous()

    def pixels(self) -> torch.Tensor:
        """The piece: every value is as it is."""
        return self.picture()


def cuttings(part: Literal["train", "held-out", "judged"]) -> list[Cutting]:
    """Pieces that photographs are cut into, those of :data:`NAMES` twice; a seventh is held out.

    Example:
        >>> len(cuttings("train")), len(cuttings("held-out")), len(cuttings("judged"))
        (93, 13, 3)
    """
    if part == "judged":
        return [Cutting(name, side=1 << 16) for name in JUDGED]
    found = []
    for name in (*NAMES, *MORE):
        if name in JUDGED:
            continue
        high, wide = _whole(name).shape[:2]
        rows, columns = (_starts(n) for n in (high, wide))
        found += [Cutting(name, top, left) for top in rows for left in columns]
    held_out = found[3::7]
    if part == "held-out":
        return held_out
    learnt = [cut for cut in found if cut not in set(held_out)]
    return learnt + [cut for cut in learnt if cut.name in NAMES]


def _starts(length: int) -> list[int]:
    """Where pieces begin: side by side, the last at the end."""
    count = -(-length // SIDE)
    return [round(i * (length - SIDE) / max(1, count - 1)) for i in range(count)]


@lru_cache
def _whole(name: str) -> NDArray[np.uint8]:
    return photograph(name)


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
