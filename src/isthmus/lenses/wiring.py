"""How an encoder is put together, norm by norm: found by trial, accepted where it adds up.

::

    norm after adding:   x ─▶ attention ─(+ x)─▶ norm 1 ─▶ first, act, second ─(+)─▶ norm 2
    norm before:         x ─▶ norm 1 ─▶ attention ─(+ x)─▶ norm 2 ─▶ first, act, second ─(+)─▶
    above the layers:    norms, linear maps and activations, one after the other, to the logits
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.errors import UnsupportedModelError
from isthmus.lenses.decompose import ACTIVATIONS, POOLS, Bend, Decomposition, Share
from isthmus.lenses.heads import Heads, find_heads, weight_of
from isthmus.lenses.sites import TOLERANCE, SiteMap, eager
from isthmus.lenses.trace import Site, Trace


@dataclass(frozen=True)
class Layer:
    """Modules of one layer, by path.

    Attributes:
        norm_after: Whether norms come after adding.
        norms: Of attention, and of the feed-forward.
        heads: Its attention.
        first: First linear map of the feed-forward.
        activation: One of :data:`~isthmus.lenses.decompose.ACTIVATIONS`.
        second: Its second linear map.
    """

    norm_after: bool
    norms: tuple[str, str]
    heads: Heads
    first: str
    activation: str
    second: str


@dataclass(frozen=True)
class Step:
    """A step above the layers.

    Attributes:
        kind: ``norm``, ``linear``, ``act`` or ``pool``.
        what: A path, or the name of an activation or a way to pool.
    """

    kind: str
    what: str


class Wiring:
    """A model of one stack of attention and plain feed-forwards, whose sums can be followed.

    Args:
        model: In eval mode.
        probe: Arguments of a small forward; several tokens that differ.

    Raises:
        UnsupportedModelError: A layer or the way to the logits is put together otherwise; the
            message names it.
    """

    def __init__(self, model: nn.Module, probe: Mapping[str, Any]) -> None:
        self.model = model
        self._modules = dict(model.named_modules())
        self.sites = SiteMap.of(model, probe)
        if "" not in self.sites.stacks:
            raise UnsupportedModelError(
                f"{type(model).__name__} has an encoder and a decoder; give a model of one stack"
            )
        heads = find_heads(model, self.sites, probe)
        stack = self.sites.stacks[""]
        seen = _all(model, probe)
        self.layers = [
            self._layer(i, path, each, stack.norm_after, seen)
            for i, (path, each) in enumerate(zip(stack.layers, heads, strict=True))
        ]
        with eager(model), torch.no_grad():
            logits = model(**probe).logits.double()
        self.steps = self._above(seen, logits)

    # following ------------------------------------------------------------------------------

    def trace(self, inputs: Mapping[str, Any]) -> tuple[Trace, Tensor]:
        """One forward: values at every place that the sums need, and the logits [B, ..., C]."""
        wanted: dict[str, Site] = {}
        for i, layer in enumerate(self.layers):
            wanted |= {f"pre.{i}": self.sites[f"resid_pre.{i}"]}
            wanted |= {f"post.{i}": self.sites[f"resid_post.{i}"]}
            wanted |= {f"norm.{k}.{i}": Site(path, "in") for k, path in enumerate(layer.norms)}
            wanted |= {f"pattern.{i}": layer.heads.pattern}
            wanted |= {f"first.{i}": Site(layer.first)}
        with eager(self.model), torch.no_grad(), Trace(self.model, wanted) as seen:
            logits = self.model(**inputs).logits
        return seen, logits

    def start(self, seen: Trace, layer: int = 0, share: Share = "absdot") -> Decomposition:
        """What a layer reads, every token its own source."""
        return Decomposition.of_tokens(seen[f"pre.{layer}"], share)

    def through(
        self, x: Decomposition, i: int, seen: Trace, bend: Bend = "origin"
    ) -> Decomposition:
        """Carry a decomposition through a layer."""
        layer = self.layers[i]
        one, two = (self._modules[path] for path in layer.norms)
        if layer.norm_after:
            mid = self._attention(x, i, seen, around=x).norm(one, seen[f"norm.0.{i}"])
            added = self._forward(mid, i, seen, bend, around=mid)
            return added.norm(two, seen[f"norm.1.{i}"])
        mid = self._attention(x.norm(one, seen[f"norm.0.{i}"]), i, seen, around=x)
        return self._forward(mid.norm(two, seen[f"norm.1.{i}"]), i, seen, bend, around=mid)

    def above(self, x: Decomposition, observed: Tensor, bend: Bend = "origin") -> Decomposition:
        """Carry what the last layer hands on to the logits [B, T or 1, S, C].

        Args:
            x: Its parts.
            observed: Its value [B, T, D].
            bend: The line of an activation.
        """
        with torch.no_grad():
            for step in self.steps:
                if step.kind == "pool":
                    x, observed = x.take(step.what), POOLS[step.what](observed)
                elif step.kind == "act":
                    x = x.bend(step.what, observed, bend)
                    observed = ACTIVATIONS[step.what](observed)
                else:
                    module = self._modules[step.what]
                    if step.kind == "norm":
                        x = x.norm(module, observed)
                    else:
                        x = x.linear(*self._linear(step.what))
                    observed = module(observed)
        return x

    def _attention(
        self, x: Decomposition, i: int, seen: Trace, around: Decomposition
    ) -> Decomposition:
        heads = self.layers[i].heads
        weight, bias = self._linear(heads.source.module)
        carried = heads.values((x.values @ weight).flatten(1, 2))
        carried = carried.view(*x.values.shape[:3], *carried.shape[2:])  # [B, T, S, H, d]
        out, pattern = heads.out.to(carried), seen[f"pattern.{i}"]
        offset = heads.bias.to(carried)
        if bias is not None:  # of the values: a pattern's rows sum to 1, so it is passed on whole
            offset = offset + torch.einsum("hd,hde->e", heads.values(bias[None, None])[0, 0], out)
        return (x.attend(pattern, carried, out) + around).plus(offset)

    def _forward(
        self, x: Decomposition, i: int, seen: Trace, bend: Bend, around: Decomposition
    ) -> Decomposition:
        layer = self.layers[i]
        inner = x.linear(*self._linear(layer.first))
        inner = inner.bend(layer.activation, seen[f"first.{i}"], bend)
        weight, bias = self._linear(layer.second)
        return (inner.linear(weight) + around).plus(bias)

    def _linear(self, path: str) -> tuple[Tensor, Tensor | None]:
        module = self._modules[path]
        weight, bias = weight_of(module), getattr(module, "bias", None)
        assert weight is not None
        return weight.detach(), None if bias is None else bias.detach()

    # finding --------------------------------------------------------------------------------

    def _layer(
        self, i: int, path: str, heads: Heads, after: bool, seen: Mapping[Site, Tensor]
    ) -> Layer:
        inside = {s: v for s, v in seen.items() if s.module.startswith(f"{path}.")}
        pre, post = seen[self.sites[f"resid_pre.{i}"]], seen[self.sites[f"resid_post.{i}"]]
        attn, mlp = (seen[self.sites[f"{n}.{i}"]] for n in ("attn_out", "mlp_out"))
        if f"resid_mid.{i}" not in self.sites.stacks[""].sites:
            raise UnsupportedModelError(
                f"{path} computes attention and feed-forward side by side; "
                "give a model that computes them one after the other"
            )
        mid = seen[self.sites[f"resid_mid.{i}"]]
        read = inside[Site(heads.source.module, "in")]
        first, activation, second = _feed_forward(path, self._modules, inside, mlp)
        reads = inside[Site(first, "in")]
        between = [(pre + attn, mid), (mid + mlp, post)] if after else [(pre, read), (mid, reads)]
        norms = [_norm(path, self._modules, inside, *pair) for pair in between]
        wanted = (pre, mid) if after else (read, reads)
        if not (_same(read, wanted[0]) and _same(reads, wanted[1])):
            raise UnsupportedModelError(f"{path}: its parts do not read what the layer hands them")
        return Layer(after, (norms[0], norms[1]), heads, first, activation, second)

    def _above(self, seen: Mapping[Site, Tensor], logits: Tensor) -> list[Step]:
        stack = self.sites.stacks[""]
        state = seen[self.sites[f"resid_post.{len(stack) - 1}"]]
        outside = [s for s in seen if not any(s.module.startswith(p) for p in stack.layers)]
        order = [s.module for s in outside if s.end == "out" and _plain(self._modules[s.module])]
        steps: list[Step] = []
        for path in order:
            given, made = seen.get(Site(path, "in")), seen[Site(path)]
            if given is None:
                continue
            way = _nearest(state, _row(given))
            if way is not None:
                linear = weight_of(self._modules[path]) is not None
                steps += [*way, Step("linear" if linear else "norm", path)]
                state = _row(made)
            way = _nearest(state, _row(logits))
            if way is not None:
                return [*steps, *way]
        raise UnsupportedModelError(
            f"{type(self.model).__name__}: no chain of norms, linear maps and activations leads "
            f"from resid_post.{len(stack) - 1} to the logits"
            + (f"; it was lost after {steps[-1].what}" if steps else "")
        )


def _nearest(state: Tensor, wanted: Tensor) -> tuple[Step, ...] | None:
    """The way that leads from a value to another, of those that do the nearest."""
    ways = {way: _along(way, state) for way in _ways(state)}
    near = {way: _far(value, wanted) for way, value in ways.items() if _same(value, wanted)}
    return min(near, key=near.__getitem__, default=None)


def _ways(state: Tensor) -> Iterator[tuple[Step, ...]]:
    pools = ["all"] if state.shape[1] == 1 else list(POOLS)
    for pool in pools:
        for act in ACTIVATIONS:
            way = [] if pool == "all" else [Step("pool", pool)]
            yield (*way, *([] if act == "identity" else [Step("act", act)]))


def _along(way: Sequence[Step], state: Tensor) -> Tensor:
    for step in way:
        state = (POOLS if step.kind == "pool" else ACTIVATIONS)[step.what](state)
    return state


def _row(value: Tensor) -> Tensor:
    """[B, D] as [B, 1, D]."""
    return value[:, None] if value.ndim == 2 else value


def _far(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and _far(a, b) <= TOLERANCE[torch.float32]


def _plain(module: nn.Module) -> bool:
    """A linear map or a norm, without modules inside."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and (weight.ndim == 1 or weight_of(module) is not None)


def _norm(
    path: str,
    modules: Mapping[str, nn.Module],
    inside: Mapping[Site, Tensor],
    given: Tensor,
    made: Tensor,
) -> str:
    for site, value in inside.items():
        before = inside.get(Site(site.module, "in"))
        if site.end == "in" or before is None or not _plain(modules[site.module]):
            continue
        if _same(before, given) and _same(value, made):
            return site.module
    raise UnsupportedModelError(f"{path}: no norm lies between what it adds and what it hands on")


def _feed_forward(
    path: str, modules: Mapping[str, nn.Module], inside: Mapping[Site, Tensor], made: Tensor
) -> tuple[str, str, str]:
    linear = [
        s.module for s in inside if s.end == "out" and weight_of(modules[s.module]) is not None
    ]
    for second in linear:
        given = inside.get(Site(second, "in"))
        if given is None or not _same(inside[Site(second)], made):
            continue
        for first in linear:
            z = inside[Site(first)]
            if first == second or z.shape != given.shape:
                continue
            name = min(ACTIVATIONS, key=lambda each: _far(ACTIVATIONS[each](z), given))
            if _same(ACTIVATIONS[name](z), given):
                return first, name, second
    raise UnsupportedModelError(
        f"{path}: its mlp_out is not two linear maps with one of {', '.join(ACTIVATIONS)} between; "
        "gated feed-forwards have no line through the origin"
    )


def _all(model: nn.Module, probe: Mapping[str, Any]) -> dict[Site, Tensor]:
    """Every vector that modules take and give, in the order of computation."""
    seen: dict[Site, Tensor] = {}

    class Watch(Trace):
        def _on(self, name: str, value: Any) -> None:
            if isinstance(value, Tensor) and value.is_floating_point() and value.ndim in (2, 3):
                seen.setdefault(self.sites[name], value.detach().double())

    sites = {f"{n}.{e}": Site(n, e) for n, _ in model.named_modules() for e in ("in", "out")}
    with eager(model), torch.no_grad(), Watch(model, sites):
        model(**probe)
    return seen
