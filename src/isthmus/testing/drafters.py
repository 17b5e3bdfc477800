"""The contract of a drafter: whatever it proposes, it says truthfully how it was obtained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch

from isthmus.decoding.acceptance import Coupled, Lossless
from isthmus.decoding.engine import Request, decode, extendable, wanted
from isthmus.decoding.law import Law
from isthmus.decoding.policy import Fixed
from isthmus.decoding.stopping import Stopper
from isthmus.decoding.table import TableTarget
from isthmus.decoding.tree import TokenTree
from isthmus.roles import Acceptance, Context, Drafter, Shape, Target
from isthmus.testing.statistics import goodness_of_fit

SHAPES = (Shape(1, 1, 1), Shape(4, 4, 1), Shape(2, 5, 1), Shape(6, 2, 3), Shape(30, 4, 4))
"""Chains and trees that a drafter is asked for, some narrower and flatter than it likes."""

PROMPTS = ((0, 1, 2, 0, 1, 2, 0, 1), (3, 1, 3), (2,))


def check_tree(tree: TokenTree, context: Context, shape: Shape, vocab_size: int) -> None:
    """Check one proposed tree against what was asked for.

    Args:
        tree: The proposal.
        context: What the drafter was given.
        shape: The shape it was given.
        vocab_size: Tokens V of the target.

    Raises:
        AssertionError: The tree is too large, starts at another root, repeats a sibling, leaves
            the vocabulary, or its q is not a law that could have drawn its tokens.
    """
    assert tree.batch == context.batch, f"{tree.batch} trees for {context.batch} rows"
    roots = context.roots().tolist()
    assert tree.tokens[:, 0].tolist() == roots, "node 0 must be the last committed token"
    alive = tree.alive.tolist()
    assert all(row[0] for row in alive), "the root must be valid"
    most = max(tree.drafted())
    assert most <= shape.nodes, f"{most} draft nodes, {shape.nodes} were asked for"
    tokens = tree.tokens.tolist()
    parents = tree.topology.parent.expand(tree.batch, -1).tolist()
    depths = tree.topology.depth.expand(tree.batch, -1).tolist()
    for b in range(tree.batch):
        nodes = [n for n in range(tree.nodes) if alive[b][n]]
        deepest = max(depths[b][n] for n in nodes)
        assert deepest <= shape.depth, f"{deepest} levels, {shape.depth} were asked for"
        wrong = [tokens[b][n] for n in nodes if not 0 <= tokens[b][n] < vocab_size]
        assert not wrong, f"tokens {wrong} are outside the vocabulary of {vocab_size}"
        children: dict[int, list[int]] = {}
        for n in nodes[1:]:
            children.setdefault(parents[b][n], []).append(n)
        for node, kids in children.items():
            assert len(kids) <= shape.width, (
                f"node {node} has {len(kids)} children, {shape.width} were asked for"
            )
            assert all(tree.alive[b, node] for _ in kids[:1]), "a child below a padding node"
            drawn = [tokens[b][k] for k in kids]
            if tree.draw != "iid":
                assert len(set(drawn)) == len(drawn), f"equal siblings {drawn} below node {node}"
            if tree.q is not None:
                _check_q(tree.q[b, node], drawn, f"row {b}, node {node}", tree.draw)
    assert tree.draw == "point" or tree.q is not None or most == 0, "a drawn tree must carry q"


def _check_q(q: torch.Tensor, drawn: Sequence[int], where: str, draw: str) -> None:
    assert bool(torch.isfinite(q).all()) and bool((q >= 0).all()), f"{where}: q is not a law"
    total = float(q.double().sum())
    assert abs(total - 1.0) < 1e-5, f"{where}: q sums to {total}, not to 1"
    support = int((q > 0).sum())
    for number, token in enumerate(drawn):
        if draw == "without" and number >= support:
            break  # nothing is left to draw; acceptance rules skip such a child
        assert float(q[token]) > 0, f"{where}: token {token} was drawn, but q gives it no chance"


def check_drafter(
    make_drafter: Callable[[], Drafter],
    *,
    target: Target | None = None,
    shapes: Sequence[Shape] = SHAPES,
    prompts: Sequence[Sequence[int]] = PROMPTS,
    seed: int = 0,
    inputs: dict[str, Any] | None = None,
) -> None:
    """Check that a drafter keeps the contract of :class:`isthmus.roles.Drafter`.

    Its trees are checked in every round, greedy and sampled; the greedy and the coupled output
    must be those of plain decoding; two drafters with the same seed must propose the same trees;
    rows must be able to leave the batch, and others to take their place; and where it hands over a
    law q, its first draw must follow it.

    Args:
        make_drafter: Makes a fresh drafter, as one starts a program.
        target: What it drafts for; a small :class:`~isthmus.decoding.table.TableTarget` that
            repeats itself when None.
        shapes: Shapes to ask for.
        prompts: Token ids of a ragged batch.
        seed: Seed of every draw.
        inputs: Encoder inputs of encoder-decoder targets, one row a prompt.

    Raises:
        AssertionError: The contract is broken; the message says where.
    """
    target = target or TableTarget(vocab_size=11, seed=3, sharpness=2.0, order=2)
    drafter = make_drafter()
    assert isinstance(drafter.name, str) and drafter.name, "a drafter needs a name"
    laws = (Law(), Law(temperature=1.0), Law(temperature=0.8, top_p=0.9, repetition_penalty=1.2))
    for shape in shapes:
        for law in laws:
            first = _run(make_drafter(), target, law, Lossless(), shape, prompts, seed, inputs)
            again = _run(make_drafter(), target, law, Lossless(), shape, prompts, seed, inputs)
            assert first == again, f"{drafter.name}: the same seed gives another output"
        plain, drafted = (
            _run(who, target, Law(), Lossless(), shape, prompts, seed, inputs)[0]
            for who in (None, make_drafter())
        )
        assert drafted == plain, f"{drafter.name} at {shape}: greedy output differs from plain"
        law = Law(temperature=1.0)
        plain, drafted, in_turn = (
            _run(who, target, law, Coupled(seed), shape, prompts, seed, inputs, batch_size)[0]
            for who, batch_size in ((None, None), (make_drafter(), None), (make_drafter(), 2))
        )
        assert drafted == plain, f"{drafter.name} at {shape}: coupled output differs from plain"
        assert in_turn == plain, f"{drafter.name} at {shape}: other output where rows join later"
        if not inputs:
            _check_first_draw(make_drafter(), target, shape, seed)
    drafter = make_drafter()
    for _ in range(2):  # a drafter serves one request after another
        _run(drafter, target, Law(), Lossless(), shapes[0], prompts, seed, inputs)


class _Watched:
    """A drafter whose every tree is checked and written down."""

    def __init__(self, drafter: Drafter, target: Target) -> None:
        self.drafter, self.name = drafter, drafter.name
        self.vocab_size = target.vocab_size
        self.taps = wanted(drafter)
        self.seen: list[list[list[int]]] = []
        self.begin = drafter.begin
        self.observe = drafter.observe
        self.select = drafter.select
        self.extend: Any = cast(Any, drafter).extend if extendable(drafter) else None

    def propose(self, context: Context, shape: Shape) -> TokenTree:
        ids, lengths = context.ids.clone(), list(context.lengths)
        tree = self.drafter.propose(context, shape)
        assert torch.equal(ids, context.ids) and lengths == context.lengths, (
            "propose must leave its context as it is"
        )
        try:
            check_tree(tree, context, shape, self.vocab_size)
        except AssertionError as error:
            raise AssertionError(f"{self.name} at {shape}: {error}") from None
        self.seen.append([tree.tokens.tolist(), tree.topology.parent.tolist()])
        return tree


def _run(
    drafter: Drafter | None,
    target: Target,
    law: Law,
    acceptance: Acceptance,
    shape: Shape,
    prompts: Sequence[Sequence[int]],
    seed: int,
    inputs: dict[str, Any] | None = None,
    batch_size: int | None = None,
) -> tuple[list[list[int]], list[list[list[int]]]]:
    """Tokens of every row and all trees; the rows end at unlike times, so that rows leave."""
    requests = [
        Request(torch.tensor(list(p)), Stopper(max_new_tokens=6 + 4 * i))
        for i, p in enumerate(prompts)
    ]
    watched = None if drafter is None else _Watched(drafter, target)
    rounds = decode(
        target,
        requests,
        policy=Fixed(watched, shape) if watched is not None else Fixed(),
        acceptance=acceptance,
        law=law,
        generator=torch.Generator().manual_seed(seed),
        inputs=inputs,
        batch_size=batch_size,
    )
    for _ in rounds:
        pass
    return [r.result.tokens for r in requests], watched.seen if watched is not None else []


def _check_first_draw(drafter: Drafter, target: Target, shape: Shape, seed: int) -> None:
    """The first child of the root must follow q, which is what acceptance relies on."""
    rows, prompt = 2000, torch.tensor(PROMPTS[0])
    if target.max_batch is not None:
        return
    lengths = [len(prompt)] * rows
    context = Context(
        prompt.expand(rows, -1).contiguous(),
        lengths,
        list(lengths),
        Law(temperature=0.7, top_k=5),
        torch.Generator().manual_seed(seed),
        list(range(rows)),
    )
    drafter.begin(context, target)
    tree = drafter.propose(context, shape.capped(shape.nodes, 1))
    if tree.nodes == 1 or tree.q is None:
        return
    q = tree.q[0, 0].double()
    counts = torch.bincount(tree.tokens[:, 1], minlength=len(q))
    p = goodness_of_fit(counts.tolist(), (rows * q).tolist())
    assert p > 1e-6, f"{drafter.name}: the first draw does not follow q (p = {p:.1e})"
