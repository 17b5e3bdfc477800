"""A serving machine on paper: requests arrive, are batched, drafted for and answered.

Continuous batching: whoever waits joins between two steps, if there is a free place; its prompt is
read in a forward of its own. A step drafts ``k_i`` tokens for each request, scores all of them in
one forward, and every request moves on by what was accepted and one token more. Time is the
machine's (:class:`Machine`); which draft tokens stand is decided beforehand, token by token, so
that all policies meet the same luck::

    arrivals ─> waiting ─> [ at most `places` active ] ─> step: lengths -> seconds -> tokens ─> done
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from isthmus.decoding.cost import Machine
from isthmus.errors import InvalidInputError

Array = NDArray[np.float64]
Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Load:
    """Requests to serve, in the order of their arrival.

    Attributes:
        arrival_s: [J].
        prompts: Prompt tokens [J].
        outputs: Tokens to write [J], at least 1.
        stands: Whether the draft token at each place of the answer would stand, bool [J, T].
    """

    arrival_s: Array
    prompts: Counts
    outputs: Counts
    stands: NDArray[np.bool_]


def poisson_load(
    requests: int,
    rate_hz: float,
    *,
    rates: Sequence[float],
    prompt: int = 96,
    output: int = 64,
    seed: int = 0,
) -> Load:
    """Requests with exponential gaps and exponential answer lengths.

    Args:
        requests: Requests J.
        rate_hz: Arrivals per second.
        rates: Acceptance rates to draw each request's own from.
        prompt: Prompt tokens, the same for all.
        output: Mean answer; lengths lie within a quarter and the fourfold of it.
        seed: Seed of every draw.

    Raises:
        InvalidInputError: No requests, no arrivals, or a rate that is no probability.
    """
    if requests < 1 or rate_hz <= 0 or not rates or not 0 <= min(rates) <= max(rates) <= 1:
        raise InvalidInputError("a load needs requests, arrivals and acceptance rates in [0, 1]")
    rng = np.random.default_rng(seed)
    arrival = np.cumsum(rng.exponential(1.0 / rate_hz, requests))
    outputs = np.clip(rng.exponential(output, requests), output / 4, output * 4).astype(np.int64)
    outputs = np.maximum(outputs, 1)
    own = rng.choice(np.asarray(rates, dtype=float), requests)
    stands = rng.random((requests, int(outputs.max()) + 1)) < own[:, None]
    return Load(arrival, np.full(requests, prompt), outputs, stands)


class Speculation(Protocol):
    """Chooses how much to draft for the active requests; rows come and go in order."""

    def join(self, rows: int) -> None:
        """New requests stand behind the ones that are there."""
        ...

    def lengths(self, context: float, rows: int, limit: int) -> Counts:
        """Draft tokens of each request [R], at most ``limit``."""
        ...

    def observe(self, drafted: Counts, accepted: Counts) -> None:
        """Learn what became of them, [R] each."""
        ...

    def select(self, rows: Sequence[int]) -> None:
        """Only these requests stay."""
        ...


class Always:
    """The same draft length at any load.

    Args:
        length: Draft tokens.
    """

    def __init__(self, length: int) -> None:
        self.length = length

    def join(self, rows: int) -> None:
        """Nothing to prepare."""

    def lengths(self, context: float, rows: int, limit: int) -> Counts:
        """The fixed length."""
        return np.full(rows, min(self.length, limit))

    def observe(self, drafted: Counts, accepted: Counts) -> None:
        """Nothing to learn."""

    def select(self, rows: Sequence[int]) -> None:
        """Nothing to keep."""


@dataclass(frozen=True)
class Served:
    """What came out.

    Attributes:
        latency_s: Finish minus arrival of each request [J].
        tokens: Tokens written.
        steps: Decoding steps.
        drafted: Draft tokens scored.
        busy_s: Seconds of work.
        idle_s: Seconds without a request.
        finish_s: When the last request was done.
    """

    latency_s: Array
    tokens: int
    steps: int
    drafted: int
    busy_s: float
    idle_s: float
    finish_s: float

    def mean_latency_s(self, warm_up: float = 0.1) -> float:
        """Mean latency without the first share of the requests, which met an empty machine."""
        return float(self.latency_s[int(warm_up * len(self.latency_s)) :].mean())


def simulate(
    load: Load, machine: Machine, policy: Speculation, *, places: int = 16, limit: int = 8
) -> Served:
    """Serve a load.

    Args:
        load: The requests.
        machine: What forwards cost.
        policy: Chooses the draft lengths.
        places: Requests that are decoded together at most.
        limit: Draft tokens of one request at most.

    Returns:
        Latencies and totals.
    """
    waiting, jobs = 0, len(load.outputs)
    active: Counts = np.zeros(0, dtype=np.int64)
    done = np.zeros(jobs, dtype=np.int64)
    finish = np.zeros(jobs)
    clock = busy = idle = 0.0
    steps = drafted_total = 0
    reach = np.arange(limit + 1)
    while waiting < jobs or len(active):
        if not len(active) and load.arrival_s[waiting] > clock:
            idle += load.arrival_s[waiting] - clock
            clock = float(load.arrival_s[waiting])
        here = int(np.searchsorted(load.arrival_s, clock, side="right"))
        new = min(here, waiting + places - len(active))
        if new > waiting:
            fresh = np.arange(waiting, new)
            seconds = machine.score_s(0.0, float(load.prompts[fresh].sum()))
            clock, busy, waiting = clock + seconds, busy + seconds, new
            active = np.append(active, fresh)
            policy.join(len(fresh))
        context = float((load.prompts[active] + done[active]).sum())
        left = load.outputs[active] - done[active]
        lengths = np.minimum(policy.lengths(context, len(active), limit), left - 1)
        seconds = machine.draft_s(context, lengths)
        seconds += machine.score_s(context, float(len(active) + lengths.sum()))
        clock, busy, steps = clock + seconds, busy + seconds, steps + 1
        place = np.minimum(done[active][:, None] + reach, load.stands.shape[1] - 1)
        stands = load.stands[active[:, None], place] & (reach < lengths[:, None])
        accepted: Any = stands.cumprod(1).sum(1)
        policy.observe(lengths, accepted)
        drafted_total += int(lengths.sum())
        done[active] += accepted + 1
        over = done[active] >= load.outputs[active]
        if over.any():
            finish[active[over]] = clock
            stay = np.flatnonzero(~over)
            active = active[stay]
            policy.select(stay.tolist())
    latency = finish - load.arrival_s
    return Served(latency, int(done.sum()), steps, drafted_total, busy, idle, clock)
