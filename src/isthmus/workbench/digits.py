"""The `digits` data set: 8 by 8 pictures of handwritten digits as grids of grey levels.

scikit-learn's digits (UCI, 1,797 pictures) with their 17 levels halved to 9, one token a pixel.
Tokens 0 to 8 are grey levels, 9 to 18 ask for a digit. Every fifth picture is held out. The judge
is a small perceptron that was shown the other pictures; its hidden layer gives the features in
which made and real pictures are compared.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from isthmus.errors import require
from isthmus.metrics.images import class_accuracy, frechet_distance
from isthmus.workbench.pycode import Split

SIDE, LEVELS, CLASSES = 8, 9, 10
HELD_OUT = 5
"""One picture in so many is held out."""


@functools.lru_cache(maxsize=1)
def _all() -> tuple[Tensor, Tensor]:
    data: Any = require("sklearn.datasets", "workbench").load_digits()
    return torch.from_numpy(data.images // 2).long(), torch.from_numpy(data.target).long()


def pictures(split: Split) -> tuple[Tensor, Tensor]:
    """Grey levels int64 [N, 8, 8] and digits int64 [N].

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    grids, digits = _all()
    held_out = torch.arange(len(grids)) % HELD_OUT == 0
    chosen = held_out if split == "held-out" else ~held_out
    return grids[chosen], digits[chosen]


@dataclass(frozen=True)
class Digit:
    """A digit with all its 17 levels, as a picture to train on."""

    values: tuple[int, ...]

    def pixels(self) -> Tensor:
        """Levels 0 to 16, uint8 [1, 8, 8]."""
        return torch.tensor(self.values, dtype=torch.uint8).view(1, SIDE, SIDE)

    def picture(self) -> Tensor:
        """The same as grey, uint8 [3, 8, 8]."""
        return (self.pixels().int() * 255 // 16).to(torch.uint8).expand(3, -1, -1).contiguous()


JUDGED = 397
"""Digits that only claims of codecs look at."""


def whole(part: Literal["learn", "stop", "judged"]) -> Tensor:
    """Digits with all their levels, uint8 [N, 8, 8]: 1,260 to learn from, 140, and 397.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    data: Any = require("sklearn.datasets", "workbench").load_digits()
    grids = torch.from_numpy(data.images).to(torch.uint8)
    order = torch.randperm(len(grids), generator=torch.Generator().manual_seed(0))
    judged, rest = order[:JUDGED], order[JUDGED:]
    return grids[{"learn": rest[140:], "stop": rest[:140], "judged": judged}[part]]


def records(part: Literal["learn", "stop"]) -> list[Digit]:
    """The same as records."""
    return [Digit(tuple(grid.flatten().tolist())) for grid in whole(part)]


def digest() -> str:
    """What the data set is, in a few letters."""
    grids, digits = _all()
    return hashlib.sha256(grids.numpy().tobytes() + digits.numpy().tobytes()).hexdigest()


def prompts(digits: Tensor) -> Tensor:
    """Tokens that ask for digits: int64 [B, 1] from int64 [B]."""
    return LEVELS + digits[:, None]


class Judge:
    """A perceptron that tells digits apart; made in a second, the same for everybody.

    Args:
        seed: Of its weights and the order of its lessons.
    """

    def __init__(self, seed: int = 0) -> None:
        grids, digits = pictures("train")
        perceptron: Any = require("sklearn.neural_network", "workbench").MLPClassifier
        self._net = perceptron(
            (64,), alpha=1e-2, max_iter=500, random_state=seed, n_iter_no_change=10
        )
        self._net.fit(grids.flatten(1).numpy() / (LEVELS - 1), digits.numpy())
        self._real = self.features(pictures("held-out")[0])

    def features(self, grids: Tensor) -> Tensor:
        """The hidden layer, float64 [N, 64], of pictures [N, 8, 8]."""
        weight, bias = (torch.from_numpy(x[0]) for x in (self._net.coefs_, self._net.intercepts_))
        return (grids.flatten(1).double() / (LEVELS - 1) @ weight + bias).relu()

    def accuracy(self, grids: Tensor, digits: Tensor) -> float:
        """Share of pictures [N, 8, 8] in which it sees the digit [N] that was asked for."""
        weight, bias = (torch.from_numpy(x[1]) for x in (self._net.coefs_, self._net.intercepts_))
        return class_accuracy(self.features(grids) @ weight + bias, digits)

    def distance(self, grids: Tensor) -> float:
        """Frechet distance of pictures [N, 8, 8] from the held-out ones, in its features."""
        return frechet_distance(self.features(grids), self._real)
