"""Waveforms: what is read, refused, resampled and written."""

from pathlib import Path

import numpy as np
import pytest
import scipy.signal
import torch

from isthmus.errors import BrokenFileError, InvalidInputError, IsthmusError
from isthmus.signals.audio import Waveform, fit, read, resample, write


def tone(hertz: float, rate: int, seconds: float = 1.0, channels: int = 1) -> Waveform:
    t = torch.arange(round(rate * seconds), dtype=torch.float64) / rate
    return Waveform((0.5 * torch.sin(2 * np.pi * hertz * t)).float().expand(channels, -1), rate)


@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_what_is_written_is_read(tmp_path: Path, suffix: str) -> None:
    wave = tone(440, 22050, channels=2)
    write(tmp_path / f"a.{suffix}", wave)
    back = read(tmp_path / f"a.{suffix}")
    assert back.rate == 22050 and back.samples.shape == (2, 22050)
    assert (back.samples - wave.samples).abs().max() < 2 / 32768
    assert [p.name for p in tmp_path.iterdir()] == [f"a.{suffix}"]


@pytest.mark.parametrize(("source", "target"), [(22050, 16000), (44100, 16000), (8000, 16000)])
def test_a_tone_keeps_its_pitch(source: int, target: int) -> None:
    ours = resample(tone(1000, source).samples, source, target)
    true = tone(1000, target).samples
    assert ours.shape == true.shape
    inner = slice(400, -400)
    assert (ours - true)[:, inner].abs().max() < 2e-3


def test_resampling_equals_scipy_within_the_band() -> None:
    rng = np.random.default_rng(0)
    low = scipy.signal.sosfiltfilt(
        scipy.signal.butter(12, 5000, fs=22050, output="sos"), rng.standard_normal(22050)
    )
    theirs = scipy.signal.resample_poly(low, 320, 441)
    ours = resample(torch.tensor(low.copy())[None], 22050, 16000)[0].numpy()
    error = np.square(ours - theirs)[200:-200].mean() / np.square(theirs).mean()
    assert ours.shape == theirs.shape and error < 1e-4


def test_what_lies_above_the_new_band_is_gone() -> None:
    assert resample(tone(10000, 44100).samples, 44100, 16000)[:, 400:-400].abs().max() < 1e-3


def test_a_stereo_file_is_made_to_fit() -> None:
    wave, changed = fit(tone(300, 44100, channels=2), 16000)
    assert wave.rate == 16000 and wave.samples.shape == (1, 16000)
    assert changed == ["2 channels averaged", "resampled from 44100 to 16000 Hz"]
    assert fit(tone(300, 16000), 16000)[1] == []
    with pytest.raises(InvalidInputError, match="44100 Hz and the model 16000 Hz"):
        fit(tone(300, 44100), 16000, resample=False)


def bad_files(folder: Path) -> dict[str, tuple[Path, type[IsthmusError], str]]:
    write(folder / "good.wav", tone(440, 16000))
    write(folder / "good.flac", tone(440, 16000))
    whole, flac = (folder / "good.wav").read_bytes(), (folder / "good.flac").read_bytes()
    files = {
        "zero.wav": (b"", InvalidInputError, "is empty"),
        "cut.wav": (whole[: len(whole) // 2], BrokenFileError, "cut off"),
        "cut.flac": (flac[: len(flac) // 2], BrokenFileError, "cut off"),
        "text.wav": (b"hello, this is no sound at all " * 9, BrokenFileError, "no sound file"),
        "header.wav": (whole[:44], IsthmusError, "holds no samples|cut off"),
    }
    found = {}
    for name, (data, error, words) in files.items():
        (folder / name).write_bytes(data)
        found[name] = (folder / name, error, words)
    found["missing"] = (folder / "missing.wav", BrokenFileError, "No such file")
    return found


@pytest.mark.parametrize(
    "name", ["zero.wav", "cut.wav", "cut.flac", "text.wav", "header.wav", "missing"]
)
def test_bad_files_are_refused_in_one_line(tmp_path: Path, name: str) -> None:
    path, error, words = bad_files(tmp_path)[name]
    with pytest.raises(error, match=words) as raised:
        read(path)
    assert "\n" not in str(raised.value) and path.name in str(raised.value)


def test_too_long_a_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    write(tmp_path / "a.wav", tone(440, 8000, seconds=3))
    with pytest.raises(InvalidInputError, match="claims 3 s"):
        read(tmp_path / "a.wav", limit_s=2)


def test_bad_samples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="finite"):
        Waveform(torch.tensor([[0.0, float("nan")]]), 16000)
    with pytest.raises(InvalidInputError, match="at least one sample"):
        Waveform(torch.zeros(1, 0), 16000)
    with pytest.raises(InvalidInputError, match="divide 16-bit"):
        Waveform(torch.zeros(1, 5, dtype=torch.int16), 16000)
    with pytest.raises(InvalidInputError, match="silent"):
        fit(Waveform(torch.zeros(1, 100), 16000), 16000)
    loud = Waveform(torch.full((1, 10), 1.5), 16000)
    with pytest.raises(InvalidInputError, match="beyond 1"):
        write(tmp_path / "a.wav", loud)
    write(tmp_path / "a.wav", loud, clip=True)
    assert read(tmp_path / "a.wav").samples.max() <= 1
    with pytest.raises(InvalidInputError, match="no known format"):
        write(tmp_path / "a.xyz", tone(440, 16000))
