"""A vision transformer that can leave patches out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from isthmus.errors import InvalidInputError
from isthmus.nn.attention import MultiHeadAttention
from isthmus.nn.feed_forward import FeedForward
from isthmus.nn.masking import Mask
from isthmus.nn.patches import PatchEmbed, grid_of, sincos2d


class Block(nn.Module):
    """Attention and a feed-forward layer, each behind its own norm and beside a shortcut.

    Args:
        width: Width D.
        heads: Attention heads; they must divide the width.
        hidden: Width of the feed-forward layer.

    Example:
        >>> Block(8, 2, 16)(torch.zeros(1, 3, 8)).shape
        torch.Size([1, 3, 8])
    """

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        if width % heads:
            raise InvalidInputError(f"{heads} heads do not divide a width of {width}")
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attention = MultiHeadAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.feed_forward = FeedForward(width, hidden, "gelu")

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, T, D] to tokens [B, T, D]."""
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.feed_forward(self.norm2(x))
        return out


def linear_init(module: nn.Module) -> None:
    """Xavier for every linear layer, zeros for its bias."""
    for m in module.modules():
        if isinstance(m, nn.Linear):
            nn.init.xavier_uniform_(m.weight)
            if m.bias is not None:
                nn.init.zeros_(m.bias)


class VisionTransformer(nn.Module):
    """Patches, fixed positions, a class token, blocks.

    Any size of picture that patches divide is read, since positions are a function of the grid.

    Args:
        width: Width D.
        layers: Blocks.
        heads: Attention heads.
        patch: Side of a patch.
        hidden: Width of the feed-forward layers, four times ``width`` when None.
        channels: Channels of the pictures.

    Example:
        >>> net = VisionTransformer(8, 1, 2, patch=4)
        >>> net(torch.zeros(2, 3, 8, 12)).shape  # a class token and six patches
        torch.Size([2, 7, 8])
    """

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        *,
        patch: int,
        hidden: int | None = None,
        channels: int = 3,
    ) -> None:
        super().__init__()
        self.width, self.patch = width, patch
        self.blocks = nn.ModuleList(
            [Block(width, heads, hidden or 4 * width) for _ in range(layers)]
        )
        linear_init(self)
        self.embed = PatchEmbed(channels, width, patch)
        self.class_token = nn.Parameter(torch.randn(width) * 0.02)
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(
        self, pictures: Tensor, mask: Mask | None = None, placeholder: Tensor | None = None
    ) -> Tensor:
        """Encode pictures.

        Args:
            pictures: [B, C, H, W].
            mask: Patches to leave out.
            placeholder: [D]; put in the place of patches that the mask drops, which then are not
                left out.

        Returns:
            [B, 1 + K, D], the class token first; [B, 1 + N, D] without a mask or with a
            placeholder.
        """
        grid = grid_of((pictures.shape[-2], pictures.shape[-1]), self.patch)
        positions = sincos2d(grid, self.width, axis_first="column").to(pictures)
        x = self.embed(pictures)
        if mask is not None and placeholder is not None:
            x = torch.where(mask.is_dropped[:, :, None], placeholder.to(x.dtype), x)
        x = x + positions
        if mask is not None and placeholder is None:
            x = mask.take(x)
        x = torch.cat([self.class_token.expand(len(x), 1, -1).to(x.dtype), x], 1)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.norm(x)
        return out
