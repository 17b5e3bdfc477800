"""Types of what the fixtures make."""

from collections.abc import Callable
from pathlib import Path

MakeSystem = Callable[..., Path]
