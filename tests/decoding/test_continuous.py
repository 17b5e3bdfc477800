"""Continuous batching: whoever joins whom, every answer is the one that it would be alone."""

from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import tiny
import torch

from isthmus import registry
from isthmus.decoding.acceptance import Coupled, Lossless
from isthmus.decoding.cost import Cost, Costs
from isthmus.decoding.drafters import ModelDrafter, PromptLookup
from isthmus.decoding.engine import (
    PREFILL_TOKENS,
    Request,
    collate,
    decode,
    extendable,
)
from isthmus.decoding.law import Law
from isthmus.decoding.model import Prompt
from isthmus.decoding.policy import Auto, Fixed
from isthmus.decoding.stopping import Stopper
from isthmus.decoding.table import TableTarget
from isthmus.errors import InvalidInputError, MismatchError, UnsupportedModelError
from isthmus.roles import Context, Shape

DRAFTERS = ("none", "prompt-lookup", "token-recycling", "speculative-sampling", "smartspec", "auto")


def prompts(count: int, seed: int = 5) -> list[torch.Tensor]:
    """Prompts of unlike length, some of which repeat themselves."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for i in range(count):
        length = int(torch.randint(1, 12, (1,), generator=generator))
        ids = torch.randint(3, tiny.V, (length,), generator=generator)
        out.append(ids.repeat(2) if i % 3 == 0 else ids)
    return out


def budget(number: int) -> int:
    return 4 + (number * 7) % 15


def policy(name: str, drafter: str) -> Any:
    model = tiny.facade(name, "float32")
    draft: Any = model.draft_model
    if drafter == "smartspec":  # left to the clock of a tiny model, it would draft nothing
        system = registry.load_module(registry.find(drafter))
        return system.Smartspec(ModelDrafter(draft), system.Settings(3, adapt=False))
    if drafter != "auto":
        return model.policy(drafter)
    candidates = [PromptLookup(), registry.load("token-recycling")(), ModelDrafter(draft)]
    return Auto(candidates, Cost({1: 1.0, 64: 1.2}), survey=5)


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("name", ["Llama", "Gemma3", "Bloom", "T5", "Marian"])
def test_every_answer_is_the_one_of_a_prompt_alone(name: str, drafter: str) -> None:
    model, asked = tiny.facade(name, "float32"), prompts(11)
    wanted = [
        model.generate(p, max_new_tokens=budget(i), drafter="none", ignore_end=True).tokens
        for i, p in enumerate(asked)
    ]
    found = dict(
        model.generate_many(
            [Prompt(p, budget(i)) for i, p in enumerate(asked)],
            batch_size=3,
            drafter=policy(name, drafter),
            ignore_end=True,
        )
    )
    assert sorted(found) == list(range(11))
    for i, want in enumerate(wanted):
        assert found[i].tokens == want, f"prompt {i}"
        assert found[i].finish_reason == "length"
    if drafter != "none" and name == "Llama":
        assert sum(r.stats.accepted for r in found.values()) > 0


def test_places_are_filled_as_they_become_free_and_no_sooner() -> None:
    model, drawn = tiny.facade("Llama", "float32"), []

    def line() -> Iterator[Prompt]:
        for i in range(9):
            drawn.append(i)
            yield Prompt(prompts(9)[i], 2 if i % 4 else 12)

    finished, waiting = [], []
    for number, _ in model.generate_many(line(), batch_size=4, drafter="none", ignore_end=True):
        finished.append(number)
        waiting.append(len(drawn))
    assert waiting[0] == 4, "the line is read only as places become free"
    assert finished[:3] == [1, 2, 3] and finished != sorted(finished)
    result = dict(model.generate_many(line(), batch_size=4, drafter="none", ignore_end=True))[0]
    assert set(result.stats.parts_s) == {"prefill", "draft", "score", "accept", "commit", "observe"}
    assert result.stats.seconds >= sum(result.stats.parts_s.values()) > 0


def test_clocks_stop_with_an_answer_and_where_nobody_reads_on() -> None:
    target = TableTarget(11, seed=3)
    asked = [Request(torch.tensor([1, 2]), Stopper(max_new_tokens=n)) for n in (3, 40, 10_000, 50)]
    rounds = decode(
        target,
        asked,
        policy=Fixed(),
        acceptance=Lossless(),
        law=Law(),
        generator=torch.Generator(),
    )
    for number in range(60):
        next(rounds)
        if number == 20:  # as a server does when a client has gone
            asked[3].result.finish_reason = "cancelled"
    rounds.close()
    short, longer, cut, gone = (request.result.stats for request in asked)
    assert gone.new_tokens == 21 and short.seconds < gone.seconds < longer.seconds
    assert 0 < short.seconds < longer.seconds < cut.seconds
    assert 0 < short.parts_s["score"] < longer.parts_s["score"] < cut.parts_s["score"]
    assert [s.new_tokens for s in (short, longer, cut)] == [3, 40, 60]
    assert all(sum(s.parts_s.values()) <= s.seconds for s in (short, longer, cut))


def test_a_long_prompt_is_read_in_chunks_while_others_go_on() -> None:
    target = TableTarget(11, seed=3, sharpness=2.0, order=2)
    long = torch.arange(3 * PREFILL_TOKENS + 5) % 11
    asked = [torch.tensor([1, 2]), torch.tensor([3]), long, torch.tensor([4])]

    def run(batch_size: int | None, picked: list[int]) -> tuple[list[Request], list[list[int]]]:
        requests = [Request(asked[i], Stopper(max_new_tokens=4 if i == 1 else 16)) for i in picked]
        rounds = decode(
            target,
            requests,
            policy=Fixed(PromptLookup(), Shape(2, 2, 1)),
            acceptance=Lossless(),
            law=Law(),
            generator=torch.Generator().manual_seed(0),
            batch_size=batch_size,
        )
        return requests, [[index for index, _ in emitted] for emitted in rounds]

    together, rounds = run(2, [0, 1, 2, 3])
    for i, request in enumerate(together):
        assert request.result.tokens == run(None, [i])[0][0].result.tokens
    left = max(i for i, emitted in enumerate(rounds) if 1 in emitted)
    joined = min(i for i, emitted in enumerate(rounds) if 2 in emitted)
    assert joined - left == 4, "three rounds of the first prompt pass while the third is read"


def test_drafters_that_cannot_take_in_rows_get_an_empty_batch() -> None:
    class Remembers(PromptLookup):
        """Has state of its own that an inherited `extend` would not know of."""

        begun: ClassVar[list[int]] = []

        def begin(self, context: Context, target: Any, **inputs: Any) -> None:
            self.begun.append(context.batch)
            super().begin(context, target, **inputs)

    assert extendable(Fixed(PromptLookup())) and extendable(policy("Llama", "auto"))
    assert not extendable(Fixed(Remembers())) and not extendable(
        Auto([Remembers()], Cost({1: 1.0}))
    )
    model, asked = tiny.facade("Llama", "float32"), prompts(7)
    drafter = Fixed(Remembers(), Shape(4, 4, 1))
    found = dict(model.generate_many(asked, batch_size=3, drafter=drafter, max_new_tokens=6))
    assert Remembers.begun == [3, 3, 1]
    for i, p in enumerate(asked):
        assert found[i].tokens == model.generate(p, max_new_tokens=6, drafter="none").tokens


def test_recurrent_targets_are_decoded_one_after_the_other() -> None:
    model, asked = tiny.facade("Mamba2", "float32"), prompts(3)
    found = dict(
        model.generate_many(asked, batch_size=4, drafter="prompt-lookup", max_new_tokens=5)
    )
    for i, p in enumerate(asked):
        assert found[i].tokens == model.generate(p, max_new_tokens=5, drafter="none").tokens
    session = tiny.target("Mamba2").session(1)
    with pytest.raises(UnsupportedModelError, match=r"Mamba2.* one row"):
        session.join(session)


def test_sources_of_unlike_length_share_a_session() -> None:
    target = tiny.target("T5")
    sources = [torch.randint(3, tiny.V, (1, n)) for n in (3, 9, 5)]
    sessions = [target.session(1, input_ids=s) for s in sources]
    start, more = torch.tensor([0, 7, 9]), torch.tensor([5])
    for session in sessions:
        session.prefill([start])
    joined = sessions[0].join(sessions[1]).join(sessions[2])
    from isthmus.decoding.tree import TokenTree

    got = joined.score(TokenTree.root(more.expand(3))).logits[:, 0]
    for b, session in enumerate(sessions):
        want = session.score(TokenTree.root(more)).logits[0, 0]
        assert torch.allclose(got[b], want, atol=1e-10)
    with pytest.raises(MismatchError, match="one target"):
        joined.join(tiny.target("Llama").session(1))


def test_inputs_are_padded_with_what_a_mask_hides() -> None:
    rows = [{"x": torch.ones(1, n, dtype=torch.int64)} for n in (2, 3)]
    assert collate(rows)["x"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert collate([{}, {}]) == {}


@pytest.mark.parametrize("drafter", ["none", "prompt-lookup", "speculative-sampling"])
def test_a_sampled_answer_depends_on_its_seed_alone(drafter: str) -> None:
    model, asked = tiny.facade("Llama", "float64"), prompts(6)
    options: dict[str, Any] = {"max_new_tokens": 8, "temperature": 1.0}
    alone = [
        model.generate(p, drafter="none", acceptance=Coupled(40 + i), **options).tokens
        for i, p in enumerate(asked)
    ]
    for order in (range(6), [4, 1, 5, 0, 2, 3]):
        line = [Prompt(asked[i], seed=40 + i) for i in order]
        found = dict(model.generate_many(line, batch_size=3, drafter=drafter, **options))
        assert [found[n].tokens for n in range(6)] == [alone[i] for i in order]
    twice = [
        dict(model.generate_many(asked, batch_size=n, drafter=drafter, seed=3, **options))
        for n in (2, 4)
    ]
    assert [twice[0][i].tokens for i in range(6)] == [twice[1][i].tokens for i in range(6)]
    assert twice[0][0].tokens != twice[0][1].tokens


def test_a_prompt_that_cannot_be_answered_does_not_hold_up_the_others() -> None:
    model = tiny.facade("Llama", "float32")
    line = [[5, 6], [7] * tiny.CONTEXT, [], [8, 9]]
    found = dict(model.generate_many(line, batch_size=2, drafter="none", max_new_tokens=3))
    assert [found[i].finish_reason for i in range(4)] == ["length", "error", "error", "length"]
    assert "shorten the prompt" in found[1].notes[0] and "empty" in found[2].notes[0]
    alone = dict(model.generate_many([[7] * tiny.CONTEXT], drafter="none"))
    assert alone[0].finish_reason == "error"
    for options in ({"batch_size": 0}, {"max_new_tokens": 0}, {"temperature": -1.0}):
        with pytest.raises(InvalidInputError):
            list(model.generate_many([[5]], **options))  # type: ignore[arg-type]


def test_costs_of_a_batch_are_measured_once_and_decide_what_is_drafted() -> None:
    asked: list[int] = []

    def measure(rows: int) -> Cost:
        asked.append(rows)
        return Cost({1: 1.0, 2: 1.9, 64: 60.0})

    costs = Costs(Cost({1: 1.0, 64: 1.1}), measure)
    for rows in (1, 15, 17, 16):
        costs.prepare(rows)
    assert asked == [16] and costs.of(20)(2) == pytest.approx(1.9) and costs.of(1)(2) < 1.1
    assert costs.of(8)(2) > 1.5, "an unknown size is like the nearest one that was measured"
    auto = Auto([PromptLookup()], costs)
    assert auto.widest(1) == 64 and auto.widest(16) == 1
