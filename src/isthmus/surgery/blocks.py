"""Layers of a stack taken out: tried first, then for good.

A layer adds to a vector and hands it on. Left out, it hands on what it was given
(:func:`bypassed`); taken out, the model is built again with fewer layers, so that caches, layer
numbers and a first layer's position bias are those of an ordinary model of that size, and
transformers loads it like any other.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.errors import InvalidInputError, UnknownNameError, UnsupportedModelError
from isthmus.lenses import sites as site_maps
from isthmus.models.hub import no_progress_bars
from isthmus.surgery.base import Steps

_COUNTS = {
    "": ("num_hidden_layers",),
    "enc": ("encoder_layers", "num_layers"),
    "dec": ("decoder_layers", "num_decoder_layers"),
}
# settings under which a layer computes otherwise in another place
_BY_PLACE = ("scale_attn_by_inverse_layer_idx", "mlp_only_layers", "share_between_layers")


def evenly(layers: int, keep: int) -> list[int]:
    """Layers spread evenly, the first and the last among them; one layer is the first.

    Raises:
        InvalidInputError: None, or more than there are.

    Example:
        >>> evenly(6, 3), evenly(6, 1)
        ([0, 2, 5], [0])
    """
    if not 1 <= keep <= layers:
        raise InvalidInputError(f"{keep} of {layers} layers cannot be kept; keep 1 to {layers}")
    if keep == 1:
        return [0]
    return [round(i * (layers - 1) / (keep - 1)) for i in range(keep)]


@contextmanager
def bypassed(model: nn.Module, paths: Collection[str]) -> Iterator[None]:
    """Compute as if some layers were not there.

    Args:
        model: A model of transformers.
        paths: Module paths of layers.

    Raises:
        UnknownNameError: The model has no such module.
    """
    modules = dict(model.named_modules())
    with ExitStack() as stack:
        for path in paths:
            if path not in modules:
                raise UnknownNameError("module", path, modules)
            handle = modules[path].register_forward_hook(_hand_on, with_kwargs=True)
            stack.callback(handle.remove)
        yield


def _hand_on(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    given = args[0] if args else kwargs["hidden_states"]
    return (given, *output[1:]) if isinstance(output, tuple) else given


@dataclass(frozen=True)
class Greedy:
    """What a greedy search left out.

    Attributes:
        removed: Candidates in the order they went.
        losses: Loss after each.
        gaps: How much better each was than the next best; small gaps are chance.
    """

    removed: tuple[str, ...]
    losses: tuple[float, ...]
    gaps: tuple[float, ...]


def greedy(
    candidates: Sequence[str],
    loss: Callable[[tuple[str, ...]], float],
    count: int,
    steps: Steps | None = None,
    *,
    allowed: Callable[[tuple[str, ...]], bool] | None = None,
) -> Greedy:
    """Leave out the least harmful candidate, again and again.

    Args:
        candidates: Any names.
        loss: What it costs to leave out some of them.
        count: How many go.
        steps: Keeps every round.
        allowed: Which sets may be left out; any if None.

    Raises:
        InvalidInputError: So many may not be left out.

    Example:
        >>> harm = {"a": 3.0, "b": 1.0, "c": 2.0}
        >>> greedy("abc", lambda names: sum(harm[n] for n in names), 2).removed
        ('b', 'c')
    """
    steps = steps or Steps()
    removed: tuple[str, ...] = ()
    losses, gaps = [], []
    for _ in range(count):
        left = [c for c in candidates if c not in removed]
        left = [c for c in left if allowed is None or allowed((*removed, c))]
        if not left:
            raise InvalidInputError(f"{count} of {len(candidates)} cannot be left out")

        def tried(gone: tuple[str, ...] = removed, left: Sequence[str] = left) -> dict[str, Tensor]:
            values = [loss((*gone, name)) for name in left]
            return {"losses": torch.tensor(values, dtype=torch.float64)}

        values = steps.do("without " + ", ".join(removed), tried)["losses"]
        order = values.argsort(stable=True).tolist()
        best = float(values[order[0]])
        losses.append(best)
        gaps.append(float(values[order[1]]) - best if len(order) > 1 else 0.0)
        removed = (*removed, left[order[0]])
    return Greedy(removed, tuple(losses), tuple(gaps))


@torch.no_grad()
def keep_blocks(model: Any, keep: Mapping[str, Sequence[int]]) -> None:
    """Take all other layers out of a model of transformers, in place.

    Its parts are replaced by those of a model that is built with fewer layers, whose weights are
    the ones kept; the result is compared with the whole model that leaves the others out.

    Args:
        model: In eval mode.
        keep: Numbers of the layers that stay, by stack (``""``, ``"enc"``, ``"dec"``); a stack
            that is not named stays whole.

    Raises:
        InvalidInputError: A stack without layers, or layers that are not there.
        UnknownNameError: No such stack.
        UnsupportedModelError: Layers of this model depend on their number.
    """
    stacks = site_maps.stacks(model)
    kept = {name: list(range(len(layers))) for name, layers in stacks.items()}
    for name, numbers in keep.items():
        if name not in stacks:
            raise UnknownNameError("stack", name or "(single)", list(stacks))
        wanted = sorted(set(numbers))
        if not wanted or not set(wanted) <= set(kept[name]):
            raise InvalidInputError(
                f"layers {list(numbers)} cannot be kept of {len(kept[name])}; keep at least one"
            )
        kept[name] = wanted
    gone = [p for n, layers in stacks.items() for i, p in enumerate(layers) if i not in kept[n]]
    if not gone:
        return
    probe = site_maps.probe_of(model)
    with bypassed(model, gone):
        wanted_logits = model(**probe, use_cache=False).logits
    config = _config(model, stacks, kept)
    state = {}
    for name, value in model.state_dict().items():
        new = _renamed(name, stacks, kept)
        if new is not None:
            state[new] = value
    with torch.random.fork_rng(devices=[]), no_progress_bars():
        fresh = type(model)(config)
    for name in fresh.state_dict().keys() - state.keys():
        if name not in model.state_dict():
            raise UnsupportedModelError(f"{type(model).__name__} has no {name} to keep")
        state[name] = model.state_dict()[name]  # a position bias of the first layer
    fresh.load_state_dict(state)
    fresh.to(device=model.device, dtype=model.dtype).eval()
    fresh.tie_weights()
    logits = fresh(**probe, use_cache=False).logits
    error = float((logits - wanted_logits).abs().max() / wanted_logits.abs().max())
    if error > site_maps.TOLERANCE[logits.dtype]:
        raise UnsupportedModelError(
            f"layers of {type(model).__name__} compute otherwise in another place (off by "
            f"{error:.1e}); its layers cannot be taken out"
        )
    attention = getattr(model.config, "_attn_implementation", None)
    for name, _ in list(model.named_children()):
        model.set_submodule(name, fresh.get_submodule(name))
    model.config = fresh.config
    if attention is not None:
        model.set_attn_implementation(attention)


def _config(model: Any, stacks: Mapping[str, Sequence[str]], kept: Mapping[str, list[int]]) -> Any:
    config = copy.deepcopy(model.config)
    inner = config.get_text_config()
    for name in _BY_PLACE:
        if getattr(inner, name, None):
            raise UnsupportedModelError(
                f"layers of {type(model).__name__} depend on their number ({name})"
            )
    for stack, numbers in kept.items():
        whole = len(stacks[stack])
        if len(numbers) == whole:
            continue
        names = [n for n in _COUNTS[stack] if getattr(inner, n, None) == whole]
        if not names:
            raise UnsupportedModelError(
                f"the config of {type(model).__name__} names no number of layers under "
                f"{', '.join(_COUNTS[stack])}"
            )
        for name, value in list(vars(inner).items()):  # such as layer_types
            if isinstance(value, list) and len(value) == whole and stack in ("", "dec"):
                setattr(inner, name, [value[i] for i in numbers])
        for name in names:
            setattr(inner, name, len(numbers))
        if stack == "enc" and "num_hidden_layers" in vars(inner):
            inner.num_hidden_layers = len(numbers)
    return config


def _renamed(
    name: str, stacks: Mapping[str, Sequence[str]], kept: Mapping[str, list[int]]
) -> str | None:
    """Where a weight goes; None where its layer goes."""
    for stack, layers in stacks.items():
        above = layers[0].rsplit(".", 1)[0]
        found = re.match(re.escape(above) + r"\.(\d+)\.", name)
        if found:
            number = int(found[1])
            if number not in kept[stack]:
                return None
            rest = name[found.end() :]
            return f"{above}.{kept[stack].index(number)}.{rest}"
    return name
