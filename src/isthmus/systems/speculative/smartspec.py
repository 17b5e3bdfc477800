"""SmartSpec: draft as much as pays at the present load, down to nothing.

Paper: Liu, Park, Hu, Kwon, Li, Zhang, Du, Mo, You, Cheung, Deng, Stoica, Zhang. Optimizing
    Speculative Decoding for Serving Large Language Models Using Goodput. 2024. arXiv:2406.14066
Idea: Choose the draft length of every step by goodput, the tokens expected to be emitted per
    second: acceptance is a running mean of each request, seconds are linear in the cached and in
    the computed tokens.
Differs: The server is an event-driven simulation whose coefficients are measured on the model at
    hand; the policy itself runs in the engine too. Chains only, no trees with rates of a level.
Lossless: yes

    acceptance a_i ──> l(a_i, k) ─┐
    cached, computed ──> T(k) ────┴──> k* = argmax  sum_i l(a_i, k) / T(k)
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from isthmus.claims import Claim, Gate, Row, Ruler, Scale, judge
from isthmus.decoding.cost import Machine, measure_machine
from isthmus.decoding.drafters import ModelDrafter, PromptLookup
from isthmus.decoding.goodput import Array, Fit, Means, expected_tokens
from isthmus.decoding.model import Model
from isthmus.decoding.policy import Cut, Fixed
from isthmus.decoding.serving_simulator import (
    Always,
    Counts,
    Load,
    Served,
    Speculation,
    poisson_load,
    simulate,
)
from isthmus.errors import InvalidInputError
from isthmus.roles import PLAIN, Context, Drafter, Shape, Step, Target
from isthmus.workbench import pycode
from isthmus.workbench.bench import acceptance_rates, reference_model


@dataclass(frozen=True)
class Settings:
    """Settings of SmartSpec.

    Attributes:
        num_draft_tokens: Draft tokens of a request at most.
        memory: Rounds that an acceptance rate remembers.
        explore: Rounds without a draft before one token is drafted to look again.
        per_request: Give every request its own length, by marginal gain, instead of one to all.
        adapt: The mechanism; off, always ``num_draft_tokens`` are drafted.
    """

    num_draft_tokens: int = 5
    memory: float = 20.0
    explore: int = 24
    per_request: bool = False
    adapt: bool = True

    def __post_init__(self) -> None:
        if self.num_draft_tokens < 0 or self.memory < 1 or self.explore < 1:
            raise InvalidInputError(
                "smartspec needs num_draft_tokens >= 0, memory >= 1 and explore >= 1, got "
                f"{self.num_draft_tokens}, {self.memory}, {self.explore}"
            )


def common_length(rates: Array, machine: Machine, context: float, limit: int) -> int:
    """The draft length of largest goodput, the same for all requests (sec. 4.2).

    Args:
        rates: Acceptance rate of each request [R].
        machine: Seconds of forwards.
        context: Cached tokens of all requests.
        limit: Longest draft.

    Example:
        >>> dear = Machine(target=(0.0, 1.0, 0.0))
        >>> free = Machine(target=(0.0, 0.0, 1.0))
        >>> common_length(np.array([0.8]), dear, 0, 4), common_length(np.array([0.8]), free, 0, 4)
        (0, 4)
    """
    rows = len(rates)
    tokens = expected_tokens(rates[:, None], np.arange(limit + 1)).sum(0)  # [k]
    seconds = np.array(
        [
            machine.draft_s(context, np.full(rows, k)) + machine.score_s(context, rows * (k + 1))
            for k in range(limit + 1)
        ]
    )
    return int(np.argmax(tokens / seconds))


def own_lengths(rates: Array, machine: Machine, context: float, limit: int) -> Counts:
    """Lengths of unlike requests: the next token goes where it is likeliest to stand.

    Token k of request i stands with chance a_i^k, so the best set of n draft tokens holds the n
    largest of these; n is the one of largest goodput.

    Example:
        >>> own_lengths(np.array([0.9, 0.1]), Machine(target=(0.0, 0.2, 1.0)), 0, 3).tolist()
        [3, 0]
    """
    rows = len(rates)
    chances = rates[:, None] ** np.arange(1, limit + 1)  # [R, k], falling along k
    order = np.argsort(-chances, axis=None, kind="stable")
    best, goodput = np.zeros(rows, dtype=np.int64), rows / machine.score_s(context, rows)
    lengths, tokens = best.copy(), float(rows)
    for flat in order.tolist():
        row = flat // limit
        lengths[row] += 1
        tokens += chances.flat[flat]
        seconds = machine.draft_s(context, lengths)
        seconds += machine.score_s(context, rows + lengths.sum())
        if tokens / seconds > goodput:
            best, goodput = lengths.copy(), tokens / seconds
    return best


class Goodput:
    """The decision, for a simulated or a real server: rates of the requests, then the lengths.

    Args:
        machine: Seconds of forwards; may be replaced while it runs.
        settings: See :class:`Settings`.
    """

    def __init__(self, machine: Machine, settings: Settings | None = None) -> None:
        self.machine, self.settings = machine, settings or Settings()
        self.rates = Means(np.array(0.6), weight=6.0, memory=4 * self.settings.memory)
        self._idle = 0

    def join(self, rows: int) -> None:
        """New requests begin with the rate of all requests before them."""
        self.rates.join(rows)

    def select(self, rows: Sequence[int]) -> None:
        """Only these requests stay."""
        self.rates.select(rows)

    def observe(self, drafted: Counts, accepted: Counts) -> None:
        """Renew the rates: a tokens stood, and one fell unless the draft was used up."""
        tried = accepted + (accepted < drafted)
        self.rates.observe(accepted / np.maximum(tried, 1), tried)

    def lengths(self, context: float, rows: int, limit: int) -> Counts:
        """Draft tokens of each request [R]."""
        limit = min(limit, self.settings.num_draft_tokens)
        if not self.settings.adapt or limit == 0:
            return np.full(rows, limit)
        rates = self.rates.estimate()
        if self.settings.per_request:
            chosen = own_lengths(rates, self.machine, context, limit)
        else:
            length = common_length(rates, self.machine, context, limit)
            chosen = np.full(rows, length, dtype=np.int64)
        self._idle = 0 if chosen.any() else self._idle + 1
        if self._idle >= self.settings.explore:
            # rates that are never looked at would never rise again; one request pays for the look
            self._idle = 0
            chosen[int(np.argmin(self.rates.count))] = 1
        return chosen


class Smartspec:
    """Policy that drafts chains of the length with the largest goodput.

    Args:
        drafter: Who drafts; prompt lookup when None.
        settings: See :class:`Settings`.
        machine: First guess of what forwards cost; learned from every round.

    Example:
        >>> Smartspec().decide(None, PLAIN)
        (None, Shape(nodes=0, depth=0, width=1000000))
    """

    role: ClassVar[str] = "policy"

    def __init__(
        self,
        drafter: Drafter | None = None,
        settings: Settings | None = None,
        machine: Machine | None = None,
    ) -> None:
        machine = machine or Machine((0.0, 1e-3, 1e-2), (0.0, 0.0, 1e-4))
        self.drafter = Cut(drafter or PromptLookup())
        self.goodput = Goodput(machine, settings)
        self._target_s, self._draft_s = Fit(machine.target), Fit(machine.draft)

    @classmethod
    def for_model(cls, model: Model, settings: Settings | None = None) -> Smartspec:
        """The policy for a model and its draft model (prompt lookup where it has none)."""
        if model.draft_model is None:
            return cls(PromptLookup(), settings)
        machine = measure_machine(model.target, model.draft_model, rows=(1, 4))
        return cls(ModelDrafter(model.draft_model), settings, machine)

    def begin(self, context: Context, target: Target, **inputs: Any) -> None:
        """See :class:`isthmus.roles.Policy`."""
        self.goodput.rates.begin(context.batch)
        self.drafter.begin(context, target, **inputs)

    def extend(self, context: Context, target: Target, **inputs: Any) -> None:
        """More requests; they begin with the rate of all before them."""
        self.goodput.join(context.batch)
        self.drafter.extend(context, target, **inputs)

    def decide(self, context: Context, limit: Shape) -> tuple[Drafter | None, Shape]:
        """The lengths of this round."""
        if limit.nodes == 0:
            return None, PLAIN
        self._cached = float(sum(context.lengths))
        self.drafter.lengths = self.goodput.lengths(
            self._cached, context.batch, min(limit.nodes, limit.depth)
        )
        longest = int(self.drafter.lengths.max())
        if longest == 0:
            return None, PLAIN
        return self.drafter, Shape(longest, longest, 1)

    def observe(self, step: Step, drafter: Drafter | None) -> None:
        """Learn acceptance and seconds; let the drafter learn."""
        rows, cached = step.tree.batch, float(sum(step.context.lengths))
        self._target_s.observe([cached, rows * step.tree.nodes, 1.0], step.score_s)
        target, draft = self._target_s.coefficients, self._draft_s.coefficients
        if drafter is not None:
            drafted = np.array(step.tree.drafted())
            self.goodput.observe(drafted, np.array(step.accepted))
            levels = step.shape.depth
            self._draft_s.observe([cached * levels, rows * levels, levels], step.draft_s)
        # a negative coefficient is noise: more tokens never take less time
        self.goodput.machine = Machine(
            (max(target[0], 0.0), max(target[1], 0.0), max(target[2], 1e-9)),
            (max(draft[0], 0.0), max(draft[1], 0.0), max(draft[2], 0.0)),
        )
        self.drafter.observe(step)

    def select(self, rows: Sequence[int]) -> None:
        """Only these rows stay."""
        self.goodput.select(rows)
        self.drafter.select(rows)


FIXED = (0, 1, 3, 5)
"""Draft lengths of the arms that do not adapt."""

LOADS = (0.1, 0.3, 0.5, 0.7, 0.9, 1.2)
"""Arrivals as a share of what plain decoding can serve."""


def _serve(machine: Machine, loads: Sequence[Load], places: int) -> dict[str, list[Served]]:
    """Every arm on the same loads."""
    arms: dict[str, list[Served]] = {}
    for load in loads:
        policies: dict[str, Speculation] = {f"k = {k}": Always(k) for k in FIXED[:-1]}
        # switched off, it is the last of the fixed lengths
        policies[f"k = {FIXED[-1]}"] = Goodput(machine, Settings(FIXED[-1], adapt=False))
        policies["ours"] = Goodput(machine)
        for name, policy in policies.items():
            arms.setdefault(name, []).append(simulate(load, machine, policy, places=places))
    return arms


def claim(ruler: Ruler, scale: Scale = "small") -> Claim:
    """Serve simulated requests at six loads, then decode real batches of three sizes.

    Args:
        ruler: The clock.
        scale: ``"small"`` is 2 x 300 requests a load, ``"test"`` one of 40.
    """
    requests, repeats, tokens = (300, 2, 24) if scale != "test" else (40, 1, 6)
    batches, places, mean_output = (1, 4, 16) if scale != "test" else (1, 2), 64, 64
    model = reference_model("pycode-t", "pycode-xs")
    assert model.draft_model is not None
    prompts = pycode.prompts(batches[-1], model.tokenizer, 96)
    ids = [torch.tensor(list(p)) for p in prompts]
    machine = measure_machine(model.target, model.draft_model, rows=batches)
    rates = acceptance_rates(model, prompts, 2 * tokens)
    full = places / machine.score_s(places * (96 + mean_output / 2), places)
    arms: dict[str, list[float]] = {}
    for rho in LOADS:
        loads = [
            poisson_load(requests, rho * full / mean_output, rates=rates, seed=seed)
            for seed in range(repeats)
        ]
        for name, served in _serve(machine, loads, places).items():
            mean = statistics.fmean(s.mean_latency_s() for s in served)
            arms.setdefault(name, []).append(mean)
    fixed = {k: arms[f"k = {k}"] for k in FIXED}
    best = [min(each) for each in zip(*fixed.values(), strict=True)]
    worst_gap = max(ours / b for ours, b in zip(arms["ours"], best, strict=True))
    beaten = sum(
        any(ours < f for ours, f in zip(arms["ours"], latency, strict=True))
        for latency in fixed.values()
    )

    def run(policy: Any, batch: int) -> Any:
        return lambda: model.generate(
            ids[:batch],
            max_new_tokens=tokens,
            drafter=policy,
            temperature=1.0,
            ignore_end=True,
            seed=0,
        )

    predicted, measured, real = [], [], {}
    for batch in batches:
        policies: dict[str, Any] = {
            f"k = {k}": Fixed(ModelDrafter(model.draft_model), Shape(k, k, 1)) for k in FIXED
        }
        policies["ours"] = Smartspec(ModelDrafter(model.draft_model), machine=machine)
        runs = {name: run(policy, batch) for name, policy in policies.items()}
        timed = ruler.compare(runs, repeats=3 if scale != "test" else 1)
        real[batch] = {name: timing.median_s for name, timing in timed.items()}
        for k in FIXED:
            seconds = machine.draft_s(batch * 108, np.full(batch, k))
            seconds += machine.score_s(batch * 108, batch * (k + 1))
            predicted.append(float(expected_tokens(np.mean(rates), k)) / seconds)
            measured.append(tokens / real[batch][f"k = {k}"])
    plain, ours = (
        model.generate(ids, drafter=policy, max_new_tokens=tokens, ignore_end=True)
        for policy in ("none", Smartspec(ModelDrafter(model.draft_model), machine=machine))
    )
    same = sum(a.tokens == b.tokens for a, b in zip(plain, ours, strict=True))
    ranks = np.argsort(np.argsort([predicted, measured], 1), 1)
    agreement = statistics.correlation(ranks[0].tolist(), ranks[1].tolist())
    gates = (
        Gate("prompts with the plain output, greedy", same, "==", len(ids)),
        Gate("latency over the best fixed length, worst load", worst_gap, "<=", 1.05),
        Gate("fixed lengths that are beaten at some load", beaten, "==", len(FIXED)),
        Gate("latency over k = 0 at overload", arms["ours"][-1] / fixed[0][-1], "<=", 1.03),
        Gate("latency of k = 5 over k = 0 at overload", fixed[5][-1] / fixed[0][-1], ">=", 1.15),
        Gate("rank correlation of predicted and real tokens per second", agreement, ">=", 0.8),
    )
    direction = (
        gates[0],
        Gate("latency over k = 0 at the lowest load", arms["ours"][0] / fixed[0][0], "<", 1.0),
        gates[2],
        gates[3],
        Gate("k = 5 over k = 0 at overload, direction", fixed[5][-1] / fixed[0][-1], ">", 1.0),
    )
    rows = [
        Row(
            f"mean latency at {rho:g} of capacity",
            "s",
            fixed[0][i],
            arms["ours"][i],
            fixed[5][i],
            ceiling=best[i],
            note="baseline: no draft; off: always 5; ceiling: best fixed length",
        )
        for i, rho in enumerate(LOADS)
    ]
    rows += [
        Row(
            f"seconds for {tokens} tokens in the engine, batch {batch}, T = 1",
            "s",
            seconds["k = 0"],
            seconds["ours"],
            seconds["k = 5"],
            ceiling=min(seconds[f"k = {k}"] for k in FIXED),
            note="wall clock, never a gate",
        )
        for batch, seconds in real.items()
    ]
    a, b, c = machine.target
    return Claim(
        slug="smartspec",
        statement="A draft length chosen by goodput at every step keeps the mean latency within "
        "5 % of the best fixed length at every load and no worse than plain decoding at overload.",
        paper_figure="mean latency down by up to 3.2x against no speculation, and no loss at high "
        "request rates where fixed lengths hurt (Fig. 8)",
        rows=tuple(rows),
        scale=scale,
        device="cpu",
        status=judge(gates, direction),
        notes=(
            f"Target forward: {1e6 * a:.2f} us a cached token, {1e3 * b:.3f} ms a computed token, "
            f"{1e3 * c:.2f} ms fixed; {places} places; mean acceptance rate "
            f"{statistics.fmean(rates):.2f}.",
        ),
        gates=(*gates, direction[1], direction[4]),
        seeds=tuple(range(repeats)),
    )
