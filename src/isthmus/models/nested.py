"""Nested decoders: every prefix of the layers is a model of its own, with one norm and one head.

::

    embed ──layer 1──┬──layer 2──┬──layers 3, 4──┐
                     norm, head  norm, head      norm, head       exits 1, 2, 4
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from isthmus.errors import InvalidInputError

RECORD = "isthmus_exits"
"""Where the config of a nested model says after which layers it may answer."""


def set_exits(model: Any, exits: Sequence[int]) -> tuple[int, ...]:
    """Write down in a model's config after which layers it was taught to answer.

    Raises:
        InvalidInputError: The exits do not rise, or the last one is not the last layer.

    Returns:
        The exits.
    """
    found = check_exits(exits, model.config.num_hidden_layers)
    setattr(model.config, RECORD, list(found))
    return found


def exits_of(config: Any) -> tuple[int, ...]:
    """The exits that a config tells of; only the last layer where it tells of none."""
    count = int(config.num_hidden_layers)
    return check_exits(getattr(config, RECORD, None) or (count,), count)


def check_exits(exits: Sequence[int], layers: int) -> tuple[int, ...]:
    """Refuse exits that do not rise to the last layer.

    Example:
        >>> check_exits([1, 2, 4], 4)
        (1, 2, 4)

    Raises:
        InvalidInputError: They do not.
    """
    found = tuple(int(e) for e in exits)
    if not found or found != tuple(sorted(set(found))) or found[0] < 1 or found[-1] != layers:
        raise InvalidInputError(
            f"exits must rise from 1 or more to the last of {layers} layers, got {list(found)}"
        )
    return found


def exit_logits(model: Any, ids: torch.Tensor, exits: Sequence[int]) -> list[torch.Tensor]:
    """Logits [B, T, V] at each exit, from one forward.

    Args:
        model: A decoder-only model of transformers.
        ids: int64 [B, T].
        exits: Layers after which it answers.
    """
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    out = decoder(input_ids=ids, output_hidden_states=True, use_cache=False)
    states, last = out.hidden_states, len(out.hidden_states) - 1
    # transformers reports the state of the last layer after the norm
    return [head(states[e] if e == last else decoder.norm(states[e])) for e in exits]


def sorted_loss(model: Any, ids: torch.Tensor, exits: Sequence[int]) -> torch.Tensor:
    """Mean over the exits of the next-token loss, one forward (S2D, sec. 2).

    Args:
        model: A decoder-only model of transformers.
        ids: int64 [B, T + 1]; the last column is only predicted.
        exits: Layers n in B after which the model answers.

    Returns:
        Scalar in nats per token.
    """
    labels = ids[:, 1:].flatten()
    losses = [
        F.cross_entropy(logits.float().flatten(0, 1), labels)
        for logits in exit_logits(model, ids[:, :-1], exits)
    ]
    return torch.stack(losses).mean()


def keep_layers(model: Any, layers: Sequence[int]) -> Any:
    """A copy of a decoder-only model that has only some of its layers, in the given order.

    Raises:
        InvalidInputError: It has no such layer.

    Returns:
        The smaller model, with weights of its own, in eval mode.
    """
    count = int(model.config.num_hidden_layers)
    if not layers or min(layers) < 0 or max(layers) >= count:
        raise InvalidInputError(f"the layers kept must be among 0 to {count - 1}, got {layers}")
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(layers)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in layers]
    if hasattr(config, RECORD):
        delattr(config, RECORD)
    place = {old: new for new, old in enumerate(layers)}
    weights = {}
    for name, value in model.state_dict().items():
        before, mark, after = name.partition(".layers.")
        index, _, rest = after.partition(".")
        if not mark:
            weights[name] = value
        elif int(index) in place:
            weights[f"{before}.layers.{place[int(index)]}.{rest}"] = value
    with torch.random.fork_rng(devices=[]):
        smaller = type(model)(config)
    smaller.to(next(model.parameters()))
    smaller.load_state_dict({k: v.clone() for k, v in weights.items()})
    return smaller.eval()
