"""The `infilling` data set: functions of the standard library, cut in three, and a model of them.

``pycode-s`` is trained on with functions instead of whole files; half of them are put in the order
prefix, suffix, middle (:mod:`isthmus.signals.infilling`), so that it learns to fill a gap and does
not forget to write from left to right.
"""

from __future__ import annotations

import ast
import functools
import itertools
import random
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from isthmus.decoding.model import Model
from isthmus.models.hub import load_checkpoint
from isthmus.signals.infilling import SPELLINGS, Sentinels, cut, join
from isthmus.workbench import pycode
from isthmus.workbench._training import Recipe, nats
from isthmus.workbench.courses import made
from isthmus.workbench.pycode import Split
from isthmus.workbench.reference import reference
from isthmus.workbench.tokenizer import load_tokenizer

BASE = "pycode-s"

RATE = 0.5
"""Share of the functions that are cut."""

LONGEST = 224
"""Tokens of a function of the training part at most."""


@dataclass(frozen=True)
class Function:
    """A function of two or more statements, moved to the left margin.

    Attributes:
        head: Up to the end of its docstring, if it has one, and the line end.
        body: The rest, line end included.
        documented: Whether it has a docstring.
        returns: Whether its last statement returns a value.
    """

    head: str
    body: str
    documented: bool
    returns: bool


def functions_of(text: str) -> list[Function]:
    r"""Functions and methods of a source text.

    Example:
        >>> one = functions_of("class A:\n  def f(self):\n    'Two.'\n    return 2\n")[0]
        >>> one.head, one.body, one.documented, one.returns
        ("def f(self):\n  'Two.'\n", '  return 2\n', True, True)
    """
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return []
    lines, found = text.splitlines(keepends=True), []
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or len(node.body) < 2:
            continue
        documented = ast.get_docstring(node) is not None
        last, first = node.body[-1], node.body[documented]
        source = textwrap.dedent("".join(lines[node.lineno - 1 : node.end_lineno]))
        cut_at = (node.body[0].end_lineno if documented else first.lineno - 1) or node.lineno
        rows = source.splitlines(keepends=True)
        head, body = (
            "".join(part)
            for part in (rows[: cut_at - node.lineno + 1], rows[cut_at - node.lineno + 1 :])
        )
        if head.startswith("def ") and body:
            returns = isinstance(last, ast.Return) and last.value is not None
            found.append(Function(head, body.rstrip("\n") + "\n", documented, returns))
    return found


@functools.lru_cache(maxsize=2)
def functions(split: Split) -> tuple[Function, ...]:
    """Functions of one part of the library, its tests left out, each once."""
    texts = (
        text
        for path, text in zip(pycode.files(split), pycode.texts(split), strict=True)
        if not any("test" in part for part in path.parts)
    )
    return tuple(dict.fromkeys(one for text in texts for one in functions_of(text)))


HEAD = 128
"""Tokens of a head that is to be completed at most."""


def returning(split: Split, count: int) -> list[Function]:
    """Functions of one part that end by returning a value, drawn where there are more."""
    found = [one for one in functions(split) if one.returns]
    random.Random(0).shuffle(found)
    encode = tokenizer().backend_tokenizer.encode
    short = (one for one in found if len(encode(one.head).ids) <= HEAD)
    return list(itertools.islice(short, count))


def ends_in_return(source: str) -> bool:
    r"""Whether a text is one whole function that ends by returning something.

    Example:
        >>> ends_in_return("def f(x):\n  return x\n"), ends_in_return("def f(x):\n  return (x\n")
        (True, False)
    """
    try:
        body = ast.parse(source).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    if len(body) != 1 or not isinstance(body[0], ast.FunctionDef):
        return False
    last = body[0].body[-1]
    return isinstance(last, ast.Return) and last.value is not None


@functools.lru_cache(maxsize=1)
def tokenizer() -> PreTrainedTokenizerFast:
    """That of the models of code, with sentinels."""
    made_of = load_tokenizer(reference("pycode-t"))  # which its smaller models share
    made_of.add_tokens(list(SPELLINGS[0]), special_tokens=True)
    return made_of


class InfillingCourse:
    """Functions, whole or cut, one behind the other.

    Args:
        recipe: Sizes and seed.
        base: Name of the reference model that is trained on.
    """

    def __init__(self, recipe: Recipe, base: str = BASE) -> None:
        self.recipe, self.base = recipe, base
        self.marks = Sentinels.of(tokenizer())

    def build(self) -> Any:
        """The base, with embeddings of the sentinels."""
        model = load_checkpoint(str(reference(self.base)), dtype="float32", device="cpu").model
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.recipe.seed)  # transformers draws the new rows from here
            model.resize_token_embeddings(len(tokenizer()), mean_resizing=False)
        return model

    @functools.cached_property
    def texts(self) -> list[tuple[list[int], int, list[int]]]:
        """Tokens of each function, of its head, and the first words of the lines of its body."""
        backend = tokenizer().backend_tokenizer
        words = [str(tokenizer().decode([i])) for i in range(len(tokenizer()))]
        out = []
        for one in functions("train"):
            head, body = backend.encode(one.head).ids, backend.encode(one.body).ids
            ids = head + body
            if len(ids) <= LONGEST:
                margin = [not words[token].strip() and words[token] != " " for token in ids]
                inside = range(len(head) + 1, len(ids))
                out.append((ids, len(head), [i for i in inside if margin[i - 1] > margin[i]]))
        return out

    def batches(self, start: int) -> Iterator[Tensor]:
        """Token ids, int64 [B, T + 1], from the seed and the step alone."""
        step, width = start, self.recipe.sequence_length + 1
        while True:
            rng = random.Random(f"{self.recipe.seed}/{step}")
            rows: list[list[int]] = []
            while len(rows) < self.recipe.batch_size:
                row: list[int] = []
                while len(row) < width:
                    ids, head, starts = rng.choice(self.texts)
                    whole = [*ids, self.marks.end]
                    filled = join(cut(ids, head, starts, rng), self.marks)
                    row += filled if rng.random() < RATE else whole
                rows.append(row[:width])
            step += 1
            yield torch.tensor(rows)

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        """Mean nats per token."""
        return nats(model, batch)


def infilling_model(base: str = BASE, *, steps: int = 320, batch_size: int = 16) -> Model:
    """The model that fills in, made on first use.

    Args:
        base: Name of the reference model that is trained on.
        steps: Optimiser steps.
        batch_size: Rows a step.
    """
    config = load_checkpoint(str(reference(base)), dtype="float32", device="cpu").model.config
    recipe = Recipe(
        name=f"infilling-{base}",
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        vocab_size=len(tokenizer()),
        steps=steps,
        batch_size=batch_size,
        sequence_length=256,
        muon_lr=0.01,
        adam_lr=0.002,
        warmup_steps=10,
        decay_share=0.5,
    )
    corpus = f"{pycode.digest()}, {RATE}, {LONGEST}"
    folder = made(recipe, InfillingCourse(recipe, base), tokenizer(), corpus=corpus)
    trained = load_checkpoint(str(folder), dtype="float32", device="cpu")
    return Model(trained.model, trained.tokenizer, fast=False)
