"""A probabilistic circuit: a hidden Chow-Liu tree, whose conditionals are exact and cheap.

::

    x_i ── observed, K levels        p(x) = sum over h of p(h_root) p(x_root | h_root)
     │  emission[i]  [M, K]                  prod p(h_i | h_parent(i)) p(x_i | h_i)
    h_i ── hidden, M states
     │  transition[i]  [M, M]        sum units: transition tables; products: siblings and emission
    h_parent(i)

Any variables may be unknown: their emissions are then 1. In the order in which a walk over the tree
meets the variables, each next conditional p(x_i | x_<i) needs one step down an edge and, when a
subtree is done, one step up: 2 (D - 1) edges for all D of them, instead of a whole pass for each.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from isthmus.errors import InvalidInputError


def mutual_information(values: Tensor, levels: int, cells: int = 4096) -> Tensor:
    """Of each pair of variables, in nats.

    Args:
        values: int64 [N, D].
        levels: K; put together to at most 32, and fewer where variables are many.
        cells: Variables times levels at most; memory is the square of it.

    Returns:
        float64 [D, D].

    Example:
        >>> twins = torch.tensor([[0, 0, 0], [1, 1, 0], [0, 0, 1], [1, 1, 1]])
        >>> [round(v, 3) for v in mutual_information(twins, 2)[0, 1:].tolist()]  # log 2, and 0
        [0.693, 0.0]
    """
    count, width = values.shape
    bins = max(2, min(32, cells // width))
    if levels > bins:
        values, levels = values * bins // levels, bins
    place = values + torch.arange(width) * levels
    joint, share = torch.zeros(width * levels, width * levels), torch.zeros(width * levels)
    for rows in torch.split(place, 2048):
        one_hot = torch.zeros(len(rows), width * levels).scatter_(1, rows, 1.0)
        joint += one_hot.T @ one_hot
        share += one_hot.sum(0)
    joint = joint.double().view(width, levels, width, levels) / count
    own = share.double().view(width, levels) / count
    apart = own[:, :, None, None] * own[None, None]
    terms = torch.where(joint > 0, joint * (joint / apart.clamp(min=1e-300)).log(), 0.0)
    return terms.sum((1, 3)).clamp(min=0)


def chow_liu(weights: Tensor) -> list[int]:
    """The maximum spanning tree of pairs of variables, rooted in its middle.

    Args:
        weights: float [D, D], such as the mutual information.

    Returns:
        The parent of each variable; -1 for the root.

    Example:
        >>> chain = torch.tensor([[0.0, 3.0, 1.0], [3.0, 0.0, 2.0], [1.0, 2.0, 0.0]])
        >>> chow_liu(chain)
        [1, -1, 1]
    """
    size = len(weights)
    best, near = weights[0].clone(), torch.zeros(size, dtype=torch.int64)
    inside = torch.zeros(size, dtype=torch.bool)
    inside[0] = True
    edges: list[list[int]] = [[] for _ in range(size)]
    for _ in range(size - 1):  # Prim: the heaviest edge that leaves the tree
        new = int(torch.where(inside, -torch.inf, best).argmax())
        old = int(near[new])
        edges[new].append(old)
        edges[old].append(new)
        inside[new] = True
        closer = weights[new] > best
        best, near = torch.where(closer, weights[new], best), torch.where(closer, new, near)

    def walk(start: int) -> tuple[list[int], list[int]]:
        parents, line = [-1] * size, [start]
        for node in line:
            for other in edges[node]:
                if other != parents[node]:
                    parents[other] = node
                    line.append(other)
        return parents, line

    end = walk(0)[1][-1]
    parents, line = walk(end)
    path = [line[-1]]
    while parents[path[-1]] >= 0:
        path.append(parents[path[-1]])
    return walk(path[len(path) // 2])[0]  # the middle of a longest path


def chow_liu_nats(train: Tensor, values: Tensor, pseudo: float) -> float:
    """What records cost by a Chow-Liu tree on the variables themselves: the tree without hiding.

    Args:
        train: int64 [N, D], what structure and tables are counted on.
        values: int64 [B, D].
        pseudo: Counts that a level of a variable has beforehand, shared out as it occurs at all.

    Returns:
        Nats of all of them.

    Example:
        >>> even = torch.tensor([[0, 0], [1, 1]] * 500)  # one fair coin, shown twice
        >>> round(chow_liu_nats(even, even[:1], 1e-6), 3)
        0.693
    """
    levels = int(max(train.max(), values.max())) + 1
    nats = 0.0
    for node, parent in enumerate(chow_liu(mutual_information(train, levels))):
        own, seen = train[:, node], values[:, node]
        above = train[:, parent] if parent >= 0 else own * 0
        over = values[:, parent] if parent >= 0 else seen * 0
        counts = torch.zeros(levels, levels, dtype=torch.float64)
        counts.index_put_((above, own), torch.ones(len(own), dtype=torch.float64), accumulate=True)
        share = (own.bincount(minlength=levels) + 0.1) / (len(own) + 0.1 * levels)
        smooth = counts + pseudo * levels * share
        nats -= float((smooth / smooth.sum(1, keepdim=True))[over, seen].log().sum())
    return nats


class Circuit(nn.Module):
    """The hidden tree as a model of D variables of K levels.

    Parameters are logarithms of probabilities that are taken as they are, so that their gradients
    are expected counts (:class:`isthmus.training.optimizers.Em`).

    Args:
        parents: Parent of each variable, -1 for the one root.
        states: M.
        levels: K.

    Raises:
        InvalidInputError: The parents are no tree.
    """

    parents: Tensor

    def __init__(self, parents: list[int], states: int, levels: int) -> None:
        super().__init__()
        size = len(parents)
        roots = [n for n in range(size) if parents[n] == -1]
        line = list(roots)
        depth = [0] * size
        if all(-1 <= p < size for p in parents):
            for node in line:  # grows while it is walked over
                below = [n for n in range(size) if parents[n] == node]
                for n in below:
                    depth[n] = depth[node] + 1
                line += below
        if len(roots) != 1 or len(line) != size:
            raise InvalidInputError("the parents of a circuit's variables make one tree")
        self.root, self.states, self.levels = roots[0], states, levels
        self.register_buffer("parents", torch.tensor(parents))
        self.log_root = nn.Parameter(torch.zeros(states))
        self.log_transition = nn.Parameter(torch.zeros(size, states, states))
        self.log_emission = nn.Parameter(torch.zeros(size, states, levels))
        self.by_depth = [[n for n in range(size) if depth[n] == d] for d in range(max(depth) + 1)]
        self.below = [[n for n in range(size) if parents[n] == p] for p in range(size)]
        self.reset(0.5)

    def reset(self, spread: float, marginals: Tensor | None = None) -> None:
        """Random tables.

        Args:
            spread: How far apart the states begin.
            marginals: Share of each level of each variable [D, K]; even when None.
        """
        with torch.no_grad():
            self.log_root.copy_(torch.full((self.states,), 1 / self.states).log())
            near = torch.randn_like(self.log_transition) * spread
            near += 2.0 * torch.eye(self.states) * (self.states > 1)
            self.log_transition.copy_(near.log_softmax(-1))
            first = torch.zeros_like(self.log_emission)
            if marginals is not None:
                first += marginals.clamp(min=1e-4).log()[:, None]
            noise = torch.randn_like(self.log_emission) * spread
            self.log_emission.copy_((first + noise).log_softmax(-1))

    def forward(self, values: Tensor, known: Tensor | None = None) -> Tensor:
        """Log-likelihood of records.

        Args:
            values: int64 [B, D].
            known: bool [B, D]; variables that are not known are summed out.

        Returns:
            [B].
        """
        leaf = self.log_emission.transpose(1, 2)  # [D, K, M]
        index = torch.arange(values.shape[1], device=values.device)
        belief = leaf[index, values]  # [B, D, M]
        if known is not None:
            belief = torch.where(known[..., None], belief, 0.0)
        transition = self.log_transition.exp()
        coming = torch.zeros_like(belief[:, :0])
        for depth in range(len(self.by_depth) - 1, -1, -1):
            nodes = self.by_depth[depth]
            own = belief[:, nodes]
            if coming.shape[1]:
                below = self.by_depth[depth + 1]
                place = {n: i for i, n in enumerate(nodes)}
                at = [place[int(p)] for p in self.parents[below]]
                own = own.index_add(1, torch.tensor(at, device=values.device), coming)
            if depth == 0:
                return torch.logsumexp(own[:, 0] + self.log_root, -1)
            top = own.amax(-1, keepdim=True).detach()
            summed = torch.einsum("bnc,npc->bnp", (own - top).exp(), transition[nodes])
            coming = summed.clamp(min=1e-38).log() + top
        raise AssertionError("a tree has a root")

    def order(self) -> list[int]:
        """Variables as a walk over the tree meets them, small subtrees first."""
        sizes = [1] * len(self.below)
        for nodes in reversed(self.by_depth):
            for n in nodes:
                sizes[n] += sum(sizes[c] for c in self.below[n])
        line, waiting = [], [self.root]
        while waiting:
            node = waiting.pop()
            line.append(node)
            waiting += sorted(self.below[node], key=lambda c: (-sizes[c], c))
        return line


Floats = npt.NDArray[np.float64]
Choose = Callable[[int, Floats], npt.NDArray[np.int64]]
"""Told a variable and the conditionals [B, K] of its values, gives the values [B]."""


class Walker:
    """Conditionals of a circuit, one variable after the other, in float64 on the CPU.

    Args:
        circuit: The circuit.

    Attributes:
        edges: Edges that were evaluated so far: M x M products for each record.
    """

    def __init__(self, circuit: Circuit) -> None:
        def table(p: Tensor) -> Floats:
            found: Floats = p.detach().double().exp().cpu().numpy()
            # float32 rows sum to one but for 1e-7, which schedules would add up differently
            found /= found.sum(-1, keepdims=True)
            return found

        self.circuit = circuit
        self.root = table(circuit.log_root)
        self.transition = table(circuit.log_transition)
        self.emission = table(circuit.log_emission)
        self.edges = 0

    def fast(self, batch: int, choose: Choose) -> None:
        """Walk over all variables; each edge is gone down once and up once.

        Args:
            batch: Records B at once.
            choose: Called for each variable in the circuit's order.
        """
        order = self.circuit.order()
        parents = self.circuit.parents.tolist()
        belief: dict[int, Floats] = {}  # p(h, what is known outside the subtrees to come)
        inside: dict[int, Floats] = {}  # p(what is known of the subtree | h)
        line = [self.root[None].repeat(batch, 0)]
        for place, node in enumerate(order):
            belief[node] = line.pop() if place == 0 else self._down(belief[parents[node]], node)
            values = choose(node, belief[node] @ self.emission[node])
            seen = self.emission[node].T[values]  # [B, M]
            belief[node] = _scaled(belief[node] * seen)
            inside[node] = seen
            # whatever subtree ends here is summed up into the one above
            after = order[place + 1] if place + 1 < len(order) else -1
            done = node
            while done != self.circuit.root and (after < 0 or parents[after] != done):
                above = parents[done]
                message = self._up(inside.pop(done), done)
                inside[above] = _scaled(inside[above] * message)
                belief[above] = _scaled(belief[above] * message)
                del belief[done]
                if after >= 0 and parents[after] == above:
                    break
                done = above

    def naive(self, batch: int, choose: Choose) -> None:
        """The same conditionals by a whole pass over the circuit for each of them."""
        known: dict[int, npt.NDArray[np.int64]] = {}
        parents, root = self.circuit.parents.tolist(), self.circuit.root
        for node in self.circuit.order():
            inside = [np.ones((batch, self.circuit.states)) for _ in parents]
            message: dict[int, Floats] = {}
            for nodes in reversed(self.circuit.by_depth):
                for n in nodes:
                    if n in known:
                        inside[n] = inside[n] * self.emission[n].T[known[n]]
                    for c in self.circuit.below[n]:
                        inside[n] = _scaled(inside[n] * message[c])
                    if n != root:
                        message[n] = self._up(inside[n], n)
            path = [node]
            while path[-1] != root:
                path.append(parents[path[-1]])
            belief = self.root[None].repeat(batch, 0)
            for above, below in zip(path[::-1], path[::-1][1:], strict=False):
                outside = belief
                if above in known:
                    outside = outside * self.emission[above].T[known[above]]
                for c in self.circuit.below[above]:
                    if c != below:
                        outside = _scaled(outside * message[c])
                belief = self._down(_scaled(outside), below)
            for c in self.circuit.below[node]:
                belief = _scaled(belief * message[c])
            known[node] = choose(node, belief @ self.emission[node])

    def _down(self, belief: Floats, node: int) -> Floats:
        self.edges += 1
        moved: Floats = belief @ self.transition[node]
        return moved

    def _up(self, inside: Floats, node: int) -> Floats:
        self.edges += 1
        moved: Floats = inside @ self.transition[node].T
        return _scaled(moved)


def _scaled(rows: Floats) -> Floats:
    """Rows whose largest entry is 1: factors cancel in conditionals."""
    top = rows.max(-1, keepdims=True)
    out: Floats = rows / np.where(top > 0, top, 1.0)
    return out
