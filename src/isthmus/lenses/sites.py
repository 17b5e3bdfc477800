"""Where a transformer keeps what: found by trial, and accepted only where the numbers add up.

Every layer takes a vector a token and adds to it. A map of a stack of layers names these values

::

    resid_pre.i ──(+ attn_out.i)──▶ resid_mid.i ──(+ mlp_out.i)──▶ resid_post.i = resid_pre.i+1
    decoders that read an encoder add cross_out.i between the two; final_norm, then logits

by modules of the model. One probe input is run, and of all that modules compute the terms are
those whose sum is what the layer hands on, to rounding. A layer that adds first and normalises
afterwards (BERT, BART) is walked norm by norm. A model whose layers do not add up in either way is
refused by name: no lens draws what it does not know.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.errors import UnknownNameError, UnsupportedModelError
from isthmus.lenses.trace import Site, Trace

_CROSS = re.compile(r"cross|encoder_attn|encdec|crossattention", re.IGNORECASE)
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_MIXER = re.compile(r"mixer|mamba|ssm|rglru|recurrent|temporal", re.IGNORECASE)
_NORM = re.compile(r"norm|ln_|layernorm", re.IGNORECASE)
_TERMS = 3
"""A layer adds at most this many: attention, cross-attention, feed-forward."""

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
"""How far sums may be from what the model computed, as a share of the largest value."""


@dataclass(frozen=True)
class Stack:
    """One stack of layers.

    Attributes:
        layers: Paths of its layers, in order.
        sites: Sites by canonical name, without the prefix of the stack.
        norm_after: Whether layers normalise after adding, so that ``resid_post.i`` is normalised.
        error: Largest distance of a sum from the model's own value, as a share of it.
    """

    layers: tuple[str, ...]
    sites: Mapping[str, Site]
    norm_after: bool
    error: float

    def __len__(self) -> int:
        return len(self.layers)


@dataclass(frozen=True)
class SiteMap:
    """Stacks of a model, by name: ``""`` for a single one, ``"enc"`` and ``"dec"`` for two.

    Attributes:
        stacks: The stacks.
        logits_error: Distance of ``head(final_norm)`` from the model's logits, as a share of the
            largest; None for models without a head.
    """

    stacks: Mapping[str, Stack]
    logits_error: float | None = field(default=None)

    def __getitem__(self, name: str) -> Site:
        """Site of a canonical name, such as ``attn_out.3`` or ``enc.resid_post.0``.

        Raises:
            UnknownNameError: The model has no such site.
        """
        sites = self.sites()
        if name not in sites:
            raise UnknownNameError("site", name, list(sites))
        return sites[name]

    def sites(self) -> dict[str, Site]:
        """All sites by their full canonical names."""
        return {
            f"{prefix}.{name}" if prefix else name: site
            for prefix, stack in self.stacks.items()
            for name, site in stack.sites.items()
        }

    def residuals(self, prefix: str = "") -> dict[str, Site]:
        """The stack's input and what every layer hands on: ``resid.0`` to ``resid.L``.

        Raises:
            UnknownNameError: The model has no such stack.
        """
        if prefix not in self.stacks:
            raise UnknownNameError("stack", prefix or "(single)", list(self.stacks))
        stack = self.stacks[prefix]
        rows = [stack.sites["resid_pre.0"]]
        rows += [stack.sites[f"resid_post.{i}"] for i in range(len(stack))]
        return {f"resid.{i}": site for i, site in enumerate(rows)}

    @classmethod
    def of(cls, model: nn.Module, probe: Mapping[str, Any]) -> SiteMap:
        """Find and verify the sites of a model.

        Args:
            model: In eval mode.
            probe: Arguments of one small forward, such as ``{"input_ids": ...}``; several tokens
                that differ, because on a single one attention has nothing to mix.

        Raises:
            UnsupportedModelError: No stack of layers, or a layer whose parts do not add up.
        """
        found = {prefix: _stack(model, layers, probe) for prefix, layers in stacks(model).items()}
        return cls(
            {name: _with_norm(model, stack, probe) for name, stack in found.items()},
            _head_error(model, probe),
        )


def probe_of(model: nn.Module, tokens: int = 8) -> dict[str, Tensor]:
    """A small forward for models of transformers that read tokens.

    Raises:
        UnsupportedModelError: The model's config names no vocabulary.
    """
    config: Any = getattr(model, "config", None)
    size = getattr(getattr(config, "get_text_config", lambda: config)(), "vocab_size", None)
    if not size:
        raise UnsupportedModelError(
            f"{type(model).__name__} reads no tokens; give a probe input of your own"
        )
    draw = torch.Generator().manual_seed(0)
    device = next(model.parameters()).device
    ids = torch.randint(3, max(size, 4), (1, tokens), generator=draw).to(device)
    main: str = getattr(model, "main_input_name", "input_ids")
    probe = {"input_ids": ids}
    if main == "input_features":  # Whisper: frames are 2 per position
        frames = 2 * config.max_source_positions
        probe = {main: torch.randn(1, config.num_mel_bins, frames, generator=draw).to(device)}
    if getattr(config, "is_encoder_decoder", False):
        probe["decoder_input_ids"] = ids
    return probe


@contextmanager
def eager(model: nn.Module) -> Iterator[None]:
    """Attention that shows its patterns, for models of transformers; the choice is put back."""
    change: Any = getattr(model, "set_attn_implementation", None)
    before = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if change is None or before is None:
        yield
        return
    try:
        change("eager")
        yield
    finally:
        change(before)


# finding ----------------------------------------------------------------------------------------


def stacks(model: nn.Module) -> dict[str, list[str]]:
    """Paths of the layers of each stack: ``""`` alone, or ``"enc"`` and ``"dec"``.

    Raises:
        UnsupportedModelError: There is no list of like layers, or one runs several times.
    """
    names = {module: name for name, module in model.named_modules()}
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        encoder: Any = model.get_encoder()  # type: ignore[operator]
        decoder: Any = model.get_decoder()  # type: ignore[operator]
        return {"enc": _layers(encoder, names), "dec": _layers(decoder, names)}
    return {"": _layers(model, names)}


def _layers(part: nn.Module, names: Mapping[nn.Module, str]) -> list[str]:
    """The list of like layers that holds most of the weights."""
    lists = [
        m
        for m in part.modules()
        if isinstance(m, (nn.ModuleList, nn.Sequential))
        and len(m)
        and len({type(c) for c in m}) == 1
        and any(isinstance(d, nn.Linear) or "Conv1D" in type(d).__name__ for d in m.modules())
    ]
    if not lists:
        raise UnsupportedModelError(f"{type(part).__name__} has no stack of layers to look into")
    most = max(lists, key=lambda m: (sum(p.numel() for p in m.parameters()), len(m)))
    if len({id(layer) for layer in most}) < len(most):
        raise UnsupportedModelError(f"{type(part).__name__} runs one layer several times")
    return [names[layer] for layer in most]


def _stack(model: nn.Module, layers: Sequence[str], probe: Mapping[str, Any]) -> Stack:
    sites: dict[str, Site] = {}
    after, worst = False, 0.0
    for i, path in enumerate(layers):
        values = _run(model, path, probe)
        pre = values[Site(path, "in")]
        post = values[Site(path)]
        found, norms, error = _terms(path, pre, post, values)
        after, worst = after or norms, max(worst, error)
        sites |= {f"resid_pre.{i}": Site(path, "in"), f"resid_post.{i}": Site(path)}
        sites |= {f"{name}.{i}": site for name, site in found.items()}
    return Stack(tuple(layers), sites, after, worst)


def _run(model: nn.Module, path: str, probe: Mapping[str, Any]) -> dict[Site, Tensor]:
    """All vectors a token that modules of a layer take and give, in the order of computation."""
    inside = [n for n, _ in model.named_modules() if n == path or n.startswith(path + ".")]
    sites = {f"{end} {name}": Site(name, end) for name in inside for end in ("in", "out")}
    seen: dict[Site, Tensor] = {}

    class Watch(Trace):
        def _on(self, name: str, value: Any) -> None:
            if isinstance(value, Tensor) and value.ndim in (2, 3) and value.is_floating_point():
                seen.setdefault(self.sites[name], value.detach().double())

    # Modules that take no tensor as their first argument are left out by their hooks.
    with torch.no_grad(), Watch(model, sites):
        model(**probe)
    if Site(path) not in seen or Site(path, "in") not in seen:
        raise UnsupportedModelError(f"{path} takes or gives no vectors a token")
    shape = seen[Site(path)].shape
    flat = (shape[:-1].numel(), shape[-1])  # some layers (OPT) fold batch and tokens together
    return {s: v.reshape(shape) for s, v in seen.items() if v.shape in (shape, flat)}


def _terms(
    path: str, pre: Tensor, post: Tensor, values: Mapping[Site, Tensor]
) -> tuple[dict[str, Site], bool, float]:
    """The terms that a layer adds, by canonical name, and how well they add up."""
    limit = TOLERANCE[torch.float32] * float(post.abs().max())
    outs = {s: v for s, v in values.items() if s.end == "out" and s.module != path}
    unique: dict[Site, Tensor] = {}
    for site, value in sorted(outs.items(), key=lambda each: each[0].module.count(".")):
        if not any(torch.equal(value, known) for known in unique.values()):
            unique[site] = value
    unique = {s: unique[s] for s in outs if s in unique}  # in the order of computation

    best = float("inf")
    for count in (2, 3, 1):
        for chosen in itertools.combinations(unique, count):
            error = float((pre + sum(unique[s] for s in chosen) - post).abs().max())
            best = min(best, error)
            if error <= limit:
                named = _named(path, chosen)
                mid = pre + unique[chosen[0]]
                for site, value in values.items():
                    if site.end == "in" and float((value - mid).abs().max()) <= limit:
                        named.setdefault("resid_mid", site)
                return named, False, error / float(post.abs().max())

    # Norms after adding: x <- N(x + term), one after the other, the last one gives the output.
    state, terms, worst = pre, [], 0.0
    first: Site | None = None
    for site, value in outs.items():
        before = values.get(Site(site.module, "in"))
        if not _NORM.search(site.module.rsplit(".", 1)[-1]) or before is None:
            continue
        for term, part in unique.items():
            error = float((state + part - before).abs().max())
            if error <= TOLERANCE[torch.float32] * float(before.abs().max()):
                terms.append(term)
                worst = max(worst, error / float(before.abs().max()))
                state = value
                first = first or site
                break
    if terms and float((state - post).abs().max()) <= limit:
        named = _named(path, terms)
        return ({**named, "resid_mid": first} if first else named), True, worst
    raise UnsupportedModelError(
        f"{path}: no sum of what its modules compute is what it hands on "
        f"(nearest {best / float(post.abs().max()):.1e} of the largest value)"
    )


def _named(path: str, terms: Sequence[Site]) -> dict[str, Site]:
    named: dict[str, Site] = {}
    for site in terms:
        inner = site.module[len(path) :]
        if _CROSS.search(inner):
            name = "cross_out"
        elif _ATTENTION.search(inner) and "attn_out" not in named:
            name = "attn_out"
        elif _MIXER.search(inner):
            name = "mixer_out"
        else:
            name = "mlp_out"
        if name in named:
            raise UnsupportedModelError(f"{path} adds two parts that look like {name}")
        named[name] = site
    return named


def _with_norm(model: nn.Module, stack: Stack, probe: Mapping[str, Any]) -> Stack:
    """The stack with its ``final_norm``: the norm that reads what the last layer hands on."""
    last = stack.sites[f"resid_post.{len(stack) - 1}"]
    above = last.module.rsplit(".", 2)[0]  # who owns the list of layers
    inside = {f"{s.module}.{s.end}" for s in stack.sites.values()}
    norms = {
        name: Site(name, "in")
        for name, module in model.named_modules()
        if _NORM.search(name.rsplit(".", 1)[-1])
        and name.startswith(above if "." in last.module else "")
        and not any(name.startswith(f"{layer}.") for layer in stack.layers)
        and f"{name}.in" not in inside
        and next(module.parameters(), torch.empty(0)).ndim == 1
    }
    with torch.no_grad(), Trace(model, {**norms, "": last}) as seen:
        model(**probe)
    for name in norms:
        given = seen.calls[name]
        if len(given) == 1 and given[0].shape == seen[""].shape and given[0].equal(seen[""]):
            return replace(stack, sites={**stack.sites, "final_norm": Site(name)})
    return stack


def _head_error(model: nn.Module, probe: Mapping[str, Any]) -> float | None:
    """How far the logits that the head gives are from the model's."""
    find: Any = getattr(model, "get_output_embeddings", None)
    head: Any = find() if find else None
    if head is None:
        return None
    name = next(n for n, m in model.named_modules() if m is head)
    with torch.no_grad():
        with Trace(model, {"in": Site(name, "in"), "out": Site(name)}) as seen:
            logits = model(**probe).logits
        again, made = head(seen["in"]), seen["out"]
    error = float((again - made).abs().max() / again.abs().max())
    # A softcap or a bias between head and logits keeps their order.
    if error > TOLERANCE[made.dtype] or not made.argmax(-1).equal(logits.argmax(-1)):
        raise UnsupportedModelError(f"{name} does not give the model's logits")
    return error
