"""A byte model on two scales as a target: a cache on both levels, one global step a patch.

Cached tokens are committed bytes. The global cache holds one place a finished patch, the local one
a place a byte, of which only those of the patch at work (and the last few before it) are read.
Everything is stored under its place in the text, so rolling back is a smaller length. Chains are
scored in one forward: draft tokens may finish patches, whose global states are then computed from
the draft and computed anew if it does not stand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from isthmus.decoding.tree import TokenTree
from isthmus.errors import InvalidInputError, MismatchError
from isthmus.models.byte_patches import BytePatches
from isthmus.nn.decoder import Store
from isthmus.nn.masks import additive
from isthmus.roles import Features, Reach, Scores, Session, Taps

PREFILL_CHUNK = 1024
"""Bytes a forward while a prompt is read."""


class PatchTarget:
    """The network behind the engine.

    Args:
        network: The network, in eval mode.
        end_tokens: Tokens that end a text.

    Attributes:
        description: All that its speed depends on.
    """

    reach: Reach = "chain"
    max_batch: int | None = None
    max_nodes = 256
    encoder_decoder = False
    recurrent = False
    takes_images = False
    why_general = "a byte model on two scales has a forward of its own"

    def __init__(self, network: BytePatches, end_tokens: Sequence[int] = ()) -> None:
        self.network, self.end_tokens = network, tuple(end_tokens)
        self.vocab_size = network.sizes.vocab_size
        self.max_length: int | None = network.sizes.max_length
        weight = network.head.weight
        self.device, self.dtype = weight.device, weight.dtype
        self.description = repr(network.sizes)

    def probe_inputs(self) -> dict[str, torch.Tensor]:
        """No encoder, no inputs."""
        return {}

    def session(self, batch: int, **inputs: Any) -> PatchSession:
        """Open a session for ``batch`` rows.

        Raises:
            InvalidInputError: Encoder inputs are given.
        """
        if inputs:
            raise InvalidInputError("a byte model takes no encoder inputs")
        return PatchSession(self, batch)


class PatchSession:
    """B rows at work; see :class:`isthmus.roles.Session`.

    Args:
        target: The model.
        batch: Rows B.
    """

    def __init__(self, target: PatchTarget, batch: int) -> None:
        self.target, self.network = target, target.network
        s = self.network.sizes
        self.patch, self.overlap = s.patch_size, s.overlap
        self._lengths = [0] * batch
        like = self.network.head.weight
        self._ids = torch.zeros(batch, 0, dtype=torch.int64, device=like.device)
        # what the global model tells of each patch: [B, K, P, D_L]
        self._told = like.new_zeros(batch, 0, s.patch_size, s.local_size)
        self._across = _Cache(s.global_layers, s.global_heads, s.global_size, batch, like)
        self._inside = _Cache(s.local_layers, s.local_heads, s.local_size, batch, like)
        if batch:
            self._begin()

    @torch.no_grad()
    def _begin(self) -> None:
        """The first patch is told of nothing, its first byte sees nothing."""
        self._reserve(1)
        batch = len(self._lengths)
        pad = self.network.global_pad.expand(batch, 1, -1)
        self._tell([0] * batch, pad)
        nothing = torch.zeros(batch, 1, dtype=torch.int64, device=pad.device)
        self._write([0] * batch, nothing)

    @property
    def lengths(self) -> list[int]:
        """Cached tokens of each row."""
        return list(self._lengths)

    def prefill(self, rows: Sequence[torch.Tensor], *, taps: Taps | None = None) -> Features | None:
        """Cache tokens of each row, int64 [T_b].

        Raises:
            InvalidInputError: Inner states are asked for.
        """
        _no_taps(taps)
        counts = [len(r) for r in rows]
        tokens = pad_sequence([r.to(self.target.device) for r in rows], batch_first=True)
        for start in range(0, tokens.shape[1], PREFILL_CHUNK):
            piece = tokens[:, start : start + PREFILL_CHUNK]
            self._feed(piece)
            steps = [min(max(n - start, 0), piece.shape[1]) for n in counts]
            self._lengths = [a + n for a, n in zip(self._lengths, steps, strict=True)]
        return None

    def score(self, tree: TokenTree, *, taps: Taps | None = None) -> Scores:
        """Run the model on a chain.

        Raises:
            InvalidInputError: The tree is no chain, or inner states are asked for.
        """
        _no_taps(taps)
        if not tree.is_chain:
            raise InvalidInputError("a byte model scores chains only; use tree.first_chain()")
        return Scores(self._feed(tree.tokens))

    def keep(self, path: torch.Tensor) -> None:
        """Commit the first tokens of the last chain, int64 [B, M] padded with -1."""
        counts = [sum(node >= 0 for node in row) for row in path.tolist()]  # a chain is short
        self._lengths = [n + c for n, c in zip(self._lengths, counts, strict=True)]

    def truncate(self, lengths: Sequence[int]) -> None:
        """Forget cached tokens beyond the given lengths."""
        self._lengths = [min(a, int(b)) for a, b in zip(self._lengths, lengths, strict=True)]

    def fork(self, rows: Sequence[int]) -> PatchSession:
        """Copies of the given rows."""
        twin = PatchSession(self.target, 0)
        index = torch.tensor(list(rows), dtype=torch.int64, device=self.target.device)
        twin._lengths = [self._lengths[r] for r in rows]
        twin._ids, twin._told = self._ids[index], self._told[index]
        for own, other in ((twin._across, self._across), (twin._inside, self._inside)):
            own.keys, own.values = other.keys[:, index], other.values[:, index]
        return twin

    def join(self, other: Session) -> PatchSession:
        """Copies of the rows of both.

        Raises:
            MismatchError: The other session is that of another target.
        """
        if not isinstance(other, PatchSession) or other.target is not self.target:
            raise MismatchError("only sessions of one target can be joined")
        twin = PatchSession(self.target, 0)
        twin._lengths = [*self._lengths, *other._lengths]
        twin._ids = _stacked(self._ids, other._ids, 0)
        twin._told = _stacked(self._told, other._told, 0)
        for own, a, b in (
            (twin._across, self._across, other._across),
            (twin._inside, self._inside, other._inside),
        ):
            own.keys, own.values = _stacked(a.keys, b.keys, 1), _stacked(a.values, b.values, 1)
        return twin

    @torch.no_grad()
    def _feed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Read N tokens a row after its cached ones; logits [B, N, V] of what follows each."""
        if not len(tokens):
            return self.network.head.weight.new_zeros(0, tokens.shape[1], self.target.vocab_size)
        starts, p, count = self._lengths, self.patch, tokens.shape[1]
        self._reserve(max(starts) + count + 1)
        _put(self._ids, starts, tokens)
        done = [n // p for n in starts]  # patches that were finished before
        more = max((n + count) // p - k for n, k in zip(starts, done, strict=True))
        if more:
            begin = [k * p - self.network.reach for k in done]
            width = more * p + self.network.reach
            place = _places(begin, width, tokens.device)
            if len(place) == 1 and begin[0] >= 0:
                ids = self._ids[:, begin[0] : begin[0] + width]
            else:
                known = place.clamp(0, self._ids.shape[1] - 1)
                ids = self._ids.gather(1, known.expand(len(starts), -1))
            patches = self.network.embed(ids, place, more)
            self._tell([k + 1 for k in done], patches)
        return self._write([n + 1 for n in starts], tokens)

    def _tell(self, starts: list[int], patches: torch.Tensor) -> None:
        """Run the global model on the patches [B, N, W] before patches ``starts`` and so on."""
        place = _places(starts, patches.shape[1], patches.device)
        stores = self._across.at(starts, place, 0)
        mask = None
        if place.shape != (1, 1):
            mask = _mask(starts, place, 0, torch.zeros_like(place), patches)
        _put(self._told, starts, self.network.across(patches, place, mask, stores))

    def _write(self, starts: list[int], before: torch.Tensor) -> torch.Tensor:
        """Logits of the bytes at places ``starts`` and so on, given those before [B, N]."""
        network, p, count = self.network, self.patch, before.shape[1]
        place = _places(starts, count, before.device)
        if place.shape == (1, 1):  # plain decoding: nothing is looked up, nothing is masked
            k, within = divmod(starts[0], p)
            told = self._told[:, k, within : within + 1]
            x = told + (network.local_embedding(before) if within else network.local_pad)
            stores = self._inside.at(starts, place, max(0, k * p - self.overlap))
            return network.inside(x, place, None, stores)
        rows = torch.arange(len(starts), device=place.device)[:, None]
        told = self._told[rows, place // p, place % p]
        x = network.local_inputs(told, before, place)
        first = (place // p * p - self.overlap).clamp(min=0)  # of the bytes that each one sees
        low = int(first.min())
        stores = self._inside.at(starts, place, low)
        return network.inside(x, place, _mask(starts, place, low, first, x), stores)

    def _reserve(self, length: int) -> None:
        """Make room for places below ``length``; grows by half."""
        if length <= self._ids.shape[1]:
            return
        length = max(length, 64, self._ids.shape[1] * 3 // 2)
        patches = length // self.patch + 2  # a shorter row may reach one patch beyond its own
        self._ids = _grown(self._ids, length, 1)
        self._told = _grown(self._told, patches, 1)
        for cache, room in ((self._across, patches), (self._inside, length)):
            cache.keys, cache.values = (_grown(x, room, 2) for x in (cache.keys, cache.values))


def written(network: BytePatches, prompt: torch.Tensor, length: int) -> torch.Tensor:
    """Greedy bytes after a prompt up to ``length`` in all, with both caches; int64 [length]."""
    session = PatchTarget(network).session(1)
    session.prefill([prompt[:-1]])
    keep = torch.zeros(1, 1, dtype=torch.int64)
    tokens, token = [prompt], prompt[-1:]
    for _ in range(length - len(prompt)):
        token = session.score(TokenTree.root(token)).logits[0].argmax(-1)
        session.keep(keep)
        tokens.append(token)
    return torch.cat(tokens)


class _Cache:
    """Keys and values of a stack under their places: [L, B, S, H, d]."""

    def __init__(self, layers: int, heads: int, width: int, batch: int, like: torch.Tensor) -> None:
        self.keys = like.new_zeros(layers, batch, 0, heads, width // heads)
        self.values = torch.zeros_like(self.keys)

    def at(self, starts: list[int], place: torch.Tensor, low: int) -> list[Store]:
        """Stores of a forward that writes ``place`` [B or 1, N] and sees what begins at ``low``."""
        window = slice(low, max(starts) + place.shape[1])
        pairs = zip(self.keys.unbind(0), self.values.unbind(0), strict=True)
        return [_Layer(keys, values, starts, window) for keys, values in pairs]


class _Layer:
    """Where one layer keeps its past, for one forward."""

    def __init__(
        self, keys: torch.Tensor, values: torch.Tensor, starts: list[int], window: slice
    ) -> None:
        self.keys, self.values, self.starts, self.window = keys, values, starts, window

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        for held, new in ((self.keys, key_states), (self.values, value_states)):
            _put(held, self.starts, new.transpose(1, 2))
        keys, values = (x[:, self.window].transpose(1, 2) for x in (self.keys, self.values))
        return keys, values


def _mask(
    starts: list[int], place: torch.Tensor, low: int, first: torch.Tensor, like: torch.Tensor
) -> torch.Tensor:
    """Additive mask [B or 1, 1, N, S] of queries at ``place`` that see from ``first`` to it."""
    keys = torch.arange(low, max(starts) + place.shape[1], device=place.device)
    seen = (keys <= place[..., None]) & (keys >= first[..., None])
    return additive(seen, like.dtype)


def _places(starts: list[int], count: int, device: torch.device) -> torch.Tensor:
    """Places that begin at ``starts``: int64 [B, N], or [1, N] where all rows are alike."""
    if min(starts) == max(starts):
        return torch.arange(starts[0], starts[0] + count, device=device)[None]
    return torch.tensor(starts, device=device)[:, None] + torch.arange(count, device=device)


def _put(held: torch.Tensor, starts: list[int], new: torch.Tensor) -> None:
    """Write new [B, N, ...] into held [B, S, ...], each row from its own place on."""
    count = new.shape[1]
    if min(starts) == max(starts):
        held[:, starts[0] : starts[0] + count] = new
        return
    rows = torch.arange(len(starts), device=held.device)[:, None]
    held[rows, _places(starts, count, held.device)] = new


def _grown(x: torch.Tensor, size: int, axis: int) -> torch.Tensor:
    return F.pad(x, [0, 0] * (x.ndim - axis - 1) + [0, size - x.shape[axis]])


def _stacked(a: torch.Tensor, b: torch.Tensor, axis: int) -> torch.Tensor:
    """Rows of both, with room for the longer."""
    room = max(a.shape[axis + 1], b.shape[axis + 1])
    return torch.cat([_grown(x, room, axis + 1) for x in (a, b)], axis)


def _no_taps(taps: Taps | None) -> None:
    if taps:
        raise InvalidInputError(
            "inner states of a byte model on two scales cannot be read; use another drafter"
        )
