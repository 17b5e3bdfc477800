"""Exact mode: plain and speculative decoding compute the same numbers, bit for bit.

A forward of 16 nodes rounds differently from a forward of one, so two nearly equal logits can
swap places: rarely in float32, often in bfloat16. Here every forward has the same shapes: each
block is padded to a fixed number of nodes, so every matrix product has the same size, and
attention, whose length changes, is computed in float64 and rounded once. The price is that plain
decoding pays for the padding too.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from isthmus.decoding.target import HubTarget, SlotSession, cut_features
from isthmus.decoding.tree import TokenTree, Topology
from isthmus.errors import InvalidInputError, UnsupportedModelError
from isthmus.roles import Reach, Scores, Taps

KERNEL = "isthmus_exact"


def attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_bias: torch.Tensor | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention in float64, rounded once at the end; an attention kernel of transformers.

    Args:
        module: The calling layer.
        query: [B, H, N, D].
        key: [B, H_kv, S, D].
        value: [B, H_kv, S, D].
        attention_mask: Additive [B, 1 or H, N, S], or None when the layer is not causal.
        scaling: Factor of the scores; 1 / sqrt(D) when None.
        dropout: Not used; targets are in eval mode.
        position_bias: Added to the scores.
        softcap: Not supported.
        s_aux: Not supported.
        kwargs: Passed by models for other kernels; not used.

    Raises:
        UnsupportedModelError: The layer wants soft-capped scores or attention sinks.
    """
    if softcap is not None or s_aux is not None:
        raise UnsupportedModelError(
            "exact mode does not know soft-capped attention or attention sinks; load without exact"
        )
    groups = query.shape[1] // key.shape[1]
    k = key.double().repeat_interleave(groups, 1)
    v = value.double().repeat_interleave(groups, 1)
    scores = query.double() @ k.transpose(-1, -2)
    scores = scores * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if position_bias is not None:
        scores = scores + position_bias
    if attention_mask is not None:
        scores = scores + attention_mask.double()
    out = torch.softmax(scores, -1) @ v
    return out.to(query.dtype).transpose(1, 2).contiguous(), None


class ExactTarget(HubTarget):
    """A target whose every forward has the same shapes.

    Args:
        model: The model; its attention kernel is set to :func:`attention`.
        block: Nodes of every forward, the root included.
        reach: As for :class:`~isthmus.decoding.target.HubTarget`.

    Raises:
        UnsupportedModelError: The model is not exact on trees, or not supported at all.
        InvalidInputError: ``block`` is below 1.
    """

    def __init__(self, model: Any, *, block: int = 17, reach: Reach | None = None) -> None:
        if block < 1:
            raise InvalidInputError(f"block must be at least 1, got {block}")
        AttentionInterface.register(KERNEL, attention)
        AttentionMaskInterface.register(KERNEL, eager_mask)
        model.set_attn_implementation(KERNEL)
        super().__init__(model, reach=reach)
        if self.reach != "tree":
            raise UnsupportedModelError(
                f"exact mode needs tree masks, and {type(model).__name__} scores "
                f"{'one token' if self.reach == 'step' else 'chains'} at a time only"
            )
        self.block = block
        self.max_nodes = block - 1

    def session(self, batch: int, **inputs: Any) -> ExactSession:
        """Open a session; see :meth:`HubTarget.session`."""
        return ExactSession(self, batch, self.encode(**inputs) if inputs else {})


class ExactSession(SlotSession):
    """A session that pads every scored tree to the target's block."""

    target: ExactTarget

    def score(self, tree: TokenTree, *, taps: Taps | None = None) -> Scores:
        """Run a tree of at most ``block`` nodes, padded to exactly that many.

        Raises:
            InvalidInputError: The tree is larger than the block.
        """
        n, missing = tree.nodes, getattr(self.target, "block", tree.nodes) - tree.nodes
        if missing < 0:
            raise InvalidInputError(f"a tree of {n} nodes does not fit a block of {n + missing}")
        tokens = torch.nn.functional.pad(tree.tokens, (0, missing))
        parent = torch.nn.functional.pad(tree.topology.parent, (0, missing))
        padded = TokenTree(tokens, Topology(parent), self._valid(tree, missing))
        scores = self._run(padded, taps=taps)
        return Scores(scores.logits[:, :n], cut_features(scores.features, slice(0, n)))

    @staticmethod
    def _valid(tree: TokenTree, missing: int) -> torch.Tensor:
        # never None, so that the mask is always built and the kernel always the same
        return torch.nn.functional.pad(tree.alive, (0, missing), value=False)
