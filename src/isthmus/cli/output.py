"""What all commands print through: tables for people, one JSON object for programs."""

import json
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

#: Columns of a table that goes to a file or a pipe, where no terminal gives a width.
PIPED_WIDTH = 160


def console(*, stderr: bool = False) -> "Console":
    """A console for tables and progress.

    Args:
        stderr: Write to standard error instead of standard output.

    Returns:
        A console as wide as the terminal, or wide enough for tables where there is none.
    """
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(
        stderr=stderr, width=None if stream.isatty() else PIPED_WIDTH, highlight=False, markup=False
    )


def print_json(values: dict[str, Any]) -> None:
    """Write one JSON object to standard output.

    Args:
        values: The object.
    """
    print(json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False))


def print_error(message: object) -> None:
    """Write one line to standard error.

    Args:
        message: What went wrong and what to do; line breaks in it become spaces.
    """
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)


def quiet_transformers() -> None:
    """Silence notes of transformers about a model: they are not for the user of a command."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
