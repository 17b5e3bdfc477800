"""The sister loop for texts that are not written from left to right: fill in, most certain first.

::

    all places masked ──fill──▶ a token and its probability at every place
           ▲                                  │
           └── the least certain places are masked again, fewer each time ──┘

Mask-predict (Ghazvininejad et al. 2019, 1904.09324): a text of N tokens is written in a fixed
number of passes over the whole of it, instead of N passes over one token each.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from isthmus.errors import InvalidInputError

Fill = Callable[[torch.Tensor], torch.Tensor]
"""Logits [B, T, V] of what stands at every place of texts int64 [B, T], some of them masked."""


@torch.no_grad()
def mask_predict(
    fill: Fill, places: torch.Tensor, steps: int, mask_token: int, pad: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write texts of known lengths in a number of passes.

    Pass t of T masks the ``N (T - t) / T`` places of a text of N that were least certain, all of
    them in the first one, and writes the likeliest token at each (eq. 1 to 3).

    Args:
        fill: The model.
        places: Places that belong to a text, bool [B, T].
        steps: Passes T.
        mask_token: Stands at the places that are masked; it is never written.
        pad: Stands behind a text.

    Returns:
        Tokens int64 [B, T], and the mean log-probability of a text's tokens, each as it was when
        the token was written [B].

    Raises:
        InvalidInputError: No pass.

    Example:
        >>> sure = torch.tensor([[0.0, 9.0, 0.0, 0.0], [0.0, 0.0, 5.0, 0.0]])  # token 3: the mask
        >>> tokens, _ = mask_predict(lambda ids: sure[None], torch.ones(1, 2).bool(), 2, 3)
        >>> tokens.tolist()
        [[1, 2]]
    """
    if steps < 1:
        raise InvalidInputError(f"a text is written in at least 1 pass, got {steps}")
    count = places.sum(1)  # N [B]
    tokens = torch.where(places, mask_token, pad)
    sure = torch.zeros(places.shape, device=places.device)
    open_ = places
    for step in range(steps):
        if step:
            left = count * (steps - step) // steps
            order = sure.masked_fill(~places, torch.inf).argsort(dim=1, stable=True).argsort(1)
            open_ = order < left[:, None]
            tokens = torch.where(open_, mask_token, tokens)
        logits = fill(tokens).float()
        logits[..., mask_token] = -torch.inf
        found, choice = torch.log_softmax(logits, -1).max(-1)
        tokens = torch.where(open_, choice, tokens)
        sure = torch.where(open_, found, sure)
    return tokens, sure.masked_fill(~places, 0.0).sum(1) / count.clamp(min=1)
