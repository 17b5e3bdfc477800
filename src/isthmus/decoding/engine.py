"""The loop: propose -> score -> accept -> commit -> observe.

Plain decoding is this loop with an empty draft. The loop knows no method by name: who drafts and
how much is the policy's business, which draft tokens stand is the acceptance rule's. Rows of a
batch accept different numbers of tokens in the same round; finished rows leave the batch once a
quarter of it is done.

Order of one round::

    shape   = policy.decide(context)            before anything is drawn
    tree    = drafter.propose(context, shape)   [B, N] tokens
    logits  = session.score(tree)               one forward of the target, [B, N, V]
    verdict = acceptance.accept(tree, logits)   path and final token
    cut       at an end token, a stop string or the budget
    session.keep(path)                          roll back to one path
    policy.observe(step)
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from isthmus.decoding.generation import Generation
from isthmus.decoding.stopping import Stopper
from isthmus.decoding.tree import TokenTree
from isthmus.errors import InvalidInputError
from isthmus.roles import (
    PLAIN,
    Acceptance,
    Context,
    Law,
    Policy,
    RoundTrace,
    Session,
    Shape,
    Step,
    Taps,
    Target,
)


@dataclass
class Request:
    """One prompt on its way through the loop.

    Attributes:
        prompt: Token ids, int64 [T] on the CPU, T >= 1. For encoder-decoder targets these are the
            decoder's start tokens.
        stopper: Its stop rules.
        result: Filled in as decoding goes on.
    """

    prompt: torch.Tensor
    stopper: Stopper
    result: Generation = field(default_factory=Generation)


def decode(
    target: Target,
    requests: Sequence[Request],
    *,
    policy: Policy,
    acceptance: Acceptance,
    law: Law,
    generator: torch.Generator,
    inputs: dict[str, Any] | None = None,
    trace: bool = False,
) -> Iterator[list[tuple[int, list[int]]]]:
    """Decode a batch, one round at a time.

    Args:
        target: The model whose output stays unchanged.
        requests: B prompts; their ``result`` fields are filled in.
        policy: Decides who drafts and how much.
        acceptance: Decides which draft tokens stand.
        law: The sampling law.
        generator: Source of every random draw.
        inputs: Encoder inputs of encoder-decoder targets, first axis B.
        trace: Keep the drafted tokens of every round in the trace.

    Yields:
        After each round, pairs (request index, new tokens).

    Raises:
        InvalidInputError: An empty prompt, or one that leaves no room in the context.
    """
    for request in requests:
        _check_prompt(request, target.max_length)
    rows = target.max_batch or len(requests)
    for first in range(0, len(requests), rows):
        part = slice(first, first + rows)
        chunk = dict(inputs or {})
        if rows < len(requests):  # a row may come with several images, so only where it must be
            chunk = {k: v[part] if torch.is_tensor(v) else v for k, v in chunk.items()}
        batch = _Batch(target, requests[part], policy, acceptance, law, generator, chunk, trace)
        for emitted in batch.run():
            yield [(first + index, tokens) for index, tokens in emitted]


def _check_prompt(request: Request, max_length: int | None) -> None:
    n = len(request.prompt)
    if n == 0:
        raise InvalidInputError("the prompt is empty; give at least one token")
    if max_length is not None:
        if n >= max_length:
            raise InvalidInputError(
                f"the prompt has {n} tokens and the model's context is {max_length}; shorten the "
                "prompt or use a model with a longer context"
            )
        room = max_length - n
        if request.stopper.max_new_tokens > room:
            request.result.notes.append(
                f"max_new_tokens cut from {request.stopper.max_new_tokens} to {room}, the room "
                f"left in a context of {max_length}"
            )
            request.stopper.max_new_tokens = room


def wanted(part: Any) -> Taps:
    """What a policy, drafter or acceptance rule taps, and what the drafters inside it do."""
    taps: Taps = getattr(part, "taps", Taps())
    inner = [getattr(part, "drafter", None), *getattr(part, "drafters", ())]
    for drafter in inner:
        if drafter is not None:
            taps |= wanted(drafter)
    return taps


class _Batch:
    """State of the rows that are decoded together."""

    def __init__(
        self,
        target: Target,
        requests: Sequence[Request],
        policy: Policy,
        acceptance: Acceptance,
        law: Law,
        generator: torch.Generator,
        inputs: dict[str, Any],
        trace: bool,
    ) -> None:
        self.target, self.requests, self.inputs = target, list(requests), inputs
        self.policy, self.acceptance, self.trace = policy, acceptance, trace
        longest = max(len(r.prompt) + r.stopper.max_new_tokens for r in requests)
        # int32 would do; int64 spares a conversion at every lookup
        ids = torch.zeros(len(requests), longest + 1, dtype=torch.int64)
        for row, request in enumerate(requests):
            ids[row, : len(request.prompt)] = request.prompt
            request.result.prompt_tokens = len(request.prompt)
            request.result.lossless = acceptance.lossless
        lengths = [len(r.prompt) for r in requests]
        self.context = Context(
            ids,
            lengths,
            list(lengths),
            law,
            generator,
            list(range(len(requests))),
            getattr(acceptance, "noise", None),
        )
        self.taps = wanted(policy) | wanted(acceptance)
        self.ends = torch.tensor(sorted({t for r in requests for t in r.stopper.end_tokens}))
        self.session: Session

    def run(self) -> Iterator[list[tuple[int, list[int]]]]:
        clock = time.perf_counter
        start = clock()
        context = self.context
        self.session = self.target.session(context.batch, **self.inputs)
        rows = [context.row(b)[:-1] for b in range(context.batch)]
        context.session = self.session
        if any(len(r) for r in rows):
            context.features = self.session.prefill(rows, taps=self.taps)
        self.parts = dict.fromkeys(("draft", "score", "accept", "commit", "observe"), 0.0)
        self.parts = {"prefill": clock() - start, **self.parts}
        self.policy.begin(context, self.target, **self.inputs)
        while context.batch:
            yield self.round(start)
            self.drop_finished()

    def limit(self) -> Shape:
        """What the budget, the context and the target's reach leave room for."""
        if self.target.reach == "step":
            return PLAIN
        left = max(
            self.requests[r].stopper.max_new_tokens - len(self.requests[r].result.tokens)
            for r in self.context.requests
        )
        depth = left - 1  # the final token needs no node
        if self.target.max_length is not None:
            depth = min(depth, self.target.max_length - max(self.context.lengths))
        nodes = self.target.max_nodes
        width = 1 if self.target.reach == "chain" else nodes
        return Shape(nodes if depth > 0 else 0, max(0, depth), width)

    def round(self, start: float) -> list[tuple[int, list[int]]]:
        clock, context, parts = time.perf_counter, self.context, self.parts
        t0 = clock()
        limit = self.limit()
        drafter, shape = self.policy.decide(context, limit)
        shape = shape.capped(limit.nodes, limit.depth, limit.width)
        if drafter is None or shape.nodes == 0:
            tree = TokenTree.root(context.roots())
        else:
            tree = drafter.propose(context, shape)
            if limit.width == 1:
                tree = tree.first_chain()
            tree = tree.limit(nodes=shape.nodes, depth=shape.depth)
        tree = tree.to(getattr(self.target, "device", tree.tokens.device))
        tree = tree.below(self.ends.to(tree.tokens.device))
        t1 = clock()
        scores = self.session.score(tree, taps=self.taps)
        context.features = scores.features
        t2 = clock()
        verdict = self.acceptance.accept(tree, scores.logits, context)
        t3 = clock()
        emitted, accepted = self.commit(tree, verdict.path, verdict.token, drafter)
        t4 = clock()
        step = Step(
            tree,
            scores.logits,
            verdict,
            accepted,
            context,
            shape,
            t1 - t0,
            t2 - t1,
            scores.features,
        )
        self.policy.observe(step, drafter)
        t5 = clock()
        for name, seconds in zip(
            ("draft", "score", "accept", "commit", "observe"),
            (t1 - t0, t2 - t1, t3 - t2, t4 - t3, t5 - t4),
            strict=True,
        ):
            parts[name] += seconds
        for row in context.requests:
            stats = self.requests[row].result.stats
            if not self.requests[row].result.finish_reason or emitted:
                stats.seconds, stats.parts_s = t5 - start, parts
        return emitted

    def commit(
        self, tree: TokenTree, path: torch.Tensor, final: torch.Tensor, drafter: Any
    ) -> tuple[list[tuple[int, list[int]]], list[int]]:
        """Cut each row where it ends, roll the cache back to what stands, write the tokens."""
        context = self.context
        tokens, steps, finals = tree.tokens.tolist(), path.tolist(), final.tolist()
        drafted = tree.drafted()
        emitted, accepted, keep, cut = [], [], [], False
        for b, index in enumerate(context.requests):
            request = self.requests[index]
            walked = [node for node in steps[b] if node >= 0]
            depth = len(walked)
            accepted.append(depth - 1)
            if request.result.finish_reason:
                keep.append(0)
                cut = True
                continue
            new = [*(tokens[b][node] for node in walked[1:]), finals[b]]
            kept = request.stopper.cut(request.result.tokens, new)
            new = new[:kept]
            n = context.lengths[b]
            context.ids[b, n : n + kept] = torch.tensor(new)
            context.lengths[b] = n + kept
            keep.append(kept)  # the root and all but the last of the new tokens
            cut = cut or kept < depth
            result = request.result
            result.tokens += new
            result.finish_reason = request.stopper.reason
            self.count(result, tree, b, drafted[b], min(depth - 1, kept), kept, drafter)
            emitted.append((index, new))
        if cut:
            width = torch.arange(path.shape[1], device=path.device)
            path = torch.where(width < torch.tensor(keep, device=path.device)[:, None], path, -1)
        self.session.keep(path)
        return emitted, accepted

    def count(
        self,
        result: Generation,
        tree: TokenTree,
        row: int,
        drafted: int,
        accepted: int,
        emitted: int,
        drafter: Any,
    ) -> None:
        """Add one round to the result."""
        stats = result.stats
        stats.new_tokens += emitted
        stats.target_forwards += 1
        stats.drafted += drafted
        stats.accepted += accepted
        detail: dict[str, Any] = {}
        if self.trace and tree.nodes > 1:
            parents = tree.topology.parent.expand(tree.batch, -1)[row]
            alive = tree.alive[row]
            detail["drafted"] = tuple(torch.where(alive, tree.tokens[row], -1)[1:].tolist())
            detail["parents"] = tuple(parents[1:].tolist())
        name = drafter.name if drafter is not None and drafted else "none"
        result.rounds.append(RoundTrace(name, drafted, accepted, emitted, **detail))

    def drop_finished(self) -> None:
        """Remove finished rows once they are a quarter of the batch."""
        context = self.context
        alive = [
            b for b, r in enumerate(context.requests) if not self.requests[r].result.finish_reason
        ]
        gone = context.batch - len(alive)
        if gone == 0 or (alive and gone * 4 < context.batch):
            return
        if alive:
            self.session = context.session = self.session.fork(alive)
            self.policy.select(alive)
        context.ids = context.ids[alive]
        context.lengths = [context.lengths[b] for b in alive]
        context.prompt_lengths = [context.prompt_lengths[b] for b in alive]
        context.requests = [context.requests[b] for b in alive]
