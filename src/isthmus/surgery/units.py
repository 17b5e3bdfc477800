"""Larger units of one language, and an output head for them on a frozen model.

A tokenizer made for other languages shatters a text into bytes. A unit is a word or a piece of one
that a monolingual tokenizer knows; its *segmentation* s(u) is what the model itself reads for it.
The head predicts units beside the model's own, which stays as it is::

    f_t ──┬─ W, frozen ──────────────────> logits of V tokens
          └─ f + feed-forward(f) ─ rows ─> logits of U units
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from torch import nn

from isthmus.decoding.target import HubTarget
from isthmus.decoding.trained import target_fingerprint
from isthmus.errors import BrokenFileError, InvalidInputError, MismatchError
from isthmus.roles import Taps
from isthmus.training.drafting import Recipe
from isthmus.training.tuning import IGNORED

Rows = Literal["mean", "random"]
"""How the rows of new units start: as the mean of the model's own rows, or drawn at random."""

ROWS: tuple[Rows, ...] = get_args(Rows)

FOREIGN = r" ?[^\x00-\x7f]+"
"""What units are learnt from: runs of letters beyond ASCII, with one space before them."""

CONFIG, WEIGHTS = "units.json", "units.safetensors"

_UNKNOWN = "<|unknown|>"
# what a segmentation follows: some tokenizers add a space at the very start, and some join what
# stands before a text to it
_ANCHORS = ("\n", "|", "0")


def segment(tokenizer: Any, text: str) -> list[int]:
    """The model's tokens of a text that stands inside another, without special tokens.

    Args:
        tokenizer: The model's tokenizer.
        text: Any text.

    Raises:
        InvalidInputError: They do not give the text back, so they cannot stand for it.
    """
    given = text
    for anchor in _ANCHORS:
        before = tokenizer.encode(anchor, add_special_tokens=False)
        ids: list[int] = tokenizer.encode(anchor + text, add_special_tokens=False)
        alone, whole = (
            tokenizer.decode(part, clean_up_tokenization_spaces=False) for part in (before, ids)
        )
        if ids[: len(before)] == before and whole == alone + text:
            return ids[len(before) :]
        given = whole[len(alone) :]
    raise InvalidInputError(
        f"the tokenizer reads {text!r} as tokens that give {given!r}; units need segmentations "
        "that survive a round trip"
    )


@dataclass(frozen=True)
class Units:
    """A vocabulary of units and their segmentations.

    Attributes:
        texts: What each unit writes.
        segments: s(u), the model's tokens of each, two or more.
        monolingual: The tokenizer that finds units in a text; its tokens are surface forms.
        tokenizer: The model's own tokenizer.
    """

    texts: tuple[str, ...]
    segments: tuple[tuple[int, ...], ...]
    monolingual: Tokenizer
    tokenizer: Any

    @classmethod
    def learn(
        cls, corpus: Iterable[str], tokenizer: Any, size: int, *, pattern: str = FOREIGN
    ) -> Self:
        """Learn a monolingual vocabulary by byte-pair encoding of characters.

        Args:
            corpus: Texts that hold the language.
            tokenizer: The model's tokenizer.
            size: Units and single characters at most.
            pattern: Regular expression of the stretches that units are learnt from.

        Raises:
            InvalidInputError: The corpus holds no such stretch.
        """
        learner = Tokenizer(models.BPE(unk_token=_UNKNOWN))
        learner.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "removed", invert=True)
        trainer = trainers.BpeTrainer(
            vocab_size=size, special_tokens=[_UNKNOWN], show_progress=False
        )
        learner.train_from_iterator(corpus, trainer)
        return cls.of(learner, tokenizer)

    @classmethod
    def of(cls, monolingual: Tokenizer, tokenizer: Any) -> Self:
        """The units of a tokenizer; what is one token of the model already is left out.

        Args:
            monolingual: A tokenizer whose tokens are pieces of text as they stand.
            tokenizer: The model's tokenizer.

        Raises:
            InvalidInputError: A segmentation does not survive a round trip, or nothing is left.
        """
        # added tokens are control marks, not text
        marks = {token.content for token in monolingual.get_added_tokens_decoder().values()}
        known = sorted(monolingual.get_vocab().items(), key=lambda item: item[1])
        pairs = [(text, segment(tokenizer, text)) for text, _ in known if text not in marks]
        pairs = [(text, ids) for text, ids in pairs if len(ids) > 1]
        if not pairs:
            raise InvalidInputError(
                "there are no units of two or more tokens; give texts of a language that the "
                "tokenizer shatters"
            )
        texts, segments = zip(*pairs, strict=True)
        return cls(texts, tuple(map(tuple, segments)), monolingual, tokenizer)

    def __len__(self) -> int:
        """Number of units U."""
        return len(self.texts)

    @cached_property
    def lengths(self) -> torch.Tensor:
        """Tokens ``len(s(u))`` of each unit, int64 [U]."""
        return torch.tensor([len(s) for s in self.segments])

    @cached_property
    def firsts(self) -> torch.Tensor:
        """First token of each segmentation, int64 [U]."""
        return torch.tensor([s[0] for s in self.segments])

    @cached_property
    def _number(self) -> dict[int, int]:
        ids = self.monolingual.get_vocab()
        return {ids[text]: unit for unit, text in enumerate(self.texts)}

    def encode(self, text: str) -> tuple[list[int], list[int]]:
        """Read a text in units where it has them and in the model's tokens elsewhere.

        Args:
            text: Any text.

        Returns:
            The model's tokens, and for each the unit that begins with it, :data:`IGNORED` where
            none does.

        Raises:
            InvalidInputError: The monolingual tokenizer changes the text, or a segmentation does
                not survive a round trip.
        """
        ids: list[int] = []
        choices: list[int] = []

        def plain(part: str) -> None:
            own = segment(self.tokenizer, part) if part else []
            ids.extend(own)
            choices.extend([IGNORED] * len(own))

        found = self.monolingual.encode(text, add_special_tokens=False)
        place = 0
        for token, (start, end) in zip(found.ids, found.offsets, strict=True):
            unit = self._number.get(token)
            if unit is None:
                continue
            if text[start:end] != self.texts[unit]:
                raise InvalidInputError(
                    f"the monolingual tokenizer writes {self.texts[unit]!r} for "
                    f"{text[start:end]!r}; units need one that leaves texts as they are"
                )
            plain(text[place:start])
            ids += self.segments[unit]
            choices += [unit, *[IGNORED] * (len(self.segments[unit]) - 1)]
            place = end
        plain(text[place:])
        return ids, choices


class UnitHead(nn.Module):
    """The grafted head: a gated residual layer and one row for each unit.

    Args:
        target: The model, which stays frozen.
        units: The vocabulary.
        rows: How the rows start; drawn ones have the spread of the model's own.
        seed: Seed of what is drawn.
    """

    def __init__(
        self, target: HubTarget, units: Units, *, rows: Rows = "mean", seed: int = 0
    ) -> None:
        super().__init__()
        self.target, self.units = target, units
        weight = target.model.get_output_embeddings().weight.detach().float()  # W [V, D]
        width = weight.shape[1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # torch's layers draw their weights from the global generator
            self.up, self.gate = nn.Linear(width, width), nn.Linear(width, width)
            self.down = nn.Linear(width, width)
            drawn = torch.randn(len(units), width)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)
        if rows == "mean":
            flat = torch.tensor([token for ids in units.segments for token in ids])
            starts = units.lengths.cumsum(0) - units.lengths
            own = F.embedding_bag(flat.to(weight.device), weight, starts.to(weight.device))
        else:
            own = drawn * weight.std().cpu()
        self.rows = nn.Parameter(own.clone())
        self.to(weight.device)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Logits of units [..., U] after the states f_t [..., D]."""
        x = features.to(self.rows.dtype)
        x = x + self.down(F.silu(self.gate(x)) * self.up(x))
        return F.linear(x, self.rows)

    def loss(self, features: torch.Tensor, choices: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy in nats of choices [P] after the states [P, D]."""
        return F.cross_entropy(self(features), choices)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``units.json`` and ``units.safetensors``, best beside the model's own files.

        Raises:
            BrokenFileError: The folder cannot be written.
        """
        folder = Path(folder)
        config, weights = folder / CONFIG, folder / WEIGHTS
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tensors = {k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}
            part = weights.with_name(f".{WEIGHTS}.part")
            save_file(tensors, part, metadata={"format": "pt"})
            note = {
                "target": target_fingerprint(self.target),
                "units": len(self.units),
                "monolingual": json.loads(self.units.monolingual.to_str()),
                "sha256": hashlib.sha256(part.read_bytes()).hexdigest(),
            }
            part.chmod(0o644)
            part.replace(weights)
            part = config.with_name(f".{CONFIG}.part")
            part.write_text(json.dumps(note, ensure_ascii=False), encoding="utf-8")
            part.replace(config)
        except OSError as error:
            raise BrokenFileError(f"{folder} cannot be written ({error.strerror})") from error

    @classmethod
    def from_pretrained(cls, folder: str | Path, target: HubTarget, tokenizer: Any) -> Self:
        """Read a head and bind it to its model.

        Raises:
            BrokenFileError: A file is missing, truncated or altered.
            MismatchError: It was trained for another model or tokenizer.
        """
        folder = Path(folder)
        try:
            note = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            fingerprint, count, digest = note["target"], note["units"], note["sha256"]
            data = (folder / WEIGHTS).read_bytes()
            monolingual = Tokenizer.from_str(json.dumps(note["monolingual"]))
        except Exception as error:  # tokenizers raises bare exceptions
            raise BrokenFileError(
                f"the unit head in {folder} cannot be read ({error}); train it again"
            ) from error
        if hashlib.sha256(data).hexdigest() != digest:
            raise BrokenFileError(f"{folder / WEIGHTS} was altered or cut short; train it again")
        units = Units.of(monolingual, tokenizer)
        if fingerprint != target_fingerprint(target) or len(units) != count:
            raise MismatchError(f"the unit head in {folder} belongs to another model or tokenizer")
        head = cls(target, units)
        try:
            head.load_state_dict(load_file(folder / WEIGHTS))
        except (SafetensorError, RuntimeError) as error:
            first = str(error).strip().splitlines()[0]
            raise BrokenFileError(f"the unit head in {folder} cannot be read ({first})") from error
        return head.eval()


@dataclass(frozen=True)
class Places:
    """Where a unit follows.

    Attributes:
        features: f_t [P, D].
        choices: The unit, int64 [P].
    """

    features: torch.Tensor
    choices: torch.Tensor


@torch.no_grad()
def places(target: HubTarget, units: Units, texts: Sequence[str], *, batch: int = 16) -> Places:
    """Run the frozen model over texts once and keep the states that a head is trained on.

    Args:
        target: The model.
        units: The vocabulary.
        texts: Training texts; their states are all held in memory.
        batch: Texts a forward.

    Raises:
        InvalidInputError: No text holds a unit behind something else.
    """
    rows = []
    for text in texts:
        ids, choices = units.encode(text)
        if any(c != IGNORED for c in choices[1 : target.max_length]):
            rows.append((ids[: target.max_length], choices[: target.max_length]))
    if not rows:
        raise InvalidInputError("the texts hold no units to train a head on; give other texts")
    rows.sort(key=lambda row: len(row[0]))
    features, wanted = [], []
    for first in range(0, len(rows), batch):
        part = rows[first : first + batch]
        width = len(part[-1][0])
        # padding stands behind the text, where a causal model does not see it
        tokens = torch.tensor([row[0] + [0] * (width - len(row[0])) for row in part])
        labels = torch.tensor([row[1] + [IGNORED] * (width - len(row[1])) for row in part])
        scores = target.forward(tokens.to(target.device), taps=Taps(final=True))
        assert scores.features is not None and scores.features.final is not None
        following = labels[:, 1:].to(target.device)
        counts = following != IGNORED
        features.append(scores.features.final[:, :-1][counts])
        wanted.append(following[counts])
    return Places(torch.cat(features), torch.cat(wanted))


def train_head(
    head: UnitHead,
    data: Places,
    recipe: Recipe,
    report: Callable[[int, float], None] | None = None,
) -> None:
    """Train a grafted head; the model stays as it is.

    Args:
        head: What is trained.
        data: Where and on what.
        recipe: Steps, places a step (``batch_size``), learning rate and seed.
        report: Called after each step with the steps taken and the loss in nats.
    """
    parameters = list(head.parameters())
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=0.0)
    generator = torch.Generator().manual_seed(recipe.seed)
    head.train()
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        rows = torch.randint(len(data.choices), (recipe.batch_size,), generator=generator)
        rows = rows.to(data.choices.device)
        loss = head.loss(data.features[rows], data.choices[rows])
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, recipe.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        if report is not None:
            report(step + 1, float(loss.detach()))
    head.eval()


@torch.no_grad()
def held_out_loss(head: UnitHead, data: Places) -> float:
    """Mean cross-entropy in nats of a head on places that it was not trained on."""
    return float(head.loss(data.features, data.choices))
