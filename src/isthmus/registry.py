"""Which systems exist, read from their files without importing them.

A system is one file, ``systems/<family>/<slug_with_underscores>.py``, and that file is its whole
registration. Its module docstring opens with a title line and carries a header of fixed lines::

    Paper: authors, title, year, arXiv id
    Idea: one line
    Differs: what was left out or changed, and why
    Lossless: yes

``Lossless:`` is optional: systems of the family ``speculative`` are lossless unless they say
``no``; for other families the word has no meaning unless it is given. A value may go on in
indented lines. One rule of names holds: slug ``token-recycling`` = file ``token_recycling.py`` =
class ``TokenRecycling``.

>>> class_name("return-of-the-encoder")
'ReturnOfTheEncoder'
"""

import difflib
import hashlib
import importlib
import importlib.util
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from isthmus.errors import InvalidInputError, UnknownNameError

__all__ = [
    "HEADER",
    "SystemInfo",
    "class_name",
    "families",
    "find",
    "load",
    "read_header",
    "slugs",
    "systems",
]

#: Folder whose subfolders are the families.
ROOT = Path(__file__).parent / "systems"

#: The header lines in their order; the last one is optional.
HEADER = ("Paper", "Idea", "Differs", "Lossless")

_REQUIRED = HEADER[:3]
_HEAD_CHARS = 8192
_OPENING = re.compile(r'(?:[ \t]*(?:#[^\n]*)?\n)*[rR]?("""|\'\'\')')
_KEY = re.compile(r"([A-Z][A-Za-z]+):[ \t]*(.*)")
_ARXIV = re.compile(r"\b(\d{4}\.\d{4,5}|[a-z]+(?:-[a-z]+)?(?:\.[A-Z]{2})?/\d{7})(?:v\d+)?\b")
_YEAR = re.compile(r"\b(?:19|20)\d{2}\b")
_FILE_NAME = re.compile(r"[a-z][a-z0-9]*(?:_[a-z0-9]+)*")


@dataclass(frozen=True)
class SystemInfo:
    """What the header of one system says.

    Attributes:
        slug: Name used by people and on the command line, for example ``"token-recycling"``.
        family: Name of the folder the file lies in.
        class_name: The class that the file must define.
        module: Name the module has once it is imported.
        path: The file.
        title: First line of the docstring, without its full stop.
        paper: Authors, title, year and arXiv id in one line.
        arxiv: The arXiv id without version, or ``""`` where the paper has none.
        year: Year of publication.
        idea: The idea in one line.
        differs: What was left out or changed against the paper, and why.
        lossless: Whether the output law is the plain target's; None where that is no question.
    """

    slug: str
    family: str
    class_name: str
    module: str
    path: Path
    title: str
    paper: str
    arxiv: str
    year: int
    idea: str
    differs: str
    lossless: bool | None


def class_name(slug: str) -> str:
    """Name of the class that a slug stands for.

    Args:
        slug: Lower-case words and digits joined by hyphens.

    Returns:
        The words joined, each with a capital first letter.
    """
    return "".join(word[:1].upper() + word[1:] for word in slug.split("-"))


def families(*, root: Path | None = None) -> list[str]:
    """Names of the families, sorted.

    Args:
        root: Folder to look in instead of the one inside the package.

    Returns:
        The folders that hold at least one system.
    """
    return sorted({path.parent.name for path in _files(root)})


def systems(family: str | None = None, *, root: Path | None = None) -> list[SystemInfo]:
    """All systems, or those of one family, sorted by family and slug.

    Args:
        family: Family to keep; None keeps all.
        root: Folder to look in instead of the one inside the package.

    Returns:
        One entry per file; nothing is imported.

    Raises:
        UnknownNameError: No such family.
        InvalidInputError: A file's header or name is malformed, or two files share a slug.
    """
    paths = list(_files(root))
    if family is not None:
        known = {path.parent.name for path in paths}
        if family not in known:
            raise UnknownNameError("family", family, known)
        paths = [path for path in paths if path.parent.name == family]
    seen: dict[str, Path] = {}
    for path in paths:
        twin = seen.setdefault(path.stem, path)
        if twin is not path:
            raise InvalidInputError(f"two systems share one name: {twin} and {path}; rename one")
    package = _package(root)
    return [_info(path, package) for path in paths]


def slugs(family: str, *, root: Path | None = None) -> list[str]:
    """Names of the systems of one family, sorted; no file is read.

    Args:
        family: Name of the folder; one without systems has no names.
        root: Folder to look in instead of the one inside the package.
    """
    found = (path for path in _files(root) if path.parent.name == family)
    return [path.stem.replace("_", "-") for path in found]


def find(slug: str, *, root: Path | None = None) -> SystemInfo:
    """Look one system up; only its own file is read.

    Args:
        slug: Name of the system; underscores are accepted for hyphens.
        root: Folder to look in instead of the one inside the package.

    Returns:
        Its entry.

    Raises:
        UnknownNameError: No such system; the message offers the nearest names.
        InvalidInputError: Its header is malformed.
    """
    stem = slug.strip().lower().replace("-", "_")
    paths = list(_files(root))
    for path in paths:
        if path.stem == stem:
            return _info(path, _package(root))
    known = [path.stem.replace("_", "-") for path in paths]
    raise UnknownNameError("system", slug, known, "(list them with: isthmus systems)")


def load(slug: str, *, root: Path | None = None) -> type:
    """Import a system and return its class.

    Args:
        slug: Name of the system.
        root: Folder to look in instead of the one inside the package.

    Returns:
        The class that carries the system's name.

    Raises:
        UnknownNameError: No such system.
        InvalidInputError: Its header is malformed, or the module lacks the class its name demands.
    """
    info = find(slug, root=root)
    found = getattr(load_module(info), info.class_name, None)
    if not isinstance(found, type):
        raise InvalidInputError(
            f"{info.path} must define class {info.class_name}, the name that its slug "
            f"{info.slug!r} stands for"
        )
    return found


def load_module(info: SystemInfo) -> ModuleType:
    """Import the module of a system.

    Args:
        info: An entry of :func:`systems` or :func:`find`.

    Returns:
        The module, imported once however often it is asked for.
    """
    if info.module.startswith("isthmus."):
        return importlib.import_module(info.module)
    if info.module in sys.modules:
        return sys.modules[info.module]
    spec = importlib.util.spec_from_file_location(info.module, info.path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by name while it is still being executed.
    sys.modules[info.module] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[info.module]
        raise
    return module


def read_header(path: Path) -> tuple[str, dict[str, str]]:
    """Read the title and the header lines of one file.

    Args:
        path: A Python file.

    Returns:
        The first line of its docstring, and the header's values by name. ``Lossless`` is absent
        where the file does not give it.

    Raises:
        InvalidInputError: There is no docstring, a line is missing, empty, doubled or misspelt, or
            the file is not UTF-8 text.
    """
    lines = _docstring(path).splitlines()
    title = lines[0].strip().rstrip(".") if lines else ""
    if not title:
        raise InvalidInputError(f"{path}: the module docstring must open with a title line")
    values: dict[str, str] = {}
    key = ""
    for line in lines[1:]:
        match = _KEY.match(line)
        if match and match[1] in HEADER:
            key = match[1]
            if key in values:
                raise InvalidInputError(f"{path}: the header line '{key}:' occurs twice")
            values[key] = match[2].strip()
        elif key and line[:1].isspace() and line.strip():
            values[key] = f"{values[key]} {line.strip()}".strip()
        else:
            key = ""
            near = difflib.get_close_matches(match[1], HEADER, 1, 0.8) if match else []
            if match and near:
                raise InvalidInputError(f"{path}: '{match[1]}:' is misspelt; write '{near[0]}:'")
    for key in _REQUIRED:
        if not values.get(key):
            raise InvalidInputError(
                f"{path}: the module docstring lacks the header line '{key}:'; a system needs "
                f"{', '.join(f'{name}:' for name in _REQUIRED)}"
            )
    if values.get("Lossless", "yes") not in ("yes", "no"):
        raise InvalidInputError(
            f"{path}: 'Lossless:' must be yes or no, not {values['Lossless']!r}; "
            "explanations belong under 'Differs:'"
        )
    return title, values


def _files(root: Path | None) -> Iterator[Path]:
    """All system files, sorted by family and slug."""
    top = ROOT if root is None else root
    if not top.is_dir():
        return
    for folder in sorted(top.iterdir()):
        if folder.name.startswith(("_", ".")) or not folder.is_dir():
            continue
        for path in sorted(folder.glob("*.py"), key=lambda path: path.stem):
            if not path.name.startswith(("_", ".")):
                yield path


def _docstring(path: Path) -> str:
    """The module docstring, read from the head of the file."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(_HEAD_CHARS)
            opening = _OPENING.match(text)
            if opening and text.find(opening[1], opening.end()) < 0:
                text += file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"{path}: cannot be read as UTF-8 text ({error})") from error
    end = text.find(opening[1], opening.end()) if opening else -1
    if opening is None or end < 0:
        raise InvalidInputError(
            f"{path}: a system's file must open with a triple-quoted docstring, its header inside"
        )
    return text[opening.end() : end].strip()


def _package(root: Path | None) -> str:
    """Name under which the systems of a folder are imported."""
    if root is None:
        return "isthmus.systems"
    # Folders outside the package get names of their own, so that two never share a module.
    return f"_systems_{hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:12]}"


def _info(path: Path, package: str) -> SystemInfo:
    """Turn one file into an entry."""
    if not _FILE_NAME.fullmatch(path.stem):
        raise InvalidInputError(
            f"{path}: the file of a system is named by lower-case words and digits joined by "
            "single underscores"
        )
    title, values = read_header(path)
    paper = values["Paper"]
    arxiv = _ARXIV.search(paper)
    # The year is looked for outside the arXiv id, whose first digits can look like one, and the
    # last hit counts, because titles may name years too.
    years = _YEAR.findall(_ARXIV.sub("", paper))
    if not years:
        raise InvalidInputError(
            f"{path}: 'Paper:' must name the year, as in 'authors, title, 2024'"
        )
    family = path.parent.name
    slug = path.stem.replace("_", "-")
    given = values.get("Lossless")
    lossless = (family == "speculative" or None) if given is None else given == "yes"
    return SystemInfo(
        slug=slug,
        family=family,
        class_name=class_name(slug),
        module=f"{package}.{family}.{path.stem}",
        path=path,
        title=title,
        paper=paper,
        arxiv=arxiv[1] if arxiv else "",
        year=int(years[-1]),
        idea=values["Idea"],
        differs=values["Differs"],
        lossless=lossless,
    )
