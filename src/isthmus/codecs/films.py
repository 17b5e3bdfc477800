"""Films through classical codecs, in our container: AV1, with loss; FFV1 and H.264, without.

::

    film ──▶ AV1, FFV1 .. ─┬─▶ Matroska, as it grows ──▶ embedded frames of an .ist file
             its sound ────┘  (packets as they are)           │
    .mkv .mp4 .webm ◀── the same packets, decoded and checked on the way ◀──┘

Nothing here is learnt: these codecs are what FFmpeg has, and what is coded is named so. The frames
of a file hold one Matroska stream (frame type 3 of the container), so times of pictures that come
unevenly, colours and sound are kept as people's own players know them. A film that is decoded into
a file is not coded again: its packets move over.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

import torch

from isthmus.codecs.av_bridge import quiet
from isthmus.codecs.base import NO_MODEL
from isthmus.codecs.container import EMBEDDED, Frame, Header
from isthmus.errors import BrokenFileError, InvalidInputError, IsthmusError, require
from isthmus.roles import Medium, Signal
from isthmus.signals.video import FORMATS, Film, frame_of, open_film, values_of

PIECE = 1 << 20
"""Bytes of a frame of the container, at most."""

LEAST = 16
"""Smallest height and width."""

EXACT_MP4 = ("yuv420p", "yuv422p", "yuv444p", "gray", "bgr0")
"""What H.264 without loss takes over from FFV1, for players that do not know that."""


class Films:
    """What both codecs share.

    Args:
        quality: 0 to 100, larger is better and larger; of a codec with loss.

    Attributes:
        encoder: Of FFmpeg.
        decoders: Of FFmpeg, any of which decodes it.
        copied: Files that the packets can move into.
        seen: Pixel formats that a decoder gives instead of the one that was coded.
    """

    id: ClassVar[str]
    lossless: ClassVar[bool]
    encoder: ClassVar[str]
    decoders: ClassVar[tuple[str, ...]]
    copied: ClassVar[tuple[str, ...]]
    seen: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    medium: ClassVar[Medium] = "video"
    numerics: ClassVar[str] = "static"
    fields: ClassVar[tuple[str, ...]] = ()
    fingerprint: ClassVar[bytes] = NO_MODEL

    def __init__(self, quality: float | None = None) -> None:
        if quality is not None and not 0 <= quality <= 100:
            raise InvalidInputError(f"quality is from 0 to 100, got {quality:g}")
        self.quality = quality
        self._out: tuple[Path, Path] | None = None

    # what a subclass says

    def form(self, info: Mapping[str, Any]) -> str:
        """The pixel format that is coded."""
        raise NotImplementedError

    def options(self, parameters: Mapping[str, Any]) -> dict[str, str]:
        """What the encoder is told."""
        raise NotImplementedError

    # the role

    def parameters(self, info: Mapping[str, Any], rate: float | None = None) -> dict[str, Any]:
        """See :class:`~isthmus.roles.Codec`; ``rate`` is kbit/s."""
        self.form(info)
        high, wide = info["shape"][2:]
        if min(high, wide) < LEAST:
            raise InvalidInputError(
                f"films have at least {LEAST} x {LEAST} pixels here, not {wide} x {high}"
            )
        return self._parameters(rate)

    def _parameters(self, rate: float | None) -> dict[str, Any]:
        raise NotImplementedError

    def open(self, path: Path) -> Signal:
        """The film in a file, with its own planes, times and sound."""
        return open_film(path, exact=self.lossless)

    def encode(self, signal: Signal, header: Header) -> Iterator[Frame]:
        """See :class:`~isthmus.roles.Codec`."""
        info, av = signal.info, _av()
        form, rate = self.form(info), Fraction(info.get("rate", "25/1"))
        film = signal if isinstance(signal, Film) else Film(info, signal.chunks, 1 / rate)
        pipe, done, told = _Pipe(), 0, 0
        try:
            with av.open(pipe, "w", format="matroska", options=_PLAIN) as file:
                coder = (
                    "libx264rgb" if form == "bgr0" and self.encoder == "libx264" else self.encoder
                )
                stream = file.add_stream(coder, rate=rate, options=self.options(header.parameters))
                context = stream.codec_context
                context.height, context.width = info["shape"][2:]
                context.pix_fmt, context.thread_count = form, 1
                context.time_base = film.unit
                if "kbps" in header.parameters:
                    context.bit_rate = round(1000 * float(header.parameters["kbps"]))
                for name, value in film.looks.items():
                    setattr(context, name, value)
                with quiet():
                    context.open()
                tracks = {
                    t.index: file.add_stream_from_template(t, opaque=True) for t in film.tracks
                }
                for chunk in film.chunks:
                    times = film.times or range(done, done + len(chunk))
                    for time, picture in zip(times, chunk, strict=True):
                        frame = self._frame(picture, info, form)
                        frame.pts, frame.time_base = time, film.unit
                        file.mux(stream.encode(frame))
                    for number, packet in film.packets:
                        packet.stream = tracks[number]
                        file.mux(packet)
                    film.packets.clear()
                    done += len(chunk)
                    for piece in pipe.taken():
                        yield Frame(piece, kind=EMBEDDED, samples=done - told)
                        told = done
                for number, packet in film.packets:  # of a sound that is longer than its film
                    packet.stream = tracks[number]
                    file.mux(packet)
                file.mux(stream.encode(None))
        except IsthmusError:
            raise
        except (av.error.FFmpegError, OSError, ValueError) as error:
            high, wide = info["shape"][2:]
            raise InvalidInputError(
                f"{self.encoder} refuses this film of {wide} x {high}, {form} ({_said(error)})"
            ) from error
        for piece in pipe.taken():
            yield Frame(piece, kind=EMBEDDED, samples=done - told)
            told = done

    def _frame(self, picture: torch.Tensor, info: Mapping[str, Any], form: str) -> Any:
        if "layout" in info or len(picture) == 1 or form == "bgr0":
            return frame_of(picture, form)
        return frame_of(picture, "gbrp").reformat(format=form)  # RGB through colours of a quarter

    def decode(self, header: Header, frames: Iterable[Frame]) -> Iterator[torch.Tensor]:
        """See :class:`~isthmus.roles.Codec`."""
        info, av = header.signal, _av()
        form = self.form(info)
        high, wide = info["shape"][2:]
        seen = (form, *self.seen.get(form, ()))
        plain = "layout" not in info and info["shape"][1] == 3 and not self.lossless
        given = "rgb24" if plain else FORMATS[_layout(info)]
        # a hostile stream may claim any size; coders round theirs up to whole blocks
        most = {"max_pixels": str((high + 256) * (wide + 256)), "threads": "1"}
        whitelist = {"codec_whitelist": ",".join((*self.decoders, *_SOUND))}
        try:
            with av.open(
                _Payloads(frames),
                format="matroska",
                container_options=whitelist,
                stream_options=[most] * 16,
            ) as file:
                streams = file.streams.video
                if len(streams) != 1 or streams[0].codec_context is None:
                    raise BrokenFileError("an embedded stream holds no film, or several")
                stream = streams[0]
                if stream.codec_context.codec.name not in self.decoders:
                    raise BrokenFileError("an embedded film is coded by another codec")
                stream.codec_context.options = most
                with _Copy(self._out, self.copied, file, form) as copy:
                    for packet in file.demux():
                        if packet.stream.type != "video":
                            copy.packet(packet)
                            continue
                        for frame in packet.decode():
                            name = frame.format.name.replace("yuvj", "yuv")
                            if (frame.height, frame.width) != (high, wide) or name not in seen:
                                raise BrokenFileError("an embedded film has another size or kind")
                            copy.frame(frame)
                            yield values_of(frame, given)[None]
                        copy.packet(packet)
        except IsthmusError:
            raise
        except (av.error.FFmpegError, OSError, ValueError, MemoryError) as error:
            raise BrokenFileError(f"an embedded film cannot be decoded ({_said(error)})") from error

    def save(self, signal: Signal, path: Path, name: Path) -> None:
        """Write a film that :func:`~isthmus.codecs.base.unpack` is decoding with this codec.

        Its packets move over as they are, its sound as well; FFV1 becomes H.264 without loss in an
        ``.mp4`` file. Every picture is decoded on the way, so a damage shows.

        Args:
            signal: What comes out of the ``.ist`` file.
            path: The file to write.
            name: What it will be called.

        Raises:
            InvalidInputError: The file cannot hold this film or its sound.
        """
        suffix = name.suffix.lower()
        known = (*self.copied, ".mp4") if self.lossless else self.copied
        if suffix not in known:
            raise InvalidInputError(f"{name}: {self.id} is written as {', '.join(known)}")
        form = self.form(signal.info)
        high, wide = signal.info["shape"][2:]
        if suffix not in self.copied and (form not in EXACT_MP4 or _halved(form, high, wide)):
            raise InvalidInputError(
                f"{name}: no .mp4 file holds {form} of {wide} x {high} exactly; write .mkv"
            )
        self._out = (path, name)
        for _ in signal.chunks:
            pass


class Av1(Films):
    """AV1 through SVT-AV1: brightness and colours of a quarter of its pixels, 8 or 10 bits.

    Example:
        >>> grey = {"medium": "video", "dtype": "uint8", "shape": [2, 1, 32, 48]}
        >>> Av1(quality=100).parameters(grey), Av1().parameters(grey, rate=60)
        ({'crf': '7'}, {'kbps': '60'})
    """

    id = "parts/av1"
    lossless = False
    encoder = "libsvtav1"
    decoders = ("libdav1d", "libaom-av1", "av1")
    copied = (".mkv", ".mp4", ".webm")
    qualities = (10.0, 30.0, 50.0, 70.0, 90.0)

    def form(self, info: Mapping[str, Any]) -> str:
        """The pixel format that is coded."""
        layout, bits = _layout(info)
        if bits > 10 or layout not in ("gray", "420", "rgb"):
            raise InvalidInputError(f"{self.id} does not code {layout} of {bits} bits")
        return FORMATS["420", bits]

    def options(self, parameters: Mapping[str, Any]) -> dict[str, str]:
        """What the encoder is told; one thread, so that two runs give equal bytes."""
        crf = {"crf": str(parameters["crf"])} if "crf" in parameters else {}
        return {"preset": "8", "svtav1-params": "lp=1", **crf}

    def _parameters(self, rate: float | None) -> dict[str, Any]:
        if rate is not None and self.quality is not None:
            raise InvalidInputError("give a rate or a quality, not both")
        if rate is not None:
            if not 1 <= rate < 1e6:
                raise InvalidInputError(
                    f"a rate of films is from 1 to 1000000 kbit/s, got {rate:g}"
                )
            return {"kbps": f"{rate:g}"}
        quality = 50.0 if self.quality is None else self.quality
        return {"crf": f"{round(63 - 0.56 * quality)}"}


class Ffv1(Films):
    """FFV1: every plane of the film as it is, grey, colours of any size, RGB, 8 to 12 bits."""

    id = "parts/ffv1"
    lossless = True
    encoder = "ffv1"
    decoders: ClassVar[tuple[str, ...]] = ("ffv1",)
    copied: ClassVar[tuple[str, ...]] = (".mkv",)

    def form(self, info: Mapping[str, Any]) -> str:
        """The pixel format that is coded."""
        layout = _layout(info)
        if layout not in FORMATS:
            raise InvalidInputError(f"{self.id} does not code {layout[0]} of {layout[1]} bits")
        return "bgr0" if layout == ("rgb", 8) else FORMATS[layout]

    def options(self, parameters: Mapping[str, Any]) -> dict[str, str]:
        """What the encoder is told: version 3, with the larger contexts."""
        return {"level": "3", "context": "1", "coder": "1", "g": "1", "slicecrc": "0"}

    def _parameters(self, rate: float | None) -> dict[str, Any]:
        if rate is not None or self.quality is not None:
            raise InvalidInputError(f"{self.id} loses nothing, so it has no rate or quality")
        return {}


class LosslessH264(Ffv1):
    """H.264 without loss: every plane as it is, predicted from other pictures.

    Smaller than FFV1 where pictures repeat, above all on films that were lossy before. Colours of
    fewer pixels want even sizes, and there are 8 or 10 bits; FFV1 takes the rest.
    """

    id = "parts/lossless-h264"
    encoder = "libx264"
    decoders = ("h264",)
    copied = (".mkv", ".mp4")
    seen: ClassVar[Mapping[str, tuple[str, ...]]] = {"bgr0": ("gbrp",)} | {
        # grey is coded as colour without colour by some builds
        name: (name.replace("gray", "yuv420p"),)
        for name in ("gray", "gray10le")
    }

    def form(self, info: Mapping[str, Any]) -> str:
        """The pixel format that is coded."""
        form = super().form(info)
        high, wide = info["shape"][2:]
        if _halved(form, high, wide) or form not in _H264:
            raise InvalidInputError(
                f"{self.id} does not code {form} of {wide} x {high}; give --codec ffv1"
            )
        return form

    def options(self, parameters: Mapping[str, Any]) -> dict[str, str]:
        """What the encoder is told."""
        return {"preset": "medium", **_EXACT}


# details ------------------------------------------------------------------------------------------

_H264: tuple[str, ...] = ("gray", "yuv420p", "yuv422p", "yuv444p", "bgr0")
_H264 += ("gray10le", "yuv420p10le", "yuv422p10le", "yuv444p10le")


def _halved(form: str, high: int, wide: int) -> bool:
    """Whether planes of colour would have half a pixel."""
    return bool((wide % 2 and form[:6] in ("yuv420", "yuv422")) or (high % 2 and "420" in form))


#: Nothing is lost; the stream names pictures a second, not the steps that times are counted in.
_EXACT = {"qp": "0", "x264-params": "force-cfr=1"}
#: No random numbers in the file, and nothing that asks for going back in it.
_PLAIN = {"fflags": "bitexact", "live": "1"}
_SOUND: tuple[str, ...] = (
    "aac",
    "mp3",
    "mp3float",
    "opus",
    "libopus",
    "vorbis",
    "flac",
    "alac",
    "ac3",
    "eac3",
)
_SOUND += ("pcm_s16le", "pcm_s24le", "pcm_f32le", "amrnb", "amrwb")


def _layout(info: Mapping[str, Any]) -> tuple[str, int]:
    """Layout and bits of a film; a plain video is RGB or grey of 8 bits."""
    planes = info["shape"][1]
    layout, bits = info.get("layout", "gray" if planes == 1 else "rgb"), info.get("bits", 8)
    key = (layout, bits)
    wanted = "uint8" if bits == 8 else "uint16"
    if key not in FORMATS or planes != (1 if layout == "gray" else 3) or info["dtype"] != wanted:
        raise InvalidInputError(
            f"films are uint8 [T, 1 or 3, H, W], or planes of a known layout, not {layout!r} of "
            f"{bits!r} bits in {info['dtype']} {info['shape']}"
        )
    return key


class _Pipe:
    """Takes what a muxer writes; it cannot go back."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def write(self, data: Any) -> int:
        self._parts.append(bytes(data))
        return len(data)

    def taken(self) -> Iterator[bytes]:
        """What was written since the last time, in pieces."""
        data = b"".join(self._parts)
        self._parts.clear()
        for at in range(0, len(data), PIECE):
            yield data[at : at + PIECE]


class _Payloads:
    """Payloads of frames, one after the other, as a file that cannot go back."""

    def __init__(self, frames: Iterable[Frame]) -> None:
        self._frames = iter(frames)
        self._now = io.BytesIO()

    def read(self, count: int) -> bytes:
        while not (data := self._now.read(count)):
            frame = next(self._frames, None)
            if frame is None:
                return b""
            if frame.kind != EMBEDDED:
                self._frames = iter(())  # PyAV reads on, and prints what a second error drops
                raise BrokenFileError("a film has a frame of another kind than embedded streams")
            self._now = io.BytesIO(frame.payload)
        return data


class _Copy:
    """Where a film goes that is decoded into a file; nowhere without a path."""

    def __init__(
        self, out: tuple[Path, Path] | None, copied: tuple[str, ...], given: Any, form: str
    ) -> None:
        self.file: Any = None
        if out is None:
            return
        path, self.name = out
        self.same = self.name.suffix.lower() in copied
        with self._named():
            self.file = _av().open(str(path), "w")
            self._streams(given, form)

    def _streams(self, given: Any, form: str) -> None:
        stream = given.streams.video[0]
        self.streams = {t.index: self._like(t) for t in given.streams.audio}
        if self.same:
            self.streams[stream.index] = self._like(stream)
            return
        coder = "libx264rgb" if form == "bgr0" else "libx264"
        self.stream = self.file.add_stream(coder, rate=stream.average_rate, options=_EXACT)
        self.stream.height, self.stream.width = stream.height, stream.width
        self.stream.pix_fmt = form
        self.stream.codec_context.time_base = stream.time_base
        for name in ("colorspace", "color_range", "color_primaries", "color_trc"):
            setattr(self.stream.codec_context, name, getattr(stream.codec_context, name))

    def _like(self, stream: Any) -> Any:
        return self.file.add_stream_from_template(stream, opaque=True)

    def packet(self, packet: Any) -> None:
        if self.file is not None and packet.dts is not None and packet.stream.index in self.streams:
            packet.stream = self.streams[packet.stream.index]
            with self._named():
                self.file.mux(packet)

    def frame(self, frame: Any) -> None:
        if self.file is not None and not self.same:
            frame.pict_type = 0  # the encoder chooses
            with self._named():
                self.file.mux(self.stream.encode(frame))

    @contextmanager
    def _named(self) -> Iterator[None]:
        """An error of writing is none of the file that is read."""
        try:
            yield
        except (_av().error.FFmpegError, OSError, ValueError) as error:
            raise BrokenFileError(
                f"{self.name} cannot be written ({_said(error)}); .mkv holds most"
            ) from error

    def __enter__(self) -> _Copy:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self.file is None:
            return
        if kind is not None:
            with suppress(Exception):  # the first error counts
                self.file.close()
            return
        with self._named():
            if not self.same:
                self.file.mux(self.stream.encode(None))
            self.file.close()


def _av() -> Any:
    return require("av", "codec")


def _said(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
