"""Token trees: what a drafter proposes and a target scores in one forward.

Node 0 is the root: the last committed token, already decided but not yet in the cache. Every other
node is a draft token. A tree of one node is plain decoding and a chain is a tree, so there is one
code path. Nodes stand in an order in which parents come before children, siblings together and in
the order in which they were drawn::

    root ── the ── cat          tokens  [root, the, a, cat]
         └─ a                   parent  [-1,   0,   0, 1  ]

The position of node i is ``L + depth[i]`` where L is the number of cached tokens; the logits at a
node are the law of its *child*.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Literal

import numpy as np
import torch

from isthmus.errors import InvalidInputError

Draw = Literal["point", "iid", "without"]
"""How the children of a node were obtained: chosen (no law), drawn with or without replacement."""


class Topology:
    """Parent links of a tree and what follows from them; immutable, shared by many trees.

    Args:
        parent: int64 [R, N] with R = 1 (all rows alike) or R = B; ``parent[:, 0] = -1`` and
            ``parent[:, i] < i``.

    Attributes:
        parent: As given.
        depth: int64 [R, N], 0 at the root.
        ancestors: bool [R, N, N], ``ancestors[r, i, j]`` when j is i or above it.
        max_depth: Deepest level in any row.
        is_chain: Every node's parent is the node before it, in every row.

    Raises:
        InvalidInputError: A parent is not earlier than its child.

    Example:
        >>> t = Topology.of([-1, 0, 0, 1])
        >>> t.depth.tolist(), t.max_depth, t.is_chain
        ([[0, 1, 1, 2]], 2, False)
        >>> t.ancestors[0].int().tolist()
        [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]]
    """

    def __init__(self, parent: torch.Tensor) -> None:
        if parent.ndim != 2 or parent.shape[1] == 0:
            raise InvalidInputError(f"parent must be [rows, nodes], got {tuple(parent.shape)}")
        n = parent.shape[1]
        arange = torch.arange(n, device=parent.device)
        if bool((parent[:, 0] != -1).any()) or bool(
            ((parent[:, 1:] >= arange[1:]) | (parent[:, 1:] < 0)).any()
        ):
            raise InvalidInputError("a tree needs parent[0] = -1 and 0 <= parent[i] < i elsewhere")
        self.parent = parent
        self._elsewhere: dict[torch.device, Topology] = {}
        self.is_chain = bool((parent == arange - 1).all())
        if self.is_chain:
            self.depth = arange.expand_as(parent)
            self.ancestors = torch.ones(n, n, dtype=torch.bool, device=parent.device).tril()[None]
            self.max_depth = n - 1
            return
        safe = parent.clamp(min=0)
        closure = torch.eye(n, dtype=torch.bool, device=parent.device).expand(len(parent), n, n)
        grown = closure | closure.gather(1, safe[:, :, None].expand_as(closure))
        # after t rounds every node knows t levels above it, so `max_depth` rounds close the set
        while not torch.equal(grown, closure):
            closure, grown = grown, grown | grown.gather(1, safe[:, :, None].expand_as(closure))
        self.ancestors = closure
        self.depth = closure.sum(-1) - 1
        self.max_depth = int(self.depth.max())

    def restrict(self, index: torch.Tensor, parent: torch.Tensor) -> Topology:
        """The topology of the nodes ``index`` [M], closed under ancestors, with their parents."""
        small = object.__new__(Topology)
        small._elsewhere = {}
        small.parent = parent
        small.depth = self.depth[:, index]
        small.ancestors = self.ancestors[:, index][:, :, index]
        small.max_depth = int(small.depth.max())
        # rows may differ: one that is a chain does not make chains of the others
        before = torch.arange(-1, len(index) - 1, device=parent.device)
        small.is_chain = bool((parent == before).all())
        return small

    @cached_property
    def parents_list(self) -> list[int]:
        """Parents of row 0 as a list, for walks over one row."""
        parents: list[int] = self.parent[0].tolist()
        return parents

    @classmethod
    def of(cls, parent: Sequence[int]) -> Topology:
        """Build the topology of one row from a list of parents."""
        row = torch.tensor([list(parent)], dtype=torch.int64)
        n = len(parent)
        if not n or parent[0] != -1 or any(not 0 <= p < i for i, p in enumerate(parent) if i):
            return cls(row)  # which says what is wrong
        # one row and small: rows of NumPy cost less than rounds of tensor operations
        ancestors = np.eye(n, dtype=bool)
        for node in range(1, n):
            ancestors[node] |= ancestors[parent[node]]
        made = object.__new__(cls)
        made._elsewhere = {}
        made.parent = row
        made.ancestors = torch.from_numpy(ancestors)[None]
        made.depth = torch.from_numpy(ancestors.sum(1) - 1)[None]
        made.max_depth = int(made.depth.max())
        made.is_chain = made.max_depth == n - 1
        return made

    @property
    def nodes(self) -> int:
        """Nodes N, the root included."""
        return self.parent.shape[1]

    @cached_property
    def children(self) -> torch.Tensor:
        """Children of each node in draw order, int64 [R, N, K], padded with -1."""
        n = self.nodes
        is_child = self.parent[:, None, :] == torch.arange(n, device=self.parent.device)[:, None]
        k = max(1, int(is_child.sum(-1).max()))
        # a stable sort brings the children of each node to the front in index order
        order = torch.sort((~is_child).to(torch.uint8), dim=-1, stable=True).indices[..., :k]
        return torch.where(is_child.gather(-1, order), order, -1)

    def to(self, device: torch.device) -> Topology:
        """This topology on another device; the copy is kept for the next call."""
        if self.parent.device == device:
            return self
        if device not in self._elsewhere:
            self._elsewhere[device] = Topology(self.parent.to(device))
        return self._elsewhere[device]

    def paths(self) -> list[list[int]]:
        """Node indices of every root-to-leaf path of row 0, for pictures."""
        parent = self.parent[0].tolist()
        inner = set(parent)
        out = []
        for leaf in range(self.nodes):
            if leaf in inner:
                continue
            path, node = [], leaf
            while node >= 0:
                path.append(node)
                node = parent[node]
            out.append(path[::-1])
        return out


@lru_cache(maxsize=256)
def chain_topology(nodes: int) -> Topology:
    """The chain of ``nodes`` nodes, root included."""
    return Topology(torch.arange(-1, nodes - 1)[None])


@dataclass(frozen=True)
class TokenTree:
    """A batch of token trees.

    Attributes:
        tokens: int64 [B, N]; column 0 holds the roots.
        topology: Parent links, shared by all rows or one a row.
        valid: bool [B, N] or None when every node counts; a node that is not valid is padding and
            is never accepted (nor is anything below it).
        draw: How children were obtained.
        q: For ``iid`` and ``without``: law from which the *first* child of each node was drawn,
            after all warping, [B, N, V].

    Raises:
        InvalidInputError: Shapes disagree, q is missing for a drawn tree or given for a chosen one.

    Example:
        >>> tree = TokenTree.chain(torch.tensor([7]), torch.tensor([[1, 2]]))
        >>> tree.tokens.tolist(), tree.topology.parent.tolist()
        ([[7, 1, 2]], [[-1, 0, 1]])
        >>> TokenTree.from_paths(7, [[1, 2], [1, 3], [4]]).tokens.tolist()
        [[7, 1, 4, 2, 3]]
    """

    tokens: torch.Tensor
    topology: Topology
    valid: torch.Tensor | None = None
    draw: Draw = "point"
    q: torch.Tensor | None = None

    def __post_init__(self) -> None:
        b, n = self.tokens.shape
        rows = self.topology.parent.shape[0]
        if n != self.topology.nodes or rows not in (1, b):
            raise InvalidInputError(
                f"tokens {tuple(self.tokens.shape)} do not fit a topology of "
                f"{rows} x {self.topology.nodes} nodes"
            )
        if (self.q is None) != (self.draw == "point") and n > 1:
            raise InvalidInputError(
                "a chosen tree (draw='point') carries no q, a drawn one must carry it"
            )

    @classmethod
    def root(cls, tokens: torch.Tensor) -> TokenTree:
        """Bare roots [B]: plain decoding."""
        return cls(tokens[:, None], chain_topology(1))

    @classmethod
    def chain(
        cls,
        root: torch.Tensor,
        tokens: torch.Tensor,
        *,
        valid: torch.Tensor | None = None,
        q: torch.Tensor | None = None,
    ) -> TokenTree:
        """A chain of T draft tokens [B, T] below each root [B].

        Args:
            root: int64 [B].
            tokens: int64 [B, T].
            valid: bool [B, T] or None.
            q: Laws that the tokens were drawn from [B, T, V], or None for chosen tokens.
        """
        both = torch.cat([root[:, None], tokens], 1)
        if valid is not None:
            valid = torch.cat([torch.ones_like(valid[:, :1]), valid], 1)
        if q is not None:
            # the last node has no child, its row of q is never read
            q = torch.cat([q, torch.zeros_like(q[:, :1])], 1)
        topology = chain_topology(both.shape[1])
        return cls(both, topology, valid, "point" if q is None else "iid", q)

    @classmethod
    def from_paths(cls, root: int, paths: Sequence[Sequence[int]]) -> TokenTree:
        """One row: the trie of the given token paths, breadth first, first come first drawn."""
        tokens, parent = [root], [-1]
        index: dict[tuple[int, ...], int] = {(): 0}
        for level in range(max((len(p) for p in paths), default=0)):
            fresh: dict[tuple[int, ...], None] = {}
            for path in paths:
                if len(path) > level:
                    fresh.setdefault(tuple(path[: level + 1]))
            # siblings must stand together: order by parent, then by first appearance
            for prefix in sorted(fresh, key=lambda p: index[p[:-1]]):
                index[prefix] = len(tokens)
                tokens.append(prefix[-1])
                parent.append(index[prefix[:-1]])
        return cls(torch.tensor([tokens]), Topology.of(parent))

    def to(self, device: torch.device) -> TokenTree:
        """This tree on another device."""
        if self.tokens.device == device:
            return self
        return TokenTree(
            self.tokens.to(device),
            self.topology.to(device),
            None if self.valid is None else self.valid.to(device),
            self.draw,
            None if self.q is None else self.q.to(device),
        )

    def row(self, b: int) -> TokenTree:
        """Row b as a tree of its own."""
        if self.batch == 1:
            return self
        topology = self.topology
        if topology.parent.shape[0] > 1:
            topology = Topology.of(topology.parent[b].tolist())
        valid = None if self.valid is None else self.valid[b : b + 1]
        q = None if self.q is None else self.q[b : b + 1]
        return TokenTree(self.tokens[b : b + 1], topology, valid, self.draw, q)

    @property
    def batch(self) -> int:
        """Rows B."""
        return self.tokens.shape[0]

    @property
    def nodes(self) -> int:
        """Nodes N, root included."""
        return self.tokens.shape[1]

    @property
    def is_chain(self) -> bool:
        """Whether every row is a chain."""
        return self.topology.is_chain

    @cached_property
    def alive(self) -> torch.Tensor:
        """Nodes that are valid and have only valid nodes above them, bool [B, N]."""
        if self.valid is None:
            return torch.ones_like(self.tokens, dtype=torch.bool)
        broken = (self.topology.ancestors & ~self.valid[:, None, :]).any(-1)
        return ~broken

    def drafted(self) -> list[int]:
        """Draft nodes of each row, root and padding not counted."""
        if self.valid is None:
            return [self.nodes - 1] * self.batch
        return [int(n) - 1 for n in self.alive.sum(-1).tolist()]

    def follow(self, tokens: torch.Tensor) -> torch.Tensor:
        """The path that spells the given tokens below the root, as far as the tree has it.

        Args:
            tokens: int64 [B, M], padded with -1.

        Returns:
            Nodes, the root first, int64 [B, M + 1], padded with -1.

        Example:
            >>> tree = TokenTree.from_paths(7, [[1, 2], [1, 3], [4]])
            >>> tree.follow(torch.tensor([[1, 3, 9]])).tolist()
            [[0, 1, 4, -1]]
        """
        tokens = tokens.to(self.tokens.device)
        node = tokens.new_zeros(len(tokens))
        path = [node]
        parent = self.topology.parent
        for wanted in tokens.unbind(1):
            fits = (parent == node[:, None]) & (self.tokens == wanted[:, None]) & self.alive
            found, index = fits.to(torch.uint8).max(1)
            node = torch.where((found > 0) & (node >= 0), index, -2)  # -1 is the root's parent
            path.append(node)
        return torch.stack(path, 1).clamp(min=-1)

    def prune(self, keep: torch.Tensor, *, closed: bool = False) -> TokenTree:
        """Drop nodes that no row keeps; ``keep`` bool [B, N] must be closed under ancestors.

        ``closed`` says that it is, and spares the check.

        Nodes that only some rows keep stay and are marked as padding in the others.

        Raises:
            InvalidInputError: The root or an ancestor of a kept node is dropped.
        """
        if not closed:
            lost = (self.topology.ancestors & ~keep[:, None, :]).any(-1) & keep
            if bool(lost.any()) or not bool(keep[:, 0].all()):
                raise InvalidInputError(
                    "prune must keep the root and every ancestor of a kept node"
                )
        if self.valid is not None:
            keep = keep & self.alive  # padding stays padding
        column = keep.any(0)
        if bool(column.all()):
            return self if bool(keep.all()) else replace(self, valid=keep)
        index = column.nonzero()[:, 0]
        renumber = torch.cumsum(column, 0) - 1
        old = self.topology.parent[:, index]
        parent = torch.where(old < 0, old, renumber[old.clamp(min=0)])
        ragged = None if bool(keep[:, index].all()) else keep[:, index]
        return TokenTree(
            self.tokens[:, index],
            self.topology.restrict(index, parent),
            ragged,
            self.draw,
            None if self.q is None else self.q[:, index],
        )

    def limit(self, *, nodes: int | None = None, depth: int | None = None) -> TokenTree:
        """Keep the first ``nodes`` draft nodes, at most ``depth`` levels below the root."""
        if (nodes is None or self.nodes - 1 <= nodes) and (
            depth is None or self.topology.max_depth <= depth
        ):
            return self
        column = torch.ones(self.nodes, dtype=torch.bool)
        if nodes is not None and self.nodes - 1 > nodes:
            column[nodes + 1 :] = False
        keep = column.to(self.tokens.device).expand_as(self.tokens)
        if depth is not None and self.topology.max_depth > depth:
            keep = keep & (self.topology.depth <= depth)
        return self.prune(keep, closed=True)

    def first_chain(self) -> TokenTree:
        """The chain of first children: what a target that scores chains only can use.

        Taking the first child drawn, whatever it is, looks at no value, so the law stays exact.
        """
        if self.is_chain:
            return self
        first = self.topology.children[..., 0].expand(self.batch, -1)
        node = torch.zeros(self.batch, dtype=torch.int64, device=self.tokens.device)
        index, valid = [node], [torch.ones_like(node, dtype=torch.bool)]
        for _ in range(self.topology.max_depth):
            child = first.gather(1, node[:, None])[:, 0]
            valid.append(valid[-1] & (child >= 0))
            node = torch.where(child >= 0, child, node)
            index.append(node)
        order = torch.stack(index, 1)
        ok = torch.stack(valid, 1) & self.alive.gather(1, order)
        q = None
        if self.q is not None:
            q = self.q.gather(1, order[:, :, None].expand(-1, -1, self.q.shape[-1]))
        return TokenTree(
            self.tokens.gather(1, order),
            chain_topology(order.shape[1]),
            None if bool(ok.all()) else ok,
            self.draw if q is None else "iid",
            q,
        )

    def below(self, stop: torch.Tensor) -> TokenTree:
        """Drop everything below a stop token: nothing is ever drafted after the end.

        Args:
            stop: int64 [K] token ids that end a row.
        """
        if self.nodes < 3 or stop.numel() == 0:
            return self
        ends = torch.isin(self.tokens, stop)
        ends[:, 0] = False
        if not bool(ends.any()):
            return self
        n = self.nodes
        strict = self.topology.ancestors & ~torch.eye(n, dtype=torch.bool, device=ends.device)
        return self.prune(~(strict & ends[:, None, :]).any(-1), closed=True)

    def to_ascii(self, names: Sequence[str] | None = None) -> str:
        """Draw row 0 with one node a line.

        Args:
            names: Text of each node; token ids when left out.

        Example:
            >>> print(TokenTree.from_paths(7, [[1, 2], [4]]).to_ascii())
            7
            ├─ 1
            │  └─ 2
            └─ 4
        """
        labels = [str(t) for t in self.tokens[0].tolist()] if names is None else list(names)
        children = self.topology.children[0].tolist()
        alive = self.alive[0].tolist()
        lines = [labels[0]]

        def draw(node: int, indent: str) -> None:
            kids = [c for c in children[node] if c >= 0 and alive[c]]
            for i, kid in enumerate(kids):
                last = i == len(kids) - 1
                lines.append(f"{indent}{'└─' if last else '├─'} {labels[kid]}")
                draw(kid, indent + ("   " if last else "│  "))

        draw(0, "")
        return "\n".join(lines)


def merge(a: TokenTree, b: TokenTree) -> TokenTree:
    """Fuse two chosen trees of one row with the same root; shared prefixes become one path.

    The nodes of ``a`` come first and in their order, then what ``b`` adds.

    Raises:
        InvalidInputError: A tree was drawn (its q would no longer describe the draw), the roots
            differ, or there is more than one row.

    Example:
        >>> x = TokenTree.from_paths(7, [[1, 2]])
        >>> merge(x, TokenTree.from_paths(7, [[1, 3], [4]])).tokens.tolist()
        [[7, 1, 2, 4, 3]]
    """
    if a.draw != "point" or b.draw != "point":
        raise InvalidInputError("only chosen trees (draw='point') can be merged")
    if a.batch != 1 or b.batch != 1 or int(a.tokens[0, 0]) != int(b.tokens[0, 0]):
        raise InvalidInputError("trees to merge must be one row each and share the root token")
    tokens, parents = [int(a.tokens[0, 0])], [-1]
    known: dict[tuple[int, int], int] = {}
    for tree in (a, b):
        place = {0: 0}  # where each node of this tree stands in the fused one
        own, alive = tree.tokens[0].tolist(), tree.alive[0].tolist()
        for node, parent in enumerate(tree.topology.parents_list):
            if node == 0 or not alive[node]:
                continue
            key = (place[parent], own[node])
            if key not in known:
                known[key] = len(tokens)
                tokens.append(own[node])
                parents.append(place[parent])
            place[node] = known[key]
    return TokenTree(torch.tensor([tokens]), Topology.of(parents))


def stack(trees: Sequence[TokenTree]) -> TokenTree:
    """Put one-row chosen trees of unlike shape into one batch, padded with invalid nodes.

    Raises:
        InvalidInputError: A tree was drawn or has more than one row.
    """
    if any(t.batch != 1 or t.draw != "point" for t in trees):
        raise InvalidInputError("stack takes one-row chosen trees (draw='point')")
    if len(trees) == 1:
        return trees[0]
    n = max(t.nodes for t in trees)
    tokens = torch.zeros(len(trees), n, dtype=torch.int64)
    valid = torch.zeros(len(trees), n, dtype=torch.bool)
    parent = torch.zeros(len(trees), n, dtype=torch.int64)
    chains = all(t.is_chain for t in trees)
    for row, tree in enumerate(trees):
        tokens[row, : tree.nodes] = tree.tokens[0]
        valid[row, : tree.nodes] = tree.alive[0]
        parent[row, : tree.nodes] = tree.topology.parent[0]
    parent[:, 0] = -1
    device = trees[0].tokens.device
    topology = chain_topology(n) if chains else Topology(parent.to(device))
    ragged = None if bool(valid.all()) else valid.to(device)
    return TokenTree(tokens.to(device), topology, ragged)
