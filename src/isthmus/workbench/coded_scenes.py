"""Scenes of shapes on plain grounds, for codecs: pictures of 64 by 64 pixels, and no words.

The scenes are those of :mod:`isthmus.workbench.scenes`, drawn twice as fine; the white ground of
those gives way to one of eight colours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from isthmus.workbench.pycode import Split
from isthmus.workbench.scenes import Scene, examples, render

SIDE = 64

GROUNDS = (
    (245, 240, 230),
    (200, 220, 240),
    (210, 235, 205),
    (240, 205, 205),
    (225, 210, 240),
    (180, 180, 180),
    (120, 130, 140),
    (250, 230, 160),
)
"""Colours of the grounds; none is that of a shape."""


@dataclass(frozen=True)
class CodedScene:
    """A scene; a record of the kind ``pictures``.

    Attributes:
        scene: Its shapes.
        jitter: Seed of where exactly they lie.
        ground: Number of the colour behind them.
    """

    scene: Scene
    jitter: int
    ground: int

    def picture(self) -> Tensor:
        """The picture, uint8 [3, 64, 64].

        Example:
            >>> CodedScene((), 0, 5).picture()[:, 0, 0].tolist()
            [180, 180, 180]
        """
        drawn = torch.from_numpy(render(self.scene, self.jitter, SIDE))
        plain = (drawn == 0).all(0)
        ground = torch.tensor(GROUNDS[self.ground])[:, None, None]
        colours = ((drawn + 2) * 127.5).round().long()
        return torch.where(plain, ground, colours).to(torch.uint8)

    def pixels(self) -> Tensor:
        """The picture: every value is as it is."""
        return self.picture()


def coded_scenes(count: int, split: Split = "train", seed: str = "coded") -> list[CodedScene]:
    """Scenes; none is in both splits.

    Raises:
        InvalidInputError: The count is below 1, or there is no such split.
    """
    drawn = examples(count, split, seed)
    return [CodedScene(e.scene, e.jitter, e.jitter % len(GROUNDS)) for e in drawn]
