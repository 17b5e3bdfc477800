"""Noise reduction by spectral subtraction, the classical baseline."""

from __future__ import annotations

import torch


def spectral_subtraction(
    noisy: torch.Tensor, quiet: float = 0.2, over: float = 2.0
) -> torch.Tensor:
    """The spectrum of the quietest frames is taken from all; after Boll, 1979.

    Args:
        noisy: [N].
        quiet: Share of the frames that count as noise.
        over: By what their power is multiplied.

    Returns:
        [N].
    """
    window = torch.hann_window(512)
    spectrum = torch.stft(noisy, 512, 128, window=window, return_complex=True)
    power = spectrum.abs().square()  # [F, T]
    frames = power.sum(0).argsort()[: max(1, round(quiet * power.shape[1]))]
    noise = over * power[:, frames].mean(1, keepdim=True)
    gain = (1 - noise / power.clamp(min=1e-12)).clamp(min=0.01).sqrt()
    return torch.istft(gain * spectrum, 512, 128, window=window, length=len(noisy))
