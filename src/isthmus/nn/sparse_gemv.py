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

import torch
import torch.nn.functional as F
from torch import nn

from isthmus.errors import InvalidInputError

MOST = 0.75
"""Share of inputs above which one vector takes the dense product, too."""


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
    def of(cls, linear: nn.Linear, *, most: float = MOST) -> SparseLinear:
        """The same layer with weights of its own."""
        with torch.device("meta"):
            made = cls(linear.in_features, linear.out_features, linear.bias is not None, most=most)
        grad = linear.weight.requires_grad
        weight = linear.weight.detach().mT.clone(memory_format=torch.contiguous_format)
        made.transposed = nn.Parameter(weight, requires_grad=grad)
        if linear.bias is not None:
            made.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=grad)
        return made.train(linear.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [..., C] to [..., R]."""
        # the sparse product has a gradient, but what is learnt from a batch is not sparse
        if x.numel() == self.in_features and not torch.is_grad_enabled():
            flat = x.reshape(-1)
            if int(torch.count_nonzero(flat)) <= self.most * self.in_features:
                y = sparse_gemv(flat, self.transposed, self.bias)
                return y.view(*x.shape[:-1], self.out_features)
        return F.linear(x, self.transposed.mT, self.bias)

    def extra_repr(self) -> str:
        """Its sizes."""
        return f"in_features={self.in_features}, out_features={self.out_features}, most={self.most}"
