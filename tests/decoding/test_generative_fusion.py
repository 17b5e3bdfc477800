"""Generative fusion: words come out right that letters alone get wrong."""

import random

import pytest
import torch

from isthmus.decoding.byte_fusion import lead_and_score
from isthmus.decoding.model import Model
from isthmus.decoding.prefixes import PrefixScorer
from isthmus.folders import EMBEDDED
from isthmus.models.hub import load_checkpoint
from isthmus.systems.decoding.generative_fusion import (
    PROMPT,
    GenerativeFusion,
    Settings,
    heard,
    word_error_rate,
)
from isthmus.workbench import letters

PLAIN = Settings(temperature=1.0, penalty=1.0)


@pytest.fixture(scope="module")
def pycode() -> Model:
    loaded = load_checkpoint(str(EMBEDDED / "pycode-t"))
    return Model(loaded.model, loaded.tokenizer)


def test_the_recogniser_is_bayes_letter_by_letter() -> None:
    """Without noise in what it was counted from, it says what it sees, and then ends."""
    scorer = PrefixScorer(letters.Recogniser("a b", 0.0), [letters.END])
    a, space, b = (letters.LETTERS.index(c) for c in "a b")
    assert int(scorer.score([[]])[1][0].argmax()) == a
    assert int(scorer.score([[a, space]])[1][0].argmax()) == b
    _, laws = scorer.score([[a, space, b]])
    assert float(laws[0, letters.END].exp()) == pytest.approx(1.0)
    channel, after = letters._counted(0.2)
    _, law = PrefixScorer(letters.Recogniser("qe", 0.2), [letters.END]).score([[a]])
    e = letters.LETTERS.index("e")
    byhand = (channel[:, e] + after[a]).log_softmax(0).double()
    assert torch.allclose(law[0, : letters.END], byhand, atol=1e-6)


def test_noise_takes_letters_for_look_alikes() -> None:
    rng = random.Random(0)
    line = "".join(rng.choice(letters.LETTERS) for _ in range(4000))
    seen = letters.blurred(line, 0.25, rng)
    changed = [(a, b) for a, b in zip(line, seen, strict=True) if a != b]
    assert 0.22 < len(changed) / len(line) < 0.28
    assert max(len({b for a, b in changed if a == c}) for c in letters.LETTERS) == letters.ALIKE


def test_the_language_model_puts_a_word_right(pycode: Model) -> None:
    line = "return the name of the current file"
    seen = letters.blurred(line, 0.2, random.Random(1))
    alone = GenerativeFusion(pycode, PROMPT, Settings(rate=0.0)).decode(heard(seen))[0]
    fused = GenerativeFusion(pycode, PROMPT, PLAIN).decode(heard(seen))[0]
    assert word_error_rate([fused], [line]) < word_error_rate([alone], [line])


def test_switched_off_it_is_the_recognisers_own_beam(pycode: Model) -> None:
    seen = letters.blurred("start a new line", 0.2, random.Random(2))
    off = GenerativeFusion(pycode, PROMPT, Settings(rate=0.0))
    own = lead_and_score(heard(seen), (), rate=0.0)
    assert [h.tokens for h in off.decode(heard(seen))] == [h.tokens for h in own]
    assert [h.tokens for h in off.rescore(heard(seen))] == [h.tokens for h in own]
