"""The bench: its accounts, a method of known acceptance length, a broken rule, the tasks."""

import json
from collections.abc import Sequence
from typing import Any

import pytest
import tiny
import torch

from isthmus.decoding.acceptance import Coupled
from isthmus.decoding.cost import Cost
from isthmus.decoding.drafters import ModelDrafter, PromptLookup
from isthmus.decoding.policy import Fixed
from isthmus.decoding.tree import TokenTree
from isthmus.errors import InvalidInputError, UnknownNameError
from isthmus.roles import Context, Shape, Step, Target
from isthmus.systems.speculative.speculative_survey import (
    Settings,
    SpeculativeSurvey,
    _TakesTheFirst,
    winners,
)
from isthmus.workbench import tasks
from isthmus.workbench.bench import answer
from isthmus.workbench.survey import Outcome, survey, table

ROWS = [p.tolist() for p in tiny.prompts()]


class Knows:
    """A drafter that knows the answers, two tokens ahead."""

    name = "knows"

    def __init__(self, answers: Sequence[Sequence[int]]) -> None:
        self.answers = {tuple(p): list(t) for p, t in zip(ROWS, answers, strict=True)}

    def begin(self, context: Context, target: Target, **inputs: Any) -> None:
        self.text = self.answers[tuple(context.row(0).tolist())]

    def propose(self, context: Context, shape: Shape) -> TokenTree:
        at = context.lengths[0] - context.prompt_lengths[0]
        ahead = self.text[at : at + min(2, shape.depth)]
        return TokenTree.chain(context.roots(), torch.tensor([ahead], dtype=torch.int64))

    def observe(self, step: Step) -> None:
        pass

    def select(self, rows: Sequence[int]) -> None:
        pass


def test_accounts_add_up_and_known_acceptance_lengths_come_out() -> None:
    model = tiny.facade("Llama")
    plain = answer(model, ROWS, "none", max_new_tokens=12)
    assert model.draft_model is not None
    methods = {
        "plain": "none",
        "knows": Fixed(Knows(plain.tokens), Shape(2, 2, 1)),
        "lookup": Fixed(PromptLookup(), Shape(4, 4, 1)),
        "model": Fixed(ModelDrafter(model.draft_model), Shape(3, 3, 1)),
        "broken": Fixed(Knows([[5] * 20] * 3), Shape(1, 1, 1)),
    }
    rules = {"broken": _TakesTheFirst()}
    found = survey(
        model, methods, {"a": ROWS[:2], "b": ROWS[2:]}, max_new_tokens=12, acceptances=rules
    )
    assert [(o.task, o.method) for o in found] == [(t, m) for t in "ab" for m in methods]
    for o in found:
        assert [sum(e) for e in o.emitted] == [len(t) for t in o.tokens] == [12] * len(o.tokens)
        assert sum(len(n) for n in o.nodes) == o.forwards and len(o.seconds) == len(o.tokens)
        assert (o.draft_forwards > 0) == (o.method == "model")
        assert (o.same == len(o.tokens)) == (o.method != "broken"), o.method
        want = {"plain": 1.0, "knows": 3.0}.get(o.method)
        assert want is None or o.acceptance_length == want
        assert o.to_dict()["target_forwards"] == o.forwards
    json.dumps([o.to_dict() for o in found])
    shown = table(found, Cost({1: 1.0, 64: 2.0}))
    assert shown.splitlines()[0] == "| method | a | b |"
    assert "| knows | 3.00 (" in shown and "| plain | 1.00 (" in shown
    assert "!" in shown.splitlines()[-3], "the broken method is marked"


def test_coupled_draws_make_all_methods_write_one_text() -> None:
    model = tiny.facade("Llama")
    assert model.draft_model is not None
    methods = {"plain": "none", "model": Fixed(ModelDrafter(model.draft_model), Shape(3, 3, 1))}
    one, two = survey(model, methods, {"a": ROWS}, max_new_tokens=10, temperature=1.0, seed=3)
    assert two.same == 3 and one.tokens == two.tokens
    other, _ = survey(model, methods, {"a": ROWS}, max_new_tokens=10, temperature=1.0, seed=4)
    assert other.tokens != one.tokens
    assert Coupled(3).lossless


def test_predicted_speedup_by_hand() -> None:
    outcome = Outcome("t", "m", [[1] * 6], [[3, 3]], [[2, 2]], draft_s=[2.0], seconds=[9.0])
    # three tokens a round; a round costs 2 of the target and 1 of drafting, plain decoding 1
    assert outcome.predicted_speedup(Cost({1: 1.0, 3: 2.0})) == 1.0
    assert outcome.acceptance_length == 3.0 and outcome.forwards == 2


def test_winners() -> None:
    outcomes = [Outcome(t, m) for t in "ab" for m in "xy"]
    score = {("a", "x"): 2.0, ("a", "y"): 1.0, ("b", "x"): 1.0, ("b", "y"): 3.0}
    assert winners(outcomes, score) == {"a": "x", "b": "y"}


class _Bytes:
    """A tokenizer that is quick to make: one token a character."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [ord(c) % 250 for c in text]


@pytest.mark.parametrize("task", tasks.TASKS)
def test_tasks_give_the_same_prompts_for_the_same_seed(task: str) -> None:
    coder: Any = _Bytes()
    found = tasks.prompts(task, 3, coder, seed=1)
    assert len(found) == 3 and all(1 <= len(p) <= tasks.PROMPT_TOKENS for p in found)
    assert found == tasks.prompts(task, 3, coder, seed=1)
    assert found != tasks.prompts(task, 3, coder, seed=2)
    assert tasks.prompts(task, 2, coder, seed=1) == found[:2]


def test_the_quote_begins_again() -> None:
    coder: Any = _Bytes()
    (prompt,) = tasks.prompts("quote", 1, coder)
    excerpt, size = prompt[: tasks.QUOTED_TOKENS], tasks.QUOTED_TOKENS
    again = coder.encode("\n\n# The same lines again:\n")
    assert prompt[size : size + len(again)] == again
    assert prompt[size + len(again) :] == excerpt[: len(prompt) - size - len(again)]


def test_bad_input_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="quote"):
        SpeculativeSurvey(Settings(tasks=("qoute",)))
    with pytest.raises(UnknownNameError):
        tasks.prompts("poems", 1, _Bytes())  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="at least 1"):
        tasks.prompts("dates", 0, _Bytes())  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="at least one method"):
        survey(tiny.facade("Llama"), {}, {"a": ROWS})
