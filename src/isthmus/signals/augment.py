"""Changes of sound that make training data of it: noise at a level, echo, lost bands, other noise.

All draw from a generator that is passed, and work on rows [B, N] of one rate.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from isthmus.errors import InvalidInputError


def mix(clean: torch.Tensor, noise: torch.Tensor, snr_db: torch.Tensor | float) -> torch.Tensor:
    """Noise scaled to a ratio of signal to noise, to be added to the clean signal.

    Args:
        clean: [..., N].
        noise: The same shape, not silent.
        snr_db: The ratio in decibels, one or [...].

    Returns:
        The scaled noise [..., N].

    Raises:
        InvalidInputError: The shapes differ.

    Example:
        >>> mix(torch.ones(4), torch.tensor([1.0, -1.0, 1.0, -1.0]), 20.0)
        tensor([ 0.1000, -0.1000,  0.1000, -0.1000])
    """
    if clean.shape != noise.shape:
        raise InvalidInputError(
            f"signal and noise have one shape, got {list(clean.shape)} and {list(noise.shape)}"
        )
    ratio = torch.as_tensor(snr_db, dtype=clean.dtype, device=clean.device)[..., None]
    power = clean.square().mean(-1, keepdim=True) / 10 ** (ratio / 10)
    return noise * (power / noise.square().mean(-1, keepdim=True).clamp(min=1e-20)).sqrt()


def remix(noise: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The noises of a batch [B, N] in another order."""
    return noise[torch.randperm(len(noise), generator=generator)]


def shift(
    tracks: torch.Tensor, length: int, generator: torch.Generator, *, together: bool = True
) -> torch.Tensor:
    """Cut a window of ``length`` at a random place out of every row.

    Args:
        tracks: [S, B, N]: S tracks, clean and noise, say, of B rows.
        length: Samples of the window.
        generator: Source of the draws.
        together: Whether the tracks of a row share their place.

    Returns:
        [S, B, length].
    """
    sources, batch, whole = tracks.shape
    if not 0 < length <= whole:
        raise InvalidInputError(f"a window of {length} samples does not fit into {whole}")
    count = (1 if together else sources, batch)
    start = torch.randint(whole - length + 1, count, generator=generator)
    index = start[..., None] + torch.arange(length)
    return tracks.gather(-1, index.expand(sources, batch, length).to(tracks.device))


def band_mask(
    tracks: torch.Tensor, rate: int, generator: torch.Generator, *, share: float = 0.2
) -> torch.Tensor:
    """Take one band, of up to ``share`` of the mel scale, out of all rows [..., N]."""
    top = 1127 * math.log1p(rate / 2 / 700)
    width = share * float(torch.rand((), generator=generator))
    start = (1 - width) * float(torch.rand((), generator=generator))
    low, high = (700 * math.expm1(top * at / 1127) for at in (start, start + width))
    length = tracks.shape[-1]
    frequency = torch.fft.rfftfreq(length, 1 / rate, device=tracks.device)
    kept = (frequency < low) | (frequency >= high)
    masked: torch.Tensor = torch.fft.irfft(torch.fft.rfft(tracks) * kept, length)
    return masked


def echo(
    clean: torch.Tensor,
    noise: torch.Tensor,
    rate: int,
    generator: torch.Generator,
    *,
    first_delay_s: tuple[float, float] = (0.01, 0.03),
    rt60_s: tuple[float, float] = (0.3, 1.3),
    gain: float = 0.3,
    trains: int = 3,
    jitter: float = 0.1,
    keep_clean: float = 0.1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Echo trains of a room on signal and noise, the same for all rows.

    An echo returns after a delay, weaker each time, until 60 dB are gone (``rt60_s``). Of the echo
    of the clean signal a part stays in it; the rest counts as noise, to be removed.

    Args:
        clean: [B, N].
        noise: [B, N].
        rate: In Hz.
        generator: Source of the draws.
        first_delay_s: Range of the delay of the first echo.
        rt60_s: Range of the time after which an echo has lost 60 dB.
        gain: Largest gain of the first echo.
        trains: Echo trains.
        jitter: How far each echo may stray from its place, as a share of the delay.
        keep_clean: Part of the echo of the clean signal that stays in the clean signal.

    Returns:
        Clean and noise [B, N].
    """

    def draw(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    first, fade, loud = draw(*first_delay_s), draw(*rt60_s), draw(0.0, gain)
    length = clean.shape[-1]
    room = clean.new_zeros(length)
    for _ in range(trains):
        delay = max(draw(1 - jitter, 1 + jitter) * first, 1 / rate)
        at, level = 0.0, loud / trains
        for _ in range(math.ceil(fade / delay)):
            at += delay * draw(1 - jitter, 1 + jitter)
            level *= 10 ** (-3 * delay / fade)
            if at * rate >= length:
                break
            room[int(at * rate)] += level
    echoed = _convolve(torch.stack([clean, noise]), room)
    return clean + keep_clean * echoed[0], noise + echoed[1] + (1 - keep_clean) * echoed[0]


def _convolve(tracks: torch.Tensor, room: torch.Tensor) -> torch.Tensor:
    """Causal convolution along the last dimension, cut to the same length."""
    size = 2 * tracks.shape[-1]
    spectrum = torch.fft.rfft(tracks, size) * torch.fft.rfft(F.pad(room, (0, len(room))), size)
    found: torch.Tensor = torch.fft.irfft(spectrum, size)[..., : tracks.shape[-1]]
    return found
