"""States of a vision transformer as classes: ranks of a class, and who brings it.

The rows of a classifier are classes as vectors; what is projected on them are hidden states, what
attention and feed-forwards write, and the values that they write it with (Vilas et al. 2023,
arXiv:2310.18969).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from isthmus.lenses.heads import weight_of
from isthmus.lenses.sites import eager
from isthmus.lenses.trace import Site, Trace
from isthmus.lenses.wiring import Wiring

KEYS, ROWS = 5, 50
"""Keys that count as most active, and pictures of one forward."""


@dataclass(frozen=True)
class Reading:
    """What states say of a class; tokens T are the class token and the patches.

    Attributes:
        logits: Of every class at ``resid.0`` (the embeddings) to ``resid.L`` [L + 1, B, T, C].
        attention: The same of what attention writes [L, B, T, C].
        forward: Of what the feed-forward writes [L, B, T, C].
        keys: Keys of the feed-forward that are most active [L, B, T, 5].
        own: The model's logits [B, C].
        error: Distance of the last class token's from them, as a share of the largest.
        sums: Distance of each block's sum from what it hands on, likewise [L].
    """

    logits: Tensor
    attention: Tensor
    forward: Tensor
    keys: Tensor
    own: Tensor
    error: float
    sums: list[float]


def read_states(
    wiring: Wiring,
    pixels: Tensor,
    norm: nn.Module,
    rows: Tensor,
    bias: Tensor,
    by: Tensor | None = None,
) -> Reading:
    """Project every state of pictures.

    Args:
        wiring: Of the classifier.
        pixels: [B, 3, H, W].
        norm: Its final norm.
        rows: Its rows [C, D].
        bias: Its bias [C].
        by: Other rows to read by; the check is of the classifier's.
    """
    layers = range(len(wiring.layers))
    names = ("resid_pre", "attn_out", "mlp_out", "resid_post")
    wanted = {f"{n}.{i}": wiring.sites[f"{n}.{i}"] for i in layers for n in names}
    wanted |= {f"keys.{i}": Site(e.second, "in") for i, e in enumerate(wiring.layers)}
    with eager(wiring.model), torch.no_grad(), Trace(wiring.model, wanted) as seen:
        own = wiring.model(pixel_values=pixels).logits
    read = rows if by is None else by

    def said(sites: Sequence[str]) -> Tensor:
        with torch.no_grad():
            return torch.stack([norm(seen[n]) @ read.T + bias for n in sites])

    states = ["resid_pre.0", *(f"resid_post.{i}" for i in layers)]
    with torch.no_grad():
        last = norm(seen[states[-1]])[:, 0] @ rows.T + bias
    sums = []
    for i in layers:
        pre, attn, mlp, post = (seen[f"{n}.{i}"] for n in names)
        sums.append(float((pre + attn + mlp - post).abs().max() / post.abs().max()))
    return Reading(
        said(states),
        said([f"attn_out.{i}" for i in layers]),
        said([f"mlp_out.{i}" for i in layers]),
        torch.stack([seen[f"keys.{i}"].topk(KEYS).indices for i in layers]),
        own,
        float((last - own).abs().max() / own.abs().max()),
        sums,
    )


def identifiability(logits: Tensor, target: Tensor) -> Tensor:
    """``1 - r / C`` with r the rank of a class, 0 at the top; ties share their ranks.

    Args:
        logits: [..., B, T, C].
        target: [B].

    Returns:
        [..., B, T], 1 where the class is the likeliest.

    Example:
        >>> identifiability(torch.tensor([[[0.1, 3.0, 2.0, 2.0]]]), torch.tensor([2])).tolist()
        [[0.625]]
    """
    at = target[:, None, None].expand(*logits.shape[:-1], 1)
    mine = logits.gather(-1, at)
    above = (logits > mine).sum(-1)
    ties = (logits == mine).sum(-1) - 1
    return 1 - (above + 0.5 * ties) / logits.shape[-1]


def object_gap(values: Tensor, where: Tensor) -> Tensor:
    """Mean over an object's patches less that over the others, mean of pictures [L + 1].

    Args:
        values: Of the class token and the patches [L + 1, B, T].
        where: Which patches show the object, bool [B, T - 1].
    """
    patches = values[:, :, 1:].double()
    inside = (patches * where).sum(-1) / where.sum(-1).clamp(min=1)
    outside = (patches * ~where).sum(-1) / (~where).sum(-1).clamp(min=1)
    return (inside - outside)[:, where.any(-1)].mean(1)


def gaps_by_chance(values: Tensor, where: Tensor, draws: int, seed: int = 0) -> list[float]:
    """The largest gap of any block, with the object's patches put anywhere at random."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(draws):
        order = torch.rand(where.shape, generator=draw).argsort(1)
        found.append(float(object_gap(values, where.gather(1, order)).max()))
    return found


def rises(logits: Tensor, target: Tensor) -> Tensor:
    """Share of patches whose logit of the class rises in each block [L, B]."""
    at = target[:, None, None].expand(*logits.shape[:-1], 1)
    return (logits.gather(-1, at)[..., 0].diff(dim=0) > 0)[:, :, 1:].float().mean(-1)


def composed(found: Reading) -> list[tuple[float, float, float, float]]:
    """Of each block, patches whose top class is attention's, the feed-forward's, as before, new."""
    top = found.logits.argmax(-1)[:, :, 1:]
    told = []
    for i in range(len(found.attention)):
        now = top[i + 1]
        same = [
            now == other
            for other in (
                found.attention[i].argmax(-1)[:, 1:],
                found.forward[i].argmax(-1)[:, 1:],
                top[i],
            )
        ]
        none = ~(same[0] | same[1] | same[2])
        a, f, before, new = (float(x.float().mean()) for x in (*same, none))
        told.append((a, f, before, new))
    return told


def matched(wiring: Wiring, rows: Tensor, seed: int | None = None) -> Tensor:
    """Largest cosine of each class with a value that a feed-forward writes [L, C]."""
    found = []
    modules = dict(wiring.model.named_modules())
    for i, layer in enumerate(wiring.layers):
        values = weight_of(modules[layer.second])
        assert values is not None
        values = values.detach()  # [inner, D]: one value a row
        if seed is not None:
            draw = torch.Generator().manual_seed(seed + i)
            values = torch.randn(values.shape, generator=draw)
        unit = values / values.norm(dim=1, keepdim=True)
        found.append((rows / rows.norm(dim=1, keepdim=True) @ unit.T).max(1).values)
    return torch.stack(found)


def agreeing(wiring: Wiring, rows: Tensor, keys: Tensor, target: Tensor) -> list[float]:
    """Share of patches whose most active keys meet the values nearest to the class, by block."""
    told = []
    modules = dict(wiring.model.named_modules())
    for i, layer in enumerate(wiring.layers):
        values = weight_of(modules[layer.second])
        assert values is not None
        unit = values.detach() / values.detach().norm(dim=1, keepdim=True)
        near = (rows @ unit.T).topk(KEYS).indices[target]  # [B, 5]
        meets = (keys[i][:, 1:, :, None] == near[:, None, None]).any(-1).any(-1)
        told.append(float(meets.float().mean()))
    return told


def probes(states: Tensor, names: Tensor, classes: int) -> Tensor:
    """Rows of a ridge probe on the class token of every block [L, C, D], after the final norm."""
    rows = []
    wanted = torch.nn.functional.one_hot(names, classes).double() - 1 / classes
    for state in states.double():
        x = state - state.mean(0)
        gram = x.T @ x + 1e-2 * len(x) * torch.eye(x.shape[1], dtype=torch.float64)
        rows.append(torch.linalg.solve(gram, x.T @ wanted).T)
    return torch.stack(rows).float()


def class_tokens(wiring: Wiring, norm: nn.Module, pixels: Tensor) -> Tensor:
    """Class tokens after the final norm, of every block [L, N, D]."""
    wanted = {f"{i}": wiring.sites[f"resid_post.{i}"] for i in range(len(wiring.layers))}
    parts = []
    for part in torch.split(pixels, ROWS):
        with torch.no_grad(), Trace(wiring.model, wanted) as seen:
            wiring.model(pixel_values=part)
            parts.append(torch.stack([norm(seen[n][:, 0]) for n in wanted]))
    return torch.cat(parts, 1)
