"""Masks over sequences of patches: which tokens are kept, which are hidden, and the way back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from isthmus.errors import InvalidInputError


@dataclass(frozen=True)
class Mask:
    """Which tokens of each row are kept.

    Attributes:
        order: Numbers of the kept tokens, then of the dropped ones, int64 [B, N].
        kept: How many are kept, K.

    Example:
        >>> mask = Mask(torch.tensor([[2, 0, 1]]), 1)
        >>> mask.is_dropped.tolist(), mask.restore.tolist()
        ([[True, True, False]], [[1, 2, 0]])
        >>> tokens = torch.tensor([[[10.0], [11.0], [12.0]]])
        >>> mask.fill(mask.take(tokens), torch.zeros(1))[0, :, 0].tolist()
        [0.0, 0.0, 12.0]
    """

    order: Tensor
    kept: int

    @property
    def keep_ids(self) -> Tensor:
        """Numbers of the kept tokens, int64 [B, K]."""
        return self.order[:, : self.kept]

    @property
    def drop_ids(self) -> Tensor:
        """Numbers of the dropped tokens, int64 [B, N - K]."""
        return self.order[:, self.kept :]

    @property
    def restore(self) -> Tensor:
        """Place of each token in ``order``, its inverse permutation, int64 [B, N]."""
        return self.order.argsort(1)

    @property
    def is_dropped(self) -> Tensor:
        """Bool [B, N]."""
        return self.restore >= self.kept

    def take(self, tokens: Tensor, which: Literal["keep", "drop"] = "keep") -> Tensor:
        """The kept or the dropped tokens of [B, N, D], in the order of ``order``."""
        ids = self.keep_ids if which == "keep" else self.drop_ids
        return tokens.gather(1, ids[:, :, None].expand(-1, -1, tokens.shape[2]))

    def fill(self, visible: Tensor, filling: Tensor) -> Tensor:
        """Put kept tokens [B, K, D] back in their places, and a vector [D] into all others."""
        batch, size = self.order.shape
        rest = filling.expand(batch, size - self.kept, -1).to(visible.dtype)
        whole = torch.cat([visible, rest], 1)
        return whole.gather(1, self.restore[:, :, None].expand(-1, -1, whole.shape[2]))


def mask_by_noise(noise: Tensor, kept: int) -> Mask:
    """Keep the tokens with the smallest noise.

    Args:
        noise: [B, N].
        kept: Tokens to keep, 1 to N.

    Raises:
        InvalidInputError: There are not so many.
    """
    if not 1 <= kept <= noise.shape[1]:
        raise InvalidInputError(f"keep 1 to {noise.shape[1]} tokens of each row, not {kept}")
    return Mask(noise.argsort(1), kept)


def random_mask(
    batch: int, tokens: int, kept: int, generator: torch.Generator | None = None
) -> Mask:
    """Keep random tokens, others in each row.

    Args:
        batch: Rows B.
        tokens: Tokens N of a row.
        kept: Tokens to keep.
        generator: Source of the draw; torch's own when None, as losses of a training loop do.

    Raises:
        InvalidInputError: There are not so many tokens.
    """
    return mask_by_noise(torch.rand(batch, tokens, generator=generator), kept)
