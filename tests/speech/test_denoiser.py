"""The denoiser: its stream, its filters, its data, and what it does with files."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from isthmus.errors import InvalidInputError
from isthmus.metrics.speech import si_sdr
from isthmus.models.wave_enhancer import WaveEnhancer
from isthmus.signals.audio import Recording, Waveform, read, write
from isthmus.signals.augment import mix
from isthmus.signals.subtraction import spectral_subtraction
from isthmus.systems.speech.denoiser import Denoiser, Learner, Settings
from isthmus.testing import check_streaming
from isthmus.training.data import Data, Noisy
from isthmus.training.loop import Plan
from isthmus.training.system import train

TINY = Settings(4, 2, resample=1, layers=1, batch_size=4, segment_s=0.2)


def enhancer(settings: Settings) -> WaveEnhancer:
    torch.manual_seed(0)
    module = Denoiser(settings).module
    assert isinstance(module, WaveEnhancer)
    return module.double().eval()


def tones(count: int, length: int, seed: int) -> Data[Noisy]:
    """Tones in white noise."""
    generator = torch.Generator().manual_seed(seed)
    t = torch.arange(length) / 16000
    found = []
    for _ in range(count):
        hertz = 200 + 800 * torch.rand((), generator=generator)
        clean = 0.3 * torch.sin(2 * torch.pi * hertz * t)
        noise = mix(clean, torch.randn(length, generator=generator), 5.0)
        found.append(Noisy(Recording(samples=clean + noise), Recording(samples=clean)))
    return Data(found[4:], found[:4], "tones")


class Fixed:
    """A stream whose level is known."""

    def __init__(self, net: WaveEnhancer, level: torch.Tensor) -> None:
        self.net, self.level, self.lookahead = net, level, net.lookahead
        self.step, self.flush = net.step, net.flush

    def init_state(self, batch: int) -> object:
        return self.net.init_state(batch, self.level)


LONG = Settings(4, 2, 16, 8, resample=1)
"""Kernel and stride of the scale small."""


@pytest.mark.parametrize("settings", [TINY, LONG, Settings(4, 3, resample=4, zeros=8)])
@torch.no_grad()
def test_the_stream_gives_what_offline_gives(settings: Settings) -> None:
    net = enhancer(settings)
    sound = torch.randn(2, 3001, dtype=torch.float64)
    level = torch.tensor([[1.0], [0.2]], dtype=torch.float64)
    check_streaming(Fixed(net, level), sound, net(sound, level), tolerance=1e-10)
    check_streaming(net, sound, tolerance=1e-10)  # the running level, too, knows no packets


def test_the_check_of_streams_can_fail() -> None:
    net = enhancer(TINY)
    sound = torch.randn(1, 2000, dtype=torch.float64)
    with pytest.raises(AssertionError, match="one packet differs from offline"):
        check_streaming(net, sound, sound)

    forgetful = Fixed(net, torch.ones(1, 1, dtype=torch.float64))
    forgetful.step = lambda chunk, state: (net.step(chunk, forgetful.init_state(1))[0], state)
    with pytest.raises(AssertionError, match="packets give"):
        check_streaming(forgetful, sound)


@torch.no_grad()
def test_the_filters_keep_what_is_in_the_band() -> None:
    net = WaveEnhancer(enhancer(TINY).unet, factor=4, zeros=56)
    t = torch.arange(1600)
    x = torch.sin(0.3 * t)[None]
    padded = torch.nn.functional.pad(x, (56, 56))
    up = net.up(padded[:, None]).transpose(1, 2).flatten(1)
    inner = slice(400, -400)
    assert (up[0] - torch.sin(0.3 * torch.arange(6400) / 4))[inner].abs().max() < 1e-4
    down = net.down(torch.nn.functional.pad(up, (224, 224))[:, None])[0, 0]
    assert down.shape == (1600,) and (down - x[0])[inner].abs().max() < 1e-4


def test_nothing_beyond_the_lookahead_matters() -> None:
    net = enhancer(Settings(4, 2, resample=2, zeros=4))
    x = torch.randn(1, 400, dtype=torch.float64, requires_grad=True)
    for sample in (100, 101, 163):
        (gradient,) = torch.autograd.grad(net(x, torch.ones(1, 1))[0, sample], x)
        assert int(gradient[0].nonzero().max()) - sample <= net.lookahead < 60


@torch.no_grad()
def test_silence_and_single_samples() -> None:
    net = enhancer(TINY)
    for length in (1, 2, 15, 16, 17, 5000):
        out = net(torch.zeros(1, length, dtype=torch.float64))
        assert out.shape == (1, length) and torch.isfinite(out).all() and out.abs().max() < 1e-2
    assert net.flush(net.init_state(1)).shape == (1, 0)


def test_batches_follow_from_their_number_and_change_their_noise() -> None:
    data = tones(8, 6000, 0)
    settings = replace(TINY, band_mask=0.0)
    learner = Learner(Denoiser(settings), data, Plan(10))
    noisy, clean, weight = learner.batch(3)
    again = learner.batch(3)
    assert torch.equal(noisy, again[0]) and noisy.shape == clean.shape == (4, 3200)
    assert weight == settings.stft_weight and not torch.equal(noisy, learner.batch(4)[0])
    late = replace(TINY, stft_from=0.5)
    weights = [Learner(Denoiser(late), data, Plan(10)).batch(p)[2] for p in range(10)]
    assert weights == [0.0] * 5 + [0.1] * 5


def test_tones_are_cleaned_and_files_are_run(tmp_path: Path) -> None:
    data = tones(12, 6000, 0)
    plan = Plan(60, learning_rate=1e-2, validate_every=60)
    settings = replace(TINY, hidden=8, stft_weight=0.0)
    made = train(Denoiser, data, settings, plan, out=tmp_path / "system")
    noisy, clean = (r.at(16000) for r in data.valid[0])
    before = float(si_sdr(noisy, clean))
    assert made.record["validation"][-1]["si_sdr_db"] > before + 5
    write(tmp_path / "in.wav", Waveform(noisy.expand(2, -1) * 0.9, 44100))
    answer = Denoiser.from_pretrained(tmp_path / "system").run(str(tmp_path / "in.wav"))
    assert answer.record["changed"] == ["2 channels averaged", "resampled from 44100 to 16000 Hz"]
    assert answer.save is not None
    answer.save(tmp_path / "out.wav")
    out = read(tmp_path / "out.wav")
    assert out.rate == 16000 and abs(out.duration_s - 6000 / 44100) < 1e-3
    write(tmp_path / "silent.wav", Waveform(torch.zeros(1, 16000), 16000))
    with pytest.raises(InvalidInputError, match="is silent"):
        made.run(str(tmp_path / "silent.wav"))


def test_spectral_subtraction_helps_a_tone() -> None:
    noisy, clean = (r.at(16000) for r in tones(5, 16000, 1).valid[0])
    gated = clean * (torch.arange(16000) > 6000)
    found = spectral_subtraction(noisy - clean + gated)
    assert si_sdr(found, gated) > si_sdr(noisy - clean + gated, gated) + 3
