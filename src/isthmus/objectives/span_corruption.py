"""Span corruption: cut spans out of a text and learn to write them (T5).

Raffel et al., "Exploring the limits of transfer learning with a unified text-to-text transformer",
2020 (arXiv 1910.10683), section 3.1.4, with the lengths of its released code::

    a b c d e f g h    noise: c d, g
    inputs   a b <0> e f <1> h </s>
    targets  <0> c d <1> g </s>       every run that is not noise is one sentinel here

Texts are cut into rows of one length, so all rows have equally many spans and nothing is padded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from isthmus.errors import InvalidInputError


def _noise(raw: int, density: float, mean_span: float) -> tuple[int, int]:
    """Noise tokens and spans of a row of ``raw`` tokens; halves round to even."""
    tokens = min(max(round(raw * density), 1), raw - 1)
    return tokens, max(1, round(tokens / mean_span))


def lengths(inputs: int, density: float = 0.15, mean_span: float = 3.0) -> tuple[int, int]:
    """How long a row is whose corrupted inputs have a given length.

    Args:
        inputs: Length of the inputs, sentinels and the end included.
        density: Share of noise.
        mean_span: Mean tokens of a span.

    Returns:
        Tokens of the row, and length of its targets.

    Raises:
        InvalidInputError: No row is so short.

    Example:
        >>> lengths(512)
        (568, 114)
    """
    raw = 1
    while True:
        noise, spans = _noise(raw + 1, density, mean_span)
        if raw + 1 - noise + spans + 1 > inputs:
            break
        raw += 1
    noise, spans = _noise(raw, density, mean_span) if raw > 1 else (0, 0)
    if raw < 2 or spans > raw - noise:
        raise InvalidInputError(f"inputs of {inputs} tokens are too short for density {density}")
    return raw, noise + spans + 1


@dataclass(frozen=True)
class SpanCorruption:
    """The corruption of rows of one length.

    Attributes:
        raw: Tokens of a row.
        sentinels: Sentinels there are.
        top: One more than the id of the first sentinel; the others go down from it.
        end: Id of the end of a text.
        density: Share of noise.
        mean_span: Mean tokens of a span.

    Raises:
        InvalidInputError: The row is too short for its spans, or there are more spans than
            sentinels.
    """

    raw: int
    sentinels: int
    top: int
    end: int
    density: float = 0.15
    mean_span: float = 3.0

    def __post_init__(self) -> None:
        if self.raw < 2:
            raise InvalidInputError(f"a row must have at least 2 tokens, got {self.raw}")
        noise, spans = _noise(self.raw, self.density, self.mean_span)
        if spans > self.raw - noise:
            raise InvalidInputError(
                f"{spans} spans do not fit between {self.raw - noise} tokens; lower the density"
            )
        if spans > self.sentinels:
            raise InvalidInputError(
                f"a row of {self.raw} tokens has {spans} spans and there are {self.sentinels} "
                "sentinels; raise sentinels, or shorten the rows"
            )

    def noise_mask(self, rows: int, generator: torch.Generator) -> torch.Tensor:
        """Which tokens are noise, bool [rows, raw]; every row ends in noise.

        Args:
            rows: How many rows.
            generator: Source of the cuts.
        """
        noise, spans = _noise(self.raw, self.density, self.mean_span)
        sizes = torch.stack(
            [
                _composition(rows, self.raw - noise, spans, generator),
                _composition(rows, noise, spans, generator),
            ],
            2,
        ).flatten(1)  # [rows, 2 spans]: clean, noise, clean, noise ...
        places = torch.arange(self.raw).expand(rows, -1).contiguous()
        run = torch.searchsorted(sizes.cumsum(1), places, right=True)
        return run % 2 == 1

    def corrupt(self, ids: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of rows.

        Args:
            ids: int64 [B, raw].
            noise: bool [B, raw], as :meth:`noise_mask` makes it.

        Returns:
            int64 [B, inputs] and [B, targets].

        Example:
            >>> rule = SpanCorruption(8, sentinels=2, top=100, end=1, density=0.375, mean_span=2)
            >>> ids, noise = torch.arange(10, 18)[None], torch.zeros(1, 8, dtype=torch.bool)
            >>> noise[0, [2, 3, 7]] = True
            >>> [t.tolist() for t in rule.corrupt(ids, noise)]
            [[[10, 11, 99, 14, 15, 16, 98, 1]], [[99, 12, 13, 98, 17, 1]]]
        """
        return self._collapse(ids, noise), self._collapse(ids, ~noise)

    def _collapse(self, ids: torch.Tensor, runs: torch.Tensor) -> torch.Tensor:
        """Every run is one sentinel; the end follows."""
        before = torch.nn.functional.pad(runs[:, :-1], (1, 0))
        starts = runs & ~before
        kept = torch.where(starts, self.top - starts.cumsum(1), ids)[~runs | starts]
        rows = kept.view(len(ids), -1)
        return torch.nn.functional.pad(rows, (0, 1), value=self.end)


def _composition(rows: int, total: int, parts: int, generator: torch.Generator) -> torch.Tensor:
    """Cut ``total`` into non-empty parts, each cut equally likely; int64 [rows, parts]."""
    order = torch.rand(rows, total - 1, generator=generator).argsort(1)
    cuts = order[:, : parts - 1].sort(1).values + 1
    edges = torch.nn.functional.pad(cuts, (1, 1))
    edges[:, -1] = total
    return edges.diff(dim=1)
