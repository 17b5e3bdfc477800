"""Function calls as JSON: a task whose answers have a schema, from the standard library's source.

The head of a function whose parameters have plain defaults, the first line of its docstring and a
request in words; the answer is the call. What a model has to do is to copy names and values into
the right places, which a small one learns in a minute, though not without mistakes::

    def wrap(width: int, tabs: bool)
    tabs is on, width is 37
    call: {"name":"wrap","arguments":{"width":37,"tabs":true}}
"""

from __future__ import annotations

import ast
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from isthmus.decoding.model import Model
from isthmus.models.hub import load_checkpoint
from isthmus.workbench import pycode
from isthmus.workbench._tasks import PromptCourse, TaskRecipe
from isthmus.workbench.courses import made
from isthmus.workbench.pycode import Split
from isthmus.workbench.reference import reference
from isthmus.workbench.schemas import Schema, record

KINDS = {bool: "boolean", int: "integer", str: "string"}
MOST = 3
"""Parameters of a call."""

BASE = "pycode-s"


@dataclass(frozen=True)
class Head:
    """A function: its name, what it does, and the types of its parameters."""

    name: str
    about: str
    parameters: tuple[tuple[str, type], ...]

    def schema(self) -> Schema:
        """What a call of it as JSON looks like.

        Example:
            >>> Head("f", "", (("x", int),)).schema()["properties"]["name"]
            {'const': 'f'}
        """
        types = {name: {"type": KINDS[kind]} for name, kind in self.parameters}
        return record(name={"const": self.name}, arguments=record(**types))


@dataclass(frozen=True)
class Call:
    """One request.

    Attributes:
        prompt: The function and what to call it with.
        schema: What every answer to it validates under.
        answer: The right answer.
    """

    prompt: str
    schema: Schema
    answer: str


@lru_cache
def heads(split: Split) -> tuple[Head, ...]:
    """Functions of the standard library whose parameters have plain defaults; none of its tests.

    Functions that are held out have names that were never seen in training.
    """
    found: dict[str, Head] = {}
    known = set() if split == "train" else {head.name for head in heads("train")}
    for path, text in zip(pycode.files(split), pycode.texts(split), strict=True):
        if any("test" in part for part in path.parts):
            continue
        try:
            nodes = list(ast.walk(ast.parse(text)))
        except (SyntaxError, ValueError, RecursionError):  # sources that are wrong on purpose
            continue
        for node in nodes:
            if isinstance(node, ast.FunctionDef) and node.name not in known:
                names = [a.arg for a in node.args.args][-len(node.args.defaults) or 99 :]
                plain = tuple(
                    (name, type(default.value))
                    for name, default in zip(names, node.args.defaults, strict=False)
                    if isinstance(default, ast.Constant) and type(default.value) in KINDS
                )
                about = (ast.get_docstring(node) or "").split("\n")[0][:40]
                if plain and len(node.name) <= 16:
                    found.setdefault(node.name, Head(node.name, about, plain[:MOST]))
    return tuple(found.values())


@lru_cache
def words() -> tuple[str, ...]:
    """Values of strings: names of functions."""
    return tuple(head.name for head in heads("train") if head.name.isalpha())


def call(head: Head, source: random.Random) -> Call:
    """A request to call a function, with values of its parameters in any order."""
    arguments: dict[str, Any] = {}
    said = []
    for name, kind in head.parameters:
        value: Any = source.choice(words())
        if kind is int:
            value = source.randrange(100)
        elif kind is bool:
            value = source.random() < 0.5
        arguments[name] = value
        spoken = ("off", "on")[value] if kind is bool else value
        said.append(f"{name} is {spoken}")
    source.shuffle(said)
    typed = ", ".join(f"{name}: {kind.__name__}" for name, kind in head.parameters)
    prompt = f"def {head.name}({typed})\n{head.about}\n{', '.join(said)}\ncall: "
    answer = json.dumps({"name": head.name, "arguments": arguments}, separators=(",", ":"))
    return Call(prompt, head.schema(), answer)


def calls(count: int, split: Split = "held-out", seed: int = 0) -> list[Call]:
    """Requests of one part of the library.

    Example:
        >>> one = calls(1)[0]
        >>> one.prompt.startswith("def ") and one.answer.startswith('{"name":')
        True
    """
    source = random.Random(f"calls/{seed}")
    return [call(source.choice(heads(split)), source) for _ in range(count)]


class CallsCourse(PromptCourse):
    """Requests and their answers, for a copy of a reference model."""

    def __init__(self, recipe: TaskRecipe, base: Model) -> None:
        self.recipe, self.base = recipe, base
        self.tokenizer: Any = base.tokenizer
        self.end = int(self.tokenizer.eos_token_id)

    def build(self) -> Any:
        """The reference model, to be tuned."""
        return self.base.target.model.float()

    def draw(self, seed: str, rng: random.Random) -> tuple[str, str]:
        """A request and its answer."""
        one = call(rng.choice(heads("train")), rng)
        return one.prompt, one.answer


def tuned_model(steps: int = 480) -> Model:
    """A reference model that has learned to call functions, made on first use."""
    checkpoint = load_checkpoint(str(reference(BASE)), dtype="float32", device="cpu")
    base = Model(checkpoint.model, checkpoint.tokenizer, fast=False)
    config = checkpoint.model.config
    recipe = TaskRecipe(
        name="calls",
        task="calls",
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        steps=steps,
        batch_size=8,
        sequence_length=256,
        muon_lr=0.01,
        adam_lr=0.002,
        warmup_steps=10,
    )
    folder = made(recipe, CallsCourse(recipe, base), base.tokenizer, corpus=pycode.digest())
    tuned = load_checkpoint(str(folder), dtype="float32", device="cpu")
    return Model(tuned.model, tuned.tokenizer, fast=False)


def parts(text: str) -> dict[str, Any] | None:
    """The arguments in an answer, or None where it is no call."""
    try:
        value = json.loads(text)["arguments"]
    except (ValueError, KeyError, TypeError):
        return None
    return value if isinstance(value, dict) else None


def exact(asked: Sequence[Call], texts: Sequence[str]) -> float:
    """Share of answers whose arguments are exactly right."""
    pairs = zip(asked, texts, strict=True)
    return sum(parts(text) == parts(one.answer) for one, text in pairs) / len(asked)


def encoded(model: Model, asked: Sequence[Call]) -> list[torch.Tensor]:
    """Prompts as token ids, as they were trained."""
    encode = model.tokenizer.backend_tokenizer.encode
    return [torch.tensor(encode(one.prompt).ids) for one in asked]
