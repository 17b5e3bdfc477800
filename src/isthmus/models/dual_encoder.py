"""One transformer for queries and documents: a query is one vector, a document m of them.

::

    <query> w w w   ──▶ state of the marker          ──projection──▶ q    [k]
    <1> .. <m> w w  ──▶ states of the m markers      ──projection──▶ d_j  [m, k]
    score = max_j <q, d_j>
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import transformers
from torch import nn

from isthmus.errors import InvalidInputError


class DualEncoder(nn.Module):
    """Queries and documents as vectors of length 1.

    Args:
        vocab_size: Tokens V; markers follow them.
        vectors: Vectors m of a document.
        dimension: Numbers k of a vector.
        hidden_size: Width D.
        num_layers: Layers.
        num_heads: Attention heads.
        max_length: Longest text in tokens, markers not counted.
        dropout: Dropout.
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        vectors: int = 1,
        dimension: int = 64,
        hidden_size: int = 128,
        num_layers: int = 2,
        num_heads: int = 4,
        max_length: int = 512,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if vectors < 1:
            raise InvalidInputError(f"a document has at least 1 vector, got {vectors}")
        self.vocab_size, self.vectors, self.max_length = vocab_size, vectors, max_length
        config = transformers.BertConfig(
            vocab_size=vocab_size + 1 + vectors,
            hidden_size=hidden_size,
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            intermediate_size=4 * hidden_size,
            max_position_embeddings=max_length + vectors,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
        self.encoder = transformers.BertModel(config, add_pooling_layer=False)
        self.projection = nn.Linear(hidden_size, dimension, bias=False)

    def forward(self, texts: Sequence[Sequence[int]], *, query: bool = False) -> torch.Tensor:
        """Vectors [B, 1, k] of queries, or [B, m, k] of documents.

        Args:
            texts: Token ids; what is too long is cut.
            query: Whether they are queries.
        """
        v, m = self.vocab_size, self.vectors
        markers = [v] if query else list(range(v + 1, v + 1 + m))
        rows = [torch.tensor([*markers, *ids[: self.max_length]]) for ids in texts]
        device = self.projection.weight.device
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
        lengths = torch.tensor([len(row) for row in rows], device=device)
        mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]
        states = self.encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        vectors: torch.Tensor = self.projection(states[:, : len(markers)])
        return F.normalize(vectors, dim=-1)


def best_match(queries: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
    """Scores ``max_j <q, d_j>`` [B, N] of queries [B, 1, k] and documents [N, m, k].

    Example:
        >>> q, d = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 1.0], [0.5, 0.0]]])
        >>> best_match(q, d)
        tensor([[0.5000]])
    """
    return torch.einsum("bk,nmk->bnm", queries[:, 0], documents).amax(-1)
