"""MuMo: an output head over larger units of one language, judged by the model's own head.

Paper: Hong, Lee, Cho. A Simple Framework to Accelerate Multilingual Language Model for Monolingual
    Text Generation. 2024. arXiv:2401.10660
Idea: Graft a head that predicts whole units of a language whose letters the tokenizer shatters;
    its best candidates are scored by the original head in one forward, and one is kept whole.
Differs: How candidates of unlike length are compared is a setting (isthmus.decoding.phrases). The
    default compares them at the token where they part, which is stricter than comparing their
    probabilities: the original head has to say each token of a unit itself. Only units that begin
    with its next token are candidates, and that token alone is the fallback for other text. The
    layer before the new rows is gated, residual and starts at zero.
Lossless: no

    f_t ──> law over U units ──> top k ──> s(u_1) .. s(u_k), one tree ──> one forward
                                              └ original head: keep one of them whole
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from operator import eq
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar, Self

import torch

from isthmus.claims import Claim, Gate, Row, Ruler, Scale, judge, ratio
from isthmus.decoding.generation import Generation
from isthmus.decoding.law import Law
from isthmus.decoding.model import Model, as_list
from isthmus.decoding.phrases import RULES, Phrases, Rule, said_after, step_scores
from isthmus.decoding.stopping import Stopper
from isthmus.decoding.tree import TokenTree
from isthmus.errors import InvalidInputError, UnsupportedModelError
from isthmus.roles import Context, RoundTrace, Scores, Taps
from isthmus.surgery.units import (
    CONFIG,
    ROWS,
    Rows,
    UnitHead,
    Units,
    held_out_loss,
    places,
    train_head,
)
from isthmus.training.drafting import Recipe
from isthmus.workbench import korean
from isthmus.workbench.bench import reference_model

FINAL = Taps(final=True)


@dataclass(frozen=True)
class Settings:
    """Settings of MuMo.

    Attributes:
        candidates: Units k that are judged.
        rule: How they are compared; see :mod:`isthmus.decoding.phrases`.
        floor: Least geometric mean of a unit's token probabilities, for ``product`` and ``mean``.
        size: Units and single characters of the vocabulary that is learnt.
        rows: How the head's rows start.
        use_units: The idea; off, the original head's next token is the only candidate.
    """

    candidates: int = 10
    rule: Rule = "part"
    floor: float = 0.5
    size: int = 128
    rows: Rows = "mean"
    use_units: bool = True

    def __post_init__(self) -> None:
        if self.candidates < 1 or self.size < 2:
            raise InvalidInputError(f"mumo needs candidates >= 1 and a size >= 2, got {self}")
        if self.rule not in RULES or self.rows not in ROWS or not 0 < self.floor <= 1:
            raise InvalidInputError(
                f"rule is one of {', '.join(RULES)}, rows one of {', '.join(ROWS)} and floor a "
                f"probability above 0, got {self.rule!r}, {self.rows!r} and {self.floor}"
            )


RECIPE = Recipe(steps=300, batch_size=256, learning_rate=3e-3)
"""How a head is trained unless told otherwise; a batch holds places, not texts."""


class Mumo:
    """Strategy: append one unit, or one token, a forward.

    Args:
        head: The grafted head, which knows its model.
        settings: See :class:`Settings`.
        ends: Tokens that end an answer; those of the model when None.
        tokenizer: For the text of the result.

    Raises:
        UnsupportedModelError: The model has an encoder or cannot score trees.
    """

    role: ClassVar[str] = "strategy"
    name = "mumo"

    def __init__(
        self,
        head: UnitHead,
        settings: Settings | None = None,
        ends: Sequence[int] | None = None,
        tokenizer: Any = None,
    ) -> None:
        target = head.target
        if target.encoder_decoder or target.reach != "tree":
            raise UnsupportedModelError(
                f"{type(target.model).__name__} cannot score a tree of candidates; mumo needs a "
                "decoder-only model whose layers all have full or windowed attention"
            )
        self.settings = settings or Settings()
        self.head, self.target, self.tokenizer = head, target, tokenizer
        own = target.model.generation_config.eos_token_id
        self.ends = tuple(as_list(own) if ends is None else ends)

    @classmethod
    def for_model(cls, model: Any, settings: Settings | None = None) -> Self:
        """Read the head that lies beside the model's own files.

        Raises:
            InvalidInputError: There is none, or the model has no tokenizer.
            IsthmusError: It cannot be read or belongs to another model.
        """
        hub = getattr(model.target, "model", None)
        folder = Path(getattr(hub, "name_or_path", "") or ".")
        if model.tokenizer is None or not (folder / CONFIG).exists():
            raise InvalidInputError(
                f"mumo needs a tokenizer and a head over units, and the model's folder holds no "
                f"{CONFIG}; make one with Mumo.graft(model, texts).head.save_pretrained(folder)"
            )
        head = UnitHead.from_pretrained(folder, model.target, model.tokenizer)
        return cls(head, settings, tokenizer=model.tokenizer)

    @classmethod
    def graft(
        cls,
        model: Model,
        texts: Sequence[str],
        settings: Settings | None = None,
        recipe: Recipe = RECIPE,
    ) -> Self:
        """Learn units and train a head for them, the model frozen.

        Args:
            model: The model and its tokenizer.
            texts: Texts that hold the language, among others.
            settings: See :class:`Settings`.
            recipe: How the head is trained.

        Raises:
            InvalidInputError: The texts hold nothing to learn units from, or a segmentation does
                not survive a round trip.
        """
        settings = settings or Settings()
        units = Units.learn(texts, model.tokenizer, settings.size)
        head = UnitHead(model.target, units, rows=settings.rows, seed=recipe.seed)
        train_head(head, places(model.target, units, texts), recipe)
        return cls(head, settings, tokenizer=model.tokenizer)

    @torch.no_grad()
    def generate(
        self,
        ids: torch.Tensor,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int | None = None,
        ignore_end: bool = False,
    ) -> Generation:
        """Decode one prompt.

        Args:
            ids: int64 [T], T >= 1.
            max_new_tokens: Budget in the model's tokens.
            temperature: 0 is greedy.
            seed: Seed of the draws.
            ignore_end: Do not stop at end tokens, for measurements.

        Raises:
            InvalidInputError: An empty prompt, or no budget.
        """
        if len(ids) == 0 or max_new_tokens < 1:
            raise InvalidInputError("give at least one prompt token and one token to write")
        target, begin = self.target, time.perf_counter()
        ends = () if ignore_end else self.ends
        generator = torch.Generator(target.device)
        generator.manual_seed(generator.seed() if seed is None else seed)
        law = Law(temperature=temperature)
        stopper = Stopper(max_new_tokens=max_new_tokens, end_tokens=ends)
        result = Generation(lossless=False, drafter=self.name, prompt_tokens=len(ids))
        context = Context(ids[None], [len(ids)], [len(ids)], law, generator, [0])
        session = target.session(1)
        if len(ids) > 1:
            session.prefill([ids[:-1]])
        limit = target.max_length or len(ids) + max_new_tokens
        tree = TokenTree.root(ids[-1:].to(target.device))
        scores = session.score(tree, taps=FINAL)
        result.stats.target_forwards, node = 1, 0
        while not result.finish_reason:
            room = min(limit - len(ids), max_new_tokens) - len(result.tokens)
            if room < 1:  # the context is full
                result.finish_reason = "length"
                break
            first, drafted = said_after(scores.logits, tree, context)[node], 0
            if first in ends:
                new = [first]
            else:
                paths = self.candidates(scores, node, first, room)
                tree = TokenTree.from_paths(int(tree.tokens[0, node]), paths).to(target.device)
                scores = session.score(tree, taps=FINAL)
                phrases = Phrases(tree, paths, step_scores(scores.logits, tree, context))
                said = [first, *said_after(scores.logits, tree, context)[1:]]
                path = phrases.choose(
                    self.settings.rule,
                    said,
                    floor=self.settings.floor,
                    generator=None if law.greedy else generator,
                )
                # the last token stays outside the cache: it is the next root
                session.keep(torch.tensor([[0, *path[:-1]]], device=target.device))
                new, node, drafted = tree.tokens[0, path].tolist(), path[-1], tree.nodes - 1
                result.stats.target_forwards += 1
            new = new[: stopper.cut(result.tokens, new)]
            result.tokens += new
            result.finish_reason = stopper.reason
            result.stats.drafted += drafted
            result.stats.accepted += len(new)
            result.rounds.append(RoundTrace(self.name, drafted, len(new), len(new)))
        result.stats.new_tokens = len(result.tokens)
        result.stats.seconds = time.perf_counter() - begin
        if self.tokenizer is not None:
            result.text = self.tokenizer.decode(result.tokens, skip_special_tokens=True)
        return result

    def candidates(self, scores: Scores, node: int, first: int, room: int) -> list[list[int]]:
        """Token paths to be judged: the fallback, and the best units that begin with it.

        Args:
            scores: Of the last forward.
            node: Where the text ends in it.
            first: The original head's next token.
            room: Tokens that a candidate may have.
        """
        if not self.settings.use_units:
            return [[first]]
        assert scores.features is not None and scores.features.final is not None
        units = self.head.units
        fit = ((units.lengths <= room) & (units.firsts == first)).nonzero()[:, 0]
        logits = self.head(scores.features.final[0, node])[fit.to(self.target.device)]
        best = logits.topk(min(self.settings.candidates, len(fit))).indices.cpu()
        return [[first], *(list(units.segments[u]) for u in fit[best].tolist())]


class _Arm:
    """What one way of decoding did on all lines."""

    def __init__(self, results: Sequence[Generation], lines: Sequence[korean.Line]) -> None:
        forwards = sum(r.stats.target_forwards for r in results)
        self.per_character = forwards / max(1, sum(len(r.text) for r in results))
        self.nodes = sum(r.stats.drafted for r in results) / forwards
        self.exact = 100 * fmean(r.text == x.answer for r, x in zip(results, lines, strict=True))
        self.tokens = [r.tokens for r in results]


def claim(ruler: Ruler, scale: Scale = "small") -> Claim:
    """Read dates, times and numbers out in Korean with a model whose tokens are those of code.

    Args:
        ruler: The clock.
        scale: ``"small"`` is 200 lines and heads of three seeds, ``"test"`` 6 and one.
    """
    small = scale != "test"
    count, many, seeds = (200, 2000, (0, 1, 2)) if small else (6, 60, (0,))
    recipe = RECIPE if small else Recipe(steps=20, batch_size=64, learning_rate=3e-3)
    model = reference_model("korean")
    target: Any = model.target
    texts = [line.text for line in korean.lines(many, "train", seed="mumo")]
    held_out = [line.text for line in korean.lines(count, seed="mumo loss")]
    lines = korean.lines(count, seed="mumo")
    units = Units.learn(texts, model.tokenizer, Settings().size)
    data, judged = (places(target, units, some) for some in (texts, held_out))

    def taught(rows: Rows, seed: int) -> tuple[UnitHead, list[float]]:
        """A head, and its held-out loss after each tenth of the training, the start first."""
        made = UnitHead(target, units, rows=rows, seed=seed)
        curve = [held_out_loss(made, judged)]

        def report(step: int, _: float) -> None:
            if step % max(1, recipe.steps // 10) == 0:
                curve.append(held_out_loss(made, judged))

        train_head(made, data, replace(recipe, seed=seed), report)
        return made, curve

    runs = {rows: [taught(rows, seed) for seed in seeds] for rows in ROWS}
    curves = {
        rows: [fmean(x) for x in zip(*(c for _, c in runs[rows]), strict=True)] for rows in ROWS
    }
    head = runs["mean"][0][0]

    def plain(some: Sequence[korean.Line]) -> list[Generation]:
        return [model.generate(x.prompt, max_new_tokens=64, drafter="none") for x in some]

    def read(
        some: Sequence[korean.Line], settings: Settings | None = None, own: UnitHead = head
    ) -> list[Generation]:
        strategy = Mumo(own, settings, tokenizer=model.tokenizer)
        return [strategy.generate(model.encode(x.prompt), max_new_tokens=64) for x in some]

    standard, ours, off, product, mean, control = (
        _Arm(results, lines)
        for results in (
            plain(lines),
            read(lines),
            read(lines, Settings(use_units=False)),
            read(lines, Settings(rule="product")),
            read(lines, Settings(rule="mean")),
            read(lines, own=UnitHead(target, units)),
        )
    )
    few = lines[: max(3, count // 10)]
    timed = ruler.compare(
        {"plain": lambda: plain(few), "ours": lambda: read(few)}, repeats=5 if small else 1
    )
    faster = ratio(timed["plain"], timed["ours"])
    spread = f"wall time, {faster.low:.2f} to {faster.high:.2f}; no gate"

    def same(some: _Arm) -> float:
        return 100 * fmean(map(eq, some.tokens, standard.tokens))

    def columns(value: Callable[[_Arm], float]) -> tuple[float, float, float]:
        return value(standard), value(ours), value(off)

    fewer = standard.per_character / ours.per_character
    lost = standard.exact - ours.exact
    worse = fmean(curves["random"][1:]) - fmean(curves["mean"][1:])
    gates = (
        Gate("target forwards a character, standard over ours", fewer, ">=", 1.6),
        Gate("points of exact match lost", lost, "<=", 2.0),
        Gate("held-out nats of random rows over mean rows while they train", worse, ">", 0.0),
    )
    return Claim(
        slug="mumo",
        statement="A head over units writes a language that the tokenizer shatters with 1.6 times "
        "fewer forwards a character, exact match within 2 points of standard decoding; rows that "
        "start as the mean of their tokens' rows train better than random ones.",
        paper_figure="1.9 times standard decoding, Korean and Japanese, quality kept",
        rows=(
            Row(
                "target forwards",
                "forwards/character",
                *columns(lambda a: a.per_character),
                control=control.per_character,
                note=f"{fewer:.2f} times fewer, {ours.nodes:.1f} tree nodes a forward; product "
                f"{product.per_character:.3f}, mean {mean.per_character:.3f}; control: untrained",
            ),
            Row(
                "exact match",
                "%",
                *columns(lambda a: a.exact),
                control=control.exact,
                note=f"product {product.exact:.1f}, mean {mean.exact:.1f}",
            ),
            Row(
                "answers equal to standard decoding",
                "%",
                *columns(same),
                note=f"product {same(product):.1f}, mean {same(mean):.1f}",
            ),
            Row(
                "held-out loss over the training",
                "nats",
                None,
                fmean(curves["mean"][1:]),
                fmean(curves["random"][1:]),
                note="off: random rows; start, a tenth, half and end: "
                + "; ".join(
                    ", ".join(f"{c[i]:.3f}" for i in (0, 1, 5, 10)) for c in curves.values()
                ),
            ),
            Row("speed-up", "x", 1.0, faster.median, None, note=spread),
        ),
        scale=scale,
        device="cpu",
        status=judge(gates, gates[1:]),
        notes=(
            f"{count} held-out lines; {len(units)} units of {units.lengths.float().mean():.1f} "
            f"tokens; {recipe.steps} steps of {recipe.batch_size} of {len(data.choices):,} places.",
        ),
        gates=gates,
        seeds=seeds,
    )
