"""Judge decoding: the OR by enumeration, the exact limits, the state it looks at, its annotator."""

import random
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch

from isthmus.decoding.engine import wanted
from isthmus.decoding.law import Law
from isthmus.decoding.model import Model
from isthmus.decoding.policy import Fixed
from isthmus.decoding.state_head import StateHead
from isthmus.decoding.table import TableTarget
from isthmus.decoding.tree import TokenTree
from isthmus.errors import BrokenFileError, InvalidInputError, MismatchError
from isthmus.roles import Context, Features, Shape
from isthmus.systems.speculative.judge import Judge, Judged, Settings
from isthmus.testing import check_acceptance
from isthmus.training.drafting import Recipe
from isthmus.workbench import faults, sums


def first_coordinate() -> StateHead:
    """A head that says what the first coordinate of a state says."""
    head = StateHead(3)
    head.weight.data = torch.tensor([1.0, 0.0, 0.0])
    return head


def context(features: torch.Tensor | None, rows: int, law: Law | None = None) -> Context:
    ids = torch.zeros(rows, 4, dtype=torch.int64)
    law = law or Law()
    made = Context(ids, [1] * rows, [1] * rows, law, torch.Generator(), list(range(rows)))
    made.features = None if features is None else Features(features)
    return made


def test_a_token_stands_if_the_exact_test_or_the_judge_lets_it_pass() -> None:
    """All 4^3 cases of a chain of three tokens, each exact or not and judged good or not."""
    cases = list(product(((0, 0), (0, 1), (1, 0), (1, 1)), repeat=3))
    exact, good = torch.tensor(cases).unbind(-1)  # [64, 3]
    tokens = torch.tensor([[9, 1, 2, 3]]).repeat(64, 1)
    logits = torch.zeros(64, 4, 10)
    choice = torch.where(exact == 1, tokens[:, 1:], 5)
    logits[:, :3].scatter_(2, choice[..., None], 4.0)
    logits[:, 3, 7] = 1.0
    states = torch.full((64, 4, 3), 50.0)  # coordinates that the head does not read, and the root
    states[:, 1:, 0] = torch.where(good == 1, 2.0, -2.0)
    tree = TokenTree.chain(tokens[:, 0], tokens[:, 1:])
    verdict = Judged(first_coordinate(), 0.5).accept(tree, logits, context(states, 64))
    for b, case in enumerate(cases):
        stands = 0
        while stands < 3 and any(case[stands]):
            stands += 1
        path = [n for n in verdict.path[b].tolist() if n >= 0]
        assert path == list(range(stands + 1)), case
        assert int(verdict.token[b]) == (7 if stands == 3 else 5), case


def test_the_threshold_is_a_probability_that_must_be_exceeded() -> None:
    tree = TokenTree.chain(torch.tensor([9]), torch.tensor([[1]]))
    logits = torch.zeros(1, 2, 10)
    logits[..., 5] = 1.0
    states = torch.zeros(1, 2, 3)  # probability one half
    for threshold, length in ((0.49, 2), (0.5, 1)):
        verdict = Judged(first_coordinate(), threshold).accept(tree, logits, context(states, 1))
        assert verdict.path.shape[1] == length


def test_nothing_stands_below_an_end() -> None:
    tree = TokenTree.chain(torch.tensor([9, 9]), torch.tensor([[1, 2, 3], [1, 3, 3]]))
    tree = tree.below(torch.tensor([2]))
    states = torch.full((2, 4, 3), 9.0)
    got = Judged(first_coordinate()).accept(tree, torch.zeros(2, 4, 10), context(states, 2))
    assert got.path.tolist() == [[0, 1, 2, -1], [0, 1, 2, 3]]


@pytest.mark.parametrize("rule", [Judged(None), Judged(first_coordinate(), 1.0)])
def test_without_the_judge_the_rule_is_exact(rule: Judged) -> None:
    assert rule.lossless and not wanted(rule)
    check_acceptance(rule, rows=2000)  # of greedy decoding the next test speaks


def test_threshold_one_writes_what_the_target_writes_and_half_does_not() -> None:
    target, draft = tiny.target("Llama"), tiny.target("Llama", noise=0.3)
    model = Model(target.model, draft_model=draft.model)
    head = StateHead(target.hidden_size)
    head.bias.data = torch.tensor(9.0)  # a judge that lets everything pass
    outputs = {}
    for threshold in (0.5, 1.0):
        drafter = Judge(model.draft_model, Settings(threshold, 6), head=head)
        got = model.generate(
            list(tiny.prompts()), drafter=Fixed(drafter, drafter.default_shape), max_new_tokens=14
        )
        outputs[threshold] = [g.tokens for g in got]
        assert all(g.lossless == (threshold == 1.0) for g in got)
        if threshold == 0.5:
            drafted = [r for g in got for r in g.rounds if r.nodes]
            assert all(r.accepted == r.nodes for r in drafted[:-3]), "everything passes"
    plain = model.generate(list(tiny.prompts()), drafter="none", max_new_tokens=14)
    assert outputs[1.0] == [g.tokens for g in plain]
    assert outputs[0.5] != outputs[1.0], "or the test sees nothing"


def test_the_state_is_that_at_the_token_itself() -> None:
    target = tiny.target("Llama")
    seen: list[torch.Tensor] = []

    class Spy(StateHead):
        def forward(self, states: torch.Tensor) -> torch.Tensor:
            seen.append(states)
            return torch.ones(states.shape[:-1])

    model = Model(target.model, draft_model=tiny.target("Llama", noise=0.3).model)
    drafter = Judge(model.draft_model, head=Spy(target.hidden_size))
    prompt = torch.tensor([5, 11, 23])
    got = model.generate(prompt, drafter=Fixed(drafter, Shape(4, 4, 1)), max_new_tokens=5)
    ids = torch.cat([prompt, torch.tensor(got.tokens)])
    want = target.model.model(input_ids=ids[None], use_cache=False).last_hidden_state[0]
    assert torch.allclose(seen[0][0], want[3:7], atol=1e-8), "at draft tokens 1 to 4"


def test_a_head_separates_what_can_be_separated() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 5, generator=generator) * 3 + 7
    good = x @ torch.tensor([1.0, -2.0, 0.0, 0.5, 0.0]) > -4
    head = StateHead(5)
    head.fit(x, good, penalty=1e-6)
    assert ((head(x) > 0.5) == good).float().mean() > 0.99
    # a hidden layer sees what no line separates
    flat = torch.randn(400, 2, generator=generator)
    cross = flat[:, 0] * flat[:, 1] > 0
    scores = []
    for hidden in (0, 16):
        head = StateHead(2, hidden)
        head.fit(flat, cross, penalty=1e-5, iterations=200)
        scores.append(float(((head(flat) > 0.5) == cross).float().mean()))
    assert scores[0] < 0.7 < 0.93 < scores[1]


def test_a_rare_class_counts_as_much_when_balanced() -> None:
    generator = torch.Generator().manual_seed(1)
    good = torch.arange(2000) % 40 > 0
    x = torch.randn(2000, 1, generator=generator) + 1.5 * good[:, None]
    found = []
    for balance in (False, True):
        head = StateHead(1)
        head.fit(x, good, balance=balance)
        found.append(float((head(x[~good]) < 0.5).float().mean()))
    assert found[0] < 0.1 < 0.6 < found[1], "share of the faults that are seen"


def test_a_head_survives_its_file_and_refuses_others(tmp_path: Path) -> None:
    target, other = tiny.target("Llama"), tiny.target("Llama", noise=0.3)
    head = StateHead(target.hidden_size, 3, seed=4)
    states = torch.randn(40, target.hidden_size, generator=torch.Generator().manual_seed(0))
    head.fit(states, torch.arange(40) % 2 == 0)
    head.record = {"tokens": 40}
    head.save_pretrained(tmp_path, "judge", target)
    again = StateHead.from_pretrained(tmp_path, "judge", target)
    assert torch.equal(again(states), head(states)) and again.record == {"tokens": 40}
    with pytest.raises(MismatchError, match="no judge head"):
        StateHead.from_pretrained(tmp_path, "judge", other)
    with pytest.raises(MismatchError, match="no other head"):
        StateHead.from_pretrained(tmp_path, "other", target)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(BrokenFileError, match="altered"):
        StateHead.from_pretrained(tmp_path, "judge", target)


def test_the_annotator_agrees_with_the_checker_of_whole_lines() -> None:
    rng = random.Random(0)
    encode = sums.tokenizer().encode
    spoilt = 0
    for problem in sums.problems(60, "train", free=True, seed="annotator"):
        text = problem.solution(rng)
        ids = [*encode(text), 0]
        assert faults.first_fault(problem, ids) == len(ids), text
        lines = sums.lines(text)
        place = rng.randrange(len(lines))
        lines[place] = sums.corrupt(lines[place], rng)
        right = sums.check_step(problem, place, lines[place])  # two digits may have changed places
        ids = [*encode("\n".join(lines)), 0]
        fault = faults.first_fault(problem, ids)
        before = len(encode("".join(f"{line}\n" for line in lines[:place])))
        assert (fault == len(ids)) == right
        if not right:
            spoilt += 1
            assert before <= fault <= before + len(encode(lines[place]))
    assert spoilt > 40


def test_the_first_fault_is_found_by_hand() -> None:
    problem, encode = sums.Problem((27, 58)), sums.tokenizer().encode

    def place(text: str) -> int:
        return faults.first_fault(problem, encode(text))

    assert place("ones: 8 with 7 gives 15\ntens: 1 and 5") == 12, "all right so far"
    assert place("ones: 7 plus 7") == 3, "the second 7 is not there"
    assert place("ones: 7 is 7") == 2, "an addend is missing"
    assert place("tens: 2") == 0
    assert place("ones: 7 plus 8 is 15\ntens: 5 plus 2 is") == 12, "the carry is missing"


def test_annotated_tokens_end_with_the_fault() -> None:
    target = tiny.target("Llama")
    problems = [sums.Problem((27, 58)), sums.Problem((41, 12))]
    solutions = [sums.tokenizer().encode(t) for t in ("ones: 7 plus 9 is 16", "ones: 1 plus 2")]
    found = faults.annotated(target, problems, solutions)
    assert found.good.tolist() == [True, True, True, False] + [True] * 4
    ids = torch.tensor([sums.tokenizer().encode(problems[1].prompt) + solutions[1]])
    want = target.model.model(input_ids=ids, use_cache=False).last_hidden_state[0, -4:]
    assert torch.allclose(found.states[4:], want, atol=1e-8)


def test_a_worded_draft_is_trained_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path))
    base, recipe = tiny.target("Llama"), Recipe(steps=2, batch_size=2, learning_rate=1e-2)
    first = faults.worded_draft(base, recipe)
    monkeypatch.setattr(faults, "_teach", lambda *_: pytest.fail("trained twice"))
    again = faults.worded_draft(base, recipe)
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(first.forward(ids).logits, again.forward(ids).logits)
    assert not torch.allclose(first.forward(ids).logits, base.forward(ids).logits)


def test_bad_input_is_refused_in_one_line() -> None:
    for bad in (Settings, Settings):
        with pytest.raises(InvalidInputError, match="threshold"):
            bad(threshold=1.5)
    with pytest.raises(InvalidInputError, match="num_draft_tokens"):
        Settings(num_draft_tokens=0)
    rule = Judged(first_coordinate())
    chain = TokenTree.chain(torch.tensor([0]), torch.tensor([[1]]))
    with pytest.raises(InvalidInputError, match="hidden states"):
        rule.accept(chain, torch.zeros(1, 2, 4), context(None, 1))
    tree = TokenTree.from_paths(0, [[1], [2]])
    with pytest.raises(InvalidInputError, match="chains only"):
        rule.accept(tree, torch.zeros(1, 3, 4), context(torch.zeros(1, 3, 3), 1))
    with pytest.raises(InvalidInputError, match="both classes"):
        StateHead(3).fit(torch.zeros(2, 3), torch.ones(2))
    model = SimpleNamespace(target=None, draft_model=None, tokenizer=None)
    with pytest.raises(InvalidInputError, match="--draft-model"):
        Judge.for_model(model)
    model.draft_model = TableTarget(5)
    with pytest.raises(InvalidInputError, match="needs a head"):
        Judge.for_model(model)


def test_a_saved_head_is_a_drafter_by_its_folder(tmp_path: Path) -> None:
    model = tiny.facade("Llama", "float64")
    head = StateHead(model.target.hidden_size, seed=1)
    head.save_pretrained(tmp_path, "judge", model.target)
    prompt = tiny.prompts()[0]
    options = {"max_new_tokens": 12, "ignore_end": True}
    result = model.generate(prompt, drafter=str(tmp_path), **options)
    judge = Judge.for_model(model, head=head)
    again = model.generate(prompt, drafter=Fixed(judge, judge.default_shape), **options)
    assert result.tokens == again.tokens and not result.lossless
    with pytest.raises(MismatchError, match="for this model"):
        tiny.facade("GPT2", "float64").generate(prompt, drafter=str(tmp_path), **options)


def test_tokens_are_settled_by_what_the_target_makes_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A target that errs behind the word "with" and nowhere else."""
    encode = sums.tokenizer().encode
    (bad,) = encode(" with ")

    class Finisher:
        def __init__(self, targets: object, prompts: list[torch.Tensor]) -> None:
            self.texts = [p.tolist() for p in prompts]

        def write(self, model: int, rows: list[int], *_: object) -> None:
            for b in rows:
                self.texts[b] += encode(f"\nanswer: {1 if bad in self.texts[b] else 85}")

    monkeypatch.setattr(faults, "Relay", Finisher)
    target, problem = tiny.target("Llama"), sums.Problem((27, 58))
    solutions = [
        encode(f"ones: 8 plus 7 is 15\ntens: 5 {w} 2 plus 1 is 8") for w in ("with", "and")
    ]
    found = faults.settled(target, [problem] * 2, solutions)
    want: list[bool] = []
    for solution in solutions:
        ids = torch.tensor([encode(problem.prompt) + solution])
        choice = target.forward(ids).logits[0, -len(solution) - 1 : -1].argmax(-1)
        odd = [t for t, c in zip(solution, choice.tolist(), strict=True) if t != c]
        odd = odd[: odd.index(bad) + 1] if bad in odd else odd
        want += [t != bad for t in odd]
    assert found.good.tolist() == want and want.count(False) == 1 and len(want) > 20
    assert len(found.states) == len(want)
