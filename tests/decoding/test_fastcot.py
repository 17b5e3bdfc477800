"""FastCoT: exact without its glance, its window, its ways out, and ragged batches."""

from types import SimpleNamespace

import pytest
import tiny
import torch

from isthmus.decoding.table import TableTarget
from isthmus.errors import InvalidInputError, UnsupportedModelError
from isthmus.systems.speculative.fastcot import Fastcot, Settings, _Row, find

END, MARKER = 0, 5


class Scripted(TableTarget):
    """Writes 11, 12, 13, ..., then the marker at place 8, a number and the end: by place alone.

    So a guess is right before anything to its left is, and a glance sees the truth.
    """

    def push(self, state, tokens):
        return state + 1 + 0 * tokens

    def logits(self, state):
        choice = torch.where(state < 8, 10 + state, 10 + 8)
        choice = torch.where(state == 8, MARKER, choice)
        choice = torch.where(state == 9, 31, choice)
        choice = torch.where(state == 10, END, choice)
        return torch.nn.functional.one_hot(choice, self.vocab_size).double() * 9


TRUTH = [11, 12, 13, 14, 15, 16, 17, MARKER, 31, END]


def make(target=None, **changed):
    settings = Settings(**{"window": 4, "answer_tokens": 2, **changed})
    return Fastcot(target or Scripted(40), [MARKER], [7, MARKER], settings, end=END)


def one(strategy, prompt=(1,), new=30):
    return strategy.generate(torch.tensor(prompt), max_new_tokens=new)


def greedy(target, prompt, new, end=None):
    ids = list(prompt)
    for _ in range(new):
        ids.append(int(target.logits(target.state(torch.tensor([ids])))[0].argmax()))
        if ids[-1] == end:
            break
    return ids[len(prompt) :]


def test_plain_arm_is_one_token_a_call():
    result = one(make(window=0, glance=False))
    assert result.tokens == TRUTH and result.finish_reason == "stop"
    assert result.stats.target_forwards == len(TRUTH) and result.lossless


@pytest.mark.parametrize("window", [0, 1, 3, 8])
@pytest.mark.parametrize("order", [1, None])
def test_exact_mode_is_greedy(window, order):
    target = TableTarget(12, seed=4, sharpness=3.0, order=order)
    strategy = make(target, window=window, glance=False)
    prompts = [[3], [4, 2, 9, 1, 1], [7, 7]]
    results = strategy.generate_batch([torch.tensor(p) for p in prompts], max_new_tokens=25)
    for prompt, result in zip(prompts, results, strict=True):
        assert result.tokens == greedy(target, prompt, 25, END)
        assert result.stats.target_forwards <= len(result.tokens) and result.lossless


@pytest.mark.parametrize("name", ["Llama", "GPT2"])
def test_exact_mode_is_transformers_greedy(name):
    target = tiny.target(name)
    strategy = Fastcot(target, [5], [5], Settings(glance=False))
    results = strategy.generate_batch(tiny.prompts(), max_new_tokens=12)
    for row, result in enumerate(results):
        assert result.tokens == tiny.reference(name, "float64", 12)[row]


def test_rows_of_a_batch_are_as_alone():
    target = TableTarget(12, seed=4, sharpness=3.0, order=1)
    prompts = [[3], [4, 2, 9, 1, 1], [7, 7], [11]]
    for glance in (True, False):
        strategy = make(target, glance=glance, window=5)
        together = strategy.generate_batch([torch.tensor(p) for p in prompts], max_new_tokens=30)
        for prompt, result in zip(prompts, together, strict=True):
            alone = one(strategy, prompt)
            assert result.tokens == alone.tokens
            assert result.stats.target_forwards == alone.stats.target_forwards


def test_a_glance_answers_early_and_says_so():
    exact, ours = one(make(window=9, glance=False)), one(make(window=9, stable=1))
    # round 1 shows the whole text in the window; the marker ends the reasoning at once
    assert ours.tokens == exact.tokens == TRUTH
    assert not ours.lossless and exact.lossless
    assert [t.drafter for t in ours.rounds] == ["window", "answer", "answer"]
    assert ours.rounds[1].nodes == 7, "six approximate tokens and the marker"
    waits = one(make(window=9, stable=2))
    assert [t.drafter for t in waits.rounds][:2] == ["window", "window"]


def test_the_mechanism_matters():
    """Approximate tokens become part of the text, and not only where they are right."""
    target = TableTarget(12, seed=4, sharpness=3.0)
    unlike = 0
    for marker in range(1, 12):
        for glance in (True, False):
            settings = Settings(window=5, stable=1, answer_tokens=2, glance=glance)
            result = one(Fastcot(target, [marker], [marker], settings, end=END), [3])
            same = result.tokens == greedy(target, [3], 30, END)
            assert glance or same
            unlike += not same
    assert unlike > 0


def test_a_budget_of_rounds_asks_for_the_answer():
    result = one(make(window=0, max_rounds=3))
    assert result.tokens[:5] == [11, 12, 13, 7, MARKER], "three rounds, then the trigger"
    assert [t.drafter for t in result.rounds][:4] == ["window"] * 3 + ["answer"]


def test_the_window_by_hand():
    row = _Row(make(), [1, 2, 3], 30)
    assert row.block() == [3, *row.window] and row.window == [3, 1, 2, 3]
    row = _Row(make(), [9, 8, 7, 6, 1], 30)
    assert row.window == [8, 7, 6, 1], "the latest tokens are the first guess"
    kept = row.take(row.block(), [8, 7, 5, 4, 3])
    assert kept == 3, "the root and two agreeing tokens"
    assert row.result.tokens == [8, 7, 5] and row.answering is True
    other = _Row(make(glance=False), [9, 8, 7, 6, 1], 30)
    other.take(other.block(), [8, 7, 4, 3, 2])
    assert other.result.tokens == [8, 7, 4] and other.window[:2] == [3, 2]
    assert other.window[2:] == [7, 4], "then the latest tokens, guesses among them"


def test_the_window_shrinks_with_the_room_left():
    target = TableTarget(12, seed=1, sharpness=3.0)
    result = one(make(target, window=6, glance=False), (3,), 12)
    emitted = 0
    for trace in result.rounds:
        assert trace.nodes <= max(0, 12 - emitted - 1 - 2)
        emitted += trace.emitted
    assert emitted == len(result.tokens) <= 12


def test_find():
    assert find([1, 2, 3, 2, 3], [2, 3]) == 1 and find([], [1]) == -1 and find([1], [1, 2]) == -1


def test_bad_input_is_refused():
    with pytest.raises(InvalidInputError, match="temperature"):
        make().generate(torch.tensor([1]), max_new_tokens=4, temperature=1.0)
    with pytest.raises(InvalidInputError, match="prompts"):
        make().generate(torch.tensor([], dtype=torch.int64), max_new_tokens=4)
    with pytest.raises(InvalidInputError, match="marker"):
        Fastcot(Scripted(40), [], [1])
    with pytest.raises(InvalidInputError, match="window"):
        Settings(window=-1)
    with pytest.raises(InvalidInputError, match="tokenizer"):
        Fastcot.for_model(SimpleNamespace(target=Scripted(40), tokenizer=None))
    with pytest.raises(UnsupportedModelError, match="encoder"):
        Fastcot.for_model(SimpleNamespace(target=tiny.target("Bart"), tokenizer=None))
    with pytest.raises(InvalidInputError, match="several tokens"):
        one(make(TableTarget(9, reach="step")))
