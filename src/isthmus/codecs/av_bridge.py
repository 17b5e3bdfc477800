"""Classical video codecs in memory, through PyAV: planes in, counted bytes out, planes back.

::

    planes [T, H, W] each ──encode()──▶ packets + private data ──Coded.pack()──▶ bytes
                                                                    │
    planes, cut to their size ◀──────────decode(bytes, format)──────┘

Nothing is converted on the way: grey stays grey (its plane is read through its line size, since
H.264 decodes to colour whatever was coded), colours are coded as the planes that were given. Frames
are padded to what a coder can take and cut again. Messages that encoders write about their settings
are left out; every byte that a decoder needs is counted. One thread, so two runs give equal bytes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from isthmus.codecs.container import leb, unleb
from isthmus.errors import BrokenFileError, InvalidInputError, UnknownNameError, require

Layout = Literal["gray", "420", "444", "rgb"]
"""One plane; one and two of half the size; three; three that hold green, blue and red."""


@dataclass(frozen=True)
class Coder:
    """A video codec.

    Attributes:
        name: What people call it.
        encoder: Of libavcodec.
        decoder: Of libavcodec.
        formats: Pixel formats by layout and bits. Grey that is coded as colour without colour is
            among them.
        least: Smallest height and width of pictures that are coded by themselves.
        apart: The same of pictures that are predicted from each other: x265 4 reads and writes
            beyond its buffers when such pictures have a side below 96 or so.
        block: What sides are padded to a multiple of.
        qualities: ``crf`` to try, from small files to large ones.
    """

    name: str
    encoder: str
    decoder: str
    formats: dict[tuple[str, int], str]
    least: int
    apart: int
    block: int
    qualities: tuple[float, ...]


def _deep(layouts: dict[str, str], bits: Sequence[int]) -> dict[tuple[str, int], str]:
    return {
        (layout, b): name if b == 8 else f"{name}{b}le"
        for layout, name in layouts.items()
        for b in bits
    }


_YUV = {"gray": "gray", "420": "yuv420p", "444": "yuv444p"}
CODERS = {
    "h264": Coder(
        "H.264", "libx264", "h264", _deep(_YUV, (8, 10)), 16, 16, 16, (45, 38, 32, 26, 20)
    ),
    "h265": Coder(
        "H.265",
        "libx265",
        "hevc",
        _deep({**_YUV, "rgb": "gbrp"}, (8, 10, 12)),
        16,
        128,
        2,
        (45, 38, 32, 26, 20),
    ),
    "av1": Coder(
        "AV1",
        "libsvtav1",
        "libdav1d",
        _deep({"gray": "yuv420p", "420": "yuv420p"}, (8, 10)),
        16,
        16,
        2,
        (60, 50, 40, 30, 20),
    ),
}
"""Codecs by name."""


@dataclass(frozen=True)
class Coded:
    """A coded sequence.

    Attributes:
        packets: One for each frame, in the order of decoding.
        private: What the decoder needs before them and they do not hold.
    """

    packets: tuple[bytes, ...]
    private: bytes = b""

    @property
    def size(self) -> int:
        """Bytes of packets and private data."""
        return len(self.private) + sum(map(len, self.packets))

    def pack(self) -> bytes:
        """All of it in one piece; each part is led by its length."""
        return b"".join(leb(len(x)) + x for x in (self.private, *self.packets))

    @classmethod
    def unpack(cls, data: bytes) -> Coded:
        """What :meth:`pack` has written.

        Raises:
            BrokenFileError: It is something else.

        Example:
            >>> Coded.unpack(Coded((b"ab", b"c")).pack()).packets
            (b'ab', b'c')
        """
        parts: list[bytes] = []
        at = 0
        while at < len(data) or not parts:
            length, at = unleb(data, at)
            if length > len(data) - at:
                raise BrokenFileError("a packet of the video is cut off")
            parts.append(data[at : at + length])
            at += length
        return cls(tuple(parts[1:]), parts[0])


def missing(coder: str) -> str:
    """Why a codec cannot be used here; empty where it can.

    Args:
        coder: A key of :data:`CODERS`.

    Raises:
        UnknownNameError: There is none of that name.
        MissingExtraError: PyAV is not installed.
    """
    how = _coder(coder)
    av: Any = require("av", "codec")
    for name, mode in ((how.encoder, "w"), (how.decoder, "r")):
        try:
            av.codec.Codec(name, mode)
        except (av.error.FFmpegError, ValueError):
            return f"this build of PyAV lacks {name}; install the wheel: pip install av"
    return ""


def encode(
    planes: Sequence[Tensor],
    coder: str = "h265",
    *,
    layout: Layout = "gray",
    bits: int = 8,
    qp: int | None = None,
    crf: float | None = None,
    intra: bool = False,
    delay: bool = True,
    preset: str = "medium",
    rate: Fraction | None = None,
) -> Coded:
    """Code a sequence of pictures.

    Args:
        planes: One or three, [T, H, W] each, of whole numbers from 0 to 2^bits - 1; of ``420`` the
            second and third have half the height and width, rounded up.
        coder: A key of :data:`CODERS`.
        layout: What the planes are.
        bits: 8, 10 or 12.
        qp: A constant step of quantisation, 0 to 51: 6 more double it. It is relative to the range:
            at 12 bits, 0 is fine for what 8 bits cannot hold.
        crf: A constant quality instead, the encoder's own measure. Neither: nothing is lost.
        intra: Code every picture by itself.
        delay: Whether pictures may be predicted from later ones.
        preset: How much the encoder tries, ``ultrafast`` to ``veryslow``.
        rate: Pictures a second.

    Raises:
        InvalidInputError: Planes that do not fit, or what this codec or build cannot do.
        UnknownNameError: No such codec, or no such preset.
        MissingExtraError: PyAV is not installed.

    Example:
        >>> ramp = torch.arange(512).view(2, 16, 16) % 256
        >>> back = decode(encode([ramp]).pack(), "h265", (2, 16, 16))
        >>> torch.equal(back[0], ramp.to(torch.uint8))
        True
    """
    how, form = _format(coder, layout, bits)
    if why := missing(coder):
        raise InvalidInputError(f"{how.name} cannot be coded: {why}")
    if preset not in _PRESETS:
        raise UnknownNameError("preset", preset, list(_PRESETS))
    padded = _padded(planes, layout, bits, how, intra)
    if layout == "gray" and "420" in form:  # a coder without grey gets colour without colour
        half = torch.full_like(padded[0][:, ::2, ::2], 1 << (bits - 1))
        padded = [padded[0], half, half]
    count, height, width = padded[0].shape
    av: Any = require("av", "codec")
    rate = rate or Fraction(25)
    with quiet():
        context: Any = av.CodecContext.create(how.encoder, "w")
        context.width, context.height, context.pix_fmt = width, height, form
        context.framerate, context.time_base, context.thread_count = rate, 1 / rate, 1
        context.options = _options(coder, qp, crf, intra, delay, preset)
        arrays = [x.numpy().astype(np.uint8 if bits == 8 else np.uint16) for x in padded]
        packets = []
        try:
            for number in range(count):
                frame: Any = av.VideoFrame(width, height, form)
                frame.pts = number
                for plane, values in zip(frame.planes, arrays, strict=False):
                    lines = _lines(plane, bits)
                    lines[:] = 0  # coders look beyond the ends of lines
                    lines[: values.shape[1], : values.shape[2]] = values[number]
                packets += [bytes(p) for p in context.encode(frame)]
            packets += [bytes(p) for p in context.encode(None)]
        except (av.error.FFmpegError, ValueError) as error:
            raise InvalidInputError(
                f"{how.name} refuses {count} pictures of {width} x {height}, {form} ({error})"
            ) from error
        private = bytes(context.extradata or b"")
    if coder == "h264":
        packets = [_without_messages(p) for p in packets]
    return Coded(tuple(packets), private)


def decode(
    data: bytes,
    coder: str,
    shape: tuple[int, int, int],
    *,
    layout: Layout = "gray",
    bits: int = 8,
    intra: bool = False,
) -> list[Tensor]:
    """The planes of a coded sequence.

    Args:
        data: What :meth:`Coded.pack` gave.
        coder: A key of :data:`CODERS`.
        shape: [T, H, W] of the first plane as it was given.
        layout: What was given.
        bits: What was given.
        intra: What was given.

    Returns:
        Planes [T, H, W], uint8, or int32 for more than 8 bits.

    Raises:
        BrokenFileError: The bytes are damaged, or hold other pictures.
        InvalidInputError: The build lacks the decoder.
    """
    how, form = _format(coder, layout, bits)
    if why := missing(coder):
        raise InvalidInputError(f"{how.name} cannot be decoded: {why}")
    coded, (count, height, width) = Coded.unpack(data), shape
    high, wide = _size(height, how, intra), _size(width, how, intra)
    av: Any = require("av", "codec")
    context: Any = av.CodecContext.create(how.decoder, "r")
    context.thread_count = 1
    # a hostile stream may claim any size; coders round theirs up to whole blocks
    context.options = {"max_pixels": str((high + 128) * (wide + 128))}
    if coded.private:
        context.extradata = coded.private
    planes: list[list[Any]] = [[] for _ in range(1 if layout == "gray" else 3)]
    try:
        for packet in (*map(av.Packet, coded.packets), None):
            for frame in context.decode(packet):
                if (frame.height, frame.width) != (high, wide) or len(planes[0]) == count:
                    raise BrokenFileError("the video holds other pictures than are named")
                if frame.format.components[0].bits != bits:
                    raise BrokenFileError("the video has other bits than are named")
                if len(frame.planes) < len(planes) or (layout != "gray" and form != _kind(frame)):
                    raise BrokenFileError("the video has other planes than are named")
                for found, plane, (h, w) in zip(
                    planes, frame.planes, _sizes(height, width, layout), strict=False
                ):
                    found.append(_lines(plane, bits)[:h, :w].copy())
    except (av.error.FFmpegError, ValueError, MemoryError) as error:
        raise BrokenFileError(f"the video cannot be decoded ({_first(error)})") from error
    if len(planes[0]) != count:
        raise BrokenFileError(f"the video holds {len(planes[0])} pictures of {count}")
    kind = np.uint8 if bits == 8 else np.int32
    return [torch.from_numpy(np.stack(found).astype(kind, copy=False)) for found in planes]


@contextmanager
def quiet() -> Iterator[None]:
    """SVT-AV1 speaks on standard error unless its environment says otherwise."""
    before = os.environ.get("SVT_LOG")
    os.environ["SVT_LOG"] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ["SVT_LOG"]
        else:
            os.environ["SVT_LOG"] = before


# details ------------------------------------------------------------------------------------------

_PRESETS = (
    "ultrafast",
    "superfast",
    "veryfast",
    "faster",
    "fast",
    "medium",
    "slow",
    "slower",
    "veryslow",
)


def _coder(name: str) -> Coder:
    if name not in CODERS:
        raise UnknownNameError("video codec", name, list(CODERS))
    return CODERS[name]


def _format(coder: str, layout: str, bits: int) -> tuple[Coder, str]:
    how = _coder(coder)
    if (layout, bits) not in how.formats:
        known = ", ".join(f"{name} of {b} bits" for name, b in how.formats)
        raise InvalidInputError(f"{how.name} codes {known} here, not {layout} of {bits} bits")
    return how, how.formats[layout, bits]


def _size(length: int, how: Coder, intra: bool) -> int:
    """What a side is padded to; at least even, since colour may have half of it."""
    return max(how.least if intra else how.apart, length + -length % how.block)


def _sizes(height: int, width: int, layout: str) -> list[tuple[int, int]]:
    small = (-(-height // 2), -(-width // 2)) if layout == "420" else (height, width)
    return [(height, width)] + [small, small] * (layout != "gray")


def _padded(
    planes: Sequence[Tensor], layout: str, bits: int, how: Coder, intra: bool
) -> list[Tensor]:
    """Planes as a coder takes them; edges are repeated, which costs least."""
    first = planes[0] if planes else torch.zeros(0)
    if first.ndim != 3 or not first.numel():
        raise InvalidInputError(f"give planes [T, H, W], not {[list(p.shape) for p in planes]}")
    count, height, width = first.shape
    sizes = _sizes(height, width, layout)
    if [tuple(p.shape) for p in planes] != [(count, h, w) for h, w in sizes]:
        raise InvalidInputError(
            f"{layout} has {count} pictures in planes of {sizes}, not "
            f"{[list(p.shape) for p in planes]}"
        )
    out = []
    high, wide = _size(height, how, intra), _size(width, how, intra)
    for plane, (h, w) in zip(planes, _sizes(high, wide, layout), strict=True):
        if plane.is_floating_point() or int(plane.min()) < 0 or int(plane.max()) >> bits:
            raise InvalidInputError(f"planes hold whole numbers from 0 to {(1 << bits) - 1}")
        edge = (0, w - plane.shape[2], 0, h - plane.shape[1])
        out.append(F.pad(plane.double()[None], edge, mode="replicate")[0])
    return out


def _options(
    coder: str, qp: int | None, crf: float | None, intra: bool, delay: bool, preset: str
) -> dict[str, str]:
    """What the encoder is told."""
    if qp is not None and crf is not None:
        raise InvalidInputError("give a constant step (qp) or a constant quality (crf), not both")
    if not 0 <= (qp or 0) <= 51:
        raise InvalidInputError(f"qp is from 0 to 51, got {qp}")
    if coder == "av1":
        if qp is None and crf is None:
            raise InvalidInputError("AV1 is coded with loss here; give a crf, or take h265")
        more = "lp=1" + (":keyint=1" if intra else "") + ("" if delay else ":pred-struct=1")
        step = crf if crf is not None else qp
        return {"crf": f"{step:g}", "svtav1-params": more, "preset": str(_SVT[preset])}
    if coder == "h264":
        own = {"crf": f"{crf:g}"} if crf is not None else {"qp": str(qp or 0)}
        more = "keyint=1:scenecut=0" if intra else ""
        own |= {"x264-params": more} if more else {}
        return own | {"preset": preset} | ({} if delay else {"bf": "0"})
    says = ["info=0", "log-level=none", "pools=none", "frame-threads=1", "wpp=0"]
    says.append(
        f"crf={crf:g}" if crf is not None else f"qp={qp}" if qp is not None else "lossless=1"
    )
    says += ["keyint=1", "repeat-headers=0"] if intra else []
    says += [] if delay else ["bframes=0"]
    return {"x265-params": ":".join(says), "preset": preset}


_SVT = dict(zip(_PRESETS, (12, 11, 10, 9, 8, 7, 5, 4, 3), strict=True))


def _lines(plane: Any, bits: int) -> Any:
    """The values of a plane with what fills its lines, [lines, values]."""
    values = np.asarray(memoryview(plane)).view(np.uint8 if bits == 8 else np.uint16)
    return values.reshape(-1, plane.line_size // values.itemsize)


def _kind(frame: Any) -> str:
    """The pixel format; full range is named apart and has the same planes."""
    name: str = frame.format.name
    return name.replace("yuvj", "yuv")


def _without_messages(packet: bytes) -> bytes:
    """An Annex B packet without its units of supplemental information (type 6)."""
    units = packet.split(b"\x00\x00\x01")[1:]
    return b"".join(b"\x00\x00\x01" + unit for unit in units if unit and unit[0] & 31 != 6)


def _first(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
