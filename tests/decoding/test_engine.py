"""Every drafter, every architecture: the greedy output of transformers, token for token."""

from typing import Any

import pytest
import tiny
import torch

from isthmus import registry
from isthmus.api import Model
from isthmus.decoding.cost import Cost
from isthmus.decoding.drafters import ModelDrafter, PromptLookup
from isthmus.decoding.policy import Auto, Fixed
from isthmus.errors import (
    InvalidInputError,
    MismatchError,
    UnknownNameError,
    UnsupportedModelError,
)
from isthmus.roles import Policy, Shape

NEW = 24


def policies(name: str, dtype: str) -> dict[str, Policy]:
    model = tiny.facade(name, dtype)
    recycling = registry.load("token-recycling")
    sampling = registry.load("speculative-sampling")
    draft: Any = model.draft_model
    # a drafter that is nearly free, so that `auto` does draft
    auto = Auto([PromptLookup(), recycling(), sampling(draft)], Cost({1: 1.0, 64: 1.2}), survey=5)
    return {
        "none": Fixed(),
        "prompt-lookup": model.policy("prompt-lookup"),
        "token-recycling": model.policy("token-recycling"),
        "speculative-sampling": model.policy("speculative-sampling"),
        "draft-tree": Fixed(ModelDrafter(draft, branching=(3, 2, 1)), Shape(20, 4, 3)),
        "auto": auto,
    }


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", tiny.NAMES)
def test_greedy_equals_transformers(name: str, dtype: str) -> None:
    want = tiny.reference(name, dtype, NEW)
    assert len({t for row in want for t in row}) > 5, "degenerate text tests nothing"
    forwards: dict[str, int] = {}
    for drafter, policy in policies(name, dtype).items():
        for rows in ([0], [0, 1, 2]):
            out = tiny.generate(name, dtype, policy, NEW, rows)
            for row, result in zip(rows, out, strict=True):
                tiny.assert_same(name, dtype, row, result.tokens, want[row])
                forwards[drafter] = forwards.get(drafter, 0) + result.stats.target_forwards
    assert forwards["none"] == 4 * NEW
    if not tiny.target(name).recurrent:
        # nothing is proven where nothing is ever accepted
        assert forwards["speculative-sampling"] < 0.8 * forwards["none"]


@pytest.mark.parametrize("name", tiny.NAMES)
def test_reach(name: str) -> None:
    assert tiny.target(name).reach == tiny.REACH[name]
    assert tiny.target(name).vocab_size == tiny.V


def llama(**options: Any) -> Any:
    return tiny.facade("Llama").generate(tiny.prompts()[0], drafter="none", **options)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (torch.zeros(0, dtype=torch.int64), "empty"),
        ("", "no tokenizer|empty"),
        ("text", "no tokenizer"),
        (torch.tensor([3, tiny.V]), "outside the vocabulary of 64"),
        (torch.tensor([-1, 3]), "outside the vocabulary"),
        (torch.full((tiny.CONTEXT,), 3), "shorten the prompt"),
        (torch.full((tiny.CONTEXT + 60,), 3), "context is 128"),
    ],
)
def test_bad_prompts(prompt: Any, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        tiny.facade("Llama").generate(prompt, max_new_tokens=4, drafter="none")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 2.0}, "top_p"),
        ({"stop": ["x"]}, "need a tokenizer"),
        ({"inputs": {"input_ids": torch.tensor([[1]])}}, "encoder-decoder"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        llama(**options)


def test_bad_drafters() -> None:
    model = tiny.facade("Llama")
    ids = tiny.prompts()[0]
    with pytest.raises(UnknownNameError, match="token-recycling"):
        model.generate(ids, drafter="token-recyclin")
    with pytest.raises(InvalidInputError, match="num_draft_tokens"):
        model.generate(ids, drafter="prompt-lookup", num_draft_tokens=-2)
    alone = Model(tiny.network("Llama"))
    with pytest.raises(InvalidInputError, match="needs a draft model"):
        alone.generate(ids, drafter="speculative-sampling")
    recurrent = Model(tiny.network("Llama"), draft_model=tiny.network("Mamba2"))
    with pytest.raises(UnsupportedModelError, match="recurrent state"):
        recurrent.generate(ids, drafter="speculative-sampling")


def test_a_draft_model_with_another_vocabulary() -> None:
    config = type(tiny.network("Llama").config)(
        **tiny.network("Llama").config.to_dict() | {"vocab_size": 900}
    )
    other = type(tiny.network("Llama"))(config).eval().double()
    model = Model(tiny.network("Llama"), draft_model=other)
    with pytest.raises(MismatchError, match="900 tokens and the target 64"):
        model.generate(tiny.prompts()[0], drafter="speculative-sampling", max_new_tokens=4)


def test_damaged_weights_are_refused_while_decoding() -> None:
    network = tiny.fresh("Llama")
    model = Model(network)
    network.lm_head.weight.data[5] = float("nan")
    for options in ({}, {"temperature": 1.0}):
        with pytest.raises(InvalidInputError, match="not finite"):
            model.generate(tiny.prompts()[0], drafter="none", max_new_tokens=4, **options)


@pytest.mark.parametrize("drafter", ["none", "prompt-lookup", "token-recycling"])
def test_a_seed_is_an_answer(drafter: str) -> None:
    model = tiny.facade("Llama")
    options: dict[str, Any] = {"drafter": drafter, "max_new_tokens": 20, "temperature": 1.5}
    one = model.generate(tiny.prompts()[0], seed=4, **options)
    assert model.generate(tiny.prompts()[0], seed=4, **options).tokens == one.tokens
    others = {tuple(model.generate(tiny.prompts()[0], seed=s, **options).tokens) for s in range(4)}
    assert len(others) == 4


@pytest.mark.parametrize("name", ["Llama", "T5", "Mamba2"])
def test_end_tokens_of_the_generation_config(name: str) -> None:
    """The token that ends an answer is kept, nothing follows it, and so does transformers."""
    text = tiny.reference(name, "float64", NEW)[0]
    end = text[6]
    model = tiny.facade(name)
    config = model.target.model.generation_config
    absent = next(t for t in range(tiny.V) if t not in text)
    before, config.eos_token_id = config.eos_token_id, [end, absent]
    try:
        for drafter in ("none", "prompt-lookup", "token-recycling"):
            out = model.generate(tiny.prompts()[0], drafter=drafter, max_new_tokens=NEW)
            assert out.tokens == text[: text.index(end) + 1] and out.finish_reason == "stop"
    finally:
        config.eos_token_id = before


def test_what_cannot_be_drafted_says_so() -> None:
    out = tiny.generate("Mamba", "float64", "prompt-lookup", 4, [0])[0]
    assert any("one token at a time" in note for note in out.notes)
    assert out.stats.drafted == 0 and out.lossless


def test_the_trace_is_the_run() -> None:
    model = tiny.facade("Llama")
    out = model.generate(
        tiny.prompts()[1],
        drafter="speculative-sampling",
        max_new_tokens=40,
        trace=True,
        ignore_end=True,
    )
    at = 0
    for entry in out.rounds:
        assert len(entry.drafted) == len(entry.parents) == entry.nodes
        assert list(entry.drafted[: entry.accepted]) == out.tokens[at : at + entry.accepted]
        at += entry.emitted
    assert at == 40 == out.stats.new_tokens
    assert len(out.rounds) == out.stats.target_forwards
    assert sum(r.accepted for r in out.rounds) == out.stats.accepted
    assert sum(r.nodes for r in out.rounds) == out.stats.drafted
    assert 0 < sum(out.stats.parts_s.values()) <= out.stats.seconds * 1.01
