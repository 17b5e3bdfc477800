"""Stores built from a corpus, kept in the user's cache folder.

The corpus is the training part of :mod:`isthmus.workbench.pycode`, or files of the user's own. A
store belongs to one tokenizer and one corpus and is found again by the fingerprint of both.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from isthmus.decoding.stores import NGramStore, SuffixStore, tokenizer_hash
from isthmus.errors import BrokenFileError, InvalidInputError
from isthmus.folders import cache_folder
from isthmus.workbench import pycode

_Store = TypeVar("_Store", NGramStore, SuffixStore)


def texts(files: Sequence[str | Path] | None = None) -> list[str]:
    """Texts of the given files, or the training part of the pycode corpus.

    Raises:
        InvalidInputError: No file is given, or one is not text.
        BrokenFileError: A file cannot be read.
    """
    if files is None:
        return pycode.texts("train")
    found = []
    for path in map(Path, files):
        try:
            found.append(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            raise InvalidInputError(f"{str(path)!r} is not UTF-8 text") from None
        except OSError as error:
            raise BrokenFileError(f"cannot read {str(path)!r}: {error.strerror or error}") from None
    if not found:
        raise InvalidInputError("a store needs at least one file")
    return found


def encode(tokenizer: Any, documents: Sequence[str], end: int) -> np.ndarray[Any, Any]:
    """Token ids of documents in one row, the token ``end`` after each, int32 [T]."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        encodings = backend.encode_batch_fast(list(documents), add_special_tokens=False)
        rows = [e.ids for e in encodings]
    else:
        rows = [tokenizer.encode(text, add_special_tokens=False) for text in documents]
    parts = [np.array([*row, end], dtype=np.int32) for row in rows]
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int32)


def ngram_store(
    tokenizer: Any,
    vocab_size: int,
    *,
    order: int = 3,
    keep: int = 12,
    files: Sequence[str | Path] | None = None,
) -> NGramStore:
    """The n-gram table of a corpus, built once.

    Args:
        tokenizer: The model's tokenizer.
        vocab_size: Width V of the model's logits.
        order: Tokens of an entry.
        keep: Successors kept for every context.
        files: Text files instead of the pycode corpus.

    Raises:
        InvalidInputError: There is no tokenizer.
    """

    def build(ids: np.ndarray[Any, Any], end: int, mark: str) -> NGramStore:
        return NGramStore.build(ids, vocab_size, order=order, keep=keep, end=end, tokenizer=mark)

    return _cached(NGramStore, build, tokenizer, files, f"{vocab_size}-{order}-{keep}")


def suffix_store(
    tokenizer: Any,
    vocab_size: int,
    *,
    reach: int = 16,
    files: Sequence[str | Path] | None = None,
) -> SuffixStore:
    """The suffix array of a corpus, built once.

    Args:
        tokenizer: The model's tokenizer.
        vocab_size: Width V of the model's logits.
        reach: Longest suffix that can be looked up.
        files: Text files instead of the pycode corpus.

    Raises:
        InvalidInputError: There is no tokenizer.
    """

    def build(ids: np.ndarray[Any, Any], end: int, mark: str) -> SuffixStore:
        return SuffixStore(ids, vocab_size, reach=reach, end=end, tokenizer=mark)

    return _cached(SuffixStore, build, tokenizer, files, f"{vocab_size}-{reach}")


def _cached(
    kind: type[_Store],
    build: Callable[[np.ndarray[Any, Any], int, str], _Store],
    tokenizer: Any,
    files: Sequence[str | Path] | None,
    options: str,
) -> _Store:
    if tokenizer is None:
        raise InvalidInputError("a store of text needs the model's tokenizer, and there is none")
    documents = texts(files)
    state = hashlib.sha256(f"{kind.__name__} {options} {tokenizer_hash(tokenizer)}".encode())
    for text in documents:
        state.update(hashlib.sha256(text.encode()).digest())
    path = cache_folder() / "stores" / f"{kind.__name__.lower()}-{state.hexdigest()[:16]}"
    path = path.with_suffix(".safetensors")
    mark = tokenizer_hash(tokenizer)
    if path.exists():
        return kind.load(path, mark)
    end = tokenizer.eos_token_id
    end = 0 if end is None else int(end)
    store = build(encode(tokenizer, documents, end), end, mark)
    store.save(path)
    return store
