"""DoLa: contrast the last layer with the earlier one that differs most from it.

Chuang et al., "DoLa: Decoding by Contrasting Layers Improves Factuality in Large Language Models",
2309.03883. The earlier ("premature") layer is chosen at every token of every row by the largest
Jensen-Shannon divergence; transformers' former version chose one for a whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from isthmus.decoding.contrast import contrast
from isthmus.decoding.early_logits import EarlyLogits
from isthmus.decoding.reshape import Pure
from isthmus.decoding.target import HubTarget
from isthmus.decoding.tree import TokenTree
from isthmus.errors import InvalidInputError
from isthmus.roles import Context


def divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """Jensen-Shannon divergence in nats of log-probabilities [..., V].

    Example:
        >>> one, other = torch.tensor([1.0, 0.0]).log(), torch.tensor([0.0, 1.0]).log()
        >>> round(float(divergence(one, other)), 6)  # ln 2
        0.693147
    """
    p, q = log_p.exp(), log_q.exp()
    middle = ((p + q) / 2).log()

    def against(x: torch.Tensor, log_x: torch.Tensor) -> torch.Tensor:
        return torch.where(x > 0, x * (log_x - middle), 0.0).sum(-1)

    return (against(p, log_p) + against(q, log_q)) / 2


def candidate_layers(layers: Literal["low", "high"] | Sequence[int], count: int) -> list[int]:
    """Every second layer of the lower or upper half, or those given.

    Args:
        layers: Which.
        count: Decoder layers L.

    Raises:
        InvalidInputError: The last layer is among them (it has no contrast with itself), or one
            that does not exist.

    Example:
        >>> candidate_layers("low", 8), candidate_layers("high", 8)
        ([0, 2], [4, 6])
    """
    if isinstance(layers, str):
        if layers not in ("low", "high"):
            raise InvalidInputError(f"layers must be low, high or numbers, got {layers!r}")
        half = count // 2
        return list(range(0, half, 2)) if layers == "low" else list(range(half, count, 2))
    if not layers or min(layers) < 0 or max(layers) >= count:
        raise InvalidInputError(
            f"layers must be numbers from 0 to {count - 1}, below the last layer {count}, which "
            f"has no contrast with itself; got {list(layers)}"
        )
    return list(layers)


class DoLa(Pure):
    """The law ``log q_L - log q_M`` on the tokens that the last layer finds plausible.

    Args:
        target: The model.
        layers: Candidates for M; see :func:`candidate_layers`.
        plausibility: alpha: tokens below this share of the best one's probability are out.
        norm: Apply the final norm to early states; the authors' code does not.

    Attributes:
        chosen: Layer M of every node in the last call, int64 [B, N].

    Raises:
        InvalidInputError: Bad layers.
        UnsupportedModelError: The model's early layers cannot be read.
    """

    def __init__(
        self,
        target: HubTarget,
        layers: Literal["low", "high"] | Sequence[int] = "high",
        *,
        plausibility: float = 0.1,
        norm: bool = False,
    ) -> None:
        if not 0.0 <= plausibility <= 1.0:
            raise InvalidInputError(f"plausibility must be within 0 and 1, got {plausibility}")
        self.early = EarlyLogits(target, candidate_layers(layers, target.num_layers), norm=norm)
        self.taps, self.plausibility = self.early.taps, plausibility
        self.chosen: torch.Tensor | None = None

    def __call__(self, logits: torch.Tensor, tree: TokenTree, context: Context) -> torch.Tensor:
        """See :class:`isthmus.roles.Reshape`."""
        assert context.features is not None
        early = self.early(context.features).to(logits)  # [B, N, J, V]
        last, lower = torch.log_softmax(logits, -1), torch.log_softmax(early, -1)
        best = divergence(last[:, :, None], lower).argmax(-1)
        self.chosen = torch.tensor(self.early.layers, device=best.device)[best]
        premature = lower.gather(2, best[..., None, None].expand(-1, -1, 1, lower.shape[-1]))
        return contrast(logits, premature[:, :, 0], plausibility=self.plausibility, original=True)
