"""Noise at a level, echo, lost bands."""

import pytest
import torch

from isthmus.errors import InvalidInputError
from isthmus.signals.augment import band_mask, echo, mix, remix, shift


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_mix_hits_the_ratio_of_every_row() -> None:
    clean, noise = torch.randn(3, 1000, generator=seeded()), torch.randn(3, 1000)
    wanted = torch.tensor([-5.0, 0.0, 20.0])
    scaled = mix(clean, noise, wanted)
    found = 10 * torch.log10(clean.square().mean(-1) / scaled.square().mean(-1))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    with pytest.raises(InvalidInputError, match="one shape"):
        mix(clean, noise[:, :5], 0.0)


def test_band_mask_removes_one_band_and_nothing_else() -> None:
    rows = torch.randn(2, 4000, generator=seeded())
    before = torch.fft.rfft(rows).abs()
    masked = band_mask(rows, 16000, seeded(1))
    after = torch.fft.rfft(masked).abs()
    gone = after < 1e-3 * before
    assert gone[0].any() and torch.equal(gone[0], gone[1])
    inside = gone[0].nonzero()[:, 0]
    assert len(inside) == inside[-1] - inside[0] + 1
    torch.testing.assert_close(after[~gone], before[~gone], rtol=1e-3, atol=1e-3)


def test_echo_keeps_the_past_and_adds_up() -> None:
    clean, noise = torch.zeros(1, 16000), torch.zeros(1, 16000)
    clean[0, 1000] = 1.0
    wet, rest = echo(clean, noise, 16000, seeded(1))
    assert torch.allclose(wet[0, :1000], torch.zeros(1000), atol=1e-6)
    assert torch.allclose(rest[0, : 1000 + 120], torch.zeros(1120), atol=1e-6)
    tail = wet[0] - clean[0]
    torch.testing.assert_close(9 * tail, rest[0], atol=1e-5, rtol=1e-3)  # a tenth stays
    early, late = rest[0, 1000:3000].abs().sum(), rest[0, 12000:].abs().sum()
    assert early > 3 * late > 0


def test_shift_cuts_windows_of_the_rows() -> None:
    tracks = torch.arange(40.0).expand(2, 3, 40)
    cut = shift(tracks, 10, seeded())
    assert cut.shape == (2, 3, 10) and (cut.diff(dim=-1) == 1).all()
    assert torch.equal(cut[0], cut[1]) and len(cut[0, :, 0].unique()) > 1
    apart = shift(tracks, 10, seeded(), together=False)
    assert not torch.equal(apart[0], apart[1])
    assert sorted(remix(torch.arange(5.0)[:, None], seeded()).flatten().tolist()) == [0, 1, 2, 3, 4]
