"""Classical coders that ours are measured beside, by whole files: what a person would get."""

from __future__ import annotations

import io
import lzma
import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from isthmus.errors import require

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
