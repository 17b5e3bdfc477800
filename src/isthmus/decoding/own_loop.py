"""What systems with a decoding loop of their own share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from isthmus.decoding.generation import Generation


def row_generators(
    seed: int | None, rows: int
) -> tuple[list[torch.Generator], list[torch.Generator]]:
    """Two generators a row, one for tokens and one for choices, so that no row sways another.

    Args:
        seed: Row b uses ``seed + b``; None takes a new one.
        rows: Rows B.
    """
    first = torch.seed() if seed is None else seed
    tokens, choices = (
        [torch.Generator().manual_seed(first + b + apart) for b in range(rows)]
        for apart in (0, 1_000_003)
    )
    return tokens, choices


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
