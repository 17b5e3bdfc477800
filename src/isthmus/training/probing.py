"""How good features are: a linear probe on frozen ones, and fine-tuning with few labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus.models.vision_transformer import VisionTransformer
from isthmus.roles import Loss
from isthmus.training.loop import Plan, Trainer
from isthmus.training.pictures import drawn, normalised


def linear_probe(
    features: Tensor, labels: Tensor, test: Tensor, truth: Tensor, *, decay: float = 1e-3
) -> float:
    """Share of test rows that logistic regression on frozen features names right.

    Args:
        features: [N, D], of the labelled rows; scaled to mean 0 and variance 1 here.
        labels: int64 [N].
        test: [M, D].
        truth: int64 [M].
        decay: Weight of the squared coefficients.

    Example:
        >>> x = torch.tensor([[-2.0], [-1.0], [1.0], [2.0]])
        >>> linear_probe(x, torch.tensor([0, 0, 1, 1]), x * 3, torch.tensor([0, 0, 1, 0]))
        0.75
    """
    mean, spread = features.mean(0), features.std(0).clamp(min=1e-6)
    x, held = (features - mean) / spread, (test - mean) / spread
    weight = torch.zeros(x.shape[1], int(labels.max()) + 1, requires_grad=True)
    bias = torch.zeros(weight.shape[1], requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(x @ weight + bias, labels) + decay * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.enable_grad():
        solver.step(closure)  # type: ignore[no-untyped-call]
    return float(((held @ weight + bias).argmax(1) == truth).float().mean())


class Classifier(nn.Module):
    """An encoder with a linear layer on the mean of its patches.

    Args:
        encoder: The encoder, which learns as well.
        classes: How many classes C there are.
    """

    def __init__(self, encoder: VisionTransformer, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.norm = nn.LayerNorm(encoder.width)
        self.classify = nn.Linear(encoder.width, classes)

    def forward(self, pictures: Tensor) -> Tensor:
        """Pictures uint8 [B, 3, H, W] to logits [B, C]."""
        tokens = self.encoder(normalised(pictures))
        logits: Tensor = self.classify(self.norm(tokens[:, 1:].mean(1)))
        return logits


class Naming:
    """Learns to name what inputs show; plays :class:`isthmus.roles.Learner`.

    Args:
        module: From inputs [B, ...] to logits [B, C].
        inputs: Training inputs [N, ...].
        labels: int64 [N].
        held_out: Inputs [M, ...] and labels [M] to judge by.
        batch_size: Inputs in a micro-batch.
        seed: Of the order.
    """

    lower_is_better = False

    def __init__(
        self,
        module: nn.Module,
        inputs: Tensor,
        labels: Tensor,
        held_out: tuple[Tensor, Tensor],
        *,
        batch_size: int = 32,
        seed: int = 0,
    ) -> None:
        self.module: Any = module
        self.inputs, self.labels, self.held_out = inputs, labels, held_out
        self.batch_size, self.seed = batch_size, seed
        self.identity: dict[str, Any] = {"task": "naming", "inputs": list(inputs.shape)}

    def batch(self, part: int) -> tuple[Tensor, Tensor]:
        """Inputs and labels."""
        rows = drawn(range(len(self.labels)), self.batch_size, part, self.seed)
        return self.inputs[rows], self.labels[rows]

    def loss(self, batch: tuple[Tensor, Tensor]) -> Loss:
        """Cross-entropy."""
        logits = self.module(batch[0]).float()
        return Loss(F.cross_entropy(logits, batch[1], reduction="sum"), len(batch[1]))

    def validate(self) -> dict[str, float]:
        """Share of held-out inputs named right."""
        inputs, labels = self.held_out
        told = torch.cat([self.module(part).argmax(1) for part in torch.split(inputs, 100)])
        return {"accuracy": float((told == labels).float().mean())}


def finetuned(learner: Naming, plan: Plan) -> float:
    """Train; the share of held-out inputs that is named right after the last step."""
    state = Trainer(learner, plan).run()
    return float(state.curve[-1]["accuracy"])
