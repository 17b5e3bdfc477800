"""Builders of chosen token trees: best-first growth, tries of beams, calibrated static trees.

They are the tensor part that tree drafters share; where the probabilities come from (a draft model,
trained heads, a table) is the drafter's business. Every tree made here is *chosen* (``draw =
"point"``): children are picked by their value, so it is verified by matching, never with q.

The score of a node is its path log-probability ``log v = sum log q`` along the path. It never
grows with depth, so the n largest scores are closed under ancestors: they are the tree of n nodes
with the most expected accepted tokens, ``E = sum v``. Growth is level by level::

    roots ── expand ──> log q [B, F, V] ── top ``branch`` of each, top ``nodes`` of all ──> store
               ^                                                                            │
               └────────── frontier: nodes of the new level that are still in the store <───┘

A node that has left the ``nodes`` best can have no descendant among them, so it is never expanded;
nothing is lost by that.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch

from isthmus.decoding.tree import TokenTree, Topology, chain_topology
from isthmus.errors import InvalidInputError


@dataclass(frozen=True)
class Level:
    """The nodes to expand next: the frontier of a :class:`Growth`.

    Attributes:
        tokens: int64 [B, F].
        parent: Position of each node's parent in the frontier before this one, int64 [B, F]; what
            a drafter with states of its own gathers them by.
        score: Path log-probabilities [B, F]; -inf marks padding.
        depth: Levels below the root; 0 for the roots themselves.
    """

    tokens: torch.Tensor
    parent: torch.Tensor
    score: torch.Tensor
    depth: int

    @property
    def valid(self) -> torch.Tensor:
        """Nodes that are no padding, bool [B, F]."""
        return self.score > -torch.inf


Expand = Callable[[Level], torch.Tensor]
"""From a frontier to the log-probabilities of its children, [B, F, V]."""


class Growth:
    """A tree that grows level by level and keeps the best ``nodes`` of all levels.

    Args:
        roots: int64 [B].
        nodes: Draft nodes at most, the root not counted.

    Raises:
        InvalidInputError: ``nodes`` is below 1.

    Example:
        >>> growth = Growth(torch.tensor([9]), nodes=2)
        >>> level = growth.add(torch.tensor([[[0.6, 0.3, 0.1]]]).log(), branch=3)
        >>> level.tokens.tolist()
        [[0, 1]]
        >>> _ = growth.add(torch.tensor([[[0.9, 0.1, 0.0], [0.5, 0.5, 0.0]]]).log(), branch=2)
        >>> growth.tree().tokens.tolist(), [round(e, 2) for e in growth.expected().tolist()]
        ([[9, 0, 0]], [1.14])
    """

    def __init__(self, roots: torch.Tensor, nodes: int) -> None:
        if nodes < 1:
            raise InvalidInputError(f"a tree needs at least one node, got nodes={nodes}")
        self.nodes = nodes
        zero = torch.zeros_like(roots)[:, None]
        # the store, best first, so that a parent stands before its children; [B, 1 + up to nodes]
        self._tokens, self._parent = roots[:, None], zero - 1
        self._score = torch.zeros_like(zero, dtype=torch.float32)
        self._depth = zero
        self._node = zero  # place of each frontier node in the store, [B, F]
        self.level = Level(self._tokens, zero, self._score, 0)

    def add(self, logp: torch.Tensor, *, branch: int, keep: int | None = None) -> Level:
        """Give the frontier its children and return the next frontier.

        Args:
            logp: Log-probabilities of the children of every frontier node [B, F, V], at most 0.
            branch: Children considered for each node, the likeliest ones.
            keep: Nodes of the next frontier at most; None keeps all that are among the best
                ``nodes``.

        Returns:
            The next frontier; empty (F = 0) when no child is among the best nodes.

        Raises:
            InvalidInputError: ``logp`` does not fit the frontier, or a size is below 1.
        """
        b, f = self.level.tokens.shape
        if logp.ndim != 3 or logp.shape[:2] != (b, f):
            raise InvalidInputError(
                f"log-probabilities {tuple(logp.shape)} do not fit a frontier of {b} x {f} nodes"
            )
        if branch < 1 or (keep is not None and keep < 1):
            raise InvalidInputError(f"branch and keep must be 1 or more, got {branch} and {keep}")
        k = min(branch, self.nodes, logp.shape[-1])
        # rounding may lift a log-probability above 0, which would break the closure
        top = logp.topk(k, -1, sorted=True)
        score = self.level.score[..., None] + top.values.clamp(max=0.0)  # [B, F, k]
        score = score.flatten(1).nan_to_num(nan=-torch.inf, neginf=-torch.inf)
        above = torch.arange(f, device=logp.device)[:, None].expand(b, f, k).reshape(b, f * k)
        self._merge(top.indices.flatten(1), self._node.gather(1, above), score, above)
        return self._advance(keep)

    def _merge(
        self, tokens: torch.Tensor, parent: torch.Tensor, score: torch.Tensor, above: torch.Tensor
    ) -> None:
        """Keep the best of the old nodes and the new ones [B, C], renumbering parents."""
        old = self._tokens.shape[1]
        depth = self.level.depth + 1
        both = torch.cat([self._score.to(score.dtype), score], 1)
        # a stable sort: among equals the shallower node, which was there before, comes first
        order = both.sort(dim=1, descending=True, stable=True).indices[:, : self.nodes + 1]
        place = torch.full_like(both, -1, dtype=torch.int64)
        steps = torch.arange(order.shape[1], device=order.device).expand_as(order)
        place.scatter_(1, order, steps)
        self._score = both.gather(1, order)
        self._tokens = torch.cat([self._tokens, tokens], 1).gather(1, order)
        links = torch.cat([self._parent, parent], 1).gather(1, order)
        self._parent = place.gather(1, links.clamp(min=0))
        self._parent[:, 0] = -1
        fresh = torch.full_like(tokens, depth)
        self._depth = torch.cat([self._depth, fresh], 1).gather(1, order)
        unknown = torch.zeros_like(self._tokens[:, :1]).expand(-1, old)
        self._above = torch.cat([unknown, above], 1).gather(1, order)
        padding = self._score == -torch.inf
        self._parent = torch.where(padding, 0, self._parent)

    def _advance(self, keep: int | None) -> Level:
        """The nodes of the newest level that are still in the store, the best ones first."""
        depth = self.level.depth + 1
        fresh = (self._depth == depth) & (self._score > -torch.inf)
        count = int(fresh.sum(1).max())
        width = count if keep is None else min(count, keep)
        index = torch.sort((~fresh).to(torch.uint8), dim=1, stable=True).indices[:, :width]
        valid = fresh.gather(1, index)
        self._node = index
        self.level = Level(
            torch.where(valid, self._tokens.gather(1, index), 0),
            torch.where(valid, self._above.gather(1, index), 0),
            torch.where(valid, self._score.gather(1, index), -torch.inf),
            depth,
        )
        return self.level

    def expected(self) -> torch.Tensor:
        """Expected accepted tokens of the best tree so far, E = sum of v, [B]."""
        return self._score[:, 1:].exp().sum(1)

    @property
    def scores(self) -> torch.Tensor:
        """Path log-probability of every node of :meth:`tree`, the root's 0 first, [B, N]."""
        return self._score[:, : int((self._score > -torch.inf).sum(1).max())]

    def tree(self) -> TokenTree:
        """The best nodes so far, best first: the first m of them are the best tree of m nodes."""
        valid = self._score > -torch.inf
        width = int(valid.sum(1).max())
        parent, valid = self._parent[:, :width], valid[:, :width]
        if width <= 2:
            topology = chain_topology(width).to(parent.device)
        elif len(parent) == 1:
            topology = Topology.of(parent[0].tolist()).to(parent.device)
        else:
            topology = Topology(parent)
        ragged = None if bool(valid.all()) else valid
        return TokenTree(self._tokens[:, :width], topology, ragged)

    def frontier(self) -> tuple[TokenTree, torch.Tensor]:
        """The frontier with its ancestors as a tree, for drafters that score trees.

        Returns:
            The tree, and the place of every frontier node in it, int64 [B, F]; padding points at
            the root.
        """
        tree = self.tree()
        node = torch.where(self.level.valid, self._node, 0)
        ancestors = tree.topology.ancestors.expand(tree.batch, -1, -1)
        rows = torch.arange(tree.batch, device=node.device)[:, None]
        needed = ancestors[rows, node].any(1)  # [B, N]
        needed[:, 0] = True
        renumber = torch.cumsum(needed.any(0), 0) - 1
        return tree.prune(needed, closed=True), renumber[node]


def best_first(
    expand: Expand,
    roots: torch.Tensor,
    *,
    nodes: int,
    depth: int,
    branch: int,
    keep: int | None = None,
    gain: float = 0.0,
) -> TokenTree:
    """Grow the tree of the ``nodes`` largest path probabilities.

    With ``keep = branch = k`` this is EAGLE-2's dynamic tree (2406.16858, sec. 4); with ``keep``
    left out and ``branch = nodes`` it is the optimum over all trees of that size (OPT-Tree,
    2406.17276, alg. 1).

    Args:
        expand: Log-probabilities [B, F, V] of the children of a :class:`Level`'s nodes; called
            once a level, first with the roots.
        roots: int64 [B].
        nodes: Draft nodes at most.
        depth: Levels at most.
        branch: Children of a node at most.
        keep: Nodes expanded on a level at most.
        gain: Stop when a level raised the expected accepted tokens by no more than this in every
            row.

    Returns:
        A chosen tree, best nodes first.

    Raises:
        InvalidInputError: A size is below 1.

    Example:
        >>> law = torch.tensor([0.5, 0.3, 0.2]).log()
        >>> tree = best_first(
        ...     lambda level: law.expand(*level.tokens.shape, 3),
        ...     torch.tensor([0]), nodes=4, depth=3, branch=3)
        >>> tree.topology.parent.tolist(), tree.tokens.tolist()
        ([[-1, 0, 0, 1, 0]], [[0, 0, 1, 0, 2]])
    """
    growth = Growth(roots, nodes)
    before = growth.expected()
    for _ in range(depth):
        level = growth.add(expand(growth.level), branch=branch, keep=keep)
        now = growth.expected()
        if level.tokens.shape[1] == 0 or not bool((now - before > gain).any()):
            break
        before = now
    return growth.tree()


def beam_trie(
    roots: torch.Tensor, beams: torch.Tensor, valid: torch.Tensor | None = None
) -> TokenTree:
    """Merge the common prefixes of beams into one tree, breadth first.

    Args:
        roots: int64 [B].
        beams: Token paths below each root, int64 [B, W, L], the best beam first.
        valid: Tokens that belong to their beam, bool [B, W, L]; what follows the first False of a
            beam is left out.

    Returns:
        A chosen tree; rows with fewer nodes are padded with invalid ones.

    Raises:
        InvalidInputError: The shapes do not fit.

    Example:
        >>> tree = beam_trie(torch.tensor([9]), torch.tensor([[[1, 2], [3, 4], [1, 5]]]))
        >>> tree.tokens.tolist(), tree.topology.parent.tolist()
        ([[9, 1, 3, 2, 5, 4]], [[-1, 0, 0, 1, 1, 2]])
    """
    if (
        beams.ndim != 3
        or len(beams) != len(roots)
        or (valid is not None and valid.shape != beams.shape)
    ):
        raise InvalidInputError(
            f"beams must be [rows, beams, length] for {len(roots)} roots, got {tuple(beams.shape)}"
        )
    b, w, length = beams.shape
    if w == 0 or length == 0:
        return TokenTree.root(roots)
    real = torch.ones_like(beams, dtype=torch.bool) if valid is None else valid
    real = real.long().cumprod(-1).bool()
    same = (beams[:, :, None] == beams[:, None]).long().cumprod(-1).bool()  # [B, W, W, L]
    # the first beam with the same prefix stands for all of them
    each = torch.arange(w, device=beams.device)
    owner = torch.where(same & real[:, None], each[:, None], w).amin(2).clamp(max=w - 1)
    own = real & (owner == each[:, None])
    place = roots.new_zeros(b, w)  # node of each beam's prefix so far
    tokens, parents, alive = [roots[:, None]], [roots.new_full((b, 1), -1)], [own.new_ones(b, 1)]
    start = 1
    for step in range(length):
        here = own[:, :, step]
        count = int(here.sum(1).max())
        if count == 0:
            break
        # siblings together: by parent, then by beam; beams that own no node come last
        key = torch.where(here, place * w + each, torch.iinfo(torch.int64).max)
        order = key.argsort(1)[:, :count]
        stands = here.gather(1, order)
        tokens.append(torch.where(stands, beams[:, :, step].gather(1, order), 0))
        parents.append(torch.where(stands, place.gather(1, order), 0))
        alive.append(stands)
        spot = torch.zeros_like(place).scatter_(
            1, order, torch.arange(start, start + count, device=place.device).expand_as(order)
        )
        place = torch.where(real[:, :, step], spot.gather(1, owner[:, :, step]), place)
        start += count
    links, ok = torch.cat(parents, 1), torch.cat(alive, 1)
    topology = Topology.of(links[0].tolist()).to(links.device) if b == 1 else Topology(links)
    return TokenTree(torch.cat(tokens, 1), topology, None if bool(ok.all()) else ok)


def calibrate(accuracy: torch.Tensor, nodes: int) -> list[tuple[int, ...]]:
    """The static tree with the most expected accepted tokens, from rank accuracies.

    Head k predicts the k-th token ahead and is right with its candidate of rank r in a share
    ``accuracy[k, r]`` of cases. If heads err independently, a path of ranks stands with the
    product of its shares; the best path is added until there are ``nodes`` (Medusa, 2401.10774,
    sec. 2.3.3).

    Args:
        accuracy: Shares [K, R], each between 0 and 1.
        nodes: Paths to choose.

    Returns:
        Rank paths, best first; every prefix of one comes before it. Paths without any chance are
        left out.

    Raises:
        InvalidInputError: ``accuracy`` is no table of shares, or ``nodes`` is negative.

    Example:
        >>> calibrate(torch.tensor([[0.6, 0.2], [0.5, 0.1]]), 4)
        [(0,), (0, 0), (1,), (1, 0)]
    """
    if accuracy.ndim != 2 or not bool(((accuracy >= 0) & (accuracy <= 1)).all()):
        raise InvalidInputError("accuracy must be a table [heads, ranks] of shares from 0 to 1")
    if nodes < 0:
        raise InvalidInputError(f"nodes must be 0 or more, got {nodes}")
    table = accuracy.double().tolist()
    heap: list[tuple[float, int, tuple[int, ...]]] = []

    def open_below(chance: float, path: tuple[int, ...]) -> None:
        if len(path) < len(table):
            for rank, share in enumerate(table[len(path)]):
                if chance * share > 0.0:
                    # among equals the shorter path, so that a prefix always comes first
                    heapq.heappush(heap, (-chance * share, len(path) + 1, (*path, rank)))

    open_below(1.0, ())
    chosen: list[tuple[int, ...]] = []
    while heap and len(chosen) < nodes:
        chance, _, path = heapq.heappop(heap)
        chosen.append(path)
        open_below(-chance, path)
    return chosen


@dataclass(frozen=True)
class RankTree:
    """A static tree whose nodes are ranks: the node of path (0, 1) is the second-best successor.

    Attributes:
        parents: Parent of each node, the root first.
        ranks: Rank of each node among its siblings' candidates; 0 for the root.

    Example:
        >>> static = RankTree.of([(0,), (0, 0), (1,)])
        >>> static.fill(torch.tensor([9]), torch.tensor([[[5, 6], [7, 8]]])).tokens.tolist()
        [[9, 5, 7, 6]]
    """

    parents: tuple[int, ...]
    ranks: tuple[int, ...]

    @classmethod
    def of(cls, paths: Sequence[Sequence[int]]) -> RankTree:
        """The tree of the given rank paths, in their order.

        Raises:
            InvalidInputError: A path comes before its own prefix, twice, or holds no rank.
        """
        place: dict[tuple[int, ...], int] = {(): 0}
        parents, ranks = [-1], [0]
        for path in map(tuple, paths):
            if not path or path in place or path[:-1] not in place or min(path) < 0:
                raise InvalidInputError(
                    f"rank path {list(path)} is empty, negative, twice there, or before its prefix"
                )
            parents.append(place[path[:-1]])
            ranks.append(path[-1])
            place[path] = len(parents) - 1
        return cls(tuple(parents), tuple(ranks))

    @cached_property
    def topology(self) -> Topology:
        """Parent links."""
        topology = Topology.of(self.parents)
        return chain_topology(topology.nodes) if topology.is_chain else topology

    def limit(self, nodes: int, depth: int, width: int) -> RankTree:
        """The first ``nodes`` nodes that lie within ``depth`` levels and ``width`` first ranks."""
        return _limited(self, nodes, depth, width)

    def fill(self, roots: torch.Tensor, candidates: torch.Tensor) -> TokenTree:
        """Put in tokens that depend on depth and rank only, as those of parallel heads do.

        Args:
            roots: int64 [B].
            candidates: Candidates of every head, best first, int64 [B, K, R].

        Raises:
            InvalidInputError: The tree asks for a head or rank that is not there.
        """
        topology = self.topology.to(candidates.device)
        if topology.max_depth > candidates.shape[1] or max(self.ranks) >= candidates.shape[2]:
            raise InvalidInputError(
                f"a tree of depth {topology.max_depth} and rank {max(self.ranks)} needs more "
                f"candidates than {tuple(candidates.shape)}"
            )
        rank = torch.tensor(self.ranks[1:], dtype=torch.int64, device=candidates.device)
        tokens = candidates[:, topology.depth[0, 1:] - 1, rank]
        return TokenTree(torch.cat([roots[:, None].to(tokens), tokens], 1), topology)


@lru_cache(maxsize=64)
def sliced(branching: tuple[int, ...]) -> tuple[Topology, ...]:
    """One tree, and its leading block for every number of levels (2409.10644, sec. 3.2).

    In breadth-first order the first levels of a tree are a tree, so its mask is a corner of the
    whole tree's mask and is never rebuilt.

    Args:
        branching: Children of every node on each level.

    Returns:
        The trees of 0, 1, ... levels.

    Example:
        >>> [t.nodes for t in sliced((2, 2))], sliced((2, 2))[1].parent.tolist()
        ([1, 3, 7], [[-1, 0, 0]])
    """
    parents, level, ends = [-1], [0], [1]
    for width in branching:
        fresh = [node for node in level for _ in range(width)]
        level = list(range(len(parents), len(parents) + len(fresh)))
        parents += fresh
        ends.append(len(parents))
    whole = Topology.of(parents)
    return tuple(whole.restrict(torch.arange(n), whole.parent[:, :n]) for n in ends)


@lru_cache(maxsize=256)
def _limited(tree: RankTree, nodes: int, depth: int, width: int) -> RankTree:
    """See :meth:`RankTree.limit`; kept, because its topology is built once."""
    place, parents, ranks, levels = {0: 0}, [-1], [0], [0]
    for node in range(1, len(tree.parents)):
        above = place.get(tree.parents[node])
        if len(parents) > nodes or above is None:
            continue
        if tree.ranks[node] < width and levels[above] < depth:
            place[node] = len(parents)
            parents.append(above)
            ranks.append(tree.ranks[node])
            levels.append(levels[above] + 1)
    return RankTree(tuple(parents), tuple(ranks))
