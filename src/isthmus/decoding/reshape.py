"""Bases of reshapes: for those that keep nothing, and for those with a state along the path.

Along the path stand a constraint, counts of n-grams, a running threshold. The state of a request
follows its committed tokens; on a draft, every node has the state of its parent moved on by its
own token. States are values: moving on makes a new one, so that branches of a tree share what they
have in common. A :class:`Walk` learns from tokens alone, a :class:`Trail` also from what the target
said at them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import torch

from isthmus.decoding.tree import TokenTree
from isthmus.errors import MismatchError
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


class Trail(ABC, Generic[State]):
    """A reshape whose law depends on what the target said at the tokens that stand.

    Which tokens of a draft stand is known after the call only, so the tree is held until the next
    call shows. Subclasses call :meth:`settle` first thing and :meth:`hold` last.

    Attributes:
        stage: When it has its turn.
        taps: Inner states of the target that it reads.
        hears: It must be shown the target's logits only; see :class:`isthmus.roles.Reshape`.
        states: By request, as far as tokens stand.
    """

    stage: Stage = "truncate"
    taps = Taps()
    hears = True

    def __init__(self) -> None:
        self.states: dict[int, State] = {}
        self._tree: TokenTree | None = None
        self._held: dict[int, tuple[int, int]] = {}  # by request: row of the tree, its length then

    @abstractmethod
    def stood(self, state: State, row: int, nodes: list[int], token: int) -> State:
        """A new state: in a row of the tree held these nodes stand, the root first, then a token.

        What the token's own node says is not known yet.
        """

    def settle(self, context: Context) -> None:
        """Move the states on by what has been committed since the last call.

        Raises:
            MismatchError: A token was committed that the last tree has no node for.
        """
        tree = self._tree
        if tree is None:
            return
        new: list[tuple[int, int, torch.Tensor]] = []
        for b, request in enumerate(context.requests):
            if request in self._held:
                row, length = self._held[request]
                if context.lengths[b] > length:
                    new.append((request, row, context.ids[b, length : context.lengths[b]]))
        if not new:
            return
        width = max(len(tokens) for _, _, tokens in new) - 1
        tokens = torch.full((tree.batch, width), -1)
        for _, row, line in new:  # hypotheses may share a row, and its root alone stands
            tokens[row, : len(line) - 1] = line[:-1]
        found = tree.follow(tokens).tolist() if width else [[0]] * tree.batch
        for request, row, line in new:
            nodes = [node for node in found[row] if node >= 0][: len(line)]
            if len(nodes) < len(line):
                raise MismatchError(
                    f"{type(self).__name__} has to see the target at every token, and some were "
                    "committed without; use an acceptance rule of isthmus' own loop"
                )
            self.states[request] = self.stood(self.states[request], row, nodes, int(line[-1]))

    def hold(self, tree: TokenTree, context: Context) -> None:
        """Remember the tree until it is known what of it stands."""
        self._tree = tree
        rows = zip(context.requests, context.lengths, strict=True)
        self._held = {request: (b, length) for b, (request, length) in enumerate(rows)}

    def forget(self, requests: Sequence[int]) -> None:
        """Let go of requests that have left."""
        for request in requests:
            self.states.pop(request, None)
            self._held.pop(request, None)

    def fork(self, parents: Sequence[int], requests: Sequence[int]) -> None:
        """Follow hypotheses that are copied; their new tokens are seen at the next call."""
        pairs = list(zip(requests, parents, strict=True))
        self.states = {r: self.states[p] for r, p in pairs}
        self._held = {r: self._held[p] for r, p in pairs if p in self._held}

    @abstractmethod
    def begin(self, context: Context, target: Target, **inputs: Any) -> None:
        """Start on new rows: fill ``states`` for ``context.requests``."""

    @abstractmethod
    def __call__(self, logits: torch.Tensor, tree: TokenTree, context: Context) -> torch.Tensor:
        """New logits [B, N, V]; see :class:`isthmus.roles.Reshape`."""


class History(Trail[torch.Tensor]):
    """A :class:`Trail` of the target's last hidden states, [T, D] a request, all but the root's."""

    taps = Taps(final=True)

    def begin(self, context: Context, target: Target, **inputs: Any) -> None:
        """Take the states of the prompts, or read those again that were read beside the batch."""
        features, rows = context.features, [context.row(b)[:-1] for b in range(context.batch)]
        if features is None and any(len(row) for row in rows):
            features = target.session(context.batch, **inputs).prefill(rows, taps=self.taps)
        for b, request in enumerate(context.requests):
            if features is None or features.final is None:
                self.states[request] = torch.zeros(0, 0)
            else:
                self.states[request] = features.final[b, : len(rows[b])]
            self._held.pop(request, None)

    def stood(self, state: torch.Tensor, row: int, nodes: list[int], token: int) -> torch.Tensor:
        """Append the states of the nodes."""
        del token  # it is the next root
        fresh = self._final[row, nodes]
        return torch.cat([state, fresh]) if len(state) else fresh

    def look(
        self, tree: TokenTree, context: Context
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Settle, hold, and give the states at the nodes and before them.

        Returns:
            At the nodes [B, N, D]; at the tokens before the root [B, T, D], padded at the end; and
            which of those are real, bool [B, T].
        """
        self.settle(context)
        assert context.features is not None and context.features.final is not None
        self._final = now = context.features.final
        self.hold(tree, context)
        past = [self.states[request] for request in context.requests]
        longest = max(len(p) for p in past)
        padded = now.new_zeros(len(past), longest, now.shape[-1])
        for row, states in zip(padded, past, strict=True):
            if len(states):  # nothing is known of the width of none
                row[: len(states)] = states
        count = torch.tensor([len(p) for p in past], device=now.device)
        return now, padded, torch.arange(longest, device=now.device) < count[:, None]
