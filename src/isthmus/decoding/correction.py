"""The DeCo reshape: the most confident middle layer corrects what the last layer finds likely."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from isthmus.decoding.contrast import behind
from isthmus.decoding.early_logits import EarlyLogits
from isthmus.decoding.reshape import Pure
from isthmus.decoding.target import HubTarget
from isthmus.decoding.tree import TokenTree
from isthmus.errors import InvalidInputError
from isthmus.roles import Context


def candidates(logits: torch.Tensor, top_p: float, top_k: int) -> torch.Tensor:
    """The smallest set of likeliest tokens with that much probability, at most k, bool [..., V].

    Example:
        >>> candidates(torch.tensor([0.5, 0.3, 0.15, 0.05]).log(), 0.7, 3).tolist()
        [True, True, False, False]
    """
    values, index = torch.softmax(logits, -1).topk(min(top_k, logits.shape[-1]), dim=-1)
    inside = values.cumsum(-1) - values < top_p
    return torch.zeros_like(logits, dtype=torch.bool).scatter(-1, index, inside)


class Correction(Pure):
    """Mix the most confident middle layer into the last one (Wang et al. 2024, 2410.11779).

    Drafts go with it, for its law at a node needs nothing else than the states there.

    Args:
        target: The model.
        alpha: How much of the middle layer is mixed in.
        top_p: Probability of the candidates.
        top_k: Candidates at most.
        low: First middle layer, as a share of the depth.
        high: Last middle layer.
        layers: Middle layers, instead of those between ``low`` and ``high``.

    Attributes:
        anchors: Layer A of every node in the last call, int64 [B, N].

    Raises:
        InvalidInputError: A setting out of range, or no layer between ``low`` and ``high``.
        UnsupportedModelError: The model's early layers cannot be read.
    """

    def __init__(
        self,
        target: HubTarget,
        alpha: float = 0.6,
        top_p: float = 0.9,
        top_k: int = 20,
        low: float = 0.625,
        high: float = 0.875,
        layers: Sequence[int] | None = None,
    ) -> None:
        if not (0 < top_p <= 1 and top_k >= 1 and 0 <= low <= high <= 1):
            raise InvalidInputError(
                "deco needs 0 < top_p <= 1, top_k >= 1 and 0 <= low <= high <= 1, got "
                f"{top_p}, {top_k}, {low}, {high}"
            )
        count = target.num_layers
        if layers is None:
            layers = range(round(low * count), min(round(high * count), count - 1) + 1)
        if not layers:
            raise InvalidInputError(
                f"no layer of {count} lies between {low} and {high} of the depth; "
                "widen low and high"
            )
        self.alpha, self.top_p, self.top_k = alpha, top_p, top_k
        self.early = EarlyLogits(target, layers)
        self.taps = self.early.taps
        self.anchors: torch.Tensor | None = None

    def __call__(self, logits: torch.Tensor, tree: TokenTree, context: Context) -> torch.Tensor:
        """See :class:`isthmus.roles.Reshape`."""
        assert context.features is not None
        early = self.early(context.features).to(logits)  # [B, N, J, V]
        among = candidates(logits, self.top_p, self.top_k)
        sure = torch.softmax(early, -1).masked_fill(~among[:, :, None], 0.0).amax(-1)
        most, best = sure.max(-1)  # [B, N]
        self.anchors = torch.tensor(self.early.layers, device=best.device)[best]
        anchor = early.gather(2, best[..., None, None].expand(-1, -1, 1, early.shape[-1]))
        mixed = logits + self.alpha * most[..., None] * anchor[:, :, 0]
        return behind(mixed.masked_fill(~among, -torch.inf), logits)
