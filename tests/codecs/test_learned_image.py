"""The learned codec of pictures: any picture in and out, rates kept, no seams, damage told."""

from __future__ import annotations

import io
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import isthmus.codecs.learned_image as part
from isthmus.cli.main import main
from isthmus.codecs.base import pack, trainable, unpack
from isthmus.codecs.learned_image import LEVELS, LearnedImage
from isthmus.errors import BrokenFileError, InvalidInputError
from isthmus.models.transform_codec import TransformCodec
from isthmus.roles import Signal
from isthmus.signals.image import read_pixels, write_pixels
from isthmus.testing import check_codec
from isthmus.training.data import Data
from isthmus.training.loop import Plan
from isthmus.training.picture_codec import PictureCodecLearner
from isthmus.training.pictures import Pictures
from isthmus.workbench.dead_leaves import DeadLeaves
from isthmus.workbench.photographs import JUDGED, Cutting, cuttings
from isthmus.workbench.trained import trained


@pytest.fixture(scope="module")
def codec() -> LearnedImage:
    """Of the scale test."""
    return LearnedImage.from_pretrained(trained(LearnedImage, "test"))


def signal(pixels: torch.Tensor) -> Signal:
    """A picture uint8 [C, H, W]."""
    return Signal({"medium": "image", "dtype": "uint8", "shape": list(pixels.shape)}, [pixels])


def drawn(channels: int = 3, height: int = 45, width: int = 70) -> torch.Tensor:
    """Waves and an edge, another for each plane."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    planes = [128 + 90 * torch.sin((x + c * y) / 9) * (x > y - c) for c in range(channels)]
    return torch.stack(planes).round().to(torch.uint8)


def coded(codec: LearnedImage, pixels: torch.Tensor, rate: float | None = None) -> bytes:
    """The file."""
    out = io.BytesIO()
    pack(codec, signal(pixels), out, rate=rate)
    return out.getvalue()


def shown(codec: LearnedImage, data: bytes) -> torch.Tensor:
    """The picture of a file."""
    return torch.cat(list(unpack(data, codec=codec).signal.chunks), 1)


def test_any_picture_comes_back_in_its_shape(codec: LearnedImage) -> None:
    sizes = [(3, 45, 70), (1, 33, 20), (4, 16, 31), (2, 9, 9), (3, 1, 1)]
    check_codec(codec, [lambda s=s: signal(drawn(*s)) for s in sizes], mutations=60)  # type: ignore[misc]


def test_more_bits_are_a_better_picture_and_never_more_than_asked_for(codec: LearnedImage) -> None:
    pixels = drawn(3, 96, 128)
    errors, sizes = [], []
    for rate in (2.0, 5.0, 12.0):
        data = coded(codec, pixels, rate)
        payload = sum(len(frame.payload) for frame in unpack(data, codec=codec).reader)
        assert 8 * payload / (96 * 128) <= rate
        sizes.append(payload)
        errors.append(float((shown(codec, data).float() - pixels).square().mean()))
    assert sizes == sorted(sizes) and errors == sorted(errors, reverse=True)


def test_a_rate_that_is_too_low_is_told_and_harms_no_file(
    codec: LearnedImage, tmp_path: Path
) -> None:
    codec.save_pretrained(tmp_path / "m")
    noise = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 64, 64), np.uint8))
    write_pixels(tmp_path / "a.png", noise)
    (tmp_path / "a.ist").write_bytes(b"before")
    given = ["encode", str(tmp_path / "a.png"), "-o", str(tmp_path / "a.ist"), "--rate", "0.01"]
    assert main([*given, "--model", str(tmp_path / "m")]) == 2
    assert (tmp_path / "a.ist").read_bytes() == b"before"
    with pytest.raises(InvalidInputError, match=r"needs [\d.]+ bits a pixel or more"):
        coded(codec, noise, 0.01)
    for rate in (0.0, -1.0, 1e9):
        with pytest.raises(InvalidInputError, match=r"a rate is 0\.001 to 1000"):
            coded(codec, noise, rate)
    with pytest.raises(InvalidInputError, match="uint8"):
        codec.parameters({"shape": [1, 9, 9], "dtype": "int32"})


def test_bands_leave_no_seams(codec: LearnedImage, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = drawn(4, 130, 40)
    whole = codec.analyse(pixels)
    plain = shown(codec, coded(codec, pixels, 6.0))
    monkeypatch.setattr(part, "BAND", 2 * codec.module.multiple * 48)
    bands = codec.analyse(pixels)
    assert len(whole) == 1 and len(bands) > 3
    torch.testing.assert_close(
        torch.cat([y for y, _ in bands], 2), whole[0][0], atol=1e-4, rtol=1e-4
    )
    # the same latents give the same pixels, whatever the band
    data = coded(codec, pixels, 6.0)
    assert len(list(unpack(data, codec=codec).reader)) == len(bands)
    level, y = 12, codec.rounded(whole[0][0], 12)
    parts: list[Any] = [None, *y.split([y.shape[2] for y, _ in bands], 2), None]
    rows = [codec.synthesise(parts[i : i + 3], level, 4) for i in range(len(bands))]
    again = codec.synthesise([None, y, None], level, 4)
    assert (torch.cat(rows, 1).int() - again.int()).abs().max() <= 1
    assert (shown(codec, data).float() - plain.float()).square().mean() < 60


def test_what_comes_before_a_damage_is_shown(
    codec: LearnedImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(part, "BAND", 2 * codec.module.multiple * 48)
    pixels = drawn(3, 130, 40)
    data = coded(codec, pixels)
    broken = bytearray(data)
    broken[3 * len(data) // 4] ^= 255
    opened = unpack(bytes(broken), codec=codec, allow_partial=True)
    rows = torch.cat(list(opened.signal.chunks), 1)
    assert opened.reader.damage and 0 < rows.shape[1] < 130
    assert torch.equal(rows[:, :32], shown(codec, data)[:, :32])
    with pytest.raises(BrokenFileError):
        shown(codec, bytes(broken))


def test_a_step_that_there_is_not_is_refused(codec: LearnedImage) -> None:
    out = io.BytesIO()
    real = codec.encode

    def encode(told: Signal, header: Any) -> Any:
        for frame in real(told, header):
            frame.payload = bytes([LEVELS]) + frame.payload[1:]
            yield frame

    codec.encode = encode  # type: ignore[method-assign]
    try:
        pack(codec, signal(drawn()), out)
    finally:
        del codec.encode
    with pytest.raises(BrokenFileError, match="a step or laws that there are not"):
        shown(codec, out.getvalue())


# how it learns ------------------------------------------------------------------------------------


class _Known(TransformCodec):
    """One grey level off, at three bits a pixel."""

    def forward(self, x: Any, past: Any = None, exact: Any = True, step: Any = 1.0) -> Any:
        return x + 1 / 255, torch.full((len(x),), 3.0 * x.shape[-1] * x.shape[-2])


def test_loss_is_error_over_the_square_of_the_step_and_bits_times_the_step() -> None:
    told = LearnedImage.scales["test"].settings
    module = _Known(3, 4, 4, 2, 2, 4, temporal=False)
    data: Data[Any] = Data([DeadLeaves(s, 48) for s in range(3)], [Cutting("rocket")])
    learner = PictureCodecLearner(module, told, data, Plan(10))
    x, steps, grid = learner.batch(0)
    assert x.shape == (2, 3, 32, 32) and not grid and learner.batch(8)[2]
    assert all(told.steps[0] <= step <= told.steps[1] for step in steps.flatten().tolist())
    torch.testing.assert_close(learner.batch(5)[0], learner.batch(5)[0])
    loss = learner.loss((x, steps, grid))
    wanted = sum((told.trade / s**2 + 3) * s * 32 * 32 for s in steps.flatten().tolist())
    assert float(loss.total) == pytest.approx(wanted, rel=1e-4)
    assert loss.weight == 2 * 32 * 32
    assert learner.validate()["bits_per_pixel"] == 3.0
    with pytest.raises(InvalidInputError, match="change side"):
        PictureCodecLearner(TransformCodec(3, 4, 4, 4, 2, 4), told, data, Plan(10))


def test_small_pictures_are_kept_and_large_ones_read_again() -> None:
    class Record:
        def __init__(self, side: int) -> None:
            self.side, self.read = side, 0

        def picture(self) -> torch.Tensor:
            self.read += 1
            return torch.zeros(3, self.side, self.side, dtype=torch.uint8)

    records = [Record(256), Record(512)]
    pictures = Pictures(records)
    assert [pictures[row].shape[1] for row in (0, 1, 0, 1)] == [256, 512, 256, 512]
    assert [record.read for record in records] == [1, 2]


def test_steps_scale_the_rounding() -> None:
    torch.manual_seed(0)
    module = TransformCodec(3, 4, 12, 2, 2, 4, temporal=False).eval()
    x = torch.rand(2, 3, 32, 32)
    each = [module(x, step=s)[0] for s in (0.25, 4.0)]
    both = module(x, step=torch.tensor([0.25, 4.0])[:, None, None, None])[0]
    torch.testing.assert_close(both, torch.stack([each[0][0], each[1][1]]))
    assert (each[0] - x).square().mean() < (each[1] - x).square().mean()


def test_pictures_to_learn_from_and_to_judge_by_are_apart() -> None:
    learnt, held_out = cuttings("train"), cuttings("held-out")
    assert not set(learnt) & set(held_out)
    assert not {cut.name for cut in (*learnt, *held_out)} & set(JUDGED)
    assert [cut.picture().shape[0] for cut in cuttings("judged")] == [3, 3, 3]
    assert Cutting("chelsea", 256, 256).picture().shape == (3, 44, 195)


def test_dead_leaves_have_detail_at_every_scale() -> None:
    assert torch.equal(DeadLeaves(3, 64).picture(), DeadLeaves(3, 64).picture())
    pictures = torch.stack([DeadLeaves(seed, 128).picture() for seed in range(4)]).double()
    power = torch.fft.rfft2(pictures.mean(1) - pictures.mean((1, 2, 3))[:, None, None]).abs() ** 2
    rows = torch.fft.fftfreq(128, 1 / 128)[:, None]
    radius = (rows**2 + torch.arange(65) ** 2).sqrt().round()
    octaves = [(4, 8), (8, 16), (16, 32)]
    levels = [float(power[:, (radius >= a) & (radius < b)].mean().log2()) for a, b in octaves]
    # about f^-2, as photographs have it: two to the second an octave, give or take
    falls = [a - b for a, b in pairwise(levels)]
    assert all(1.0 < fall < 3.5 for fall in falls), falls


def test_doors_know_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert trainable("learned-image") is LearnedImage
    with pytest.raises(Exception, match="lossless-image"):
        trainable("lossless-image")
    for name in "abc":
        write_pixels(tmp_path / f"{name}.png", drawn(3, 64, 64))
    made = ["train", "learned-image", "--scale", "test", "--data", str(tmp_path)]
    assert main([*made, "-o", str(tmp_path / "m"), "--steps", "2"]) == 0
    given = [str(tmp_path / "a.png"), "-o", str(tmp_path / "a.ist")]
    assert main(["encode", *given, "--model", str(tmp_path / "m")]) == 0
    back = ["decode", str(tmp_path / "a.ist"), "-o", str(tmp_path / "d.png")]
    assert main(back) == 2  # its model lies elsewhere
    assert main([*back, "--model", str(tmp_path / "m")]) == 0
    assert read_pixels(tmp_path / "d.png").shape == (3, 64, 64)
    assert main(["run", str(tmp_path / "m"), given[0]]) == 0
    assert "bytes" in capsys.readouterr().out
