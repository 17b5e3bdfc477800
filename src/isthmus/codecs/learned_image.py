"""Pictures with loss: a learned transform and its entropy model, one model for all rates.

::

    x ─▶ g_a ─▶ y / step ─round─▶ range coder, by tables that z, step and picture choose
                  ▲                     │
        the finest step within          ▼
        the rate that is asked for      y^ · step ─▶ g_s ─▶ x^

The transform begins as a block cosine transform and learns what is better for photographs, flat
drawings and their edges. Laws of latents are made wider or narrower for each picture, channel by
channel. The model in the package has 1.1 million weights and has seen a dozen photographs and 300
pictures of dead leaves (:mod:`isthmus.workbench.dead_leaves`): it is at its best with photographs
at few bits. Alpha and grey are coded as pictures without colour.

J. Balle, D. Minnen, S. Singh, S. Hwang, N. Johnston, "Variational image compression with a scale
hyperprior", 2018, arXiv:1802.01436.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from isthmus.codecs.container import Frame, Header
from isthmus.codecs.entropy import HyperCoder
from isthmus.codecs.hyperprior import HyperpriorCodec
from isthmus.codecs.laws import one_thread
from isthmus.errors import BrokenFileError, InvalidInputError
from isthmus.models.transform_codec import FRACTIONS, HYPER, TransformCodec, pad_to
from isthmus.nn.likelihood import SCALES, GaussianConditional, scale_at
from isthmus.roles import Medium, Signal
from isthmus.signals.image import Pictured
from isthmus.training.data import Data
from isthmus.training.loop import Plan
from isthmus.training.picture_codec import PictureCodecLearner
from isthmus.training.system import Scale

WIDEST = 1 << 14
"""Columns of a picture at most."""

BAND = 1 << 20
"""Pixels that are coded together, about."""

REACH = 8
"""Latents that a pixel, and pixels that a latent depends on, to each side; of latents."""

LEVELS, FINEST = 36, -16
"""How many steps there are, 2^(level / 8), and the level of the smallest."""

BEGIN = 16
"""Batches that laws begin from."""

WIDER = range(-3, 13)
"""Places in the table of deviations by which a law may be wider than the model says."""

Bands = Sequence[tuple[int, Tensor, Tensor, HyperCoder]]
"""Rows of pixels, y [P, M, h, w], whole z, and the coder that knows z, of each band."""

_TOLD, _FAR = 128, 1 << 20

_ADAM = Plan(1, "adam", 1e-3, "cosine", 50, validate_every=200)


@dataclass(frozen=True)
class Settings:
    """Settings of the codec and its training.

    Attributes:
        width: N, channels of the transforms.
        latents: M.
        stages: Halvings of a picture.
        hyper: Channels of z.
        prior_width: Channels of the entropy model's nets.
        gain: What latents begin as, times the waves of pixels of 0 to 1.
        trade: lambda at step 1; falls with the square of the step.
        steps: Smallest and largest step that is learnt.
        scales: Smallest and largest factor by which pictures are scaled before they are cut.
        grid: Share of the training at the end that is on the grid of whole numbers.
        side: Of a crop.
        batch_size: Crops of a batch.
    """

    width: int = 128
    latents: int = 192
    stages: int = 4
    hyper: int = 64
    prior_width: int = 128
    gain: float = 5.0
    trade: float = 0.01
    steps: tuple[float, float] = (0.25, 5.0)
    scales: tuple[float, float] = (0.5, 1.0)
    grid: float = 0.1
    side: int = 256
    batch_size: int = 8


class LearnedImage(HyperpriorCodec):
    """The codec; ``module`` is a :class:`~isthmus.models.transform_codec.TransformCodec`.

    Example:
        >>> LearnedImage.step(0), LearnedImage.step(16), LearnedImage.step(LEVELS - 1) > 5
        (0.25, 1.0, True)
    """

    name = "learned-image"
    family = "parts"
    reads = "pictures"
    medium: ClassVar[Medium] = "image"
    numerics = "int"
    fields = ("most",)
    rates: ClassVar[tuple[float, ...]] = (0.25, 0.5, 1.0, 2.0)
    settings_type = Settings
    scales: ClassVar[Mapping[str, Scale]] = {
        "test": Scale(
            Settings(8, 12, 2, 2, 8, side=32, batch_size=2, grid=0.2),
            replace(_ADAM, steps=10, warmup_steps=2, validate_every=10),
            "workbench:photographs-few",
        ),
        "small": Scale(
            Settings(64, 96, 3, 16, 48, side=128, batch_size=4),
            replace(_ADAM, steps=2000),
            "workbench:photographs",
        ),
        "paper": Scale(
            Settings(),
            replace(_ADAM, steps=1_000_000, learning_rate=1e-4, validate_every=20_000),
            "workbench:photographs",
        ),
    }

    def __init__(self, settings: Settings | None = None) -> None:
        s: Settings = settings or Settings()
        super().__init__(s)
        sizes = (s.width, s.latents, s.stages, s.hyper, s.prior_width)
        self.module = TransformCodec(3, *sizes, temporal=False, gain=s.gain, steady=True)

    @classmethod
    def untrained(cls, settings: Settings, data: Data[Pictured]) -> Self:
        """A new codec, whose laws begin as wide as latents of some crops are."""
        codec = cls(settings)
        learner = codec.learner(data, _ADAM)
        with torch.no_grad():
            x = torch.cat([learner.batch(part)[0] for part in range(BEGIN)])
            codec.module.law.begin(codec.module.g_a(x - 0.5))
        return codec

    def learner(self, data: Data[Pictured], plan: Plan) -> PictureCodecLearner:
        """See :class:`~isthmus.training.picture_codec.PictureCodecLearner`."""
        self._coder = None
        return PictureCodecLearner(self.module, self.settings, data, plan)

    # coding -----------------------------------------------------------------------------------

    @staticmethod
    def step(level: int) -> float:
        """What latents are rounded to multiples of."""
        return float(2.0 ** ((level + FINEST) / 8))

    def parameters(self, info: Mapping[str, Any], rate: float | None = None) -> dict[str, Any]:
        """The rate that is asked for, in thousandths of a bit a pixel; 0 takes step 1.

        Raises:
            InvalidInputError: A picture that is not coded, or a rate that is none.
        """
        self._check(info, InvalidInputError)
        if rate is not None and not 0.001 <= rate <= 1000:
            raise InvalidInputError(f"a rate is 0.001 to 1000 bits a pixel, not {rate}")
        return {"most": 0 if rate is None else int(rate * 1000)}

    def _check(self, info: Mapping[str, Any], error: type[Exception]) -> tuple[int, int, int]:
        """Planes to code (colour, alpha), height and width."""
        channels, height, width = info["shape"]
        if not 1 <= channels <= 4 or info["dtype"] != "uint8":
            raise error(
                f"this codec takes 1 to 4 planes of uint8, not {channels} of {info['dtype']}"
            )
        if not (height > 0 and 0 < width <= WIDEST):
            raise error(f"this codec takes pictures of 1 to {WIDEST} columns, not {width}")
        return 2 - channels % 2, height, width

    def _bands(self, height: int, width: int) -> list[slice]:
        """Rows that are coded together: nets and decoders need no more memory for more of them."""
        m = self.module.multiple
        rows = max(1, BAND // (-(-width // m) * m * m)) * m
        return [slice(top, min(height, top + rows)) for top in range(0, height, rows)]

    @torch.inference_mode()
    def analyse(self, pixels: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Latents [P, M, h, w] and whole z of each band of a picture uint8 [C, H, W].

        Colour is the first of P pictures, alpha the second. A band is seen with what lies around
        it, so there are no seams.
        """
        m, f = self.module.multiple, self.module.multiple // HYPER  # pixels of a z, of a latent
        found = []
        for band in self._bands(*pixels.shape[1:]):
            above = min(band.start, REACH * f)
            x = pixels[None, :, band.start - above : band.stop + REACH * f].float() / 255
            shown = [x[:, : 3 if len(pixels) > 2 else 1].expand(-1, 3, -1, -1)]
            shown += [x[:, -1:].expand(-1, 3, -1, -1)] * (len(pixels) % 2 == 0)
            with one_thread():
                y = self.module.g_a(pad_to(torch.cat(shown), m) - 0.5)
                high = HYPER * -(-(band.stop - band.start) // m)
                y = y[:, :, above // f :][:, :, :high]
                found.append((y, _whole(self.module.law.h_a(y))))
        return found

    def rounded(self, y: Tensor, level: int) -> Tensor:
        """Whole numbers of latents at a level, int64."""
        return _whole(y / self.step(level))

    @torch.inference_mode()
    def synthesise(self, around: Sequence[Tensor | None], level: int, channels: int) -> Tensor:
        """Pixels uint8 [C, H, W] of the second of three bands of whole latents."""
        before, y, after = around
        assert y is not None
        above = before[:, :, -REACH:] if before is not None else y[:, :, :0]
        below = after[:, :, :REACH] if after is not None else y[:, :, :0]
        with one_thread():
            seen = torch.cat([above, y, below], 2).float() * self.step(level)
            x = self.module.g_s(seen) + 0.5
        f = self.module.multiple // HYPER
        x = x[:, :, above.shape[2] * f :][:, :, : y.shape[2] * f]
        x = (x * 255).round().clamp(0, 255).to(torch.uint8)
        grey = x.float().mean(1).round().to(torch.uint8)
        colour = x[0] if channels > 2 else grey[:1]
        return colour if channels % 2 else torch.cat([colour, grey[1:]])

    def encode(self, signal: Signal, header: Header) -> Iterator[Frame]:
        """A frame for each band: the level, laws where they are told, then the latents.

        Raises:
            InvalidInputError: This picture does not fit into the rate.
        """
        _, height, width = self._check(header.signal, InvalidInputError)
        pixels, most = torch.cat(list(signal.chunks), 1), header.parameters["most"]
        none = self.module.law.no_past
        bands = [
            (band.stop - band.start, y, z, self.coder.knowing(z, none(z)))
            for band, (y, z) in zip(self._bands(height, width), self.analyse(pixels), strict=True)
        ]
        made = self._within(bands, most * height * width // 8000) if most else None
        if most and made is None:
            least = 8 * _size(self._coded(bands, LEVELS - 1)) / (height * width)
            raise InvalidInputError(
                f"this picture needs {least:.3f} bits a pixel or more here, not {most / 1000}; "
                "ask for more, or scale it down"
            )
        yield from made or self._coded(bands, -FINEST)

    def _coded(self, bands: Bands, level: int) -> list[Frame]:
        """The frame of each band at a level."""
        frames = []
        for rows, y, z, known in bands:
            whole = self.rounded(y, level)
            coder, told = self._laws(known, whole, z, level)
            data = told + coder.compress(whole, z, self.module.law.no_past(z))
            frames.append(Frame.of(_symbols(whole, z), data, samples=rows, reset=True))
        return frames

    def _within(self, bands: Bands, room: int) -> list[Frame] | None:
        """Frames of the finest level that fits into so many bytes; None where none does."""
        low, high, found = 0, LEVELS, None
        while low < high:
            middle = (low + high) // 2
            frames = self._coded(bands, middle)
            if _size(frames) <= room:
                high, found = middle, frames
            else:
                low = middle + 1
        return found

    @torch.inference_mode()
    def _laws(
        self, known: HyperCoder, y: Tensor, z: Tensor, level: int
    ) -> tuple[HyperCoder, bytes]:
        """The coder of whole latents of a band, and the bytes that tell of it.

        Those are the level, and where that pays half a byte a channel: how much wider its law is.
        """
        coder = known.at(level + FINEST)
        mean, index = coder.prior(z, self.module.law.no_past(z))
        each = []
        for wider in WIDER:
            scale = scale_at((index + wider).clamp(0, SCALES - 1).float())
            bits = GaussianConditional.bits(y.float(), mean / FRACTIONS, scale)
            each.append(bits.sum((0, 2, 3)))
        costs = torch.stack(each)  # [widths, M]
        least, best = costs.min(0)
        if costs[-WIDER.start].sum() - least.sum() < 4 * len(best):
            return coder, bytes([level])
        halves = F.pad(best, (0, len(best) % 2)).view(-1, 2)
        told = bytes([level | _TOLD, *(16 * halves[:, 0] + halves[:, 1]).tolist()])
        return known.at(level + FINEST, _wider(best)), told

    def _told(self, data: bytes) -> tuple[int, HyperCoder, bytes]:
        """Level, coder, and the bytes left for it, of what :meth:`_laws` has told.

        Raises:
            BrokenFileError: It has not.
        """
        level, count = (data[0] & ~_TOLD if data else LEVELS), (self.settings.latents + 1) // 2
        if level >= LEVELS or (data[0] & _TOLD and len(data) <= count):
            raise BrokenFileError("the file names a step or laws that there are not")
        if not data[0] & _TOLD:
            return level, self.coder.at(level + FINEST), data[1:]
        halves = torch.tensor(list(data[1 : 1 + count]))
        best = torch.stack([halves // 16, halves % 16], 1).flatten()[: self.settings.latents]
        return level, self.coder.at(level + FINEST, _wider(best)), data[1 + count :]

    def decode(self, header: Header, frames: Iterable[Frame]) -> Iterator[Tensor]:
        """The bands of the picture, each once the next has arrived."""
        planes, height, width = self._check(header.signal, BrokenFileError)
        m, channels = self.module.multiple, header.signal["shape"][0]
        bands, level = self._bands(height, width), -1
        around: list[Tensor | None] = [None, None, None]
        held: list[int] = []

        def shown() -> Tensor:
            return self.synthesise(around, level, channels)[:, : held.pop(0), :width]

        for band, frame in zip(bands, frames, strict=False):  # no frame beyond the bands is taken
            own, coder, data = self._told(frame.payload)
            if level not in (-1, own):
                raise BrokenFileError("the file names two steps for one picture")
            level, rows = own, band.stop - band.start
            high, wide = (HYPER * -(-n // m) for n in (rows, width))
            none = torch.zeros(planes, 0, high, wide, dtype=torch.int64)
            shape = (planes, self.settings.latents, high, wide)
            y, z = coder.decompress(data, shape, none)
            frame.verify(_symbols(y, z))
            around = [*around[1:], y]
            held.append(rows)
            if around[1] is not None:
                yield shown()
        if held:
            around = [*around[1:], None]
            yield shown()


def _size(frames: Iterable[Frame]) -> int:
    return sum(len(frame.payload) for frame in frames)


def _wider(best: Tensor) -> Tensor:
    return (best + WIDER.start)[:, None, None]


def _whole(x: Tensor) -> Tensor:
    return x.round().clamp(-_FAR, _FAR).long()


def _symbols(y: Tensor, z: Tensor) -> Tensor:
    return torch.cat([z.flatten(), y.flatten()])
