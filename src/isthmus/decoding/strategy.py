"""What systems with a decoding loop of their own share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from isthmus.decoding.generation import Generation


class BatchStrategy(ABC):
    """A strategy that decodes several prompts together; one prompt is a batch of one."""

    def generate(
        self,
        ids: torch.Tensor,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> Generation:
        """Decode one prompt, int64 [T]; see :meth:`generate_batch`."""
        return self.generate_batch(
            [ids], max_new_tokens=max_new_tokens, temperature=temperature, seed=seed
        )[0]

    @abstractmethod
    def generate_batch(
        self,
        prompts: Sequence[torch.Tensor],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> list[Generation]:
        """Decode prompts of any lengths, int64 [T_b] each."""
