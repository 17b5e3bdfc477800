"""Every example in a docstring runs against the isthmus that is installed."""

import doctest
import importlib
from pathlib import Path

import pytest

import isthmus
from isthmus.errors import MissingExtraError

PACKAGE = Path(isthmus.__file__).parent


def module_names() -> list[str]:
    """All modules of the package, read from its files so that collecting imports nothing."""
    names = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = ["isthmus", *path.relative_to(PACKAGE).with_suffix("").parts]
        names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return [name for name in names if not name.endswith("__main__")]


@pytest.mark.parametrize("name", module_names())
def test_examples(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except MissingExtraError as error:
        pytest.skip(str(error))
    failed, _ = doctest.testmod(module, optionflags=doctest.ELLIPSIS, report=True)
    assert failed == 0, f"{failed} examples of {name} fail; their output is above"
