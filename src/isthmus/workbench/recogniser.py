"""The workbench recogniser: a small conformer that writes the characters it hears, by CTC.

Claims about speech measure on it, or start from its encoder: attention and transducer models do
not find the alignment by themselves in minutes. On sentences of a closed vocabulary it makes few
errors after four minutes of one core; :func:`recogniser` trains it once and keeps it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch

from isthmus.decoding.ctc import Transcript, greedy, prefix_beam
from isthmus.metrics.speech import character_error_rate, word_error_rate
from isthmus.models.ctc import CTCModel
from isthmus.nn.conformer import Conformer
from isthmus.nn.spec_augment import SpecAugment
from isthmus.objectives.ctc import ctc_loss
from isthmus.roles import Loss
from isthmus.signals.audio import fit, read
from isthmus.signals.features import RATE, LogMel
from isthmus.training.data import Data, Spoken
from isthmus.training.loop import Plan
from isthmus.training.speech import Characters, SpokenBatch, SpokenBatches, features_of
from isthmus.training.system import Answer, Scale, TrainedSystem
from isthmus.workbench.trained import trained

VOCABULARY = "characters.json"


@dataclass(frozen=True)
class Settings:
    """Settings of the recogniser.

    Attributes:
        mels: Bands of the features.
        width: D.
        depth: Blocks.
        heads: H.
        kernel: Of the depthwise convolutions.
        factor: Of the subsampling; 4 is 25 frames a second, enough for characters.
        channels: Of the subsampling.
        dropout: Behind every part.
        block: ``conformer`` or ``e-branchformer``.
        inner: Blocks, numbered from 1, that are read as well.
        batch_size: Records of a batch.
        causal: Whether it may be used in a stream: features are not normalised over the whole
            sound, and convolutions reach back only.
        chunk: Frames that a block hears at once, with all before them; 0 is all.
        level: Whether features have a fixed level, as in a stream, though convolutions look ahead.
    """

    mels: int = 40
    width: int = 96
    depth: int = 4
    heads: int = 4
    kernel: int = 9
    factor: int = 4
    channels: int = 16
    dropout: float = 0.1
    block: str = "conformer"
    inner: tuple[int, ...] = ()
    batch_size: int = 32
    causal: bool = False
    chunk: int = 0
    level: bool = False

    def features(self) -> LogMel:
        """What makes the features."""
        return LogMel("nemo", self.mels, normalise="fixed" if self.causal or self.level else True)

    def encoder(self) -> Conformer:
        """A new encoder of these sizes."""
        return Conformer(
            self.mels,
            self.width,
            self.depth,
            self.heads,
            block=self.block,
            kernel=self.kernel,
            factor=self.factor,
            channels=self.channels,
            dropout=self.dropout,
            causal=self.causal,
            chunk=self.chunk,
        )


class Learner:
    """CTC on the characters of spoken records.

    Args:
        system: The system that is trained.
        data: Sounds and texts.
        plan: Its training.
    """

    lower_is_better = True

    def __init__(self, system: Recogniser, data: Data[Spoken], plan: Plan) -> None:
        self.module: Any = system.module
        s = system.settings
        self.letters = system.letters
        self.identity = {"settings": asdict(s), "data": data.fingerprint}
        augment = SpecAugment(2, s.mels // 5, 2, 0.05)
        make = (system.letters, system.mel, s.batch_size)
        self.train = SpokenBatches(data.train, *make, seed=plan.seed, augment=augment)
        self.valid = SpokenBatches(data.valid, *make)

    def batch(self, part: int) -> SpokenBatch:
        """See :class:`~isthmus.training.speech.SpokenBatches`."""
        return self.train.batch(part)

    def loss(self, batch: SpokenBatch) -> Loss:
        """Nats of every text, of the last block and the mean of the inner ones alike."""
        read, lengths = self.module(batch.features, batch.frames)
        found = [ctc_loss(p, lengths, batch.targets, batch.target_lengths) for p in read]
        total = found[-1].nats.sum()
        if len(found) > 1:
            inner = torch.stack([ctc.nats.sum() for ctc in found[:-1]]).mean()
            total = 0.5 * (total + inner)
        missed = (~found[-1].fits).sum()
        return Loss(total, len(batch.frames), {"too_long_for_their_frames": missed})

    def validate(self) -> dict[str, float]:
        """Error rates of the best path."""
        said, meant = [], []
        for batch in self.valid.once():
            read, lengths = self.module(batch.features, batch.frames)
            said += [self.letters.decode(t.tokens) for t in greedy(read[-1], lengths)]
            meant += [self.valid.records[row].text for row in batch.rows]
        return {
            "wer": word_error_rate(meant, said).rate,
            "cer": character_error_rate(meant, said).rate,
        }


class Recogniser(TrainedSystem):
    """The recogniser."""

    name = "recogniser"
    reads = "spoken"
    settings_type = Settings
    scales: ClassVar[Mapping[str, Scale]] = {
        "test": Scale(
            Settings(16, 16, 2, 2, channels=4, batch_size=4), Plan(6), "workbench:speech-few"
        ),
        "small": Scale(
            Settings(),
            Plan(450, learning_rate=2e-3, warmup_steps=45, weight_decay=1e-2, validate_every=150),
            "workbench:speech-sentences",
        ),
        "paper": Scale(
            Settings(80, 512, 17, 8, factor=8, channels=256, batch_size=128),
            Plan(100_000, learning_rate=1e-3, warmup_steps=10_000, validate_every=2000),
            "workbench:speech-sentences",
        ),
    }

    def __init__(self, settings: Settings, letters: Characters) -> None:
        super().__init__(settings)
        self.letters, self.mel = letters, settings.features()
        self.module = CTCModel(settings.encoder(), len(letters), settings.inner)

    @classmethod
    def untrained(cls, settings: Settings, data: Data[Spoken]) -> Self:
        """A new recogniser that knows the characters of the data."""
        return cls(
            settings, Characters.of(r.text for part in (data.train, data.valid) for r in part)
        )

    def learner(self, data: Data[Spoken], plan: Plan) -> Learner:
        """See :class:`Learner`."""
        return Learner(self, data, plan)

    def write_files(self, folder: Path) -> None:
        """Weights and characters."""
        super().write_files(folder)
        (folder / VOCABULARY).write_text(json.dumps(self.letters.characters), encoding="utf-8")

    @classmethod
    def read_files(cls, settings: Settings, folder: Path) -> Self:
        """A recogniser from a folder."""
        letters = Characters(json.loads((folder / VOCABULARY).read_text(encoding="utf-8")))
        return cls(settings, letters).load_weights(folder)

    @torch.no_grad()
    def transcribe(self, sounds: list[torch.Tensor], *, beam: int = 0) -> list[Transcript]:
        """What is said in sounds [N] at 16 kHz; by the best path, or a beam of this width."""
        read, lengths = self.module(*features_of(self.mel, sounds))
        if not beam:
            return greedy(read[-1], lengths)
        rows = zip(read[-1], lengths.tolist(), strict=True)
        return [prefix_beam(row[:length], beam, 8)[0] for row, length in rows]

    def run(self, given: str) -> Answer:
        """Write what is said in the sound file of that name."""
        wave, changed = fit(read(given), RATE, name=given)
        found = self.transcribe([wave.samples[0]])[0]
        text = self.letters.decode(found.tokens)
        record = {"duration_s": wave.duration_s, "changed": changed, "logprob": found.logprob}
        return Answer(text, record)


def recogniser(scale: str = "small") -> Recogniser:
    """The recogniser of sentences, trained on first use."""
    return Recogniser.from_pretrained(trained(Recogniser, scale))
