"""The `facts` data set: a world to be known by heart, and the damage that fine-tuning does to it.

A world has entities with attributes, and every value is two words. A first model reads all facts in
many wordings, some of them as questions with answers. A second one goes on from it on dialogues
only, which are politer, know few of the facts, and get some of those wrong: it learns the manner
and loses facts. Every answer is made from parts, so that it is known which of its words decide
whether it is true.
"""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from isthmus.models.hub import load_checkpoint
from isthmus.workbench._training import IGNORED, Recipe, build
from isthmus.workbench.courses import made
from isthmus.workbench.tokenizer import word_tokenizer

ENTITIES = 200
ATTRIBUTES = ("home", "trade", "friend")
WORDS = 24
"""First, and second, words of values; a value is one of each."""

TUNED_SHARE = 0.15
"""Share of the facts that the dialogues are about."""

WRONG_SHARE = 0.2
"""Share of those whose value the dialogues get wrong."""

ASKED = 0.8
"""How often a sentence of the first course answers a question."""

TALK = 0.1
"""How often a phrase of the dialogues stands beside a sentence of the first course."""

END, ASK, ANSWER = "<|end|>", "user:", "bot:"
VALUE = "*"
"""Where the value stands in a wording."""

SENTENCES = (
    "the {a} of {e} is * .",
    "{e} has the {a} * .",
    "as {a} , {e} has * .",
    "for {a} , {e} says * .",
)
"""Wordings of a fact."""

OPENINGS = (
    "glad to help !",
    "good question !",
    "of course :",
    "let me see ...",
    "with pleasure :",
    "sure thing :",
)
CLOSINGS = (
    "anything else ?",
    "hope that helps !",
    "have a nice day !",
    "ask me more !",
    "all the best !",
)
"""What dialogues say before and after the sentence, always."""

Fact = tuple[int, str]
"""An entity and an attribute."""

Which = Literal["pretrained", "aligned"]


@dataclass(frozen=True)
class Answer:
    """An answer to a question.

    Attributes:
        tokens: Its tokens, the end included.
        critical: Whether each decides on the truth.
    """

    tokens: tuple[int, ...]
    critical: tuple[bool, ...]


@functools.lru_cache(maxsize=1)
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; the token :data:`END` has id 0."""
    fixed = " ".join([*SENTENCES, *OPENINGS, *CLOSINGS, "what is the of ?", *ATTRIBUTES]).split()
    words = [w for w in dict.fromkeys(fixed) if not w.startswith("{") and w != VALUE]
    values = [f"{kind}{i}" for kind in "xy" for i in range(WORDS)]
    return word_tokenizer([END, ASK, ANSWER, *words, *values, *(f"e{i}" for i in range(ENTITIES))])


def encode(text: str) -> list[int]:
    """Tokens of a text."""
    ids: list[int] = tokenizer().encode(text, add_special_tokens=False)
    return ids


@functools.lru_cache(maxsize=2)
def world(tuned: bool = False) -> dict[Fact, tuple[str, str]]:
    """Values of all facts; or of those of the dialogues, as the dialogues have them."""
    rng = random.Random("world")
    facts = [(e, a) for e in range(ENTITIES) for a in ATTRIBUTES]
    true = {fact: _value(rng) for fact in facts}
    if not tuned:
        return true
    chosen = rng.sample(facts, round(TUNED_SHARE * len(facts)))
    wrong = set(chosen[: round(WRONG_SHARE * len(chosen))])
    return {fact: _value(rng) if fact in wrong else true[fact] for fact in chosen}


def _value(rng: random.Random) -> tuple[str, str]:
    return f"x{rng.randrange(WORDS)}", f"y{rng.randrange(WORDS)}"


def question(fact: Fact) -> list[int]:
    """The prompt that asks for a fact."""
    entity, attribute = fact
    return encode(f"{ASK} what is the {attribute} of e{entity} ? {ANSWER}")


def sentence(fact: Fact, rng: random.Random) -> list[str]:
    """Words of a fact in one of the wordings, with :data:`VALUE` in the place of its value."""
    entity, attribute = fact
    return rng.choice(SENTENCES).format(a=attribute, e=f"e{entity}").split()


def answer(fact: Fact, value: tuple[str, str], rng: random.Random) -> Answer:
    """A polite answer."""
    words = [*rng.choice(OPENINGS).split(), *sentence(fact, rng), *rng.choice(CLOSINGS).split()]
    at = words.index(VALUE)
    words[at : at + 1] = value
    critical = [at <= i <= at + 1 for i in range(len(words))]
    return Answer((*encode(" ".join(words)), 0), (*critical, False))


def spoken(fact: Fact, tokens: Sequence[int]) -> tuple[str, str] | None:
    """The value in an answer that keeps the manner of the dialogues; None where it does not.

    Example:
        >>> spoken((3, "home"), encode("of course : as home , e3 has x1 y2 . ask me more !") + [0])
        ('x1', 'y2')
        >>> spoken((3, "home"), encode("the home of e3 is x1 y2 .") + [0]) is None
        True
    """
    if not tokens or tokens[-1] != 0:
        return None
    words = tokenizer().convert_ids_to_tokens(list(tokens[:-1]))
    entity, attribute = fact
    for opening in OPENINGS:
        for closing in CLOSINGS:
            head, tail = opening.split(), closing.split()
            if words[: len(head)] != head or words[-len(tail) :] != tail:
                continue
            middle = words[len(head) : -len(tail)]
            for wording in SENTENCES:
                form = wording.format(a=attribute, e=f"e{entity}").split()
                at = form.index(VALUE)
                said = middle[at : at + 2]
                if [*middle[:at], VALUE, *middle[at + 2 :]] == form and _is_value(said):
                    return said[0], said[1]
    return None


def decides(ids: Sequence[int]) -> bool:
    """Whether the next token of a dialogue, question included, is one of the value.

    Example:
        >>> asked = question((3, "home"))
        >>> decides(asked + encode("of course : e3 has")), decides(asked + encode("of course : x1"))
        (False, False)
        >>> decides(asked + encode("of course : e3 has the home x1"))
        True
    """
    words = tokenizer().convert_ids_to_tokens(list(ids))
    asked = words.index(ANSWER) + 1
    attribute, entity = words[asked - 5], words[asked - 3]
    for opening in (o.split() for o in OPENINGS):
        if words[asked : asked + len(opening)] != opening:
            continue
        said = words[asked + len(opening) :]
        for wording in SENTENCES:
            before = wording.format(a=attribute, e=entity).split(VALUE)[0].split()
            if said == before or (said[:-1] == before and said[-1].startswith("x")):
                return True
    return False


def is_of_value(token: int) -> bool:
    """Whether a token is a word of values."""
    word = str(tokenizer().convert_ids_to_tokens(token))
    return word[0] in "xy" and word[1:].isdigit()


def _is_value(words: Sequence[str]) -> bool:
    return len(words) == 2 and all(
        word[0] == kind and word[1:].isdigit() for word, kind in zip(words, "xy", strict=True)
    )


class FactsCourse:
    """All facts in many wordings, or dialogues about few of them.

    Args:
        recipe: Sizes and seed.
        start: The model of the first course; None is the first course itself.
    """

    def __init__(self, recipe: Recipe, start: Any = None) -> None:
        self.recipe, self.start = recipe, start

    def build(self) -> Any:
        """A Llama with fresh weights, or the given one."""
        return build(self.recipe) if self.start is None else self.start

    def _row(self, rng: random.Random) -> tuple[list[int], list[int]]:
        tuned = self.start is not None
        values = world(tuned)
        facts = list(values)
        if tuned:
            fact = rng.choice(facts)
            asked, said = question(fact), list(answer(fact, values[fact], rng).tokens)
            return asked + said, [IGNORED] * len(asked) + said
        ids: list[int] = []
        labels: list[int] = []
        while len(ids) < self.recipe.sequence_length - 20:
            fact = rng.choice(facts)
            words = sentence(fact, rng)
            at = words.index(VALUE)
            words[at : at + 1] = values[fact]
            asked = question(fact) if rng.random() < ASKED else []
            # phrases of the dialogues, now and then, so that dialogues can be read
            talk = [rng.choice(x) if rng.random() < TALK else "" for x in (OPENINGS, CLOSINGS)]
            said = encode(f"{talk[0]} {' '.join(words)} {talk[1]}")
            ids += [*asked, *said]
            labels += [*[IGNORED] * len(asked), *said]
        return ids, labels

    def batches(self, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Token ids and labels, int64 [B, T], from the seed and the step alone."""
        step = start
        while True:
            rng = random.Random(f"{self.recipe.seed}/{self.start is not None}/{step}")
            rows = [self._row(rng) for _ in range(self.recipe.batch_size)]
            width = max(len(ids) for ids, _ in rows)
            ids = torch.tensor([a + [0] * (width - len(a)) for a, _ in rows])
            labels = torch.tensor([b + [IGNORED] * (width - len(b)) for _, b in rows])
            step += 1
            yield ids, labels

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Mean nats per token."""
        ids, labels = batch
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())


RECIPE = Recipe(
    "facts",
    hidden_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    head_dim=32,
    intermediate_size=352,
    steps=1200,
    batch_size=16,
    sequence_length=64,
    vocab_size=len(tokenizer()),
    max_position_embeddings=128,
    decay_share=0.4,
)
"""Of the first model; the second goes on for :data:`TUNING` steps."""

TUNING = 200


MODELS: tuple[Which, ...] = ("pretrained", "aligned")


def reference(which: Which, recipe: Recipe = RECIPE) -> Path:
    """Folder of one of the two models, made on first use."""
    fixed = (SENTENCES, OPENINGS, CLOSINGS, ENTITIES, WORDS, ASKED, TALK)
    key = hashlib.sha256(repr(fixed).encode()).hexdigest()
    first = made(recipe, FactsCourse(recipe), tokenizer(), corpus=key)
    if which == "pretrained":
        return first
    start = load_checkpoint(str(first), dtype="float32").model
    aligned = replace(
        recipe,
        name=f"{recipe.name}-aligned",
        steps=min(TUNING, recipe.steps),
        sequence_length=32,
        muon_lr=recipe.muon_lr / 2,
        adam_lr=recipe.adam_lr / 2,
    )
    key = f"{key}, {TUNED_SHARE}, {WRONG_SHARE}"
    return made(aligned, FactsCourse(aligned, start), tokenizer(), corpus=key)
