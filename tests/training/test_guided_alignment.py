"""Guided alignment: the loss, the tap, given and expected alignments, a head that learns them."""

from __future__ import annotations

import json
import pickle
import random
import re
from dataclasses import replace
from itertools import product

import pytest
import torch

from isthmus.cli.main import main
from isthmus.decoding.shortlist import Lexicon, learn_lexicon
from isthmus.errors import BrokenFileError, InvalidInputError
from isthmus.models.encoder_decoder import shifted
from isthmus.nn.attention import MultiHeadAttention
from isthmus.objectives.alignment import HeadTap, alignment_loss
from isthmus.systems.text.marian import Marian
from isthmus.training.data import Aligned, Data, Pair, read
from isthmus.training.guided_alignment import (
    GuidedLearner,
    aligned,
    alignment_error,
    given_alignment,
    tapped,
)
from isthmus.training.loop import Plan
from isthmus.training.system import train
from isthmus.workbench.dates import LANGUAGES, Example, examples, fields

WORDS = "zero one two three four five six seven eight nine"
NAMES = {str(number): word for number, word in enumerate(WORDS.split())}
PAIRS = [  # the answer is in another order than the question
    Pair(" ".join(NAMES[d] for d in digits), digits[::-1])
    for digits in map("".join, product("0123456789", repeat=3))
]
random.Random(0).shuffle(PAIRS)
UNLIKE = [p for p in PAIRS[1::2] if len(set(p.target)) == 3]
DATA = Data(PAIRS[::2], UNLIKE[::9], "digits")
SETTINGS = replace(
    Marian.scales["test"].settings,
    hidden_size=48,
    num_attention_heads=2,
    decoder_layers=2,
    vocab_size=300,
)


def test_the_tap_sees_the_weights_that_the_attention_uses() -> None:
    torch.manual_seed(0)
    attention = MultiHeadAttention(6, 2).double()
    x, memory = torch.randn(2, 3, 6).double(), torch.randn(2, 4, 6).double()
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    before = attention(x, memory, mask[:, None, None])
    with HeadTap(attention, 1) as tap:
        after = attention(x, memory, mask[:, None, None])
    torch.testing.assert_close(before, after)
    weights = tap.weights(mask)
    with torch.no_grad():  # through values of 1 in one channel the output is the weights
        for key in range(4):
            values = torch.zeros(2, 4, 6).double()
            values[:, key, 3] = 1.0
            attention.v_proj.register_forward_hook(lambda m, i, o, v=values: v)
            attention.out_proj.weight.copy_(torch.eye(6))
            attention.out_proj.bias.zero_()
            out = attention(x, memory, mask[:, None, None])
            torch.testing.assert_close(out[..., 3], weights[:, :, key])
    assert not attention.q_proj._forward_hooks
    with pytest.raises(InvalidInputError, match="heads 0 to 1"):
        HeadTap(attention, 2)
    with pytest.raises(InvalidInputError, match="has not run"):
        HeadTap(attention).weights(mask)


def test_the_loss_by_hand_and_its_gradient() -> None:
    scores = torch.randn(1, 2, 3, generator=torch.Generator().manual_seed(0)).double()
    scores.requires_grad_()
    wanted = torch.tensor([[[0.0, 1.0, 0.0], [0.5, 0.5, 0.0]]]).double()
    weights = scores.softmax(-1)
    hand = -((weights[0, 0, 1] + 1e-6).log() + 0.5 * (weights[0, 1, :2] + 1e-6).log().sum())
    torch.testing.assert_close(alignment_loss(weights, wanted), hand)
    (gradient,) = torch.autograd.grad(alignment_loss(weights, wanted), scores)
    torch.testing.assert_close(gradient, weights - wanted, atol=1e-4, rtol=0)  # of cross-entropy
    with pytest.raises(InvalidInputError, match="must fit"):
        alignment_loss(weights, wanted[:, :1])


def test_posteriors_are_bayes_rule_over_the_source() -> None:
    probs = {(2, 5): 0.5, (3, 5): 0.25, (3, 6): 0.75}
    source, target = torch.tensor(list(probs)).T
    lexicon = Lexicon(source, target, torch.tensor(list(probs.values())))
    found = lexicon.posteriors(torch.tensor([[3, 2, 0], [2, 2, 2]]), torch.tensor([[5, 6], [5, 9]]))
    hand = [[[1 / 3, 2 / 3, 0], [1, 0, 0]], [[1 / 3, 1 / 3, 1 / 3], [0, 0, 0]]]
    torch.testing.assert_close(found, torch.tensor(hand))
    nothing = Lexicon(*torch.zeros(2, 0, dtype=torch.int64), torch.zeros(0))
    assert nothing.posteriors(source[None], target[None]).sum() == 0


def _error(system: Marian) -> float:
    """Share of digits that are sought at another word than their own."""
    wrong = 0
    for pair in DATA.valid:
        ids = [system.tokenizer(side, return_tensors="pt")["input_ids"] for side in pair]
        best = aligned(system.module, *ids)[0].argmax(-1)
        words, digits = (system.tokenizer.convert_ids_to_tokens(side[0]) for side in ids)
        place = torch.tensor([word[0] == "Ġ" for word in words]).cumsum(0)
        for t, digit in enumerate(digits):
            if digit in NAMES:
                wanted = pair.source.split().index(NAMES[digit])
                wrong += int(place[best[t]]) != wanted
    return wrong / (3 * len(DATA.valid))


def test_guidance_more_than_halves_the_error_of_a_head(tmp_path, capsys) -> None:
    plan = Plan(80, learning_rate=3e-3, warmup_steps=10, validate_every=80)
    made = {
        weight: train(
            Marian,
            DATA,
            replace(SETTINGS, guided_alignment=weight),
            plan,
            out=tmp_path / f"{weight}",
        )
        for weight in (0.0, 0.5)
    }
    errors = {weight: _error(system) for weight, system in made.items()}
    assert errors[0.5] < 0.03 < 0.5 * errors[0.0], errors
    assert made[0.5].record["validation"][-1]["loss"] < 1.5  # cross-entropy alone is reported
    capsys.readouterr()
    assert main(["run", str(tmp_path / "0.5"), DATA.valid[0].source, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    pairs = [tuple(map(int, link.split("-"))) for link in told["alignment"].split()]
    assert [t for _, t in pairs] == list(range(len(told["target_tokens"])))
    assert all(s < len(told["source_tokens"]) for s, _ in pairs)
    assert main(["run", str(tmp_path / "0.0"), DATA.valid[0].source, "--json"]) == 0
    assert "alignment" not in json.loads(capsys.readouterr().out)


def test_the_loss_of_a_batch_is_that_of_both_parts() -> None:
    torch.manual_seed(0)
    settings = replace(SETTINGS, guided_alignment=0.5, label_smoothing=0.0)
    system = Marian.untrained(settings, DATA)
    learner = system.learner(DATA, Plan(2))
    assert isinstance(learner, GuidedLearner)
    batch = learner.batch(0)
    source, target, _ = batch
    learner.module.eval()
    plain = learner.loss(batch)
    learner.module.train()
    both = learner.loss(batch)
    assert not plain.sums and both.weight == plain.weight
    ids = list(learner.train)
    lexicon = learn_lexicon(ids, system.module.config.vocab_size)
    hand = torch.tensor(0.0)
    for s, t in zip(source, target, strict=True):  # each alone, without padding
        s, t = s[s != 0][None], t[t != 0][None]
        with tapped(system.module) as tap:
            system.module(s, shifted(t, 0))
        hand = hand + alignment_loss(tap.weights(s != 0), lexicon.posteriors(s, t))
    torch.testing.assert_close(both.total - plain.total, 0.5 * hand, atol=1e-2, rtol=1e-4)
    with pytest.raises(InvalidInputError, match="must be positive"):
        system.settings = replace(settings, guided_alignment=-1.0)
        system.learner(DATA, Plan(2))


def _numbers(texts: list[str], aligned: bool) -> list[Pair]:
    """Digits, which come again and again, and their words in the other order."""
    found = [Pair(" ".join(NAMES[d] for d in text), text[::-1]) for text in texts]
    if not aligned:
        return found
    last = range(len(texts[0]))[-1]
    words = [[range(*m.span()) for m in re.finditer("[a-z]+", p.source)] for p in found]
    return [
        Aligned(*p, [(each[last - t], range(t, t + 1)) for t in range(last + 1)])
        for p, each in zip(found, words, strict=True)
    ]


def test_given_alignments_teach_what_model_1_cannot_know(tmp_path) -> None:
    texts = list(map("".join, product("123", repeat=4)))
    random.Random(0).shuffle(texts)
    plan = Plan(80, learning_rate=3e-3, warmup_steps=10, validate_every=80)
    asked = _numbers(texts[60:], True)
    errors = {}
    for given in (False, True):
        data = Data(_numbers(texts[:60], given), _numbers(texts[60:], False), "digits")
        settings = replace(SETTINGS, guided_alignment=0.5)
        system = train(Marian, data, settings, plan, out=tmp_path / f"{given}")
        errors[given] = alignment_error(system.module, system.tokenizer, asked)
        wrong = 0
        for pair in asked:  # one by one
            ids = [system.tokenizer(side, return_tensors="pt")["input_ids"] for side in pair]
            best = aligned(system.module, *ids)[0].argmax(-1)
            told = given_alignment(system.tokenizer, pair)
            wrong += int((told[torch.arange(4), best[:4]] == 0).sum())
        assert errors[given] == wrong / (4 * len(asked))
    assert errors[True] < 0.05 < 0.5 * errors[False], errors


def test_given_alignments_by_hand() -> None:
    data = Data([Aligned("ab cd", "x yz", [(range(3, 5), range(1))]), Pair("gh", "u")], [])
    data = replace(data, train=[*data.train, Aligned("ef", "w", [(range(1), range(1))])])
    system = Marian.untrained(replace(SETTINGS, guided_alignment=0.1), data)
    cut = system.tokenizer.tokenize
    assert (cut("ab cd"), cut("x yz")) == (["a", "b", "Ġ", "c", "d"], ["x", "Ġ", "y", "z"])
    found = [given_alignment(system.tokenizer, pair) for pair in data.train]
    assert found[0][0].tolist() == [0, 0, 0, 0.5, 0.5, 0] and found[0].sum() == 1
    assert not found[1].any()
    assert found[2].tolist() == [[1, 0, 0], [0, 0, 0]]
    learner = system.learner(data, Plan(2))
    for part in range(learner.sampler.parts):
        source, target, wanted = learner.batch(part)
        for row, place in enumerate(learner.sampler.rows(part)):
            size = found[place].shape
            assert wanted.shape == (len(source), target.shape[1], source.shape[1])
            assert wanted[row, : size[0], : size[1]].tolist() == found[place].tolist()
            assert wanted[row].sum() == found[place].sum()


def test_links_of_words_are_read_beside_pairs(tmp_path) -> None:
    file = tmp_path / "pairs.jsonl"
    told = {"source": "vier Katzen", "target": "four cats", "alignment": "0-0 1-1"}
    plain = {"source": "drei", "target": "three"}
    file.write_text("".join(json.dumps(r) + "\n" for r in (told, plain)), encoding="utf-8")
    data = read("pairs", [file])
    (found,) = data.train
    assert isinstance(found, Aligned) and not isinstance(data.valid[0], Aligned)
    assert found.spans == ((range(4), range(4)), (range(5, 11), range(5, 9)))
    assert found == Pair("vier Katzen", "four cats")  # wherever pairs are read
    assert Data([found], []).fingerprint != Data([Aligned(*found)], []).fingerprint
    assert pickle.loads(pickle.dumps(found)).spans == found.spans
    for links in ("0-2", "2-0", "0", "a-b", "-1-0"):
        file.write_text(json.dumps(told | {"alignment": links}) + "\n", encoding="utf-8")
        with pytest.raises(BrokenFileError, match=r"line 1: .* is no link"):
            read("pairs", [file])


def test_the_fields_of_a_date_are_where_they_stand() -> None:
    for example in examples(150, seed="fields"):
        year, month, day = (
            "".join(example.source[i] for i in source) for source, _ in fields(example)
        )
        assert (year, int(day)) == (example.target[:4], int(example.target[8:]))
        number = int(example.target[5:7])
        name = LANGUAGES[example.language].months[number - 1]
        assert month == name or int(month) == number
        assert ["".join(example.target[i] for i in t) for _, t in fields(example)] == [
            *example.target.split("-")
        ]
    with pytest.raises(InvalidInputError, match="no date"):
        fields(Example("soon", "2021-03-04", "en"))
