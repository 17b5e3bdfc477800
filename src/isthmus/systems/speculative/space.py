"""SPACE: the model fills masks behind its own guesses while it checks them.

Paper: Yi, Lin, Li, Wu, Yu, Wang, Tian, Liang. Generation Meets Verification: Accelerating Large
    Language Model Inference with Smart Parallel Auto-Correct Decoding. 2024. arXiv:2402.11809
Idea: Tune the model to fill k mask tokens behind any prefix; one forward then verifies the last
    round's guesses and, from the masks behind the accepted one, takes the next round's.
Differs: Several prefixes of each training text get masks at once. Guesses are the likeliest
    tokens, verified by matching under sampling too; the published decoder redraws from p after a
    rejection, which is biased. A target that scores chains only checks and fills in turn.
Lossless: yes

    round:   root ── c1 ── c2 ── ... ── ck        the guesses, a chain
               │      │     │             └ m m m m m
               │      │     └ m m m m m           masks see their own node's path and each other
               │      └ m m m m m
               └ m m m m m                        k (k + 2) rows besides the root
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar, Self

import torch

from isthmus import registry
from isthmus.claims import Claim, Gate, Row, Ruler, Scale, judge
from isthmus.decoding.policy import Fixed
from isthmus.decoding.tree import TokenTree, Topology, chain_topology
from isthmus.errors import InvalidInputError
from isthmus.roles import Context, Shape, Step, Target
from isthmus.training.drafting import Recipe
from isthmus.training.tuning import (
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
from isthmus.workbench.drafters import target_model, texts
from isthmus.workbench.tuned import RECIPE, answer_together, tuned, with_placeholder


@dataclass(frozen=True)
class Settings:
    """Settings of SPACE, with the paper's defaults.

    Attributes:
        masks: Masks k of a group, and guesses of a round.
        groups: Prefixes of a training text that get masks.
        mask_weight: Weight of the masks' loss beside the next-token loss.
        fill: Train the masks (the idea); off, the model is tuned plainly and its masks say little.
    """

    masks: int = 5
    groups: int = 8
    mask_weight: float = 1.0
    fill: bool = True

    def __post_init__(self) -> None:
        if self.masks < 1 or self.groups < 1 or self.mask_weight < 0:
            raise InvalidInputError(
                f"space needs masks and groups of at least 1 and a weight of 0 or more, got {self}"
            )


class Space:
    """Drafter that reads its guesses off mask rows of the verification forward.

    Args:
        settings: See :class:`Settings`.
        mask_token: The mask; the target's last token when None.

    Example:
        >>> Space().default_shape
        Shape(nodes=35, depth=10, width=2)
    """

    role: ClassVar[str] = "drafter"
    name = "space"
    tuning_settings: ClassVar[tuple[str, ...]] = ("masks", "groups", "mask_weight", "fill")

    def __init__(self, settings: Settings | None = None, mask_token: int | None = None) -> None:
        self.settings = settings or Settings()
        self._given, self._mask = mask_token, -1
        self._guesses = torch.empty(0, 0, dtype=torch.int64)  # [B, <= k], -1 where there is none

    @classmethod
    def for_model(cls, model: Any, settings: Settings | None = None) -> Self:
        """The drafter of a model that was tuned to fill masks.

        Raises:
            InvalidInputError: The model has no mask token.
        """
        token = getattr(model.target.config, PLACEHOLDER, None)
        if token is None:
            raise InvalidInputError(
                "space needs a model that was tuned to fill masks, and this one has no "
                f"{PLACEHOLDER} in its config; tune a copy with isthmus.workbench.tuned"
            )
        silence(model.target.model, token)
        return cls(settings, token)

    @classmethod
    def fine_tuning(cls, model: Any, settings: Settings) -> Loss:
        """Semi-autoregressive fine-tuning (sec. 3.1): next tokens, and masks behind prefixes."""
        token = add_placeholder(model)

        def loss(ids: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
            b, t = ids.shape
            if not settings.fill:
                return label_loss(logits_of(model, ids), next_tokens(ids))
            shape = (b, settings.groups)  # the last two places have nothing to fill in
            ends = torch.randint(0, t - 2, shape, generator=generator, device=ids.device)
            g = append_groups(ids, ends, settings.masks, token, torch.float32)
            logits = logits_of(model, g.ids, attention_mask=g.mask, position_ids=g.positions)
            plain = label_loss(logits[:, :t], next_tokens(ids))
            return plain + settings.mask_weight * label_loss(logits[:, t:], g.labels.flatten(1))

        return loss

    @property
    def default_shape(self) -> Shape:
        """So many guesses, k, and k + 1 groups of k masks."""
        k = self.settings.masks
        return Shape(k * (k + 2), 2 * k, 2)

    def begin(self, context: Context, target: Target, **inputs: Any) -> None:
        """Start without guesses: the first round only fills masks behind the root."""
        self._mask = target.vocab_size - 1 if self._given is None else self._given
        self._guesses = torch.full((context.batch, 0), -1)

    def propose(self, context: Context, shape: Shape) -> TokenTree:
        """The guesses as a chain with a group of masks behind each (sec. 3.2)."""
        k, roots = self.settings.masks, context.roots()
        known = self._guesses.shape[1]
        if shape.width == 1:
            count = min(known, shape.nodes, shape.depth)
            sizes = (0,) * count + (min(k, shape.nodes - count, shape.depth - count),)
        else:
            count, sizes = plan(known, k, shape)
        tokens = torch.full((context.batch, 1 + count + sum(sizes)), self._mask)
        tokens[:, 0], tokens[:, 1 : count + 1] = roots, self._guesses[:, :count].clamp(min=0)
        tree = TokenTree(tokens, layout(sizes))
        real = self._guesses[:, :count] >= 0
        if bool(real.all()):
            return tree
        # a row without guesses has masks behind its root only
        lost = torch.zeros_like(tokens, dtype=torch.bool)
        lost[:, 1 : count + 1] = ~real
        return tree.prune(~(tree.topology.ancestors & lost[:, None, :]).any(-1), closed=True)

    def observe(self, step: Step) -> None:
        """The group behind the last accepted token foretells what follows the new root."""
        tree, path = step.tree, step.verdict.path
        parent = tree.topology.parent.expand_as(tree.tokens)
        rows = torch.arange(tree.batch, device=path.device)
        node = path.gather(1, (path >= 0).sum(1, keepdim=True) - 1)[:, 0]
        masks = (tree.tokens == self._mask) & tree.alive
        alive = torch.ones_like(node, dtype=torch.bool)
        guesses = []
        for _ in range(self.settings.masks):
            below = masks & (parent == node[:, None])  # at most one in each row
            alive = alive & below.any(1)
            if not bool(alive.any()):
                break
            node = torch.where(alive, below.long().argmax(1), node)
            logits = step.logits[rows, node].clone()
            logits[:, self._mask] = -torch.inf
            guesses.append(torch.where(alive, logits.argmax(-1), -1).cpu())
        self._guesses = torch.stack(guesses, 1) if guesses else torch.full((tree.batch, 0), -1)

    def select(self, rows: Sequence[int]) -> None:
        """Keep the guesses of the given rows."""
        self._guesses = self._guesses[list(rows)]


def plan(known: int, masks: int, shape: Shape) -> tuple[int, tuple[int, ...]]:
    """How many guesses to check, and how many masks to put behind the root and each of them.

    Example:
        >>> plan(5, 5, Shape(35, 10, 2)), plan(2, 2, Shape(4, 9, 2)), plan(2, 2, Shape(9, 2, 2))
        ((5, (5, 5, 5, 5, 5, 5)), (1, (1, 1)), (2, (2, 1, 0)))
    """
    for size in range(masks, 0, -1):
        count = min(known, size, shape.depth)
        sizes = tuple(min(size, shape.depth - depth) for depth in range(count + 1))
        if count + sum(sizes) <= shape.nodes:
            return count, sizes
    return 0, (min(masks, shape.nodes, shape.depth),)


@lru_cache(maxsize=256)
def layout(sizes: tuple[int, ...]) -> Topology:
    """Parent links: root, chain of guesses, then the masks of each node in turn."""
    count = len(sizes) - 1
    parents = list(range(-1, count))
    for node, size in enumerate(sizes):
        for step in range(size):
            parents.append(node if step == 0 else len(parents) - 1)
    topology = Topology.of(parents)
    return chain_topology(len(parents)) if topology.is_chain else topology


def claim(ruler: Ruler, scale: Scale = "small") -> Claim:
    """Tune a reference model to fill masks, decode with it, compare with Jacobi decoding.

    Args:
        ruler: The clock; not used, no gate is a time.
        scale: ``"small"`` is 64 held-out prompts of 16 tokens, ``"test"`` 4 of 6 and a short
            training.
    """
    small = scale != "test"
    # masks are new to the model: they take three times the steps that other tunings need
    recipe = replace(RECIPE, steps=3 * RECIPE.steps) if small else Recipe(steps=2, batch_size=2)
    count, new = (64, 16) if small else (4, 6)
    model, plain, base = tuned("space", recipe=recipe), tuned(None, recipe=recipe), target_model()
    off = with_placeholder(plain)  # what Settings(fill=False) trains
    prompts = pycode.prompts(count, base.tokenizer, 48)

    def tau(which: Any, drafter: Any, shape: Shape, **sampling: Any) -> float:
        out = answer_together(which, prompts, Fixed(drafter, shape), max_new_tokens=new, **sampling)
        answers.append(out.tokens)
        return out.acceptance_length()

    answers: list[list[list[int]]] = []
    space, untrained = Space.for_model(model), Space.for_model(off)
    shape = space.default_shape
    length = tau(model, space, shape)
    greedy = answer_together(model, prompts, "none", max_new_tokens=new).tokens
    same = sum(a == b for a, b in zip(answers[0], greedy, strict=True))
    sampled = tau(model, space, shape, temperature=1.0)
    without = tau(off, untrained, shape)
    without_1 = tau(off, untrained, shape, temperature=1.0)
    # Jacobi decoding: last round's own next tokens, in a chain of the same length
    module = registry.load_module(registry.find("make-some-noise"))
    jacobi = module.MakeSomeNoise(module.Settings(retrieval=False))
    chain = Shape(5, 5, 1)
    length_jacobi = tau(base, jacobi, chain)
    jacobi_1 = tau(base, jacobi, chain, temperature=1.0)
    jacobi_plain = tau(plain, jacobi, chain)
    held_out = texts(length=96, split="held-out")
    rows = 256 if small else 8
    loss, loss_plain = (held_out_loss(m.target.model, held_out, rows=rows) for m in (model, plain))
    gates = (
        Gate("prompts with the model's own greedy output", same, "==", count),
        Gate("acceptance length", length, ">=", 1.35),
        Gate("gain over Jacobi decoding of the untuned model", length - length_jacobi, ">=", 0.1),
        Gate("held-out loss over plain tuning", loss / loss_plain, "<=", 1.015),
        Gate("gain over untrained masks", length - without, ">=", 0.1),
    )
    direction = (
        gates[0],
        Gate("gain over Jacobi decoding", length - length_jacobi, ">", 0.0),
        Gate("gain over Jacobi decoding, T = 1", sampled - jacobi_1, ">", 0.0),
        gates[4],
    )
    unit = "tokens/forward"
    return Claim(
        slug="space",
        statement="Tuned to fill masks, the model accepts 1.35 or more of its own guesses per "
        "forward, 0.1 more than Jacobi decoding, and its next-token loss stays within 1.5%.",
        paper_figure="2.7x to 4.0x on HumanEval-X, quality kept",
        rows=(
            Row(
                "acceptance length, greedy",
                unit,
                length_jacobi,
                length,
                without,
                control=jacobi_plain,
                note="baseline: Jacobi, untuned; control: Jacobi, tuned"
                " plainly; off: masks not trained",
            ),
            Row(
                "acceptance length, T = 1",
                unit,
                jacobi_1,
                sampled,
                without_1,
                note="baseline: Jacobi, untuned; off: masks not trained",
            ),
            Row(
                "held-out loss",
                "nats/token",
                loss_plain,
                loss,
                None,
                note="baseline: plain tuning, same tokens",
            ),
            Row("rows of a forward besides the root", "tokens", 5, shape.nodes, shape.nodes),
        ),
        scale=scale,
        device="cpu",
        status=judge(gates, direction),
        notes=(
            f"All tuned models: {recipe.steps} steps of {recipe.batch_size} x "
            f"{recipe.sequence_length} tokens from the same checkpoint.",
        ),
        gates=(*gates, *direction[1:3]),
        seeds=(0,),
    )
