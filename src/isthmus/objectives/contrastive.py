"""Contrastive learning: a query shall score its own documents above all others of the batch.

>>> scores = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
>>> round(float(info_nce(scores)), 4)  # 2 log(1 + e^-2)
0.2539
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from isthmus.errors import InvalidInputError

X = TypeVar("X")


def info_nce(
    scores: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    positives: torch.Tensor | None = None,
    excluded: torch.Tensor | None = None,
    symmetric: bool = False,
) -> torch.Tensor:
    """Sum over queries of ``-log softmax`` at their documents.

    Args:
        scores: Of B queries with N >= B documents, [B, N]; further columns are hard negatives.
        temperature: Scores are divided by it.
        positives: Documents of each query, bool [B, N]; the diagonal when None. Of several, the
            mean is taken.
        excluded: Documents that are no negatives of a query, bool [B, N], such as others with the
            same text; a positive is never excluded.
        symmetric: Add the loss of documents that look for their query, and halve.

    Returns:
        Scalar.

    Raises:
        InvalidInputError: Shapes do not fit, or a query has no document.
    """
    b, n = scores.shape
    if positives is None:
        positives = torch.eye(b, n, dtype=torch.bool, device=scores.device)
    if n < b or positives.shape != scores.shape or not bool(positives.any(1).all()):
        raise InvalidInputError(
            f"every query needs a document of its own among the columns of {list(scores.shape)}"
        )
    scores = _wide(scores) / temperature
    if excluded is not None:
        scores = scores.masked_fill(excluded & ~positives, -torch.inf)
    loss = _softmax_loss(scores, positives)
    if symmetric:
        asked = positives.any(0)  # hard negatives look for nobody
        loss = (loss + _softmax_loss(scores.T[asked], positives.T[asked])) / 2
    return loss


def _wide(scores: torch.Tensor) -> torch.Tensor:
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def _softmax_loss(scores: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
    # what is excluded has no finite logarithm, and is no positive
    logs = F.log_softmax(scores, 1).masked_fill(~positives, 0.0)
    return -(logs.sum(1) / positives.sum(1)).sum()


def same(keys: Sequence[X], others: Sequence[X]) -> torch.Tensor:
    """Which keys are equal, bool [B, N]: for ``excluded``.

    Example:
        >>> same(["a", "b"], ["a", "b", "a"]).int().tolist()
        [[1, 0, 1], [0, 1, 0]]
    """
    numbers = {key: i for i, key in enumerate(dict.fromkeys([*keys, *others]))}
    rows, columns = (torch.tensor([numbers[k] for k in side]) for side in (keys, others))
    return rows[:, None] == columns


def distil(scores: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Sum over queries of the divergence KL(teacher || student) between laws over documents.

    Args:
        scores: The student's, [B, N].
        teacher: The teacher's, [B, N].
        temperature: Both are divided by it.

    Example:
        >>> float(distil(torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 2.0]])))
        0.0
    """
    laws = [F.log_softmax(_wide(s) / temperature, 1) for s in (scores, teacher)]
    return F.kl_div(laws[0], laws[1], reduction="sum", log_target=True)


def margin_mse(scores: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Sum of squared gaps between the margins of student and teacher (MarginMSE).

    Args:
        scores: The student's, [B, N]; column 0 is the positive, the others negatives.
        teacher: The teacher's, [B, N].

    Example:
        >>> float(margin_mse(torch.tensor([[3.0, 1.0]]), torch.tensor([[1.0, 0.0]])))
        1.0
    """
    gaps = [s[:, :1] - s[:, 1:] for s in (scores, teacher)]
    return (gaps[0] - gaps[1]).square().sum()


def embed_in_chunks(encode: Callable[[X], torch.Tensor], chunks: Sequence[X]) -> torch.Tensor:
    """Embed more than fits in memory at once, with exact gradients (GradCache).

    Only vectors are kept; in the backward pass every chunk is embedded again, with the random
    state that it had, so dropout is the same. The loss sees all vectors together, and memory is
    that of one chunk. After Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory
    Limited Setup", 2021 (arXiv 2101.06983); torch's activation checkpoints are that very method.

    Args:
        encode: From a chunk to its vectors [b, D], everything after pooling included.
        chunks: The batch, cut; sizes may differ.

    Returns:
        Vectors [B, D], in order.
    """
    parts = [
        checkpoint(encode, chunk, use_reentrant=False, preserve_rng_state=True) for chunk in chunks
    ]
    return torch.cat(parts)


class _Gather(torch.autograd.Function):
    """Rows of all processes; backward, every process gets the sum of what all think of its rows."""

    @staticmethod
    def forward(ctx: object, rows: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def gather(rows: torch.Tensor) -> torch.Tensor:
    """Rows [B, D] of all processes in the order of their ranks, with gradients; as they are in one.

    Documents are gathered so that those of all processes are negatives; every process scores its
    own queries, whose documents begin at column ``rank * B``.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rows
    found: torch.Tensor = _Gather.apply(rows)  # type: ignore[no-untyped-call]
    return found
