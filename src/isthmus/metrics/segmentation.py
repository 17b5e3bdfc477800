"""How well the classes of pixels are told: accuracy, intersection over union, at boundaries."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from isthmus.errors import InvalidInputError
from isthmus.signals.image import IGNORED


class Confusion:
    """Counts of every true class against every predicted one, over any number of masks.

    Args:
        classes: How many classes C there are.

    Attributes:
        counts: int64 [C, C], rows are true classes.

    Example:
        >>> seen = Confusion(3)
        >>> seen.add(torch.tensor([[0, 0, 1, 255]]), torch.tensor([[0, 1, 1, 1]]))
        >>> seen.iou().tolist()  # 1 of 2, 1 of 2, a class that nobody has seen
        [0.5, 0.5, nan]
        >>> seen.mean_iou(), round(seen.accuracy(), 3)
        (0.5, 0.667)
    """

    def __init__(self, classes: int) -> None:
        self.counts = torch.zeros(classes, classes, dtype=torch.int64)

    def add(self, truth: Tensor, predicted: Tensor, where: Tensor | None = None) -> None:
        """Count some pixels.

        Args:
            truth: True classes, integers of any shape; :data:`IGNORED` is left out.
            predicted: Predicted classes, same shape.
            where: Bool, same shape: the pixels that count, all when None.

        Raises:
            InvalidInputError: The shapes differ, or a class is out of range.
        """
        if truth.shape != predicted.shape:
            raise InvalidInputError(
                f"truth {list(truth.shape)} and prediction {list(predicted.shape)} differ in shape"
            )
        judged = truth != IGNORED if where is None else (truth != IGNORED) & where
        true, told = truth[judged].long().cpu(), predicted[judged].long().cpu()
        size = len(self.counts)
        if len(true) and not (0 <= min(true.min(), told.min()) <= max(true.max(), told.max())):
            raise InvalidInputError("classes are counted from 0")
        if len(true) and max(true.max(), told.max()) >= size:
            raise InvalidInputError(
                f"class {int(max(true.max(), told.max()))} is out of range; there are {size}, and "
                f"{IGNORED} is left out"
            )
        self.counts += torch.bincount(true * size + told, minlength=size**2).view(size, size)

    def iou(self) -> Tensor:
        """Intersection over union of each class, float64 [C]; nan for one that never occurred."""
        hits = self.counts.diagonal().double()
        return hits / (self.counts.sum(0) + self.counts.sum(1) - hits)

    def mean_iou(self) -> float:
        """Mean over the classes that occur in truth or prediction (mIoU)."""
        return float(self.iou().nanmean())

    def accuracy(self) -> float:
        """Share of pixels told right."""
        return float(self.counts.diagonal().sum() / self.counts.sum())


def trimap(mask: Tensor, width: int = 2) -> Tensor:
    """The band of pixels around the boundaries of a mask.

    Args:
        mask: Classes, integers [B, H, W].
        width: How far the band reaches on both sides, in pixels.

    Returns:
        Bool [B, H, W]: whether another class is within ``width`` rows and columns.

    Example:
        >>> trimap(torch.tensor([[[0, 0, 0, 1, 1, 1]]]), 1).int().tolist()
        [[[0, 0, 1, 1, 0, 0]]]
    """
    x = mask[:, None].float()
    span = 2 * width + 1
    highest = F.max_pool2d(x, span, 1, width)
    lowest = -F.max_pool2d(-x, span, 1, width)
    return (highest != lowest)[:, 0]
