"""Codecs side by side on one's own files: rate, distortion and time, classical ones beside ours.

All coders see the same samples and are counted by whole files. Pictures and films are judged by
PSNR (of the mean error over all pictures of a film, in RGB) and MS-SSIM (of some of them), sound by
the mean distance of log-mel spectra in dB, after any delay has been taken out. Classical coders get
the planes of a film, codecs that learn get RGB; what they give back is turned into RGB by the same
conversion.
"""

from __future__ import annotations

import contextlib
import io
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isthmus.codecs.base import TrainedCodec, ids, known, lookup, pack, unpack
from isthmus.codecs.peers import Peer, Rate, peers
from isthmus.errors import InvalidInputError, IsthmusError
from isthmus.laws.rd import Point, bd_rate
from isthmus.metrics.images import ms_ssim, scales_of
from isthmus.roles import Medium, Signal
from isthmus.signals.features import mel_filters
from isthmus.signals.files import medium_of, open_signal
from isthmus.signals.video import frame_of, open_film, values_of

MOST = 1 << 27
"""Numbers of a film that are compared: those of its first pictures."""

LOOKED = 30
"""Pictures of a film that MS-SSIM looks at, evenly over it."""

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
        left_out: Coders that could not code these files, or not at a setting, and why.
        similarity: Name of the second measure in the points, such as ``MS-SSIM-3``; empty without.
        notes: What of the files was not compared.
    """

    medium: Medium
    curves: dict[str, list[Point]]
    bd: dict[str, float]
    anchor: str
    left_out: dict[str, str]
    similarity: str = ""
    notes: tuple[str, ...] = ()


def bench(
    files: Sequence[str | Path],
    *,
    model: str | Path | None = None,
    report: Callable[[str], None] | None = None,
) -> Found:
    """Measure all coders of a medium on files of it.

    Args:
        files: Pictures, sounds or films.
        model: Folder of one more trained codec.
        report: Told the name of each coder before its turn.

    Raises:
        InvalidInputError: No files, or files of several media.
        BrokenFileError: A file cannot be read.
    """
    media = {medium_of(f) for f in files}
    if len(media) != 1:
        raise InvalidInputError(
            "give pictures only, or sounds only, or films only, at least one of them"
        )
    medium: Any = media.pop()
    notes: list[str] = []
    signals = [_whole(Path(f), notes) for f in files]
    scales = 0
    if medium != "audio":
        scales = min(scales_of(*whole.shape[-2:]) for whole, _ in signals)
    curves: dict[str, list[Point]] = {}
    left_out: dict[str, str] = {}
    for peer in [*peers(medium), *_ours(medium, model)]:
        if report is not None:
            report(peer.name)
        points: list[Point] = []
        for setting in peer.qualities:
            try:
                points.append(_point(peer, setting, signals, scales))
            except InvalidInputError as error:  # of one setting alone, as too low a rate
                at = f"at {setting:g}: " if len(peer.qualities) > 1 else ""
                left_out[peer.name] = f"{at}{error}"
            except (IsthmusError, OSError, RuntimeError, ValueError) as error:
                left_out[peer.name] = str(error).strip().splitlines()[0]
                points = []
                break
        if points:
            curves[peer.name] = sorted(points, key=lambda p: p.rate)
    anchor, bd = {"image": "JPEG", "audio": "MP3"}.get(medium, "H.264"), {}
    for name, points in curves.items():
        if name != anchor and anchor in curves:
            try:
                bd[name] = bd_rate(curves[anchor], points)
            except InvalidInputError:
                continue  # a coder without loss, or of one quality
    return Found(medium, curves, bd, anchor, left_out, _similarity(scales), tuple(notes))


def _similarity(scales: int) -> str:
    return f"MS-SSIM{'' if scales == 5 else f'-{scales}'}" if scales else ""


def _whole(path: Path, notes: list[str]) -> tuple[Tensor, Rate]:
    """A picture uint8 [C, H, W], sound of 16 bits as float32 [C, N] or a film, and its rate."""
    if medium_of(path) == "video":
        return _film(path, notes)
    signal = open_signal(path, exact=False)
    whole = torch.cat(list(signal.chunks), 1)
    if signal.medium == "audio":
        whole = (whole.clamp(-1, 1) * 32767).round() / 32768
    return whole, int(signal.info.get("rate_hz", 0))


def _film(path: Path, notes: list[str]) -> tuple[Tensor, Rate]:
    """A film as :class:`~isthmus.codecs.peers.Peer` has it, of 8 bits."""
    film = open_film(path, exact=False)
    bits, most = film.info["bits"], max(1, MOST // math.prod(film.info["shape"][1:]))
    found: list[Tensor] = []
    for chunk in film.chunks:
        left = most - sum(map(len, found))
        if len(chunk) > left:
            notes.append(f"of {path} the first {most} pictures are compared")
            found.append(chunk[:left])
            break
        found.append(chunk)
    whole = torch.cat(found)
    whole = whole if bits == 8 else (whole >> (bits - 8)).to(torch.uint8)
    return whole, Fraction(film.info["rate"])


def rgb(film: Tensor) -> Tensor:
    """A film of planes in red, green and blue, as FFmpeg turns it; grey stays grey.

    Args:
        film: uint8 [T, 1 or 3, H, W], as :class:`~isthmus.codecs.peers.Peer` has it.
    """
    if film.shape[1] == 1:
        return film
    return torch.stack([values_of(frame_of(x, "yuv420p"), "rgb24") for x in film])


def _ours(medium: str, model: str | Path | None) -> list[Peer]:
    """Our codecs that are ready: those without a model, and those whose model is at hand."""
    found = []
    for name in ids():
        system: Any = lookup(name)
        if system.medium != medium or getattr(system, "fits_each_file", False):
            continue  # minutes a second of film are no comparison for a bench
        ready = _trained(system, model) if issubclass(system, TrainedCodec) else [system()]
        found += [_as_peer(codec) for codec in ready]
    return found


def _trained(system: Any, model: str | Path | None) -> list[Any]:
    """The model asked for, or the one in the package, or one in the cache, or none."""
    if model is not None:
        with contextlib.suppress(IsthmusError):  # the folder is another system's
            return [system.from_pretrained(model)]
    embedded = system.embedded()
    return [system.from_pretrained(embedded)] if embedded else _own_first(known(system))[:1]


def _own_first(codecs: Iterable[Any]) -> list[Any]:
    """Models of the scale small before others, which may be a claim's with its idea off."""
    return sorted(codecs, key=lambda codec: codec.settings != codec.scales["small"].settings)


def _as_peer(codec: Any) -> Peer:
    steps = tuple(getattr(codec, "qualities", ()))
    film, learnt = codec.medium == "video", isinstance(codec, TrainedCodec)

    def encode(whole: Tensor, rate: Rate, quality: float) -> bytes:
        info: dict[str, Any] = {"medium": codec.medium, "shape": list(whole.shape)}
        used = type(codec)(quality=quality) if steps else codec
        if film:
            info |= {"dtype": "uint8", "rate": f"{Fraction(rate)}".removesuffix("/1")}
            info["rate"] += "/1" * ("/" not in info["rate"])
            if learnt:
                whole = rgb(whole)
            else:
                info |= {"layout": "gray" if whole.shape[1] == 1 else "420", "bits": 8}
        elif codec.medium == "image":
            info["dtype"] = "uint8"
        elif codec.lossless:
            info |= {"dtype": "int16", "rate_hz": rate}
            whole = (whole * 32768).round().to(torch.int32)
        else:
            info |= {"dtype": "float32", "rate_hz": rate}
        out = io.BytesIO()
        wanted = quality if quality > 0 and not steps else None
        pack(used, Signal(info, [whole]), out, rate=wanted)
        return out.getvalue()

    def decode(data: bytes) -> Tensor:
        whole = torch.cat(list(unpack(data, codec=codec).signal.chunks), 0 if film else 1)
        return whole.float() / 32768 if whole.dtype == torch.int32 else whole

    rates = steps or tuple(getattr(codec, "rates", ())) or (0.0,)
    return Peer(
        f"isthmus {codec.id.split('/')[1]}",
        codec.medium,
        codec.lossless,
        rates,
        encode,
        decode,
        learnt,
    )


def _point(
    peer: Peer, setting: float, signals: Sequence[tuple[Tensor, Rate]], scales: int
) -> Point:
    bits, size, spent, back, qualities, alike = 0, 0.0, 0.0, 0.0, [], []
    for whole, rate in signals:
        start = time.perf_counter()
        data = peer.encode(whole, rate, setting)
        middle = time.perf_counter()
        decoded = peer.decode(data)
        spent, back = spent + middle - start, back + time.perf_counter() - middle
        bits += 8 * len(data)
        image = peer.medium == "image"
        length = whole.shape[0 if peer.medium == "video" else 1]
        size += whole[0].numel() if image else float(1000 * length / rate)
        if peer.medium == "audio":
            qualities.append(closeness(whole, decoded, int(rate)))
            continue
        if image and len(decoded) == len(whole) + 2:  # WebP has no grey: three planes alike
            decoded = torch.cat([decoded[1:2], decoded[3:]])
        if peer.medium == "video":
            whole, decoded = rgb(whole), decoded if peer.learnt else rgb(decoded)
        qualities.append(psnr(whole, decoded))
        if scales:
            step = -(-len(whole) // LOOKED) if peer.medium == "video" else 1
            pairs = (whole, decoded) if step == 1 else (whole[::step], decoded[::step])
            alike.append(ms_ssim(*pairs, scales=scales))
    per = size / 1e6 if peer.medium == "image" else size / 1000
    quality = sum(qualities) / len(qualities)
    more = {_similarity(scales): sum(alike) / len(alike)} if alike else {}
    return Point(bits / size, quality, spent / per, back / per, f"{setting:g}", more)


def psnr(truth: Tensor, other: Tensor) -> float:
    """Peak signal-to-noise ratio of 8-bit pictures in dB; infinite for equal ones.

    Example:
        >>> zero = torch.zeros(1, 2, 2, dtype=torch.uint8)
        >>> round(psnr(zero, zero + 1), 2)  # 20 log10(255)
        48.13
    """
    if truth.shape != other.shape:
        raise InvalidInputError(f"pictures of {list(truth.shape)} and {list(other.shape)}")
    total = 0.0
    for a, b in zip(
        torch.split(truth, 16), torch.split(other, 16), strict=True
    ):  # memory stays flat for films
        total += float((a.double() - b.double()).square().sum())
    error = total / truth.numel()
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
