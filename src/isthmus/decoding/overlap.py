"""Drafting ahead of verification: windows, the rule without a bonus token, and the clock."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from isthmus.decoding.acceptance import Lossless
from isthmus.decoding.cost import Cost
from isthmus.decoding.drafters import ModelDrafter
from isthmus.decoding.law import draw_next
from isthmus.decoding.tree import TokenTree, chain_topology
from isthmus.roles import Acceptance, Context, Shape, Step, Target, Verdict


class Window(ModelDrafter):
    """A draft model that drafts ahead of what is being verified.

    Args:
        model: The draft model as a target, sharing the target's vocabulary.
        window: Draft tokens of a window.
        pre_verify: Test the first token of a window while the rest is drafted.
        post_verify: Draft the next window while this one is tested.

    Attributes:
        ahead: Rows that hold drafted tokens beyond those under test in this round.
        rounds: Of each round of each row: tokens drafted before the target started, tokens drafted
            beside it, nodes it scored.
    """

    name = "pearl"

    def __init__(
        self, model: Target, window: int, *, pre_verify: bool = True, post_verify: bool = True
    ) -> None:
        super().__init__(model)
        self.window, self.pre_verify, self.post_verify = window, pre_verify, post_verify
        self.ahead: list[bool] = []
        self.rounds: list[tuple[int, int, int]] = []

    def begin(self, context: Context, target: Target, **inputs: Any) -> None:
        """Start with nothing drafted."""
        super().begin(context, target, **inputs)
        empty = torch.zeros(0, dtype=torch.int64)
        self._stream = [empty] * context.batch  # drafted tokens after the committed ones
        self._laws: list[list[torch.Tensor]] = [[] for _ in range(context.batch)]  # [V] each
        self._base = list(context.lengths)

    def propose(self, context: Context, shape: Shape) -> TokenTree:
        """What the target tests in this round; more may have been drafted meanwhile."""
        pre, post = self.pre_verify, self.post_verify
        pending = [len(s) for s in self._stream]
        serial = beside = [0] * context.batch
        idle = [n == 0 for n in pending]
        if not pre:  # nothing to test yet: the target has to wait for a window
            serial = self._draw(context, idle)
            pending = [len(s) for s in self._stream]
        if pre or post:
            beside = self._draw(
                context,
                [(post or i) and n <= self.window for i, n in zip(idle, pending, strict=True)],
            )
        first = [int(pre and n > 0) for n in beside]
        room = min(shape.nodes, shape.depth)
        wanted = [n + f for n, f in zip(pending, first, strict=True)]
        tested = [min(n, room) for n in wanted]
        # a test cut short by the budget ends the text: there the target's own token is welcome
        self.ahead = [len(s) > t == n for s, t, n in zip(self._stream, tested, wanted, strict=True)]
        # the law after the last pending token tests the first new one: it needs no node of its own
        scored = [1 + min(n, t) for n, t in zip(pending, tested, strict=True)]
        self.rounds += zip(serial, beside, scored, strict=True)
        return self._chains(context, tested)

    def _draw(self, context: Context, who: Sequence[bool]) -> list[int]:
        """Draw a window more for the given rows; returns the tokens drawn in each row."""
        assert self._session is not None
        window = self.window
        if self.model.max_length is not None:
            longest = max(b + len(s) for b, s in zip(self._base, self._stream, strict=True))
            window = min(window, self.model.max_length - longest)
        if not any(who) or window < 1:
            return [0] * context.batch
        go = torch.tensor(who)
        known = [torch.cat([context.row(b), s]) for b, s in enumerate(self._stream)]
        fresh = [
            k[n:] if w else k[:0] for k, n, w in zip(known, self._session.lengths, who, strict=True)
        ]
        width = max(len(f) for f in fresh)
        block = torch.stack([torch.nn.functional.pad(f, (0, width - len(f))) for f in fresh])
        valid = torch.arange(width) < torch.tensor([len(f) for f in fresh])[:, None]
        tree = TokenTree(block, chain_topology(width), valid)
        for _ in range(window):
            logits = self._feed(tree)
            places = [b + len(s) for b, s in zip(self._base, self._stream, strict=True)]
            token, q = draw_next(self._after(context, logits), context, places)
            for b in go.nonzero()[:, 0].tolist():
                self._stream[b] = torch.cat([self._stream[b], token[b].cpu()])
                if q is not None:
                    self._laws[b].append(q[b])
            tree = TokenTree(token.cpu(), chain_topology(1), go[:, None])
        return [window * int(w) for w in who]

    def _after(self, context: Context, logits: torch.Tensor) -> torch.Tensor:
        """Processed logits [B, V] after each row's own drafted tokens."""
        logits = logits if logits.dtype in (torch.float32, torch.float64) else logits.float()
        if getattr(context.law, "plain", False):
            return logits
        ends = torch.tensor([len(s) for s in self._stream])
        tree = self._chains(context, ends.tolist(), bare=True).to(logits.device)
        full = logits[:, None].expand(-1, tree.nodes, -1)
        out = context.law.drafting.logits(full, tree, context)
        return out[torch.arange(len(ends)), ends]

    def _chains(self, context: Context, counts: Sequence[int], *, bare: bool = False) -> TokenTree:
        """The first drafted tokens of each row as a ragged batch of chains."""
        width = max(counts)
        device = getattr(self.model, "device", context.ids.device)
        if width == 0:
            return TokenTree.root(context.roots())
        tokens = torch.stack(
            [
                torch.nn.functional.pad(s[:n], (0, width - n))
                for s, n in zip(self._stream, counts, strict=True)
            ]
        )
        valid = torch.arange(width) < torch.tensor(counts)[:, None]
        ragged = None if bool(valid.all()) else valid.to(device)
        q = None
        if not bare and any(self._laws):
            some = next(law[0] for law in self._laws if law)
            q = torch.stack(
                [
                    torch.stack([*laws[:n], *[torch.zeros_like(some)] * (width - n)])
                    for laws, n in zip(self._laws, counts, strict=True)
                ]
            )
        roots = context.roots().to(device)
        return TokenTree.chain(roots, tokens.to(device), valid=ragged, q=q)

    def observe(self, step: Step) -> None:
        """Keep what was drafted ahead as long as the text goes on as drafted."""
        assert self._session is not None
        context, lengths = step.context, list(self._session.lengths)
        for b, stream in enumerate(self._stream):
            new = context.row(b)[self._base[b] :]
            both = min(len(new), len(stream))
            right = int((new[:both] == stream[:both]).long().cumprod(0).sum())
            if right == len(new):
                self._stream[b], self._laws[b] = stream[right:], self._laws[b][right:]
            else:
                self._stream[b], self._laws[b] = stream[:0], []
                lengths[b] = min(lengths[b], self._base[b] + right)
            self._base[b] = context.lengths[b]
        self._session.truncate(lengths)

    def select(self, rows: Sequence[int]) -> None:
        """Keep only the given rows."""
        super().select(rows)
        self._stream = [self._stream[r] for r in rows]
        self._laws = [self._laws[r] for r in rows]
        self._base = [self._base[r] for r in rows]


class NoBonus:
    """An exact rule that adds no token of its own where the draft goes on already (alg. 1).

    The last accepted token is handed over as the final one, so that the draft ahead stays valid;
    a bonus token and the continuation together would be two tokens for one place.

    Args:
        window: The drafter.
        rule: The exact rule for what is at hand.
    """

    def __init__(self, window: Window, rule: Acceptance | None = None) -> None:
        self.window, self.rule = window, rule or Lossless()
        self.lossless = self.rule.lossless
        self.noise = getattr(self.rule, "noise", None)

    def accept(self, tree: TokenTree, logits: torch.Tensor, context: Context) -> Verdict:
        """See :class:`isthmus.roles.Acceptance`."""
        verdict = self.rule.accept(tree, logits, context)
        if tree.nodes == 1:
            return verdict
        depth = (verdict.path >= 0).sum(1)
        ahead = torch.tensor(self.window.ahead, device=depth.device)
        whole = ahead & (depth == tree.alive.sum(1)) & (depth > 1)
        last = verdict.path.gather(1, depth[:, None] - 1)
        token = torch.where(whole, tree.tokens.gather(1, last)[:, 0], verdict.token)
        steps = torch.arange(verdict.path.shape[1], device=depth.device)
        cut = torch.where(steps < (depth - whole.long())[:, None], verdict.path, -1)
        return Verdict(cut[:, : int((depth - whole.long()).max())], token)


def elapsed(
    rounds: Sequence[tuple[int, int, int]], t_draft: float, target: Cost, contention: float = 0.0
) -> float:
    """Time of all rounds when both models run side by side.

    Args:
        rounds: Of :class:`Window`, as it counts them.
        t_draft: Time of one draft forward.
        target: Time of a target forward by its nodes.
        contention: Share of the shorter of the two that is lost on a shared device; 1 is no
            parallelism at all.

    Example:
        >>> elapsed([(0, 4, 1), (2, 0, 3)], 1.0, Cost({1: 3.0, 3: 3.0}))
        9.0
    """
    total = 0.0
    for serial, beside, nodes in rounds:
        a, b = beside * t_draft, target(nodes)
        total += serial * t_draft + max(a, b) + contention * min(a, b)
    return total
