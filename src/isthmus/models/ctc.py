"""A recogniser that writes no token after another: an encoder, and CTC on top and within.

::

    features ─▶ Conformer ─┬─▶ block k: p_k = softmax(CTC(x)), x + W p_k ─▶ ... ─▶ p_top
                           └ the same CTC head and W at every chosen block

With ``condition``, what a lower block has recognised is told to those above (self-conditioned CTC,
Nozaki and Komatsu, 2021, arXiv 2104.02724).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from isthmus.errors import InvalidInputError
from isthmus.nn.conformer import Conformer


class CTCModel(nn.Module):
    """Encoder and head.

    Args:
        encoder: The encoder, of width D.
        vocab: Tokens V, the blank included.
        inner: Blocks, numbered from 1, that are read as well as the last.
        condition: Whether what was read at an inner block is added to its state.
        prefixes: Tokens that may stand before the frames, to say what is asked for.

    Raises:
        InvalidInputError: A block is named that does not exist, or the last.
    """

    def __init__(
        self,
        encoder: Conformer,
        vocab: int,
        inner: Sequence[int] = (),
        *,
        condition: bool = True,
        prefixes: int = 0,
    ) -> None:
        super().__init__()
        depth = len(encoder.layers)
        if any(not 1 <= block < depth for block in inner):
            raise InvalidInputError(f"inner blocks are from 1 to {depth - 1}, got {list(inner)}")
        self.encoder, self.inner = encoder, tuple(inner)
        self.head = nn.Linear(encoder.width, vocab)
        self.prefix = nn.Embedding(prefixes, encoder.width) if prefixes else None
        self.tell = nn.Linear(vocab, encoder.width) if inner and condition else None

    def forward(
        self, features: torch.Tensor, frames: torch.Tensor, prefix: torch.Tensor | None = None
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Recognise.

        Args:
            features: [B, M, F].
            frames: Valid frames [B].
            prefix: Tokens int64 [B, P] that precede the frames; they are read, too.

        Returns:
            Log-probabilities [B, P + T, V] of the inner blocks and of the last, and how many frames
            of each row are valid [B].
        """
        read: list[torch.Tensor] = []

        def between(number: int, x: torch.Tensor) -> torch.Tensor:
            if number not in self.inner:
                return x
            read.append(self.head(x).log_softmax(-1))
            return x if self.tell is None else x + self.tell(read[-1].exp())

        before = None if prefix is None or self.prefix is None else self.prefix(prefix)
        x, lengths = self.encoder(features, frames, prefix=before, between=between)
        return [*read, self.head(x).log_softmax(-1)], lengths
