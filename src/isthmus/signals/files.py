"""Files of sound, pictures and films as signals, exactly as they are, and signals as files again.

Sound is read and written in pieces, so that an hour of it needs no more memory than a minute. A
picture comes in bands of rows. Whole numbers stay whole numbers: 8, 16, 24 and 32-bit sound, 8 and
16-bit pictures, grey or coloured, with or without alpha.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

from isthmus.errors import BrokenFileError, InvalidInputError, require
from isthmus.roles import Signal
from isthmus.signals import image, video

SOUNDS = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".au", ".w64")
"""Files that are taken for sound."""

PIECE = 1 << 16
"""Samples of a chunk of sound."""

#: Sample formats of libsndfile that hold whole numbers, and how many bits of an int32 they fill.
_WHOLE = {"PCM_S8": 8, "PCM_U8": 8, "PCM_16": 16, "PCM_24": 24, "PCM_32": 32, "ALAC_16": 16}
_SUBTYPES = {"int8": "PCM_S8", "int16": "PCM_16", "int24": "PCM_24", "int32": "PCM_32"}
_LAYOUTS = {"gray": "grey", "420": "4:2:0", "422": "4:2:2", "444": "4:4:4", "rgb": "RGB"}
_COLOURS = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4}


def medium_of(path: str | Path) -> str:
    """``audio``, ``image`` or ``video``, by the suffix of a file.

    Raises:
        InvalidInputError: It is another one.
    """
    suffix = Path(path).suffix.lower()
    if suffix in SOUNDS:
        return "audio"
    if suffix in image.SUFFIXES:
        return "image"
    if suffix in video.SUFFIXES:
        return "video"
    raise InvalidInputError(
        f"{path}: {suffix or 'a name without suffix'!r} is neither sound nor a picture nor a film; "
        f"give one of {' '.join((*SOUNDS, *image.SUFFIXES, *video.SUFFIXES))}"
    )


def open_signal(path: str | Path, *, exact: bool = True) -> Signal:
    """Open a file of sound, a picture or a film.

    Args:
        path: The file; its suffix says what it is.
        exact: Whole numbers as they are, as lossless codecs need them; False gives sound as
            float32 and pictures as 8 bits. Films come as RGB of 8 bits in any case;
            :func:`~isthmus.signals.video.open_film` has their own planes.

    Raises:
        BrokenFileError: It is missing, damaged or cut off.
        InvalidInputError: It is empty, or neither of them.
        MissingExtraError: ``soundfile``, Pillow or PyAV is not installed.
    """
    path, medium = Path(path), medium_of(path)
    if medium == "video":
        return video.open_video(path)
    return _sound(path, exact) if medium == "audio" else _picture(path, exact)


def save_signal(path: str | Path, signal: Signal, *, exact: bool = True) -> None:
    """Write a signal into a file, in the format of its suffix; what was there is replaced whole.

    Args:
        path: The file.
        signal: Sound, a picture or a film.
        exact: Keep the type of the samples or refuse; False writes sound in float32 as 16 bits,
            cut at the limits, and films as H.264 with little loss.

    Raises:
        InvalidInputError: The format of that name cannot hold the signal, or is not known.
        BrokenFileError: It cannot be written.
    """
    path, medium = Path(path), signal.medium
    if medium not in ("audio", "image", "video"):
        raise InvalidInputError(f"{medium} is written neither as sound nor as a picture nor a film")
    if medium_of(path) != medium:
        raise InvalidInputError(f"{path} is no name for {medium}; choose another suffix")
    if medium == "video":
        video.save_video(path, signal, exact=exact)
        return
    with replaced(path) as part:
        if medium == "audio":
            _save_sound(part, path, signal, exact)
        else:
            image.write_pixels(part, torch.cat(list(signal.chunks), 1), str(path))


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A temporary name that takes the place of a file once the block has ended well.

    Raises:
        BrokenFileError: It cannot be written.
    """
    name = None
    try:
        try:
            handle, name = tempfile.mkstemp(
                prefix=f".{path.stem[:40]}-", suffix=path.suffix, dir=path.parent
            )
            os.close(handle)
            yield Path(name)
            Path(name).chmod(0o644)
            Path(name).replace(path)
        except OSError as error:
            raise BrokenFileError(
                f"{path} cannot be written ({error.strerror or error})"
            ) from error
    finally:
        if name is not None:
            Path(name).unlink(missing_ok=True)


# sound --------------------------------------------------------------------------------------------


def _sound(path: Path, exact: bool) -> Signal:
    soundfile: Any = require("soundfile", "codec")
    try:
        if path.stat().st_size == 0:
            raise InvalidInputError(f"{path} is empty (0 bytes); give a recording")
        info = soundfile.info(str(path), verbose=True)
    except OSError as error:
        raise BrokenFileError(f"{path} cannot be read ({error.strerror or error})") from error
    except RuntimeError as error:  # soundfile's own errors
        reason = str(error).split(": ", 1)[-1].rstrip(".")
        raise BrokenFileError(f"{path} cannot be read as sound ({reason})") from error
    # libsndfile reads what is left of a file that was cut off and only notes it in its log
    if any("data" in x and "should be" in x for x in info.extra_info.splitlines()):
        raise BrokenFileError(f"{path} is cut off: its header promises more than it holds")
    # how long an MP3 file is, only its end tells
    total = None if info.format == "MP3" else int(info.frames)
    if info.frames < 1:
        raise InvalidInputError(f"{path} holds no samples; give a recording")
    bits = _WHOLE.get(info.subtype, 0) if exact else 0
    if exact and not bits and info.subtype == "DOUBLE":
        raise InvalidInputError(f"{path} has 64-bit samples, which are not coded; store 32 bits")
    signal = {
        "medium": "audio",
        "dtype": f"int{bits}" if bits else "float32",
        "shape": [int(info.channels), total],
        "rate_hz": int(info.samplerate),
    }

    def chunks() -> Iterator[torch.Tensor]:
        done = 0
        try:
            with soundfile.SoundFile(str(path)) as file:
                while total is None or done < total:
                    count = PIECE if total is None else min(PIECE, total - done)
                    data = file.read(count, "int32" if bits else "float32", always_2d=True)
                    if total is None and not len(data):
                        return
                    if total is not None and len(data) < count:
                        raise BrokenFileError(
                            f"{path} is cut off: {done + len(data)} of {total} samples could "
                            "be read"
                        )
                    done += len(data)
                    if not bits and not np.isfinite(data).all() and not exact:
                        raise InvalidInputError(f"{path} holds samples that are no finite numbers")
                    # libsndfile puts whole numbers into the upper bits
                    yield torch.from_numpy((data >> (32 - bits) if bits else data).T.copy())
        except (OSError, RuntimeError) as error:
            raise BrokenFileError(f"{path} cannot be read as sound ({error})") from error

    return Signal(signal, chunks())


def _save_sound(part: Path, path: Path, signal: Signal, faithful: bool) -> None:
    soundfile: Any = require("soundfile", "codec")
    info = dict(signal.info)
    rounded = not faithful and info["dtype"] == "float32"
    if rounded:
        info["dtype"] = "int16"
    kind = {"oga": "OGG", "opus": "OGG", "aif": "AIFF"}.get(
        path.suffix.lower().lstrip("."), path.suffix.lstrip(".").upper()
    )
    keeps, dtype = kind not in ("OGG", "MP3"), str(info["dtype"])
    subtype = _SUBTYPES.get(dtype, "FLOAT") if keeps else ("OPUS" if ".opus" in path.name else None)
    if keeps and not soundfile.check_format(kind, subtype):
        if dtype == "int8" and soundfile.check_format(kind, "PCM_U8"):
            subtype = "PCM_U8"
        else:
            raise InvalidInputError(
                f"{path}: {kind} cannot hold samples of the type {dtype}; write .wav"
            )
    shift = 32 - int(dtype[3:]) if dtype.startswith("int") else 0
    try:
        with soundfile.SoundFile(
            str(part), "w", int(info["rate_hz"]), int(info["shape"][0]), subtype, format=kind
        ) as file:
            for chunk in signal.chunks:
                data = chunk.T.numpy()
                if rounded:
                    data = np.rint(data.clip(-1, 1) * 32767).astype(np.int32)
                if shift:
                    data = (data.astype(np.int64) << shift).astype(np.int32)
                file.write(np.ascontiguousarray(data))
    except RuntimeError as error:  # soundfile's own errors
        raise InvalidInputError(f"{path} cannot be written as {kind} ({error})") from error


# pictures -----------------------------------------------------------------------------------------


def _picture(path: Path, exact: bool) -> Signal:
    pixels = image.read_pixels(path, deep=exact)
    rows = max(1, (1 << 22) // max(1, pixels.shape[0] * pixels.shape[2]))
    info = {
        "medium": "image",
        "dtype": "uint8" if pixels.dtype == torch.uint8 else "uint16",
        "shape": list(pixels.shape),
    }
    return Signal(info, iter(torch.split(pixels, rows, 1)))


def described(info: Mapping[str, Any]) -> str:
    """What a signal is, in words.

    Example:
        >>> described({"medium": "image", "dtype": "uint8", "shape": [3, 20, 30]})
        '30 x 20 pixels, RGB, 8 bits'
    """
    shape, dtype = info["shape"], str(info["dtype"])
    if info["medium"] == "image":
        colour = {n: k for k, n in _COLOURS.items()}.get(shape[0], f"{shape[0]} planes")
        return f"{shape[2]} x {shape[1]} pixels, {colour}, {dtype.lstrip('uint')} bits"
    if info["medium"] == "audio":
        length = "unknown length" if shape[1] is None else f"{shape[1] / info['rate_hz']:.2f} s"
        return f"{length}, {info['rate_hz']} Hz, {shape[0]} channel(s), {dtype}"
    if info["medium"] == "video":
        layout = info.get("layout", {1: "gray", 3: "rgb"}.get(shape[1], f"{shape[1]} planes"))
        bits = info.get("bits", 8)
        rate = f"{float(Fraction(info.get('rate', '25/1'))):.4g} pictures a second"
        return (
            f"{shape[3]} x {shape[2]} pixels, {_LAYOUTS.get(layout, layout)}, {bits} bits, {rate}"
        )
    if info["medium"] == "bytes":
        return f"a file of {shape[0]:,} bytes"
    return f"{info['medium']} {dtype} {shape}"
