"""Does a ranking of inputs matter to the model? What is ranked high is taken out, and p is read.

::

    p(x)                     probability of the class that the model names, fixed before
    p(x less the top k)      falls fast when the ranking is right
    p(only the top k)        stays when the ranking is right

An input is B rows of T places, tokens or patches. How a place is taken out is for whoever asks:
an *answer* maps which places are kept, bool [B, K, T], to p [B, K]; :class:`TokenRemoval` is one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from isthmus.errors import InvalidInputError, UnknownNameError
from isthmus.lenses.trace import Site, Trace

Answer = Callable[[Tensor], Tensor]
"""Which places are kept, bool [B, K, T], to the probability of the fixed class [B, K]."""

How = Literal["mask", "delete", "hide"]
"""Put the mask token there, close the gap, or take the token out of attention."""

_AT_ONCE = 1024
"""Texts of one forward."""


class TokenRemoval:
    """The answer of a classifier of token sequences with tokens taken out.

    Args:
        model: Of transformers; takes ``input_ids`` and ``attention_mask``, gives ``logits``.
        ids: int64 [B, T].
        present: Bool [B, T]; False is padding. All by default.
        how: See :data:`How`.
        mask_id: The token that stands for a removed one, with ``"mask"``.

    Raises:
        UnknownNameError: No such way.
        InvalidInputError: ``"mask"`` without a mask token.
    """

    def __init__(
        self,
        model: Any,
        ids: Tensor,
        present: Tensor | None = None,
        *,
        how: How = "mask",
        mask_id: int | None = None,
    ) -> None:
        if how not in get_args(How):
            raise UnknownNameError("way to take tokens out", how, list(get_args(How)))
        if how == "mask" and mask_id is None:
            raise InvalidInputError('the tokenizer has no mask token; use how="delete" or "hide"')
        self.model, self.ids, self.how, self.mask_id = model, ids, how, mask_id
        self.present = torch.ones_like(ids, dtype=torch.bool) if present is None else present
        self.target = self._logits(ids, self.present).argmax(-1)  # [B]

    def __call__(self, kept: Tensor) -> Tensor:
        """Probability of each text's own class [B, K] with some places kept [B, K, T]."""
        b, k, t = kept.shape
        ids = self.ids[:, None].expand(b, k, t)
        there = self.present[:, None].expand(b, k, t)
        if self.how == "mask":
            ids = torch.where(kept | ~there, ids, torch.full_like(ids, self.mask_id or 0))
        elif self.how == "hide":
            there = there & kept
        else:
            order = (~(kept & there)).to(torch.uint8).argsort(dim=-1, stable=True)
            ids, there = ids.gather(-1, order), (kept & there).gather(-1, order)
        logits = self._logits(ids.flatten(0, 1), there.flatten(0, 1)).double()
        chosen = self.target[:, None].expand(b, k).reshape(-1, 1)
        return logits.softmax(-1).gather(-1, chosen).view(b, k)

    def _logits(self, ids: Tensor, there: Tensor) -> Tensor:
        found = []
        with torch.no_grad():
            for rows, mask in zip(*(torch.split(x, _AT_ONCE) for x in (ids, there)), strict=True):
                found.append(self.model(input_ids=rows, attention_mask=mask.long()).logits)
        return torch.cat(found)


def places(scores: Tensor, removable: Tensor, *, seed: int = 0) -> Tensor:
    """Rank of every place, 0 for the highest score; ties are broken by a seeded shuffle.

    Args:
        scores: [B, T].
        removable: Bool [B, T]; other places (class tokens, padding) rank behind all.
        seed: Of the shuffle.

    Raises:
        InvalidInputError: Shapes differ, or a score is not a number.

    Example:
        >>> places(torch.tensor([[0.1, 0.9, 0.5]]), torch.tensor([[True, True, False]])).tolist()
        [[1, 0, 2]]
    """
    if scores.shape != removable.shape:
        raise InvalidInputError(
            f"{list(scores.shape)} scores do not fit {list(removable.shape)} places"
        )
    if scores.isnan().any():
        raise InvalidInputError("a score is not a number; nothing can be ranked by it")
    shuffle = torch.randperm(scores.shape[1], generator=torch.Generator().manual_seed(seed))
    low = torch.finfo(torch.float64).min
    keys = scores.double().masked_fill(~removable, low)[:, shuffle]
    order = shuffle[keys.argsort(dim=1, descending=True, stable=True)]  # [B, T], best first
    return order.argsort(1)


def aopc(answer: Answer, scores: Tensor, removable: Tensor, most: int = 10) -> Tensor:
    """Area over the curve of p as places are taken out, most important first [B].

    ``1 / (K + 1) sum_{k=0..K} p(x) - p(x less the top k)``; higher is better.

    Args:
        answer: See :data:`Answer`.
        scores: [B, T].
        removable: Bool [B, T].
        most: K.
    """
    rank = places(scores, removable)
    counts = torch.arange(most + 1).expand(len(scores), -1)
    p = answer(_without(rank, removable, counts))
    return (p[:, :1] - p).mean(1)


def comprehensiveness(
    answer: Answer, scores: Tensor, removable: Tensor, share: float = 0.2
) -> Tensor:
    """How far p falls without the top share of places [B]; higher is better."""
    p = answer(_without(places(scores, removable), removable, _counts(removable, (0.0, share))))
    return p[:, 0] - p[:, 1]


def sufficiency(answer: Answer, scores: Tensor, removable: Tensor, share: float = 0.2) -> Tensor:
    """How far p falls with only the top share of places [B]; lower is better."""
    rank, counts = places(scores, removable), _counts(removable, (share,))
    only = (rank[:, None] < counts[..., None]) | ~removable[:, None]
    whole = torch.ones_like(only)
    p = answer(torch.cat([whole, only], 1))
    return p[:, 0] - p[:, 1]


def perturbation_auc(
    answer: Answer,
    scores: Tensor,
    removable: Tensor,
    order: Literal["positive", "negative"] = "positive",
    steps: int = 10,
) -> Tensor:
    """Area under p as shares of the places are taken out, by the trapezoid rule [B].

    Args:
        answer: See :data:`Answer`.
        scores: [B, T].
        removable: Bool [B, T].
        order: ``"positive"``: most important first, low is good; ``"negative"``: least first,
            high is good.
        steps: Shares besides 0.
    """
    signed = scores if order == "positive" else -scores
    shares = [i / steps for i in range(steps + 1)]
    rank = places(signed, removable)
    p = answer(_without(rank, removable, _counts(removable, shares)))
    return torch.trapezoid(p, dx=1 / steps)


def greedy(answer: Answer, removable: Tensor, most: int = 10) -> Tensor:
    """Scores of an oracle that takes out, each time, the place whose loss costs most [B, T].

    It asks the model about every place at every step: a ceiling for short inputs.
    """
    b, t = removable.shape
    kept, scores = torch.ones(b, t, dtype=torch.bool), torch.zeros(b, t, dtype=torch.float64)
    one = torch.eye(t, dtype=torch.bool)
    for step in range(min(most, int(removable.sum(1).min()))):
        p = answer(kept[:, None] & ~one)  # [B, T]: each place taken out besides
        best = p.masked_fill(~(kept & removable), math.inf).argmin(1, keepdim=True)
        scores.scatter_(1, best, float(most - step))
        kept.scatter_(1, best, False)
    return scores


def interval(values: Tensor, *, draws: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """Mean over examples and its 95 % bootstrap interval; of differences it is a paired one.

    Example:
        >>> interval(torch.full((5,), 2.0))
        (2.0, 2.0, 2.0)
    """
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(values), (draws, len(values)), generator=draw)
    means = values.double()[rows].mean(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float(values.double().mean()), low, high


# what to stand beside -----------------------------------------------------------------------------


def random_scores(like: Tensor, seed: int) -> Tensor:
    """Scores that know nothing."""
    return torch.rand(like.shape, generator=torch.Generator().manual_seed(seed))


def gradient_times_input(
    model: nn.Module, site: Site, inputs: Mapping[str, Any], target: Tensor
) -> Tensor:
    """Gradient of a class's logit by a value, times the value, summed over channels [B, T].

    Args:
        model: In eval mode; gives ``logits`` [B, C].
        site: The value [B, T, D], such as the embeddings.
        inputs: Arguments of the forward.
        target: Classes [B].
    """
    with torch.enable_grad(), Trace(model, {"x": site}, grad=True) as seen:
        logits = model(**inputs).logits
        x = seen["x"]
        (slope,) = torch.autograd.grad(logits.gather(1, target[:, None]).sum(), x)
    return (slope * x).sum(-1).detach()


def rollout(patterns: Sequence[Tensor]) -> Tensor:
    """Attention joined over layers, half of each being what goes around it [B, T, T].

    Source: S. Abnar, W. Zuidema, "Quantifying Attention Flow in Transformers", 2020.

    Args:
        patterns: Of each layer [B, H, T, T], first to last.
    """
    joined = torch.eye(patterns[0].shape[-1]).to(patterns[0])
    for pattern in patterns:
        mean = pattern.mean(1)
        joined = (0.5 * mean + 0.5 * torch.eye(mean.shape[-1]).to(mean)) @ joined
    return joined


def _counts(removable: Tensor, shares: Sequence[float]) -> Tensor:
    """Places that shares of each row are, rounded up [B, K]."""
    whole = removable.sum(1, keepdim=True).double()
    return (whole * torch.tensor(shares, dtype=torch.float64) - 1e-9).ceil().long()


def _without(rank: Tensor, removable: Tensor, counts: Tensor) -> Tensor:
    """Kept [B, K, T] where the first so many [B, K] are taken out."""
    return (rank[:, None] >= counts[..., None]) | ~removable[:, None]
