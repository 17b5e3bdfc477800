"""What the layers below the last would have said: the model's own head on earlier states."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from isthmus.decoding.target import HubTarget, tolerance
from isthmus.errors import InvalidInputError, UnsupportedModelError
from isthmus.roles import Features, Taps


class EarlyLogits:
    """Logits of chosen layers, ``head(norm(h))`` or ``head(h)``.

    Args:
        target: The model.
        layers: Layers as :class:`~isthmus.roles.Taps` numbers them: 0 is the embedding, L leaves
            the last layer.
        norm: Apply the final norm, which the head was trained behind.

    Attributes:
        taps: What a reshape has to tap for them.

    Raises:
        InvalidInputError: A layer does not exist.
        UnsupportedModelError: The model's own logits are not its head on its normed last state.
    """

    def __init__(self, target: HubTarget, layers: Sequence[int], *, norm: bool = True) -> None:
        count = target.num_layers
        if not layers or min(layers) < 0 or max(layers) > count:
            raise InvalidInputError(f"layers must be within 0 and {count}, got {list(layers)}")
        self.target, self.layers, self.norm = target, tuple(layers), norm
        self.taps = Taps(layers=tuple(sorted({*layers})))
        worst = self._probe()
        if worst > tolerance(target.dtype):
            raise UnsupportedModelError(
                f"the logits of {type(target.model).__name__} are more than its head on its last "
                f"state (they differ by {worst:.1e} of their spread), so its early layers cannot "
                "be read"
            )

    def head(self, hidden: torch.Tensor, *, norm: bool) -> torch.Tensor:
        """Logits [..., V] of states [..., D]."""
        module = self.target.final_norm
        return self.target.head(module(hidden) if norm and module is not None else hidden)

    @torch.no_grad()
    def __call__(self, features: Features) -> torch.Tensor:
        """Logits [B, N, J, V] of the J layers, float32 or wider."""
        stacked = torch.stack([features.layers[layer] for layer in self.layers], 2)
        logits = self.head(stacked.to(self.target.dtype), norm=self.norm)
        return logits if logits.dtype == torch.float64 else logits.float()

    @torch.no_grad()
    def _probe(self) -> float:
        target, last = self.target, self.target.num_layers
        inputs = target.probe_inputs()
        tokens = torch.arange(3, 8, device=target.device)[None] % target.vocab_size
        scores = target.forward(
            tokens, encoded=target.encode(**inputs) if inputs else None, taps=Taps(layers=(last,))
        )
        assert scores.features is not None
        got, want = self.head(scores.features.layers[last], norm=True), scores.logits
        return float((got - want).abs().max() / (want.max() - want.min()).clamp(min=1e-9))
