"""A Transformer that sees a grid of codes from all sides and says what stands in its gaps.

::

    codes [B, N], gaps masked ─▶ embeddings + places ─▶ 3 x 3 around each ─▶ blocks ─▶ logits

It learns by cross-entropy at random gaps, of a share drawn evenly, as MaskGIT does (Chang et al.,
2022, arXiv 2202.04200). The convolution in front of the blocks tells each place what is around it:
attention alone takes hundreds of steps to find out which places are neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus.errors import InvalidInputError
from isthmus.models.vision_transformer import Block, linear_init
from isthmus.nn.patches import sincos2d


class MaskedGrid(nn.Module):
    """The model.

    Args:
        size: V, codes; the mask is one more.
        width: D, a multiple of 4 that heads divide.
        layers: Blocks.
        heads: Attention heads.

    Example:
        >>> net = MaskedGrid(5, 8, 1, 2)
        >>> net(torch.zeros(2, 6, dtype=torch.int64), (2, 3)).shape
        torch.Size([2, 6, 5])
    """

    def __init__(self, size: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.size, self.mask, self.width = size, size, width
        self.embed = nn.Embedding(size + 1, width)
        self.around = nn.Conv2d(width, width, 3, 1, 1)
        self.blocks = nn.ModuleList(Block(width, heads, 4 * width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, size)
        linear_init(self)
        nn.init.normal_(self.embed.weight, std=0.1)

    def forward(self, codes: Tensor, grid: tuple[int, int]) -> Tensor:
        """Logits [B, N, V] of codes int64 [B, N] in raster order on a grid; gaps are ``mask``."""
        x = self.embed(codes) + sincos2d(grid, self.width).to(codes.device)
        x = x + self.around(x.movedim(1, -1).unflatten(-1, grid)).flatten(2).movedim(1, -1)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(self.norm(x))
        return out

    def nats(self, codes: Tensor, grid: tuple[int, int], span: tuple[int, int]) -> Tensor:
        """Mean cross-entropy at random gaps; draws from torch's generator.

        Args:
            codes: int64 [B, N].
            grid: Rows and columns.
            span: Codes from the first number on and below the second are possible.
        """
        share = torch.rand(len(codes), 1, device=codes.device)
        noise = torch.rand(codes.shape, device=codes.device)
        gaps = (noise < share) | (noise == noise.amin(1, keepdim=True))  # one at least
        logits = self(codes.masked_fill(gaps, self.mask), grid)[gaps]
        return F.cross_entropy(logits[:, span[0] : span[1]], codes[gaps] - span[0])

    @torch.no_grad()
    def fill(
        self,
        codes: Tensor,
        gaps: Tensor,
        grid: tuple[int, int],
        span: tuple[int, int],
        rounds: int = 1,
    ) -> Tensor:
        """Codes with the likeliest ones in their gaps, the surest first.

        Args:
            codes: int64 [B, N]; what stands in a gap does not matter.
            gaps: Bool [B, N].
            grid: Rows and columns.
            span: Which codes are possible.
            rounds: Passes; each writes an equal share of what is open in every row.

        Raises:
            InvalidInputError: No pass.
        """
        if rounds < 1:
            raise InvalidInputError(f"gaps are filled in 1 pass or more, got {rounds}")
        count, open_ = gaps.sum(1, keepdim=True), gaps
        for left in range(rounds - 1, -1, -1):
            logits = self(codes.masked_fill(open_, self.mask), grid)[..., span[0] : span[1]]
            sure, choice = logits.log_softmax(-1).max(-1)
            sure = sure.masked_fill(~open_, -torch.inf)
            order = sure.argsort(dim=1, descending=True, stable=True)
            write = open_ & (order.argsort(1) < open_.sum(1, keepdim=True) - count * left // rounds)
            codes = torch.where(write, choice + span[0], codes)
            open_ = open_ & ~write
        return codes
