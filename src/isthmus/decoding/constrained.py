"""Decoding under a constraint: the law, the drafts, and the end of an answer.

:class:`Constrained` is the reshape: it masks every node of a draft tree by the state of its own
path, so that any lossless acceptance rule stays lossless, for the constrained law. :class:`Forced`
drafts the text that admits no choice, which always stands, and prunes what the constraint forbids
from the drafts of others. :class:`Ending` follows an answer and says whether it is whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch

from isthmus.decoding.constraint import FREE, Grammar, State
from isthmus.decoding.generation import Generation
from isthmus.decoding.reshape import Walk
from isthmus.decoding.tree import TokenTree, chain_topology, merge, stack
from isthmus.errors import DeadEnd
from isthmus.roles import PLAIN, Context, Drafter, Extendable, Policy, Shape, Stage, Step, Target

NAME = "constraint"
"""Who drafted, in the trace, where the text admitted no choice."""


class Ending:
    """Follows one answer and says whether it is whole; a criterion of the stop rules.

    Attributes:
        status: ``"unfinished"`` (a valid beginning), ``"complete"``, or ``"broken"``.
    """

    def __init__(self, grammar: Grammar) -> None:
        self.grammar = grammar
        self._matcher = grammar.start()._matcher
        self._seen = 0
        self.status = "unfinished"

    def __call__(self, tokens: Sequence[int]) -> str:
        """Why an answer of these tokens is over, empty while it is not; tokens only grow."""
        for token in tokens[self._seen :]:
            self._seen += 1
            if self.status != "unfinished":
                continue
            if token in self.grammar.ends:
                self.status = "complete" if self._matcher.is_accepting() else "broken"
            elif self._matcher.try_consume_tokens([token]) != 1:
                self.status = "broken"
            elif self._matcher.is_stopped() and not self.grammar.ends:
                self.status = "complete"
        return "" if self.status == "unfinished" else "stop"

    def close(self, result: Generation) -> None:
        """Write into the notes what is to be said about a finished answer.

        Raises:
            DeadEnd: The constraint cannot be kept from here on.
        """
        self(result.tokens)
        whole = self.status == "complete" or (
            self.status == "unfinished" and self._matcher.is_accepting()
        )
        if self.status == "broken":
            raise DeadEnd(
                f"after {len(result.tokens)} tokens nothing that the constraint allows can follow; "
                "a processor bans it, the vocabulary cannot write it, or it is too complex"
            )
        if not whole:
            result.notes.append(
                f"the constraint is unfinished after {len(result.tokens)} tokens: the text is a "
                "valid beginning; raise max_new_tokens"
            )
        elif not self.grammar.exact:
            fault = self.grammar.judge(result.text)
            held = f"does not validate ({fault})" if fault else "validates all the same"
            result.notes.append(
                f"the schema is held in part only ({self.grammar.unheld}); this answer {held}"
            )


class Constrained(Walk[State]):
    """The reshape that masks every token the constraint of a request forbids.

    Args:
        grammar: Constraint of all requests without one of their own; None leaves them free.
        own: Constraints by request.
    """

    stage: Stage = "mask"

    def __init__(
        self, grammar: Grammar | None, own: Mapping[int, Grammar | None] | None = None
    ) -> None:
        super().__init__()
        self.grammar, self.own = grammar, {} if own is None else own

    def begin(self, context: Context, target: Target, **inputs: Any) -> None:
        """Start on new rows."""
        for b, request in enumerate(context.requests):
            grammar = self.own.get(request, self.grammar)
            state = FREE if grammar is None else grammar.start()
            self._states[request] = context.prompt_lengths[b], state

    def start(self, prompt: torch.Tensor) -> State:
        """The state after any prompt: an answer begins behind it."""
        return FREE if self.grammar is None else self.grammar.start()

    def advance(self, state: State, token: int) -> State:
        """The state after one more token."""
        return state.advance(token)

    def __call__(self, logits: torch.Tensor, tree: TokenTree, context: Context) -> torch.Tensor:
        """New logits [B, N, V], each node by its own path."""
        return super().__call__(logits, tree, context) if self.binds(context) else logits

    def binds(self, context: Context) -> bool:
        """Whether any row is under a constraint that it has not fulfilled yet."""
        # who is free stays free
        rows = (b for b, r in enumerate(context.requests) if self._states[r][1] is not FREE)
        return any(self.at_root(context, b).mask is not None for b in rows)

    def prune(self, tree: TokenTree, context: Context) -> TokenTree:
        """The tree without the nodes that cannot stand.

        Of a drawn tree, a forbidden node stays and only what is below it goes: that it was drawn
        is part of the law of what follows its rejection.
        """
        stands = torch.tensor([[s.alive for s in row] for row in self.at_nodes(tree, context)])
        keep = stands.to(tree.tokens.device)
        if tree.draw != "point":
            above = tree.topology.parent.clamp(min=0).expand_as(keep)
            keep = keep.gather(1, above)
        return tree if bool(keep.all()) else tree.prune(keep, closed=True)

    def apply(self, states: list[State], logits: torch.Tensor) -> torch.Tensor:
        """Logits [R, V] without the tokens that are not allowed.

        Raises:
            DeadEnd: Nothing is left, because something else bans what the constraint allows.
        """
        masks = {r: state.mask for r, state in enumerate(states)}
        bound = {r: mask for r, mask in masks.items() if mask is not None}
        if not bound:
            return logits
        words = np.stack([*bound.values()]).view(np.uint8)
        allowed = np.unpackbits(words, axis=1, bitorder="little")
        banned = torch.from_numpy(allowed[:, : logits.shape[-1]] == 0).to(logits.device)
        if len(bound) == len(states):
            masked = logits.masked_fill(banned, -torch.inf)
        else:
            rows = torch.tensor([*bound], device=logits.device)
            masked = logits.index_copy(0, rows, logits[rows].masked_fill(banned, -torch.inf))
        if bool((masked.amax(-1) == -torch.inf).any()):
            raise DeadEnd(
                "no token is left that the constraint allows: a processor bans them, or the model "
                "has no end token for an answer that is complete"
            )
        return masked


class Forced:
    """A policy that drafts what a constraint forces and prunes what it forbids.

    A round in which every row has forced tokens is drafted by the constraint alone; in others the
    inner policy has its say, and forced tokens stand beside its drafts.

    Args:
        policy: Who drafts where there is a choice.
        constraint: The constraint, as the law holds it.
    """

    def __init__(self, policy: Policy, constraint: Constrained) -> None:
        self.policy, self.constraint = policy, constraint
        self._inner: Drafter | None = None

    def begin(self, context: Context, target: Target, **inputs: Any) -> None:
        """See :class:`isthmus.roles.Policy`."""
        self.policy.begin(context, target, **inputs)

    def extend(self, context: Context, target: Target, **inputs: Any) -> None:
        """Pass the rows on."""
        cast(Extendable, self.policy).extend(context, target, **inputs)

    def decide(self, context: Context, limit: Shape) -> tuple[Drafter | None, Shape]:
        """The constraint where it forces every row, else the choice of the inner policy."""
        if not self.constraint.binds(context):
            self._inner, inner = self.policy.decide(context, limit)
            return self._inner, inner
        self._inner = None
        depth = min(limit.nodes, limit.depth)
        states = [self.constraint.at_root(context, b) for b in range(context.batch)]
        chains = [list(state.forced[:depth]) for state in states]
        longest = max(map(len, chains))
        shape = Shape(longest, longest, 1)
        # rows that are beyond their end want nothing
        if longest and all(
            chain or state.mask is None for chain, state in zip(chains, states, strict=True)
        ):
            self.policy.decide(context, PLAIN)
            return Guided(None, self.constraint, chains), shape
        self._inner, inner = self.policy.decide(context, limit)
        if self._inner is None or inner.nodes == 0:
            return (Guided(None, self.constraint, chains), shape) if longest else (None, PLAIN)
        return Guided(self._inner, self.constraint, chains), inner

    def observe(self, step: Step, drafter: Drafter | None) -> None:
        """Pass the round on, in the name of who was asked."""
        self.policy.observe(step, self._inner)

    def select(self, rows: Sequence[int]) -> None:
        """Pass the selection on."""
        self.policy.select(rows)


class Guided:
    """A drafter under a constraint, for one round.

    Args:
        drafter: Who drafts, or None for forced tokens alone.
        constraint: The constraint.
        chains: Forced tokens of each row.
    """

    def __init__(
        self, drafter: Drafter | None, constraint: Constrained, chains: Sequence[Sequence[int]]
    ) -> None:
        self.drafter, self.constraint, self.chains = drafter, constraint, chains
        names = [NAME] if any(chains) else []
        self.name = "|".join(names if drafter is None else [*names, drafter.name])
        self.begin = self.observe = self.select = self._outside

    def propose(self, context: Context, shape: Shape) -> TokenTree:
        """The drafter's tree without what cannot stand, and the forced chains."""
        if self.drafter is None:
            return self._forced(context)
        tree = self.constraint.prune(self.drafter.propose(context, shape), context)
        if tree.draw != "point" or not any(self.chains):
            return tree
        forced = self._forced(context)
        return stack([merge(forced.row(b), tree.row(b)) for b in range(tree.batch)])

    def _forced(self, context: Context) -> TokenTree:
        width = max(map(len, self.chains))
        tokens = [[*chain, *[0] * (width - len(chain))] for chain in self.chains]
        valid = [
            [True] * (1 + len(chain)) + [False] * (width - len(chain)) for chain in self.chains
        ]
        every = torch.cat([context.roots()[:, None], torch.tensor(tokens, dtype=torch.int64)], 1)
        ragged = None if all(len(chain) == width for chain in self.chains) else torch.tensor(valid)
        return TokenTree(every, chain_topology(width + 1), ragged)

    def _outside(self, *given: Any, **inputs: Any) -> None:
        """The policy, which owns the drafter, tells it itself."""
