"""Features of sound: log-mel spectrograms in the styles that recognisers were trained on."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

import torch
from torch.nn import functional as F

from isthmus.errors import InvalidInputError, UnknownNameError

Style = Literal["whisper", "nemo"]

RATE, HOP = 16_000, 160

LEVEL, SPREAD = -9.0, 4.0
"""Mean and deviation of log-mel bands of the workbench's speech, ``nemo``, roughly."""


@lru_cache(maxsize=8)
def mel_filters(n_mels: int, n_fft: int, rate: int = RATE) -> torch.Tensor:
    """Triangles on Slaney's mel scale, each of area 1 in Hz / 2, float64 [M, n_fft / 2 + 1].

    The scale is linear, 200/3 Hz a mel, below 1 kHz, then logarithmic, ln(6.4)/27 a mel.

    Example:
        >>> mel_filters(80, 400).sum(0)[:2]
        tensor([0.0000, 0.0269], dtype=torch.float64)
    """
    step, knee = 200 / 3, 15.0
    top = knee + 27 * math.log(rate / 2 / 1000) / math.log(6.4)
    mels = torch.linspace(0, top, n_mels + 2, dtype=torch.float64)
    above = 1000 * torch.exp((mels - knee) * math.log(6.4) / 27)
    hertz = torch.where(mels < knee, mels * step, above)  # [M + 2]
    bins = torch.linspace(0, rate / 2, n_fft // 2 + 1, dtype=torch.float64)
    low, middle, high = hertz[:-2, None], hertz[1:-1, None], hertz[2:, None]
    rising, falling = (bins - low) / (middle - low), (high - bins) / (high - middle)
    return torch.minimum(rising, falling).clamp(min=0) * 2 / (high - low)


class LogMel:
    """Log-mel features, 100 frames a second.

    ``whisper``: power through the filters, log10, at most 8 below the utterance's maximum, shifted
    to about [-1, 1]; sound is padded to 30 s where asked. ``nemo``: pre-emphasis, natural log, and
    every band at mean 0 and deviation 1 over the utterance unless ``normalise`` says otherwise, as
    streams need it.

    Args:
        style: ``whisper`` or ``nemo``.
        n_mels: Bands M.
        normalise: ``nemo`` only: whether bands are normalised over the utterance; ``fixed`` brings
            them near mean 0 and deviation 1 by two constants, which needs no utterance.

    Raises:
        UnknownNameError: There is no such style.

    Example:
        >>> features, frames = LogMel("nemo")(torch.randn(2, 16000), torch.tensor([16000, 8000]))
        >>> features.shape, frames.tolist()
        (torch.Size([2, 80, 101]), [101, 51])
    """

    def __init__(
        self, style: Style = "nemo", n_mels: int = 80, *, normalise: bool | Literal["fixed"] = True
    ) -> None:
        if style not in ("whisper", "nemo"):
            raise UnknownNameError("style of features", style, ("whisper", "nemo"))
        self.style, self.n_mels, self.normalise = style, n_mels, normalise
        self.filters = mel_filters(n_mels, 400 if style == "whisper" else 512).float()

    def __call__(
        self, samples: torch.Tensor, lengths: torch.Tensor, *, pad_to: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Features of a batch.

        Args:
            samples: float32 [B, N] at 16 kHz; what lies beyond a row's length does not matter.
            lengths: int64 [B], at least 1.
            pad_to: Samples to which rows are padded with silence first; 480,000 for Whisper.

        Returns:
            Features [B, M, F], 0 beyond each row (``nemo``), and valid frames [B].

        Raises:
            InvalidInputError: A length is below 1 or beyond the samples.
        """
        if int(lengths.min()) < 1 or int(lengths.max()) > samples.shape[1]:
            raise InvalidInputError(
                f"lengths are from 1 to {samples.shape[1]}, got {lengths.tolist()}"
            )
        if pad_to:
            samples = F.pad(samples, (0, max(0, pad_to - samples.shape[1])))
        inside = torch.arange(samples.shape[1], device=samples.device) < lengths[:, None]
        samples = samples * inside
        filters = self.filters.to(samples)
        if self.style == "whisper":
            return self._whisper(samples, filters), -(-lengths // HOP)
        return self._nemo(samples, inside, lengths, filters)

    def _whisper(self, samples: torch.Tensor, filters: torch.Tensor) -> torch.Tensor:
        window = torch.hann_window(400, device=samples.device)
        spectrum = torch.stft(samples, 400, HOP, window=window, return_complex=True)
        power = spectrum[..., :-1].abs() ** 2  # [B, 201, F]
        log = (filters @ power).clamp(min=1e-10).log10()
        log = torch.maximum(log, log.amax((1, 2), keepdim=True) - 8.0)
        features: torch.Tensor = (log + 4.0) / 4.0
        return features

    def _nemo(
        self,
        samples: torch.Tensor,
        inside: torch.Tensor,
        lengths: torch.Tensor,
        filters: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        emphasised = torch.cat([samples[:, :1], samples[:, 1:] - 0.97 * samples[:, :-1]], 1)
        window = torch.hann_window(400, periodic=False, device=samples.device)
        spectrum = torch.stft(
            emphasised * inside,
            512,
            HOP,
            400,
            window,
            pad_mode="constant",
            return_complex=True,
        )
        power = spectrum.real.square() + spectrum.imag.square()
        log = (filters @ power + 2**-24).log()  # [B, M, F]
        frames = lengths // HOP + 1
        valid = (torch.arange(log.shape[2], device=log.device) < frames[:, None])[:, None]
        if self.normalise == "fixed":
            log = (log - LEVEL) / SPREAD
        elif self.normalise:
            count = frames[:, None, None]
            mean = (log * valid).sum(2, keepdim=True) / count
            square = ((log - mean).square() * valid).sum(2, keepdim=True)
            log = (log - mean) / ((square / (count - 1).clamp(min=1)).sqrt() + 1e-5)
        return log * valid, frames
