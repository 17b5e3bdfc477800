"""The loop: propose -> score -> accept -> commit -> observe.

Plain decoding is this loop with an empty draft. The loop knows no method by name: who drafts and
how much is the policy's business, which draft tokens stand is the acceptance rule's. Rows of a
batch accept different numbers of tokens in the same round; finished rows leave the batch once a
quarter of it is done.

Batching is continuous: requests wait in a line, and those at its head take the places that have
become free. Their prompts are read beside the batch, a chunk between two rounds, and then their
rows join it. A fixed batch is the case of a line that everybody leaves at once. Policies and
drafters that cannot take in rows (:class:`isthmus.roles.Extendable`) get an empty batch to begin
on instead.

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
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, cast

import torch
import torch.nn.functional as F

from isthmus.decoding.acceptance import match_path
from isthmus.decoding.generation import Generation
from isthmus.decoding.stopping import Stopper
from isthmus.decoding.tree import TokenTree
from isthmus.errors import InvalidInputError
from isthmus.roles import (
    PLAIN,
    Acceptance,
    Context,
    Extendable,
    Law,
    Policy,
    RoundTrace,
    Shape,
    Step,
    Taps,
    Target,
)

PREFILL_TOKENS = 512
"""Prompt tokens that are read between two rounds of the rows at work: bounds their wait."""

UNDRAFTED = RoundTrace("none", 0, 0, 1)
"""What every round of plain decoding leaves behind, the same for all rows."""

PATIENCE = 8
"""Rounds after which rows join or leave though they are less than a quarter of the batch."""


@dataclass
class Request:
    """One prompt on its way through the loop.

    Attributes:
        prompt: Token ids, int64 [T] on the CPU, T >= 1. For encoder-decoder targets these are the
            decoder's start tokens.
        stopper: Its stop rules.
        result: Filled in as decoding goes on.
        inputs: Encoder inputs of this request alone, first axis 1; the second is padded with
            zeros where sources of unlike length are encoded together.
        trace: Keep the drafted tokens of its rounds.
    """

    prompt: torch.Tensor
    stopper: Stopper
    result: Generation = field(default_factory=Generation)
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    trace: bool = False


def decode(
    target: Target,
    requests: Iterable[Request],
    *,
    policy: Policy,
    acceptance: Acceptance,
    law: Law,
    generator: torch.Generator,
    inputs: dict[str, Any] | None = None,
    batch_size: int | None = None,
    trace: bool = False,
) -> Generator[list[tuple[int, list[int]]]]:
    """Decode requests, one round at a time.

    Args:
        target: The model whose output stays unchanged.
        requests: Prompts, read only as places become free; their ``result`` fields are filled in.
        policy: Decides who drafts and how much.
        acceptance: Decides which draft tokens stand.
        law: The sampling law.
        generator: Source of every random draw.
        inputs: Encoder inputs of all requests, first axis B, instead of each request's own.
        batch_size: Rows at work at most; all requests at once when None.
        trace: Keep the drafted tokens of every round in the trace.

    Yields:
        After each round, pairs (request index, new tokens).

    Raises:
        InvalidInputError: An empty prompt, or one that leaves no room in the context.
    """
    if isinstance(requests, Sequence):
        for request in requests:  # before anything is decoded
            check_prompt(request, target.max_length)
    sizes = [n for n in (batch_size, target.max_batch) if n is not None]
    yield from _Loop(
        target,
        requests,
        policy,
        acceptance,
        law,
        generator,
        inputs,
        min(sizes, default=None),
        trace,
    ).run()


def check_prompt(request: Request, max_length: int | None) -> None:
    """Refuse a prompt that cannot be continued, and cut the budget to the context.

    Raises:
        InvalidInputError: It is empty or leaves no room.
    """
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


def _inside(part: Any) -> list[Any]:
    """The drafters and the policy inside a policy or a drafter."""
    inner = [getattr(part, name, None) for name in ("policy", "drafter")]
    inner += getattr(part, "drafters", ())
    return [part for part in inner if part is not None]


def wanted(part: Any) -> Taps:
    """What a policy, drafter or acceptance rule taps, and what the drafters inside it do."""
    taps: Taps = getattr(part, "taps", Taps())
    for inner in _inside(part):
        taps |= wanted(inner)
    return taps


def choice_suffices(policy: Any, acceptance: Any, law: Any) -> bool:
    """Whether policy, acceptance rule and law read no more of logits than which is the largest.

    A policy says so by ``reads_logits``, a rule by ``reads_choice``, a law by being plain
    and greedy.
    """
    plain = bool(getattr(law, "plain", False)) and law.greedy
    own = not getattr(policy, "reads_logits", True)
    return plain and own and bool(getattr(acceptance, "reads_choice", False))


def extendable(part: Any) -> bool:
    """Whether a policy or drafter, and the drafters inside it, take in rows of a running batch.

    A class that begins or selects in its own way has state of its own, which an ``extend`` that it
    only inherits does not know of.
    """
    kin = type(part).__mro__

    def place(name: str) -> int:
        return next((i for i, kind in enumerate(kin) if name in vars(kind)), len(kin))

    own = place("extend") <= min(place("begin"), place("select"))
    able = own and callable(getattr(part, "extend", None))
    return able and all(extendable(inner) for inner in _inside(part))


def collate(rows: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Encoder inputs of several requests as one batch, padded with zeros along the second axis.

    Example:
        >>> collate([{"x": torch.tensor([[1, 2]])}, {"x": torch.tensor([[3]])}])["x"].tolist()
        [[1, 2], [3, 0]]
    """
    out = {}
    for name in rows[0]:
        parts = [row[name].transpose(0, 1) for row in rows]  # [T, 1, ...]
        widest = max(len(p) for p in parts)
        padded = [torch.cat([p, p.new_zeros(widest - len(p), *p.shape[1:])]) for p in parts]
        out[name] = torch.cat(padded, 1).transpose(0, 1)
    return out


class _Newcomers:
    """Requests that have left the line; their prompts are read before their rows join the batch."""

    def __init__(self, context: Context, inputs: dict[str, Any]) -> None:
        self.context, self.inputs = context, inputs
        self.rows = [context.row(b)[:-1] for b in range(context.batch)]
        self.read = 0

    def prefill(self, tokens: int | None, taps: Taps | None) -> bool:
        """Read some tokens of all rows together, or all of them; returns whether that was all."""
        longest = max(len(row) for row in self.rows)
        step = longest if tokens is None else max(1, tokens // len(self.rows))
        chunk = [row[self.read : self.read + step] for row in self.rows]
        assert self.context.session is not None
        if any(len(row) for row in chunk):
            self.context.features = self.context.session.prefill(chunk, taps=taps)
        self.read += step
        return self.read >= longest


class _Loop:
    """The line of waiting requests and the rows at work."""

    def __init__(
        self,
        target: Target,
        requests: Iterable[Request],
        policy: Policy,
        acceptance: Acceptance,
        law: Law,
        generator: torch.Generator,
        inputs: dict[str, Any] | None,
        batch_size: int | None,
        trace: bool,
    ) -> None:
        self.target, self.policy, self.acceptance = target, policy, acceptance
        self.law, self.generator, self.inputs, self.trace = law, generator, inputs, trace
        self.line, self.batch_size = iter(requests), batch_size
        # a row may come with several images, so the inputs of all are split only where they must be
        self.total = len(requests) if isinstance(requests, Sequence) else None
        self.admitted = 0  # requests that have left the line
        self.rounds = self.joined = self.left = 0  # so far, and when rows last joined or left
        self.requests: dict[int, Request] = {}
        self.clock: dict[str, float] = {}  # seconds of each part so far
        self.since: dict[int, tuple[float, dict[str, float]]] = {}  # when each came, and its clock
        self.newcomers: _Newcomers | None = None
        self.context = self.rows([])
        self.taps = wanted(policy) | wanted(acceptance) | law.taps
        self.grows = extendable(policy)
        self.choice = choice_suffices(policy, acceptance, law)
        self.ends = torch.zeros(0, dtype=torch.int64)

    def run(self) -> Iterator[list[tuple[int, list[int]]]]:
        try:
            self.admit()
            while self.newcomers or self.context.batch:
                if self.newcomers:
                    self.prefill(self.newcomers)
                if self.context.batch:
                    yield self.round()
                    self.rounds += 1
                    self.drop_finished()
                self.admit()
        finally:  # whoever reads no further has the times so far
            self.settle([*self.since])

    def rows(self, indices: Sequence[int]) -> Context:
        """What is known of the given requests at their start."""
        prompts = [self.requests[index].prompt for index in indices]
        budgets = [self.requests[index].stopper.max_new_tokens for index in indices]
        longest = max((len(p) + n for p, n in zip(prompts, budgets, strict=True)), default=0)
        # int32 would do; int64 spares a conversion at every lookup
        ids = torch.zeros(len(prompts), longest + 1, dtype=torch.int64)
        for row, prompt in zip(ids, prompts, strict=True):
            row[: len(prompt)] = prompt
        lengths = [len(p) for p in prompts]
        noise = getattr(self.acceptance, "noise", None)
        return Context(ids, lengths, list(lengths), self.law, self.generator, list(indices), noise)

    def admit(self) -> None:
        """Let the head of the line take the free places, once they are a quarter of the batch.

        Joining copies the batch, so one place alone waits a few rounds, but never for other rows.
        """
        free = None if self.batch_size is None else self.batch_size - self.context.batch
        worth = free is not None and 4 * free >= (self.batch_size or 0) > 0
        enough = self.grows and (worth or self.rounds - self.joined >= PATIENCE)
        if self.newcomers or (self.context.batch and not enough):
            return
        fresh = list(islice(self.line, free))
        if not fresh:
            return
        start, self.joined = time.perf_counter(), self.rounds
        first, self.admitted = self.admitted, self.admitted + len(fresh)
        for index, request in enumerate(fresh, first):
            check_prompt(request, self.target.max_length)
            request.result.prompt_tokens = len(request.prompt)
            request.result.lossless = self.acceptance.lossless
            self.requests[index], self.since[index] = request, (start, dict(self.clock))
        inputs: dict[str, Any] = {}
        if self.inputs is None:
            inputs = collate([request.inputs for request in fresh])
        elif len(fresh) == self.total:
            inputs = self.inputs
        else:
            part = slice(first, self.admitted)
            inputs = {k: v[part] if torch.is_tensor(v) else v for k, v in self.inputs.items()}
        context = self.rows(range(first, self.admitted))
        context.session = self.target.session(len(fresh), **inputs)
        self.newcomers = _Newcomers(context, inputs)
        self.spend(prefill=time.perf_counter() - start)

    def prefill(self, newcomers: _Newcomers) -> None:
        """Read on in the prompts of the newcomers; whose prompt is read joins the batch."""
        start, context, new = time.perf_counter(), self.context, newcomers.context
        if not context.batch:
            newcomers.prefill(None, self.taps)
            self.context, self.newcomers = new, None
            self.law.begin(new, self.target, **newcomers.inputs)
            self.policy.begin(new, self.target, **newcomers.inputs)
        elif newcomers.prefill(PREFILL_TOKENS, None):
            self.newcomers = None
            assert context.session is not None and new.session is not None
            self.law.begin(new, self.target, **newcomers.inputs)
            cast(Extendable, self.policy).extend(new, self.target, **newcomers.inputs)
            context.session = context.session.join(new.session)
            short = new.ids.shape[1] - context.ids.shape[1]
            both = (F.pad(context.ids, (0, max(short, 0))), F.pad(new.ids, (0, max(-short, 0))))
            context.ids = torch.cat(both)
            context.lengths += new.lengths
            context.prompt_lengths += new.prompt_lengths
            context.requests += new.requests
        ends = {t for r in self.context.requests for t in self.requests[r].stopper.end_tokens}
        self.ends = torch.tensor(sorted(ends), dtype=torch.int64)
        self.spend(prefill=time.perf_counter() - start)

    def spend(self, **parts: float) -> None:
        """Add seconds to the clock that all requests wait by."""
        for name, seconds in parts.items():
            self.clock[name] = self.clock.get(name, 0.0) + seconds

    def settle(self, indices: Iterable[int]) -> None:
        """Give requests the times that they took."""
        now = time.perf_counter()
        for index in indices:
            stats, (start, before) = self.requests[index].result.stats, self.since.pop(index)
            stats.seconds = now - start
            stats.parts_s = {k: s - before.get(k, 0.0) for k, s in self.clock.items()}

    def alive(self) -> list[int]:
        """Rows whose requests are not finished yet."""
        requests = enumerate(self.context.requests)
        return [b for b, r in requests if not self.requests[r].result.finish_reason]

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

    def round(self) -> list[tuple[int, list[int]]]:
        clock, context, session = time.perf_counter, self.context, self.context.session
        assert session is not None
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
        score = getattr(session, "choose", session.score) if self.choice else session.score
        scores = score(tree, taps=self.taps)
        context.features = scores.features
        t2 = clock()
        if scores.choice is None:
            verdict = self.acceptance.accept(tree, scores.logits, context)
        else:
            verdict = match_path(tree, scores.choice)
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
        self.spend(draft=t1 - t0, score=t2 - t1, accept=t3 - t2, commit=t4 - t3, observe=t5 - t4)
        self.settle(i for i, _ in emitted if self.requests[i].result.finish_reason)
        return emitted

    def commit(
        self, tree: TokenTree, path: torch.Tensor, final: torch.Tensor, drafter: Any
    ) -> tuple[list[tuple[int, list[int]]], list[int]]:
        """Cut each row where it ends, roll the cache back to what stands, write the tokens."""
        if tree.nodes == 1:
            return self.commit_one(path, final)
        context = self.context
        tokens, steps, finals = tree.tokens.tolist(), path.tolist(), final.tolist()
        drafted, ids = tree.drafted(), context.ids.numpy()  # on the CPU: a view
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
            ids[b, n : n + kept] = new
            context.lengths[b] = n + kept
            keep.append(kept)  # the root and all but the last of the new tokens
            cut = cut or kept < depth
            result = request.result
            result.tokens += new
            result.finish_reason = request.stopper.reason
            trace = self.trace or request.trace
            self.count(result, tree, b, drafted[b], min(depth - 1, kept), kept, drafter, trace)
            emitted.append((index, new))
        if cut:
            width = torch.arange(path.shape[1], device=path.device)
            path = torch.where(width < torch.tensor(keep, device=path.device)[:, None], path, -1)
        assert context.session is not None
        context.session.keep(path)
        return emitted, accepted

    def commit_one(
        self, path: torch.Tensor, final: torch.Tensor
    ) -> tuple[list[tuple[int, list[int]]], list[int]]:
        """The same where nothing was drafted; small models spend a good part of a round here."""
        context, finals = self.context, final.tolist()
        lengths, ids = context.lengths, context.ids.numpy()
        emitted, ended = [], []
        for b, index in enumerate(context.requests):
            request = self.requests[index]
            result, stopper = request.result, request.stopper
            if result.finish_reason:
                ended.append(b)
                continue
            new = [finals[b]]
            stopper.cut(result.tokens, new)  # a token alone always stands
            ids[b, lengths[b]] = finals[b]
            lengths[b] += 1
            result.tokens += new
            result.finish_reason = stopper.reason
            result.stats.new_tokens += 1
            result.stats.target_forwards += 1
            result.rounds.append(UNDRAFTED)
            emitted.append((index, new))
        if ended:
            path = path.clone()
            path[ended] = -1
        assert context.session is not None
        context.session.keep(path)
        return emitted, [0] * context.batch

    def count(
        self,
        result: Generation,
        tree: TokenTree,
        row: int,
        drafted: int,
        accepted: int,
        emitted: int,
        drafter: Any,
        trace: bool,
    ) -> None:
        """Add one round to the result."""
        stats = result.stats
        stats.new_tokens += emitted
        stats.target_forwards += 1
        stats.drafted += drafted
        stats.accepted += accepted
        detail: dict[str, Any] = {}
        if trace:
            parents = tree.topology.parent.expand(tree.batch, -1)[row]
            alive = tree.alive[row]
            detail["drafted"] = tuple(torch.where(alive, tree.tokens[row], -1)[1:].tolist())
            detail["parents"] = tuple(parents[1:].tolist())
        name = drafter.name if drafter is not None and drafted else "none"
        result.rounds.append(RoundTrace(name, drafted, accepted, emitted, **detail))

    def drop_finished(self) -> None:
        """Remove finished rows once they are a quarter of the batch, or after a few rounds."""
        context = self.context
        alive = self.alive()
        gone = context.batch - len(alive)
        soon = gone * 4 < context.batch and self.rounds - self.left < PATIENCE
        if gone == 0 or (alive and soon):
            return
        self.left = self.rounds
        assert context.session is not None
        context.session = context.session.fork(alive) if alive else None
        if alive:
            self.policy.select(alive)
        left = {*context.requests} - {context.requests[b] for b in alive}
        self.law.forget(sorted(left))
        self.settle(left & self.since.keys())  # those that were ended from outside
        for index in left:
            del self.requests[index]
        context.ids = context.ids[alive]
        context.lengths = [context.lengths[b] for b in alive]
        context.prompt_lengths = [context.prompt_lengths[b] for b in alive]
        context.requests = [context.requests[b] for b in alive]
