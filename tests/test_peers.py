"""Other engines on the bench: the worker and its channel, what is refused, what is kept whole."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from decoding.tiny import facade, network, prompts
from isthmus.cli.main import main
from isthmus.errors import InvalidInputError, IsthmusError, UnknownNameError
from isthmus.workbench import peer_worker, peers
from isthmus.workbench.bench import _common, bench
from isthmus.workbench.peers import Peer, Worker


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A tiny Llama on disk."""
    folder = tmp_path / "tiny"
    network("Llama", "float32").save_pretrained(folder)
    return folder


def script(path: Path, *lines: str) -> Path:
    """An executable that stands where an interpreter would."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)
    return path


def pretend_installed(name: str, *lines: str) -> None:
    """An environment in the cache whose Python is a script."""
    folder = peers.environment(name)
    script(folder / "bin" / "python", *lines)
    (folder / "installed.json").write_text("{}")


@pytest.mark.skipif(sys.platform == "win32", reason="its stand-in is a shell script")
def test_an_engine_in_its_own_process_decodes_on_the_bench(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_one = {**peers.ENGINES, "transformers": Peer("transformers", (), ("float32",))}
    monkeypatch.setattr(peers, "ENGINES", with_one)
    # this Python has the engine already: transformers itself, loaded and run by the real worker
    pretend_installed("transformers", f'exec {sys.executable} "$@"')
    ids = [p.tolist() for p in prompts()[:2]]
    rows = bench(
        facade("Llama", "float32"),
        ids,
        ["none", "transformers float32"],
        max_new_tokens=6,
        repeats=1,
        checkpoint=checkpoint,
    )
    ours, theirs = rows
    assert theirs.tokens == ours.tokens
    assert (theirs.same, theirs.agreeing, theirs.new_tokens) == (2, 1.0, 12)
    assert theirs.about.startswith("transformers ") and theirs.precision == "float32"
    assert theirs.overhead is not None and 0 <= theirs.overhead < 1
    assert theirs.forwards is None and theirs.to_dict()["acceptance_length"] is None


def test_a_dying_worker_is_one_line(tmp_path: Path, checkpoint: Path) -> None:
    dying = script(
        tmp_path / "python",
        "read line",
        'echo \'{"about": "short-lived 1.0"}\'',
        "read line",
        "echo some noise >&2",
        "echo out of memory >&2",
        "exit 3",
    )
    with Worker("openvino", "int8", checkpoint, threads=1, interpreter=dying) as worker:
        assert worker.about == "short-lived 1.0"
        with pytest.raises(IsthmusError, match=r"openvino int8 ended .*exit code 3; out of memory"):
            worker.generate([1, 2, 3], 4)
        with pytest.raises(IsthmusError, match="exit code 3"):
            worker.generate([1, 2, 3], 4)
    gone = script(tmp_path / "false", "exit 1")
    with pytest.raises(IsthmusError, match="exit code 1"):
        Worker("openvino", "int8", checkpoint, threads=1, interpreter=gone)


def test_what_an_engine_says_of_an_error_is_passed_on(checkpoint: Path) -> None:
    with pytest.raises(IsthmusError, match="no-such float32 failed: KeyError: 'no-such'"):
        Worker("no-such", "float32", checkpoint, threads=1, interpreter=Path(sys.executable))


def test_the_worker_needs_nothing_of_isthmus() -> None:
    code = f"import runpy, sys; runpy.run_path({str(peers.WORKER)!r}); print(*sys.modules)"
    run = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True
    )
    assert not [m for m in run.stdout.split() if m.split(".")[0] in ("isthmus", "torch", "numpy")]


def test_what_is_not_installed_is_refused_with_the_command(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert peers.installed() == peers.methods("float32") == []
    with pytest.raises(InvalidInputError, match="isthmus bench peers --install openvino"):
        Worker("openvino", "int8", checkpoint, threads=1)
    with pytest.raises(UnknownNameError, match=r"llama\.cpp"):
        peers.python("llama-cpp")
    with pytest.raises(UnknownNameError, match="precision of ctranslate2"):
        peers.parse("ctranslate2 int4")
    assert peers.parse("llama.cpp int8") == ("llama.cpp", "int8")
    model, ids = facade("Llama", "float32"), [[1, 2, 3]]
    with pytest.raises(InvalidInputError, match="the folder of a checkpoint"):
        bench(model, ids, ["none", "openvino int8"], repeats=1)
    with pytest.raises(InvalidInputError, match="temperature 0"):
        bench(model, ids, ["openvino int8"], temperature=1.0, checkpoint=checkpoint)
    with pytest.raises(InvalidInputError, match="is none"):
        Worker("openvino", "int8", tmp_path, threads=1, interpreter=Path(sys.executable))
    assert main(["bench", "peers", "--install", "ctranslat2"]) == 2
    assert "did you mean 'ctranslate2'?" in capsys.readouterr().err


def test_methods_follow_the_numbers_of_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    for name in peers.ENGINES:
        pretend_installed(name, "exit 1")
    assert peers.methods("float32")[::2] == [f"{name} float32" for name in peers.ENGINES]
    assert peers.methods("bfloat16") == [
        *("ctranslate2 float32", "ctranslate2 int8"),
        *("openvino float16", "openvino int8"),
        *("llama.cpp bfloat16", "llama.cpp int8"),
    ]
    assert main(["bench", "peers", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert all(peer["installed"] for peer in listed.values()) and set(listed) == set(peers.ENGINES)


@pytest.mark.parametrize("step", ["-m venv", "-m pip"])
def test_an_install_that_fails_leaves_nothing_installed(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails = f'case "$*" in *"{step}"*) exit 4;; esac'
    pretend_installed("llama.cpp", fails)
    monkeypatch.setattr(sys, "executable", str(script(tmp_path / "python", fails)))
    with pytest.raises(IsthmusError, match=f"could not be installed .exit code 4.*{step}"):
        peers.install("llama.cpp")
    assert peers.installed() == []


def test_an_export_is_kept_as_a_whole(tmp_path: Path) -> None:
    made = []

    def fails(out: Path) -> None:
        out.mkdir()
        (out / "half").touch()
        raise ValueError("no more")

    def works(out: Path) -> None:
        made.append(out)
        out.write_text("all")

    export = tmp_path / "exports" / "one"
    with pytest.raises(ValueError, match="no more"):
        peer_worker.kept(export, fails)
    assert list(export.parent.iterdir()) == []
    for _ in range(2):
        peer_worker.kept(export, works)
    assert export.read_text() == "all" and len(made) == 1


def test_tensors_are_read_without_torch(tmp_path: Path) -> None:
    given = {
        str(dtype).removeprefix("torch."): torch.randn(3, 5).to(dtype)
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
    }
    save_file(given, tmp_path / "x.safetensors", metadata={"format": "pt"})
    read = dict(peer_worker.tensors(tmp_path / "x.safetensors"))
    assert read.keys() == given.keys()
    for name, x in given.items():
        assert torch.equal(torch.tensor(read[name]), x.float())


def test_agreement_counts_tokens_before_the_first_difference() -> None:
    others: list[list[int]] = [[1, 2, 3], [1, 9, 3], [], [1, 2]]
    assert [_common([1, 2, 3], other) for other in others] == [3, 1, 0, 2]
