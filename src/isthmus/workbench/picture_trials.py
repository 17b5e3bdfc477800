"""Trials that codecs of pictures are put to: rate and PSNR, lost frames, classical coders."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from isthmus.codecs.base import TrainedCodec, pack, unpack
from isthmus.codecs.frames import parts
from isthmus.codecs.peers import peers
from isthmus.errors import InvalidInputError
from isthmus.metrics.images import psnr
from isthmus.roles import Signal

FLOORS: Mapping[str, float] = {"JPEG": 1, "WEBP": 0, "AVIF": 0}
"""The lowest quality of classical coders that Pillow has."""


def signal(pixels: Tensor) -> Signal:
    """A picture uint8 [C, H, W]."""
    info = {"medium": "image", "dtype": "uint8", "shape": list(pixels.shape)}
    return Signal(info, [pixels])


def sheets(pictures: Tensor, across: int) -> Tensor:
    """Pictures side by side, so that headers and a coder's last word count for little.

    Args:
        pictures: [N, C, H, W]; N is a multiple of the square of ``across``.
        across: Pictures along each side of a sheet.

    Returns:
        [N / across^2, C, across H, across W].

    Example:
        >>> sheets(torch.arange(4).view(4, 1, 1, 1), 2)[0, 0].tolist()
        [[0, 1], [2, 3]]
    """
    count, channels, height, width = pictures.shape
    if count % across**2:
        raise InvalidInputError(f"{count} pictures do not fill sheets of {across} by {across}")
    grid = pictures.view(-1, across, across, channels, height, width).permute(0, 3, 1, 4, 2, 5)
    return grid.reshape(-1, channels, across * height, across * width)


@dataclass(frozen=True)
class Coded:
    """Pictures that went into files and came back.

    Attributes:
        bits: Of all payloads, checks of symbols left out, a pixel.
        file_bits: Of the whole files, a pixel.
        psnr_db: Mean of the pictures.
        back: What came back, uint8 [N, C, H, W].
    """

    bits: float
    file_bits: float
    psnr_db: float
    back: Tensor


def coded(codec: TrainedCodec, pictures: Tensor, rate: float | None = None) -> Coded:
    """Pictures uint8 [N, C, H, W], each through a file."""
    payload = whole = 0
    back = []
    for picture in pictures:
        file = io.BytesIO()
        sizes = pack(codec, signal(picture), file, rate=rate, compact=True)
        payload, whole = payload + sizes.payload, whole + sizes.file
        opened = unpack(file.getvalue(), codec=codec)
        back.append(torch.cat(list(opened.signal.chunks), 1))
    found, pixels = torch.stack(back), pictures[:, 0].numel()
    quality = float(psnr(found, pictures).mean())
    return Coded(8 * payload / pixels, 8 * whole / pixels, quality, found)


def spoilt(data: bytes, numbers: Sequence[int]) -> bytes:
    """A file in which frames have damaged payloads, as they come over a bad line."""
    head, frames, width = parts(data)
    out, at = bytearray(data), len(head) + width
    for number, (_, payload) in enumerate(frames):
        at = data.index(payload, at)
        if number in numbers:
            out[at + len(payload) - 1] ^= 0xFF
        at += len(payload) + width
    return bytes(out)


def lossy(codec: TrainedCodec, pictures: Tensor) -> float:
    """Mean PSNR of pictures, each from a file that has lost one frame, another in each."""
    found = []
    for number, picture in enumerate(pictures):
        file = io.BytesIO()
        frames = pack(codec, signal(picture), file).frames
        data = spoilt(file.getvalue(), [number % frames])
        opened = unpack(data, codec=codec, allow_partial=True)
        found.append(torch.cat(list(opened.signal.chunks), 1))
    return float(psnr(torch.stack(found), pictures).mean())


def curve(codec: Any, pictures: Tensor) -> dict[int, Coded]:
    """What :func:`coded` says of each size of the codebook, by size."""
    sizes, rates = codec.settings.sizes, codec.rates[::-1]
    return {k: coded(codec, pictures, rate) for k, rate in zip(sizes, rates, strict=True)}


@dataclass(frozen=True)
class Mended:
    """Pictures that lost indices of the whole codebook at random.

    Attributes:
        psnr_db: Mean of the pictures, by what filled the gaps: ``transformer``, ``nearest``, or
            ``none`` where nothing was lost.
        right: Share of the gaps that were filled as they were, likewise, and by the ``commonest``
            index.
    """

    psnr_db: Mapping[str, float]
    right: Mapping[str, float]


def losses(codec: Any, pictures: Tensor, share: float = 0.2) -> Mended:
    """Lose a share of the indices of each picture uint8 [N, C, H, W], and fill the gaps."""
    codes = torch.cat([codec.analyse(picture, 0) for picture in pictures])
    noise = torch.rand(codes.shape, generator=torch.Generator().manual_seed(0)).flatten(1)
    rank = noise.argsort(1).argsort(1)
    gaps = (rank < round(share * rank.shape[1])).view(codes.shape)
    guesses = {
        "transformer": codec.but(mended=True).mend(codes, gaps, 0),
        "nearest": codec.but(mended=False).mend(codes, gaps, 0),
        "none": codes,
    }
    shape, quality, right = tuple(pictures.shape[1:]), {}, {}
    for arm, found in guesses.items():
        back = torch.stack([codec.synthesise(c[None], 0, shape) for c in found])
        quality[arm] = float(psnr(back, pictures).mean())
        right[arm] = float((found == codes)[gaps].double().mean())
    commonest = codes.flatten().mode().values
    right["commonest"] = float((codes[gaps] == commonest).double().mean())
    return Mended(quality, right)


def floors(pictures: Tensor) -> dict[str, tuple[float, float]]:
    """Bits a pixel of whole files and mean PSNR of classical coders at their lowest quality.

    Raises:
        MissingExtraError: Pillow is not installed.
    """
    found = {}
    for peer in peers("image"):
        if peer.lossless or peer.name not in FLOORS:
            continue
        files = [peer.encode(picture, 0, FLOORS[peer.name]) for picture in pictures]
        back = torch.stack([peer.decode(file) for file in files])
        bits = 8 * sum(map(len, files)) / pictures[:, 0].numel()
        found[peer.name] = (bits, float(psnr(back, pictures).mean()))
    return found
