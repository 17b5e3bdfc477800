"""The `clips` data set: a shape moves through eight noisy frames, and people say so in five ways.

Six captioners of unlike encoders err in unlike places: one that looks at single frames hardly sees
which way the shape goes, one that looks at differences hardly sees what it is.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from isthmus.folders import kept, published
from isthmus.roles import Loss
from isthmus.training.loop import Plan, Trainer
from isthmus.training.seeds import batch_generator

FRAMES, SIDE, NOISE = 8, 16, 0.25
SHAPES = ("square", "cross", "ring", "bar")
SIZES = ("small", "large")
LIGHTS = ("dim", "bright")
WAYS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
TEMPLATES = (
    "a {size} {light} {shape} moves {way}",
    "the {shape} is {size} and {light} and goes {way}",
    "there is a {light} {size} {shape} which drifts {way}",
    "{way} moves one {size} {light} {shape}",
    "we see the {light} {shape} of {size} size go {way}",
)
_FIELDS = {"shape": SHAPES, "size": SIZES, "light": LIGHTS, "way": tuple(WAYS)}
WORDS = (
    "<end>",
    *sorted({w for t in TEMPLATES for w in t.split() if "{" not in w}),
    *itertools.chain.from_iterable(_FIELDS.values()),
)
"""All words; the first one ends a caption and pads."""
LONGEST = 1 + max(len(t.split()) for t in TEMPLATES)


@dataclass(frozen=True)
class Clips:
    """Clips and what people say of them.

    Attributes:
        frames: float32 [N, FRAMES, SIDE, SIDE].
        captions: The five captions of each clip, as words.
    """

    frames: torch.Tensor
    captions: list[list[list[str]]]


def clips(count: int, seed: int) -> Clips:
    """Draw clips."""
    generator = torch.Generator().manual_seed(seed)

    def draw(options: int) -> torch.Tensor:
        return torch.randint(options, (count,), generator=generator)

    drawn = {name: draw(len(values)) for name, values in _FIELDS.items()}
    radius = 1 + drawn["size"]  # 3 or 5 pixels wide
    step = torch.tensor(list(WAYS.values()))[drawn["way"]]  # [N, 2]
    centre = torch.stack([draw(6), draw(6)], 1) + 5 - 2 * step
    time = torch.arange(FRAMES)[None, :, None] // 2
    place = centre[:, None] + step[:, None] * time  # [N, FRAMES, 2]
    grid = torch.arange(SIDE)
    dx = (grid - place[..., :1]).abs()[:, :, None, :]
    dy = (grid - place[..., 1:]).abs()[:, :, :, None]
    r = radius[:, None, None, None]
    far = torch.maximum(dx, dy)
    inside = torch.stack(
        [
            far <= r,
            (torch.minimum(dx, dy) == 0) & (far <= r),
            far == r,
            (dy == 0) & (dx <= r),
        ]
    )  # [shapes, N, FRAMES, SIDE, SIDE]
    shape = inside[drawn["shape"], torch.arange(count)]
    light = torch.tensor([0.6, 1.2])[drawn["light"]][:, None, None, None]
    noise = torch.randn(shape.shape, generator=generator) * NOISE
    named = [
        {name: values[int(drawn[name][i])] for name, values in _FIELDS.items()}
        for i in range(count)
    ]
    return Clips(shape * light + noise, [[t.format(**n).split() for t in TEMPLATES] for n in named])


def ids(captions: Sequence[Sequence[str]]) -> torch.Tensor:
    """Captions as word numbers, ended and padded, int64 [N, LONGEST]."""
    number = {word: i for i, word in enumerate(WORDS)}
    out = torch.zeros(len(captions), LONGEST, dtype=torch.int64)
    for row, caption in zip(out, captions, strict=True):
        row[: len(caption)] = torch.tensor([number[w] for w in caption])
    return out


class _Frames(nn.Module):
    """Each frame by itself: [B, T, SIDE, SIDE], or [B, T, channels, SIDE, SIDE], to [B, T, D]."""

    def __init__(self, width: int, channels: int = 1) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 12, 3, 2, 1), nn.ReLU(), nn.Conv2d(12, 24, 3, 2, 1), nn.ReLU()
        )
        self.out = nn.Linear(24 * (SIDE // 4) ** 2, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.ndim == 4:
            x = x[:, :, None]
        found = self.layers(x.flatten(0, 1)).flatten(1)
        out: torch.Tensor = self.out(found).view(len(x), x.shape[1], -1)
        return out


def _pairs(x: torch.Tensor) -> torch.Tensor:
    """Frames four apart as two channels, [B, FRAMES - 4, 2, SIDE, SIDE]."""
    return torch.stack([x[:, :-4], x[:, 4:]], 2)


class _Mean(nn.Module):
    """The mean of pairs of frames, seen one by one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.frames = _Frames(width, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.frames(_pairs(x)).relu().mean(1)
        return out


class _Temporal(nn.Module):
    """Convolutions along time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.frames = _Frames(width)
        self.mix = nn.Conv1d(width, width, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.mix(self.frames(x).relu().mT).relu().amax(-1)
        return out


class _Recurrent(nn.Module):
    """A gated unit along pairs of frames."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.frames = _Frames(width, 2)
        self.unit = nn.GRU(width, width, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = self.frames(_pairs(x)).relu()
        out: torch.Tensor = (seen + self.unit(seen)[0]).mean(1)
        return out


class _Attention(nn.Module):
    """Attention along time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.frames = _Frames(width)
        self.place = nn.Parameter(torch.randn(FRAMES, width) * 0.5)
        self.layer = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer(self.frames(x) + self.place).mean(1)
        return out


class _Solid(nn.Module):
    """Convolutions in space and time at once."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv3d(1, 12, 3, 2, 1), nn.ReLU(), nn.Conv3d(12, 24, 3, 2, 1), nn.ReLU()
        )
        self.out = nn.Linear(24 * (FRAMES // 4) * (SIDE // 4) ** 2, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.out(self.layers(x[:, None]).flatten(1)).relu()
        return out


class _Differences(nn.Module):
    """What changes between frames two apart, and one mean picture."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.moves, self.still = _Frames(width), _Frames(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        moves: torch.Tensor = self.moves(x[:, 2:] - x[:, :-2]).relu().mean(1)
        out: torch.Tensor = moves + self.still(x.mean(1, keepdim=True))[:, 0]
        return out


ENCODERS: dict[str, type[nn.Module]] = {
    "mean": _Mean,
    "temporal": _Temporal,
    "recurrent": _Recurrent,
    "attention": _Attention,
    "solid": _Solid,
    "differences": _Differences,
}
"""Encoders [B, FRAMES, SIDE, SIDE] -> [B, D] by name."""


class Captioner(nn.Module):
    """An encoder, and a gated unit that writes the caption.

    Args:
        encoder: A key of :data:`ENCODERS`.
        width: Width D.
    """

    def __init__(self, encoder: str, width: int = 64) -> None:
        super().__init__()
        self.encoder = ENCODERS[encoder](width)
        self.words = nn.Embedding(len(WORDS), width)
        self.unit = nn.GRU(2 * width, width, batch_first=True)
        self.out = nn.Linear(width, len(WORDS))

    def forward(self, frames: torch.Tensor, said: torch.Tensor) -> torch.Tensor:
        """Logits [B, T, words] of captions int64 [B, T], each word given those before it."""
        seen = self.encoder(frames)[:, None]
        before = self.words(F.pad(said[:, :-1], (1, 0)))
        states = self.unit(torch.cat([before, seen.expand(-1, before.shape[1], -1)], -1))[0]
        logits: torch.Tensor = self.out(states)
        return logits

    @torch.no_grad()
    def caption(self, frames: torch.Tensor) -> list[list[str]]:
        """Greedy captions of clips, as words."""
        seen = self.encoder(frames)[:, None]
        word = torch.zeros(len(frames), 1, dtype=torch.int64)
        state, found = None, []
        for _ in range(LONGEST):
            out, state = self.unit(torch.cat([self.words(word), seen], -1), state)
            word = self.out(out).argmax(-1)
            found.append(word)
        rows = torch.cat(found, 1).tolist()
        return [[WORDS[w] for w in r[: r.index(0) if 0 in r else None]] for r in rows]


class CaptionLearner:
    """Cross-entropy of one of a clip's captions, drawn anew.

    Args:
        module: A captioner.
        data: Clips to learn from.
        batch_size: Clips of a step.
        seed: Seed of the draws.
    """

    lower_is_better = True

    def __init__(self, module: Captioner, data: Clips, batch_size: int, seed: int) -> None:
        self.module: Any = module
        self.data, self.size, self.seed = data, batch_size, seed
        self.said = torch.stack([ids(c) for c in zip(*data.captions, strict=True)], 1)
        self.identity = {"clips": len(data.captions), "size": batch_size, "seed": seed}

    def batch(self, part: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Frames and captions."""
        generator = batch_generator(self.seed, part)
        rows = torch.randint(len(self.said), (self.size,), generator=generator)
        which = torch.randint(len(TEMPLATES), (self.size,), generator=generator)
        return self.data.frames[rows], self.said[rows, which]

    def loss(self, batch: tuple[torch.Tensor, torch.Tensor]) -> Loss:
        """Sum over words and the end."""
        frames, said = batch
        ends = (said != 0).sum(1, keepdim=True)
        where = torch.arange(said.shape[1]) <= ends
        logits = self.module(frames, said)[where]
        return Loss(F.cross_entropy(logits, said[where], reduction="sum"), int(where.sum()))

    def validate(self) -> dict[str, float]:
        """Nothing is held out: the last weights are kept."""
        return {}


@dataclass(frozen=True)
class Recipe:
    """How a captioner is made.

    Attributes:
        encoder: A key of :data:`ENCODERS`.
        seed: Seed of weights and draws.
        clips: Clips to learn from.
        steps: Optimiser steps.
        batch_size: Clips of a step.
    """

    encoder: str
    seed: int = 0
    clips: int = 4_000
    steps: int = 700
    batch_size: int = 64


def captioner(recipe: Recipe) -> Captioner:
    """A trained captioner, made on first use."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        module = Captioner(recipe.encoder)
    key = {**asdict(recipe), "noise": NOISE, "words": WORDS}
    with kept("captioners", f"clips-{recipe.encoder}", key) as folder:
        file = folder / "model.safetensors"
        if not file.exists():
            learner = CaptionLearner(
                module, clips(recipe.clips, seed=1), recipe.batch_size, recipe.seed
            )
            plan = Plan(recipe.steps, learning_rate=3e-3, seed=recipe.seed)
            Trainer(learner, plan).run()
            with published(folder) as part:
                save_file(module.state_dict(), part / file.name)
        module.load_state_dict(load_file(file))
    return module.eval()
