"""Likelihood and utility: how far a model's own preferences agree with a task, and what follows.

Paper: M. Josifoski, M. Peyrard, F. Rajic, J. Wei, D. Paul, V. Hartmann, B. Patra, V. Chaudhary,
    E. Kiciman, B. Faltings, R. West, "Language Model Decoding as Likelihood-Utility Alignment",
    2023, arXiv:2210.07228
Idea: A decoder is a bet on how well likelihood agrees with utility. Measure the agreement over
    candidates of each input first; search by likelihood where it is high, be guided by a value
    function where likelihood says nothing.
Differs: Two tasks with small models trained here (dates to ISO form, Python continued with as many
    comments as possible) instead of six. The value function is a measure of the text so far; its
    noise is uniform on 0 to 1, drawn once for every prefix.

    candidates ──> Kendall's tau of log-probability and utility, within each input ──> advice
    beam, ranked by (1 - a) logprob / length + a log V(prefix)
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from isthmus.claims import Claim, Gate, Row, Ruler, Scale, judge
from isthmus.decoding.beam import BeamSearch, Candidates, StochasticBeam
from isthmus.decoding.model import Model
from isthmus.decoding.search import search
from isthmus.errors import InvalidInputError
from isthmus.roles import Hypothesis
from isthmus.workbench import dates, pycode
from isthmus.workbench.bench import reference_model

Value = Callable[[Sequence[int]], float]
"""From the tokens of an answer, or of its beginning, to its value, 0 to 1."""

FLOOR = 1e-3
"""Values below this count as this: their logarithm has to be finite."""


@dataclass(frozen=True)
class Settings:
    """Settings of the study.

    Attributes:
        width: Beams of the searches.
        share: a, the say of the value in a guided beam; 0 switches the idea off, because the beam
            then goes by likelihood alone.
        aligned: Median tau from which likelihood is worth searching by.
    """

    width: int = 5
    share: float = 0.75
    aligned: float = 0.2


class ValueRanker:
    """Ranks continuations by ``(1 - a) logprob / length + a log V``; see the paper's section 4.

    Args:
        value: V.
        share: a.

    Example:
        >>> ranker = ValueRanker(lambda tokens: 0.5 if tokens[-1] == 7 else 1.0, share=0.5)
        >>> none, two = torch.zeros(1, 1, 0, dtype=torch.long), torch.tensor([[-1.0, -1.5]])
        >>> scores = ranker(Candidates(none, torch.tensor([[0, 0]]), torch.tensor([[7, 8]]), two))
        >>> [round(s, 3) for s in scores[0].tolist()]  # 0.5 (-1) + 0.5 ln 0.5, 0.5 (-1.5)
        [-0.847, -0.75]
    """

    def __init__(self, value: Value, share: float) -> None:
        self.value, self.share = value, share

    def __call__(self, candidates: Candidates) -> torch.Tensor:
        """Scores [B, K]."""
        likely = candidates.logprob / candidates.length
        if not self.share:
            return likely
        rows = candidates.tokens().tolist()
        values = [[math.log(max(FLOOR, self.value(tokens))) for tokens in row] for row in rows]
        return (1 - self.share) * likely + self.share * likely.new_tensor(values)

    def follow(self, parent: torch.Tensor, token: torch.Tensor) -> None:
        """Nothing is kept."""


def noisy(value: Value, noise: float) -> Value:
    """``(1 - e) V + e u``, with u uniform and always the same for one text."""

    def degraded(tokens: Sequence[int]) -> float:
        digest = hashlib.blake2b(repr(list(tokens)).encode(), digest_size=8).digest()
        return (1 - noise) * value(tokens) + noise * int.from_bytes(digest, "big") / 2**64

    return degraded


@dataclass(frozen=True)
class Alignment:
    """How likelihood and utility go together.

    Attributes:
        taus: Kendall's tau of every input whose candidates differ in utility.
        by_length: The same with log-probability over length.
        left_out: Inputs whose candidates are all as good.
    """

    taus: tuple[float, ...]
    by_length: tuple[float, ...]
    left_out: int

    @property
    def median(self) -> float:
        """Median tau; 0 where there is none."""
        return statistics.median(self.taus) if self.taus else 0.0


def kendall(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Kendall's tau-b; None where either side is constant.

    Example:
        >>> kendall([1, 2, 3], [1, 3, 2]), kendall([1, 2], [5, 5])
        (0.3333333333333333, None)
    """
    x, y = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    dx, dy = (v[:, None] - v for v in (x, y))
    signs = torch.triu(dx.sign() * dy.sign(), 1).sum()
    untied = [torch.triu(d != 0, 1).sum().double() for d in (dx, dy)]
    scale = (untied[0] * untied[1]).sqrt()
    return None if not scale else float(signs / scale)


class LikelihoodUtility:
    """The study on one model.

    Args:
        model: The model.
        settings: See :class:`Settings`.

    Raises:
        InvalidInputError: A share outside 0 to 1, or a width below 1.
    """

    role: ClassVar[str] = "study"

    def __init__(self, model: Any = None, settings: Settings | None = None) -> None:
        self.model, self.settings = model, settings or Settings()
        if not 0 <= self.settings.share <= 1 or self.settings.width < 1:
            raise InvalidInputError(
                f"share must be within 0 and 1 and width at least 1, got {self.settings}"
            )

    def beam(
        self, prompts: Sequence[Any], new: int, value: Value | None = None
    ) -> list[list[Hypothesis]]:
        """Beams of several prompts, ranked by likelihood or guided by a value, best first."""
        ranker = ValueRanker(value or (lambda tokens: 1.0), self.settings.share if value else 0.0)
        return self._search(prompts, BeamSearch(self.settings.width, ranker=ranker), new)

    def candidates(self, prompts: Sequence[Any], new: int) -> list[list[Hypothesis]]:
        """Answers that span the range of likelihood: a beam, and draws without replacement."""
        width = self.settings.width
        found = [
            self._search(prompts, kind, new)
            for kind in (BeamSearch(width), StochasticBeam(2 * width))
        ]
        return [
            list({h.tokens: h for some in row for h in some}.values())
            for row in zip(*found, strict=True)
        ]

    def _search(self, prompts: Sequence[Any], kind: Any, new: int) -> list[list[Hypothesis]]:
        starts, inputs = self.model._sources(list(prompts), None)
        return search(
            self.model.target,
            starts,
            kind,
            max_new_tokens=new,
            end_tokens=self.model._ends(False),
            inputs=inputs,
            generator=torch.Generator().manual_seed(0),
        )

    @staticmethod
    def measure(rows: Sequence[Sequence[Hypothesis]], utility: Sequence[Value]) -> Alignment:
        """Kendall's tau within each input.

        Args:
            rows: Candidates of every input.
            utility: What each input's answers are worth.
        """
        taus, normed = [], []
        for row, value in zip(rows, utility, strict=True):
            worth = [value(h.tokens) for h in row]
            tau = kendall([h.logprob for h in row], worth)
            long = kendall([h.logprob / max(1, len(h.tokens)) for h in row], worth)
            if tau is not None and long is not None:
                taus.append(tau)
                normed.append(long)
        return Alignment(tuple(taus), tuple(normed), len(rows) - len(taus))

    def advise(
        self, found: Alignment, has_value: bool
    ) -> Literal["beam", "value-guided beam", "sample"]:
        """What to decode with."""
        if found.median >= self.settings.aligned:
            return "beam"
        return "value-guided beam" if has_value else "sample"


def digits(example: dates.Example, model: Model) -> Value:
    """Share of the ten characters of a date that are right."""

    def value(tokens: Sequence[int]) -> float:
        text = str(model.tokenizer.decode(list(tokens), skip_special_tokens=True)).strip()
        same = sum(a == b for a, b in zip(text, example.target, strict=False))
        return same / max(len(text), len(example.target))

    return value


def comments(model: Model) -> Value:
    """Share of a text that stands in comments: behind a #, up to the end of its line."""

    def value(tokens: Sequence[int]) -> float:
        text = str(model.tokenizer.decode(list(tokens), skip_special_tokens=True))
        inside = sum(len(line) - line.find("#") for line in text.split("\n") if "#" in line)
        return inside / max(1, len(text))

    return value


def promise(model: Model) -> Value:
    """Value of a beginning of such a text: half what it holds, half whether it is in one now."""
    share = comments(model)

    def value(tokens: Sequence[int]) -> float:
        text = str(model.tokenizer.decode(list(tokens), skip_special_tokens=True))
        return 0.5 * share(tokens) + 0.5 * ("#" in text.rpartition("\n")[2])

    return value


def _mean(rows: Sequence[Sequence[Hypothesis]], utility: Sequence[Value]) -> float:
    return statistics.fmean(u(row[0].tokens) for row, u in zip(rows, utility, strict=True))


def claim(ruler: Ruler, scale: Scale = "small") -> Claim:
    """Agreement on two tasks, and what searching by likelihood or by a value gives on each."""
    small = scale != "test"
    writer, coder = reference_model("dates-s"), reference_model("pycode-t")
    return examine(writer, coder, scale, dates_count=200 if small else 8, texts=48 if small else 4)


def examine(writer: Model, coder: Model, scale: Scale, *, dates_count: int, texts: int) -> Claim:
    """The claim's measurements on two models.

    Args:
        writer: Writes dates in ISO form.
        coder: Continues Python.
        scale: As for :func:`claim`.
        dates_count: Dates.
        texts: Texts to continue.
    """
    asked = dates.examples(dates_count, "held-out")
    sources, right = [each.source for each in asked], [digits(each, writer) for each in asked]
    study = LikelihoodUtility(writer)
    closed = study.measure(study.candidates(sources, 12), right)
    searched = _mean(study.beam(sources, 12), right)
    drawn = writer.generate(sources, max_new_tokens=12, temperature=1.0, drafter="none", seed=1)
    sampled = statistics.fmean(u(g.tokens) for u, g in zip(right, drawn, strict=True))

    new = 24
    prompts = [torch.tensor(p) for p in pycode.prompts(texts, coder.tokenizer, 48)]
    worth = [comments(coder)] * len(prompts)
    study = LikelihoodUtility(coder)
    opened = study.measure(study.candidates(prompts, new), worth)
    likely = _mean(study.beam(prompts, new), worth)
    guided = {
        noise: _mean(study.beam(prompts, new, noisy(promise(coder), noise)), worth)
        for noise in (0.0, 0.25, 0.5, 1.0)
    }
    off = LikelihoodUtility(coder, Settings(share=0.0))
    unguided = _mean(off.beam(prompts, new, promise(coder)), worth)
    falling = [guided[noise] for noise in sorted(guided)]
    gain = (guided[0.0] - likely) / max(likely, 1e-9)
    gates = (
        Gate("median tau, dates", closed.median, ">=", 0.3),
        Gate("median tau, comments, size", abs(opened.median), "<=", 0.1),
        Gate("dates: beam less sampling", searched - sampled, ">=", 0),
        Gate("comments: gain of the guided beam over the beam", gain, ">=", 0.3),
        Gate(
            "the gain falls with the noise",
            float(falling == sorted(falling, reverse=True)),
            "==",
            1,
        ),
        Gate("idea off: gain over the beam", unguided - likely, "<=", 1e-9),
    )
    direction = (
        Gate("median tau, dates over comments", closed.median - opened.median, ">", 0),
        Gate("comments: gain of the guided beam over the beam", gain, ">", 0),
    )
    told = ", ".join(f"{noise:g}: {value:.3f}" for noise, value in guided.items())
    advice = [
        study.advise(found, has_value) for found, has_value in ((closed, False), (opened, True))
    ]
    return Claim(
        slug="likelihood-utility",
        statement="Where likelihood agrees with utility a beam is the better bet; where it says "
        "nothing, a value function guides the same beam to more utility.",
        paper_figure="likelihood search is best where the correlation is high (information "
        "extraction, translation), value guidance where it is near zero (toxicity, proteins)",
        rows=(
            Row(
                "median tau of likelihood and utility",
                "",
                opened.median,
                closed.median,
                None,
                note="baseline: comments; ours: dates",
            ),
            Row(
                "dates, characters right, beam",
                "",
                sampled,
                searched,
                None,
                note="baseline: sampling",
            ),
            Row(
                "comments, share of the text, guided beam",
                "",
                likely,
                guided[0.0],
                unguided,
                control=guided[1.0],
                note="baseline: beam; control: value is noise",
            ),
        ),
        scale=scale,
        device="cpu",
        status=judge(gates, direction),
        gates=gates,
        reason="Comments are unlikely under this model, not unrelated to likelihood; and a beam "
        "that looks at twice its width sees few of them, so that some noise in the value, which "
        "makes it look elsewhere, helps rather than harms.",
        seeds=(0, 1),
        notes=(
            f"Comments by noise of the value: {told}.",
            f"Left out, because all candidates are as good: {closed.left_out} of {len(asked)} "
            f"dates, {opened.left_out} of {len(prompts)} texts.",
            f"With log-probability over length the medians are "
            f"{statistics.median(closed.by_length or (0,)):.2f} and "
            f"{statistics.median(opened.by_length or (0,)):.2f}.",
            f"Advised: {advice[0]} for dates, {advice[1]} for comments.",
            "Beam and guided beam take as many forwards; the value is a count over the text.",
        ),
    )
