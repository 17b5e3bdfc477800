"""Sound: waveforms read, checked, resampled and written.

Reading goes through libsndfile (package ``soundfile``, the extra ``speech``). What is unusable is
refused in one line: a file that is cut off, empty, not a number, silent, or too long.
"""

from __future__ import annotations

import math
import os
import tempfile
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from isthmus.errors import BrokenFileError, InvalidInputError, require

SILENCE = 1e-5
"""A waveform whose loudest sample is below this is silent; one step of 16 bits is 3e-5."""


@dataclass(frozen=True)
class Waveform:
    """Sampled sound.

    Attributes:
        samples: float32 [C, N], nominally within [-1, 1].
        rate: Samples a second.

    Raises:
        InvalidInputError: No samples, samples that are no finite numbers, another shape or type,
            or a rate below 1.

    Example:
        >>> Waveform(torch.zeros(2, 8000), 16000).duration_s
        0.5
    """

    samples: torch.Tensor
    rate: int

    def __post_init__(self) -> None:
        shape = list(self.samples.shape)
        if self.samples.dtype != torch.float32 or len(shape) != 2:
            raise InvalidInputError(
                f"a waveform is float32 [channels, samples], got {self.samples.dtype} {shape}; "
                "divide 16-bit samples by 32768"
            )
        if not self.samples.numel():
            raise InvalidInputError(f"a waveform has at least one sample, got {shape}")
        if not torch.isfinite(self.samples).all():
            raise InvalidInputError("a waveform has finite samples only; some are NaN or infinite")
        if self.rate < 1:
            raise InvalidInputError(f"the rate is at least 1 Hz, got {self.rate}")

    @property
    def duration_s(self) -> float:
        """Seconds."""
        return self.samples.shape[1] / self.rate

    def mono(self) -> Waveform:
        """The mean of the channels."""
        return Waveform(self.samples.mean(0, keepdim=True), self.rate)

    def at(self, rate: int) -> Waveform:
        """The same sound at another rate."""
        return Waveform(resample(self.samples, self.rate, rate), rate)


@dataclass(frozen=True, repr=False)
class Recording:
    """A record to train on: a sound file that is read when it is needed, or samples in memory.

    Attributes:
        path: The file.
        samples: float32 [N], where there is no file.
        rate: Rate of the samples; a file knows its own.
    """

    path: Path | None = None
    samples: torch.Tensor | None = None
    rate: int = 16_000

    def __repr__(self) -> str:
        """What decides the sound, for fingerprints."""
        if self.samples is not None:
            return f"{zlib.crc32(self.samples.numpy().tobytes()):08x}/{len(self.samples)}"
        assert self.path is not None
        return f"{self.path.name}/{self.path.stat().st_size}"

    @property
    def duration_s(self) -> float:
        """Seconds; a file is opened but not read.

        Raises:
            BrokenFileError: The file cannot be opened as sound.
        """
        if self.samples is not None:
            return len(self.samples) / self.rate
        soundfile: Any = require("soundfile", "speech")
        try:
            return float(soundfile.info(str(self.path)).duration)
        except (OSError, RuntimeError) as error:
            raise BrokenFileError(f"{self.path} cannot be read as sound ({error})") from error

    def at(self, rate: int) -> torch.Tensor:
        """One channel [N] at a rate.

        Raises:
            BrokenFileError: The file cannot be read.
            InvalidInputError: It is empty.
        """
        if self.samples is not None:
            return resample(self.samples, self.rate, rate)
        assert self.path is not None
        return read(self.path).mono().at(rate).samples[0]


def fit(
    wave: Waveform, rate: int, *, resample: bool = True, name: str = "the audio"
) -> tuple[Waveform, list[str]]:
    """Make a waveform what a model was trained on: one channel at one rate, with sound in it.

    Args:
        wave: Any waveform.
        rate: The model's rate.
        resample: Whether another rate may be converted.
        name: What messages call it.

    Returns:
        The waveform, and what was changed, in words.

    Raises:
        InvalidInputError: It is silent, or has another rate that may not be converted.

    Example:
        >>> tone = torch.sin(torch.arange(44100) * 0.1).expand(2, -1)
        >>> fit(Waveform(tone, 44100), 16000)[1]
        ['2 channels averaged', 'resampled from 44100 to 16000 Hz']
    """
    changed = []
    if len(wave.samples) > 1:
        changed.append(f"{len(wave.samples)} channels averaged")
        wave = wave.mono()
    if float(wave.samples.abs().max()) < SILENCE:
        raise InvalidInputError(f"{name} is silent; give a recording with sound in it")
    if wave.rate != rate:
        if not resample:
            raise InvalidInputError(
                f"{name} has {wave.rate} Hz and the model {rate} Hz; allow resampling"
            )
        changed.append(f"resampled from {wave.rate} to {rate} Hz")
        wave = wave.at(rate)
    return wave, changed


def read(path: str | Path, *, limit_s: float = 24 * 3600.0) -> Waveform:
    """Read a sound file: WAV, FLAC, Ogg, MP3 and what else libsndfile knows.

    Args:
        path: The file.
        limit_s: Longest sound that is read, in seconds.

    Raises:
        BrokenFileError: The file is missing, is no sound, or is cut off.
        InvalidInputError: It is empty, too long, or holds samples that are no finite numbers.
        MissingExtraError: ``soundfile`` is not installed.
    """
    soundfile: Any = require("soundfile", "speech")
    path = Path(path)
    try:
        if path.stat().st_size == 0:
            raise InvalidInputError(f"{path} is empty (0 bytes); give a recording")
        info = soundfile.info(str(path), verbose=True)
        if info.frames > limit_s * info.samplerate:
            raise InvalidInputError(
                f"{path} claims {info.frames / info.samplerate:,.0f} s, more than the "
                f"{limit_s:,.0f} s that are allowed; cut it or raise the limit"
            )
        # libsndfile reads what is left of a file that was cut off and only notes it in its log
        if any("data" in x and "should be" in x for x in info.extra_info.splitlines()):
            raise BrokenFileError(f"{path} is cut off: its header promises more than it holds")
        data, rate = soundfile.read(str(path), dtype="float32", always_2d=True)
    except OSError as error:
        raise BrokenFileError(f"{path} cannot be read ({error.strerror or error})") from error
    except RuntimeError as error:  # soundfile's own errors
        reason = str(error).split(": ", 1)[-1].rstrip(".")
        raise BrokenFileError(
            f"{path} cannot be read as sound ({reason}); it is no sound file or cut off"
        ) from error
    if len(data) < info.frames:
        raise BrokenFileError(
            f"{path} is cut off: {len(data)} of {info.frames} samples could be read"
        )
    if not len(data):
        raise InvalidInputError(f"{path} holds no samples; give a recording")
    try:
        return Waveform(torch.from_numpy(data.T.copy()), rate)
    except InvalidInputError as error:
        raise InvalidInputError(f"{path}: {error}") from error


def write(path: str | Path, wave: Waveform, *, clip: bool = False) -> None:
    """Write a sound file; the format follows from the name, 16 bits where it allows a choice.

    Args:
        path: Where to; an interrupted write leaves what was there.
        wave: What to write.
        clip: Cut samples beyond [-1, 1] instead of refusing them.

    Raises:
        InvalidInputError: A sample lies beyond [-1, 1], or the format is unknown.
        BrokenFileError: The file cannot be written.
        MissingExtraError: ``soundfile`` is not installed.
    """
    soundfile: Any = require("soundfile", "speech")
    path = Path(path)
    peak = float(wave.samples.abs().max())
    if peak > 1 and not clip:
        raise InvalidInputError(
            f"the loudest sample is {peak:.3g}, beyond 1, and would be cut; divide by it or clip"
        )
    kind = path.suffix.lstrip(".").upper()
    if kind not in soundfile.available_formats():
        known = ", ".join(sorted(soundfile.available_formats())).lower()
        raise InvalidInputError(f"{path}: {kind.lower()!r} is no known format; choose of {known}")
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        os.close(handle)
        try:
            soundfile.write(name, wave.samples.clamp(-1, 1).T.numpy(), wave.rate, format=kind)
            Path(name).chmod(0o644)
            Path(name).replace(path)
        finally:
            Path(name).unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:
        raise BrokenFileError(f"{path} cannot be written ({error})") from error


def resample(samples: torch.Tensor, source: int, target: int, zeros: int = 24) -> torch.Tensor:
    """Change the rate by band-limited interpolation: a Hann-windowed sinc in polyphase form.

    Args:
        samples: [..., N].
        source: Its rate in Hz.
        target: The wanted rate in Hz.
        zeros: Zero crossings of the sinc on either side; more is a steeper filter.

    Returns:
        [..., ceil(N * target / source)].

    Raises:
        InvalidInputError: A rate is below 1.

    Example:
        >>> resample(torch.ones(1, 441), 22050, 16000).shape
        torch.Size([1, 320])
    """
    if min(source, target) < 1:
        raise InvalidInputError(f"rates are at least 1 Hz, got {source} and {target}")
    if source == target:
        return samples
    common = math.gcd(source, target)
    down, up = source // common, target // common
    kernel, reach = _kernel(down, up, zeros)
    length = samples.shape[-1]
    flat = samples.reshape(-1, 1, length)
    padded = F.pad(flat, (reach, reach + down))
    phases = F.conv1d(padded, kernel.to(samples), stride=down)  # [B, up, T]
    out = phases.transpose(1, 2).reshape(*samples.shape[:-1], -1)
    return out[..., : -(-length * up // down)]


@lru_cache(maxsize=16)
def _kernel(down: int, up: int, zeros: int) -> tuple[torch.Tensor, int]:
    """Filters [up, 1, 2 reach + down] of the phases of one period, and how far they reach."""
    cutoff = min(1.0, up / down) * 0.97  # of the Nyquist frequency of the source
    reach = math.ceil(zeros / cutoff)
    offset = torch.arange(-reach, reach + down, dtype=torch.float64)
    phase = torch.arange(up, dtype=torch.float64) * down / up
    t = (offset[None] - phase[:, None]) * cutoff  # [up, K]
    window = torch.cos(t.clamp(-zeros, zeros) * math.pi / (2 * zeros)) ** 2
    return (torch.sinc(t) * window * cutoff)[:, None], reach
