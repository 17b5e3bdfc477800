"""Orders in which a model writes the codes of K levels and T times, and who sees whom in them.

::

    flat      (0,0) (1,0) (2,0) (0,1) (1,1) ..    K T steps, a code each
    parallel  all levels of 0, all of 1, ..       T steps
    delay     (0,s) with (1,s-1) with (2,s-2)     T + K - 1 steps
    stack     level 0 of all times, then level 1  K T steps
    streams   level k runs d steps behind k - 1   T + (K - 1) d steps, over permuted times

A pattern is a table of rows. A row is one place in a causal Transformer: it reads some codes, and
some are predicted from it. Rows of a step run together and do not see one another; a row sees
those of earlier steps that are still kept, so that the table says what a cache holds, too.
Flat, parallel and delay are from Copet et al., "Simple and controllable music generation", 2023
(arXiv 2306.05284), stack and streams from Le Lan et al., 2023 (arXiv 2309.08804).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from isthmus.errors import InvalidInputError

NONE = -1
"""Stands where there is no code: at the edges, and where a row has nothing to do with a level."""


class Step(NamedTuple):
    """One pass of generation.

    Attributes:
        rows: Its rows, a slice of the table.
        row: Of every code that is written, its row within the step, int64 [P].
        level: Its level, int64 [P].
        time: Its time, int64 [P].
        keep: Cached rows and then those of the step that the next step still sees, int64; None
            where that is all of them.
        prefix: How many there are, where they are the first ones; -1 where they are not.
    """

    rows: slice
    row: Tensor
    level: Tensor
    time: Tensor
    keep: Tensor | None
    prefix: int


@dataclass(frozen=True, eq=False)
class Pattern:
    """The table; N rows in the order of their steps.

    Attributes:
        levels: K.
        times: T.
        steps: Passes of generation.
        step: Of each row, int64 [N].
        at: A place in time for the row, int64 [N].
        kind: What kind of row it is, int64 [N].
        emits: The time of the code of each level that is predicted from the row, int64 [N, K].
        before: The times of the codes that were just written and are read by the row, [N, K].
        same: Those of lower levels that are read because they share its time, [N, K].
        until: The last step that sees the row, int64 [N].
    """

    levels: int
    times: int
    steps: int
    step: Tensor
    at: Tensor
    kind: Tensor
    emits: Tensor
    before: Tensor
    same: Tensor
    until: Tensor

    @cached_property
    def sees(self) -> Tensor:
        """Whether row i sees row j, bool [N, N]."""
        asks = self.step[:, None]
        kept = (self.step < asks) & (asks <= self.until)
        return kept | torch.eye(len(self.step), dtype=torch.bool)

    @cached_property
    def row_of(self) -> Tensor:
        """The row that each code is predicted from, int64 [K, T]."""
        row, level = (self.emits >= 0).nonzero().T
        found = torch.full((self.levels, self.times), NONE)
        found[level, self.emits[row, level]] = row
        return found

    def visible(self) -> Tensor:
        """Which codes each code is told of, through any number of blocks: bool [K T, K T].

        Codes are counted level by level. A code that is seen by none of the rows it depends on
        was forgotten, though it was written earlier.
        """
        reach = self.sees.float()
        for _ in range(max(1, len(reach)).bit_length()):
            reach = (reach @ reach).clamp(max=1)
        reads = torch.zeros(len(reach), self.levels, self.times + 1)
        rows, levels = torch.meshgrid(
            torch.arange(len(reach)), torch.arange(self.levels), indexing="ij"
        )
        for table in (self.before, self.same):
            reads[rows, levels, table] = 1  # NONE lands in the last place, which is cut off
        told = reach @ reads[..., : self.times].flatten(1)
        return told[self.row_of.flatten()] > 0

    @cached_property
    def places(self) -> Tensor:
        """Step and time of each row, int64 [1, N, 2]."""
        return torch.stack([self.step, self.at], -1)[None]

    @cached_property
    def reads(self) -> Tensor:
        """Times that a row reads: just written, then lower levels, int64 [N, 2 K]."""
        return torch.cat([self.before, self.same], 1)

    @cached_property
    def plan(self) -> list[Step]:
        """What generation does, pass by pass."""
        first = torch.searchsorted(self.step, torch.arange(self.steps + 1))
        bounds: list[int] = first.tolist()
        held = torch.empty(0, dtype=torch.int64)
        plan = []
        for s in range(self.steps):
            rows = slice(bounds[s], bounds[s + 1])
            row, level = (self.emits[rows] >= 0).nonzero().T
            cached = torch.cat([held, torch.arange(rows.start, rows.stop)])
            keep = (self.until[cached] > s).nonzero().flatten()
            held = cached[keep]
            leading = torch.equal(keep, torch.arange(len(keep)))
            whole = len(keep) == len(cached)
            time = self.emits[rows][row, level]
            prefix = len(keep) if leading else -1
            plan.append(Step(rows, row, level, time, None if whole else keep, prefix))
        return plan

    @cached_property
    def cached(self) -> int:
        """Rows that a cache holds at most from one step to the next; asked for in every step."""
        steps = torch.arange(self.steps)[:, None]
        return int(((self.step <= steps) & (self.until > steps)).sum(1).max())


def _checked(levels: int, times: int, delay: int = 1, stride: int = 1) -> None:
    if levels < 1 or times < 1 or delay < 1 or stride < 1:
        raise InvalidInputError(
            "a pattern needs levels, times, delay and stride of 1 or more, "
            f"got {levels}, {times}, {delay} and {stride}"
        )


def _one_by_one(levels: int, times: int, level: Tensor, time: Tensor) -> Tensor:
    """Emissions [N, K] of rows that write one code each."""
    emits = torch.full((levels * times, levels), NONE)
    emits[torch.arange(levels * times), level] = time
    return emits


def _behind(emits: Tensor) -> Tensor:
    """What the step before wrote, where each step is one row."""
    return torch.cat([torch.full_like(emits[:1], NONE), emits[:-1]])


def flat(levels: int, times: int) -> Pattern:
    """Code after code, all levels of a time first.

    Raises:
        InvalidInputError: A size is not positive, as for all patterns.

    Example:
        >>> flat(2, 3).row_of.tolist()
        [[0, 2, 4], [1, 3, 5]]
    """
    _checked(levels, times)
    n = torch.arange(levels * times)
    time, level = n // levels, n % levels
    emits = _one_by_one(levels, times, level, time)
    none = torch.full_like(emits, NONE)
    until = torch.full_like(n, len(n) - 1)
    return Pattern(levels, times, len(n), n, time, level, emits, _behind(emits), none, until)


def _shifted(levels: int, times: int, delay: int) -> Pattern:
    steps = times + (levels - 1) * delay
    s = torch.arange(steps)
    emits = s[:, None] - delay * torch.arange(levels)
    emits = emits.masked_fill((emits < 0) | (emits >= times), NONE)
    until = torch.full_like(s, steps - 1)
    none = torch.full_like(emits, NONE)
    kind = torch.zeros_like(s)
    return Pattern(levels, times, steps, s, s, kind, emits, _behind(emits), none, until)


def parallel(levels: int, times: int) -> Pattern:
    """All levels of a time at once, as if they were independent."""
    _checked(levels, times)
    return _shifted(levels, times, 0)


def delay(levels: int, times: int) -> Pattern:
    """Each level a step behind the one below it; one row writes K codes.

    Example:
        >>> delay(2, 3).row_of.tolist()
        [[0, 1, 2], [1, 2, 3]]
    """
    _checked(levels, times)
    return _shifted(levels, times, 1)


def stack(levels: int, times: int) -> Pattern:
    """Level after level.

    Only rows of level 0 stay; those of another level go when it is done, and its codes reach the
    next levels by what these read: the levels below at the same time.

    Example:
        >>> made = stack(3, 10)
        >>> made.steps, made.cached
        (30, 19)
    """
    _checked(levels, times)
    n = torch.arange(levels * times)
    level, time = n // times, n % times
    emits = _one_by_one(levels, times, level, time)
    before = torch.where(emits > 0, emits - 1, NONE)
    lower = torch.arange(levels) < level[:, None]
    same = torch.where(lower, time[:, None], NONE)
    until = torch.where(level == 0, len(n) - 1, (level + 1) * times - 1)
    return Pattern(levels, times, len(n), n, time, level, emits, before, same, until)


def interleaved(times: int, stride: int) -> Tensor:
    """Times in passes: every stride-th one, then their next neighbours, and so on; int64 [T].

    Example:
        >>> interleaved(7, 3).tolist()
        [0, 3, 6, 1, 4, 2, 5]
    """
    return torch.cat([torch.arange(first, times, stride) for first in range(min(stride, times))])


def streams(levels: int, times: int, *, delay: int = 3, stride: int = 3) -> Pattern:
    """K streams side by side, each over the same permuted times, d steps behind the one below.

    A step has a row for each stream. All of them read what the step before wrote, and the row of
    level k the levels below at its time. Only the first stream's rows stay, with all codes of the
    step before in them, so that the cache has one row a step.

    Args:
        levels: K.
        times: T.
        delay: d, steps from a level to the next.
        stride: Of the passes over time; 1 keeps time in order.

    Example:
        >>> streams(2, 4, delay=1, stride=2).row_of.shape, streams(4, 150).steps
        (torch.Size([2, 4]), 159)
        >>> made = streams(2, 4, delay=1, stride=2)
        >>> made.step[made.row_of].tolist()  # times 0 and 2, then 1 and 3
        [[0, 2, 1, 3], [1, 3, 2, 4]]
    """
    _checked(levels, times, delay, stride)
    order = interleaved(times, stride)
    steps = times + (levels - 1) * delay
    slot = torch.arange(steps)[:, None] - delay * torch.arange(levels)  # [S, K]
    runs = (slot >= 0) & (slot < times)
    time = torch.where(runs, order[slot.clamp(0, times - 1)], NONE)
    before = _behind(time)
    step, level = (runs | (torch.arange(levels) == 0)).nonzero().T  # the first stays to the end
    at = time[step, level]
    emits = torch.full((len(step), levels), NONE)
    emits[torch.arange(len(step)), level] = at
    lower = (torch.arange(levels) < level[:, None]) & (at[:, None] >= 0)
    same = torch.where(lower, at[:, None], NONE)
    over = at < 0
    at = torch.where(over, step, at)
    kind = level * (stride + 1) + torch.where(over, stride, at % stride)
    until = torch.where(level == 0, steps - 1, step)
    return Pattern(levels, times, steps, step, at, kind, emits, before[step], same, until)
