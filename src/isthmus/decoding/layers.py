"""A target taken apart: slices of its layers, and the keys and values that it has cached.

:class:`LayerSlices` runs any stretch of the decoder layers through the modules that transformers
makes public (layers, rotary embedding, final norm), so a drafter may stop after the first layers,
go on from there later, or let rows of its own join half-way::

    embed ──> run(0, l) ──> h_l ──> run(l, L) ──> finish ──> f ──> the target's head
                             │
                             └─ a drafter's own rows may be appended here

What that assumes is tried on a probe when it is set up. A drafter that shares the target's forward
leaves an :class:`Ahead` with the session (``session.ahead``), which then scores the next tree.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, cast

import torch
from torch import nn

from isthmus.decoding.cache import LayerShape, SlotCache
from isthmus.decoding.target import HubTarget, SlotSession, tolerance
from isthmus.decoding.tree import TokenTree, chain_topology
from isthmus.errors import InvalidInputError, UnsupportedModelError
from isthmus.models.hub import cache_argument
from isthmus.nn.masks import additive, tree_mask
from isthmus.roles import Features, Scores, Taps

Mask = torch.Tensor | dict[str, torch.Tensor] | None
"""One additive mask, or one by kind of layer."""


class Ahead(Protocol):
    """Scores the next tree in place of the session's own forward."""

    def finish(self, tree: TokenTree, taps: Taps | None) -> Scores | None:
        """Logits and taps at every node; None where this is not the tree that was prepared."""
        ...


@contextlib.contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Let gradients flow through a module without collecting any for its weights."""
    learning = [p for p in module.parameters() if p.requires_grad]
    for p in learning:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in learning:
            p.requires_grad_(True)


class LayerSlices:
    """Any stretch of a decoder-only target's layers.

    Args:
        target: A model of the Llama, Qwen, Mistral, Gemma or GPT-2 kind.

    Raises:
        UnsupportedModelError: Its layers, run one by one, do not give what the model gives.
    """

    def __init__(self, target: HubTarget) -> None:
        self.target = target
        decoder = target.model.get_decoder()
        self.norm: Any = target.final_norm
        self.rotary: Any = getattr(decoder, "rotary_emb", None)
        self._table: Any = getattr(decoder, "wpe", None)
        kinds = getattr(target.config, "layer_types", None)
        self.kinds = list(kinds or ["full_attention"] * target.num_layers)
        self._by_kind = self.rotary is not None and (
            "layer_type" in inspect.signature(self.rotary.forward).parameters
        )
        if target.encoder_decoder or target.recurrent or self.norm is None:
            raise self._refusal("its layers read more than the tokens before them")
        if target.state_dtype != target.dtype:
            name = str(target.state_dtype).removeprefix("torch.")
            raise self._refusal(f"its states are {name} and its layers are not; load it in {name}")
        self._cache_name = cache_argument(target.layers[0])
        try:
            worst = self._probe()
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise self._refusal(str(error).strip().splitlines()[0]) from error
        if worst > tolerance(target.dtype):
            raise self._refusal(f"its states differ by {worst:.1e} of their spread")

    def _refusal(self, why: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"the layers of {type(self.target.model).__name__} cannot be run one by one ({why}); "
            "use a drafter that reads its hidden states, such as eagle or medusa"
        )

    def embed(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """What enters the first layer, [B, N, D], for tokens and positions int64 [B, N]."""
        x: torch.Tensor = self.target.model.get_input_embeddings()(tokens)
        return x if self._table is None else x + self._table(positions)

    def run(
        self,
        hidden: torch.Tensor,
        start: int,
        stop: int,
        positions: torch.Tensor,
        mask: Mask = None,
        cache: Any = None,
    ) -> torch.Tensor:
        """Run layers ``start`` to ``stop - 1``.

        Args:
            hidden: What enters layer ``start``, [B, N, D].
            start: First layer.
            stop: Layer after the last.
            positions: int64 [B, N].
            mask: Additive [B or 1, 1, N, S + N]; causal over ``hidden`` itself when None.
            cache: A cache of transformers; these layers read it and write to it.

        Returns:
            What enters layer ``stop``, [B, N, D].
        """
        if mask is None:
            steps = torch.arange(hidden.shape[1], device=hidden.device)
            mask = self._both(steps[:, None] >= steps, positions)
        extra: dict[str, Any] = {self._cache_name: cache, "use_cache": cache is not None}
        for index in range(start, stop):
            kind = self.kinds[index]
            if self.rotary is not None:
                given = {"layer_type": kind} if self._by_kind else {}
                extra["position_ids"] = positions
                extra["position_embeddings"] = self.rotary(hidden, positions, **given)
            where = mask[kind] if isinstance(mask, dict) else mask
            out = self.target.layers[index](hidden, attention_mask=where, **extra)
            hidden = out if torch.is_tensor(out) else out[0]
        return hidden

    def finish(self, hidden: torch.Tensor) -> torch.Tensor:
        """The final norm: from what leaves the last layer to what the head multiplies."""
        out: torch.Tensor = self.norm(hidden)
        return out

    def mask(self, session: SlotSession, seen: torch.Tensor, positions: torch.Tensor) -> Mask:
        """Mask of N new rows over everything that a session has cached and themselves.

        Args:
            session: The session.
            seen: Who sees whom among the new rows, bool [B or 1, N, N].
            positions: Their positions, int64 [B, N].
        """
        cache, target = session.cache, self.target
        slot_pos, slot_live = cache.slots()

        def build(window: int | None) -> torch.Tensor:
            return tree_mask(
                seen,
                positions,
                slot_pos=slot_pos,
                slot_live=slot_live,
                past=cache.used,
                window=window,
                dtype=target.dtype,
            )

        if target.mixed:
            return {"full_attention": build(None), "sliding_attention": build(target.window)}
        return build(target.window if "sliding" in target.kinds else None)

    def _both(self, seen: torch.Tensor, positions: torch.Tensor) -> Mask:
        target = self.target
        near = seen
        if target.window is not None:
            near = seen & (positions[:, :, None] - positions[:, None] < target.window)
        full, close = additive(seen, target.dtype), additive(near, target.dtype)
        if target.mixed:
            return {"full_attention": full, "sliding_attention": close}
        return close if "sliding" in target.kinds else full

    @torch.no_grad()
    def _probe(self) -> float:
        """Worst difference between every slice and the model's own states, over their spread."""
        target, count = self.target, self.target.num_layers
        generator = torch.Generator().manual_seed(2)
        tokens = torch.randint(0, target.vocab_size, (1, 9), generator=generator).to(target.device)
        taps = Taps(final=True, layers=tuple(range(count + 1)))
        want = target.forward(tokens, taps=taps).features
        assert want is not None and want.final is not None
        positions = torch.arange(9, device=target.device)[None]
        hidden, pairs = self.embed(tokens, positions), []
        for index in range(count):
            pairs.append((hidden, want.layers[index]))
            hidden = self.run(hidden, index, index + 1, positions)
        pairs += [(hidden, want.layers[count]), (self.finish(hidden), want.final)]
        # once more in two parts of the layers and of the text, through a session's cache
        session = cast(SlotSession, target.session(1))
        session.prefill([tokens[0, :4]])
        half, where = max(1, count // 2), positions[:, 4:]
        session.cache.reserve(5)
        mask = self.mask(session, chain_topology(5).to(target.device).ancestors, where)
        hub = session.cache.hub
        low = self.run(self.embed(tokens[:, 4:], where), 0, half, where, mask, hub)
        high = self.run(low, half, count, where, mask, hub)
        pairs.append((self.finish(high), want.final[:, 4:]))
        return max(float((a - b).abs().max()) / (float(b.max() - b.min()) or 1.0) for a, b in pairs)


class ShallowRun:
    """A chain's first layers, run token by token in the target's own cache while it is drafted.

    :meth:`finish` then runs the other layers once over what is there: verification that resumes
    from the shallow states. It holds for one round.

    Args:
        slices: The target's layers.
        session: The session that will score the chain.
        stop: Layers run ahead.

    Attributes:
        hidden: What enters layer ``stop`` at the tokens so far, [B, n, D].
        tokens: They, int64 [B, n].
    """

    def __init__(self, slices: LayerSlices, session: SlotSession, stop: int) -> None:
        self.slices, self.session, self.stop = slices, session, stop
        target = slices.target
        empty = torch.empty(session.cache.batch, 0, device=target.device)
        self.tokens = empty.long()
        self.hidden = empty[..., None].to(target.dtype).expand(-1, -1, target.hidden_size)

    def _where(self, count: int) -> tuple[torch.Tensor, Mask]:
        """Positions [B, count] and mask of the whole chain so far."""
        session, topology = self.session, chain_topology(count).to(self.slices.target.device)
        lengths = torch.tensor(session.cache.lengths, device=topology.depth.device)
        positions = lengths[:, None] + topology.depth
        if self.slices.target.max_length is not None:
            positions = positions.clamp(max=self.slices.target.max_length - 1)
        return positions, self.slices.mask(session, topology.ancestors, positions)

    @torch.no_grad()
    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Run the next tokens of the chain, int64 [B, n]; returns their states [B, n, D]."""
        cache, done, n = self.session.cache, self.tokens.shape[1], tokens.shape[1]
        cache.reserve(done + n)
        positions, mask = self._where(done + n)
        if isinstance(mask, dict):
            mask = {kind: m[:, :, done:] for kind, m in mask.items()}
        elif mask is not None:
            mask = mask[:, :, done:]
        positions = positions[:, done:]
        cache.used += done  # where these layers write
        try:
            embedded = self.slices.embed(tokens, positions)
            hidden = self.slices.run(embedded, 0, self.stop, positions, mask, cache.hub)
        finally:
            cache.used -= done
        self.tokens = torch.cat([self.tokens, tokens], 1)
        self.hidden = torch.cat([self.hidden, hidden], 1)
        return hidden

    @torch.no_grad()
    def finish(self, tree: TokenTree, taps: Taps | None) -> Scores | None:
        """See :class:`Ahead`."""
        n, wanted, slices = tree.nodes, taps or Taps(), self.slices
        known = min(n, self.tokens.shape[1])
        same = (tree.tokens == self.tokens[:, :n]) if known == n else None
        if same is None:
            same = tree.tokens[:, :known] == self.tokens
        if (
            not tree.is_chain
            or wanted.cross_attention
            or min(wanted.layers, default=self.stop) < self.stop
            or not bool((same | ~tree.alive[:, :known]).all())
        ):
            return None
        if known < n:
            self.step(tree.tokens[:, known:])
        positions, mask = self._where(n)
        hidden, layers, place = self.hidden[:, :n], {}, self.stop
        for stop in [*sorted(wanted.layers), slices.target.num_layers]:
            hidden = slices.run(hidden, place, stop, positions, mask, self.session.cache.hub)
            layers[stop], place = hidden, stop
        final = slices.finish(hidden)
        layers = {i: layers[i] for i in wanted.layers}
        features = Features(final if wanted.final else None, layers) if wanted else None
        return Scores(slices.target.head(final), features)


def one_kind(target: HubTarget) -> LayerShape:
    """Heads and widths of the cached keys and values, which have to be the same in every layer.

    Raises:
        UnsupportedModelError: They differ, or some layers keep none.
    """
    shapes = set(target.layout)
    shape = next(iter(shapes))
    if target.recurrent or len(shapes) != 1 or shape is None:
        raise UnsupportedModelError(
            f"the layers of {type(target.model).__name__} cache keys and values of different "
            "shapes; use a drafter that reads its hidden states, such as eagle"
        )
    return shape


def cached_layer(cache: SlotCache, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of one layer at every slot in use, views [B, H, S, d]."""
    view = cast(Any, cache.hub.layers[layer])
    arena = cache.arenas[view.arena]
    used = slice(0, cache.used)
    return arena.keys[view.index][:, :, used], arena.values[view.index][:, :, used]


def cached_mask(cache: SlotCache, dtype: torch.dtype) -> torch.Tensor | None:
    """Additive mask [B, 1, 1, S] of the live slots; None when all are."""
    _, live = cache.slots()
    return None if live is None else additive(live[:, None], dtype)


def cached_at(
    cache: SlotCache, positions: torch.Tensor, layers: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of some layers at given positions.

    Args:
        cache: A session's cache.
        positions: int64 [B, M]; what stands at a position that is not cached has no meaning.
        layers: Layers L.

    Returns:
        Two tensors [L, B, H, M, d].
    """
    slot_pos, live = cache.slots()
    if live is None:
        index = positions.clamp(min=0, max=max(0, cache.used - 1))
    else:
        found = (slot_pos[:, None] == positions[:, :, None]) & live[:, None]
        index = found.to(torch.uint8).argmax(-1)
    out = []
    for part in (0, 1):
        views = [cached_layer(cache, layer)[part] for layer in layers]
        rows = index[:, None, :, None].expand(-1, views[0].shape[1], -1, views[0].shape[3])
        out.append(torch.stack([view.gather(2, rows) for view in views]))
    return out[0], out[1]


class Memory:
    """Keys and values of verified tokens that a drafter made itself and only reads.

    Args:
        shape: Heads and widths.
        batch: Rows B.
        dtype: Element type.
        device: Where the buffers live.
    """

    def __init__(
        self, shape: LayerShape, batch: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._dtype = dtype
        self._slots = SlotCache([shape], batch, dtype, device)

    @property
    def lengths(self) -> list[int]:
        """Remembered tokens of each row."""
        return self._slots.lengths

    def append(self, keys: torch.Tensor, values: torch.Tensor, valid: torch.Tensor) -> None:
        """Remember those of M tokens [B, H, M, d] that are real, bool [B, M], real ones first."""
        m = valid.shape[1]
        self._slots.reserve(m)
        cast(Any, self._slots.hub.layers[0]).update(keys, values)
        self._slots.keep(torch.where(valid, torch.arange(m, device=valid.device), -1))

    def read(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Keys and values [B, H, S, d], and their mask [B, 1, 1, S] (None: all count)."""
        keys, values = cached_layer(self._slots, 0)
        return keys, values, cached_mask(self._slots, self._dtype)

    def select(self, rows: Sequence[int]) -> None:
        """Keep only the given rows."""
        self._slots = self._slots.select(rows)


class Rotation:
    """The target's own rotation of queries, so that a drafter can read its rotated keys.

    Args:
        target: Any target; one without rotary positions rotates nothing.

    Raises:
        UnsupportedModelError: Its keys are not those of position 0, rotated.
    """

    def __init__(self, target: HubTarget) -> None:
        self.rotary: Any = getattr(target.model.get_decoder(), "rotary_emb", None)
        self._given: dict[str, str] = {}
        if self.rotary is None:
            return
        if "layer_type" in inspect.signature(self.rotary.forward).parameters:
            self._given = {"layer_type": target.config.layer_types[-1]}
        if self._probe(target) > tolerance(target.dtype):
            raise UnsupportedModelError(
                f"the cached keys of {type(target.model).__name__} are not keys rotated by its "
                "rotary module; use a drafter that reads its hidden states, such as eagle"
            )

    def __call__(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Rotate queries [B, H, N, d] to their positions, int64 [B or 1, N]."""
        if self.rotary is None:
            return x
        cos, sin = (part[:, None] for part in self.rotary(x, positions, **self._given))
        turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
        a, b = turned.chunk(2, -1)
        return torch.cat([turned * cos + torch.cat([-b, a], -1) * sin, rest], -1)

    @torch.no_grad()
    def _probe(self, target: HubTarget) -> float:
        """One token alone attends to itself only, so its last key at 0 and at 5 differ by R(5)."""
        keys = []
        for place in (0, 5):
            where = torch.tensor([[place]], device=target.device)
            cache = target.empty_cache()
            target.forward(torch.ones_like(where), positions=where, cache=cache)
            keys.append(cache.layers[-1].keys)
        turned = self(keys[0], torch.full((1, 1), 5, device=target.device))
        return float((turned - keys[1]).abs().max()) / (float(keys[1].abs().max()) or 1.0)


def check_layer(target: HubTarget, layer: int, name: str) -> None:
    """Refuse a layer that the target does not have.

    Raises:
        InvalidInputError: It is not between 1 and the number of layers.
    """
    if not 1 <= layer <= target.num_layers:
        raise InvalidInputError(
            f"{name} must be 1 to {target.num_layers}, the layers of the target, got {layer}"
        )


def round_starts(length: int, period: int, generator: torch.Generator) -> torch.Tensor:
    """Where the draft round of each place of a training text began.

    A round starts every ``period`` places, the first of them anywhere: places of one round are
    drafted on what was verified before its start, as in decoding.

    Args:
        length: Places T.
        period: Places of a round.
        generator: Draws where the first round starts.

    Returns:
        int64 [T]; ``start[i] <= i``, and 0 for the places before the first start.

    Example:
        >>> starts = round_starts(6, 3, torch.Generator().manual_seed(0))
        >>> all(int(s) <= i < int(s) + 3 for i, s in enumerate(starts))
        True
    """
    shift = int(torch.randint(period, (1,), generator=generator, device=generator.device))
    place = torch.arange(length, device=generator.device)
    return ((place + shift) // period * period - shift).clamp(min=0)
