"""Exact bookkeeping: a vector of the residual stream as a sum over where it comes from.

::

    x[t] = sum_s parts[t, s]      s: a token of the input; one more where biases have a source

Linear maps, mixing by an observed pattern, norms with their observed scale and activations by a
line through the origin keep the sum; what each of them adds by itself (a bias) is shared among the
sources. So the sum can be compared with what the model computed, after every step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus.errors import InvalidInputError, UnknownNameError

Share = Literal["absdot", "norm", "equal", "first", "source"]
"""How a bias b is shared among parts x_s: by the size of x_s b, by the size of x_s, evenly among
those that are not 0, wholly to the first one (the class token), or to a source of its own."""

Bend = Literal["origin", "tangent"]
"""Which line stands for an activation: through the origin and the point, or its tangent there,
whose offset is shared like a bias."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda z: z,
    "gelu": F.gelu,
    "gelu-tanh": lambda z: F.gelu(z, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "quick-gelu": lambda z: z * torch.sigmoid(1.702 * z),
}
"""Activations that are told apart; all are 0 at 0."""


@dataclass(frozen=True)
class Decomposition:
    """Vectors as sums over sources.

    Attributes:
        values: Parts [B, T, S, D].
        share: How biases are shared; with ``"source"`` the last of the S sources is theirs.

    Example:
        >>> x = torch.tensor([[[1.0, 2.0], [3.0, 5.0]]])  # one text, two tokens
        >>> parts = Decomposition.of_tokens(x).linear(torch.eye(2), torch.tensor([1.0, 0.0]))
        >>> parts.values[0, 0].tolist(), parts.values[0, 1].tolist()
        ([[2.0, 2.0], [0.0, 0.0]], [[0.0, 0.0], [4.0, 5.0]])
        >>> parts.error(x + torch.tensor([1.0, 0.0]))
        0.0
    """

    values: Tensor
    share: Share = "absdot"

    @classmethod
    def of_tokens(cls, x: Tensor, share: Share = "absdot") -> Decomposition:
        """Every token is its own source.

        Args:
            x: [B, T, D].
            share: See :data:`Share`.

        Raises:
            UnknownNameError: No such way to share.
        """
        if share not in get_args(Share):
            raise UnknownNameError("way to share biases", share, list(get_args(Share)))
        values = torch.diag_embed(x.mT).permute(0, 2, 3, 1)  # [B, T, S, D]
        if share == "source":
            values = F.pad(values, (0, 0, 0, 1))
        return cls(values, share)

    def total(self) -> Tensor:
        """The sum over sources [B, T, D]."""
        return self.values.sum(2)

    def error(self, observed: Tensor) -> float:
        """Farthest that the sum is from a value [B, T, D], as a share of its largest entry."""
        return float((self.total() - observed).abs().max() / observed.abs().max().clamp(min=1e-30))

    def __add__(self, other: Decomposition) -> Decomposition:
        """Sums, source by source."""
        return replace(self, values=self.values + other.values)

    def plus(self, bias: Tensor | None) -> Decomposition:
        """Share what is added to the sum.

        Args:
            bias: [D] or [B, T, D]; None is nothing.
        """
        if bias is None:
            return self
        x = self.values
        b = torch.broadcast_to(bias, (*x.shape[:2], x.shape[-1]))
        if self.share == "absdot":
            weight = torch.einsum("btsd,btd->bts", x, b).abs()
        elif self.share == "norm":
            weight = x.norm(dim=-1)
        elif self.share == "equal":
            weight = (x != 0).any(-1).to(x)
        else:
            weight = torch.zeros_like(x[..., 0])
            weight[..., 0 if self.share == "first" else -1] = 1
        total = weight.sum(-1, keepdim=True)
        # No part points along the bias: all take the same of it.
        even = torch.full_like(weight, 1 / weight.shape[-1])
        weight = torch.where(total > 0, weight / total.clamp(min=1e-30), even)
        return replace(self, values=x + weight[..., None] * b[:, :, None])

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> Decomposition:
        """A linear map.

        Args:
            weight: [D, D'].
            bias: [D'].
        """
        return replace(self, values=self.values @ weight).plus(bias)

    def attend(self, pattern: Tensor, carried: Tensor, out: Tensor) -> Decomposition:
        """Attention by an observed pattern, without biases.

        Args:
            pattern: [B, H, T, K].
            carried: Values of the parts by head [B, K, S, H, d].
            out: By head [H, d, D].
        """
        mixed = torch.einsum("bhtk,bkshd->btshd", pattern, carried)
        return replace(self, values=torch.einsum("btshd,hde->btse", mixed, out))

    def norm(self, module: nn.Module, observed: Tensor) -> Decomposition:
        """A norm with the scale that it had on the sum.

        Args:
            module: LayerNorm or RMSNorm; see :func:`norm_scale`.
            observed: What it read [B, T, D].
        """
        scale, centred, weight, bias = norm_scale(module, observed)
        x = self.values
        if centred:
            x = x - x.mean(-1, keepdim=True)
        return replace(self, values=x * scale[:, :, None] * weight).plus(bias)

    def bend(self, activation: str, observed: Tensor, how: Bend = "origin") -> Decomposition:
        """An activation by a line for every unit.

        Args:
            activation: One of :data:`ACTIVATIONS`.
            observed: What it read [B, T, D].
            how: See :data:`Bend`.

        Raises:
            UnknownNameError: No such line.
        """
        if how not in get_args(Bend):
            raise UnknownNameError("line", how, list(get_args(Bend)))
        act = ACTIVATIONS[activation]
        if how == "origin":
            flat = observed.abs() < torch.finfo(observed.dtype).tiny  # the limit, and no 0 / 0
            slope = act(observed) / torch.where(flat, 1, observed)
            slope = torch.where(flat, _slope(act, torch.zeros_like(observed)), slope)
            return replace(self, values=self.values * slope[:, :, None])
        slope = _slope(act, observed)
        offset = act(observed) - slope * observed
        return replace(self, values=self.values * slope[:, :, None]).plus(offset)

    def take(self, place: str) -> Decomposition:
        """Of one position, or the mean of all: [B, 1, S, D].

        Args:
            place: ``"all"`` positions as they are, the ``"first"``, the ``"last"``, or their
                ``"mean"``.
        """
        return replace(self, values=POOLS[place](self.values))


POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "all": lambda x: x,
    "first": lambda x: x[:, :1],
    "last": lambda x: x[:, -1:],
    "mean": lambda x: x.mean(1, keepdim=True),
}
"""Ways to read a sequence [B, T, ...]."""


def norm_scale(module: nn.Module, x: Tensor) -> tuple[Tensor, bool, Tensor, Tensor | None]:
    """What a norm does to a value [B, T, D], as a factor a token.

    Returns:
        The factor [B, T, 1], whether the mean is taken off before, gain [D] and bias [D] or None.

    Raises:
        InvalidInputError: It is neither LayerNorm nor RMSNorm, by its own output on the value.
    """
    eps = getattr(module, "eps", getattr(module, "variance_epsilon", None)) or 0.0
    gain, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    gain = torch.ones_like(x[0, 0]) if gain is None else gain.detach().to(x)
    bias = None if bias is None else bias.detach()
    with torch.no_grad():
        wanted = module(x)
    if gain.ndim != 1 or wanted.shape != x.shape:
        raise InvalidInputError(f"{type(module).__name__} is neither LayerNorm nor RMSNorm")
    for centred in (True, False):
        c = x - x.mean(-1, keepdim=True) if centred else x
        scale = (c.square().mean(-1, keepdim=True) + eps).rsqrt()
        for weight in (gain, 1 + gain):  # some models keep the gain less 1
            told = c * scale * weight
            told = told if bias is None else told + bias
            if float((told - wanted).abs().max()) <= 1e-4 * float(wanted.abs().max()):
                return scale, centred, weight, bias
    raise InvalidInputError(f"{type(module).__name__} is neither LayerNorm nor RMSNorm")


def _slope(act: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    with torch.enable_grad():
        at = z.detach().requires_grad_()
        (slope,) = torch.autograd.grad(act(at).sum(), at)
    return slope
