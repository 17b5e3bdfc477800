import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from isthmus.claims import Ruler
from isthmus.decoding.law import Law
from isthmus.decoding.model import Model
from isthmus.decoding.reshape import Walk
from isthmus.errors import InvalidInputError, UnsupportedModelError
from isthmus.models.hub import load_checkpoint
from isthmus.roles import Reshape
from isthmus.signals.infilling import SPELLINGS, Parts, Sentinels, cut, join, split
from isthmus.systems.decoding.self_infilling import (
    Answer,
    Place,
    SelfInfilling,
    Settings,
    claim,
    degenerate,
)
from isthmus.workbench import infilling
from isthmus.workbench.reference import reference

MARKS = Sentinels(prefix=90, suffix=91, middle=92, end=0)
PIECES = st.lists(st.integers(1, 80), max_size=6).map(tuple)


@given(PIECES, PIECES, PIECES, st.booleans())
def test_what_is_joined_is_split_again(prefix, middle, suffix, joined):
    parts = Parts(prefix, middle, suffix, joined)
    assert split(join(parts, MARKS), MARKS) == parts
    assert parts.whole == prefix + middle + suffix


def test_a_text_without_sentinels_is_a_prefix():
    assert split([5, 6, 0, 7], MARKS) == Parts((5, 6))


@given(st.lists(st.integers(1, 80), min_size=1, max_size=12), st.integers(0, 5), st.integers())
def test_cuts_lose_nothing_and_spare_the_head(tokens, first, seed):
    first = min(first, len(tokens))
    parts = cut(tokens, first, [len(tokens) // 2], random.Random(seed))
    assert parts.whole == tuple(tokens) and len(parts.prefix) >= first
    assert parts == cut(tokens, first, [len(tokens) // 2], random.Random(seed))


def test_half_of_the_suffixes_begin_where_asked():
    rng = random.Random(0)
    lengths = [len(cut(list(range(100)), 0, [99], rng).suffix) for _ in range(1000)]
    assert 450 < lengths.count(1) < 560


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_sentinels_are_found_as_models_spell_them(spelling):
    words = ["a", *spelling, "<end>"]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = SimpleNamespace(get_vocab=lambda: vocabulary, eos_token_id=4)
    assert Sentinels.of(tokenizer) == Sentinels(1, 2, 3, 4)


def test_a_model_that_was_not_trained_to_fill_in_is_refused():
    plain = load_checkpoint(str(reference("pycode-t"))).tokenizer
    with pytest.raises(UnsupportedModelError, match="<fim_prefix>"):
        SelfInfilling(plain)


def test_the_beginning_of_a_cut_must_be_inside():
    with pytest.raises(InvalidInputError, match="0 to 2"):
        cut([1, 2], 3, [], random.Random(0))


TOKENIZER = infilling.tokenizer()
REAL = Sentinels.of(TOKENIZER)


def method(**settings):
    return SelfInfilling(TOKENIZER, Settings(**settings))


def law(states, *scores, **settings):
    """The one token that may follow each state, or None where the model decides."""
    vocab = len(TOKENIZER)
    logits = torch.zeros(len(states), vocab)  # as unsure as can be
    for row, score in enumerate(scores):
        for token, value in score.items():
            logits[row, token] = value
    out = method(**settings).apply(states, logits)
    free = out.isfinite().sum(-1).tolist()
    return [int(row.argmax()) if n == 1 else None for row, n in zip(out, free, strict=True)], out


def ids(text):
    return tuple(TOKENIZER.encode(text, add_special_tokens=False))


def test_rows_in_different_phases_are_told_different_tokens():
    prompt = method().suffix_prompt
    states = [
        Place("prefix", ids("    x = 1\n")),  # unsure: the ending is written first
        Place("prefix", ids("    return x")),  # that is the ending already
        Place("prefix", ids("    x = 1\n")),  # sure: goes on
        Place("prefix", ids("    x\n\ndef")),  # over
        Place("suffix", (), prompt),  # how it begins
        Place("suffix", ids("return x\n")),  # goes on
        Place("suffix", ids("return x\n\n@")),  # over: now the middle
        Place("middle", ids("    x = 1")),
        Place("middle", ids("    x = 1\n\nclass")),  # does not meet the suffix
        Place("plain", ids("    x = 1")),
    ]
    told, out = law(states, *[{}] * 2, {7: 50.0}, *[{}] * 7)
    assert told == [
        REAL.suffix,
        None,
        None,
        REAL.end,
        prompt[0],
        None,
        REAL.middle,
        None,
        REAL.end,
        None,
    ]
    banned = ~out.isfinite()
    assert banned[[1, 2, 7, 9]][:, [REAL.prefix, REAL.suffix, REAL.middle]].all()
    assert banned[5, [REAL.prefix, REAL.suffix, REAL.end]].all() and not banned[5, REAL.middle]
    assert not banned[[1, 2, 7, 9], REAL.end].any()


def test_in_a_suffix_the_end_of_the_text_is_the_middle():
    _, out = law([Place("suffix", ids("return x"))], {REAL.end: 5.0, REAL.middle: 5.0})
    assert float(out[0, REAL.middle]) == pytest.approx(5 + 0.693147, abs=1e-5)


def test_states_follow_the_sentinels():
    part = method()
    state = part.start(torch.tensor([REAL.prefix, *ids("def f():\n")]))
    assert state == Place("prefix")
    state = part.advance(part.advance(state, 7), REAL.suffix)
    assert state == Place("suffix", (), part.suffix_prompt)
    state = part.advance(state, part.suffix_prompt[0])
    assert state.due == part.suffix_prompt[1:] and state.tokens == part.suffix_prompt[:1]
    assert part.advance(state, REAL.middle) == Place("middle")
    assert part.start(torch.tensor([5])) == Place("plain")
    assert isinstance(part, Reshape) and isinstance(part, Walk)


def test_the_random_interruption_keeps_its_probability_and_its_draws():
    states = [Place("prefix", (i, j)) for i in range(40) for j in range(50)]
    sure = 0.125  # p / (2 tau) = 1/4
    part, other = method(random=True), method(random=True, seed=1)
    drawn = [part._unsure(state, sure) for state in states]
    assert 0.72 < sum(drawn) / len(drawn) < 0.78
    assert drawn == [part._unsure(state, sure) for state in states]
    assert drawn != [other._unsure(state, sure) for state in states]
    assert not any(part._unsure(state, 0.26) for state in states)


def test_an_answer_has_its_parts_in_their_places():
    part, prompt = method(), "def f(x):\n"
    asked = part.ask(prompt)
    written = [*ids("    y ="), REAL.suffix, *ids("return y\n"), REAL.middle, *ids(" x\n    ")]
    met = part.read(asked, [*written, REAL.end], prompt)
    assert met.text == "    y = x\n    return y\n" and met.interrupted
    assert (met.before, met.suffix) == ("    y = x\n    ", "return y\n")
    missed = part.read(asked, written, prompt)  # out of budget
    assert missed.text == "    y = x\n    " and missed.suffix == ""
    over = part.read(asked, [*written, *ids("x\ndef g"), REAL.end], prompt)
    assert over.text == "    y = x\n    x\n" and over.suffix == ""
    plain = part.read(asked, [*ids("    return x\n"), REAL.end], prompt)
    assert plain.text == plain.before == "    return x\n" and not plain.interrupted


PROGRAM = "    a = 1\n    if x:\n        return a\n    b = 2\n    c = 3\n    return b + c\n"


@pytest.mark.parametrize(
    ("kind", "suffix"),
    [
        ("vanilla", "    c = 3\n    return"),
        ("extended", "    b = 2\n    c = 3\n    return"),
        ("half", "    b = 2\n    c = 3\n    return b + c"),
    ],
)
def test_what_the_next_round_keeps_of_a_program(kind, suffix):
    answer = Answer(PROGRAM, "", "    c = 3\n    return b + c\n", True)
    assert method(split=kind)._next_suffix(answer) == suffix
    assert method(split=kind)._next_suffix(replace(answer, text="x", suffix="y")) == ""


def test_what_a_new_suffix_is_written_behind():
    answer = Answer("    a = 1\n    return a\n", "    a = 1\n    ", "return a\n", True)
    assert method()._kept(answer) == "    a = 1"
    assert method()._kept(replace(answer, suffix="", text="    return 1 # return\n")) == (
        "    return 1 #"
    )
    assert method()._kept(replace(answer, suffix="", text="    a = 1\n")) == ""


def test_degenerate_answers():
    assert degenerate("\n  pass\n") and degenerate("  return\n") and degenerate("")
    assert degenerate("x = 1", "return") and not degenerate("x = 1")


def test_whole_functions():
    assert infilling.ends_in_return("def f():\n    x = 1\n    return x\n")
    assert not infilling.ends_in_return("def f():\n    return\n")
    assert not infilling.ends_in_return("def f():\n    if x:\n        return 1\n")
    assert not infilling.ends_in_return("def f():\n    return 1\ndef g():\n    return 2\n")


@pytest.fixture(scope="module")
def model():
    return infilling.infilling_model("pycode-t", steps=1, batch_size=1)


HEADS = ["def add(a, b):\n    '''Add two numbers.'''\n", "def name(self):\n    '''Name.'''\n"]


def test_switched_off_it_is_plain_decoding(model):
    options = {"max_new_tokens": 10, "drafter": "none"}
    off = method(tau=0.0, rounds=0)
    texts = off.complete(model, HEADS, **options)
    plain = model.generate(HEADS, stop=list(Settings().stop), **options)
    assert texts == [one.text for one in plain]


def test_drafts_change_nothing(model):
    asked = [method().ask(head) for head in HEADS]
    texts = [
        [a.text for a in method().passes(model, asked, HEADS, max_new_tokens=12, drafter=drafter)]
        for drafter in ("none", "prompt-lookup")
    ]
    assert texts[0] == texts[1]


def test_every_interrupted_answer_has_its_suffix_prompt(model):
    part = method(tau=1.0)
    asked = [part.ask(head) for head in HEADS]
    law = Law(reshapes=[part])
    made = model.generate([torch.tensor(a) for a in asked], law=law, max_new_tokens=6)
    for one in made:
        assert one.tokens[:2] == [REAL.suffix, *part.suffix_prompt]
    assert isinstance(model, Model)


@pytest.mark.parametrize("settings", [{"tau": 2.0}, {"rounds": -1}, {"suffix_prompt": ""}])
def test_bad_settings_are_refused(settings):
    with pytest.raises(InvalidInputError, match="self-infilling needs"):
        method(**settings)


def test_functions_of_both_parts_are_whole_and_do_not_meet():
    parts = {split: infilling.functions(split) for split in ("train", "held-out")}
    for one in parts["held-out"]:
        assert one.head.startswith("def ") and one.head.endswith("\n") and one.body.strip()
    returning = [one for one in parts["held-out"] if one.returns]
    assert sum(infilling.ends_in_return(one.head + one.body) for one in returning) > 0.9 * len(
        returning
    )
    assert len(parts["train"]) > 5000 and len(parts["held-out"]) > 400


def test_the_claim_made_small():
    found = claim(Ruler(), "test")
    gates = {gate.name: gate for gate in found.gates}
    assert gates["idea off: texts that differ from left to right"].passed
    assert all(0 <= row.ours <= 100 for row in found.rows)
