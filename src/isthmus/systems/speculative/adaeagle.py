"""AdaEAGLE: predict, before drafting, how many tokens are worth drafting this round.

Paper: Zhang, Xu, Liang, Chen, Peng, Sun. AdaEAGLE: Optimizing Speculative Decoding via Explicit
    Modeling of Adaptive Draft Structures. 2024. arXiv:2412.18910
Idea: A small network reads what is known before drafting, the last verified feature and the token
    after it, and says how many draft tokens will stand; that many are drafted.
Differs: The network gives the chance of each length to stand (ordinal logits), and the length with
    the most expected tokens per unit of time is drafted; ``cost_aware`` off, the expected length
    itself, as in the paper. In a batch all rows draft the same length.
Lossless: yes

    [f_t; E x_{t+1}] ── three layers ──> P(y >= 1..K) ── argmax (1 + sum P) / (1 + c k) ──> k
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from isthmus import registry
from isthmus.claims import Claim, Gate, Row, Ruler, Scale, judge
from isthmus.decoding.feature_drafter import FeatureDrafter, relative_cost, weights_read
from isthmus.decoding.survey import Survey, survey
from isthmus.decoding.target import HubTarget
from isthmus.decoding.trained import (
    CONFIG,
    WEIGHTS,
    check_replaceable,
    read_config,
    target_fingerprint,
)
from isthmus.errors import BrokenFileError, InvalidInputError, MismatchError
from isthmus.folders import published
from isthmus.roles import PLAIN, Context, Drafter, Shape, Step, Target
from isthmus.training.drafting import Recipe
from isthmus.workbench.bench import answer, repeats_itself
from isthmus.workbench.drafters import curve_note, reference_drafter, target_model, texts


@dataclass(frozen=True)
class Settings:
    """Settings of AdaEAGLE.

    Attributes:
        longest: Draft tokens of a round at most, K.
        cost: Time of a drafter step over that of a target forward, c; None takes the ratio of
            the weights that each has to read.
        cost_aware: Draft the length with the most tokens per time; off, the expected length.
        threshold: Also end a chain once its probability falls below this; 0 never does.
        adaptive: The idea; off, always the longest draft.
    """

    longest: int = 8
    cost: float | None = None
    cost_aware: bool = True
    threshold: float = 0.0
    adaptive: bool = True


class Adaeagle:
    """Policy that drafts chains of predicted length.

    Args:
        drafter: A trained drafter on features.
        settings: See :class:`Settings`.

    Raises:
        InvalidInputError: A length below 1, or a negative cost.
    """

    role: ClassVar[str] = "policy"
    name = "adaeagle"

    def __init__(self, drafter: FeatureDrafter, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self.drafter = drafter
        self.cost = relative_cost(drafter) if self.settings.cost is None else self.settings.cost
        if self.settings.longest < 1 or self.cost < 0:
            raise InvalidInputError(
                f"longest must be 1 or more and cost 0 or more, got {self.settings.longest} and "
                f"{self.cost}"
            )
        target, width = drafter.target, drafter.sizes.hidden_size
        self.predictor = nn.Sequential(  # the lightweight draft length predictor, sec. 3.2
            nn.Linear(2 * width, width),
            nn.ReLU(),
            nn.Linear(width, max(1, width // 4)),
            nn.ReLU(),
            nn.Linear(max(1, width // 4), self.settings.longest),
        ).to(target.device, target.state_dtype)
        self._chance: torch.Tensor | None = None  # of the chain so far, [B]

    @classmethod
    def for_model(cls, model: Any, settings: Settings | None = None) -> Self:
        """Refuse to plan untrained.

        Raises:
            InvalidInputError: Always; a saved policy is loaded instead.
        """
        raise InvalidInputError(
            "adaeagle needs a trained drafter and a trained predictor: train eagle, then "
            "Adaeagle.taught(drafter, texts).save_pretrained(folder), then --drafter FOLDER"
        )

    def chances(self, inputs: torch.Tensor) -> torch.Tensor:
        """``P(y >= k)`` for k = 1..K, [..., K], from ``[f_t; E x_{t+1}]`` [..., 2D]."""
        out: torch.Tensor = self.predictor(inputs).sigmoid()
        return out.cummin(-1).values  # longer never stands more often

    def plan(self, chances: torch.Tensor) -> torch.Tensor:
        """How many tokens to draft, int64 [...], from ``P(y >= k)`` [..., K].

        Example:
            >>> policy = object.__new__(Adaeagle)
            >>> policy.settings, policy.cost = Settings(longest=3), 0.5
            >>> policy.plan(torch.tensor([[0.9, 0.8, 0.1], [0.3, 0.2, 0.1]])).tolist()
            [2, 1]
        """
        if not self.settings.adaptive:
            return torch.full(chances.shape[:-1], self.settings.longest, device=chances.device)
        if not self.settings.cost_aware:
            return chances.sum(-1).round().long().clamp(1, self.settings.longest)
        length = torch.arange(1, self.settings.longest + 1, device=chances.device)
        return ((1 + chances.cumsum(-1)) / (1 + self.cost * length)).argmax(-1) + 1

    def begin(self, context: Context, target: Target, **inputs: Any) -> None:
        """See :class:`isthmus.roles.Policy`."""
        self.drafter.begin(context, target, **inputs)

    @torch.no_grad()
    def decide(self, context: Context, limit: Shape) -> tuple[Drafter | None, Shape]:
        """A chain of the planned length."""
        if limit.nodes == 0:
            return None, PLAIN
        length = int(self.plan(self.chances(self.drafter.known(context)).mean(0)))
        self.drafter.stop_rule = None
        if self.settings.threshold:
            self._chance = self.drafter.law_of_first().amax(-1)
            self.drafter.stop_rule = self._too_unsure
        return self.drafter, Shape(length, length, 1).capped(limit.nodes, limit.depth, 1)

    def _too_unsure(self, logits: torch.Tensor) -> bool:
        assert self._chance is not None
        self._chance = self._chance * torch.softmax(logits, -1).amax(-1)
        return bool((self._chance < self.settings.threshold).all())

    def observe(self, step: Step, drafter: Drafter | None) -> None:
        """Let the drafter catch up."""
        self.drafter.observe(step)

    def select(self, rows: Sequence[int]) -> None:
        """Keep only the given rows."""
        self.drafter.select(rows)

    @classmethod
    def taught(
        cls,
        drafter: FeatureDrafter,
        prompts: torch.Tensor,
        settings: Settings | None = None,
        *,
        new_tokens: int = 32,
        steps: int = 600,
        seed: int = 0,
    ) -> Self:
        """A policy whose predictor was trained on what the drafter's chains came to.

        Args:
            drafter: Trained, and frozen here.
            prompts: int64 [P, T].
            settings: See :class:`Settings`.
            new_tokens: Tokens to write after each prompt; every one of them is a label.
            steps: Optimiser steps of 256 labels.
            seed: Seed of weights and order.
        """
        settings = settings or Settings()
        rounds = survey(drafter, prompts, new_tokens, settings.longest)
        return cls(drafter, settings).learn(rounds, steps=steps, seed=seed)

    def learn(self, rounds: Survey, *, steps: int = 600, seed: int = 0) -> Self:
        """Train the predictor: binary cross-entropy on ``y >= k`` for every k."""
        generator = torch.Generator().manual_seed(seed)
        for p in self.predictor.parameters():
            bound = p.shape[-1] ** -0.5 if p.ndim > 1 else 0.0
            p.data.copy_((torch.rand(p.shape, generator=generator) * 2 - 1) * bound)
        length = torch.arange(1, self.settings.longest + 1)
        inputs = rounds.inputs.flatten(0, 1)
        labels = (rounds.accepted.flatten()[:, None] >= length).to(inputs)
        optimizer = torch.optim.AdamW(self.predictor.parameters(), lr=1e-3, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            rows = torch.randint(len(inputs), (256,), generator=generator)
            logits = self.predictor(inputs[rows])
            loss = F.binary_cross_entropy_with_logits(logits, labels[rows])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        return self

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the predictor, and the drafter in a folder within.

        Raises:
            InvalidInputError: The folder holds something else.
            BrokenFileError: It cannot be written.
        """
        folder = Path(folder)
        check_replaceable(folder)
        with published(folder) as part:
            self.drafter.save_pretrained(part / "drafter")
            weights = {k: v.detach().cpu() for k, v in self.predictor.state_dict().items()}
            save_file(weights, part / WEIGHTS, metadata={"format": "pt"})
            config = {
                "system": self.name,
                "settings": asdict(self.settings),
                "target": target_fingerprint(self.drafter.target),
                "sha256": hashlib.sha256((part / WEIGHTS).read_bytes()).hexdigest(),
            }
            (part / CONFIG).write_text(json.dumps(config, indent=1))

    @classmethod
    def from_pretrained(cls, folder: str | Path, target: HubTarget) -> Self:
        """Read a policy and its drafter.

        Raises:
            BrokenFileError: A file is missing, truncated or altered.
            MismatchError: It was trained for another target, or is another system.
        """
        config = read_config(folder)
        if config["system"] != cls.name:
            raise MismatchError(f"{folder} holds a {config['system']} drafter, not {cls.name}")
        inner = Path(folder) / "drafter"
        system: Any = registry.load(read_config(inner)["system"])
        drafter = system.from_pretrained(inner, target)
        weights = Path(folder) / WEIGHTS
        try:
            if hashlib.sha256(weights.read_bytes()).hexdigest() != config["sha256"]:
                raise BrokenFileError(f"{weights} was altered or cut short; train it again")
            policy = cls(drafter, Settings(**config["settings"]))
            policy.predictor.load_state_dict(load_file(weights))
        except (OSError, SafetensorError, TypeError, RuntimeError) as error:
            raise BrokenFileError(f"the policy in {folder} cannot be read ({error})") from error
        return policy


def claim(ruler: Ruler, scale: Scale = "small") -> Claim:
    """Measure predicted lengths against every fixed one and the truth, on ``pycode-m``.

    The chain that stands at each place of the greedy answers is counted once; every way of
    choosing lengths is then followed through the same answers. Time is counted in weights read:
    1 for a target forward, c for a drafter step, and the predictor's own share.

    Args:
        ruler: The clock; not used, nothing is timed.
        scale: ``"small"`` learns from 256 answers and counts on 256 others of 32 tokens.
    """
    full = scale != "test"
    rows, new, longest = (256, 32, 8) if full else (8, 6, 4)
    drafter = reference_drafter("eagle", recipe=None if full else Recipe(steps=12))
    assert isinstance(drafter, FeatureDrafter)
    model, held_out = target_model(), texts(split="held-out")
    seen = survey(drafter, texts()[:rows, :32], new, longest)
    unseen = survey(drafter, held_out[:rows, :32], new, longest)
    steps = 600 if full else 20
    policy = Adaeagle(drafter, Settings(longest=longest)).learn(seen, steps=steps)
    c = policy.cost
    extra = sum(p.numel() for p in policy.predictor.parameters()) / weights_read(drafter.target)

    def measured(
        rounds: Survey, lengths: torch.Tensor, price: float = 0.0, tried: torch.Tensor | None = None
    ) -> tuple[float, float, float]:
        """Tokens per unit of time, tokens per forward, wasted drafts per token."""
        tokens, forwards, drafted = rounds.count(lengths)
        spent = drafted
        if tried is not None:  # the step that finds the chain unsure is paid, too
            spent += rounds.count(torch.minimum(lengths + 1, tried))[2] - drafted
        speed = tokens / (forwards * (1 + price) + c * spent)
        return speed, tokens / forwards, (drafted - (tokens - forwards)) / tokens

    fixed = {k: torch.full_like(seen.accepted, k) for k in range(1, longest + 1)}
    speeds = {k: measured(seen, lengths)[0] for k, lengths in fixed.items()}
    best = max(speeds, key=lambda k: speeds[k])  # chosen on the texts that were learned from
    with torch.no_grad():
        chances = policy.chances(unseen.inputs)
    lengths = policy.plan(chances)
    policy.settings = replace(policy.settings, cost_aware=False)
    paper = policy.plan(chances)
    sure = (unseen.chance >= 0.1).sum(-1).clamp(min=1)
    mixed = torch.minimum(lengths, sure)
    ours = measured(unseen, lengths, extra)
    rival = measured(unseen, fixed[best])
    off = measured(unseen, fixed[longest])
    truth = measured(unseen, unseen.accepted.clamp(1, longest))
    expected = measured(unseen, paper, extra)
    both = measured(unseen, mixed, extra, lengths)
    alone = measured(unseen, sure, 0.0, fixed[longest])

    count = 16 if full else 2
    prompts = held_out[:count, :32].tolist()
    policy.settings = replace(policy.settings, cost_aware=True)
    plain = answer(model, prompts, "none", max_new_tokens=16)
    same = answer(model, prompts, policy, max_new_tokens=16)
    equal = sum(a == b for a, b in zip(same.tokens, plain.tokens, strict=True))
    loops = sum(repeats_itself(t, size=3, times=2) for t in plain.tokens)
    # longer fixed drafts are accepted further and waste more: compare at one acceptance length
    known = [measured(unseen, f)[1:] for f in fixed.values()]
    wasted = ours[2] / float(np.interp(ours[1], *zip(*known, strict=True)))
    gates = (
        Gate("answers with the plain output", equal, "==", count),
        Gate("speed over the best fixed length", ours[0] / rival[0], ">=", 0.99),
        Gate("wasted drafts over those of a fixed length as far accepted", wasted, "<=", 0.8),
        Gate("tokens/forward over the best fixed length", ours[1] / rival[1], ">=", 0.97),
        Gate("speed over the longest draft (off)", ours[0] / off[0], ">", 1.0),
        Gate("speed of the truth over ours", truth[0] / ours[0], ">", 1.0),
    )
    direction = (
        gates[0],
        Gate("wasted drafts over those of a fixed length, direction", wasted, "<", 1.0),
        *gates[3:],
    )
    grid = ", ".join(f"{k}: {measured(unseen, f)[0]:.3f}" for k, f in fixed.items())
    return Claim(
        slug="adaeagle",
        statement="A small network that predicts how many draft tokens will stand is as fast as "
        "the best fixed draft length and wastes fewer drafts than one that is accepted as far.",
        paper_figure="1.61x over plain decoding, above every fixed length (Table 1)",
        rows=(
            Row(
                "tokens per unit of time",
                "tokens/target forward",
                rival[0],
                ours[0],
                off[0],
                ceiling=truth[0],
                note=f"baseline: {best} tokens always; off: {longest} always; c = {c:.3f}, "
                f"predictor {extra:.3f}; fixed {grid}",
            ),
            Row("acceptance length", "tokens/forward", rival[1], ours[1], off[1], ceiling=truth[1]),
            Row("wasted draft tokens", "per token", rival[2], ours[2], off[2], ceiling=truth[2]),
            Row(
                "tokens per unit of time, expected length instead of the best",
                "tokens/target forward",
                rival[0],
                expected[0],
                None,
                note="the paper's rule",
            ),
            Row(
                "tokens per unit of time, with a threshold of 0.1",
                "tokens/target forward",
                rival[0],
                both[0],
                None,
                control=alone[0],
                note="control: the threshold alone",
            ),
        ),
        scale=scale,
        device="cpu",
        status=judge(gates, direction),
        notes=(
            curve_note(drafter),
            f"{loops} of {count} plain answers repeat themselves.",
        ),
        gates=(*gates, direction[1]),
        seeds=(0,),
    )
