"""A decoder-only Transformer over the codes of several levels, in any order that a pattern says.

::

    codes just written ─┐
    lower levels here  ─┼─▶ sum of embeddings ─▶ decoder layers, cache of rows ─▶ head of a level
    kind of row        ─┘

The layers are :class:`isthmus.nn.decoder.DecoderLayer`, turned by two coordinates: the step of a
row and its time. A special code, the one after the last, stands where there is none.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus.errors import InvalidInputError
from isthmus.models.code_patterns import Pattern, Step
from isthmus.nn.decoder import DecoderLayer, LayerSizes
from isthmus.nn.masks import additive


class RowStore:
    """Keys and values of the rows that are kept, in room made once.

    Args:
        room: Rows at most, those of a running step included.
    """

    def __init__(self, room: int) -> None:
        self.room, self.used = room, 0
        self.both: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Put rows behind those that are kept; see :class:`isthmus.nn.decoder.Store`."""
        if self.both is None:
            batch, heads, _, width = key_states.shape
            self.both = key_states.new_empty(2, batch, heads, self.room, width)
        end = self.used + key_states.shape[2]
        self.both[0, :, :, self.used : end] = key_states
        self.both[1, :, :, self.used : end] = value_states
        self.used = end
        return self.both[0, :, :, :end], self.both[1, :, :, :end]

    def select(self, keep: Tensor, prefix: int) -> None:
        """Keep some rows; the first ``prefix`` of them, or those of an index where it is -1."""
        if prefix >= 0:
            self.used = prefix
            return
        assert self.both is not None
        self.both[:, :, :, : len(keep)] = self.both[:, :, :, keep.to(self.both.device)]
        self.used = len(keep)


class PatternLM(nn.Module):
    """The model.

    Args:
        levels: K.
        size: V, codes of a level.
        width: D.
        layers: Blocks.
        heads: H.
        kinds: Kinds of rows that a pattern may have.

    Raises:
        InvalidInputError: The width is no multiple of four times the heads.

    Example:
        >>> from isthmus.models.code_patterns import streams
        >>> model = PatternLM(2, 5, width=8, layers=1, heads=2)
        >>> model(torch.zeros(3, 2, 4, dtype=torch.int64), streams(2, 4)).shape
        torch.Size([3, 2, 4, 5])
    """

    def __init__(
        self,
        levels: int,
        size: int,
        width: int = 64,
        layers: int = 3,
        heads: int = 4,
        *,
        kinds: int = 64,
    ) -> None:
        super().__init__()
        if width % (4 * heads):
            raise InvalidInputError(
                f"the width must be a multiple of 4 times the heads, got {width} and {heads}"
            )
        self.levels, self.size, self.kinds = levels, size, kinds
        self.embed = nn.EmbeddingBag(2 * levels * (size + 1) + kinds, width, mode="sum")
        nn.init.normal_(self.embed.weight, std=0.3)
        with torch.no_grad():  # nothing is read at most places, and at first it says nothing
            self.embed.weight[size : 2 * levels * (size + 1) : size + 1] = 0
        inner = width * 8 // 3 // 8 * 8
        # few channels turn by each coordinate, and clips are short
        sizes = LayerSizes(width, heads, heads, width // heads, inner, rope_theta=100.0)
        self.layers = nn.ModuleList(DecoderLayer(sizes) for _ in range(layers))
        self.norm = nn.RMSNorm(width, 1e-6)
        self.head = nn.Parameter(torch.randn(levels, width, size) * 0.02)
        self.offset = nn.Parameter(torch.zeros(levels, size))

    def forward(self, codes: Tensor, pattern: Pattern) -> Tensor:
        """Logits of every code, given what the pattern shows of the others.

        Args:
            codes: int64 [B, K, T].
            pattern: Of as many levels and times.

        Returns:
            [B, K, T, V].

        Raises:
            InvalidInputError: The codes are of another shape than the pattern, or out of range.
        """
        self._check(codes, pattern)
        x = self._read(self._edged(codes), pattern, slice(None))
        places = pattern.places.to(codes.device)
        mask = additive(pattern.sees, x.dtype).to(codes.device)
        for layer in self.layers:
            x = layer(x, places, mask)
        wide: Tensor = self.norm(x)[:, pattern.row_of.to(codes.device)]  # [B, K, T, D]
        return torch.einsum("bktd,kdv->bktv", wide, self.head) + self.offset[:, None]

    def nats(self, codes: Tensor, pattern: Pattern) -> Tensor:
        """Cost of each code, [B, K, T]; its sum over a matrix is the chain rule's total."""
        return F.cross_entropy(
            self(codes, pattern).flatten(0, 2), codes.flatten(), reduction="none"
        ).view(codes.shape)

    @torch.no_grad()
    def generate(self, pattern: Pattern, noise: Tensor, *, device: str = "cpu") -> Tensor:
        """Write codes, step by step, with a cache of the rows that the pattern keeps.

        Args:
            pattern: The order.
            noise: Added to the logits, of which the largest wins: Gumbel noise makes it a draw,
                zeros make it greedy; [B, K, T, V].
            device: Where the model is.

        Returns:
            int64 [B, K, T].

        Raises:
            InvalidInputError: Noise and pattern differ in shape, or the model is of another K.
        """
        told = (self.levels, pattern.times, self.size)
        if noise.ndim != 4 or tuple(noise.shape[1:]) != told:
            raise InvalidInputError(f"noise must be [B, K, T, V] = [B, {told}], got {noise.shape}")
        made = torch.zeros(noise.shape[:3], dtype=torch.int64)
        self._check(made, pattern)
        edged = self._edged(made).to(device)
        noise = noise.to(device, self.head.dtype)
        stores = [RowStore(pattern.cached + pattern.levels) for _ in self.layers]
        # rows of a step see themselves and all that is kept, which stands before them
        own = F.pad(torch.eye(pattern.levels, dtype=torch.bool), (pattern.cached, 0), value=True)
        mask = additive(own, self.head.dtype).to(device)
        for step in pattern.plan:
            logits = self._step(edged, pattern, step, stores, mask)
            best = (logits + noise[:, step.level, step.time]).argmax(-1)
            edged[:, step.level, step.time] = best
        return edged[..., :-1]

    def _step(
        self, edged: Tensor, pattern: Pattern, step: Step, stores: list[RowStore], full: Tensor
    ) -> Tensor:
        """Logits [B, P, V] of the codes that a step writes; ``full`` is a mask for most rows."""
        x = self._read(edged, pattern, step.rows)
        rows = x.shape[1]
        places = pattern.places[:, step.rows].to(x.device)
        first = pattern.cached - stores[0].used
        mask = full[:, :, :rows, first : pattern.cached + rows] if rows > 1 else None
        for layer, store in zip(self.layers, stores, strict=True):
            x = layer(x, places, mask, store)
            if step.keep is not None:
                store.select(step.keep, step.prefix)
        wide = self.norm(x)[:, step.row]  # [B, P, D]
        return torch.einsum("bpd,pdv->bpv", wide, self.head[step.level]) + self.offset[step.level]

    def _check(self, codes: Tensor, pattern: Pattern) -> None:
        wanted = (self.levels, pattern.times)
        if pattern.levels != self.levels or tuple(codes.shape[1:]) != wanted:
            raise InvalidInputError(
                f"model, pattern and codes must agree: {self.levels} levels; the pattern has "
                f"{pattern.levels} and {pattern.times} times, the codes {tuple(codes.shape[1:])}"
            )
        if int(pattern.kind.max()) >= self.kinds:
            raise InvalidInputError(f"give the model more than {self.kinds} kinds of rows")
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.size:
            raise InvalidInputError(f"codes must be 0 to {self.size - 1}")

    def _edged(self, codes: Tensor) -> Tensor:
        """Codes with the special one at the end, where NONE finds it."""
        return F.pad(codes, (0, 1), value=self.size)

    def _read(self, edged: Tensor, pattern: Pattern, rows: slice) -> Tensor:
        """What rows read, [B, N, D]."""
        batch, device = len(edged), edged.device
        times = pattern.reads[rows].to(device)  # [N, 2 K]
        places = torch.arange(2 * self.levels, device=device)
        read = edged[:, places % self.levels, times] + places * (self.size + 1)
        kind = (pattern.kind[rows] + 2 * self.levels * (self.size + 1)).to(device)
        read = torch.cat([read, kind[None, :, None].expand(batch, -1, 1)], -1)
        found: Tensor = self.embed(read.flatten(0, 1))
        return found.view(batch, -1, found.shape[-1])
