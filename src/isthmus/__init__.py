"""isthmus: encoder-decoder systems on one grammar.

Importing this package loads neither torch nor any system; names resolve on first use.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from isthmus.api import Model, custom_generate, load
    from isthmus.workbench.coding import decode, encode

__version__ = "0.1.0"
__all__ = ["Model", "__version__", "custom_generate", "decode", "encode", "load"]


def __getattr__(name: str) -> Any:
    if name in ("load", "Model", "custom_generate"):
        from isthmus import api

        return getattr(api, name)
    if name in ("encode", "decode"):
        from isthmus.workbench import coding

        return getattr(coding, name)
    raise AttributeError(f"module 'isthmus' has no attribute {name!r}")
