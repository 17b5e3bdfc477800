"""The family bench and the guide: what cannot run says why."""

import json
from pathlib import Path

import pytest

from isthmus.cli.main import main
from isthmus.errors import InvalidInputError, UnknownNameError
from isthmus.workbench.family import family_bench

SMALL = {"target": "pycode-t", "prompts": 2, "prompt_tokens": 16, "max_new_tokens": 6}


def test_lossless_systems_write_plain_text_and_others_say_why() -> None:
    slugs = ["token_recycling", "opt-tree", "speculative-survey", "fastcot"]
    plain, recycling, tree, study, cot = family_bench(slugs, **SMALL)  # type: ignore[arg-type]
    assert plain.greedy is not None and plain.greedy.acceptance_length == 1.0
    assert plain.slowdown == 1.0
    assert recycling.name == "token-recycling" and recycling.lossless
    for outcome, whole in ((recycling.greedy, plain.greedy), (recycling.sampled, plain.sampled)):
        assert outcome is not None and whole is not None
        assert outcome.tokens == whole.tokens and outcome.same == 2
        assert outcome.forwards <= whole.forwards
    assert recycling.slowdown is not None and recycling.slowdown > 0
    assert "draft model" in tree.reason and tree.greedy is None
    assert "does not decode" in study.reason
    assert not cot.lossless and cot.greedy is not None and cot.sampled is None, "greedy only"


def test_bad_words_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="token-recycling"):
        family_bench(["token-recicling"])
    with pytest.raises(InvalidInputError, match="at least 1"):
        family_bench([], prompts=0)


def test_the_command_prints_one_table(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "family", "token-recycling", "opt-tree", "--target", "pycode-t"]
    words += ["--prompts", "2", "--prompt-tokens", "16", "--max-new-tokens", "6"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "token-recycling" in shown and "2/2" in shown
    assert "opt-tree: opt-tree needs a draft model" in shown
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    names = [line["system"] for line in found["systems"]]
    assert names == ["none", "token-recycling", "opt-tree"]
    assert found["systems"][1]["greedy"]["same_output"] == 2


def test_the_guide_advises_from_what_it_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("import os\nimport sys\n" * 6)
    words = ["bench", "guide", str(tmp_path), "--prompt-tokens", "24", "--max-new-tokens", "6"]
    assert main([*words, "--json"]) == 0
    advice = json.loads(capsys.readouterr().out)
    assert advice["choice"] in {*advice["ranked"], "none"}
    assert "there is no draft model" in advice["excluded"].values()
    assert advice["options"]["drafter"] == advice["choice"]
    assert main([*words, "--batch", "0"]) == 2
    assert "at least 1" in capsys.readouterr().err
    assert main(["bench", "guide", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
