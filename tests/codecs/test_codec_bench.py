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
    return folder


@pytest.mark.parametrize("name", ["a.png", "a.wav"])
def test_all_coders_in_one_run(files: Path, name: str) -> None:
    found = bench([files / name])
    ours = "isthmus lossless-image" if name == "a.png" else "isthmus lossless-audio"
    assert ours in found.curves and len(found.curves) >= 4
    for coder, points in found.curves.items():
        exact = coder in (ours, "FLAC") or "lossless" in coder
        assert all(math.isinf(p.quality) == exact for p in points), coder
        assert [p.rate for p in points] == sorted(p.rate for p in points)
    if name == "a.png":
        assert found.anchor == "JPEG" and found.bd.get("WEBP", 0) < 20


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
    assert "pictures only, or sounds only" in capsys.readouterr().err
    assert main(["bench", "codec"]) == 2
    with pytest.raises(InvalidInputError):
        bench([])
    assert {p.medium for p in peers("audio")} == {"audio"}
