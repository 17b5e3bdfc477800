"""A linear layer that reads only the weights of inputs that are not zero.

::

    x  0 .3 0 0 -2 0      W^T row 1, row 4 ──> y = .3 W^T[1] - 2 W^T[4] + b

One input vector with many zeros needs few columns of W [R, C]. Kept transposed, W^T [C, R], each
column is a contiguous row, and a bag of embeddings with weights is the sum that is wanted: one
pass over the rows that count and nothing copied. (Selecting rows first and multiplying then copies
them, which is many times slower than the whole product.)

Several vectors share few zeros, so a batch takes the dense product with the same weight.
"""

from __future__ import annotations

from typing import Self

import torch
import torch.nn.functional as F
from torch import nn

from isthmus.errors import InvalidInputError

MOST = 0.6
"""Share of inputs above which one vector takes the dense product, too: it is as fast there."""


def sparse_gemv(
    x: torch.Tensor, transposed: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """``W x + b`` for one vector, reading only the rows of W^T whose input is not zero.

    Args:
        x: [C].
        transposed: W^T [C, R], contiguous.
        bias: [R].

    Returns:
        [R].

    Example:
        >>> wt = torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]])
        >>> sparse_gemv(torch.tensor([2.0, 0.0, -1.0]), wt, torch.tensor([0.5, 0.5])).tolist()
        [-0.5, -9.5]
    """
    at = x.nonzero().squeeze(-1)
    if not len(at):
        y = transposed.new_zeros(transposed.shape[1])
    else:
        y = F.embedding_bag(at[None], transposed, mode="sum", per_sample_weights=x[at][None])[0]
    return y if bias is None else y + bias


class SparseLinear(nn.Module):
    """A linear layer for inputs with zeros; the weight is kept transposed.

    A single vector whose zeros are worth it goes through :func:`sparse_gemv`, anything else
    through the dense product.

    Args:
        in_features: Inputs C.
        out_features: Outputs R.
        bias: Whether there is a bias.
        most: Share of inputs that are not zero up to which the sparse product is taken.

    Raises:
        InvalidInputError: ``most`` is not within 0 and 1.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, most: float = MOST
    ) -> None:
        super().__init__()
        if not 0 <= most <= 1:
            raise InvalidInputError(f"most must be from 0 to 1, got {most}")
        self.in_features, self.out_features, self.most = in_features, out_features, most
        self.transposed = nn.Parameter(torch.empty(in_features, out_features))
        nn.init.normal_(self.transposed, std=in_features**-0.5)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    @classmethod
    def of(cls, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Self:
        """A layer with copies of a weight [R, C] and a bias [R]."""
        with torch.device("meta"):
            made = cls(weight.shape[1], weight.shape[0], bias is not None)
        copied = weight.detach().mT.clone(memory_format=torch.contiguous_format)
        made.transposed = nn.Parameter(copied, requires_grad=weight.requires_grad)
        if bias is not None:
            made.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
        return made

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [..., C] to [..., R]."""
        return self.product(x, self.bias)

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The same with another bias."""
        # a gradient reads everything again, and a GPU must be waited for to count zeros
        if x.numel() == self.in_features and x.device.type == "cpu" and not torch.is_grad_enabled():
            flat = x.reshape(-1)
            if int(torch.count_nonzero(flat)) <= self.most * self.in_features:
                y = sparse_gemv(flat, self.transposed, bias)
                return y.view(*x.shape[:-1], self.out_features)
        return F.linear(x, self.transposed.mT, bias)

    def extra_repr(self) -> str:
        """Its sizes."""
        return f"in_features={self.in_features}, out_features={self.out_features}, most={self.most}"


class ThresholdedLinear(SparseLinear):
    """A linear layer that takes inputs near a mode for the mode itself.

    ``y = W s(x - mu) + (b + mu W 1)`` with s(v) = v where its size is above tau and 0 elsewhere:
    the shift costs nothing, and what is near mu is skipped.

    Args:
        in_features: Inputs C.
        out_features: Outputs R.
        bias: Whether there is a bias.

    Example:
        >>> layer = ThresholdedLinear.of(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        >>> layer.set(1.0, 0.5)
        >>> layer(torch.tensor([1.2, 5.0])).tolist()  # as if the first input were 1
        [11.0, 23.0]
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)
        self.mode, self.threshold = 0.0, 0.0
        self.register_buffer("folded", None, persistent=False)
        self.folded: torch.Tensor | None

    def set(self, mode: float, threshold: float) -> None:
        """Choose mu and tau.

        Raises:
            InvalidInputError: The threshold is negative.
        """
        if threshold < 0:
            raise InvalidInputError(f"a threshold must be 0 or more, got {threshold}")
        self.mode, self.threshold = mode, threshold
        with torch.no_grad():
            shift = mode * self.transposed.sum(0)
            self.folded = shift if self.bias is None else shift + self.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [..., C] to [..., R]."""
        centred = F.hardshrink(x - self.mode if self.mode else x, self.threshold)
        return self.product(centred, self.folded if self.mode else self.bias)

    def extra_repr(self) -> str:
        """Sizes, mode and threshold."""
        return f"{super().extra_repr()}, mode={self.mode:.4g}, threshold={self.threshold:.4g}"
