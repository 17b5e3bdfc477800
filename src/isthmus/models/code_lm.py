"""A causal Transformer over the codes of several codebooks, which range coding follows.

::

    sum of the n_q embeddings of frame t-1 ─▶ blocks with a window ─▶ n_q heads ─▶ laws of frame t

The codes of a frame are predicted independently of each other, so a frame costs one step (Défossez
et al., 2022, arXiv 2210.13438, section 3.3). Attention reaches a fixed number of frames back, with
a learned bias for each distance, so streams of any length run in constant memory, and a step gives
what the whole gives.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus.errors import InvalidInputError


@dataclass
class CodeState:
    """What a stream keeps.

    Attributes:
        keys: Of each block, [B, H, S, E], S at most the reach.
        values: The same.
        last: Codes of the frame before, int64 [n_q, B]; None before the first.
    """

    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    last: Tensor | None = None


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, inner: int, reach: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.reach, self.dropout = heads, reach, dropout
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)
        self.bias = nn.Parameter(torch.zeros(heads, reach))

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, [B, H, T, E] each."""
        parts = self.qkv(self.before(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        return q, k, v

    def _rest(self, x: Tensor, mixed: Tensor) -> Tensor:
        drop = self.dropout if self.training else 0.0
        x = x + F.dropout(self.out(mixed.transpose(1, 2).flatten(2)), drop)
        inside = self.down(F.gelu(self.up(self.between(x))))
        return x + F.dropout(inside, drop)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] to the same."""
        q, k, v = self._split(x)
        at = torch.arange(x.shape[1], device=x.device)
        back = at[:, None] - at  # [T, T]
        mask = self.bias[:, back.clamp(0, self.reach - 1)]
        mask = mask.masked_fill((back < 0) | (back >= self.reach), float("-inf"))
        return self._rest(x, F.scaled_dot_product_attention(q, k, v, attn_mask=mask[None]))

    def step(self, x: Tensor, keys: Tensor | None, values: Tensor | None) -> tuple[Tensor, ...]:
        """One frame [B, 1, D]; its keys and values behind those before."""
        q, k, v = self._split(x)
        if keys is not None and values is not None:
            k = torch.cat([keys, k], 2)[:, :, -self.reach :]
            v = torch.cat([values, v], 2)[:, :, -self.reach :]
        bias = self.bias[:, : k.shape[2]].flip(1)[None, :, None]  # the last key is 0 frames away
        score = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5 + bias
        return self._rest(x, score.softmax(-1) @ v), k, v


class CodeLM(nn.Module):
    """The model.

    Args:
        n_q: Codebooks.
        size: K, codes of each.
        width: D.
        layers: Blocks.
        heads: H.
        inner: Width of the feed-forwards.
        reach: Frames that attention sees in each block, itself included.
        dropout: While training.

    Raises:
        InvalidInputError: Heads that do not divide the width, or no reach.

    Example:
        >>> lm = CodeLM(2, 16, 8, 1, 2, 16, reach=4)
        >>> lm(torch.zeros(2, 3, 5, dtype=torch.int64)).shape
        torch.Size([2, 3, 5, 16])
    """

    def __init__(
        self,
        n_q: int,
        size: int,
        width: int = 200,
        layers: int = 5,
        heads: int = 8,
        inner: int = 800,
        *,
        reach: int = 262,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if width % heads or reach < 1:
            raise InvalidInputError(
                f"heads divide the width and reach is 1 or more, got {heads}, {width}, {reach}"
            )
        self.n_q, self.size = n_q, size
        self.embed = nn.Parameter(torch.randn(n_q, size, width) * 0.1)
        self.start = nn.Parameter(torch.zeros(width))
        self.blocks = nn.ModuleList(
            _Block(width, heads, inner, reach, dropout) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Parameter(torch.randn(n_q, width, size) * 0.02)
        self.offset = nn.Parameter(torch.zeros(n_q, size))

    def forward(self, codes: Tensor) -> Tensor:
        """Logits of every frame given those before it.

        Args:
            codes: int64 [n, B, T], of the first n codebooks.

        Returns:
            [n, B, T, K].
        """
        x = self._embedded(codes[..., :-1])  # [B, T - 1, D]
        x = torch.cat([self.start.expand(codes.shape[1], 1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return self._logits(x, len(codes))

    def nats(self, codes: Tensor) -> Tensor:
        """Cost of codes [n, B, T], of each."""
        logits = self(codes)
        return F.cross_entropy(logits.flatten(0, -2), codes.flatten(), reduction="none").view(
            codes.shape
        )

    @torch.no_grad()
    def step(self, state: CodeState, n: int, batch: int = 1) -> tuple[Tensor, CodeState]:
        """Logits of the next frame; put its codes into ``last`` of the new state.

        Args:
            state: :class:`CodeState`; left as it is.
            n: Codebooks used.
            batch: B.

        Returns:
            [n, B, K], and the new state.
        """
        if state.last is None:
            x = self.start.expand(batch, 1, -1)
        else:
            x = self._embedded(state.last[..., None])
        keys, values = [], []
        for i, block in enumerate(self.blocks):
            before = (state.keys[i], state.values[i]) if state.keys else (None, None)
            x, k, v = block.step(x, *before)  # type: ignore[operator]
            keys.append(k)
            values.append(v)
        return self._logits(x, n)[:, :, 0], CodeState(keys, values)

    def _embedded(self, codes: Tensor) -> Tensor:
        """Sum over the codebooks, [B, T, D]."""
        found = [F.embedding(c, e) for c, e in zip(codes, self.embed, strict=False)]
        return torch.stack(found).sum(0)

    def _logits(self, x: Tensor, n: int) -> Tensor:
        wide: Tensor = self.norm(x)[None]  # [1, B, T, D]
        return wide @ self.head[:n, None] + self.offset[:n, None, None]
