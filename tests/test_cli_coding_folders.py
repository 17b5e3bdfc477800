"""isthmus encode and decode of whole folders, here and on a cluster."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from isthmus.cli.main import main
from isthmus.signals.files import open_signal

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 24, 3)).astype(np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two pictures, one of them lossy, a sound, a text, and a picture that is hidden."""
    given = tmp_path / "given"
    (given / "trip").mkdir(parents=True)
    picture = Image.fromarray(PIXELS)
    picture.save(given / "a.png")
    picture.save(given / ".b.png")
    picture.save(given / "trip" / "c.jpg")
    soundfile.write(given / "trip" / "d.wav", np.linspace(-0.5, 0.5, 900), 8000)
    (given / "notes.txt").write_text("x")
    return given


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def whole(path: Path) -> torch.Tensor:
    return torch.cat(list(open_signal(path).chunks), 1)


def test_a_folder_goes_in_and_comes_out(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small, back = tmp_path / "small", tmp_path / "back"
    assert main(["encode", str(folder), "-o", str(small)]) == 0
    said = capsys.readouterr()
    total = sum(p.stat().st_size for p in small.rglob("*.ist"))
    assert f"3 file(s), {total:,} bytes" in said.out and "1 file(s) of other kinds" in said.err
    assert files(small) == ["a.png.ist", "trip/c.jpg.ist", "trip/d.wav.ist"]
    assert main(["decode", str(small), "-o", str(back)]) == 0
    # a JPEG file cannot hold the same pixels again
    assert files(back) == ["a.png", "trip/c.jpg.png", "trip/d.wav"]
    for name in ("a.png", "trip/c.jpg", "trip/d.wav"):
        again = back / (f"{name}.png" if name.endswith("jpg") else name)
        assert torch.equal(whole(folder / name), whole(again)), name


def test_what_is_there_is_kept_and_a_bad_file_holds_up_nobody(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = tmp_path / "small"
    (small / "trip").mkdir(parents=True)
    (small / "trip" / "c.jpg.ist").write_bytes(b"mine")
    (folder / "a.png").write_bytes((folder / "a.png").read_bytes()[:100])
    assert main(["encode", str(folder), "-o", str(small)]) == 2
    said = capsys.readouterr()
    assert "1 file(s) were there already" in said.err and "a.png" in said.err
    assert "Traceback" not in said.err
    assert files(small) == ["trip/c.jpg.ist", "trip/d.wav.ist"]
    assert (small / "trip" / "c.jpg.ist").read_bytes() == b"mine"
    assert main(["decode", str(small), "-o", str(tmp_path / "back"), "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    errors = {Path(one["given"]).name: one["error"] for one in found["files"]}
    assert errors["d.wav.ist"] == "" and "no .ist file" in errors["c.jpg.ist"]


def test_a_codec_takes_the_files_of_its_medium(folder: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    assert main(["encode", str(folder), "-o", str(small), "--codec", "lossless-audio"]) == 0
    assert files(small) == ["trip/d.wav.ist"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["encode", "empty", "-o", "x"], "holds no sound, pictures or films"),
        (["encode", "given", "-o", "x", "--codec", "av1"], "holds no video"),
        (["encode", "given", "-o", "given/a.png"], "is a file"),
        (["encode", "given", "-o", "x", "--codec", "losless-audio"], "did you mean"),
        (["encode", "given/a.png", "-o", "x", "--engine", "ray"], "is one file"),
        (["decode", "given", "-o", "x"], "holds no .ist files"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    says: str,
) -> None:
    monkeypatch.chdir(folder.parent)
    Path("empty").mkdir()
    assert main(words) == 2
    error = capsys.readouterr().err.strip()
    assert says in error and len(error.splitlines()) == 1 and not Path("x").exists()


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
@pytest.mark.filterwarnings("ignore")  # Ray warns of its own settings
def test_a_cluster_writes_the_same_files(folder: Path, tmp_path: Path) -> None:
    (folder / "bad.png").write_bytes(b"x")
    here, there = tmp_path / "here", tmp_path / "there"
    assert main(["encode", str(folder), "-o", str(here)]) == 2
    assert main(["encode", str(folder), "-o", str(there), "--engine", "ray", "--workers", "2"]) == 2
    assert files(here) == files(there) == ["a.png.ist", "trip/c.jpg.ist", "trip/d.wav.ist"]
    assert all((here / name).read_bytes() == (there / name).read_bytes() for name in files(here))
