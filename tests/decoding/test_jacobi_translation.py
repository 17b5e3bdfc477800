"""Jacobi iteration: equal to greedy, never slower, and faster only while it iterates."""

import pytest
import tiny
import torch

from isthmus.decoding.acceptance import Lossless
from isthmus.decoding.engine import Request, decode
from isthmus.decoding.law import Law
from isthmus.decoding.policy import Fixed
from isthmus.decoding.stopping import Stopper
from isthmus.decoding.table import TableTarget
from isthmus.errors import InvalidInputError
from isthmus.systems.speculative.jacobi_translation import (
    JacobiTranslation,
    Settings,
    picture,
    solve,
)


class Sourced(TableTarget):
    """Decided by the position alone, two times out of three: as a source decides a translation."""

    def push(self, state, tokens):
        place = torch.div(state, 64, rounding_mode="floor") + 1
        return place * 64 + torch.where(place % 3 == 0, tokens, 0)


TARGET = Sourced(12, seed=5, sharpness=3.0)


def greedy(target, prompt, new):
    """The plain answer by one-token steps over the table."""
    ids = list(prompt)
    for _ in range(new):
        ids.append(int(target.logits(target.state(torch.tensor([ids])))[0].argmax()))
    return ids[len(prompt) :]


def run(drafter, prompts=((1,),), new=30, target=TARGET, ends=()):
    requests = [
        Request(torch.tensor(p), Stopper(max_new_tokens=new, end_tokens=list(ends)))
        for p in prompts
    ]
    for _ in decode(
        target,
        requests,
        policy=Fixed(drafter, drafter.default_shape),
        acceptance=Lossless(),
        law=Law(),
        generator=torch.Generator(),
    ):
        pass
    return [r.result for r in requests]


def by_hand(target, prompt, new, window, pad=0):
    """Sliding Jacobi iteration written out: argmaxes of whole prefixes, no cache, no engine."""
    done, guesses, rounds = list(prompt), [pad] * window, 0
    while len(done) - len(prompt) < new:
        rounds += 1
        width = min(window, new - (len(done) - len(prompt)) - 1)
        ids = [*done, *guesses[:width]]
        said = [
            int(target.logits(target.state(torch.tensor([ids[: len(done) + k]])))[0].argmax())
            for k in range(width + 1)
        ]
        agreed = 0
        while agreed < width and said[agreed] == guesses[agreed]:
            agreed += 1
        done += said[: agreed + 1]
        rest = said[agreed + 1 :]
        guesses = rest + [pad] * (window - len(rest))
    return done[len(prompt) :], rounds


@pytest.mark.parametrize("window", [1, 2, 5, 9])
@pytest.mark.parametrize("order", [1, 2, None])
def test_rounds_and_text_equal_the_iteration_by_hand(window, order):
    target = TableTarget(7, seed=2, sharpness=3.0, order=order)
    (result,) = run(JacobiTranslation(Settings(window=window)), ([3, 1],), 24, target)
    tokens, rounds = by_hand(target, [3, 1], 24, window)
    assert result.tokens == tokens == greedy(target, [3, 1], 24)
    assert result.stats.target_forwards == rounds <= 24


def test_the_mechanism_matters():
    (on,) = run(JacobiTranslation())
    (off,) = run(JacobiTranslation(Settings(iterate=False)))
    assert on.tokens == off.tokens == greedy(TARGET, [1], 30)
    # padding is right now and then, by chance
    assert on.stats.acceptance_length > off.stats.acceptance_length + 0.3


@pytest.mark.parametrize("sliding", [True, False])
def test_rows_of_a_batch_are_as_alone(sliding):
    prompts = ((1,), (4, 2, 9), (7, 7))
    settings = Settings(window=4, sliding=sliding)
    together = run(JacobiTranslation(settings), prompts)
    for prompt, result in zip(prompts, together, strict=True):
        (alone,) = run(JacobiTranslation(settings), (prompt,))
        assert result.tokens == alone.tokens == greedy(TARGET, prompt, 30)


def test_blocks_never_guess_past_their_end():
    drafter = JacobiTranslation(Settings(window=4, sliding=False))
    (result,) = run(drafter)
    at = 0
    for trace in result.rounds:
        assert trace.nodes <= 3 - at % 4
        at += trace.emitted


def test_after_k_rounds_the_first_k_tokens_are_greedy():
    target = tiny.target("Bart")
    source = tiny.prompts()[0][None]
    start = torch.tensor([target.start_token])
    want = tiny.reference("Bart", "float64", 10)[0]
    whole = solve(target, start, 10, input_ids=source)
    assert whole.tokens == want and whole.steps <= 10
    for k, row in enumerate(whole.rounds.tolist()):
        assert row[: k + 1] == want[: k + 1]
        assert all(whole.fixed[:k] <= k)
    for block in (1, 3, 4, 10):
        parts = solve(target, start, 10, block=block, input_ids=source)
        assert parts.tokens == want
        assert parts.steps <= 10, "a block of b tokens takes b rounds at most"
    assert solve(target, start, 1, input_ids=source).tokens == want[:1]


def test_an_end_token_ends_the_first_block_that_holds_it():
    want = greedy(TARGET, [1], 12)
    end = want[2]
    assert end not in want[:2]
    for block in (2, 3, 5):
        found = solve(TARGET, torch.tensor([1]), 12, block=block, end=end)
        assert found.tokens == want[:3]
    (result,) = run(JacobiTranslation(), ends=(end,))
    assert result.tokens == want[:3]


def test_what_counts_as_ahead():
    path = solve(TARGET, torch.tensor([1]), 8)
    right = path.rounds == path.rounds[-1]
    ahead = path.ahead()
    for row in range(len(right)):
        for column in range(8):
            early = bool(right[row, column]) and not bool(right[row, :column].all())
            assert bool(ahead[row, column]) == early
    assert bool(ahead.any())


@pytest.mark.parametrize("name", ["Llama", "T5", "Bart"])
def test_greedy_text_is_transformers_text(name):
    drafter = JacobiTranslation()
    policy = Fixed(drafter, drafter.default_shape)
    rows = [0, 1, 2]
    results = tiny.generate(name, "float64", policy, 12, rows)
    for row, result in zip(rows, results, strict=True):
        tiny.assert_same(
            name, "float64", row, result.tokens, tiny.reference(name, "float64", 12)[row]
        )


def test_picture_is_saved(tmp_path):
    saved = picture(solve(TARGET, torch.tensor([1]), 6), tmp_path / "graph.svg")
    text = saved.read_text()
    assert "<svg" in text and text.count("<path") > 6


def test_bad_input_is_refused():
    with pytest.raises(InvalidInputError, match="at least 1"):
        JacobiTranslation(Settings(window=0))
    with pytest.raises(InvalidInputError, match="at least 1"):
        solve(TARGET, torch.tensor([1]), 0)
