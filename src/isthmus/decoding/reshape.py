"""Bases of reshapes: one for those that keep nothing, one for those with a state along the path.

Along the path stand a constraint, counts of n-grams, a running threshold. The state of a request
follows its committed tokens; on a draft, every node has the state of its parent moved on by its
own token. States are values: moving on makes a new one, so that branches of a tree share what they
have in common.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import torch

from isthmus.decoding.tree import TokenTree
from isthmus.roles import Context, Stage, Taps, Target

State = TypeVar("State")


class Pure(ABC):
    """A reshape that keeps nothing: the law at a node follows from what this one call shows.

    Attributes:
        stage: When it has its turn.
        taps: Inner states of the target that it reads.
    """

    stage: Stage = "combine"
    taps = Taps()

    def begin(self, context: Context, target: Target, **inputs: Any) -> None:
        """Nothing to start."""
        del context, target, inputs

    def forget(self, requests: Sequence[int]) -> None:
        """Nothing to let go of."""
        del requests

    def fork(self, parents: Sequence[int], requests: Sequence[int]) -> None:
        """Nothing to copy."""
        del parents, requests

    @abstractmethod
    def __call__(self, logits: torch.Tensor, tree: TokenTree, context: Context) -> torch.Tensor:
        """New logits [B, N, V]; see :class:`isthmus.roles.Reshape`."""


class Walk(ABC, Generic[State]):
    """A reshape whose law at a node depends on the tokens before it through a state.

    Attributes:
        stage: When it has its turn.
        taps: Inner states of the target that it reads.
    """

    stage: Stage = "combine"
    taps = Taps()

    def __init__(self) -> None:
        self._states: dict[int, tuple[int, State]] = {}  # by request: tokens walked, state

    @abstractmethod
    def start(self, prompt: torch.Tensor) -> State:
        """State after a prompt, int64 [T]."""

    @abstractmethod
    def advance(self, state: State, token: int) -> State:
        """A new state, one token on; the given one stays as it is.

        Drafts may hold tokens that the law bans; whatever is answered for those is never used.
        """

    @abstractmethod
    def apply(self, states: list[State], logits: torch.Tensor) -> torch.Tensor:
        """New logits [R, V] from those given, one state a row."""

    def begin(self, context: Context, target: Target, **inputs: Any) -> None:
        """Start on new rows."""
        del target, inputs
        for b, request in enumerate(context.requests):
            prompt = context.ids[b, : context.prompt_lengths[b]]
            self._states[request] = len(prompt), self.start(prompt)

    def forget(self, requests: Sequence[int]) -> None:
        """Let go of requests that have left."""
        for request in requests:
            self._states.pop(request, None)

    def fork(self, parents: Sequence[int], requests: Sequence[int]) -> None:
        """Follow hypotheses that are copied: states are values, so copies may share them."""
        self._states = {r: self._states[p] for r, p in zip(requests, parents, strict=True)}

    def at_root(self, context: Context, row: int) -> State:
        """State of a row after its committed tokens."""
        request, length = context.requests[row], context.lengths[row]
        walked, state = self._states[request]
        for token in context.ids[row, walked:length].tolist():
            state = self.advance(state, token)
        self._states[request] = length, state
        return state

    def at_nodes(self, tree: TokenTree, context: Context) -> list[list[State]]:
        """State of every node of every row."""
        tokens, parents = tree.tokens.tolist(), tree.topology.parent.expand(tree.batch, -1).tolist()
        out = []
        for b in range(tree.batch):
            states = [self.at_root(context, b)]
            for node in range(1, tree.nodes):
                states.append(self.advance(states[parents[b][node]], tokens[b][node]))
            out.append(states)
        return out

    def __call__(self, logits: torch.Tensor, tree: TokenTree, context: Context) -> torch.Tensor:
        """New logits [B, N, V], each node by its own path."""
        states = [state for row in self.at_nodes(tree, context) for state in row]
        return self.apply(states, logits.flatten(0, 1)).view_as(logits)
