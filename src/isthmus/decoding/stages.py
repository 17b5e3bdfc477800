"""A decoder that runs in stages: layers up to the first exit, from there to the next, and so on.

A token that leaves early has no keys in the layers it skipped. Its state waits at the exit, and the
next token that goes deeper takes all waiting states along in one pass, so no key is ever missing,
copied or stale::

    token      1   2   3   4            a stage that runs at token 4 runs on the states of
    stage 1    x   x   x   x            tokens 2 to 4 at once, as it would have run on them
    stage 2    x   .   .   x  <- 2, 3   when they were new
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch

from isthmus.decoding.cache import SLACK
from isthmus.decoding.layers import LayerSlices, Mask
from isthmus.decoding.target import HubTarget, SlotSession
from isthmus.models.nested import check_exits
from isthmus.roles import Reach


class StagedTarget:
    """A decoder-only model as a draft model that may answer after several of its layers.

    Args:
        model: The model.
        exits: Layers after which it may answer; the last is its last layer.

    Attributes:
        exits: As given.
        calls: Times that each stage has run, over all sessions.
        max_batch: As of the model, and so are the other limits.

    Raises:
        UnsupportedModelError: Its layers cannot be run one by one.
        InvalidInputError: The exits do not rise to the last layer.
    """

    reach: Reach = "chain"

    def __init__(self, model: HubTarget, exits: Sequence[int]) -> None:
        self.exits = check_exits(exits, model.num_layers)
        self.model, self.slices = model, LayerSlices(model)
        self.vocab_size, self.device = model.vocab_size, model.device
        self.max_length, self.max_nodes = model.max_length, model.max_nodes
        self.max_batch = model.max_batch
        self.calls = [0] * len(self.exits)

    def session(self, batch: int) -> StagedSession:
        """An empty session of ``batch`` rows."""
        return StagedSession(self, cast(SlotSession, self.model.session(batch)))

    @torch.no_grad()
    def logits(self, state: torch.Tensor) -> torch.Tensor:
        """What an exit says, [B, V], to states [B, D]: one norm and one head for all exits."""
        return self.model.head(self.slices.finish(state))


class StagedSession:
    """Rows of a :class:`StagedTarget`: tokens are fed, and the stages follow as far as needed.

    Args:
        target: The model in stages.
        session: An empty session of the model; only its cache is used.
    """

    def __init__(self, target: StagedTarget, session: SlotSession) -> None:
        self.target, self.slices, self._inner = target, target.slices, session
        self._bounds = list(zip((0, *target.exits[:-1]), target.exits, strict=True))
        self._empty()

    def _empty(self) -> None:
        """Nothing waits: every stage has run on every slot."""
        cache, model = self._inner.cache, self.target.model
        none = torch.zeros(cache.batch, 0, model.hidden_size, dtype=model.dtype)
        self._done = [cache.used] * len(self._bounds)  # slots that each stage has run on
        self._waiting = [none.to(model.device) for _ in self._bounds]  # what enters it next

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return self._inner.lengths

    @property
    def waiting(self) -> list[int]:
        """Slots that each stage has not run on yet."""
        return [states.shape[1] for states in self._waiting]

    def prefill(self, rows: Sequence[torch.Tensor]) -> None:
        """Run the first stage over the tokens of each row, one int64 [T_b] tensor a row."""
        width = max(len(r) for r in rows)
        tokens = torch.stack([torch.nn.functional.pad(r, (0, width - len(r))) for r in rows])
        steps = torch.arange(width)
        self.feed(tokens, torch.stack([steps < len(r) for r in rows]))

    @torch.no_grad()
    def feed(self, tokens: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """Append tokens and run the first stage on them.

        Args:
            tokens: int64 [B, N].
            valid: Which of them are real, bool [B, N], real ones first.

        Returns:
            What leaves the first stage at each row's newest token, [B, D].
        """
        cache, count = self._inner.cache, tokens.shape[1]
        tokens, valid = tokens.to(cache.device), valid.to(cache.device)
        if not cache.dense and cache.used + count > SLACK + max(cache.lengths) * 4 // 3:
            self.catch_up()  # the slots are about to move
            cache.compact()
            self._empty()
        cache.reserve(count)
        steps = torch.arange(count, device=cache.device)
        positions = torch.tensor(cache.lengths, device=cache.device)[:, None] + steps
        self._waiting[0] = self.slices.embed(tokens, self._inside(positions))
        cache.keep(torch.where(valid, steps, -1))
        return self.run(0)

    def _inside(self, positions: torch.Tensor) -> torch.Tensor:
        """Positions of padding may lie past the end of a table; nothing reads them."""
        limit = self.target.max_length
        return positions if limit is None else positions.clamp(max=limit - 1)

    @torch.no_grad()
    def run(self, stage: int) -> torch.Tensor:
        """Run a stage on all that waits for it; needs the stage before it to be up to date.

        Returns:
            What leaves it at each row's newest token, [B, D].
        """
        cache, first, hidden = self._inner.cache, self._done[stage], self._waiting[stage]
        used, positions, mask, newest = cache.used, *self._where(first)
        cache.used = first  # where these layers write
        try:
            hidden = self.slices.run(hidden, *self._bounds[stage], positions, mask, cache.hub)
        finally:
            cache.used = used
        self._done[stage], self._waiting[stage] = used, hidden[:, :0]
        if stage + 1 < len(self._bounds):
            self._waiting[stage + 1] = torch.cat([self._waiting[stage + 1], hidden], 1)
        self.target.calls[stage] += 1
        # a row that was cut back has nothing new here, and nobody asks for its state
        place = (newest - first).clamp(min=0)
        return hidden[torch.arange(len(hidden), device=hidden.device), place]

    def _where(self, first: int) -> tuple[torch.Tensor, Mask, torch.Tensor]:
        """Positions [B, M] and mask of the slots from ``first`` on, and each row's newest slot."""
        cache = self._inner.cache
        places, live = cache.slots()
        slots = torch.arange(cache.used, device=cache.device)
        newest = slots[-1:].expand(cache.batch)
        seen = (slots[first:, None] >= slots[first:])[None]  # [1, M, M]
        if live is not None:
            newest = torch.where(live, slots, 0).amax(1)
            # a dead slot sees itself, since softmax over nothing is no number
            own = torch.eye(len(slots) - first, dtype=torch.bool, device=cache.device)
            seen = seen & live[:, None, first:] | own
        positions = self._inside(places[:, first:]).expand(cache.batch, -1)
        used, cache.used = cache.used, first
        try:
            return positions, self.slices.mask(self._inner, seen, positions), newest
        finally:
            cache.used = used

    def catch_up(self) -> None:
        """Run every stage on what waits for it."""
        for stage in range(1, len(self._bounds)):
            if self._waiting[stage].shape[1]:
                self.run(stage)

    def truncate(self, lengths: Sequence[int]) -> None:
        """Forget tokens beyond the given lengths, and the states that wait for them."""
        self._inner.truncate(lengths)
        used = self._inner.cache.used
        self._done = [min(done, used) for done in self._done]
        self._waiting = [
            states[:, : used - done] for done, states in zip(self._done, self._waiting, strict=True)
        ]

    def fork(self, rows: Sequence[int]) -> StagedSession:
        """Copies of the given rows."""
        self.catch_up()
        return StagedSession(self.target, self._inner.fork(rows))

    def join(self, other: StagedSession) -> StagedSession:
        """Copies of the rows of both."""
        self.catch_up()
        other.catch_up()
        return StagedSession(self.target, self._inner.join(other._inner))
