"""Errors that isthmus raises: one tree, one line each, always with what to do next.

The command line prints ``error: <message>`` and exits with code 2 for any of these; a traceback
means a bug in isthmus. Tree::

    IsthmusError
    ├── UnknownNameError      a name that no registry, table or hub knows (nearest names suggested)
    ├── InvalidInputError     a value that is out of range, of the wrong kind or empty
    │   └── DivergedError     a training whose loss or gradient is no finite number any more
    ├── UnsupportedModelError a model that cannot be decoded exactly, with the reason
    ├── MismatchError         two things that must belong together and do not (vocabularies, ...)
    ├── DeadEnd               bans and constraints leave no token to go on with
    ├── BrokenFileError       a file that is missing, truncated, altered or cannot be written
    │   └── DesyncError       a sound file that this model decodes to other symbols than were coded
    └── MissingExtraError     an optional dependency is not installed; names the pip command
"""

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class IsthmusError(Exception):
    """Base of every error that isthmus raises on purpose."""


class UnknownNameError(IsthmusError):
    """A name that nothing answers to.

    Args:
        kind: What was looked up, for example ``"drafter"``.
        name: The name as given.
        known: All names that would have been accepted.
        hint: What else to do, appended to the message.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str = "") -> None:
        self.name = name
        self.known = sorted(known)
        near = difflib.get_close_matches(name, self.known, n=3, cutoff=0.5)
        if near:
            advice = f"did you mean {' or '.join(repr(n) for n in near)}?"
        elif not self.known:
            advice = ""
        elif len(self.known) <= 12:
            advice = f"choose one of: {', '.join(self.known)}"
        else:
            advice = f"there are {len(self.known)} to choose from"
        tail = "; ".join(part for part in (advice, hint) if part)
        super().__init__(f"unknown {kind} {name!r}{'; ' + tail if tail else ''}")


class InvalidInputError(IsthmusError, ValueError):
    """A value out of range, of the wrong kind, or empty."""


class DivergedError(InvalidInputError):
    """A training whose loss or gradient is not finite."""


class UnsupportedModelError(IsthmusError):
    """A model that isthmus cannot decode with an unchanged output; the message says why."""


class MismatchError(IsthmusError):
    """Two things that must belong together do not, for example two vocabularies."""


class DeadEnd(IsthmusError):  # noqa: N818
    """Bans and constraints leave no token to go on with."""


class BrokenFileError(IsthmusError):
    """A file is missing, truncated, altered, or cannot be written."""


class DesyncError(BrokenFileError):
    """Encoder and decoder disagree on the entropy model: the file is sound, its symbols are not."""


class MissingExtraError(IsthmusError, ImportError):
    """An optional dependency is not installed."""


def require(module: str, extra: str) -> ModuleType:
    """Import an optional dependency or say how to install it.

    Args:
        module: Module to import, for example ``"matplotlib.pyplot"``.
        extra: The extra of isthmus that brings it, for example ``"plot"``.

    Returns:
        The imported module.

    Raises:
        MissingExtraError: The module cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"this needs {module.split('.')[0]!r}, which is not installed; "
            f"run: pip install 'isthmus[{extra}]'"
        ) from error
