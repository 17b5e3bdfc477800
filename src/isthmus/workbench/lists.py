"""The `lists` data set: find the program from examples of what it does.

A program is a line of one to five operators on a list of numbers 0 to 15; a problem shows three
inputs with their outputs (the public tests) and keeps five more back (the hidden ones). Programs
have no loops, so running one is safe. A program is held out when a hash of its text says so.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from isthmus.workbench._training import IGNORED, Recipe, build
from isthmus.workbench.courses import made
from isthmus.workbench.pycode import Split
from isthmus.workbench.tokenizer import word_tokenizer

SIZE = 16
"""Numbers are 0 to 15; arithmetic is modulo 16."""

LONGEST = 5
"""Operators of a program at most."""

PUBLIC, HIDDEN = 3, 5
HELD_OUT_PERCENT = 10

OPERATORS: dict[str, Callable[[list[int]], list[int]]] = {
    "reverse": lambda x: x[::-1],
    "sort": sorted,
    "double": lambda x: [2 * v % SIZE for v in x],
    "next": lambda x: [(v + 1) % SIZE for v in x],
    "mirror": lambda x: [SIZE - 1 - v for v in x],
    "sums": lambda x: [s % SIZE for s in itertools.accumulate(x)],
    "square": lambda x: [v * v % SIZE for v in x],
    "tail": lambda x: x[1:],
    "head": lambda x: x[:3],
    "even": lambda x: [v for v in x if v % 2 == 0],
    "odd": lambda x: [v for v in x if v % 2],
    "unique": lambda x: list(dict.fromkeys(x)),
}
"""Operators by name; all are total."""

END, SHOW, GIVES, PROGRAM = "<|end|>", "show", "gives", "program"
WORDS = (END, SHOW, GIVES, PROGRAM, *map(str, range(SIZE)), *OPERATORS)


def run(program: list[str], values: list[int]) -> list[int]:
    """Apply operators from left to right.

    Example:
        >>> run(["sort", "tail", "double"], [9, 1, 4])
        [8, 2]
    """
    for name in program:
        values = OPERATORS[name](values)
    return values


@dataclass(frozen=True)
class Problem:
    """A program to be found.

    Attributes:
        program: One that solves it; others may, too.
        public: Inputs and outputs that the prompt shows.
        hidden: Inputs and outputs that judge the answer.
    """

    program: tuple[str, ...]
    public: tuple[tuple[list[int], list[int]], ...]
    hidden: tuple[tuple[list[int], list[int]], ...]

    @property
    def prompt(self) -> str:
        """The public tests, and the word that asks for the program."""
        tests = (f"{SHOW} {_join(x)} {GIVES} {_join(y)}" for x, y in self.public)
        return " ".join(" ".join(tests).split()) + f" {PROGRAM}"

    @property
    def answer(self) -> str:
        """The program as text."""
        return " ".join(self.program)


def _join(values: list[int]) -> str:
    return " ".join(map(str, values))


def passes(text: str, tests: tuple[tuple[list[int], list[int]], ...]) -> float:
    """Share of the tests that a program passes; 0 for a text that is none."""
    program = text.split()
    if not 1 <= len(program) <= LONGEST or any(name not in OPERATORS for name in program):
        return 0.0
    return sum(run(program, x) == y for x, y in tests) / len(tests)


def problem(split: Split, rng: random.Random) -> Problem:
    """Draw a problem of one part.

    Args:
        split: ``"train"`` or ``"held-out"``.
        rng: Source of draws.
    """
    while True:
        program = tuple(rng.choices(list(OPERATORS), k=rng.randint(1, LONGEST)))
        digest = hashlib.sha256(" ".join(program).encode()).digest()[0]
        if (digest * 100 // 256 < HELD_OUT_PERCENT) != (split == "held-out"):
            continue
        inputs = [rng.choices(range(SIZE), k=rng.randint(3, 6)) for _ in range(PUBLIC + HIDDEN)]
        tests = [(x, run(list(program), x)) for x in inputs]
        if sum(bool(y) for _, y in tests[:PUBLIC]) >= 2:  # something is to be seen
            return Problem(program, tuple(tests[:PUBLIC]), tuple(tests[PUBLIC:]))


@functools.lru_cache(maxsize=1)
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; the token :data:`END` has id 0.

    Example:
        >>> tokenizer().decode(tokenizer().encode("sort tail"))
        'sort tail'
    """
    return word_tokenizer(WORDS)


RECIPE = Recipe(
    "lists",
    hidden_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    head_dim=32,
    intermediate_size=288,
    steps=500,
    batch_size=96,
    sequence_length=64,
    vocab_size=len(WORDS),
    max_position_embeddings=64,
)
"""Of the model that answers problems: 0.7 million parameters."""


class ListsCourse:
    """Prompts and programs; only the program has a loss.

    Args:
        recipe: Sizes and seed.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def build(self) -> Any:
        """A Llama with fresh weights."""
        return build(self.recipe)

    def batches(self, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Token ids and labels, int64 [B, T], from the seed and the step alone."""
        step = start
        encode = tokenizer().backend_tokenizer.encode
        while True:
            rng = random.Random(f"{self.recipe.seed}/{step}")
            rows = []
            for _ in range(self.recipe.batch_size):
                drawn = problem("train", rng)
                asked, said = encode(drawn.prompt).ids, [*encode(drawn.answer).ids, 0]
                rows.append((asked + said, [IGNORED] * len(asked) + said))
            width = max(len(ids) for ids, _ in rows)
            ids = torch.tensor([a + [0] * (width - len(a)) for a, _ in rows])
            labels = torch.tensor([b + [IGNORED] * (width - len(b)) for _, b in rows])
            step += 1
            yield ids, labels

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Mean nats per token of the programs."""
        ids, labels = batch
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())


def reference(recipe: Recipe = RECIPE) -> Any:
    """Folder of the trained model, made on first use."""
    key = hashlib.sha256(repr((WORDS, PUBLIC, LONGEST, HELD_OUT_PERCENT)).encode()).hexdigest()
    return made(recipe, ListsCourse(recipe), tokenizer(), corpus=key)
