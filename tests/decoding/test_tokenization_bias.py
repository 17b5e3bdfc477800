"""Tokenization bias: known laws of chains, the paper's own algorithm, and answers by tokens."""

from collections import Counter
from itertools import product

import pytest
import torch

from isthmus.decoding.bytescorer import END
from isthmus.decoding.model import Model
from isthmus.decoding.prefixes import PrefixScorer
from isthmus.folders import EMBEDDED
from isthmus.models.hub import load_checkpoint
from isthmus.systems.decoding.tokenization_bias import (
    Settings,
    TokenizationBias,
    branch_and_pass,
    chain_errors,
    cut_bits,
    cut_prompts,
)
from isthmus.workbench import chains


@pytest.fixture(scope="module")
def pycode() -> Model:
    loaded = load_checkpoint(str(EMBEDDED / "pycode-t"))
    return Model(loaded.model, loaded.tokenizer)


def method(cut: chains.Cut, length: int, settings: Settings | None = None) -> TokenizationBias:
    parts = chains.exact_model(cut, length), chains.vocab(cut), [chains.END], [chains.END]
    return TokenizationBias(*parts, settings=settings)


@pytest.mark.parametrize("cut", ["longest", "merges"])
def test_every_text_up_to_seven_letters(cut: chains.Cut) -> None:
    right = method(cut, 8, Settings(tolerance=0.0))
    texts = ["".join(t) for n in range(8) for t in product("AB", repeat=n)]
    assert max(chain_errors(right, texts)) < 1e-12
    for text in texts:
        assert (
            abs(
                right.scorer.read(text.encode()).logp
                - torch.tensor(chains.probability(text), dtype=torch.float64).log()
            )
            < 1e-9
        )
    told = chain_errors(method(cut, 8, Settings(covers="tokens")), texts)
    assert sum(told) / len(told) > 0.1


def test_branch_and_pass_is_the_sum_over_covers() -> None:
    vocab = chains.vocab("longest")
    prefixes = PrefixScorer(chains.exact_model("longest", 9), [chains.END])
    for text in ("A", "AB", "ABA", "BAABABB", "ABABABA"):
        found = branch_and_pass(vocab, prefixes, text.encode())
        assert abs(found - chains.probability(text)) < 1e-12


def test_the_end_is_its_own_event() -> None:
    law = method("merges", 4).next_byte(b"ABBA").exp()
    assert abs(float(law[END]) - 1.0) < 1e-12
    assert method("merges", 4).sample(b"AB", 10, torch.Generator().manual_seed(0)).__len__() == 2


def test_sampled_bytes_follow_the_chain() -> None:
    generator = torch.Generator().manual_seed(0)
    right = method("merges", 5)
    drawn = Counter(right.sample(b"AB", 1, generator) for _ in range(400))
    assert abs(drawn[b"A"] / 400 - chains.after("AB")) < 0.07


def test_bias_is_seen_where_it_is() -> None:
    found = method("longest", 6).bias(b"A")
    assert found[0] < 1e-9  # nothing has been told yet
    assert found[1] > 0.4
    assert max(method("longest", 6, Settings(covers="tokens")).bias(b"AB")) == 0.0


def test_answers_go_on_inside_a_word(pycode: Model) -> None:
    prompt = "import os\n\ndef path(name):\n    ret"
    right = TokenizationBias.for_model(pycode)
    answer = right.generate(prompt, max_new_tokens=4, drafter="none")
    assert answer.text.startswith("urn ")
    told = pycode.generate(prompt, max_new_tokens=4, drafter="none")
    assert not told.text.startswith("urn")
    sampled = {
        right.generate(prompt, max_new_tokens=2, temperature=1.0, seed=s, drafter="none").text
        for s in range(3)
    }
    assert any(text.startswith("urn") for text in sampled)
    with pytest.raises(TypeError, match="for_model"):
        method("merges", 4).generate("A")


def test_prompts_cut_inside_a_token_cost_fewer_bits(pycode: Model) -> None:
    prompts = cut_prompts(TokenizationBias.for_model(pycode).vocab, 6)
    bits = cut_bits(pycode, prompts)
    assert bits["covers"] < min(bits["tokens"], bits["healed"])
