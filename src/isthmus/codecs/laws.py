"""Laws of a network as whole frequencies, by one rule for who writes and who reads (``pinned``).

::

    logits ─▶ multiples of 2^-8 ─▶ whole numbers from a table of exp ─▶ frequencies, sum 2^16

All but the first arrow is exact in whole numbers. Writer and reader run the same steps in the same
shapes on one thread, so the first gives the same on one machine; on another one, a logit that lies
on an edge may fall to the other side, and the check of the symbols tells.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from isthmus.codecs.rangecoder import TOTAL, Decoder, Encoder, Ints
from isthmus.errors import InvalidInputError
from isthmus.models.code_lm import CodeLM, CodeState

GRID = 256
"""Steps of a logit between two whole numbers."""

_SPAN = 14 * GRID
"""Logits that lie farther below the largest count as if they lay there."""

_EXP = np.array([math.floor(math.exp(-k / GRID) * (1 << 24) + 0.5) for k in range(_SPAN + 1)])


def frequencies(logits: torch.Tensor) -> Ints:
    """Frequencies of at least 1 that sum to 2^16.

    Args:
        logits: [..., K] with K up to 2^15.

    Returns:
        int64 [..., K].

    Raises:
        InvalidInputError: A logit is no finite number, or there are too many.

    Example:
        >>> frequencies(torch.tensor([1.0, 1.0])).tolist()
        [32768, 32768]
    """
    values = logits.detach().double().numpy()
    if not 1 <= values.shape[-1] <= TOTAL // 2 or not np.isfinite(values).all():
        raise InvalidInputError(f"a law is of 1 to {TOTAL // 2} finite logits")
    grid = np.rint(values * GRID).astype(np.int64)
    weight = _EXP[np.minimum(grid.max(-1, keepdims=True) - grid, _SPAN)]
    free = TOTAL - values.shape[-1]
    counts: Ints = 1 + weight * free // weight.sum(-1, keepdims=True)
    best = counts.argmax(-1)[..., None]
    rest = TOTAL - counts.sum(-1, keepdims=True)
    np.put_along_axis(counts, best, np.take_along_axis(counts, best, -1) + rest, -1)
    return counts


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums in one order: a single thread, as long as the block runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class CodeCoder:
    """Codes of several codebooks as bytes, packet after packet, along a model or evenly.

    The writer takes the reader's own steps, frame by frame, so both meet the same numbers.

    Args:
        lm: The model; None spends the bits of even odds.
        n_q: Codebooks used.
        size: K.
        batch: Channels.
    """

    def __init__(self, lm: CodeLM | None, n_q: int, size: int, batch: int = 1) -> None:
        self.lm, self.n_q, self.size, self.batch = lm, n_q, size, batch
        self.state = CodeState()

    def encode(self, codes: torch.Tensor) -> bytes:
        """Bytes of codes [n_q, B, T]."""
        coder = Encoder()
        flat = codes.permute(2, 0, 1).reshape(codes.shape[2], -1).numpy()  # [T, n_q B]
        if self.lm is None:
            coder.uniform(flat.reshape(-1), np.full(flat.size, self.size))
        elif len(flat):
            laws = []
            for frame in codes.unbind(2):
                laws.append(self._law())
                self.state.last = frame
            coder.rows(flat.reshape(-1), np.concatenate(laws))
        return coder.finish()

    def decode(self, data: bytes, frames: int) -> torch.Tensor:
        """Codes [n_q, B, T] of bytes.

        Raises:
            BrokenFileError: They were not coded so.
        """
        coder = Decoder(data)
        if self.lm is None:
            flat = coder.uniform(np.full(frames * self.n_q * self.batch, self.size))
            found = torch.from_numpy(flat).view(frames, self.n_q, self.batch)
            return found.permute(1, 2, 0)
        out = []
        for _ in range(frames):
            frame = torch.from_numpy(coder.rows(self._law())).view(self.n_q, self.batch)
            self.state.last = frame
            out.append(frame)
        return torch.stack(out, 2)

    def _law(self) -> Ints:
        """Frequencies of the next frame, [n_q B, K]."""
        assert self.lm is not None
        with one_thread():
            logits, self.state = self.lm.step(self.state, self.n_q, self.batch)
        return frequencies(logits).reshape(-1, self.size)


class TokenLaws:
    """Frequencies of the next token of a causal model of transformers, step by step.

    Writer and reader both take these steps, so they meet the same numbers.

    Args:
        lm: The model, in eval mode.
    """

    def __init__(self, lm: Any) -> None:
        from transformers import DynamicCache

        from isthmus.models.hub import cache_argument

        self.lm, self.cache, self._name = lm, DynamicCache(), cache_argument(lm)

    @torch.no_grad()
    def after(self, token: int) -> Ints:
        """Frequencies [V] after one more token."""
        given: Any = {"input_ids": torch.tensor([[token]]), self._name: self.cache}
        with one_thread():
            return frequencies(self.lm(**given, use_cache=True).logits[0, -1])


def packets(chunks: Iterable[torch.Tensor], length: int) -> Iterator[torch.Tensor]:
    """Pieces [C, length], and a shorter one at the end."""
    held: list[torch.Tensor] = []
    for chunk in chunks:
        held.append(chunk)
        while sum(part.shape[1] for part in held) >= length:
            joined = torch.cat(held, 1)
            yield joined[:, :length]
            held = [joined[:, length:]]
    rest = torch.cat(held, 1) if held else torch.zeros(1, 0)
    if rest.shape[1]:
        yield rest
