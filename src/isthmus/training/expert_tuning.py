"""Short tuning of models that were carved into experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from isthmus.nn.moe import Routing, routings
from isthmus.objectives.balance import move_bias
from isthmus.training.drafting import Recipe
from isthmus.training.tuning import label_loss, logits_of, next_tokens, tune


def tune_layers(
    model: Any, texts: Tensor, recipe: Recipe, rate: float = 1e-3, trained: str = "mlp"
) -> None:
    """Tune the feed-forward layers of a model in place, and keep experts in balance by their bias.

    Args:
        model: A model, carved or not; all its other weights stay.
        texts: Tokens int64 [W, T].
        recipe: Steps, batch size and rate.
        rate: Step of the biases, gamma (:func:`isthmus.objectives.balance.move_bias`).
        trained: Module name of the feed-forward layers.
    """
    for name, weight in model.named_parameters():
        weight.requires_grad_(f".{trained}." in name)

    def loss(ids: Tensor, noise: torch.Generator) -> Tensor:
        del noise
        with routings(model) as found:
            value = label_loss(logits_of(model, ids), next_tokens(ids))
        for path, routed in found.items():
            bias = getattr(model.get_submodule(path), "bias", None)
            if bias is not None and isinstance(routed.routing, Routing):
                move_bias(bias, routed.routing, rate)
        return value

    tune(model, texts, loss, recipe)
