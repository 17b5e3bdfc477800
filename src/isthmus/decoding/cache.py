"""The key/value cache of the engine: append-only slots instead of positions.

Keys that were rotated, or that come from position embeddings, do not care in which slot they sit;
only the mask must know. So a forward appends the N nodes of a tree as N slots, committing a path
gathers its slots to the front of that tail, and rolling back is a smaller number. No ``crop``: its
meaning changed between releases of transformers 5.

All layers of one key shape share one buffer, so a commit moves every layer with one gather.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from isthmus.errors import MismatchError

SLACK = 64
"""Dead slots that do not yet make compaction worth its copy."""


@dataclass(frozen=True)
class LayerShape:
    """Heads and widths of one layer's keys and values."""

    heads: int
    key_dim: int
    value_dim: int


class Arena:
    """Keys and values of all layers that share a shape: [L, B, H, capacity, D].

    Args:
        shape: Heads and widths.
        layers: Layers L that live here.
        batch: Rows B.
        dtype: Element type.
        device: Where the buffers live.
        capacity: Slots to begin with; grows by half when full.
    """

    def __init__(
        self,
        shape: LayerShape,
        layers: int,
        batch: int,
        dtype: torch.dtype,
        device: torch.device,
        capacity: int,
    ) -> None:
        head = (layers, batch, shape.heads, capacity)
        self.keys = torch.empty(*head, shape.key_dim, dtype=dtype, device=device)
        self.values = torch.empty(*head, shape.value_dim, dtype=dtype, device=device)

    @property
    def capacity(self) -> int:
        """Slots there is room for."""
        return self.keys.shape[3]

    def reserve(self, slots: int, used: int) -> None:
        """Make room for ``slots`` slots; the first ``used`` are copied."""
        if slots <= self.capacity:
            return
        capacity = max(slots, self.capacity + self.capacity // 2)
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_empty(*old.shape[:3], capacity, old.shape[-1])
            new[:, :, :, :used] = old[:, :, :, :used]
            setattr(self, name, new)

    def move(self, source: torch.Tensor, start: int) -> None:
        """Copy the slots ``source`` [M] (all rows alike) to ``start .. start + M``."""
        end = start + len(source)
        self.keys[:, :, :, start:end] = self.keys.index_select(3, source)
        self.values[:, :, :, start:end] = self.values.index_select(3, source)

    def move_rows(self, source: torch.Tensor, start: int) -> None:
        """Copy the slots ``source`` [B, M] of each row to ``start .. start + M``."""
        end = start + source.shape[1]
        for buffer in (self.keys, self.values):
            index = source[None, :, None, :, None].expand(
                buffer.shape[0], -1, buffer.shape[2], -1, buffer.shape[-1]
            )
            buffer[:, :, :, start:end] = buffer.gather(3, index)

    def select(self, rows: Sequence[int], used: int) -> Arena:
        """A copy that holds the first ``used`` slots of the given rows, and as much room."""
        twin = object.__new__(Arena)
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_empty(old.shape[0], len(rows), *old.shape[2:])
            for place, row in enumerate(rows):  # an index would copy the empty slots too
                new[:, place, :, :used] = old[:, row, :, :used]
            setattr(twin, name, new)
        return twin

    def reorder(self, rows: Sequence[int], used: int) -> None:
        """Give every row the slots of another, in place; rows that stay are not touched."""
        moved = [(place, row) for place, row in enumerate(rows) if place != row]
        to, source = torch.tensor(moved, device=self.keys.device).unbind(1)
        for buffer in (self.keys, self.values):
            buffer[:, to, :, :used] = buffer[:, source, :, :used]

    def join(self, other: Arena, used: tuple[int, int]) -> Arena:
        """A copy that holds the rows of both, of which the given numbers of slots are in use."""
        twin = object.__new__(Arena)
        capacity, first = max(self.capacity, other.capacity), self.keys.shape[1]
        for name in ("keys", "values"):
            old, more = getattr(self, name), getattr(other, name)
            layers, rows, heads, _, width = old.shape
            new = old.new_empty(layers, rows + more.shape[1], heads, capacity, width)
            # a slot that no mask lets through must still hold a number
            new[:, :, :, : max(used)] = 0
            new[:, :first, :, : used[0]] = old[:, :, :, : used[0]]
            new[:, first:, :, : used[1]] = more[:, :, :, : used[1]]
            setattr(twin, name, new)
        return twin


class SlotLayer(CacheLayerMixin):
    """One layer's window onto an :class:`Arena`, as transformers' cache interface wants it."""

    is_sliding = False
    is_compileable = False

    def __init__(self, cache: SlotCache, arena: int, index: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # the cache holds its layers: a cycle would keep its buffers until the next collection
        self.cache: SlotCache = weakref.proxy(cache)
        self.arena = arena
        self.index = index
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: the arena exists before the first forward."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write N new slots in place and return views of all slots [B, H, used + N, D]."""
        start = self.cache.used
        end = start + key_states.shape[2]
        arena = self.cache.arenas[self.arena]
        keys, values = arena.keys[self.index], arena.values[self.index]
        keys[:, :, start:end] = key_states
        values[:, :, start:end] = value_states
        self.keys, self.values = keys[:, :, :end], values[:, :, :end]
        # a cache may be wider than the model: FastTarget keeps float32
        return self.keys.to(key_states.dtype), self.values.to(value_states.dtype)

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Key length and offset; releases before 5.10 pass positions, later ones a length."""
        n = query_length if isinstance(query_length, int) else int(query_length.shape[0])
        return self.cache.used + n, 0

    def get_seq_length(self) -> int:
        """Slots in use before this forward."""
        return self.cache.used

    def get_max_length(self) -> int:
        """No fixed maximum."""
        return -1

    get_max_cache_shape = get_max_length


class SlotCache:
    """Slots of B rows with two side tensors: the position of each slot and whether it is live.

    Attributes:
        used: Slots in use, the same number in every row.
        pos: Position of each slot, int64 [B, capacity]; written only while not dense.
        live: Whether a slot holds a committed token, bool [B, capacity]; likewise.
        lengths: Committed tokens of each row.
        dense: Slot s of every row is live and holds position s, so no mask is needed for the past.
        hub: The same cache as an object of transformers.
    """

    def __init__(
        self,
        layout: Sequence[LayerShape | None],
        batch: int,
        dtype: torch.dtype,
        device: torch.device,
        capacity: int = 256,
    ) -> None:
        self.layout = tuple(layout)
        kinds = list(dict.fromkeys(s for s in self.layout if s is not None))
        counts = dict.fromkeys(kinds, 0)
        self._place: list[tuple[int, int]] = []
        for shape in self.layout:
            if shape is None:  # a layer that reads another layer's keys and stores none
                self._place.append((0, 0))
                continue
            self._place.append((kinds.index(shape), counts[shape]))
            counts[shape] += 1
        self.arenas = [Arena(k, counts[k], batch, dtype, device, capacity) for k in kinds]
        self.used = 0
        self.lengths = [0] * batch
        self.dense = True
        self.device = device
        self.pos = torch.zeros(batch, capacity, dtype=torch.int64, device=device)
        self.live = torch.zeros(batch, capacity, dtype=torch.bool, device=device)
        self.hub = Cache(layers=[SlotLayer(self, a, i) for a, i in self._place])

    @property
    def batch(self) -> int:
        """Rows B."""
        return len(self.lengths)

    def reserve(self, nodes: int) -> None:
        """Make room for ``nodes`` more slots."""
        need = self.used + nodes
        for arena in self.arenas:
            arena.reserve(need, self.used)
        short = need - self.pos.shape[1]
        if short > 0:
            grow = max(short, self.pos.shape[1] // 2)
            self.pos = torch.nn.functional.pad(self.pos, (0, grow))
            self.live = torch.nn.functional.pad(self.live, (0, grow))

    def keep(self, path: torch.Tensor) -> None:
        """Commit the nodes ``path`` [B, M] (padded with -1) of the tail that was just written.

        The tail begins at slot ``used``; kept nodes move to its front and the rest is forgotten.
        """
        start = self.used
        if self.batch == 1:  # no tensor work at all where the path is already in place
            nodes = [n for n in path[0].tolist() if n >= 0]
            if nodes != list(range(len(nodes))):
                source = torch.tensor(nodes, device=self.device) + start
                for arena in self.arenas:
                    arena.move(source, start)
            first, last = self.lengths[0], self.lengths[0] + len(nodes)
            self.lengths, self.used = [last], start + len(nodes)
            if not self.dense:
                self.pos[:, start : self.used] = torch.arange(first, last, device=self.device)
                self.live[:, start : self.used] = True
            return
        if self.dense and path.shape[1] == 1 and not bool(path.any()):  # every row keeps its root
            self.lengths, self.used = [n + 1 for n in self.lengths], start + 1
            return
        kept = path >= 0
        counts = kept.sum(1).tolist()
        width = max(counts)
        if self.dense and min(counts) != width:
            self._mark()
        steps = torch.arange(width, device=self.device)
        if not bool(((path[:, :width] == steps) | ~kept[:, :width]).all()):
            source = path[:, :width].clamp(min=0) + start
            for arena in self.arenas:
                arena.move_rows(source, start)
        if not self.dense:
            lengths = torch.tensor(self.lengths, device=self.device)
            self.pos[:, start : start + width] = lengths[:, None] + steps
            self.live[:, start : start + width] = kept[:, :width]
        self.lengths = [n + c for n, c in zip(self.lengths, counts, strict=True)]
        self.used = start + width
        if not self.dense and self.used > SLACK + max(self.lengths) * 4 // 3:
            self.compact()

    def _mark(self) -> None:
        """Leave the dense state: from here on positions and live slots are written down."""
        self.dense = False
        self.pos[:, : self.used] = torch.arange(self.used, device=self.device)
        self.live[:, : self.used] = True

    def slots(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Position [B or 1, S] and liveness [B, S] (None when all are live) of the slots in use."""
        if self.dense:
            return torch.arange(self.used, device=self.device)[None], None
        return self.pos[:, : self.used], self.live[:, : self.used]

    def truncate(self, lengths: Sequence[int]) -> None:
        """Forget every slot at or beyond the given position of its row."""
        lower = [min(a, b) for a, b in zip(self.lengths, lengths, strict=True)]
        if lower == self.lengths:
            return
        self.lengths = lower
        if self.dense and min(lower) == max(lower):
            self.used = lower[0]
            return
        if self.dense:
            self.used = max(lower)
            self._mark()
        limit = torch.tensor(lower, device=self.device)
        used = slice(0, self.used)
        self.live[:, used] &= self.pos[:, used] < limit[:, None]

    def compact(self) -> None:
        """Move the live slots of each row to the front, in position order."""
        if self.dense:
            return
        used = slice(0, self.used)
        key = torch.where(self.live[:, used], self.pos[:, used], self.used + 1)
        width = max(self.lengths)
        order = torch.sort(key, dim=1, stable=True).indices[:, :width]
        for arena in self.arenas:
            arena.move_rows(order, 0)
        self.pos[:, :width] = self.pos.gather(1, order)
        self.live[:, :width] = self.live.gather(1, order)
        self.used = width
        self.dense = min(self.lengths) == width

    def select(self, rows: Sequence[int]) -> SlotCache:
        """A copy that holds the given rows."""
        index = torch.tensor(list(rows), device=self.pos.device)
        twin = self._twin([arena.select(rows, self.used) for arena in self.arenas])
        twin.used, twin.dense = self.used, self.dense
        twin.lengths = [self.lengths[r] for r in rows]
        twin.pos, twin.live = self.pos.index_select(0, index), self.live.index_select(0, index)
        twin.compact()
        return twin

    def reorder(self, rows: Sequence[int]) -> None:
        """Let row b go on as a copy of ``rows[b]``, in place; as many rows as there are."""
        if list(rows) == list(range(self.batch)):
            return
        for arena in self.arenas:
            arena.reorder(rows, self.used)
        self.lengths = [self.lengths[r] for r in rows]
        if not self.dense:
            index = torch.tensor(list(rows), device=self.pos.device)
            self.pos, self.live = self.pos[index], self.live[index]

    def join(self, other: SlotCache) -> SlotCache:
        """A copy that holds the rows of both, this one's first.

        Raises:
            MismatchError: The other cache is that of another model.
        """
        if other.layout != self.layout:
            raise MismatchError("the rows of two models cannot share a cache")
        used = self.used, other.used
        pairs = zip(self.arenas, other.arenas, strict=True)
        twin = self._twin([own.join(more, used) for own, more in pairs])
        twin.used, twin.lengths = max(used), [*self.lengths, *other.lengths]
        twin.dense = self.dense and other.dense and self.used == other.used
        capacity = max(self.pos.shape[1], other.pos.shape[1])
        twin.pos = self.pos.new_zeros(twin.batch, capacity)
        twin.live = self.live.new_zeros(twin.batch, capacity)
        for first, part in ((0, self), (self.batch, other)):
            pos, live = part.slots()
            rows, slots = slice(first, first + part.batch), slice(0, part.used)
            twin.pos[rows, slots] = pos
            twin.live[rows, slots] = True if live is None else live
        return twin

    def _twin(self, arenas: list[Arena]) -> SlotCache:
        twin = object.__new__(SlotCache)
        twin.layout, twin._place, twin.device = self.layout, self._place, self.device
        twin.arenas = arenas
        twin.hub = Cache(layers=[SlotLayer(twin, a, i) for a, i in twin._place])
        return twin
