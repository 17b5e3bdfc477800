"""Moving pictures in files: sizes, rates and pixels come back, and damage is named."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
import torch

from isthmus.errors import BrokenFileError, InvalidInputError
from isthmus.roles import Signal
from isthmus.signals.video import open_video, save_video


def film(height: int, width: int, rate: str = "30000/1001") -> Signal:
    t, y, x = (torch.arange(n) for n in (7, height, width))
    grey = (5 * t[:, None, None] + 2 * y[:, None] + x).to(torch.uint8)
    pixels = torch.stack([grey, grey // 2, 200 - grey], 1)
    info = {"medium": "video", "dtype": "uint8", "shape": [7, 3, height, width], "rate": rate}
    return Signal(info, [pixels[:4], pixels[4:]])


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("size", [(48, 64), (35, 51)])
def test_films_come_back(tmp_path: Path, suffix: str, size: tuple[int, int]) -> None:
    path = tmp_path / f"a{suffix}"
    truth = torch.cat(list(film(*size).chunks))
    for exact in (False, True):
        save_video(path, film(*size), exact=exact)
        back = open_video(path)
        assert back.info["shape"] == [None, 3, *size]
        assert abs(Fraction(back.info["rate"]) - Fraction(30000, 1001)) < Fraction(1, 10)
        pixels = torch.cat(list(back.chunks))
        assert pixels.shape == truth.shape and pixels.dtype == torch.uint8
        off = (pixels.float() - truth.float()).abs().mean()
        assert off == 0 if exact else 0 < off < 4


def test_what_is_refused(tmp_path: Path) -> None:
    path, empty, text = tmp_path / "a.mp4", tmp_path / "b.mp4", tmp_path / "c.mkv"
    save_video(path, film(32, 32))
    before = path.read_bytes()
    empty.touch()
    text.write_text("no video " * 50)
    with pytest.raises(InvalidInputError, match="0 bytes"):
        open_video(empty)
    for bad in (text, tmp_path / "none.mp4"):
        with pytest.raises(BrokenFileError, match="cannot be read"):
            open_video(bad)
    path.write_bytes(before[: len(before) // 2])
    with pytest.raises(BrokenFileError):
        list(open_video(path).chunks)
    path.write_bytes(before)
    nothing = Signal(film(32, 32).info, [])
    grey = Signal({**film(8, 8).info, "shape": [7, 1, 8, 8]}, [])
    for signal, name, match in (
        (nothing, "a.mp4", "no pictures"),
        (grey, "a.mp4", r"\[T, 3, H, W\]"),
        (film(8, 8), "a.gif", "written as .mp4 or .mkv"),
    ):
        with pytest.raises(InvalidInputError, match=match):
            save_video(tmp_path / name, signal)
    assert path.read_bytes() == before
