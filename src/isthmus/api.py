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

from isthmus.decoding.custom_generate import custom_generate
from isthmus.decoding.model import Model, drafters
from isthmus.decoding.target import HubTarget
from isthmus.models.hub import check_same_vocabulary, load_checkpoint
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
        dtype: ``"auto"`` (what the device computes fastest), ``"float32"``, ``"bfloat16"``,
            ``"float16"`` or ``"float64"``.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, ...
        draft_model: A smaller model with the same vocabulary, for drafters that need one.
        exact: Compute every forward with the same shapes, so that plain and speculative decoding
            see the same numbers bit for bit; slower. See :mod:`isthmus.decoding.exact`.

    Raises:
        UnknownNameError: No such model, dtype or device.
        BrokenFileError: A damaged checkpoint.
        UnsupportedModelError: A model that cannot be decoded with an unchanged output.
        MismatchError: The draft model has another vocabulary.
    """
    checkpoint = load_checkpoint(locate(str(source)), dtype=dtype, device=device)
    model = Model(checkpoint.model, checkpoint.tokenizer, exact=exact)
    if draft_model:
        draft = load_checkpoint(locate(str(draft_model)), dtype=dtype, device=device)
        check_same_vocabulary(draft.tokenizer, checkpoint.tokenizer)
        model.draft_model = HubTarget(draft.model)
    return model


def locate(source: str) -> str:
    """The folder or hub id behind a name that :func:`load` takes; reference models are made.

    Args:
        source: As for :func:`load`.
    """
    if not source:
        return str(reference.reference(EMBEDDED))
    if not Path(source).exists() and source in reference.NAMES:
        return str(reference.reference(source))
    return source
