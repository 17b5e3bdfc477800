"""Where isthmus keeps what it can make again."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """The cache folder: ``ISTHMUS_CACHE``, else ``isthmus`` in the user's cache folder."""
    own = os.environ.get("ISTHMUS_CACHE")
    if own:
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "isthmus"
