"""Writes the seed corpus of the fuzz test: small files that between them have every feature.

python tests/codecs/make_corpus.py
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from isthmus.codecs.base import pack
from isthmus.codecs.container import TEXT, Frame, Header, write
from isthmus.codecs.films import Av1, Ffv1
from isthmus.codecs.lossless_audio import LosslessAudio
from isthmus.codecs.lossless_image import LosslessImage
from isthmus.roles import Signal

CORPUS = Path(__file__).parent / "corpus"


def picture(planes: int, rows: int, columns: int, bits: int = 8) -> Signal:
    """A slope with noise."""
    generator = torch.Generator().manual_seed(planes * 1000 + rows)
    y, x = torch.arange(rows)[:, None], torch.arange(columns)
    clean = (x * 3 + y * 5) * (1 << (bits - 8)) + torch.arange(planes)[:, None, None] * 20
    noise = torch.randint(0, 9, (planes, rows, columns), generator=generator)
    pixels = (clean + noise).clamp(0, (1 << bits) - 1)
    info = {"medium": "image", "dtype": f"uint{bits}", "shape": [planes, rows, columns]}
    return Signal(info, [pixels.to(torch.uint8 if bits == 8 else torch.int32)])


def sound(channels: int, length: int, dtype: str = "int16") -> Signal:
    """Tones with noise."""
    generator = torch.Generator().manual_seed(channels * 1000 + length)
    t = torch.arange(length)[None] * (0.05 + 0.01 * torch.arange(channels)[:, None])
    clean = torch.sin(t) * 0.4 + torch.randn(channels, length, generator=generator) * 0.01
    info = {"medium": "audio", "dtype": dtype, "shape": [channels, length], "rate_hz": 8000}
    if dtype == "float32":
        return Signal(info, [clean])
    return Signal(info, [(clean * (1 << (int(dtype[3:]) - 2))).round().to(torch.int32)])


def spans(signal: Signal, *, known: bool) -> bytes:
    """Sound in small spans, so that a short file has several frames, with a text between."""
    codec = LosslessAudio()
    info: dict[str, Any] = dict(signal.info)
    if not known:
        info["shape"] = [info["shape"][0], None]
    header = Header(
        codec.id, bytes(32), info, {"block": 64, "blocks": 2}, {"numerics": "static"}, lossless=True
    )
    frames = list(codec.encode(signal, header))
    frames.insert(1, Frame(b"a note", kind=TEXT))
    out = io.BytesIO()
    write(out, header, frames)
    return out.getvalue()


def packed(signal: Signal, *, compact: bool = False) -> bytes:
    """A file."""
    out = io.BytesIO()
    codec = LosslessImage() if signal.medium == "image" else LosslessAudio()
    pack(codec, signal, out, compact=compact)
    return out.getvalue()


def board() -> Signal:
    """A drawing, which is embedded."""
    cells = (torch.arange(16)[:, None] // 4 + torch.arange(24) // 4) % 2 * 200
    info = {"medium": "image", "dtype": "uint8", "shape": [3, 16, 24]}
    return Signal(info, [cells.to(torch.uint8).expand(3, -1, -1).contiguous()])


def film(planes: int, high: int, wide: int) -> Signal:
    """A slope that moves."""
    t, y, x = (torch.arange(n) for n in (5, high, wide))
    grey = (40 + 9 * t[:, None, None] + 2 * y[:, None] + x).clamp(0, 255).to(torch.uint8)
    values = torch.stack([grey, 255 - grey, grey // 2][:planes], 1)
    info = {"medium": "video", "dtype": "uint8", "shape": [5, planes, high, wide], "rate": "25/1"}
    return Signal(info, [values[:2], values[2:]])


FILMS = {
    "film": lambda: film(3, 18, 21),
    "film-grey": lambda: film(1, 16, 16),
    "film-exact": lambda: film(3, 16, 17),
}

FILES = {
    "drawing": lambda: packed(board()),
    "grey-dot": lambda: packed(picture(1, 1, 1)),
    "rgb": lambda: packed(picture(3, 9, 7)),
    "rgba-short": lambda: packed(picture(4, 12, 10), compact=True),
    "deep": lambda: packed(picture(1, 16, 16, 16)),
    "fitted": lambda: packed(picture(2, 40, 32)),
    "mono": lambda: packed(sound(1, 90)),
    "stereo-short": lambda: packed(sound(2, 200), compact=True),
    "float": lambda: packed(sound(1, 60, "float32")),
    "frames": lambda: spans(sound(2, 300), known=True),
    "stream": lambda: spans(sound(1, 300, "int24"), known=False),
}


if __name__ == "__main__":
    (CORPUS / "films").mkdir(parents=True, exist_ok=True)
    for name, make in FILES.items():
        (CORPUS / f"{name}.ist").write_bytes(make())
    for name, signal in FILMS.items():
        with (CORPUS / "films" / f"{name}.ist").open("wb") as file:
            pack(Ffv1() if "exact" in name else Av1(), signal(), file)
