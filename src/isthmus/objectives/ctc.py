"""Connectionist temporal classification: the probability of a text over all its alignments.

After Graves et al., 2006. Token 0 is the blank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from isthmus.errors import InvalidInputError

BLANK = 0


@dataclass(frozen=True)
class CTC:
    """The loss of a batch.

    Attributes:
        nats: -log p of each text, [B]; 0 with gradient 0 where it does not fit.
        fits: Whether the frames of a row are enough for its text, bool [B].
    """

    nats: torch.Tensor
    fits: torch.Tensor


def frames_needed(targets: torch.Tensor, target_lengths: torch.Tensor) -> torch.Tensor:
    """Frames of the shortest alignment of each text: its tokens, and a blank in every repeat.

    Example:
        >>> frames_needed(torch.tensor([[3, 3, 5], [4, 4, 4]]), torch.tensor([3, 1])).tolist()
        [4, 1]
    """
    inside = torch.arange(1, targets.shape[1], device=targets.device) < target_lengths[:, None]
    repeats = (targets[:, 1:] == targets[:, :-1]) & inside
    return target_lengths + repeats.sum(1)


def ctc_loss(
    log_probs: torch.Tensor,
    lengths: torch.Tensor,
    targets: torch.Tensor,
    target_lengths: torch.Tensor,
) -> CTC:
    """Score texts.

    Args:
        log_probs: [B, T, V], normalised.
        lengths: Valid frames [B].
        targets: Tokens from 1 to V - 1, int64 [B, U], anything beyond the lengths.
        target_lengths: [B]; 0 is an empty text.

    Raises:
        InvalidInputError: The blank, or a token beyond the vocabulary, stands in a text.

    Example:
        >>> uniform = torch.full((1, 2, 2), 0.5).log()
        >>> ctc = ctc_loss(uniform, torch.tensor([2]), torch.tensor([[1]]), torch.tensor([1]))
        >>> round(float(ctc.nats.exp()), 4)  # 3 of 4 paths: _1, 1_, 11
        1.3333
    """
    inside = torch.arange(targets.shape[1], device=targets.device) < target_lengths[:, None]
    tokens = targets[inside]
    if len(tokens) and not 1 <= int(tokens.min()) <= int(tokens.max()) < log_probs.shape[2]:
        raise InvalidInputError(
            f"tokens of a text are from 1 to {log_probs.shape[2] - 1} (0 is the blank), got "
            f"{int(tokens.min())} to {int(tokens.max())}"
        )
    fits = frames_needed(targets, target_lengths) <= lengths
    nats = F.ctc_loss(
        log_probs.transpose(0, 1).float(),
        targets.masked_fill(~inside, 1),
        lengths,
        target_lengths,
        blank=BLANK,
        reduction="none",
        zero_infinity=True,
    )
    return CTC(nats, fits)
