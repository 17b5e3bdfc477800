"""Trials that codecs of moving pictures are put to: bits of each frame, and classical coders."""

from __future__ import annotations

import io
from dataclasses import dataclass

import torch
from torch import Tensor

from isthmus.codecs import av_bridge
from isthmus.codecs.base import TrainedCodec, pack, unpack
from isthmus.codecs.frames import parts, sealed
from isthmus.codecs.peers import peers
from isthmus.errors import BrokenFileError, DesyncError
from isthmus.metrics.images import psnr
from isthmus.roles import Signal
from isthmus.training.clip_codec import CLIPS, GRID, ClipCodec, Told


def signal(frames: Tensor) -> Signal:
    """Pictures uint8 [T, 3, H, W] as a film of unknown length."""
    info = {"medium": "video", "dtype": "uint8", "shape": [None, *frames.shape[1:]], "rate": "25/1"}
    return Signal(info, [frames])


@dataclass(frozen=True)
class Coded:
    """Clips that went into files and came back.

    Attributes:
        files: The files.
        bits: Of the payload of each picture, checks of symbols left out, [N, T].
        psnr_db: Of each picture, [N, T].
        back: What came back, uint8 [N, T, 3, H, W].
    """

    files: list[bytes]
    bits: Tensor
    psnr_db: Tensor
    back: Tensor

    def later(self, pixels: int) -> float:
        """Bits a pixel of all pictures but the first of each clip."""
        return float(self.bits[:, 1:].double().mean()) / pixels


def coded(codec: TrainedCodec, clips: Tensor) -> Coded:
    """Clips uint8 [N, T, 3, H, W] through files."""
    files, bits, quality, back = [], [], [], []
    for clip in clips:
        file = io.BytesIO()
        pack(codec, signal(clip), file)
        _, frames, width = parts(file.getvalue())
        found = torch.cat(list(unpack(file.getvalue(), codec=codec).signal.chunks))
        files.append(file.getvalue())
        bits.append([8 * (len(payload) - width) for _, payload in frames])
        quality.append(psnr(found, clip))
        back.append(found)
    return Coded(files, torch.tensor(bits), torch.stack(quality), torch.stack(back))


@torch.no_grad()
def on_the_grid(module: ClipCodec, told: Told, clips: Tensor) -> float:
    """Bits of clips with the prior on the grid of whole numbers, over those in floating point."""
    x = clips.float() / 255
    on, away = (float(module(x, told, stage)[1].sum()) for stage in (GRID, CLIPS))
    return on / away


def without(data: bytes, number: int) -> bytes:
    """A film of unknown length that lacks a frame, all checksums made to fit."""
    head, frames, width = parts(data)
    return sealed(head, frames[:number] + frames[number + 1 :], width, len(frames) - 1)


def noticed(codec: TrainedCodec, data: bytes, number: int) -> bool:
    """Whether a lost frame is found out at the one after it, by an error of isthmus.

    Symbols of another law mostly decode to others, which their check tells
    (:class:`~isthmus.errors.DesyncError`); some cannot be decoded at all.
    """
    shown = 0
    try:
        for _ in unpack(without(data, number), codec=codec).signal.chunks:
            shown += 1
    except (BrokenFileError, DesyncError):
        return shown == number
    return False


def there_and_back(clips: Tensor) -> Tensor:
    """Clips [N, T, ...] and the same clips backwards, [2N, T, ...].

    What a place in time holds is then the same in the mean; only what a codec does may differ.
    """
    return torch.cat([clips, clips.flip(1)])


def sheet(clips: Tensor, across: int) -> Tensor:
    """Clips [N, T, 3, H, W] side by side, [T, 3, ...]: headers then count for little.

    Example:
        >>> sheet(torch.zeros(4, 8, 3, 64, 64), 2).shape
        torch.Size([8, 3, 128, 128])
    """
    rows = [torch.cat(list(row), -1) for row in torch.split(clips, across)]
    return torch.cat(rows, -2)


def classical(clips: Tensor, wanted_db: float) -> dict[str, tuple[float, float]]:
    """Bits a pixel and PSNR of classical coders, each at the setting nearest to a quality.

    Args:
        clips: uint8 [N, T, 3, H, W]; N is a square.
        wanted_db: The quality.

    Raises:
        MissingExtraError: Pillow or PyAV is not installed.
    """
    film = sheet(clips, round(len(clips) ** 0.5))
    pixels, found = film[:, 0].numel(), {}
    jpeg = next(p for p in peers("image") if p.name == "JPEG")
    tries = []
    for quality in range(5, 96, 5):
        files = [jpeg.encode(x, 0, quality) for x in film]
        back = torch.stack([jpeg.decode(f) for f in files])
        tries.append((8 * sum(map(len, files)) / pixels, float(psnr(back, film).mean())))
    found["JPEG"] = min(tries, key=lambda t: abs(t[1] - wanted_db))
    tries, shape = [], (film.shape[0], film.shape[2], film.shape[3])
    for crf in range(14, 45, 2):
        data = av_bridge.encode(_yuv(film), "h265", layout="444", crf=crf, delay=False)
        planes = av_bridge.decode(data.pack(), "h265", shape, layout="444")
        tries.append((8 * data.size / pixels, float(psnr(_rgb(planes), film).mean())))
    found["x265"] = min(tries, key=lambda t: abs(t[1] - wanted_db))
    return found


#: Luma and differences of colour of red, green and blue, full range (JFIF).
_MATRIX = torch.tensor(
    [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]],
    dtype=torch.float64,
)


def _yuv(film: Tensor) -> list[Tensor]:
    planes = torch.einsum("ij,tjhw->tihw", _MATRIX, film.double())
    planes[:, 1:] += 128
    return list(planes.round().clamp(0, 255).to(torch.uint8).unbind(1))


def _rgb(planes: list[Tensor]) -> Tensor:
    values = torch.stack(planes, 1).double()
    values[:, 1:] -= 128
    out = torch.einsum("ij,tjhw->tihw", torch.linalg.inv(_MATRIX), values)
    return out.round().clamp(0, 255).to(torch.uint8)
