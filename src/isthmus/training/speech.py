"""What recognisers learn from: spoken records as batches of features and characters."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from isthmus.errors import InvalidInputError
from isthmus.metrics.speech import word_error_rate
from isthmus.models.speech_to_text import SpeechToText
from isthmus.nn.spec_augment import SpecAugment
from isthmus.signals.features import RATE, LogMel
from isthmus.training.buckets import Buckets2D, BucketSampler, KeptBytes, Profile, batch_sizes
from isthmus.training.data import Spoken, Translated
from isthmus.training.seeds import batch_generator

HOP = 160
"""Samples of a frame of the features."""


@dataclass(frozen=True)
class Characters:
    """A vocabulary of characters; token 0 is the blank of CTC.

    Attributes:
        characters: In order; the first is token 1.

    Example:
        >>> letters = Characters.of(["see", "sea"])
        >>> letters.encode("sea").tolist(), letters.decode([2, 1])
        ([3, 2, 1], 'ea')
    """

    characters: str

    @classmethod
    def of(cls, texts: Iterable[str]) -> Characters:
        """All characters of some texts."""
        return cls("".join(sorted(set("".join(texts)))))

    def __len__(self) -> int:
        """Tokens, the blank included."""
        return len(self.characters) + 1

    def encode(self, text: str) -> torch.Tensor:
        """Tokens int64 [U].

        Raises:
            InvalidInputError: A character was not in the training data.
        """
        missing = sorted(set(text) - set(self.characters))
        if missing:
            raise InvalidInputError(
                f"{text!r} has {missing[0]!r}, which the training data does not have; leave it out"
            )
        return torch.tensor([self.characters.index(c) + 1 for c in text], dtype=torch.int64)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of some tokens."""
        return "".join(self.characters[token - 1] for token in tokens)


@dataclass(frozen=True)
class Words:
    """A closed vocabulary of words; token 0 is the blank of CTC.

    Attributes:
        words: In order; the first is token 1.

    Example:
        >>> words = Words.of(["a cat", "a dog"])
        >>> words.encode("dog cat").tolist(), words.decode([1, 3])
        ([3, 2], 'a dog')
    """

    words: tuple[str, ...]

    @classmethod
    def of(cls, texts: Iterable[str]) -> Words:
        """All words of some texts."""
        return cls(tuple(sorted({word for text in texts for word in text.split()})))

    def __len__(self) -> int:
        """Tokens, the blank included."""
        return len(self.words) + 1

    def encode(self, text: str) -> torch.Tensor:
        """Tokens int64 [U].

        Raises:
            InvalidInputError: A word was not in the training data.
        """
        number = {word: index for index, word in enumerate(self.words, 1)}
        missing = [word for word in text.split() if word not in number]
        if missing:
            raise InvalidInputError(
                f"{text!r} has {missing[0]!r}, which the training data does not have; leave it out"
            )
        return torch.tensor([number[word] for word in text.split()], dtype=torch.int64)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of some tokens."""
        return " ".join(self.words[token - 1] for token in tokens)


def spelled(text: str) -> str:
    """The characters of a text as :class:`Words`, so that marks such as ``<de>`` stay whole.

    Example:
        >>> spelled("a cat"), unspelled("<en> a _ c a t".split())
        ('a _ c a t', 'a cat')
    """
    return " ".join(text.replace(" ", "_"))


def unspelled(words: Sequence[str]) -> str:
    """The text that was spelled, without marks."""
    return "".join(word for word in words if word[0] != "<").replace("_", " ")


def heard(text: str) -> str:
    """The words of a text, without what cannot be heard.

    Example:
        >>> heard("Forty two, nine.")
        'forty two nine'
    """
    return " ".join(re.findall(r"\w+", text.lower()))


def ctc_units(texts: Iterable[str], spell: bool) -> list[str]:
    """What CTC has to hear of texts, as words: their words, or their characters.

    Example:
        >>> ctc_units(["Ten, two"], False), ctc_units(["Ten, two"], True)
        (['ten two'], ['t e n _ t w o'])
    """
    return [spelled(heard(text)) if spell else heard(text) for text in texts]


def timed(text: str, frames: Sequence[int]) -> list[tuple[str, int]]:
    """Words, and the frame at which each begins, of a text and the frames of its characters.

    Example:
        >>> timed("at six", [3, 4, 6, 7, 8, 8])
        [('at', 3), ('six', 7)]
    """
    return [(word.group(), frames[word.start()]) for word in re.finditer(r"\S+", text)]


class SpokenBatch(NamedTuple):
    """Spoken records, padded.

    Attributes:
        features: [B, M, F].
        frames: Valid frames [B].
        targets: int64 [B, U].
        target_lengths: [B].
        rows: Number of each record.
    """

    features: torch.Tensor
    frames: torch.Tensor
    targets: torch.Tensor
    target_lengths: torch.Tensor
    rows: tuple[int, ...]


class LimitedBatch(NamedTuple):
    """Spoken records, and the look-ahead with which they are heard."""

    spoken: SpokenBatch
    right: int


def features_of(mel: LogMel, sounds: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [B, M, F] and valid frames [B] of sounds [N] at 16 kHz."""
    lengths = torch.tensor([len(sound) for sound in sounds])
    return mel(pad_sequence(list(sounds), True), lengths)


class SpokenBatches:
    """Batches of records of like lengths, epoch after epoch.

    Args:
        records: Sounds and texts.
        letters: Their vocabulary.
        mel: Makes the features.
        size: Records of a batch.
        seed: Seed of the order and of SpecAugment.
        augment: Masks the features of training batches.
        alter: Changes the sounds [N] of training batches before, with a generator of its draws.
        parts: Buckets by duration.
        sampler: Chooses the records of every batch instead.

    Attributes:
        profile: What the batches of an epoch are made of.
    """

    def __init__(
        self,
        records: Sequence[Spoken | Translated],
        letters: Characters | Words,
        mel: LogMel,
        size: int,
        *,
        seed: int = 0,
        augment: SpecAugment | None = None,
        alter: Callable[[torch.Tensor, torch.Generator], torch.Tensor] | None = None,
        parts: int = 6,
        sampler: BucketSampler | None = None,
    ) -> None:
        self.records, self.letters, self.mel = list(records), letters, mel
        self.augment, self.alter, self.seed, self.size = augment, alter, seed, size
        self.targets = [letters.encode(record.text) for record in self.records]
        seconds = np.array([record.sound.duration_s for record in self.records])
        lengths = [len(t) for t in self.targets]
        if sampler is None:
            buckets = Buckets2D.estimate(seconds, lengths, parts, 1)
            bucket = buckets.assign(seconds, lengths, strict=False)
            sampler = BucketSampler(bucket, [size] * len(buckets.bounds), seed)
        self.sampler = sampler
        self.profile = Profile.of(seconds, lengths, sampler.epoch())
        self.order = np.argsort(seconds, kind="stable")

    def batch(self, part: int) -> SpokenBatch:
        """The batch of that number, its sounds altered and its features masked."""
        draw = torch.Generator().manual_seed(zlib.crc32(f"sounds/{self.seed}/{part}".encode()))
        found = self.of(self.sampler.rows(part).tolist(), draw)
        if self.augment is None:
            return found
        # torch keeps the lower 32 bits of a seed only
        generator = batch_generator(self.seed, part)
        features = self.augment(found.features, found.frames, generator)
        return found._replace(features=features)

    def once(self) -> Iterable[SpokenBatch]:
        """Every record once, short ones first, as they are."""
        for start in range(0, len(self.order), self.size):
            yield self.of(self.order[start : start + self.size].tolist())

    def of(self, rows: Sequence[int], draw: torch.Generator | None = None) -> SpokenBatch:
        """A batch of these records, their sounds altered by these draws, if any."""
        sounds = [self.records[r].sound.at(RATE) for r in rows]
        if self.alter is not None and draw is not None:
            sounds = [self.alter(sound, draw) for sound in sounds]
        features, frames = features_of(self.mel, sounds)
        targets = [self.targets[r] for r in rows]
        lengths = torch.tensor([len(t) for t in targets])
        return SpokenBatch(features, frames, pad_sequence(targets, True), lengths, tuple(rows))


def words_wrong(
    transcribe: Callable[[list[torch.Tensor]], Sequence[str]], records: Sequence[Spoken]
) -> float:
    """Word error rate of a recogniser, on what can be heard.

    Args:
        transcribe: Texts of sounds [N] at 16 kHz.
        records: Sounds and their texts; 32 of like lengths at a time.
    """
    order = sorted(records, key=lambda r: r.sound.duration_s)
    said: list[str] = []
    for start in range(0, len(order), 32):
        said += transcribe([r.sound.at(RATE) for r in order[start : start + 32]])
    return word_error_rate([heard(r.text) for r in order], [heard(text) for text in said]).rate


def rows_by_memory(
    network: Callable[[], SpeechToText], bounds: Sequence[tuple[float, float]], rows: int, mels: int
) -> tuple[list[int], float]:
    """Rows of the batches of every bucket, as many as fit into what some of the longest take.

    Sizes are counted on the meta device: nothing is computed, and they are the same on every
    machine.

    Args:
        network: Makes what is trained.
        bounds: Longest sound in seconds and most tokens of every bucket.
        rows: How many records of the greatest lengths fill the memory.
        mels: Bands of the features.

    Returns:
        Rows of every bucket, and the share of the memory that the largest batch leaves.
    """
    with torch.device("meta"):
        made = network().train()  # dropout keeps something, too

        def step(seconds: float, tokens: float, count: int) -> torch.Tensor:
            frames = int(seconds * RATE) // HOP + 1
            target = torch.zeros(count, int(tokens), dtype=torch.int64)
            logits, log_probs, _ = made(
                torch.zeros(count, mels, frames), torch.full((count,), frames), target
            )
            text = F.cross_entropy(logits.flatten(0, 1), target.flatten())
            total: torch.Tensor = text + log_probs.sum()
            return total

        kept = KeptBytes(step)
        limit = kept(max(i for i, _ in bounds), max(o for _, o in bounds), rows)
        sizes = batch_sizes(bounds, lambda *of: kept(*of) <= limit, rows)
        most = max(kept(*bound, size) for bound, size in zip(bounds, sizes, strict=True))
    return sizes, 1 - most / limit
