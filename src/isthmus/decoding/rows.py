"""Rows of a grid in flight: a row begins before the one above it has ended.

::

    window 2, width 4, row 0 alone:     1  2  3  4
    number = pass                       5  6  7  8
                                        7  8  9 10

The first token of a row follows, in raster order, the last one of the row above, which may not be
there yet: another token stands in for it, at its position, until it is (ZipAR, He et al. 2024,
2412.04062).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from isthmus.decoding.grid import GridSession, Painted, PlaceDraws
from isthmus.decoding.target import HubTarget
from isthmus.errors import InvalidInputError


@dataclass(frozen=True)
class Rows:
    """When rows begin.

    Attributes:
        window: Tokens of a row before the next one begins; at least a row's width is raster order.
        adaptive: Let each row wait until its first token no longer depends on waiting; ``window``
            is then the least.
        first_row_alone: Finish row 0 before row 1 begins.
        stand_in: Whose newest token stands in for the last token of the current row, which the
            first one of the next row follows: that of the row above the current one, or its own.

    Raises:
        InvalidInputError: The window is below 1, or the stand-in is unknown.
    """

    window: int
    adaptive: bool = False
    first_row_alone: bool = True
    stand_in: Literal["above", "current"] = "above"

    def __post_init__(self) -> None:
        if self.window < 1 or self.stand_in not in ("above", "current"):
            raise InvalidInputError(
                f"rows need a window of 1 or more and the stand-in 'above' or 'current', got {self}"
            )

    def passes(self, height: int, width: int) -> int:
        """Forwards that a grid takes without waiting, the prompt's included.

        Example:
            >>> Rows(4).passes(8, 8), Rows(4, first_row_alone=False).passes(8, 8)
            (40, 36)
        """
        s = min(self.window, width)
        first = width if self.first_row_alone else s
        return width + (first + (height - 2) * s if height > 1 else 0)


def paint_rows(
    rows: Rows,
    target: HubTarget,
    prompts: torch.Tensor,
    size: tuple[int, int],
    draws: PlaceDraws,
    levels: int,
) -> Painted:
    """Decode images by rows in flight.

    Args:
        rows: When rows begin.
        target: A decoder that was trained on prompts and then tokens in raster order.
        prompts: int64 [B, P].
        size: Height H and width W in tokens.
        draws: Source of the draws.
        levels: Only tokens below this number are image tokens.
    """
    canvas = Canvas(rows, draws, prompts, size, levels)
    session, length = GridSession(target, len(prompts)), prompts.shape[1]
    start = torch.arange(length, device=prompts.device).expand_as(prompts)
    canvas.write(session.feed(prompts, start)[:, -1:], start[:, :1] - 1)
    while not canvas.complete:
        tokens, places = canvas.newest()
        positions = torch.where(places >= -1, places + length, -1)
        canvas.write(session.feed(tokens, positions), places)
    return Painted(canvas.tokens, canvas.passes)


IDLE = -2
"""Place of a token that is not there; the prompt's last one stands at place -1."""


class Canvas:
    """Images in the making: which rows are open, and what each of them feeds next."""

    def __init__(
        self,
        rows: Rows,
        draws: PlaceDraws,
        prompts: torch.Tensor,
        size: tuple[int, int],
        levels: int,
    ) -> None:
        self.rows, self.draws, self.levels = rows, draws, levels
        (self.height, self.width), batch = size, len(prompts)
        self.tokens = prompts.new_full((batch, *size), -1)
        self.fed = prompts.new_zeros(batch, self.height)  # tokens of each row that are cached
        self.passes = prompts.new_zeros(batch)
        # first tokens that wait, and the laws that they were drawn from
        self.waiting = prompts.new_full((batch, self.height), -1)
        self.laws = self.fed.new_zeros(batch, self.height, levels, dtype=torch.float64)
        window = torch.full((self.height,), min(rows.window, self.width))
        if rows.first_row_alone:
            window[1:2] = self.width
        self.window = window.to(prompts.device)

    @property
    def counts(self) -> torch.Tensor:
        """Tokens of each row, int64 [B, H]."""
        return (self.tokens >= 0).sum(2)

    @property
    def complete(self) -> bool:
        """Whether nothing is missing."""
        return bool((self.tokens >= 0).all())

    def newest(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What the next pass feeds: tokens and their places, int64 [B, N].

        The newest token of every open row; of a row that is finished, its last one, once; and a
        stand-in in front of every row that is about to begin.
        """
        counts = self.counts
        rows = torch.arange(self.height, device=counts.device)
        column = (counts - 1).clamp(min=0)[..., None]
        last = self.tokens.gather(2, column)[..., 0]  # [B, H]
        unfinished = ~(self.tokens >= 0).flatten(1).all(1, keepdim=True)
        places = torch.where((self.fed < counts) & unfinished, rows * self.width + self.fed, IDLE)
        above = counts.roll(1, 1)
        opens = (counts == 0) & (above >= self.window) & (above < self.width) & (rows > 0)
        # the row above the one that the new row follows; row 1 follows row 0, which has none
        back = 2 if self.rows.stand_in == "above" else 1
        stand_in = last.gather(1, (rows - back).clamp(min=0).expand_as(last))
        before = torch.where(opens, rows * self.width - 1, IDLE)
        tokens, places = torch.cat([last, stand_in], 1), torch.cat([places, before], 1)
        used = (places != IDLE).any(0)
        return tokens[:, used], places[:, used]

    def write(self, logits: torch.Tensor, places: torch.Tensor) -> None:
        """Draw what follows the tokens at some places [B, N] from their logits [B, N, V]."""
        self.passes += ~(self.tokens >= 0).flatten(1).all(1)
        real = self._real(places)
        image, _ = torch.nonzero(real & (places >= 0), as_tuple=True)
        fed = places[real & (places >= 0)]
        self.fed[image, fed // self.width] = fed % self.width + 1
        following = (places + 1).clamp(0, self.height * self.width - 1)
        logits = logits[..., : self.levels]
        drawn = self.draws.pick(logits, following)
        free = (places != IDLE) & (places + 1 < self.height * self.width) & ~self._real(following)
        if self.rows.adaptive:
            first = free & (following % self.width == 0) & (following > 0)
            drawn, settled = self._wait(logits, following // self.width, drawn, real, first)
            free &= settled
        image, node = torch.nonzero(free, as_tuple=True)
        self.tokens.view(len(places), -1)[image, following[image, node]] = drawn[image, node]

    def _real(self, places: torch.Tensor) -> torch.Tensor:
        """Whether the token at each place [B, N] has been decided; the prompt's last one has."""
        flat = self.tokens.flatten(1)
        return (flat.gather(1, places.clamp(min=0)) >= 0) & (places >= 0) | (places == -1)

    def _wait(
        self,
        logits: torch.Tensor,
        rows: torch.Tensor,
        drawn: torch.Tensor,
        real: torch.Tensor,
        first: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Judge the first tokens of rows by the law of one pass later.

        Args:
            logits: [B, N, V].
            rows: Row of the token that follows, int64 [B, N].
            drawn: What was drawn from the logits, int64 [B, N].
            real: Whether it follows a token that has been decided, bool [B, N].
            first: Whether it is the first one of a row other than row 0, bool [B, N].

        Returns:
            Tokens int64 [B, N] and whether they stand.
        """
        law = self.draws.logprobs(logits).exp()
        waiting, old = self.waiting.gather(1, rows), _rows_of(self.laws, rows)
        asked = waiting >= 0
        # one key for every row and every number of tokens above it, beyond those of the places
        above = self.counts.gather(1, (rows - 1).clamp(min=0))
        keys = self.height * self.width * (1 + above) + rows
        odds = _rows_at(law, waiting) / _rows_at(old, waiting)
        accepted = asked & (self.draws.uniform(keys) < odds)  # min(1, p_(k+1) / p_k)
        rest = (law - old).clamp(min=0).log()  # the positive part of p_(k+1) - p_k
        again = torch.where(asked, self.draws.of(rest, keys + self.height * self.width**2), drawn)
        token = torch.where(accepted, waiting, again)
        image, node = torch.nonzero(first, as_tuple=True)
        self.waiting[image, rows[image, node]] = token[image, node]
        self.laws[image, rows[image, node]] = law[image, node]
        return torch.where(first, token, drawn), ~first | accepted | real


def _rows_of(table: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """``table[b, rows[b, n]]``, [B, N, X] of [B, H, X]."""
    return table.gather(1, rows[..., None].expand(-1, -1, table.shape[2]))


def _rows_at(table: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """``table[b, n, tokens[b, n]]``, [B, N] of [B, N, X]; of token 0 where there is none."""
    return table.gather(2, tokens.clamp(min=0)[..., None])[..., 0]
