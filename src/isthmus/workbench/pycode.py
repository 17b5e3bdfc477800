"""The `pycode` data set: the Python source of the running interpreter's standard library.

Every Python carries about ten megabytes of well-written code (and, where its tests are installed,
seventeen more), so a language model can be trained and measured without a network. A file belongs
to the held-out part when a hash of its path says so: the same files are held out on every machine
and under every Python that has them. Test modules are only ever trained on.

Between two Python versions a file can move (``datetime.py`` became ``_pydatetime.py``); a model
trained under one version may then have seen, under another name, a file that is held out under the
other. Numbers in one table therefore name the corpus digest they were measured on.
"""

import ast
import functools
import hashlib
import os
import random
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Literal, Protocol

from isthmus.errors import InvalidInputError, IsthmusError

Split = Literal["train", "held-out"]

HELD_OUT_PERCENT = 5
_MIN_CHARACTERS = 200
_MAX_DIGIT_SHARE = 0.15
_MAX_NON_ASCII_SHARE = 0.02
_NO_DIGITS = str.maketrans("", "", "0123456789")
_FOREIGN = {"site-packages", "dist-packages", "__pycache__", "turtledemo", "encodings"}
_FOREIGN |= {"pydoc_data", "lib-dynload", "ensurepip"}
_TEST_PARTS = {"test", "tests", "idle_test", "_test"}


class Encoder(Protocol):
    """What `prompts` needs of a tokenizer: text to ids, without special tokens."""

    def encode(self, text: str, *, add_special_tokens: bool = ...) -> list[int]:
        """Return the token ids of ``text``."""
        ...


def _root() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _is_test(path: PurePosixPath) -> bool:
    return any(part in _TEST_PARTS for part in path.parts)


def _is_wanted(path: PurePosixPath) -> bool:
    if any(part in _FOREIGN or part.startswith("config-") for part in path.parts):
        return False
    if path.name.startswith("_sysconfigdata"):
        return False
    if _is_test(path):
        # Sources that are wrong on purpose, to test that a parser says so.
        return not (path.name.startswith("bad") or "data" in path.parts)
    return True


def _is_held_out(path: PurePosixPath) -> bool:
    if _is_test(path):
        return False
    value = hashlib.sha256(f"pycode/{path.as_posix()}".encode()).digest()
    return int.from_bytes(value[:8], "big") % 100 < HELD_OUT_PERCENT


def _read(path: Path) -> str | None:
    """Text of a source file, or None for one that is no prose-like code."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    if len(text) < _MIN_CHARACTERS or "\0" in text:
        return None
    digits = len(text) - len(text.translate(_NO_DIGITS))
    foreign = 0 if text.isascii() else sum(character > "\x7f" for character in text)
    if digits > _MAX_DIGIT_SHARE * len(text) or foreign > _MAX_NON_ASCII_SHARE * len(text):
        return None
    return text


@functools.lru_cache(maxsize=1)
def _corpus() -> dict[PurePosixPath, str]:
    root = _root()
    found: dict[PurePosixPath, str] = {}
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in _FOREIGN]
        for path in (Path(folder, name) for name in names if name.endswith(".py")):
            relative = PurePosixPath(path.relative_to(root).as_posix())
            if _is_wanted(relative) and (text := _read(path)) is not None:
                found[relative] = text
    if sum(not _is_test(path) for path in found) < 100:
        raise IsthmusError(
            f"the data set pycode is the standard library's source, and {str(root)!r} holds none; "
            "run isthmus under a Python that is installed with its .py files"
        )
    return dict(sorted(found.items(), key=lambda item: item[0].as_posix()))


def _select(split: Split) -> Iterator[PurePosixPath]:
    if split not in ("train", "held-out"):
        raise InvalidInputError(f"split is {split!r}; it must be 'train' or 'held-out'")
    return (path for path in _corpus() if _is_held_out(path) == (split == "held-out"))


def files(split: Split) -> list[PurePosixPath]:
    """Paths of a split, relative to the standard library's folder, in a fixed order.

    Args:
        split: ``"train"`` or ``"held-out"`` (about 5 % of the modules that are no tests).

    Returns:
        Posix paths, sorted.

    Raises:
        InvalidInputError: ``split`` is neither of the two.
        IsthmusError: This interpreter has no standard-library source.
    """
    return list(_select(split))


def texts(split: Split) -> list[str]:
    r"""Contents of `files`, in the same order, line ends as ``\n``.

    Args:
        split: ``"train"`` or ``"held-out"``.

    Returns:
        One string per file.

    Raises:
        InvalidInputError: ``split`` is neither of the two.
        IsthmusError: This interpreter has no standard-library source.
    """
    corpus = _corpus()
    return [corpus[path] for path in _select(split)]


def modules() -> dict[PurePosixPath, str]:
    """Path and text of every module that is no test, of both splits, in a fixed order.

    Raises:
        IsthmusError: This interpreter has no standard-library source.
    """
    return {path: text for path, text in _corpus().items() if not _is_test(path)}


def training_texts(library_repeats: int) -> list[str]:
    """Documents of one epoch of training, modules repeated, tests once.

    Tests outweigh the modules about two to one and are more monotonous, so a short training run
    is better spent on modules.

    Args:
        library_repeats: How often each module that is no test appears, at least 1.

    Returns:
        One string per document, in a fixed order.
    """
    corpus = _corpus()
    repeated = [
        [corpus[path]] * (1 if _is_test(path) else library_repeats) for path in _select("train")
    ]
    return [text for group in repeated for text in group]


def digest() -> str:
    """Hash of all paths and contents of both splits (64 hexadecimal digits).

    Returns:
        The SHA-256 of the corpus; two machines with the same digest have the same data.

    Raises:
        IsthmusError: This interpreter has no standard-library source.
    """
    state = hashlib.sha256()
    for path, text in _corpus().items():
        body = text.encode()
        state.update(f"{path.as_posix()} {len(body)}\n".encode())
        state.update(body)
    return state.hexdigest()


def prompts(
    count: int,
    tokenizer: Encoder,
    prompt_tokens: int = 96,
    seed: int = 0,
    *,
    prose: bool = False,
) -> list[list[int]]:
    """Prompts from held-out files, each beginning at a line start.

    Args:
        count: How many prompts, at least 1.
        tokenizer: Any tokenizer with the ``encode`` of transformers.
        prompt_tokens: Length of each prompt in tokens, at least 1.
        seed: Other seeds give other prompts.
        prose: Prompts from inside docstrings instead of anywhere in a file.

    Returns:
        ``count`` lists of ``prompt_tokens`` ids. No file is used a second time before every file
        that is long enough has been used once.

    Raises:
        InvalidInputError: A number is below 1, or no held-out file is long enough.
        IsthmusError: This interpreter has no standard-library source.
    """
    if count < 1 or prompt_tokens < 1:
        raise InvalidInputError(
            f"count is {count} and prompt_tokens is {prompt_tokens}; both must be at least 1"
        )
    rng = random.Random(seed)
    documents = texts("held-out")
    if prose:
        documents = [words for text in documents for words in docstrings(text)]
    rng.shuffle(documents)
    longest = 16 * prompt_tokens  # Characters; far more than twice the tokens asked for.
    chosen: list[list[int]] = []
    while len(chosen) < count:
        before = len(chosen)
        for text in documents:
            starts = _line_starts(text)
            start = starts[rng.randrange(len(starts))]
            ids = tokenizer.encode(text[start : start + longest], add_special_tokens=False)
            if len(ids) >= 2 * prompt_tokens:  # As much again, to compare a continuation with.
                chosen.append(ids[:prompt_tokens])
            if len(chosen) == count:
                break
        if len(chosen) == before:
            raise InvalidInputError(
                f"no held-out file is long enough for prompts of {prompt_tokens} tokens"
            )
    return chosen


def docstrings(text: str) -> list[str]:
    r"""Docstrings of a Python source text, in order.

    Example:
        >>> docstrings('def f():\n    "Words."\n')
        ['Words.']
    """
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
    return [words for words in found if words]


def _line_starts(text: str) -> Sequence[int]:
    """Offsets of lines in the first two thirds of a text that are not blank."""
    offsets, position = [0], 0
    for line in text.splitlines(keepends=True):
        if line.strip() and position <= 2 * len(text) // 3:
            offsets.append(position)
        position += len(line)
    return offsets
