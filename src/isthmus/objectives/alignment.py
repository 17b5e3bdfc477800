"""Guided alignment: one head of the cross-attention is told which source tokens a target is from.

::

    cross-attention ──taps of q, k──▶ A [B, T, S] of one head ──┐
    given alignment a [B, T, S], rows of sum 1 or 0 ────────────┴──▶ - sum a log(A + 1e-6)

A translation model aligns source and target in some of its heads, but nobody knows in which, and
how well. After Chen et al., "Guided Alignment Training for Topic-Aware Neural Machine Translation",
2016 (arXiv 1607.01628), in the form of Marian, one head of one layer learns alignments that are
given, and gives them back for new texts.
"""

from __future__ import annotations

import math
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from isthmus.errors import InvalidInputError
from isthmus.nn.attention import MultiHeadAttention

TINY = 1e-6
"""What keeps the logarithm finite, as in Marian."""


class HeadTap:
    """The weights of one head of an attention, while a model runs.

    Queries and keys are listened to by hooks; the weights are made of them when they are asked for,
    with their gradient. The model is left as it is, and its own attention as fast.

    Args:
        attention: The attention.
        head: Number of the head.

    Raises:
        InvalidInputError: It has no such head.

    Example:
        >>> attention = MultiHeadAttention(4, 2)
        >>> x, memory = torch.randn(1, 2, 4), torch.randn(1, 3, 4)
        >>> with HeadTap(attention) as tap:
        ...     _ = attention(x, memory)
        >>> tap.weights(torch.tensor([[True, False, True]]))[0, :, 1].tolist()
        [0.0, 0.0]
    """

    def __init__(self, attention: MultiHeadAttention, head: int = 0) -> None:
        if not 0 <= head < attention.heads:
            raise InvalidInputError(
                f"the attention has heads 0 to {attention.heads - 1}, not {head}"
            )
        self.attention, self.head = attention, head
        self._seen: dict[str, torch.Tensor] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> Self:
        """Begin to listen."""

        def listen(name: str) -> Any:
            def hook(module: nn.Module, given: Any, out: torch.Tensor) -> None:
                self._seen[name] = out

            return hook

        for name in ("q_proj", "k_proj"):
            module = getattr(self.attention, name)
            self._hooks.append(module.register_forward_hook(listen(name)))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Listen no longer."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def weights(self, mask: torch.Tensor) -> torch.Tensor:
        """What the head looked at, the last time.

        Args:
            mask: True where a source has a token, bool [B, S].

        Returns:
            [B, T, S]; rows have the sum 1.

        Raises:
            InvalidInputError: The attention has not run.
        """
        if len(self._seen) < 2:
            raise InvalidInputError("the attention has not run while it was listened to")
        width = self.attention.head_dim
        part = slice(self.head * width, (self.head + 1) * width)
        q, k = (self._seen[name][..., part] for name in ("q_proj", "k_proj"))
        scores = self.attention.scale * q @ k.transpose(1, 2)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        return scores.masked_fill(~mask[:, None], -math.inf).softmax(-1)


def alignment_loss(weights: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """``- sum a log(A + 1e-6)`` over all target tokens, in nats.

    Args:
        weights: A of one head, [B, T, S].
        wanted: a, [B, T, S]; rows that say nothing are 0.

    Raises:
        InvalidInputError: Shapes differ.

    Example:
        >>> weights = torch.tensor([[[0.5, 0.5], [0.25, 0.75]]])
        >>> wanted = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])  # of the second token nothing
        >>> round(float(alignment_loss(weights, wanted)), 4)  # log 2
        0.6931
    """
    if weights.shape != wanted.shape:
        raise InvalidInputError(
            f"weights {list(weights.shape)} and alignments {list(wanted.shape)} must fit"
        )
    return -(wanted * (weights + TINY).log()).sum()


def links(weights: torch.Tensor) -> str:
    """The source token that every target token looks at most, as pairs ``source-target``.

    Args:
        weights: [T, S].

    Example:
        >>> links(torch.tensor([[0.1, 0.9], [0.8, 0.2]]))
        '1-0 0-1'
    """
    return " ".join(f"{s}-{t}" for t, s in enumerate(weights.argmax(-1).tolist()))
