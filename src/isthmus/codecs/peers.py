"""Classical coders that ours are measured beside, by whole files: what a person would get."""

from __future__ import annotations

import importlib.util
import io
import lzma
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from isthmus.codecs.av_bridge import CODERS, missing
from isthmus.codecs.av_bridge import decode as decoded
from isthmus.codecs.av_bridge import encode as coded
from isthmus.codecs.container import leb, unleb
from isthmus.errors import require
from isthmus.roles import Medium

Coder = Callable[[Tensor], bytes]
"""Small grey pictures of one size, uint8 [N, H, W], into a file."""


def _sheets(form: str, **how: Any) -> Coder:
    """All pictures in one sheet, of that shape which suits the format best."""

    def coded(pictures: Tensor) -> bytes:
        count, height, width = pictures.shape
        found = []
        for across in sorted({1, min(20, count), count}):
            rows = -(-count // across)
            if max(rows * height, across * width) > 16_383:  # what WebP takes
                continue
            sheet = torch.zeros(rows * across, height, width, dtype=torch.uint8)
            sheet[:count] = pictures
            grid = sheet.view(rows, across, height, width).permute(0, 2, 1, 3)
            out = io.BytesIO()
            image = require("PIL.Image", "codec").fromarray(
                grid.reshape(rows * height, across * width).contiguous().numpy()
            )
            image.save(out, form, **how)
            found.append(out.getvalue())
        return min(found, key=len)

    return coded


def _bytes(pictures: Tensor) -> bytes:
    return bytes(pictures.contiguous().numpy().tobytes())


LOSSLESS: dict[str, Coder] = {
    "zlib": lambda x: zlib.compress(_bytes(x), 9),
    "lzma": lambda x: lzma.compress(_bytes(x), preset=9 | lzma.PRESET_EXTREME),
    "PNG": _sheets("PNG", optimize=True),
    "WebP": _sheets("WEBP", lossless=True, quality=100, method=6),
}
"""Coders without loss, by name, each at its strongest."""


Rate = int | Fraction
"""Samples or pictures a second."""


# one signal at a time, at a choice of qualities -------------------------------------------------


@dataclass(frozen=True)
class Peer:
    """A classical coder.

    Attributes:
        name: Its name.
        medium: ``image``: uint8 [C, H, W]; ``audio``: float32 [C, N] within [-1, 1]; ``video``:
            brightness and, where there are colours, two planes of them, each value repeated over
            two by two pixels, uint8 [T, 1 or 3, H, W].
        lossless: Whether every bit comes back (of 16-bit sound).
        qualities: Settings to try, from small files to large ones.
        encode: A signal, its rate (Hz, pictures a second) and a setting into a whole file.
        decode: The file back into the signal.
        learnt: Films come back as RGB.
    """

    name: str
    medium: Medium
    lossless: bool
    qualities: tuple[float, ...]
    encode: Callable[[Tensor, Rate, float], bytes]
    decode: Callable[[bytes], Tensor]
    learnt: bool = False


def peers(medium: str) -> list[Peer]:
    """Coders of a medium that the installed libraries have.

    Args:
        medium: ``image``, ``audio`` or ``video``.

    Raises:
        MissingExtraError: Pillow, ``soundfile`` or PyAV is not installed.
    """
    if medium == "video":
        return [_film(name) for name in CODERS if not missing(name)]
    if medium == "audio":
        formats: Any = require("soundfile", "codec").available_formats()
        found = [_sound("FLAC", "PCM_16", (1.0,), lossless=True)]
        levels = (0.95, 0.8, 0.6, 0.4, 0.2, 0.0)
        opus = (1.0, 0.98, 0.96, 0.93, 0.88, 0.8, 0.6)  # 6 to 256 kbit/s, linearly
        found += [_sound("OGG", "VORBIS", levels), _sound("OGG", "OPUS", opus)]
        return found + ([_sound("MP3", "MPEG_LAYER_III", levels)] if "MP3" in formats else [])
    features: Any = require("PIL.features", "codec")
    steps = (10.0, 30.0, 50.0, 70.0, 85.0, 95.0)
    found = [_picture("PNG", (0.0,), {"optimize": True}), _picture("JPEG", steps)]
    if features.check("webp"):
        best = {"lossless": True, "quality": 100, "method": 6, "exact": True}
        found += [_picture("WEBP", (0.0,), best), _picture("WEBP", steps)]
    if features.check("avif"):
        found.append(_picture("AVIF", steps))
    if importlib.util.find_spec("pillow_jxl"):
        importlib.import_module("pillow_jxl")
        exact = _picture("JXL", (0.0,), {"lossless": True})
        found += [exact, _picture("JXL", steps)]
    return found


def _picture(form: str, qualities: tuple[float, ...], exact: dict[str, Any] | None = None) -> Peer:
    def encode(pixels: Tensor, rate: Rate, quality: float) -> bytes:
        values: Any = pixels.permute(1, 2, 0).contiguous().numpy()
        out = io.BytesIO()
        values = values[..., 0] if len(pixels) == 1 else values
        picture = require("PIL.Image", "codec").fromarray(values)
        picture.save(out, form, **(exact or {"quality": int(quality)}))
        return out.getvalue()

    def decode(data: bytes) -> Tensor:
        values = np.array(require("PIL.Image", "codec").open(io.BytesIO(data)))
        pixels = torch.from_numpy(values)
        return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()

    name = f"{form} lossless" if exact else form
    return Peer(name, "image", exact is not None, qualities, encode, decode)


def _film(coder: str) -> Peer:
    """A video codec; its file is what a decoder needs, and three numbers for the size."""

    def encode(pictures: Tensor, rate: Rate, quality: float) -> bytes:
        planes = [pictures[:, 0], *(pictures[:, i, ::2, ::2] for i in range(1, len(pictures[0])))]
        layout: Any = "gray" if len(planes) == 1 else "420"
        done = coded(planes, coder, layout=layout, crf=quality, rate=Fraction(rate))
        colours, high, wide = pictures.shape[1:]
        sizes = leb(2 * len(pictures) + (colours > 1)) + leb(high) + leb(wide)
        return sizes + done.pack()

    def decode(data: bytes) -> Tensor:
        count, at = unleb(data, 0)
        high, at = unleb(data, at)
        wide, at = unleb(data, at)
        layout: Any = "420" if count % 2 else "gray"
        found = decoded(data[at:], coder, (count // 2, high, wide), layout=layout)
        whole = [x.repeat_interleave(2, 1).repeat_interleave(2, 2) for x in found[1:]]
        return torch.stack([found[0], *(x[:, :high, :wide] for x in whole)], 1)

    return Peer(CODERS[coder].name, "video", False, CODERS[coder].qualities, encode, decode)


def _sound(form: str, subtype: str, qualities: tuple[float, ...], lossless: bool = False) -> Peer:
    soundfile: Any = require("soundfile", "codec")

    def encode(samples: Tensor, rate: Rate, quality: float) -> bytes:
        out = io.BytesIO()
        how: dict[str, Any] = {"format": form, "subtype": subtype, "compression_level": quality}
        whole = np.rint(samples.T.numpy() * 32768).clip(-32768, 32767).astype(np.int16)
        soundfile.write(out, whole, int(rate), **how)
        return out.getvalue()

    def decode(data: bytes) -> Tensor:
        values, _ = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
        return torch.from_numpy(values.T.copy())

    name = {"OPUS": "Opus", "VORBIS": "Vorbis", "MPEG_LAYER_III": "MP3"}.get(subtype, form)
    return Peer(name, "audio", lossless, qualities, encode, decode)
