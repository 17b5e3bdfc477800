"""Log-mel spectra of speech that can be made sound again, by Griffin and Lim's phases.

::

    [B, N] ─▶ frames of four hops ─▶ magnitudes ─▶ mel bands ─▶ log, near mean 0 ─▶ [B, M, N / hop]
    [B, M, F] ─▶ bands undone ─▶ magnitudes ─▶ phases that fit each other ─▶ [B, F hop]

After D. Griffin and J. Lim, "Signal estimation from modified short-time Fourier transform", 1984,
with the momentum of N. Perraudin and others, 2013.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from isthmus.errors import InvalidInputError
from isthmus.signals.features import mel_filters

FLOOR = 1e-4
"""Magnitude below which a band counts as silent; a sine of amplitude 1 has magnitude 1."""

LEVEL, SPREAD = -6.5, 2.0
"""Mean and deviation of the log magnitudes of the workbench's speech, roughly."""


class MelSpectrum:
    """Log-mel spectra with exactly one frame a hop, and the way back.

    Windows are Hann's, four hops long, about the middle of their hop, with silence around the
    sound.

    Args:
        rate: Hz of the sounds.
        hop: Samples of a frame.
        n_mels: Bands M.

    Raises:
        InvalidInputError: No band, no hop, or bands so narrow that one holds nothing.

    Example:
        >>> spectrum = MelSpectrum(16_000, 160, 40)
        >>> spectrum(torch.zeros(1, 1600)).shape, spectrum.fft
        (torch.Size([1, 40, 10]), 1024)
    """

    def __init__(self, rate: int, hop: int, n_mels: int) -> None:
        if rate < 1 or hop < 1 or n_mels < 1:
            raise InvalidInputError(
                f"rate, hop and bands are 1 or more, got {rate}, {hop} and {n_mels}"
            )
        self.rate, self.hop, self.n_mels, self.size = rate, hop, n_mels, 4 * hop
        self.fft = 1 << (self.size - 1).bit_length()
        filters = mel_filters(n_mels, self.fft, rate)
        if not (filters.amax(1) > 0).all():
            raise InvalidInputError(
                f"{n_mels} bands are too many for windows of {self.size} samples at {rate} Hz"
            )
        self.filters = (filters / filters.sum(1, keepdim=True)).float()  # [M, fft / 2 + 1]
        self.inverse = torch.linalg.pinv(self.filters.double()).float()
        self.window = torch.hann_window(self.size)

    def __call__(self, x: Tensor) -> Tensor:
        """Log-mel frames [B, M, N / hop] of sounds [B, N].

        Raises:
            InvalidInputError: N is no multiple of the hop.
        """
        if x.shape[-1] % self.hop or not x.shape[-1]:
            raise InvalidInputError(
                f"sounds are multiples of {self.hop} samples, got {x.shape[-1]}; pad them"
            )
        bands = self.filters.to(x) @ self._spectrum(x).abs()
        return (bands.clamp(min=FLOOR).log() - LEVEL) / SPREAD

    def natural(self, mel: Tensor) -> Tensor:
        """Natural logs of magnitudes, not brought near mean 0: what distances are measured on."""
        return (mel * SPREAD + LEVEL).clamp(min=math.log(FLOOR))

    def sound(self, mel: Tensor, *, rounds: int = 32, momentum: float = 0.9) -> Tensor:
        """A sound whose frames come near these.

        Phases begin as those of the first transform of a spectrum of phase 0, so equal frames give
        equal sounds.

        Args:
            mel: [B, M, F].
            rounds: Of Griffin and Lim's projections.
            momentum: 0 is the original.

        Returns:
            [B, F hop].
        """
        level = (mel * SPREAD + LEVEL).clamp(max=3.0).exp()
        level = torch.where(level > 1.5 * FLOOR, level, 0.0)
        magnitude = (self.inverse.to(mel) @ level).clamp(min=0.0)  # [B, fft / 2 + 1, F]
        # a phase that goes on from frame to frame as a steady tone's does
        bins = torch.arange(magnitude.shape[1], device=mel.device, dtype=torch.float64)
        turn = bins[:, None] * torch.arange(magnitude.shape[2], device=mel.device) * self.hop
        angle = (2 * math.pi / self.fft * (turn % self.fft)).to(mel.dtype)
        phase = torch.polar(torch.ones_like(angle), angle).expand_as(magnitude)
        before = torch.zeros_like(phase)
        for _ in range(rounds):
            rebuilt = self._spectrum(self._overlapped(magnitude * phase))
            moved = rebuilt + momentum * (rebuilt - before)
            before = rebuilt
            phase = moved / moved.abs().clamp(min=1e-9)
        return self._overlapped(magnitude * phase)

    def _spectrum(self, x: Tensor) -> Tensor:
        """Complex spectra [B, fft / 2 + 1, F], a sine of amplitude 1 at magnitude 1."""
        left = (self.size - self.hop) // 2
        padded = F.pad(x, (left, self.size - self.hop - left))
        window = self.window.to(x)
        frames = padded.unfold(-1, self.size, self.hop) * (window * (2 / window.sum()))
        spectrum: Tensor = torch.fft.rfft(frames, self.fft)
        return spectrum.transpose(-1, -2)

    def _overlapped(self, spectrum: Tensor) -> Tensor:
        """The sound [B, F hop] whose windowed frames are nearest to these by squares."""
        window = self.window.to(spectrum.real)
        count = spectrum.shape[-1]
        frames = torch.fft.irfft(spectrum.transpose(-1, -2), self.fft)[..., : self.size]
        frames = frames * (window * (window.sum() / 2))

        def added(parts: Tensor) -> Tensor:
            total = count * self.hop + self.size - self.hop
            shape = {"output_size": (1, total), "kernel_size": (1, self.size)}
            return F.fold(parts.transpose(-1, -2), stride=(1, self.hop), **shape)[:, 0, 0]

        weight = added(window.square().expand(1, count, -1)).clamp(min=1e-3)
        left = (self.size - self.hop) // 2
        y: Tensor = (added(frames) / weight)[:, left : left + count * self.hop]
        return y
