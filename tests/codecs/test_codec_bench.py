"""The bench of codecs: classical coders keep what they promise, and all are judged alike."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from isthmus.cli.main import main
from isthmus.codecs.peers import LOSSLESS, peers
from isthmus.errors import InvalidInputError
from isthmus.workbench.codec_bench import bench, closeness, psnr


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    y, x = np.mgrid[:48, :64]
    noise = np.random.default_rng(0).normal(0, 6, (48, 64, 3))
    slope = np.stack([x * 3, y * 4, 255 - x * 2], -1) + noise
    Image.fromarray(slope.clip(0, 255).astype(np.uint8)).save(folder / "a.png")
    t = np.arange(16_000) / 16_000
    tone = 0.3 * np.sin(2 * np.pi * 300 * t * (1 + t)) + np.random.default_rng(1).normal(
        0, 0.01, 16_000
    )
    soundfile.write(folder / "a.wav", tone, 16_000, subtype="PCM_16")
    Image.fromarray(slope.clip(0, 255).astype(np.uint8)[..., 0]).save(folder / "grey.png")
    return folder


@pytest.mark.parametrize("name", ["a.png", "grey.png", "a.wav"])
def test_all_coders_in_one_run(files: Path, name: str) -> None:
    found = bench([files / name])
    ours = "isthmus lossless-audio" if name == "a.wav" else "isthmus lossless-image"
    assert ours in found.curves and len(found.curves) >= 4
    for coder, points in found.curves.items():
        exact = coder in (ours, "FLAC") or "lossless" in coder
        assert all(math.isinf(p.quality) == exact for p in points), coder
        assert [p.rate for p in points] == sorted(p.rate for p in points)
    assert not found.left_out
    if name == "a.png":
        assert found.anchor == "JPEG" and found.bd.get("WEBP", 0) < 20


@pytest.fixture(autouse=True)
def _nothing_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bench lists trained codecs that lie at hand; which do is no matter of these tests."""
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))


def test_films(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    av = pytest.importorskip("av")
    t, y, x = (np.arange(n) for n in (8, 48, 64))
    grey = 60 + 4 * t[:, None, None] + 2 * y[:, None] + x
    noise = np.random.default_rng(0).normal(0, 3, (8, 48, 64, 3))
    values = np.stack([grey, 250 - grey, grey // 2], -1) + noise
    with av.open(str(tmp_path / "a.mkv"), "w") as file:
        stream = file.add_stream("ffv1", rate=25)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for picture in values.clip(0, 255).astype(np.uint8):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        file.mux(stream.encode(None))
    words = ["bench", "codec", str(tmp_path / "a.mkv"), "--json", "-p", str(tmp_path / "x.png")]
    assert main(words) == 0
    record = json.loads(capsys.readouterr().out)
    curves = record["curves"]
    assert {"H.264", "isthmus ffv1", "isthmus lossless-h264"} <= set(curves)
    assert record["medium"] == "video" and record["anchor"] == "H.264"
    for name, points in curves.items():
        exact = name in ("isthmus ffv1", "isthmus lossless-h264")
        assert all((p["quality"] is None) == exact for p in points), name
        assert [p["rate"] for p in points] == sorted(p["rate"] for p in points)
        alike = [p["more"]["MS-SSIM-3"] for p in points]
        assert alike == [1.0] if exact else 0.5 < alike[0] < alike[-1] < 1
    assert curves["H.264"][-1]["quality"] > 30  # and not another film, or its colours swapped


def test_quality_is_that_of_the_formula() -> None:
    one = torch.full((1, 4, 4), 10, dtype=torch.uint8)
    assert psnr(one, one) == math.inf
    assert psnr(one, one + 5) == pytest.approx(20 * math.log10(255 / 5))
    sound = torch.randn(2, 8000, generator=torch.Generator().manual_seed(0)) * 0.1
    assert closeness(sound, sound, 16_000) == math.inf
    late = torch.nn.functional.pad(sound, (37, 0))
    assert closeness(sound, late, 16_000) == math.inf  # a delay is no loss
    assert closeness(sound, sound * 0.5, 16_000) == pytest.approx(-20 * math.log10(2), abs=0.01)


def test_small_pictures_in_one_file() -> None:
    digits = torch.randint(0, 17, (30, 8, 8), dtype=torch.uint8)
    sizes = {name: len(code(digits)) for name, code in LOSSLESS.items()}
    assert set(sizes) == {"zlib", "lzma", "PNG", "WebP"}
    assert all(30 * 64 * math.log2(17) / 8 < n < 30 * 64 * 1.2 for n in sizes.values())


def test_the_door(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "x.png"
    assert main(["bench", "codec", str(files / "a.png"), "--json", "-p", str(picture)]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["curves"]["PNG lossless"][0]["quality"] is None and picture.exists()
    assert main(["bench", "codec", str(files / "a.png"), str(files / "a.wav")]) == 2
    assert "pictures only, or sounds only, or films only" in capsys.readouterr().err
    assert main(["bench", "codec"]) == 2
    with pytest.raises(InvalidInputError):
        bench([])
    assert {p.medium for p in peers("audio")} == {"audio"}
