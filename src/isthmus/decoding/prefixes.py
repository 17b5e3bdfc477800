"""Log-probabilities of token sequences that share a beginning, one forward over a tree for all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch

from isthmus.decoding.tree import TokenTree, Topology, chain_topology
from isthmus.errors import InvalidInputError, UnsupportedModelError
from isthmus.roles import Target

CHUNK = 256
"""Tokens of a text that one forward reads."""

Reshaped = Callable[[list[list[int]], torch.Tensor], torch.Tensor]
"""From the tokens before and raw logits [N, V] to the logits that are meant."""


class PrefixScorer:
    """Log-probabilities of token sequences that share a beginning, one forward for all.

    Args:
        target: The model.
        start: Tokens that every sequence begins with, at least one; they are given, not scored.
        reshape: Changes logits before they are normalised; they stay as they are when None.
        inputs: Encoder inputs of encoder-decoder models.

    Attributes:
        forwards: Calls of the model.

    Raises:
        UnsupportedModelError: The model scores one token at a time only.
        InvalidInputError: There is no start.
    """

    def __init__(
        self,
        target: Target,
        start: Sequence[int],
        reshape: Reshaped | None = None,
        **inputs: Any,
    ) -> None:
        if target.reach == "step":
            raise UnsupportedModelError(
                "bytes are scored on several token sequences at once, and this model keeps a "
                "state that goes forward only; use an attention model"
            )
        if not start:
            raise InvalidInputError("a text is scored after at least one token; give start tokens")
        self.target, self.start, self.reshape = target, list(start), reshape
        self.forwards = 0
        self._device = getattr(target, "device", "cpu")
        self._session = target.session(1, **inputs)
        self._session.prefill([torch.tensor(self.start[:-1], dtype=torch.int64)])
        self._ids, self._sums = list(self.start), [0.0] * len(self.start)

    def score(self, sequences: Sequence[Sequence[int]]) -> tuple[list[float], torch.Tensor]:
        """Score K sequences, each after the start.

        Returns:
            Log-probability of each, and log-probabilities of what follows each [K, V].

        Raises:
            InvalidInputError: One is longer than the model reads.
        """
        rows = [self.start + list(s) for s in sequences]
        limit = self.target.max_length
        if limit is not None and max(map(len, rows)) > limit:
            raise InvalidInputError(
                f"the text takes {max(map(len, rows))} tokens, and the model reads {limit}"
            )
        size = len(rows)
        if self.target.reach == "chain":
            size = 1
        common = _shared(rows)
        while size > 1 and sum(len(r) - len(common) for r in rows[:size]) > 512:
            size = (size + 1) // 2
        sums: list[float] = []
        laws = []
        for first in range(0, len(rows), size):
            more, law = self._score(rows[first : first + size])
            sums += more
            laws.append(law)
        return sums, torch.cat(laws)

    def _score(self, rows: list[list[int]]) -> tuple[list[float], torch.Tensor]:
        common = _shared(rows)
        m = len(_shared([self._ids, common])) - 1
        self._session.truncate([m])
        self._ids, self._sums = self._ids[: m + 1], self._sums[: m + 1]
        while len(common) - m > CHUNK:
            block = common[m : m + CHUNK]
            law = self._run(block, chain_topology(CHUNK), common[:m])
            self._session.keep(torch.arange(CHUNK, device=self._device)[None])
            following = common[m + 1 : m + CHUNK + 1]
            gained = law[torch.arange(CHUNK), torch.tensor(following)].tolist()
            self._sums += [self._sums[-1] + total for total in accumulate(gained)]
            self._ids += following
            m += CHUNK
        tokens, parents = [common[m]], [-1]
        places: dict[tuple[int, ...], int] = {(): 0}
        for row in rows:
            for end in range(m + 2, len(row) + 1):
                path = tuple(row[m + 1 : end])
                if path not in places:
                    places[path] = len(tokens)
                    tokens.append(path[-1])
                    parents.append(places[path[:-1]])
        law = self._run(tokens, Topology.of(parents), common[:m])
        table = law[torch.tensor(parents).clamp(min=0), torch.tensor(tokens)].tolist()
        sums = [self._sums[-1]]
        for node in range(1, len(tokens)):
            sums.append(sums[parents[node]] + table[node])
        shared = [places[tuple(common[m + 1 : end])] for end in range(m + 1, len(common) + 1)]
        self._session.keep(torch.tensor([shared], device=self._device))
        self._ids += common[m + 1 :]
        self._sums += [sums[node] for node in shared[1:]]
        last = [places[tuple(row[m + 1 :])] for row in rows]
        return [sums[node] for node in last], law[last]

    def _run(self, tokens: list[int], topology: Topology, before: list[int]) -> torch.Tensor:
        """Log-probabilities [N, V] of what follows each node, on the CPU."""
        self.forwards += 1
        topology = topology.to(torch.device(self._device))
        tree = TokenTree(torch.tensor([tokens], device=self._device), topology)
        logits = self._session.score(tree).logits[0].cpu()
        if logits.dtype != torch.float64:
            logits = logits.float()
        if self.reshape is not None:
            paths: list[list[int]] = []
            for token, parent in zip(tokens, topology.parents_list, strict=True):
                paths.append([*(paths[parent] if parent >= 0 else before), token])
            logits = self.reshape(paths, logits)
        return logits.log_softmax(-1)


def _shared(rows: Sequence[list[int]]) -> list[int]:
    """The longest beginning that all rows share."""
    first, last = min(rows), max(rows)
    count = 0
    while count < min(len(first), len(last)) and first[count] == last[count]:
        count += 1
    return first[:count]
