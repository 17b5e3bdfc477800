"""The speculative family on one bench: every system that drafts, one target, the same prompts.

What a system needs beyond the target is made from the workbench: its drafter is trained on first
use, its draft model is the target's. Systems that cannot run on this target say why.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from isthmus import registry
from isthmus.decoding.model import BUILT_IN, Model, own_loop, rule_of
from isthmus.decoding.policy import Fixed
from isthmus.decoding.target import HubTarget
from isthmus.decoding.trained import TrainedDrafter
from isthmus.errors import InvalidInputError, IsthmusError
from isthmus.roles import Policy
from isthmus.workbench import pycode
from isthmus.workbench.bench import reference_model
from isthmus.workbench.drafters import TARGET, reference_drafter, target_model
from isthmus.workbench.survey import Outcome, survey

PLAIN = "none"


@dataclass(frozen=True)
class Line:
    """One system on the bench.

    Attributes:
        name: Its slug.
        lossless: Whether the output law is the target's.
        greedy: What it did greedily; None where it could not run.
        sampled: What it did at temperature 1; coupled draws, so that lossless systems write
            what plain decoding writes. None where it decodes greedily only.
        slowdown: Seconds per token over those of plain decoding, greedy, median over prompts.
        reason: Why it did not run.
    """

    name: str
    lossless: bool
    greedy: Outcome | None = None
    sampled: Outcome | None = None
    slowdown: float | None = None
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        shown: dict[str, Any] = {"system": self.name, "lossless": self.lossless}
        if self.reason:
            return shown | {"reason": self.reason}
        for kind, outcome in (("greedy", self.greedy), ("sampled", self.sampled)):
            if outcome is not None:
                told = outcome.to_dict()
                drop = ("task", "method", "emitted")
                shown[kind] = {k: v for k, v in told.items() if k not in drop}
        return shown | {"seconds_per_token_over_plain": self.slowdown}


def bench_model(name: str = TARGET, draft: str = "pycode-n") -> Model:
    """A reference target with its draft model; trained drafters of the workbench fit it."""
    model = target_model(name)
    if model.draft_model is None and draft:
        model.draft_model = HubTarget(reference_model(draft).target.model)
    return model


def method(model: Model, slug: str, target: str) -> str | Policy:
    """What runs a system on a model.

    Raises:
        IsthmusError: It needs something that this model does not have.
    """
    system: Any = registry.load(slug) if slug not in BUILT_IN else None
    if system is None:
        return slug
    if issubclass(system, TrainedDrafter):
        drafter = reference_drafter(slug, target=target)
        return Fixed(drafter, drafter.default_shape)
    if own_loop(slug):
        system.for_model(model)  # refused here, not in the middle of the bench
        return slug
    if getattr(system, "role", "") == "study":
        raise InvalidInputError("a study: it measures and does not decode")
    return model.policy(slug)


def family_bench(
    slugs: Sequence[str] = (),
    *,
    target: str = TARGET,
    prompts: int = 16,
    prompt_tokens: int = 32,
    max_new_tokens: int = 24,
    seed: int = 0,
    report: Callable[[str], None] = lambda doing: None,
) -> list[Line]:
    """Decode the same prompts with every system, greedily and at temperature 1.

    Args:
        slugs: Systems; all of the family when empty.
        target: Reference model that is decoded.
        prompts: Prompts, from held-out files of Python's standard library.
        prompt_tokens: Their length.
        max_new_tokens: Tokens to write for each.
        seed: Seed of the coupled draws.
        report: Told what is being done.

    Returns:
        Plain decoding first, then the systems in the order given.

    Raises:
        UnknownNameError: No such system or target.
        InvalidInputError: A number is out of range.
    """
    if min(prompts, prompt_tokens, max_new_tokens) < 1:
        raise InvalidInputError("prompts, prompt tokens and new tokens must be at least 1")
    wanted = [registry.find(s).slug for s in slugs] or registry.slugs("speculative")
    model = bench_model(target, "pycode-n" if target == TARGET else "")
    methods: dict[str, str | Policy] = {PLAIN: PLAIN}
    reasons: dict[str, str] = {}
    for slug in wanted:
        report(f"preparing {slug}")
        try:
            methods[slug] = method(model, slug, target)
        except IsthmusError as error:
            reasons[slug] = str(error)
    ids = pycode.prompts(prompts, model.tokenizer, prompt_tokens)
    runs: list[dict[str, Outcome]] = []
    for kind, temperature in (("greedy", 0.0), ("T = 1", 1.0)):
        able = {}
        for name, each in methods.items():
            report(f"warming up {name}")
            few = min(4, max_new_tokens)
            try:
                survey(
                    model,
                    {name: each},
                    {kind: ids[:1]},
                    max_new_tokens=few,
                    temperature=temperature,
                )
                able[name] = each
            except IsthmusError as error:  # some decode greedily only
                reasons.setdefault(name, str(error))
        found = survey(
            model,
            able,
            {kind: ids},
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            report=lambda task, name: report(f"{task}: {name}"),
        )
        runs.append({outcome.method: outcome for outcome in found})
    greedy, sampled = runs
    pace = _seconds_per_token(greedy[PLAIN])
    lines = []
    for name in (PLAIN, *wanted):
        if name not in greedy:
            lines.append(Line(name, _lossless(name), reason=reasons[name]))
            continue
        times = _seconds_per_token(greedy[name])
        slowdown = statistics.median(t / p for t, p in zip(times, pace, strict=True))
        lossless = _lossless(name) and getattr(rule_of(methods[name]), "lossless", True)
        lines.append(Line(name, lossless, greedy[name], sampled.get(name), slowdown))
    return lines


def _lossless(name: str) -> bool:
    return name in BUILT_IN or bool(registry.find(name).lossless)


def _seconds_per_token(outcome: Outcome) -> list[float]:
    return [s / max(1, len(t)) for s, t in zip(outcome.seconds, outcome.tokens, strict=True)]
