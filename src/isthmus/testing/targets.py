"""The contract of a target: however tokens reach the cache, the logits are those of the prefix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from isthmus.decoding.tree import TokenTree, Topology, chain_topology
from isthmus.errors import IsthmusError, UnsupportedModelError
from isthmus.roles import Session, Target


def check_target(
    target: Target,
    *,
    inputs: dict[str, torch.Tensor] | None = None,
    rounds: int = 3,
    tolerance: float | None = None,
    seed: int = 0,
) -> float:
    """Check that a target keeps the contract of :class:`isthmus.roles.Target`.

    Ragged rows are prefilled, random trees scored and random paths kept, rolled back, forked and
    joined by new rows; after every forward each node is compared with a fresh session that was
    given the same prefix in one piece.

    Args:
        target: The target.
        inputs: Encoder inputs of encoder-decoder targets, first axis B; made up when None.
        rounds: Rounds of score and keep.
        tolerance: Largest difference allowed, as a share of the spread of the logits; by default
            what rounding explains for the dtype of the logits.
        seed: Seed of the random trees.

    Returns:
        The largest difference seen, as a share of the spread.

    Raises:
        AssertionError: The contract is broken; the message says where.

    Example:
        >>> from isthmus.decoding.table import TableTarget
        >>> check_target(TableTarget(vocab_size=7))
        0.0
    """
    assert target.vocab_size > 0, "vocab_size must be positive"
    assert target.reach in ("tree", "chain", "step"), f"unknown reach {target.reach!r}"
    assert target.max_nodes >= 0, "max_nodes must not be negative"
    generator = torch.Generator().manual_seed(seed)
    batch = 3 if target.max_batch is None else min(3, target.max_batch)
    given = _inputs(target, inputs, batch)
    checker = _Checker(target, given, tolerance, generator)

    rows = [checker.draw(n) for n in (4, 7, 2)[:batch]]
    session = target.session(batch, **given)
    assert list(session.lengths) == [0] * batch, "a new session must be empty"
    session.prefill(rows)
    checker.lengths(session, rows, "prefill")
    state = rows
    for number in range(rounds):
        state = checker.round(session, state, f"round {number + 1}")
    checker.nothing_kept(session, state)
    state = checker.rolled_back(session, state)
    state = checker.forked(session, state)
    checker.joined(session, state)
    checker.refusals(session)
    return checker.worst


def _inputs(
    target: Target, inputs: dict[str, torch.Tensor] | None, batch: int
) -> dict[str, torch.Tensor]:
    if inputs is not None:
        return {k: v[:batch] for k, v in inputs.items()}
    probe: dict[str, torch.Tensor] = getattr(target, "probe_inputs", dict)()
    return {k: v.expand(batch, *v.shape[1:]).contiguous() for k, v in probe.items()}


class _Checker:
    """The target under test, how its rows are recomputed, and the worst difference so far."""

    def __init__(
        self,
        target: Target,
        inputs: dict[str, torch.Tensor],
        tolerance: float | None,
        generator: torch.Generator,
    ) -> None:
        self.target, self.inputs, self.generator = target, inputs, generator
        self.tolerance = tolerance
        self.worst = 0.0

    def draw(self, count: int) -> torch.Tensor:
        return torch.randint(0, self.target.vocab_size, (count,), generator=self.generator)

    def tree(self, batch: int) -> TokenTree:
        """A random tree of the target's reach; a third of them ragged."""
        n = {"tree": 6, "chain": 4, "step": 1}[self.target.reach]
        n = min(n, self.target.max_nodes + 1)
        tokens = torch.randint(0, self.target.vocab_size, (batch, n), generator=self.generator)
        if self.target.reach != "tree":
            topology = chain_topology(n)
        else:
            parents = [
                [
                    -1,
                    *(
                        int(torch.randint(0, i, (1,), generator=self.generator))
                        for i in range(1, n)
                    ),
                ]
                for _ in range(batch)
            ]
            topology = Topology(torch.tensor(parents))
        valid = None
        if n > 1 and batch > 1:
            valid = torch.ones(batch, n, dtype=torch.bool)
            valid[batch - 1, n - 1] = False
        tree = TokenTree(tokens, topology, valid)
        return tree.to(getattr(self.target, "device", tokens.device))

    def reference(self, row: int, prefix: torch.Tensor) -> torch.Tensor:
        """Logits [V] after a prefix, from a session that has seen nothing else."""
        own = {k: v[row : row + 1] for k, v in self.inputs.items()}
        session = self.target.session(1, **own)
        if len(prefix) > 1:
            session.prefill([prefix[:-1]])
        root = TokenTree.root(prefix[-1:])
        root = root.to(getattr(self.target, "device", prefix.device))
        return session.score(root).logits[0, 0].cpu()

    def compare(self, row: int, prefix: torch.Tensor, got: torch.Tensor, where: str) -> None:
        want = self.reference(row, prefix)
        got = got.cpu()
        assert bool(torch.isfinite(got).all()), f"{where}: logits of a live node are not finite"
        spread = float(want.max() - want.min()) or 1.0
        error = float((got.double() - want.double()).abs().max()) / spread
        limit = self.tolerance
        if limit is None:
            # some models compute parts of a layer in float32 whatever their dtype
            limit = 1e-4 if want.dtype in (torch.float64, torch.float32) else 4e-2
        assert error <= limit, (
            f"{where}: logits differ from those of a session that was given the same "
            f"{len(prefix)} tokens at once by {error:.1e} of their spread (allowed {limit:.0e})"
        )
        self.worst = max(self.worst, error)

    def lengths(self, session: Session, state: Sequence[torch.Tensor], where: str) -> None:
        want = [len(s) for s in state]
        assert list(session.lengths) == want, (
            f"{where}: lengths are {list(session.lengths)}, {want} tokens were committed"
        )

    def scored(
        self, session: Session, state: Sequence[torch.Tensor], where: str
    ) -> tuple[TokenTree, list[list[list[int]]]]:
        """Score a random tree, compare every live node; returns the paths of all nodes."""
        tree = self.tree(len(state))
        logits = session.score(tree).logits
        want = (tree.batch, tree.nodes, self.target.vocab_size)
        assert tuple(logits.shape) == want, f"{where}: logits {tuple(logits.shape)}, not {want}"
        paths: list[list[list[int]]] = []
        parents = tree.topology.parent.expand(tree.batch, -1).tolist()
        for b in range(tree.batch):
            own: list[list[int]] = [[0]]
            for node in range(1, tree.nodes):
                own.append([*own[parents[b][node]], node])
            paths.append(own)
            for node in range(tree.nodes):
                if bool(tree.alive[b, node]):
                    prefix = torch.cat([state[b], tree.tokens[b, own[node]].cpu()])
                    self.compare(b, prefix, logits[b, node], f"{where}, row {b}, node {node}")
        return tree, paths

    def round(self, session: Session, state: list[torch.Tensor], where: str) -> list[torch.Tensor]:
        """Score a tree and keep a random path of each row."""
        tree, paths = self.scored(session, state, where)
        chosen = []
        for b, own in enumerate(paths):
            alive = [n for n in range(tree.nodes) if bool(tree.alive[b, n])]
            pick = int(torch.randint(0, len(alive), (1,), generator=self.generator))
            chosen.append(own[alive[pick]])
        self.keep(session, tree, chosen)
        out = [torch.cat([s, tree.tokens[b, chosen[b]].cpu()]) for b, s in enumerate(state)]
        self.lengths(session, out, f"{where}, after keep")
        return out

    @staticmethod
    def keep(session: Session, tree: TokenTree, chosen: Sequence[Sequence[int]]) -> None:
        width = max(1, *(len(c) for c in chosen)) if chosen else 1
        path = [[*c, *[-1] * (width - len(c))] for c in chosen]
        session.keep(torch.tensor(path, device=tree.tokens.device))

    def nothing_kept(self, session: Session, state: list[torch.Tensor]) -> None:
        """A scored tree of which nothing is kept leaves no trace."""
        if self.target.reach == "step":
            return
        tree, _ = self.scored(session, state, "before an empty keep")
        self.keep(session, tree, [[] for _ in state])
        self.lengths(session, state, "after an empty keep")
        tree, paths = self.scored(session, state, "after an empty keep")
        self.keep(session, tree, [[] for _ in paths])

    def rolled_back(self, session: Session, state: list[torch.Tensor]) -> list[torch.Tensor]:
        """Truncate to unlike lengths and go on."""
        short = [max(1, len(s) - 1 - b) for b, s in enumerate(state)]
        try:
            session.truncate(short)
        except UnsupportedModelError:
            return state  # recurrent state says so instead of being silently wrong
        state = [s[:n] for s, n in zip(state, short, strict=True)]
        self.lengths(session, state, "truncate")
        return self.round(session, state, "after truncate")

    def forked(self, session: Session, state: list[torch.Tensor]) -> list[torch.Tensor]:
        """A fork goes its own way and the original does not notice."""
        order = [0] if len(state) == 1 else [len(state) - 1, 0]
        twin = session.fork(order)
        chosen = [state[r] for r in order]
        self.lengths(twin, chosen, "fork")
        inputs = self.inputs
        self.inputs = {k: v[order] for k, v in inputs.items()}
        self.round(twin, chosen, "in a fork")
        self.inputs = inputs
        return self.round(session, state, "in a session that was forked")

    def joined(self, session: Session, state: list[torch.Tensor]) -> None:
        """Rows that were prefilled elsewhere follow the own ones, whichever are longer."""
        if self.target.max_batch == 1:
            try:
                session.join(session)
            except IsthmusError:
                return
            raise AssertionError("max_batch is 1, but a second row was not refused")
        inputs = self.inputs
        for turned in (False, True):
            batch = len(state)
            other = self.target.session(batch, **inputs)
            rows = [self.draw(9 + 3 * b) for b in range(batch)]
            other.prefill(rows)
            pair = (other, session) if turned else (session, other)
            both = [*rows, *state] if turned else [*state, *rows]
            twin = pair[0].join(pair[1])
            self.lengths(twin, both, "join")
            self.inputs = {k: torch.cat([v, v]) for k, v in inputs.items()}
            both = self.round(twin, both, "in a joined session")
            # what joined may leave again
            order = [2 * batch - 1, 0]
            self.inputs = {k: v[order] for k, v in self.inputs.items()}
            self.round(twin.fork(order), [both[r] for r in order], "in a fork of a joined session")
            self.inputs = inputs
        self.round(session, state, "in a session that was joined")

    def refusals(self, session: Session) -> None:
        """What reach and max_batch exclude must be refused, not computed wrongly."""
        device = getattr(self.target, "device", torch.device("cpu"))
        bad: list[tuple[str, Any]] = []
        if self.target.reach != "tree":
            bad.append(("a tree", Topology.of([-1, 0, 0])))
        if self.target.reach == "step":
            bad.append(("a chain", chain_topology(2)))
        for name, topology in bad:
            tokens = torch.zeros(len(session.lengths), topology.nodes, dtype=torch.int64)
            try:
                session.score(TokenTree(tokens, topology).to(device))
            except IsthmusError:
                continue
            raise AssertionError(f"reach is {self.target.reach!r}, but {name} was not refused")
        if self.target.max_batch is not None:
            try:
                self.target.session(self.target.max_batch + 1, **self.inputs)
            except IsthmusError:
                return
            raise AssertionError("more rows than max_batch were not refused")
