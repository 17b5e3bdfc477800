"""Reward-guided decoding: its law by enumeration, both limits, and that no refused step stays."""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch

from isthmus.decoding.relay import StepEnd
from isthmus.decoding.rewards import NoReward, StateReward, mixture
from isthmus.decoding.state_head import StateHead
from isthmus.decoding.table import TableTarget
from isthmus.errors import InvalidInputError, MismatchError, UnsupportedModelError
from isthmus.systems.speculative.reward_guided import RewardGuided, Settings, keep_probability
from isthmus.workbench import sums
from isthmus.workbench.rewards import RewardRecipe, steps

DRAFT, TARGET = (TableTarget(11, seed=s, sharpness=2.0) for s in (3, 4))
PROMPTS = [torch.tensor(p) for p in ([1, 2, 3], [4], [5, 6])]


class Listed:
    """A reward read off a table of steps, any model's or no model's states."""

    def __init__(self, rule, reader=None) -> None:  # type: ignore[no-untyped-def]
        self.rule, self.reader = rule, reader
        self.seen: list[tuple[list[int], int, torch.Tensor | None]] = []

    def score(
        self, texts: Sequence[Sequence[int]], starts: Sequence[int], states: torch.Tensor | None
    ) -> list[float]:
        for i, (text, start) in enumerate(zip(texts, starts, strict=True)):
            self.seen.append((list(text), start, None if states is None else states[i]))
        return [self.rule(tuple(t[s:])) for t, s in zip(texts, starts, strict=True)]


def arbitrary(step: Sequence[int]) -> float:
    return sum((i + 2) * t for i, t in enumerate(step)) % 7 / 7


def law_after(target: TableTarget, text: Sequence[int]) -> torch.Tensor:
    logits = target.logits(target.state(torch.tensor([list(text)])))
    return torch.softmax(logits[0].double(), -1)


def step_law(
    target: TableTarget, text: list[int], room: int, end: int
) -> dict[tuple[int, ...], float]:
    """Probability of every step of at most ``room`` tokens that ``end`` ends."""
    found: dict[tuple[int, ...], float] = {}
    for size in range(1, room + 1):
        for step in product(range(3), repeat=size):
            if end in step[:-1] or (size < room and step[-1] != end):
                continue
            p = 1.0
            for i, token in enumerate(step):
                p *= float(law_after(target, [*text, *step[:i]])[token])
            found[step] = p
    assert sum(found.values()) == pytest.approx(1.0)
    return found


@pytest.mark.parametrize("kind", ["step", "clip"])
def test_the_law_is_the_enumerated_mixture(kind: str) -> None:
    """Texts of two tokens over three, one or two steps long; every text's share is known."""
    small, large = (TableTarget(3, seed=s, sharpness=1.5) for s in (1, 2))
    settings = Settings(threshold=0.4, weight=kind, slope=3.0, separator=(2,))  # type: ignore[arg-type]

    def steps_after(text: list[int], room: int) -> dict[tuple[int, ...], float]:
        ours, theirs = (step_law(m, text, room, end=2) for m in (small, large))
        keep = torch.tensor([keep_probability(settings, arbitrary(y)) for y in ours]).double()
        laws = [torch.tensor([law[y] for y in ours]).double() for law in (ours, theirs)]
        return dict(zip(ours, mixture(laws[0], laws[1], keep)[0].tolist(), strict=True))

    truth: dict[tuple[int, ...], float] = {}
    for first, p in steps_after([0], 2).items():
        if len(first) == 2:
            truth[first] = p
            continue
        for second, q in steps_after([0, *first], 1).items():
            truth[*first, *second] = p * q
    rows = 1500
    strategy = RewardGuided(small, large, Listed(arbitrary), settings)
    got = strategy.generate_batch(
        [torch.tensor([0])] * rows, max_new_tokens=2, temperature=1.0, seed=0
    )
    counts = Counter(tuple(g.tokens) for g in got)
    assert sum(truth.values()) == pytest.approx(1.0) and set(counts) <= set(truth)
    chi = sum((counts[y] - rows * p) ** 2 / (rows * p) for y, p in truth.items())
    assert chi < 8 + 5 * math.sqrt(2 * 8), f"{chi:.1f} with 8 degrees of freedom"


def test_both_limits_are_the_single_models() -> None:
    for threshold, model, name in ((0.0, DRAFT, "draft"), (1.01, TARGET, "target")):
        settings = Settings(threshold=threshold, separator=(7,))
        strategy = RewardGuided(DRAFT, TARGET, Listed(arbitrary), settings)
        for prompt, got in zip(
            PROMPTS, strategy.generate_batch(PROMPTS, max_new_tokens=15), strict=True
        ):
            text = prompt.tolist()
            for _ in range(15):
                text.append(int(law_after(model, text).argmax()))
            assert got.tokens == text[len(prompt) :] and not got.lossless
            assert {r.drafter for r in got.rounds} == {name}
            assert got.finish_reason == "length"


def test_the_weights_are_those_of_the_table() -> None:
    def values(kind: str, *rewards: float) -> list[float]:
        settings = Settings(threshold=0.7, weight=kind, slope=2.0)  # type: ignore[arg-type]
        return [round(keep_probability(settings, r), 4) for r in rewards]

    assert values("step", 0.69, 0.7, 0.9) == [0.0, 1.0, 1.0]
    assert values("constant", 0.0, 0.9) == [0.7, 0.7]
    assert values("clip", -1.0, 0.25, 1.5) == [0.0, 0.25, 1.0]
    assert values("ratio", math.log(0.25), 0.3) == [0.25, 1.0]
    assert values("sigmoid", 0.7, 0.7 + math.log(3) / 2) == [0.5, 0.75]


@pytest.mark.parametrize("own", [False, True])
def test_no_refused_step_stays_in_a_cache(own: bool) -> None:
    """Two transformers on ragged rows, step by step, against forwards of the whole text."""
    small, large = tiny.target("Llama"), tiny.target("Llama", noise=0.3)
    reader = tiny.target("Llama", noise=0.6) if own else small
    reward = Listed(arbitrary, reader if own else "draft")
    settings = Settings(threshold=0.5, separator=(9,), max_steps=6)
    over = StepEnd((9,))
    strategy = RewardGuided(small, large, reward, settings)
    prompts = [torch.tensor(p) for p in ([9, 5, 11], [23], [40, 7])]
    # a step is short here: nine tokens of 64 end one
    strategy.over = lambda step: len(step) == 3 or over(step)  # type: ignore[assignment]
    got = strategy.generate_batch(prompts, max_new_tokens=17, seed=0)
    writers = [r.drafter for g in got for r in g.rounds]
    assert 3 < writers.count("draft") < len(writers) - 3, "or the test sees nothing"
    for prompt, result in zip(prompts, got, strict=True):
        text, start = prompt.tolist(), len(prompt)
        while len(text) - start < 17:
            for model in (small, large):
                step: list[int] = []
                while not step or not (strategy.over(step) or len(text) + len(step) - start >= 17):
                    ids = torch.tensor([text + step])
                    step.append(int(model.forward(ids).logits[0, -1].argmax()))
                if arbitrary(step) >= 0.5:
                    break
            text += step
        assert result.tokens == text[start:]
    for text, _, states in reward.seen:
        out = reader.model.model(input_ids=torch.tensor([text]), use_cache=False)
        assert states is not None
        assert torch.allclose(states, out.last_hidden_state[0, -1], atol=1e-8)
    total = sum(len(p) for p in prompts) + 17 * 3
    assert strategy.read[1] < total, "the target reads nothing twice and no refused step"


def test_what_is_read_is_counted_by_hand() -> None:
    # one row, steps of two tokens; the second step is refused
    refuse = iter([1.0, 0.0, 1.0])
    strategy = RewardGuided(DRAFT, TARGET, Listed(lambda s: next(refuse)), Settings(separator=(1,)))
    strategy.over = lambda step: len(step) == 2  # type: ignore[assignment]
    got = strategy.generate(torch.tensor([1, 2, 3]), max_new_tokens=6)
    # the draft reads 3 + 1, then 2, and after the refusal the last token kept, 2 new ones and 1
    assert [r.drafter for r in got.rounds] == ["draft", "target", "draft"]
    assert strategy.read == (4 + 2 + 3 + 1, 5 + 1)
    assert (got.stats.drafted, got.stats.accepted, got.stats.target_forwards) == (6, 4, 2)


def test_rows_of_a_batch_do_not_depend_on_each_other() -> None:
    settings = Settings(threshold=0.5, weight="clip", separator=(7,))
    strategy = RewardGuided(DRAFT, TARGET, Listed(arbitrary), settings)
    together = strategy.generate_batch(PROMPTS, max_new_tokens=20, temperature=1.0, seed=5)
    assert len({tuple(r.drafter for r in g.rounds) for g in together}) == 3
    for row, prompt in enumerate(PROMPTS):
        alone = strategy.generate(prompt, max_new_tokens=20, temperature=1.0, seed=5 + row)
        assert alone.tokens == together[row].tokens


def test_off_keeps_the_share_asked_for_whatever_the_reward() -> None:
    settings = Settings(threshold=0.3, weight="constant", separator=(7,))
    strategy = RewardGuided(DRAFT, TARGET, NoReward(), settings)
    strategy.over = lambda step: True  # type: ignore[assignment]
    got = strategy.generate_batch(PROMPTS, max_new_tokens=90, seed=1)
    share = sum(r.drafter == "draft" for g in got for r in g.rounds) / 270
    assert share == pytest.approx(0.3, abs=0.1)


def test_an_end_token_and_max_steps_end_a_row() -> None:
    first = int(law_after(DRAFT, [1, 2, 3]).argmax())
    keep = Settings(threshold=0.0, separator=(7,))
    got = RewardGuided(DRAFT, TARGET, Listed(arbitrary), keep, end=first).generate(
        PROMPTS[0], max_new_tokens=9
    )
    assert got.tokens == [first] and got.finish_reason == "stop"
    short = Settings(threshold=0.0, separator=(first,), max_steps=1)
    got = RewardGuided(DRAFT, TARGET, Listed(arbitrary), short).generate(
        PROMPTS[0], max_new_tokens=9
    )
    assert got.tokens == [first] and got.finish_reason == "length"


def test_separators_that_are_text_are_found_across_tokens() -> None:
    tokenizer = sums.tokenizer()
    over = StepEnd("5\n", tokenizer)
    ids = tokenizer.encode("ones: 7 plus 8 is 15\n")
    assert [over(ids[: n + 1]) for n in range(len(ids))] == [False] * (len(ids) - 1) + [True]


def test_steps_to_learn_from_carry_the_labels_of_the_checker() -> None:
    found = steps(TableTarget(26, seed=1), RewardRecipe(problems=6, corrupt_share=1.0))
    kinds = Counter((s.source, s.right) for s in found)
    lines = sum(n for (source, _), n in kinds.items() if source == "greedy")
    assert kinds["corrupted", False] == lines and kinds["corrupted", True] == 0
    asked = sums.problems(6, "train", seed="reward/0", addends=(2, 3))
    assert lines == sum(len(p.meanings()) for p in asked)
    assert not any(s.right for s in found if s.source != "corrupted"), "a random model is wrong"
    assert all(any(s.text.startswith(p.prompt) for p in asked) for s in found)


def test_a_state_reward_is_its_head() -> None:
    head = StateHead(4)
    head.weight.data = torch.tensor([1.0, 0.0, 0.0, -1.0])
    states = torch.tensor([[math.log(3), 5.0, 5.0, 0.0], [0.0, 1.0, 2.0, math.log(4)]])
    assert StateReward(head).score([[1], [2]], [0, 0], states) == pytest.approx([0.75, 0.2])


def test_a_saved_head_is_a_strategy_by_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.facade("Llama", "float64")
    head = StateHead(model.draft_model.hidden_size)
    head.weight.data[0] = 3.0
    head.save_pretrained(tmp_path, "reward-guided", model.draft_model)
    steps = Settings(separator=(7,))
    monkeypatch.setattr("isthmus.systems.speculative.reward_guided.Settings", lambda: steps)
    prompt = tiny.prompts()[0]
    result = model.generate(prompt, drafter=str(tmp_path), max_new_tokens=12)
    again = RewardGuided.for_model(model, steps, reward=StateReward(head))
    assert result.tokens == again.generate(prompt, max_new_tokens=12).tokens
    assert not result.lossless
    with pytest.raises(MismatchError, match="for this model"):
        tiny.facade("GPT2", "float64").generate(prompt, drafter=str(tmp_path), max_new_tokens=4)


def test_bad_input_is_refused_in_one_line() -> None:
    for bad in (
        {"weight": "none"},
        {"weight": "constant", "threshold": 1.2},
        {"max_steps": 0},
        {"separator": ""},
    ):
        with pytest.raises(InvalidInputError):
            Settings(**bad)  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="token ids"):
        RewardGuided(DRAFT, TARGET, NoReward())
    good = Settings(separator=(7,))
    strategy = RewardGuided(DRAFT, TARGET, NoReward(), good)
    with pytest.raises(InvalidInputError, match="max_new_tokens"):
        strategy.generate(PROMPTS[0], max_new_tokens=0)
    with pytest.raises(MismatchError, match="share one vocabulary"):
        RewardGuided(TableTarget(900), TARGET, NoReward(), good).generate(
            PROMPTS[0], max_new_tokens=2
        )
    alone = SimpleNamespace(target=TARGET, draft_model=None, tokenizer=None)
    with pytest.raises(InvalidInputError, match="--draft-model"):
        RewardGuided.for_model(alone)
    both = SimpleNamespace(target=TARGET, draft_model=DRAFT, tokenizer=None)
    with pytest.raises(InvalidInputError, match="needs a reward"):
        RewardGuided.for_model(both, good)
    encoder = SimpleNamespace(target=tiny.target("Bart"), draft_model=DRAFT, tokenizer=None)
    with pytest.raises(UnsupportedModelError, match="without an encoder"):
        RewardGuided.for_model(encoder)
