"""Speculative contrastive decoding: the draft model is also the amateur of the contrast.

Paper: Yuan, Lu, Huang, Yuan, Zhou. Speculative Contrastive Decoding. 2023. arXiv:2311.08981
Idea: Verify the amateur's draft against the contrastive law of expert and amateur, whose logits
    are there anyway: the quality of contrastive decoding at the speed of speculative sampling.
Differs: The amateur's logits after a fully accepted draft are computed when they are needed, for
    all rows of a batch at once. Temperature and truncation apply to the contrastive scores, and to
    the amateur's law that drafts. Chains only.
Lossless: no

    amateur ──x ~ q──> draft ──expert──> s_e ──(1 + beta) s_e - beta s_a, plausible set──> p_cd
       └──────────────── s_a ───────────────────^                  accept u q(x) < p_cd(x)

It is exact for its own law: the answers are those of plain contrastive decoding, which is another
law than the expert's.
"""

from __future__ import annotations

import ast
import random
import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from isthmus.claims import Claim, Gate, Row, Ruler, Scale, Status, judge
from isthmus.decoding.acceptance import Coupled
from isthmus.decoding.contrast import Amateur, Contrastive, contrast
from isthmus.decoding.cost import measure_cost
from isthmus.decoding.law import Law
from isthmus.decoding.policy import Fixed
from isthmus.decoding.table import TableTarget
from isthmus.errors import InvalidInputError
from isthmus.roles import Shape, Target
from isthmus.testing.statistics import string_test
from isthmus.workbench import pycode
from isthmus.workbench.bench import answer, reference_model


@dataclass(frozen=True)
class Settings:
    """Settings of speculative contrastive decoding, with the paper's defaults.

    Attributes:
        num_draft_tokens: Draft tokens a round, gamma; 0 is plain contrastive decoding.
        strength: beta of the improved form.
        plausibility: alpha, the share of the expert's best token that a token needs.
        original: The original form ``log p_e - log p_a`` instead.
        contrastive: The mechanism; off, the law is the expert's: speculative sampling.
    """

    num_draft_tokens: int = 4
    strength: float = 0.5
    plausibility: float = 0.1
    original: bool = False
    contrastive: bool = True


class SpeculativeContrastive(Amateur):
    """A draft model that drafts and is contrasted with.

    Args:
        model: The amateur as a target, sharing the target's vocabulary.
        settings: See :class:`Settings`.

    Attributes:
        acceptance: The rule for the contrastive law; None when the mechanism is off.

    Raises:
        InvalidInputError: A setting is out of range.

    Example:
        >>> SpeculativeContrastive(TableTarget(5)).acceptance.lossless
        False
    """

    role: ClassVar[str] = "drafter"
    name = "speculative-contrastive"

    def __init__(self, model: Target, settings: Settings | None = None) -> None:
        chosen = self.settings = settings or Settings()
        if chosen.num_draft_tokens < 0 or chosen.strength < 0 or not 0 <= chosen.plausibility <= 1:
            raise InvalidInputError(
                "num_draft_tokens and strength are 0 or more and plausibility is a share, got "
                f"{chosen.num_draft_tokens}, {chosen.strength} and {chosen.plausibility}"
            )
        super().__init__(model)
        self.acceptance = Contrastive(self, **self.options) if chosen.contrastive else None

    @property
    def options(self) -> dict[str, Any]:
        """How the contrast is formed."""
        chosen = self.settings
        return {
            "strength": chosen.strength,
            "plausibility": chosen.plausibility,
            "original": chosen.original,
        }

    @property
    def default_shape(self) -> Shape:
        """A chain of the chosen length."""
        gamma = self.settings.num_draft_tokens
        return Shape(gamma, gamma, 1)


def walltime_factor(agreement: float, gamma: int, cost: float) -> float:
    """Expected speed-up over plain decoding of the expert (eq. 5).

    Args:
        agreement: lambda, the mean of ``sum min(p_cd, q)``.
        gamma: Draft tokens a round.
        cost: Amateur forward in expert forwards, c.

    Returns:
        ``(1 - lambda^(gamma + 1)) / ((1 - lambda) (1 + c gamma + c lambda^gamma))``.

    Example:
        >>> walltime_factor(0.5, 1, 0.0), round(walltime_factor(0.5, 1, 0.2), 6)
        (1.5, 1.153846)
    """
    tokens = gamma + 1.0 if agreement == 1.0 else (1 - agreement ** (gamma + 1)) / (1 - agreement)
    return tokens / (1.0 + cost * gamma + cost * agreement**gamma)


def line_parses(line: str) -> bool:
    """Whether one line of Python can stand in a program, its block and branches granted.

    Example:
        >>> [line_parses(x) for x in ("    if a:", "else:", "x = (1", "return y", "a b")]
        [True, True, False, True, False]
    """
    text = line.strip()
    if text.endswith(":"):
        text += " pass"
    before = ""
    if text.startswith(("elif", "else")):
        before = "if x: pass\n"
    elif text.startswith(("except", "finally")):
        before = "try: pass\n"
    body = textwrap.indent(f"{before}{text}", "  ")
    try:
        ast.parse(f"async def f():\n for x in y:\n{body}\n")
    except (SyntaxError, ValueError):
        return False
    return True


def quality(texts: Sequence[str]) -> tuple[list[float], list[float]]:
    """Of each answer the share of whole lines that parse, and of repeated words.

    Returns:
        Shares of parsing lines (answers with no whole line are left out), and shares of repeated
        word trigrams.
    """
    valid, repeats = [], []
    for text in texts:
        lines = [x for x in text.split("\n")[1:-1] if x.strip()]
        if lines:
            valid.append(statistics.fmean(line_parses(x) for x in lines))
        words = text.split()
        grams = list(zip(words, words[1:], words[2:], strict=False))
        if grams:
            repeats.append(1.0 - len(set(grams)) / len(grams))
    return valid, repeats


def difference(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """Difference of the means, and its lower bootstrap bound at 95 %."""
    rng = random.Random(0)
    draws = sorted(
        statistics.fmean(rng.choices(ours, k=len(ours)))
        - statistics.fmean(rng.choices(theirs, k=len(theirs)))
        for _ in range(1000)
    )
    return statistics.fmean(ours) - statistics.fmean(theirs), draws[50]


class Pair(TableTarget):
    """An expert whose enumerated law is the contrastive one.

    Args:
        expert: Decodes.
        amateur: Is contrasted with.
        options: Of :func:`~isthmus.decoding.contrast.contrast`.
    """

    def __init__(self, expert: TableTarget, amateur: TableTarget, **options: Any) -> None:
        super().__init__(
            expert.vocab_size,
            seed=expert.seed,
            sharpness=expert.sharpness,
            end_token=expert.end_token,
        )
        self.mixed = _Mixed(expert, amateur, options)

    def truth(self, *args: Any, **kwargs: Any) -> dict[tuple[int, ...], float]:
        """Probability of every answer under the contrastive law."""
        return self.mixed.truth(*args, **kwargs)


class _Mixed(TableTarget):
    def __init__(self, expert: TableTarget, amateur: TableTarget, options: dict[str, Any]) -> None:
        super().__init__(expert.vocab_size, end_token=expert.end_token)
        self.expert, self.amateur, self.options = expert, amateur, options

    def logits(self, state: torch.Tensor) -> torch.Tensor:
        """Contrastive scores; the states of both models are those of the prefix."""
        return contrast(self.expert.logits(state), self.amateur.logits(state), **self.options)


def claim(ruler: Ruler, scale: Scale = "small") -> Claim:
    """Measure law, speed and quality with expert ``pycode-t`` and amateur ``pycode-xs``.

    Arms: the expert by speculative sampling (off), and the contrastive law; plain contrastive
    decoding for the comparison of answers.

    Args:
        ruler: The clock.
        scale: ``"small"`` is 192 answers of 40 tokens at temperature 0.7, ``"test"`` 6 of 10.
    """
    full = scale != "test"
    count, tokens, draws = (192, 40, 6000) if full else (6, 10, 800)
    expert, weak = TableTarget(5, seed=1, sharpness=1.2), TableTarget(5, seed=2)

    def law_test(settings: Settings) -> float:
        drafter = SpeculativeContrastive(weak, settings)
        return string_test(
            Fixed(drafter, drafter.default_shape),
            target=Pair(expert, weak, **SpeculativeContrastive(weak).options),
            law=Law(temperature=0.8),
            acceptance=drafter.acceptance,
            rows=draws,
        ).p

    kept, off_law = law_test(Settings()), law_test(Settings(contrastive=False))
    model = reference_model("pycode-t", "pycode-xs")
    assert model.draft_model is not None
    small = model.draft_model
    prompts = pycode.prompts(count, model.tokenizer, 64)

    def run(settings: Settings) -> Any:
        drafter = SpeculativeContrastive(small, settings)
        return answer(
            model,
            prompts,
            Fixed(drafter, drafter.default_shape),
            max_new_tokens=tokens,
            acceptance=drafter.acceptance,
            temperature=0.7,
            batch=16,
        )

    ours, off = run(Settings()), run(Settings(contrastive=False))

    def coupled(gamma: int) -> list[list[int]]:
        drafter = SpeculativeContrastive(small, Settings(num_draft_tokens=gamma))
        rule = Contrastive(drafter, Coupled(7), **drafter.options)
        few = prompts[: max(2, count // 24)]
        return answer(
            model,
            few,
            Fixed(drafter, drafter.default_shape),
            max_new_tokens=tokens,
            acceptance=rule,
            temperature=0.7,
        ).tokens

    plain, drafted = coupled(0), coupled(4)
    same = sum(a == b for a, b in zip(plain, drafted, strict=True))

    def texts(got: Any) -> list[str]:
        return [model.tokenizer.decode(t) for t in got.tokens]

    (valid, again), (valid_off, again_off) = quality(texts(ours)), quality(texts(off))
    better, better_low = difference(valid, valid_off)
    fewer, fewer_low = difference([-x for x in again], [-x for x in again_off])

    some = list(zip(prompts, off.tokens, strict=True))[: max(2, count // 6)]
    both = []
    for prompt, new in some:
        ids = torch.tensor([[*prompt, *new]])
        both.append([m.forward(ids).logits[0, -tokens:].double() for m in (model.target, small)])
    s_e = torch.cat([e for e, _ in both])
    s_a = torch.cat([a for _, a in both])[:, : s_e.shape[1]]
    q = torch.softmax(s_a / 0.7, -1)

    def law(strength: float) -> torch.Tensor:
        return torch.softmax(contrast(s_e, s_a, strength=strength) / 0.7, -1)

    curve = {b: float(torch.minimum(law(b), q).sum(-1).mean()) for b in (0.0, 0.25, 0.5, 1.0)}
    away = 1.0 - float(torch.minimum(law(0.5), torch.softmax(s_e / 0.7, -1)).sum(-1).mean())
    cost = measure_cost(small)(1) / measure_cost(model.target)(1)
    tau, tau_off = ours.acceptance_length(), off.acceptance_length()
    shown = ", ".join(f"{b:g}: {x:.3f}" for b, x in curve.items())
    gates = (
        Gate("chi-square p against the enumerated contrastive law", kept, ">", 1e-4),
        Gate("chi-square p with the mechanism off: another law", off_law, "<", 1e-4),
        Gate("coupled answers equal to plain contrastive decoding", same, "==", len(plain)),
        Gate("acceptance length over speculative sampling's", tau / tau_off, ">=", 0.8),
        Gate("more lines parse than the expert's, lower bound", better_low, ">", 0.0),
        Gate("fewer repeats than the expert's, lower bound", fewer_low, ">", 0.0),
    )
    direction = (
        *gates[:3],
        Gate("acceptance length over plain contrastive decoding", tau, ">", 1.0),
        Gate("more lines parse", better, ">", 0.0),
    )
    status = judge(gates, direction)
    return Claim(
        slug="speculative-contrastive",
        statement="Drafting with the amateur gives exactly the answers of contrastive decoding at "
        "nearly the acceptance length of speculative sampling, and better text than the expert's.",
        paper_figure="quality of contrastive decoding at 1.9x to 2.9x with Llama 2 70B/7B (Tab. 2)",
        rows=(
            Row("acceptance length, T = 0.7", "tokens/forward", 1.0, tau, tau_off),
            Row(
                "lambda: mean of sum min(p_cd, q)",
                "",
                None,
                curve[0.5],
                curve[0.0],
                note=f"by strength {shown}; eq. 5 forecasts "
                f"{walltime_factor(curve[0.5], 4, cost):.2f}x with c = {cost:.2f}",
            ),
            Row(
                "share of lines that parse",
                "",
                statistics.fmean(valid_off),
                statistics.fmean(valid),
                statistics.fmean(valid_off),
                note=f"difference {better:+.4f}, lower bound {better_low:+.4f}; off: the expert",
            ),
            Row(
                "share of repeated word trigrams",
                "",
                statistics.fmean(again_off),
                statistics.fmean(again),
                statistics.fmean(again_off),
                note=f"difference {-fewer:+.4f}; lower is better",
            ),
            Row("total variation from the expert's law", "", 0.0, away, 0.0),
            Row("chi-square p, contrastive law", "", None, kept, off_law),
        ),
        scale=scale,
        device="cpu",
        status=status,
        reason=""
        if status == Status.REPRODUCED
        else "law and speed come out; the gain in quality is that of large models and is measured "
        "on short answers of a small one here",
        gates=gates,
        seeds=(0, 7),
    )
