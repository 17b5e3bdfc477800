"""Fitting a network to one clip, which it learns by heart: HNeRV, and NeRV, its baseline.

Embeddings are learnt through an encoder, which is not part of what is sent
(:mod:`isthmus.models.fields`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus.errors import InvalidInputError
from isthmus.metrics.images import psnr
from isthmus.models.fields import (
    Blocks,
    ContentField,
    FrameEncoder,
    TimeField,
    budget,
    strides_for,
)
from isthmus.roles import Loss
from isthmus.training.loop import Plan, Progress, Trainer
from isthmus.training.seeds import batch_generator


@dataclass(frozen=True)
class Fitting:
    """What is fitted, and how.

    Attributes:
        content: Pictures grow out of embeddings of themselves; off, out of their times (NeRV),
            with channels that halve from block to block and kernels of 3.
        embedding: Channels of an embedding.
        encoder: Width of the encoder, which is not sent.
        hidden: Width of NeRV's MLP.
        epochs: How often a clip is seen.
        batch_size: Pictures of a step.
        learning_rate: Peak of Adam's.
        seed: Of first weights and of the order of pictures.
    """

    content: bool = True
    embedding: int = 16
    encoder: int = 64
    hidden: int = 128
    epochs: int = 300
    batch_size: int = 2
    learning_rate: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        sizes = (self.embedding, self.encoder, self.hidden, self.epochs, self.batch_size)
        if min(sizes) < 1 or not self.learning_rate > 0:
            raise InvalidInputError(f"sizes and rates of a field are above 0, got {self}")


class Fit(nn.Module):
    """What is fitted to a segment: a field, and the encoder of its pictures.

    Args:
        clip: The pictures, padded, float [T, 3, H, W] from 0 to 1.
        settings: How.
        total: Parameters that are sent.
    """

    def __init__(self, clip: Tensor, settings: Fitting, total: int) -> None:
        super().__init__()
        s, (count, _, height, width) = settings, clip.shape
        strides = strides_for(height, width)
        self.clip, self.content = clip, s.content
        self.encoder: nn.Module | None = None
        if s.content:
            grid = clip[:, :1, :: math.prod(strides), :: math.prod(strides)]
            sent = s.embedding * grid.numel()
            if sent >= total:
                raise InvalidInputError(
                    f"{count} embeddings of {s.embedding} channels are {sent} numbers of {total}; "
                    "raise rate_bpp, or lower embedding"
                )
            total -= sent
            self.encoder = FrameEncoder(strides, s.encoder, s.embedding)
        self.width = budget(total, lambda c: field(s, c, height, width))
        self.field = field(s, self.width, height, width)

    def inputs(self, frames: Tensor) -> Tensor:
        """What the field reads for pictures [B] of the segment."""
        if self.encoder is not None:
            found: Tensor = self.encoder(self.clip[frames])
            return found
        return frames / max(1, len(self.clip) - 1)

    def forward(self, frames: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] of numbers [B]."""
        out: Tensor = self.field(self.inputs(frames))
        return out


class Learner:
    """Mean squared error on pictures of the segment, each once an epoch.

    Args:
        module: What is fitted.
        settings: How.
        shown: Numbers of the pictures that are learnt; all when None.
    """

    lower_is_better = False

    def __init__(self, module: Fit, settings: Fitting, shown: Tensor | None = None) -> None:
        self.module: Any = module
        self.settings = settings
        self.fit, self.clip = module, module.clip
        self.shown = torch.arange(len(module.clip)) if shown is None else shown
        self.identity = {"settings": asdict(settings)}
        self.curve: list[tuple[float, float]] = []
        self.steps = 0

    def batch(self, part: int) -> Tensor:
        """Numbers of pictures [B]."""
        size = min(self.settings.batch_size, len(self.shown))
        many = -(-len(self.shown) // size)
        draw = batch_generator(self.settings.seed, part // many)
        order = torch.randperm(len(self.shown), generator=draw)
        return self.shown[order[part % many * size :][:size]]

    def loss(self, batch: Tensor) -> Loss:
        """Over all values of the pictures."""
        self.steps += 1
        error = (self.module(batch) - self.clip[batch]).square().mean((1, 2, 3))
        return Loss(error.sum(), len(batch))

    def validate(self) -> dict[str, float]:
        """PSNR of the pictures that are learnt, in dB."""
        made = rendered(self.fit, self.shown)
        found = float(psnr(made, self.clip[self.shown], 1.0).mean())
        self.curve.append((float(self.steps), -found))
        return {"psnr_db": found}


def field(s: Fitting, width: int, height: int, across: int) -> nn.Module:
    """The part of a network that is sent, for padded pictures."""
    strides = strides_for(height, across)
    if s.content:
        return ContentField(Blocks(width, strides), s.embedding)
    grid = (height // math.prod(strides), across // math.prod(strides))
    return TimeField(Blocks(width, strides, 3, 3, 2.0), s.hidden, grid)


def fitted(
    clip: Tensor,
    settings: Fitting,
    total: int,
    shown: Tensor | None = None,
    report: Callable[[Progress], None] | None = None,
) -> tuple[Fit, list[tuple[float, float]]]:
    """Fit a network to pictures float [T, 3, H, W], padded: the network, and (steps, -dB)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        made = Fit(clip, settings, total)
    learner = Learner(made, settings, shown)
    steps = -(-len(learner.shown) // settings.batch_size) * settings.epochs
    plan = Plan(
        steps,
        optimizer="adam",
        learning_rate=settings.learning_rate,
        warmup_steps=steps // 10,
        clip_norm=0.0,
        validate_every=max(1, steps // 30),
        seed=settings.seed,
    )
    Trainer(learner, plan).run(report)
    return made.eval(), learner.curve


@torch.no_grad()
def rendered(made: Fit, frames: Tensor) -> Tensor:
    """Pictures of a fitted segment."""
    return torch.cat([made(part) for part in torch.split(frames, 16)])


@torch.no_grad()
def between(made: Fit, frames: Tensor) -> Tensor:
    """Pictures that were not learnt: from the mean of both neighbours' embeddings, or the time."""
    if not made.content:
        return rendered(made, frames)
    around = made.inputs(frames - 1) + made.inputs(frames + 1)
    out: Tensor = made.field(around / 2)
    return out


def padded_size(height: int, width: int) -> tuple[int, int]:
    """Sides that the strides of pictures of this size divide.

    Example:
        >>> padded_size(48, 64), padded_size(31, 36)  # 32 x 40 has a stride of 16 in all
        ((48, 64), (32, 48))
    """
    scale = math.prod(strides_for(height, width))
    size = height + -height % scale, width + -width % scale
    return size if size == (height, width) else padded_size(*size)


def padded(clip: Tensor) -> Tensor:
    """Pictures from 0 to 1 with repeated edges, so that the strides divide their sides."""
    height, width = clip.shape[2:]
    high, wide = padded_size(height, width)
    edge = (0, wide - width, 0, high - height)
    return F.pad(clip.float() / 255, edge, mode="replicate")
