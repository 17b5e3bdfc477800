"""The file that keeps an unfinished run: tensors, and a note of plain data, replaced as a whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from isthmus.errors import BrokenFileError


def write(path: Path, tensors: dict[str, torch.Tensor], note: dict[str, Any]) -> None:
    """Write a run down; an interruption leaves the file as it was.

    Args:
        path: Where to.
        tensors: Contiguous, on the CPU, and sharing no memory.
        note: Everything else.

    Raises:
        BrokenFileError: The file cannot be written.
    """
    part = path.with_suffix(".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, part, metadata={"run": json.dumps(note)})
        part.replace(path)
    except OSError as error:
        raise BrokenFileError(f"{path} cannot be written ({error.strerror})") from error


def read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and note of a run.

    Raises:
        BrokenFileError: The file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            note: dict[str, Any] = json.loads((file.metadata() or {})["run"])
            return {k: file.get_tensor(k) for k in file.keys()}, note  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise BrokenFileError(
            f"the unfinished run in {path} is damaged; delete that file to begin anew"
        ) from error


def under(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Tensors whose names begin with a prefix, by what follows it.

    Example:
        >>> list(under({"now.a": torch.ones(1), "best.a": torch.ones(1)}, "now."))
        ['a']
    """
    return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
