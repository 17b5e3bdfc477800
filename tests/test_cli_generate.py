"""``isthmus generate`` and ``isthmus bench decode`` as a person meets them."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = [sys.executable, "-m", "isthmus.cli.main"]


def run(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], input=stdin, capture_output=True, text=True, timeout=300
    )


def test_text_streams_and_one_line_of_statistics_follows() -> None:
    done = run("generate", "def add(a, b):", "-n", "12")
    assert done.returncode == 0
    assert done.stdout.strip()
    assert len(done.stderr.strip().splitlines()) == 1
    assert "acceptance length" in done.stderr


def test_json_is_one_object_and_drafters_agree(tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("import os\nimport ")
    answers = []
    for drafter in ("none", "token-recycling"):
        done = run("generate", "-f", str(file), "-n", "16", "-d", drafter, "--json")
        assert done.returncode == 0
        answers.append(json.loads(done.stdout))
    assert answers[0]["tokens"] == answers[1]["tokens"]
    assert answers[0]["lossless"] is True
    assert answers[0]["stats"]["new_tokens"] == len(answers[0]["tokens"])
    piped = run("generate", "-n", "16", "--json", stdin="import os\nimport ")
    assert json.loads(piped.stdout)["tokens"] == answers[0]["tokens"]


def test_errors_are_one_line_and_exit_code_2(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("not json")
    for arguments, word in (
        (("generate", "x", "-d", "promt-lookup"), "prompt-lookup"),
        (("generate", "x", "--dtype", "float23"), "float32"),
        (("generate", ""), "no prompt"),
        (("generate", "x", "-m", str(broken)), "cannot be read"),
        (("generate", "x", "-n", "0"), "max_new_tokens"),
        (("generate", "x", "--top-p", "1.5"), "top_p"),
        (("generate", "-f", str(tmp_path / "none.txt")), "none.txt"),
        (("bench", "decode", "--prompts", "0"), "at least 1"),
        (("bench", "decode", "--methods", "openvino int3"), "int8"),
    ):
        done = run(*arguments)
        assert done.returncode == 2, arguments
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
        assert word in done.stderr, done.stderr
        assert not done.stdout


def test_an_interrupt_keeps_what_was_written() -> None:
    process = subprocess.Popen(
        [*COMMAND, "generate", "def f(", "-n", "900", "-d", "token-recycling"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    head = process.stdout.read(8)  # text is flowing, for two seconds at least
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130, (len(rest), errors.decode())
    assert head + rest
    assert b"tokens in" in errors and b"Traceback" not in errors


def test_the_bench_compares_methods_in_one_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path))  # no other engine is installed there
    done = run(
        *("bench", "decode", "--prompts", "1", "--repeats", "1", "--max-new-tokens", "8"),
        *("--methods", "transformers", "--methods", "token-recycling", "--json", "--peers"),
    )
    assert done.returncode == 0, done.stderr
    assert "without openvino: isthmus bench peers --install openvino" in done.stderr
    rows = json.loads(done.stdout)["methods"]
    assert [r["method"] for r in rows] == ["transformers", "token-recycling"]
    assert rows[1]["same_output"] == 1
    assert rows[1]["new_tokens"] == 8


def test_constraints(tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "array", "items": {"enum": [1, 2]}, "minItems": 2, "maxItems": 3}')
    done = run("generate", "x = ", "--json-schema", str(schema))
    assert done.returncode == 0 and json.loads(done.stdout)
    done = run("generate", "x = ", "--choice", "yes", "--choice", "no", "--json")
    assert json.loads(done.stdout)["text"] in ("yes", "no")
    grammar = tmp_path / "sum.lark"
    grammar.write_text('start: NUM "+" NUM\nNUM: /[0-9]{1,2}/')
    done = run("generate", "x = ", "--grammar", str(grammar))
    assert "+" in done.stdout
    lines = tmp_path / "in.jsonl"
    lines.write_text('{"prompt": "a = "}\n{"prompt": "b = "}\n')
    done = run("generate", "--input", str(lines), "--regex", "[0-9]{4}")
    assert [len(json.loads(line)["text"]) for line in done.stdout.splitlines()] == [4, 4]
    for arguments, word in (
        (("--json-schema", '{"uniqueItems": true}'), "uniqueItems"),
        (("--regex", "a", "--choice", "b"), "give one"),
    ):
        done = run("generate", "x", *arguments)
        assert done.returncode == 2
        assert word in done.stderr and len(done.stderr.strip().splitlines()) == 1
