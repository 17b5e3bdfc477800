"""HNeRV: the file is a network that has learnt one clip by heart, and a few numbers a picture.

Paper: H. Chen, M. Gwilliam, S. Lim, A. Shrivastava, "HNeRV: A Hybrid Neural Representation for
    Videos", 2023, arXiv:2304.02633
Idea: A decoder is fitted to one clip and reads tiny embeddings that an encoder makes of the
    pictures, where NeRV reads the time; its parameters are spread evenly over its blocks.
Differs: Symbols go through a range coder, in the place of Huffman's code. Pruning and inpainting
    are left out. Strides and the width follow from the size of the pictures and from the rate.
    Long clips are cut into segments.

::

    picture ─encoder, not sent─▶ e_t [16, h, w] ─▶ 1x1 ─▶ UpBlock ... ─▶ picture      (3.1)
    C: embeddings + decoder = budget;  channels / 1.2, kernels 1, 3, 5 ...           (3.2)
    fitted ─▶ weights in 8 bits, embeddings in 6 ─▶ range coder                      (3.3)
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from isthmus.claims import Claim, Gate, Row, Ruler, judge
from isthmus.claims import Scale as ClaimScale
from isthmus.codecs import av_bridge
from isthmus.codecs.base import NO_MODEL, pack, unpack
from isthmus.codecs.container import Frame, Header, leb, unleb
from isthmus.codecs.weights import Quantised, quantise
from isthmus.codecs.weights import pack as pack_weights
from isthmus.codecs.weights import unpack as unpack_weights
from isthmus.errors import BrokenFileError, InvalidInputError
from isthmus.metrics.images import psnr
from isthmus.models.fields import strides_for
from isthmus.roles import Medium, Signal
from isthmus.training.field import (
    Fit,
    Fitting,
    between,
    field,
    fitted,
    padded,
    padded_size,
    rendered,
)
from isthmus.training.loop import Progress
from isthmus.workbench.curves import reached
from isthmus.workbench.drifting import drifting

RATE = 5e-3
"""Of the claim: a hundred epochs of a small clip want a larger rate than three hundred."""

MOST = 1 << 24
"""Parameters of a segment: what a file may make a decoder allocate."""

Clip = Tensor
"""Pictures, uint8 [T, 3, H, W]."""


@dataclass(frozen=True)
class Settings(Fitting):
    """Settings of the codec, besides those of :class:`~isthmus.training.field.Fitting`.

    Attributes:
        rate_bpp: Bits a pixel of a picture that parameters may take before the range coder.
        bits: Of a weight.
        embedding_bits: Of a number of an embedding.
        segment: Pictures that share a network.
    """

    rate_bpp: float = 0.1
    bits: int = 8
    embedding_bits: int = 6
    segment: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.segment < 1 or not self.rate_bpp > 0:
            raise InvalidInputError(f"the rate and the segments of hnerv are above 0, got {self}")
        if not (1 <= self.bits <= 12 and 1 <= self.embedding_bits <= 12):
            raise InvalidInputError(f"hnerv rounds to 1 to 12 bits, got {self}")


class Hnerv:
    """The codec; it needs no model, since every file brings its own.

    Args:
        settings: See :class:`Settings`.

    Attributes:
        fits_each_file: It trains on what it codes, so that a bench leaves it out.
        report: Called after every step of that training, or None.

    Example:
        >>> still = torch.full((2, 3, 8, 8), 200, dtype=torch.uint8)
        >>> codec = Hnerv(Settings(rate_bpp=400, encoder=4, epochs=60, learning_rate=1e-2))
        >>> out, info = io.BytesIO(), {"medium": "video", "dtype": "uint8", "shape": [2, 3, 8, 8]}
        >>> _ = pack(codec, Signal(info | {"rate": "25/1"}, [still]), out)
        >>> back = torch.cat(list(unpack(out.getvalue()).signal.chunks))
        >>> bool((back.int() - 200).abs().max() < 16)
        True
    """

    name = "hnerv"
    family = "compression"
    role = "codec"
    id = "compression/hnerv"
    medium: ClassVar[Medium] = "video"
    lossless = False
    numerics = "static"
    fingerprint = NO_MODEL
    fits_each_file = True
    fields = ("content", "embedding", "hidden", "millibpp")

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self.report: Callable[[Progress], None] | None = None

    def parameters(self, info: Mapping[str, Any], rate: float | None = None) -> dict[str, Any]:
        """What a decoder is built from; the rate is in bits a pixel.

        Raises:
            InvalidInputError: No colour pictures of 8 bits, or no rate above 0.
        """
        s = self.settings
        if info["dtype"] != "uint8" or info["shape"][1] != 3:
            raise InvalidInputError(f"{self.name} codes colour of 8 bits, not {dict(info)}")
        millibpp = round(1000 * (s.rate_bpp if rate is None else rate))
        if millibpp < 1:
            raise InvalidInputError(f"{self.name} needs 0.001 bits a pixel or more, not {rate}")
        names = {"content": int(s.content), "embedding": s.embedding, "hidden": s.hidden}
        return names | {"millibpp": millibpp}

    def encode(self, signal: Signal, header: Header) -> Iterator[Frame]:
        """A frame for each segment; most of the time is fitting."""
        for clip in _segments(signal.chunks, self.settings.segment):
            told = header.parameters["millibpp"] / 1000
            total = round(told * clip[:, 0].numel() / self.settings.bits)
            if total > MOST:
                raise InvalidInputError(
                    f"{total} parameters for {len(clip)} pictures; {self.name} takes up to {MOST}: "
                    "lower the rate, or segment"
                )
            yield frame(self.fit(padded(clip), total), self.settings)

    def fit(self, clip: Tensor, total: int) -> Fit:
        """A network of so many parameters for padded pictures from 0 to 1."""
        return fitted(clip, self.settings, total, report=self.report)[0]

    def decode(self, header: Header, frames: Iterable[Frame]) -> Iterator[Clip]:
        """The pictures of each segment."""
        count, _, height, width = header.signal["shape"]
        told: Any = [header.parameters.get(name) for name in self.fields]
        content, embedding, hidden, _ = told
        if content not in (0, 1) or any(type(n) is not int or not 0 < n <= 1024 for n in told[1:3]):
            raise BrokenFileError(f"names a network that {self.name} never has")
        s = replace(self.settings, content=bool(content), embedding=embedding, hidden=hidden)
        for one in frames:
            (many, at), shape = unleb(one.payload, 0), padded_size(height, width)
            channels, at = unleb(one.payload, at)
            if not 0 < channels <= 1024 or not 0 < many <= (count or 1 << 16):
                raise BrokenFileError(f"names a network that {self.name} never has")
            with torch.device("meta"):
                net = field(s, channels, *shape)
            shapes: dict[str, Any] = {k: v.shape for k, v in net.state_dict().items()}
            if content:
                scale = math.prod(strides_for(*shape))
                shapes["embeddings"] = (many, embedding, shape[0] // scale, shape[1] // scale)
            if sum(math.prod(x) for x in shapes.values()) > MOST:
                raise BrokenFileError(f"names a network of more than {MOST} parameters")
            found = unpack_weights(one.payload[at:], shapes)
            one.verify(_symbols(found))
            pictures = grown(net, {k: q.tensor() for k, q in found.items()}, many)
            for part in pictures:
                yield (255 * part[:, :, :height, :width]).round().to(torch.uint8)


@torch.no_grad()
def frame(made: Fit, s: Settings) -> Frame:
    """A fitted segment as a frame of the file."""
    sent = {k: quantise(v, s.bits) for k, v in made.field.state_dict().items()}
    count = len(made.clip)
    if made.content:
        every = torch.split(torch.arange(count), 16)
        embeddings = torch.cat([made.inputs(part) for part in every])
        sent["embeddings"] = quantise(embeddings, s.embedding_bits)
    data = leb(count) + leb(made.width) + pack_weights(sent)
    return Frame.of(_symbols(sent), data, samples=count, reset=True)


@torch.no_grad()
def grown(net: nn.Module, tensors: dict[str, Tensor], count: int) -> Iterator[Tensor]:
    """Pictures of a network that was sent, some at a time."""
    inputs = tensors.pop("embeddings", None)
    if inputs is None:
        inputs = torch.arange(count) / max(1, count - 1)
    net.load_state_dict(tensors, assign=True)
    for part in torch.split(inputs, 16):
        yield net(part)


def _symbols(sent: Mapping[str, Quantised]) -> Any:
    return torch.cat([sent[name].symbols.flatten() for name in sorted(sent)]).numpy()


def _segments(chunks: Iterable[Clip], most: int) -> Iterator[Clip]:
    """Pictures in segments, as they come."""
    held: list[Tensor] = []
    for one in (picture for chunk in chunks for picture in chunk):
        held.append(one)
        if len(held) == most:
            yield torch.stack(held)
            held = []
    if held:
        yield torch.stack(held)


# the claim ----------------------------------------------------------------------------------------


class _Fitted(Hnerv):
    """The codec with a network that is fitted already."""

    def __init__(self, settings: Settings, made: Fit) -> None:
        super().__init__(settings)
        self.made = made

    def fit(self, clip: Tensor, total: int) -> Fit:
        return self.made


def _decoded(data: bytes) -> Clip:
    return torch.cat(list(unpack(data).signal.chunks))


def _h265(clip: Clip, most: int) -> tuple[float, int]:
    """PSNR and bytes of H.265, red, green and blue as they are, in no more bytes."""
    planes = list(clip.unbind(1))
    for qp in range(52):
        data = av_bridge.encode(planes, "h265", layout="rgb", qp=qp, preset="veryslow").pack()
        if len(data) <= most:
            break
    shape: Any = tuple(planes[0].shape)
    back = av_bridge.decode(data, "h265", shape, layout="rgb")
    return float(psnr(torch.stack(back, 1), clip).mean()), len(data)


def claim(ruler: Ruler, scale: ClaimScale = "small") -> Claim:
    """Fit both kinds of network to one clip, write both files, and look at what comes back."""
    small = scale != "test"
    clip = drifting() if small else drifting(6, 16, 24, digits=1)
    total, epochs = (105_000, 100) if small else (24_000, 4)
    pixels = clip[:, 0].numel()
    ours = Settings(rate_bpp=8 * total / pixels, epochs=epochs, learning_rate=RATE)
    if not small:
        ours = replace(ours, encoder=8, embedding=4)
    arms = {"ours": ours, "off": replace(ours, content=False)}
    info = {"medium": "video", "dtype": "uint8", "shape": list(clip.shape), "rate": "25/1"}
    even = torch.arange(0, len(clip), 2)
    odd = torch.arange(1, len(clip) - 1, 2)
    fit, sent, exact, back, unseen, curves = {}, {}, {}, {}, {}, {}
    for arm, s in arms.items():
        fit[arm], curves[arm] = fitted(padded(clip), s, total)
        out = io.BytesIO()
        pack(_Fitted(s, fit[arm]), Signal(info, [clip]), out)
        sent[arm] = out.getvalue()
        every = rendered(fit[arm], torch.arange(len(clip)))
        exact[arm] = float(psnr(every, padded(clip), 1.0).mean())
        back[arm] = float(psnr(_decoded(sent[arm]), clip).mean())
        half, _ = fitted(padded(clip), s, total, even)
        unseen[arm] = float(psnr(between(half, odd), padded(clip)[odd], 1.0).mean())
    steps = curves["ours"][-1][0]
    share = reached(curves["ours"], curves["off"][-1][1])
    peer, peer_bytes = _h265(clip, len(sent["ours"]))
    reads = {arm: partial(_decoded, data) for arm, data in sent.items()}
    timing = ruler.compare(reads, repeats=5)
    speed = {arm: len(clip) / timing[arm].median_s for arm in arms}
    rounding = exact["ours"] - back["ours"]
    gates = (
        Gate("PSNR from the file above NeRV's, dB", back["ours"] - back["off"], ">=", 0.7),
        Gate("bytes over NeRV's", len(sent["ours"]) / len(sent["off"]), "<=", 1.02),
        Gate("share of the steps to NeRV's last PSNR", share and share / steps, "<=", 2 / 3),
        Gate("PSNR lost by 8 and 6 bits, dB", rounding, "<=", 0.5),
        Gate("unseen pictures, PSNR above NeRV's, dB", unseen["ours"] - unseen["off"], ">", 0.0),
    )
    return Claim(
        slug="hnerv",
        statement="Pictures that grow out of embeddings of themselves are 0.7 dB closer than those "
        "that grow out of their times, in as many bytes and after two thirds of the steps.",
        paper_figure="4.7 dB above NeRV at equal size and 16 times faster to converge (Bunny)",
        rows=(
            Row("PSNR from the file", "dB", back["off"], back["ours"], back["off"], ceiling=peer,
                note=f"ceiling: H.265, veryslow, in {peer_bytes} bytes"),
            Row("PSNR before rounding", "dB", exact["off"], exact["ours"], exact["off"]),
            Row("PSNR of unseen pictures", "dB", unseen["off"], unseen["ours"], unseen["off"],
                note="every second picture is learnt"),
            Row("file", "bytes", len(sent["off"]), len(sent["ours"]), len(sent["off"])),
            Row("steps to NeRV's last PSNR", "steps", steps, share, steps),
            Row("decoding", "pictures/s", speed["off"], speed["ours"], None),
        ),
        scale=scale,
        device="cpu",
        status=judge(gates, (Gate("closer", back["ours"] - back["off"], ">", 0), *gates[1:2])),
        gates=gates,
        seeds=(ours.seed,),
        notes=(
            f"{len(clip)} pictures of {clip.shape[3]} x {clip.shape[2]}, digits over a photograph; "
            f"{total} parameters each, embeddings counted; off and baseline: NeRV",
            "at this size a clip has few more pixels than the network numbers, and the classical "
            "codec wins by far",
        ),
    )  # fmt: skip
