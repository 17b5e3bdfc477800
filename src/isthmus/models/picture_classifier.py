"""A vision transformer whose class token is read by a linear map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput

from isthmus.models.vision_transformer import VisionTransformer
from isthmus.nn.masking import Mask


class PictureClassifier(nn.Module, PyTorchModelHubMixin):
    """Names what a picture shows; called like an image classifier of transformers.

    Args:
        names: Names of the classes C.
        width: Width D.
        layers: Blocks.
        heads: Attention heads.
        patch: Side of a patch.
        hidden: Width of the feed-forward layers.
        side: Side of the pictures that it is for.
        seed: Of the weights.

    Example:
        >>> net = PictureClassifier(["cat", "dog"], width=8, layers=1, heads=2, patch=4, side=8)
        >>> net(torch.zeros(3, 3, 8, 8)).logits.shape
        torch.Size([3, 2])
    """

    def __init__(
        self,
        names: Sequence[str],
        width: int,
        layers: int,
        heads: int,
        patch: int,
        side: int,
        hidden: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.names, self.side = list(names), side
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.encoder = VisionTransformer(width, layers, heads, patch=patch, hidden=hidden)
            self.head = nn.Linear(width, len(self.names))

    def forward(self, pixel_values: Tensor, mask: Mask | None = None) -> Any:
        """Logits [B, C] of pictures [B, 3, H, W], of which a mask may leave patches out."""
        tokens = self.encoder(pixel_values, mask)
        return ImageClassifierOutput(logits=self.head(tokens[:, 0]))


@dataclass(frozen=True)
class Eye:
    """A picture classifier with what it takes to show it a picture.

    Attributes:
        model: Takes ``pixel_values``, gives ``logits``.
        names: Its classes.
        side: Side of the pictures that it reads.
        mean: Of the channels, 0 to 1.
        spread: Likewise.
    """

    model: Any
    names: tuple[str, ...]
    side: int
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    spread: tuple[float, ...] = (0.25, 0.25, 0.25)

    def pixels(self, pictures: Tensor) -> Tensor:
        """What the model reads, of uint8 [B, 3, H, W]."""
        mean, spread = (torch.tensor(v)[:, None, None] for v in (self.mean, self.spread))
        return (pictures.float() / 255 - mean) / spread
