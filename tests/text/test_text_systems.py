"""nanoT5 and Marian from the command line, as a user has them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as tf

import isthmus
from isthmus.cli.main import main
from isthmus.decoding.shortlist import ShortlistTarget
from isthmus.signals.tokenizer import learn_tokenizer
from isthmus.systems.text.marian import Marian
from isthmus.training.data import Data, Pair
from isthmus.training.loop import Plan
from isthmus.training.system import train
from isthmus.training.text import PairLearner
from isthmus.workbench.data import data as named_data


def call(capsys, *words: str) -> tuple[int, str, str]:
    code = main(list(words))
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    lines = [f"{a} plus {b}\t{a + b}" for a in range(20) for b in range(20)]
    (folder / "sums.tsv").write_text("\n".join(lines))
    return folder


def test_marian_trains_runs_and_decodes_everywhere(pairs, tmp_path, capsys):
    out = tmp_path / "sums"
    words = ["train", "marian", "-o", str(out), "--data", str(pairs), "--scale", "test", "--json"]
    code, said, _ = call(capsys, *words, "--steps", "4", "--plan", "validate_every=2")
    record = json.loads(said)
    assert code == 0 and record["records"] == [380, 20]
    assert [c["step"] for c in record["validation"]] == [2, 4]
    lines = (tmp_path / "sums.metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["validation"]["loss"] == record["validation"][-1]["loss"]
    assert (tmp_path / "sums.metrics.png").stat().st_size > 5_000

    code, said, _ = call(capsys, "run", str(out), "3 plus 4", "--json")
    ours = json.loads(said)["text"]
    model = tf.AutoModelForSeq2SeqLM.from_pretrained(out)
    tokenizer = tf.AutoTokenizer.from_pretrained(out)
    ids = tokenizer("3 plus 4", return_tensors="pt")
    theirs = model.generate(**ids, max_new_tokens=60, num_beams=1, do_sample=False)
    engine = isthmus.load(out, dtype="float32").generate("3 plus 4", max_new_tokens=60)
    assert engine.tokens == theirs[0, 1:].tolist() and ours.startswith(engine.text)
    code, said, _ = call(capsys, "run", str(out), "3 plus 4", "-o", str(tmp_path / "o.txt"))
    assert code == 0 and (tmp_path / "o.txt").read_text() == f"{ours}\n"


def test_nanot5_fills_in_what_is_marked(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("the cat sat on the mat and the dog sat on the log " * 60)
    (tmp_path / "more.txt").write_text("the cat sat on the log and the dog sat on the mat " * 60)
    out = tmp_path / "t5"
    data = ["--data", str(tmp_path / "text.txt"), "--data", str(tmp_path / "more.txt")]
    words = ["train", "nanot5", "-o", str(out), "--scale", "test", "--steps", "2", *data]
    assert call(capsys, *words)[0] == 0
    code, said, _ = call(capsys, "run", str(out), "the <extra_id_0> sat", "--json")
    record = json.loads(said)
    assert code == 0 and record["text"].startswith("the ") and record["text"].endswith(" sat")
    code, _, error = call(capsys, "run", str(out), "nothing to fill")
    assert code == 2 and "mark what is to be filled in" in error
    assert (
        tf.T5ForConditionalGeneration.from_pretrained(out).config.feed_forward_proj == "gated-gelu"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "marian", "-o", "OUT", "--data", "none.tsv"], "none.tsv cannot be read"),
        (["train", "marian", "-o", "OUT", "--data", "workbench:pycode"], "holds texts, and pairs"),
        (["train", "marian", "-o", "OUT", "--set", "hiden=4"], "no setting 'hiden'; marian has"),
        (["train", "marian", "-o", "OUT", "--plan", "step=4"], "no setting 'step'; --plan has"),
        (["train", "marian", "-o", "OUT", "--target", "x"], "is no drafter"),
        (["run", "marain", "x"], "did you mean 'marian'"),
        (["run", "token-recycling", "x"], "is not trained"),
    ],
)
def test_bad_words_are_one_line(words, message, tmp_path, capsys):
    words = [str(tmp_path / "out") if w == "OUT" else w for w in words]
    code, _, error = call(capsys, *words)
    assert code == 2 and error.startswith("error: ") and message in error
    assert error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_copier_is_learnt_and_batches_are_nearly_without_padding(tmp_path):
    generator = torch.Generator().manual_seed(0)
    lengths = (20 ** torch.rand(600, generator=generator)).long().tolist()
    records = [
        Pair(text, text[::-1])
        for n in lengths
        if (text := "".join("ab"[i] for i in torch.randint(2, (n,), generator=generator)))
    ]
    data = Data(records[40:], records[:40], "reversals")
    told = Marian.scales["test"]
    torch.manual_seed(0)
    learner = Marian.untrained(told.settings, data).learner(data, told.plan)
    assert learner.profile.inputs < 0.05 and learner.profile.outputs < 0.05
    plan = Plan(150, learning_rate=3e-3, validate_every=75)
    made = train(Marian, data, told.settings, plan)
    first, last = made.record["validation"]
    assert last["loss"] < first["loss"] < 3.0


def test_a_pair_that_is_too_long_is_named():
    tokenizer = learn_tokenizer(["a b"], 300)
    data = Data([Pair("b" * 300, "a")], [Pair("a", "b")])
    module = Marian.untrained(Marian.scales["test"].settings, data).module
    with pytest.raises(
        isthmus.errors.InvalidInputError, match="301 and 2 tokens is longer than 128"
    ):
        PairLearner(module, tokenizer, data, {})


def test_marian_keeps_its_shortlist_in_the_folder(pairs, tmp_path, capsys):
    out = tmp_path / "short"
    words = ["train", "marian", "-o", str(out), "--data", str(pairs), "--scale", "test"]
    words += ["--steps", "3", "--set", "shortlist=4", "--set", "shortlist_first=2"]
    assert call(capsys, *words)[0] == 0
    lines = (out / "lexicon.s2t").read_text().splitlines()
    assert all(len(line.split(" ")) == 3 for line in lines)
    system = Marian.from_pretrained(out)
    assert isinstance(system.model.target, ShortlistTarget)
    source = torch.tensor([system.tokenizer("3 plus 14").input_ids])
    allowed = system.model.target.shortlist.allowed(source)[0]
    found = system.model.generate("3 plus 14", max_new_tokens=20)
    assert 4 < allowed.sum() < 40 and all(allowed[t] for t in found.tokens)
    code, said, _ = call(capsys, "run", str(out), "3 plus 14", "--json")
    assert code == 0 and json.loads(said)["text"].startswith(found.text)
    (out / "lexicon.s2t").write_text("no lexicon\n")
    code, _, error = call(capsys, "run", str(out), "3 plus 14")
    assert code == 2 and "lexicon.s2t, line 1" in error


def test_an_ensemble_adds_up_log_probabilities_step_by_step(pairs):
    data = named_data(str(pairs), "pairs")
    settings = Marian.scales["test"].settings
    systems = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        systems.append(Marian.untrained(settings, data))
        systems[-1].module.eval()
    one, other = (system.model for system in systems)
    sources = ["3 plus 4", "11 plus 17", "5 plus 19"]
    options = {"max_new_tokens": 8, "drafter": "none", "ignore_end": True}
    alone = [g.tokens for g in one.generate(sources, **options)]
    assert [g.tokens for g in one.generate(sources, fuse=one, **options)] == alone
    both = [g.tokens for g in one.generate(sources, fuse=other, **options)]
    for source, found in zip(sources, both, strict=True):
        ids, text = torch.tensor([systems[0].tokenizer(source).input_ids]), [0]
        with torch.no_grad():
            for _ in range(8):
                laws = (s.module(ids, torch.tensor([text]))[0, -1] for s in systems)
                text.append(int(sum(law.log_softmax(-1) for law in laws).argmax()))
        assert found == text[1:]
    assert both != alone
