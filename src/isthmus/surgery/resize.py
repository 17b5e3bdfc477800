r"""Linear maps between decoders of different width and depth.

With a width factor k, ``F = [I|...|I] / k`` (small, large) averages k channels and
``T = [I|...|I]^T`` (large, small) repeats one, so that ``F T = I``. A weight W (out, in) becomes ::

    coalesce:     F_out W T_in     outputs are averaged, inputs that have become one are summed
    de-coalesce:  T_out W F_in     outputs are repeated, each copy of an input is read at 1/k

and ``coalesce(de-coalesce(W)) = W``. In depth, k blocks become their average and one block becomes
k copies.

What keeps the outputs (Llama-type decoders: RMSNorm, gated MLP, grouped queries, rotary positions):

* **de-coalescing in width**, up to rounding, and without any rounding of the weights where the
  factors are powers of two. Repeated channels have the mean square of the originals, heads are
  repeated whole with their dimension, so norms and rotary positions see what they saw before. An
  output head of its own reads each copy at 1/k; a head that is tied to the embeddings cannot, so
  there the last norm carries the 1/k.
* **inserting blocks whose two output projections are zero** (:func:`insert_blocks`), exactly.
* **not** de-coalescing in depth: a block that runs k times is another function.

Source: L. Zou, H. Zhang and Y. Deng, "A Multi-Level Framework for Accelerating Training Transformer
Models", 2024, arXiv:2404.07999. There the embeddings are halved in growing; here the last norm is
changed instead, because in a pre-norm model the halves would not weigh against the blocks as the
whole did.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any, Literal

import torch

from isthmus.errors import InvalidInputError, MismatchError, UnsupportedModelError
from isthmus.models.hub import no_progress_bars

Pairing = Literal["far", "near"]
"""Which of n units become one of n/k: j, j + n/k, ... (``"far"``) or k neighbours (``"near"``)."""

# Which axis a module's outputs lie on, and which one its inputs come from.
_WRITES = {
    "embed_tokens": "hidden",
    "q_proj": "heads",
    "k_proj": "heads",
    "v_proj": "heads",
    "o_proj": "hidden",
    "gate_proj": "intermediate",
    "up_proj": "intermediate",
    "down_proj": "hidden",
    "input_layernorm": "hidden",
    "post_attention_layernorm": "hidden",
    "norm": "hidden",
}
_READS = {
    "q_proj": "hidden",
    "k_proj": "hidden",
    "v_proj": "hidden",
    "o_proj": "heads",
    "gate_proj": "hidden",
    "up_proj": "hidden",
    "down_proj": "intermediate",
    "lm_head": "hidden",
}
_PER_HEAD = {"q_norm", "k_norm"}
_OUTPUTS = ("o_proj", "down_proj")
_BLOCK = re.compile(r"(.*\blayers\.)(\d+)(\..*)")
_PROBE_TOKENS = 8


def repeat(x: torch.Tensor, factor: int, dim: int, unit: int, pairing: Pairing) -> torch.Tensor:
    """T along one axis: every unit of ``unit`` channels, ``factor`` times.

    Example:
        >>> repeat(torch.tensor([1, 2]), 2, 0, 1, "far").tolist()
        [1, 2, 1, 2]
        >>> repeat(torch.tensor([1, 2]), 2, 0, 1, "near").tolist()
        [1, 1, 2, 2]
    """
    before, (size, *after) = x.shape[:dim], x.shape[dim:]
    groups = (1, size // unit) if pairing == "far" else (size // unit, 1)
    copies = (factor, 1) if pairing == "far" else (1, factor)
    units = x.reshape(*before, *groups, unit, *after)
    copied = units.repeat(*[1] * dim, *copies, 1, *[1] * len(after))
    return copied.reshape(*before, size * factor, *after)


def gather(x: torch.Tensor, factor: int, dim: int, unit: int, pairing: Pairing) -> torch.Tensor:
    """The transpose of T along one axis: the sum of the ``factor`` units that become one.

    Example:
        >>> gather(torch.tensor([1, 2, 3, 4]), 2, 0, 1, "far").tolist()
        [4, 6]
        >>> gather(torch.tensor([1, 2, 3, 4]), 2, 0, 1, "near").tolist()
        [3, 7]
    """
    before, (size, *after) = x.shape[:dim], x.shape[dim:]
    fewer = size // (unit * factor)
    groups = (factor, fewer) if pairing == "far" else (fewer, factor)
    units = x.reshape(*before, *groups, unit, *after)
    summed = units.sum(dim if pairing == "far" else dim + 1)
    return summed.reshape(*before, size // factor, *after)


def coalesce_width(
    model: Any,
    factor: int = 2,
    *,
    intermediate_factor: int | None = None,
    pairing: Pairing = "far",
) -> Any:
    """Shrink a decoder in width: F_out W T_in of every weight.

    Args:
        model: A Llama-type decoder of transformers; stays as it is.
        factor: By what hidden size, heads and key-value heads are divided.
        intermediate_factor: By what the intermediate size is divided; ``factor`` when None.
        pairing: Which channels, and which whole heads, become one.

    Returns:
        A new model of the same class and dtype.

    Raises:
        InvalidInputError: A factor below 1, or a size that it does not divide.
        UnsupportedModelError: The model has a weight whose axes are not known.
    """
    return _rewidthed(model, factor, intermediate_factor, pairing, grow=False)


@torch.no_grad()
def decoalesce_width(
    model: Any,
    factor: int = 2,
    *,
    intermediate_factor: int | None = None,
    pairing: Pairing = "far",
) -> Any:
    """Grow a decoder in width: T_out W F_in of every weight; the outputs stay.

    Args:
        model: A Llama-type decoder of transformers; stays as it is.
        factor: Multiplies hidden size, heads and key-value heads; the head dimension stays.
        intermediate_factor: Multiplies the intermediate size; ``factor`` when None.
        pairing: Where the copies of a channel, and of a whole head, lie.

    Returns:
        A new model of the same class and dtype.

    Raises:
        InvalidInputError: A factor below 1.
        UnsupportedModelError: The model has a weight whose axes are not known, or a probe shows
            that its outputs would change.
    """
    grown = _rewidthed(model, factor, intermediate_factor, pairing, grow=True)
    _check_kept(model, grown)
    return grown


def coalesce_depth(model: Any, factor: int = 2, *, pairing: Pairing = "near") -> Any:
    """Shrink a decoder in depth: every parameter becomes the average over ``factor`` blocks.

    Args:
        model: A decoder of transformers; stays as it is.
        factor: By what the number of blocks is divided.
        pairing: Which blocks become one.

    Returns:
        A new model of the same class and dtype.

    Raises:
        InvalidInputError: A factor below 1, or one that does not divide the number of blocks.
        UnsupportedModelError: The model has no numbered blocks, or unlike ones would become one.
    """
    layers = int(model.config.num_hidden_layers)
    _check_factor(factor, "the number of blocks", layers)
    fewer = layers // factor
    groups = [
        [j + fewer * i if pairing == "far" else j * factor + i for i in range(factor)]
        for j in range(fewer)
    ]
    return _relayered(model, groups)


def decoalesce_depth(model: Any, factor: int = 2, *, pairing: Pairing = "near") -> Any:
    """Grow a decoder in depth by copies of its blocks; the outputs change.

    Args:
        model: A decoder of transformers; stays as it is.
        factor: Multiplies the number of blocks.
        pairing: Where the copies of a block stand.

    Returns:
        A new model of the same class and dtype.

    Raises:
        InvalidInputError: A factor below 1.
        UnsupportedModelError: The model has no numbered blocks.
    """
    _check_factor(factor)
    layers = int(model.config.num_hidden_layers)
    more = range(layers * factor)
    return _relayered(model, [[j % layers if pairing == "far" else j // factor] for j in more])


@torch.no_grad()
def insert_blocks(model: Any, num_hidden_layers: int) -> Any:
    """Grow a decoder in depth without changing its outputs at all.

    The inserted blocks are spread evenly. Each is a copy of the block before it whose two output
    projections are zero: it costs what a block costs and adds nothing to the residual stream, and
    once trained it begins at the old function.

    Args:
        model: A Llama-type decoder of transformers; stays as it is.
        num_hidden_layers: Blocks of the new model.

    Returns:
        A new model of the same class and dtype.

    Raises:
        InvalidInputError: Fewer blocks than there are.
        UnsupportedModelError: The blocks do not end in the projections that are known, or a probe
            shows that the outputs would change.
    """
    layers = int(model.config.num_hidden_layers)
    if num_hidden_layers < layers:
        raise InvalidInputError(
            f"the model has {layers} blocks and cannot grow to {num_hidden_layers}; "
            "coalesce_depth makes it shallower"
        )
    sources = [j * layers // num_hidden_layers for j in range(num_hidden_layers)]
    inserted = {j for j in range(1, num_hidden_layers) if sources[j] == sources[j - 1]}
    grown = _relayered(model, [[source] for source in sources])
    for name, weight in grown.named_parameters():
        block = _BLOCK.fullmatch(name)
        if block and int(block[2]) in inserted and _module(name) in _OUTPUTS:
            weight.zero_()
    _check_kept(model, grown)
    return grown


@torch.no_grad()
def interpolate(model: Any, grown: Any, share: float) -> Any:
    """``(1 - share) * model + share * grown``, parameter by parameter.

    It gives the copies that growing made different values, so that training can tell them apart.

    Args:
        model: A model; stays as it is.
        grown: A model of the same shape.
        share: Weight of ``grown``, 0 to 1.

    Returns:
        A new model of the same class and dtype.

    Raises:
        InvalidInputError: A share outside 0 to 1.
        MismatchError: The two differ in shape.
    """
    if not 0.0 <= share <= 1.0:
        raise InvalidInputError(f"share is {share}; it must lie between 0 and 1")
    ours, theirs = dict(model.named_parameters()), dict(grown.named_parameters())
    if {n: p.shape for n, p in ours.items()} != {n: p.shape for n, p in theirs.items()}:
        raise MismatchError("the two models differ in shape; resize one of them first")
    return _built(
        model, model.config, {n: torch.lerp(p, theirs[n], share) for n, p in ours.items()}
    )


@torch.no_grad()
def _rewidthed(
    model: Any, factor: int, intermediate_factor: int | None, pairing: Pairing, *, grow: bool
) -> Any:
    config = copy.deepcopy(model.config)
    factors = {
        "hidden": factor,
        "heads": factor,
        "intermediate": factor if intermediate_factor is None else intermediate_factor,
    }
    fields = {
        "hidden_size": "hidden",
        "num_attention_heads": "heads",
        "num_key_value_heads": "heads",
        "intermediate_size": "intermediate",
    }
    missing = [field for field in fields if not getattr(config, field, 0)]
    if missing:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no {missing[0]}; resizing knows Llama-type decoders"
        )
    config.head_dim = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    units = {"hidden": 1, "heads": config.head_dim, "intermediate": 1}
    for field, axis in fields.items():
        size = int(getattr(config, field))
        _check_factor(factors[axis], field, 0 if grow else size)
        setattr(config, field, size * factors[axis] if grow else size // factors[axis])

    def written(x: torch.Tensor, axis: str, dim: int) -> torch.Tensor:
        if grow:
            return repeat(x, factors[axis], dim, units[axis], pairing)
        return gather(x, factors[axis], dim, units[axis], pairing) / factors[axis]

    def read(x: torch.Tensor, axis: str) -> torch.Tensor:
        if grow:
            return repeat(x / factors[axis], factors[axis], 1, units[axis], pairing)
        return gather(x, factors[axis], 1, units[axis], pairing)

    state = {}
    for name, weight in model.named_parameters():
        module = _module(name)
        last_norm = module == "norm" and not _BLOCK.fullmatch(name)
        if not (
            module in _WRITES
            or module in _READS
            or (module in _PER_HEAD and weight.numel() == config.head_dim)
        ):
            raise UnsupportedModelError(
                f"{type(model).__name__} has the weight {name!r}, whose axes are not known; "
                "resizing knows Llama-type decoders"
            )
        x = weight.detach().clone()
        if module in _WRITES:
            x = written(x, _WRITES[module], 1 if module == "embed_tokens" else 0)
        if module in _READS and x.ndim == 2:
            x = read(x, _READS[module])
        if last_norm and config.tie_word_embeddings:
            x = x / factor if grow else x * factor
        state[name] = x
    return _built(model, config, state)


@torch.no_grad()
def _relayered(model: Any, groups: Sequence[Sequence[int]]) -> Any:
    """A model whose block j is the average of the blocks ``groups[j]``."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(groups)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        if any(len({kinds[i] for i in group}) > 1 for group in groups):
            raise UnsupportedModelError(
                f"{type(model).__name__} has blocks of several kinds, and unlike ones would "
                "become one; choose another factor or pairing"
            )
        config.layer_types = [kinds[group[0]] for group in groups]
    given = dict(model.named_parameters())
    state = {n: p.detach().clone() for n, p in given.items() if not _BLOCK.fullmatch(n)}
    firsts = [b for b in map(_BLOCK.fullmatch, given) if b and b[2] == "0"]
    if not firsts:
        raise UnsupportedModelError(f"{type(model).__name__} has no blocks named 'layers.0'")
    for j, group in enumerate(groups):
        for block in firsts:
            members = [given[f"{block[1]}{i}{block[3]}"].detach() for i in group]
            state[f"{block[1]}{j}{block[3]}"] = torch.stack(members).mean(0)
    return _built(model, config, state)


def _built(model: Any, config: Any, state: dict[str, torch.Tensor]) -> Any:
    """A model of the same class with these weights, without drawing random ones first."""
    with no_progress_bars():
        built = type(model).from_pretrained(
            None, config=config, state_dict=state, dtype=model.dtype
        )
    built.config.name_or_path = model.config.name_or_path
    built.generation_config = copy.deepcopy(model.generation_config)
    return built.to(model.device).train(model.training)


@torch.no_grad()
def _check_kept(model: Any, grown: Any) -> None:
    """Compare the outputs of two models on a probe.

    Raises:
        UnsupportedModelError: They differ by more than rounding.
    """
    vocabulary = int(model.config.vocab_size)
    ids = torch.arange(1, 1 + _PROBE_TOKENS, device=model.device)[None] * 7919 % vocabulary
    before, after = (m(input_ids=ids).logits.double() for m in (model, grown))
    error = float((before - after).abs().max() / before.abs().max())
    if not error <= 64 * torch.finfo(model.dtype).eps ** 0.75:
        raise UnsupportedModelError(
            f"growing {type(model).__name__} would change its outputs (by {error:.1e} of the "
            "largest logit); resizing knows Llama-type decoders"
        )


def _check_factor(factor: int, what: str = "", size: int = 0) -> None:
    if factor < 1:
        raise InvalidInputError(f"a factor is {factor}; it must be at least 1")
    if size % factor:
        raise InvalidInputError(
            f"{what} is {size}, which {factor} does not divide; choose a factor that does"
        )


def _module(parameter: str) -> str:
    """The last module of a parameter's name."""
    return parameter.split(".")[-2]
