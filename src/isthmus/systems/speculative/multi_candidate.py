"""Multi-candidate speculation that stops in time: a decision model ends the draft.

Paper: Lu, Zeng, Ma, Yu, Levorato. Improving Multi-Candidate Speculative Decoding. 2024.
    arXiv:2409.10644
Idea: Draw k_1, k_2, ... candidates a level, cut one precomputed tree to any length, and let a small
    classifier on the draft model's own figures say whether another level is worth a call.
Differs: The classifier is a logistic regression on five figures and has no hidden states; it looks
    at what was drawn on earlier levels only, so the law is kept. Candidates that come from the
    target's last law (``target_roots``) are an option of its own, because the choice of the one
    accepted furthest changes the law: with it the result says ``lossless=False``.
Lossless: yes

    level d ──(path probability, top-1, margin, entropy, depth)──> classifier ── >= threshold? ──┐
       ^───────────────────────────── draft level d + 1 <────────────────────────────────────────┘
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from isthmus.claims import Claim, Gate, Row, Ruler, Scale, judge
from isthmus.decoding.builders import sliced
from isthmus.decoding.cost import measure_cost
from isthmus.decoding.drafters import ModelDrafter
from isthmus.decoding.furthest import FurthestRoot
from isthmus.decoding.law import Law
from isthmus.decoding.policy import Fixed
from isthmus.decoding.table import TableTarget
from isthmus.decoding.tree import TokenTree
from isthmus.errors import InvalidInputError
from isthmus.roles import Context, Shape, Step, Target
from isthmus.testing.statistics import string_test
from isthmus.workbench import pycode
from isthmus.workbench.bench import Answers, answer, reference_model

FIGURES = ("log path probability", "top-1 probability", "margin", "entropy", "depth")
"""What the decision model looks at, taken at the likeliest node of the level just drawn."""


@dataclass(frozen=True)
class Decision:
    """The decision model (sec. 3.3): chance that another level will be accepted.

    Attributes:
        weights: One weight a figure of :data:`FIGURES`, then the bias. The default was fitted on
            Python drafts of two small models at temperature 1.

    Example:
        >>> Decision((0.0, 0.0, 0.0, 0.0, 0.0, 0.0))(torch.zeros(2, 5)).tolist()
        [0.5, 0.5]
    """

    weights: tuple[float, ...] = (0.6, 0.8, 0.2, -0.1, -0.3, 0.4)

    def __call__(self, figures: torch.Tensor) -> torch.Tensor:
        """Chances [B] for figures [B, 5]."""
        w = figures.new_tensor(self.weights)
        return torch.sigmoid(figures @ w[:-1] + w[-1])

    @classmethod
    def fit(cls, figures: torch.Tensor, reached: torch.Tensor, ridge: float = 1.0) -> Decision:
        """Fit by Newton's method.

        Args:
            figures: Of recorded levels [R, 5].
            reached: Whether the level after it was accepted, [R].
            ridge: Penalty on the weights, so that separable records give finite ones.

        Raises:
            InvalidInputError: There are no records.
        """
        if not len(figures):
            raise InvalidInputError("the decision model needs recorded levels to be fitted on")
        x = torch.cat([figures, torch.ones_like(figures[:, :1])], 1).double()
        y, w = reached.double(), torch.zeros(x.shape[1], dtype=torch.float64)
        penalty = ridge * torch.eye(len(w), dtype=torch.float64)
        for _ in range(25):
            chance = torch.sigmoid(x @ w)
            slope = x.T @ (chance - y) + penalty @ w
            bend = (x * (chance * (1 - chance))[:, None]).T @ x + penalty
            w = w - torch.linalg.solve(bend, slope)
        return cls(tuple(w.tolist()))


@dataclass(frozen=True)
class Settings:
    """Settings of multi-candidate speculation.

    Attributes:
        branching: Candidates of every node on each level.
        decide: The mechanism; off, all levels are always drafted (plain MCSD).
        threshold: Another level needs at least this chance.
        decision: The decision model.
        target_roots: Take the first candidates from the target's last law and keep the one that
            is accepted furthest. Not lossless.
    """

    branching: tuple[int, ...] = (4, 2, 1, 1)
    decide: bool = True
    threshold: float = 0.5
    decision: Decision = Decision()
    target_roots: bool = False


class MultiCandidate(ModelDrafter):
    """A draft model with several candidates a level and a decision before each further level.

    Args:
        model: The draft model as a target, sharing the target's vocabulary.
        settings: See :class:`Settings`.

    Attributes:
        figures: Figures of each level of the last draft that was decided on, [B, 5] each.
        levels: Levels drafted in each row of the last draft.
        acceptance: The rule for target roots, else None: the exact rule serves.

    Raises:
        InvalidInputError: A threshold that is no probability, or no candidate on a level.
    """

    role: ClassVar[str] = "drafter"
    name = "multi-candidate"

    def __init__(self, model: Target, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        if not 0.0 <= self.settings.threshold <= 1.0:
            raise InvalidInputError(f"threshold is a chance, got {self.settings.threshold}")
        super().__init__(model, branching=self.settings.branching)
        self.figures: list[torch.Tensor] = []
        self.levels: list[int] = []
        self.acceptance = FurthestRoot() if self.settings.target_roots else None

    @property
    def default_shape(self) -> Shape:
        """The whole tree."""
        widths = self.settings.branching
        nodes = sum(math.prod(widths[: i + 1]) for i in range(len(widths)))
        return Shape(nodes, len(widths), max(widths))

    def begin(self, context: Context, target: Target, **inputs: Any) -> None:
        """Start without a law of the target."""
        super().begin(context, target, **inputs)
        if self.acceptance is not None:
            self.acceptance.known = None

    def propose(self, context: Context, shape: Shape) -> TokenTree:
        """Draft level by level while the decision model expects the next one to be accepted."""
        shape = self.ready(context, shape)
        plan, nodes, wide = [], 0, 1
        for width in self.settings.branching[: shape.depth]:
            width = min(width, shape.width, (shape.nodes - nodes) // wide, self._vocab)
            if width < 1:
                break
            plan.append(width)
            wide, nodes = wide * width, nodes + wide * width
        slices, point = sliced(tuple(plan)), context.law.greedy
        device = getattr(self.model, "device", context.ids.device)
        tokens = context.roots().to(device)[:, None]
        valid = torch.ones_like(tokens, dtype=torch.bool)
        going = valid[:, 0]
        self.figures, self.levels = [], [0] * context.batch
        log_path = torch.zeros(tokens.shape, dtype=torch.float64, device=device)  # [B, F]
        q: torch.Tensor | None = None
        for level, width in enumerate(plan):
            if level and self.settings.decide:
                going = going & (
                    self.settings.decision(self.figures[-1]) >= self.settings.threshold
                )
                if not bool(going.any()):
                    break
            self.levels = [n + int(g) for n, g in zip(self.levels, going.tolist(), strict=True)]
            whole = TokenTree(tokens, slices[level].to(device))
            start = slices[level - 1].nodes if level else 0
            law = self.laws(context, whole)[:, start:]  # [B, F, V]
            probs = torch.softmax(law, -1)
            if level == 0 and self.acceptance is not None and not point:
                probs, fresh = self.acceptance.first(probs, width, context)
            elif point:
                fresh = law.topk(width, -1).indices
            else:
                flat = torch.multinomial(
                    probs.flatten(0, 1), width, True, generator=context.generator
                )
                fresh = flat.view(*law.shape[:2], width)
            q = probs if q is None else torch.cat([q, probs], 1)
            log_path, figures = _figures(probs, fresh, log_path, level + 1)
            self.figures.append(figures)
            tokens = torch.cat([tokens, fresh.flatten(1)], 1)
            valid = torch.cat([valid, going[:, None].expand(-1, fresh[0].numel())], 1)
        ragged = None if bool(valid.all()) else valid
        topology = next(t for t in slices if t.nodes == tokens.shape[1]).to(device)
        if point or q is None:
            return TokenTree(tokens, topology, ragged)
        rest = q.new_zeros(len(q), tokens.shape[1] - q.shape[1], q.shape[2])
        return TokenTree(tokens, topology, ragged, "iid", torch.cat([q, rest], 1))

    def select(self, rows: Sequence[int]) -> None:
        """Keep only the given rows."""
        super().select(rows)
        if self.acceptance is not None and self.acceptance.known is not None:
            self.acceptance.known = self.acceptance.known[list(rows)]


def _figures(
    probs: torch.Tensor, fresh: torch.Tensor, log_path: torch.Tensor, depth: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Path log-probabilities of a drawn level [B, F k] and the figures of its best node [B, 5]."""
    own = probs.gather(-1, fresh).double().clamp(min=1e-30).log()
    paths = (log_path[..., None] + own).flatten(1)
    best, at = paths.max(1)
    above = probs[torch.arange(len(at), device=at.device), at // fresh.shape[-1]].double()  # [B, V]
    top = above.topk(2, -1).values if above.shape[1] > 1 else above.expand(-1, 2)
    entropy = -(above * above.clamp(min=1e-30).log()).sum(-1)
    depths = torch.full_like(best, float(depth))
    return paths, torch.stack([best, top[:, 0], top[:, 0] - top[:, 1], entropy, depths], 1)


class _Recorded(MultiCandidate):
    """Writes down figures, levels reached and the price of every round."""

    def __init__(self, model: Target, settings: Settings) -> None:
        super().__init__(model, settings)
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.drafted: list[int] = []
        self.nodes: list[int] = []

    def observe(self, step: Step) -> None:
        if self.figures:
            reached = torch.tensor(step.accepted)
            self.seen.append((torch.stack(self.figures, 1), reached))  # [B, levels, 5], [B]
        self.drafted += self.levels
        self.nodes += step.tree.drafted()
        super().observe(step)


def train(records: list[tuple[torch.Tensor, torch.Tensor]], loss: float) -> tuple[Decision, float]:
    """Fit the decision model on full drafts and set its threshold.

    Args:
        records: Figures [B, levels, 5] and levels accepted [B] of each round.
        loss: Share of the emitted tokens that may be lost on these records.

    Returns:
        The model, and the highest threshold that loses no more.
    """
    depth = max(f.shape[1] for f, _ in records)
    full = [(f, r) for f, r in records if f.shape[1] == depth]
    figures, reached = torch.cat([f for f, _ in full]), torch.cat([r for _, r in full])
    levels = torch.arange(1, depth)  # a decision follows each level but the last
    labels = reached[:, None] > levels  # [R, levels]
    decision = Decision.fit(figures[:, :-1].flatten(0, 1), labels.flatten())
    chances = decision(figures[:, :-1])  # [R, levels]
    best, emitted = 0.0, (reached + 1).double().mean()
    for threshold in torch.linspace(0.02, 0.98, 49).tolist():
        drawn = 1 + (chances >= threshold).long().cumprod(1).sum(1)
        left = (torch.minimum(reached, drawn) + 1).double().mean()
        if left >= (1.0 - loss) * emitted:
            best = threshold
    return decision, best


def claim(ruler: Ruler, scale: Scale = "small") -> Claim:
    """Measure what the decision saves, at temperature 1 with ``pycode-t`` and ``pycode-s``.

    The decision model is fitted on other prompts than it is measured on; its threshold is the
    highest that loses 2 % of the tokens there.

    Args:
        ruler: The clock.
        scale: ``"small"`` is 96 prompts of 24 tokens, ``"test"`` 6 of 8 with tiny law tests.
    """
    full = scale != "test"
    count, tokens, draws = (96, 24, 6000) if full else (6, 8, 800)
    truth, guess = TableTarget(3, seed=1, sharpness=1.2), TableTarget(3, seed=2)

    def law_test(settings: Settings) -> float:
        drafter = MultiCandidate(guess, replace(settings, branching=(3, 2)))
        policy, law = Fixed(drafter, drafter.default_shape), Law(temperature=0.8, top_p=0.9)
        rule = drafter.acceptance
        return string_test(policy, target=truth, law=law, acceptance=rule, tokens=5, rows=draws).p

    # stops in about every second round on these laws
    halting = Decision((4.0, 0.0, 0.0, 0.0, 0.0, 4.0))
    law_of = {
        "fixed": law_test(Settings(decide=False)),
        "decision": law_test(Settings(decision=halting)),
        "target roots": law_test(Settings(decide=False, target_roots=True)),
    }
    model = reference_model("pycode-t", "pycode-s")
    assert model.draft_model is not None
    small = model.draft_model

    def run(settings: Settings, seed: int, rows: int) -> tuple[_Recorded, Answers]:
        drafter = _Recorded(small, settings)
        prompts = pycode.prompts(rows, model.tokenizer, 96, seed=seed)
        return drafter, answer(
            model,
            prompts,
            Fixed(drafter, drafter.default_shape),
            max_new_tokens=tokens,
            acceptance=drafter.acceptance,
            temperature=1.0,
            batch=16,
            seed=1000 * seed,
        )

    fixed = Settings(decide=False)
    decision, threshold = train(run(fixed, 1, count * 2 // 3)[0].seen, 0.02)
    chosen = Settings(decision=decision, threshold=threshold)
    arms = {
        "fixed": run(fixed, 0, count),
        "decision": run(chosen, 0, count),
        "target roots": run(replace(fixed, target_roots=True), 0, count),
    }
    tau = {name: got.acceptance_length() for name, (_, got) in arms.items()}
    calls = {n: sum(d.drafted) / sum(map(len, a.tokens)) for n, (d, a) in arms.items()}
    t_target, t_draft = measure_cost(model.target), measure_cost(small)

    def speed(drafter: _Recorded, got: Answers) -> float:
        widths = [t.nodes for t in sliced(drafter.settings.branching)]
        spent = sum(t_target(1 + n) for n in drafter.nodes)
        spent += sum(t_draft(widths[level]) for n in drafter.drafted for level in range(n))
        return sum(map(len, got.tokens)) * t_target(1) / spent

    forecast = {name: speed(*arm) for name, arm in arms.items()}
    saved = 1.0 - calls["decision"] / calls["fixed"]
    gates = (
        Gate("chi-square p, fixed draft", law_of["fixed"], ">", 1e-4),
        Gate("chi-square p, with decisions", law_of["decision"], ">", 1e-4),
        Gate("chi-square p, target roots: seen as lossy", law_of["target roots"], "<", 1e-4),
        Gate("share of draft calls saved", saved, ">=", 0.2),
        Gate("acceptance length left", tau["decision"] / tau["fixed"], ">=", 0.97),
        Gate(
            "forecast speed over the fixed draft",
            forecast["decision"] / forecast["fixed"],
            ">=",
            1.0,
        ),
    )
    direction = (*gates[:3], Gate("some draft calls saved", saved, ">", 0.0), gates[5])
    return Claim(
        slug="multi-candidate",
        statement="A small classifier that ends the draft saves a fifth of the draft model's calls "
        "at hardly any loss of accepted tokens, and the output keeps its law.",
        paper_figure="27.5% faster than MCSD with Llama 2 7B and a 68M draft model (abstract)",
        rows=(
            Row(
                "acceptance length, T = 1",
                "tokens/forward",
                1.0,
                tau["decision"],
                tau["fixed"],
                control=tau["target roots"],
                note="off: all levels always; control: candidates from the target's last law, "
                "which changes the law",
            ),
            Row(
                "draft forwards a token",
                "",
                None,
                calls["decision"],
                calls["fixed"],
                control=calls["target roots"],
            ),
            Row(
                "forecast speed-up from forward times",
                "x",
                1.0,
                forecast["decision"],
                forecast["fixed"],
                control=forecast["target roots"],
                note=f"threshold {threshold:.2f}; weights "
                f"{', '.join(f'{w:.2f}' for w in decision.weights)}",
            ),
            Row(
                "chi-square p of the joint law",
                "",
                None,
                law_of["decision"],
                law_of["fixed"],
                control=law_of["target roots"],
                note="control: target roots, which are not lossless",
            ),
        ),
        scale=scale,
        device="cpu",
        status=judge(gates, direction),
        gates=gates,
        seeds=(0, 1),
    )
