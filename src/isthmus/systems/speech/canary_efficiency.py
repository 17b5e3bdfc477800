"""Canary, trained and run efficiently: no padding to compute, and no layers where they are slow.

Paper: P. Zelasko, K. Dhawan, D. Galvez, K. C. Puvvada, A. Pasad, N. R. Koluguri, K. Hu,
    V. Lavrukhin, J. Balam, B. Ginsburg, "Training and Inference Efficiency of Encoder-Decoder
    Speech Models", 2025, arXiv:2503.05931
Idea: Batches of like inputs and like outputs, each as large as memory allows, found by measuring;
    and layers moved from the decoder, which runs once a token, to the encoder, which runs once.
Differs: The decoder writes characters instead of 16,000 pieces, in one language and one task; CTC
    of words on the encoder teaches the alignment, which minutes of training do not find otherwise;
    a small one hears 25 frames a second instead of 12.5, whose CTC is of characters, and starts
    from an encoder that CTC alone has taught. Memory is counted in bytes that autograd keeps, so
    batches are the same on every machine.

::

    seconds x tokens ─▶ 2-D buckets ─▶ rows of each by measurement ─▶ one bucket a step
    features ─▶ FastConformer x E ─┬─▶ CTC: what is heard (training)
                                   └─▶ decoder x D, keys and values kept ─▶ characters
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from isthmus.claims import Claim, Gate, Row, Ruler, judge, ratio
from isthmus.claims import Scale as ClaimScale
from isthmus.models.speech_to_text import SpeechToText
from isthmus.nn.conformer import Conformer
from isthmus.nn.spec_augment import SpecAugment
from isthmus.objectives.ctc import ctc_loss
from isthmus.roles import Loss
from isthmus.signals.audio import fit, read
from isthmus.signals.features import RATE, LogMel
from isthmus.training.buckets import Ahead, Buckets2D, BucketSampler, Profile, outliers
from isthmus.training.data import Data, Spoken
from isthmus.training.loop import Plan
from isthmus.training.speech import (
    Characters,
    SpokenBatch,
    SpokenBatches,
    Words,
    ctc_units,
    features_of,
    rows_by_memory,
    words_wrong,
)
from isthmus.training.system import Answer, Scale, TrainedSystem
from isthmus.workbench.curves import Curve, cpu_curve, reached
from isthmus.workbench.data import data as named_data
from isthmus.workbench.data import series
from isthmus.workbench.lengths import cost, spread, waste
from isthmus.workbench.trained import trained

VOCABULARY, DATA = "units.json", "workbench:speech-series"


@dataclass(frozen=True)
class Settings:
    """Settings; the defaults are Canary-1B-Flash.

    Attributes:
        mels: Bands of the features.
        width: D.
        encoder_layers: Blocks of the encoder.
        decoder_layers: As many as the encoder has switches that idea off.
        heads: H.
        kernel: Of the convolutions.
        channels: Of the subsampling.
        factor: Of the subsampling.
        inner: Width within the encoder's feed-forwards; 2 D makes its blocks as large as the
            decoder's.
        dropout: Behind every part.
        ctc: Weight of CTC of what is heard.
        spell: Whether CTC hears characters, for which a factor of 8 leaves too few frames, instead
            of words.
        parts: Buckets by duration; 0 switches buckets off: batches are drawn at random.
        subparts: Buckets by tokens in each.
        batch_size: Memory is what this many of the longest records take; rows of random batches.
        strict: Whether records look only at the first bucket that their sound fits.
        ear: Lower blocks that start from an encoder which CTC alone has taught; 0 is none.
        sigmas: Records with that much more tokens a second than others are left out.
    """

    mels: int = 128
    width: int = 1024
    encoder_layers: int = 32
    decoder_layers: int = 4
    heads: int = 8
    kernel: int = 9
    channels: int = 256
    factor: int = 8
    inner: int = 4096
    dropout: float = 0.1
    ctc: float = 0.3
    spell: bool = False
    parts: int = 30
    subparts: int = 2
    batch_size: int = 32
    strict: bool = True
    sigmas: float = 4.0
    ear: int = 0


EAR = Plan(600, learning_rate=2e-3, warmup_steps=60, weight_decay=1e-2, validate_every=200)
"""How the ear is trained, once for all that start from it."""


class Batch(NamedTuple):
    """Sounds and characters, and the words or characters that CTC hears, int64 [B, W]."""

    spoken: SpokenBatch
    words: torch.Tensor
    word_lengths: torch.Tensor


class Learner:
    """Cross-entropy of characters and CTC of what is heard, in batches that waste little.

    Args:
        system: The system that is trained.
        data: Sounds and texts.
        plan: Its training.

    Attributes:
        buckets: Where the records fall; None without buckets.
        sizes: Rows of a batch of each bucket.
        headroom: Share of the memory that the largest batch leaves.
        profile: Padding of an epoch.
    """

    lower_is_better = True

    def __init__(self, system: CanaryEfficiency, data: Data[Spoken], plan: Plan) -> None:
        self.module: Any = system.module
        self.system, s = system, system.settings
        self.identity = {"settings": asdict(s), "data": data.fingerprint}
        seconds = np.array([r.sound.duration_s for r in data.train])
        tokens = np.array([len(r.text) + 1.0 for r in data.train])
        self.buckets: Buckets2D | None = None
        self.sizes, self.headroom = [s.batch_size], 0.0
        bucket = np.zeros(len(seconds), np.int64)
        if s.parts:
            rough = Buckets2D.estimate(seconds, tokens, s.parts, s.subparts)
            odd = outliers(seconds, tokens, rough, s.sigmas)
            self.buckets = Buckets2D.estimate(seconds[~odd], tokens[~odd], s.parts, s.subparts)
            self.sizes, self.headroom = rows_by_memory(
                system.network, self.buckets.bounds, s.batch_size, s.mels
            )
            bucket = self.buckets.assign(seconds, tokens, strict=s.strict)
            bucket[odd] = -1
        sampler = BucketSampler(bucket, self.sizes, plan.seed)
        self.profile = Profile.of(seconds, tokens, sampler.epoch(), cost)
        augment, make = SpecAugment(2, s.mels // 5, 2, 0.05), (system.letters, system.mel)
        self.train = SpokenBatches(
            data.train, *make, s.batch_size, seed=plan.seed, augment=augment, sampler=sampler
        )
        self.valid, self.judged = SpokenBatches(data.valid, *make, 32), list(data.valid)
        self.batch = Ahead(lambda part: self._told(self.train, self.train.batch(part)))

    def _told(self, batches: SpokenBatches, batch: SpokenBatch) -> Batch:
        texts = [batches.records[r].text for r in batch.rows]
        words = [self.system.words.encode(t) for t in ctc_units(texts, self.system.settings.spell)]
        return Batch(batch, pad_sequence(words, True), torch.tensor([len(w) for w in words]))

    def loss(self, batch: Batch) -> Loss:
        """``(1 - c) text + c CTC`` in nats a character; that of the text alone is reported."""
        spoken, share = batch.spoken, self.system.settings.ctc
        wanted = F.pad(spoken.targets, (0, 1))  # c1 ... cU end, then nothing
        wanted.scatter_(1, spoken.target_lengths[:, None], self.system.end)
        begun = F.pad(spoken.targets, (1, 0))
        logits, log_probs, frames = self.module(spoken.features, spoken.frames, begun)
        keep = wanted > 0
        text = F.cross_entropy(logits[keep], wanted[keep], reduction="sum")
        ctc = ctc_loss(log_probs, frames, batch.words, batch.word_lengths)
        total = (1 - share) * text + share * ctc.nats.sum()
        said = {"text": text.detach(), "heard": ctc.nats.sum().detach()}
        return Loss(total, keep.sum(), {**said, "too_long": (~ctc.fits).sum()})

    def held_out(self) -> float:
        """Nats a character of held-out texts; of CTC where nothing is written."""
        found = [self.loss(self._told(self.valid, batch)) for batch in self.valid.once()]
        of = "heard" if self.system.settings.ctc == 1 else "text"
        return sum(float(f.sums[of]) for f in found) / sum(float(f.weight) for f in found)

    def validate(self) -> dict[str, float]:
        """Nats a character, and the word error rate of greedy decoding."""
        loss = self.held_out()
        if self.system.settings.ctc == 1:  # an ear writes nothing
            return {"loss": loss}
        return {"loss": loss, "wer": words_wrong(self.system.transcribe, self.judged)}


class CanaryEfficiency(TrainedSystem):
    """The system."""

    name = "canary-efficiency"
    reads = "spoken"
    settings_type = Settings
    scales: ClassVar[Mapping[str, Scale]] = {
        "test": Scale(
            Settings(16, 16, 2, 1, 2, 5, 4, inner=32, parts=3, batch_size=2), Plan(4), f"{DATA}-few"
        ),
        "small": Scale(
            Settings(
                40, 96, 10, 2, 4, 9, 16, 4, 192, 0.05, spell=True, parts=8, batch_size=4, ear=6
            ),
            Plan(1200, learning_rate=2e-3, warmup_steps=80, weight_decay=1e-2, validate_every=400),
            DATA,
        ),
        "paper": Scale(
            Settings(),
            Plan(
                200_000, learning_rate=3e-4, schedule="inverse-sqrt", warmup_steps=2_500,
                weight_decay=1e-3, precision="bf16-mixed", validate_every=5_000,
            ),
            DATA,
        ),
    }  # fmt: skip

    def __init__(self, settings: Settings, letters: Characters, words: Words) -> None:
        super().__init__(settings)
        self.letters, self.words, self.mel = letters, words, LogMel("nemo", settings.mels)
        self.end = len(letters)
        self.module: Any = self.network()

    def network(self) -> SpeechToText:
        """A new network of these settings; weights are drawn from torch's generator."""
        s = self.settings
        body = Conformer(
            s.mels, s.width, s.encoder_layers, s.heads, kernel=s.kernel, inner=s.inner,
            factor=s.factor, channels=s.channels, dropout=s.dropout,
        )  # fmt: skip
        return SpeechToText(
            body, self.end + 1, s.decoder_layers, s.heads, s.dropout, heard=len(self.words)
        )

    @classmethod
    def untrained(cls, settings: Settings, data: Data[Spoken]) -> Self:
        """A new system with the characters and words of the data."""
        texts = [r.text for part in (data.train, data.valid) for r in part]
        s = settings
        made = cls(s, Characters.of(texts), Words.of(ctc_units(texts, s.spell)))
        if s.ear:
            alone = replace(s, encoder_layers=s.ear, decoder_layers=1, ctc=1.0, ear=0)
            ear = cls.from_pretrained(trained(cls, settings=alone, plan=EAR, data=data)).module
            made.module.encoder.load_state_dict(ear.encoder.state_dict(), strict=False)
            made.module.ctc.load_state_dict(ear.ctc.state_dict())
            for block in made.module.encoder.layers[s.ear :]:
                block.pass_on()
        return made

    def learner(self, data: Data[Spoken], plan: Plan) -> Learner:
        """See :class:`Learner`."""
        return Learner(self, data, plan)

    def write_files(self, folder: Path) -> None:
        """Weights, characters and words."""
        super().write_files(folder)
        units = {"characters": self.letters.characters, "words": self.words.words}
        (folder / VOCABULARY).write_text(json.dumps(units), encoding="utf-8")

    @classmethod
    def read_files(cls, settings: Settings, folder: Path) -> Self:
        """A system from a folder."""
        units = json.loads((folder / VOCABULARY).read_text(encoding="utf-8"))
        made = cls(settings, Characters(units["characters"]), Words(tuple(units["words"])))
        return made.load_weights(folder)

    @torch.no_grad()
    def transcribe(self, sounds: Sequence[torch.Tensor]) -> list[str]:
        """Greedy texts of sounds [N] at 16 kHz; of 30 characters a second at most."""
        begin = torch.zeros(len(sounds), 1, dtype=torch.int64)
        longest = 8 + 30 * max(len(sound) for sound in sounds) // RATE
        rows = self.module.write(*features_of(self.mel, sounds), begin, longest)
        return [self.letters.decode([t for t in row if t]) for row in rows]

    def run(self, given: str) -> Answer:
        """Write what is said in the sound file of that name."""
        wave, changed = fit(read(given), RATE, name=given)
        text = self.transcribe([wave.samples[0]])[0]
        return Answer(text, {"duration_s": wave.duration_s, "changed": changed})


def claim(ruler: Ruler, scale: ClaimScale = "small") -> Claim:
    """Padding by kind of batch; CPU time to a loss; speed with the layers in the encoder."""
    size = "test" if scale == "test" else "small"
    told, small = CanaryEfficiency.scales[size], size == "small"
    records: Data[Spoken] = named_data(told.data, "spoken")
    # (a) what is padding; the card's figures
    kinds = {"random": (0, 1), "1-D": (10, 1), "2-D": (10, 2)}
    kind = {name: waste(*spread(), *parts) for name, parts in kinds.items()}
    more = kind["2-D"].rows / kind["1-D"].rows
    # (b) CPU time to a loss, both at a constant rate and with about as many rows a batch
    some = Data(records.train, records.valid[:40], records.name)
    steps, part = (120, 12) if small else (4, 1)
    plan = replace(told.plan, schedule="constant", validate_every=part, warmup_steps=part)
    curves: dict[str, Curve] = {}
    profiles: dict[str, Profile] = {}
    for name, change in {"random": {"parts": 0, "batch_size": 16}, "2-D": {}}.items():
        most = replace(plan, steps=3 * steps if name == "2-D" else steps)  # its steps are shorter
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(plan.seed)
            begun = CanaryEfficiency.untrained(told.settings, records)
        begun.settings = replace(told.settings, **change)  # batches alone differ
        learner = begun.learner(some, plan)
        profiles[name] = learner.profile
        learner.batch.ahead = False  # one thread, all of it counted
        curves[name] = cpu_curve(learner, most, learner.held_out)
    loss = curves["random"][-1][1]
    time_s = {name: reached(curve, loss) for name, curve in curves.items()}
    sooner = (time_s["random"] or math.nan) / (time_s["2-D"] or math.nan)
    # (c) layers from the decoder to the encoder, both arms for longer
    long = replace(told.plan, steps=5 * told.plan.steps // 3)
    half = (told.settings.encoder_layers + told.settings.decoder_layers) // 2
    deep = replace(told.settings, encoder_layers=half, decoder_layers=half)
    arms = {"ours": told.settings, "deep": deep}
    at = {n: trained(CanaryEfficiency, size, settings=s, plan=long) for n, s in arms.items()}
    made = {name: CanaryEfficiency.from_pretrained(folder) for name, folder in at.items()}
    judged = series("held-out", 500 if small else 20, seed=3)
    errors = {name: words_wrong(each.transcribe, judged) for name, each in made.items()}
    sounds = [r.sound.at(RATE) for r in judged[: 24 if small else 2]]

    def reads(system: CanaryEfficiency) -> Callable[[], object]:
        return lambda: [system.transcribe([sound]) for sound in sounds]

    timings = ruler.compare({name: reads(system) for name, system in made.items()}, repeats=5)
    faster = ratio(timings["deep"], timings["ours"])
    heard_s = sum(len(sound) for sound in sounds) / RATE
    weights = {n: sum(p.numel() for p in m.module.parameters()) for n, m in made.items()}
    lost = [name for name, error in errors.items() if error > 0.5]
    worse = None if lost else errors["ours"] - errors["deep"]
    figures = {
        "frames that are padding, random batches": (kind["random"].inputs, 0.66),
        "frames that are padding, 10 buckets": (kind["1-D"].inputs, 0.12),
        "tokens that are padding, 10 buckets": (kind["1-D"].outputs, 0.36),
        "frames that are padding, 10 x 2 buckets": (kind["2-D"].inputs, 0.12),
        "tokens that are padding, 10 x 2 buckets": (kind["2-D"].outputs, 0.23),
        "more rows a batch, 10 x 2 over 10 buckets": (more - 1, 0.18),
    }
    off = {f"{n}, distance from {f:.0%}": abs(v - f) for n, (v, f) in figures.items()}
    gates = (
        *(Gate(name, value, "<=", 0.03) for name, value in off.items()),
        Gate("CPU time to a loss, random batches over 2-D", sooner, ">=", 1.5),
        Gate("speed, one sound at a time, over as many decoder layers", faster.median, ">=", 2.0),
        Gate("word error over as many decoder layers", worse, "<=", 0.01),
    )
    why = [f"{name} has not learnt" for name in lost]
    why += [f"missed: {gate.name}" for gate in gates if not gate.passed]
    shown = "; ".join(f"{n}: {p.rows:.1f} rows, {p.cost:.0%} padding" for n, p in profiles.items())

    def row(metric: str, unit: str, name: str) -> Row:
        one, two, none = (getattr(kind[k], name) for k in ("1-D", "2-D", "random"))
        return Row(metric, unit, one, two, none, note="baseline: buckets by duration; off: random")

    def moved(metric: str, unit: str, values: Mapping[str, float], note: str) -> Row:
        """Baseline and idea off are the deep decoder."""
        return Row(metric, unit, values["deep"], values["ours"], values["deep"], note=note)

    rtfx = {name: heard_s / timing.median_s for name, timing in timings.items()}
    alike = f"baseline and off: {half} + {half} layers"
    return Claim(
        slug="canary-efficiency",
        statement="Buckets in two dimensions leave little padding and train a recogniser in less "
        "time; with its layers in the encoder it is twice as fast and hears as well.",
        paper_figure="5 times larger batches, 4 times fewer GPUs or half the time, 3 times the "
        "speed at equal accuracy (abstract)",
        rows=(
            row("padding, frames", "", "inputs"),
            row("padding, tokens", "", "outputs"),
            row("padding, cost", "", "cost"),
            row("rows of a batch", "", "rows"),
            Row(f"CPU time to {loss:.3f} nats a character", "s", time_s["random"], time_s["2-D"],
                time_s["random"], note="baseline and off: random batches"),
            moved("inverse real-time factor", "x", rtfx, f"{faster}; {alike}"),
            moved("word error rate", "", errors, alike),
            moved("parameters", "", weights, alike),
        ),
        scale=scale, device="cpu",
        status=judge(gates, (Gate("sooner", sooner, ">", 1), Gate("speed", faster.median, ">", 1))),
        reason="; ".join(why),
        gates=gates, seeds=(told.plan.seed,),
        notes=(
            "a: 20,000 lengths drawn as the card says; memory is four of the longest",
            f"b: {shown}; the same first weights and rate, and up to three times the steps; the "
            f"loss is that of {len(some.valid)} held-out series which random batches end with",
            f"c: {len(judged)} held-out series that chose nothing; {long.steps} steps from one ear "
            "(1.3 points apart after 1200, on others); after first looks blocks above it begin by "
            "passing on what it hears, with half the dropout",
        ),
    )  # fmt: skip
