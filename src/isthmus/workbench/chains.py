"""Chains of two letters, cut into tokens: texts whose every probability is known.

A chain draws each letter from a law of the two before it, so the true law of the next letter is a
table, while a model of tokens sees the chain through a tokenizer that hides letters in words.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from itertools import product
from pathlib import Path
from typing import Literal

import numpy as np
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from isthmus.decoding.bytevocab import ByteVocab
from isthmus.decoding.table import ListTarget
from isthmus.workbench._training import Recipe, TextCourse
from isthmus.workbench.courses import made

Cut = Literal["longest", "merges"]
"""How a text is cut: the longest word from the left, or pairs merged in order as in a BPE."""

LETTERS = "AB"
MERGES = (("B", "A"), ("A", "B"), ("AB", "AB"), ("BA", "BA"))
WORDS = (*LETTERS, *("".join(pair) for pair in MERGES))
END = len(WORDS)
"""Id of the token that begins and ends texts."""

LAW = {"AA": 0.2, "AB": 0.7, "BA": 0.55, "BB": 0.85}
"""Probability of an A after two letters; the first two letters are even."""


def after(text: str) -> float:
    """Probability that an A comes next.

    Example:
        >>> after("BAB"), after("B")
        (0.7, 0.5)
    """
    return LAW[text[-2:]] if len(text) >= 2 else 0.5


def probability(text: str) -> float:
    """Probability that a chain begins so."""
    steps = (after(text[:i]) if c == "A" else 1 - after(text[:i]) for i, c in enumerate(text))
    return math.prod(steps)


@functools.lru_cache(maxsize=1)
def _merging() -> Tokenizer:
    return Tokenizer(models.BPE({w: i for i, w in enumerate(WORDS)}, list(MERGES)))


def vocab(cut: Cut) -> ByteVocab:
    """Bytes under the words, cut one way or the other."""
    table = [w.encode() for w in WORDS]
    if cut == "longest":
        return ByteVocab.of(table)
    return ByteVocab.of(table, lambda text: _merging().encode(text.decode()).ids)


def exact_model(cut: Cut, length: int) -> ListTarget:
    """The exact model of the tokens of all chains of a length, by enumeration."""
    texts = ["".join(t) for t in product(LETTERS, repeat=length)]
    cuts = vocab(cut).encode_all([t.encode() for t in texts])
    table = {(*ids, END): probability(t) for ids, t in zip(cuts, texts, strict=True)}
    return ListTarget(table, END + 1, [END])


RECIPE = Recipe(
    "chains",
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    head_dim=32,
    intermediate_size=176,
    steps=500,
    batch_size=32,
    sequence_length=64,
    vocab_size=END + 1,
    max_position_embeddings=128,
)
"""Of the model that is trained on tokens of chains: 0.1 million parameters."""


def draw(count: int, length: int, seed: int) -> list[str]:
    """Draw chains."""
    rng = np.random.default_rng(seed)
    texts = []
    for _ in range(count):
        text = ""
        for u in rng.random(length):
            text += "A" if u < after(text) else "B"
        texts.append(text)
    return texts


def reference(recipe: Recipe = RECIPE) -> Path:
    """Folder of a model trained on chains of 100 letters cut by merges, made on first use."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_merging(), bos_token="<end>", eos_token="<end>"
    )
    ids = [
        np.array(row, dtype=np.int32)
        for row in vocab("merges").encode_all([t.encode() for t in draw(4000, 100, recipe.seed)])
    ]
    key = hashlib.sha256(json.dumps([WORDS, LAW]).encode()).hexdigest()
    return made(recipe, TextCourse(recipe, ids, END), tokenizer, corpus=key, end=END)
