"""How far decoded sound is from what was coded."""

from __future__ import annotations

import math

import torch

from isthmus.errors import InvalidInputError
from isthmus.signals.features import mel_filters


def log_mel_distance(estimate: torch.Tensor, truth: torch.Tensor, rate: int = 16_000) -> float:
    """Distance of mel spectra in decibels: over the bands of a frame by squares, then the mean.

    Spectra of 64 bands from windows of 32 ms every 8 ms; power more than 60 dB below the loudest
    band of the truth counts as 60 dB below.

    Args:
        estimate: [N].
        truth: [N], not silent.
        rate: Hz.

    Returns:
        Decibels; 0 for equal sounds.

    Raises:
        InvalidInputError: The lengths differ, or the truth is silent.

    Example:
        >>> x = torch.randn(8000)
        >>> log_mel_distance(x, x), round(log_mel_distance(x / 10**0.5, x), 2)
        (0.0, 10.0)
    """
    if estimate.shape != truth.shape or truth.ndim != 1:
        raise InvalidInputError(
            f"both sounds are [N], got {list(estimate.shape)} and {list(truth.shape)}"
        )
    if not truth.any():
        raise InvalidInputError("a silent sound has no log-mel distance; leave it out")
    size = 1 << round(0.032 * rate).bit_length() - 1
    found = torch.stack([estimate, truth]).double()
    window = torch.hann_window(size, dtype=torch.float64)
    spectrum = torch.stft(found, size, size // 4, window=window, return_complex=True)
    power = mel_filters(64, size, rate) @ spectrum.abs().square()  # [2, M, T]
    decibels = 10 * power.clamp(min=float(power[1].max()) * 1e-6).log10()
    return float((decibels[0] - decibels[1]).square().mean(0).sqrt().mean())


def mel_cepstral_distance(estimate: torch.Tensor, truth: torch.Tensor, order: int = 13) -> float:
    """Distance of mel cepstra in decibels, frame by frame, then the mean; loudness does not count.

    ``10 / ln 10 sqrt(2 sum over d of (c_d - c'_d)^2)`` for d from 1 to the order, with
    ``c_d = 2 / M sum over m of L_m cos(pi d (m + 1/2) / M)`` (Kubichek, 1993).

    Args:
        estimate: L, natural logs of the magnitudes of mel bands, [M, T].
        truth: The same shape.
        order: Cepstra, below M.

    Returns:
        Decibels; 0 for equal spectra.

    Raises:
        InvalidInputError: The shapes differ, there is no frame, or there are too few bands.

    Example:
        >>> wave = torch.cos(torch.pi * 3 * (torch.arange(40) + 0.5) / 40)[:, None]
        >>> round(mel_cepstral_distance(wave, 0 * wave), 3)  # c_3 is off by 1: 10 sqrt(2) / ln 10
        6.142
    """
    if estimate.shape != truth.shape or truth.ndim != 2 or not truth.shape[1]:
        raise InvalidInputError(
            f"both spectra are [M, T], got {list(estimate.shape)} and {list(truth.shape)}"
        )
    bands = len(truth)
    if not 1 <= order < bands:
        raise InvalidInputError(f"{bands} bands give cepstra 1 to {bands - 1}, not {order}")
    place = torch.arange(bands, dtype=torch.float64) + 0.5
    cosines = torch.cos(torch.pi / bands * place * torch.arange(1, order + 1)[:, None])
    apart = 2 / bands * cosines @ (estimate.double() - truth.double())  # [order, T]
    return float(10 / math.log(10) * (2 * apart.square().sum(0)).sqrt().mean())


def aligned(
    estimate: torch.Tensor, truth: torch.Tensor, most: int = 4000
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Two sounds where they overlap, the first moved to where it fits best.

    A delay of one sample ruins a ratio of signal to distortion, and coders have delays.

    Args:
        estimate: [N].
        truth: [M].
        most: Longest delay, to either side, in samples.

    Returns:
        Both, of one length; and how much later the estimate was.

    Raises:
        InvalidInputError: Nothing is left of one of them.

    Example:
        >>> x = torch.randn(900)
        >>> a, b, late = aligned(torch.cat([torch.zeros(7), x]), x)
        >>> torch.equal(a, b), late
        (True, 7)
    """
    length = len(estimate) + len(truth)
    spectra = torch.fft.rfft(estimate.double(), length), torch.fft.rfft(truth.double(), length)
    fit = torch.fft.irfft(spectra[0] * spectra[1].conj(), length)
    most = min(most, length // 2 - 1)
    lags = torch.cat([torch.arange(most + 1), torch.arange(-most, 0)])
    late = int(lags[fit[lags].argmax()])
    a, b = (estimate[late:], truth) if late >= 0 else (estimate, truth[-late:])
    both = min(len(a), len(b))
    if not both:
        raise InvalidInputError("the sounds have no sample in common")
    return a[:both], b[:both], late
