"""OWSM-CTC: one encoder that recognises, translates and names the language, without a decoder.

Paper: Y. Peng, Y. Sudo, M. Shakeel, S. Watanabe, "OWSM-CTC: An Open Encoder-Only Speech Foundation
    Model for Speech Recognition, Translation, and Language Identification", 2024, arXiv:2402.12654
Idea: CTC at several depths of one encoder: lower blocks learn the transcript, upper ones the task
    that two prefix tokens ask for, and each is told what those below have read.
Differs: Units are characters, not 50,000 pieces; the prompt of the previous sentence and its
    encoder are left out. A small one starts from a recogniser that has learnt to hear.

    <lang> <task> frames ─▶ blocks ─▶ CTC: transcript ─▶ blocks ─▶ CTC: <lang> <task> answer
                                          └── x + W p ──▲
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from isthmus.claims import Claim, Gate, Op, Row, Ruler, judge, ratio
from isthmus.claims import Scale as ClaimScale
from isthmus.decoding.ctc import greedy, windows
from isthmus.metrics.speech import word_error_rate
from isthmus.models.ctc import CTCModel
from isthmus.models.speech_to_text import SpeechToText
from isthmus.nn.conformer import Conformer
from isthmus.nn.spec_augment import SpecAugment
from isthmus.objectives.ctc import ctc_loss
from isthmus.roles import Loss
from isthmus.signals.audio import Recording, fit, read
from isthmus.signals.features import RATE, LogMel
from isthmus.training.data import Data, Translated
from isthmus.training.loop import Plan
from isthmus.training.seeds import batch_generator
from isthmus.training.speech import SpokenBatches, Words, features_of, spelled, unspelled
from isthmus.training.system import Answer, Scale, TrainedSystem
from isthmus.workbench.ears import ear, lend
from isthmus.workbench.recogniser import Settings as Hearing
from isthmus.workbench.speech import NOISES, corpus, noise, surrounded
from isthmus.workbench.trained import trained

UNKNOWN, TASKS = "<nolang>", ("<asr>", "<translate>")
VOCABULARY, DATA = "units.json", "workbench:speech-multi"


@dataclass(frozen=True)
class Settings:
    """Settings of OWSM-CTC.

    Attributes:
        mels: Bands of the features.
        width: D.
        depth: Blocks.
        heads: H.
        kernel: Of the convolutions.
        channels: Of the subsampling.
        inner: Blocks, numbered from 1, that have CTC besides the last.
        source: Those of them that learn the transcript.
        condition: Whether each tells those above what it has read; off switches the idea off.
        top_weight: Of the last block's loss; the others share the rest.
        hide_language: How often the language is hidden in training.
        dropout: Behind every part.
        batch_size: Records of a batch.
        decoder: Layers of a text decoder instead, over a plain encoder: the baseline; 0 is none.
        factor: Of the subsampling.
        ear: Lower blocks that start from a recogniser of the same records; 0 is none.
        around: Most seconds of silence or noise around half of the sounds in training.
    """

    mels: int = 80
    width: int = 1024
    depth: int = 27
    heads: int = 16
    kernel: int = 31
    channels: int = 256
    inner: tuple[int, ...] = (6, 12, 15, 21)
    source: tuple[int, ...] = (6, 12, 15)
    condition: bool = True
    top_weight: float = 0.2
    hide_language: float = 0.5
    dropout: float = 0.1
    batch_size: int = 256
    decoder: int = 0
    factor: int = 8
    ear: int = 0
    around: float = 0.0


class Batch(NamedTuple):
    """Features, the prefix, and what the lower and the upper blocks should read."""

    features: torch.Tensor
    frames: torch.Tensor
    prefix: torch.Tensor
    transcript: torch.Tensor
    transcript_lengths: torch.Tensor
    answer: torch.Tensor
    answer_lengths: torch.Tensor


class Learner:
    """Both tasks, drawn evenly, with the language given or hidden.

    Args:
        system: The system that is trained.
        data: Sounds, texts and translations.
        plan: Its training.
    """

    lower_is_better = True

    def __init__(self, system: OwsmCtc, data: Data[Translated], plan: Plan) -> None:
        self.module: Any = system.module
        self.system, self.seed, s = system, plan.seed, system.settings
        self.identity = {"settings": asdict(s), "data": data.fingerprint}
        self.heard = [r._replace(text=spelled(r.text)) for r in data.train]
        make = (system.words, system.mel, s.batch_size)
        augment = SpecAugment(2, s.mels // 5, 2, 0.05)
        alter = partial(surrounded, longest_s=s.around)
        self.train = SpokenBatches(self.heard, *make, seed=plan.seed, augment=augment, alter=alter)
        self.valid = list(data.valid)

    def batch(self, part: int) -> Batch:
        """See :class:`Batch`."""
        base, words = self.train.batch(part), self.system.words
        records, draw = [self.heard[row] for row in base.rows], batch_generator(self.seed, part)
        tasks = torch.randint(2, (len(records),), generator=draw).tolist()
        hidden = torch.rand(len(records), generator=draw) < self.system.settings.hide_language
        answers = [
            words.encode(f"<{r.language}> {TASKS[t]} {spelled(r.translation) if t else r.text}")
            for r, t in zip(records, tasks, strict=True)
        ]
        prefix = torch.stack([answer[:2] for answer in answers])
        prefix[hidden, 0] = 0
        lengths = torch.tensor([len(answer) for answer in answers])
        return Batch(
            base.features, base.frames, prefix, base.targets, base.target_lengths,
            pad_sequence(answers, True), lengths,
        )  # fmt: skip

    def loss(self, batch: Batch) -> Loss:
        """``0.2 top + 0.8 mean(inner)`` in nats a record; the baseline: ``0.7 text + 0.3 CTC``."""
        s, count = self.system.settings, len(batch.frames)
        transcript = batch.transcript, batch.transcript_lengths
        if s.decoder:
            begin = F.pad(batch.prefix, (1, 0))
            text = torch.cat([begin, batch.answer[:, 2:]], 1)  # 0 lang task w1 ... wU
            logits, log_probs, lengths = self.module(batch.features, batch.frames, text)
            wanted = F.pad(batch.answer, (0, 1))  # lang task w1 ... wU end, then nothing
            wanted.scatter_(1, batch.answer_lengths[:, None], len(self.system.words))
            keep = wanted > 0
            # the prefix is given, so it is not asked for; but a hidden language is
            keep[:, :2] = batch.prefix[:, :2] == 0
            total = 0.7 * F.cross_entropy(logits[keep], wanted[keep], reduction="sum")
            return Loss(total + 0.3 * ctc_loss(log_probs, lengths, *transcript).nats.sum(), count)
        read, lengths = self.module(batch.features, batch.frames, batch.prefix)
        answer = batch.answer, batch.answer_lengths
        nats = [
            ctc_loss(p, lengths, *(transcript if level in s.source else answer)).nats.sum()
            for level, p in zip((*s.inner, s.depth), read, strict=True)
        ]
        inner = torch.stack(nats[:-1] or nats).mean()
        return Loss(s.top_weight * nats[-1] + (1 - s.top_weight) * inner, count)

    def validate(self) -> dict[str, float]:
        """Word error rates of both tasks, and languages that were named right."""
        return judged(self.system, self.valid)


class OwsmCtc(TrainedSystem):
    """The system."""

    name = "owsm-ctc"
    reads = "translated"
    settings_type = Settings
    scales: ClassVar[Mapping[str, Scale]] = {
        "test": Scale(
            Settings(16, 16, 2, 2, 5, 4, (1,), (1,), batch_size=4), Plan(4), f"{DATA}-few"
        ),
        "small": Scale(
            Settings(
                40, 64, 6, 4, 15, 16, (2, 3, 5), (2, 3), batch_size=32, factor=4, ear=3, around=0.6
            ),
            Plan(440, learning_rate=2e-3, warmup_steps=40, weight_decay=1e-2, validate_every=220),
            DATA,
        ),
        "paper": Scale(
            Settings(),
            Plan(600_000, learning_rate=2e-4, warmup_steps=60_000, validate_every=5000),
            DATA,
        ),
    }

    def __init__(self, settings: Settings, words: Words) -> None:
        super().__init__(settings)
        self.words, self.mel = words, LogMel("nemo", settings.mels, normalise="fixed")
        s, vocab = settings, len(words) + 1  # the last one ends texts of the baseline
        body = Conformer(
            s.mels, s.width, s.depth, s.heads, block="e-branchformer",
            kernel=s.kernel, factor=s.factor, channels=s.channels, dropout=s.dropout,
        )  # fmt: skip
        self.module: Any = (
            SpeechToText(body, vocab, s.decoder)
            if s.decoder
            else CTCModel(body, vocab, s.inner, condition=s.condition, prefixes=vocab)
        )

    @classmethod
    def untrained(cls, settings: Settings, data: Data[Translated]) -> Self:
        """A new system with the words and languages of the data."""
        records = [*data.train, *data.valid]
        texts = [f"<{r.language}> {spelled(f'{r.text} {r.translation}')}" for r in records]
        made, s = cls(settings, Words.of([*texts, " ".join(TASKS)])), settings
        if s.ear:
            sizes = s.mels, s.width, s.ear, s.heads, s.kernel, s.factor, s.channels, s.dropout
            head = made.module.ctc if s.decoder else made.module.head
            ears = ear(data, Hearing(*sizes, block="e-branchformer", level=True))
            rows = made.words.encode(spelled(ears.letters.characters))
            lend(ears, made.module.encoder, head, rows)
        return made

    def learner(self, data: Data[Translated], plan: Plan) -> Learner:
        """See :class:`Learner`."""
        return Learner(self, data, plan)

    def write_files(self, folder: Path) -> None:
        """Weights and words."""
        super().write_files(folder)
        (folder / VOCABULARY).write_text(json.dumps(self.words.words), encoding="utf-8")

    @classmethod
    def read_files(cls, settings: Settings, folder: Path) -> Self:
        """A system from a folder."""
        words = json.loads((folder / VOCABULARY).read_text(encoding="utf-8"))
        return cls(settings, Words(tuple(words))).load_weights(folder)

    @torch.no_grad()
    def answer(
        self, sounds: Sequence[torch.Tensor], task: str = TASKS[0], language: str = UNKNOWN
    ) -> list[tuple[str, str]]:
        """Language and text for sounds [N] at 16 kHz.

        Args:
            sounds: The sounds.
            task: ``<asr>`` or ``<translate>``.
            language: ``<de>`` ...; ``<nolang>`` lets the system name it.
        """
        features, frames = features_of(self.mel, sounds)
        marks = self.words.encode(task if language == UNKNOWN else f"{language} {task}")
        prefix = F.pad(marks, (2 - len(marks), 0)).expand(len(sounds), -1)
        if self.settings.decoder:
            rows = self.module.write(features, frames, F.pad(prefix, (1, 0)), longest=64)
        else:
            read, lengths = self.module(features, frames, prefix)
            rows = [list(found.tokens) for found in greedy(read[-1], lengths)]
        texts = [self.words.decode(row).split() for row in rows]
        named = [next((w for w in t if w[0] == "<" and w not in TASKS), language) for t in texts]
        return list(zip(named, map(unspelled, texts), strict=True))

    @torch.no_grad()
    def long_form(
        self, sound: torch.Tensor, *, window_s: float = 30.0, context_s: float = 4.0
    ) -> str:
        """The transcript of a long sound [N]: overlapping windows in one batch, edges discarded."""
        step = self.settings.factor * 160  # samples of a frame behind the subsampling
        size, context = (round(s * RATE / step) for s in (window_s, context_s))
        places = windows(-(-len(sound) // step), size, context)
        pieces = [sound[a * step : b * step] for a, b, _, _ in places]
        features, frames = features_of(self.mel, pieces)
        prefix = F.pad(self.words.encode(TASKS[0]), (1, 0)).expand(len(pieces), -1)
        read, lengths = self.module(features, frames, prefix)
        parts = [
            row[2 + low - a : min(2 + high - a, int(length))]
            for row, length, (a, _, low, high) in zip(read[-1], lengths, places, strict=True)
        ]
        whole = torch.cat(parts)[None]
        row = greedy(whole, torch.tensor([whole.shape[1]]))[0].tokens
        return unspelled(self.words.decode(row).split())

    def run(self, given: str) -> Answer:
        """Language, transcript and translation of the sound file of that name."""
        wave, changed = fit(read(given), RATE, name=given)
        language, said = self.answer([wave.samples[0]])[0]
        _, means = self.answer([wave.samples[0]], TASKS[1], language)[0]
        record = {"language": language, "transcript": said, "translation": means}
        return Answer(f"{language} {said}: {means}", record | {"changed": changed})


def judged(system: OwsmCtc, records: Sequence[Translated]) -> dict[str, float]:
    """Word error rates of both tasks, the language hidden, and languages named right."""
    said, means = list[tuple[str, str]](), list[str]()
    order = sorted(records, key=lambda r: r.sound.duration_s)
    for start in range(0, len(order), 50):
        sounds = [r.sound.at(RATE) for r in order[start : start + 50]]
        said += system.answer(sounds)
        means += [text for _, text in system.answer(sounds, TASKS[1])]
    named = [language == f"<{r.language}>" for (language, _), r in zip(said, order, strict=True)]
    return {
        "translation_wer": word_error_rate([r.translation for r in order], means).rate,
        "wer": word_error_rate([r.text for r in order], [text for _, text in said]).rate,
        "languages": sum(named) / len(named),
    }


BASELINE = {"depth": 4, "decoder": 4, "inner": (), "source": ()}
"""The arm with a text decoder, of the size of six blocks, as 18 and 18 have that of the 27."""


def claim(ruler: Ruler, scale: ClaimScale = "small") -> Claim:
    """Three arms that were trained alike: ours, without conditioning, and with a text decoder."""
    size = "test" if scale == "test" else "small"
    told = OwsmCtc.scales[size]
    days = corpus("multi", "held-out", 12 if size == "test" else 1000, seed=11)
    valid = [Translated(Recording(samples=u.samples), u.line.language, u.line.text, u.line.target)
             for u in days]  # fmt: skip
    made: dict[str, OwsmCtc] = {}
    for name, change in {"ours": {}, "off": {"condition": False}, "decoder": BASELINE}.items():
        settings: Settings = replace(told.settings, **change)  # type: ignore[arg-type]
        made[name] = OwsmCtc.from_pretrained(trained(OwsmCtc, size, settings=settings))
    found = {name: judged(system, valid) for name, system in made.items()}
    sounds = [record.sound.at(RATE) for record in valid[:20]]

    def reads(name: str, task: str) -> object:
        return [made[name].answer([sound], task) for sound in sounds]

    timings = ruler.compare({name: partial(reads, name, TASKS[1]) for name in made}, repeats=3)
    faster = ratio(timings["decoder"], timings["ours"])
    long, hiss = torch.cat(sounds), torch.Generator().manual_seed(0)
    rtfx = {name: len(long) / RATE / timing.median_s for name, timing in timings.items()}
    empty = [0.1 * noise(k, 2 * RATE, hiss) for k in NOISES * (1 if size == "test" else 8)]
    dreamt = {name: sum(len(text.split()) for _, text in m.answer(empty)) / len(empty)
              for name, m in made.items()}  # fmt: skip
    windowed = partial(made["ours"].long_form, long, window_s=6, context_s=0.8)
    alone = partial(reads, "decoder", TASKS[0])
    form = ruler.compare({"windows": windowed, "decoder": alone}, repeats=3)
    tiled = ratio(form["decoder"], form["windows"])
    keys = "translation_wer", "wer", "languages"
    means, hears, named = ({name: each[key] for name, each in found.items()} for key in keys)
    error = {name: (means[name] + hears[name]) / 2 for name in made}
    lost = [name for name in made if max(means[name], hears[name]) > 0.5]

    def gate(name: str, other: str, value: float, op: Op, bound: float) -> Gate:
        """Comparisons with an arm that has not learnt the task say nothing."""
        return Gate(name, None if {"ours", other} & set(lost) else value, op, bound)

    relative = error["ours"] / max(error["decoder"], 1e-9)
    more, lower = dreamt["ours"] - dreamt["decoder"], error["off"] - error["ours"]
    gates = (
        gate("speed against the decoder, one sound at a time", "decoder", faster.median, ">=", 3.0),
        gate("word error against the decoder, ratio", "decoder", relative, "<=", 1.1),
        gate("word error without conditioning minus ours", "off", lower, ">", 0.0),
        gate("words heard in noise, ours minus the decoder's", "decoder", more, "<", 0.0),
        gate("long form in windows against the decoder, speed", "decoder", tiled.median, ">=", 5.0),
    )
    why = [f"not learnt by {name}" for name in lost]
    why += [f"missed: {gate.name}" for gate in gates if not gate.passed]

    def row(metric: str, unit: str, values: Mapping[str, float], note: str = "") -> Row:
        return Row(metric, unit, values["decoder"], values["ours"], values["off"], note=note)

    return Claim(
        slug="owsm-ctc",
        statement="An encoder with CTC at several depths translates and recognises as well as an "
        "encoder with a text decoder of its size, three times as fast, and hears less in noise.",
        paper_figure="3 to 4 times faster than OWSM, 20 times on long form (abstract)",
        rows=(
            row("word error rate, translation", "", means),
            row("word error rate, transcript", "", hears),
            # the decoder is given its prefix and names no language
            replace(row("languages named right", "", named), baseline=None),
            row("inverse real-time factor", "x", rtfx, f"{faster} against the decoder"),
            row("words heard in 2 s of noise", "words", dreamt),
            Row("long form, speed", "x", 1.0, tiled.median, None, note=str(tiled)),
            row("training", "s", {name: m.record["seconds"] for name, m in made.items()}),
        ),
        scale=scale,
        device="cpu",
        status=judge(gates, (gates[0], gates[2])),
        reason="; ".join(why),
        gates=gates,
        seeds=(told.plan.seed,),
        notes=(
            "baseline: four blocks and four decoder layers with CTC of the transcript beside; "
            "off: inner CTC without telling the blocks above; all arms take the same steps",
            "all arms start from one cached CTC encoder of three blocks; one with over half of "
            "the words of a task wrong has not learnt, and comparisons with it count for nothing",
            f"{len(valid)} days of three languages, hidden ones, that chose no checkpoint",
            "after a first look: translations in the order of speech; more and narrower blocks; "
            "then, as all heard words in noise, features of a fixed level and up to 0.6 s of "
            "silence or noise around half of what is learnt; then more days (of 200, the gain of "
            "conditioning was 0.5 points, and after these changes -0.2)",
        ),
    )
