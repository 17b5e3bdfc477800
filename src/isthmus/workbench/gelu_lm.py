"""A small language model whose feed-forwards are not gated, trained in a minute on first use.

An OPT of transformers with another activation: what methods for hidden units after a GELU are
measured on.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM

from isthmus.workbench import pycode
from isthmus.workbench._training import Recipe, batches, nats
from isthmus.workbench.courses import made
from isthmus.workbench.tokenizer import end_id, train_tokenizer

RECIPES = {
    "small": Recipe(
        name="gelu-lm",
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        head_dim=32,
        intermediate_size=512,
        vocab_size=1024,
        batch_size=8,
        sequence_length=128,
        steps=300,
        warmup_steps=10,
        decay_share=0.5,
    ),
    "test": Recipe(
        name="gelu-lm",
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        head_dim=16,
        intermediate_size=64,
        vocab_size=384,
        batch_size=2,
        sequence_length=32,
        steps=20,
        warmup_steps=2,
    ),
}
"""By scale."""

EVERY = {"small": 4, "test": 60}
"""Only every so many documents are read: more than such short trainings get through."""


class GeluCourse:
    """Packed text and an OPT with a GELU.

    Args:
        recipe: Sizes and steps.
        every: See :data:`EVERY`.
    """

    def __init__(self, recipe: Recipe, every: int) -> None:
        self.recipe, self.every = recipe, every
        self.tokenizer, self.documents = _texts(recipe.vocab_size, every)
        self.end = end_id(self.tokenizer)

    def build(self) -> Any:
        """The model with fresh weights."""
        r = self.recipe
        config = OPTConfig(
            vocab_size=r.vocab_size,
            hidden_size=r.hidden_size,
            word_embed_proj_dim=r.hidden_size,
            ffn_dim=r.intermediate_size,
            num_hidden_layers=r.num_hidden_layers,
            num_attention_heads=r.num_attention_heads,
            max_position_embeddings=r.max_position_embeddings,
            activation_function="gelu",
            dropout=0.0,
            layerdrop=0.0,
            bos_token_id=self.end,
            eos_token_id=self.end,
            pad_token_id=self.end,
            dtype="float32",
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(r.seed)
            return OPTForCausalLM(config)

    def batches(self, start: int) -> Iterator[Tensor]:
        """Token ids [B, T + 1]."""
        return batches(self.documents, self.recipe, self.end, start)

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        """Mean loss of next-token prediction."""
        return nats(model, batch)


@functools.lru_cache(maxsize=2)
def _texts(vocab_size: int, every: int) -> tuple[Any, list[NDArray[np.int32]]]:
    texts = pycode.texts("train")[::every]
    tokenizer = train_tokenizer(texts, vocab_size)
    found = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return tokenizer, [np.array(each.ids, dtype=np.int32) for each in found]


def gelu_lm(scale: str = "small") -> Path:
    """Folder of the model and its tokenizer, trained now if it was not before."""
    recipe, every = RECIPES[scale], EVERY[scale]
    course = GeluCourse(recipe, every)
    corpus = f"{pycode.digest()}/{every}"
    return made(recipe, course, course.tokenizer, corpus=corpus, end=course.end)
