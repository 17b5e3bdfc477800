"""How a codec of moving pictures learns: pictures first, then what one says of the next.

::

    a share of the steps   single pictures      lambda 255^2 MSE + bits / pixel
    the rest               whole clips          bits / pixel, given the latents before (rounded)
      its last part        the same             on the grid of the whole numbers that will code
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from isthmus.errors import InvalidInputError
from isthmus.models.transform_codec import TransformCodec, rate_distortion
from isthmus.nn.whole_net import rounded
from isthmus.roles import Loss
from isthmus.signals.clips import Moving
from isthmus.training.data import Data
from isthmus.training.loop import Plan
from isthmus.training.pictures import drawn
from isthmus.training.seeds import batch_generator

PICTURES, CLIPS, GRID = 0, 1, 2
"""Stages."""


class Told(Protocol):
    """Settings that the learner reads; see ``stem-video``."""

    temporal: bool
    frozen: bool
    trade: float
    frames: int
    side: int
    batch_size: int
    pictures: float
    grid: float


def pasts(y: Tensor) -> Tensor:
    """The two latents before each of a clip, the latest first; zeros where none are.

    Args:
        y: Whole numbers [B, T, M, h, w].

    Returns:
        [B, T, 2M, h, w].

    Example:
        >>> pasts(torch.tensor([3.0, 5.0, 7.0]).view(1, 3, 1, 1, 1)).flatten(1).tolist()
        [[0.0, 0.0, 3.0, 0.0, 5.0, 3.0]]
    """
    one = F.pad(y, (0, 0, 0, 0, 0, 0, 1, 0))[:, :-1]
    return torch.cat([one, F.pad(one, (0, 0, 0, 0, 0, 0, 1, 0))[:, :-1]], 2)


class ClipCodec(TransformCodec):
    """A transform codec over clips: all pictures alike, and latents that tell of later ones."""

    def clips(
        self, x: Tensor, told: Told, stage: int = GRID, y: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Pictures of clips [B, T, C, H, W] and their bits [B, T].

        Args:
            x: Clips of 0 to 1; single pictures while pictures are learnt.
            told: Settings.
            stage: Of the training.
            y: Latents [B, T, M, h, w], where they are known.
        """
        batch, length = x.shape[:2]
        flat = x.flatten(0, 1)
        still = told.frozen and stage != PICTURES
        with torch.set_grad_enabled(torch.is_grad_enabled() and not still):
            y = self.g_a(flat - 0.5) if y is None else y.flatten(0, 1)
            out = flat if still and self.training else self.g_s(rounded(y)) + 0.5
        past = self.law.no_past(y)
        if told.temporal and stage != PICTURES:
            before = y.detach().round().unflatten(0, (batch, length))
            past = pasts(before).flatten(0, 1)
        _, y_bits, z_bits = self.law(y, past, stage == GRID)
        bits = y_bits.flatten(1).sum(1) + z_bits.flatten(1).sum(1)
        return out.view(x.shape), bits.view(batch, length)

    def forward(
        self, x: Tensor, told: Any = None, stage: Any = GRID, y: Any = None
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`clips`."""
        return self.clips(x, told, stage, y)


class ClipLearner:
    """Crops of clips, and rate and distortion.

    Args:
        module: What learns.
        told: Settings.
        data: Clips.
        plan: The training.

    Raises:
        InvalidInputError: Crops that do not fit the codec.
    """

    lower_is_better = True

    def __init__(self, module: ClipCodec, told: Any, data: Data[Moving], plan: Plan) -> None:
        if told.side % module.multiple or told.frames < 3:
            raise InvalidInputError(
                f"crops have a side that {module.multiple} divides and 3 frames or more, not "
                f"{told.side} and {told.frames}; change side and frames"
            )
        self.module: Any = module
        self.told, self.plan = told, plan
        self.train, self.valid = data.train, data.valid
        self.identity = {"settings": asdict(told), "data": data.fingerprint}
        self._seen: dict[int, Tensor] = {}
        self._known: dict[int, Tensor] = {}

    def stage(self, part: int) -> int:
        """What a micro-batch teaches."""
        done = part / (self.plan.steps * self.plan.accumulate)
        if done < self.told.pictures:
            return PICTURES
        return GRID if done >= 1 - self.told.grid else CLIPS

    def batch(self, part: int) -> tuple[Tensor, int, Tensor | None]:
        """Crops of 0 to 1, the stage, and the latents of the crops where they are known.

        Crops are [B, T, C, side, side]; T is 1 and B larger while pictures are learnt. Latents that
        no longer change, of clips that are not cut to the side, are made once.
        """
        stage, told = self.stage(part), self.told
        few = stage == PICTURES
        count, length = (2 * told.batch_size, 1) if few else (told.batch_size, told.frames)
        rows = drawn(range(len(self.train)), count, part, self.plan.seed)
        generator = batch_generator(self.plan.seed, part)
        clips = [self._frames(row) for row in rows]
        places = [self._place(frames, length, generator) for frames in clips]
        crops = [frames[place] for frames, place in zip(clips, places, strict=True)]
        whole = all(frames.shape[2:] == (told.side, told.side) for frames in clips)
        y = None
        if told.frozen and not few and whole:
            each = [self._latents(row)[p[0]] for row, p in zip(rows, places, strict=True)]
            y = torch.stack(each)
        return torch.stack(crops).float() / 255, stage, y

    @torch.no_grad()
    def _latents(self, row: int) -> Tensor:
        if row not in self._known:
            x = self._frames(row).float().to(next(self.module.parameters()).device) / 255
            self._known[row] = self.module.g_a(x - 0.5).cpu()
        return self._known[row]

    def _frames(self, row: int) -> Tensor:
        if row not in self._seen:
            frames = self.train[row].frames()
            if len(frames) < self.told.frames or min(frames.shape[2:]) < self.told.side:
                raise InvalidInputError(
                    f"{self.train[row]!r:.80} has {len(frames)} pictures of {frames.shape[2]} by "
                    f"{frames.shape[3]}; {self.told.frames} of {self.told.side} by "
                    f"{self.told.side} are learnt from (settings frames and side)"
                )
            self._seen[row] = frames
        return self._seen[row]

    def _place(
        self, frames: Tensor, length: int, generator: torch.Generator
    ) -> tuple[slice, slice, slice, slice]:
        """Where in a clip a crop is taken."""
        side = self.told.side
        sizes = zip((len(frames), *frames.shape[2:]), (length, side, side), strict=True)
        firsts = [
            (int(torch.randint(n - wanted + 1, (1,), generator=generator)), wanted)
            for n, wanted in sizes
        ]
        t, y, x = (slice(first, first + wanted) for first, wanted in firsts)
        return t, slice(None), y, x

    def loss(self, batch: tuple[Tensor, int, Tensor | None]) -> Loss:
        """Rate and distortion, summed over pixels."""
        x, stage, y = batch
        out, bits = self.module(x, self.told, stage, y)
        flat, back = x.flatten(0, 1), out.flatten(0, 1)
        total = rate_distortion(flat, back, bits.flatten(), self.told.trade)
        pixels = len(flat) * flat.shape[-1] * flat.shape[-2]
        told = {"bits_per_pixel": bits.detach().sum()}
        return Loss(total, pixels, told)

    def validate(self) -> dict[str, float]:
        """Rate and distortion of held-out clips, as they will be coded."""
        sums = torch.zeros(3, dtype=torch.float64)
        draw = torch.Generator().manual_seed(0)
        for record in self.valid:
            frames = record.frames()
            x = frames[self._place(frames, self.told.frames, draw)][None].float() / 255
            out, bits = self.module(x, self.told, GRID)
            flat = x.flatten(0, 1)
            error = F.mse_loss(out.flatten(0, 1), flat)
            pixels = flat[:, 0].numel()
            sums += torch.tensor([float(error) * pixels, float(bits.sum()), pixels])
        error, rate = (sums[:2] / sums[2]).tolist()
        loss = self.told.trade * 255**2 * error + rate
        psnr = -10 * math.log10(max(error, 1e-10))
        return {"loss": loss, "bits_per_pixel": rate, "psnr_db": psnr}
