"""The cache of a trained drafter's own layers: verified tokens for good, drafted ones for a round.

Two kinds of rows go in. *Verified* tokens, with the target's true features, are appended and stay
(:meth:`DraftCache.append`, then :meth:`DraftCache.commit`). *Drafted* tokens are appended level by
level below them with a tree mask (:meth:`DraftCache.branch`), and :meth:`DraftCache.drop` forgets
them all before the next round, so a predicted feature never stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch

from isthmus.decoding.cache import LayerShape, SlotCache
from isthmus.nn.decoder import LayerSizes, Store
from isthmus.nn.masks import tree_mask


class DraftCache:
    """Keys and values of L layers for B rows.

    Args:
        sizes: Sizes of the layers.
        layers: Layers L.
        batch: Rows B.
        dtype: Element type.
        device: Where the buffers live.
    """

    def __init__(
        self,
        sizes: LayerSizes,
        layers: int,
        batch: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = LayerShape(sizes.num_key_value_heads, sizes.head_dim, sizes.head_dim)
        self._slots = SlotCache([shape] * layers, batch, dtype, device)
        self._dtype = dtype
        self._reset()

    def _reset(self) -> None:
        self._start = self._level = 0  # first drafted slot; nodes of the newest level
        self._seen: torch.Tensor | None = None  # [B, tail, tail], who sees whom among the drafted
        self._depth: torch.Tensor | None = None  # [B, tail]

    @property
    def lengths(self) -> list[int]:
        """Verified tokens of each row."""
        return self._slots.lengths

    def store(self, layer: int) -> Store:
        """What the attention of a layer writes to."""
        return cast(Store, self._slots.hub.layers[layer])

    def append(self, valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Make room for N verified tokens a row.

        Args:
            valid: Which of them are real, bool [B, N], real ones first.

        Returns:
            Positions [B, N] and the mask of the forward (None: plainly causal).
        """
        self.drop()
        slots, n = self._slots, valid.shape[1]
        slots.reserve(n)
        steps = torch.arange(n, device=valid.device)
        positions = torch.tensor(slots.lengths, device=valid.device)[:, None] + steps
        if slots.used == 0 and bool(valid.all()):
            return positions, None
        past, live = slots.slots()
        mask = tree_mask(
            (steps[:, None] >= steps)[None],
            positions,
            slot_pos=past,
            slot_live=live,
            past=slots.used,
            dtype=self._dtype,
        )
        return positions, mask

    def commit(self, valid: torch.Tensor) -> None:
        """Keep the tokens of the last forward that are real, bool [B, N]."""
        steps = torch.arange(valid.shape[1], device=valid.device)
        self._slots.keep(torch.where(valid, steps, -1))

    def branch(self, parent: torch.Tensor, rows: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """Make room for a level of F drafted nodes a row.

        Args:
            parent: Place of each node's parent in the level branched before, int64 [B, F]; the
                first level hangs from the verified tokens, whatever it says.
            rows: A node is a block of R tokens, one after the other, that all see one another; the
                same on every level.

        Returns:
            Positions [B, F R] and the mask [B, 1, F R, S + tail + F R] of the level's forward.
        """
        slots, (b, nodes) = self._slots, parent.shape
        slots.used += self._level  # the level before has run by now
        count = nodes * rows
        slots.reserve(count)
        steps = torch.arange(count, device=parent.device)
        own = (steps[:, None] // rows == steps // rows).expand(b, -1, -1)
        if self._seen is None or self._depth is None:
            self._start = slots.used
            seen, depth = own, (steps % rows).expand(b, -1)
            self._seen, self._depth = seen, depth
        else:
            tail = self._seen.shape[1]
            place = parent.repeat_interleave(rows, 1) * rows + rows - 1 + tail - self._level
            above = self._seen.gather(1, place[..., None].expand(-1, -1, tail))
            seen = torch.cat([above, own], 2)
            depth = self._depth.gather(1, place) + 1 + steps % rows
            before = torch.nn.functional.pad(self._seen, (0, count))
            self._seen = torch.cat([before, seen], 1)
            self._depth = torch.cat([self._depth, depth], 1)
        self._level = count
        positions = torch.tensor(slots.lengths, device=parent.device)[:, None] + depth
        past, live = torch.arange(self._start, device=parent.device)[None], None
        if not slots.dense:
            past, live = slots.pos[:, : self._start], slots.live[:, : self._start]
        mask = tree_mask(
            seen, positions, slot_pos=past, slot_live=live, past=self._start, dtype=self._dtype
        )
        return positions, mask

    def drop(self) -> None:
        """Forget every drafted node."""
        if self._seen is not None:
            self._slots.used = self._start
        self._reset()

    def select(self, rows: Sequence[int]) -> None:
        """Keep only the given rows."""
        self.drop()
        self._slots = self._slots.select(rows)
