"""Multi-resolution STFT loss: two sounds are near if their spectra are, at several window lengths.

After Yamamoto et al., "Parallel WaveGAN", 2020 (arXiv 1910.11480).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from isthmus.errors import InvalidInputError

RESOLUTIONS = ((512, 50, 240), (1024, 120, 600), (2048, 240, 1200))
"""FFT size, hop and window of each resolution, for 16 kHz."""


def magnitude(x: torch.Tensor, size: int, hop: int, window: int) -> torch.Tensor:
    """Magnitude of the STFT with a Hann window, never below sqrt(1e-7), [B, F, T]."""
    hann = torch.hann_window(window, dtype=x.dtype, device=x.device)
    spectrum = torch.stft(x, size, hop, window, hann, return_complex=True)
    power = spectrum.real.square() + spectrum.imag.square()
    return power.clamp(min=1e-7).sqrt()


def mrstft(
    estimate: torch.Tensor,
    truth: torch.Tensor,
    *,
    resolutions: Sequence[tuple[int, int, int]] = RESOLUTIONS,
    band: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Spectral convergence and log-magnitude distance, each averaged over the resolutions.

    ``|| |S| - |S'| ||_F / || |S| ||_F`` over all rows, and the mean of ``|log |S| - log |S'||``.

    Args:
        estimate: Sound [B, N], longer than half the largest FFT.
        truth: The same shape.
        resolutions: FFT size, hop and window of each.
        band: Share of the lowest bins that are left out; 0.5 is the loss of the high band.

    Returns:
        The two losses, scalars.

    Raises:
        InvalidInputError: The shapes differ, or the sound is too short.

    Example:
        >>> x = torch.randn(1, 4000)
        >>> [round(float(loss), 3) for loss in mrstft(2 * x, x)]
        [1.0, 0.693]
    """
    if estimate.shape != truth.shape or estimate.ndim != 2:
        raise InvalidInputError(
            f"both sounds are [B, N], got {list(estimate.shape)} and {list(truth.shape)}"
        )
    needed = max(size for size, _, _ in resolutions) // 2 + 1
    if estimate.shape[1] < needed:
        raise InvalidInputError(f"the sound needs at least {needed} samples for the largest FFT")
    convergence, distance = estimate.new_zeros(2)
    for size, hop, window in resolutions:
        ours, true = (magnitude(x, size, hop, window) for x in (estimate, truth))
        start = round(band * ours.shape[1])
        ours, true = ours[:, start:], true[:, start:]
        convergence = convergence + (true - ours).norm() / true.norm()
        distance = distance + (true.log() - ours.log()).abs().mean()
    return convergence / len(resolutions), distance / len(resolutions)
