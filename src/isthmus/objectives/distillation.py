"""Losses that teach a drafter to speak like its target."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of values [B, T] where mask [B, T] is set; 0 where it is set nowhere."""
    weight = mask.to(values.dtype)
    return (values * weight).sum() / weight.sum().clamp(min=1.0)


def soft_cross_entropy(
    target_logits: torch.Tensor, logits: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Cross-entropy to the target's distribution: ``-sum_v p_v log q_v``, mean over the mask.

    Args:
        target_logits: What p is the softmax of, [B, T, V]; no gradient flows into it.
        logits: What q is the softmax of, [B, T, V].
        mask: Positions that count, bool [B, T].

    Returns:
        Scalar in nats.

    Example:
        >>> p = torch.tensor([[[0.0, 0.0]]])
        >>> round(soft_cross_entropy(p, p, torch.ones(1, 1, dtype=torch.bool)).item(), 4)
        0.6931
    """
    p = torch.softmax(target_logits.detach(), -1)
    return masked_mean(-(p * torch.log_softmax(logits, -1)).sum(-1), mask)


def hard_cross_entropy(
    labels: torch.Tensor, logits: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Cross-entropy to tokens [B, T] of logits [B, T, V], mean over the mask."""
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return masked_mean(loss.view(labels.shape), mask)


def smooth_l1(target: torch.Tensor, output: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Smooth L1 distance (beta 1) of features [B, T, D], mean over the width and the mask."""
    loss = F.smooth_l1_loss(output, target.detach(), reduction="none").mean(-1)
    return masked_mean(loss, mask)


def shifted(x: torch.Tensor, k: int) -> torch.Tensor:
    """What stands k places later: ``out[:, i] = x[:, i + k]``, zeros beyond the end.

    Args:
        x: [B, T, ...].
        k: Places, 0 or more.

    Example:
        >>> shifted(torch.tensor([[1, 2, 3]]), 1).tolist()
        [[2, 3, 0]]
    """
    if k == 0:
        return x
    return torch.cat([x[:, k:], torch.zeros_like(x[:, :k])], 1)


def feature_noise(
    features: torch.Tensor, generator: torch.Generator, scale: float = 0.2
) -> torch.Tensor:
    """Uniform noise on features [B, T, D], as EAGLE adds it (2401.15077, sec. 4.2).

    Each element gets ``(u - 0.5) * scale * 512 / T`` with u in [0, 1); T below 512 counts as 512,
    since the noise would drown short texts.
    """
    u = torch.rand(features.shape, generator=generator, device=features.device)
    noise = (u - 0.5) * (scale * 512 / max(512, features.shape[1]))
    return features + noise.to(features.dtype)
