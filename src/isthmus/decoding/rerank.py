"""Choosing among complete answers: the one that the others agree with most.

Minimum Bayes risk (Eikema and Aziz, 2108.04718) draws answers from the model itself and gives the
one of the largest mean utility against all of them; a consensus does the same with answers of
several models (1806.01954). Both are :class:`Consensus`; :class:`Samples` draws.

    s_i = mean over j != i of u(answer_i, answer_j)          i* = argmax s_i, the first of equals
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from isthmus.errors import DeadEnd, InvalidInputError
from isthmus.metrics.repetition import ngrams
from isthmus.roles import Choice, Hypothesis

Utility = Callable[[Sequence[Sequence[Hashable]]], ArrayLike]
"""From n answers, as tokens or words, to ``u[i, j]``: how good i is if j were the right one."""

Floats = NDArray[np.float64]


def consensus(utility: ArrayLike) -> Floats:
    """Support s_i [n] of every answer by the others, from u [n, n]; the diagonal has no say.

    Raises:
        InvalidInputError: The matrix is not square, or not finite.

    Example:
        >>> consensus([[1, 0.5, 0.1], [0.5, 1, 0.3], [0.2, 0.4, 1]]).round(2).tolist()
        [0.3, 0.4, 0.3]
    """
    u = np.array(utility, np.float64)
    if u.ndim != 2 or u.shape[0] != u.shape[1] or not np.isfinite(u).all():
        raise InvalidInputError(f"a utility is a finite matrix [n, n], got {list(u.shape)}")
    np.fill_diagonal(u, 0.0)
    support: Floats = u.sum(1) / max(1, len(u) - 1)
    return support


def ngram_f(answers: Sequence[Sequence[Hashable]], orders: int = 4) -> Floats:
    """Mean F1 of shared n-grams, n = 1..orders, of every two answers; symmetric [n, n].

    Orders that neither answer has are left out of the mean; two empty answers agree fully.

    Example:
        >>> ngram_f(["abcd", "abce", "xy"], orders=2).round(3).tolist()
        [[1.0, 0.708, 0.0], [0.708, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    count = len(answers)
    total, weight = np.zeros((count, count)), np.zeros((count, count))
    for n in range(1, orders + 1):
        index: dict[tuple[Hashable, ...], int] = {}
        rows = [[index.setdefault(g, len(index)) for g in ngrams(a, n)] for a in answers]
        counts = np.stack([np.bincount(r, minlength=max(1, len(index))) for r in rows])
        sizes = counts.sum(1)
        shared = np.stack([np.minimum(row, counts).sum(1) for row in counts])
        both = sizes[:, None] + sizes
        known = both > 0
        total += np.divide(2 * shared, both, out=np.zeros_like(total), where=known)
        weight += known
    return np.divide(total, weight, out=np.ones_like(total), where=weight > 0)


class Consensus:
    """Gives the answer that the others support most.

    Args:
        utility: Of answers as token ids; shared n-grams when None.

    Attributes:
        support: Support of every answer in the last choice.

    Example:
        >>> said = [Hypothesis(t, 0.0, 0.0) for t in ((1, 2, 3), (4, 5), (1, 2, 4))]
        >>> Consensus().choose(said)  # the last one shares 1 2 with the first and 4 with the other
        2
    """

    def __init__(self, utility: Utility | None = None) -> None:
        self.utility = utility or ngram_f
        self.support: Floats = np.zeros(0)

    def choose(self, hypotheses: Sequence[Hypothesis], source: Any = None) -> int:
        """See :class:`isthmus.roles.Rerank`."""
        del source
        self.support = consensus(self.utility([h.tokens for h in hypotheses]))
        return int(self.support.argmax())


class Samples:
    """Independent answers of each row, drawn from the law as it is: a search that cuts nothing.

    Args:
        width: Answers W of each row.

    Raises:
        InvalidInputError: The width is below 1.

    Example:
        >>> samples = Samples(3)
        >>> samples.start(1, torch.Generator().manual_seed(0), end_tokens=[], max_new_tokens=1)
        >>> samples.step(torch.tensor([[[0.0, 1.0]]]).log()) is None
        True
        >>> [h.tokens for h in samples.finish()[0]]
        [(1,), (1,), (1,)]
    """

    def __init__(self, width: int = 32) -> None:
        if width < 1:
            raise InvalidInputError(f"samples must be at least 1, got {width}")
        self.width = width

    def start(
        self,
        rows: int,
        generator: torch.Generator,
        *,
        end_tokens: Sequence[int],
        max_new_tokens: int,
    ) -> None:
        """Begin on B rows; see :class:`isthmus.roles.Search`."""
        self._generator, self._room = generator, max_new_tokens
        self._ends = sorted(set(end_tokens))
        self._tokens: list[torch.Tensor] = []  # [B, W] each
        self._open = torch.ones(rows, self.width, dtype=torch.bool)
        self._length = torch.zeros(rows, self.width, dtype=torch.int64)
        self._sums = torch.zeros(rows, self.width, dtype=torch.float64)

    def step(self, logprobs: torch.Tensor) -> Choice | None:
        """Draw one token for every open answer; see :class:`isthmus.roles.Search`.

        Raises:
            DeadEnd: The law left no token.
        """
        rows, held, vocab = logprobs.shape
        laws = torch.softmax(logprobs.double(), -1)
        if not bool(laws.isfinite().all()):
            raise DeadEnd("the law left no token to draw")
        laws = laws.expand(-1, self.width, -1).reshape(-1, vocab)
        token = torch.multinomial(laws, 1, generator=self._generator).view(rows, self.width)
        parent = torch.arange(held, device=token.device).expand(rows, -1)
        parent = parent.expand(-1, self.width) if held == 1 else parent
        gain = logprobs.gather(1, parent[..., None].expand(-1, -1, vocab)).gather(
            2, token[..., None]
        )[..., 0]
        here = token.cpu()
        self._sums += gain.cpu().double() * self._open
        self._length += self._open
        self._tokens.append(here)
        self._open &= ~torch.isin(here, torch.tensor(self._ends, dtype=torch.int64))
        going = bool(self._open.any()) and len(self._tokens) < self._room
        return Choice(parent, token, gain) if going else None

    def finish(self) -> list[list[Hypothesis]]:
        """The answers in the order of their draws; the score is the log-probability."""
        tokens = torch.stack(self._tokens, 2)  # [B, W, T]
        return [
            [
                Hypothesis(tuple(t[:n]), total, total)
                for t, n, total in zip(row, lengths, sums, strict=True)
            ]
            for row, lengths, sums in zip(
                tokens.tolist(), self._length.tolist(), self._sums.tolist(), strict=True
            )
        ]
