"""The transducer loss: the probability of a text over all ways to read frames and write tokens.

After Graves, "Sequence transduction with recurrent neural networks", 2012 (arXiv 1211.3711), and
Yu et al., "FastEmit", 2021 (arXiv 2010.11148). A cell (t, u) of the lattice has read t frames and
written u tokens; the blank reads the next frame, a token writes itself::

    b(t, u) = log p(blank)      e(t, u) = log p(token u + 1)

    alpha(t, u) = P(t, u) + logcumsumexp_t(alpha(t, u - 1) + e(t, u - 1) - P(t, u))
    P(t, u)     = b(0, u) + ... + b(t - 1, u)
    -log p      = -(alpha(T - 1, U) + b(T - 1, U))

All frames and rows are scanned at once, one scan a token, in float64. The gradient is the analytic
one, so that no more than the logits and one tensor of their size are ever held.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch.autograd.function import once_differentiable

from isthmus.errors import InvalidInputError, UnknownNameError
from isthmus.objectives.ctc import BLANK

Reduction = Literal["none", "sum", "mean"]


def rnnt_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    frames: torch.Tensor,
    lengths: torch.Tensor,
    *,
    blank: int = BLANK,
    fastemit: float = 0.0,
    reduction: Reduction = "none",
) -> torch.Tensor:
    """Score texts.

    Args:
        logits: [B, T, U + 1, V], of any scale; what lies beyond a row's frames and tokens does not
            matter and has gradient 0.
        targets: Tokens, int64 [B, U], anything beyond the lengths.
        frames: Valid frames [B], at least 1.
        lengths: Tokens of each text [B]; 0 is an empty text.
        blank: The token that reads a frame.
        fastemit: Lambda of FastEmit: the gradient of writing is larger by this share. The value
            stays that of the plain loss, of which this is then no longer the gradient.
        reduction: ``none``, ``sum`` or ``mean`` over the rows.

    Returns:
        -log p in nats, float32 or float64 as the logits, [B] or a scalar; infinite, with gradient
        0, where the logits give a text no probability at all.

    Raises:
        InvalidInputError: Shapes or lengths do not fit, or a blank stands in a text.
        UnknownNameError: There is no such reduction.

    Example:
        >>> two = torch.tensor([2])  # all alike: log(C(T - 1 + U, U)) below (T + U) log V
        >>> nats = rnnt_loss(torch.zeros(1, 2, 3, 4), torch.tensor([[1, 2]]), two, two)
        >>> round(4 * math.log(4) - math.log(3), 4), round(float(nats), 4)
        (4.4466, 4.4466)
    """
    if reduction not in ("none", "sum", "mean"):
        raise UnknownNameError("reduction", reduction, ("none", "sum", "mean"))
    _check(logits, targets, frames, lengths, blank, fastemit)
    nats: torch.Tensor = _Transducer.apply(
        logits, targets.long(), frames.long(), lengths.long(), blank, fastemit
    )  # type: ignore[no-untyped-call]
    return nats if reduction == "none" else nats.sum() if reduction == "sum" else nats.mean()


def _check(
    logits: torch.Tensor,
    targets: torch.Tensor,
    frames: torch.Tensor,
    lengths: torch.Tensor,
    blank: int,
    fastemit: float,
) -> None:
    if (
        logits.ndim != 4
        or targets.shape != (logits.shape[0], logits.shape[2] - 1)
        or {frames.shape, lengths.shape} != {logits.shape[:1]}
    ):
        raise InvalidInputError(
            "the transducer loss takes logits [B, T, U + 1, V], targets [B, U], frames [B] and "
            f"lengths [B], got {list(logits.shape)}, {list(targets.shape)}, "
            f"{list(frames.shape)} and {list(lengths.shape)}"
        )
    rows, time, width, vocab = logits.shape
    if not rows:
        raise InvalidInputError("the transducer loss needs a row, got an empty batch")
    if not 1 <= int(frames.min()) <= int(frames.max()) <= time:
        raise InvalidInputError(f"frames are from 1 to {time}, got {frames.tolist()}")
    if not 0 <= int(lengths.min()) <= int(lengths.max()) < width:
        raise InvalidInputError(f"lengths are from 0 to {width - 1}, got {lengths.tolist()}")
    if not 0 <= blank < vocab or not 0 <= fastemit < math.inf:
        raise InvalidInputError(
            f"the blank is from 0 to {vocab - 1} and fastemit from 0, got {blank} and {fastemit}"
        )
    inside = torch.arange(width - 1, device=targets.device) < lengths[:, None]
    tokens = targets[inside]
    if len(tokens) and (
        int(tokens.min()) < 0 or int(tokens.max()) >= vocab or bool((tokens == blank).any())
    ):
        raise InvalidInputError(
            f"tokens of a text are from 0 to {vocab - 1} without the blank, {blank}; got "
            f"{sorted(set(tokens.tolist()))[:20]}"
        )


class _Transducer(torch.autograd.Function):
    """-log p [B]; what is saved is the logits, and five tensors of the size of the lattice."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        targets: torch.Tensor,
        frames: torch.Tensor,
        lengths: torch.Tensor,
        blank: int,
        fastemit: float,
    ) -> torch.Tensor:
        time, width = logits.shape[1:3]
        wide = logits if logits.dtype in (torch.float32, torch.float64) else logits.float()
        lse = wide.logsumexp(-1)  # [B, T, U + 1]
        there = torch.arange(time, device=logits.device) < frames[:, None]
        place = torch.arange(width, device=logits.device)
        inside, ends = place < lengths[:, None], place <= lengths[:, None]
        tokens = torch.where(inside, torch.nn.functional.pad(targets, (0, 1)), blank)  # [B, U + 1]
        written = wide.gather(3, tokens[:, None, :, None].expand(-1, time, -1, -1))[..., 0] - lse
        read = wide[..., blank] - lse
        # one frame more than there are, so that reading the last one leads somewhere
        b = _padded(read, there[:, :, None] & ends[:, None], 0.0)
        e = _padded(written, there[:, :, None] & inside[:, None], -math.inf)
        alpha, beta = _forward(b, e), _backward(b, e, lengths)
        log_p = beta[:, 0, 0]
        if logits.requires_grad:
            possible = log_p.isfinite()
            norm = log_p.masked_fill(~possible, 0.0)[:, None, None]
            keep = there[:, :, None] & possible[:, None, None]
            onward = torch.nn.functional.pad(beta[:, :, 1:], (0, 1), value=-math.inf)
            reads = (alpha + b - norm)[:, :-1] + beta[:, 1:]
            writes = (alpha + e + onward - norm)[:, :-1]
            reads, writes = (
                torch.where(keep, log.exp(), 0.0).to(wide.dtype) for log in (reads, writes)
            )
            ctx.save_for_backward(logits, lse, tokens, reads, writes * (1.0 + fastemit))
            ctx.blank = blank
        return -log_p.to(wide.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logits, lse, tokens, reads, writes = ctx.saved_tensors
        scale = grads[0][:, None, None]
        reads, writes = reads * scale, writes * scale
        visits = reads + writes
        # softmax * visits - [blank] * reads - [token] * writes
        grad = (logits.to(lse.dtype) - lse[..., None]).exp_().mul_(visits[..., None])
        # what lies beyond a row may hold anything, even what is no number
        grad.masked_fill_((visits == 0)[..., None], 0.0)
        grad[..., ctx.blank] -= reads
        index = tokens[:, None, :, None].expand(-1, grad.shape[1], -1, -1)
        grad.scatter_add_(3, index, -writes[..., None])
        return grad.to(logits.dtype), None, None, None, None, None


def _padded(log: torch.Tensor, where: torch.Tensor, other: float) -> torch.Tensor:
    """In float64, ``other`` where it does not count and in one more frame, [B, T + 1, U + 1]."""
    log = torch.where(where, log.double(), other)
    return torch.nn.functional.pad(log, (0, 0, 0, 1), value=other)


def _forward(b: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
    """Log p of reaching each cell, alpha [B, T + 1, U + 1]."""
    before = torch.nn.functional.pad(b.cumsum(1), (0, 0, 1, -1))  # P(t, u)
    rows = [before[:, :, 0]]
    for u in range(1, b.shape[2]):
        enter = rows[-1] + e[:, :, u - 1] - before[:, :, u]
        rows.append(before[:, :, u] + enter.logcumsumexp(1))
    return torch.stack(rows, 2)


def _backward(b: torch.Tensor, e: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Log p of the rest from each cell, beta [B, T + 1, U + 1]; the mirrored scan."""
    after = b.flip(1).cumsum(1).flip(1)  # b(t, u) + ... + b(T - 1, u)
    onward = torch.full_like(b[:, :, 0], -math.inf)
    rows = []
    for u in reversed(range(b.shape[2])):
        leave = e[:, :, u] + onward - after[:, :, u]
        rest = after[:, :, u] + leave.flip(1).logcumsumexp(1).flip(1)
        onward = torch.where((lengths == u)[:, None], after[:, :, u], rest)
        rows.append(onward)
    return torch.stack(rows[::-1], 2)
