"""What each attention head takes from each token: found by trial, accepted where it adds up.

::

    attn_out_t = sum_h sum_s pattern_h[t, s] (W_o^h v_s^h) + bias

The pattern is the four-dimensional output whose rows sum to 1, ``W_o`` the linear map whose output
is ``attn_out``, and the values those outputs of linear maps, whole or a slice of a fused one, whose
mix by the pattern is what ``W_o`` reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.errors import UnsupportedModelError
from isthmus.lenses.sites import TOLERANCE, SiteMap, eager
from isthmus.lenses.trace import Intervene, Site, Trace


@dataclass(frozen=True)
class Heads:
    """Attention of one layer, head by head.

    Attributes:
        pattern: Where the pattern is [B, H, T, S].
        source: Where the values are, alone or beside queries and keys.
        values: Takes them out of it: [B, S, H, d].
        mixed: Where the mixed values are, which ``W_o`` reads [B, T, H * d].
        out: ``W_o`` by head [H, d, D].
        bias: Its bias [D].
    """

    pattern: Site
    source: Site
    values: Callable[[Tensor], Tensor]
    mixed: Site
    out: Tensor
    bias: Tensor

    def parts(self, pattern: Tensor, source: Tensor, rows: slice) -> Tensor:
        """What each head takes from each token to some positions [B, T', S, H, D].

        Args:
            pattern: Value at :attr:`pattern`.
            source: Value at :attr:`source`.
            rows: Positions T' of the queries.
        """
        carried = torch.einsum("bshd,hde->bshe", self.values(source), self.out.to(source))
        return pattern[:, :, rows].permute(0, 2, 3, 1)[..., None] * carried[:, None]

    def without(self, head: int) -> Callable[[Tensor], Tensor]:
        """A change at :attr:`mixed` that takes one head out."""
        width = self.out.shape[1]

        def change(value: Tensor) -> Tensor:
            left = value.clone()
            left[..., head * width : (head + 1) * width] = 0
            return left

        return change


def find_heads(model: nn.Module, sites: SiteMap, probe: Mapping[str, Any]) -> list[Heads]:
    """Heads of every layer of a model with one stack.

    Args:
        model: In eval mode.
        sites: Its sites.
        probe: Arguments of a small forward.

    Raises:
        UnsupportedModelError: A layer without attention, or whose attention does not add up.
    """
    if "" not in sites.stacks:
        raise UnsupportedModelError("heads are told apart in models with one stack of layers")
    found = []
    for i, path in enumerate(sites.stacks[""].layers):
        if f"attn_out.{i}" not in sites.stacks[""].sites:
            raise UnsupportedModelError(f"{path} has no attention whose heads could be told apart")
        found.append(_find(model, path, sites[f"attn_out.{i}"], probe))
    return found


def cost_without(model: nn.Module, heads: Sequence[Heads], ids: Tensor, scored: slice) -> Tensor:
    """What leaving each head out costs, nats a token [L, H].

    Args:
        model: A model of transformers.
        heads: Of its layers.
        ids: Texts [B, T].
        scored: Predictions that count, of the T - 1 there are.
    """

    def nats(changes: Mapping[Site, Callable[[Tensor], Tensor]]) -> float:
        with torch.no_grad(), Intervene(model, changes):
            logits = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
        told = logits.gather(-1, ids[:, 1:, None])[..., 0]
        return -float(told[:, scored].mean())

    whole = nats({})
    rows = [[nats({e.mixed: e.without(h)}) - whole for h in range(len(e.out))] for e in heads]
    return torch.tensor(rows)


def _find(model: nn.Module, path: str, attn_out: Site, probe: Mapping[str, Any]) -> Heads:
    values = _run(model, path, probe)
    wanted = values[attn_out]
    limit = TOLERANCE[torch.float32] * max(float(wanted.abs().max()), 1e-6)
    patterns = [
        (site, v)
        for site, v in values.items()
        if v.ndim == 4 and torch.allclose(v.sum(-1), torch.ones(1, dtype=v.dtype), atol=1e-3)
    ]
    modules = dict(model.named_modules())
    linear = {s: v for s, v in values.items() if weight_of(modules[s.module]) is not None}
    for pattern, p in patterns:
        for site, v in linear.items():
            given = values.get(Site(site.module, "in"))
            if site.end == "in" or given is None or v.shape != wanted.shape:
                continue
            if float((v - wanted).abs().max()) > limit:
                continue
            weight = weight_of(modules[site.module])
            assert weight is not None
            count = p.shape[1]
            if weight.shape[0] % count:
                continue
            for source, raw in linear.items():
                if source.end == "in" or source == site or raw.ndim != 3:
                    continue
                for read in _reads(raw.shape[-1], count, weight.shape[0] // count):
                    mixed = torch.einsum("bhts,bshd->bthd", p, read(raw)).flatten(2)
                    if float((mixed - given).abs().max()) <= TOLERANCE[torch.float32] * max(
                        float(given.abs().max()), 1e-6
                    ):
                        bias = getattr(modules[site.module], "bias", None)
                        return Heads(
                            pattern,
                            source,
                            read,
                            Site(site.module, "in"),
                            weight.detach().reshape(count, -1, weight.shape[1]),
                            torch.zeros(weight.shape[1]) if bias is None else bias.detach(),
                        )
    raise UnsupportedModelError(
        f"{path}: pattern, values and output of its attention do not add up, head by head"
    )


def weight_of(module: nn.Module) -> Tensor | None:
    """Weight of a linear map as [in, out]; None for other modules."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or isinstance(module, nn.Embedding):
        return None
    return weight.T if isinstance(module, nn.Linear) else weight  # Conv1D of GPT-2: [in, out]


def _reads(width: int, heads: int, size: int) -> Iterator[Callable[[Tensor], Tensor]]:
    """Ways in which values may lie in an output of that width."""
    for groups in {heads, *(g for g in range(1, heads) if heads % g == 0)}:
        inner = groups * size
        if inner <= width:  # alone, or after queries and keys

            def last(raw: Tensor, groups: int = groups, inner: int = inner) -> Tensor:
                values = raw[..., -inner:].reshape(*raw.shape[:-1], groups, size)
                return values.repeat_interleave(heads // groups, 2)

            yield last
    if width == 3 * heads * size:  # query, key and value of a head side by side

        def beside(raw: Tensor) -> Tensor:
            return raw.reshape(*raw.shape[:-1], heads, 3, size)[..., 2, :]

        yield beside


def _run(model: nn.Module, path: str, probe: Mapping[str, Any]) -> dict[Site, Tensor]:
    """Every tensor that modules of a layer take and give, with attention that shows patterns."""
    inside = [n for n, _ in model.named_modules() if n == path or n.startswith(path + ".")]
    seen: dict[Site, Tensor] = {}

    class Watch(Trace):
        def _on(self, name: str, value: Any) -> None:
            if isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 2:
                seen.setdefault(self.sites[name], value.detach().double())

    sites = {f"{n}.{e}": Site(n, e) for n in inside for e in ("in", "out")}
    sites |= {f"{n}.1": Site(n, item=1) for n in inside if _gives_pair(n)}
    with eager(model), torch.no_grad(), Watch(model, sites):
        model(**probe)
    return seen


def _gives_pair(name: str) -> bool:
    return "attn" in name.rsplit(".", 1)[-1] or "attention" in name.rsplit(".", 1)[-1]
