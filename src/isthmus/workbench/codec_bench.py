"""Codecs side by side on one's own files: rate, distortion and time, classical ones beside ours.

All coders see the same samples and are counted by whole files. Pictures are judged by PSNR, sound
by the mean distance of log-mel spectra in dB, after any delay has been taken out.
"""

from __future__ import annotations

import contextlib
import io
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isthmus.codecs.base import TrainedCodec, ids, known, lookup, pack, unpack
from isthmus.codecs.peers import Peer, peers
from isthmus.errors import InvalidInputError, IsthmusError
from isthmus.laws.rd import Point, bd_rate
from isthmus.roles import Medium, Signal
from isthmus.signals.features import mel_filters
from isthmus.signals.files import medium_of, open_signal

REACH = 4096
"""Samples that a coder may delay sound by."""


@dataclass(frozen=True)
class Found:
    """What a bench found.

    Attributes:
        medium: Of all files.
        curves: Points by coder, rates rising.
        bd: Rate against the anchor at equal quality, in percent, where curves can be compared.
        anchor: The coder that ``bd`` compares with.
        left_out: Coders that could not code these files, and why.
    """

    medium: Medium
    curves: dict[str, list[Point]]
    bd: dict[str, float]
    anchor: str
    left_out: dict[str, str]


def bench(
    files: Sequence[str | Path],
    *,
    model: str | Path | None = None,
    report: Callable[[str], None] | None = None,
) -> Found:
    """Measure all coders of a medium on files of it.

    Args:
        files: Pictures, or sounds.
        model: Folder of one more trained codec.
        report: Told the name of each coder before its turn.

    Raises:
        InvalidInputError: No files, or files of several media.
        BrokenFileError: A file cannot be read.
    """
    media = {medium_of(f) for f in files}
    if len(media) != 1:
        raise InvalidInputError("give pictures only, or sounds only, at least one of them")
    medium: Any = media.pop()
    signals = [_whole(Path(f)) for f in files]
    curves: dict[str, list[Point]] = {}
    left_out: dict[str, str] = {}
    for peer in [*peers(medium), *_ours(medium, model)]:
        if report is not None:
            report(peer.name)
        try:
            points = [_point(peer, q, signals) for q in peer.qualities]
        except (IsthmusError, OSError, RuntimeError, ValueError) as error:
            left_out[peer.name] = str(error).strip().splitlines()[0]
            continue
        curves[peer.name] = sorted(points, key=lambda p: p.rate)
    anchor, bd = "JPEG" if medium == "image" else "MP3", {}
    for name, points in curves.items():
        if name != anchor and anchor in curves:
            try:
                bd[name] = bd_rate(curves[anchor], points)
            except InvalidInputError:
                continue  # a coder without loss, or of one quality
    return Found(medium, curves, bd, anchor, left_out)


def _whole(path: Path) -> tuple[Tensor, int]:
    """A picture uint8 [C, H, W], or sound of 16 bits as float32 [C, N], and its rate."""
    signal = open_signal(path, exact=False)
    whole = torch.cat(list(signal.chunks), 1)
    if signal.medium == "audio":
        whole = (whole.clamp(-1, 1) * 32767).round() / 32768
    return whole, int(signal.info.get("rate_hz", 0))


def _ours(medium: str, model: str | Path | None) -> list[Peer]:
    """Our codecs that are ready: those without a model, and those whose model is at hand."""
    found = []
    for name in ids():
        system: Any = lookup(name)
        if system.medium != medium:
            continue
        trained = issubclass(system, TrainedCodec)
        ready = [*known(system)][:1] if trained else [system()]
        if trained and model is not None:
            with contextlib.suppress(IsthmusError):  # the folder is another system's
                ready = [system.from_pretrained(model)]
        found += [_as_peer(codec) for codec in ready]
    return found


def _as_peer(codec: Any) -> Peer:
    def encode(whole: Tensor, rate: int, quality: float) -> bytes:
        info: dict[str, Any] = {"medium": codec.medium, "shape": list(whole.shape)}
        if codec.medium == "image":
            info["dtype"] = "uint8"
        elif codec.lossless:
            info |= {"dtype": "int16", "rate_hz": rate}
            whole = (whole * 32768).round().to(torch.int32)
        else:
            info |= {"dtype": "float32", "rate_hz": rate}
        out = io.BytesIO()
        pack(codec, Signal(info, [whole]), out, rate=quality if quality > 0 else None)
        return out.getvalue()

    def decode(data: bytes) -> Tensor:
        whole = torch.cat(list(unpack(data, codec=codec).signal.chunks), 1)
        return whole.float() / 32768 if whole.dtype == torch.int32 else whole

    rates = tuple(getattr(codec, "rates", ())) or (0.0,)
    return Peer(
        f"isthmus {codec.id.split('/')[1]}", codec.medium, codec.lossless, rates, encode, decode
    )


def _point(peer: Peer, setting: float, signals: Sequence[tuple[Tensor, int]]) -> Point:
    bits, size, spent, back, qualities = 0, 0.0, 0.0, 0.0, []
    for whole, rate in signals:
        start = time.perf_counter()
        data = peer.encode(whole, rate, setting)
        middle = time.perf_counter()
        decoded = peer.decode(data)
        spent, back = spent + middle - start, back + time.perf_counter() - middle
        bits += 8 * len(data)
        image = peer.medium == "image"
        size += whole[0].numel() if image else 1000 * whole.shape[1] / rate
        qualities.append(psnr(whole, decoded) if image else closeness(whole, decoded, rate))
    per = size / 1e6 if peer.medium == "image" else size / 1000
    quality = sum(qualities) / len(qualities)
    return Point(bits / size, quality, spent / per, back / per, f"{setting:g}")


def psnr(truth: Tensor, other: Tensor) -> float:
    """Peak signal-to-noise ratio of 8-bit pictures in dB; infinite for equal ones.

    Example:
        >>> zero = torch.zeros(1, 2, 2, dtype=torch.uint8)
        >>> round(psnr(zero, zero + 1), 2)  # 20 log10(255)
        48.13
    """
    if truth.shape != other.shape:
        raise InvalidInputError(f"pictures of {list(truth.shape)} and {list(other.shape)}")
    error = float((truth.double() - other.double()).square().mean())
    return 10 * math.log10(255**2 / error) if error else math.inf


def closeness(truth: Tensor, other: Tensor, rate: int) -> float:
    """Minus the mean distance of log-mel spectra in dB, a delay taken out; infinite for equal ones.

    Args:
        truth: float32 [C, N].
        other: [C, M].
        rate: In Hz.
    """
    truth, other = _aligned(truth, other)
    if torch.equal(truth, other):
        return math.inf
    return -float((_log_mel(truth, rate) - _log_mel(other, rate)).abs().mean())


def _log_mel(x: Tensor, rate: int) -> Tensor:
    window = torch.hann_window(1024)
    x = torch.nn.functional.pad(x, (0, max(0, 1024 - x.shape[1])))
    power = torch.stft(x, 1024, 256, window=window, return_complex=True, center=False).abs() ** 2
    mel = mel_filters(64, 1024, rate).float() @ power
    return 10 * (mel + 1e-7).log10()


def _aligned(truth: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Both cut to what they share once the delay with the highest correlation is taken out."""
    size = truth.shape[1] + other.shape[1]
    product = torch.fft.rfft(other.mean(0), size) * torch.fft.rfft(truth.mean(0), size).conj()
    match = torch.fft.irfft(product, size)
    lags = [*range(REACH), *range(-REACH, 0)]
    delay = max(lags, key=lambda lag: float(match[lag]) if abs(lag) < size else -math.inf)
    truth, other = truth[:, max(0, -delay) :], other[:, max(0, delay) :]
    length = min(truth.shape[1], other.shape[1])
    return truth[:, :length], other[:, :length]
