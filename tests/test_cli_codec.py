"""The doors: isthmus encode, decode and inspect on files that people have."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

import isthmus
from isthmus.cli.main import main
from isthmus.signals.files import open_signal

PIXELS = np.random.default_rng(0).integers(0, 256, (37, 23, 4)).astype(np.uint8)
SOUND = np.random.default_rng(1).normal(0, 0.1, (3001, 2))


def image(path: Path, mode: str, **how: Any) -> Path:
    if mode == "I;16":
        values = PIXELS[..., 0].astype(np.uint16) * 257
        Image.fromarray(values).save(path)
    elif mode == "P":
        Image.fromarray(PIXELS[..., :3]).quantize(20).save(path)
    else:
        Image.fromarray(PIXELS).convert(mode).save(path, **how)
    return path


def whole(path: Path) -> torch.Tensor:
    return torch.cat(list(open_signal(path).chunks), 1)


@pytest.mark.parametrize(
    ("name", "mode", "back"),
    [
        ("a.png", "RGB", "b.png"),
        ("a.png", "RGBA", "b.webp"),
        ("a.png", "L", "b.tif"),
        ("a.png", "LA", "b.png"),
        ("a.png", "1", "b.png"),
        ("a.png", "P", "b.png"),
        ("a.png", "I;16", "b.png"),
        ("a.jpg", "RGB", "b.png"),
        ("a.webp", "RGB", "b.png"),
        ("a.bmp", "RGB", "b.ppm"),
    ],
)
def test_pictures_go_in_and_come_out(tmp_path: Path, name: str, mode: str, back: str) -> None:
    given, small, out = image(tmp_path / name, mode), tmp_path / "x.ist", tmp_path / back
    assert main(["encode", str(given), "-o", str(small)]) == 0
    assert main(["decode", str(small), "-o", str(out)]) == 0
    assert torch.equal(whole(given), whole(out))


@pytest.mark.parametrize(
    ("name", "subtype", "rate", "back"),
    [
        ("a.wav", "PCM_16", 44_100, "b.flac"),
        ("a.wav", "PCM_24", 48_000, "b.wav"),
        ("a.wav", "PCM_U8", 8_000, "b.wav"),
        ("a.wav", "FLOAT", 22_050, "b.wav"),
        ("a.flac", "PCM_24", 96_000, "b.flac"),
        ("a.ogg", "VORBIS", 16_000, "b.wav"),
        ("a.mp3", "MPEG_LAYER_III", 44_100, "b.wav"),
        ("a.aiff", "PCM_16", 11_025, "b.aiff"),
    ],
)
def test_sound_goes_in_and_comes_out(
    tmp_path: Path, name: str, subtype: str, rate: int, back: str
) -> None:
    given, small, out = tmp_path / name, tmp_path / "x.ist", tmp_path / back
    soundfile.write(given, SOUND, rate, subtype=subtype)
    assert main(["encode", str(given), "-o", str(small)]) == 0
    assert main(["decode", str(small), "-o", str(out)]) == 0
    assert torch.equal(whole(given), whole(out))
    assert soundfile.info(out).samplerate == rate


def test_what_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given, small = image(tmp_path / "a.png", "RGB"), tmp_path / "x.ist"
    assert main(["encode", str(given), "-o", str(small), "--json"]) == 0
    sizes = json.loads(capsys.readouterr().out)
    assert sizes["file"] == small.stat().st_size and sizes["codec"] == "parts/lossless-image"
    assert main(["inspect", str(small)]) == 0
    said = capsys.readouterr().out
    assert "23 x 37 pixels, RGB, 8 bits" in said and "all checksums fit" in said
    small.write_bytes(small.read_bytes()[:-3])
    assert main(["inspect", str(small), "--json"]) == 2
    assert "cut off" in json.loads(capsys.readouterr().out)["damage"]


def test_a_file_of_which_the_end_is_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from isthmus.codecs import lossless_audio

    monkeypatch.setattr(lossless_audio, "BLOCK", 256)
    monkeypatch.setattr(lossless_audio, "BLOCKS", 4)
    given, small, out = tmp_path / "a.wav", tmp_path / "x.ist", tmp_path / "b.wav"
    soundfile.write(given, SOUND, 8000)
    assert main(["encode", str(given), "-o", str(small)]) == 0
    small.write_bytes(small.read_bytes()[:-500])
    out.write_bytes(b"precious")
    assert main(["decode", str(small), "-o", str(out)]) == 2
    assert out.read_bytes() == b"precious"
    assert "cut off" in capsys.readouterr().err
    assert main(["decode", str(small), "-o", str(out), "--partial"]) == 0
    got = whole(out)
    assert got.shape[1] in (1024, 2048) and torch.equal(got, whole(given)[:, : got.shape[1]])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.wav", "b.wav", "x.ist"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["encode", "none.png", "-o", "x.ist"], "none.png"),
        (["encode", "a.txt", "-o", "x.ist"], "neither sound nor a picture"),
        (["encode", "empty.wav", "-o", "x.ist"], "empty"),
        (["encode", "broken.png", "-o", "x.ist"], "broken.png"),
        (["encode", "a.png", "-o", "x.ist", "--codec", "losless-image"], "did you mean"),
        (["encode", "a.png", "-o", "x.ist", "--codec", "lossless-audio"], "codes audio"),
        (
            ["encode", "a.png", "-o", "x.ist", "--codec", "lossless-image", "--rate", "2"],
            "no rate",
        ),
        (["encode", "a.png", "-o", "x.ist", "--rate", "0.01"], "bits a pixel or more"),
        (["encode", "a.png", "-o", "x.ist", "--model", "a.txt"], "holds no isthmus.json"),
        (
            ["encode", "a.png", "-o", "x.ist", "--codec", "lossless-image", "--model", "a.txt"],
            "leave --model out",
        ),
        (["encode", "a.png", "-o", "a.png"], "is the file that is read"),
        (["encode", "a.png", "-o", "nowhere/x.ist"], "cannot be written"),
        (["decode", "a.png", "-o", "b.png"], "no .ist file"),
        (["decode", "good.ist", "-o", "b.wav"], "holds image"),
        (["decode", "good.ist", "-o", "b.jpg"], "has no alpha"),
        (["decode", "good.ist", "-o", "good.ist"], "is the file that is read"),
        (["inspect", "none.ist"], "cannot be read"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    image(Path("a.png"), "RGBA")
    Path("a.txt").write_text("x")
    Path("empty.wav").write_bytes(b"")
    Path("broken.png").write_bytes(Path("a.png").read_bytes()[:300])
    isthmus.encode("a.png", "good.ist")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    capsys.readouterr()
    assert main(words) == 2
    said = capsys.readouterr().err
    assert says in said and len(said.strip().splitlines()) == 1
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


LONG = """
import resource, sys
import isthmus
isthmus.encode(sys.argv[1], sys.argv[2]); isthmus.decode(sys.argv[2], sys.argv[3])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_does_not_grow_with_the_length(tmp_path: Path) -> None:
    unit = 1024 if sys.platform != "darwin" else 1
    assert resource.RUSAGE_SELF == 0
    peaks = []
    for spans in (1, 3):
        given = tmp_path / f"{spans}.wav"
        noise = np.random.default_rng(0).integers(-90, 90, spans * 4096 * 64).astype(np.int16)
        soundfile.write(given, noise, 8000)
        words = [given, tmp_path / "x.ist", tmp_path / "y.wav"]
        run = subprocess.run(
            [sys.executable, "-c", LONG, *map(str, words)],
            capture_output=True,
            text=True,
            check=True,
        )
        peaks.append(int(run.stdout) * unit)
    assert peaks[1] - peaks[0] < 60 << 20
