"""A transducer at work on sound as it arrives.

::

    packets ─▶ samples so far ─▶ features ─▶ causal encoder ─▶ frames of complete chunks ─▶ search

The encoder hears the sound again from its start whenever a chunk is complete, and only the frames
of that chunk are read: for a causal encoder they are those of the whole sound, to the last digit
that the size of a matrix product leaves.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from isthmus.decoding.transducer import TransducerGreedy, TransducerState
from isthmus.errors import InvalidInputError
from isthmus.nn.conformer import Conformer
from isthmus.signals.features import HOP, LogMel

WINDOW = 200
"""Samples of a window on either side of the middle of a frame of features."""


@dataclass(frozen=True)
class Heard:
    """A stream.

    Attributes:
        samples: So far, float32 [B, N].
        read: Frames behind the encoder that the search has read.
        search: The texts.
    """

    samples: torch.Tensor
    read: int
    search: TransducerState


class Listener:
    """Plays :class:`~isthmus.roles.Streaming`.

    What comes out of packets [B, N] are the tokens written at each frame, int64 [B, S, n], S being
    the most that one frame may have and 0 standing where there is none. The texts are in
    ``state.search``.

    Args:
        encoder: A causal one, whose chunk is that of the stream.
        mel: Makes its features; no statistics of the whole sound.
        search: Reads its frames.
        chunk: Frames behind the encoder that are read at once.
        factor: Of the encoder's subsampling.

    Attributes:
        lookahead: Samples from the first frame of a chunk to the end of what the chunk is made of.

    Raises:
        InvalidInputError: It cannot be used in a stream.
    """

    def __init__(
        self,
        encoder: Conformer,
        mel: LogMel,
        search: TransducerGreedy,
        *,
        chunk: int,
        factor: int,
    ) -> None:
        if chunk < 1 or encoder.chunk != chunk or not encoder.subsampling.causal:
            raise InvalidInputError(
                f"a stream needs a causal encoder with chunks, got chunks of {encoder.chunk} "
                f"frames; train it with chunk={chunk or 8}"
            )
        if mel.normalise is True:
            raise InvalidInputError("features of a stream cannot be normalised over the whole")
        self.encoder, self.mel, self.search, self.chunk = encoder, mel, search, chunk
        self.factor = factor
        self.lookahead = factor * HOP * (chunk - 1) + WINDOW

    def init_state(self, batch: int) -> Heard:
        """The state before the first packet."""
        return Heard(torch.zeros(batch, 0), 0, self.search.init_state(batch))

    def step(self, chunk: torch.Tensor, state: Heard) -> tuple[torch.Tensor, Heard]:
        """Take in a packet; frames of complete chunks come out."""
        state = replace(state, samples=torch.cat([state.samples, chunk], 1))
        ready = (state.samples.shape[1] - WINDOW) // HOP + 1  # features no later sample changes
        frames = (ready - 1) // self.factor + 1 if ready > 0 else 0
        return self._until(frames // self.chunk * self.chunk, state)

    def flush(self, state: Heard) -> torch.Tensor:
        """The frames of the last chunk."""
        length = state.samples.shape[1]
        last = self.encoder.subsampling.lengths(torch.tensor(length // HOP + 1))
        return self._until(int(last) if length else 0, state)[0]

    @torch.no_grad()
    def _until(self, end: int, state: Heard) -> tuple[torch.Tensor, Heard]:
        rows, due = len(state.samples), max(0, end - state.read)
        out = torch.zeros(rows, self.search.max_symbols, due, dtype=torch.int64)
        if not due:
            return out, state
        lengths = torch.full((rows,), state.samples.shape[1])
        memory = self.encoder(*self.mel(state.samples, lengths))[0][:, state.read : end]
        before = [len(text) for text in state.search.tokens]
        search = self.search.read(memory, torch.full((rows,), due), state.search, self.chunk)
        for row, start in enumerate(before):
            slot, last = 0, -1
            new = zip(search.tokens[row][start:], search.frames[row][start:], strict=True)
            for token, frame in new:
                slot, last = (slot + 1 if frame == last else 0), frame
                out[row, slot, frame - state.read] = token
        return out, Heard(state.samples, end, search)
