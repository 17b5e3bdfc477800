"""The bench of translation engines: equal work, equal outputs, and what is refused."""

import json
from pathlib import Path

import pytest

from isthmus.cli.main import main
from isthmus.errors import InvalidInputError, MismatchError, UnknownNameError
from isthmus.workbench import peers
from isthmus.workbench import translation as bench
from isthmus.workbench.translation import random_sources, random_translator, translation_bench


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder() -> Path:
    return random_translator(2, 1, hidden_size=64, vocab_size=96)


def test_engines_write_the_same_tokens_and_as_many(folder: Path) -> None:
    sources = random_sources(5, 7, 96)
    sources[1] = [4, 5, 1]  # padding is no source
    cells = translation_bench(
        folder,
        sources,
        ["transformers", "isthmus", "isthmus int8"],
        batches=(1, 4),
        alone=2,
        new_tokens=6,
        repeats=2,
    )
    assert [(c.batch, c.engine) for c in cells[::3]] == [(1, "transformers"), (4, "transformers")]
    for cell in cells:
        count = 2 if cell.batch == 1 else 5
        assert [len(t) for t in cell.tokens] == [6] * count
        assert len(cell.samples_s) == 2 and len(cell.calls_s) == 4
        assert sum(cell.calls_s) == pytest.approx(sum(cell.samples_s))
        assert 0 < cell.latency_ms(50) <= cell.latency_ms(95)
        if cell.engine != "isthmus int8":
            assert (cell.same, cell.agreeing) == (count, 1.0)
    assert cells[0].speedup.median == 1.0 and cells[1].to_dict()["tokens_per_s"] > 0


def test_ctranslate2_decodes_the_same_checkpoint(folder: Path) -> None:
    pytest.importorskip("ctranslate2")
    names = ["transformers", "ctranslate2"]
    assert bench.engines()[-2:] == ["ctranslate2 float32", "ctranslate2 int8"]
    sources = random_sources(4, 9, 96)
    sources[2] = [7, 1]
    _, theirs = translation_bench(folder, sources, names, batches=(3,), new_tokens=8, repeats=1)
    assert (theirs.same, theirs.agreeing) == (4, 1.0) and theirs.about.startswith("ctranslate2 ")


def test_a_trained_model_is_asked_for_its_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [f"{a} plus {b}\t{a + b}" for a in range(9) for b in range(9)]
    (tmp_path / "sums.tsv").write_text("\n".join(lines))
    data, out = ["--data", str(tmp_path / "sums.tsv")], str(tmp_path / "sums")
    words = ["train", "deep-shallow", "-o", out, "--scale", "test", "--steps", "2", *data]
    assert main(words) == 0
    capsys.readouterr()
    asked = ["bench", "translate", "--model", out, *data, "--sources", "3", "--alone", "1"]
    asked += ["--engines", "transformers", "--engines", "isthmus", "--repeats", "1"]
    asked += ["--batch", "2", "--new-tokens", "5"]
    assert main([*asked, "--json"]) == 0
    [found] = json.loads(capsys.readouterr().out)["models"]
    assert [cell["same_output"] for cell in found["cells"]] == [3, 3]
    assert all(0 <= cell["exact"] <= 1 for cell in found["cells"])
    assert main(asked) == 0
    said = capsys.readouterr().out
    assert "same output" in said and "3/3 (100%)" in said and "exact" in said


def test_what_cannot_be_timed_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = random_sources(2, 4, 96)
    with pytest.raises(UnknownNameError, match="did you mean 'isthmus'"):
        translation_bench(folder, sources, ["isthmsu"])
    with pytest.raises(UnknownNameError, match="precision of ctranslate2"):
        translation_bench(folder, sources, ["ctranslate2 int4"])
    for numbers in ({"alone": 0}, {"batches": (0,)}, {"new_tokens": 0}):
        with pytest.raises(InvalidInputError, match="at least 1"):
            translation_bench(folder, sources, ["isthmus"], **numbers)
    monkeypatch.setattr(peers, "_beside", lambda name: False)
    assert bench.engines() == list(bench.OWN)
    with pytest.raises(InvalidInputError, match="isthmus bench peers --install ctranslate2"):
        translation_bench(folder, sources, ["ctranslate2"])
    monkeypatch.setattr(bench, "_ours", lambda model, batch, new: [[1]] * len(batch))
    with pytest.raises(MismatchError, match="isthmus wrote 1 tokens where 4"):
        translation_bench(folder, sources, ["isthmus"], new_tokens=4, repeats=1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--layers", "12"], "two numbers as in 12-1, not '12'"),
        (["--layers", "0-1"], "two numbers as in 12-1"),
        (["--model", "x", "--layers", "1-1"], "not both"),
        (["--data", "x.tsv"], "name its folder"),
        (["--model", "nowhere"], "nowhere is no folder of a model"),
        (["--batch", "0"], "at least 1"),
    ],
)
def test_bad_words_are_one_line(
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(peers, "_beside", lambda name: False)  # nor a word of what is not installed
    assert main(["bench", "translate", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_without_ctranslate2_the_bench_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peers, "_beside", lambda name: False)
    words = ["--layers", "1-1", "--repeats", "1", "--sources", "1", "--alone", "1"]
    assert main(["bench", "translate", *words, "--new-tokens", "2", "--batch", "1"]) == 0
    said = capsys.readouterr()
    assert "bench peers --install ctranslate2" in said.err and "isthmus int8" in said.out
