"""The `moving` data set: a window that pans over a photograph, and digits that fly and bounce.

Colour, 64 by 64 pixels, eight pictures. Photographs are halved in size after the window is cut, so
that a pan moves by half pixels and leaves nothing sharper than a camera would. Clips to judge by
come from a photograph, and from digits, that no training has seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from isthmus.training.data import Data
from isthmus.workbench import digits
from isthmus.workbench.photographs import photograph

SIDE, LENGTH = 64, 8
FASTEST = 2.0
"""Pixels a picture that anything moves at most, along each side."""

Part = Literal["train", "held-out", "judged"]

#: Photographs of each part, and which share of their width.
_PLACES = {
    "train": (("astronaut", 0.0, 1.0), ("coffee", 0.0, 1.0), ("rocket", 0.0, 1.0)),
    "held-out": (("chelsea", 0.0, 0.5),),
    "judged": (("chelsea", 0.5, 1.0),),
}
_DIGITS: dict[Part, Literal["learn", "stop", "judged"]] = {
    "train": "learn",
    "held-out": "stop",
    "judged": "judged",
}


@dataclass(frozen=True)
class Pan:
    """A window that moves over a photograph.

    Attributes:
        name: Of the photograph.
        top: First place of the window, in half pixels.
        left: The same along the other side.
        down: Half pixels a picture.
        right: The same along the other side.
        mirrored: Whether left and right are exchanged.
    """

    name: str
    top: int
    left: int
    down: int
    right: int
    mirrored: bool = False

    def frames(self) -> Tensor:
        """The pictures, uint8 [LENGTH, 3, SIDE, SIDE]."""
        whole = _planes(self.name)
        made = []
        for t in range(LENGTH):
            y, x = self.top + t * self.down, self.left + t * self.right
            made.append(whole[:, y : y + 2 * SIDE, x : x + 2 * SIDE])
        small = F.avg_pool2d(torch.stack(made).float(), 2).round().to(torch.uint8)
        return small.flip(-1) if self.mirrored else small


@dataclass(frozen=True)
class Flight:
    """Digits that fly over a dark ground and bounce.

    Attributes:
        part: Which digits.
        which: Their numbers.
        places: First places of each, down and right.
        steps: Pixels that each moves a picture.
        sides: How large each is.
    """

    part: Part
    which: tuple[int, ...]
    places: tuple[tuple[int, int], ...]
    steps: tuple[tuple[int, int], ...]
    sides: tuple[int, ...]

    def frames(self) -> Tensor:
        """The pictures, uint8 [LENGTH, 3, SIDE, SIDE]."""
        grids = digits.whole(_DIGITS[self.part])[list(self.which)].float() * (255 / 16)
        ground = torch.full((LENGTH, SIDE, SIDE), 16.0)
        for grid, place, step, side in zip(grids, self.places, self.steps, self.sides, strict=True):
            size = (side, side)
            large = F.interpolate(grid[None, None], size, mode="bilinear", align_corners=False)[0]
            room = SIDE - side
            for t in range(LENGTH):
                y, x = (_bounced(p + t * s, room) for p, s in zip(place, step, strict=True))
                window = ground[t, y : y + side, x : x + side]
                window.copy_(torch.maximum(window, large[0]))
        return ground.round().to(torch.uint8)[:, None].expand(-1, 3, -1, -1).contiguous()


@lru_cache(maxsize=4)
def _planes(name: str) -> Tensor:
    return torch.from_numpy(photograph(name)).permute(2, 0, 1)


def _bounced(place: int, room: int) -> int:
    """A place between 0 and the room, thrown back at both ends."""
    place %= 2 * room
    return min(place, 2 * room - place)


def pans(count: int, part: Part, seed: int = 0) -> list[Pan]:
    """Pans over photographs, at up to :data:`FASTEST` pixels a picture and never still.

    Raises:
        MissingExtraError: scikit-image is not installed.
    """
    draw = torch.Generator().manual_seed(seed)
    places, found = _PLACES[part], []
    fast = int(2 * FASTEST)
    for number in range(count):
        name, first, last = places[number % len(places)]
        height, width = photograph(name).shape[:2]
        left, right = int(width * first), int(width * last)
        step = [0, 0]
        while step == [0, 0]:
            step = torch.randint(-fast, fast + 1, (2,), generator=draw).tolist()
        at = []
        for low, high, s in ((0, height, step[0]), (left, right, step[1])):
            low, high = low + max(0, -s * (LENGTH - 1)), high - 2 * SIDE - max(0, s * (LENGTH - 1))
            at.append(int(torch.randint(low, high + 1, (1,), generator=draw)))
        mirrored = bool(torch.randint(2, (1,), generator=draw))
        found.append(Pan(name, at[0], at[1], step[0], step[1], mirrored))
    return found


def flights(count: int, part: Part, seed: int = 0) -> list[Flight]:
    """Clips of one to three digits.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    draw = torch.Generator().manual_seed(seed)

    def drawn(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=draw))

    many, fast, found = len(digits.whole(_DIGITS[part])), int(FASTEST), []
    for _ in range(count):
        each = range(drawn(1, 4))
        sides = tuple(drawn(14, 25) for _ in each)
        places = tuple((drawn(0, SIDE - s), drawn(0, SIDE - s)) for s in sides)
        steps = tuple((drawn(-fast, fast + 1), drawn(1, fast + 1)) for _ in each)
        which = tuple(drawn(0, many) for _ in each)
        found.append(Flight(part, which, places, steps, sides))
    return found


def data(count: int = 1200, held_out: int = 16) -> Data[Pan | Flight]:
    """Two pans for each flight of digits."""

    def both(number: int, part: Part) -> list[Pan | Flight]:
        few = number // 3
        return [*pans(number - few, part), *flights(few, part)]

    return Data(both(count, "train"), both(held_out, "held-out"))
