"""Drafters that are parts: prompt lookup and a draft model.

Systems under :mod:`isthmus.systems` are built on these. A drafter only proposes; whatever it
proposes, the output keeps the target's law.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch

from isthmus.decoding.builders import Growth, RankTree
from isthmus.decoding.law import chain_logits, draw_next
from isthmus.decoding.tree import Draw, TokenTree, Topology, chain_topology, merge, stack
from isthmus.errors import InvalidInputError, MismatchError, UnsupportedModelError
from isthmus.roles import Context, Drafter, Extendable, Session, Shape, Step, Target


class PromptLookup:
    """Copy what followed the last few tokens where they stood before: an n-gram lookup.

    The longest suffix (``max_ngram`` tokens down to ``min_ngram``) that occurs earlier is looked
    up, latest occurrence first, and its continuation is the draft chain. For encoder-decoder
    targets the source text is searched too. The baseline of every other drafter here; the idea
    is Saxena's "prompt lookup decoding" (2023), part of transformers.

    Args:
        max_ngram: Longest suffix to look for.
        min_ngram: Shortest suffix that still counts as a match.

    Example:
        >>> PromptLookup().continuation(np.array([5, 6, 7, 8, 5, 6]), 3).tolist()
        [7, 8, 5]
    """

    name = "prompt-lookup"
    pure = True

    def __init__(self, max_ngram: int = 3, min_ngram: int = 1) -> None:
        if not 1 <= min_ngram <= max_ngram:
            raise InvalidInputError(
                f"prompt lookup needs 1 <= min_ngram <= max_ngram, got {min_ngram}, {max_ngram}"
            )
        self.max_ngram, self.min_ngram = max_ngram, min_ngram
        self._sources: list[np.ndarray[Any, Any]] | None = None

    def begin(self, context: Context, target: Target, **inputs: Any) -> None:
        """Remember the source of each row, where there is one with the same vocabulary."""
        self._sources = None
        self.extend(context, target, **inputs)

    def extend(self, context: Context, target: Target, **inputs: Any) -> None:
        """Remember the sources of more rows."""
        source = inputs.get("input_ids")
        if source is not None:
            self._sources = [*(self._sources or []), *source.cpu().numpy()]

    def continuation(self, ids: np.ndarray[Any, Any], length: int) -> np.ndarray[Any, Any]:
        """At most ``length`` tokens that followed the longest known suffix of ids [T]."""
        n = len(ids)
        for size in range(min(self.max_ngram, n - 1), self.min_ngram - 1, -1):
            # ends[i]: the n-gram ending at i equals the suffix; the suffix itself is left out
            ends = ids[size - 1 : n - 1] == ids[-1]
            for back in range(1, size):
                ends &= ids[size - 1 - back : n - 1 - back] == ids[-1 - back]
            hits = np.flatnonzero(ends)
            if len(hits):
                start = int(hits[-1]) + size
                return ids[start : start + length]
        return ids[:0]

    def propose(self, context: Context, shape: Shape) -> TokenTree:
        """A chain below each root, or bare roots where nothing matches."""
        length = min(shape.nodes, shape.depth)
        chains = []
        for b in range(context.batch):
            ids = context.row(b).numpy()
            if self._sources is not None:
                ids = np.concatenate([self._sources[b], ids])
            chain = self.continuation(ids, length) if length else ids[:0]
            chains.append(torch.from_numpy(np.append(ids[-1:], chain))[None])
        return stack([TokenTree(c, chain_topology(c.shape[1])) for c in chains])

    def observe(self, step: Step) -> None:
        """Nothing to learn: the committed text is the store."""

    def select(self, rows: Sequence[int]) -> None:
        """Keep the sources of the given rows."""
        if self._sources is not None:
            self._sources = [self._sources[r] for r in rows]


class Union:
    """Fuse what several drafters propose into one tree: the first one's nodes come first.

    Only drafters that choose their tokens can be fused; a tree that was drawn is no longer
    described by its law once another tree's nodes are among its own.

    Args:
        drafters: Drafters of chosen trees, the surest first.
    """

    def __init__(self, drafters: Sequence[Drafter]) -> None:
        self.drafters = list(drafters)
        self.name = "+".join(d.name for d in self.drafters)
        self.pure = all(getattr(d, "pure", False) for d in self.drafters)

    def begin(self, context: Context, target: Target, **inputs: Any) -> None:
        """Start all of them."""
        for drafter in self.drafters:
            drafter.begin(context, target, **inputs)

    def extend(self, context: Context, target: Target, **inputs: Any) -> None:
        """Pass the rows on."""
        for drafter in self.drafters:
            cast(Extendable, drafter).extend(context, target, **inputs)

    def propose(self, context: Context, shape: Shape) -> TokenTree:
        """The fused tree, cut to ``shape``; for a chain, the first proposal that is one."""
        if shape.width < len(self.drafters):  # no room for one child of each
            trees = [
                d.propose(context, shape.capped(shape.nodes, shape.depth, 1)) for d in self.drafters
            ]
            return max(trees, key=lambda t: sum(t.drafted()))
        # all but the last draft a chain, so that no node gets more children than were asked for
        spare = shape.width - len(self.drafters) + 1
        widths = [1] * (len(self.drafters) - 1) + [spare]
        trees = [
            d.propose(context, shape.capped(shape.nodes, shape.depth, width))
            for d, width in zip(self.drafters, widths, strict=True)
        ]
        rows = []
        for b in range(context.batch):
            fused = trees[0].row(b)
            for tree in trees[1:]:
                fused = merge(fused, tree.row(b))
            rows.append(fused.limit(nodes=shape.nodes, depth=shape.depth))
        return stack(rows)

    def observe(self, step: Step) -> None:
        """Let all of them learn."""
        for drafter in self.drafters:
            drafter.observe(step)

    def select(self, rows: Sequence[int]) -> None:
        """Pass the selection on."""
        for drafter in self.drafters:
            drafter.select(rows)


class ModelDrafter:
    """A smaller model drafts: a chain by default, or a tree with a fixed branching.

    Tokens are drawn from the draft model's own law *after* the request's processing; that law is
    handed over as q, so the sampled output stays exact. Its cache is one session like the
    target's: after each round it forgets rejected tokens and is fed the committed ones it has not
    seen (after a full acceptance, that includes its own last draft).

    Args:
        model: The draft model as a target, with the target's vocabulary.
        branching: Children of every node at each level; None drafts a chain. Levels beyond the
            end repeat the last entry.
        draw: ``"iid"`` or ``"without"`` replacement when sampling; greedy drafts are ``point``.
        process: Apply the request's warpers to the draft model too. Off, q is the raw softmax:
            still exact, lower acceptance.

    Raises:
        UnsupportedModelError: The draft model keeps a recurrent state, which cannot be rolled
            back.
    """

    name = "draft-model"

    def __init__(
        self,
        model: Target,
        *,
        branching: Sequence[int] | None = None,
        draw: Draw = "iid",
        process: bool = True,
    ) -> None:
        if model.max_batch == 1:
            raise UnsupportedModelError(
                "a draft model with recurrent state cannot forget rejected tokens; "
                "use one with attention layers only"
            )
        if branching is not None and (not branching or min(branching) < 1):
            raise InvalidInputError(f"branching must be positive numbers, got {list(branching)}")
        self.model, self.branching, self.draw, self.process = model, branching, draw, process
        self._session: Session | None = None
        self._vocab = model.vocab_size
        self._start: list[int] = []

    def begin(self, context: Context, target: Target, **inputs: Any) -> None:
        """Prefill the draft model with everything but the roots.

        Raises:
            MismatchError: The two vocabularies differ by more than padding rows.
        """
        self._vocab = target.vocab_size
        if abs(self.model.vocab_size - target.vocab_size) > 512:
            raise MismatchError(
                f"the draft model has {self.model.vocab_size} tokens and the target "
                f"{target.vocab_size}; a draft model must share the target's vocabulary"
            )
        self._session, self._start = None, []
        self.extend(context, target, **inputs)

    def extend(self, context: Context, target: Target, **inputs: Any) -> None:
        """Prefill the draft model with more rows."""
        reads = ("encoder_decoder", "takes_images")
        own = inputs if any(getattr(self.model, name, False) for name in reads) else {}
        fresh = self.model.session(context.batch, **own)
        rows = [context.row(b)[:-1] for b in range(context.batch)]
        if any(len(r) for r in rows):
            fresh.prefill(rows)
        self._session = fresh if self._session is None else self._session.join(fresh)
        self._start = [*self._start, *context.lengths]

    def propose(self, context: Context, shape: Shape) -> TokenTree:
        """Draw a chain or a tree within ``shape``."""
        self._start = list(context.lengths)
        limit = self.model.max_length
        depth = min(shape.depth, shape.nodes)
        if limit is not None:
            depth = min(depth, limit - max(context.lengths))
        if depth < 1:
            return TokenTree.root(context.roots())
        if self.branching is None or shape.width == 1 or self.model.reach != "tree":
            return self._chain(context, depth)
        return self._tree(context, shape.capped(shape.nodes, depth))

    def _unseen(self, context: Context, leave: int) -> TokenTree | None:
        """Committed tokens that the cache lacks, all but the last ``leave``, as chains."""
        assert self._session is not None
        rows = [
            context.row(b)[n : context.lengths[b] - leave]
            for b, n in enumerate(self._session.lengths)
        ]
        width = max(len(r) for r in rows)
        if width == 0:
            return None
        tokens = torch.stack([torch.nn.functional.pad(r, (0, width - len(r))) for r in rows])
        steps = torch.arange(width)
        valid = torch.stack([steps < len(r) for r in rows])
        return TokenTree(tokens, chain_topology(width), None if bool(valid.all()) else valid)

    def _feed(self, tree: TokenTree) -> torch.Tensor:
        """Run and commit a chain; returns the logits after the last valid token, [B, V]."""
        assert self._session is not None
        device = getattr(self.model, "device", tree.tokens.device)
        logits = self._session.score(tree.to(device)).logits
        steps = torch.arange(tree.nodes).expand(tree.batch, -1)
        path = torch.where(tree.alive, steps, -1).to(device)
        self._session.keep(path)
        last = tree.alive.sum(1).clamp(min=1).to(device) - 1
        return self._fit(logits[torch.arange(tree.batch, device=device), last])

    def _fit(self, logits: torch.Tensor) -> torch.Tensor:
        """Cut or pad the last axis to the target's vocabulary; padding has no probability."""
        extra = self._vocab - logits.shape[-1]
        if extra <= 0:
            return logits[..., : self._vocab]
        return torch.nn.functional.pad(logits, (0, extra), value=-torch.inf)

    def _chain(self, context: Context, depth: int) -> TokenTree:
        block = self._unseen(context, 0)
        assert block is not None  # the root is never cached
        logits = self._feed(block)
        drafted = logits.new_zeros(context.batch, 0, dtype=torch.int64)
        laws = []
        for level in range(depth):
            law = self._law(logits, context, drafted)
            token, q = draw_next(law, context, [n + level for n in context.lengths])
            if q is not None:
                laws.append(q)
            drafted = torch.cat([drafted, token], 1)
            if level + 1 < depth:
                if self.stops():
                    break
                logits = self._feed(TokenTree(token, chain_topology(1)))
        roots = context.roots().to(drafted.device)
        return TokenTree.chain(roots, drafted, q=torch.stack(laws, 1) if laws else None)

    def stops(self) -> bool:
        """Whether no row wants another draft token; a drafter that stops early says so here."""
        return False

    def _law(self, logits: torch.Tensor, context: Context, drafted: torch.Tensor) -> torch.Tensor:
        logits = logits if logits.dtype in (torch.float32, torch.float64) else logits.float()
        return chain_logits(logits, context, drafted) if self.process else logits

    def _tree(self, context: Context, shape: Shape) -> TokenTree:
        """Level by level; each level re-scores the tree so far, and none of it is kept."""
        assert self._session is not None and self.branching is not None
        before = self._unseen(context, 1)
        if before is not None:
            self._feed(before)
        point = context.law.greedy or self.draw == "point"
        device = getattr(self.model, "device", context.ids.device)
        tree = TokenTree.root(context.roots().to(device))
        parent, level_nodes = [-1], [0]
        q = None if point else torch.zeros(context.batch, 0, self._vocab, device=device)
        nothing = torch.full((context.batch, 0), -1, dtype=torch.int64, device=device)
        for level in range(shape.depth):
            width = self.branching[min(level, len(self.branching) - 1)]
            width = min(width, shape.width, (shape.nodes + 1 - tree.nodes) // len(level_nodes))
            if width < 1:
                break
            bare = TokenTree(tree.tokens, tree.topology)
            logits = self._fit(self._session.score(bare).logits)
            self._session.keep(nothing)
            law = (
                context.law.drafting.logits(logits, bare, context)
                if self.process
                else logits.float()
            )
            frontier = law[:, level_nodes]  # [B, F, V]
            if point:
                fresh = frontier.topk(width, -1).indices
            elif self.draw == "iid":
                flat = torch.softmax(frontier, -1).flatten(0, 1)
                fresh = torch.multinomial(flat, width, True, generator=context.generator)
            else:
                fresh = gumbel_top_k(frontier, width, context.generator)
            tokens = torch.cat([tree.tokens, fresh.reshape(context.batch, -1)], 1)
            start = tree.nodes
            parent += [node for node in level_nodes for _ in range(width)]
            level_nodes = list(range(start, tokens.shape[1]))
            if q is not None:
                rows = torch.softmax(law, -1)
                q = torch.cat([q, rows[:, q.shape[1] :]], 1)
            filler = None
            if q is not None:
                missing = tokens.shape[1] - q.shape[1]
                filler = torch.cat([q, q.new_zeros(context.batch, missing, self._vocab)], 1)
            draw: Draw = "point" if point else self.draw
            tree = TokenTree(tokens, Topology.of(parent).to(device), None, draw, filler)
        return tree

    def ready(self, context: Context, shape: Shape) -> Shape:
        """Feed all but the roots and say what there is room for; for drafters of trees.

        After it :meth:`laws` can be asked about trees that stand on the roots.
        """
        self._start = list(context.lengths)
        depth = min(shape.depth, shape.nodes)
        if self.model.max_length is not None:
            depth = min(depth, self.model.max_length - max(context.lengths))
        if depth < 1:
            return shape.capped(0, 0)
        before = self._unseen(context, 1)
        if before is not None:
            self._feed(before)
        width = shape.width if self.model.reach == "tree" else 1
        return shape.capped(shape.nodes, depth, width)

    def laws(self, context: Context, tree: TokenTree) -> torch.Tensor:
        """The draft model's processed logits at every node of a tree [B, N, V]; keeps none of it.

        Needs :meth:`ready` before it in the same round.
        """
        assert self._session is not None
        tree = tree.to(getattr(self.model, "device", tree.tokens.device))
        # what was drawn above does not matter here, and a drawn tree would have to carry q
        bare = TokenTree(tree.tokens, tree.topology, tree.valid)
        logits = self._fit(self._session.score(bare).logits)
        self._session.keep(torch.full_like(bare.tokens[:, :0], -1))
        return (
            context.law.drafting.logits(logits, bare, context) if self.process else logits.float()
        )

    def grow(
        self,
        context: Context,
        shape: Shape,
        *,
        branch: int | None = None,
        keep: int | None = None,
        gain: float = 0.0,
    ) -> tuple[TokenTree, torch.Tensor]:
        """Draft the tree of the ``shape.nodes`` largest path probabilities, level by level.

        See :func:`isthmus.decoding.builders.best_first`; each level is one forward of the draft
        model over the nodes that can still have a child in the tree.

        Args:
            context: As in :meth:`propose`.
            shape: Limits.
            branch: Children of a node at most; ``shape.nodes`` when None.
            keep: Nodes expanded on a level at most.
            gain: Stop after a level that adds no more expected tokens than this in any row.

        Returns:
            The chosen tree, best nodes first, and the path log-probability of each node [B, N].
        """
        shape = self.ready(context, shape)
        device = getattr(self.model, "device", context.ids.device)
        roots = context.roots().to(device)
        if shape.nodes == 0:
            return TokenTree.root(roots), torch.zeros(len(roots), 1, device=device)
        growth = Growth(roots, shape.nodes)
        branch = min(branch or shape.nodes, shape.width)
        rows = torch.arange(len(roots), device=device)[:, None]
        before = growth.expected()
        for _ in range(shape.depth):
            tree, place = growth.frontier()
            law = self.laws(context, tree)[rows, place]  # [B, F, V]
            level = growth.add(torch.log_softmax(law, -1), branch=branch, keep=keep)
            now = growth.expected()
            if level.tokens.shape[1] == 0 or not bool((now - before > gain).any()):
                break
            before = now
        return growth.tree(), growth.scores

    def fill(self, context: Context, shape: Shape, plan: RankTree) -> TokenTree:
        """Draft a static tree: the node of rank r below a node is its r-th likeliest child.

        Args:
            context: As in :meth:`propose`.
            shape: Limits; what lies outside of them is left out.
            plan: The tree, best or shallowest nodes first.
        """
        shape = self.ready(context, shape)
        plan = plan.limit(shape.nodes, shape.depth, min(shape.width, self._vocab))
        device = getattr(self.model, "device", context.ids.device)
        tokens = context.roots().to(device)[:, None].repeat(1, len(plan.parents))
        topology = plan.topology.to(device)
        ranks = torch.tensor(plan.ranks, device=device)
        parent, depth = topology.parent[0], topology.depth[0]
        for level in range(1, topology.max_depth + 1):
            inner = torch.unique(parent[depth == level])
            needed = topology.ancestors[0, inner].any(0)[None].expand_as(tokens)
            part = TokenTree(tokens, topology).prune(needed, closed=True)
            place = torch.cumsum(needed[0], 0) - 1
            fresh = (depth == level).nonzero()[:, 0]
            law = self.laws(context, part)
            best = law.topk(int(ranks[fresh].max()) + 1, -1).indices  # [B, N, k]
            tokens = tokens.clone()
            tokens[:, fresh] = best[:, place[parent[fresh]], ranks[fresh]]
        return TokenTree(tokens, topology)

    def observe(self, step: Step) -> None:
        """Forget drafted tokens that were not accepted."""
        assert self._session is not None
        known = [n + a for n, a in zip(self._start, step.accepted, strict=True)]
        self._session.truncate(
            [min(a, b) for a, b in zip(known, self._session.lengths, strict=True)]
        )
        self._start = list(step.context.lengths)

    def select(self, rows: Sequence[int]) -> None:
        """Keep only the given rows."""
        assert self._session is not None
        self._session = self._session.fork(rows)
        self._start = [self._start[r] for r in rows]


def gumbel_top_k(logits: torch.Tensor, k: int, generator: torch.Generator) -> torch.Tensor:
    """Draw k tokens without replacement, in draw order, from softmax(logits) [..., V].

    The k largest of logits + Gumbel noise, *sorted*, are a draw without replacement in order
    (Vieira 2014; Kool et al. 2019, 1903.06059); unsorted they are not.

    Returns:
        int64 [..., k].
    """
    noise = gumbel_noise(logits.shape, generator, logits.device)
    return (logits.double() + noise).topk(k, -1, sorted=True).indices


def gumbel_noise(
    shape: Sequence[int], generator: torch.Generator, device: torch.device | None = None
) -> torch.Tensor:
    """Gumbel(0) noise, float64: adding it to log-probabilities and taking the argmax is a draw."""
    u = torch.rand(tuple(shape), generator=generator, device=device, dtype=torch.float64)
    return -torch.log(-torch.log(u.clamp(min=1e-300)))
