"""Greedy transducer search: against the loop of the paper, in batches, in a stream."""

import math
import random

import pytest
import torch

from isthmus.decoding.transducer import TransducerGreedy, greedy
from isthmus.errors import InvalidInputError
from isthmus.roles import FrameScorer

VOCAB = 5


class Table:
    """A transducer whose text is a hash of its tokens; rows keep (token sum, tokens written)."""

    def __init__(self, width: int = 6, blank: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(0)
        self.table = torch.randn(23, VOCAB, generator=generator)
        self.out = torch.randn(width, VOCAB, generator=generator)
        self.blank, self.calls = blank, 0

    def start(self, batch: int) -> torch.Tensor:
        return torch.zeros(batch, dtype=torch.int64)

    def hear(
        self, frames: torch.Tensor, lengths: torch.Tensor, state: torch.Tensor
    ) -> torch.Tensor:
        return state

    def score(self, frames: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        logits = frames @ self.out + self.table[state][:, None]
        logits[..., 0] += self.blank
        return logits.log_softmax(-1)

    def advance(
        self, tokens: torch.Tensor, where: torch.Tensor, state: torch.Tensor
    ) -> torch.Tensor:
        return torch.where(where, (3 * state + tokens) % 23, state)


def by_the_loop(
    scorer: Table, frames: torch.Tensor, most: int
) -> tuple[list[int], list[int], float]:
    """One row [T, D], a frame and a token at a time."""
    state, tokens, places, total = scorer.start(1), [], [], 0.0
    for t in range(len(frames)):
        for _ in range(most):
            scores = scorer.score(frames[None, t : t + 1], state)[0, 0]
            token = int(scores.argmax())
            total += float(scores[token])
            if token == 0:
                break
            tokens.append(token)
            places.append(t)
            state = scorer.advance(torch.tensor([token]), torch.tensor([True]), state)
    return tokens, places, total


@pytest.mark.parametrize(("most", "blank"), [(1, 1.0), (3, 1.0), (10, 2.5), (4, -9.0), (10, 99.0)])
def test_it_is_the_loop_and_neighbours_change_nothing(most: int, blank: float) -> None:
    frames = torch.randn(4, 12, 6, generator=torch.Generator().manual_seed(1))
    lengths, scorer = torch.tensor([12, 7, 1, 10]), Table(blank=blank)
    assert isinstance(scorer, FrameScorer)
    found = greedy(scorer, frames, lengths, max_symbols=most)
    calls = scorer.calls
    for row, length, transcript in zip(frames, lengths.tolist(), found, strict=True):
        tokens, places, total = by_the_loop(scorer, row[:length], most)
        assert list(transcript.tokens) == tokens and list(transcript.frames) == places
        assert transcript.logprob == pytest.approx(total, abs=1e-4)
    longest = max(len(t.tokens) for t in found)
    assert calls == longest + 1  # one a token, not one a frame
    assert (longest > 0) == (blank < 99)
    if blank == -9.0:
        assert len(found[0].tokens) == 12 * most


def test_chunks_of_any_size_give_the_same_text() -> None:
    frames = torch.randn(3, 20, 6, generator=torch.Generator().manual_seed(2))
    lengths, scorer = torch.tensor([20, 9, 15]), Table()
    whole = greedy(scorer, frames, lengths)
    for found, wanted in zip(greedy(scorer, frames, lengths, chunk=4), whole, strict=True):
        assert found.tokens == wanted.tokens and found.frames == wanted.frames
    for seed in range(3):
        draw, search, place = random.Random(seed), TransducerGreedy(scorer), 0
        state = search.init_state(3)
        while place < 20:
            part = frames[:, place : place + draw.randint(0, 6)]
            state = search.step(part, (lengths - place).clamp(0, part.shape[1]), state)
            place += part.shape[1]
        for found, wanted in zip(state.transcripts(), whole, strict=True):
            assert found.tokens == wanted.tokens and found.frames == wanted.frames
            assert math.isclose(found.logprob, wanted.logprob, abs_tol=1e-4)
        assert state.heard.tolist() == lengths.tolist()


def test_a_text_ends_at_its_longest_and_reading_goes_on() -> None:
    frames = torch.randn(2, 12, 6, generator=torch.Generator().manual_seed(1))
    lengths, scorer = torch.tensor([12, 7]), Table(blank=-9.0)
    long, short = (greedy(scorer, frames, lengths, longest=n, chunk=5) for n in (0, 13))
    for a, b in zip(long, short, strict=True):
        assert len(a.tokens) > 13 and b.tokens == a.tokens[:13] and b.frames == a.frames[:13]


def test_no_frames_and_bad_numbers() -> None:
    assert greedy(Table(), torch.zeros(2, 0, 6), torch.tensor([0, 0]))[1].tokens == ()
    with pytest.raises(InvalidInputError, match="max_symbols is at least 1"):
        TransducerGreedy(Table(), 0)
    with pytest.raises(InvalidInputError, match="longest at least 0"):
        TransducerGreedy(Table(), longest=-1)
