"""ADED: a trigram table stands in for the model and is nudged by what it writes.

Paper: Liu, Lei, Wang, Zhang, Shi, Yan, Zhao, Zhou. Adaptive Draft-Verification for Efficient Large
    Language Model Decoding. 2024. arXiv:2407.12021
Idea: Draft from a pruned trigram table of a corpus, raise the weights of the trigrams that were
    just generated, and search the table with PUCT for paths that are likely and unlike.
Differs: The typical acceptance that the authors' code offers is left out: it changes the output.
    Adaptation is kept beside the table, so that one file serves many users. A deterministic
    best-first search is offered in place of PUCT. Without a corpus the table starts empty and is
    filled by adaptation alone.
Lossless: yes

    corpus ──count──> P(c | a, b) ──nudge──> weights ──PUCT──> 24 prefixes ──> tree
                                      ^                                          │
                                      └──────── last 16 tokens <── target <──────┘
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from isthmus.claims import Claim, Gate, Row, Ruler, Scale, judge, ratio
from isthmus.decoding.policy import Fixed
from isthmus.decoding.puct import Puct
from isthmus.decoding.stores import Adapted, NGramStore, Trie, likeliest_tree
from isthmus.decoding.tree import TokenTree, stack
from isthmus.errors import InvalidInputError
from isthmus.roles import Context, Shape, Step, Target
from isthmus.workbench import pycode, tasks
from isthmus.workbench.bench import Answers, answer, reference_model, repeats_itself
from isthmus.workbench.corpus import ngram_store


@dataclass(frozen=True)
class Settings:
    """Settings of ADED, with the values of the authors' code.

    Attributes:
        adapt: The mechanism; off, the table stays as the corpus left it.
        search: ``"puct"``, or ``"best-first"`` for the most likely tree of the same size.
        gain: Added to the weight of each recent trigram in every round.
        cap: Largest weight.
        window: Tokens whose trigrams are nudged.
        iterations: PUCT iterations a round.
        depth: Tokens of a searched sentence; a path is one longer.
        prefixes: Most visited prefixes that are kept.
        nodes: Draft nodes at most.
        keep: Successors of a bigram that are looked at.
        c1: First exploration constant.
        c2: Second exploration constant.
        remember: Keep what was learnt for the next prompt (one user's prompts only).
        seed: Seed of the roll-outs.
    """

    adapt: bool = True
    search: Literal["puct", "best-first"] = "puct"
    gain: float = 0.04
    cap: float = 3.0
    window: int = 16
    iterations: int = 150
    depth: int = 4
    prefixes: int = 24
    nodes: int = 64
    keep: int = 12
    c1: float = 32.0
    c2: float = 8.0
    remember: bool = False
    seed: int = 0


class Aded:
    """Drafter with an adaptive trigram table.

    Args:
        settings: See :class:`Settings`.
        store: The corpus's trigrams; an empty table when None.

    Raises:
        InvalidInputError: A setting is out of range.

    Example:
        >>> Aded().default_shape
        Shape(nodes=64, depth=5, width=12)
    """

    role: ClassVar[str] = "drafter"
    name = "aded"

    def __init__(self, settings: Settings | None = None, store: NGramStore | None = None) -> None:
        self.settings = s = settings or Settings()
        if s.search not in ("puct", "best-first"):
            raise InvalidInputError(f"search must be 'puct' or 'best-first', got {s.search!r}")
        if min(s.iterations, s.depth, s.prefixes, s.keep, s.window) < 1 or s.c2 <= 0:
            raise InvalidInputError(
                "iterations, depth, prefixes, keep and window must be at least 1 and c2 above 0"
            )
        self.store = store
        self.table: Adapted | None = None
        self._lengths: list[int] = []
        self._random = random.Random(s.seed)

    @classmethod
    def for_model(
        cls,
        model: Any,
        settings: Settings | None = None,
        *,
        files: Sequence[str | Path] | None = None,
    ) -> Aded:
        """A drafter with the trigrams of the pycode corpus, or of the given text files.

        The first call for a tokenizer reads the corpus; the table is then kept in the cache.

        Args:
            model: An :class:`isthmus.decoding.model.Model` with a tokenizer.
            settings: See :class:`Settings`.
            files: Text files to count instead.
        """
        settings = settings or Settings()
        size = model.target.vocab_size
        return cls(settings, ngram_store(model.tokenizer, size, keep=settings.keep, files=files))

    @property
    def default_shape(self) -> Shape:
        """The whole tree: searched prefixes, each one token longer."""
        s = self.settings
        return Shape(s.nodes, s.depth + 1, s.keep)

    def begin(self, context: Context, target: Target, **inputs: Any) -> None:
        """Start from the corpus's table, or from what was learnt before if that is kept.

        Raises:
            MismatchError: The table counts the tokens of another vocabulary.
        """
        s = self.settings
        store = self.store
        if store is None:
            store = NGramStore(target.vocab_size)
        store.require(target.vocab_size)
        known = self.table is not None and self.table.store.vocab_size == target.vocab_size
        if not (known and s.remember):
            self.table = Adapted(store, gain=s.gain, cap=s.cap, keep=s.keep)
        self._lengths = list(context.lengths)
        self._random = random.Random(s.seed)
        self._learn(context, range(context.batch))

    def propose(self, context: Context, shape: Shape) -> TokenTree:
        """Search the table below each root; a bare root where the bigram is unknown."""
        assert self.table is not None
        trees = []
        for b in range(context.batch):
            last = tuple(context.row(b)[-2:].tolist())
            if self.settings.search == "puct":
                found = self.search(last, shape)
            else:
                found = likeliest_tree(self.table.successors, last, shape)
            trees.append(found.tree())
        return stack(trees)

    def search(self, last: tuple[int, ...], shape: Shape) -> Trie:
        """The most visited prefixes below ``last`` [2], each extended by its best successor."""
        assert self.table is not None
        s, lookup = self.settings, self.table.successors
        trie = Trie(last[-1], shape)
        if not lookup(last)[0]:
            return trie
        found = Puct(lookup, self._random, depth=s.depth, c1=s.c1, c2=s.c2)
        found.run(last, s.iterations)
        ranked = sorted(range(1, len(found.tokens)), key=lambda node: -found.visits[node])
        for node in ranked[: s.prefixes]:
            if not found.visits[node] or len(trie.tokens) > shape.nodes:
                break
            trie.add([*found.path(node), *lookup(found.contexts[node])[0][:1]])
        return trie

    def observe(self, step: Step) -> None:
        """Nudge the trigrams of the last tokens of every row that went on."""
        context = step.context
        moved = [b for b in range(context.batch) if context.lengths[b] != self._lengths[b]]
        self._lengths = list(context.lengths)
        self._learn(context, moved)

    def select(self, rows: Sequence[int]) -> None:
        """The table is shared by the rows of a batch; only their lengths are renumbered."""
        self._lengths = [self._lengths[r] for r in rows]

    def _learn(self, context: Context, rows: Sequence[int]) -> None:
        assert self.table is not None
        if self.settings.adapt:
            for b in rows:
                self.table.nudge(context.row(b)[-self.settings.window :].tolist())


def claim(ruler: Ruler, scale: Scale = "small") -> Claim:
    """Measure acceptance with the pycode corpus as the table, inside and outside its domain.

    Many short greedy continuations decide, those that repeat a phrase left out; temperature 1
    decides outside the domain, where every greedy answer of the small model is a loop.

    Args:
        ruler: The clock.
        scale: ``"small"`` is 48 held-out prompts and 24 date tables of 24 tokens, ``"test"`` 2.
    """
    small = scale != "test"
    count, tokens, nodes = (48, 24, 24) if small else (2, 8, 24)
    model = reference_model("pycode-t")
    store = ngram_store(model.tokenizer, model.target.vocab_size)
    inside = pycode.prompts(count, model.tokenizer, 96)
    outside = tasks.prompts("dates", max(2, count // 2), model.tokenizer)

    def arm(
        settings: Settings, prompts: list[list[int]], size: int = nodes, **sampling: Any
    ) -> Answers:
        policy = Fixed(Aded(settings, store), Shape(size, settings.depth + 1, settings.keep))
        return answer(model, prompts, policy, max_new_tokens=tokens, **sampling)

    on, frozen, greedy_tree = Settings(), Settings(adapt=False), Settings(search="best-first")
    plain = answer(model, inside, "none", max_new_tokens=tokens)
    lookup = answer(model, inside, "prompt-lookup", max_new_tokens=tokens)
    ours, off, best = (arm(s, inside) for s in (on, frozen, greedy_tree))
    wide = arm(on, inside, 64)
    straight = [r for r, t in enumerate(plain.tokens) if not repeats_itself(t, size=4, times=2)]
    free = Gate("answers without a repeated phrase", len(straight), ">=", count // 4)
    rows = straight or range(len(inside))
    tau = {
        name: a.acceptance_length(rows)
        for name, a in (("on", ours), ("off", off), ("best", best), ("wide", wide))
    }
    same = sum(a == b for a, b in zip(ours.tokens, plain.tokens, strict=True))
    sampled = {
        (name, place): arm(s, p, temperature=1.0).acceptance_length()
        for name, s in (("on", on), ("off", frozen))
        for place, p in (("inside", inside[: max(2, count // 2)]), ("outside", outside))
    }
    loops = {name: arm(s, outside) for name, s in (("on", on), ("off", frozen))}
    policy = Fixed(Aded(on, store), Shape(nodes, 5, 12))
    timed = ruler.compare(
        {
            "plain": lambda: answer(model, inside[:4], "none", max_new_tokens=tokens),
            "ours": lambda: answer(model, inside[:4], policy, max_new_tokens=tokens),
        },
        repeats=3 if small else 1,
    )
    speedup = ratio(timed["plain"], timed["ours"])
    gain = tau["on"] / tau["off"]
    far = sampled["on", "outside"] / sampled["off", "outside"]
    gates = (
        Gate("prompts with the plain output, greedy", same, "==", count),
        Gate("acceptance length, 24 nodes, greedy", tau["on"], ">=", 1.6),
        Gate("adapted over frozen, inside the domain, greedy", gain, ">=", 1.05),
        Gate("adapted over frozen, date tables, T = 1", far, ">=", 1.05),
        free,
    )
    direction = (gates[0], gates[1], Gate("adapted over frozen, greedy", gain, ">", 1.0), free)
    status = judge(gates, direction)
    unit, looked = "tokens/forward", lookup.acceptance_length(rows)
    return Claim(
        slug="aded",
        statement="A trigram table of the corpus drafts more than 1.6 tokens per target forward "
        "with 24 nodes, and adapting it to the text at hand adds 5 % or more.",
        paper_figure="up to 2.5x without training; about 1.9x from a 253 MB corpus",
        rows=(
            Row(
                "acceptance length, greedy, 24 nodes",
                unit,
                1.0,
                tau["on"],
                tau["off"],
                control=looked,
                note="off: frozen table; control: prompt lookup",
            ),
            Row("acceptance length, greedy, 64 nodes", unit, 1.0, tau["wide"], None),
            Row(
                "acceptance length, greedy, search against best-first",
                unit,
                tau["best"],
                tau["on"],
                None,
                note="baseline: best-first tree of 24 nodes from the same adapted table",
            ),
            *(
                Row(
                    f"acceptance length, T = 1, {place} the domain",
                    unit,
                    1.0,
                    sampled["on", place],
                    sampled["off", place],
                )
                for place in ("inside", "outside")
            ),
            Row(
                "acceptance length, greedy, date tables",
                unit,
                1.0,
                loops["on"].acceptance_length(),
                loops["off"].acceptance_length(),
                note="almost all answers are loops; never a gate",
            ),
            Row(
                "speed-up over plain, greedy, 24 nodes",
                "x",
                1.0,
                speedup.median,
                None,
                note=f"{speedup}, the search in Python included; never a gate",
            ),
        ),
        scale=scale,
        device="cpu",
        status=status,
        reason=""
        if status == "reproduced"
        else "the small model's sampled text repeats too little for adaptation to pay, and its "
        "greedy text outside the domain only loops",
        notes=(f"{count - len(straight)} of {count} greedy answers repeat a phrase: left out.",),
        gates=(*gates, direction[2]),
        seeds=(0,),
    )
