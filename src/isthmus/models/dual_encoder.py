"""One encoder for queries and documents: a query is one vector, a document m of them.

::

    w w w ──▶ tokens [T, D] ──layers──▶ states ──m weighted means──▶ [m, D] ──projection──▶ [m, k]
    score = max_j <q, d_j>

Before it is trained a vector is a random projection of the bag of words, rare words weighing more;
of several vectors each begins with its own stretch of the document. Were they to begin alike, the
best match would be that of the luckiest noise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from isthmus.errors import InvalidInputError

RARE = 1e-3
"""A word of this frequency weighs half of one that is never seen (Arora et al., 2017)."""

STRETCHES = 64
"""Equal stretches of a document that weights of its vectors tell apart."""

OUTSIDE = -3.0
"""Logarithm of what a word outside a vector's own stretch weighs at first."""


class DualEncoder(nn.Module):
    """Queries and documents as vectors of length 1.

    Args:
        vocab_size: Tokens V; id 0 pads and counts nowhere.
        vectors: Vectors m of a document.
        dimension: Numbers k of a vector.
        hidden_size: Width D.
        num_layers: Layers of a transformer over the tokens; with none a text is a bag of words.
        num_heads: Attention heads.
        max_length: Longest text in tokens.
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        vectors: int = 1,
        dimension: int = 64,
        hidden_size: int = 128,
        num_layers: int = 1,
        num_heads: int = 4,
        max_length: int = 512,
    ) -> None:
        super().__init__()
        if vectors < 1:
            raise InvalidInputError(f"a document has at least 1 vector, got {vectors}")
        self.vectors, self.max_length = vectors, max_length
        self.tokens = nn.Embedding(vocab_size, hidden_size)
        self.places = nn.Embedding(max_length, hidden_size)
        self.weights = nn.Embedding(vocab_size, 1)  # logarithms
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                hidden_size, num_heads, 4 * hidden_size, 0.0, batch_first=True, norm_first=True
            )
            for _ in range(num_layers)
        )
        # row 0 looks at a query, the others each at a document
        self.looks = nn.Linear(hidden_size, 1 + vectors, bias=False)
        self.stretches = nn.Embedding(STRETCHES, 1 + vectors)  # logarithms
        self.projection = nn.Linear(hidden_size, dimension, bias=False)
        nn.init.normal_(self.places.weight, std=0.02)
        nn.init.zeros_(self.weights.weight)
        nn.init.zeros_(self.looks.weight)
        nn.init.zeros_(self.stretches.weight)
        own = torch.arange(STRETCHES) * vectors // STRETCHES
        self.stretches.weight.data[:, 1:] = OUTSIDE * (own[:, None] != torch.arange(vectors))
        nn.init.normal_(self.projection.weight, std=hidden_size**-0.5)
        for layer in self.layers:  # each begins as the identity
            nn.init.zeros_(layer.self_attn.out_proj.weight)  # type: ignore[union-attr, arg-type]
            nn.init.zeros_(layer.linear2.weight)  # type: ignore[union-attr, arg-type]

    def weigh(self, counts: torch.Tensor) -> None:
        """Begin with weights ``a / (a + p)`` of tokens with frequencies p.

        Args:
            counts: How often each token is seen, [V].
        """
        share = counts.double() / counts.sum()
        self.weights.weight.data[:, 0] = (RARE / (RARE + share)).log().float()

    def forward(self, texts: Sequence[Sequence[int]], *, query: bool = False) -> torch.Tensor:
        """Vectors [B, 1, k] of queries, or [B, m, k] of documents.

        Args:
            texts: Token ids; what is too long is cut.
            query: Whether they are queries.
        """
        rows = [torch.tensor([*ids[: self.max_length]] or [0]) for ids in texts]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self.tokens.weight.device)
        lengths = torch.tensor([len(row) for row in rows], device=ids.device)
        place = torch.arange(ids.shape[1], device=ids.device)
        absent = place >= lengths[:, None]
        x = self.tokens(ids) + self.places(place)
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=absent)
        stretch = (place * STRETCHES // lengths[:, None]).clamp(max=STRETCHES - 1)
        looks = self.looks(x) + self.stretches(stretch)
        looks = looks[..., :1] if query else looks[..., 1:]
        looks = (looks + self.weights(ids)).masked_fill(absent[..., None], -torch.inf)
        means = torch.einsum("btm,btd->bmd", looks.softmax(1), x)
        return F.normalize(self.projection(means), dim=-1)


def best_match(queries: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
    """Scores ``max_j <q, d_j>`` [B, N] of queries [B, 1, k] and documents [N, m, k].

    Example:
        >>> q, d = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 1.0], [0.5, 0.0]]])
        >>> best_match(q, d)
        tensor([[0.5000]])
    """
    return torch.einsum("bk,nmk->bnm", queries[:, 0], documents).amax(-1)
