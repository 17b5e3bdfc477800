"""A transducer whose predictor may look at the sound: an attention decoder, chunk by chunk.

::

    features ─▶ Conformer ─▶ h [B, T, D] ──────┬─▶ W tanh(W_h h_t + W_s s_{c(t),u}) ─▶ logits
                          h up to the end of c │
    text so far ─▶ cross-attention ─▶ s_{c,u} ─┘

Chunk c of K frames is read with the states s_c, for which the decoder has read the whole text again
with what is heard by the end of c, in training as in use. Without cross-attention the states are
the same in all chunks: a plain transducer with a self-attentive predictor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import functional as F

from isthmus.errors import InvalidInputError
from isthmus.nn.attention import MultiHeadAttention
from isthmus.nn.conformer import Conformer
from isthmus.nn.feed_forward import FeedForward
from isthmus.nn.position import sinusoidal


class _Layer(nn.Module):
    """Pre-norm: self-attention over the text, cross-attention over the sound, feed-forward."""

    def __init__(self, width: int, heads: int, inner: int, dropout: float, *, cross: bool) -> None:
        super().__init__()
        self.self_attn = MultiHeadAttention(width, heads, dropout=dropout)
        self.cross_attn = MultiHeadAttention(width, heads, dropout=dropout) if cross else None
        self.feed_forward = FeedForward(width, inner, "silu", dropout=dropout)
        self.norm_self_attn, self.norm_feed_forward = nn.LayerNorm(width), nn.LayerNorm(width)
        self.norm_cross_attn = nn.LayerNorm(width) if cross else nn.Identity()
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, memory: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Map x [B, C, U, D] to the same; the mask over the memory is bool [B, 1, C U, T]."""
        text = self.norm_self_attn(x).flatten(0, 1)  # every chunk reads the text for itself
        x = x + self.dropout(self.self_attn(text, causal=True).view(x.shape))
        if self.cross_attn is not None:
            query = self.norm_cross_attn(x).flatten(1, 2)
            x = x + self.dropout(self.cross_attn(query, memory, mask).view(x.shape))
        out: torch.Tensor = x + self.dropout(self.feed_forward(self.norm_feed_forward(x)))
        return out


@dataclass(frozen=True)
class Reading:
    """Rows that are being read.

    Attributes:
        text: Tokens so far behind the first one, which is 0; int64 [B, L], anything beyond.
        written: Tokens of each row, that one included, [B].
        memory: Frames so far [B, T, D].
        heard: How many of them are valid, [B].
        states: The predictor's after each row's last token, [B, D].
    """

    text: torch.Tensor
    written: torch.Tensor
    memory: torch.Tensor
    heard: torch.Tensor
    states: torch.Tensor


class AttentionTransducer(nn.Module):
    """Encoder, decoder and joint network; plays :class:`~isthmus.roles.FrameScorer`.

    Args:
        encoder: Of width D.
        vocab: Tokens V; 0 is the blank, begins texts, and ends them in the decoder's own law.
        layers: Of the decoder.
        heads: Of the decoder.
        inner: Width within the decoder's feed-forwards.
        joint: Width of the joint network.
        dropout: Of the decoder.
        cross: Whether the decoder looks at the sound.
        chunk: Frames K of a chunk; 0 takes the whole sound as one.
        max_length: Tokens of a text at most.
    """

    waves: torch.Tensor

    def __init__(
        self,
        encoder: Conformer,
        vocab: int,
        layers: int = 2,
        heads: int = 4,
        inner: int = 0,
        joint: int = 0,
        *,
        dropout: float = 0.1,
        cross: bool = True,
        chunk: int = 0,
        max_length: int = 512,
    ) -> None:
        super().__init__()
        width = encoder.width
        self.encoder, self.cross, self.chunk, self.max_length = encoder, cross, chunk, max_length
        self.embedding = nn.Embedding(vocab, width)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        self.layers = nn.ModuleList(
            _Layer(width, heads, inner or 4 * width, dropout, cross=cross) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.word = nn.Linear(width, vocab)  # the decoder's own law
        joint = joint or width
        self.from_sound, self.from_text = nn.Linear(width, joint), nn.Linear(width, joint)
        self.head = nn.Linear(joint, vocab)
        self.register_buffer("waves", sinusoidal(max_length, width).float(), persistent=False)
        for module in (m for n, m in self.named_modules() if not n.startswith("encoder")):
            if isinstance(module, nn.Linear):  # as the other text decoders here begin
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def ends(self, lengths: torch.Tensor, size: int) -> torch.Tensor:
        """How many frames are heard by the end of each chunk of T = ``size`` frames, [B, C].

        Example:
            >>> encoder = Conformer(8, 8, 1, 2, factor=4, channels=2, causal=True, chunk=4)
            >>> AttentionTransducer(encoder, 3, chunk=4).ends(torch.tensor([10, 5]), 10).tolist()
            [[4, 8, 10], [4, 5, 5]]
        """
        if not self.chunk or not self.cross:
            return lengths[:, None]
        last = torch.arange(1, -(-size // self.chunk) + 1, device=lengths.device) * self.chunk
        return torch.minimum(last, lengths[:, None])

    def predict(
        self, text: torch.Tensor, memory: torch.Tensor, heard: torch.Tensor
    ) -> torch.Tensor:
        """States s of the decoder.

        Args:
            text: Tokens int64 [B, U], the first of which is 0.
            memory: Frames h [B, T, D].
            heard: How many of them are heard in each chunk [B, C].

        Returns:
            [B, C, U, D].

        Raises:
            InvalidInputError: The text is longer than ``max_length``.
        """
        (rows, length), chunks = text.shape, heard.shape[1]
        if length > self.max_length:
            raise InvalidInputError(
                f"a text of {length} tokens is longer than max_length={self.max_length}"
            )
        x = self.embedding(text) * math.sqrt(self.encoder.width) + self.waves[:length]
        x = x[:, None].expand(-1, chunks, -1, -1)
        place = torch.arange(memory.shape[1], device=text.device)
        mask = place < heard.clamp(min=1)[:, :, None, None]  # [B, C, 1, T]
        mask = mask.expand(-1, -1, length, -1).reshape(rows, 1, chunks * length, -1)
        for layer in self.layers:
            x = layer(x, memory, mask)
        out: torch.Tensor = self.norm(x)
        return out

    def forward(
        self,
        features: torch.Tensor,
        frames: torch.Tensor,
        targets: torch.Tensor,
        *,
        transduce: bool = True,
    ) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """Score texts.

        Args:
            features: [B, M, F].
            frames: Valid frames [B].
            targets: int64 [B, U].
            transduce: Whether the transducer's logits are wanted.

        Returns:
            Logits [B, T, U + 1, V] of the transducer, those [B, U + 1, V] of the decoder's own law
            after the last chunk, and valid frames behind the encoder [B].
        """
        memory, lengths = self.encoder(features, frames)
        size = memory.shape[1]
        heard = self.ends(lengths, size) if transduce else lengths[:, None]
        states = self.predict(F.pad(targets, (1, 0)), memory, heard)  # [B, C, U + 1, D]
        own = self.word(states[:, -1])
        if not transduce:
            return None, own, lengths
        told = self.from_text(states)
        if told.shape[1] > 1:
            told = told[:, torch.arange(size, device=told.device) // self.chunk]
        inner = self.from_sound(memory)[:, :, None] + told  # [B, T, U + 1, J]
        return self.head(inner.tanh()), own, lengths

    # FrameScorer ------------------------------------------------------------------------------

    def start(self, batch: int) -> Reading:
        """See :class:`~isthmus.roles.FrameScorer`."""
        none = self.waves.new_zeros(batch, 0, self.encoder.width)
        zero = torch.zeros(batch, 1, dtype=torch.int64, device=none.device)
        return self._read(Reading(zero, zero[:, 0] + 1, none, zero[:, 0], none.sum(1)))

    def hear(self, frames: torch.Tensor, lengths: torch.Tensor, state: Reading) -> Reading:
        """The text is read again with what is heard now."""
        memory = torch.cat([state.memory, frames], 1)
        state = replace(state, memory=memory, heard=state.heard + lengths)
        return self._read(state) if self.cross else state

    def score(self, frames: torch.Tensor, state: Reading) -> torch.Tensor:
        """See :class:`~isthmus.roles.FrameScorer`."""
        inner = self.from_sound(frames) + self.from_text(state.states)[:, None]
        log_probs: torch.Tensor = self.head(inner.tanh()).log_softmax(-1)
        return log_probs

    def advance(self, tokens: torch.Tensor, where: torch.Tensor, state: Reading) -> Reading:
        """See :class:`~isthmus.roles.FrameScorer`."""
        written = state.written + where
        text = F.pad(state.text, (0, max(0, int(written.max()) - state.text.shape[1])))
        place = torch.arange(text.shape[1], device=text.device)
        new = (place == state.written[:, None]) & where[:, None]
        text = torch.where(new, tokens[:, None], text)
        return self._read(replace(state, text=text, written=written))

    def _read(self, state: Reading) -> Reading:
        if self.cross and not state.memory.shape[1]:
            return state  # nothing is heard, so nothing is asked yet
        states = self.predict(state.text, state.memory, state.heard[:, None])[:, 0]
        last = (state.written - 1)[:, None, None].expand(-1, 1, states.shape[2])
        return replace(state, states=states.gather(1, last)[:, 0])

    @torch.no_grad()
    def write(self, memory: torch.Tensor, lengths: torch.Tensor, longest: int) -> list[list[int]]:
        """Greedy texts by the decoder's own law, without the transducer.

        Args:
            memory: Frames h [B, T, D].
            lengths: Valid ones [B].
            longest: Tokens at most.
        """
        text = torch.zeros(len(memory), 1, dtype=torch.int64, device=memory.device)
        done = torch.zeros_like(text[:, 0], dtype=torch.bool)
        for _ in range(longest):
            states = self.predict(text, memory, lengths[:, None])[:, 0, -1]
            token = self.word(states).argmax(-1).masked_fill(done, 0)
            text = torch.cat([text, token[:, None]], 1)
            done |= token == 0
            if done.all():
                break
        rows: list[list[int]] = [row[1:] for row in text.tolist()]
        return [row[: row.index(0)] if 0 in row else row for row in rows]
