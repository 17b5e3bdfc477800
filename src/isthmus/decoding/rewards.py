"""Rewards for steps of reasoning: what a process reward model looks like from the outside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import torch

from isthmus.decoding.state_head import StateHead
from isthmus.roles import Target


class Reward(Protocol):
    """Scores the last step of a text.

    Attributes:
        reader: Whose last hidden states it looks at: ``"draft"`` for the draft model's, which are
            there already; a model of its own, which reads along; None for no model's.
    """

    reader: Target | Literal["draft"] | None

    def score(
        self, texts: Sequence[Sequence[int]], starts: Sequence[int], states: torch.Tensor | None
    ) -> list[float]:
        """One score a text.

        Args:
            texts: Token ids of question, steps so far and the step to score.
            starts: Where the step to score begins in each.
            states: The reader's last hidden states at the ends of the texts [R, D], or None.
        """
        ...


class StateReward:
    """The reward that a fitted head reads off a hidden state at the end of the step.

    Args:
        head: See :class:`isthmus.decoding.state_head.StateHead`.
        reader: See :class:`Reward`.
    """

    def __init__(self, head: StateHead, reader: Target | Literal["draft"] = "draft") -> None:
        self.head = head
        self.reader: Target | Literal["draft"] | None = reader

    @torch.no_grad()
    def score(
        self, texts: Sequence[Sequence[int]], starts: Sequence[int], states: torch.Tensor | None
    ) -> list[float]:
        """See :class:`Reward`."""
        assert states is not None
        scores: list[float] = self.head(states).tolist()
        return scores


class NoReward:
    """The same score for every step, for mixtures that do not look at rewards."""

    reader: Target | Literal["draft"] | None = None

    def score(
        self, texts: Sequence[Sequence[int]], starts: Sequence[int], states: torch.Tensor | None
    ) -> list[float]:
        """See :class:`Reward`."""
        return [0.0] * len(texts)


def mixture(
    draft: torch.Tensor, target: torch.Tensor, keep: torch.Tensor
) -> tuple[torch.Tensor, float]:
    """The law of steps that are kept with probability w and else written by another model.

    ``w P_m + nu P_M`` with ``nu = 1 - E_m[w]`` (RSD, 2501.19324, eq. 3).

    Args:
        draft: P_m of every possible step [Y].
        target: P_M [Y].
        keep: w of every step [Y].

    Returns:
        The law [Y] and nu, the share of the steps that the target writes.

    Example:
        >>> half = torch.tensor([0.5, 0.5])
        >>> law, share = mixture(half, torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0]))
        >>> law.tolist(), share
        ([1.0, 0.0], 0.5)
    """
    share = 1.0 - float((keep * draft).sum())
    return keep * draft + share * target, share
