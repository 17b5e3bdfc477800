"""Token Recycling: the candidates that a forward computes anyway are next round's draft.

Paper: Luo, Wang, Zhu, Zhang, Zhang, Yang, Xu. Turning Trash into Treasure: Accelerating Inference
    of Large Language Models with Token Recycling. 2024. arXiv:2408.08696
Idea: Keep the top-k successors of every token the target has scored in a [V, k] table and look up
    a static tree in it, breadth first, at no model cost.
Differs: Empty cells are marked instead of holding token 0, so a cold table drafts little rather
    than nonsense. The template has the paper's level sizes (8, 21, 25, 15, 8, 3) and is ordered
    best first, so that its first n nodes are the tree for a budget of n; which nodes of a level it
    holds follows from fixed rank weights, not from the released list. ``prefill_update`` scores
    the prompt once more instead of tapping the prefill.
Lossless: yes

    table[V, k] ──lookup──> tree ──target──> logits ──top-k──> table
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch

from isthmus.claims import Claim, Gate, Row, Ruler, Scale, judge, ratio
from isthmus.decoding.policy import Fixed
from isthmus.decoding.stores import EMPTY, AdjacencyStore
from isthmus.decoding.tree import TokenTree, Topology, chain_topology
from isthmus.roles import Context, Shape, Step, Target
from isthmus.workbench import pycode
from isthmus.workbench.bench import Answers, answer, reference_model, repeats_itself

LEVEL_SIZES = (8, 21, 25, 15, 8, 3)
"""Nodes of each level below the root (sec. 3.2): 80 in all, depth 6."""

RANK_WEIGHTS = (0.46, 0.17, 0.10, 0.075, 0.06, 0.05, 0.045, 0.04)
"""How often the successor of each rank is right, roughly; decides the template's shape."""


@dataclass(frozen=True)
class Settings:
    """Settings of Token Recycling, with the paper's defaults.

    Attributes:
        k: Successors kept for every token.
        nodes: Template nodes at most, the root not counted.
        prefill_update: Fill the table from the prompt's logits first.
        keep: Keep the table for the next prompt (one user's prompts only: it holds text).
        recycle: The mechanism; off, the table holds random successors and never learns.
    """

    k: int = 8
    nodes: int = 80
    prefill_update: bool = False
    keep: bool = False
    recycle: bool = True


@dataclass(frozen=True)
class Template:
    """The static tree: parent and rank of every node, root first, best first."""

    parents: np.ndarray[Any, Any]
    ranks: np.ndarray[Any, Any]
    levels: tuple[np.ndarray[Any, Any], ...]
    topology: Topology


@lru_cache(maxsize=32)
def template(nodes: int = 80, k: int = 8) -> Template:
    """The tree of the ``nodes`` best template nodes.

    Args:
        nodes: Nodes below the root, at most 80.
        k: Successors of a node, at most 8.

    Example:
        >>> t = template(80)
        >>> [len(level) for level in t.levels]
        [8, 21, 25, 15, 8, 3]
        >>> template(3).ranks.tolist(), template(3).parents.tolist()
        ([0, 0, 0, 1], [-1, 0, 1, 0])
    """
    ranked: list[tuple[float, tuple[int, ...]]] = []
    level: list[tuple[float, tuple[int, ...]]] = [(1.0, ())]
    for size in LEVEL_SIZES:
        children = [
            (weight * RANK_WEIGHTS[rank], (*path, rank))
            for weight, path in level
            for rank in range(min(k, len(RANK_WEIGHTS)))
        ]
        # heavier first; among equals the smaller ranks, so the template is the same everywhere
        level = sorted(children, key=lambda c: (-c[0], c[1]))[:size]
        ranked += level
    # a child weighs less than its parent, so every prefix of this order is a tree
    ranked.sort(key=lambda c: (-c[0], c[1]))
    paths = [(), *(path for _, path in ranked[:nodes])]
    index = {path: i for i, path in enumerate(paths)}
    parents = np.array([-1, *(index[p[:-1]] for p in paths[1:])])
    depth = np.array([len(p) for p in paths])
    return Template(
        parents,
        np.array([0, *(p[-1] for p in paths[1:])]),
        tuple(np.flatnonzero(depth == d) for d in range(1, int(depth.max()) + 1)),
        Topology.of(parents.tolist()),
    )


class TokenRecycling:
    """Drafter with an adjacency table that learns from every scored node.

    Args:
        settings: See :class:`Settings`.

    Example:
        >>> drafter = TokenRecycling()
        >>> drafter.default_shape
        Shape(nodes=80, depth=6, width=8)
    """

    role: ClassVar[str] = "drafter"
    name = "token-recycling"
    pure: ClassVar[bool] = True
    lazy: ClassVar[bool] = True

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self.store: AdjacencyStore | None = None

    @property
    def default_shape(self) -> Shape:
        """The whole template."""
        return Shape(self.settings.nodes, len(LEVEL_SIZES), self.settings.k)

    def begin(self, context: Context, target: Target, **inputs: Any) -> None:
        """Start with an empty table, or with the one kept from the last prompt."""
        size = target.vocab_size
        if self.store is None or not self.settings.keep or len(self.store.table) != size:
            self.store = AdjacencyStore(size, self.settings.k)
            if not self.settings.recycle:
                self.store.table[:] = _random_rows(*self.store.table.shape)
        self.extend(context, target, **inputs)

    def extend(self, context: Context, target: Target, **inputs: Any) -> None:
        """Fill the table from more prompts, where the settings ask for it."""
        assert self.store is not None
        if self.settings.prefill_update and self.settings.recycle and target.reach != "step":
            for b in range(context.batch):
                ids = context.row(b)[:-1]
                one = {k: v[b : b + 1] for k, v in inputs.items() if torch.is_tensor(v)}
                if len(ids):
                    session = target.session(1, **one)
                    tree = TokenTree(ids[None], chain_topology(len(ids)))
                    tree = tree.to(getattr(target, "device", ids.device))
                    self.store.update_from_logits(ids, session.score(tree).logits[0])

    def propose(self, context: Context, shape: Shape) -> TokenTree:
        """Fill the template from the table; empty cells are left out.

        Siblings differ because the target's top-k are unlike tokens.
        """
        assert self.store is not None
        nodes = min(shape.nodes, self.settings.nodes)
        if shape.width == 1:  # only the line of first successors is of use
            plan = _line(min(nodes, shape.depth))
        else:
            plan = template(nodes, min(shape.width, self.store.table.shape[1]))
        tokens = self.store.fill(context.roots().numpy(), plan.parents, plan.ranks, plan.levels)
        known = tokens != EMPTY  # nothing is known below an empty cell
        if known.all():
            return TokenTree(torch.from_numpy(tokens), plan.topology).limit(depth=shape.depth)
        tree = TokenTree(torch.from_numpy(np.maximum(tokens, 0)), plan.topology)
        return tree.prune(torch.from_numpy(known), closed=True).limit(depth=shape.depth)

    def observe(self, step: Step) -> None:
        """Every scored node, rejected ones too, renews its token's row."""
        if not self.settings.recycle or self.store is None:
            return
        tree = step.tree
        if tree.valid is None:
            self.store.update_from_logits(tree.tokens.flatten(), step.logits.flatten(0, 1))
        else:
            alive = tree.alive
            self.store.update_from_logits(tree.tokens[alive], step.logits[alive])

    def select(self, rows: Sequence[int]) -> None:
        """The table is shared by the rows of a batch; nothing to do."""


def _random_rows(vocab_size: int, k: int) -> np.ndarray[Any, Any]:
    """A table of k unlike random successors a token: the control of the claim."""
    steps = np.random.default_rng(0).integers(1, max(2, vocab_size // k), (vocab_size, k))
    return np.cumsum(steps, 1) % vocab_size


@lru_cache(maxsize=64)
def _line(nodes: int) -> Template:
    """The chain of first successors, for targets that score chains only."""
    parents = np.arange(-1, nodes)
    levels = tuple(np.array([i]) for i in range(1, nodes + 1))
    return Template(parents, np.zeros(nodes + 1, dtype=np.int64), levels, chain_topology(nodes + 1))


def claim(ruler: Ruler, scale: Scale = "small") -> Claim:
    """Measure the paper's claim on held-out Python with the embedded model.

    Arms: plain decoding, prompt lookup, a static table of random successors (off), a cold table,
    one filled from the prompt, one kept across prompts; greedy and at temperature 1.

    Args:
        ruler: The clock.
        scale: ``"small"`` is 16 prompts of 128 tokens, ``"test"`` 3 of 24.
    """
    count, tokens = (16, 128) if scale != "test" else (3, 24)
    model = reference_model("pycode-t")
    prompts = pycode.prompts(count, model.tokenizer, 96)

    def arm(settings: Settings | None, **sampling: Any) -> Answers:
        drafter = None if settings is None else TokenRecycling(settings)
        policy = Fixed(drafter, drafter.default_shape) if drafter else Fixed()
        return answer(model, prompts, policy, max_new_tokens=tokens, **sampling)

    arms = {
        "off": Settings(recycle=False),
        "cold": Settings(),
        "prompt": Settings(prefill_update=True),
        "kept": Settings(prefill_update=True, keep=True),
    }
    greedy = {name: arm(settings) for name, settings in arms.items()}
    plain = arm(None)
    lookup = answer(model, prompts, "prompt-lookup", max_new_tokens=tokens)
    sampled = {name: arm(arms[name], temperature=1.0) for name in ("off", "cold", "kept")}
    lookup_1 = answer(model, prompts, "prompt-lookup", max_new_tokens=tokens, temperature=1.0)

    straight = [r for r, t in enumerate(plain.tokens) if not repeats_itself(t)]
    rows = straight if len(straight) >= max(1, count // 4) else list(range(count))
    tau = {name: answers.acceptance_length(rows) for name, answers in greedy.items()}
    tau_lookup = lookup.acceptance_length(rows)
    same = sum(a == b for a, b in zip(greedy["cold"].tokens, plain.tokens, strict=True))

    def run(settings: Settings | None) -> Any:
        drafter = None if settings is None else TokenRecycling(settings)
        shape = Shape(24, len(LEVEL_SIZES), 8)  # 81 nodes are not free on a CPU
        policy = Fixed(drafter, shape) if drafter else Fixed()
        few = prompts[: max(2, count // 4)]
        return lambda: answer(model, few, policy, max_new_tokens=tokens)

    repeats = 3 if scale != "test" else 1
    timed = ruler.compare({"plain": run(None), "ours": run(arms["kept"])}, repeats=repeats)
    speedup = ratio(timed["plain"], timed["ours"])
    gates = (
        Gate("prompts with the plain output", same, "==", count),
        Gate("acceptance length, cold", tau["cold"], ">=", 1.8),
        Gate("cold over prompt lookup", tau["cold"] / tau_lookup, ">", 1.0),
        Gate("prompt-filled over cold", tau["prompt"] / tau["cold"], ">=", 1.04),
        Gate("kept over prompt-filled", tau["kept"] / tau["prompt"], ">=", 1.04),
        Gate("acceptance length, random table", tau["off"], "<", 1.15),
    )
    cold, cold_lookup = sampled["cold"].acceptance_length(), lookup_1.acceptance_length()
    direction = (
        gates[0],
        Gate("cold over prompt lookup, T = 1", cold / cold_lookup, ">", 1.0),
        Gate("kept over cold, T = 1", sampled["kept"].acceptance_length() / cold, ">=", 1.04),
        gates[5],
    )
    # a text in a loop flatters every drafter that looks things up: it may not decide
    free = Gate("greedy answers free of loops", len(straight), ">=", max(1, count // 4))
    unit = "tokens/forward"
    return Claim(
        slug="token-recycling",
        statement="A table of recycled candidates drafts an 80-node tree that is accepted at more "
        "than 1.8 tokens per target forward, without training and with an unchanged output.",
        paper_figure="about 2x; acceptance length 2.7 to 2.8 on Spec-Bench (Table 1)",
        rows=(
            Row(
                "acceptance length, greedy, cold table",
                unit,
                1.0,
                tau["cold"],
                tau["off"],
                control=tau_lookup,
                note="control: prompt lookup",
            ),
            Row(
                "acceptance length, greedy, filled from the prompt",
                unit,
                tau["cold"],
                tau["prompt"],
                tau["off"],
                control=tau_lookup,
                note="baseline: cold table",
            ),
            Row(
                "acceptance length, greedy, kept across prompts",
                unit,
                tau["prompt"],
                tau["kept"],
                tau["off"],
                control=tau_lookup,
                note="baseline: filled from prompt",
            ),
            Row(
                "acceptance length, T = 1, cold table",
                unit,
                1.0,
                sampled["cold"].acceptance_length(),
                sampled["off"].acceptance_length(),
                control=lookup_1.acceptance_length(),
                note="control: prompt lookup",
            ),
            Row(
                "acceptance length, T = 1, kept across prompts",
                unit,
                1.0,
                sampled["kept"].acceptance_length(),
                sampled["off"].acceptance_length(),
                control=lookup_1.acceptance_length(),
                note="control: prompt lookup",
            ),
            Row(
                "speed-up over plain, 24 nodes, kept",
                "x",
                1.0,
                speedup.median,
                None,
                note=f"{speedup}, never a gate",
            ),
        ),
        scale=scale,
        device="cpu",
        status=judge((*gates, free), direction),
        reason=""
        if free.passed
        else "almost every greedy answer of the small model runs in a loop, "
        "so only the sampled figures count",
        notes=(
            f"{count - len(straight)} of {count} greedy answers run in loops"
            f"{' and are left out' if rows is straight else ''}; the model is small.",
        ),
        gates=(*gates, *direction[1:3], free),
        seeds=(0,),
    )
