"""The house of many floors: each imports only from its own floor and those below."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import isthmus
from isthmus import registry
from making import MakeSystem

PACKAGE = Path(isthmus.__file__).parent

FLOORS = [
    ["signals", "nn", "roles", "registry", "errors", "folders", "settings", "cluster"],
    ["models", "objectives", "metrics"],
    ["training", "decoding", "codecs", "indexes", "lenses", "surgery", "laws"],
    ["workbench", "claims", "testing"],
    ["systems"],
    ["cli", "serving", "api", "__main__"],
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}

#: Files are safetensors and JSON; these readers run code that a file brings along.
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNSAFE_CALLS = {("torch", "load"), ("torch", "save"), ("np", "load"), ("numpy", "load")}


def module_parts(path: Path, package: Path) -> list[str]:
    """Dotted name of a file below the package, without the leading ``isthmus``."""
    return list(path.relative_to(package).with_suffix("").parts)


def for_types(tree: ast.Module) -> Iterator[ast.AST]:
    """Everything under ``if TYPE_CHECKING:``, which never runs."""
    for node in tree.body:
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for statement in node.body:
                yield from ast.walk(statement)


def imports(path: Path, package: Path) -> Iterator[tuple[int, list[str]]]:
    """Line and target of every import of isthmus in a file, wherever in the file it stands."""
    parts = module_parts(path, package)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    # The grammar names, in its annotations alone, things that floors above it make.
    spared = set(for_types(tree)) if parts == ["roles"] else set()
    for node in ast.walk(tree):
        targets: list[str] = []
        if node in spared:
            continue
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                inside = ["isthmus", *parts[:-1]]
                inside = inside[: len(inside) - (node.level - 1)]
                base = ".".join([*inside, *([node.module] if node.module else [])])
            targets = [f"{base}.{alias.name}" for alias in node.names]
        elif (
            isinstance(node, ast.Call)
            and (getattr(node.func, "attr", "") or getattr(node.func, "id", ""))
            in ("import_module", "__import__")
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            targets = [str(node.args[0].value)]
        for target in targets:
            words = target.split(".")
            if words[0] == "isthmus":
                yield node.lineno, words[1:]


def top_level(target: list[str], package: Path) -> str:
    """The part of the house that an import leads to; lazy names of the package lead to its API."""
    if not target or target[0].startswith("__version"):
        return ""
    name = target[0]
    if (package / name).is_dir() or (package / f"{name}.py").exists() or name in FLOOR:
        return name
    return "api"


def violations(package: Path) -> list[str]:
    """Everything in a package that breaks the rules of the house, one line each."""
    found = []
    for path in sorted(package.rglob("*.py")):
        parts = module_parts(path, package)
        where = path.relative_to(package)
        if parts == ["__init__"]:
            continue
        if parts[0] not in FLOOR:
            found.append(f"{where}: {parts[0]!r} stands on no floor; give it one in FLOORS")
            continue
        for line, target in imports(path, package):
            name = top_level(target, package)
            if not name:
                continue
            if FLOOR.get(name, -1) > FLOOR[parts[0]]:
                found.append(f"{where}:{line}: imports isthmus.{name} from a floor above")
            if parts[0] == "systems" and name == "systems" and len(parts) == 3:
                found.append(f"{where}:{line}: a system imports from another system")
    return found


def unsafe(package: Path) -> list[str]:
    """Every place that reads or writes a format which can run code."""
    found = []
    for path in sorted(package.rglob("*.py")):
        where = path.relative_to(package)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
                if (node.module, "load") in UNSAFE_CALLS:
                    names += [a.name for a in node.names if a.name in ("load", "save")]
            bad = {
                name for name in names if name.split(".")[0] in UNSAFE_MODULES | {"load", "save"}
            }
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and (node.value.id, node.attr) in UNSAFE_CALLS
            ):
                bad.add(f"{node.value.id}.{node.attr}")
            found += [f"{where}:{node.lineno}: {name}" for name in sorted(bad)]
    return found


def test_imports_lead_downward() -> None:
    assert violations(PACKAGE) == []


def test_no_unsafe_files() -> None:
    assert unsafe(PACKAGE) == []


@pytest.mark.parametrize(
    ("path", "code", "found"),
    [
        ("registry.py", "from isthmus.claims import Claim", "a floor above"),
        ("registry.py", "def f():\n    from isthmus import claims", "a floor above"),
        ("nn/part.py", "from ..models import hub", "a floor above"),
        ("nn/part.py", "from .. import decoding", "a floor above"),
        ("nn/deep/part.py", "from ...models.hub import x", "a floor above"),
        ("decoding/loop.py", "import isthmus.workbench.pycode as p", "a floor above"),
        ("decoding/loop.py", "from isthmus import load", "a floor above"),
        ("decoding/loop.py", "import importlib\nimportlib.import_module('isthmus.api')", "above"),
        ("nn/part.py", "if TYPE_CHECKING:\n    from isthmus.decoding import x", "a floor above"),
        ("roles.py", "from isthmus.decoding import x", "a floor above"),
        ("roles.py", "if TYPE_CHECKING:\n    from isthmus.decoding import x", None),
        ("systems/a/one.py", "from isthmus.systems.a.two import Two", "another system"),
        ("systems/a/one.py", "from .two import Two", "another system"),
        ("systems/a/one.py", "from isthmus.cli import main", "a floor above"),
        ("attic.py", "", "stands on no floor"),
        ("claims.py", "from isthmus import __version__\nfrom isthmus.errors import x", None),
        ("decoding/loop.py", "from isthmus.surgery import x\nfrom . import tree", None),
        ("cli/main.py", "from isthmus.systems.a.one import One\nfrom isthmus import load", None),
        ("__init__.py", "from isthmus.api import load", None),
    ],
)
def test_the_check_sees_a_planted_import(
    tmp_path: Path, path: str, code: str, found: str | None
) -> None:
    file = tmp_path / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(code)
    lines = violations(tmp_path)
    assert len(lines) == (found is not None), lines
    assert found is None or found in lines[0]


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "def f():\n    import pickle as p",
        "from pickle import loads",
        "import torch\ntorch.load('x')",
        "from torch import load",
        "import numpy as np\nnp.load('x')",
    ],
)
def test_the_check_sees_a_planted_pickle(tmp_path: Path, code: str) -> None:
    (tmp_path / "x.py").write_text(code)
    assert len(unsafe(tmp_path)) == 1


def test_import_isthmus_is_light() -> None:
    code = "import sys, isthmus; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(run.stdout.split())
    assert not {"torch", "transformers", "numpy"} & loaded
    assert not [name for name in loaded if name.startswith("isthmus.")]


def test_an_unknown_name_of_the_package() -> None:
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        isthmus.lode  # noqa: B018


def test_every_system_has_its_header_and_its_class() -> None:
    for info in registry.systems():
        assert registry.load(info.slug).__name__ == info.class_name
        assert callable(getattr(registry.load_module(info), "claim", None)), (
            f"{info.path.name} has no claim(ruler, scale)"
        )


def test_every_system_is_of_one_sitting() -> None:
    for info in registry.systems():
        lines = len(info.path.read_text(encoding="utf-8").splitlines())
        assert lines <= 400, f"{info.path.name} has {lines} lines: a part is hiding in it"


def test_the_walk_over_systems_can_fail(systems_root: Path, make_system: MakeSystem) -> None:
    make_system("made-up", name="Another")
    with pytest.raises(registry.InvalidInputError):
        registry.load("made-up", root=systems_root)
