"""Decoding methods: one bench for all of them, and a guide to which one a task wants.

Paper: Shi, Yang, Cai, Zhang, Wang, Yang, Lam. A Thorough Examination of Decoding Methods in the
    Era of LLMs. 2024. arXiv:2402.06925
Idea: Run every deterministic and stochastic method on the same tasks, at its best and at one fixed
    setting, with its speed; tasks that can be checked want the former, open text does not want
    greedy.
Differs: Two tasks with small models trained here (dates to ISO form, Python continued) instead of
    twelve with Llama-2; aligned and quantised models are left out, so that the finding that
    alignment narrows the gaps is not tested. Beams that sample are not among the methods.
    Quality of open text is repetition, diversity and n-gram divergence from what people wrote,
    instead of MAUVE and judges.

    strategies x settings ──model──> answers ──score──> best, fixed, spread, speed ──> advice
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from isthmus.claims import Claim, Gate, Ratio, Row, Ruler, Scale, judge, ratio
from isthmus.decoding.model import Model
from isthmus.decoding.strategies import STRATEGIES, Strategy, describe, make
from isthmus.metrics.repetition import distinct, divergence, repetition
from isthmus.workbench import dates, pycode
from isthmus.workbench.bench import reference_model

Answers = list[list[int]]
Score = Callable[[Answers], float]

GRIDS: dict[str, tuple[dict[str, Any], ...]] = {
    "greedy": ({},),
    "sample": ({}, {"temperature": 0.7}, {"temperature": 0.4}),
    "top-p": ({}, {"top_p": 0.9}, {"top_p": 0.8}),
    "top-k": ({}, {"top_k": 20}, {"top_k": 5}),
    "typical": ({}, {"typical": 0.9}, {"typical": 0.2}),
    "eta": ({}, {"eta": 0.004}, {"eta": 0.0009}),
    "mirostat": ({}, {"tau": 2.5}, {"tau": 4.0}),
    "beam": ({}, {"beams": 2}),
    "diverse-beam": ({}, {"groups": 4}),
    "contrastive-search": ({}, {"alpha": 0.4}, {"alpha": 0.2}),
    "contrastive-decoding": ({}, {"beta": 0.3}, {"beta": 1.0}),
    "dola": ({}, {"layers": "low"}),
    "fsd": ({}, {"alpha": 0.4}, {"alpha": 0.2}),
    "fsd-vec": ({}, {"alpha": 0.6}, {"alpha": 0.2}),
}
"""Settings of each method that are tried; the first is the fixed one, the study's default."""

OFF: dict[str, dict[str, Any]] = {
    "top-p": {"top_p": 1e-6},
    "contrastive-search": {"alpha": 0.0},
    "contrastive-decoding": {"beta": 0.0},
    "fsd": {"alpha": 0.0},
    "fsd-vec": {"alpha": 0.0},
    "beam": {"beams": 1},
    "sample": {"top_k": 1},
}
"""Settings at which a method is greedy decoding."""


@dataclass(frozen=True)
class Settings:
    """Settings.

    Attributes:
        methods: Methods that are compared.
        steer: Off, methods are run where they do nothing, and all of them are greedy.
    """

    methods: tuple[str, ...] = tuple(GRIDS)
    steer: bool = True


@dataclass(frozen=True)
class Finding:
    """What one method did on one task.

    Attributes:
        method: Its name.
        fixed: Score at the fixed setting.
        best: Best score over the grid.
        best_setting: Where that was.
        spread: Largest less smallest score over the grid, over their mean: how much tuning matters.
        answers: New tokens of every prompt at the fixed setting.
    """

    method: str
    fixed: float
    best: float
    best_setting: str
    spread: float
    answers: Answers

    @property
    def deterministic(self) -> bool:
        """Whether nothing is drawn."""
        return not (issubclass(kind := STRATEGIES[self.method], Drawn) or kind is Mirostat)


Drawn, Mirostat = STRATEGIES["sample"], STRATEGIES["mirostat"]


class DecodingMethods:
    """Compares decoding methods on a model and a task, and says which one to use.

    Args:
        settings: See :class:`Settings`.

    Example:
        >>> some = [Finding("greedy", 0.9, 0.9, "", 0.0, []), Finding("top-p", 0.8, 0.8, "", 0, [])]
        >>> DecodingMethods().advise("closed", some)
        'greedy'
    """

    role: ClassVar[str] = "study"

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()

    def strategy(self, method: str, **settings: Any) -> Strategy:
        """The method as it is run: with its idea switched off, where the settings say so."""
        off = {} if self.settings.steer else OFF.get(method, {})
        return make(method, {**settings, **off})

    def answers(
        self,
        model: Model,
        prompts: Sequence[Any],
        strategy: Strategy,
        *,
        max_new_tokens: int,
        batch: int = 8,
        open_ended: bool = True,
        seed: int = 0,
    ) -> Answers:
        """New tokens of every prompt; open-ended texts go on after end tokens."""
        out: Answers = []
        for first in range(0, len(prompts), batch):
            found = model.generate(
                list(prompts[first : first + batch]),
                max_new_tokens=max_new_tokens,
                drafter="none",
                ignore_end=open_ended,
                seed=seed + first,
                strategy=strategy,
            )
            out += [result.tokens for result in found]
        return out

    def compare(
        self,
        model: Model,
        prompts: Sequence[Any],
        score: Score,
        *,
        grids: Mapping[str, Sequence[Mapping[str, Any]]] = GRIDS,
        **options: Any,
    ) -> list[Finding]:
        """Run every method over its grid; contrastive decoding only with a draft model.

        Args:
            model: The model.
            prompts: Texts or token ids.
            score: Larger is better.
            grids: Settings of each method, the fixed one first.
            options: As for :meth:`answers`.
        """
        out = []
        for method in self.settings.methods:
            if method not in grids or (
                method == "contrastive-decoding" and model.draft_model is None
            ):
                continue
            tried = []
            for setting in grids[method]:
                answers = self.answers(model, prompts, self.strategy(method, **setting), **options)
                tried.append((score(answers), setting, answers))
            scores = [s for s, _, _ in tried]
            mean = sum(scores) / len(scores)
            best = max(tried, key=lambda t: t[0])
            named = " ".join(f"{k}={describe(v)}" for k, v in best[1].items()) or "default"
            spread = (max(scores) - min(scores)) / abs(mean) if mean else 0.0
            out.append(Finding(method, scores[0], best[0], named, spread, tried[0][2]))
        return out

    def advise(self, task: Literal["closed", "open"], findings: Sequence[Finding]) -> str:
        """The method to use: for a closed task the best deterministic one, else the best of all.

        Fixed settings decide: who has to tune does not have the number in advance. Among equals the
        first, so that beams have to earn their time.
        """
        pool = [f for f in findings if task == "open" or f.deterministic]
        return max(pool, key=lambda f: f.fixed).method


def solved(model: Model, asked: Sequence[dates.Example]) -> Score:
    """Share of the dates that are written right."""

    def score(answers: Answers) -> float:
        texts = model.tokenizer.batch_decode(answers, skip_special_tokens=True)
        right = (dates.check(each, text) for each, text in zip(asked, texts, strict=True))
        return sum(right) / len(asked)

    return score


def continued(model: Model, count: int, tokens: int) -> tuple[list[torch.Tensor], Answers]:
    """Prompts of held-out Python and how people went on."""
    head = 64
    texts = pycode.prompts(count, model.tokenizer, head + tokens)
    return [torch.tensor(text[:head]) for text in texts], [text[head:] for text in texts]


def over(part: float, whole: float) -> float | None:
    """A ratio; None, which passes no gate, where there is nothing to compare with."""
    return part / whole if whole else None


TIMED = ("greedy", "contrastive-search", "contrastive-decoding", "beam")
"""Methods that are timed."""


def claim(ruler: Ruler, scale: Scale = "small") -> Claim:
    """Compare all methods on dates (closed) and on continuing Python (open), and time some.

    Args:
        ruler: The clock.
        scale: ``"small"`` is 400 dates and 16 texts of 128 tokens; ``"test"`` is far smaller.
    """
    writer, coder = reference_model("dates-s"), reference_model("pycode-t", "pycode-s")
    return examine(DecodingMethods(), writer, coder, ruler, scale)


def examine(
    study: DecodingMethods, writer: Model, coder: Model, ruler: Ruler, scale: Scale
) -> Claim:
    """The claim's measurements on two models.

    Args:
        study: Which methods, on or off.
        writer: Writes dates in ISO form.
        coder: Continues Python; its draft model is the amateur.
        ruler: The clock.
        scale: As for :func:`claim`.
    """
    small = scale != "test"
    off = DecodingMethods(Settings(study.settings.methods, steer=False))
    asked = dates.examples(400 if small else 12, "held-out")
    sources = [each.source for each in asked]
    right = solved(writer, asked)
    closed = {
        f.method: f
        for f in study.compare(
            writer,
            sources,
            right,
            grids={
                m: GRIDS[m] for m in ("greedy", "beam", "diverse-beam", "sample", "top-p", "fsd")
            },
            max_new_tokens=16,
            batch=100,
            open_ended=False,
        )
    }

    count, tokens = (16, 128) if small else (2, 48)
    prompts, people = continued(coder, count, tokens)

    def near(answers: Answers) -> float:
        return 1.0 - divergence(answers, people, 2)

    options: dict[str, Any] = {"max_new_tokens": tokens, "batch": 16}
    grids = {m: grid if small else grid[:1] for m, grid in GRIDS.items()}
    opened = {f.method: f for f in study.compare(coder, prompts, near, grids=grids, **options)}
    still = {
        method: repetition(off.answers(coder, prompts, off.strategy(method), **options))
        for method in ("fsd", "contrastive-search", "top-p")
    }

    def timed(method: str) -> Callable[[], Any]:
        few, strategy = prompts[:8], study.strategy(method)
        new = tokens // 2 if small else 4
        return lambda: study.answers(coder, few, strategy, max_new_tokens=new)

    clocks = ruler.compare({m: timed(m) for m in TIMED}, repeats=3 if small else 1)
    cost: dict[str, Ratio] = {m: ratio(clocks[m], clocks["greedy"]) for m in TIMED}

    human, rep = repetition(people), {m: repetition(f.answers) for m, f in opened.items()}
    left = {m: over(rep[m], rep["greedy"]) for m in still}
    sure = max(closed["greedy"].fixed, closed["beam"].fixed)
    gates = (
        Gate("dates, greedy", closed["greedy"].fixed, ">=", 0.85),
        Gate("dates, greedy, upper", closed["greedy"].fixed, "<=", 0.95),
        Gate(
            "points of greedy or beam over sampling", 100 * (sure - closed["sample"].fixed), ">=", 3
        ),
        Gate("rep-4, greedy over people", over(rep["greedy"], human), ">=", 2.0),
        *(Gate(f"rep-4, {m} over greedy", left[m], "<=", 0.5) for m in still),
        *(Gate(f"time, {m} over greedy", cost[m].median, ">", 1.0) for m in TIMED[1:]),
    )
    direction = (
        Gate("greedy or beam over sampling", sure - closed["sample"].fixed, ">", 0.0),
        Gate("rep-4, greedy over people", over(rep["greedy"], human), ">", 1.0),
        *(Gate(f"rep-4, {m} over greedy", left[m], "<", 1.0) for m in still),
    )
    rows = [
        *(
            Row(
                f"dates right, {m}",
                "share",
                closed["greedy"].fixed,
                f.fixed,
                None,
                note=f"best {f.best:.3f} at {f.best_setting}, spread {f.spread:.2f}",
            )
            for m, f in closed.items()
        ),
        *(
            Row(
                f"rep-4 of continued Python, {m}",
                "share",
                rep["greedy"],
                rep[m],
                still.get(m),
                control=human,
                note=f"control: people; distinct-2 {distinct(f.answers):.2f}, bigram divergence "
                f"{1 - f.fixed:.3f}, best {1 - f.best:.3f} at {f.best_setting}, spread "
                f"{f.spread:.2f}",
            )
            for m, f in opened.items()
        ),
        *(
            Row(f"time, {m}", "x", 1.0, cost[m].median, None, note=f"{cost[m]}, batch of 8")
            for m in TIMED[1:]
        ),
    ]
    return Claim(
        slug="decoding-methods",
        statement="Which method is best depends on the task: what can be checked wants greedy or "
        "beams, open text wants FSD, contrastive search or truncated sampling; methods that look "
        "twice are slower.",
        paper_figure="deterministic methods win on closed tasks, FSD and sampling on open ones; "
        "contrastive search, contrastive decoding and beams are slower than greedy (Tables 2 to 5)",
        rows=tuple(rows),
        scale=scale,
        device="cpu",
        status=judge(gates, direction),
        notes=(
            f"Advice: {study.advise('closed', list(closed.values()))} for dates, "
            f"{study.advise('open', list(opened.values()))} for Python.",
            f"distinct-2 of people {distinct(people):.2f}.",
            "Off runs a method at the setting where it is greedy decoding.",
        ),
        gates=gates,
        seeds=(0,),
    )
