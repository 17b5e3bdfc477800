"""Where an answer ends, also in the middle of an accepted block."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.decoding.acceptance import Lossless
from isthmus.decoding.drafters import ModelDrafter
from isthmus.decoding.engine import Request, decode
from isthmus.decoding.law import Law
from isthmus.decoding.policy import Fixed
from isthmus.decoding.stopping import Detokenizer, Stopper
from isthmus.decoding.table import TableSession, TableTarget
from isthmus.decoding.tree import TokenTree
from isthmus.errors import InvalidInputError
from isthmus.roles import Context, Policy, Scores, Shape, Taps


class Bytes:
    """A tokenizer whose tokens are bytes, so that one may end inside a character."""

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        return bytes(t for t in tokens if t < 256).decode("utf-8", errors="replace")


class Script(TableTarget):
    """A target that always says the same text."""

    def __init__(self, text: bytes) -> None:
        super().__init__(260)
        self.text = list(text)

    def session(self, batch: int, **inputs: Any) -> TableSession:
        return ScriptSession(self, batch)


class ScriptSession(TableSession):
    def score(self, tree: TokenTree, *, taps: Taps | None = None) -> Scores:
        super().score(tree)
        text = self.target.text  # type: ignore[attr-defined]
        depth = tree.topology.depth.expand_as(tree.tokens)
        at = torch.tensor(self._lengths)[:, None] + depth
        token = torch.tensor(text + [0] * 50)[at]
        return Scores(torch.nn.functional.one_hot(token, 260).double())


class Oracle:
    """Drafts exactly what the target will say, in long chains, and notes what was scored."""

    name = "oracle"

    def __init__(self, text: bytes) -> None:
        self.text = torch.tensor(list(text) + [0] * 50)
        self.scored: list[list[int]] = []

    def begin(self, context: Context, target: Any, **inputs: Any) -> None:
        pass

    def propose(self, context: Context, shape: Shape) -> TokenTree:
        n = context.lengths[0]
        tokens = self.text[n - 1 : n - 1 + min(shape.depth, shape.nodes)]
        return TokenTree.chain(context.roots(), tokens.expand(context.batch, -1))

    def observe(self, step: Any) -> None:
        self.scored.append(step.tree.tokens[0, 1:].tolist())

    def select(self, rows: Sequence[int]) -> None:
        pass


def run(text: bytes, policy: Policy | None = None, **options: Any) -> tuple[Any, Stopper]:
    stopper = Stopper(**{"max_new_tokens": 40, "tokenizer": Bytes()} | options)
    request = Request(torch.tensor([65]), stopper)
    rounds = decode(
        Script(text),
        [request],
        policy=policy or Fixed(Oracle(text), Shape(12, 12, 1)),
        acceptance=Lossless(),
        law=Law(),
        generator=torch.Generator(),
    )
    emitted = [token for step in rounds for _, tokens in step for token in tokens]
    assert emitted == request.result.tokens
    return request.result, stopper


def test_end_token_in_mid_block() -> None:
    oracle = Oracle(b"abc.defgh")
    result, _ = run(b"abc.defgh", Fixed(oracle, Shape(12, 12, 1)), end_tokens=[ord(".")])
    assert bytes(result.tokens) == b"abc." and result.finish_reason == "stop"
    assert result.stats.target_forwards == 1 and result.stats.accepted <= 4
    assert all(ord(".") not in scored[:-1] for scored in oracle.scored), "drafted past the end"


def test_nothing_is_drafted_below_the_end() -> None:
    seen = []

    class Watch(Oracle):
        def observe(self, step: Any) -> None:
            for row in range(step.tree.batch):
                alive = step.tree.alive[row]
                seen.append(step.tree.tokens[row, alive].tolist()[1:])

    run(b"ab.cd", Fixed(Watch(b"ab.cd"), Shape(9, 9, 1)), end_tokens=[ord(".")])
    assert seen == [[97, 98, 46]]


@pytest.mark.parametrize("budget", [1, 2, 5, 12, 13, 14, 30])
def test_budget(budget: int) -> None:
    text = bytes(range(97, 123)) + bytes(range(65, 91))
    result, _ = run(text, max_new_tokens=budget)
    assert bytes(result.tokens) == text[:budget] and result.finish_reason == "length"
    assert result.stats.new_tokens == budget
    assert sum(r.emitted for r in result.rounds) == budget
    assert all(r.accepted <= r.emitted for r in result.rounds)


@pytest.mark.parametrize("size", [1, 3, 12])
def test_stop_string_across_tokens_and_blocks(size: int) -> None:
    text = b"one two END three four"
    result, stopper = run(text, Fixed(Oracle(text), Shape(size, size, 1)), stop=["zzz", "END"])
    assert stopper.text == "one two " and result.finish_reason == "stop"
    assert bytes(result.tokens) == b"one two END", "the token that completes the string stays"


def test_the_first_stop_string_counts() -> None:
    result, stopper = run(b"ab cd ef", stop=["ef", "d", "cd"])
    assert stopper.text == "ab " and bytes(result.tokens) == b"ab cd"


def test_a_stop_string_that_ends_inside_a_token() -> None:
    class Words(Bytes):
        def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
            return "".join({1: "one;", 2: "two", 3: " th;ree"}[t] for t in tokens)

    stopper = Stopper(max_new_tokens=9, stop=["; th", ";"], tokenizer=Words())
    assert stopper.cut([], [2, 3, 1]) == 2
    assert stopper.text == "two th" and stopper.reason == "stop"


def test_a_stop_string_in_the_prompt_does_not_count() -> None:
    result, stopper = run(b"bcdefg", stop=["Ab"], max_new_tokens=4)
    assert stopper.text is None and result.finish_reason == "length"


def test_criteria_in_mid_block() -> None:
    """transformers' assisted generation looks at block ends only and would run past this."""
    calls = []

    def seen(tokens: list[int]) -> bool:
        calls.append(bytes(tokens))
        return len(tokens) == 5

    result, _ = run(b"abcdefghijkl", criteria=seen)
    assert bytes(result.tokens) == b"abcde" and result.finish_reason == "criteria"
    assert calls == [b"a", b"ab", b"abc", b"abcd", b"abcde"]


def test_stop_string_in_multi_byte_text() -> None:
    text = "naïve → end♥ more".encode()
    result, stopper = run(text, stop=["d♥"], max_new_tokens=60)
    assert stopper.text == "naïve → en"
    assert bytes(result.tokens).decode() == "naïve → end♥"


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=30), st.data())
def test_detokenizer(text: str, data: st.DataObject) -> None:
    """Whatever the blocks, the text is whole and nothing is taken back."""
    raw = list(text.encode())
    detokenizer, shown, i = Detokenizer(Bytes()), "", 0
    while i < len(raw):
        step = data.draw(st.integers(1, 5))
        shown += detokenizer.push(raw[i : i + step], last=i + step >= len(raw))
        assert shown == detokenizer.text
        # a stray replacement mark may be in the text itself, but never as half a character
        assert text.startswith(shown)
        i += step
    assert shown == text


def test_detokenizer_lets_go_at_the_end() -> None:
    half = "é".encode()[:1]
    detokenizer = Detokenizer(Bytes())
    assert detokenizer.push([97]) == "a"
    assert detokenizer.push(list(half)) == ""
    assert detokenizer.push([], last=True) == "\ufffd"


@pytest.mark.parametrize(
    "options", [{"stop": [""], "tokenizer": Bytes()}, {"stop": ["a"]}], ids=["empty", "bare"]
)
def test_bad_stops(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError):
        Stopper(max_new_tokens=3, **options)


def test_rows_that_stop_at_unlike_times() -> None:
    """Finished rows leave the batch; the others and their drafts go on unharmed."""
    target = TableTarget(7, seed=5, sharpness=2.0)
    draft = TableTarget(7, seed=5, sharpness=2.0)

    def answers(policy: Policy) -> list[list[int]]:
        requests = [
            Request(
                torch.tensor([b % 7, (3 * b) % 7] * (1 + b % 3)),
                Stopper(max_new_tokens=3 + 7 * b % 31, end_tokens=[6]),
            )
            for b in range(9)
        ]
        rounds = decode(
            target,
            requests,
            policy=policy,
            acceptance=Lossless(),
            law=Law(),
            generator=torch.Generator(),
        )
        for _ in rounds:
            pass
        assert all(r.result.finish_reason in ("stop", "length") for r in requests)
        return [r.result.tokens for r in requests]

    plain = answers(Fixed())
    assert len({len(a) for a in plain}) > 3
    assert answers(Fixed(ModelDrafter(draft), Shape(4, 4, 1))) == plain
    assert answers(Fixed(ModelDrafter(draft, branching=(2, 2)), Shape(12, 3, 2))) == plain
