"""Stores: tables of what followed what, that draft without a model.

A store belongs to one tokenizer and one user: it holds fragments of what was read and written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from isthmus.errors import InvalidInputError

EMPTY = -1
"""Mark of a cell that holds no token."""


class AdjacencyStore:
    """For every token the k most likely successors seen last, int32 [V, k].

    Args:
        vocab_size: Tokens V.
        k: Successors kept.

    Attributes:
        table: int32 [V, k], best first, ``EMPTY`` where nothing was seen.

    Example:
        >>> store = AdjacencyStore(vocab_size=4, k=2)
        >>> store.update(np.array([1, 1]), np.array([[2, 3], [3, 0]]))
        >>> store.table[1].tolist(), store.table[0].tolist()
        ([3, 0], [-1, -1])
    """

    def __init__(self, vocab_size: int, k: int) -> None:
        if vocab_size < 1 or k < 1:
            raise InvalidInputError(f"a store needs vocab_size and k of at least 1, got {k}")
        self.table = np.full((vocab_size, min(k, vocab_size)), EMPTY, dtype=np.int32)

    def update(self, tokens: np.ndarray[Any, Any], successors: np.ndarray[Any, Any]) -> None:
        """Replace the rows of ``tokens`` [M] by ``successors`` [M, k]; the later one wins."""
        # NumPy assigns repeated indices in order, so the last one stays
        self.table[tokens] = successors

    def update_from_logits(self, tokens: torch.Tensor, logits: torch.Tensor) -> None:
        """Store the k most likely successors of each token [M] by its logits [M, V]."""
        k = self.table.shape[1]
        best = torch.topk(logits, k, dim=-1).indices
        self.update(tokens.cpu().numpy(), best.to("cpu", torch.int32).numpy())

    def fill(
        self,
        roots: np.ndarray[Any, Any],
        parents: np.ndarray[Any, Any],
        ranks: np.ndarray[Any, Any],
        levels: Sequence[np.ndarray[Any, Any]],
    ) -> np.ndarray[Any, Any]:
        """Look up a tree template level by level, one gather a level.

        Args:
            roots: int64 [B].
            parents: Parent of each node [N].
            ranks: Which successor of its parent each node is [N].
            levels: Node indices of each level below the root, top down.

        Returns:
            int64 [B, N], ``EMPTY`` where the table has no entry or the parent is empty.
        """
        tokens = np.full((len(roots), len(parents)), EMPTY, dtype=np.int64)
        tokens[:, 0] = roots
        for level in levels:
            above = tokens[:, parents[level]]
            found = self.table[above, ranks[level]]
            tokens[:, level] = np.where(above == EMPTY, EMPTY, found)
        return tokens
