"""Reward-guided speculative decoding: a small model writes steps, a reward decides who is heard.

Paper: Liao, Xu, Dong, Li, Monz, Savarese, Sahoo, Xiong. Reward-Guided Speculative Decoding for
    Efficient LLM Reasoning. 2025. arXiv:2501.19324
Idea: A draft model writes one step of reasoning, a process reward model scores it, and the target
    writes the step anew only where the score is low; no token is verified.
Differs: The reward here is a head on the draft model's own states, so it costs next to nothing; a
    reward with a model of its own, as in the paper, plays the same role (``Reward.reader``).
Lossless: no

    draft writes a step ──reward r──> kept with probability w(r), else the target writes it
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, get_args

import torch

from isthmus.claims import Claim, Gate, Row, Ruler, Scale, judge
from isthmus.decoding.generation import Generation
from isthmus.decoding.own_loop import BatchStrategy, row_generators
from isthmus.decoding.relay import Relay, StepEnd
from isthmus.decoding.rewards import NoReward, Reward, StateReward
from isthmus.decoding.state_head import StateHead
from isthmus.errors import InvalidInputError, UnsupportedModelError
from isthmus.roles import RoundTrace, Target
from isthmus.workbench import sums
from isthmus.workbench.bench import reference_model
from isthmus.workbench.rewards import sums_reward

DRAFT, TARGET, READER = 0, 1, 2

Weight = Literal["step", "constant", "clip", "sigmoid", "ratio"]


@dataclass(frozen=True)
class Settings:
    """Settings of reward-guided decoding, with the values of the released code.

    Attributes:
        threshold: Reward delta from which a draft step is kept.
        weight: How likely a step of reward r is kept, w(r): ``"step"`` is 1 from the threshold on,
            best for a given use of the target; ``"clip"`` is r cut to [0, 1]; ``"sigmoid"`` is a
            smooth step at the threshold; ``"ratio"`` is min(1, exp r), for rewards that are log
            ratios of target and draft likelihood; ``"constant"`` switches the idea off: w is
            ``threshold`` whatever the reward.
        slope: Steepness of the sigmoid.
        separator: What ends a step: text, or token ids where there is no tokenizer.
        max_steps: Steps of an answer at most.
    """

    threshold: float = 0.7
    weight: Weight = "step"
    slope: float = 10.0
    separator: str | tuple[int, ...] = "\n\n"
    max_steps: int = 100

    def __post_init__(self) -> None:
        if self.weight not in get_args(Weight):
            raise InvalidInputError(f"weight is one of {get_args(Weight)}, not {self.weight!r}")
        if self.weight == "constant" and not 0.0 <= self.threshold <= 1.0:
            raise InvalidInputError(f"a constant weight is a probability, got {self.threshold}")
        if self.max_steps < 1 or not self.separator or not math.isfinite(self.threshold):
            raise InvalidInputError(
                "reward-guided needs max_steps >= 1, a separator and a finite threshold, got "
                f"{self.max_steps}, {self.separator!r} and {self.threshold}"
            )


def keep_probability(settings: Settings, reward: float) -> float:
    """w(r): how likely a draft step of that reward is kept (sec. 3.1, Table 1).

    Example:
        >>> [keep_probability(Settings(threshold=0.7), r) for r in (0.69, 0.7)]
        [0.0, 1.0]
        >>> keep_probability(Settings(weight="clip"), 1.3)
        1.0
    """
    if settings.weight == "step":
        return float(reward >= settings.threshold)
    if settings.weight == "constant":
        return settings.threshold
    if settings.weight == "clip":
        return min(1.0, max(0.0, reward))
    if settings.weight == "ratio":
        return math.exp(min(0.0, reward))
    return 0.5 + 0.5 * math.tanh(settings.slope * (reward - settings.threshold) / 2)


class RewardGuided(BatchStrategy):
    """Strategy: draft by steps, score, keep or write anew.

    Args:
        draft: Small model.
        target: The model whose quality is wanted, with the same vocabulary.
        reward: Scores steps.
        settings: See :class:`Settings`.
        tokenizer: Finds a separator that is text.
        end: Token that ends an answer, or None.

    Attributes:
        read: Tokens that draft model, target and the reward's own model have read, discarded
            steps included, in the last call.
        scores: Rewards of the draft steps of each row of the last call.
    """

    role: ClassVar[str] = "strategy"
    name = "reward-guided"

    def __init__(
        self,
        draft: Target,
        target: Target,
        reward: Reward,
        settings: Settings | None = None,
        *,
        tokenizer: Any = None,
        end: int | None = None,
    ) -> None:
        self.models, self.reward, self.end = [draft, target], reward, end
        self.settings = settings or Settings()
        self.over = StepEnd(self.settings.separator, tokenizer, end)
        self.watched = [DRAFT] if reward.reader == "draft" else []
        if reward.reader is not None and not isinstance(reward.reader, str):
            self.models.append(reward.reader)
            self.watched = [READER]
        self.read: tuple[int, ...] = ()
        self.scores: list[list[float]] = []

    @classmethod
    def for_model(
        cls, model: Any, settings: Settings | None = None, *, reward: Reward | None = None
    ) -> Self:
        """The model is the target, its draft model writes the steps.

        Raises:
            InvalidInputError: There is no draft model or no reward.
            UnsupportedModelError: The model has an encoder.
        """
        if model.draft_model is None:
            raise InvalidInputError(
                "reward-guided needs a draft model that writes steps; give one with --draft-model"
            )
        if getattr(model.target, "encoder_decoder", False):
            raise UnsupportedModelError("reward-guided is for models without an encoder")
        if reward is None:
            raise InvalidInputError(
                "reward-guided needs a reward for its steps: fit a StateHead on the draft model's "
                "states, save it, and give its folder as the drafter"
            )
        end = None if model.tokenizer is None else model.tokenizer.eos_token_id
        return cls(
            model.draft_model, model.target, reward, settings, tokenizer=model.tokenizer, end=end
        )

    @classmethod
    def for_folder(cls, model: Any, folder: str | Path) -> Self:
        """Score with a saved head on the draft model's states.

        Raises:
            IsthmusError: The head cannot be read or reads another model; or as for
                :meth:`for_model`.
        """
        if model.draft_model is None:
            return cls.for_model(model)
        head = StateHead.from_pretrained(folder, cls.name, model.draft_model)
        return cls.for_model(model, reward=StateReward(head))

    @torch.no_grad()
    def generate_batch(
        self,
        prompts: Sequence[torch.Tensor],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> list[Generation]:
        """Decode prompts of any lengths together; rows that wait for the target share its calls.

        Args:
            prompts: B prompts, int64 [T_b].
            max_new_tokens: Budget of each.
            temperature: 0 is greedy.
            seed: Seed of every draw; row b uses ``seed + b``.

        Returns:
            One result a prompt. ``rounds`` has one entry a step with the name of its writer, and
            ``stats.target_forwards`` counts the tokens that the target wrote.

        Raises:
            InvalidInputError: A budget below 1 or an empty prompt.
        """
        if max_new_tokens < 1:
            raise InvalidInputError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        start = time.perf_counter()
        relay = Relay(self.models, prompts, watched=self.watched)
        draws, coins = row_generators(seed, len(prompts))
        results = [Generation(lossless=False, prompt_tokens=len(p)) for p in prompts]
        limits = [len(p) + max_new_tokens for p in prompts]
        self.scores = [[] for _ in prompts]
        alive = list(range(len(prompts)))
        while alive:
            starts = {b: len(relay.texts[b]) for b in alive}
            relay.write(DRAFT, alive, self.over, limits, temperature, draws)
            drafted = {b: len(relay.texts[b]) - starts[b] for b in alive}
            refused = []
            for b, reward in zip(alive, self._score(relay, alive, starts), strict=True):
                self.scores[b].append(reward)
                keep = keep_probability(self.settings, reward)
                if 0.0 < keep < 1.0:
                    u = torch.rand((), generator=coins[b], dtype=torch.float64)
                    keep = float(float(u) < keep)
                if keep == 0.0:
                    refused.append(b)
            relay.take_back_rows({b: starts[b] for b in refused})
            relay.write(TARGET, refused, self.over, limits, temperature, draws)
            for b in alive:
                self._note(results[b], relay.texts[b][starts[b] :], drafted[b], b in refused)
                self._finish(results[b], max_new_tokens)
            alive = [b for b in alive if not results[b].finish_reason]
        for result in results:
            result.stats.seconds = time.perf_counter() - start
        self.read = tuple(relay.read)
        return results

    def _score(self, relay: Relay, rows: Sequence[int], starts: dict[int, int]) -> list[float]:
        states = relay.states(self.watched[0], rows) if self.watched else None
        texts = [relay.texts[b] for b in rows]
        return self.reward.score(texts, [starts[b] for b in rows], states)

    def _note(self, result: Generation, written: list[int], drafted: int, refused: bool) -> None:
        """Add a finished step to a result."""
        result.tokens += written
        stats, kept = result.stats, 0 if refused else drafted
        stats.new_tokens, stats.drafted = len(result.tokens), stats.drafted + drafted
        stats.accepted += kept
        stats.target_forwards += len(written) if refused else 0
        writer = "target" if refused else "draft"
        result.rounds.append(RoundTrace(writer, drafted, kept, len(written)))

    def _finish(self, result: Generation, budget: int) -> None:
        if result.tokens[-1] == self.end:
            result.finish_reason = "stop"
        elif len(result.tokens) >= budget or len(result.rounds) >= self.settings.max_steps:
            result.finish_reason = "length"


@dataclass(frozen=True)
class _Arm:
    """What one setting did on all problems."""

    solved: float  # percent
    flops: float  # a problem
    share: float  # of the steps, written by the target
    same: float  # percent of the answers that are the target's

    def note(self, target: _Arm) -> str:
        """What it cost."""
        return f"target writes {self.share:.0%} of the steps, FLOPs {self.flops / target.flops:.0%}"


def claim(ruler: Ruler, scale: Scale = "small") -> Claim:
    """Solve held-out chains of sums.

    Chains of two and three numbers, of which the draft model alone solves about half. FLOPs are
    twice the weights of a model for every token that it reads, discarded steps included.

    Args:
        ruler: Not used; only tokens are counted.
        scale: ``"small"`` is 400 problems, ``"test"`` 12.
    """
    count, budget = (400, 80) if scale != "test" else (12, 48)
    model = reference_model("sums-l", "sums-s")
    draft, target = model.draft_model, model.target
    assert draft is not None
    sizes = [sum(p.numel() for p in m.model.parameters()) for m in (draft, target)]
    head = sums_reward(draft)
    reward = StateReward(head)
    problems = sums.problems(count, seed="reward-guided", addends=(2, 3))
    plain, base = NoReward(), Settings(separator="\n")
    answers: list[list[int]] = []

    def solved(results: Sequence[Generation]) -> float:
        texts = [model.tokenizer.decode(r.tokens) for r in results]
        return 100 * sum(map(sums.check_answer, problems, texts)) / count

    def arm(settings: Settings, kind: Reward, models: Sequence[Any] = (draft, target)) -> _Arm:
        words = model.tokenizer
        strategy = RewardGuided(
            models[0], models[1], kind, settings, tokenizer=words, end=words.eos_token_id
        )
        prompts = [model.encode(p.prompt) for p in problems]
        results = strategy.generate_batch(prompts, max_new_tokens=budget, seed=0)
        weights = [sizes[DRAFT if m is draft else TARGET] for m in models]
        flops = sum(2.0 * n * w for n, w in zip(strategy.read, weights, strict=True))
        if kind is reward:
            flops += 2.0 * head.parameters_used * sum(map(len, strategy.scores))
        if not answers:
            answers.extend(r.tokens for r in results)
        steps = [r.drafter == "target" for each in results for r in each.rounds]
        same = sum(a == r.tokens for a, r in zip(answers, results, strict=True))
        share = sum(steps) / len(steps)
        return _Arm(solved(results), flops / count, share, 100 * same / count)

    def best_of(samples: int) -> tuple[float, float]:
        """Percent solved and FLOPs of the best of some drawn answers by the product of rewards."""
        strategy = RewardGuided.for_model(model, replace(base, threshold=-1.0), reward=reward)
        prompts = [model.encode(p.prompt) for p in problems for _ in range(samples)]
        results = strategy.generate_batch(prompts, max_new_tokens=budget, temperature=1.0, seed=1)
        value = torch.tensor([math.prod(s) for s in strategy.scores]).view(count, samples)
        chosen = value.argmax(1) + torch.arange(count) * samples
        flops = 2.0 * strategy.read[DRAFT] * sizes[DRAFT]
        return solved([results[i] for i in chosen.tolist()]), flops / count

    alone = replace(base, weight="constant", threshold=1.0)
    large = arm(alone, plain, (target, target))
    small = arm(alone, plain)
    deltas = (0.05, 0.1, 0.3, 0.5, 0.7, 0.8, 0.9)
    ours = {d: arm(replace(base, threshold=d), reward) for d in deltas}
    chance = {
        d: arm(replace(base, weight="constant", threshold=1.0 - a.share), plain)
        for d, a in ours.items()
    }
    most, most_flops = best_of(4)
    main = base.threshold
    fall = max(ours[a].solved - ours[b].solved for a, b in pairwise(deltas))
    lost = large.solved - ours[main].solved
    cost = ours[main].flops / large.flops
    gained = ours[main].solved - chance[main].solved
    gates = (
        Gate("draft model alone solves, percent", small.solved, ">=", 40.0),
        Gate("target alone solves, percent", large.solved, ">=", 90.0),
        Gate("points below the target", lost, "<=", 1.0),
        Gate("FLOPs over the target's", cost, "<=", 0.6),
        Gate("points over a random mixture of the same share", gained, ">=", 5.0),
        Gate("largest fall to the next higher delta, points", fall, "<=", 2.0),
    )
    direction = (
        Gate("points over the draft model", ours[main].solved - small.solved, ">", 0.0),
        Gate("FLOPs over the target's, direction", cost, "<", 1.0),
        Gate("points over a random mixture, direction", gained, ">", 0.0),
    )
    return Claim(
        slug="reward-guided",
        statement="Steps of a small model that a reward lets pass, with the rest written by the "
        "target, solve as many problems as the target to a point at 60 % of its FLOPs, and 5 "
        "points more than a random mixture of the same share.",
        paper_figure="up to 4.4x fewer FLOPs than the target only, up to 3.5 points over parallel "
        "decoding of the draft model, Qwen2.5-Math 1.5B and 7B",
        rows=(
            *(
                Row(
                    f"problems solved at delta {d:g}",
                    "%",
                    small.solved,
                    a.solved,
                    chance[d].solved,
                    ceiling=large.solved,
                    note=f"{a.note(large)}; off: {chance[d].note(large)}; answers equal to the "
                    f"target's {a.same:.0f} %",
                )
                for d, a in ours.items()
            ),
            Row("FLOPs a problem", "", large.flops, ours[main].flops, chance[main].flops),
            Row(
                "problems solved by the best of 4 of the draft model",
                "%",
                small.solved,
                most,
                None,
                note=f"drawn at temperature 1, product of rewards, FLOPs "
                f"{most_flops / large.flops:.0%} of the target's",
            ),
        ),
        scale=scale,
        device="cpu",
        status=judge(gates, direction),
        notes=(
            f"Draft model {sizes[DRAFT]:,} parameters, target {sizes[TARGET]:,}, reward "
            f"{head.parameters_used:,} on the draft model's states, fitted on "
            f"{head.record['steps']} steps of training problems, {head.record['right']:.0%} right.",
            "The draft model fails where the next number is copied from the question, and hardly "
            "anywhere else; the reward learns which steps those are, and a changed digit in a "
            "column moves it little.",
            f"The gates are those of the default, delta {main:g}; off is a coin of the same share.",
        ),
        gates=gates,
        seeds=(0, 1),
    )
