"""The adapter to transformers: find, load and pair up checkpoints."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from isthmus.errors import (
    BrokenFileError,
    InvalidInputError,
    MismatchError,
    UnknownNameError,
    UnsupportedModelError,
)

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass
class Checkpoint:
    """A loaded model.

    Attributes:
        model: A model of transformers in eval mode.
        tokenizer: Its tokenizer, or None when the checkpoint has none.
        source: The path or hub id it came from.
    """

    model: Any
    tokenizer: Any
    source: str


CACHE_NAMES = ("cache", "past_key_values", "cache_params", "layer_past")
"""Argument of a forward that takes the cache; transformers 5.24 calls it ``cache`` everywhere."""


def cache_argument(module: Any) -> str:
    """Name of the argument by which a model or a layer of transformers takes its cache.

    Args:
        module: The module.
    """
    names = inspect.signature(module.forward).parameters
    return next((name for name in CACHE_NAMES if name in names), CACHE_NAMES[0])


def parse_dtype(name: str, device: str) -> torch.dtype:
    """A dtype by name; ``"auto"`` takes :func:`preferred_dtype`.

    Raises:
        UnknownNameError: Not a dtype.
    """
    if name == "auto":
        return preferred_dtype(device)
    if name not in DTYPES:
        raise UnknownNameError("dtype", name, ["auto", *DTYPES])
    return DTYPES[name]


def preferred_dtype(device: str) -> torch.dtype:
    """float32 on a CPU, bfloat16 elsewhere: never a matter of timing, since outputs hang on it."""
    return torch.float32 if device == "cpu" else torch.bfloat16


def is_bfloat16(source: str, device: str) -> bool:
    """Whether a checkpoint that lies on this machine holds bfloat16 weights and goes to the CPU."""
    from huggingface_hub import try_to_load_from_cache

    if parse_device(device) != "cpu":
        return False
    path = Path(source) / "config.json"
    try:
        if not Path(source).exists():
            path = Path(str(try_to_load_from_cache(source, "config.json")))
        config = json.loads(path.read_text())
        return "bfloat16" in (config.get("dtype"), config.get("torch_dtype"))
    except (OSError, ValueError, AttributeError):
        return False  # not here, or damaged: loading it says so


def parse_device(name: str) -> str:
    """A device by name; ``"auto"`` is the first GPU, else the CPU.

    Raises:
        InvalidInputError: Not a device of this machine.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InvalidInputError(
            f"device {name!r} is not available here; try --device cpu"
        ) from error
    return str(device)


def load_checkpoint(source: str, *, dtype: str = "auto", device: str = "auto") -> Checkpoint:
    """Load a generating model and its tokenizer.

    Args:
        source: Folder of a checkpoint, or a hub id.
        dtype: ``"auto"``, ``"float32"``, ``"bfloat16"``, ``"float16"`` or ``"float64"``.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"`` ...

    Raises:
        UnknownNameError: Neither a folder nor a hub id that can be reached.
        BrokenFileError: A file of the checkpoint is damaged.
        UnsupportedModelError: The checkpoint does not generate text.
    """
    where = parse_device(device)
    number = parse_dtype(dtype, where)
    if not Path(source).exists():
        _check_reachable(source)
    from transformers import AutoConfig

    with no_progress_bars(), _Translated(source):
        config = AutoConfig.from_pretrained(source)
        model = _auto_class(config).from_pretrained(source, dtype=number)
    _check_complete(model, source)
    return Checkpoint(model.to(where).eval(), load_tokenizer(source), source)


def load_classifier(source: str, what: str = "text") -> Checkpoint:
    """Load a classifier in float32 on the CPU, with its tokenizer if it reads text.

    Args:
        source: Folder of a checkpoint, or a hub id.
        what: It classifies a ``"text"`` or an ``"image"``.

    Raises:
        UnknownNameError: Neither a folder nor a hub id that can be reached.
        BrokenFileError: A file of the checkpoint is damaged.
        UnsupportedModelError: The checkpoint is no such classifier.
    """
    if not Path(source).exists():
        _check_reachable(source)
    from transformers import (
        AutoConfig,
        AutoModelForImageClassification,
        AutoModelForSequenceClassification,
    )

    auto: Any = AutoModelForImageClassification
    if what == "text":
        auto = AutoModelForSequenceClassification
    with no_progress_bars(), _Translated(source):
        config = AutoConfig.from_pretrained(source)
        if type(config) not in auto._model_mapping:
            raise UnsupportedModelError(f"{source}: {config.model_type!r} classifies no {what}")
        model, told = auto.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
        if told["missing_keys"]:
            raise UnsupportedModelError(
                f"{source} is no trained classifier of {what}: it lacks "
                f"{sorted(told['missing_keys'])[0]}; give a checkpoint that was fine-tuned"
            )
    _check_complete(model, source)
    return Checkpoint(model.eval(), load_tokenizer(source) if what == "text" else None, source)


def _check_reachable(source: str) -> None:
    """Ask the hub once, so that a wrong name answers in seconds and not after five retries.

    Raises:
        UnknownNameError: Not in the local cache and not on a hub that can be reached.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        if try_to_load_from_cache(source, "config.json") is None:
            HfApi().model_info(source, timeout=10)
    except Exception as error:  # transport errors differ from release to release
        raise UnknownNameError(
            "model",
            source,
            [],
            hint="it is no folder here and no model on a hub that this machine can reach "
            f"({type(error).__name__}); give the folder of a checkpoint or a full hub id",
        ) from error


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Keep transformers from drawing progress bars."""
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            logging.enable_progress_bar()


def load_tokenizer(source: str) -> Any:
    """The tokenizer of a checkpoint, or None when there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _auto_class(config: Any) -> Any:
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForSeq2SeqLM,
        AutoModelForSpeechSeq2Seq,
    )

    decoders = (AutoModelForCausalLM, AutoModelForImageTextToText)
    for auto in (*decoders, AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq):
        if bool(config.is_encoder_decoder) == (auto in decoders):
            continue
        if type(config) in auto._model_mapping:
            return auto
    raise UnsupportedModelError(
        f"model type {config.model_type!r} does not generate text with transformers; isthmus "
        "decodes causal, sequence-to-sequence, speech-to-text and image-to-text models"
    )


class _Translated:
    """Turn the errors of loading into ours, one line each."""

    def __init__(self, source: str) -> None:
        self.source = source

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None or isinstance(error, (UnsupportedModelError, KeyboardInterrupt)):
            return
        folder = Path(self.source)
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if not folder.exists():
            raise BrokenFileError(f"{self.source} could not be fetched ({first})") from error
        if not folder.is_dir() or not (folder / "config.json").exists():
            raise BrokenFileError(
                f"{self.source} holds no config.json; give the folder of a checkpoint"
            ) from error
        raise BrokenFileError(
            f"the checkpoint in {self.source} cannot be read ({first}); fetch or export it again"
        ) from error


def _check_complete(model: Any, source: str) -> None:
    folder = Path(source)
    if not folder.is_dir():
        return
    names = {p.name for p in folder.iterdir()}
    if not names & {"model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"}:
        raise BrokenFileError(f"{source} holds no weights (model.safetensors)")


def check_same_vocabulary(draft: Any, target: Any) -> None:
    """Compare two tokenizers token by token.

    Raises:
        MismatchError: A token id means something else in the draft model.
    """
    if draft is None or target is None:
        return
    ours, theirs = draft.get_vocab(), target.get_vocab()
    if ours == theirs:
        return
    wrong = [t for t, i in ours.items() if theirs.get(t) != i]
    missing = len(theirs.keys() - ours.keys())
    if wrong or missing:
        example = f", for example {wrong[0]!r}" if wrong else ""
        raise MismatchError(
            f"the draft model's vocabulary differs from the target's ({len(wrong)} tokens with "
            f"another id or none{example}, {missing} missing); use a draft model of the same family"
        )
