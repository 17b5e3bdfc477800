"""Where isthmus keeps what it can make again, and how folders are written as a whole."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

from isthmus.errors import BrokenFileError, InvalidInputError

EMBEDDED = Path(__file__).parent / "workbench" / "embedded"
"""Folder of the models that come with isthmus."""


def cache_folder() -> Path:
    """The cache folder: ``ISTHMUS_CACHE``, else ``isthmus`` in the user's cache folder."""
    own = os.environ.get("ISTHMUS_CACHE")
    if own:
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "isthmus"


@contextmanager
def kept(kind: str, name: str, key: Any) -> Iterator[Path]:
    """The place in the cache of something that can be made again, locked while it may be made.

    Args:
        kind: Folder of the cache, for example ``"drafters"``.
        name: What it is, for people.
        key: All that it depends on, as plain data: equal keys, equal places.

    Yields:
        The folder, which may not be there yet.

    Raises:
        BrokenFileError: The cache folder cannot be written.
    """
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    folder = cache_folder() / kind / f"{name}-{digest[:12]}"
    lock = FileLock(folder.with_name(f"{folder.name}.lock"))
    with writable(folder.parent):
        lock.acquire()
    try:
        yield folder
    finally:
        lock.release()


def check_replaceable(folder: Path, marks: Sequence[str], kind: str) -> None:
    """Refuse a folder whose loss would be felt.

    Args:
        folder: What is about to be replaced.
        marks: Files that only something of this kind has.
        kind: What may be replaced, for the message.

    Raises:
        InvalidInputError: It holds files and none of the marks, or is a file.
    """
    if folder.is_dir():
        if any(folder.iterdir()) and not any((folder / mark).exists() for mark in marks):
            raise InvalidInputError(
                f"{folder} holds something that is no {kind}; choose a new folder"
            )
    elif folder.exists():
        raise InvalidInputError(f"{folder} is a file; choose a new folder")


def read_record(path: Path, fields: Sequence[str], kind: str) -> dict[str, Any]:
    """The JSON object that describes what ``isthmus train`` wrote into a folder.

    Args:
        path: The file.
        fields: What it must have.
        kind: What it describes, for messages.

    Raises:
        BrokenFileError: It is missing or damaged.
    """
    try:
        record = json.loads(path.read_text())
    except OSError as error:
        raise BrokenFileError(
            f"{path.parent} holds no {path.name}; give a folder made by isthmus train"
        ) from error
    except ValueError:
        record = None
    if not isinstance(record, dict) or not set(fields) <= set(record):
        raise BrokenFileError(f"{path} is damaged; train the {kind} again")
    return record


def digest(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def temporary(path: Path) -> Path:
    """Where a file is written before it takes its name; links are followed and stay links."""
    path = Path(os.path.realpath(path))
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def replace_text(path: Path, text: str) -> None:
    """Write a file as a whole: whoever reads it meanwhile sees the old one.

    Raises:
        BrokenFileError: It cannot be written.
    """
    part = temporary(path)
    try:
        with part.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(os.path.realpath(path))
    except OSError as error:
        raise BrokenFileError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


@contextmanager
def writable(folder: Path) -> Iterator[None]:
    """Make a folder, and turn an operating-system refusal inside the block into one line.

    Raises:
        BrokenFileError: It cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise BrokenFileError(
            f"{folder} cannot be written ({error.strerror or error}); set ISTHMUS_CACHE, or give "
            "another folder that can be written"
        ) from error


@contextmanager
def published(folder: Path) -> Iterator[Path]:
    """A new folder that takes the place of another as a whole, once the block has ended well.

    Args:
        folder: Where to; an interrupted block leaves what was there.

    Yields:
        The folder to write in, beside it.

    Raises:
        BrokenFileError: It cannot be written.
    """
    with writable(folder.parent):
        new = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        old = new.with_name(f"{new.name}.old")
        try:
            yield new
            # temporary folders and safetensors files are private; the result need not be
            new.chmod(0o755)
            for path in new.iterdir():
                if path.is_file():
                    path.chmod(0o644)
            if folder.exists():
                folder.rename(old)
            new.rename(folder)
        finally:
            if old.exists() and not folder.exists():
                old.rename(folder)  # the last step failed
            shutil.rmtree(new, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)
