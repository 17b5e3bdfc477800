"""Text in: plain files, JSON lines and folders of them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from isthmus.errors import BrokenFileError, InvalidInputError

SUFFIXES = (".txt", ".md", ".rst", ".py", ".jsonl")
"""What is read from a folder; a file that is named itself may have any suffix."""


def read_texts(paths: Iterable[Path]) -> list[str]:
    """Read the documents of files and folders.

    Args:
        paths: Plain text files (one document each), ``.jsonl`` files (one object with a field
            ``"text"`` a line) and folders, which are searched in name order.

    Returns:
        The documents that are not empty.

    Raises:
        BrokenFileError: A file is missing, is no UTF-8 text, or a line of it is no such object;
            the message names file and line.
        InvalidInputError: There is no document at all.
    """
    documents: list[str] = []
    for path in paths:
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
        else:
            files = [path]
        for file in files:
            documents += _read(file)
    documents = [d for d in documents if d.strip()]
    if not documents:
        raise InvalidInputError(
            f"no text was found; give files, or folders with {', '.join(SUFFIXES)} files"
        )
    return documents


def read_text(path: Path) -> str:
    """A whole text file.

    Raises:
        BrokenFileError: It cannot be read, or is no UTF-8 text; the message names file and line.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise BrokenFileError(f"{path} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        place = path.read_bytes()[: error.start].count(b"\n") + 1
        raise BrokenFileError(f"{path}, line {place}: not UTF-8 text") from error


def _read(path: Path) -> list[str]:
    text = read_text(path)
    if path.suffix != ".jsonl":
        return [text]
    documents = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise BrokenFileError(f"{path}, line {number}: not JSON") from error
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise BrokenFileError(f'{path}, line {number}: needs a field "text" with a string')
        documents.append(record["text"])
    return documents
