"""TAED: a transducer whose predictor is an attention decoder that hears what has been said so far.

Paper: Y. Tang, A. Sun, H. Inaguma, X. Chen, N. Dong, X. Ma, P. Tomasello, J. Pino, "Hybrid
    Transducer and Attention based Encoder-Decoder Modeling for Speech-to-Text Tasks", 2023,
    arXiv:2305.03101
Idea: The transducer decides when to read and write, the decoder, which attends to the sound heard
    so far, what: texts in another order than the sound, written frame by frame as it arrives.
Differs: Units are characters. The pre-trained speech encoder and text decoder are left out; a small
    one starts from a recogniser that has learnt to hear. Sizes, the chunk of 320 ms and the weight
    of the decoder's own loss are not taken from the paper's tables. A stream encodes the sound
    again from its start whenever a chunk is complete: nothing is cached, and nothing differs.

    frames ─▶ Conformer ─▶ h_t ───────────────┬─▶ W tanh(W_h h_t + W_s s) ─▶ read on, or a token
                 h up to the end of t's chunk │
    tokens so far ─▶ decoder ─▶ s_{c(t), u} ──┘
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch.nn import functional as F

from isthmus.claims import Claim, Gate, Row, Ruler, judge
from isthmus.claims import Scale as ClaimScale
from isthmus.decoding.ctc import Transcript
from isthmus.decoding.transducer import TransducerGreedy, TransducerState
from isthmus.metrics.speech import character_error_rate
from isthmus.models.attention_transducer import AttentionTransducer
from isthmus.nn.spec_augment import SpecAugment
from isthmus.objectives.rnnt import rnnt_loss
from isthmus.roles import Loss
from isthmus.signals.audio import fit, read
from isthmus.signals.features import HOP, RATE
from isthmus.training.data import Data, Spoken, Translated
from isthmus.training.loop import Plan
from isthmus.training.speech import Characters, SpokenBatch, SpokenBatches, features_of
from isthmus.training.system import Answer, Scale, TrainedSystem
from isthmus.workbench.ears import ear
from isthmus.workbench.recogniser import Settings as Hearing
from isthmus.workbench.speech import corpus
from isthmus.workbench.trained import trained

VOCABULARY, DATA = "characters.json", "workbench:speech-dates"


@dataclass(frozen=True)
class Settings:
    """Settings of TAED.

    Attributes:
        mels: Bands of the features.
        width: D.
        depth: Blocks of the encoder.
        heads: H, of encoder and decoder.
        kernel: Of the encoder's convolutions.
        factor: Of the subsampling.
        channels: Of the subsampling.
        layers: Of the decoder.
        inner: Width within the decoder's feed-forwards; 4 D when 0.
        joint: Width of the joint network.
        chunk: Frames behind the subsampling that are heard at once, K; 0 is the whole sound.
        cross: Whether the decoder looks at the sound; off switches the idea off, and a plain
            transducer remains.
        transduce: Off, the decoder writes alone once all is heard: the other baseline.
        decoder_weight: Lambda, of the decoder's own loss.
        dropout: Behind every part.
        batch_size: Records of a batch.
        longest: Characters of a text at most.
        ear: Whether the encoder starts from a recogniser of the same records.
    """

    mels: int = 80
    width: int = 512
    depth: int = 12
    heads: int = 8
    kernel: int = 9
    factor: int = 4
    channels: int = 256
    layers: int = 6
    inner: int = 2048
    joint: int = 512
    chunk: int = 8
    cross: bool = True
    transduce: bool = True
    decoder_weight: float = 1.0
    dropout: float = 0.1
    batch_size: int = 64
    longest: int = 400
    ear: bool = False

    def hearing(self) -> Hearing:
        """The recogniser that has the same encoder."""
        return Hearing(
            self.mels, self.width, self.depth, self.heads, self.kernel, self.factor,
            self.channels, self.dropout, causal=True, chunk=self.chunk,
        )  # fmt: skip


class Learner:
    """The transducer's loss and the decoder's own.

    Args:
        system: The system that is trained.
        data: Sounds, and what is to be written.
        plan: Its training.
    """

    lower_is_better = True

    def __init__(self, system: Taed, data: Data[Translated], plan: Plan) -> None:
        self.module: Any = system.module
        self.system, s = system, system.settings
        self.identity = {"settings": asdict(s), "data": data.fingerprint}
        self.train = SpokenBatches(
            [Spoken(r.sound, r.translation) for r in data.train],
            system.letters, system.mel, s.batch_size, seed=plan.seed,
            augment=SpecAugment(2, s.mels // 5, 2, 0.05),
        )  # fmt: skip
        self.valid = list(data.valid)

    def batch(self, part: int) -> SpokenBatch:
        """See :class:`~isthmus.training.speech.SpokenBatches`."""
        return self.train.batch(part)

    def loss(self, batch: SpokenBatch) -> Loss:
        """``L_rnnt + lambda L_ce`` in nats a record; a record in a batch is a text."""
        s, (features, frames, targets, lengths, _) = self.system.settings, batch
        logits, own, heard = self.module(features, frames, targets, transduce=s.transduce)
        total = own.new_zeros(())
        if s.decoder_weight or not s.transduce:
            # y1 ... yU, then 0, which ends a text
            place = torch.arange(own.shape[1])
            wanted = F.pad(targets, (0, 1)).masked_fill(place == lengths[:, None], 0)
            keep = place <= lengths[:, None]
            ce = F.cross_entropy(own[keep], wanted[keep], reduction="sum")
            total = total + (s.decoder_weight if s.transduce else 1.0) * ce
        if logits is not None:
            total = total + rnnt_loss(logits, targets, heard, lengths, reduction="sum")
        return Loss(total, len(frames))

    def validate(self) -> dict[str, float]:
        """Characters wrong, and texts that are right."""
        return judged(self.system, self.valid)


class Taed(TrainedSystem):
    """The system."""

    name = "taed"
    reads = "translated"
    settings_type = Settings
    scales: ClassVar[Mapping[str, Scale]] = {
        "test": Scale(
            Settings(16, 16, 2, 2, 5, 4, 4, 1, 32, 16, batch_size=4, longest=20),
            Plan(4),
            f"{DATA}-few",
        ),
        "small": Scale(
            Settings(40, 96, 4, 4, 9, 4, 16, 2, 384, 96, batch_size=32, longest=20, ear=True),
            Plan(400, learning_rate=1.5e-3, warmup_steps=30, weight_decay=1e-2, validate_every=200),
            f"{DATA}-said",
        ),
        "paper": Scale(
            Settings(),
            Plan(300_000, learning_rate=5e-4, warmup_steps=10_000, validate_every=5000),
            f"{DATA}-said",
        ),
    }

    def __init__(self, settings: Settings, letters: Characters) -> None:
        super().__init__(settings)
        s, hearing = settings, settings.hearing()
        self.letters, self.mel = letters, hearing.features()
        self.module: AttentionTransducer = AttentionTransducer(
            hearing.encoder(), len(letters), s.layers, s.heads, s.inner, s.joint,
            dropout=s.dropout, cross=s.cross, chunk=s.chunk, max_length=s.longest + 1,
        )  # fmt: skip
        self.search = TransducerGreedy(self.module, longest=s.longest)

    @classmethod
    def untrained(cls, settings: Settings, data: Data[Translated]) -> Self:
        """A new system with the characters of the data."""
        records = [*data.train, *data.valid]
        made = cls(settings, Characters.of(r.translation for r in records))
        if settings.ear:
            heard: Any = ear(data, settings.hearing()).module
            made.module.encoder.load_state_dict(heard.encoder.state_dict())
        return made

    def learner(self, data: Data[Translated], plan: Plan) -> Learner:
        """See :class:`Learner`."""
        return Learner(self, data, plan)

    def write_files(self, folder: Path) -> None:
        """Weights and characters."""
        super().write_files(folder)
        (folder / VOCABULARY).write_text(json.dumps(self.letters.characters), encoding="utf-8")

    @classmethod
    def read_files(cls, settings: Settings, folder: Path) -> Self:
        """A system from a folder."""
        letters = Characters(json.loads((folder / VOCABULARY).read_text(encoding="utf-8")))
        return cls(settings, letters).load_weights(folder)

    @torch.no_grad()
    def answer(self, sounds: Sequence[torch.Tensor]) -> list[Transcript]:
        """What is to be written for sounds [N] at 16 kHz, with the frame of each token."""
        memory, lengths = self.module.encoder(*features_of(self.mel, sounds))
        if not self.settings.transduce:
            rows = self.module.write(memory, lengths, self.settings.longest)
            return [Transcript(tuple(row), 0.0, 0.0, (int(n) - 1,) * len(row))
                    for row, n in zip(rows, lengths, strict=True)]  # fmt: skip
        return self.read_on(memory, lengths, self.search.init_state(len(sounds))).transcripts()

    def read_on(
        self, memory: torch.Tensor, lengths: torch.Tensor, state: TransducerState
    ) -> TransducerState:
        """Frames [B, T, D] from the start of a chunk on, ``lengths`` [B] of them valid."""
        size = self.settings.chunk or max(1, memory.shape[1])
        for start in range(0, memory.shape[1], size):
            part = memory[:, start : start + size]
            state = self.search.step(part, (lengths - start).clamp(0, part.shape[1]), state)
        return state

    def run(self, given: str) -> Answer:
        """Write what the sound file of that name asks for."""
        wave, changed = fit(read(given), RATE, name=given)
        found = self.answer([wave.samples[0]])[0]
        hop_s = self.settings.factor * HOP / RATE
        record = {"duration_s": wave.duration_s, "changed": changed, "logprob": found.logprob}
        record["written_at_s"] = [round(frame * hop_s, 2) for frame in found.frames]
        return Answer(self.letters.decode(found.tokens), record)


@dataclass(frozen=True)
class Heard:
    """A stream: samples [B, N] so far, frames behind the encoder that were read, and the texts."""

    samples: torch.Tensor
    read: int
    search: TransducerState


class Listener:
    """A trained TAED at work on sound as it arrives; plays :class:`~isthmus.roles.Streaming`.

    What comes out of packets [B, N] are the tokens written at each frame, int64 [B, S, n], S being
    the most a frame may have and 0 standing where there is none. ``state.search`` has the texts.

    Args:
        system: The system, with chunks.
    """

    def __init__(self, system: Taed) -> None:
        self.system, s = system, system.settings
        self.lookahead = s.factor * HOP * (s.chunk - 1) + WINDOW
        """Samples from the first frame of a chunk to the end of what the chunk is made of."""

    def init_state(self, batch: int) -> Heard:
        """The state before the first packet."""
        return Heard(torch.zeros(batch, 0), 0, self.system.search.init_state(batch))

    def step(self, chunk: torch.Tensor, state: Heard) -> tuple[torch.Tensor, Heard]:
        """Take in a packet; frames of complete chunks come out."""
        s, state = (
            self.system.settings,
            replace(state, samples=torch.cat([state.samples, chunk], 1)),
        )
        complete = (state.samples.shape[1] - WINDOW) // HOP + 1  # features no later sample changes
        frames = (complete - 1) // s.factor + 1 if complete > 0 else 0
        return self._until(frames // s.chunk * s.chunk, state)

    def flush(self, state: Heard) -> torch.Tensor:
        """The frames of the last chunk."""
        length = torch.tensor(state.samples.shape[1] // HOP + 1)
        last = int(self.system.module.encoder.subsampling.lengths(length))  # type: ignore[operator]
        return self._until(last if state.samples.shape[1] else 0, state)[0]

    @torch.no_grad()
    def _until(self, end: int, state: Heard) -> tuple[torch.Tensor, Heard]:
        system, rows = self.system, len(state.samples)
        out = torch.zeros(rows, system.search.max_symbols, max(0, end - state.read)).long()
        if end <= state.read:
            return out, state
        features, frames = features_of(system.mel, list(state.samples))
        memory = system.module.encoder(features, frames)[0][:, state.read : end]
        before = [len(text) for text in state.search.tokens]
        search = system.read_on(memory, torch.full((rows,), end - state.read), state.search)
        for row, start in enumerate(before):
            slot, last = 0, -1
            for token, frame in zip(
                search.tokens[row][start:], search.frames[row][start:], strict=True
            ):
                slot, last = (slot + 1 if frame == last else 0), frame
                out[row, slot, frame - state.read] = token
        return out, Heard(state.samples, end, search)


WINDOW = 200
"""Samples of a window on either side of the middle of a frame of features."""


def judged(
    system: Taed, records: Sequence[Translated], *, digits: bool = False
) -> dict[str, float]:
    """Characters wrong, and texts that are right; of digits only where asked."""
    said, meant = [], []
    order = sorted(records, key=lambda r: r.sound.duration_s)
    for start in range(0, len(order), 50):
        part = order[start : start + 50]
        found = system.answer([r.sound.at(RATE) for r in part])
        said += [system.letters.decode(t.tokens) for t in found]
        meant += [r.translation for r in part]
    exact = sum(a == b for a, b in zip(said, meant, strict=True)) / len(meant)
    if digits:
        said, meant = ([text.replace("-", "") for text in texts] for texts in (said, meant))
    return {"error": character_error_rate(meant, said).rate, "exact": exact}
