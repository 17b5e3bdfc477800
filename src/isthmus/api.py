"""The Python door: load a model, generate, stream, or plug into transformers' ``generate``.

>>> import isthmus
>>> model = isthmus.load()  # the small model that ships with isthmus
>>> out = model.generate("def add(a, b):", max_new_tokens=8, drafter="prompt-lookup")
>>> plain = model.generate("def add(a, b):", max_new_tokens=8, drafter="none")
>>> out.tokens == plain.tokens
True
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from isthmus import registry
from isthmus.decoding.custom_generate import custom_generate
from isthmus.decoding.fast import FastTarget, best_target
from isthmus.decoding.model import Model, drafters
from isthmus.decoding.target import HubTarget
from isthmus.errors import InvalidInputError, UnsupportedModelError
from isthmus.models.hub import (
    Checkpoint,
    check_same_vocabulary,
    is_bfloat16,
    load_checkpoint,
    parse_device,
    parse_dtype,
    preferred_dtype,
)
from isthmus.surgery.export import is_own, load_own
from isthmus.training.system import CONFIG, read_config
from isthmus.workbench import reference

__all__ = ["Model", "custom_generate", "drafters", "load"]

EMBEDDED = "pycode-t"
"""Name of the reference model that ships inside the package."""


def load(
    source: str | Path = "",
    *,
    dtype: str = "auto",
    device: str = "auto",
    draft_model: str | Path = "",
    exact: bool = False,
) -> Model:
    """Load a model to decode with.

    Args:
        source: Folder or hub id of a checkpoint of transformers, or the name of a reference model
            of :mod:`isthmus.workbench`; the embedded model when empty.
        dtype: ``"auto"`` (float32 on a CPU, where a model with a fast forward keeps bfloat16
            weights as they are, and bfloat16 elsewhere), ``"float32"``,
            ``"bfloat16"``, ``"float16"`` or ``"float64"``; or ``"int8"``, which rounds the weights
            of a model with a fast forward: faster, smaller, and no longer quite the same model.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, ...
        draft_model: A smaller model with the same vocabulary, for drafters that need one.
        exact: Plain and speculative decoding see the same numbers bit for bit. A fast forward
            (:mod:`isthmus.decoding.fast`) does so at no cost; other models compute every forward
            with the same shapes, which is slower (:mod:`isthmus.decoding.exact`).

    Raises:
        UnknownNameError: No such model, dtype or device.
        BrokenFileError: A damaged checkpoint.
        UnsupportedModelError: A model that cannot be decoded with an unchanged output.
        MismatchError: The draft model has another vocabulary.
    """
    own = _own(str(source))
    if own is not None:
        if dtype not in ("auto", "float32") or device not in ("auto", "cpu") or exact:
            raise InvalidInputError(
                f"{source} has a network of its own and runs in float32 on the CPU; leave dtype, "
                "device and exact out"
            )
        if draft_model:
            raise InvalidInputError(f"{source} takes no draft model; leave it out")
        return own
    checkpoint, target = _load(str(source), dtype, device)
    model = Model(target, checkpoint.tokenizer, exact=exact)
    if draft_model:
        draft, model.draft_model = _load(str(draft_model), dtype, device)
        check_same_vocabulary(draft.tokenizer, checkpoint.tokenizer)
    return model


def _own(source: str) -> Model | None:
    """What decodes with a trained system whose network is none of transformers, or None."""
    folder = Path(source)
    if not source or not (folder / CONFIG).exists() or (folder / "config.json").exists():
        return None
    name = read_config(folder)["system"]
    system: Any = registry.load(name)
    if not hasattr(system, "model"):
        raise UnsupportedModelError(
            f"{source} holds {name}, which writes no text token by token; use: isthmus run {source}"
        )
    model: Model = system.from_pretrained(folder).model
    return model


def _load(source: str, dtype: str, device: str) -> tuple[Checkpoint, HubTarget]:
    """A checkpoint and the best target for it."""
    place = locate(source)
    if is_own(place):
        return _shrunk(place, dtype, device)
    chosen = dtype
    if dtype in ("auto", "int8"):
        stored = is_bfloat16(place, device)
        chosen = "bfloat16" if stored else "auto" if dtype == "auto" else "float32"
    checkpoint = load_checkpoint(place, dtype=chosen, device=device)
    target = best_target(checkpoint.model)
    if dtype == "int8":
        if not isinstance(target, FastTarget):
            raise UnsupportedModelError(
                f"int8 weights need a fast forward; {target.why_general}; try another --dtype"
            )
        target.to_int8()
    elif chosen != dtype and not isinstance(target, FastTarget):
        why = target.why_general
        target = HubTarget(checkpoint.model.to(preferred_dtype("cpu")))
        target.why_general = why
    return checkpoint, target


def _shrunk(place: str, dtype: str, device: str) -> tuple[Checkpoint, HubTarget]:
    """A model of ``isthmus shrink`` that transformers has no shape for."""
    if dtype == "int8":
        raise UnsupportedModelError(f"{place} has a shape of its own; choose another --dtype")
    where = parse_device(device)
    number = torch.float32 if dtype == "auto" else parse_dtype(dtype, where)
    model, tokenizer = load_own(place, device=where, dtype=number)
    return Checkpoint(model, tokenizer, place), best_target(model)


def locate(source: str) -> str:
    """The folder or hub id behind a name that :func:`load` takes; reference models are made.

    Args:
        source: As for :func:`load`.
    """
    return reference.locate(source or EMBEDDED)
