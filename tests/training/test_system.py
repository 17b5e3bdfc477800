"""Data from files, and systems that are trained, written and read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from isthmus.errors import BrokenFileError, InvalidInputError, MismatchError, UnknownNameError
from isthmus.roles import Loss
from isthmus.training.data import Data, Pair, read, read_hub
from isthmus.training.loop import Plan
from isthmus.training.system import Answer, Scale, TrainedSystem, train
from isthmus.workbench import speech, voices
from isthmus.workbench.data import SOURCES, data


@dataclass(frozen=True)
class Settings:
    width: int = 2


class Lengths(TrainedSystem):
    """Learns how many times as long a target is."""

    name = "lengths"
    reads = "pairs"
    settings_type = Settings
    scales: ClassVar = {"test": Scale(Settings(), Plan(60, learning_rate=0.1), "workbench:dates")}

    def __init__(self, settings):
        super().__init__(settings)
        self.module = nn.Linear(1, 1, bias=False)

    @classmethod
    def untrained(cls, settings, data):
        return cls(settings)

    def learner(self, data, plan):
        return Learner(self.module, data)

    @torch.no_grad()
    def run(self, given):
        return Answer(str(round(float(self.module(torch.tensor([float(len(given))]))))))

    @classmethod
    def read_files(cls, settings, folder):
        return cls(settings).load_weights(folder)


class Learner:
    lower_is_better = True

    def __init__(self, module, data):
        self.module, self.data = module, data
        self.identity = {"data": data.fingerprint}

    def batch(self, part):
        pair = self.data.train[part % len(self.data.train)]
        return torch.tensor([[float(len(pair.source))]]), float(len(pair.target))

    def loss(self, batch):
        return Loss((self.module(batch[0]) - batch[1]).square().sum() / batch[1] ** 2, 1)

    def validate(self):
        weight = next(self.module.parameters())
        return {"error": float(sum((weight * len(s) - len(t)) ** 2 for s, t in self.data.valid))}


PAIRS = [Pair("a" * n, "b" * 2 * n) for n in range(1, 30)]


def test_a_system_is_trained_written_and_read(tmp_path: Path) -> None:
    out = tmp_path / "out"
    told = Lengths.scales["test"]
    made = train(Lengths, Data(PAIRS, PAIRS[:3], "doubles"), told.settings, told.plan, out=out)
    assert made.run("aaaa").text == "8"
    with pytest.raises(InvalidInputError, match="is a file"):
        train(Lengths, Data(PAIRS, PAIRS), told.settings, told.plan, out=str(out / "isthmus.json"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out.metrics.jsonl"]
    again = Lengths.from_pretrained(out)
    assert again.run("aaaa").text == "8" and again.record == made.record
    assert again.record["records"] == [29, 3] and again.record["data"] == "doubles"
    weights = out / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(BrokenFileError, match="altered or cut short"):
        Lengths.from_pretrained(out)
    config = json.loads((out / "isthmus.json").read_text())
    (out / "isthmus.json").write_text(json.dumps({**config, "system": "widths"}))
    with pytest.raises(MismatchError, match="holds widths, not lengths"):
        Lengths.from_pretrained(out)
    with pytest.raises(BrokenFileError, match="made by isthmus train"):
        Lengths.from_pretrained(tmp_path)


def test_a_folder_with_something_else_is_refused_before_training(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(InvalidInputError, match="no trained system"):
        train(Lengths, Data(PAIRS, PAIRS), Settings(), Plan(1), out=out)
    assert (out / "thesis.txt").read_text() == "years of work"


def test_pairs_from_files_of_every_kind(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("eins\tone\n\nzwei\ttwo\n")
    (tmp_path / "b.csv").write_text('"drei, 3",three\n')
    (tmp_path / "c.jsonl").write_text('{"source": "vier", "target": "four"}\n')
    found = read("pairs", [tmp_path])
    assert found.train == [Pair("eins", "one"), Pair("zwei", "two"), Pair("drei, 3", "three")]
    assert found.valid == [Pair("vier", "four")]  # the last of fewer than twenty
    (tmp_path / "valid.tsv").write_text("null\tzero\n")
    split = read("pairs", [tmp_path])
    assert split.valid == [Pair("null", "zero")] and len(split.train) == 4
    assert split.fingerprint != found.fingerprint == read("pairs", [
        tmp_path / "a.tsv", tmp_path / "b.csv", tmp_path / "c.jsonl"
    ]).fingerprint  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.tsv", "a\tb\nc\n", "x.tsv, line 2: needs two columns, source and target; it has 1"),
        ("x.tsv", "a\tb\nc\t \n", "line 2"),
        ("x.tsv", "\n\na\tb\nc\n", "line 4"),
        ("x.csv", "a,b\nc,d,e\n", "line 2: .* it has 3"),
        ("x.jsonl", '{"source": "a"}\n', 'line 1: needs a field "target" with a string'),
        ("x.jsonl", '{"source": "a", "target": "b"}\n[1]\n', "line 2: not a JSON object"),
        ("x.jsonl", "nonsense\n", "line 1: not JSON"),
        ("x.tsv", b"a\tb\n\xff\tb\n", "line 2: not UTF-8"),
        ("x.tsv", "", "holds 0 records"),
    ],
)
def test_a_bad_record_is_named_with_file_and_line(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises((BrokenFileError, InvalidInputError), match=message):
        read("pairs", [path])


def test_a_given_number_of_bad_records_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "x.tsv"
    path.write_text("a\tb\nc\nd\te\nf\n")
    found = read("pairs", [path], skip_bad=2)
    assert len(found.train) + len(found.valid) == 2 and len(found.left_out) == 2
    with pytest.raises(BrokenFileError, match=r"line 4: .* \(2 records are bad\)"):
        read("pairs", [path], skip_bad=1)
    with pytest.raises(BrokenFileError, match="cannot be read"):
        read("pairs", [tmp_path / "none.tsv"])


def test_names_of_data_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = speech.corpus  # thousands of utterances take a minute to speak

    def few(kind: str, split: Any, count: int, seed: int = 0) -> Any:
        spoken = whole(kind, split, 8, seed=seed)
        return spoken * (count // 8 + 1) if seed else spoken  # series are made of many

    monkeypatch.setattr(speech, "corpus", few)
    said = voices.said
    monkeypatch.setattr(voices, "said", lambda split, each, seed=0: said(split, 1, seed=seed))
    noisy = speech.noisy
    monkeypatch.setattr(speech, "noisy", lambda kind, split, count: noisy(kind, split, 8))
    with pytest.raises(UnknownNameError, match="did you mean 'dates'"):
        data("workbench:date", "pairs")
    with pytest.raises(InvalidInputError, match="holds pairs, and texts are read here"):
        data("workbench:dates", "texts")
    for name, source in SOURCES.items():
        made = data(f"workbench:{name}", source.kind)
        assert made.train and made.valid and made.name == f"workbench:{name}"
        assert not {*map(repr, made.train)} & {*map(repr, made.valid)}


def test_data_sets_of_the_hub_are_read_by_their_columns(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.csv").write_text("source,target,text\neins,one,a\nzwei,two,b\n")
    (folder / "validation.csv").write_text("source,target,text\ndrei,three,c\n")
    found = data(f"hub:{folder}", "pairs")
    assert list(found.train) == [Pair("eins", "one"), Pair("zwei", "two")]
    assert list(found.valid) == [Pair("drei", "three")]
    assert list(data(f"hub:{folder}", "texts").train) == ["a", "b"]
    with pytest.raises(InvalidInputError, match="no column 'quelle'; it has source, target, text"):
        read_hub("pairs", str(folder), {"source": "quelle"})
    with pytest.raises(InvalidInputError, match="read as texts or pairs, not as images"):
        read_hub("images", str(folder))
