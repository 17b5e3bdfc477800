"""A closer look at speculative decoding: which method fits this deployment?

Paper: Ryu, Kim. Closer Look at Efficient Inference Methods: A Survey of Speculative Decoding. 2024.
    arXiv:2411.13157
Idea: Methods are draft-centric (how tokens are proposed and selected) or model-centric (what model
    drafts), and which of them pays depends on the deployment: on what a forward costs, how well
    the drafter agrees, how much the text copies, and what must stay exact.
Differs: The paper sorts methods and gives no procedure; here its questions are answered by a
    probe, methods are replayed on the target's own text, and the best one is named with the
    numbers that decided.
Lossless: yes

    probe ──> costs, texts ──replay──> tau of each method ──> exclusions ──> ranked advice
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from isthmus.claims import Claim, Gate, Row, Ruler, Scale, judge
from isthmus.decoding.cost import Cost
from isthmus.decoding.drafters import PromptLookup
from isthmus.decoding.model import Model
from isthmus.decoding.policy import GAIN, Fixed
from isthmus.errors import InvalidInputError, UnknownNameError
from isthmus.roles import Policy, Shape
from isthmus.workbench import tasks
from isthmus.workbench.bench import reference_model
from isthmus.workbench.replay import copy_rate, entropy, record, replay
from isthmus.workbench.survey import measure_batch, survey


@dataclass(frozen=True)
class Method:
    """One line of the taxonomy.

    Attributes:
        path: Where the survey puts it.
        model: It needs a draft model.
        text: It needs a tokenizer and a corpus.
        tree: It drafts trees.
        lossless: The output keeps its law.
        nodes: Draft nodes of its ready configuration.
        published: The paper's own speed-up, which decides nothing.
    """

    path: str
    model: bool = False
    text: bool = False
    tree: bool = False
    lossless: bool = True
    nodes: int = 8
    published: float = 1.0


METHODS: dict[str, Method] = {
    "prompt-lookup": Method("draft-centric / search / prompt n-grams", nodes=6, published=1.5),
    "token-recycling": Method(
        "draft-centric / tree / recycled candidates", tree=True, nodes=16, published=2.0
    ),
    "aded": Method("draft-centric / trigrams", text=True, tree=True, nodes=24, published=1.9),
    "speculative-sampling": Method(
        "model-centric / independent draft model", model=True, nodes=4, published=2.6
    ),
}
"""What is advised on, by slug."""


@dataclass(frozen=True)
class Trial:
    """How one method did in the replay.

    Attributes:
        tau: Tokens per target forward.
        nodes: Nodes scored in a round, the root included, mean.
        draft_s: Seconds of drafting in a round of one row.
    """

    tau: float
    nodes: float
    draft_s: float


@dataclass(frozen=True)
class Probe:
    """What was measured about a deployment.

    Attributes:
        cost: Seconds of a target forward by nodes of each row, at the batch size asked for.
        batch: Rows decoded together.
        trials: Replays by method.
        reach: What the target scores in one forward: ``"tree"``, ``"chain"`` or ``"step"``.
        draft_growth: Time of a draft-model forward at this batch size over that at one row.
        copy_rate: Share of written tokens that follow a trigram as they did before.
        entropy: Mean entropy of the target's law in nats.
        vocabularies_match: The draft model has the target's tokens; None without a draft model.
        tokenizer: There is a tokenizer.
    """

    cost: Cost
    batch: int
    trials: Mapping[str, Trial]
    reach: str = "tree"
    draft_growth: float = 1.0
    copy_rate: float = 0.0
    entropy: float = 0.0
    vocabularies_match: bool | None = None
    tokenizer: bool = True

    def speedup(self, name: str, trial: Trial) -> float:
        """Tokens per second over plain decoding's, for a method with these counts."""
        grows = self.draft_growth if METHODS[name].model else self.batch
        seconds = self.cost(trial.nodes) + trial.draft_s * grows
        return trial.tau * self.cost(1) / seconds


@dataclass(frozen=True)
class Advice:
    """A ranked answer.

    Attributes:
        choice: The drafter to use; ``"none"`` says: do not speculate.
        ranked: Predicted speed-up of each method that can work, best first.
        excluded: Why a method cannot.
        options: What to pass to ``generate``.
        reasons: The numbers that decided.
    """

    choice: str
    ranked: dict[str, float]
    excluded: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class Settings:
    """Settings of the guide.

    Attributes:
        exact: The output must keep its law.
        gain: Predicted speed-up below which plain decoding is advised.
        tokens: Tokens written of each probe prompt.
        temperature: The deployment's temperature.
        seed: Seed of the coupled draws.
        measure: The mechanism; off, published speed-ups decide.
    """

    exact: bool = True
    gain: float = GAIN
    tokens: int = 16
    temperature: float = 0.0
    seed: int = 0
    measure: bool = True


class SpeculativeSurveyCloser:
    """A decision guide that measures before it advises.

    Args:
        settings: See :class:`Settings`.

    Raises:
        InvalidInputError: A setting is out of range.
    """

    role: ClassVar[str] = "study"

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        if self.settings.tokens < 1 or self.settings.gain < 1.0:
            raise InvalidInputError("tokens and gain must be at least 1")

    def policies(self, model: Model) -> dict[str, Policy]:
        """The ready configuration of every method that this model can be tried with."""
        out: dict[str, Policy] = {}
        for name, method in METHODS.items():
            if (method.model and model.draft_model is None) or (
                method.text and model.tokenizer is None
            ):
                continue
            made: Any = model.policy(name)
            width = 12 if method.tree else 1
            drafter = PromptLookup() if name == "prompt-lookup" else made.drafter
            out[name] = Fixed(drafter, Shape(method.nodes, method.nodes, width))
        return out

    def probe(
        self,
        model: Model,
        prompts: Sequence[Sequence[int]],
        *,
        batch: int = 1,
        policies: Mapping[str, Policy] | None = None,
        costs: tuple[Cost, float] | None = None,
    ) -> Probe:
        """Measure a deployment on prompts of its own kind.

        Args:
            model: The model, with a draft model if one could be used.
            prompts: Token ids.
            batch: Rows that will be decoded together.
            policies: Methods to try; :meth:`policies` when None.
            costs: Forward times and growth of the draft model, measured before.
        """
        s = self.settings
        cost, growth = costs or measure_batch(model, batch)
        texts = record(
            model, prompts, max_new_tokens=s.tokens, temperature=s.temperature, seed=s.seed
        )
        trials = {}
        for name, policy in (policies or self.policies(model)).items():
            found = replay(policy, texts, temperature=s.temperature, seed=s.seed)
            rounds = [r for result in found for r in result.rounds]
            drafting = [
                (f.stats.parts_s["draft"] + f.stats.parts_s["observe"]) / len(f.rounds)
                for f in found
            ]
            trials[name] = Trial(
                sum(r.emitted for r in rounds) / len(rounds),
                1.0 + statistics.fmean(r.nodes for r in rounds),
                statistics.median(drafting),
            )
        draft, target = model.draft_model, model.target
        match = None if draft is None else abs(draft.vocab_size - target.vocab_size) <= 512
        return Probe(
            cost,
            batch,
            trials,
            target.reach,
            growth,
            statistics.fmean(copy_rate(t) for t in texts),
            statistics.fmean(entropy(t) for t in texts),
            match,
            model.tokenizer is not None,
        )

    def advise(self, probe: Probe) -> Advice:
        """Exclude what cannot work, rank the rest, and say why.

        Raises:
            UnknownNameError: The probe tried a method that the taxonomy does not know.
        """
        s = self.settings
        for name in probe.trials:
            if name not in METHODS:
                raise UnknownNameError("method", name, METHODS)
        excluded = {
            name: why for name in METHODS if (why := self._obstacle(name, probe)) is not None
        }
        speed = {
            name: probe.speedup(name, trial) if s.measure else METHODS[name].published
            for name, trial in probe.trials.items()
            if name not in excluded
        }
        ranked = dict(sorted(speed.items(), key=lambda item: -item[1]))
        best = next(iter(ranked), "none")
        choice = best if ranked and ranked[best] >= s.gain else "none"
        reasons = [
            f"batch {probe.batch}: 4 nodes cost {probe.cost(4) / probe.cost(1):.2f} of one, "
            f"16 cost {probe.cost(16) / probe.cost(1):.2f}",
            f"copy rate {probe.copy_rate:.2f}, entropy {probe.entropy:.2f} nats",
            *(f"{n}: {METHODS[n].path}; predicted {ranked[n]:.2f}x" for n in ranked),
        ]
        options: dict[str, Any] = {"drafter": choice}
        if choice != "none":
            options["num_draft_tokens"] = METHODS[choice].nodes
        return Advice(choice, ranked, excluded, options, tuple(reasons))

    def _obstacle(self, name: str, probe: Probe) -> str | None:
        """Why a method cannot work here, or None."""
        method, s = METHODS[name], self.settings
        if probe.reach == "step":
            return "the target is exact one token at a time only"
        if method.tree and probe.reach == "chain":
            return "the target scores chains only"
        if method.model and probe.vocabularies_match is None:
            return "there is no draft model"
        if method.model and not probe.vocabularies_match:
            return "the draft model has another vocabulary"
        if method.text and not probe.tokenizer:
            return "there is no tokenizer"
        if s.exact and not method.lossless:
            return "the output must stay exact"
        if name not in probe.trials:
            return "it was not tried"
        if s.measure and probe.cost(4) / probe.cost(1) > probe.trials[name].tau:
            return "compute-bound: four nodes cost more than a round would bring"
        return None


def claim(ruler: Ruler, scale: Scale = "small") -> Claim:
    """Hold the guide's advice against measured methods, four tasks at two batch sizes.

    The guide sees other prompts of each task than the measurement. Temperature 0.5: greedy text of
    the small model loops.

    Args:
        ruler: Not used: acceptance is counted, and a cell's speed-up follows from forward times.
        scale: ``"small"`` is 4 probe and 8 measured prompts of 16 tokens a task, ``"test"`` 1.
    """
    small = scale != "test"
    few, many, tokens = (4, 8, 16) if small else (1, 1, 6)
    model = reference_model("pycode-t", "pycode-xs")
    settings = Settings(tokens=tokens, temperature=0.5)
    guide = SpeculativeSurveyCloser(settings)
    fixed = SpeculativeSurveyCloser(Settings(tokens=tokens, measure=False))
    names = ("continue", "docstring", "quote", "dates")
    policies = guide.policies(model)
    costs = {batch: measure_batch(model, batch) for batch in (1, 8)}
    measured = survey(
        model,
        {"plain": "none", **policies},
        {n: tasks.prompts(n, many, model.tokenizer, seed=1) for n in names},
        max_new_tokens=tokens,
        temperature=settings.temperature,
    )
    right = blind = never = 0
    rows, errors = [], []
    for task in names:
        prompts = tasks.prompts(task, few, model.tokenizer, seed=2)
        for batch, known in costs.items():
            seen = guide.probe(model, prompts, batch=batch, policies=policies, costs=known)
            true = {"none": 1.0}
            for o in measured:
                if o.task == task and o.method != "plain":
                    nodes = 1.0 + statistics.fmean(n for row in o.nodes for n in row)
                    trial = Trial(o.acceptance_length, nodes, seen.trials[o.method].draft_s)
                    true[o.method] = seen.speedup(o.method, trial)
                    errors.append(abs(math.log(seen.trials[o.method].tau / o.acceptance_length)))
            advice, guess = guide.advise(seen), fixed.advise(seen)
            best = max(true, key=lambda name: true[name])
            right += true[advice.choice] >= 0.9 * true[best]
            blind += true[guess.choice] >= 0.9 * true[best]
            never += true[best] <= 1.0 / 0.9
            rows.append(
                Row(
                    f"speed-up of the advised method, {task}, batch {batch}",
                    "x",
                    1.0,
                    true[advice.choice],
                    true[guess.choice],
                    ceiling=true[best],
                    note=f"advised {advice.choice}, best {best}, published figures say "
                    f"{guess.choice}",
                )
            )
    tried = {name: Trial(2.5, METHODS[name].nodes + 1.0, 0.0) for name in METHODS}
    bound = Probe(
        Cost({n: float(n) for n in (1, 2, 4, 8, 16, 32)}), 64, tried, vocabularies_match=True
    )
    refused = guide.advise(bound).choice == "none"
    cells = len(rows)
    gates = (
        Gate("cells within 10 % of the best method", right, ">=", 0.75 * cells),
        Gate("says no in a compute-bound cell", int(refused), "==", 1),
        Gate("cells more than by published figures", right - blind, ">", 0),
    )
    return Claim(
        slug="speculative-survey-closer",
        statement="A short probe with replayed methods names a drafter within 10 % of the best one "
        "in three cells of four, and says no where drafting cannot pay.",
        paper_figure="a survey: no figure; the claim is the guide's own",
        rows=(
            *rows,
            Row(
                "cells within 10 % of the best method",
                "cells",
                None,
                right,
                blind,
                control=never,
                note="control: never speculate",
            ),
            Row(
                "mean error of the replayed acceptance length",
                "%",
                None,
                100 * statistics.fmean(errors),
                None,
                note="other prompts of the same task",
            ),
        ),
        scale=scale,
        device="cpu",
        status=judge(gates, gates[:2]),
        reason=""
        if all(g.passed for g in gates)
        else "the probe's few prompts misjudge a method, or published figures do as well here",
        notes=("Off: the method with the largest published speed-up, whatever the deployment.",),
        gates=gates,
        seeds=(0, 1, 2),
    )
