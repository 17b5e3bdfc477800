"""A like-for-like survey of decoding methods over tasks.

Every method decodes the same prompts of every task with the same model and budget. What is counted
comes from token ids and rounds, never from decoded text; the first method is the baseline, and its
output is what the others must write too.

When sampling, the survey couples the draws: one noise for every position, so that all lossless
methods write the same text and differ only in the forwards that it took.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from isthmus.decoding.acceptance import Coupled
from isthmus.decoding.cost import Cost, forward_times
from isthmus.decoding.model import Model, own_loop, rule_of
from isthmus.errors import InvalidInputError
from isthmus.roles import Acceptance, Policy


@dataclass
class Outcome:
    """What one method did on one task.

    Attributes:
        task: The task.
        method: The method.
        tokens: New tokens of each prompt.
        emitted: Tokens of every round of each prompt.
        nodes: Draft nodes that were scored in every round of each prompt.
        draft_forwards: Forwards of the draft model, prefills included.
        seconds: Wall time of each prompt, prefill included.
        draft_s: Seconds of each prompt spent in drafting and learning.
        same: Prompts whose output is the baseline's.
    """

    task: str
    method: str
    tokens: list[list[int]] = field(default_factory=list)
    emitted: list[list[int]] = field(default_factory=list)
    nodes: list[list[int]] = field(default_factory=list)
    draft_forwards: int = 0
    seconds: list[float] = field(default_factory=list)
    draft_s: list[float] = field(default_factory=list)
    same: int = 0

    @property
    def new_tokens(self) -> int:
        """Tokens written over all prompts."""
        return sum(len(t) for t in self.tokens)

    @property
    def forwards(self) -> int:
        """Target forwards after the prefills: one a round."""
        return sum(len(e) for e in self.emitted)

    @property
    def acceptance_length(self) -> float:
        """Tokens per target forward: the ratio of sums, not the mean of ratios."""
        return self.new_tokens / max(1, self.forwards)

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second of wall time."""
        return self.new_tokens / max(1e-9, sum(self.seconds))

    @property
    def round_draft_s(self) -> float:
        """Seconds of drafting in one round, the median over prompts."""
        shares = [s / max(1, len(e)) for s, e in zip(self.draft_s, self.emitted, strict=True)]
        return statistics.median(shares) if shares else 0.0

    def predicted_speedup(self, cost: Cost) -> float:
        """Speed-up over plain decoding from forward times, free of the clock's noise.

        Args:
            cost: Seconds of a target forward by nodes.
        """
        scored = [cost(1 + n) for row in self.nodes for n in row]
        if not scored:
            return 1.0
        return self.acceptance_length * cost(1) / (statistics.fmean(scored) + self.round_draft_s)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "task": self.task,
            "method": self.method,
            "prompts": len(self.tokens),
            "new_tokens": self.new_tokens,
            "target_forwards": self.forwards,
            "draft_forwards": self.draft_forwards,
            "acceptance_length": round(self.acceptance_length, 4),
            "tokens_per_s": round(self.tokens_per_s, 3),
            "same_output": self.same,
            "emitted": self.emitted,
        }


def survey(
    model: Model,
    methods: Mapping[str, str | Policy],
    tasks: Mapping[str, Sequence[Sequence[int]]],
    *,
    max_new_tokens: int = 32,
    temperature: float = 0.0,
    seed: int = 0,
    acceptances: Mapping[str, Acceptance] | None = None,
    report: Callable[[str, str], None] = lambda task, method: None,
) -> list[Outcome]:
    """Run every method on every task.

    Args:
        model: The model, with its draft model where a method needs one.
        methods: Drafters by the name that is shown: a slug or a policy, or the slug of a system
            with a decoding loop of its own. The first one is the baseline.
        tasks: Prompts of token ids by task.
        max_new_tokens: Tokens of each answer; end tokens are ignored, so that all do equal work.
        temperature: 0 is greedy; otherwise draws are coupled, but for methods that bring their
            own acceptance rule or loop.
        seed: Seed of the coupled draws.
        acceptances: Acceptance rules of single methods, in place of the exact one or their own.
        report: Called before each run with the task and the method.

    Returns:
        One outcome for each task and method, tasks outermost, in the order given.

    Raises:
        InvalidInputError: No method or no prompt is given.
    """
    if not methods or not tasks or not all(tasks.values()):
        raise InvalidInputError("a survey needs at least one method and a prompt for each task")
    policies = {
        name: method if own_loop(method) else model.policy(method)
        for name, method in methods.items()
    }
    exact = Coupled(seed) if temperature > 0 else None
    rules = {
        name: None if isinstance(policy, str) else rule_of(policy) or exact
        for name, policy in policies.items()
    }
    rules |= acceptances or {}
    out = []
    for task, prompts in tasks.items():
        outcomes = [Outcome(task, name) for name in policies]
        for prompt in prompts:  # the methods in turn, so that a slow moment of the machine hits all
            for outcome in outcomes:
                report(task, outcome.method)
                policy, rule = policies[outcome.method], rules[outcome.method]
                _run(model, policy, prompt, outcome, max_new_tokens, temperature, rule)
        for outcome in outcomes:
            pairs = zip(outcome.tokens, outcomes[0].tokens, strict=True)
            outcome.same = sum(a == b for a, b in pairs)
        out += outcomes
    return out


def table(outcomes: Sequence[Outcome], cost: Cost | None = None) -> str:
    """Acceptance lengths, methods by tasks, as Markdown.

    Args:
        outcomes: What :func:`survey` gave.
        cost: With it, each cell also shows the predicted speed-up.
    """
    names = list(dict.fromkeys(o.task for o in outcomes))
    cells = {(o.method, o.task): o for o in outcomes}
    lines = [f"| method | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for method in dict.fromkeys(o.method for o in outcomes):
        shown = []
        for task in names:
            o = cells[method, task]
            speed = "" if cost is None else f" ({o.predicted_speedup(cost):.2f}x)"
            mark = "" if o.same == len(o.tokens) else "!"
            shown.append(f"{o.acceptance_length:.2f}{mark}{speed}")
        lines.append(f"| {method} | {' | '.join(shown)} |")
    return "\n".join([*lines, "", "`!` marks an output that differs from the first method's."])


def _run(
    model: Model,
    policy: str | Policy,
    prompt: Sequence[int],
    out: Outcome,
    budget: int,
    temperature: float,
    acceptance: Acceptance | None,
) -> None:
    calls = 0

    def count(module: Any, args: Any, output: Any) -> None:
        nonlocal calls
        calls += 1

    draft = model.draft_model
    handle = None if draft is None else draft.model.register_forward_hook(count)
    try:
        result = model.generate(
            torch.tensor(list(prompt)),
            max_new_tokens=budget,
            drafter=policy,
            acceptance=acceptance,
            ignore_end=True,
            temperature=temperature,
            seed=0,
        )
    finally:
        if handle is not None:
            handle.remove()
    out.tokens.append(result.tokens)
    out.emitted.append([r.emitted for r in result.rounds])
    out.nodes.append([r.nodes for r in result.rounds])
    out.draft_forwards += calls
    out.seconds.append(result.stats.seconds)
    parts = result.stats.parts_s
    out.draft_s.append(parts.get("draft", 0.0) + parts.get("observe", 0.0))


def measure_batch(model: Model, batch: int, cached: int = 96) -> tuple[Cost, float]:
    """Forward times at a batch size, and how a draft-model forward grows with it."""
    cached = min(cached, (model.target.max_length or 10**9) - 66)
    nodes = [1] if model.target.reach == "step" else [1, 2, 4, 8, 16, 32]
    rows = min(batch, model.target.max_batch or batch)
    found = forward_times(model.target, [rows], nodes, [cached])
    cost = Cost({round(n / rows): s for _, n, s in found})
    if model.draft_model is None or batch == 1:
        return cost, 1.0
    times = forward_times(model.draft_model, [1, batch], [1], [cached])
    return cost, max(1.0, times[1][2] / times[0][2])
