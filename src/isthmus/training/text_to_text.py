"""Base of the systems that turn a text into a text: their files are transformers' own.

A trained folder is a checkpoint of transformers with its tokenizer, beside ``isthmus.json``: it
loads there, and decodes here through the engine (``isthmus generate --model FOLDER``).
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, Self

from isthmus.decoding.fast import best_target
from isthmus.decoding.model import Model
from isthmus.models.encoder_decoder import EncoderDecoder
from isthmus.models.hub import load_checkpoint, no_progress_bars
from isthmus.training.system import Answer, TrainedSystem


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
