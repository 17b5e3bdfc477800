"""Masked image modelling: encode what is visible, predict what is hidden.

::

    pictures ──mask──▶ encoder ──▶ tokens ──▶ predictor ──▶ predictions  ┐
        └────────────▶ target ─────────────────────────────▶ targets     ┴─▶ loss of hidden patches
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from isthmus.errors import InvalidInputError
from isthmus.models.vision_transformer import Block, VisionTransformer, linear_init
from isthmus.nn.masking import Mask
from isthmus.nn.patches import grid_of, patchify, sincos2d, unpatchify


@dataclass(frozen=True)
class PixelTarget:
    """The pixels of each patch.

    Attributes:
        patch: Side of a patch.
        norm: Whether each patch is brought to mean 0 and variance 1 by its own pixels.
        eps: Added to the variance.

    Example:
        >>> target = PixelTarget(1, norm=True)(torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1))
        >>> [round(v, 3) for v in target.flatten().tolist()]  # the unbiased variance is 1
        [-1.0, 0.0, 1.0]
    """

    patch: int
    norm: bool = True
    eps: float = 1e-6

    def __call__(self, pictures: Tensor) -> Tensor:
        """Pictures [B, C, H, W] to targets [B, N, values of a patch]."""
        x = patchify(pictures, self.patch)
        if not self.norm:
            return x
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + self.eps).sqrt()


class PixelDecoder(nn.Module):
    """A small transformer over visible tokens and mask tokens, with a linear layer to pixels.

    Args:
        inputs: Width of the encoder's tokens.
        width: Its own width.
        layers: Blocks.
        heads: Attention heads.
        outputs: Values of a patch.
        hidden: Width of the feed-forward layers, four times ``width`` when None.
    """

    def __init__(
        self,
        inputs: int,
        width: int,
        layers: int,
        heads: int,
        outputs: int,
        *,
        hidden: int | None = None,
    ) -> None:
        super().__init__()
        self.width = width
        self.embed = nn.Linear(inputs, width)
        self.blocks = nn.ModuleList(
            [Block(width, heads, hidden or 4 * width) for _ in range(layers)]
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.predict = nn.Linear(width, outputs)
        linear_init(self)
        self.mask_token = nn.Parameter(torch.randn(width) * 0.02)

    def forward(self, tokens: Tensor, mask: Mask, grid: tuple[int, int]) -> Tensor:
        """Predict every patch.

        Args:
            tokens: The encoder's, [B, 1 + K, D] or [B, 1 + N, D], the class token first.
            mask: What the encoder has seen.
            grid: Rows and columns of patches.

        Returns:
            [B, N, values of a patch].
        """
        x = self.embed(tokens)
        lead, rest = x[:, :1], x[:, 1:]
        if rest.shape[1] < mask.order.shape[1]:
            rest = mask.fill(rest, self.mask_token)
        x = torch.cat([lead, rest], 1)
        x = x + sincos2d(grid, self.width, class_token=True, axis_first="column").to(x)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.predict(self.norm(x[:, 1:]))
        return out


class MaskedImageModel(nn.Module):
    """Encoder, predictor and target.

    Args:
        encoder: Reads pictures and a mask.
        predictor: Turns its tokens into a prediction for each patch.
        target: What is to be predicted.
        placeholder: Whether the encoder reads a mask token in each hidden place, as BEiT and
            SimMIM do, rather than the visible patches alone.

    Attributes:
        placeholder: That token [D], or None.
    """

    def __init__(
        self,
        encoder: VisionTransformer,
        predictor: PixelDecoder,
        target: Callable[[Tensor], Tensor],
        *,
        placeholder: bool = False,
    ) -> None:
        super().__init__()
        self.encoder, self.predictor, self.target = encoder, predictor, target
        self.placeholder = nn.Parameter(torch.randn(encoder.width) * 0.02) if placeholder else None

    def forward(self, pictures: Tensor, mask: Mask) -> Tensor:
        """Predictions for all patches, [B, N, values of a patch]."""
        grid = grid_of((pictures.shape[-2], pictures.shape[-1]), self.encoder.patch)
        tokens = self.encoder(pictures, mask, self.placeholder)
        out: Tensor = self.predictor(tokens, mask, grid)
        return out

    def errors(self, pictures: Tensor, predicted: Tensor) -> Tensor:
        """Mean squared error of each patch, [B, N]; who takes the mean picks the hidden ones."""
        return (predicted.float() - self.target(pictures)).square().mean(-1)


def painted(
    pictures: Tensor, predicted: Tensor, mask: Mask, target: PixelTarget, *, leak: bool = False
) -> Tensor:
    """Pictures with the hidden patches as they were predicted.

    Args:
        pictures: [B, C, H, W].
        predicted: Predictions [B, N, values of a patch].
        mask: What was hidden.
        target: What was predicted.
        leak: Where patches were normalised: use mean and variance of the *true* hidden patches,
            which a model does not know. Such a picture looks better than the model is.

    Returns:
        [B, C, H, W].

    Raises:
        InvalidInputError: Patches were normalised, and ``leak`` is not set.
    """
    true = patchify(pictures, target.patch)
    if target.norm:
        if not leak:
            raise InvalidInputError(
                "the target is normalised per patch, so a picture would need the mean and variance "
                "of the hidden patches; say leak=True to use them, or train with norm off"
            )
        spread = (true.var(-1, keepdim=True) + target.eps).sqrt()
        predicted = predicted * spread + true.mean(-1, keepdim=True)
    whole = torch.where(mask.is_dropped[:, :, None], predicted, true)
    grid = grid_of((pictures.shape[-2], pictures.shape[-1]), target.patch)
    return unpatchify(whole, grid, target.patch)
