"""Critical tokens: the pretrained model says what is true, the aligned one says the rest.

Paper: L. Jin, B. Peng, L. Song, H. Mi, Y. Tian, D. Yu. Collaborative decoding of critical tokens
    for boosting factuality of large language models. 2024. arXiv:2402.17982
Idea: Alignment costs facts. Hand the tokens that decide on the truth (names, numbers) to the
    pretrained model, greedily, and let the aligned model draw all others.
Differs: The classifier is a logistic head on the aligned model's last state, not a language model
    of its own, and its labels come from templates, not from a strong model. The mixture of both
    laws by the classifier's probability is left out. The world, its facts and the damage of tuning
    are planted.

    h_aligned ──head──▶ c_t <= theta:  x_t ~ p_aligned
                        c_t >  theta:  x_t = argmax p_pretrained   (never the end of the answer)
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from isthmus.claims import Claim, Gate, Row, Ruler, Scale, judge
from isthmus.decoding.fusion import Member, Route
from isthmus.decoding.law import Law
from isthmus.decoding.model import Model
from isthmus.decoding.router import Classifier, Oracle, Router
from isthmus.decoding.state_head import StateHead
from isthmus.metrics.repetition import distinct
from isthmus.models.hub import load_checkpoint
from isthmus.roles import Taps
from isthmus.workbench import facts


@dataclass(frozen=True)
class Settings:
    """Settings.

    Attributes:
        threshold: theta: above this probability a token counts as critical; 1 switches the idea
            off, and below 0 the pretrained model says everything.
        temperature: Of the aligned model.
    """

    threshold: float = 0.5
    temperature: float = 1.0


def fit_classifier(
    aligned: Model, dialogues: Sequence[tuple[Sequence[int], Sequence[bool]]]
) -> StateHead:
    """A head that says, from the aligned model's state, whether the next token is critical.

    Args:
        aligned: The aligned model.
        dialogues: Tokens, and whether each is critical.
    """
    states, labels = states_of(aligned, dialogues)
    head = StateHead(states.shape[-1])
    head.fit(states, labels)
    return head


@torch.no_grad()
def states_of(
    aligned: Model, dialogues: Sequence[tuple[Sequence[int], Sequence[bool]]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Last states at all tokens but the last [M, D], and whether the next token is critical [M]."""
    states: list[torch.Tensor] = []
    labels: list[bool] = []
    for tokens, critical in dialogues:
        ids = torch.tensor([list(tokens[:-1])], device=aligned.target.device)
        scores = aligned.target.forward(ids, taps=Taps(final=True))
        assert scores.features is not None and scores.features.final is not None
        states.append(scores.features.final[0].float())
        labels += critical[1:]
    return torch.cat(states), torch.tensor(labels)


class CriticalTokens(Route):
    """The fusion as a reshape of the aligned model's law.

    Args:
        aligned: The model at work.
        pretrained: The one that knows.
        router: Says which tokens are critical; a head is used with the threshold of the settings.
        settings: See :class:`Settings`.

    Raises:
        MismatchError: Their tokens write different bytes.
    """

    role: ClassVar[str] = "reshape"

    def __init__(
        self,
        aligned: Model,
        pretrained: Model,
        router: StateHead | Router,
        settings: Settings | None = None,
    ) -> None:
        self.settings = settings or Settings()
        if isinstance(router, StateHead):
            router = Classifier(router, above=self.settings.threshold)
        ends = aligned.target.model.generation_config.eos_token_id
        super().__init__(
            Member(pretrained.target, vocab=pretrained.tokenizer),
            router,
            greedy=True,
            keeps=[ends] if isinstance(ends, int) else list(ends or ()),
            vocab=aligned.tokenizer,
        )

    @property
    def law(self) -> Law:
        """The whole law: drawn where the aligned model speaks."""
        return Law(temperature=self.settings.temperature, reshapes=[self])


def f1(said: torch.Tensor, meant: torch.Tensor) -> float:
    """Harmonic mean of precision and recall of bool [M].

    Example:
        >>> f1(torch.tensor([True, True, False]), torch.tensor([True, False, False]))
        0.6666666666666666
    """
    both = int((said & meant).sum())
    return 2 * both / max(1, int(said.sum()) + int(meant.sum()))


@dataclass(frozen=True)
class Answers:
    """What answers to questions about the world were like.

    Attributes:
        right: Share that keep the manner and state the true value.
        manner: Share that keep the manner of the dialogues.
        known: Share that hold the true value, in whatever manner.
        distinct: distinct-2 of their tokens without values.
        tokens: Of each answer.
    """

    right: float
    manner: float
    known: float
    distinct: float
    tokens: list[list[int]]

    @classmethod
    def of(cls, asked: Sequence[facts.Fact], tokens: list[list[int]]) -> Answers:
        """Judge answers, as tokens."""
        true = facts.world()
        spoken = [facts.spoken(fact, each) for fact, each in zip(asked, tokens, strict=True)]
        values = [facts.encode(" ".join(true[fact])) for fact in asked]
        count = len(asked)
        return cls(
            sum(s == true[fact] for s, fact in zip(spoken, asked, strict=True)) / count,
            sum(s is not None for s in spoken) / count,
            sum(
                any(each[i : i + 2] == value for i in range(len(each)))
                for each, value in zip(tokens, values, strict=True)
            )
            / count,
            distinct([[t for t in each if not facts.is_of_value(t)] for each in tokens]),
            tokens,
        )


def answer(model: Model, asked: Sequence[facts.Fact], law: Law, seed: int = 5) -> Answers:
    """Ask a model about facts."""
    prompts = [facts.question(fact) for fact in asked]
    found = model.generate(prompts, max_new_tokens=24, drafter="none", law=law, seed=seed)
    return Answers.of(asked, [each.tokens for each in found])


def dialogues(count: int, seed: int, *, tuned: bool) -> list[tuple[list[int], list[bool]]]:
    """Dialogues with labels, about facts that the aligned model was tuned on or about all."""
    rng, values = random.Random(seed), facts.world(tuned)
    out = []
    for fact in rng.choices(sorted(values), k=count):
        asked, said = facts.question(fact), facts.answer(fact, values[fact], rng)
        out.append(([*asked, *said.tokens], [*[False] * len(asked), *said.critical]))
    return out


def claim(ruler: Ruler, scale: Scale = "small") -> Claim:
    """Facts that tuning on dialogues has damaged, with the pretrained model's help and without.

    Args:
        ruler: Not used: nothing here is a speed.
        scale: ``"small"`` asks for every fact of the world.
    """
    del ruler
    small = scale != "test"
    recipe = facts.RECIPE if small else replace(facts.RECIPE, steps=3, batch_size=2)
    pretrained, aligned = (
        Model(each.model, each.tokenizer, fast=False)
        for each in (
            load_checkpoint(str(facts.reference(which, recipe)), dtype="float32", device="cpu")
            for which in facts.MODELS
        )
    )
    asked = sorted(facts.world()) if small else sorted(facts.world())[:6]
    head = fit_classifier(aligned, dialogues(200 if small else 8, 1, tuned=True))
    states, meant = states_of(aligned, dialogues(200 if small else 8, 2, tuned=False))
    with torch.no_grad():
        quality = f1(head(states) > Settings().threshold, meant)

    drawn = answer(aligned, asked, Law(temperature=1.0))
    greedy = answer(aligned, asked, Law())
    source = answer(pretrained, asked, Law())
    ours = answer(aligned, asked, CriticalTokens(aligned, pretrained, head).law)
    told = Oracle(lambda ids: facts.decides(ids.tolist()))
    oracle = answer(aligned, asked, CriticalTokens(aligned, pretrained, told).law)
    off = answer(
        aligned, asked, CriticalTokens(aligned, pretrained, head, Settings(threshold=1.0)).law
    )
    gates = (
        Gate("planted damage: pretrained over aligned greedy", source.known - greedy.known, ">", 0),
        Gate("F1 of the classifier", quality, ">=", 0.9),
        Gate("facts over aligned drawing", ours.right - drawn.right, ">=", 0.10),
        Gate("facts over aligned greedy", ours.right - greedy.right, ">=", 0.03),
        Gate("manner, difference from aligned", abs(ours.manner - drawn.manner), "<=", 0.02),
        Gate(
            "distinct-2 outside values, relative difference from aligned",
            abs(ours.distinct / max(drawn.distinct, 1e-9) - 1),
            "<=",
            0.05,
        ),
        Gate("idea off: answers as drawn", float(off.tokens == drawn.tokens), "==", 1.0),
    )
    direction = (
        Gate("facts over aligned drawing", ours.right - drawn.right, ">", 0.0),
        Gate("facts over aligned greedy", ours.right - greedy.right, ">", 0.0),
        gates[-1],
    )
    status = judge(gates, direction)
    missed = ", ".join(gate.name for gate in gates if not gate.passed)
    return Claim(
        slug="critical-tokens",
        statement="When a pretrained model says the tokens that decide on the truth, an aligned "
        "one that has lost facts gets them right again, as polite and as varied as before.",
        paper_figure="large drops in hallucination on TriviaQA, NaturalQuestions and FActScore "
        "with diversity kept",
        rows=(
            Row(
                "facts right",
                "",
                drawn.right,
                ours.right,
                off.right,
                ceiling=oracle.right,
                control=greedy.right,
                note=f"{len(asked)} questions; baseline: aligned, drawn; control: aligned, greedy; "
                f"ceiling: true labels; pretrained alone knows {source.known:.3f}",
            ),
            Row(
                "manner kept",
                "",
                drawn.manner,
                ours.manner,
                off.manner,
                ceiling=oracle.manner,
                control=source.manner,
                note="control: pretrained, greedy",
            ),
            Row(
                "distinct-2 outside values",
                "",
                drawn.distinct,
                ours.distinct,
                off.distinct,
                control=greedy.distinct,
                note="control: aligned, greedy",
            ),
            Row("F1 of the classifier", "", None, quality, None),
        ),
        scale=scale,
        device="cpu",
        status=status,
        reason="" if status == "reproduced" else f"missed: {missed}",
        gates=gates,
        seeds=(1, 2, 5),
        notes=(
            f"{len(facts.world())} facts, of which the dialogues know {len(facts.world(True))} and "
            f"have {facts.WRONG_SHARE:.0%} of those wrong.",
            "Gentler tuning (120 steps at a quarter of the rate) and a classifier that "
            "learnt on other entities were tried too and came out worse: manner 0.10, facts"
            " right 0.102 against 0.408 greedy.",
        ),
    )
