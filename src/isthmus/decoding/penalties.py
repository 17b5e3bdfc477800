"""Penalties on tokens of the answer so far, and biases on single tokens, as OpenAI defines them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from isthmus.errors import InvalidInputError


class Penalties:
    """A logits processor: ``z_v - frequency * count(v) - presence * [count(v) > 0] + bias(v)``.

    Counts are those of the answer; the prompt does not count.

    Args:
        prompt_tokens: Tokens of the prompt.
        presence: Once for a token that stands in the answer.
        frequency: For every time it stands there.
        bias: Added to single tokens.
        vocab_size: Tokens V, for a check of ``bias``.

    Raises:
        InvalidInputError: A bias of a token outside the vocabulary, or outside -100 to 100.

    Example:
        >>> p = Penalties(1, presence=1.0, frequency=0.5, bias={3: 2.0}, vocab_size=4)
        >>> p(torch.tensor([[0, 2, 2]]), torch.zeros(1, 4)).tolist()
        [[0.0, 0.0, -2.0, 2.0]]
    """

    def __init__(
        self,
        prompt_tokens: int,
        *,
        presence: float = 0.0,
        frequency: float = 0.0,
        bias: Mapping[int, float] | None = None,
        vocab_size: int,
    ) -> None:
        self.prompt_tokens, self.presence, self.frequency = prompt_tokens, presence, frequency
        bias = bias or {}
        for token, value in bias.items():
            if not 0 <= token < vocab_size or not -100 <= value <= 100:
                raise InvalidInputError(
                    f"a bias is a number from -100 to 100 for a token below {vocab_size}, got "
                    f"{value} for token {token}"
                )
        self._tokens = torch.tensor(list(bias), dtype=torch.int64)
        self._values = torch.tensor(list(bias.values()), dtype=torch.float32)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Processed scores [R, V] after the prefixes [R, T]."""
        answer = input_ids[:, self.prompt_tokens :]
        if answer.shape[1] and (self.presence or self.frequency):
            counts = torch.zeros_like(scores).scatter_add_(
                1, answer, torch.ones_like(answer, dtype=scores.dtype)
            )
            scores = scores - self.frequency * counts - self.presence * (counts > 0)
        if len(self._tokens):
            tokens, values = self._tokens.to(scores.device), self._values.to(scores)
            scores = scores.index_add(1, tokens, values.expand(len(scores), -1))
        return scores
