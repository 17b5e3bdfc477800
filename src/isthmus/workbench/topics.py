"""Texts whose topic a few planted words decide, and a small BERT that names it.

Three words of the topic stand among fillers, two of a rival and one of another; the most decide. So
it is known which words speak for the topic, and which against it::

    <cls> the harbour was near barn and tide , cloud then sail saw ... orchard   ->  sea
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from isthmus.models.hub import load_classifier
from isthmus.workbench._training import Recipe
from isthmus.workbench.courses import made
from isthmus.workbench.tokenizer import word_tokenizer

TOPICS = {
    "sea": "boat wave harbour sail tide anchor reef gull",
    "farm": "barn plough wheat orchard tractor meadow hen fence",
    "music": "violin chord drum melody choir tempo flute encore",
    "sky": "cloud comet orbit moon rocket thunder star eclipse",
}
"""Words of each topic."""

FILLERS = (
    "the a of and then was near old very some came went saw that this under over with every last "
    "first long grey small they she he we it one two three day night house street man woman child"
)
PAD, CLS, MASK = "<pad>", "<cls>", "<mask>"
LENGTH = 24
"""Words of a text that is judged."""

WORDS = (
    PAD,
    CLS,
    MASK,
    *FILLERS.split(),
    *(word for words in TOPICS.values() for word in words.split()),
)
NUMBER = {word: i for i, word in enumerate(WORDS)}

RECIPE = Recipe(
    "topics",
    hidden_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    head_dim=32,
    intermediate_size=256,
    steps=400,
    batch_size=48,
    sequence_length=LENGTH + 1,
    vocab_size=len(WORDS),
    max_position_embeddings=64,
    adam_lr=1e-3,
    warmup_steps=60,
    decay_share=0.5,
)
"""A BERT of half a million parameters."""


@dataclass(frozen=True)
class Texts:
    """Texts of one length.

    Attributes:
        ids: The class token, then words; int64 [B, T].
        topic: Their topic, int64 [B].
        planted: The words that speak for it, bool [B, T].
    """

    ids: Tensor
    topic: Tensor
    planted: Tensor


def texts(count: int, seed: str = "held-out", length: int = LENGTH) -> Texts:
    """Texts with three words for the topic, two for a rival and one for another.

    Args:
        count: How many, B.
        seed: Other seeds give other texts.
        length: Words of each.
    """
    rows = [_text(random.Random(f"topics/{seed}/{i}"), (3, 2, 1), length) for i in range(count)]
    ids, topics, planted = zip(*rows, strict=True)
    return Texts(torch.tensor(ids), torch.tensor(topics), torch.tensor(planted))


def _text(
    rng: random.Random, counts: tuple[int, int, int], length: int, masked: float = 0.0
) -> tuple[list[int], int, list[bool]]:
    """Ids, topic and what speaks for it; the topic is -100 where masks have left a tie."""
    order = rng.sample(range(len(TOPICS)), 3)
    words = [w.split() for w in TOPICS.values()]
    said, plain = [], [0] * len(TOPICS)
    for topic, count in zip(order, counts, strict=True):
        for word in rng.choices(words[topic], k=count):
            hidden = rng.random() < masked
            said.append(MASK if hidden else word)
            plain[topic] += not hidden
    fillers = rng.choices(FILLERS.split(), k=length - len(said))
    said += [MASK if rng.random() < masked else word for word in fillers]
    rng.shuffle(said)
    most = max(range(len(plain)), key=plain.__getitem__)
    tie = sorted(plain)[-1] == sorted(plain)[-2]
    planted = [word in words[most] for word in said]
    return [NUMBER[w] for w in (CLS, *said)], -100 if tie else most, [False, *planted]


class TopicCourse:
    """Texts with fewer and more words of each kind, some of them masked.

    Args:
        recipe: Sizes and seed.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def build(self) -> Any:
        """A BERT with fresh weights."""
        recipe = self.recipe
        config = BertConfig(
            vocab_size=recipe.vocab_size,
            hidden_size=recipe.hidden_size,
            num_hidden_layers=recipe.num_hidden_layers,
            num_attention_heads=recipe.num_attention_heads,
            intermediate_size=recipe.intermediate_size,
            max_position_embeddings=recipe.max_position_embeddings,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            pad_token_id=0,
            id2label=dict(enumerate(TOPICS)),
            label2id={name: i for i, name in enumerate(TOPICS)},
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            return BertForSequenceClassification(config)

    def batches(self, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Ids [B, T] and topics [B] of each step."""
        for step in itertools.count(start):
            rng = random.Random(f"topics/train/{self.recipe.seed}/{step}")
            length = rng.randint(LENGTH - 6, LENGTH)
            rows = []
            for _ in range(self.recipe.batch_size):
                more = rng.randint(1, 3)
                counts = (more, rng.randint(max(0, more - 2), more - 1), rng.randint(0, more - 1))
                rows.append(_text(rng, counts, length, 0.1))
            yield torch.tensor([r[0] for r in rows]), torch.tensor([r[1] for r in rows])

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Mean cross-entropy of the topics."""
        return F.cross_entropy(model(input_ids=batch[0]).logits, batch[1])


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, after the class token.

    Example:
        >>> tokenizer()("boat near drum").input_ids == [NUMBER[w] for w in
        ...     (CLS, "boat", "near", "drum")]
        True
    """
    made_ = word_tokenizer(WORDS)
    made_.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{CLS} $A", special_tokens=[(CLS, NUMBER[CLS])]
    )
    made_.add_special_tokens({"cls_token": CLS, "mask_token": MASK})
    return made_


@functools.lru_cache(maxsize=2)
def topic_model(recipe: Recipe = RECIPE) -> Any:
    """The BERT that names topics, trained in a minute or two on first use."""
    return load_classifier(topic_folder(recipe)).model


def topic_folder(recipe: Recipe = RECIPE) -> str:
    """Where it is kept, with its tokenizer."""
    drawn = texts(16)
    state = hashlib.sha256(repr((WORDS, drawn.ids.tolist(), drawn.topic.tolist())).encode())
    return str(made(recipe, TopicCourse(recipe), tokenizer(), corpus=state.hexdigest()))


def tiny() -> Recipe:
    """The same in seconds, for tests: it has learnt next to nothing."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return replace(RECIPE, name="topics-t", steps=3, batch_size=4, intermediate_size=32, **sizes)
