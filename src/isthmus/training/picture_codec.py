"""How a codec of pictures learns all its rates at once: each crop is rounded to steps of its own.

::

    crop, step D ─▶ y / D rounded ─▶ times D ─▶ x^     lambda(D) 255^2 MSE + bits / pixel

Where steps are fine, error is worth more: lambda falls with the square of the step, as the error of
rounding rises (R. Gray, D. Neuhoff, "Quantization", 1998). The last part of the training computes
the law of the latents on the grid of the whole numbers that will code.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from isthmus.errors import InvalidInputError
from isthmus.models.transform_codec import TransformCodec
from isthmus.roles import Loss
from isthmus.signals.image import Pictured
from isthmus.training.data import Data
from isthmus.training.loop import Plan
from isthmus.training.pictures import Pictures, drawn, scaled_crop


class PictureCodecLearner:
    """Crops of pictures, each with a step, and rate and distortion.

    Args:
        module: What learns.
        told: Settings; see :class:`isthmus.codecs.learned_image.Settings`.
        data: Pictures.
        plan: The training.

    Raises:
        InvalidInputError: Crops that do not fit the codec.
    """

    lower_is_better = True

    def __init__(self, module: TransformCodec, told: Any, data: Data[Pictured], plan: Plan) -> None:
        if told.side % module.multiple:
            raise InvalidInputError(
                f"crops have a side that {module.multiple} divides, not {told.side}; change side"
            )
        self.module: Any = module
        self.told, self.plan = told, plan
        self.train, self.valid = data.train, data.valid
        self.identity = {"settings": asdict(told), "data": data.fingerprint}
        self.pictures = Pictures(data.train)

    def batch(self, part: int) -> tuple[Tensor, Tensor, bool]:
        """Crops [B, 3, side, side] of 0 to 1, their steps [B, 1, 1, 1], and whether on the grid."""
        told = self.told
        rng = np.random.default_rng([self.plan.seed, part])
        rows = drawn(range(len(self.train)), told.batch_size, part, self.plan.seed)
        crops = [
            scaled_crop(self.pictures[row], None, told.side, told.scales, rng)[0] for row in rows
        ]
        turned = [crop.mT if rng.random() < 0.5 else crop for crop in crops]
        low, high = (math.log2(step) for step in told.steps)
        steps = torch.from_numpy(2 ** rng.uniform(low, high, len(rows))).float()
        done = part / (self.plan.steps * self.plan.accumulate)
        x = torch.stack(turned).float() / 255
        return x, steps[:, None, None, None], done >= 1 - told.grid

    def loss(self, batch: tuple[Tensor, Tensor, bool]) -> Loss:
        """Rate and distortion, summed over pixels; a crop counts by its step, as bits fall so."""
        x, steps, grid = batch
        out, bits = self.module(x, None, grid, steps)
        weight = steps.flatten()
        pixels = x.shape[-1] * x.shape[-2]
        error = (out - x).square().flatten(1).mean(1) * 255**2 * pixels
        total = ((self.told.trade / weight**2 * error + bits) * weight).sum()
        return Loss(total, len(x) * pixels, {"bits_per_pixel": bits.detach().sum()})

    def validate(self) -> dict[str, float]:
        """Rate and distortion of the middle of held-out pictures at step 1, as they are coded."""
        sums, side = torch.zeros(2, dtype=torch.float64), self.told.side
        for record in self.valid:
            whole = record.picture()
            top, left = (max(0, n - side) // 2 for n in whole.shape[1:])
            x = whole[None, :, top : top + side, left : left + side].float() / 255
            x = F.pad(x, (0, side - x.shape[3], 0, side - x.shape[2]), mode="replicate")
            out, bits = self.module(x)
            pixels = side * side
            sums += torch.tensor([float(F.mse_loss(out, x)), float(bits.sum()) / pixels])
        error, rate = (sums / max(1, len(self.valid))).tolist()
        loss = self.told.trade * 255**2 * error + rate
        psnr = -10 * math.log10(max(error, 1e-10))
        return {"loss": loss, "bits_per_pixel": rate, "psnr_db": psnr}
