"""Batches of pictures, each from its number alone: order, scaled crops, flips."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from isthmus.errors import BrokenFileError
from isthmus.signals.image import IGNORED, Masked, Pictured, resize

R = TypeVar("R")

KEPT = 1 << 18
"""Values of a picture at most that is kept in memory."""


def drawn(records: Sequence[R], batch: int, part: int, seed: int) -> list[R]:
    """The records of one batch; an epoch is one shuffle, its incomplete last batch left out.

    Example:
        >>> two = [drawn("abcd", 2, part, 0) for part in (0, 1)]
        >>> sorted(two[0] + two[1])
        ['a', 'b', 'c', 'd']
    """
    a_epoch = max(1, len(records) // batch)
    epoch, place = divmod(part, a_epoch)
    order = np.random.default_rng([seed, epoch]).permutation(len(records))
    wrapped = np.take(order, range(place * batch, (place + 1) * batch), mode="wrap")
    return [records[i] for i in wrapped]


class Pictures:
    """Pictures of records by their numbers; small ones are kept, others are read again.

    Args:
        records: What has them.
    """

    def __init__(self, records: Sequence[Pictured]) -> None:
        self.records = records
        self._kept: dict[int, Tensor] = {}

    def __getitem__(self, row: int) -> Tensor:
        """uint8 [3, H, W]."""
        if row in self._kept:
            return self._kept[row]
        picture = self.records[row].picture()
        if picture.numel() <= KEPT:
            self._kept[row] = picture
        return picture


def scaled_crop(
    picture: Tensor,
    mask: Tensor | None,
    side: int,
    scales: tuple[float, float],
    rng: np.random.Generator,
) -> tuple[Tensor, Tensor | None]:
    """A picture scaled by a random factor, cut or padded to a square, half the time mirrored.

    Args:
        picture: uint8 [3, H, W].
        mask: Its classes [H, W], or None; padding has no label.
        side: Side of the square.
        scales: Smallest and largest factor.
        rng: Source of the draws.

    Returns:
        uint8 [3, side, side], and the mask [side, side].
    """
    factor = rng.uniform(*scales)
    size = tuple(max(1, round(n * factor)) for n in picture.shape[-2:])
    both = [resize(picture, (size[0], size[1]))]
    if mask is not None:
        both.append(resize(mask, (size[0], size[1])))
    top, left = (int(rng.integers(0, max(0, n - side) + 1)) for n in size)
    flip = rng.random() < 0.5
    made = []
    for each in both:
        square = each[..., top : top + side, left : left + side]
        if square.shape[-2:] != (side, side):
            fill = 127 if each.ndim == 3 else IGNORED
            whole = each.new_full((*each.shape[:-2], side, side), fill)
            whole[..., : square.shape[-2], : square.shape[-1]] = square
            square = whole
        made.append(square.flip(-1) if flip else square)
    return made[0], made[1] if mask is not None else None


def resized_crop(
    picture: Tensor, side: int, area: tuple[float, float], rng: np.random.Generator
) -> Tensor:
    """A random part of a picture at a fixed size, half the time mirrored.

    Args:
        picture: uint8 [3, H, W].
        side: Side of the square that it is brought to.
        area: Smallest and largest share of the picture; below a whole one, height over width is
            drawn between 3/4 and 4/3 as well.
        rng: Source of the draws.

    Returns:
        uint8 [3, side, side].
    """
    height, width = picture.shape[-2:]
    share = rng.uniform(*area)
    aspect = 1.0 if share == 1 else float(np.exp(rng.uniform(-1, 1) * np.log(4 / 3)))
    h = min(height, max(1, round(height * (share * aspect) ** 0.5)))
    w = min(width, max(1, round(width * (share / aspect) ** 0.5)))
    top, left = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1))
    part = resize(picture[:, top : top + h, left : left + w], (side, side))
    return part.flip(-1) if rng.random() < 0.5 else part


def checked_mask(record: Masked, classes: int) -> Tensor:
    """The mask of a record, int64 [H, W].

    Raises:
        BrokenFileError: It has another size than its picture, or a class that is out of range.
    """
    mask = record.mask()
    found = set(torch.unique(mask).tolist()) - {IGNORED}
    if found and max(found) >= classes:
        raise BrokenFileError(
            f"{record} has class {max(found)}; there are {classes} classes, counted from 0, and "
            f"{IGNORED} is left out: set names to the classes of this data"
        )
    return mask.long()


def same_size(pictures: Sequence[Tensor], most: int = 32) -> list[slice]:
    """Runs of neighbours of one size, at most so many each: what can be stacked.

    Example:
        >>> same_size([torch.zeros(3, 2, 2), torch.zeros(3, 2, 2), torch.zeros(3, 4, 2)])
        [slice(0, 2, None), slice(2, 3, None)]
    """
    runs: list[slice] = []
    start = 0
    for i in range(1, len(pictures) + 1):
        if (
            i == len(pictures)
            or i - start == most
            or pictures[i].shape[-2:] != pictures[start].shape[-2:]
        ):
            runs.append(slice(start, i))
            start = i
    return runs


def normalised(pictures: Tensor) -> Tensor:
    """Pixels as networks read them: uint8 to float, by the mean and spread of ImageNet.

    Args:
        pictures: uint8 [B, 3, H, W].
    """
    mean, spread = (torch.tensor(v, device=pictures.device).view(3, 1, 1) for v in IMAGENET)
    return (pictures.float() / 255 - mean) / spread


def pixels(normal: Tensor) -> Tensor:
    """The inverse of :func:`normalised`, as float from 0 to 1.

    Example:
        >>> x = torch.full((1, 3, 1, 1), 51, dtype=torch.uint8)
        >>> (pixels(normalised(x)) * 255).round().flatten().tolist()
        [51.0, 51.0, 51.0]
    """
    mean, spread = (torch.tensor(v, device=normal.device).view(3, 1, 1) for v in IMAGENET)
    return (normal * spread + mean).clamp(0, 1)


IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and spread of the three channels."""
