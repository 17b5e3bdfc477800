"""Grids of codes as bytes: along a model of codes, by counts, or evenly; in one frame or several.

::

    codes [P, h, w] ─▶ tiles of one side ─▶ a step of the model for each place, all tiles at once
                    └▶ dealt into frames: neighbours travel apart, and a lost frame leaves gaps
                       that are known and have neighbours that arrived

A model of codes needs all that came before, so only a single frame is coded along it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from isthmus.codecs.container import Frame
from isthmus.codecs.laws import frequencies, one_thread
from isthmus.codecs.rangecoder import Decoder, Encoder, Ints, Table
from isthmus.errors import InvalidInputError
from isthmus.models.code_lm import CodeLM, CodeState
from isthmus.models.masked_grid import MaskedGrid
from isthmus.signals.image import tiles, untiled

MOST = 64
"""Frames that codes are dealt into, at most."""


@lru_cache(maxsize=MOST)
def shear(frames: int) -> int:
    """How far a row's deal is moved against the row above, so that frames are spread widely.

    Example:
        >>> shear(5)  # the move of a knight: a frame's codes are sqrt 5 apart
        2
    """
    reach = range(-frames, frames + 1)

    def closest(step: int) -> int:
        same = [(r, c) for r in reach for c in reach if (c + step * r) % frames == 0]
        return min(r * r + c * c for r, c in same if (r, c) != (0, 0))

    return max(range(frames), key=closest)


def dealt(shape: Sequence[int], frames: int) -> Tensor:
    """Which frame each code of a grid travels in.

    Args:
        shape: Planes P, rows h and columns w.
        frames: How many, 1 to :data:`MOST`.

    Returns:
        int64 [P, h, w].

    Raises:
        InvalidInputError: No such number of frames.

    Example:
        >>> dealt((1, 2, 5), 5).tolist()
        [[[0, 1, 2, 3, 4], [2, 3, 4, 0, 1]]]
    """
    if not 1 <= frames <= MOST:
        raise InvalidInputError(f"codes travel in 1 to {MOST} frames, not {frames}")
    _, high, wide = shape
    row, column = torch.arange(high)[:, None], torch.arange(wide)
    return ((column + shear(frames) * row) % frames).expand(*shape)


def nearest(codes: Tensor, gaps: Tensor) -> Tensor:
    """Codes [P, h, w] whose gaps hold the code that arrived nearest, in steps along the grid.

    Of equally near ones that above is taken, else that on the left, on the right, below.

    Raises:
        InvalidInputError: A plane of which nothing arrived.

    Example:
        >>> row = torch.tensor([[[7, 0, 0, 9]]])
        >>> nearest(row, torch.tensor([[[False, True, True, False]]])).tolist()
        [[[7, 7, 9, 9]]]
    """
    if gaps.flatten(1).all(1).any():
        raise InvalidInputError("there is nothing to fill gaps from")
    codes, open_ = codes.clone(), gaps.clone()
    while open_.any():
        before, known = codes.clone(), ~open_
        for axis, forward in ((1, True), (2, True), (2, False), (1, False)):
            count = codes.shape[axis]
            to = [slice(None)] * 3
            of = [slice(None)] * 3
            to[axis], of[axis] = slice(1, count), slice(0, count - 1)
            if not forward:
                to, of = of, to
            take = open_[tuple(to)] & known[tuple(of)]
            codes[tuple(to)] = torch.where(take, before[tuple(of)], codes[tuple(to)])
            open_[tuple(to)] &= ~take
    return codes


@torch.no_grad()
def filled(
    masker: MaskedGrid, codes: Tensor, gaps: Tensor, span: tuple[int, int], side: int, rounds: int
) -> Tensor:
    """Codes [P, h, w] whose gaps a model has filled, tile by tile.

    Args:
        masker: The model.
        codes: int64 [P, h, w].
        gaps: Bool, of that shape.
        span: Where these codes lie among those that the model knows.
        side: Of a tile.
        rounds: See :meth:`MaskedGrid.fill <isthmus.models.masked_grid.MaskedGrid.fill>`.
    """
    rows, holes = (torch.cat([tiles(plane[None], side) for plane in x]) for x in (codes, gaps))
    with one_thread():
        found = masker.fill(rows + span[0], holes, (side, side), span, rounds) - span[0]
    shape = (1, codes.shape[1], codes.shape[2])
    return torch.cat([untiled(v, shape, side) for v in found.chunk(len(codes))])


class GridCoder:
    """Codes of a grid along a model, tile by tile and all tiles side by side.

    Places beyond the edge of the grid cost nothing: the model is told that they repeat the last
    row or column.

    Args:
        lm: Of one codebook.
        low: The model's number of code 0.
        size: K, codes.
        side: Of a tile.
    """

    def __init__(self, lm: CodeLM, low: int, size: int, side: int) -> None:
        self.lm, self.low, self.size, self.side = lm, low, size, side

    def encode(self, codes: Tensor) -> bytes:
        """Bytes of codes int64 [P, h, w]."""
        values = torch.cat([tiles(plane[None], self.side) for plane in codes])
        inside, coder, state = self._inside(codes.shape), Encoder(), CodeState()
        laws, wanted = [], []
        for place in range(self.side**2):
            law, state = self._law(state, len(values))
            state.last = values[None, :, place] + self.low
            laws.append(law[inside[:, place].numpy()])
            wanted.append(values[inside[:, place], place])
        coder.rows(torch.cat(wanted).numpy(), np.concatenate(laws))
        return coder.finish()

    def decode(self, data: bytes, shape: tuple[int, int, int]) -> Tensor:
        """Codes int64 [P, h, w] of bytes.

        Raises:
            BrokenFileError: They were not coded so.
        """
        inside, coder, state = self._inside(shape), Decoder(data), CodeState()
        count, side = len(inside), self.side
        values = torch.zeros(count, side**2, dtype=torch.int64)
        down, across = -(-shape[1] // side), -(-shape[2] // side)
        columns = shape[2] - side * (torch.arange(count) % across)  # of the grid, in each tile
        for place in range(side**2):
            law, state = self._law(state, count)
            here = inside[:, place]
            if place:
                beyond = (place % side) >= columns
                left, above = values[:, place - 1], values[:, max(0, place - side)]
                values[:, place] = torch.where(beyond, left, above)
            if here.any():
                values[here, place] = torch.from_numpy(coder.rows(law[here.numpy()]))
            state.last = values[None, :, place] + self.low
        planes = values.view(shape[0], down * across, -1)
        return torch.cat([untiled(v, (1, *shape[1:]), side) for v in planes])

    def _inside(self, shape: Sequence[int]) -> Tensor:
        """Which places of tiles lie on the grid, bool [B, side^2]."""
        planes, high, wide = shape
        row, column = -(-high // self.side) * self.side, -(-wide // self.side) * self.side
        on = torch.zeros(1, row, column, dtype=torch.bool)
        on[:, :high, :wide] = True
        return tiles(on, self.side).repeat(planes, 1)

    def _law(self, state: CodeState, count: int) -> tuple[Ints, CodeState]:
        """Frequencies of the next place in every tile, [B, K]."""
        with one_thread():
            logits, state = self.lm.step(state, 1, count)
        return frequencies(logits[0, :, self.low : self.low + self.size]), state


@dataclass(frozen=True)
class GridPackets:
    """The frames of a grid of codes.

    Attributes:
        frames: How many; see :func:`dealt`.
        size: K, codes.
        table: Frequencies of the codes; None spends the bits of even odds.
        along: Codes a single frame in the place of the table.
    """

    frames: int
    size: int
    table: Table | None = None
    along: GridCoder | None = None

    def encode(self, codes: Tensor) -> Iterator[tuple[Tensor, bytes]]:
        """The codes of each frame and their bytes, of codes int64 [P, h, w]."""
        if self.along is not None and self.frames == 1:
            yield codes, self.along.encode(codes)
            return
        turn = dealt(codes.shape, self.frames)
        for number in range(self.frames):
            own, coder = codes[turn == number], Encoder()
            if self.table is None:
                coder.uniform(own.numpy(), np.full(len(own), self.size))
            elif len(own):
                coder.table(own.numpy(), self.table)
            yield own, coder.finish()

    def decode(self, frames: Iterable[Frame], shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        """Codes int64 [P, h, w], and a bool of that shape: where nothing has arrived.

        Raises:
            BrokenFileError: The bytes were not coded so.
            DesyncError: Other symbols than were coded.
        """
        codes, gaps = torch.zeros(shape, dtype=torch.int64), torch.ones(shape, dtype=torch.bool)
        turn = dealt(shape, self.frames)
        for number, frame in zip(range(self.frames), frames, strict=False):
            if frame.lost:
                continue
            here = turn == number
            count = int(here.sum())
            if self.along is not None and self.frames == 1:
                own = self.along.decode(frame.payload, shape)[here]
            elif not count:  # a picture of fewer codes than frames
                own = codes[here]
            elif self.table is None:
                even = np.full(count, self.size)
                own = torch.from_numpy(Decoder(frame.payload).uniform(even))
            else:
                own = torch.from_numpy(Decoder(frame.payload).table(count, self.table))
            frame.verify(own)
            codes[here], gaps = own, gaps & ~here
        return codes, gaps
