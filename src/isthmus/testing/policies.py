"""The contract of a policy: it decides within its limit, before anything is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch

from isthmus.decoding.acceptance import Lossless
from isthmus.decoding.engine import Request, decode, extendable, wanted
from isthmus.decoding.law import Law
from isthmus.decoding.policy import Fixed
from isthmus.decoding.stopping import Stopper
from isthmus.decoding.table import TableTarget
from isthmus.roles import PLAIN, Context, Drafter, Policy, Shape, Step, Target


def check_policy(policy: Policy, *, target: Target | None = None, tokens: int = 40) -> None:
    """Check that a policy keeps the contract of :class:`isthmus.roles.Policy`.

    It decides through whole answers of a ragged batch whose rows leave one by one, and of one in
    which others take their places; every decision
    must lie within the limit it was given, a limit of 0 must give plain decoding, and the greedy
    output must be that of plain decoding.

    Args:
        policy: The policy, with drafters that know the target's vocabulary.
        target: What it decides for; a small
            :class:`~isthmus.decoding.table.TableTarget` that repeats itself when None.
        tokens: New tokens of the longest row.

    Raises:
        AssertionError: The contract is broken; the message says where.
    """
    target = target or TableTarget(vocab_size=11, seed=3, sharpness=2.0, order=2)
    plain = _run(Fixed(), target, tokens)
    watched = _Watched(policy)
    assert _run(watched, target, tokens) == plain, "greedy output differs from plain decoding"
    assert watched.decisions, "the policy was never asked"
    assert _run(watched, target, tokens) == plain, "the second batch differs from plain decoding"
    again = _run(watched, target, tokens, batch_size=2)
    assert again == plain, "greedy output differs from plain decoding where rows join later"


class _Watched:
    """A policy whose every decision is checked against its limit and against smaller ones."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.decisions = 0
        self.taps = wanted(policy)
        self.begin = policy.begin
        self.select = policy.select
        self.extend: Any = cast(Any, policy).extend if extendable(policy) else None

    def decide(self, context: Context, limit: Shape) -> tuple[Drafter | None, Shape]:
        """Ask for less first; the last decision counts."""
        nothing = self._ask(context, PLAIN)
        assert nothing[0] is None or nothing[1].nodes == 0, "a limit of 0 must give plain decoding"
        self._ask(context, Shape(min(3, limit.nodes), min(2, limit.depth), 1))
        return self._ask(context, limit)

    def _ask(self, context: Context, limit: Shape) -> tuple[Drafter | None, Shape]:
        drafter, shape = self.policy.decide(context, limit)
        self.decisions += 1
        # plain decoding draws nothing, so its width and depth say nothing
        within = shape.nodes == 0 or (
            0 < shape.nodes <= limit.nodes
            and 0 <= shape.depth <= limit.depth
            and 1 <= shape.width <= limit.width
        )
        assert within, f"{shape} exceeds the limit {limit}"
        return drafter, shape

    def observe(self, step: Step, drafter: Drafter | None) -> None:
        """Pass the round on."""
        self.policy.observe(step, drafter)


def _run(
    policy: Policy, target: Target, tokens: int, batch_size: int | None = None
) -> list[list[int]]:
    prompts: Sequence[Sequence[int]] = ((0, 1, 2, 0, 1, 2, 0, 1), (3, 1, 3), (2,), (4, 5))
    requests = [
        Request(torch.tensor(list(p)), Stopper(max_new_tokens=max(1, tokens * (i + 1) // 4)))
        for i, p in enumerate(prompts)
    ]
    rounds = decode(
        target,
        requests,
        policy=policy,
        acceptance=Lossless(),
        law=Law(),
        generator=torch.Generator().manual_seed(0),
        batch_size=batch_size,
    )
    for _ in rounds:
        pass
    return [r.result.tokens for r in requests]
