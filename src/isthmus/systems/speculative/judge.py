"""Judge decoding: a head on the target's own states says which unexpected tokens are right.

Paper: Bachmann, Anagnostidis, Pumarola, Georgopoulos, Sanakoyeu, Du, Schoenfeld, Thabet, Kohler.
    Judge Decoding: Faster Speculative Sampling Requires Going Beyond Model Alignment. 2025.
    arXiv:2501.19309
Idea: The target's last hidden state at a draft token that it has read shows whether the answer is
    still right; a linear head reads it off, and such tokens stand although the target would have
    said something else.
Differs: The tokens to learn from are annotated by a checker instead of people. Without a head, or
    with a threshold of 1, this is a draft model with the exact rule.
Lossless: no

    draft x_1 .. x_25 ──one target forward──> laws p_t, states e_t
    x_t stands if p_t(x_t) passes the exact test or sigmoid(w e_t + b) > theta; stop at the first
    that does not, and let the target speak there
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Self

import torch

from isthmus.claims import Claim, Gate, Row, Ruler, Scale, Status, judge
from isthmus.decoding.acceptance import NOTHING
from isthmus.decoding.drafters import ModelDrafter
from isthmus.decoding.policy import Fixed
from isthmus.decoding.relaxed import TopBeta
from isthmus.decoding.state_head import StateHead
from isthmus.decoding.tree import TokenTree
from isthmus.errors import InvalidInputError
from isthmus.roles import Acceptance, Context, Shape, Taps, Target, Verdict
from isthmus.training.drafting import Recipe
from isthmus.workbench import sums
from isthmus.workbench.bench import reference_model
from isthmus.workbench.faults import draft_texts, fitted_head, worded_draft


@dataclass(frozen=True)
class Settings:
    """Settings of judge decoding, with the paper's values.

    Attributes:
        threshold: Probability theta of being right above which a draft token stands; 1 switches
            the judge off, and the output is the target's.
        num_draft_tokens: Length of a draft, which nobody verifies before it is complete.
    """

    threshold: float = 0.5
    num_draft_tokens: int = 25

    def __post_init__(self) -> None:
        if not 0.0 <= self.threshold <= 1.0 or self.num_draft_tokens < 1:
            raise InvalidInputError(
                "judge needs a threshold from 0 to 1 and num_draft_tokens of at least 1, got "
                f"{self.threshold} and {self.num_draft_tokens}"
            )


class Judged:
    """Acceptance: the exact test or the judge, token by token along a chain.

    Args:
        head: Probability of being right from the target's last hidden state *at* the token.
        threshold: See :class:`Settings`.

    Raises:
        InvalidInputError: From ``accept``: the tree is no chain, or there are no hidden states.
    """

    def __init__(self, head: StateHead | None, threshold: float = 0.5) -> None:
        self.head, self.threshold = head, threshold
        self.lossless = head is None or threshold >= 1.0
        self.taps = Taps(final=not self.lossless)

    @torch.no_grad()
    def accept(self, tree: TokenTree, logits: torch.Tensor, context: Context) -> Verdict:
        """See :class:`isthmus.roles.Acceptance`."""
        if not tree.is_chain:
            raise InvalidInputError("judge decoding is for chains only")
        logits = context.law.logits(logits, tree, context)  # [B, N, V]
        if not bool(torch.isfinite(logits.amax(-1)).all()):
            raise InvalidInputError("the target's logits are not finite; try --dtype float32")
        greedy, drafted = context.law.greedy, tree.tokens[:, 1:]
        law = logits if greedy else torch.softmax(logits.double(), -1)
        drawn = None if greedy else tree.q
        if drawn is None:  # a chosen token must be the one that the target chooses or draws
            choice = law.argmax(-1)
            if not greedy:
                draw = torch.multinomial(law.flatten(0, 1), 1, generator=context.generator)
                choice = draw.view(tree.tokens.shape)
            passes = drafted == choice[:, :-1]
        else:  # a drawn one passes with probability min(1, p / q)
            p, q = (x[:, :-1].gather(-1, drafted[..., None])[..., 0] for x in (law, drawn.double()))
            u = torch.rand(p.shape, generator=context.generator, dtype=p.dtype, device=p.device)
            passes = (q > 0) & (u * q < p)
        if self.head is not None and not self.lossless:
            if context.features is None or context.features.final is None:
                raise InvalidInputError("the judge needs the target's last hidden states")
            good = self.head(context.features.final[:, 1:]) > self.threshold
            passes |= good.to(passes.device)
        passes &= tree.alive[:, 1:]
        count = 1 + passes.long().cumprod(1).sum(1)  # the root and what stands below it
        steps = torch.arange(int(count.max()), device=count.device)
        path = torch.where(steps < count[:, None], steps, -1)
        if drawn is None:
            return Verdict(path, choice.gather(1, count[:, None] - 1)[:, 0])
        return Verdict(path, _final(tree, law, drawn.double(), count, context.generator))


def _final(
    tree: TokenTree,
    law: torch.Tensor,
    drawn: torch.Tensor,
    count: torch.Tensor,
    generator: torch.Generator,
) -> torch.Tensor:
    """The target's token behind what stands, int64 [B]: what p has more than q, or p at the end."""
    rows = torch.arange(len(count), device=count.device)
    p = law[rows, count - 1]  # [B, V]
    refused = (count < tree.nodes) & tree.alive[rows, count.clamp(max=tree.nodes - 1)]
    rest = (p - drawn[rows, count - 1]).clamp(min=0.0)
    mass = rest.sum(-1, keepdim=True)
    use = refused[:, None] & (mass > NOTHING)
    p = torch.where(use, rest / mass.clamp(min=NOTHING), p)
    return torch.multinomial(p, 1, generator=generator)[:, 0]


class Judge(ModelDrafter):
    """Drafter: a long chain of a draft model, and the acceptance that judges it.

    Args:
        model: The draft model.
        settings: See :class:`Settings`.
        head: The fitted judge, bound to the target's states; None keeps the exact rule.

    Example:
        >>> from isthmus.decoding.table import TableTarget
        >>> Judge(TableTarget(5)).default_shape
        Shape(nodes=25, depth=25, width=1)
    """

    role: ClassVar[str] = "drafter"
    name = "judge"

    def __init__(
        self, model: Target, settings: Settings | None = None, *, head: StateHead | None = None
    ) -> None:
        super().__init__(model)
        self.settings = settings or Settings()
        self.acceptance: Acceptance = Judged(head, self.settings.threshold)

    @classmethod
    def for_model(
        cls, model: Any, settings: Settings | None = None, *, head: StateHead | None = None
    ) -> Self:
        """Judge the drafts of the model's draft model.

        Raises:
            InvalidInputError: There is no draft model or no head.
        """
        if model.draft_model is None:
            raise InvalidInputError("judge needs a draft model; give one with --draft-model")
        if head is None:
            raise InvalidInputError(
                "judge needs a head fitted for its target: fit a StateHead on states of right and "
                "wrong tokens, save it, and give its folder as the drafter"
            )
        return cls(model.draft_model, settings, head=head)

    @classmethod
    def for_folder(cls, model: Any, folder: str | Path) -> Self:
        """Judge with a saved head, see :meth:`isthmus.decoding.state_head.StateHead.fit`.

        Raises:
            IsthmusError: The head cannot be read or is another target's; or as for
                :meth:`for_model`.
        """
        return cls.for_model(model, head=StateHead.from_pretrained(folder, cls.name, model.target))

    @property
    def default_shape(self) -> Shape:
        """The paper's chain."""
        return Shape(self.settings.num_draft_tokens, self.settings.num_draft_tokens, 1)


MISREADS = (
    "this small target has read its own wording only: behind right words that it never met it "
    "makes mistakes itself, so whatever lets them pass costs accuracy"
)
"""Why the judge cannot keep the target's accuracy here."""


@dataclass(frozen=True)
class _Arm:
    """What one rule did on all problems."""

    length: float  # tokens a target forward
    solved: float  # percent
    tokens: list[list[int]]


def at_length(arms: Sequence[_Arm], length: float) -> float:
    """Percent solved by a family of rules at an acceptance length, between its nearest members.

    Beyond the family's ends the member at that end answers.
    """
    points = sorted((arm.length, arm.solved) for arm in arms)
    for (x1, y1), (x2, y2) in pairwise(points):
        if x1 <= length <= x2:
            return y1 + (y2 - y1) * (length - x1) / max(x2 - x1, 1e-9)
    return points[0][1] if length < points[0][0] else points[-1][1]


def claim(ruler: Ruler, scale: Scale = "small") -> Claim:
    """Draft sums in other words than the target's and see what is let pass.

    Target and problems are plain; the draft model words its solutions freely. The head is fitted
    and its threshold chosen on training problems: the most tokens a forward among thresholds that
    lose no more than 2 points, else the highest threshold.

    Args:
        ruler: Not used: tokens a forward decide.
        scale: ``"small"`` is 300 problems, ``"test"`` 8.
    """
    count, fitted, recipe = 300, 600, Recipe(steps=300, batch_size=32, learning_rate=2e-3)
    if scale == "test":
        count, fitted, recipe = 8, 60, Recipe(steps=3, batch_size=4, learning_rate=2e-3)
    addends, budget = (2, 2), 64
    model = reference_model("sums-l", "sums-s")
    target: Any = model.target
    assert model.draft_model is not None
    draft = worded_draft(model.draft_model, recipe)
    head = fitted_head(target, draft, count=fitted, addends=addends)
    people = fitted_head(target, draft, by="annotator", count=fitted, addends=addends)
    drafter = Judge(draft)
    policy = Fixed(drafter, drafter.default_shape)

    def arm(problems: Sequence[sums.Problem], rule: Acceptance | None) -> _Arm:
        results = model.generate(
            [model.encode(p.prompt) for p in problems],
            drafter="none" if rule is None else policy,
            acceptance=rule,
            max_new_tokens=budget,
        )
        right = sum(sums.check_answer(p, r.text) for p, r in zip(problems, results, strict=True))
        forwards = sum(r.stats.target_forwards for r in results)
        written = [r.tokens for r in results]
        return _Arm(sum(map(len, written)) / forwards, 100 * right / len(problems), written)

    thresholds = (0.3, 0.5, 0.7, 0.9, 0.95, 0.98)
    training = sums.problems(max(count // 2, 4), "train", seed="threshold", addends=addends)
    whole = arm(training, None).solved
    tuned = {t: arm(training, Judged(head, t)) for t in thresholds}
    safe = [t for t in thresholds if whole - tuned[t].solved <= 2.0]
    best = max(safe, key=lambda t: tuned[t].length) if safe else thresholds[-1]

    problems = sums.problems(count, seed="judge", addends=addends)
    alone = [model.tokenizer.decode(t) for t in draft_texts(draft, problems)]
    drafted = 100 * sum(map(sums.check_answer, problems, alone)) / count
    plain, exact, off = (arm(problems, r) for r in (None, Judged(None), Judged(head, 1.0)))
    judged = {t: arm(problems, Judged(head, t)) for t in thresholds}
    gaps = (3.0, 5.0, 6.0, 7.0, 8.0, 9.0, 11.0, 15.0)
    faults = arm(problems, Judged(people, 0.5))
    families = {
        name: [exact, *(arm(problems, TopBeta(beta, gap)) for gap in gaps)]
        for name, beta in (("top-beta", 3), ("lenience", int(target.vocab_size)))
    }
    ours = judged[best]
    rivals = {name: at_length(arms, ours.length) for name, arms in families.items()}
    same = sum(a == b for a, b in zip(off.tokens, plain.tokens, strict=True))
    gain, lost = ours.length / exact.length, plain.solved - ours.solved
    identical = Gate("threshold 1 writes what the target writes", same, "==", count)
    over = [
        Gate(f"points over {n} at equal length", ours.solved - y, ">=", 3.0)
        for n, y in rivals.items()
    ]
    gates = (
        identical,
        Gate("target solves, percent", plain.solved, ">=", 90.0),
        Gate("draft model solves, percent", drafted, ">=", 60.0),
        Gate("acceptance length over greedy verification", gain, ">=", 1.4),
        Gate("points lost", lost, "<=", 2.0),
        *over,
    )
    direction = (
        identical,
        Gate("acceptance length over greedy verification, direction", gain, ">", 1.0),
        Gate("points over the draft model", ours.solved - drafted, ">", 0.0),
        *(Gate(f"{gate.name}, direction", gate.value, ">", 0.0) for gate in over),
    )
    status = judge(gates, direction)
    return Claim(
        slug="judge",
        statement="A linear head on the target's state at a draft token lets right but unexpected "
        "tokens pass: 1.4 times the acceptance length of greedy verification within 2 points of "
        "the target, and 3 points above rules by likelihood at equal length.",
        paper_figure="accepted length 6.3 to 19.7, about 9x, quality kept, Llama 3.1 8B and 405B",
        rows=(
            Row("acceptance length", "tokens/forward", exact.length, ours.length, off.length),
            Row("problems solved", "%", plain.solved, ours.solved, off.solved, control=drafted),
            *(
                Row(
                    f"problems solved at threshold {t:g}",
                    "%",
                    plain.solved,
                    a.solved,
                    off.solved,
                    note=f"{a.length:.2f} tokens a forward; at that length top-beta "
                    f"{at_length(families['top-beta'], a.length):.1f}, lenience "
                    f"{at_length(families['lenience'], a.length):.1f}",
                )
                for t, a in judged.items()
            ),
            Row(
                "problems solved with labels of an annotator of faults, threshold 0.5",
                "%",
                plain.solved,
                faults.solved,
                off.solved,
                note=f"{faults.length:.2f} tokens a forward",
            ),
        ),
        scale=scale,
        device="cpu",
        status=status,
        reason="" if status == Status.REPRODUCED else MISREADS,
        notes=(
            f"Control: the draft model alone. Threshold {best:g} was chosen on training problems.",
            f"The head was fitted on {head.record['tokens']} unexpected tokens in drafts of "
            f"training problems, {head.record['faults']} of them faults: behind them the target "
            "errs, as it may behind a right token in words that it never met.",
            "Top-beta is the 3 best tokens within a gap of 3 to 15 nats, lenience any token "
            "within it; both are read off between the nearest gaps.",
        ),
        gates=gates,
        seeds=(0,),
    )
