"""HiFi-Codec: four codebooks in two groups, so that none of them carries nearly everything.

Paper: D. Yang, S. Liu, R. Huang, J. Tian, C. Weng, Y. Zou, "HiFi-Codec: Group-residual Vector
    Quantization for High Fidelity Audio Codec", 2023, arXiv:2305.02765
Idea: The vectors of a HiFi-GAN autoencoder are split into groups of channels, and each group has
    residual codebooks of its own: every group has a first one, and the load of a long residual
    chain, nearly all on its first codebook, is shared.
Differs: The spectral loss is L1 plus L2 at several windows, of weight 45; the codebooks' weight of
    10 is ours, optimiser and other weights are HiFi-GAN's, and one optimiser moves codec and
    discriminators. Files hold raw codes in packets, encoded with the sound beside them. The scale
    small has no adversary (steps are several times as dear), fewer channels and kernels, its
    longest stride first. Its nets begin at the level of the sounds (hifigan.level), its codebooks
    by k-means after a quarter of the training instead of evenly around 0, with a weight of 30; a
    pilot of one chain chose that. Then they learn by gradient as published. Speech of espeak-ng.

    [C, N] ─▶ encoder ─▶ [C, D, T] ─┬─ first half  ─▶ RVQ ─┬─▶ codes ─▶ generator ─▶ [C, N]
                                    └─ second half ─▶ RVQ ─┘
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from isthmus.claims import Claim, Gate, Row, Ruler, judge
from isthmus.claims import Scale as ClaimScale
from isthmus.codecs.container import Frame, Header, leb, unleb
from isthmus.codecs.laws import CodeCoder, packets
from isthmus.codecs.sound import SoundCodec, overlapped
from isthmus.errors import BrokenFileError, InvalidInputError
from isthmus.models.audio_disc import (
    PeriodDiscriminator,
    ScaleDiscriminator,
    SeveralDiscriminators,
    STFTDiscriminator,
)
from isthmus.models.hifigan import HiFiGANEncoder, HiFiGANGenerator, level
from isthmus.models.seanet import folded
from isthmus.nn.quantize import GroupedRVQ
from isthmus.roles import Signal
from isthmus.training.audio_codec import AudioCodec, CodecLearner, Goals
from isthmus.training.data import Data, Spoken
from isthmus.training.loop import Plan
from isthmus.training.system import Scale
from isthmus.workbench import sound_trials as trials
from isthmus.workbench.speech import corpus
from isthmus.workbench.trained import trained

_ADAM = Plan(1, "adamw", 2e-4, betas=(0.8, 0.99), weight_decay=0.01, clip_norm=0.0)


@dataclass(frozen=True)
class Settings:
    """Settings of the codec and its training; sections 3 and 4 of the paper.

    Attributes:
        rate_hz: Of the sound.
        width: C, channels next to the sound.
        dim: D of the vectors.
        strides: From the sound on; their product is the samples of a frame.
        kernels: Of the residual blocks of a fusion.
        dilations: Of every block.
        groups: Groups of channels; 1 is a plain residual quantizer, the idea switched off.
        codebooks: Of all groups together.
        size: K, codes of each.
        kmeans: Whether codebooks begin as k-means, else evenly within 1 / K of 0.
        mel: Weight of the spectral loss.
        features: Weight of the distance of the discriminators' features.
        commitment: Weight of the codebooks' own loss.
        mel_sizes: Windows of the spectral loss.
        periods: Of the period discriminator; without any there is no discriminator at all.
        period_widths: Its channels.
        scale_widths: Channels of the three-scale discriminator.
        disc_sizes: Windows of the spectral discriminator.
        disc_width: Its channels.
        quantized_from: Share of the training after which codebooks begin.
        judged_from: Share of the training after which discriminators count.
        judging: How often they learn.
        packet_s: Sound in a frame of the file, at least what the generator looks to one side.
        batch_size: Windows of a batch.
        segment_s: Their length.

    Raises:
        InvalidInputError: Codebooks or channels do not fall into equal groups.
    """

    rate_hz: int = 24_000
    width: int = 32
    dim: int = 512
    strides: tuple[int, ...] = (2, 4, 5, 8)
    kernels: tuple[int, ...] = (3, 7, 11)
    dilations: tuple[int, ...] = (1, 3, 5)
    groups: int = 2
    codebooks: int = 4
    size: int = 1024
    kmeans: bool = False
    mel: float = 45.0
    features: float = 2.0
    commitment: float = 10.0
    mel_sizes: tuple[int, ...] = (256, 512, 1024)
    periods: tuple[int, ...] = (2, 3, 5, 7, 11)
    period_widths: tuple[int, ...] = (32, 128, 512, 1024, 1024)
    scale_widths: tuple[int, ...] = (16, 64, 256, 1024)
    disc_sizes: tuple[int, ...] = (2048, 1024, 512)
    disc_width: int = 32
    quantized_from: float = 0.0
    judged_from: float = 0.0
    judging: float = 1.0
    packet_s: float = 2.0
    batch_size: int = 32
    segment_s: float = 1.0

    def __post_init__(self) -> None:
        if self.groups < 1 or self.codebooks % self.groups or self.dim % self.groups:
            raise InvalidInputError(
                f"{self.codebooks} codebooks and {self.dim} channels do not fall into "
                f"{self.groups} equal groups; take a divisor of both"
            )

    @property
    def hop(self) -> int:
        """Samples of a frame."""
        return int(np.prod(self.strides))

    @property
    def choices(self) -> tuple[int, ...]:
        """Numbers of codebooks that are trained: all, always."""
        return (self.codebooks,)

    @property
    def kbps(self) -> float:
        """Rate of the codes: groups share the frame, so a code of any group has log2 K bits."""
        return self.codebooks * float(np.log2(self.size)) * self.rate_hz / self.hop / 1000


class Hificodec(SoundCodec):
    """The codec.

    Example:
        >>> s = Settings()  # 75 frames a second of 4 codes of 10 bits
        >>> s.rate_hz / s.hop, s.kbps
        (75.0, 3.0)
    """

    name = "hificodec"
    family = "codecs"
    reads = "spoken"
    settings_type = Settings
    scales: ClassVar[Mapping[str, Scale]] = {
        "test": Scale(
            Settings(
                rate_hz=16_000,
                width=2,
                dim=8,
                strides=(8, 5, 4, 2),
                kernels=(3, 5),
                dilations=(1,),
                size=16,
                mel_sizes=(256, 512),
                periods=(2,),
                period_widths=(2, 4),
                scale_widths=(2, 4),
                disc_sizes=(256,),
                disc_width=2,
                packet_s=0.2,
                batch_size=2,
                segment_s=0.2,
            ),
            replace(_ADAM, steps=4, validate_every=2),
            "workbench:speech-few",
        ),
        "small": Scale(
            Settings(
                rate_hz=16_000,
                width=8,
                dim=64,
                strides=(8, 5, 4, 2),
                kernels=(3, 7),
                dilations=(1, 3),
                size=256,
                kmeans=True,
                commitment=30.0,
                periods=(),
                quantized_from=0.25,
                batch_size=16,
                segment_s=0.5,
            ),
            replace(_ADAM, steps=600, learning_rate=2e-3, warmup_steps=20, validate_every=600),
            "workbench:speech-docs",
        ),
        "paper": Scale(
            Settings(),
            replace(_ADAM, steps=600_000, schedule="constant", validate_every=20_000),
            "workbench:speech-docs",
        ),
    }

    def __init__(self, settings: Settings | None = None) -> None:
        s: Settings = settings or Settings()
        super().__init__(s)
        sizes = (s.dim, s.width, s.strides, s.kernels, s.dilations)
        judges = (
            SeveralDiscriminators(
                PeriodDiscriminator(s.periods, s.period_widths),
                ScaleDiscriminator(3, s.scale_widths),
                STFTDiscriminator(s.disc_sizes, s.disc_width),
            )
            if s.periods
            else None
        )
        how: Any = {"l1": 0.0, "mel": s.mel, "adversarial": 1.0, "features": s.features}
        how |= {"commitment": s.commitment, "mel_sizes": s.mel_sizes}
        stages = s.codebooks // s.groups
        self.module: AudioCodec = AudioCodec(
            HiFiGANEncoder(*sizes),
            # codebook loss 1, commitment 0.25 (section 3.2)
            GroupedRVQ(s.dim, s.size, s.groups, stages, learn="grad", kmeans_init=s.kmeans),
            HiFiGANGenerator(*sizes),
            Goals(s.rate_hz, hinge=False, balance=False, **how),
            judges,
        )

    @classmethod
    def untrained(cls, settings: Settings, data: Data[Spoken]) -> Self:
        """A new codec, whose nets begin at the level of the sounds."""
        codec = cls(settings)
        learner: Any = codec.learner(data, _ADAM)
        encoder: Any = codec.module.encoder
        decoder: Any = codec.module.decoder
        level(encoder, decoder, learner.batch(0)[0][:, None])
        return codec

    def learner(self, data: Data[Spoken], plan: Plan) -> CodecLearner:
        """See :class:`~isthmus.training.audio_codec.CodecLearner`."""
        s, says = self.settings, {"settings": asdict(self.settings)}
        return CodecLearner(self.module, s.hop, s, data, plan, says)

    # coding -----------------------------------------------------------------------------------

    def decode_config(self) -> dict[str, Any]:
        """What a decoder is built from."""
        told = asdict(self.settings)
        names = ("rate_hz", "width", "dim", "strides", "kernels", "dilations", "groups")
        return {name: told[name] for name in (*names, "codebooks", "size", "packet_s")}

    def decode_tensors(self) -> Mapping[str, Tensor]:
        """Generator and codebooks: the encoder may learn anew."""
        kept = ("decoder.", "quantizer.")
        return {k: v for k, v in self.module.state_dict().items() if k.startswith(kept)}

    def parameters(self, info: Mapping[str, Any], rate: float | None = None) -> dict[str, Any]:
        """Nothing to choose: groups are used as a whole.

        Raises:
            InvalidInputError: Sound of another kind than the codec's, or too low a rate.
        """
        self.check_sound(info, InvalidInputError)
        if rate is not None and rate < self.settings.kbps - 1e-6:
            raise InvalidInputError(
                f"{self.name} has the one rate of {self.settings.kbps:.2f} kbit/s, not {rate}"
            )
        return {}

    @property
    def packet(self) -> int:
        """Samples of a frame of the file."""
        s: Settings = self.settings
        decoder: Any = self.module.decoder
        return max(int(decoder.reach), round(s.packet_s * s.rate_hz / s.hop)) * s.hop

    def _coder(self, header: Header, error: type[Exception]) -> CodeCoder:
        self.check_sound(header.signal, error)
        s: Settings = self.settings
        return CodeCoder(None, s.codebooks, s.size, header.signal["shape"][0])

    def encode(self, signal: Signal, header: Header) -> Iterator[Frame]:
        """A frame for every packet of sound, heard with the sound beside it."""
        coder, hop = self._coder(header, InvalidInputError), self.settings.hop
        encoder, quantizer = folded(self.module.encoder), folded(self.module.quantizer)
        pieces = overlapped(packets(signal.chunks, self.packet), encoder.reach * hop)
        for window, left, own in pieces:
            x = F.pad(window, (0, -window.shape[1] % hop))
            z = encoder(x[:, None])[..., left // hop : left // hop - (-own // hop)]
            codes = quantizer.encode(z)  # [n_q, C, T]
            yield Frame.of(codes, leb(own) + coder.encode(codes), samples=own)

    @torch.no_grad()
    def decode(self, header: Header, frames: Iterable[Frame]) -> Iterator[Tensor]:
        """The sound of every frame, as soon as the next one has come: just that of the whole."""
        coder, hop = self._coder(header, BrokenFileError), self.settings.hop
        decoder, quantizer = folded(self.module.decoder), folded(self.module.quantizer)
        counts: deque[int] = deque()

        def vectors() -> Iterator[Tensor]:
            for frame in frames:
                count, at = unleb(frame.payload, 0)
                if not 1 <= count <= self.packet:
                    raise BrokenFileError(f"a frame of {count} samples; at most {self.packet}")
                codes = coder.decode(frame.payload[at:], -(-count // hop))
                frame.verify(codes)
                counts.append(count)
                yield quantizer.decode(codes)

        for window, left, _ in overlapped(vectors(), decoder.reach):
            y = decoder(window)[:, 0, left * hop :]
            yield y[:, : counts.popleft()]


def claim(ruler: Ruler, scale: ClaimScale = "small") -> Claim:
    """Train the same nets with three quantizers, and hear held-out sentences through each."""
    size = "test" if scale == "test" else "small"
    told, count = Hificodec.scales[size], 2 if size == "test" else 24
    s: Settings = told.settings
    kinds = {
        "grouped": s,
        "chain": replace(s, groups=1),  # as many codes in one row: the idea switched off
        "long chain": replace(s, groups=1, codebooks=2 * s.codebooks),
    }
    codecs = {
        name: Hificodec.from_pretrained(trained(Hificodec, size, settings=kind))
        for name, kind in kinds.items()
    }
    texts = [
        *corpus("sentences", "accent", count, seed=1),
        *corpus("docs", "accent", count, seed=1),
    ]
    sounds = [u.samples for u in texts]
    heard, books = {}, {}
    for name, codec in codecs.items():
        heard[name] = trials.compared(trials.coded(codec, sounds)[1], sounds)
        books[name] = trials.codebooks(codec.module, sounds, s.hop)
    shares = {name: trials.largest_share(found["explained"]) for name, found in books.items()}
    worse = heard["grouped"]["mel_db"] / heard["chain"]["mel_db"]
    first = sum(books["grouped"]["energy"][: s.dim // s.groups])
    long = torch.cat(sounds)[: s.rate_hz * (2 if count == 2 else 10)]
    grouped = codecs["grouped"]
    timing = ruler.compare({"both ways": lambda: trials.coded(grouped, [long])}, repeats=3)
    factor = timing["both ways"].median_s * s.rate_hz / len(long)

    def row(metric: str, unit: str, of: Mapping[str, float], note: str = "") -> Row:
        note = f"base and off: one chain of as many; control: one twice as long{note}"
        ours, chain, control = (of[name] for name in kinds)
        return Row(metric, unit, chain, ours, chain, control=control, note=note)

    def each(metric: str, key: str, over: Any) -> Row:
        told = (f"{name} {', '.join(f'{v:.3g}' for v in f[key])}" for name, f in books.items())
        means = {name: float(over(found[key])) for name, found in books.items()}
        return row(f"{metric} of the codebooks", "", means, f"; {'; '.join(told)}")

    scores = {key: {name: h[key] for name, h in heard.items()} for key in heard["grouped"]}
    gates = (
        Gate("log-mel distance, grouped / chain", worse, "<=", 1.10),
        Gate("largest share of a grouped codebook", shares["grouped"], "<=", 0.7),
        Gate("largest share of a chained codebook", shares["chain"], ">", 0.7),
    )
    less = Gate("largest share, grouped / chain", shares["grouped"] / shares["chain"], "<", 1.0)
    return Claim(
        slug="hificodec",
        statement="At equal steps and bits, two groups of two codebooks come within 10 % of the "
        "log-mel distance of a chain of four, while no codebook has more than 0.7 of all that is "
        "explained.",
        paper_figure="four codebooks in two groups score better than EnCodec's eight or more",
        rows=(
            row("log-mel distance", "dB", scores["mel_db"]),
            row("STOI", "", scores["stoi"]),
            row("largest share of a codebook in what is explained", "", shares),
            each("variance explained, sum", "explained", np.sum),
            each("perplexity, mean", "perplexity", np.mean),
            row("rate of the codes", "kbit/s", {name: kind.kbps for name, kind in kinds.items()}),
            Row("real-time factor, both ways", "", 1.0, factor, None),
        ),
        scale=scale,
        device="cpu",
        status=judge(gates, (gates[0], less)),
        gates=gates,
        seeds=(told.plan.seed,),
        notes=(
            f"{len(sounds)} sentences in accents that were not in the training, "
            f"{sum(map(len, sounds)) / s.rate_hz:.0f} s; {told.plan.steps} steps; "
            f"the first group has {first:.2f} of the energy",
            "at equal bits groups do not lower the distortion: what they change is its shape, how "
            "evenly codebooks share the load",
        ),
    )
