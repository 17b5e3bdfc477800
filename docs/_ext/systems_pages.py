"""Writes the pages that are made from the code: one per system and one per public module.

System pages come from the headers of the systems and from the ledger, module pages from a walk
over the package. Both are written into the source folder before Sphinx looks for its pages, and
both folders are ignored by git.
"""

import ast
import re
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

import isthmus
from isthmus import registry
from isthmus.claims import Entry, render_entry, shipped_ledger
from isthmus.registry import SystemInfo

ORPHAN = "---\norphan: true\n---\n\n"
"""For pages that an index links to: hundreds of them in every sidebar take minutes to write."""

AUTOMODULE = """\
```{{eval-rst}}
.. automodule:: {module}
   :members:
   :ignore-module-all:
   :show-inheritance:
```
"""


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("builder-inited", write_pages)
    app.connect("autodoc-process-docstring", drop_header)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def write_pages(app: Sphinx) -> None:
    source = Path(app.srcdir)
    replace_folder(source / "systems", system_pages())
    replace_folder(source / "api", module_pages())


def replace_folder(folder: Path, pages: dict[str, str]) -> None:
    """Make a folder hold these pages and no other; an unchanged page keeps its time stamp."""
    for name, text in pages.items():
        path = folder / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    for path in folder.rglob("*.md"):
        if path.relative_to(folder).as_posix() not in pages:
            path.unlink()


def system_pages() -> dict[str, str]:
    ledger = shipped_ledger().read()
    found = registry.systems()
    lines = [
        "# Systems",
        "",
        "One published system, one file. Each page says which paper it follows, what was left out "
        "or changed, and what came out when its claim was measured here.",
        "",
    ]
    pages = {}
    for family in registry.families():
        members = [info for info in found if info.family == family]
        lines += [f"## {family}", "", "| System | Idea | Claim |", "|---|---|---|"]
        for info in members:
            entry = ledger.get(info.slug)
            status = entry.claim.status.value if entry else "not measured yet"
            idea = cell(info.idea)
            lines.append(f"| [{info.slug}]({family}/{info.slug}.md) | {idea} | {status} |")
            pages[f"{family}/{info.slug}.md"] = ORPHAN + system_page(info, entry)
        lines.append("")
    if not found:
        lines += ["There is none yet.", ""]
    return pages | {"index.md": "\n".join(lines)}


def system_page(info: SystemInfo, entry: Entry | None) -> str:
    paper = info.paper
    if info.arxiv:
        paper += f" ([arXiv](https://arxiv.org/abs/{info.arxiv}))"
    lines = [f"# {info.slug}", "", f"**{info.title}**", "", f"- Paper: {paper}"]
    lines += [f"- Idea: {info.idea}", f"- Differs: {info.differs}"]
    if info.lossless is not None:
        lines.append(f"- Lossless: {'yes' if info.lossless else 'no'}")
    lines += ["", "## Claim", ""]
    if entry is None:
        lines += [f"Not measured yet. Measure it with `isthmus claim {info.slug}`.", ""]
    else:
        lines += [render_entry(entry)]
    lines += ["## Code", "", AUTOMODULE.format(module=info.module)]
    return "\n".join(lines)


def module_pages() -> dict[str, str]:
    package = Path(isthmus.__file__).parent
    summaries = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        private = any(part.startswith("_") and part != "__init__" for part in parts)
        if not private and parts[0] != "systems":
            name = ".".join(["isthmus", *(part for part in parts if part != "__init__")])
            said = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            summaries[name] = " ".join(said.partition("\n\n")[0].split())
    lines = [
        "# Reference",
        "",
        "Every public module, from its docstrings. The systems have pages of their own: "
        "[Systems](../systems/index.md).",
        "",
        "| Module | |",
        "|---|---|",
        *(f"| [{name}]({name}.md) | {cell(said)} |" for name, said in sorted(summaries.items())),
        "",
    ]
    pages = {
        f"{name}.md": f"{ORPHAN}# {name}\n\n{AUTOMODULE.format(module=name)}" for name in summaries
    }
    return pages | {"index.md": "\n".join(lines)}


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def drop_header(
    app: Sphinx, what: str, name: str, obj: object, options: Any, lines: list[str]
) -> None:
    """Take title and header out of a system's docstring: its page opens with them already."""
    if what != "module" or not name.startswith("isthmus.systems."):
        return
    kept: list[str] = []
    inside = False
    for line in lines[1:]:
        if re.match(rf"(?:{'|'.join(registry.HEADER)}):", line):
            inside = True
        elif not (inside and line[:1].isspace() and line.strip()):
            inside = False
            kept.append(line)
    lines[:] = kept
