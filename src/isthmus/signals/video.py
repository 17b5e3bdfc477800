"""Files of moving pictures as signals, and signals as files again, through PyAV.

::

    open_video ─▶ RGB of 8 bits, whatever the file holds       what codecs that learn want
    open_film  ─▶ the file's own planes, times and sound       what classical codecs want

Pictures are read one at a time, so a long film needs no more memory than a short one. Films that
are to be shown turned come out upright.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
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

NUMBERS = 1 << 22
"""Numbers of a chunk of a film, about."""

LAYOUTS = {"gray": 1, "420": 3, "422": 3, "444": 3, "rgb": 3}
"""Planes by layout: brightness alone; with two of colour, of a quarter, half or all of its
pixels; red, green and blue."""

_NAMES = {"gray": "gray", "420": "yuv420p", "422": "yuv422p", "444": "yuv444p", "rgb": "gbrp"}
FORMATS = {
    (layout, bits): name if bits == 8 else f"{name}{bits}le"
    for layout, name in _NAMES.items()
    for bits in (8, 10, 12)
}
"""Pixel formats by layout and bits, as FFmpeg names them."""

_KNOWN = {name: key for key, name in FORMATS.items()}
#: Formats that hold the same values in another order.
_MOVED = {"nv12": "yuv420p", "nv21": "yuv420p", "p010le": "yuv420p10le"}
_LIKE = {**_MOVED, "pal8": "gbrp"}
_LIKE |= {f"yuvj{n}p": f"yuv{n}p" for n in ("420", "422", "444")}
_LIKE |= dict.fromkeys(("rgb24", "bgr24", "rgb0", "bgr0", "0rgb", "0bgr"), "gbrp")


@dataclass
class Film(Signal):
    """A film on its way into a codec: pictures, and what goes beside them.

    Where colours have fewer pixels than brightness (``info["layout"]`` 420 or 422), chunks repeat
    each of them, so that all planes have one size; every second one gives the plane back.

    Attributes:
        unit: Seconds that one step of ``times`` takes.
        times: Of the pictures of the chunk that was given last.
        looks: ``colorspace``, ``color_range``, ``color_primaries`` and ``color_trc``, as FFmpeg
            numbers them.
        tracks: Streams of sound, as PyAV has them.
        packets: Number of a track and coded sound, read since somebody emptied this list.
        notes: What does not come along, in words.
    """

    unit: Fraction = Fraction(1, 25)
    times: list[int] = field(default_factory=list)
    looks: dict[str, int] = field(default_factory=dict)
    tracks: list[Any] = field(default_factory=list)
    packets: list[tuple[int, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def open_video(path: str | Path) -> Film:
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
    return _opened(Path(path), planes=False, exact=False)


def open_film(path: str | Path, *, exact: bool = True) -> Film:
    """Open a file of moving pictures with its own planes, times and sound.

    Args:
        path: mp4, mkv, mov, webm or avi.
        exact: Planes as they are; False gives brightness and colours of a quarter of its pixels
            (420) of 8 or 10 bits, whatever the file holds.

    Returns:
        Chunks uint8, or int32 for more than 8 bits, [n, planes, H, W]; ``info`` has ``layout`` and
        ``bits`` besides what a video has.

    Raises:
        BrokenFileError: It is missing or damaged.
        InvalidInputError: It is empty, holds no moving pictures, or such that are not known here.
        MissingExtraError: PyAV is not installed.
    """
    return _opened(Path(path), planes=True, exact=exact)


def _opened(path: Path, *, planes: bool, exact: bool) -> Film:
    av = _av()
    try:
        if path.stat().st_size == 0:
            raise InvalidInputError(f"{path} is empty (0 bytes); give a video")
        file = av.open(str(path))
    except IsthmusError:
        raise
    except OSError as error:  # those of FFmpeg that have no number of their own are such as well
        said = f"({getattr(error, 'strerror', None) or _said(error)})"
        raise BrokenFileError(f"{path} cannot be read as a video {said}") from error
    except (av.error.FFmpegError, ValueError) as error:
        raise BrokenFileError(f"{path} cannot be read as a video ({_said(error)})") from error
    try:
        return _begun(path, file, planes, exact)
    except BaseException:
        file.close()
        raise


def _begun(path: Path, file: Any, planes: bool, exact: bool) -> Film:
    """A film whose first picture has been decoded: only that says what it really is."""
    if not file.streams.video:
        raise InvalidInputError(f"{path} holds no moving pictures; give a video")
    stream = file.streams.video[0]
    stream.thread_type = "AUTO"
    rate = Fraction(stream.average_rate or stream.guessed_rate or 25)
    rate = rate.limit_denominator(100_000) if rate > 0 else Fraction(25)
    film = Film({}, (), stream.time_base or 1 / rate)
    if planes:
        film.tracks = list(file.streams.audio)
    pictures = _pictures(path, file, film, rate)
    time, first = next(pictures)
    turn = round(first.rotation / 90) % 4
    high, wide = first.height, first.width
    if turn % 2:
        high, wide = wide, high
    form = _LIKE.get(first.format.name, first.format.name)
    layout, bits = _KNOWN.get(form, ("", 8))
    if planes and not exact and (layout not in ("gray", "420") or bits > 10):
        deep = max(part.bits for part in first.format.components) > 8
        layout, bits = ("420", 10 if deep else 8)
    elif planes and not layout:
        raise InvalidInputError(
            f"{path} has pixels of the kind {first.format.name}, which are not coded exactly; "
            "give another codec, or convert it to yuv444p"
        )
    film.info = {
        "medium": "video",
        "dtype": "uint8" if not planes or bits == 8 else "uint16",
        "shape": [None, LAYOUTS[layout] if planes else 3, high, wide],
        "rate": f"{rate.numerator}/{rate.denominator}",
    }
    if planes:
        film.info |= {"layout": layout, "bits": bits}
        film.looks = _looks(first, converted=FORMATS[layout, bits] != form)
    elif file.streams.audio:
        film.notes.append("its sound is left out")
    if len(file.streams.video) > 1:
        film.notes.append("the first of its films is taken, the others are left out")
    if len(file.streams) > len(file.streams.video) + len(file.streams.audio):
        film.notes.append("its subtitles and data are left out")
    size = (first.height, first.width)
    each = 1 if not planes else max(1, NUMBERS // (LAYOUTS[layout] * high * wide))
    wanted = FORMATS[layout, bits] if planes else "rgb24"

    def chunks() -> Iterator[torch.Tensor]:
        found, times = [], []
        for now, frame in _chain((time, first), pictures):
            if (frame.height, frame.width) != size:
                raise InvalidInputError(f"{path} changes its size; cut it there")
            found.append(torch.rot90(values_of(frame, wanted), turn, (1, 2)))
            times.append(now)
            if len(found) == each:
                film.times = times
                yield torch.stack(found)
                found, times = [], []
        if found:
            film.times = times
            yield torch.stack(found)

    film.chunks = chunks()
    return film


def _looks(frame: Any, converted: bool) -> dict[str, int]:
    """What the numbers of a picture mean, once it has or has not been converted."""
    names = ("colorspace", "color_range", "color_primaries", "color_trc")
    looks = {name: int(getattr(frame, name)) for name in names}
    if frame.format.name.startswith("yuvj"):
        looks["color_range"] = 2
    if converted:
        looks["color_range"] = 1
        if looks["colorspace"] in (0, 2):  # of RGB, or unknown: FFmpeg converts as of BT.601
            looks["colorspace"] = 6
    return looks


def _chain(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest


def _pictures(path: Path, file: Any, film: Film, rate: Fraction) -> Iterator[tuple[int, Any]]:
    """Times and pictures; packets of sound go into the film as they come."""
    av, count, before = _av(), 0, None
    step = max(1, round(1 / (rate * film.unit)))
    promised = float((file.duration or 0) / av.time_base)
    try:
        with file:
            for packet in file.demux([file.streams.video[0], *film.tracks]):
                if packet.stream.type == "audio":
                    if packet.dts is not None:  # the last of a stream is empty
                        film.packets.append((packet.stream.index, packet))
                    continue
                for frame in packet.decode():
                    now = frame.pts
                    if now is None or (before is not None and now <= before):
                        now = 0 if before is None else before + step
                    yield now, frame
                    count, before = count + 1, now
    except IsthmusError:
        raise
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise BrokenFileError(
            f"{path} is damaged after {count} picture(s) ({_said(error)})"
        ) from error
    if not count:
        raise BrokenFileError(f"{path} holds no picture that can be decoded")
    seconds = float(((before or 0) + step) * film.unit)
    if seconds < promised - 1:
        film.notes.append(
            f"its pictures end after {seconds:.1f} of {promised:.1f} s; the file may be cut off"
        )


def values_of(frame: Any, form: str) -> torch.Tensor:
    """The values of a picture of PyAV.

    Args:
        frame: The picture.
        form: ``rgb24``, or one of :data:`FORMATS`: what it is converted to, where it is another.

    Returns:
        uint8, or int32 for more than 8 bits, [planes, H, W]; red, green, blue in this order.
    """
    layout, bits = _KNOWN.get(form, ("rgb", 8))
    if layout == "rgb" and bits == 8:
        if frame.format.name == "gbrp":
            return torch.from_numpy(
                np.stack([_values(frame.planes[i], frame, 8) for i in (2, 0, 1)])
            )
        flat = np.ascontiguousarray(frame.to_ndarray(format="rgb24"))
        return torch.from_numpy(flat).permute(2, 0, 1).contiguous()
    name = frame.format.name.replace("yuvj", "yuv")
    # brightness is a plane of its own already; a conversion would change its range
    bright = layout == "gray" and name.startswith("yuv") and frame.format.components[0].bits == bits
    if name != form and not bright:
        if frame.format.name not in _MOVED:  # the range that video has
            frame = frame.reformat(format=form, dst_color_range=1)
        else:
            frame = frame.reformat(format=form)
    high, wide = frame.height, frame.width
    found = []
    for plane in frame.planes[: LAYOUTS[layout]]:
        values = _values(plane, frame, bits)
        for axis, length in enumerate((high, wide)):
            if values.shape[axis] < length:
                values = values.repeat(2, axis).take(range(length), axis)
        found.append(values)
    if layout == "rgb":
        found = [found[2], found[0], found[1]]
    stacked = np.stack(found)
    return torch.from_numpy(stacked if bits == 8 else stacked.astype(np.int32))


def frame_of(values: torch.Tensor, form: str) -> Any:
    """A picture of PyAV, from values as :func:`values_of` gives them.

    Args:
        values: [planes, H, W]; a format with more planes gets grey in those that are missing.
        form: One of :data:`FORMATS`, or ``bgr0``.
    """
    count, high, wide = values.shape
    frame: Any = _av().VideoFrame(wide, high, form)
    if form == "bgr0":
        packed = np.zeros((high, wide, 4), np.uint8)
        packed[..., :3] = values.flip(0).permute(1, 2, 0).numpy()
        lines = np.asarray(memoryview(frame.planes[0])).view(np.uint8)
        lines = lines.reshape(-1, frame.planes[0].line_size)
        lines[:high, : 4 * wide] = packed.reshape(high, -1)
        return frame
    layout, bits = _KNOWN[form]
    order = (1, 2, 0) if layout == "rgb" else range(len(frame.planes))
    for plane, number in zip(frame.planes, order, strict=False):
        lines = np.asarray(memoryview(plane)).view(np.uint8 if bits == 8 else np.uint16)
        lines = lines.reshape(-1, plane.line_size // lines.itemsize)
        lines[:] = 1 << (bits - 1)  # coders look beyond the ends of lines
        if number < count:
            y, x = (2 if plane.height < high else 1), (2 if plane.width < wide else 1)
            lines[: plane.height, : plane.width] = values[number, ::y, ::x].numpy()
    return frame


def _values(plane: Any, frame: Any, bits: int) -> Any:
    """A plane without what fills its lines, as an array of its own."""
    values = np.asarray(memoryview(plane)).view(np.uint8 if bits == 8 else np.uint16)
    lines = values.reshape(-1, plane.line_size // values.itemsize)
    return lines[: plane.height, : plane.width].copy()


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
