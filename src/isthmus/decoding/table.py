"""A target without a network: its laws come from a hash of the prefix.

Every conditional law of a :class:`TableTarget` is known in closed form, so the law of a whole
answer can be enumerated (:meth:`TableTarget.truth`) and a decoder checked against it exactly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from isthmus.decoding.tree import TokenTree
from isthmus.errors import InvalidInputError, MismatchError
from isthmus.roles import Context, Features, Law, Reach, Scores, Session, Taps


class TableTarget:
    """A target whose conditional laws are a seeded hash of the prefix, in float64.

    Args:
        vocab_size: Tokens V.
        seed: Another seed is another model.
        sharpness: Standard deviation of the logits; 0 is the uniform law.
        order: Trailing tokens that the law depends on; the whole prefix when None. A small order
            repeats itself, which is what drafters that look things up live on.
        end_token: Token that ends an answer, or None.
        reach: What one forward accepts, to play a weaker model.
        max_length: Context limit in tokens, or None.

    Raises:
        InvalidInputError: A size is out of range.

    Example:
        >>> target = TableTarget(vocab_size=4, seed=1)
        >>> session = target.session(1)
        >>> session.score(TokenTree.root(torch.tensor([2]))).logits.shape
        torch.Size([1, 1, 4])
    """

    max_batch: int | None = None
    max_nodes = 1024

    def __init__(
        self,
        vocab_size: int,
        *,
        seed: int = 0,
        sharpness: float = 1.0,
        order: int | None = None,
        end_token: int | None = None,
        reach: Reach = "tree",
        max_length: int | None = None,
    ) -> None:
        if vocab_size < 1:
            raise InvalidInputError(f"vocab_size must be at least 1, got {vocab_size}")
        if order is not None and (order < 0 or (vocab_size + 1) ** (order + 1) >= 2**62):
            raise InvalidInputError(f"order must be 0 or more and small, got {order}")
        self.vocab_size, self.seed, self.sharpness = vocab_size, seed, sharpness
        self.order, self.end_token = order, end_token
        self.reach: Reach = reach
        self.max_length = max_length

    def session(self, batch: int, **inputs: Any) -> TableSession:
        """Open a session for ``batch`` rows.

        Raises:
            InvalidInputError: Encoder inputs are given.
        """
        if inputs:
            raise InvalidInputError("a TableTarget takes no encoder inputs")
        return TableSession(self, batch)

    def push(self, state: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """State after one more token; states are int64 numbers, 0 is the empty prefix."""
        if self.order is None:
            return _mix(state * 1_000_003 + tokens + 1)
        base = self.vocab_size + 1
        return torch.remainder(state * base + tokens + 1, base**self.order)

    def logits(self, state: torch.Tensor) -> torch.Tensor:
        """Logits [..., V] after the prefixes of the given states [...]."""
        token = torch.arange(1, self.vocab_size + 1, device=state.device)
        key = _mix(_mix(state + self.seed * 7_919)[..., None] + token * 104_729)
        # the upper 52 bits, centred between two steps so that neither 0 nor 1 occurs
        uniform = (_shift(key, 12).double() + 0.5) / 2.0**52
        return self.sharpness * math.sqrt(2.0) * torch.erfinv(2.0 * uniform - 1.0)

    def state(self, ids: torch.Tensor) -> torch.Tensor:
        """State [R] after the prefixes ids [R, T]."""
        state = torch.zeros(len(ids), dtype=torch.int64, device=ids.device)
        for column in ids.unbind(1):
            state = self.push(state, column)
        return state

    def truth(
        self, prompt: Sequence[int], length: int, law: Law, *, end_token: int | None = None
    ) -> dict[tuple[int, ...], float]:
        """Probability of every answer of at most ``length`` tokens, by enumeration.

        Args:
            prompt: At least one token.
            length: Tokens of an answer that does not end before.
            law: The sampling law.
            end_token: Answers end after it; the target's own when None.

        Returns:
            Every string of tokens with its probability, impossible ones (0.0) included; they sum
            to 1. There are at most V ** length of them.
        """
        end = self.end_token if end_token is None else end_token
        done: dict[tuple[int, ...], float] = {}
        open_: list[tuple[int, ...]] = [()]
        weights = torch.ones(1, dtype=torch.float64)
        for level in range(length):
            ids = torch.tensor([[*prompt, *answer] for answer in open_])
            lengths = [ids.shape[1]] * len(ids)
            context = Context(
                ids,
                lengths,
                [len(prompt)] * len(ids),
                law,
                torch.Generator(),
                list(range(len(ids))),
            )
            logits = self.logits(self.state(ids))[:, None]
            probs = law.probs(logits, TokenTree.root(context.roots()), context)[:, 0]
            joint = weights[:, None] * probs
            longer: list[tuple[int, ...]] = []
            kept = []
            for row, answer in enumerate(open_):
                for token in range(self.vocab_size):
                    if token == end or level + 1 == length:
                        done[(*answer, token)] = float(joint[row, token])
                    else:
                        longer.append((*answer, token))
                        kept.append(joint[row, token])
            if not longer:
                break
            open_, weights = longer, torch.stack(kept)
        return done


class ListTarget(TableTarget):
    """A target whose laws are those of a list of weighted texts: the exact model of all of them.

    Args:
        texts: Weight of each token sequence, end token included; they sum to anything.
        vocab_size: Tokens V.
        start: Tokens before every text.

    Example:
        >>> target = ListTarget({(0, 2): 3.0, (1, 2): 1.0}, vocab_size=4, start=[3])
        >>> root = TokenTree.root(torch.tensor([3]))
        >>> target.session(1).score(root).logits.softmax(-1)[0, 0].tolist()
        [0.75, 0.25, 0.0, 0.0]
    """

    def __init__(
        self, texts: Mapping[tuple[int, ...], float], vocab_size: int, start: Sequence[int]
    ) -> None:
        super().__init__(vocab_size)
        places: dict[tuple[int, ...], int] = {(): 0}
        weights: list[dict[int, float]] = [{}]
        after: list[dict[int, int]] = [{}]
        for text, weight in texts.items():
            whole = (*start, *text)
            for k, token in enumerate(whole):
                place = places[whole[:k]]
                weights[place][token] = weights[place].get(token, 0.0) + weight
                if whole[: k + 1] not in places:
                    places[whole[: k + 1]] = after[place][token] = len(weights)
                    weights.append({})
                    after.append({})
        # the last state is that of what no text begins with; there the law is even
        self._logits = torch.full((len(weights) + 1, vocab_size), -math.inf, dtype=torch.float64)
        self._after = torch.full((len(weights) + 1, vocab_size), len(weights))
        for place, (row, next_) in enumerate(zip(weights, after, strict=True)):
            for token, weight in row.items():
                self._logits[place, token] = math.log(weight)
                self._after[place, token] = next_[token]
        self._logits[~torch.isfinite(self._logits).any(-1)] = 0.0

    def push(self, state: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """State after one more token."""
        return self._after[state, tokens]

    def logits(self, state: torch.Tensor) -> torch.Tensor:
        """Logits [..., V] after the prefixes of the given states [...]."""
        return self._logits[state]


class TableSession:
    """A session of a :class:`TableTarget`: one number for every cached prefix.

    Args:
        target: The model.
        batch: Rows B.
    """

    def __init__(self, target: TableTarget, batch: int) -> None:
        self.target = target
        self._lengths = [0] * batch
        # states[b, n] is the state after the first n cached tokens of row b
        self._states = torch.zeros(batch, 1, dtype=torch.int64)
        self._scored: torch.Tensor | None = None

    @property
    def lengths(self) -> list[int]:
        """Cached tokens of each row."""
        return list(self._lengths)

    def _last(self) -> torch.Tensor:
        return self._states.gather(1, torch.tensor(self._lengths)[:, None])[:, 0]

    def _reserve(self, more: int) -> None:
        short = max(self._lengths) + more + 1 - self._states.shape[1]
        if short > 0:
            self._states = torch.nn.functional.pad(self._states, (0, short))

    def prefill(self, rows: Sequence[torch.Tensor], *, taps: Taps | None = None) -> Features | None:
        """Cache the tokens of each row, one int64 [T_b] tensor a row."""
        counts = [len(r) for r in rows]
        width = max(counts)
        if width == 0:
            return None
        self._reserve(width)
        tokens = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
        slots = torch.tensor(self._lengths)[:, None] + 1
        state, states = self._last(), []
        for i, column in enumerate(tokens.unbind(1)):
            # what padding writes lies beyond the row's length and is overwritten later
            state = self.target.push(state, column)
            states.append(state)
            self._states.scatter_(1, slots + i, state[:, None])
        self._lengths = [n + c for n, c in zip(self._lengths, counts, strict=True)]
        return _features(self.target.logits(torch.stack(states, 1)), taps) if taps else None

    def score(self, tree: TokenTree, *, taps: Taps | None = None) -> Scores:
        """Look up every node; the hidden states are the logits themselves.

        Raises:
            InvalidInputError: The tree is wider than the target's reach or too large.
        """
        reach = self.target.reach
        if (reach != "tree" and not tree.is_chain) or (reach == "step" and tree.nodes > 1):
            raise InvalidInputError(f"this TableTarget scores {reach}s only")
        if tree.nodes - 1 > self.target.max_nodes:
            raise InvalidInputError(f"a tree of {tree.nodes - 1} nodes is too large")
        depth = tree.topology.depth.expand_as(tree.tokens)
        above = tree.topology.parent.clamp(min=0).expand_as(tree.tokens)
        state = self.target.push(self._last()[:, None], tree.tokens)
        for level in range(1, tree.topology.max_depth + 1):
            deeper = self.target.push(state.gather(1, above), tree.tokens)
            state = torch.where(depth == level, deeper, state)
        self._scored = state
        logits = self.target.logits(state)
        return Scores(logits, _features(logits, taps) if taps else None)

    def keep(self, path: torch.Tensor) -> None:
        """Commit one path of the last scored tree, int64 [B, M] padded with -1."""
        assert self._scored is not None, "keep follows score"
        width = path.shape[1]
        self._reserve(width)
        taken = self._scored.gather(1, path.clamp(min=0))
        slots = torch.tensor(self._lengths)[:, None] + 1 + torch.arange(width)
        # rows that keep less write what the next round overwrites
        self._states.scatter_(1, slots, torch.where(path >= 0, taken, 0))
        counts = (path >= 0).sum(1).tolist()
        self._lengths = [n + int(c) for n, c in zip(self._lengths, counts, strict=True)]
        self._scored = None

    def truncate(self, lengths: Sequence[int]) -> None:
        """Forget cached tokens beyond the given lengths."""
        self._lengths = [min(a, int(b)) for a, b in zip(self._lengths, lengths, strict=True)]

    def fork(self, rows: Sequence[int]) -> TableSession:
        """Copies of the given rows."""
        twin = TableSession(self.target, len(rows))
        twin._lengths = [self._lengths[r] for r in rows]
        twin._states = self._states[list(rows)].clone()
        return twin

    def join(self, other: Session) -> TableSession:
        """Copies of the rows of both.

        Raises:
            MismatchError: The other session is that of another target.
        """
        if not isinstance(other, TableSession) or other.target is not self.target:
            raise MismatchError("only sessions of one target can be joined")
        twin = TableSession(self.target, 0)
        twin._lengths = [*self._lengths, *other._lengths]
        width = max(self._states.shape[1], other._states.shape[1])
        states = (s._states for s in (self, other))
        pad = torch.nn.functional.pad
        twin._states = torch.cat([pad(s, (0, width - s.shape[1])) for s in states])
        return twin


def _features(logits: torch.Tensor, taps: Taps) -> Features:
    """A table has no inner states; its logits stand in for all of them."""
    return Features(logits if taps.final else None, dict.fromkeys(taps.layers, logits))


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift to the right; torch's own keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """The finaliser of SplitMix64; products wrap around."""
    x = (x ^ _shift(x, 30)) * -4658895280553007687
    x = (x ^ _shift(x, 27)) * -7723592293110705685
    return x ^ _shift(x, 31)
