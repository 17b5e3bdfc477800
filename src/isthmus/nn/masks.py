"""Attention masks, built once for every system that needs one.

Masks are additive floats (0 where visible, the dtype's minimum where not): a boolean mask is right
under scaled-dot-product attention but silently wrong under the eager kernel, which adds it.
"""

from __future__ import annotations

import torch


def tree_mask(
    ancestors: torch.Tensor,
    node_pos: torch.Tensor,
    *,
    slot_pos: torch.Tensor | None = None,
    slot_live: torch.Tensor | None = None,
    past: int = 0,
    window: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Mask of the N nodes of a token tree over S cached slots and the nodes themselves.

    Args:
        ancestors: bool [R, N, N] with R = 1 or B, reflexive.
        node_pos: Position of each node, int64 [B, N].
        slot_pos: Position of each cached slot [B, S]; needed with ``slot_live`` or ``window``.
        slot_live: Whether each cached slot is committed, bool [B, S]; all of them when None.
        past: S, when neither of the two above is given.
        window: Sliding window: a node sees positions p with ``node_pos - p < window``.
        dtype: Float dtype of the result.

    Returns:
        Additive mask [B or 1, 1, N, S + N]. Every node sees itself, so no row is empty (softmax
        over nothing is NaN).

    Example:
        >>> import torch
        >>> seen = torch.tensor([[[True, False, False], [True, True, False], [True, False, True]]])
        >>> (tree_mask(seen, torch.tensor([[2, 3, 3]]), past=2)[0, 0] == 0).int().tolist()
        [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 0, 1]]
    """
    low = torch.finfo(dtype).min
    tail = ancestors
    if window is not None:
        tail = tail & (node_pos[:, :, None] - node_pos[:, None, :] < window)
    past_seen: torch.Tensor | None = None
    if slot_live is not None:
        past_seen = slot_live[:, None, :].expand(-1, node_pos.shape[1], -1)
    if window is not None and slot_pos is not None:
        near = node_pos[:, :, None] - slot_pos[:, None, :] < window
        past_seen = near if past_seen is None else past_seen & near
    if past_seen is None:
        mask = torch.zeros(*tail.shape[:2], past + tail.shape[-1], dtype=dtype, device=tail.device)
        mask[:, :, past:].masked_fill_(~tail, low)
        return mask[:, None]
    seen = torch.cat([past_seen, tail.expand(len(past_seen), -1, -1)], -1)
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, low)[
        :, None
    ]
