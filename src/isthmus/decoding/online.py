"""Decoding for many at once, as they come: one thread owns the model, requests join its batch.

The loop is the same continuous batching as that of a file of prompts; its line of requests merely
runs dry and fills up again. Every request has its own sampling law, budget and stop strings. Where
it samples, its draws come from noise keyed on its seed and the position, so an answer depends
neither on the drafter nor on who shares the batch, and is that of
:meth:`isthmus.decoding.model.Model.generate_many`.

A listener is called in the thread of the engine after every round; it must not block.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from isthmus.decoding.acceptance import Coupled, Lossless
from isthmus.decoding.constrained import Constrained, Forced
from isthmus.decoding.constraint import DeadEnd, Grammar
from isthmus.decoding.engine import Request, check_prompt, decode
from isthmus.decoding.generation import Generation
from isthmus.decoding.law import Law, Laws
from isthmus.decoding.model import Model, Wanted, constrained_law, rule_of
from isthmus.decoding.tree import TokenTree
from isthmus.errors import InvalidInputError, IsthmusError
from isthmus.roles import Context, Verdict

logger = logging.getLogger(__name__)


class BusyError(IsthmusError):
    """All places and the whole line are taken; ask again later."""


@dataclass(frozen=True)
class Logprob:
    """What the model thought of a token, before any processing.

    Attributes:
        token: The token.
        logprob: Its log-probability.
        top: The likeliest tokens and their log-probabilities, best first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass
class Job:
    """A request on its way.

    Attributes:
        request: The request, as the loop takes it.
        sampling: Options of its law.
        seed: Key of its draws.
        grammar: What its answer has to be, or None.
        listener: Who is told.
        top: Likeliest tokens to report beside each token, or None.
        cancelled: Why it was let go, empty while it was not.
        result: Filled in as decoding goes on; ``finish_reason`` is set at the end.
        logprobs: One entry a token, where asked for.
        done: Set once nothing more will come.
    """

    request: Request
    sampling: dict[str, Any]
    seed: int
    grammar: Grammar | None
    listener: Callable[[Job, list[int]], None]
    top: int | None = None
    logprobs: list[Logprob] = field(default_factory=list)
    done: threading.Event = field(default_factory=threading.Event)
    cancelled: str = ""

    @property
    def result(self) -> Generation:
        """The answer so far."""
        return self.request.result

    def cancel(self, reason: str = "cancelled") -> None:
        """Let go of it; its place is free after the round at work."""
        self.cancelled = self.cancelled or reason


class _Line:
    """The waiting requests as the loop takes them: dry now and again, but never closed."""

    def __init__(self, engine: Online) -> None:
        self._engine = engine

    def __iter__(self) -> _Line:
        return self

    def __next__(self) -> Request:
        job = self._engine._next()
        if job is None:
            raise StopIteration
        return job.request


class _Laws(Laws):
    """The laws, and the seeds and constraints that are forgotten with them."""

    def __init__(self, own: dict[int, Law], *others: dict[int, Any]) -> None:
        super().__init__(own)
        self._others = others

    def forget(self, requests: Sequence[int]) -> None:
        """Let go of requests that have left."""
        super().forget(requests)
        for request in requests:
            for other in self._others:
                other.pop(request, None)


class _Rule:
    """Exact acceptance of a mixed batch that also writes down log-probabilities."""

    lossless = True

    def __init__(self, seeds: Mapping[int, int], jobs: Mapping[int, Job]) -> None:
        self._greedy, self._drawn, self._jobs = Lossless(), Coupled(0, seeds), jobs
        self.noise = self._drawn.noise

    def accept(self, tree: TokenTree, logits: torch.Tensor, context: Context) -> Verdict:
        """See :class:`isthmus.roles.Acceptance`."""
        rule = self._greedy if context.law.greedy else self._drawn
        verdict = rule.accept(tree, logits, context)
        for b, number in enumerate(context.requests):
            job = self._jobs.get(number)
            if job is not None and job.top is not None:
                job.logprobs += _logprobs(tree, logits[b], verdict, b, job.top)
        return verdict


def _logprobs(
    tree: TokenTree, logits: torch.Tensor, verdict: Verdict, row: int, top: int
) -> list[Logprob]:
    """Log-probabilities of the tokens of one verdict, from the nodes [N, V] that they follow."""
    path = [node for node in verdict.path[row].tolist() if node >= 0]
    tokens = [*tree.tokens[row, path[1:]].tolist(), int(verdict.token[row])]
    laws = torch.log_softmax(logits[path].float(), -1)
    own = laws[torch.arange(len(path)), tokens].tolist()
    best = laws.topk(min(top, laws.shape[-1]))
    values, indices = best.values.tolist(), best.indices.tolist()
    return [
        Logprob(token, logprob, tuple(zip(indices[i], values[i], strict=True)))
        for i, (token, logprob) in enumerate(zip(tokens, own, strict=True))
    ]


class Online:
    """A model at work on whatever is asked.

    Args:
        model: The model; from now on only this engine may use it.
        drafter: As for :meth:`~isthmus.decoding.model.Model.generate`; one for all requests.
        num_draft_tokens: As for generate.
        batch_size: Requests at work at most.
        queue: Requests that may wait besides.

    Raises:
        InvalidInputError: The drafter cannot serve many requests, or a size is out of range.
    """

    def __init__(
        self,
        model: Model,
        *,
        drafter: str = "auto",
        num_draft_tokens: int | None = None,
        batch_size: int = 16,
        queue: int = 64,
    ) -> None:
        if batch_size < 1 or queue < 0:
            raise InvalidInputError(
                f"batch_size must be at least 1 and queue at least 0, got {batch_size} and {queue}"
            )
        self.model, self.drafter = model, drafter
        self.policy = model.policy(drafter, num_draft_tokens)
        if rule_of(self.policy) is not None:
            raise InvalidInputError(
                f"{drafter} brings its own acceptance rule, which draws for all requests together; "
                "serve with another drafter"
            )
        self.batch_size, self.queue = batch_size, queue
        self._waiting: deque[Job] = deque()
        self._jobs: dict[int, Job] = {}  # in the loop, by number
        self._laws: dict[int, Law] = {}
        self._seeds: dict[int, int] = {}
        self._grammars: dict[int, Grammar | None] = {}
        self._constrained = Constrained(None, self._grammars)
        self._numbers = 0
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="isthmus-engine", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        """Requests at work."""
        return len(self._jobs)

    @property
    def waiting(self) -> int:
        """Requests in the line."""
        return len(self._waiting)

    @property
    def alive(self) -> bool:
        """Whether the engine takes requests."""
        return self._thread.is_alive() and not self._stopping

    def prepare(
        self,
        prompt: str | Sequence[int],
        listener: Callable[[Job, list[int]], None],
        *,
        max_new_tokens: int = 128,
        stop: Sequence[str] = (),
        seed: int = 0,
        logprobs: int | None = None,
        trace: bool = False,
        ignore_end: bool = False,
        constraint: Wanted | None = None,
        **sampling: Any,
    ) -> Job:
        """Check a request; :meth:`submit` puts it into the line.

        Args:
            prompt: Text or token ids.
            listener: Called after each round with the job and its new tokens, and once more with
                none when it is done.
            max_new_tokens: Budget.
            stop: Strings that end the answer.
            seed: Key of its draws.
            logprobs: Likeliest tokens to report beside each token; None reports nothing.
            trace: Keep the drafted tokens of every round.
            ignore_end: Do not stop at end tokens.
            constraint: What the answer has to be, as for generate.
            sampling: As for :class:`~isthmus.decoding.law.Law`.

        Raises:
            InvalidInputError: A bad prompt, option or constraint.
        """
        Law(**sampling)  # refuses what is out of range
        grammar = None
        if constraint is not None:
            grammar = self.model.compile(constraint, ignore_end=ignore_end)
        (start,), inputs = self.model._sources([prompt], None)
        request = self.model._request(
            start, max_new_tokens, self.drafter, stop, ignore_end, grammar
        )
        check_prompt(request, self.model.target.max_length)
        request.inputs, request.trace = inputs or {}, trace
        return Job(request, sampling, seed, grammar, listener, logprobs)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Put jobs into the line, all or none.

        Raises:
            BusyError: There is no room for them.
        """
        with self._wake:
            if self._stopping:
                raise BusyError("the server is shutting down")
            # those that wait only until the loop looks are no queue yet
            free = self.batch_size - len(self._jobs) + self.queue - len(self._waiting)
            if len(jobs) > free:
                raise BusyError(
                    f"{len(self._jobs)} requests are at work and {len(self._waiting)} wait; "
                    "ask again later"
                )
            self._waiting.extend(jobs)
            self._wake.notify()

    def stop(self, timeout_s: float | None = None) -> None:
        """Finish what is in the line, then end the thread.

        Args:
            timeout_s: After this, what is left is cancelled.
        """
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            for job in [*self._waiting, *self._jobs.values()]:
                job.cancel("shutdown")
            self._thread.join()

    def _next(self) -> Job | None:
        """The head of the line, numbered; what was cancelled while it waited is let go."""
        while self._waiting:
            job = self._waiting.popleft()
            if job.cancelled:
                self._end(job)
                continue
            number, self._numbers = self._numbers, self._numbers + 1
            self._jobs[number], self._seeds[number] = job, job.seed
            self._grammars[number] = job.grammar
            self._laws[number] = constrained_law(self._constrained, job.sampling)
            return job
        return None

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._waiting and not self._stopping:
                    self._wake.wait()
                if self._stopping and not self._waiting:
                    return
            try:
                self._decode()
            except Exception as error:  # one bad batch must not end the server
                logger.exception("a batch failed")
                for job in self._jobs.values():
                    job.result.finish_reason = "error"
                    job.result.notes.append(f"{type(error).__name__}: {error}")
                    self._end(job)
                self._jobs.clear()

    def _decode(self) -> None:
        """Decode until the line is dry and no row is at work."""
        self._numbers = 0
        for kept in (self._laws, self._seeds, self._grammars):
            kept.clear()
        self._constrained = Constrained(None, self._grammars)
        target = self.model.target
        rounds = decode(
            target,
            _Line(self),
            policy=Forced(self.policy, self._constrained),
            acceptance=_Rule(self._seeds, self._jobs),
            law=_Laws(self._laws, self._seeds, self._grammars),
            generator=torch.Generator(target.device).manual_seed(0),
            batch_size=self.batch_size,
        )
        for emitted in rounds:
            for number, tokens in emitted:
                job = self._jobs.get(number)
                if job is None:
                    continue
                del job.logprobs[len(job.result.tokens) :]  # behind a stop
                self._tell(job, tokens)
            for number, job in list(self._jobs.items()):
                if job.cancelled and not job.result.finish_reason:
                    job.result.finish_reason = job.cancelled
                if job.result.finish_reason:
                    del self._jobs[number]
                    self._end(job)

    def _end(self, job: Job) -> None:
        job.result.finish_reason = job.result.finish_reason or job.cancelled
        if job.result.finish_reason != "error":
            try:
                self.model._finish(job.request)
            except DeadEnd as error:
                job.result.finish_reason = "error"
                job.result.notes.append(str(error))
        job.done.set()
        self._tell(job, [])

    @staticmethod
    def _tell(job: Job, tokens: list[int]) -> None:
        try:
            job.listener(job, tokens)
        except Exception:  # whoever asked is gone; the others are not to suffer
            logger.exception("a listener failed")
            job.cancel("error")


def wait(job: Job, timeout_s: float | None = None) -> Generation:
    """Wait for a job, for callers with a thread of their own.

    Args:
        job: A job that was submitted.
        timeout_s: Cancel it after this.
    """
    start = time.perf_counter()
    while not job.done.wait(0.1):
        if timeout_s is not None and time.perf_counter() - start > timeout_s:
            job.cancel("timeout")
    return job.result
