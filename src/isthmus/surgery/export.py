"""A changed model as a folder that others load, and what it weighs.

================  ===============================================================================
result            folder
================  ===============================================================================
native            a checkpoint of transformers like any other, with ``surgery.json`` beside it
of isthmus        ``isthmus_config.json``, the plan, and the original under ``base``: transformers
                  has no model of that shape, so :func:`isthmus.load` applies the plan again;
                  and weights that were tuned after the cut
================  ===============================================================================

Either is loaded again before it is published, and must compute what the changed model computed.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from isthmus import registry
from isthmus.errors import BrokenFileError, InvalidInputError, MismatchError
from isthmus.folders import check_replaceable, digest, published, read_record, replace_text
from isthmus.lenses import sites as site_maps
from isthmus.models.hub import load_checkpoint, load_tokenizer
from isthmus.settings import changed, tuples
from isthmus.surgery.base import Plan, Report, asdict_plain, write_tensors

NATIVE, OWN = "surgery.json", "isthmus_config.json"
"""Files that tell a folder of a changed model."""

BASE, TUNED = "base", "tuned.safetensors"

_WEIGHTS = (".safetensors", ".bin")


def export(
    model: Any,
    tokenizer: Any,
    plan: Plan,
    report: Report,
    folder: str | Path,
    *,
    original: Any = None,
    dtype: torch.dtype | None = None,
    notes: Mapping[str, Any] | None = None,
    tuned: bool = False,
) -> None:
    """Publish a changed model, once it has been loaded again and found to be the same.

    Args:
        model: As ``apply`` left it.
        tokenizer: Its tokenizer, or None.
        plan: The plan.
        report: What ``apply`` reported.
        folder: Where to; replaced as a whole if it holds a changed model.
        original: The model before; needed where the report is not ``native``.
        dtype: Of the file; that of the model if None.
        notes: What else to write beside it, as JSON values.
        tuned: Whether the weights are others than ``apply`` left, so that a folder of isthmus must
            hold them beside the plan.

    Raises:
        InvalidInputError: The folder holds something else.
        MismatchError: What was written computes something else.
        BrokenFileError: The folder cannot be written.
    """
    folder = Path(folder)
    check_replaceable(folder, (NATIVE, OWN), "model that isthmus shrank")
    record: dict[str, Any] = {"format": 1, "method": plan.method, "report": report.to_dict()}
    record |= notes or {}
    kept = model if report.native else original
    assert kept is not None, "give the original of a model that is not native"
    stored = _cast(kept, dtype)
    with published(folder) as new:
        place = new if report.native else new / BASE
        stored.save_pretrained(place)
        if tokenizer is not None:
            tokenizer.save_pretrained(place)
        if report.native:  # the weights say it all: the plan's tensors would only double them
            record["plan"] = {k: v for k, v in asdict_plain(plan).items() if k != "tensors"}
        else:
            plan.save(new)
            if tuned:
                values = dict(_cast(model, dtype).named_parameters())
                write_tensors(new / TUNED, values)
                record["sha256"] = digest(new / TUNED)
        name = NATIVE if report.native else OWN
        replace_text(new / name, json.dumps(record, indent=1, sort_keys=True) + "\n")
        if report.native:
            _compare(_cast(stored, torch.float32), load_checkpoint(str(new), dtype="float32").model)


def surgeon(slug: str, settings: Mapping[str, Any] | None = None) -> Any:
    """An operation by its name.

    Args:
        slug: A system of the role ``surgery``.
        settings: Strings as a command line gives them, or values as a plan keeps them.

    Raises:
        UnknownNameError: No such system.
        InvalidInputError: It is no surgery, or has no such setting.
    """
    system: Any = registry.load(slug)
    if getattr(system, "role", "") != "surgery":
        known = ", ".join(registry.slugs("surgery"))
        raise InvalidInputError(f"{slug} shrinks no model; methods that do: {known}")
    kind: Any = getattr(registry.load_module(registry.find(slug)), "Settings", None)
    if kind is None:
        return system()
    given = dict(settings or {})
    if all(isinstance(value, str) for value in given.values()):
        return system(changed(kind(), given, slug))
    try:
        return system(kind(**tuples(given)))
    except TypeError as error:
        raise BrokenFileError(
            f"the plan has settings that {slug} does not know ({error}); shrink again"
        ) from error


def is_own(folder: str | Path) -> bool:
    """Whether a folder holds a changed model that only isthmus loads."""
    return (Path(folder) / OWN).is_file()


def load_own(
    folder: str | Path, *, device: str = "cpu", dtype: torch.dtype | None = None
) -> tuple[Any, Any]:
    """Apply the plan of a folder to the model in it.

    Args:
        folder: Made by :func:`export`.
        device: Where to.
        dtype: Of the changed model; float32 if None.

    Returns:
        The model and its tokenizer.

    Raises:
        BrokenFileError: A file is missing or damaged.
        MismatchError: The plan belongs to another model.
    """
    folder = Path(folder)
    record = read_record(folder / OWN, ("method",), "model")
    plan = Plan.load(folder)
    if plan.method != record["method"]:
        raise BrokenFileError(f"{folder} holds the plan of another method; shrink again")
    checkpoint = load_checkpoint(str(folder / BASE), dtype="float32", device=device)
    surgeon(plan.method, plan.settings).apply(checkpoint.model, plan)
    if "sha256" in record:
        _put_tuned(checkpoint.model, folder / TUNED, str(record["sha256"]))
    return _cast(checkpoint.model, dtype).eval(), load_tokenizer(str(folder / BASE))


def _put_tuned(model: Any, path: Path, expected: str) -> None:
    """Put the weights of a training after the cut in the place of those that the plan gives."""
    try:
        if digest(path) != expected:
            raise BrokenFileError(f"{path} was altered or cut short; shrink again")
        values = load_file(path)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.copy_(values[name])
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise BrokenFileError(f"{path} cannot be read ({error}); shrink again") from error


def file_bytes(folder: str | Path) -> int:
    """Bytes of the weights in a folder, plans of isthmus included."""
    found = [p for p in Path(folder).rglob("*") if p.suffix in _WEIGHTS and p.is_file()]
    return sum(p.stat().st_size for p in found)


def _cast(model: Any, dtype: torch.dtype | None) -> Any:
    """A copy with weights of another dtype; what transformers computes anew stays as it is."""
    if dtype is None or dtype == model.dtype:
        return model
    kept = model.state_dict().keys()
    model = copy.deepcopy(model)
    named = itertools.chain(model.named_parameters(), model.named_buffers())
    for name, value in named:
        if name in kept and value.is_floating_point():
            value.data = value.data.to(dtype)
    return model


@torch.no_grad()
def _compare(model: Any, loaded: Any) -> None:
    """Refuse a file that computes something else than the model it was made of."""

    def logits(each: Any) -> Tensor:
        out: Tensor = each(**site_maps.probe_of(each)).logits
        return out

    wanted, got = logits(model), logits(loaded)
    if not torch.allclose(wanted, got, rtol=1e-4, atol=1e-5 * float(wanted.abs().max())):
        error = float((wanted - got).abs().max())
        raise MismatchError(
            f"transformers loads another model than was written (logits differ by {error:.2g}); "
            "the method must say that its result is not native"
        )
