"""Other decoding engines on the same bench, each in a Python environment of its own.

::

    checkpoint ─▶ the peer's own converter ─▶ its engine in a worker process
    prompt ids ─▶ JSON line ─▶ worker (loads once, decodes, looks at the clock) ─▶ JSON line

An environment lies in the user cache folder and is made on an explicit command only
(:func:`install`); :mod:`isthmus.workbench.peer_worker` is what runs in it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Self

from isthmus.errors import InvalidInputError, IsthmusError, UnknownNameError
from isthmus.folders import cache_folder, writable
from isthmus.workbench import peer_worker

WORKER = Path(peer_worker.__file__)

_TORCH = "torch>=2.11,<2.14"


@dataclass(frozen=True)
class Peer:
    """An engine that is installed apart.

    Attributes:
        name: The engine.
        requirements: What pip installs into its environment, converter included.
        precisions: Numbers it decodes with, the most exact first.
        module: What it is imported as.
    """

    name: str
    requirements: tuple[str, ...]
    precisions: tuple[str, ...]
    module: str = ""


_ALL = (
    # 16-bit numbers need AVX-512 or AMX there and become float32 in silence elsewhere
    Peer(
        "ctranslate2",
        ("ctranslate2>=4.8,<5", "transformers>=5,<6", _TORCH),
        ("float32", "int8"),
        "ctranslate2",
    ),
    Peer(
        "openvino",
        ("openvino-genai>=2026.4", "optimum-intel[openvino]>=2.2", _TORCH),
        ("float32", "float16", "int8"),
    ),
    Peer(
        "llama.cpp",
        ("llama-cpp-python>=0.3.36", "gguf>=0.19"),
        ("float32", "bfloat16", "float16", "int8"),
    ),
)

ENGINES: Mapping[str, Peer] = MappingProxyType({peer.name: peer for peer in _ALL})
"""All peers by name."""


def environment(name: str) -> Path:
    """Folder of a peer's environment, which may not be there yet.

    Raises:
        UnknownNameError: No such peer.
    """
    if name not in ENGINES:
        raise UnknownNameError("peer", name, ENGINES)
    return cache_folder() / "peers" / name


def python(name: str) -> Path:
    """The Python of an installed peer.

    Raises:
        UnknownNameError: No such peer.
        InvalidInputError: It is not installed; the message holds the command.
    """
    folder = environment(name)
    if not (folder / "installed.json").exists():
        raise InvalidInputError(
            f"{name} is not installed; run: isthmus bench peers --install {name}"
        )
    return _python(folder)


def available(name: str) -> bool:
    """Whether a peer can run: in an environment of its own, or beside this package.

    Raises:
        UnknownNameError: No such peer.
    """
    return (environment(name) / "installed.json").exists() or _beside(name)


def interpreter_of(name: str) -> Path:
    """The Python that a peer runs in: its own where it has one, else this one if it is there.

    Raises:
        UnknownNameError: No such peer.
        InvalidInputError: It is not installed; the message holds the command.
    """
    if not (environment(name) / "installed.json").exists() and _beside(name):
        return Path(sys.executable)
    return python(name)


def _beside(name: str) -> bool:
    module = ENGINES[name].module
    return bool(module) and importlib.util.find_spec(module) is not None


def installed() -> list[str]:
    """Names of the peers that are installed."""
    return [name for name in ENGINES if (environment(name) / "installed.json").exists()]


def install(name: str) -> None:
    """Make a peer's environment with pip, from its beginning; pip speaks on standard error.

    Args:
        name: A name in :data:`ENGINES`.

    Raises:
        UnknownNameError: No such peer.
        BrokenFileError: The cache folder cannot be written.
        IsthmusError: pip could not install it.
    """
    folder, peer = environment(name), ENGINES[name]
    mark = folder / "installed.json"
    with writable(folder):
        mark.unlink(missing_ok=True)
    steps = (
        [sys.executable, "-m", "venv", "--clear", str(folder)],
        [str(_python(folder)), "-m", "pip", "install", *peer.requirements],
    )
    for step in steps:
        done = subprocess.run(step, stdout=sys.stderr, check=False)
        if done.returncode:
            raise IsthmusError(
                f"{name} could not be installed (exit code {done.returncode}, see above); "
                f"the command was: {' '.join(step)}"
            )
    with writable(folder):
        mark.write_text(json.dumps(asdict(peer), indent=2) + "\n", encoding="utf-8")


def parse(method: str) -> tuple[str, str] | None:
    """Engine and precision that a method's name asks for; None when it names no peer.

    Raises:
        UnknownNameError: The engine has no such precision.

    Example:
        >>> parse("ctranslate2 int8"), parse("openvino"), parse("prompt-lookup")
        (('ctranslate2', 'int8'), ('openvino', 'float32'), None)
    """
    name, _, precision = method.partition(" ")
    if name not in ENGINES:
        return None
    known = ENGINES[name].precisions
    if precision and precision not in known:
        raise UnknownNameError(f"precision of {name}", precision, known)
    return name, precision or known[0]


def methods(dtype: str) -> list[str]:
    """The installed peers as methods of a bench: the precision class of ``dtype``, then int8.

    Args:
        dtype: Numbers of the model that they are compared with. A peer without 16-bit numbers
            takes float32 instead.
    """
    wide = {"bfloat16": ("bfloat16", "float16"), "float16": ("float16",)}.get(dtype, ())
    chosen = []
    for name in installed():
        known = ENGINES[name].precisions
        first = next((p for p in wide if p in known), known[0])
        chosen += [f"{name} {first}", f"{name} int8"]
    return chosen


class Worker:
    """A peer's process: the engine is loaded once and decodes one prompt after the other.

    Args:
        engine: A name in :data:`ENGINES`, or ``"transformers"``.
        precision: Numbers it decodes with.
        checkpoint: Folder of a transformers checkpoint.
        threads: Threads it may use.
        interpreter: The Python it runs in; the peer's own when None.
        task: ``"generate"`` continues prompts, ``"translate"`` reads sources.

    Attributes:
        about: The engine's package and version.

    Raises:
        InvalidInputError: The peer is not installed, or ``checkpoint`` is no folder.
        IsthmusError: The peer could not load the checkpoint; the message is the peer's own.
    """

    def __init__(
        self,
        engine: str,
        precision: str,
        checkpoint: Path,
        *,
        threads: int,
        interpreter: Path | None = None,
        task: Literal["generate", "translate"] = "generate",
    ) -> None:
        self.name = f"{engine} {precision}"
        if interpreter is None:
            interpreter = python(engine) if task == "generate" else interpreter_of(engine)
        export = cache_folder() / "exports" / _digest(checkpoint) / f"{engine}-{precision}"
        self._errors = tempfile.TemporaryFile(  # noqa: SIM115 - close() closes it
            "w+", encoding="utf-8", errors="replace"
        )
        self._process = subprocess.Popen(
            # isolated: neither this package's path nor its neighbours' names reach the peer
            [str(interpreter), "-I", str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            encoding="utf-8",
            env=os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"},
        )
        try:
            answer = self._ask(
                engine=engine,
                precision=precision,
                checkpoint=str(checkpoint.resolve()),
                export=str(export),
                threads=threads,
                task=task,
            )
        except BaseException:
            self.close()
            raise
        self.about: str = answer["about"]

    def generate(self, prompt: list[int], max_new_tokens: int) -> tuple[list[int], float]:
        """Decode one prompt greedily, end tokens like any other.

        Returns:
            The new tokens, and the seconds that passed inside the worker.

        Raises:
            IsthmusError: The peer failed; the message is its own.
        """
        answer = self._ask(prompt=prompt, max_new_tokens=max_new_tokens)
        return answer["tokens"], answer["seconds"]

    def translate(
        self, batches: Sequence[Sequence[Sequence[int]]], new_tokens: int
    ) -> tuple[list[list[int]], list[float]]:
        """Translate batches of sources greedily, end tokens like any other.

        Args:
            batches: Source ids of sentences, in batches.
            new_tokens: Tokens of every translation.

        Returns:
            Target ids of all sentences, and the seconds of each batch inside the worker.

        Raises:
            IsthmusError: The peer failed; the message is its own.
        """
        answer = self._ask(batches=batches, max_new_tokens=new_tokens)
        return answer["tokens"], answer["seconds"]

    def close(self) -> None:
        """End the process."""
        process = self._process
        for pipe in (process.stdin, process.stdout):
            if pipe is not None and not pipe.closed:
                with contextlib.suppress(BrokenPipeError):  # it is gone already
                    pipe.close()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._errors.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise IsthmusError(
                f"{self.name} ended in the middle of its work (exit code {self._process.wait()}"
                f"{self._last_words()})"
            )
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise IsthmusError(f"{self.name} failed: {' '.join(answer['error'].split())}")
        return answer

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        return f"; {lines[-1]}" if lines else ""


def _python(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def _digest(checkpoint: Path) -> str:
    """Name of a checkpoint's contents.

    Raises:
        InvalidInputError: It is no folder with a config and weights.
    """
    files = [checkpoint / "config.json", *sorted(checkpoint.glob("*.safetensors"))]
    if len(files) < 2 or not files[0].exists():
        raise InvalidInputError(
            f"peers decode the folder of a checkpoint with config.json and safetensors files, and "
            f"{str(checkpoint)!r} is none"
        )
    state = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            state.update(hashlib.file_digest(file, "sha256").digest())
    return state.hexdigest()[:12]
