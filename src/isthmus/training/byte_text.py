"""Learners of byte models: pieces from anywhere in the texts."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F

from isthmus.errors import InvalidInputError
from isthmus.metrics.bits import bits_per_byte
from isthmus.models.byte_patches import judged
from isthmus.roles import Loss
from isthmus.signals.tokenizer import stream
from isthmus.training.data import Data
from isthmus.training.seeds import batch_generator
from isthmus.training.system import TrainedSystem


class ByteLearner:
    """Cross-entropy of bytes.

    Args:
        system: What learns; its settings have ``max_length`` (bytes of a piece) and
            ``batch_size``, and its module is a
            :class:`~isthmus.models.byte_patches.BytePatches`.
        data: Texts.
        seed: Seed of the order.
        held_out: Held-out bytes that are judged at most.

    Raises:
        InvalidInputError: The texts are shorter than one piece.
    """

    lower_is_better = True

    def __init__(
        self, system: TrainedSystem, data: Data[str], seed: int, held_out: int = 65_536
    ) -> None:
        s = system.settings
        self.module: Any = system.module
        self.settings, self.seed = s, seed
        self.bytes, self.held_out = stream(data.train), stream(data.valid)[:held_out]
        if len(self.bytes) < s.max_length:
            raise InvalidInputError(
                f"the texts have {len(self.bytes)} bytes, fewer than one piece of {s.max_length}; "
                "give more, or a smaller max_length"
            )
        self.identity = {"system": system.name, "settings": asdict(s), "data": data.fingerprint}

    def batch(self, part: int) -> torch.Tensor:
        """Pieces from anywhere, int64 [B, T]."""
        s = self.settings
        generator = batch_generator(self.seed, part)
        last = len(self.bytes) - s.max_length
        starts = torch.randint(last + 1, (s.batch_size, 1), generator=generator)
        return self.bytes[starts + torch.arange(s.max_length)].long()

    def loss(self, batch: torch.Tensor) -> Loss:
        """Sum over bytes, in nats."""
        logits = self.module(batch)
        total = F.cross_entropy(logits.flatten(0, 1), batch.flatten(), reduction="sum")
        return Loss(total, batch.numel())

    def validate(self) -> dict[str, float]:
        """Bits a byte of held-out text."""
        nats = judged(self.network, self.held_out)
        return {"bits_per_byte": bits_per_byte(float(nats.sum()), len(nats))}

    @property
    def network(self) -> Any:
        """The module without the wrapper that it has while it is trained."""
        return getattr(self.module, "module", self.module)
