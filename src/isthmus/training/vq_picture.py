"""How a vector-quantized codec of pictures learns: whole first, then what is behind the encoder.

::

    a share of the steps   encoder, codebook, decoder         L1, features, adversary, commitment
    the rest               book and decoder of one level in turn; models of codes

All levels take equal turns, or else the codes of a small book could cost more than those of a large
one whose model has learnt for longer. The model that fills gaps learns the whole codebook in every
second step: gaps in that one are the hardest to fill.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Protocol

import torch
from torch import Tensor

from isthmus.errors import InvalidInputError
from isthmus.models.vqgan import VQGAN
from isthmus.roles import Loss
from isthmus.signals.image import Pictured
from isthmus.training.data import Data
from isthmus.training.loop import Plan
from isthmus.training.pictures import Pictures, drawn
from isthmus.training.seeds import batch_generator


class Told(Protocol):
    """Settings that the learner reads; see ``vqgan-compression``."""

    @property
    def sizes(self) -> Sequence[int]: ...  # noqa: D102
    @property
    def side(self) -> int: ...  # noqa: D102
    @property
    def batch_size(self) -> int: ...  # noqa: D102
    @property
    def whole(self) -> float: ...  # noqa: D102
    @property
    def quantised_from(self) -> float: ...  # noqa: D102
    @property
    def judged_from(self) -> float: ...  # noqa: D102


class VQPictureLearner:
    """Crops of pictures, and the loss of :class:`~isthmus.models.vqgan.VQGAN`.

    Args:
        module: What learns.
        told: Settings.
        data: Pictures.
        plan: The training.
    """

    lower_is_better = True

    def __init__(self, module: VQGAN, told: Told, data: Data[Pictured], plan: Plan) -> None:
        self.module: Any = module
        self.net, self.told, self.plan = module, told, plan
        self.train, self.valid = data.train, data.valid
        self.identity = {"settings": asdict(told), "data": data.fingerprint}  # type: ignore[call-overload]
        self.pictures = Pictures(data.train)

    def batch(self, part: int) -> tuple[Tensor, int, dict[str, Any]]:
        """Crops of 0 to 1, [B, 3, side, side], the level that learns, and what else counts."""
        s, done = self.told, part / (self.plan.steps * self.plan.accumulate)
        rows = drawn(range(len(self.train)), s.batch_size, part, self.plan.seed)
        draw = batch_generator(self.plan.seed, part)
        crops = [self._crop(self._picture(row), draw) for row in rows]
        whole = done < s.whole
        how: dict[str, Any] = {"whole": whole, "judged": done >= s.judged_from}
        how["quantised"] = not whole or done >= s.quantised_from
        level = part // 2 % len(s.sizes)
        how["gaps"] = level * (part % 2)
        return torch.stack(crops).float() / 255, level, how

    def _picture(self, row: int) -> Tensor:
        picture = self.pictures[row]
        if min(picture.shape[1:]) < self.told.side:
            raise InvalidInputError(
                f"{self.train[row]!r:.80} is {picture.shape[1]} by {picture.shape[2]}; crops "
                f"of {self.told.side} are learnt from (setting side)"
            )
        return picture

    def _crop(self, picture: Tensor, draw: torch.Generator) -> Tensor:
        side = self.told.side
        y, x = (int(torch.randint(n - side + 1, (), generator=draw)) for n in picture.shape[1:])
        crop = picture[:, y : y + side, x : x + side]
        return crop.flip(2) if int(torch.randint(2, (), generator=draw)) else crop

    def loss(self, batch: tuple[Tensor, int, dict[str, Any]]) -> Loss:
        """Of one batch."""
        x, level, how = batch
        total, told = self.module(x, level, **how)
        return Loss(total, 1.0, dict(told))

    def validate(self) -> dict[str, float]:
        """Error of held-out pictures over all levels, PSNR of the first, and bits of its codes."""
        net, draw = self.net, torch.Generator().manual_seed(0)
        pictures = [record.picture() for record in self.valid]
        fitting = [p for p in pictures if min(p.shape[1:]) >= self.told.side]
        if not fitting:
            raise InvalidInputError(f"no held-out picture has {self.told.side} pixels a side")
        x = torch.stack([self._crop(p, draw) for p in fitting]).float() / 255
        errors = []
        for level in range(len(net.sizes) if net.begun else 1):
            codes = net.codes(x, level)
            errors.append(float((net.pictures(codes, level).clamp(0, 1) - x).square().mean()))
        codes = net.codes(x, 0)
        bits = float(net.lm.nats(codes.flatten(1)[None]).mean()) / math.log(2)
        psnr = -10 * math.log10(max(errors[0], 1e-10))
        return {"error": sum(errors) / len(errors), "psnr_db": psnr, "bits_per_code": bits}
