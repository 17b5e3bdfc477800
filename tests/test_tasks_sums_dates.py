"""The generated tasks `sums`, `dates` and `korean`, and how their reference models are made."""

import datetime
import json
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from isthmus.errors import InvalidInputError, UnknownNameError
from isthmus.workbench import dates, korean, reference, sums
from isthmus.workbench._tasks import TaskRecipe
from isthmus.workbench._training import IGNORED, Trainer

TINY = TaskRecipe(
    name="tiny-sums",
    task="sums",
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    head_dim=8,
    intermediate_size=16,
    vocab_size=26,
    steps=4,
    batch_size=2,
    sequence_length=64,
    max_position_embeddings=256,
    warmup_steps=1,
)
TINY_DATES = replace(
    TINY, name="tiny-dates", task="dates", vocab_size=96, encoder_layers=1, num_hidden_layers=2
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# Sums -------------------------------------------------------------------------------------------


def test_a_solution_by_hand():
    problem = sums.Problem((27, 58, 46))
    assert problem.text().splitlines() == [
        "27 + 58 + 46 =",
        "ones: 7 plus 8 is 15",
        "tens: 2 plus 5 plus 1 is 8",
        "85 + 46 =",
        "ones: 5 plus 6 is 11",
        "tens: 8 plus 4 plus 1 is 13",
        "answer: 131",
    ]
    assert problem.answer == 131
    uneven = sums.Problem((995, 5)).solution().splitlines()
    assert uneven == [
        "ones: 5 plus 5 is 10",
        "tens: 9 plus 1 is 10",
        "hundreds: 9 plus 1 is 10",
        "answer: 1000",
    ]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 999), min_size=2, max_size=5), st.booleans(), st.integers(0, 2**32))
def test_solutions_are_right_however_worded(addends, free, seed):
    problem = sums.Problem(tuple(addends), free)
    rng = random.Random(seed)
    solution = problem.solution(rng)
    assert sums.check_steps(problem, solution) == [True] * len(problem.meanings())
    assert sums.check_answer(problem, solution) and problem.answer == sum(addends)
    tokenizer = sums.tokenizer()
    ids = tokenizer.encode(problem.prompt + solution)
    assert tokenizer.decode(ids) == problem.prompt + solution and 0 not in ids
    lines = sums.lines(solution)
    at = rng.randrange(len(lines))
    assert not sums.check_step(problem, at, sums.corrupt(lines[at], rng)), "one digit changed"
    if not free:
        assert solution == problem.solution()


def test_free_wording_differs_and_means_the_same():
    problem = sums.Problem((27, 58, 46), free=True)
    texts = {problem.solution(random.Random(seed)) for seed in range(20)}
    assert len(texts) > 15
    assert all(all(sums.check_steps(problem, text)) for text in texts)
    assert problem.prompt.endswith("= freely\n")


def test_mistakes_are_found_where_they_are():
    problem = sums.Problem((27, 58))
    wrong = "ones: 7 plus 8 is 15\ntens: 2 plus 5 is 7\nanswer: 75"
    assert sums.check_steps(problem, wrong) == [True, False, False]
    assert not sums.check_answer(problem, wrong) and sums.given_answer(wrong) == 75
    extra = problem.solution() + "\nanswer: 85"
    assert sums.check_steps(problem, extra) == [True, True, True, False]
    assert sums.given_answer("ones: 7 plus 8 is 15") is None
    assert not sums.check_step(problem, 0, "tens: 2 plus 5 plus 1 is 8"), "right, but not here"
    assert not sums.check_step(problem, -1, "answer: 85")
    assert sums.check_answer(problem, "answer: 85" + sums.END)


def test_problems_are_split_by_their_addends():
    train, held_out = (sums.problems(150, split) for split in ("train", "held-out"))
    assert not any(sums.is_held_out(p.addends) for p in train)
    assert all(sums.is_held_out(p.addends) for p in held_out)
    assert sums.problems(5) == sums.problems(5) != sums.problems(5, seed=1)
    assert {len(p.addends) for p in train} == {2, 3, 4}
    share = sum(sums.is_held_out((a, b)) for a in range(10, 60) for b in range(10, 60)) / 2500
    assert 0.07 < share < 0.13
    assert {p.free for p in sums.problems(30, free=None)} == {True, False}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sums.Problem((5,)), "two or more"),
        (lambda: sums.Problem((5, 1000)), "0 to 999"),
        (lambda: sums.problems(1, "test"), "'held-out'"),
        (lambda: sums.problems(1, addends=(1, 2)), "fewest"),
        (lambda: sums.corrupt("freely", random.Random(0)), "no digit"),
        (lambda: dates.examples(1, "test"), "'held-out'"),
        (lambda: dates.write(datetime.date(2021, 3, 4), "ja", 9), "2 forms"),
        (lambda: korean.numeral(10_000), "0 to 9999"),
        (lambda: korean.read_time(24, 0), "no time 24:00"),
        (lambda: korean.lines(1, "test"), "'held-out'"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(InvalidInputError, match=message):
        call()


# Dates ------------------------------------------------------------------------------------------


def test_dates_by_hand():
    day = datetime.date(2021, 3, 4)
    assert dates.write(day, "de", 1) == "04.03.2021"
    assert dates.write(day, "en") == "March 4, 2021"
    assert dates.write(day, "fr", 2) == "jeudi 4 mars 2021"
    assert dates.write(day, "ja") == "2021年3月4日"
    assert dates.write(day, "hu", 1) == "2021. 03. 04."
    with pytest.raises(UnknownNameError, match="did you mean"):
        dates.write(day, "dee")


def test_every_form_names_one_date_only():
    seen: dict[str, str] = {}
    day = datetime.date(1999, 1, 1)
    while day.year < 2001:
        for code, told in dates.LANGUAGES.items():
            for form in range(len(told.forms)):
                source = dates.write(day, code, form)
                assert seen.setdefault(source, day.isoformat()) == day.isoformat(), source
        day += datetime.timedelta(days=1)


def test_every_source_survives_the_tokenizer():
    tokenizer = dates.tokenizer()
    drawn = dates.examples(400, "train") + dates.examples(400)
    for each in drawn:
        ids = tokenizer.encode(each.source)
        assert ids[-1] == 2 and 3 not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == each.source
        assert dates.check(each, each.target) and not dates.check(each, "2021-02-30")
    assert {e.language for e in drawn} == set(dates.LANGUAGES)
    held_out = {e.target for e in dates.examples(400)}
    assert not held_out & {e.target for e in dates.examples(2000, "train")}


# Korean -----------------------------------------------------------------------------------------


def value(text):
    """A Sino-Korean numeral read back, one character after the other."""
    total, digit = 0, 0
    for character in text:
        if character in "천백십":
            total += max(1, digit) * {"천": 1000, "백": 100, "십": 10}[character]
            digit = 0
        else:
            digit = "영일이삼사오육칠팔구".index(character)
    return total + digit


def test_every_numeral_reads_back_and_no_two_are_alike():
    said = [korean.numeral(n) for n in range(10_000)]
    assert [value(text) for text in said] == list(range(10_000)) and len(set(said)) == 10_000
    assert (korean.numeral(1999), korean.numeral(16)) == ("천구백구십구", "십육")


def test_dates_and_times_are_those_of_cldr():
    data = pytest.importorskip("babel.dates")
    for day in (datetime.date(2021, 6, 4), datetime.date(1910, 10, 31), datetime.date(2000, 1, 1)):
        digits = data.format_date(day, "long", "ko")
        words = korean.read_date(day).answer.strip()
        irregular = words.replace("유월", "육월").replace("시월", "십월")
        pairs = [(part[-1], value(part[:-1])) for part in irregular.split()]
        assert digits == " ".join(f"{n}{suffix}" for suffix, n in pairs)
    names = {h: data.format_time(datetime.time(h), "a", locale="ko") for h in (9, 12)}
    assert korean.read_time(9, 5).answer == f" {names[9]} 아홉 시 오 분"
    assert korean.read_time(12, 30).answer == f" {names[12]} 열두 시 삼십 분"


def test_korean_is_split_by_its_code_and_shattered_by_its_tokenizer():
    held_out = {line.prompt for line in korean.lines(300)}
    assert not held_out & {line.prompt for line in korean.lines(1500, "train")}
    tokenizer = korean.tokenizer()
    for line in korean.lines(40):
        ids = tokenizer.encode(line.answer)
        assert tokenizer.decode(tokenizer.encode(line.text)) == line.text
        assert len(ids) >= 2.5 * len(line.answer.replace(" ", "")), "three bytes a syllable"
    course = replace(TINY, task="korean", vocab_size=korean.VOCABULARY, batch_size=4).course()
    ids, labels = next(course.batches(3))
    again = next(course.batches(3))
    assert torch.equal(ids, again[0]) and ids.shape == labels.shape == (4, 64)
    assert IGNORED not in labels[0] and torch.equal(ids[0, 1:], labels[0, :-1]), "a row of code"
    assert IGNORED in labels[1] and "#" not in tokenizer.decode(labels[1][labels[1] != IGNORED])


# Their models -----------------------------------------------------------------------------------


def test_rows_hold_whole_problems_and_questions_carry_no_loss():
    course = TINY.course()
    ids, labels = next(course.batches(0))
    assert ids.shape == labels.shape == (2, 64)
    text = course.tokenizer.decode(ids[0])
    problems = text.split(sums.END)
    first = problems[0]
    question = first.split("\n")[0] + "\n"
    length = len(course.tokenizer.encode(question))
    assert (labels[0, : length - 1] == IGNORED).all()
    known = labels[0] != IGNORED
    shifted = torch.cat([ids[0, 1:], ids[0, -1:]])
    assert torch.equal(labels[0, :-1][known[:-1]], shifted[:-1][known[:-1]])
    said = course.tokenizer.decode(labels[0][known])
    assert "=" in said and question not in said, "only what is left to add is a step"
    again = next(course.batches(0))
    later = next(course.batches(1))
    assert torch.equal(again[0], ids) and not torch.equal(later[0], ids)


def test_dates_are_padded_without_loss():
    source, mask, target, labels = next(TINY_DATES.course().batches(0))
    assert (source[mask == 0] == 0).all() and (source[mask == 1] != 0).all()
    assert (target[:, 0] == 1).all() and torch.equal(target[:, 1:], labels[:, :-1])
    assert (labels[:, -1] == 2).all() and IGNORED not in labels


@pytest.mark.parametrize(
    ("recipe", "auto"),
    [(TINY, AutoModelForCausalLM), (TINY_DATES, AutoModelForSeq2SeqLM)],
    ids=["sums", "dates"],
)
def test_a_model_is_trained_published_and_read(recipe, auto, tmp_path, cache):
    folder = tmp_path / "model"
    reference.train(recipe, folder, progress=False, held_out_windows=3)
    model, tokenizer = auto.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    card = json.loads((folder / "card.json").read_text())
    assert card["corpus"] == {"name": recipe.task, "sha256": recipe.digest()}
    assert set(card["held_out"]) >= {"solved", "problems"} and card["held_out"]["problems"] == 3
    assert card["parameters"] == sum(p.numel() for p in model.parameters())
    assert tokenizer.get_vocab() == recipe.tokenizer().get_vocab()
    text = "27 + 58 =\n" if recipe is TINY else "4. März 2021"
    assert tokenizer.encode(text) == recipe.tokenizer().encode(text)
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert not list((cache / "unfinished").glob("*/state.safetensors"))


@pytest.mark.parametrize("recipe", [TINY, TINY_DATES], ids=["sums", "dates"])
def test_an_interrupted_run_goes_on_with_the_same_numbers(recipe, tmp_path):
    def run(folder):
        course = recipe.course()
        return Trainer(recipe, (), end=0, corpus="c", directory=tmp_path / folder, course=course)

    whole, first = run("a"), run("b")
    whole.run()
    first.run(stop_at=2)
    second = run("b")
    assert second.step == 2
    second.run()
    for (name, a), (_, b) in zip(
        whole.model.named_parameters(), second.model.named_parameters(), strict=True
    ):
        assert torch.equal(a, b), name


def test_fingerprints_of_tasks_follow_their_data(monkeypatch):
    before = reference.fingerprint(TINY)
    assert before == reference.fingerprint(replace(TINY)) != reference.fingerprint(TINY_DATES)
    monkeypatch.setattr(sums, "digest", lambda: "other data")
    assert reference.fingerprint(TINY) != before


def test_the_recipes_are_there():
    tasks = {n: r for n, r in reference.RECIPES.items() if isinstance(r, TaskRecipe)}
    expected = {"sums-l", "sums-s", "dates", "dates-deep", "dates-s", "korean", "slots"}
    assert set(tasks) == expected
    assert all(len(r.tokenizer()) == r.vocab_size for r in tasks.values())
