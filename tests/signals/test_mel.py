"""Mel spectra and the way back to sound."""

import math

import pytest
import torch

from isthmus.errors import InvalidInputError
from isthmus.signals.mel import FLOOR, LEVEL, SPREAD, MelSpectrum

SPECTRUM = MelSpectrum(16_000, 171, 40)


def tone(samples: int) -> torch.Tensor:
    t = torch.arange(samples) / 16_000
    return 0.5 * torch.sin(2 * torch.pi * (300 + 400 * t) * t)


def test_a_sine_has_its_amplitude_in_its_band() -> None:
    hop, t = 171, torch.arange(171 * 12) / 16_000
    spectrum = MelSpectrum(16_000, hop, 40)
    found = spectrum._spectrum(0.5 * torch.sin(2 * torch.pi * 1000.0 * t)[None])
    assert found.shape == (1, spectrum.fft // 2 + 1, 12)
    assert float(found.abs()[0, 64, 6]) == pytest.approx(0.5, rel=1e-3)  # 64 x 16000 / 1024
    silent = spectrum(torch.zeros(1, hop * 3))
    assert torch.allclose(silent, torch.tensor((math.log(FLOOR) - LEVEL) / SPREAD))


def test_frames_come_back_as_sound_where_phases_are_known() -> None:
    x = tone(171 * 30)[None]
    back = SPECTRUM._overlapped(SPECTRUM._spectrum(x))
    assert back.shape == x.shape and torch.allclose(back, x, atol=1e-4)


def test_phases_are_found_that_give_the_spectrum_again() -> None:
    noise = torch.randn(171 * 40, generator=torch.Generator().manual_seed(0))
    mel = SPECTRUM(0.05 * noise[None] + tone(171 * 40))
    first, last = (SPECTRUM(SPECTRUM.sound(mel, rounds=rounds)) for rounds in (0, 32))
    assert float((last - mel).abs().mean()) < 0.6 * float((first - mel).abs().mean())
    assert not SPECTRUM.sound(torch.full((1, 40, 5), -9.0)).any()  # silence stays silence


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="multiples of 171"):
        SPECTRUM(torch.zeros(1, 172))
    with pytest.raises(InvalidInputError, match="1 or more"):
        MelSpectrum(16_000, 0, 40)
    with pytest.raises(InvalidInputError, match="too many"):
        MelSpectrum(16_000, 20, 80)
