"""Small reference models: one table of recipes, trained on first use, cached by fingerprint.

::

    recipe ─▶ corpus (pycode) ─▶ tokens ─▶ Trainer ─▶ bf16 checkpoint + tokenizer + card
                 └ held-out files ─────────────────────▶ loss, measured on the exported weights

`reference` returns a folder that transformers loads. The model ``pycode-t`` ships inside the
package; its drafts ``pycode-s`` and ``pycode-xs`` share its tokenizer and take minutes to train.
So do the models of generated tasks, which are marked on held-out problems: ``sums-l`` solves
nearly all of them and ``sums-s`` about every other one; ``dates`` is an encoder-decoder, and
``dates-s`` one that errs about one time in ten; ``korean`` reads code out in a language that its
tokenizer shatters; ``slots`` says lists of slots in words. ``pycode-100m`` and ``pycode-500m`` are
not trained but grown (:mod:`isthmus.workbench.grown`).
From the command line: ``python -m isthmus.workbench.reference pycode-s``.
"""

import argparse
import copy
import functools
import hashlib
import json
import math
import platform
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from filelock import FileLock
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerFast

import isthmus
from isthmus.errors import BrokenFileError, InvalidInputError, IsthmusError, UnknownNameError
from isthmus.folders import EMBEDDED, cache_folder, check_replaceable, published, writable
from isthmus.workbench import korean, pycode, slots
from isthmus.workbench._tasks import MARKED, PairCourse, PromptCourse, TaskRecipe
from isthmus.workbench._training import Progress, Recipe, Trainer, build, evaluate, pack
from isthmus.workbench.grown import GROWTHS, grown
from isthmus.workbench.tokenizer import end_id, load_tokenizer, train_tokenizer

_MAKERS = (
    Recipe(
        name="pycode-t",
        hidden_size=320,
        num_hidden_layers=6,
        num_attention_heads=5,
        intermediate_size=896,
        steps=530,
        decay_share=0.37,
    ),
    # the target of claims that train several drafters: a forward is cheap, a vocabulary small
    Recipe(
        name="pycode-m",
        hidden_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        head_dim=32,
        intermediate_size=352,
        vocab_size=1024,
        batch_size=8,
        sequence_length=512,
        steps=800,
        decay_share=0.4,
    ),
    # its draft model
    Recipe(
        name="pycode-n",
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        head_dim=32,
        intermediate_size=176,
        vocab_size=1024,
        batch_size=8,
        sequence_length=512,
        steps=400,
        decay_share=0.4,
    ),
    Recipe(
        name="pycode-s",
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=352,
        steps=480,
    ),
    Recipe(
        name="pycode-xs",
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=176,
        steps=600,
    ),
    TaskRecipe(
        name="sums-l",
        task="sums",
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        head_dim=32,
        intermediate_size=256,
        vocab_size=26,
        batch_size=8,
        sequence_length=256,
        max_position_embeddings=512,
        steps=800,
        decay_share=0.4,
    ),
    TaskRecipe(
        name="sums-s",
        task="sums",
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        head_dim=32,
        intermediate_size=128,
        vocab_size=26,
        batch_size=8,
        sequence_length=256,
        max_position_embeddings=512,
        steps=600,
        decay_share=0.4,
    ),
    # deep enough for an early exit, and nearly perfect, so that speed alone is measured on it
    TaskRecipe(
        name="dates",
        task="dates",
        hidden_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        head_dim=32,
        intermediate_size=256,
        vocab_size=96,
        encoder_layers=2,
        batch_size=64,
        sequence_length=16,
        max_position_embeddings=64,
        steps=400,
        decay_share=0.4,
    ),
    # a deep encoder, to be looked into layer by layer
    TaskRecipe(
        name="dates-deep",
        task="dates",
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        head_dim=32,
        intermediate_size=256,
        vocab_size=96,
        encoder_layers=6,
        batch_size=64,
        sequence_length=16,
        max_position_embeddings=64,
        steps=600,
        decay_share=0.4,
    ),
    # stopped before it is perfect, so that ways of decoding can differ
    TaskRecipe(
        name="dates-s",
        task="dates",
        hidden_size=96,
        num_hidden_layers=2,
        num_attention_heads=3,
        head_dim=32,
        intermediate_size=192,
        vocab_size=96,
        encoder_layers=2,
        batch_size=64,
        sequence_length=16,
        max_position_embeddings=64,
        steps=210,
        decay_share=0.4,
    ),
    # stopped before it is perfect, so that it leaves a slot out now and then
    TaskRecipe(
        name="slots",
        task="slots",
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        head_dim=24,
        intermediate_size=192,
        vocab_size=len(slots.tokenizer()),
        encoder_layers=2,
        batch_size=64,
        sequence_length=64,
        max_position_embeddings=64,
        steps=220,
        decay_share=0.4,
    ),
    # a tokenizer of code, and a language that it shatters into bytes
    TaskRecipe(
        name="korean",
        task="korean",
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        head_dim=32,
        intermediate_size=256,
        vocab_size=korean.VOCABULARY,
        batch_size=8,
        sequence_length=256,
        max_position_embeddings=512,
        steps=450,
        decay_share=0.4,
    ),
)

RECIPES: Mapping[str, Recipe] = MappingProxyType({recipe.name: recipe for recipe in _MAKERS})
"""All reference models that are trained, by name."""

NAMES = (*RECIPES, *GROWTHS)
"""All reference models."""

MARKS = ("recipe.json", "tokenizer.json")
"""Files that tell a folder of a reference model."""

_SNAPSHOT_WINDOWS = 24


def fingerprint(recipe: Recipe) -> str:
    """Name of a recipe's result: equal recipes and tokenizers, equal fingerprints.

    Args:
        recipe: Any recipe.

    Returns:
        Twelve hexadecimal digits.
    """
    state = hashlib.sha256(json.dumps(recipe.as_dict(), sort_keys=True).encode())
    if isinstance(recipe, TaskRecipe):
        state.update(recipe.digest().encode())
        return state.hexdigest()[:12]
    embedded = EMBEDDED / "pycode-t" / "tokenizer.json"
    if embedded.exists():
        state.update(embedded.read_bytes())
    return state.hexdigest()[:12]


def reference(name: str | Recipe, progress: bool = True) -> Path:
    """Return the folder of a reference model, training it first if need be.

    Args:
        name: A name in `NAMES`, or a recipe of a claim's own.
        progress: Show a progress bar while training, if standard error is a terminal.

    Returns:
        A folder with a transformers checkpoint (bf16), its tokenizer, ``card.json`` (held-out
        loss, tokens seen, seconds, machine, versions, corpus digest) and, of a trained model,
        ``recipe.json``.

    Raises:
        UnknownNameError: There is no such model.
        BrokenFileError: A file is altered, or the cache folder cannot be written.
        IsthmusError: This interpreter has no standard-library source to train on.
        KeyboardInterrupt: Training was interrupted; the next call goes on from there.
    """
    if isinstance(name, str):
        if name not in NAMES:
            raise UnknownNameError("reference model", name, NAMES)
        if name in GROWTHS:
            growth = GROWTHS[name]
            return grown(growth, reference(growth.base, progress))
    recipe = RECIPES[name] if isinstance(name, str) else name
    if _is_complete(EMBEDDED / recipe.name, recipe):
        return EMBEDDED / recipe.name
    folder = cache_folder() / "reference" / f"{recipe.name}-{fingerprint(recipe)}"
    if not _is_complete(folder, recipe):
        train(recipe, folder, progress=progress)
    return folder


def locate(source: str) -> str:
    """The folder or hub id behind a name; reference models are made when they are asked for.

    Args:
        source: Folder, hub id, or the name of a reference model.
    """
    if not Path(source).exists() and source in NAMES:
        return str(reference(source))
    return source


def train(
    recipe: Recipe,
    folder: Path,
    *,
    progress: bool = True,
    documents: Sequence[str] | None = None,
    snapshots: Path | None = None,
    snapshot_every_s: float = 600.0,
    held_out_windows: int | None = None,
) -> None:
    """Train a reference model and publish it.

    The state of an unfinished run lies in the cache folder; the same recipe goes on from it. A
    recipe that differs only in ``steps`` and ``decay_share`` goes on from it too, as long as
    neither learning rate has begun to fall, because up to there the two runs are the same.

    Args:
        recipe: What to train.
        folder: Where to publish; replaced as a whole, at the end.
        progress: Show a progress bar, if standard error is a terminal.
        documents: Training texts instead of those of `pycode`; a generated task takes none.
        snapshots: Folder to publish the unfinished model in now and then.
        snapshot_every_s: Seconds between snapshots.
        held_out_windows: Number of held-out sequences to measure on; None takes all.

    Raises:
        InvalidInputError: ``folder`` holds something else.
        BrokenFileError: A checkpoint is altered, or a folder cannot be written.
        IsthmusError: This interpreter has no standard-library source.
        KeyboardInterrupt: Training was interrupted and its state saved.
    """
    for place in (folder, snapshots):
        if place is not None:
            check_replaceable(place, MARKS, "reference model")
    task = isinstance(recipe, TaskRecipe)
    corpus = recipe.digest() if isinstance(recipe, TaskRecipe) else pycode.digest()
    if task:
        documents = ()
    elif documents is None:
        documents = pycode.training_texts(recipe.library_repeats)
    else:
        corpus = hashlib.sha256("\0".join([corpus, *documents]).encode()).hexdigest()
    # Without the end of the schedule: a run may be made longer or shorter while it lasts.
    beginning = replace(recipe, steps=1, decay_share=0.0)
    unfinished = f"{recipe.name}-{fingerprint(beginning)}-{corpus[:12]}"
    state = cache_folder() / "unfinished" / unfinished
    lock = FileLock(state.with_name(f"{unfinished}.lock"))
    with writable(state):
        lock.acquire()
    try:
        if _is_complete(folder, recipe):  # Made by another process while this one waited.
            return
        tokenizer = (
            recipe.tokenizer() if isinstance(recipe, TaskRecipe) else _tokenizer(recipe.vocab_size)
        )
        trainer = Trainer(
            recipe,
            _encode(tokenizer, documents),
            end=end_id(tokenizer),
            corpus=corpus,
            directory=state,
            device="cuda" if torch.cuda.is_available() else "cpu",
            course=recipe.course() if isinstance(recipe, TaskRecipe) else None,
        )
        with _bar(recipe, progress) as show:
            snapped = time.monotonic()

            def report(now: Progress) -> None:
                nonlocal snapped
                show(now)
                if snapshots is not None and time.monotonic() - snapped > snapshot_every_s:
                    export(trainer, tokenizer, snapshots, windows=_SNAPSHOT_WINDOWS)
                    snapped = time.monotonic()

            trainer.run(report)
        export(trainer, tokenizer, folder, held_out_windows)
        shutil.rmtree(state, ignore_errors=True)
    finally:
        lock.release()


def export(
    trainer: Trainer,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    windows: int | None = None,
) -> None:
    """Publish a model in bf16, with the held-out loss of exactly the published weights.

    Args:
        trainer: A run, finished or not.
        tokenizer: Its tokenizer.
        folder: Where to publish; replaced as a whole.
        windows: Number of held-out windows to measure on; None takes all.

    Raises:
        InvalidInputError: ``folder`` holds something else.
        BrokenFileError: ``folder`` cannot be written.
    """
    check_replaceable(folder, MARKS, "reference model")
    recipe = trainer.recipe
    with published(folder) as temporary:
        config = copy.deepcopy(trainer.model.config)
        config.dtype = torch.bfloat16
        config.architectures = [type(trainer.model).__name__]
        config.save_pretrained(temporary)
        generation = GenerationConfig(
            bos_token_id=trainer.end, eos_token_id=trainer.end, pad_token_id=trainer.end
        )
        if isinstance(trainer.course, PromptCourse | PairCourse):
            generation = trainer.course.generation()
        generation.save_pretrained(temporary)
        # Tied weights are listed once, as transformers expects of a file.
        weights = trainer.model.named_parameters()
        save_file(
            {name: weight.detach().to("cpu", torch.bfloat16) for name, weight in weights},
            temporary / "model.safetensors",
            metadata={"format": "pt"},
        )
        tokenizer.save_pretrained(temporary)
        held_out = _held_out(temporary, tokenizer, trainer, windows)
        _write_json(temporary / "recipe.json", recipe.as_dict())
        _write_json(temporary / "card.json", _card(trainer, held_out))


def _card(trainer: Trainer, held_out: dict[str, Any]) -> dict[str, Any]:
    recipe = trainer.recipe
    corpus = "pycode"
    data = "Python standard library source, Python Software Foundation License"
    if isinstance(recipe, TaskRecipe):
        corpus, data = recipe.task, "generated"
    return {
        "name": recipe.name,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "held_out": held_out,
        "steps": trainer.step,
        "steps_of_recipe": recipe.steps,
        "tokens_seen": trainer.step * recipe.batch_size * recipe.sequence_length,
        "seconds": round(trainer.seconds, 1),
        "machine": {
            "device": _device_name(trainer.device),
            "architecture": platform.machine(),
            "system": platform.system(),
            "threads": torch.get_num_threads(),
        },
        "versions": {
            "python": platform.python_version(),
            "isthmus": isthmus.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "corpus": {"name": corpus, "sha256": trainer.corpus},
        "data": data,
    }


def _held_out(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    trainer: Trainer,
    windows: int | None,
) -> dict[str, Any]:
    """Loss of the weights in a folder, computed in float32; of a task, the share it solves."""
    if isinstance(trainer.course, PromptCourse | PairCourse):
        marked: Any = trainer.course.build()
        marked.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
        marked.generation_config = trainer.course.generation()
        return trainer.course.marks(marked.to(trainer.device).eval(), windows or MARKED)
    length = trainer.recipe.sequence_length
    model: nn.Module = build(trainer.recipe, token_id=trainer.end)
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    model.to(trainer.device)
    texts = pycode.texts("held-out")
    stream = pack(_encode(tokenizer, texts), end_id(tokenizer))
    loss = evaluate(model, stream, length, windows)
    bytes_per_token = sum(len(text.encode()) for text in texts) / (len(stream) - 1)
    return {
        "nats_per_token": round(loss, 4),
        "bits_per_byte": round(loss / math.log(2) / bytes_per_token, 4),
        "bytes_per_token": round(bytes_per_token, 4),
        "files": len(texts),
        "windows": windows or math.ceil((len(stream) - 1) / length),
        "context": length,
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "cpu"
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or "cpu"


@functools.lru_cache(maxsize=2)
def _tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """The tokenizer that ships with pycode-t, or, for another size, one that is trained now."""
    embedded = EMBEDDED / "pycode-t"
    if (embedded / "tokenizer.json").exists():
        tokenizer = load_tokenizer(embedded)
        if len(tokenizer) == vocab_size:
            return tokenizer
    return train_tokenizer(pycode.texts("train"), vocab_size)


def _encode(
    tokenizer: PreTrainedTokenizerFast, documents: Sequence[str]
) -> list[NDArray[np.int32]]:
    """Token ids of documents; a document that occurs twice is encoded once."""
    distinct = list(dict.fromkeys(documents))
    # The backend does not warn that a file is longer than the context, which is no concern here.
    encodings = tokenizer.backend_tokenizer.encode_batch_fast(distinct, add_special_tokens=False)
    ids = {
        text: np.array(encoding.ids, dtype=np.int32)
        for text, encoding in zip(distinct, encodings, strict=True)
    }
    return [ids[text] for text in documents]


def _is_complete(folder: Path, recipe: Recipe) -> bool:
    path = folder / "recipe.json"
    if not path.exists() or not (folder / "model.safetensors").exists():
        return False
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BrokenFileError(
            f"{str(path)!r} cannot be read ({error}); delete its folder to train again"
        ) from error
    return bool(saved == recipe.as_dict())


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _bar(recipe: Recipe, wanted: bool) -> Iterator[Callable[[Progress], None]]:
    console = Console(stderr=True)
    columns = (
        TextColumn("training {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=console, disable=not (wanted and console.is_terminal)) as bar:
        task = bar.add_task(recipe.name, total=recipe.steps, loss=math.nan)
        yield lambda now: bar.update(task, completed=now.step, loss=now.loss)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train a reference model from the command line.

    Args:
        arguments: Words after the program's name; None takes those of the process.

    Returns:
        Exit code: 0, 2 for a mistake in the request, 130 after Ctrl-C.
    """
    parser = argparse.ArgumentParser(
        prog="python -m isthmus.workbench.reference",
        description="Train a small reference model on the standard library's source.",
    )
    parser.add_argument("name", help=f"one of: {', '.join(RECIPES)}")
    parser.add_argument("--steps", type=int, help="optimiser steps instead of the recipe's")
    parser.add_argument("--out", type=Path, help="folder to publish in instead of the cache")
    parser.add_argument("--snapshots", type=Path, help="folder for the unfinished model")
    parser.add_argument("--snapshot-minutes", type=float, default=10.0)
    given = parser.parse_args(arguments)
    console = Console(stderr=True)
    try:
        if given.name not in RECIPES:
            raise UnknownNameError("reference model", given.name, RECIPES)
        recipe = RECIPES[given.name]
        if given.steps is not None:
            if given.steps < 1:
                raise InvalidInputError(f"--steps is {given.steps}; it must be at least 1")
            recipe = replace(recipe, steps=given.steps)
        folder = given.out or cache_folder() / "reference" / f"{recipe.name}-{fingerprint(recipe)}"
        train(
            recipe,
            folder,
            snapshots=given.snapshots,
            snapshot_every_s=60.0 * given.snapshot_minutes,
        )
    except IsthmusError as error:
        console.print(f"error: {error}", style=None, markup=False, highlight=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on from here", highlight=False)
        return 128 + signal.SIGINT
    Console().print(str(folder), markup=False, highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
