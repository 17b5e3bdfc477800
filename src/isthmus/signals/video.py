"""Files of moving pictures as signals, and signals as files again, through PyAV.

Pictures are read one at a time, so a long film needs no more memory than a short one. What comes
out is RGB of 8 bits, whatever the file holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

from isthmus.errors import BrokenFileError, InvalidInputError, IsthmusError, require
from isthmus.roles import Signal

SUFFIXES = (".mp4", ".mkv", ".mov", ".m4v", ".webm", ".avi")
"""Files that are taken for moving pictures."""

WRITTEN = (".mp4", ".mkv")


def open_video(path: str | Path) -> Signal:
    """Open a file of moving pictures; its sound is left out.

    Args:
        path: mp4, mkv, mov, webm or avi.

    Returns:
        Chunks uint8 [1, 3, H, W]; ``rate`` is pictures a second as a fraction, and the mean of them
        where they vary. How many there are, only the end tells.

    Raises:
        BrokenFileError: It is missing or damaged.
        InvalidInputError: It is empty or holds no moving pictures.
        MissingExtraError: PyAV is not installed.
    """
    path, av = Path(path), _av()
    try:
        if path.stat().st_size == 0:
            raise InvalidInputError(f"{path} is empty (0 bytes); give a video")
        with av.open(str(path)) as file:
            if not file.streams.video:
                raise InvalidInputError(f"{path} holds no moving pictures; give a video")
            stream = file.streams.video[0]
            width, height = int(stream.width), int(stream.height)
            rate = Fraction(stream.average_rate or stream.guessed_rate or 25)
    except IsthmusError:
        raise
    except OSError as error:
        raise BrokenFileError(f"{path} cannot be read ({error.strerror or error})") from error
    except (av.error.FFmpegError, ValueError) as error:
        raise BrokenFileError(f"{path} cannot be read as a video ({_said(error)})") from error

    def chunks() -> Iterator[torch.Tensor]:
        count = 0
        try:
            with av.open(str(path)) as file:
                for frame in file.decode(video=0):
                    if (frame.height, frame.width) != (height, width):
                        raise InvalidInputError(f"{path} changes its size; cut it there")
                    values = np.ascontiguousarray(frame.to_ndarray(format="rgb24"))
                    yield torch.from_numpy(values).permute(2, 0, 1)[None].contiguous()
                    count += 1
        except IsthmusError:
            raise
        except (av.error.FFmpegError, OSError, ValueError) as error:
            raise BrokenFileError(
                f"{path} is damaged after {count} picture(s) ({_said(error)})"
            ) from error
        if not count:
            raise BrokenFileError(f"{path} holds no picture that can be decoded")

    info = {
        "medium": "video",
        "dtype": "uint8",
        "shape": [None, 3, height, width],
        "rate": f"{rate.numerator}/{rate.denominator}",
    }
    return Signal(info, chunks())


def save_video(path: str | Path, signal: Signal, *, exact: bool = False, crf: float = 18) -> None:
    """Write moving pictures as H.264, in one pass; the file that was there is replaced whole.

    Args:
        path: An .mp4 or .mkv file.
        signal: Chunks uint8 [T, 3, H, W], of any size. Odd sizes keep colours of full size, since
            half of them is no whole number; some players do not show such files.
        exact: Lose nothing (H.264 of RGB, which needs a player that knows it).
        crf: Quality otherwise: lower is better and larger.

    Raises:
        InvalidInputError: No video, or a name that is none for it.
        BrokenFileError: It cannot be written.
        MissingExtraError: PyAV is not installed.
    """
    from isthmus.signals.files import replaced

    path, av, info = Path(path), _av(), signal.info
    if path.suffix.lower() not in WRITTEN:
        raise InvalidInputError(f"{path}: video is written as {' or '.join(WRITTEN)}")
    shape, kind = info["shape"], info["dtype"]
    if signal.medium != "video" or kind != "uint8" or len(shape) != 4 or shape[1] != 3:
        raise InvalidInputError(f"give a video uint8 [T, 3, H, W], not {kind} {shape}")
    height, width = shape[2:]
    count = 0
    with replaced(path) as part:
        try:
            with av.open(str(part), "w") as file:
                stream = file.add_stream(
                    "libx264rgb" if exact else "libx264", rate=Fraction(info.get("rate", "25/1"))
                )
                stream.width, stream.height = width, height
                odd = height % 2 or width % 2
                stream.pix_fmt = "rgb24" if exact else "yuv444p" if odd else "yuv420p"
                stream.options = {"qp": "0"} if exact else {"crf": f"{crf:g}"}
                for chunk in signal.chunks:
                    for values in chunk.permute(0, 2, 3, 1).contiguous().numpy():
                        file.mux(stream.encode(av.VideoFrame.from_ndarray(values, format="rgb24")))
                        count += 1
                file.mux(stream.encode(None))
        except IsthmusError:
            raise
        except (av.error.FFmpegError, ValueError) as error:
            raise InvalidInputError(f"{path} cannot be written ({_said(error)})") from error
        if not count:
            raise InvalidInputError(f"{path}: there are no pictures to write")


def _av() -> Any:
    return require("av", "codec")


def _said(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
