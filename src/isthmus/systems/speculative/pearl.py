"""PEARL: the draft model keeps drafting while the target verifies, so neither waits.

Paper: Liu, Li, Lv, Liu, Zhu, Hu, Sun. PEARL: Parallel Speculative Decoding with Adaptive Draft
    Length. 2024. arXiv:2408.11850
Idea: Pre-verify: the target tests the first draft token while the rest of the window is drafted.
    Post-verify: the next window is drafted while the target tests this one. Accepted windows follow
    each other without a gap, which is what makes the draft length adaptive.
Differs: The engine runs both models in turn and a clock counts the time of running them side by
    side. The two modes are one rule: a round tests the tokens that are pending and the first token
    of the window drafted meanwhile, whose law the same forward gives.
Lossless: yes

    draft   | y1 y2 y3 y4 | z1 z2 z3 z4 | ...        time of a round: max(gamma t_draft, t_target)
    target  | tests y1    | y2 y3 y4 z1 | z2 ...     a rejection at n: residual token, drop the rest
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from isthmus.claims import Claim, Gate, Row, Ruler, Scale, judge
from isthmus.decoding.acceptance import Coupled
from isthmus.decoding.cost import Cost, measure_cost
from isthmus.decoding.engine import Request, decode
from isthmus.decoding.law import Law
from isthmus.decoding.overlap import NoBonus, Window, elapsed
from isthmus.decoding.policy import Fixed
from isthmus.decoding.stopping import Stopper
from isthmus.decoding.table import TableTarget
from isthmus.decoding.target import HubTarget
from isthmus.errors import InvalidInputError
from isthmus.roles import Acceptance, Shape, Target
from isthmus.testing.statistics import string_test
from isthmus.workbench import pycode
from isthmus.workbench.bench import answer, reference_model


@dataclass(frozen=True)
class Settings:
    """Settings of PEARL.

    Attributes:
        window: Draft tokens drawn in one target forward, gamma; None takes t_target / t_draft as
            measured, so that both finish together.
        pre_verify: Test the first token of a window while the rest is drafted.
        post_verify: Draft the next window while this one is tested. With both off, this is
            ordinary speculation: first draft, then verify.
    """

    window: int | None = None
    pre_verify: bool = True
    post_verify: bool = True


class Pearl(Fixed):
    """The policy: one window a round, tested and drafted side by side.

    Args:
        model: The draft model as a target, sharing the target's vocabulary.
        settings: See :class:`Settings`; without a window it is 4.

    Attributes:
        acceptance: The exact rule without a bonus token.

    Raises:
        InvalidInputError: A window below 1.

    Example:
        >>> Pearl(TableTarget(5), Settings(window=3)).shape
        Shape(nodes=3, depth=3, width=1)
    """

    role: ClassVar[str] = "policy"
    name = "pearl"

    def __init__(self, model: Target, settings: Settings | None = None) -> None:
        chosen = settings or Settings()
        chosen = replace(chosen, window=4 if chosen.window is None else chosen.window)
        assert chosen.window is not None
        if chosen.window < 1:
            raise InvalidInputError(f"the window must be at least 1, got {chosen.window}")
        self.window = Window(
            model,
            chosen.window,
            pre_verify=chosen.pre_verify,
            post_verify=chosen.post_verify,
        )
        super().__init__(self.window, Shape(chosen.window, chosen.window, 1))
        self.acceptance = NoBonus(self.window)

    @classmethod
    def for_model(cls, model: Any, settings: Settings | None = None) -> Pearl:
        """Take the draft model of a model, and the window from measured forward times.

        Raises:
            InvalidInputError: There is no draft model.
        """
        chosen = settings or Settings()
        if model.draft_model is None:
            raise InvalidInputError("pearl needs a draft model; give one with --draft-model")
        if chosen.window is None and isinstance(model.target, HubTarget):
            ratio = measure_cost(model.target)(1) / measure_cost(model.draft_model)(1)
            chosen = replace(chosen, window=max(1, round(ratio)))
        return cls(model.draft_model, chosen)


class _Blurred(TableTarget):
    """A target with part of its logits replaced: a draft model that agrees as much as wanted."""

    def __init__(self, target: TableTarget, share: float) -> None:
        super().__init__(target.vocab_size, seed=target.seed, sharpness=target.sharpness)
        self.other = TableTarget(target.vocab_size, seed=99, sharpness=target.sharpness)
        self.share = share

    def logits(self, state: torch.Tensor) -> torch.Tensor:
        return (1 - self.share) * super().logits(state) + self.share * self.other.logits(state)


ARMS = {
    "pearl": Settings(),
    "no pre-verify": Settings(pre_verify=False),
    "no post-verify": Settings(post_verify=False),
    "off": Settings(pre_verify=False, post_verify=False),
}


def claim(ruler: Ruler, scale: Scale = "small") -> Claim:
    """Measure the clock of both models side by side against speculation with its best length.

    On models whose agreement alpha is set (time ratios 3, 5 and 10), and with ``pycode-t`` and
    ``pycode-s`` at their measured times.

    Args:
        ruler: The clock of the forward times; the rest is counted.
        scale: ``"small"`` is 500 tokens an arm, ``"test"`` 60.
    """
    full = scale != "test"
    tokens, draws = (500, 3000) if full else (60, 400)
    truth, guess = TableTarget(5, seed=1, sharpness=1.2), TableTarget(5, seed=2)

    def law_test(settings: Settings) -> float:
        policy = Pearl(guess, replace(settings, window=2))
        law = Law(temperature=0.8, top_p=0.9)
        rule = policy.acceptance
        return string_test(policy, target=truth, law=law, acceptance=rule, rows=draws, tokens=4).p

    kept = min(law_test(settings) for settings in ARMS.values())
    target = TableTarget(40, seed=5, sharpness=2.0)

    def run(draft: Target, settings: Settings, rule: Acceptance | None = None) -> Any:
        policy = Pearl(draft, settings)
        request = Request(torch.tensor([1, 2]), Stopper(max_new_tokens=tokens))
        rounds = decode(
            target,
            [request],
            policy=policy,
            acceptance=NoBonus(policy.window, rule),
            law=Law(temperature=1.0),
            generator=torch.Generator().manual_seed(0),
        )
        for _ in rounds:
            pass
        return policy.window.rounds, request.result

    near = _Blurred(target, 0.15)
    texts = [
        run(near, replace(s, window=w), Coupled(7))[1].tokens for s in ARMS.values() for w in (2, 5)
    ]
    same = sum(t == texts[0] for t in texts)

    speed: dict[tuple[float, int, str], float] = {}
    for share in (0.5, 0.3, 0.15) if full else (0.15,):
        draft = _Blurred(target, share)
        states = target.state(torch.randint(0, 40, (2000, 3)))
        p, q = (torch.softmax(m.logits(states), -1) for m in (target, draft))
        alpha = float(torch.minimum(p, q).sum(-1).mean())
        chains = {w: run(draft, replace(ARMS["off"], window=w)) for w in (1, 2, 3, 4, 6, 8, 12)}
        for ratio in (3, 5, 10):
            flat = Cost({1: float(ratio)})

            def per_token(got: Any, unit: Cost = flat) -> float:
                # every forward of the target takes as long, as on a device with room to spare
                rounds = [(s, b, 1) for s, b, _ in got[0]]
                return elapsed(rounds, 1.0, unit) / len(got[1].tokens)

            best = min(per_token(got) for got in chains.values())
            for name, settings in ARMS.items():
                if name != "off":
                    mine = per_token(run(draft, replace(settings, window=ratio)))
                    speed[alpha, ratio, name] = best / mine
    strong = {k: v for k, v in speed.items() if k[2] == "pearl" and k[0] >= 0.7}
    pearl = {k: v for k, v in speed.items() if k[2] == "pearl"}
    alone = statistics.fmean(
        v / max(speed[a, r, "no pre-verify"], speed[a, r, "no post-verify"])
        for (a, r, _), v in pearl.items()
    )

    model = reference_model("pycode-t", "pycode-s")
    assert model.draft_model is not None
    t_target, t_draft = measure_cost(model.target), measure_cost(model.draft_model)(1)
    gamma = max(1, round(t_target(1) / t_draft))
    prompts = pycode.prompts(16 if full else 2, model.tokenizer, 96)
    real: dict[str, float] = {}
    for name, settings in ARMS.items():
        for window in (gamma,) if name != "off" else (1, 2, 4, 6):
            policy = Pearl(model.draft_model, replace(settings, window=window))
            got = answer(model, prompts, policy, max_new_tokens=24, temperature=1.0)
            emitted = sum(map(len, got.tokens))
            rate = emitted * t_target(1) / elapsed(policy.window.rounds, t_draft, t_target)
            real[name] = max(rate, real.get(name, 0.0))

    gates = (
        Gate("smallest chi-square p of the four arms", kept, ">", 1e-4),
        Gate("coupled answers alike, all arms and windows", same, "==", len(texts)),
        Gate("least gain over the best chain, alpha >= 0.7", min(strong.values()), ">=", 1.1),
        Gate("least gain over the best chain, all", min(pearl.values()), ">=", 0.95),
        Gate("both modes over the better one alone, mean", alone, ">=", 1.0),
    )
    direction = (*gates[:2], Gate("mean gain", statistics.fmean(pearl.values()), ">", 1.0))
    return Claim(
        slug="pearl",
        statement="Drafting and verifying side by side is 1.1 times as fast as speculation with "
        "its best draft length where seven of ten draft tokens agree, and keeps the law.",
        paper_figure="up to 1.52x over speculative decoding, 3.79x over plain (Table 2)",
        rows=(
            *(
                Row(
                    f"speed on the clock over the best chain, alpha {a:.2f}, time ratio {r}",
                    "x",
                    1.0,
                    v,
                    1.0,
                    note=f"no pre-verify {speed[a, r, 'no pre-verify']:.3f}, no post-verify "
                    f"{speed[a, r, 'no post-verify']:.3f}",
                )
                for (a, r, _), v in pearl.items()
            ),
            Row(
                "speed on the clock over plain, pycode-t and pycode-s, T = 1",
                "x",
                1.0,
                real["pearl"],
                real["off"],
                note=f"window {gamma}; no pre-verify {real['no pre-verify']:.3f}, no post-verify "
                f"{real['no post-verify']:.3f}; off: the best chain; two devices assumed",
            ),
        ),
        scale=scale,
        device="cpu",
        status=judge(gates, direction),
        notes=("The clock assumes that the two models do not slow each other down.",),
        gates=gates,
        seeds=(0, 7),
    )
