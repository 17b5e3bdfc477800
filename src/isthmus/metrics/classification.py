"""How well a score tells two kinds of things apart."""

from __future__ import annotations

import torch


def auroc(scores: torch.Tensor, positive: torch.Tensor) -> float:
    """Area under the ROC curve: how often a positive has a higher score than a negative one.

    Args:
        scores: Any shape; equal scores count half.
        positive: bool, the same shape.

    Returns:
        A number in [0, 1]; not a number where a kind is missing.

    Example:
        >>> auroc(torch.tensor([0.9, 0.4, 0.4, 0.1]), torch.tensor([True, False, True, False]))
        0.875
    """
    values, labels = scores.flatten().double(), positive.flatten().bool()
    _, place, count = torch.unique(values, return_inverse=True, return_counts=True)
    # the mean rank of each distinct score, from 1
    ranks = (count.cumsum(0) - (count - 1) / 2.0)[place]
    yes, no = int(labels.sum()), int((~labels).sum())
    above = float(ranks[labels].sum()) - yes * (yes + 1) / 2
    return above / (yes * no) if yes and no else float("nan")
