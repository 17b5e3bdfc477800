"""Base of the systems that turn a text into a text: their files are transformers' own.

A trained folder is a checkpoint of transformers with its tokenizer, beside ``isthmus.json``: it
loads there, and decodes here through the engine (``isthmus generate --model FOLDER``).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import torch

from isthmus.decoding.fast import best_target
from isthmus.decoding.model import Model
from isthmus.models.encoder_decoder import Config, EncoderDecoder
from isthmus.models.hub import load_checkpoint, no_progress_bars
from isthmus.objectives.alignment import links
from isthmus.signals.tokenizer import learn_tokenizer
from isthmus.training.data import Data, Pair
from isthmus.training.guided_alignment import GuidedLearner, aligned
from isthmus.training.loop import Plan
from isthmus.training.system import Answer, TrainedSystem
from isthmus.training.text import PairLearner, tokenize


class TextToText(TrainedSystem):
    """An encoder-decoder and its tokenizer.

    Args:
        settings: The system's settings.
        module: The network.
        tokenizer: Of both sides.
    """

    module: EncoderDecoder

    def __init__(self, settings: Any, module: EncoderDecoder, tokenizer: Any) -> None:
        super().__init__(settings)
        self.module, self.tokenizer = module, tokenizer

    @functools.cached_property
    def model(self) -> Model:
        """The trained network behind the engine: any drafter, strategy and constraint."""
        return Model(best_target(self.module.to_hf()), self.tokenizer)

    def run(self, given: str) -> Answer:
        """Greedy answer to one text."""
        found = self.model.generate(given, max_new_tokens=256)
        return Answer(found.text, {"tokens": len(found.tokens)})

    def write_files(self, folder: Path) -> None:
        """Write a checkpoint of transformers and the tokenizer."""
        with no_progress_bars():
            self.module.to_hf().save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    @classmethod
    def read_files(cls, settings: Any, folder: Path) -> Self:
        """Read them."""
        checkpoint = load_checkpoint(str(folder), dtype="float32", device="cpu")
        return cls(settings, EncoderDecoder.from_hf(checkpoint.model), checkpoint.tokenizer)


class Translator(TextToText):
    """A transformer of Marian's kind, trained on pairs in batches of like lengths.

    The settings have the fields that :func:`translation_config` reads, and ``vocab_size``,
    ``label_smoothing`` and ``batch_tokens``; with ``guided_alignment``, where they have it and it
    is not 0, a head learns to align with that weight.
    """

    reads = "pairs"

    @classmethod
    def network(cls, settings: Any, vocab_size: int) -> EncoderDecoder:
        """Random weights."""
        return EncoderDecoder(translation_config(settings, vocab_size))

    @classmethod
    def untrained(cls, settings: Any, data: Data[Pair]) -> Self:
        """A tokenizer learnt from both sides of the data, and random weights."""
        texts = (text for pair in data.train for text in pair)
        tokenizer = learn_tokenizer(texts, settings.vocab_size)
        return cls(settings, cls.network(settings, len(tokenizer)), tokenizer)

    def learner(self, data: Data[Pair], plan: Plan) -> PairLearner:
        """Cross-entropy of targets, and of alignments where a head is guided."""
        s = self.settings
        guided = getattr(s, "guided_alignment", 0.0)
        kind: Any = functools.partial(GuidedLearner, weight=guided) if guided else PairLearner
        made: PairLearner = kind(
            self.module,
            self.tokenizer,
            data,
            {"system": self.name, "settings": asdict(s)},
            tokens=s.batch_tokens,
            label_smoothing=s.label_smoothing,
            seed=plan.seed,
        )
        return made

    def run(self, given: str) -> Answer:
        """Greedy answer to one text, and which tokens it comes from where a head is guided."""
        found = self.model.generate(given, max_new_tokens=256)
        answer = Answer(found.text, {"tokens": len(found.tokens)})
        if getattr(self.settings, "guided_alignment", 0.0) and found.tokens:
            source, target = tokenize(self.tokenizer, [given])[0], torch.tensor(found.tokens)
            names = self.tokenizer.convert_ids_to_tokens
            answer.record["source_tokens"] = names(source.tolist())
            answer.record["target_tokens"] = names(target.tolist())
            weights = aligned(self.module, source[None], target[None])[0]
            answer.record["alignment"] = links(weights)
        return answer


def exact_answers(model: Model, asked: Sequence[Pair], other: Model | None = None) -> float:
    """Answers in percent that are right to the letter, of at most 16 tokens.

    Args:
        model: What answers, greedily.
        asked: Questions and their answers.
        other: A model that answers together with it.
    """
    found = [
        answer.text
        for start in range(0, len(asked), 50)
        for answer in model.generate(
            [p.source for p in asked[start : start + 50]],
            max_new_tokens=16,
            drafter="none",
            fuse=other,
        )
    ]
    right: int = sum(f == p.target for f, p in zip(found, asked, strict=True))
    return 100 * right / len(asked)


def translation_config(settings: Any, vocab_size: int) -> Config:
    """The network of some settings: Marian's row, with ``hidden_size`` and what else it takes."""
    s = settings
    return Config.marian(
        vocab_size,
        hidden_size=s.hidden_size,
        encoder_layers=s.encoder_layers,
        decoder_layers=s.decoder_layers,
        num_attention_heads=s.num_attention_heads,
        head_dim=s.hidden_size // s.num_attention_heads,
        intermediate_size=s.intermediate_size,
        dropout=s.dropout,
        max_length=s.max_length,
    )
