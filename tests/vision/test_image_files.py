"""Pictures and masks in files, and the records that are read from folders."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from isthmus.errors import BrokenFileError, InvalidInputError
from isthmus.signals.image import (
    palette,
    read_image,
    read_mask,
    resize,
    size_of,
    write_image,
    write_mask,
)
from isthmus.training.data import read

PICTURE = torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8)


def test_pictures_and_masks_survive_a_file(tmp_path: Path) -> None:
    write_image(tmp_path / "x.png", PICTURE)
    assert torch.equal(read_image(tmp_path / "x.png"), PICTURE)
    assert size_of(tmp_path / "x.png") == (5, 7)
    mask = torch.arange(35).view(5, 7) * 7
    write_mask(tmp_path / "m.png", mask)
    assert torch.equal(read_mask(tmp_path / "m.png"), mask.to(torch.uint8))
    seen = np.array(Image.open(tmp_path / "m.png").convert("RGB"))
    assert len({tuple(c) for row in seen for c in row}) == 35  # every class has its own colour
    few = torch.tensor(palette(12)).float()
    assert torch.pdist(few).min() > 40  # and the first ones can be told apart


def test_alpha_grey_and_sixteen_bits_become_pixels(tmp_path: Path) -> None:
    clear = np.zeros((2, 2, 4), np.uint8)
    clear[0, 0] = (10, 20, 30, 255)
    Image.fromarray(clear).save(tmp_path / "a.png")
    found = read_image(tmp_path / "a.png")
    assert found[:, 0, 0].tolist() == [10, 20, 30] and found[:, 1, 1].tolist() == [255] * 3
    Image.fromarray(np.full((2, 3), 0x8000, np.uint16)).save(tmp_path / "deep.png")
    assert read_image(tmp_path / "deep.png").unique().tolist() == [128]
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    Image.new("RGB", (4, 2)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").shape == (3, 4, 2)


def bomb(path: Path) -> None:
    """A PNG header that promises 60,000 x 60,000 pixels."""
    body = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    check = struct.pack(">I", zlib.crc32(body))
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + check
    path.write_bytes(data + struct.pack(">I", 4) + b"IDAT" + b"\0" * 8)


def test_files_that_are_no_pictures_are_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty.png").write_bytes(b"")
    write_image(tmp_path / "good.png", torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8))
    (tmp_path / "short.png").write_bytes((tmp_path / "good.png").read_bytes()[:2000])
    bomb(tmp_path / "bomb.png")
    for name, why in [
        ("none.png", "not there"),
        ("text.png", "no picture"),
        ("empty.png", "no picture"),
        ("short.png", "cannot be read"),
        ("bomb.png", "at most"),
        (".", "cannot be read"),
    ]:
        with pytest.raises(BrokenFileError, match=why) as caught:
            read_image(tmp_path / name)
        assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
    with pytest.raises(BrokenFileError, match="pixels of the kind RGB"):
        read_mask(tmp_path / "good.png")
    with pytest.raises(InvalidInputError, match="suffix"):
        write_image(tmp_path / "x.pics", PICTURE)
    with pytest.raises(InvalidInputError, match=r"\[3, H, W\]"):
        write_image(tmp_path / "x.png", PICTURE[0])
    with pytest.raises(InvalidInputError, match=r"\.png"):
        write_mask(tmp_path / "m.jpg", torch.zeros(2, 2).int())


def test_a_mask_keeps_its_values_when_resized() -> None:
    mask = torch.tensor([[0, 9], [3, 255]], dtype=torch.uint8)
    big = resize(mask, (4, 4))
    assert torch.equal(big, mask.repeat_interleave(2, 0).repeat_interleave(2, 1))
    assert resize(PICTURE, (5, 7)) is PICTURE and resize(PICTURE, (3, 3)).dtype == torch.uint8


def test_masks_beside_pictures_and_in_a_folder_of_their_own(tmp_path: Path) -> None:
    for folder, mask in (("beside", "a.mask.png"), ("apart/images", "../masks/a.png")):
        (tmp_path / folder / mask).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / folder).mkdir(exist_ok=True)
        write_image(tmp_path / folder / "a.png", PICTURE)
        write_mask(tmp_path / folder / mask, torch.ones(5, 7).int())
    found = read("masks", [tmp_path / "beside", tmp_path / "apart"])
    records = [*found.train, *found.valid]
    assert len(records) == 2
    for record in records:
        assert torch.equal(record.picture(), PICTURE) and record.mask().unique().tolist() == [1]


def test_bad_pictures_are_named(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", PICTURE)
    with pytest.raises(BrokenFileError, match=r"a\.png.* has no mask"):
        read("masks", [tmp_path])
    write_mask(tmp_path / "a.mask.png", torch.ones(3, 3).int())
    with pytest.raises(BrokenFileError, match=r"\(5, 7\).*its mask .* \(3, 3\)"):
        read("masks", [tmp_path])
    (tmp_path / "b.png").write_text("hello")
    with pytest.raises(BrokenFileError, match=r"b\.png is no picture"):
        read("pictures", [tmp_path])
    write_image(tmp_path / "c.png", PICTURE)
    found = read("pictures", [tmp_path], skip_bad=1)
    assert len(found.left_out) == 1
