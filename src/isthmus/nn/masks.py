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


def additive(seen: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Additive mask [B, 1, N, S] of who sees whom, bool [B, N, S] or [N, S]."""
    seen = seen if seen.ndim == 3 else seen[None]
    low = torch.finfo(dtype).min
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill_(~seen, low)[:, None]


def rollout_mask(
    anchor: torch.Tensor,
    depth: torch.Tensor,
    key_anchor: torch.Tensor | None = None,
    key_depth: torch.Tensor | None = None,
) -> torch.Tensor:
    """Who sees whom when drafts from every place of a text are trained at once.

    Row (i, 0) is the real token at place i, row (i, k) the k-th draft step of a draft that starts
    there and stands at place i + k. A row sees the real rows up to its own anchor, and the steps of
    its own draft up to itself: just what it sees while drafting.

    Args:
        anchor: Anchor i of each query row, int64 [N].
        depth: Step k of each query row, int64 [N].
        key_anchor: Those of the key rows [M]; the query rows themselves when None.
        key_depth: Likewise.

    Returns:
        bool [N, M]; every row sees itself.

    Example:
        >>> anchor, depth = torch.tensor([0, 1, 0, 1]), torch.tensor([0, 0, 1, 1])
        >>> rollout_mask(anchor, depth).int().tolist()
        [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]]
    """
    key_anchor = anchor if key_anchor is None else key_anchor
    key_depth = depth if key_depth is None else key_depth
    real = (key_depth == 0) & (key_anchor <= anchor[:, None])
    own = (key_anchor == anchor[:, None]) & (key_depth <= depth[:, None])
    return real | own


def relaxed_mask(length: int, block: int, *, device: torch.device | None = None) -> torch.Tensor:
    """Causal between blocks, everything within a block (Falcon, 2412.12639, sec. 3.2).

    Args:
        length: Rows L.
        block: Rows k of a block; 1 is the causal mask.
        device: Where it is made.

    Returns:
        bool [L, L].

    Example:
        >>> relaxed_mask(4, 2).int().tolist()
        [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    """
    place = torch.arange(length, device=device) // block
    return place <= place[:, None]
