"""Multi-resolution STFT loss."""

import numpy as np
import pytest
import scipy.signal
import torch

from isthmus.errors import InvalidInputError
from isthmus.objectives.mrstft import magnitude, mrstft


def test_magnitude_equals_scipy() -> None:
    x = torch.randn(4000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    window = np.pad(scipy.signal.get_window("hann", 240), (136, 136))
    padded = np.pad(x.numpy(), 256, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, 512)[::50] * window
    theirs = np.abs(np.fft.rfft(frames)).T
    ours = magnitude(x[None], 512, 50, 240)[0].numpy()
    np.testing.assert_allclose(ours, np.maximum(theirs, 1e-7**0.5), atol=1e-9)


def test_zero_on_identity_and_a_gradient_elsewhere() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4000, generator=generator)
    assert [float(v) for v in mrstft(x, x)] == [0.0, 0.0]
    y = (x + 0.1 * torch.randn(2, 4000, generator=generator)).requires_grad_()
    sum(mrstft(y, x)).backward()  # type: ignore[union-attr]
    assert y.grad is not None and torch.isfinite(y.grad).all() and y.grad.abs().sum() > 0
    silent = torch.zeros(1, 4000, requires_grad=True)
    sum(mrstft(silent, x[:1])).backward()  # type: ignore[union-attr]
    assert silent.grad is not None and torch.isfinite(silent.grad).all()


def test_the_high_band_ignores_low_frequencies() -> None:
    t = torch.arange(16000, dtype=torch.float64)
    x = torch.randn(1, 16000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    low = 0.2 * torch.sin(0.1 * t)[None]
    whole, high = sum(mrstft(x + low, x)), sum(mrstft(x + low, x, band=0.5))
    assert float(high) < 0.05 * float(whole)


def test_refusals() -> None:
    with pytest.raises(InvalidInputError, match="both sounds"):
        mrstft(torch.zeros(1, 3000), torch.zeros(1, 3001))
    with pytest.raises(InvalidInputError, match="at least 1025"):
        mrstft(torch.zeros(1, 1000), torch.zeros(1, 1000))
