"""``isthmus explain``: look into a model with a lens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from isthmus.cli.output import console, print_json, quiet_transformers
from isthmus.errors import InvalidInputError

_PAGES = (".html", ".htm")
_TOOLS = ("sae",)
"""Lenses that are no published system."""


def explain(
    subject: str,
    given: str,
    /,
    *,
    lens: str,
    settings: Annotated[tuple[str, ...], Parameter(name="--set")] = (),
    out: Annotated[Path | None, Parameter(name=["--out", "-o"])] = None,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Look into a model: what a lens finds, with the identities that its numbers satisfy.

    Args:
        subject: What to look into: folder or hub id of a checkpoint, a reference model, or a
            program that the lens knows; "" for the lens's own example.
        given: The input, mostly a text.
        lens: Name of the lens; isthmus systems --family lenses lists them. Beside those there is
            sae, the sparse features of a site.
        settings: A setting of the lens, as name=value; may be given several times.
        out: Write a page (.html), a picture (.png, .svg, .pdf), or a folder for Python.
        json: Print one JSON object and nothing else on standard output.
    """
    quiet_transformers()
    from isthmus import registry
    from isthmus.laws.forwards import PICTURES, check_picture, save
    from isthmus.settings import changed, pairs
    from isthmus.workbench import reference

    made: Any
    if lens in _TOOLS:
        made = _sae(pairs(settings))
        subject = reference.locate(subject or "pycode-t")
    else:
        system: Any = registry.load(lens)
        if getattr(system, "role", "") != "lens":
            known = [i.slug for i in registry.systems() if i.family == "lenses"]
            raise InvalidInputError(f"{lens} is no lens; there are {', '.join((*known, *_TOOLS))}")
        chosen = registry.load_module(registry.find(lens)).Settings()
        made = system(changed(chosen, pairs(settings), lens))
    suffix = "" if out is None else out.suffix.lower()
    if out is not None and suffix and suffix not in (*_PAGES, *PICTURES):
        raise InvalidInputError(
            f"{out} is neither a page nor a picture; give a name with "
            f"{', '.join((*_PAGES, *PICTURES))}, or a folder"
        )
    if out is not None and suffix in PICTURES:
        check_picture(out)
    with console(stderr=True).status("looking"):
        found = made.explain(made.open(subject), given)
    if out is not None:
        if suffix in _PAGES:
            found.html(out)
        elif suffix in PICTURES:
            save(found.figure(), out)
        else:
            found.save(out)
    if json:
        print_json(found.to_dict())
        return 0
    console().print(str(found), soft_wrap=True)
    if out is not None:
        console().print(f"written to {out}")
    return 0


def _sae(settings: dict[str, str]) -> Any:
    """The lens of sparse features, which reads data sets by their names."""
    from isthmus.lenses.sae_lens import SaeLens, Settings
    from isthmus.settings import changed
    from isthmus.workbench.data import data

    def read(name: str) -> tuple[Any, Any]:
        found = data(name, "texts")
        return found.train, found.valid

    return SaeLens(changed(Settings(), settings, "sae"), read)
