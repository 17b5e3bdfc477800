"""Lexical units: how a text is cut, what is learnt, and what the threshold does."""

from functools import lru_cache

import pytest
import tiny
import torch

from isthmus.decoding.model import Model
from isthmus.errors import InvalidInputError, UnsupportedModelError
from isthmus.systems.speculative.lexical_units import (
    LexicalUnits,
    Settings,
    unit_lengths,
    unit_starts,
)
from isthmus.training.drafting import Recipe
from isthmus.training.tuning import add_placeholder, label_loss, logits_of, next_tokens, tune
from isthmus.workbench.tuned import agreement

TEXT = (torch.arange(32)[:, None] + torch.arange(32)) % 32 + 3  # one round of tokens


@lru_cache(maxsize=2)
def learned(units: bool) -> Model:
    """A tiny model that has learned to count, with its placeholders trained or not."""
    model = tiny.fresh("Llama", "float32")
    recipe = Recipe(steps=80 if units else 40, batch_size=4, sequence_length=32, learning_rate=1e-2)
    # the untuned model is sure of nothing here, so every token must count as sure
    settings = Settings(alpha=0.0, learn_units=units)
    tune(model, TEXT, LexicalUnits.fine_tuning(model, settings), recipe)
    return Model(model)


def test_units_partition_the_text() -> None:
    generator = torch.Generator().manual_seed(0)
    sure = torch.rand(50, 30, generator=generator) < 0.6
    ends = torch.rand(50, 30, generator=generator) < 0.1
    starts = unit_starts(sure, 3, ends)
    for row in range(50):
        want, size = [], 0
        for i in range(30):  # the slow way
            joins = i > 0 and sure[row, i] and sure[row, i - 1] and not ends[row, i - 1]
            size = size + 1 if joins and size < 3 else 1
            want.append(size == 1)
        assert starts[row].tolist() == want
    lengths = unit_lengths(starts)
    assert bool((torch.where(starts, lengths, 0).sum(1) == 30).all())
    assert int(lengths.max()) == 3 and int(lengths.min()) == 1
    # no unit crosses an end of text
    assert not bool((lengths[:, :-1][ends[:, :-1]] > 1).any())


def test_the_loss_learns_units_of_the_base_model_only() -> None:
    ids = TEXT[:4]
    plain = label_loss(logits_of(tiny.network("Llama", "float32"), ids), next_tokens(ids))
    off = LexicalUnits.fine_tuning(tiny.fresh("Llama", "float32"), Settings(learn_units=False))
    assert torch.allclose(off(ids, torch.Generator().manual_seed(0)), plain, atol=1e-5)
    # a base model that is sure of nothing makes units of one token: nothing but the plain loss
    none = LexicalUnits.fine_tuning(tiny.fresh("Llama", "float32"), Settings(alpha=1.0))
    assert torch.allclose(none(ids, torch.Generator().manual_seed(0)), plain, atol=1e-5)
    every = LexicalUnits.fine_tuning(tiny.fresh("Llama", "float32"), Settings(alpha=0.0))
    assert every(ids, torch.Generator().manual_seed(0)) > plain + 0.5


@pytest.mark.parametrize("name", ["Llama", "GPT2"])
def test_beta_one_is_greedy_decoding(name: str) -> None:
    model = tiny.fresh(name)
    add_placeholder(model)
    wrapped = Model(model)
    strategy = LexicalUnits.for_model(wrapped, Settings(beta=1.0))
    for prompt in tiny.prompts():
        got = strategy.generate(prompt, max_new_tokens=9, ignore_end=True)
        want = wrapped.generate(prompt, max_new_tokens=9, drafter="none", ignore_end=True)
        assert got.tokens == want.tokens and got.stats.target_forwards == 9
        assert not got.lossless and got.finish_reason == "length"
        assert all(agreement(wrapped, prompt, got.tokens))


def test_units_save_forwards_and_the_switch_matters() -> None:
    prompt = TEXT[0, :6].clone()
    saved = []
    for units in (True, False):
        model = learned(units)
        result = LexicalUnits.for_model(model, Settings(beta=0.9)).generate(
            prompt, max_new_tokens=16, ignore_end=True
        )
        assert len(result.tokens) == 16 and int(tiny.V) not in result.tokens
        saved.append(1 - result.stats.target_forwards / 16)
        if units:
            assert sum(agreement(model, prompt, result.tokens)) >= 15
    assert saved[0] >= 0.5 and saved[1] < 0.3
    # with no threshold untrained placeholders write what the model would not
    result = LexicalUnits.for_model(learned(False), Settings(beta=0.0)).generate(
        prompt, max_new_tokens=16, ignore_end=True
    )
    assert result.stats.target_forwards == 4
    assert sum(agreement(learned(False), prompt, result.tokens)) < 14


def test_one_round_by_hand() -> None:
    """Three placeholders; the first is sure, the second is not: two tokens are emitted."""
    model = learned(True)
    prompt, token = TEXT[0, :6].clone(), tiny.V
    logits = model.target.forward(torch.cat([prompt, torch.tensor([token] * 3)])[None]).logits
    probs = torch.softmax(logits[0, 5:], -1).max(-1)
    order = probs.values[1:].tolist()
    for beta in (0.2, 0.5, 0.9, 0.99):
        count = next((i for i, p in enumerate(order) if p <= beta), 3)
        result = LexicalUnits.for_model(model, Settings(beta=beta)).generate(
            prompt, max_new_tokens=4, ignore_end=True
        )
        assert result.rounds[0].emitted == 1 + count
        assert result.tokens[: 1 + count] == probs.indices[: 1 + count].tolist()


def test_end_tokens_and_seeds() -> None:
    model = learned(True)
    strategy = LexicalUnits(model.target, tiny.V, Settings(beta=0.5), ends=[11])
    result = strategy.generate(TEXT[0, :6].clone(), max_new_tokens=16)
    assert result.tokens == [9, 10, 11] and result.finish_reason == "stop"
    prompt = tiny.prompts()[0]
    a, b = (strategy.generate(prompt, max_new_tokens=8, temperature=2.0, seed=4) for _ in "ab")
    assert a.tokens == b.tokens


def test_bad_input_is_refused() -> None:
    for bad in ({"longest": 1}, {"alpha": 1.5}, {"beta": -0.1}, {"groups": 0}):
        with pytest.raises(InvalidInputError):
            Settings(**bad)
    with pytest.raises(InvalidInputError, match="tuned to emit units"):
        LexicalUnits.for_model(tiny.facade("Llama"))
    for name in ("Bart", "Mamba"):
        with pytest.raises(UnsupportedModelError):
            LexicalUnits(tiny.target(name), 5)
    with pytest.raises(InvalidInputError, match="at least one"):
        LexicalUnits.for_model(learned(True)).generate(torch.tensor([]), max_new_tokens=1)
