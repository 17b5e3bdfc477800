"""A causal conformer at work on sound as it arrives, every frame computed once.

::

    packets ─▶ samples ─▶ features ─▶ subsampling ─▶ blocks ─▶ states of complete chunks
               [512+]     [2 f]                      a Cache each: (B, L, D), (B, D, k - 1)

After Noroozi et al., "Stateful Conformer with Cache-based Inference for Streaming Automatic Speech
Recognition", 2023 (arXiv 2312.17279). What comes out is what the encoder gives for the whole sound
with the same limits; what is kept does not grow with the sound.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch.nn.utils.rnn import pad_sequence

from isthmus.errors import InvalidInputError
from isthmus.nn.conformer import (
    Cache,
    Conformer,
    ConformerBlock,
    limited_mask,
    relative_positions,
    valid_mask,
)
from isthmus.signals.features import HOP, LogMel

WINDOW = 200
"""Samples of a window on either side of the middle of a frame of features."""
MARGIN = 2
"""Frames of features, or tokens, whose past is cut off and which are computed to be dropped."""


@dataclass(frozen=True)
class Stream:
    """Where a stream stands.

    Attributes:
        samples: Those that are still needed, [B, n]; the first is sample ``160 first``.
        first: Number of a frame of features.
        features: Those that are still needed, [B, M, m]; the last is frame ``made - 1``.
        made: Frames of features so far.
        done: Frames behind the encoder so far.
        heard: Samples of each row so far [B].
        width: Samples so far, with the padding of rows that have ended.
        caches: Of the blocks.
    """

    samples: torch.Tensor
    first: int
    features: torch.Tensor
    made: int
    done: int
    heard: torch.Tensor
    width: int
    caches: tuple[Cache, ...]

    @property
    def kept(self) -> int:
        """Numbers that are kept."""
        tensors = [self.samples, self.features]
        tensors += [t for cache in self.caches for t in (cache.attended, cache.convolved)]
        return sum(t.numel() for t in tensors)


class CachedConformer:
    """Plays :class:`~isthmus.roles.Streaming`: packets [B, N] in, states [B, D, n] out.

    Rows may end before others: :meth:`step` is told how much of a packet belongs to each. Their
    states are 0 from there on.

    Args:
        encoder: A causal conformer with layer norms.
        mel: Makes its features; no statistics of the whole sound.
        left: L, frames before a chunk that attention sees.
        right: R; chunks have R + 1 frames.

    Attributes:
        lookahead: Samples from the first frame of a chunk to the end of what the chunk is made of.

    Raises:
        InvalidInputError: The encoder or the features cannot be used in a stream, or the limits do
            not fit.
    """

    def __init__(self, encoder: Conformer, mel: LogMel, left: int, right: int) -> None:
        if not encoder.subsampling.causal or encoder.chunk:
            raise InvalidInputError("a stream needs a causal encoder that has no chunks of its own")
        if mel.normalise is True or mel.style != "nemo":
            raise InvalidInputError(
                "features of a stream are nemo's, and not normalised over the whole"
            )
        none = torch.arange(0)
        limited_mask(none, none, left, right)
        self.encoder, self.mel, self.left, self.size = encoder, mel, left, right + 1
        self.factor = 2**encoder.subsampling.halvings
        self.lookahead = self.factor * HOP * right + WINDOW

    def init_state(self, batch: int) -> Stream:
        """The state before the first packet."""
        caches = []
        like = self.encoder.subsampling.linear.weight
        for block in self.encoder.layers:
            if not isinstance(block, ConformerBlock):
                raise InvalidInputError("only blocks of a conformer have caches")
            attended = like.new_zeros(batch, self.left, self.encoder.width)
            convolved = like.new_zeros(batch, block.conv.before, self.encoder.width)
            caches.append(Cache(attended, convolved))
        return Stream(
            torch.zeros(batch, 0), 0, like.new_zeros(batch, self.mel.n_mels, 0), 0, 0,
            torch.zeros(batch, dtype=torch.int64), 0, tuple(caches),
        )  # fmt: skip

    def step(
        self, chunk: torch.Tensor, state: Stream, lengths: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Stream]:
        """Take in a packet; states of complete chunks come out.

        Args:
            chunk: [B, N].
            state: Where the stream stands; it stays as it is.
            lengths: Samples of the packet that belong to each row, [B]; None is all. A row that
                was given less than all has ended.

        Raises:
            InvalidInputError: A row goes on after its end.
        """
        given = torch.full((len(chunk),), chunk.shape[1]) if lengths is None else lengths
        if ((state.heard < state.width) & (given > 0)).any():
            raise InvalidInputError("a row has ended and gets more sound; begin a new stream")
        state = replace(
            state, samples=torch.cat([state.samples, chunk], 1), heard=state.heard + given,
            width=state.width + chunk.shape[1],
        )  # fmt: skip
        ready = (state.width - WINDOW) // HOP + 1  # features no later sample changes
        state = self._features(state, max(0, ready))
        due = (state.made - 1) // self.factor + 1 if state.made else 0
        return self._encode(state, due // self.size * self.size)

    def flush(self, state: Stream) -> torch.Tensor:
        """The states of the last chunk."""
        return self.finish(state)[0]

    def finish(self, state: Stream) -> tuple[torch.Tensor, Stream]:
        """The states of the last chunk, and the state at the end."""
        if not state.width:
            return self._encode(state, 0)
        state = self._features(state, state.width // HOP + 1)
        return self._encode(state, (state.made - 1) // self.factor + 1)

    def play(self, sound: torch.Tensor, packet: int = 1600) -> Iterator[tuple[torch.Tensor, int]]:
        """States [1, n, D] of a sound [N] as they come, and how many samples are heard by then."""
        state = self.init_state(1)
        for part in torch.split(sound[None], packet, 1):
            out, state = self.step(part, state)
            yield out.transpose(1, 2), state.width
        yield self.flush(state).transpose(1, 2), state.width

    def lengths(self, state: Stream) -> torch.Tensor:
        """States of each row that will be valid once the stream is flushed, [B]."""
        frames = torch.where(state.heard > 0, state.heard // HOP + 1, 0)
        return self.encoder.subsampling.lengths(frames)

    def _features(self, state: Stream, end: int) -> Stream:
        """Features up to frame ``end``, and only the samples that later ones need."""
        if end <= state.made:
            return state
        size, start = state.samples.shape[1], HOP * state.first
        inside = (state.heard - start).clamp(1, size)
        made, _ = self.mel(state.samples, inside)
        frames = torch.where(state.heard > 0, state.heard // HOP + 1, 0)
        going = torch.where(state.heard == state.width, end, frames)
        place = torch.arange(state.made, end)
        new = made[:, :, state.made - state.first : end - state.first]
        new = new * (place < going[:, None])[:, None]
        first = max(0, end - MARGIN)
        return replace(
            state, samples=state.samples[:, HOP * first - start :], first=first, made=end,
            features=torch.cat([state.features, new.to(state.features)], 2),
        )  # fmt: skip

    @torch.no_grad()
    def _encode(self, state: Stream, end: int) -> tuple[torch.Tensor, Stream]:
        """States of the frames up to ``end``."""
        rows, new = len(state.heard), max(0, end - state.done)
        if not new:
            return state.features.new_zeros(rows, self.encoder.width, 0), state
        encoder, before = self.encoder, min(MARGIN, state.done)
        origin = state.made - state.features.shape[2]  # number of the first feature that is kept
        begin = self.factor * (state.done - before) - origin
        part = state.features[:, :, begin : self.factor * (end - 1) + 1 - origin]
        ended = self.lengths(state)
        limit = torch.where(state.heard == state.width, end, ended) - state.done
        frames = torch.where(state.heard > 0, state.heard // HOP + 1, 0)
        frames = torch.where(state.heard == state.width, state.made, frames) - origin - begin
        x = encoder.subsampling(part, frames.clamp(0, part.shape[2]))[0][:, before:] * encoder.scale
        valid = valid_mask(limit, new)
        queries = torch.arange(state.done, end)
        keys = torch.arange(state.done - self.left, end)
        mask = limited_mask(queries, keys, self.left, self.size - 1)
        exists = keys < (limit + state.done)[:, None]  # [B, K]
        mask = mask & exists[:, None, None] & valid[:, None, :, None]
        positions = relative_positions(self.left + new, encoder.width, x)
        caches = tuple(replace(cache) for cache in state.caches)
        for block, cache in zip(encoder.layers, caches, strict=True):
            x = block(x, positions, mask, valid, cache)
        x = x.masked_fill(~valid[..., None], 0.0)
        needed = max(0, self.factor * (end - MARGIN) - origin)
        features = state.features[:, :, needed:]
        return x.transpose(1, 2), replace(state, features=features, done=end, caches=caches)


@torch.no_grad()
def windowed(
    encoder: Conformer,
    features: torch.Tensor,
    frames: torch.Tensor,
    past: int,
    size: int,
    ahead: int = 0,
) -> torch.Tensor:
    """What an encoder that needs the whole sound makes of a stream: windows, each by itself.

    Args:
        encoder: Any.
        features: Of one sound [1, M, F].
        frames: Valid ones [1].
        past: Frames behind the encoder that a window has before those that are kept.
        size: Frames that are kept of a window.
        ahead: Frames that a window has behind those that are kept.

    Returns:
        [T, D].
    """
    factor = 2**encoder.subsampling.halvings
    total = int(encoder.subsampling.lengths(frames))
    starts = range(0, total, size)
    cuts = [(max(0, start - past), min(total, start + size + ahead)) for start in starts]
    parts = [features[0, :, factor * a : factor * b].T for a, b in cuts]
    lengths = torch.tensor([len(part) for part in parts])
    states = encoder(pad_sequence(parts, True).transpose(1, 2), lengths)[0]
    kept = [
        row[start - a : min(b, start + size) - a]
        for row, start, (a, b) in zip(states, starts, cuts, strict=True)
    ]
    return torch.cat(kept)
