"""Beam searches: keep the best W hypotheses of each row, or W drawn without replacement.

``BeamSearch`` adds up log-probabilities and keeps the largest sums; hypotheses that reach an end
token leave the beam and are ranked by ``logprob / length ** length_penalty``. With groups, the
beam is cut into parts that avoid each other's tokens (Vijayakumar et al., 1610.02424). With a
ranker, the continuations with the largest sums are ranked again by whoever knows better: a value
function, a classifier, a length-normalised sum. ``StochasticBeam`` draws W whole answers without
replacement by perturbing the sums with Gumbel noise (Kool et al., 1903.06059).

The rule of stopping, row by row, is that of transformers. An answer can only enter the finished
ones from the W best continuations of a step, and a row is closed for good when W answers are
finished and

* ``early_stopping=True``: at once;
* ``False``: the best open sum, divided by the length it has now, is no better than the worst of
  the finished scores (a heuristic: with a positive penalty a longer answer might still rise);
* ``"never"``: the same with the length it could still reach, where the penalty is positive, so
  nothing is lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from isthmus.errors import DeadEnd, InvalidInputError
from isthmus.roles import Choice, Hypothesis

Stopping = Literal["never"] | bool


@dataclass(frozen=True)
class Candidates:
    """The best continuations of one step, before the beam is filled from them.

    Attributes:
        prefix: New tokens of each hypothesis before this step, int64 [B, W, T].
        parent: Hypothesis that each candidate continues, int64 [B, K].
        token: The token it adds, int64 [B, K].
        logprob: Sum of log-probabilities, that token included, [B, K]; -inf is no candidate.
    """

    prefix: torch.Tensor
    parent: torch.Tensor
    token: torch.Tensor
    logprob: torch.Tensor

    @property
    def length(self) -> int:
        """New tokens of every candidate."""
        return self.prefix.shape[2] + 1

    def tokens(self) -> torch.Tensor:
        """All new tokens of every candidate, int64 [B, K, T + 1]."""
        where = self.parent[:, :, None].expand(-1, -1, self.prefix.shape[2])
        return torch.cat([self.prefix.gather(1, where), self.token[:, :, None]], 2)


class Ranker(Protocol):
    """Ranks continuations by something else than their sums; it may keep a state by hypothesis."""

    def __call__(self, candidates: Candidates) -> torch.Tensor:
        """Scores [B, K], larger is better; open and finished hypotheses are compared by them."""
        ...

    def follow(self, parent: torch.Tensor, token: torch.Tensor) -> None:
        """Go along with what the beam took on, int64 [B, W] each."""
        ...


class _Group:
    """One beam of w hypotheses a row: sums, tokens, and the w best finished answers."""

    def __init__(self, rows: int, width: int, like: torch.Tensor) -> None:
        self.width = width
        self.sums = like.new_zeros(rows, 1)
        self.tokens = torch.zeros(rows, 1, 0, dtype=torch.int64, device=like.device)
        self.open = torch.ones(rows, dtype=torch.bool, device=like.device)
        self.done_score = like.new_full((rows, width), -torch.inf)
        self.done_sum = self.done_score.clone()
        self.done_tokens = self.tokens.new_zeros(rows, width, 0)
        self.done_length = self.tokens.new_zeros(rows, width)

    def finish(
        self, score: torch.Tensor, total: torch.Tensor, tokens: torch.Tensor, stopping: Stopping
    ) -> None:
        """Merge new answers [B, K] (score -inf: none) into the w best of each row."""
        full = self.done_score.isfinite().all(1)
        barred = ~self.open | (full if stopping is True else torch.zeros_like(full))
        score = score.masked_fill(barred[:, None], -torch.inf)
        length = tokens.shape[2]
        grown = torch.nn.functional.pad(self.done_tokens, (0, length - self.done_tokens.shape[2]))
        merged = torch.cat([self.done_score, score], 1)
        self.done_score, index = merged.topk(self.width)
        self.done_sum = torch.cat([self.done_sum, total], 1).gather(1, index)
        lengths = torch.full_like(index[:, :1], length).expand(-1, score.shape[1])
        self.done_length = torch.cat([self.done_length, lengths], 1).gather(1, index)
        both = torch.cat([grown, tokens], 1)
        self.done_tokens = both.gather(1, index[:, :, None].expand(-1, -1, length))


def _ranked(found: list[Hypothesis], room: int) -> list[Hypothesis]:
    """Answers of one row, best first.

    Raises:
        DeadEnd: There is none.
    """
    if not found:
        raise DeadEnd(f"the law left no answer of at most {room} tokens to the beam")
    return sorted(found, key=lambda h: -h.score)


class BeamSearch:
    """Beam search with groups, a length penalty and an optional ranker.

    Args:
        width: Hypotheses W of each row.
        length_penalty: a in ``logprob / length ** a``; 0 ranks by the plain sum.
        early_stopping: See the module.
        groups: Parts of the beam; 1 is beam search.
        diversity: lambda: what a token loses, in the choice of one step, for each hypothesis of
            earlier groups that has just taken it. The sums themselves stay log-probabilities.
        ranker: Ranks the ``max(2, 1 + end tokens) * W`` continuations with the largest sums again;
            then finished answers are ranked by its scores and the length penalty has no say.

    Raises:
        InvalidInputError: A number is out of range.

    Example:
        >>> beam = BeamSearch(2)
        >>> beam.start(1, torch.Generator(), end_tokens=[0], max_new_tokens=2)
        >>> beam.step(torch.tensor([[[0.2, 0.5, 0.3]]]).log()).token.tolist()
        [[1, 2]]
        >>> choice = beam.step(torch.tensor([[[0.1, 0.2, 0.7], [0.9, 0.1, 0.0]]]).log())
        >>> choice is None, [h.tokens for h in beam.finish()[0]]
        (True, [(1, 2), (2, 0)])
    """

    def __init__(
        self,
        width: int = 4,
        *,
        length_penalty: float = 1.0,
        early_stopping: Stopping = False,
        groups: int = 1,
        diversity: float = 0.0,
        ranker: Ranker | None = None,
    ) -> None:
        if width < 1 or groups < 1 or width % groups:
            raise InvalidInputError(
                f"a beam of {width} cannot be cut into {groups} groups; the width must be a "
                "multiple of the groups, both at least 1"
            )
        if early_stopping not in (True, False, "never"):
            raise InvalidInputError(
                f"early_stopping must be true, false or 'never', got {early_stopping!r}"
            )
        if diversity < 0.0:
            raise InvalidInputError(f"diversity must be 0 or more, got {diversity}")
        self.width, self.length_penalty, self.early_stopping = width, length_penalty, early_stopping
        self.groups, self.diversity, self.ranker = groups, diversity, ranker
        self._parts: list[_Group] = []

    def start(
        self,
        rows: int,
        generator: torch.Generator,
        *,
        end_tokens: Sequence[int],
        max_new_tokens: int,
    ) -> None:
        """Begin on B rows; see :class:`isthmus.roles.Search`."""
        del generator  # nothing is drawn
        self._rows, self._ends, self._room = rows, sorted(set(end_tokens)), max_new_tokens
        self._parts, self._length = [], 0

    def step(self, logprobs: torch.Tensor) -> Choice | None:
        """Extend every group; see :class:`isthmus.roles.Search`."""
        if not self._parts:
            size = self.width // self.groups
            self._parts = [_Group(self._rows, size, logprobs[:, 0, 0]) for _ in range(self.groups)]
        self._length += 1
        first, size = self._length == 1, self.width // self.groups
        taken = torch.zeros_like(logprobs[:, 0])  # [B, V], how often earlier groups took a token
        parents, tokens, gains = [], [], []
        for g, part in enumerate(self._parts):
            own = logprobs if first else logprobs[:, g * size : (g + 1) * size]
            penalty = self.diversity * taken if g and self.diversity else None
            parent, token, gain = self._extend(part, own, penalty)
            taken.scatter_add_(1, token, gain.isfinite().to(taken))
            parents.append(parent if first else parent + g * size)
            tokens.append(token)
            gains.append(gain)
        choice = Choice(torch.cat(parents, 1), torch.cat(tokens, 1), torch.cat(gains, 1))
        if self.ranker is not None:
            self.ranker.follow(choice.parent, choice.token)
        alive = any(bool(part.open.any()) for part in self._parts)
        return choice if alive and self._length < self._room else None

    def _extend(
        self, part: _Group, logprobs: torch.Tensor, penalty: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Parent, token and log-probability [B, w] of the next open hypotheses of one group."""
        width, vocab = part.width, logprobs.shape[-1]
        total = part.sums[:, :, None] + logprobs  # [B, w, V]
        keyed = total if penalty is None else total - penalty[:, None]
        # as many as are needed for w open ones, should every end token be among the best
        keep = min(max(2, 1 + len(self._ends)) * width, keyed.shape[1] * vocab)
        key, flat = keyed.flatten(1).topk(keep)
        parent, token = flat // vocab, flat % vocab
        sums = total.flatten(1).gather(1, flat)
        pool = Candidates(part.tokens, parent, token, sums)
        if self.ranker is not None:
            key = self.ranker(pool).masked_fill(~sums.isfinite(), -torch.inf)
            key, order = key.sort(dim=1, descending=True, stable=True)
            parent, token, sums = (x.gather(1, order) for x in (parent, token, sums))
            pool = Candidates(part.tokens, parent, token, sums)
        ends = torch.isin(token, token.new_tensor(self._ends))
        if self._length >= self._room:
            ends = torch.ones_like(ends)
        tokens = pool.tokens()
        best = torch.arange(keep, device=token.device) < width
        score = key if self.ranker is not None else sums / self._length**self.length_penalty
        part.finish(
            score.masked_fill(~(ends & best), -torch.inf), sums, tokens, self.early_stopping
        )
        # the w best open ones, in order; where there are fewer, dead ones fill the beam
        open_key, index = key.masked_fill(ends, -torch.inf).topk(min(width, keep))
        short = width - index.shape[1]
        index = torch.nn.functional.pad(index, (0, short))
        dead = torch.nn.functional.pad(~open_key.isfinite(), (0, short), value=True)
        chosen = parent.gather(1, index)
        gain = logprobs.flatten(1).gather(1, chosen * vocab + token.gather(1, index))
        gain = gain.masked_fill(dead, -torch.inf)
        part.sums = sums.gather(1, index).masked_fill(dead, -torch.inf)
        part.tokens = tokens.gather(1, index[:, :, None].expand(-1, -1, tokens.shape[2]))
        self._close(part, torch.where(dead, -torch.inf, key.gather(1, index)))
        return chosen, token.gather(1, index), gain

    def _close(self, part: _Group, key: torch.Tensor) -> None:
        """Close the rows that cannot get better."""
        full = part.done_score.isfinite().all(1)
        best = (key if self.ranker is not None else part.sums).amax(1)
        if self.ranker is None:
            reach = self._length
            if self.early_stopping == "never" and self.length_penalty > 0:
                reach = self._room
            best = best / reach**self.length_penalty
        settled = full & ((best <= part.done_score.amin(1)) | (self.early_stopping is True))
        part.open &= ~settled & best.isfinite()

    def finish(self) -> list[list[Hypothesis]]:
        """Finished answers of each row, best first; groups are merged.

        Raises:
            DeadEnd: A row has none: the law left no token.
        """
        out = []
        for row in range(self._rows):
            found = [
                Hypothesis(tuple(tokens[:length]), total, score, {"group": g})
                for g, part in enumerate(self._parts)
                for tokens, length, total, score in zip(
                    part.done_tokens[row].tolist(),
                    part.done_length[row].tolist(),
                    part.done_sum[row].tolist(),
                    part.done_score[row].tolist(),
                    strict=True,
                )
                if score > -torch.inf
            ]
            out.append(_ranked(found, self._room))
        return out


class StochasticBeam:
    """Draw W different answers without replacement, in the order of a Gumbel top-k.

    Every partial answer carries its log-probability phi and a Gumbel G with that location, and
    the children of one parent are drawn so that the largest of theirs is the parent's own G
    (Kool et al. 2019, sec. 4.1 and appendix B.3). The W answers left are the W largest of all.

    Args:
        width: Answers W of each row.

    Raises:
        InvalidInputError: The width is below 1.

    Example:
        >>> beam = StochasticBeam(2)
        >>> beam.start(1, torch.Generator().manual_seed(0), end_tokens=[], max_new_tokens=1)
        >>> beam.step(torch.tensor([[[0.25, 0.75]]]).log()) is None
        True
        >>> sorted(h.tokens for h in beam.finish()[0])
        [(0,), (1,)]
    """

    def __init__(self, width: int = 4) -> None:
        if width < 1:
            raise InvalidInputError(f"a stochastic beam needs a width of at least 1, got {width}")
        self.width = width
        self._tokens: torch.Tensor | None = None

    def start(
        self,
        rows: int,
        generator: torch.Generator,
        *,
        end_tokens: Sequence[int],
        max_new_tokens: int,
    ) -> None:
        """Begin on B rows; see :class:`isthmus.roles.Search`."""
        self._rows, self._generator = rows, generator
        self._ends, self._room = sorted(set(end_tokens)), max_new_tokens
        self._tokens = None

    def step(self, logprobs: torch.Tensor) -> Choice | None:
        """Perturb and keep the W largest; see :class:`isthmus.roles.Search`."""
        rows, _, vocab = logprobs.shape
        logprobs = torch.log_softmax(logprobs.double(), -1)
        if self._tokens is None:
            self._phi = logprobs.new_zeros(rows, 1)
            self._gumbel = logprobs.new_zeros(rows, 1)
            self._ended = torch.zeros(rows, 1, dtype=torch.bool, device=logprobs.device)
            self._tokens = torch.zeros(rows, 1, 0, dtype=torch.int64, device=logprobs.device)
            self._length = self._tokens.new_zeros(rows, 1)
        phi = self._phi[:, :, None] + logprobs  # [B, W, V]
        noise = torch.rand(phi.shape, generator=self._generator, dtype=phi.dtype, device=phi.device)
        free = phi - (-noise.clamp(1e-300, 1 - 1e-16).log()).log()
        largest = free.amax(-1, keepdim=True)
        # the largest of the children becomes the parent's own, stably
        bound = self._gumbel[:, :, None]
        v = bound - free + torch.log1p(-(free - largest).exp().clamp(max=1.0))
        key = bound - v.clamp(min=0) - (-v.abs()).exp().log1p()
        key = torch.where(free == largest, bound, key)
        key = key.masked_fill(~phi.isfinite() | ~bound.isfinite(), -torch.inf)
        # an answer that has ended stays as it is: one child, which costs nothing
        stay = self._ended[:, :, None]
        first = torch.arange(vocab, device=phi.device) == 0
        key = torch.where(stay, torch.where(first, bound, -torch.inf), key)
        phi = torch.where(stay, self._phi[:, :, None], phi)
        gumbel, flat = key.flatten(1).topk(min(self.width, key[0].numel()))
        parent, token = flat // vocab, flat % vocab
        ended = self._ended.gather(1, parent)
        dead = ~gumbel.isfinite()
        gain = logprobs.flatten(1).gather(1, flat).masked_fill(ended, 0.0)
        self._phi = phi.flatten(1).gather(1, flat).masked_fill(dead, -torch.inf)
        self._gumbel = gumbel
        old = self._tokens.gather(1, parent[:, :, None].expand(-1, -1, self._tokens.shape[2]))
        self._tokens = torch.cat([old, token[:, :, None]], 2)
        self._length = self._length.gather(1, parent) + (~ended).long()
        at_end = torch.isin(token, token.new_tensor(self._ends)) & ~ended
        self._ended = ended | at_end | dead
        short = self.width - parent.shape[1]
        if short:  # fewer continuations than hypotheses: dead ones fill the beam
            self._fill(short)
        pad = torch.nn.functional.pad
        choice = Choice(
            pad(parent, (0, short)), pad(token, (0, short)), pad(gain, (0, short), value=-torch.inf)
        )
        done = bool(self._ended.all()) or self._tokens.shape[2] >= self._room
        return None if done else choice

    def _fill(self, short: int) -> None:
        pad = torch.nn.functional.pad
        assert self._tokens is not None
        self._phi = pad(self._phi, (0, short), value=-torch.inf)
        self._gumbel = pad(self._gumbel, (0, short), value=-torch.inf)
        self._ended = pad(self._ended, (0, short), value=True)
        self._length = pad(self._length, (0, short))
        self._tokens = pad(self._tokens, (0, 0, 0, short))

    def finish(self) -> list[list[Hypothesis]]:
        """The answers drawn, largest perturbed log-probability first (it is their score).

        Raises:
            DeadEnd: A row has none: the law left no token.
        """
        assert self._tokens is not None
        out = []
        for row in range(self._rows):
            found = [
                Hypothesis(tuple(tokens[:length]), phi, gumbel)
                for tokens, length, phi, gumbel in zip(
                    self._tokens[row].tolist(),
                    self._length[row].tolist(),
                    self._phi[row].tolist(),
                    self._gumbel[row].tolist(),
                    strict=True,
                )
                if gumbel > -torch.inf
            ]
            out.append(_ranked(found, self._room))
        return out
