"""Clips: short films that are learnt from."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from isthmus.signals.video import open_video

LONGEST = 64
"""Pictures of a file that are looked at."""


@runtime_checkable
class Moving(Protocol):
    """A record that has moving pictures."""

    def frames(self) -> Tensor:
        """The pictures, uint8 [T, 3, H, W]."""
        ...


@dataclass(frozen=True)
class ClipFile:
    """A film in a file, of which the first pictures are read when they are needed."""

    path: Path

    def frames(self) -> Tensor:
        """The first :data:`LONGEST` pictures, uint8 [T, 3, H, W].

        Raises:
            BrokenFileError: The file is damaged.
            InvalidInputError: It is empty or no film.
        """
        return torch.cat(list(itertools.islice(open_video(self.path).chunks, LONGEST)))
