"""Sorted speculative decoding: one nested drafter, several exits, many targets.

Paper: Kavehzadeh, Pourreza, Valipour, Zhu, Bai, Ghodsi, Chen, Rezagholizadeh. S2D: Sorted
    Speculative Decoding For More Efficient Deployment of Nested Large Language Models. 2024.
    arXiv:2407.01955
Idea: A drafter is trained so that several of its prefixes answer through one norm and one head.
    While it drafts, each token leaves at the first exit that is confident, and thresholds tuned
    for a target make the one drafter suit targets of any size.
Differs: The targets are a reference model of six layers and copies of it with four and two, tuned
    for a minute. The drafter is trained from scratch with the sum of its exits' losses and no
    distillation. Thresholds, draft length and stop rule are chosen on texts that the target wrote.
    Keys of skipped layers are computed later, all at once, by the next token that goes deeper.
Lossless: yes

    token ──layer 1──> sure? ──yes──> draft it          the state waits at the exit
                         └──no──> layer 2 on all that waits ──> sure? ... ──> last exit
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from isthmus.claims import Claim, Gate, Row, Ruler, Scale, judge
from isthmus.decoding.drafters import ModelDrafter
from isthmus.decoding.model import Model
from isthmus.decoding.policy import Fixed
from isthmus.decoding.stages import StagedSession, StagedTarget
from isthmus.decoding.target import HubTarget
from isthmus.decoding.tree import TokenTree
from isthmus.errors import InvalidInputError
from isthmus.models.nested import exits_of
from isthmus.roles import Context, Shape, Target
from isthmus.workbench import nested, pycode
from isthmus.workbench.bench import repeats_itself
from isthmus.workbench.drafters import target_model
from isthmus.workbench.exits import NEVER, Record, confidence, forward_cost, record, speedups
from isthmus.workbench.tuned import answer_together


@dataclass(frozen=True)
class Settings:
    """Settings of sorted speculative decoding.

    Attributes:
        exits: Layers after which the drafter may answer; None takes what it was trained with.
        thresholds: Confidence (largest probability) that each exit but the last asks for; the
            last value serves all further exits.
        stop: A draft ends after a token less sure than this; 0 never.
        num_draft_tokens: Draft tokens at most.
        adaptive: The mechanism; off, the last exit answers every token.
    """

    exits: tuple[int, ...] | None = None
    thresholds: tuple[float, ...] = (0.6,)
    stop: float = 0.2
    num_draft_tokens: int = 6
    adaptive: bool = True


class SortedSpeculation(ModelDrafter):
    """A nested draft model whose tokens leave at the first confident exit.

    Args:
        model: A draft model trained by :func:`isthmus.models.nested.sorted_loss`; one that was
            not has a single exit, its last layer.
        settings: See :class:`Settings`.

    Raises:
        InvalidInputError: A number is out of range, or the exits do not fit the model.
        UnsupportedModelError: Its layers cannot be run one by one.
    """

    role: ClassVar[str] = "drafter"
    name = "sorted-speculation"

    def __init__(self, model: Target, settings: Settings | None = None) -> None:
        self.settings = s = settings or Settings()
        if s.num_draft_tokens < 0 or not s.thresholds or min(*s.thresholds, s.stop) < 0:
            raise InvalidInputError(
                "sorted speculation needs num_draft_tokens, stop and at least one threshold of 0 "
                f"or more, got {s.num_draft_tokens}, {s.stop} and {s.thresholds}"
            )
        staged: Any = model
        if isinstance(model, HubTarget):
            exits = s.exits or exits_of(model.config)
            staged = StagedTarget(model, exits) if len(exits) > 1 else model
        super().__init__(staged)
        last = len(getattr(staged, "exits", (1,))) - 1
        self.thresholds = [*_levels(s, last), 0.0]
        self.answers = [0] * (last + 1)  # tokens that each exit answered
        self._tops: list[torch.Tensor] = []  # confidence of each step, [B]

    @property
    def default_shape(self) -> Shape:
        """A chain."""
        return Shape(self.settings.num_draft_tokens, self.settings.num_draft_tokens, 1)

    def propose(self, context: Context, shape: Shape) -> TokenTree:
        """A chain that ends in each row after its first unsure token.

        The unsure token stays: a drawn token may not be taken back for its value.
        """
        self._tops = []
        tree = super().propose(context, Shape(shape.nodes, shape.depth, 1))
        if tree.nodes < 3:
            return tree
        sure = torch.stack(self._tops[: tree.nodes - 2], 1) >= self.settings.stop
        keep = torch.cat([sure.new_ones(len(sure), 2), sure.cumprod(1).bool()], 1)
        return tree.prune(keep & tree.alive, closed=True)

    def stops(self) -> bool:
        """Whether every row has drafted an unsure token."""
        return not bool(self._going().any())

    def _going(self) -> torch.Tensor:
        """Rows that draft on, bool [B]."""
        return (torch.stack(self._tops) >= self.settings.stop).all(0)

    def _feed(self, tree: TokenTree) -> torch.Tensor:
        """Run a chain as deep as its last tokens need; returns the law's logits there, [B, V]."""
        if not isinstance(self._session, StagedSession):
            logits = super()._feed(tree)
            self._tops.append(confidence(logits))
            self.answers[0] += len(logits)
            return logits
        model: Any = self.model
        state = self._session.feed(tree.tokens, tree.alive)
        # rows that have stopped take the first answer there is; nobody looks at it
        decided = ~self._going() if self._tops else state.new_zeros(len(state), dtype=torch.bool)
        found: tuple[torch.Tensor, torch.Tensor] | None = None
        for stage, threshold in enumerate(self.thresholds):
            if stage:
                state = self._session.run(stage)  # with every state that waits for it
            if threshold > 1:
                continue
            here = self._fit(model.logits(state))
            sure = confidence(here)
            leaving = ~decided & (sure >= threshold)
            if found is not None:
                here = torch.where(decided[:, None], found[0], here)
                sure = torch.where(decided, found[1], sure)
            found = here, sure
            self.answers[stage] += int(leaving.sum())
            decided = decided | leaving
            if bool(decided.all()):
                break
        assert found is not None  # the last exit always answers
        self._tops.append(found[1])
        return found[0]


def _levels(settings: Settings, count: int) -> list[float]:
    """Thresholds of the first ``count`` exits; the one after them always answers."""
    given = [*settings.thresholds, *settings.thresholds[-1:] * count][:count]
    return given if settings.adaptive else [NEVER] * count


LEVELS = (0.0, 0.3, 0.5, 0.7, 0.9, NEVER)
STOPS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
LENGTHS = (1, 2, 3, 4, 5, 6, 8)


def calibrate(seen: Record, target: float, *, adaptive: bool = True) -> Settings:
    """The policy with the largest predicted speed-up on calibration texts of one target.

    Args:
        seen: The drafter on the texts.
        target: Parameters that a target forward reads.
        adaptive: Off, only the last exit is used, and length and stop rule are chosen.
    """
    choices: list[tuple[float, ...]] = [(NEVER,)]
    if adaptive and len(seen.right) > 1:
        choices = list(itertools.product(LEVELS, repeat=len(seen.right) - 1))
    policies = [
        Settings(None, levels, stop, length, adaptive)
        for levels in choices
        for stop in STOPS
        for length in LENGTHS
    ]
    return policies[int(predict(seen, target, policies).argmax())]


def predict(seen: Record, target: float, policies: Sequence[Settings]) -> NDArray[np.float64]:
    """Predicted speed-up of each policy, [P]; see :func:`isthmus.workbench.exits.speedups`."""
    last = len(seen.right) - 1
    levels = [[*_levels(p, last), 0.0] for p in policies]
    stops, lengths = [p.stop for p in policies], [p.num_draft_tokens for p in policies]
    return speedups(seen, target, levels, stops, lengths)


@dataclass(frozen=True)
class Result:
    """One drafter on one target: the calibrated policy and its speed-up on other texts."""

    policy: Settings
    speedup: float


def compare(
    drafters: Mapping[str, HubTarget], target: HubTarget, texts: torch.Tensor, start: int
) -> dict[str, Result]:
    """Calibrate each drafter on every other text and predict its speed-up on the others.

    A drafter named ``"off"`` answers from its last exit only.
    """
    cost, found = forward_cost(target), {}
    for name, model in drafters.items():
        tune, judged = record(model, texts[::2], start), record(model, texts[1::2], start)
        policy = calibrate(tune, cost, adaptive=name != "off")
        found[name] = Result(policy, float(predict(judged, cost, [policy])[0]))
    return found


def claim(ruler: Ruler, scale: Scale = "small") -> Claim:
    """Measure one nested drafter against three of fixed depth on targets of three sizes.

    Args:
        ruler: Not used: the parameters that are read decide.
        scale: ``"small"`` is 160 texts of 24 tokens a target; ``"test"`` 8 of 8, with drafters
            that were hardly trained.
    """
    small = scale != "test"
    count, tokens, checked = (160, 24, 24) if small else (8, 8, 2)
    budget = nested.TOKENS if small else 8192
    ours = nested.drafter(tokens=budget)
    fixed = {f"{d} layers": nested.drafter((d,), tokens=budget) for d in nested.EXITS}
    targets = {name: nested.target(name, *(() if small else (4,))) for name in nested.KEPT}
    tokenizer = target_model().tokenizer
    prompts = pycode.prompts(count, tokenizer, 48)
    start = len(prompts[0])

    results: dict[str, dict[str, Result]] = {}
    same, repeats, measured, answers = 0, 0, {}, [0] * len(nested.EXITS)
    for name, target in targets.items():
        model = Model(target.model, tokenizer, fast=False)
        plain = answer_together(model, prompts, "none", max_new_tokens=tokens)
        whole = torch.tensor([p + t for p, t in zip(prompts, plain.tokens, strict=True)])
        straight = [r for r in range(count) if not repeats_itself(plain.tokens[r], 4, 2)]
        repeats += count - len(straight)
        texts = whole[straight] if len(straight) > 1 else whole
        arms = {"nested": ours, "off": ours, **fixed}
        results[name] = compare(arms, target, texts, start)
        drafter = SortedSpeculation(ours, results[name]["nested"].policy)
        policy = Fixed(drafter, drafter.default_shape)
        got = answer_together(model, prompts[:checked], policy, max_new_tokens=tokens)
        same += sum(a == b for a, b in zip(got.tokens, plain.tokens[:checked], strict=True))
        answers = [a + b for a, b in zip(answers, drafter.answers, strict=True)]
        measured[name] = (
            f"measured {got.acceptance_length():.2f} tokens/forward, answered by exit: "
            + ", ".join(f"{d}: {n}" for d, n in zip(nested.EXITS, drafter.answers, strict=True))
        )

    def mean(arm: str) -> float:
        return sum(r[arm].speedup for r in results.values()) / len(results)

    share = {
        name: r["nested"].speedup / max(r[f].speedup for f in fixed) for name, r in results.items()
    }
    best = max(fixed, key=mean)
    sizes = [sum(p.numel() for p in m.model.parameters()) for m in (ours, *fixed.values())]
    gates = (
        Gate("answers with the plain output", same, "==", checked * len(targets)),
        *(
            Gate(f"speed-up over that of the best fixed drafter, target of {name}", x, ">=", 0.97)
            for name, x in share.items()
        ),
        Gate("mean speed-up over that of each fixed drafter", mean("nested") / mean(best), ">", 1),
        Gate("parameters, share of the three fixed drafters", sizes[0] / sum(sizes[1:]), "<=", 0.5),
        Gate("mean speed-up over that of the last exit", mean("nested") / mean("off"), ">", 1.0),
        # all from one exit is a drafter of one depth, whatever its speed
        Gate("draft tokens that a deeper exit answers", 1 - answers[0] / sum(answers), ">", 0.0),
        Gate("draft tokens that the first exit answers", answers[0] / sum(answers), ">", 0.0),
    )
    return Claim(
        slug="sorted-speculation",
        statement="One nested drafter with exits after 1, 2 and 4 layers, trained for the compute "
        "of three drafters of these depths and calibrated for each of three targets, speeds up "
        "every target within 3 % of the best of the three, and on the mean more than each.",
        paper_figure="1.55x on average over targets of 7B to 70B with one drafter (abstract)",
        rows=(
            *(
                Row(
                    f"predicted speed-up, target of {name} ({forward_cost(targets[name]):,.0f})",
                    "x",
                    max(r[f].speedup for f in fixed),
                    r["nested"].speedup,
                    r["off"].speedup,
                    note=f"baseline: the best fixed drafter; {_note(r, fixed)}; {measured[name]}",
                )
                for name, r in results.items()
            ),
            Row(
                "mean predicted speed-up",
                "x",
                mean(best),
                mean("nested"),
                mean("off"),
                note="; ".join(f"{f}: {mean(f):.3f}" for f in fixed),
            ),
            Row("drafter parameters", "", sum(sizes[1:]), sizes[0], None, note="baseline: three"),
        ),
        scale=scale,
        device="cpu",
        status=judge(gates, (gates[0], *gates[4:7])),
        reason=""
        if gates[-2].passed
        else "after so short a training four layers predict hardly better than one, so calibration "
        "lets the first exit answer; what it gains on drafters of its own depth is that one "
        "network gets the compute of three",
        notes=(
            "A forward costs the parameters it reads; a head counts at every exit that is asked.",
            "All drafters choose draft length and stop rule on half of the texts of each target.",
            f"{repeats} of {count * len(targets)} greedy texts repeat a phrase and are left out.",
            f"The nested drafter saw {budget:,} tokens; the three others share its compute.",
        ),
        gates=gates,
        seeds=(0,),
    )


def _note(found: Mapping[str, Result], fixed: Mapping[str, HubTarget]) -> str:
    policy = found["nested"].policy
    levels = ", ".join("never" if x > 1 else f"{x}" for x in policy.thresholds)
    apart = ", ".join(f"{name} {found[name].speedup:.3f}" for name in fixed)
    return (
        f"{apart}; thresholds {levels}, stop {policy.stop}, up to {policy.num_draft_tokens} tokens"
    )
