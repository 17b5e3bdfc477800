"""``isthmus generate --input``: a file of prompts as a person meets it."""

import importlib.util
import io
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from isthmus.cli.main import main
from isthmus.decoding.jobs import Journal, read_lines
from isthmus.errors import BrokenFileError, InvalidInputError, IsthmusError, MismatchError

COMMAND = [sys.executable, "-m", "isthmus.cli.main", "generate"]
ROWS: list[dict[str, Any]] = [
    {"prompt": f"def f{i}(a, b):\n    ", "id": f"row {i}", "max_new_tokens": 6 + 5 * (i % 3)}
    for i in range(7)
]


@dataclass
class Done:
    """What a command left behind."""

    returncode: int
    stdout: str
    stderr: str


Run = Callable[..., Done]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Call ``isthmus generate`` in this process, which has paid for its imports."""

    def call(*arguments: str, stdin: str = "") -> Done:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = main(["generate", *arguments])
        return Done(code, *capsys.readouterr())

    return call


def text_of(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def rows_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_answers_come_in_order_and_are_those_of_single_prompts(run: Run, tmp_path: Path) -> None:
    source, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    source.write_text(text_of(ROWS))
    done = run("-i", str(source), "-o", str(output), "--batch-size", "3", "-d", "prompt-lookup")
    assert done.returncode == 0, done.stderr
    assert len(done.stderr.splitlines()) == 1 and "7 answers" in done.stderr and not done.stdout
    found = rows_of(output.read_text())
    assert [row["id"] for row in found] == [row["id"] for row in ROWS]
    assert [row["new_tokens"] for row in found] == [row["max_new_tokens"] for row in ROWS]
    assert {row["finish_reason"] for row in found} == {"length"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["answers.jsonl", "prompts.jsonl"]
    alone = run(ROWS[4]["prompt"], "-n", str(ROWS[4]["max_new_tokens"]), "-d", "none", "--json")
    assert json.loads(alone.stdout)["text"] == found[4]["text"]
    piped = run("--input", "-", "--batch-size", "2", "-d", "none", stdin=text_of(ROWS))
    assert piped.stdout == output.read_text(), "another batch size and drafter change nothing"
    again = run("-i", str(source), "-o", str(output))
    assert again.returncode == 2 and "is there already" in again.stderr


def test_an_interrupted_job_goes_on_as_if_nothing_had_been(run: Run, tmp_path: Path) -> None:
    source, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    part = tmp_path / "answers.jsonl.part"
    rows = [{"prompt": f"class C{i}:\n", "max_new_tokens": 4 if i < 3 else 400} for i in range(5)]
    source.write_text(text_of(rows))
    options = ["-i", str(source), "-d", "none", "--temperature", "1", "--batch-size", "2"]
    command = [*COMMAND, *options, "-o", str(output)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    for _ in range(1000):
        if part.exists() and part.read_text().count("\n") > 2:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors
    assert "answers are kept" in errors and not output.exists()
    kept = rows_of(part.read_text())[1:]
    assert 2 <= len(kept) < 5
    with part.open("a") as file:
        file.write('{"line": 5, "text": "half a li')
    other = run(*options[:4], "--temperature", "0.5", "-o", str(output))
    assert other.returncode == 2 and "was begun with temperature 1.0, not 0.5" in other.stderr
    rows[4]["max_new_tokens"] = rows[3]["max_new_tokens"] = 300
    changed = tmp_path / "changed.jsonl"
    changed.write_text(text_of(rows))
    other = run("-i", str(changed), *options[2:], "-o", str(output))
    assert other.returncode == 2 and "input has changed" in other.stderr
    assert len(other.stderr.splitlines()) == 1 and part.exists()
    done = run(*options, "-o", str(output))
    assert done.returncode == 0, done.stderr
    assert f"({len(kept)} were there already)" in done.stderr and not part.exists()
    found = rows_of(output.read_text())
    assert [row["id"] for row in found] == [1, 2, 3, 4, 5]
    for row in kept:
        assert found[row["line"] - 1] == {k: v for k, v in row.items() if k != "line"}


def test_one_bad_prompt_does_not_stop_the_others(run: Run) -> None:
    rows = [{"prompt": "x = 1\n"}, {"prompt": "x = 1\n" * 3000}, {"prompt": "y = 2\n"}]
    done = run("-i", "-", "-n", "4", "-d", "none", stdin=text_of(rows))
    assert done.returncode == 2 and "1 of 3 lines could not be answered: 2" in done.stderr
    found = rows_of(done.stdout)
    assert [row["finish_reason"] for row in found] == ["length", "error", "length"]
    assert "shorten the prompt" in found[1]["error"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no prompts"),
        ('{"prompt": "a"}\n{"prompt": "b"', "line 2: no JSON"),
        ('\n\n["a"]', "line 3: give an object"),
        ('{"promt": "a"}', "line 1: unknown field 'promt'; it takes prompt, id"),
        ('{"id": 3}', "line 1: there is no 'prompt'"),
        ('{"prompt": ""}', "line 1: there is no 'prompt'"),
        ('{"prompt": 4}', "'prompt' must be of type str"),
        ('{"prompt": "a", "seed": true}', "'seed' must be of type int"),
        ('{"prompt": "a", "id": 1.5}', "'id' must be of type str or int"),
        ('{"prompt": "a", "max_new_tokens": 0}', "at least 1"),
    ],
)
def test_bad_lines_are_named_by_number(text: str, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        read_lines(text.splitlines(), "prompts.jsonl")


def test_bad_options_are_one_line(run: Run, tmp_path: Path) -> None:
    source = tmp_path / "prompts.jsonl"
    source.write_text(text_of(ROWS))
    for arguments, word in (
        (("-i", str(tmp_path / "none.jsonl")), "none.jsonl"),
        (("-i", str(source), "--json"), "no --json"),
        (("-i", str(source), "--exact"), "--batch-size 1"),
        (("-i", str(source), "--batch-size", "0"), "batch-size"),
        (("-i", str(source), "-o", str(tmp_path / "no" / "where.jsonl")), "cannot be written"),
        (("x", "-o", str(tmp_path / "out.jsonl")), "--input"),
    ):
        done = run(*arguments)
        assert done.returncode == 2 and not done.stdout, arguments
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
        assert word in done.stderr, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["prompts.jsonl"]


def test_the_journal_repairs_its_last_line_and_nothing_else(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"

    def journal(text: str = "in", **settings: Any) -> Journal:
        return Journal(output, text, settings, 7)

    first = journal(a=1)
    assert not first.path.exists(), "a job that answers nothing leaves nothing"
    for number in (2, 3):
        first.add(number, {"id": f"ü{number}"})
    first.close()
    whole = first.path.read_bytes()
    for cut in range(1, len(whole) + 1):
        first.path.write_bytes(whole[:cut])
        again = journal(a=1)
        assert again.done <= {2, 3}
        for number in {1, 2, 3} - again.done:
            again.add(number, {"id": f"ü{number}"})
        again.publish()
        assert [row["id"] for row in rows_of(output.read_text())] == ["ü1", "ü2", "ü3"]
        assert not first.path.exists()
        output.unlink()
    first.path.write_bytes(whole)
    for text, settings in (("other", {"a": 1}), ("in", {"a": 2}), ("in", {"a": 1, "b": 0})):
        with pytest.raises(MismatchError):
            journal(text, **settings)
    first.path.write_bytes(whole.replace(b'"line": 2', b'"line" 2'))
    with pytest.raises(BrokenFileError, match="line 2 is damaged"):
        journal(a=1)
    assert issubclass(MismatchError, IsthmusError) and not output.exists()


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="ray is installed")
def test_without_ray_the_command_to_install_it_is_named(run: Run) -> None:
    done = run("-i", "-", "--engine", "ray", stdin=text_of(ROWS))
    assert done.returncode == 2 and "pip install 'isthmus[scale]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
@pytest.mark.filterwarnings("ignore")  # Ray warns of its own settings
def test_two_workers_of_a_cluster_give_the_same_answers(run: Run, tmp_path: Path) -> None:
    source, outputs = tmp_path / "prompts.jsonl", (tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    source.write_text(text_of(ROWS))
    shared = ["-i", str(source), "-d", "none", "--temperature", "1", "--seed", "3"]
    for output, more in zip(outputs, ([], ["--engine", "ray", "--workers", "2"]), strict=True):
        done = run(*shared, *more, "-o", str(output))
        assert done.returncode == 0, done.stderr
    assert outputs[0].read_text() == outputs[1].read_text()
    assert not list(tmp_path.glob("*.part"))
