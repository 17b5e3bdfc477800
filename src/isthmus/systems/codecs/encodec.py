"""EnCodec: a streaming autoencoder with residual codebooks, whose codes a small Transformer packs.

Paper: A. Defossez, J. Copet, G. Synnaeve, Y. Adi, "High Fidelity Neural Audio Compression", 2022,
    arXiv:2210.13438
Idea: A causal convolutional autoencoder learns from one spectral adversary under a balancer of
    gradients; a residual quantizer makes its vectors codes, and a causal Transformer tells a range
    coder how likely each code is.
Differs: The 48 kHz stereo variant (chunks of 1 s, each normalised) is left out; channels are coded
    one beside the other. One optimiser takes the steps of all. Dead codes get sum and count, too,
    and residuals are of detached codes. Laws are whole numbers, not probabilities rounded to 1e-6.
    The code model has a learned bias for distances instead of sine positions. Nets begin at the
    level of the sounds (seanet.level). The scale small has no adversary (steps are 3.5 times as
    dear), its longest stride first, codebooks that begin later, and lighter weights of waveform and
    commitment: vectors that are pulled to codes early on learn little more.

    [C, N] ─▶ SEANet ─▶ RVQ ─▶ codes [n_q, C, T] ─▶ code model ─▶ range coder ─▶ a frame a second
"""

from __future__ import annotations

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
from isthmus.codecs.sound import SoundCodec
from isthmus.errors import BrokenFileError, InvalidInputError
from isthmus.models.audio_disc import STFTDiscriminator
from isthmus.models.code_lm import CodeLM
from isthmus.models.seanet import SEANetDecoder, SEANetEncoder, folded, level
from isthmus.nn.quantize import RVQ
from isthmus.roles import Signal
from isthmus.training.audio_codec import AudioCodec, CodecLearner, Goals
from isthmus.training.data import Data, Spoken
from isthmus.training.loop import Plan
from isthmus.training.system import Scale
from isthmus.workbench import sound_trials as trials
from isthmus.workbench.data import data as named_data
from isthmus.workbench.recogniser import Recogniser
from isthmus.workbench.speech import corpus
from isthmus.workbench.trained import trained

_ADAM = Plan(1, "adam", 3e-4, betas=(0.5, 0.9), clip_norm=0.0)


@dataclass(frozen=True)
class Settings:
    """Settings of the codec and its training; section 3 and appendix A of the paper.

    Attributes:
        rate_hz: Of the sound.
        width: C, channels next to the sound.
        dim: D of the vectors.
        strides: From the sound on; their product is the samples of a frame.
        lstm: Layers of the LSTMs.
        codebooks: n_q at most.
        size: K, codes of each.
        choices: Numbers of codebooks that are trained, one for each batch.
        decay: Of the codebooks' averages; few steps want faster ones.
        dead_below: See :class:`~isthmus.nn.quantize.VQ`; small batches need less.
        l1: Weight of the distance of waveforms.
        commitment: Weight of the codebooks' own loss.
        balance: Whether the balancer shares out the gradient; off, weights are fixed.
        balance_decay: Of its averages.
        mel_sizes: Windows of the spectral loss.
        disc_sizes: Windows of the discriminator; there is none without any.
        disc_width: Its channels.
        quantized_from: Share of the training after which codebooks begin, by k-means.
        judged_from: Share of the training after which the discriminator counts.
        judging: How often it learns.
        coded: Whether the code model's laws are used; off, codes cost their raw bits.
        lm: Of the code model: width, blocks, heads, and width of the feed-forwards.
        lm_reach_s: How far back it sees; no farther than its windows are long.
        lm_learns: Share of the training after which it learns, and all else stays as it is; length
            of its windows in seconds, and how many are a batch.
        lm_dropout: While it learns.
        packet_s: Sound in a frame of the file.
        batch_size: Windows of a batch.
        segment_s: Their length.
    """

    rate_hz: int = 24_000
    width: int = 32
    dim: int = 128
    strides: tuple[int, ...] = (2, 4, 5, 8)
    lstm: int = 2
    codebooks: int = 32
    size: int = 1024
    choices: tuple[int, ...] = (2, 4, 8, 16, 32)
    decay: float = 0.99
    dead_below: float = 2.0
    l1: float = 0.1
    commitment: float = 1.0
    balance: bool = True
    balance_decay: float = 0.999
    mel_sizes: tuple[int, ...] = (32, 64, 128, 256, 512, 1024, 2048)
    disc_sizes: tuple[int, ...] = (2048, 1024, 512, 256, 128)
    disc_width: int = 32
    quantized_from: float = 0.0
    judged_from: float = 0.0
    judging: float = 2 / 3
    coded: bool = True
    lm: tuple[int, int, int, int] = (200, 5, 8, 800)
    lm_reach_s: float = 3.5
    lm_learns: tuple[float, float, int] = (0.5, 5.0, 64)
    lm_dropout: float = 0.0
    packet_s: float = 1.0
    batch_size: int = 64
    segment_s: float = 1.0

    @property
    def hop(self) -> int:
        """Samples of a frame."""
        return int(np.prod(self.strides))

    @property
    def kbps(self) -> float:
        """Raw rate of one codebook."""
        return float(np.log2(self.size)) * self.rate_hz / self.hop / 1000


class Encodec(SoundCodec):
    """The codec.

    Example:
        >>> Settings().kbps * 2, Settings().rate_hz / Settings().hop  # kbit/s of two; frames
        (1.5, 75.0)
    """

    name = "encodec"
    family = "codecs"
    reads = "spoken"
    numerics = "pinned"
    fields = ("books", "coded")
    settings_type = Settings
    scales: ClassVar[Mapping[str, Scale]] = {
        "test": Scale(
            Settings(
                rate_hz=16_000,
                width=2,
                dim=8,
                lstm=1,
                codebooks=3,
                size=16,
                choices=(1, 3),
                mel_sizes=(256, 512),
                disc_sizes=(256,),
                disc_width=2,
                lm=(8, 1, 2, 16),
                lm_reach_s=0.2,
                lm_learns=(0.5, 0.4, 4),
                packet_s=0.4,
                batch_size=2,
                segment_s=0.2,
            ),
            replace(_ADAM, steps=6, validate_every=3),
            "workbench:speech-few",
        ),
        "small": Scale(
            Settings(
                rate_hz=16_000,
                width=8,
                dim=64,
                strides=(8, 3, 3, 3),
                lstm=1,
                codebooks=8,
                size=256,
                choices=(2, 4, 8),
                decay=0.97,
                dead_below=0.1,
                l1=0.01,
                commitment=0.005,
                balance_decay=0.995,
                mel_sizes=(256, 512, 1024),
                disc_sizes=(),
                quantized_from=0.2,
                lm=(96, 2, 4, 384),
                lm_reach_s=0.7,
                lm_learns=(0.5, 1.0, 64),
                lm_dropout=0.1,
                batch_size=16,
                segment_s=0.5,
            ),
            replace(
                _ADAM,
                steps=2400,
                learning_rate=4e-3,
                schedule="two-plateaus",
                betas=(0.8, 0.99),
                warmup_steps=20,
                validate_every=2400,
            ),
            "workbench:speech-docs",
        ),
        "paper": Scale(
            Settings(),
            replace(_ADAM, steps=1_200_000, schedule="constant", validate_every=20_000),
            "workbench:speech-docs",
        ),
    }

    def __init__(self, settings: Settings | None = None) -> None:
        s: Settings = settings or Settings()
        super().__init__(s)
        sizes = (s.width, s.dim, s.strides)
        how: Any = {"l1": s.l1, "commitment": s.commitment, "mel_sizes": s.mel_sizes}
        how |= {"balance": s.balance, "decay": s.balance_decay}
        reach = max(1, round(s.lm_reach_s * s.rate_hz / s.hop))
        self.module: AudioCodec = AudioCodec(
            SEANetEncoder(*sizes, lstm=s.lstm),
            RVQ(s.dim, s.size, s.codebooks, decay=s.decay, dead_below=s.dead_below),
            SEANetDecoder(*sizes, lstm=s.lstm),
            Goals(s.rate_hz, **how),  # spectra 1, adversary 3, its features 3
            STFTDiscriminator(s.disc_sizes, s.disc_width) if s.disc_sizes else None,
            CodeLM(s.codebooks, s.size, *s.lm, reach=reach, dropout=s.lm_dropout),
        )

    @classmethod
    def untrained(cls, settings: Settings, data: Data[Spoken]) -> Self:
        """A new codec, whose nets begin at the level of the sounds."""
        codec = cls(settings)
        learner: Any = codec.learner(data, _ADAM)
        level(codec.module.encoder, codec.module.decoder, learner.batch(0)[0][:, None])
        return codec

    def learner(self, data: Data[Spoken], plan: Plan) -> CodecLearner:
        """See :class:`~isthmus.training.audio_codec.CodecLearner`."""
        s, says = self.settings, {"settings": asdict(self.settings)}
        return CodecLearner(self.module, s.hop, s, data, plan, says, s.lm_learns)

    # coding -----------------------------------------------------------------------------------

    def decode_config(self) -> dict[str, Any]:
        """What a decoder is built from."""
        told = asdict(self.settings)
        names = ("rate_hz", "width", "dim", "strides", "lstm", "codebooks", "size", "packet_s")
        return {name: told[name] for name in (*names, "lm", "lm_reach_s")}

    def decode_tensors(self) -> Mapping[str, Tensor]:
        """Decoder, codebooks and code model: the encoder may learn anew."""
        kept = ("decoder.", "quantizer.", "lm.")
        return {k: v for k, v in self.module.state_dict().items() if k.startswith(kept)}

    def parameters(self, info: Mapping[str, Any], rate: float | None = None) -> dict[str, Any]:
        """Codebooks used, by a rate in raw kbit/s, and whether the code model packs them.

        Raises:
            InvalidInputError: Sound of another kind than the codec's, or too low a rate.
        """
        s: Settings = self.settings
        self.check_sound(info, InvalidInputError)
        books = s.codebooks if rate is None else min(s.codebooks, int(rate / s.kbps + 1e-6))
        if books < 1:
            raise InvalidInputError(f"{self.name} needs {s.kbps:.2f} kbit/s or more, not {rate}")
        return {"books": books, "coded": int(s.coded)}

    @property
    def packet(self) -> int:
        """Samples of a frame of the file."""
        s: Settings = self.settings
        return max(1, round(s.packet_s * s.rate_hz / s.hop)) * s.hop

    def _coder(self, header: Header, error: type[Exception]) -> tuple[CodeCoder, int]:
        """What packs codes, and how many codebooks are used."""
        s: Settings = self.settings
        self.check_sound(header.signal, error)
        books, coded = (header.parameters.get(name) for name in self.fields)
        if type(books) is not int or not 1 <= books <= s.codebooks or coded not in (0, 1):
            raise error(f"names {books} codebooks of {s.codebooks}; this codec never does")
        lm = self.module.lm if coded else None
        return CodeCoder(lm, books, s.size, header.signal["shape"][0]), books

    def encode(self, signal: Signal, header: Header) -> Iterator[Frame]:
        """A frame for every packet of sound, as soon as it has been heard."""
        coder, books = self._coder(header, InvalidInputError)
        encoder, quantizer = folded(self.module.encoder), folded(self.module.quantizer)
        states = encoder.init_state()
        for piece in packets(signal.chunks, self.packet):
            x = F.pad(piece, (0, -piece.shape[1] % self.settings.hop))
            z, states = encoder.step(x[:, None], states)
            codes = quantizer.encode(z, books)  # [n_q, C, T]
            data = leb(piece.shape[1]) + coder.encode(codes)
            yield Frame.of(codes, data, samples=piece.shape[1])

    def decode(self, header: Header, frames: Iterable[Frame]) -> Iterator[Tensor]:
        """The sound of every frame, as soon as it has come."""
        coder, _ = self._coder(header, BrokenFileError)
        decoder, quantizer = folded(self.module.decoder), folded(self.module.quantizer)
        states = decoder.init_state()
        for frame in frames:
            count, at = unleb(frame.payload, 0)
            if not 1 <= count <= self.packet:
                raise BrokenFileError(f"a frame of {count} samples; at most {self.packet}")
            codes = coder.decode(frame.payload[at:], -(-count // self.settings.hop))
            frame.verify(codes)
            y, states = decoder.step(quantizer.decode(codes), states)
            yield y[:, 0, :count]


def claim(ruler: Ruler, scale: ClaimScale = "small") -> Claim:
    """Pack held-out sentences in accents that were not heard, and set classical coders beside."""
    size = "test" if scale == "test" else "small"
    told, few = Encodec.scales[size], size == "test"
    codec = Encodec.from_pretrained(trained(Encodec, size))
    codec.module.half().float()  # as the package ships it
    raw = Encodec(replace(codec.settings, coded=False))
    raw.module.load_state_dict(codec.module.state_dict())
    raw.module.eval()
    s, module = codec.settings, codec.module
    listener = Recogniser.from_pretrained(trained(Recogniser, size))
    spoken, docs = (corpus(k, "accent", 2 if few else 24, seed=1) for k in ("sentences", "docs"))
    texts, sounds = [u.line.target for u in spoken], [u.samples for u in (*spoken, *docs)]
    seconds = sum(map(len, sounds)) / s.rate_hz
    heard = named_data(told.data, "spoken")
    packed, back = trials.coded(codec, sounds)
    plain, same = trials.coded(raw, sounds)
    learnt = [record.sound.at(s.rate_hz) for record in heard.train[:300]]
    frames = codec.packet // s.hop
    static = trials.static_bytes(module, s.hop, learnt, sounds, size=s.size, packet=frames)
    equal = all(torch.equal(a, b) for a, b in zip(back, same, strict=True))
    streams = [trials.streamed(module, x, s.hop) for x in sounds[:8]]
    vectors, apart, moved = (max(map(float, column)) for column in zip(*streams, strict=True))
    learner = codec.learner(heard, replace(told.plan, steps=1000))  # batches of the codec's part
    weights = module.balancer.weights
    drift, loose = (
        trials.off_weights(trials.gradient_shares(module, learner, balance=b), weights)
        for b in (True, False)
    )
    long = torch.cat(sounds)[: s.rate_hz * (2 if few else 10)]
    timing = ruler.compare({"both ways": lambda: trials.coded(codec, [long])}, repeats=3)
    factor = timing["both ways"].median_s * s.rate_hz / len(long)
    half, halved = trials.coded(codec, sounds, s.kbps * max(1, s.codebooks // 2))
    own, other = (size * 8 / seconds / 1000 for size in (packed, half))
    arms = trials.peers(sounds) | {"ours": (own, back), "half": (other, halved)}
    arms["as it was"] = (16 * s.rate_hz / 1000, sounds)
    results = {
        name: {"kbps": kbps} | trials.listen(listener, sound, sounds, texts)
        for name, (kbps, sound) in arms.items()
    }

    def row(metric: str, key: str, unit: str) -> Row:
        base, own, other = (results[name][key] for name in ("Opus 6", "ours", "half"))
        names = [name for name in results if name not in ("Opus 6", "ours", "half")]
        rest = ", ".join(f"{name} {results[name][key]:.3g}" for name in names)
        note = f"base: Opus 6; control: half of our codebooks; {rest}"
        return Row(metric, unit, base, own, None, control=other, note=note)

    saved = packed / plain
    bits = (
        Gate("bits with the code model / raw", saved, "<=", 0.85),
        Gate("static tables - code model, bytes", static - packed, ">", 0.0),
    )
    others = (
        Gate("the same sound with and without it", float(equal), "==", 1.0),
        Gate("balanced shares off their weights", drift, "<=", 0.10),
        Gate("fixed weights' shares off their weights", loose, ">", 0.10),
        Gate("decoded frame by frame and as a whole, apart", apart, "<=", 1e-4),
        Gate("real-time factor, both ways", factor, "<", 1.0),
    )
    return Claim(
        slug="encodec",
        statement="A small Transformer packs the codes of a residual quantizer into 0.85 of their "
        "bits or less, below static tables, for the very same sound; the balancer holds gradient "
        "shares at their weights; coding streams faster than real time.",
        paper_figure="25 to 40 % of the bits saved; better scores at 6 kbit/s than Opus at 12",
        rows=(
            Row("payload", "bytes", plain, packed, plain, control=static, note="control: static"),
            Row("gradient shares off their weights", "", loose, drift, loose),
            Row("real-time factor, both ways", "", 1.0, factor, None),
            row("rate of payloads", "kbps", "kbit/s"),
            row("log-mel distance", "mel_db", "dB"),
            row("STOI", "stoi", ""),
            row("characters misheard", "cer", ""),
            row("SI-SDR, aligned", "si_sdr_db", "dB"),
        ),
        scale=scale,
        device="cpu",
        status=judge((*bits, *others), (Gate("bits saved", saved, "<", 1.0), *others)),
        gates=(*bits, *others),
        seeds=(told.plan.seed,),
        notes=(
            f"{len(sounds)} sentences in accents that were not in the training, {seconds:.0f} s; "
            f"vectors, stream and whole, {vectors:.1g} apart, {moved:.1%} of codes others",
            "a frozen recogniser, STOI and log-mel distance listen; classical coders may win",
            "after looks at 0.97 and 0.87 of the bits: waveform and commitment weigh less, "
            "codebooks begin later, the code model learns last, and 74 frames a second instead of "
            "50, as in the paper; shares are of mean norms (means of shares were 0.16 off: norms "
            "vary much)",
        ),
    )
