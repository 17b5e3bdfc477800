"""From the frames of a transducer to texts: the likeliest token at every frame, until the blank.

::

    chunk of frames ─▶ hear ─▶ score all of them ─▶ first frame that writes ─▶ advance ─┐
                                 ▲                                                      │
                                 └──────────────────── from that frame on ◀─────────────┘

The text changes only where a token is written, so all frames up to the next one are scored by one
call: a chunk takes as many calls as its rows write tokens, and one more, not as many as frames.
A model plays :class:`~isthmus.roles.FrameScorer`. Chunks may be of any size unless the model
itself works in chunks; the state goes from one to the next.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from isthmus.decoding.ctc import Transcript
from isthmus.errors import InvalidInputError
from isthmus.objectives.ctc import BLANK
from isthmus.roles import FrameScorer


@dataclass
class TransducerState:
    """Texts that are being written.

    Attributes:
        inner: The scorer's own state.
        heard: Frames of each row so far, int64 [B].
        logprob: Of the path so far, [B].
        tokens: Of each row.
        frames: Frame of each token, counted from the start of the row.
    """

    inner: Any
    heard: torch.Tensor
    logprob: torch.Tensor
    tokens: list[list[int]] = field(default_factory=list)
    frames: list[list[int]] = field(default_factory=list)

    def transcripts(self) -> list[Transcript]:
        """The texts of all rows."""
        rows = zip(self.tokens, self.frames, self.logprob.tolist(), strict=True)
        return [Transcript(tuple(t), total, total, tuple(f)) for t, f, total in rows]


class TransducerGreedy:
    """Greedy search, frame by frame.

    Args:
        scorer: The model.
        max_symbols: Tokens written at one frame at most; the next one is then read without a blank.
        longest: Tokens of a text at most; what follows is read without writing. 0 is no limit.

    Raises:
        InvalidInputError: ``max_symbols`` is below 1, or ``longest`` below 0.
    """

    def __init__(self, scorer: FrameScorer, max_symbols: int = 10, *, longest: int = 0) -> None:
        if max_symbols < 1 or longest < 0:
            raise InvalidInputError(
                f"max_symbols is at least 1 and longest at least 0, got {max_symbols} and {longest}"
            )
        self.scorer, self.max_symbols, self.longest = scorer, max_symbols, longest

    @torch.no_grad()
    def init_state(self, batch: int) -> TransducerState:
        """The state before the first frame."""
        none = torch.zeros(batch)
        texts: list[list[int]] = [[] for _ in range(batch)]
        places: list[list[int]] = [[] for _ in range(batch)]
        return TransducerState(self.scorer.start(batch), none.long(), none, texts, places)

    @torch.no_grad()
    def step(
        self, frames: torch.Tensor, lengths: torch.Tensor, state: TransducerState
    ) -> TransducerState:
        """Read a chunk.

        Args:
            frames: [B, N, D].
            lengths: Valid frames of the chunk [B]; 0 for rows that have ended.
            state: Where the texts stand; its lists are taken over by the new state.
        """
        if not frames.shape[1]:
            return state
        scorer = self.scorer
        inner = scorer.hear(frames, lengths, state.inner)
        place = torch.arange(frames.shape[1], device=frames.device)
        now = torch.zeros_like(lengths)  # the frame each row is at
        written = torch.zeros_like(lengths)  # tokens it has written there
        logprob = state.logprob.to(frames.device)
        while True:
            scores = scorer.score(frames, inner)  # [B, N, V]
            best, token = scores.max(-1)
            ahead = (place >= now[:, None]) & (place < lengths[:, None])
            writes = ahead & (token != BLANK)
            if self.longest:
                short = [len(text) < self.longest for text in state.tokens]
                writes &= torch.tensor(short, device=frames.device)[:, None]
            where = writes.any(1)
            at = torch.where(where, writes.int().argmax(1), lengths)  # the first, or the end
            passed = ahead & (place < at[:, None])
            logprob = logprob + torch.where(passed, scores[..., BLANK], 0.0).sum(1)
            if not where.any():
                break
            here = at.clamp(max=frames.shape[1] - 1)[:, None]
            chosen = token.gather(1, here)[:, 0]
            logprob = logprob + torch.where(where, best.gather(1, here)[:, 0], 0.0)
            for row in where.nonzero()[:, 0].tolist():
                state.tokens[row].append(int(chosen[row]))
                state.frames[row].append(int(state.heard[row] + at[row]))
            inner = scorer.advance(chosen, where, inner)
            written = torch.where(at == now, written, 0) + 1
            full = written >= self.max_symbols
            now, written = at + full, written.masked_fill(full, 0)
        heard = state.heard.to(frames.device) + lengths
        return TransducerState(inner, heard, logprob, state.tokens, state.frames)

    def read(
        self, frames: torch.Tensor, lengths: torch.Tensor, state: TransducerState, chunk: int = 0
    ) -> TransducerState:
        """Read frames [B, T, D], ``lengths`` [B] of them valid, in chunks; 0 is all at once."""
        size = chunk or max(1, frames.shape[1])
        for start in range(0, frames.shape[1], size):
            part = frames[:, start : start + size]
            state = self.step(part, (lengths - start).clamp(0, part.shape[1]), state)
        return state


def greedy(
    scorer: FrameScorer,
    frames: torch.Tensor,
    lengths: torch.Tensor,
    *,
    chunk: int = 0,
    max_symbols: int = 10,
    longest: int = 0,
) -> list[Transcript]:
    """The texts of whole rows.

    Args:
        scorer: The model.
        frames: [B, T, D].
        lengths: Valid frames [B].
        chunk: Frames that the model hears at once; 0 is all of them.
        max_symbols: See :class:`TransducerGreedy`.
        longest: See there.
    """
    search = TransducerGreedy(scorer, max_symbols, longest=longest)
    return search.read(frames, lengths, search.init_state(len(frames)), chunk).transcripts()
