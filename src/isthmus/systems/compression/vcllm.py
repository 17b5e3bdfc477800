"""VcLLM: tensors as grey pictures, which a video codec compresses.

Paper: C. Xu, Y. Wu, X. Yang, B. Chen, M. Lentz, D. Zhuo, L. W. Wills, "VcLLM: Video Codecs are
    Secretly Tensor Codecs", 2024, arXiv:2407.00467
Idea: Laid out as frames of 8 bits, weights and caches go through H.264 or H.265 at any fractional
    number of bits: intra prediction, transform and arithmetic coding are ready, often in hardware.
Differs: Software encoders (x264, x265), no NVENC. Weights and caches are coded, gradients and
    traffic between machines are not. Pixels may have 10 or 12 bits. Where it is smaller, fine
    tensors go in layers: a picture of coarse steps and pictures of ternary digits below them.

    tensor ─▶ tiles [T, h, w] ─▶ low, scale in 16 bits; pixels ─┬▶ H.265 ──────────────┬▶ a frame
                                                  of fine steps └▶ layers, H.264 exact ┘
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from isthmus.claims import Claim, Gate, Row, Ruler, judge
from isthmus.claims import Scale as ClaimScale
from isthmus.codecs import av_bridge, weights
from isthmus.codecs.base import NO_MODEL
from isthmus.codecs.container import Frame, Header
from isthmus.codecs.rangecoder import Decoder, Encoder
from isthmus.errors import BrokenFileError, InvalidInputError
from isthmus.roles import Medium, Signal

CODERS = ("", "h264", "h265")
"""By number, as headers say it; the first packs pixels as they are."""

QPS = tuple(range(51, -1, -1))
"""Steps of one picture, from coarse to fine."""

LAYERS = tuple((first, digits) for digits in range(1, 6) for first in range(11, 33))
"""Steps of layers, from coarse to fine: levels of the first picture, and ternary digits below it.
Of hundreds of levels H.265 takes 1.3 bits a value above their entropy; H.264 takes 0.11 to 0.19
bits above that of 11 to 32 levels, and 0.07 above that of a digit."""


@dataclass(frozen=True)
class Settings:
    """Settings.

    Attributes:
        coder: ``h265``, ``h264`` (as layers are always), or empty: pixels as they are, idea off.
        bits: Of a pixel: 8, 10 or 12 (H.264: 8 or 10; without a coder, 1 to 12).
        qp: The codec's step where no rate is asked for, 0 to 51; None loses nothing of the pixels.
        tile: Longest side of a frame; each has its own low and scale.
        intra: Code every frame by itself, as suits weights.
        preset: How much the encoder tries.
    """

    coder: str = "h265"
    bits: int = 8
    qp: int | None = 20
    tile: int = 1024
    intra: bool = True
    preset: str = "medium"


class Vcllm:
    """The codec of tensors.

    Args:
        settings: Its settings.

    Raises:
        InvalidInputError: No such coder or bits.

    Example:
        >>> x = torch.arange(512.0).view(16, 32)
        >>> coded = Vcllm(Settings("", bits=8)).tensor(x)
        >>> len(coded)  # 512 pixels of 8 bits, one low and one scale, and a word of the coder
        520
    """

    role: ClassVar[str] = "codec"
    name: ClassVar[str] = "vcllm"
    id: ClassVar[str] = "compression/vcllm"
    medium: ClassVar[Medium] = "tensor"
    lossless: ClassVar[bool] = False
    numerics: ClassVar[str] = "static"
    fields: ClassVar[tuple[str, ...]] = ("coder", "bits", "tile", "intra", "millibits")
    fingerprint: ClassVar[bytes] = NO_MODEL

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = s = settings or Settings()
        depths = (8, 10, 12) if s.coder else range(1, 13)
        if s.coder not in CODERS or s.bits not in depths or not 16 <= s.tile <= 4096:
            raise InvalidInputError(
                f"give a coder of {CODERS}, 8, 10 or 12 bits (1 to 12 without one) and tiles of 16 "
                f"to 4096, not {s}"
            )

    def parameters(self, info: Mapping[str, Any], rate: float | None = None) -> dict[str, Any]:
        """What a decoder needs, and the wanted bits a value in thousandths (0: by ``qp``).

        Raises:
            InvalidInputError: No tensor of floats, or no positive rate.
        """
        s = self.settings
        if not str(info["dtype"]).startswith("float"):
            raise InvalidInputError(f"{self.name} codes floats, not {info['dtype']}")
        if rate is not None and (not 0.01 <= rate <= 64 or not s.coder):
            raise InvalidInputError(f"{self.name} takes 0.01 to 64 bits a value, not {rate}")
        found = {"coder": CODERS.index(s.coder), "bits": s.bits, "tile": s.tile}
        return {**found, "intra": int(s.intra), "millibits": round(1000 * (rate or 0))}

    def encode(self, signal: Signal, header: Header) -> Iterator[Frame]:
        """One frame with all tiles."""
        (value,) = signal.chunks
        wanted = header.parameters["millibits"] / 1000
        pixels, data = self._coded(value, wanted)
        yield Frame.of(pixels, data, samples=value.numel(), reset=True)

    def decode(self, header: Header, frames: Iterable[Frame]) -> Iterator[Tensor]:
        """The tensor."""
        p, shape = header.parameters, header.signal["shape"]
        known = set(p) == set(self.fields) and p["coder"] in range(len(CODERS))
        if not known or p["bits"] not in (8, 10, 12) or not 16 <= p["tile"] <= 4096:
            raise BrokenFileError(f"{self.name} never writes the parameters {dict(p)}")
        own = Settings(CODERS[p["coder"]], p["bits"], tile=p["tile"], intra=bool(p["intra"]))
        for frame in frames:
            _, value = _restored(frame.payload, shape, own, frame)
            yield value.to(getattr(torch, header.signal["dtype"]))
            return

    def tensor(self, value: Tensor, rate: float | None = None) -> bytes:
        """The payload of a tensor alone, without a file around it.

        Args:
            value: Of any shape.
            rate: Wanted bits a value at most, in one picture or in layers, whichever errs less; one
                picture by ``qp`` where not given.

        Raises:
            InvalidInputError: A value is no finite number or too large for half precision, or the
                rate is below what the coarsest step needs.
        """
        return self._coded(value, rate or 0.0)[1]

    def restored(self, data: bytes, shape: Iterable[int]) -> Tensor:
        """The tensor of a payload, float32."""
        return _restored(data, list(shape), self.settings)[1]

    def _coded(self, value: Tensor, rate: float) -> tuple[Tensor, bytes]:
        """Pixels as the decoder will see them, and the payload."""
        s, shape = self.settings, list(value.shape)
        tiles = _tiles(_checked(value), s.tile)  # [T, h, w]
        head, whole = _rounded(tiles, 1 << s.bits)
        if not s.coder:
            coder = Encoder()
            coder.uniform(whole.reshape(-1).numpy(), np.full(whole.numel(), 1 << s.bits))
            return whole, head + coder.finish()

        @cache
        def one(qp: int | None) -> bytes:
            how: Any = {"bits": s.bits, "intra": s.intra, "preset": s.preset, "qp": qp}
            return head + b"\0" + av_bridge.encode([whole], s.coder, **how).pack()

        @cache
        def layered(step: tuple[int, int]) -> bytes:
            levels, digits = step
            own, rest = _rounded(tiles, levels * 3**digits)
            pictures = [rest // 3**digits, *(rest // 3**d % 3 for d in reversed(range(digits)))]
            # presets that try more find larger files where nothing is to be found
            how: Any = {"intra": s.intra, "preset": "veryfast"}
            stream = av_bridge.encode([torch.cat(pictures)], "h264", **how).pack()
            return own + bytes([digits]) + stream

        if not rate:
            data = one(s.qp)
            return _restored(data, shape, s)[0], data
        room = rate * value.numel() / 8
        found = [d for d in (_finest(one, QPS, room), _finest(layered, LAYERS, room)) if d]
        if not found:
            least = 8 * len(one(QPS[0])) / value.numel()
            raise InvalidInputError(f"{rate} bits a value are too few; {least:.3f} at least")
        seen = [(*_restored(data, shape, s), data) for data in found]
        pixels, _, data = min(seen, key=lambda x: float((x[1] - value).double().square().sum()))
        return pixels, data


def _finest(coded: Callable[[Any], bytes], steps: Sequence[Any], room: float) -> bytes:
    """What the finest of the steps gives that has room, by bisection; nothing where none has."""
    number = bisect_right(steps, room, key=lambda step: len(coded(step)))
    return coded(steps[number - 1]) if number else b""


def _rounded(tiles: Tensor, levels: int) -> tuple[bytes, Tensor]:
    """Lows and scales of tiles [T, h, w] as bytes, and their pixels, 0 to levels - 1."""
    low = tiles.amin((1, 2)).half()
    scale = ((tiles.amax((1, 2)) - low.float()) / (levels - 1)).clamp(min=6e-8).half()
    pixels = (tiles - low.float()[:, None, None]) / scale.float()[:, None, None]
    head = torch.cat([low, scale]).numpy().astype("<f2").tobytes()
    return head, pixels.round().clamp(0, levels - 1).long()


def _checked(value: Tensor) -> Tensor:
    x = value.detach().float()
    if not x.numel() or not bool(torch.isfinite(x).all()) or float(x.abs().max()) > 6e4:
        raise InvalidInputError("values are finite numbers below 6e4, at least one of them")
    return x


def _cut(shape: Iterable[int], tile: int) -> tuple[int, int, int, int, int, int]:
    """Rows, columns, frames down and across, and a frame's height and width."""
    *rest, columns = tuple(shape) or (1,)
    rows = int(np.prod(rest)) if rest else 1
    down, across = -(-rows // tile), -(-columns // tile)
    return rows, columns, down, across, -(-rows // down), -(-columns // across)


def _tiles(x: Tensor, tile: int) -> Tensor:
    """Frames [T, h, w] of the matrix [everything, last axis]; edges are repeated."""
    rows, columns, down, across, h, w = _cut(x.shape, tile)
    edge = (0, across * w - columns, 0, down * h - rows)
    padded = F.pad(x.reshape(1, rows, columns), edge, mode="replicate")
    return padded.view(down, h, across, w).transpose(1, 2).reshape(-1, h, w)


def _restored(
    data: bytes, shape: list[int], s: Settings, frame: Frame | None = None
) -> tuple[Tensor, Tensor]:
    """Pixels of a payload, and the tensor."""
    rows, columns, down, across, h, w = _cut(shape, s.tile)
    count = down * across
    if len(data) <= 4 * count or (not s.coder and 8 * len(data) < count * h * w * s.bits):
        raise BrokenFileError("the tensor's payload is cut off")
    stats = torch.from_numpy(np.frombuffer(data, "<f2", 2 * count).astype(np.float32))
    if not bool(torch.isfinite(stats).all()):
        raise BrokenFileError("the tensor's lows and scales are no numbers")
    if s.coder:
        digits, stream = data[4 * count], data[4 * count + 1 :]
        if digits > LAYERS[-1][1]:
            raise BrokenFileError(f"{digits} layers below a picture are more than there can be")
        coder, bits = ("h264", 8) if digits else (s.coder, s.bits)
        told: Any = {"bits": bits, "intra": s.intra}
        found = av_bridge.decode(stream, coder, ((digits + 1) * count, h, w), **told)[0]
        pixels, *rest = found.view(digits + 1, count, h, w)
        for digit in rest:
            pixels = 3 * pixels.int() + digit
    else:
        widths = np.full(count * h * w, 1 << s.bits)
        pixels = torch.from_numpy(Decoder(data[4 * count :]).uniform(widths)).view(count, h, w)
    if frame is not None:
        frame.verify(pixels)
    low, scale = (x[:, None, None] for x in stats.view(2, count))
    grid = (pixels.float() * scale + low).view(down, across, h, w).transpose(1, 2)
    return pixels, grid.reshape(down * h, across * w)[:rows, :columns].reshape(shape)


def error(truth: Tensor, other: Tensor) -> float:
    """Squared error relative to the tensor's own square."""
    return float((truth - other).double().square().sum() / truth.double().square().sum())


def bits_at(curve: list[tuple[float, float]], wanted: float) -> float:
    """Bits a value of an error, between the measured points (bits, error) on a logarithmic scale.

    Raises:
        InvalidInputError: The curve does not reach that error on both sides.

    Example:
        >>> round(bits_at([(2.0, 0.04), (4.0, 0.0004)], 0.004), 6)
        3.0
    """
    line = sorted((np.log(e), b) for b, e in curve)
    if not line[0][0] <= np.log(wanted) <= line[-1][0]:
        raise InvalidInputError(f"the curve does not enclose the error {wanted:.2g}")
    return float(np.interp(np.log(wanted), [e for e, _ in line], [b for _, b in line]))


def claim(ruler: Ruler, scale: ClaimScale = "small") -> Claim:
    """Code the matrices of the embedded language model by a video codec and by two rivals."""
    from transformers import AutoModelForCausalLM

    from isthmus.workbench.reference import reference

    model: Any = AutoModelForCausalLM.from_pretrained(reference("pycode-t"), dtype=torch.float32)
    part = "layers.2.self_attn.k_" if scale == "test" else "layers.2."
    matrices = [p.detach() for n, p in model.named_parameters() if p.ndim == 2 and part in n]
    values = sum(m.numel() for m in matrices)

    def measured(coded: Any) -> tuple[float, float]:
        """Bits a value over all matrices, and the mean of their relative errors by size."""
        size, missed = 0.0, 0.0
        for m in matrices:
            bits, back = coded(m)
            size, missed = size + bits, missed + error(m, back) * m.numel()
        return size / values, missed / values

    def video(settings: Settings, rate: float = 0, shuffled: bool = False) -> tuple[float, float]:
        codec, generator = Vcllm(settings), torch.Generator().manual_seed(0)

        def coded(m: Tensor) -> tuple[float, Tensor]:
            order = torch.randperm(m.numel(), generator=generator) if shuffled else None
            given = m if order is None else m.flatten()[order].view(m.shape)
            data = codec.tensor(given, rate)
            back = codec.restored(data, m.shape)
            if order is not None:
                back = torch.empty(m.numel()).index_put_((order,), back.flatten()).view(m.shape)
            return 8.0 * len(data), back

        return measured(coded)

    def grouped(bits: int) -> tuple[float, float]:
        def coded(m: Tensor) -> tuple[float, Tensor]:
            back, each = weights.by_groups(m, bits)
            return each * m.numel(), back

        return measured(coded)

    def ranged(bits: int) -> tuple[float, float]:
        def coded(m: Tensor) -> tuple[float, Tensor]:
            found = weights.quantise(m, bits)
            return 8.0 * len(weights.pack({"m": found})), found.tensor()

        return measured(coded)

    fast: Any = {"preset": "veryfast"}
    ours = [video(Settings(qp=qp, **fast)) for qp in (18, 23, 28, 33)]
    mixed = [video(Settings(qp=qp, **fast), shuffled=True) for qp in (23, 28)]
    one = [video(Settings(bits=b, qp=q, **fast)) for b, q in ((10, None), (12, 0), (12, 5))]
    fine = [video(Settings(bits=12, **fast), rate) for rate in (8.0, 8.2, 8.4)]
    groups = {b: grouped(b) for b in (3, 4, 8)}
    ranges = [ranged(b) for b in (2, 3, 4, 5, 6, 8, 9)]
    plain = [video(Settings(coder="", bits=b)) for b in (1, 2, 3, 4, 5, 6, 8, 10)]
    rows, gates = [], []
    for b, (spent, missed) in groups.items():
        found = bits_at(fine if b == 8 else ours, missed)
        name = f"bits saved at the error of {b} bits in groups of 64"
        gates.append(Gate(name, spent - found, *((">", 0.0) if b == 8 else (">=", 0.4))))
        rows.append(
            Row(
                f"at relative error {missed:.2g}",
                "bits a weight",
                spent,
                found,
                bits_at(plain, missed),
                control=bits_at(ranges, missed),
                note=f"base: {b} bits in groups of 64 with their statistics; off: pixels of fewer "
                "bits, as they are; control: uniform steps and the range coder",
            )
        )
    rows.append(
        Row(
            f"at relative error {groups[8][1]:.2g}, one picture or layers",
            "bits a weight",
            bits_at(one, groups[8][1]),
            bits_at(fine, groups[8][1]),
            None,
            note="base: one picture of 10 or 12 bits; ours: as a rate of 8.0 to 8.4 chooses",
        )
    )
    off = groups[4][0] - bits_at(plain, groups[4][1])
    gates.append(Gate("bits saved at the error of 4 bits, without the video codec", off, "<", 0.4))
    for qp, point, other in zip((23, 28), ours[1:3], mixed, strict=True):
        rows.append(
            Row(
                f"shuffled weights, qp {qp}",
                "bits a weight",
                other[0],
                point[0],
                None,
                note=f"base: the same weights in random order, error {other[1]:.3g}; ours: in "
                f"place, error {point[1]:.3g}: what prediction and transform find",
            )
        )
    return Claim(
        slug="vcllm",
        statement="H.265 on weights as grey pictures takes at least 0.4 bits a weight less than "
        "rounding in groups of 64 at the errors of 3 and 4 bits, and layers in H.264 less than 8 "
        "bits in groups at theirs.",
        paper_figure="near-lossless quality at about 3 bits a value (unverified), better than "
        "group quantizers",
        rows=tuple(rows),
        scale=scale,
        device="cpu",
        status=judge(tuple(gates), tuple(Gate(g.name, g.value, ">", 0.0) for g in gates[:2])),
        gates=tuple(gates),
        seeds=(0,),
        notes=(
            f"{values:,} weights, all matrices of the third layer of pycode-t; x265, preset "
            "veryfast, intra, 8-bit pixels; at the error of 8 bits layers, exact in x264",
            "layers came after one picture had failed there, and their levels were tried on these "
            "matrices; the gates are older and stand",
            "errors are squares relative to the weights' own; perplexity, caches and gradients "
            "are not measured",
        ),
    )
