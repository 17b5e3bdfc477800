"""A small head on a model's last hidden states that says how good a text is so far.

One number a token: the reward of a step that ends there, or whether the token is right. The model
itself stays as it is; the head is fitted in seconds::

    last hidden state [D] ──standardise──> linear, or one hidden layer ──> logit
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from isthmus.decoding.trained import CONFIG, WEIGHTS, read_config, target_fingerprint
from isthmus.errors import BrokenFileError, InvalidInputError, MismatchError
from isthmus.folders import writable

_MAX_WIDTH = 1_000_000


class StateHead(nn.Module):
    """A head on states [..., D]; call it for probabilities [...].

    Args:
        width: Width D of the states.
        hidden: Units of the hidden layer; 0 is a linear head, ``w e + b``.
        seed: Seed of the first weights of a hidden layer.

    Attributes:
        record: How it was fitted, kept in its file.

    Example:
        >>> StateHead(4)(torch.zeros(2, 4)).tolist()
        [0.5, 0.5]
    """

    def __init__(self, width: int, hidden: int = 0, *, seed: int = 0) -> None:
        super().__init__()
        if not (0 < width <= _MAX_WIDTH and 0 <= hidden <= _MAX_WIDTH):
            raise InvalidInputError(
                f"a head needs a width and 0 or more units, got {width, hidden}"
            )
        self.width, self.hidden = width, hidden
        self.mean, self.scale = (
            nn.Parameter(x, requires_grad=False) for x in (torch.zeros(width), torch.ones(width))
        )
        generator = torch.Generator().manual_seed(seed)
        if hidden:
            weight = torch.randn(hidden, width, generator=generator) / width**0.5
            self.inner, self.inner_bias = nn.Parameter(weight), nn.Parameter(torch.zeros(hidden))
        self.weight = nn.Parameter(torch.zeros(hidden or width))
        self.bias = nn.Parameter(torch.zeros(()))
        self.record: dict[str, Any] = {}

    @property
    def parameters_used(self) -> int:
        """Weights of the head."""
        return sum(p.numel() for p in self.parameters())

    def logit(self, states: torch.Tensor) -> torch.Tensor:
        """Logits [...] of states [..., D]."""
        x = (states.to(self.weight) - self.mean) / self.scale
        if self.hidden:
            x = F.gelu(F.linear(x, self.inner, self.inner_bias))
        return x @ self.weight + self.bias

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Probabilities [...] of states [..., D]."""
        return torch.sigmoid(self.logit(states))

    def fit(
        self,
        states: torch.Tensor,
        labels: torch.Tensor,
        *,
        balance: bool = False,
        penalty: float = 1e-3,
        iterations: int = 60,
    ) -> float:
        """Fit by cross-entropy with a quadratic penalty, all examples at once (L-BFGS).

        Args:
            states: float [M, D].
            labels: 1 where it is good, 0 where not, [M].
            balance: Weigh both classes alike, however rare one is.
            penalty: Of the squared weights, relative to the mean loss.
            iterations: Steps at most.

        Returns:
            The mean loss at the end, in nats, without the penalty.

        Raises:
            InvalidInputError: A class is missing, or the shapes do not fit.
        """
        labels = labels.float()
        good = float(labels.mean()) if len(labels) else 0.0
        if states.shape != (len(labels), self.width) or not 0.0 < good < 1.0:
            raise InvalidInputError(
                f"fitting needs states [M, {self.width}] and labels of both classes, got "
                f"{list(states.shape)} with {good:.0%} good"
            )
        states = states.detach().float()
        self.mean.data, self.scale.data = states.mean(0), states.std(0).clamp(min=1e-6)
        weights = torch.ones_like(labels)
        if balance:
            weights = torch.where(labels > 0, 0.5 / good, 0.5 / (1.0 - good))
        free = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.LBFGS(
            free, max_iter=iterations, history_size=10, line_search_fn="strong_wolfe"
        )
        loss = torch.zeros(())

        def closure() -> torch.Tensor:
            nonlocal loss
            optimizer.zero_grad()
            loss = F.binary_cross_entropy_with_logits(self.logit(states), labels, weights)
            squares = sum((p.square().sum() for p in free if p.ndim), torch.zeros(()))
            total = loss + penalty * squares
            total.backward()  # type: ignore[no-untyped-call]
            return total

        optimizer.step(closure)  # type: ignore[no-untyped-call]
        optimizer.zero_grad()
        return float(loss.detach())

    def save_pretrained(self, folder: str | Path, system: str, target: Any) -> None:
        """Write ``isthmus.json`` and ``model.safetensors``.

        Args:
            folder: Where to; made if need be.
            system: Slug of the system that it is for.
            target: The model whose states it reads.

        Raises:
            BrokenFileError: The folder cannot be written.
        """
        place = Path(folder)
        weights = {k: v.detach().cpu().contiguous() for k, v in self.named_parameters()}
        with writable(place):
            part = place / f"{WEIGHTS}.part"
            save_file(weights, part, metadata={"format": "pt"})
            part.replace(place / WEIGHTS)
            config = {
                "system": system,
                "settings": {"width": self.width, "hidden": self.hidden},
                "target": target_fingerprint(target),
                "sha256": hashlib.sha256((place / WEIGHTS).read_bytes()).hexdigest(),
                "training": self.record,
            }
            part = place / f"{CONFIG}.part"
            part.write_text(json.dumps(config, indent=1))
            part.replace(place / CONFIG)

    @classmethod
    def from_pretrained(cls, folder: str | Path, system: str, target: Any) -> Self:
        """Read a head that :meth:`save_pretrained` wrote.

        Raises:
            BrokenFileError: A file is missing or altered.
            MismatchError: It is for another system or reads another model.
        """
        config = read_config(folder)
        if config["system"] != system or config["target"] != target_fingerprint(target):
            raise MismatchError(f"{folder} holds no {system} head for this model")
        path = Path(folder) / WEIGHTS
        try:
            if hashlib.sha256(path.read_bytes()).hexdigest() != config["sha256"]:
                raise BrokenFileError(f"{path} was altered or cut short; fit it again")
            head = cls(**config["settings"])
            head.load_state_dict(load_file(path))
        except (OSError, SafetensorError, RuntimeError, TypeError) as error:
            raise BrokenFileError(f"{path} cannot be read ({error}); fit it again") from error
        head.record = config.get("training", {})
        return head.eval()
