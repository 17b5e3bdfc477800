"""Optimisers by name: torch's own, AdamW with steps scaled by each matrix (nanoT5), and EM."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from isthmus.errors import InvalidInputError, UnknownNameError


class AdamWScale(torch.optim.Optimizer):
    """AdamW whose step grows with the size of what it moves.

    ``p <- p - a_t m / (sqrt(v) + eps)``, with ``a_t = lr sqrt(1 - b2^t) / (1 - b1^t) max(1e-3,
    RMS(p))``, then decoupled decay ``p <- p - lr wd p``. One rate serves tensors of very different
    scale. After Nawrot, "nanoT5", 2023 (arXiv 2309.02373), where it replaces Adafactor.

    Args:
        params: Parameters.
        lr: Rate.
        betas: Decay of both moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled decay.

    Raises:
        InvalidInputError: The rate is not positive.

    Example:
        >>> p = nn.Parameter(torch.ones(4))
        >>> p.grad = torch.full((4,), 0.5)
        >>> AdamWScale([p], lr=0.1).step()
        >>> [round(v, 4) for v in p.tolist()]  # 1 - 0.1 RMS(p) m / sqrt(v)
        [0.9, 0.9, 0.9, 0.9]
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 2e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        if lr <= 0:
            raise InvalidInputError(f"the learning rate must be positive, got {lr}")
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, settings)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            b1, b2 = group["betas"]
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p] = {
                        "step": torch.zeros(()),
                        "exp_avg": torch.zeros_like(p),
                        "exp_avg_sq": torch.zeros_like(p),
                    }
            grads = [p.grad for p in params]
            means = [self.state[p]["exp_avg"] for p in params]
            squares = [self.state[p]["exp_avg_sq"] for p in params]
            torch._foreach_lerp_(means, grads, 1 - b1)
            torch._foreach_mul_(squares, b2)
            torch._foreach_addcmul_(squares, grads, grads, 1 - b2)
            roots = torch._foreach_sqrt(squares)
            torch._foreach_add_(roots, group["eps"])
            sizes = torch._foreach_norm(params)
            for p, m, root, size in zip(params, means, roots, sizes, strict=True):
                count = self.state[p]["step"]
                count += 1
                t = float(count)
                scale = (size / p.numel() ** 0.5).clamp(min=1e-3)
                rate = group["lr"] * (1 - b2**t) ** 0.5 / (1 - b1**t) * scale
                p.sub_(m / root * rate)
            if group["weight_decay"]:
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        return loss


class Em(torch.optim.Optimizer):
    """Expectation maximisation of tables of probabilities, kept as their logarithms.

    The gradient of a log-likelihood by the logarithm of a probability is the expected count of its
    use. So with ``- log p(record)`` as the loss, and rows of log-probabilities as parameters that
    the model takes as they are, ``-grad`` are expected counts per record, and a step is
    ``p <- (1 - lr) p + lr (counts + a / K) / (total + a)``: at a rate of 1 the whole of EM, below
    it the smoothed step for batches.

    Args:
        params: Log-probabilities; their last dimension sums to one after every step.
        lr: Share of the new estimate, at most 1.
        betas: Not used.
        weight_decay: Pseudo-count a of a row, per record.

    Raises:
        InvalidInputError: The rate is not within 0 and 1.

    Example:
        >>> p = nn.Parameter(torch.tensor([[0.5, 0.5]]).log())
        >>> p.grad = torch.tensor([[-0.3, -0.1]])  # used in 3 and in 1 of 10 records
        >>> Em([p], lr=1.0).step()
        >>> [round(v, 2) for v in p.exp()[0].tolist()]
        [0.75, 0.25]
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1.0,
        betas: tuple[float, float] = (0.0, 0.0),
        weight_decay: float = 0.0,
    ) -> None:
        if not 0 < lr <= 1:
            raise InvalidInputError(f"EM takes a learning rate above 0 and up to 1, got {lr}")
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            rate, pseudo = group["lr"], max(group["weight_decay"], 1e-9)
            for p in group["params"]:
                if p.grad is None:
                    continue
                counts = (-p.grad).clamp(min=0) + pseudo / p.shape[-1]
                found = counts / counts.sum(-1, keepdim=True)
                mixed = p.exp().lerp(found, rate)
                p.copy_((mixed / mixed.sum(-1, keepdim=True)).clamp(min=1e-30).log())
        return loss


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "adamw-scale": AdamWScale,
    "adafactor": torch.optim.Adafactor,
    "adadelta": torch.optim.Adadelta,
    "sgd": torch.optim.SGD,
    "em": Em,
}

DECAYS = {"sgd": "momentum", "adadelta": "rho"}
"""What the first beta is to optimisers with one decay."""


def optimizer(
    name: str,
    parameters: Iterable[nn.Parameter],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.0,
) -> torch.optim.Optimizer:
    """Make an optimiser.

    Args:
        name: A key of :data:`OPTIMIZERS`.
        parameters: What is trained; weight decay spares vectors (biases and norms).
        lr: Peak learning rate.
        betas: Decay of the moments; the first is SGD's momentum, Adadelta's rho.
        weight_decay: Of matrices and larger.

    Raises:
        UnknownNameError: No such optimiser.
    """
    if name not in OPTIMIZERS:
        raise UnknownNameError("optimizer", name, OPTIMIZERS)
    trained = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    options: dict[str, Any] = {"lr": lr}
    if name in DECAYS:
        options[DECAYS[name]] = betas[0]
    elif name != "adafactor":
        options["betas"] = betas
    return OPTIMIZERS[name](groups, **options)
