"""A network that fills a block of masks behind a prefix in one pass.

source ──encoder──┐
prefix  m m m m ──decoder, no causal mask──> one law a mask
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

IGNORED = -100
"""Label of a place that no loss is taken on."""


class BlockNetwork(nn.Module):
    """An encoder and a bidirectional decoder that fills masks.

    Args:
        target: The model it drafts for; embeddings and encoder begin as its own.
        layers: Layers of the decoder.
        heads: Attention heads of the decoder.
        max_length: Places that the decoder knows.
    """

    def __init__(
        self, target: Any, *, layers: int = 2, heads: int = 4, max_length: int = 512
    ) -> None:
        super().__init__()
        vocab, model = target.vocab_size, getattr(target, "model", None)
        width = target.hidden_size if model is not None else 8 * heads
        self.vocab_size, self.mask = vocab, vocab
        self.encoder: Any = None
        if model is not None and target.encoder_decoder:
            self.encoder = copy.deepcopy(model.get_encoder())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # torch's layers draw their weights from here
            self.embedding = nn.Embedding(vocab + 1, width)
            self.places = nn.Embedding(min(max_length, target.max_length or max_length), width)
            layer = nn.TransformerDecoderLayer(
                width, heads, 4 * width, 0.0, batch_first=True, norm_first=True
            )
            self.decoder = nn.TransformerDecoder(layer, layers, nn.LayerNorm(width))
            for table in (self.embedding, self.places):
                nn.init.normal_(table.weight, std=width**-0.5)
        if model is not None:
            own = model.get_input_embeddings().weight.detach()
            self.embedding.weight.data[:vocab] = own[:vocab] / (own.std() * width**0.5)
            self.to(own.device, own.dtype)

    def read(self, **inputs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Encode the source: states [B, S, D] and their padding, True where there is none."""
        if self.encoder is None:
            rows = inputs["rows"]
            return self.embedding.weight.new_zeros(rows, 1, self.embedding.embedding_dim), None
        mask = inputs.get("attention_mask")
        states = self.encoder(inputs["source"], attention_mask=mask)[0]
        return states, None if mask is None else mask == 0

    def forward(
        self, memory: torch.Tensor, hidden: torch.Tensor | None, tokens: torch.Tensor
    ) -> torch.Tensor:
        """Logits [B, N, V] at every place; tokens of -1 are not seen by anybody.

        Args:
            memory: States of the source [B, S, D].
            hidden: Source places that are padding, bool [B, S], or None.
            tokens: Prefix, then masks (id V), then -1; int64 [B, N].
        """
        absent = tokens < 0
        places = self.places(torch.arange(tokens.shape[1], device=tokens.device))
        x = self.embedding(tokens.clamp(min=0)) + places
        # no causal mask: every place sees the whole prefix and all masks
        x = self.decoder(x, memory, tgt_key_padding_mask=absent, memory_key_padding_mask=hidden)
        return F.linear(x, self.embedding.weight[: self.vocab_size])


def masked(
    answers: torch.Tensor, start: int, block: int, mask: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut each answer at a uniform place and put masks for the next ``block`` tokens.

    Args:
        answers: int64 [B, U], padded with -1.
        start: Token before the first one.
        block: Masks k.
        mask: Their id.
        generator: Source of the cuts.

    Returns:
        Tokens int64 [B, 1 + U + k], -1 where nothing is; labels of the same shape.
    """
    b, u = answers.shape
    lengths = (answers >= 0).sum(1)
    cut = (torch.rand(b, generator=generator, device=answers.device) * lengths).long()[:, None]
    place = torch.arange(1 + u + block, device=answers.device)
    whole = F.pad(answers, (1, block), value=-1)
    whole[:, 0] = start
    hole = (place > cut) & (place <= cut + block)
    tokens = torch.where(place <= cut, whole, torch.where(hole, mask, -1))
    return tokens, torch.where(hole & (whole >= 0), whole, IGNORED)
