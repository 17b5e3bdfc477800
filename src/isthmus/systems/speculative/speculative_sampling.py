"""Speculative sampling: a small model proposes, the large one scores all of it in one pass.

Paper: Leviathan, Kalman, Matias. Fast Inference from Transformers via Speculative Decoding. 2022.
    arXiv:2211.17192
Idea: Accept draft token x ~ q when u q(x) < p(x), else draw from norm((p - q)+): the output keeps
    the target's law exactly, and a run of agreeing tokens costs one target pass.
Differs: Greedy decoding is run as matching of argmaxes (the limit of temperature 0, sec. 2.2) and
    not as sampling from a one-hot law. Lenience (sec. 2.4) is left out: it changes the output.
Lossless: yes
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from isthmus.claims import Claim, Ruler
from isthmus.decoding.drafters import ModelDrafter
from isthmus.errors import InvalidInputError
from isthmus.roles import Shape, Target


@dataclass(frozen=True)
class Settings:
    """Settings of speculative sampling.

    Attributes:
        num_draft_tokens: Draft tokens a round, the paper's gamma; 0 switches the method off.
        process: Apply the request's temperature, top-k ... to the draft model too.
    """

    num_draft_tokens: int = 4
    process: bool = True


class SpeculativeSampling(ModelDrafter):
    """A draft model that proposes a chain of ``num_draft_tokens`` tokens.

    Args:
        model: The draft model as a target, sharing the target's vocabulary.
        settings: See :class:`Settings`.

    Raises:
        InvalidInputError: A negative number of draft tokens.
    """

    role: ClassVar[str] = "drafter"
    name = "speculative-sampling"

    def __init__(self, model: Target, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        if self.settings.num_draft_tokens < 0:
            raise InvalidInputError(
                f"num_draft_tokens must be 0 or more, got {self.settings.num_draft_tokens}"
            )
        super().__init__(model, process=self.settings.process)

    @property
    def default_shape(self) -> Shape:
        """A chain of the chosen length."""
        gamma = self.settings.num_draft_tokens
        return Shape(nodes=gamma, depth=gamma, width=1)


def acceptance_probability(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Chance that a token drawn from q stands under p (Theorem 3.5): sum of min(p, q).

    Args:
        p: Target law [..., V].
        q: Drafter law [..., V].

    Returns:
        beta [...], one minus the total-variation distance.

    Example:
        >>> acceptance_probability(torch.tensor([0.5, 0.5]), torch.tensor([1.0, 0.0])).item()
        0.5
    """
    return torch.minimum(p, q).sum(-1)


def expected_tokens(alpha: float, gamma: int) -> float:
    """Expected tokens of one round (eq. 1): (1 - alpha^(gamma + 1)) / (1 - alpha).

    Example:
        >>> expected_tokens(0.5, 1), expected_tokens(1.0, 4)
        (1.5, 5.0)
    """
    if not 0.0 <= alpha <= 1.0:
        raise InvalidInputError(f"alpha is a probability, got {alpha}")
    if alpha == 1.0:
        return gamma + 1.0
    return (1.0 - alpha ** (gamma + 1)) / (1.0 - alpha)


def walltime_factor(alpha: float, gamma: int, cost: float) -> float:
    """Expected speed-up (Theorem 3.8) when a draft step costs ``cost`` target steps.

    Example:
        >>> walltime_factor(0.8, 4, 0.0)
        3.3616
    """
    return round(expected_tokens(alpha, gamma) / (gamma * cost + 1.0), 12)


def arithmetic_factor(alpha: float, gamma: int, cost: float) -> float:
    """Expected growth of arithmetic (Theorem 3.11), ``cost`` in target operations per token.

    Example:
        >>> round(arithmetic_factor(0.5, 1, 0.0), 6)
        1.333333
    """
    return (gamma * cost + gamma + 1.0) / expected_tokens(alpha, gamma)


def best_gamma(alpha: float, cost: float, limit: int = 32) -> int:
    """The number of draft tokens with the largest speed-up; 0 when alpha <= cost (Cor. 3.9).

    Example:
        >>> best_gamma(0.8, 0.05), best_gamma(0.1, 0.2)
        (7, 0)
    """
    return max(range(limit + 1), key=lambda g: (walltime_factor(alpha, g, cost), -g))


def claim(ruler: Ruler, scale: str = "small") -> Claim:
    """Placeholder removed before commit."""
    raise NotImplementedError
