"""Pictures as sequences of tokens: the bytes of JPEG files, or codes of a small VQ-VAE.

::

    picture ─▶ file with the constant header ─▶ scan ─▶ byte pairs ─▶ ids      JpegTokens
    picture ─▶ convolutions ─▶ codebook ─▶ codes, row by row ───────▶ ids      VqTokens

Both begin a picture with its first rows, so a language model over the ids can complete it. Id 0 is
the end in both.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus.errors import InvalidInputError, require
from isthmus.nn.quantize import VQ
from isthmus.signals import jpeg
from isthmus.signals.image import resize
from isthmus.signals.tokenizer import as_bytes, as_text

MARKERS = as_text(b"\xff") + "[" + "".join(as_text(bytes([0xD0 + i])) for i in range(8)) + "]"
"""Restart markers as a pattern of letters: no byte pair reaches across one."""


def squared(picture: Tensor, side: int) -> Tensor:
    """A picture, uint8 [1 or 3, H, W], as [3, side, side]."""
    return resize(picture[:3].expand(3, -1, -1), (side, side))


class JpegTokens:
    """Pictures as the bytes of their files.

    Args:
        side: Of the pictures; others are brought to it.
        quality: Of JPEG, 4:2:0.
        restart: Units between two restart markers; 0 for none.
        tokenizer: Byte pairs, by :func:`~isthmus.signals.tokenizer.learn_byte_pairs`.

    Example:
        >>> tokens = JpegTokens(16)
        >>> white = tokens.file(torch.full((3, 16, 16), 255, dtype=torch.uint8))
        >>> len(tokens.strip(white)), tokens.form.units, tokens.form.header in white
        (5, 1, True)
    """

    def __init__(
        self, side: int, quality: int = 25, restart: int = 0, tokenizer: Any = None
    ) -> None:
        self.side, self.quality, self.restart = side, quality, restart
        self.tokenizer = tokenizer
        blank = torch.zeros(3, side, side, dtype=torch.uint8)
        self.form = jpeg.parse(self.file(blank))

    def file(self, picture: Tensor) -> bytes:
        """The file of a picture, uint8 [3, H, W], with the tables of the standard."""
        out, small = io.BytesIO(), squared(picture, self.side)
        image = require("PIL.Image", "codec").fromarray(small.permute(1, 2, 0).numpy().copy())
        told = {"restart_marker_blocks": self.restart} if self.restart else {}
        image.save(out, "JPEG", quality=self.quality, subsampling=2, optimize=False, **told)
        return out.getvalue()

    def strip(self, data: bytes) -> bytes:
        """The scan of a file whose header is the constant one.

        Raises:
            InvalidInputError: It has another.
            BrokenFileError: It is no JPEG file, or a damaged one.
        """
        found = jpeg.parse(data)
        if found.header != self.form.header:
            marks = f", restart_marker_blocks={self.restart}" if self.restart else ""
            raise InvalidInputError(
                f"this JPEG file ({found.width} x {found.height}) has another header than those "
                f"that were learnt: {self.side} x {self.side}, colours, no metadata, Pillow's "
                f"quality={self.quality}, subsampling=2{marks}; other files are for other codecs"
            )
        return found.scan

    def scan_ids(self, scan: bytes) -> list[int]:
        """Tokens of a scan."""
        return [int(i) for i in self.tokenizer(as_text(scan), add_special_tokens=False).input_ids]

    def ids(self, picture: Tensor) -> list[int]:
        """Tokens of a picture."""
        return self.scan_ids(self.strip(self.file(picture)))

    def scan(self, ids: Sequence[int]) -> bytes:
        """Bytes of tokens."""
        return as_bytes(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def first(self, picture: Tensor) -> list[int]:
        """Tokens of the upper half: those that lie wholly in its units."""
        return self.first_of(self.file(picture))

    def first_of(self, data: bytes) -> list[int]:
        """The same of a file.

        Raises:
            InvalidInputError: See :meth:`strip`.
        """
        scan = self.strip(data)
        row = -(-self.form.width // self.form.unit[0])
        units = row * max(1, self.form.units // row // 2)
        end = jpeg.read(self.form, scan).ends[units - 1]
        kept: list[int] = []
        for token in self.scan_ids(scan):
            end -= len(self.scan([token]))
            if end < 0:
                break
            kept.append(token)
        return kept

    def picture(self, ids: Sequence[int]) -> tuple[Tensor, str]:
        """What tokens show, uint8 [3, side, side], and where and why they break, if they do."""
        scan = self.scan(ids)
        found = jpeg.read(self.form, scan)
        said = f"breaks at byte {found.at} of {len(scan)}: {found.why}" if not found.whole else ""
        return self.shown(jpeg.mend(self.form, scan)), said

    @staticmethod
    def shown(data: bytes) -> Tensor:
        """What a file shows, uint8 [3, H, W]."""
        image = require("PIL.Image", "codec").open(io.BytesIO(data)).convert("RGB")
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class VqTokens(nn.Module):
    """Pictures as the codes of a VQ-VAE, one for 4 by 4 pixels: a usual rival.

    Args:
        side: Of the pictures; others are brought to it.
        codes: Of the codebook.

    Raises:
        InvalidInputError: 4 does not divide the side.
    """

    def __init__(self, side: int, codes: int) -> None:
        super().__init__()
        if side % 4:
            raise InvalidInputError(f"a code is of 4 by 4 pixels, which {side} is no multiple of")
        self.side, self.grid = side, side // 4
        act = nn.GELU
        self.encoder = nn.Sequential(
            *(nn.Conv2d(3, 32, 4, 2, 1), act(), nn.Conv2d(32, 64, 4, 2, 1), act()),
            *(nn.Conv2d(64, 64, 3, 1, 1), act(), nn.Conv2d(64, 16, 1)),
        )
        self.vq = VQ(16, codes, decay=0.95)
        self.decoder = nn.Sequential(
            *(nn.Conv2d(16, 64, 3, 1, 1), act(), nn.Conv2d(64, 128, 3, 1, 1), nn.PixelShuffle(2)),
            *(act(), nn.Conv2d(32, 48, 3, 1, 1), nn.PixelShuffle(2), act()),
            nn.Conv2d(12, 3, 3, 1, 1),
        )

    def learn(self, pictures: Sequence[Tensor], steps: int, seed: int = 0) -> Self:
        """Learn to give pictures back.

        Args:
            pictures: uint8 [C, H, W] each.
            steps: Steps, of 32 pictures each.
            seed: Of their order.
        """
        whole = torch.stack([squared(p, self.side) for p in pictures])
        optimizer = torch.optim.AdamW(self.parameters(), lr=2e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
        rng = np.random.default_rng(seed)
        for _ in range(steps):
            x = whole[rng.integers(len(whole), size=32)].float() / 127.5 - 1
            found = self.vq(self.encoder(x))
            loss = F.mse_loss(self.decoder(found.z_q), x) + 0.25 * found.commit_loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        return self.eval()

    @torch.no_grad()
    def ids(self, picture: Tensor) -> list[int]:
        """Tokens of a picture, row by row."""
        codes = self.vq.encode(self.encoder(squared(picture, self.side)[None].float() / 127.5 - 1))
        return [int(c) + 1 for c in codes.flatten()]

    def first(self, picture: Tensor) -> list[int]:
        """Tokens of the upper half."""
        return self.ids(picture)[: self.grid**2 // 2]

    @torch.no_grad()
    def picture(self, ids: Sequence[int]) -> tuple[Tensor, str]:
        """What tokens show, and what is wrong with them."""
        codes = torch.zeros(self.grid**2, dtype=torch.int64)
        given = torch.tensor([i - 1 for i in ids if i > 0][: len(codes)], dtype=torch.int64)
        codes[: len(given)] = given
        pixels = self.decoder(self.vq.decode(codes.view(1, self.grid, self.grid)))[0]
        wrong = "" if len(ids) == len(codes) else f"has {len(ids)} codes instead of {len(codes)}"
        return ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8), wrong
