"""How the reference models of generated tasks are made: their data, their networks, their marks.

The counterpart of packed text in :mod:`isthmus.workbench._training`: a :class:`Course` says what a
network looks like, what it reads at each step and what its loss is; the trainer, its checkpoints
and the publishing of a model are the same for all.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType, ModuleType
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    GenerationConfig,
    MBartConfig,
    MBartForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from isthmus.workbench import dates, korean, pycode, slots, sums
from isthmus.workbench._training import IGNORED, Course, Recipe, build, pack
from isthmus.workbench.pycode import Split
from isthmus.workbench.tokenizer import end_id

TASKS: Mapping[str, ModuleType] = MappingProxyType(
    {"sums": sums, "dates": dates, "korean": korean, "slots": slots}
)
"""The data sets by name."""

MARKED = 400
"""Held-out problems that a published model is marked on."""

CODE_FILES = 150
"""Files of code that the model of Korean readings sees beside them."""


@dataclass(frozen=True)
class TaskRecipe(Recipe):
    """A recipe whose data are generated.

    Attributes:
        task: A name in :data:`TASKS`.
        encoder_layers: Layers of the encoder; 0 makes a decoder-only model.
    """

    task: str = "sums"
    encoder_layers: int = 0

    def digest(self) -> str:
        """Hash of what the data depend on."""
        value: str = TASKS[self.task].digest()
        return value

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The task's tokenizer."""
        made: PreTrainedTokenizerFast = TASKS[self.task].tokenizer()
        return made

    def course(self) -> Course:
        """What the trainer is to train."""
        courses: dict[str, type[PairCourse | PromptCourse]] = {
            "sums": SumsCourse,
            "dates": DatesCourse,
            "korean": KoreanCourse,
            "slots": SlotsCourse,
        }
        return courses[self.task](self)


class PromptCourse:
    """Rows of prompts and their answers for a decoder; a prompt carries no loss.

    Args:
        recipe: Sizes and seed.
    """

    def __init__(self, recipe: TaskRecipe) -> None:
        self.recipe = recipe
        self.tokenizer = recipe.tokenizer()
        self.end = end_id(self.tokenizer)

    def build(self) -> nn.Module:
        """A Llama with fresh weights."""
        return build(self.recipe, token_id=self.end)

    def generation(self) -> GenerationConfig:
        """End and padding tokens."""
        return GenerationConfig(bos_token_id=self.end, eos_token_id=self.end, pad_token_id=self.end)

    def draw(self, seed: str, rng: random.Random) -> tuple[str, str]:
        """One prompt of the training part and its answer."""
        raise NotImplementedError

    def marks(self, model: Any, count: int) -> dict[str, Any]:
        """How well a model answers held-out prompts."""
        raise NotImplementedError

    def batches(self, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and labels [B, T], a function of seed and step alone."""
        recipe = self.recipe
        width = recipe.sequence_length
        step = start
        while True:
            rng = random.Random(f"{recipe.seed}/{step}")
            tokens: list[int] = []
            labels: list[int] = []
            rows: list[tuple[list[int], list[int]]] = []
            number = 0
            while len(rows) < recipe.batch_size:
                prompt, answer = self.draw(f"{recipe.seed}/{step}/{number}", rng)
                number += 1
                asked = self.encode(prompt)
                said = [*self.encode(answer), self.end]
                tokens += [*asked, *said]
                labels += [IGNORED] * len(asked) + said
                if len(tokens) > width:
                    rows.append((tokens[:width], labels[1 : width + 1]))
                    tokens, labels = [], []
            step += 1
            yield torch.tensor([r[0] for r in rows]), torch.tensor([r[1] for r in rows])

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        ids: list[int] = self.tokenizer.backend_tokenizer.encode(text).ids
        return ids

    def loss(self, model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
        """Mean nats per token of the solutions."""
        ids, labels = batch
        logits = model(input_ids=ids, use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())

    def answers(self, model: Any, prompts: Sequence[str]) -> list[str]:
        """Greedy solutions; prompts of one length share a batch, so nothing is padded."""
        by_length: dict[int, list[int]] = {}
        encoded = [self.encode(prompt) for prompt in prompts]
        for index, ids in enumerate(encoded):
            by_length.setdefault(len(ids), []).append(index)
        found = [""] * len(prompts)
        device = next(model.parameters()).device
        for length, members in by_length.items():
            asked = torch.tensor([encoded[i] for i in members], device=device)
            out = model.generate(
                input_ids=asked,
                attention_mask=torch.ones_like(asked),
                do_sample=False,
                max_new_tokens=128,
            )
            for index, row in zip(members, out[:, length:].tolist(), strict=True):
                found[index] = str(self.tokenizer.decode(row, skip_special_tokens=True))
        return found


class SumsCourse(PromptCourse):
    """Whole problems and their solutions."""

    def draw(self, seed: str, rng: random.Random) -> tuple[str, str]:
        """A problem of any wording."""
        (problem,) = sums.problems(1, "train", seed=seed, free=None)
        return problem.prompt, problem.solution(rng)

    def marks(self, model: Any, count: int) -> dict[str, Any]:
        """Share of held-out problems that are solved, greedily."""
        asked = sums.problems(count, "held-out")
        texts = self.answers(model, [problem.prompt for problem in asked])
        pairs = list(zip(asked, texts, strict=True))
        right = sum(sums.check_answer(problem, text) for problem, text in pairs)
        steps = [ok for problem, text in pairs for ok in sums.check_steps(problem, text)]
        return {
            "solved": round(right / count, 4),
            "steps_right": round(sum(steps) / max(1, len(steps)), 4),
            "problems": count,
        }


class KoreanCourse(PromptCourse):
    """Code and its Korean readings; a quarter of the rows is the code of `pycode`."""

    @functools.cached_property
    def code(self) -> Tensor:
        """Packed tokens of some files, int64 [N]."""
        documents = random.Random(self.recipe.seed).sample(pycode.texts("train"), CODE_FILES)
        encode = self.tokenizer.backend_tokenizer.encode_batch_fast
        ids = [np.array(e.ids, dtype=np.int32) for e in encode(documents)]
        return torch.from_numpy(pack(ids, self.end).astype(np.int64))

    def draw(self, seed: str, rng: random.Random) -> tuple[str, str]:
        """A line of any kind."""
        (line,) = korean.lines(1, "train", seed=seed)
        return line.prompt, line.answer

    def batches(self, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and labels [B, T], a function of seed and step alone."""
        rows, width = self.recipe.batch_size // 4, self.recipe.sequence_length
        for step, (ids, labels) in enumerate(super().batches(start), start):
            rng = np.random.default_rng([self.recipe.seed, step])
            for row, first in enumerate(rng.integers(0, len(self.code) - width - 1, rows)):
                window = self.code[first : first + width + 1]
                ids[row], labels[row] = window[:-1], window[1:]
            yield ids, labels

    def marks(self, model: Any, count: int) -> dict[str, Any]:
        """Share of held-out lines that are read right, greedily."""
        asked = korean.lines(count, "held-out")
        texts = self.answers(model, [line.prompt for line in asked])
        right = sum(text == line.answer for line, text in zip(asked, texts, strict=True))
        return {"solved": round(right / count, 4), "problems": count}


class PairCourse:
    """Sources and what is to be written of them, for an encoder-decoder.

    Args:
        recipe: Sizes and seed.
    """

    def __init__(self, recipe: TaskRecipe) -> None:
        self.recipe = recipe
        self.tokenizer = recipe.tokenizer()
        self.end = end_id(self.tokenizer)
        self.start, self.pad = (
            cast(int, token) for token in (self.tokenizer.bos_token_id, self.tokenizer.pad_token_id)
        )

    def draw(self, count: int, split: Split, seed: int | str = 0) -> Sequence[Any]:
        """Examples of one part, with a ``source`` and a ``target`` each."""
        drawn: Sequence[Any] = TASKS[self.recipe.task].examples(count, split, seed=seed)
        return drawn

    def build(self) -> nn.Module:
        """An mBART (norms before each part: it learns far sooner than BART), without dropout."""
        recipe = self.recipe
        config = MBartConfig(
            vocab_size=recipe.vocab_size,
            d_model=recipe.hidden_size,
            encoder_layers=recipe.encoder_layers,
            decoder_layers=recipe.num_hidden_layers,
            encoder_attention_heads=recipe.num_attention_heads,
            decoder_attention_heads=recipe.num_attention_heads,
            encoder_ffn_dim=recipe.intermediate_size,
            decoder_ffn_dim=recipe.intermediate_size,
            max_position_embeddings=recipe.max_position_embeddings,
            dropout=0.0,
            attention_dropout=0.0,
            activation_dropout=0.0,
            pad_token_id=self.pad,
            bos_token_id=self.start,
            eos_token_id=self.end,
            decoder_start_token_id=self.start,
            forced_eos_token_id=None,
            dtype="float32",
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)  # transformers draws its weights from here
            model = MBartForConditionalGeneration(config)
        model.set_attn_implementation("sdpa")
        return model

    def generation(self) -> GenerationConfig:
        """Start, end and padding tokens."""
        return GenerationConfig(
            bos_token_id=self.start,
            eos_token_id=self.end,
            pad_token_id=self.pad,
            decoder_start_token_id=self.start,
        )

    def batches(self, start: int) -> Iterator[tuple[Tensor, ...]]:
        """Sources [B, T], their masks, decoder inputs and labels [B, U] of each step."""
        recipe = self.recipe
        step = start
        while True:
            drawn = self.draw(recipe.batch_size, "train", f"{recipe.seed}/{step}")
            step += 1
            yield self.collate(drawn)

    def collate(self, drawn: Sequence[Any]) -> tuple[Tensor, ...]:
        """The tensors of some examples; see :meth:`batches`."""
        encode = self.tokenizer.backend_tokenizer.encode
        sources = [torch.tensor(encode(each.source).ids) for each in drawn]
        targets = [torch.tensor([self.start, *encode(each.target).ids]) for each in drawn]
        source = pad_sequence(sources, batch_first=True, padding_value=self.pad)
        target = pad_sequence(targets, batch_first=True, padding_value=self.pad)
        labels = target[:, 1:]
        labels = torch.where(labels == self.pad, IGNORED, labels)
        return source, (source != self.pad).long(), target[:, :-1], labels

    def loss(self, model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
        """Mean nats per token of the answers."""
        source, mask, target, labels = batch
        logits = model(
            input_ids=source, attention_mask=mask, decoder_input_ids=target, use_cache=False
        ).logits
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())

    def answers(self, model: Any, drawn: Sequence[Any]) -> list[str]:
        """What a model writes of some sources, greedily."""
        source, mask, _, _ = self.collate(drawn)
        device = next(model.parameters()).device
        out = model.generate(
            input_ids=source.to(device),
            attention_mask=mask.to(device),
            do_sample=False,
            num_beams=1,
            max_new_tokens=self.recipe.sequence_length,
        )
        return list(self.tokenizer.batch_decode(out, skip_special_tokens=True))

    def marks(self, model: Any, count: int) -> dict[str, Any]:
        """How well a model writes of held-out sources."""
        raise NotImplementedError


class DatesCourse(PairCourse):
    """Written dates and their ISO forms."""

    def marks(self, model: Any, count: int) -> dict[str, Any]:
        """Share of held-out dates that are written right, greedily."""
        drawn = self.draw(count, "held-out")
        texts = self.answers(model, drawn)
        right = sum(dates.check(each, text) for each, text in zip(drawn, texts, strict=True))
        return {"solved": round(right / count, 4), "problems": count}


class SlotsCourse(PairCourse):
    """Lists of slots and texts that say them."""

    def marks(self, model: Any, count: int) -> dict[str, Any]:
        """Slot error rate of texts of held-out meanings, greedily."""
        drawn = self.draw(count, "held-out")
        rate = slots.error_rate([each.meaning for each in drawn], self.answers(model, drawn))
        return {"slot_error_rate": round(rate, 4), "problems": count}
