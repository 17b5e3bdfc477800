"""Lexical Unit Decoding: emit at once the run of tokens that the model is sure of.

Paper: Sun, Gao, Wang, Liu, Wu, Huang. Lexical Units Decoding: Towards Accurate and Fast Parallel
    Decoding of Large Language Models. 2024. arXiv:2405.15208
Idea: Runs of tokens that the base model predicts with confidence are units; the model is tuned to
    emit the next unit in one forward over placeholders, and falls back to one token otherwise.
Differs: Ordinary and parallel samples are one batch: a text with placeholders behind some of its
    prefixes. The placeholder is a new token that can never be emitted. The thresholds are not the
    paper's, which were not at hand. The drafter of ``space`` reads the same placeholders, so a
    model tuned here can be decoded without loss too.
Lossless: no

    forward:   last token ── P ── P ── P       k - 1 placeholders
    emitted:        x1       x2   x3   x4      the first always, then while max p > beta
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch

from isthmus.claims import Claim, Gate, Row, Ruler, Scale, judge
from isthmus.decoding.generation import Generation
from isthmus.decoding.law import Law
from isthmus.decoding.model import as_list
from isthmus.decoding.stopping import Stopper
from isthmus.decoding.tree import TokenTree, chain_topology
from isthmus.errors import InvalidInputError, UnsupportedModelError
from isthmus.roles import Context, RoundTrace
from isthmus.training.drafting import Recipe
from isthmus.training.tuning import (
    IGNORED,
    PLACEHOLDER,
    Loss,
    add_placeholder,
    append_groups,
    held_out_loss,
    label_loss,
    logits_of,
    next_tokens,
    silence,
)
from isthmus.workbench import pycode
from isthmus.workbench.drafters import texts
from isthmus.workbench.tuned import RECIPE, agreement, docstring_prompts, tuned, with_placeholder


@dataclass(frozen=True)
class Settings:
    """Settings of Lexical Unit Decoding.

    Attributes:
        longest: Tokens k of a unit at most, and of a forward.
        alpha: A token belongs to a run when the base model gives it at least this much.
        beta: A token behind the first is emitted when its probability exceeds this; 1 emits one
            token a forward.
        groups: Units of a training text that are learnt as a whole.
        unit_weight: Weight of their loss beside the next-token loss.
        learn_units: The idea; off, the model is tuned plainly and its placeholders say little.
    """

    longest: int = 4
    alpha: float = 0.5
    beta: float = 0.9
    groups: int = 8
    unit_weight: float = 1.0
    learn_units: bool = True

    def __post_init__(self) -> None:
        if self.longest < 2 or self.groups < 1 or self.unit_weight < 0:
            raise InvalidInputError(
                f"units need longest >= 2, groups >= 1 and a weight of 0 or more, got {self}"
            )
        if not (0 <= self.alpha <= 1 and 0 <= self.beta <= 1):
            raise InvalidInputError(
                f"alpha and beta are probabilities, got {self.alpha} and {self.beta}"
            )


def unit_starts(
    confident: torch.Tensor, longest: int, ends: torch.Tensor | None = None
) -> torch.Tensor:
    """Cut texts into units: maximal runs of confident tokens, other tokens alone (sec. 3.1).

    Args:
        confident: Whether the base model was sure of each token, bool [B, T].
        longest: Longer runs are cut into pieces of this size.
        ends: End-of-text tokens, bool [B, T]; a unit ends with one.

    Returns:
        Where a unit starts, bool [B, T]; the first token starts one.

    Example:
        >>> sure = torch.tensor([[0, 1, 1, 1, 0, 0, 1]]).bool()
        >>> unit_starts(sure, 2).int().tolist()
        [[1, 1, 0, 1, 1, 1, 1]]
    """
    joined = confident[:, 1:] & confident[:, :-1]
    if ends is not None:
        joined &= ~ends[:, :-1]
    start = torch.nn.functional.pad(~joined, (1, 0), value=True)
    place = torch.arange(start.shape[1], device=start.device).expand_as(start)
    first = torch.where(start, place, 0).cummax(1).values
    return (place - first) % longest == 0


def unit_lengths(starts: torch.Tensor) -> torch.Tensor:
    """Tokens from each place to the end of its unit, that place included, int64 [B, T]."""
    t = starts.shape[1]
    place = torch.arange(t, device=starts.device).expand_as(starts)
    following = torch.where(starts, place, t)[:, 1:].flip(1).cummin(1).values.flip(1)
    return torch.nn.functional.pad(following, (0, 1), value=t) - place


class LexicalUnits:
    """Decode with a model that was tuned to emit units.

    Args:
        target: The model.
        token: Its placeholder.
        settings: See :class:`Settings`.
        ends: Tokens that end an answer.
        tokenizer: For the text of the result.
    """

    role: ClassVar[str] = "strategy"
    name = "lexical-units"
    tuning_settings: ClassVar[tuple[str, ...]] = (
        "longest",
        "alpha",
        "groups",
        "unit_weight",
        "learn_units",
    )

    def __init__(
        self,
        target: Any,
        token: int,
        settings: Settings | None = None,
        ends: Sequence[int] = (),
        tokenizer: Any = None,
    ) -> None:
        if target.encoder_decoder or target.reach == "step":
            raise UnsupportedModelError(
                f"{type(target.model).__name__} cannot read placeholders behind a text; "
                "lexical-units needs a decoder-only model with attention layers"
            )
        self.settings = settings or Settings()
        self.target, self.token, self.tokenizer = target, token, tokenizer
        self.ends = tuple(ends)
        silence(target.model, token)

    @classmethod
    def for_model(cls, model: Any, settings: Settings | None = None) -> Self:
        """The strategy of a model that was tuned to emit units.

        Raises:
            InvalidInputError: The model has no placeholder token.
            UnsupportedModelError: The model is no decoder of attention layers.
        """
        token = getattr(model.target.config, PLACEHOLDER, None)
        if token is None:
            raise InvalidInputError(
                "lexical-units needs a model that was tuned to emit units, and this one has no "
                f"{PLACEHOLDER} in its config; tune a copy with isthmus.workbench.tuned"
            )
        ends = as_list(model.target.model.generation_config.eos_token_id)
        return cls(model.target, token, settings, ends, model.tokenizer)

    @classmethod
    def fine_tuning(cls, model: Any, settings: Settings) -> Loss:
        """Next tokens, and whole units behind placeholders (sec. 3.2)."""
        base = copy.deepcopy(model).eval()
        end = torch.tensor(as_list(model.config.eos_token_id), dtype=torch.int64)
        token = add_placeholder(model)

        def loss(ids: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
            t, labels = ids.shape[1], next_tokens(ids)
            if not settings.learn_units:
                return label_loss(logits_of(model, ids), labels)
            with torch.no_grad():
                law = torch.softmax(logits_of(base, ids[:, :-1]), -1)
            gold = law.gather(2, ids[:, 1:, None])[..., 0]
            sure = torch.nn.functional.pad(gold >= settings.alpha, (1, 0))
            starts = unit_starts(sure, settings.longest, torch.isin(ids, end.to(ids.device)))
            lengths = unit_lengths(starts)
            # units of one token have nothing to learn and are drawn only where no other is left
            worth = (starts & (lengths > 1)).float() + 1e-6
            worth[:, 0] = 0  # no token stands before it
            first = torch.multinomial(worth, settings.groups, True, generator=generator)
            g = append_groups(ids, first - 1, settings.longest - 1, token, torch.float32)
            step = torch.arange(1, settings.longest, device=ids.device)
            inside = step < lengths.gather(1, first)[..., None]
            wanted = torch.where(inside, g.labels, IGNORED).flatten(1)
            logits = logits_of(model, g.ids, attention_mask=g.mask, position_ids=g.positions)
            plain = label_loss(logits[:, :t], labels)
            return plain + settings.unit_weight * label_loss(logits[:, t:], wanted)

        return loss

    def generate(
        self,
        ids: torch.Tensor,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int | None = None,
        ignore_end: bool = False,
    ) -> Generation:
        """Decode one prompt (sec. 3.3).

        Args:
            ids: int64 [T], T >= 1.
            max_new_tokens: Budget.
            temperature: For the first token of each forward; the others are the likeliest ones.
            seed: Seed of the draws.
            ignore_end: Do not stop at end tokens, for measurements.

        Raises:
            InvalidInputError: An empty prompt, or no budget.
        """
        if len(ids) == 0 or max_new_tokens < 1:
            raise InvalidInputError("give at least one prompt token and one token to write")
        s, target, begin = self.settings, self.target, time.perf_counter()
        law = Law(temperature=temperature)
        generator = torch.Generator(target.device)
        generator.manual_seed(generator.seed() if seed is None else seed)
        stopper = Stopper(max_new_tokens=max_new_tokens, end_tokens=() if ignore_end else self.ends)
        result = Generation(lossless=False, drafter=self.name, prompt_tokens=len(ids))
        context = Context(ids[None], [len(ids)], [len(ids)], law, generator, [0])
        session = target.session(1)
        if len(ids) > 1:
            session.prefill([ids[:-1]])
        pending = ids[-1:].tolist()
        limit = target.max_length or len(ids) + max_new_tokens
        while not result.finish_reason:
            past = len(ids) + len(result.tokens)
            room = min(limit - past, max_new_tokens - len(result.tokens), s.longest)
            if room < 1:  # the context is full
                result.finish_reason = "length"
                break
            block = [*pending, *[self.token] * (room - 1)]
            tree = TokenTree(
                torch.tensor([block], device=target.device), chain_topology(len(block))
            )
            logits = session.score(tree).logits[:, len(pending) - 1 :].float()  # [1, room, V]
            session.keep(torch.arange(len(pending), device=target.device)[None])
            root = TokenTree.root(torch.tensor([pending[-1]], device=target.device))
            probs = law.probs(logits[:, :1], root, context)[0]
            first = probs.argmax(-1)
            if not law.greedy:
                first = torch.multinomial(probs, 1, generator=generator)[0]
            sure = torch.softmax(logits[0, 1:], -1).max(-1)
            count = int((sure.values > s.beta).long().cumprod(0).sum())
            new = [int(first), *sure.indices[:count].tolist()]
            new = new[: stopper.cut(result.tokens, new)]
            result.tokens += new
            result.finish_reason = stopper.reason
            pending = new
            result.stats.target_forwards += 1
            result.stats.drafted += room - 1
            result.stats.accepted += len(new) - 1
            result.rounds.append(RoundTrace(self.name, room - 1, len(new) - 1, len(new)))
        result.stats.new_tokens = len(result.tokens)
        result.stats.seconds = time.perf_counter() - begin
        if self.tokenizer is not None:
            result.text = self.tokenizer.decode(result.tokens, skip_special_tokens=True)
        return result


@dataclass(frozen=True)
class Point:
    """One threshold: share of forwards saved, and of tokens that greedy decoding would write."""

    beta: float
    saved: float
    agreement: float


def sweep(
    model: Any,
    prompts: Sequence[Sequence[int]],
    settings: Settings,
    betas: Sequence[float],
    new: int,
) -> list[Point]:
    """Forwards saved and agreement at each threshold."""
    points = []
    for beta in betas:
        own = Settings(**{**vars(settings), "beta": beta})
        strategy = LexicalUnits.for_model(model, own)
        forwards, same = 0, []
        for prompt in prompts:
            ids = torch.tensor(list(prompt))
            result = strategy.generate(ids, max_new_tokens=new, ignore_end=True)
            forwards += result.stats.target_forwards
            same += agreement(model, ids, result.tokens)
        points.append(Point(beta, 1 - forwards / len(same), sum(same) / len(same)))
    return points


def claim(ruler: Ruler, scale: Scale = "small") -> Claim:
    """Tune a reference model to emit units and sweep the threshold beta.

    Args:
        ruler: The clock; not used, no gate is a time.
        scale: ``"small"`` is 24 + 12 prompts of 24 tokens, ``"test"`` 2 + 1 of 6 and a short
            training.
    """
    small = scale != "test"
    recipe = RECIPE if small else Recipe(steps=2, batch_size=2)
    count, new = (24, 24) if small else (2, 6)
    betas = (1.0, 0.9, 0.8, 0.6, 0.4) if small else (1.0, 0.5, 0.0)
    own, off = Settings(), Settings(learn_units=False)
    model, plain = tuned("lexical-units", own, recipe=recipe), tuned(None, recipe=recipe)
    control = with_placeholder(plain)  # what learn_units=False trains
    code = pycode.prompts(count, model.tokenizer, 48)
    prompts = code + docstring_prompts(count // 2, model.tokenizer, 48)
    curve = sweep(model, prompts, own, betas, new)
    # an untrained placeholder is rarely sure of anything: lower thresholds find its points
    lower = (*betas, 0.2, 0.1, 0.0) if small else betas
    without = sweep(control, prompts, off, lower, new)
    fast = [p for p in curve if p.saved >= 0.25]
    best = max(fast or curve[-1:], key=lambda p: p.agreement)
    peer = max([p for p in without if p.saved >= 0.25] or without[-1:], key=lambda p: p.agreement)
    greedy = curve[0]
    held_out, rows = texts(length=96, split="held-out"), 256 if small else 8
    loss, loss_off = (held_out_loss(m.target.model, held_out, rows=rows) for m in (model, control))
    gates = (
        Gate("agreement at beta = 1", greedy.agreement, "==", 1.0),
        Gate("forwards saved at beta = 1", greedy.saved, "==", 0.0),
        Gate("forwards saved", best.saved, ">=", 0.25),
        Gate("agreement with greedy there", best.agreement, ">=", 0.97),
        Gate("agreement over untrained placeholders", best.agreement - peer.agreement, ">=", 0.1),
    )
    direction = (*gates[:3], gates[4])
    unit = "share"
    return Claim(
        slug="lexical-units",
        statement="A model tuned to emit units saves a quarter of its forwards while 97% of its "
        "tokens are those of its greedy decoding; untrained placeholders are far worse.",
        paper_figure="33% faster on natural language without loss, 30% on code with a loss of 3%",
        rows=(
            Row(
                "forwards saved",
                unit,
                0.0,
                best.saved,
                peer.saved,
                note=f"beta {best.beta:g}; off: placeholders not trained, beta {peer.beta:g}",
            ),
            Row(
                "agreement with the model's own greedy token",
                unit,
                1.0,
                best.agreement,
                peer.agreement,
                note="lossy: the price of the line above",
            ),
            *(
                Row(
                    f"agreement at beta {p.beta:g}",
                    unit,
                    None,
                    p.agreement,
                    q.agreement,
                    note=f"saved {p.saved:.1%}, off {q.saved:.1%}",
                )
                for p, q in zip(curve, without, strict=False)
            ),
            Row(
                "held-out loss",
                "nats/token",
                loss_off,
                loss,
                loss_off,
                note="baseline: plain tuning on the same tokens",
            ),
        ),
        scale=scale,
        device="cpu",
        status=judge(gates, direction),
        notes=(
            f"Lossy. {len(prompts)} prompts of 48 tokens, {len(prompts) - count} of them end where "
            f"a docstring begins; {new} new tokens each. Both models: {recipe.steps} steps of "
            f"{recipe.batch_size} x {recipe.sequence_length} tokens.",
        ),
        gates=gates,
        seeds=(0,),
    )
