"""Distances of sounds by hand, delays, and what classical coders leave."""

import math

import pytest
import torch

from isthmus.codecs.audio_peers import through
from isthmus.errors import InvalidInputError, UnknownNameError
from isthmus.metrics.sound import aligned, log_mel_distance, mel_cepstral_distance


def tone(seconds: float = 1.0) -> torch.Tensor:
    t = torch.arange(round(16000 * seconds)) / 16000
    return 0.3 * torch.sin(2 * torch.pi * (200 + 300 * t) * t)


def test_a_louder_sound_is_as_far_as_it_is_louder() -> None:
    x = torch.randn(8000, generator=torch.Generator().manual_seed(0))
    assert log_mel_distance(x, x) == 0.0
    assert log_mel_distance(2 * x, x) == pytest.approx(6.0206, abs=1e-3)
    with pytest.raises(InvalidInputError, match="silent"):
        log_mel_distance(x, torch.zeros(8000))


def test_cepstra_are_those_of_a_discrete_cosine_transform() -> None:
    from scipy.fft import dct  # type: ignore[import-untyped]

    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(40, 7, generator=draw) for _ in range(2))
    moved = dct((a - b).double().numpy(), type=2, axis=0) / 40  # 2 sum over m of L cos, over M
    by_hand = 10 / math.log(10) * ((2 * moved[1:14] ** 2).sum(0) ** 0.5).mean()
    assert mel_cepstral_distance(a, b) == pytest.approx(by_hand, rel=1e-6)
    assert mel_cepstral_distance(a + 3.0, a) == pytest.approx(0.0, abs=1e-5)  # louder, only
    for x, y, order in ((a, b[:, :3], 13), (a[0], b[0], 13), (a, b, 40)):
        with pytest.raises(InvalidInputError, match=r"spectra|bands"):
            mel_cepstral_distance(x, y, order)


@pytest.mark.parametrize("late", [-37, 0, 5, 400])
def test_delays_are_found(late: int) -> None:
    x = torch.randn(3000, generator=torch.Generator().manual_seed(0))
    moved = torch.cat([torch.zeros(late), x]) if late >= 0 else x[-late:]
    a, b, found = aligned(moved, x)
    assert found == late and torch.equal(a, b)


@pytest.mark.parametrize(("name", "kbps"), [("opus", 12), ("mp3", 16)])
def test_classical_coders_give_the_sound_back(name: str, kbps: float) -> None:
    pytest.importorskip("av")
    x = tone(2.0)
    heard = through(name, x, 16000, kbps)
    assert heard.samples.shape == x.shape
    assert heard.packet_bytes < heard.file_bytes
    assert 0.4 * kbps < heard.packet_bytes * 8 / 2000 < 2 * kbps
    assert log_mel_distance(heard.samples, x) < 15
    with pytest.raises(UnknownNameError, match="coder of sound"):
        through("vorbs", x, 16000, 8)
