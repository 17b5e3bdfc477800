"""``isthmus systems`` and ``isthmus show``: what there is, without running it."""

import dataclasses
from typing import Annotated, Any

from cyclopts import Parameter

from isthmus import registry
from isthmus.claims import Entry, number, render_entry, shipped_ledger
from isthmus.cli.output import console, print_json
from isthmus.registry import SystemInfo

Json = Annotated[bool, Parameter(name="--json", negative="")]


def systems(
    *,
    family: str | None = None,
    measured: Annotated[bool, Parameter(negative="")] = False,
    json: Json = False,
) -> None:
    """List the systems and what became of each.

    Args:
        family: Only the systems of this family.
        measured: Show the first row of each claim instead of the idea: the baseline, the system,
            and the system with its mechanism switched off.
        json: Print one JSON object and nothing else.
    """
    found = registry.systems(family)
    ledger = shipped_ledger().read()
    if json:
        print_json({"systems": [_header(info, ledger.get(info.slug)) for info in found]})
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("system", no_wrap=True)
    if measured:
        for column in ("lossless", "measured", "unit", "baseline", "ours", "off", "claim"):
            table.add_column(column, justify="right" if column in NUMBERS else "left")
        for info in found:
            table.add_row(info.slug, *_first_row(info, ledger.get(info.slug)))
        console().print(table)
        return
    table.add_column("family", no_wrap=True)
    table.add_column("idea")
    table.add_column("claim", no_wrap=True)
    for info in found:
        table.add_row(info.slug, info.family, info.idea, _status(ledger.get(info.slug)))
    console().print(table)


#: Columns of numbers in the table of ``isthmus systems --measured``.
NUMBERS = ("baseline", "ours", "off")


def _first_row(info: SystemInfo, entry: Entry | None) -> list[str]:
    lossless = {True: "yes", False: "no", None: ""}[info.lossless]
    if entry is None or not entry.claim.rows:
        return [lossless, "", "", "", "", "", _status(entry)]
    row = entry.claim.rows[0]
    numbers = [number(value) for value in (row.baseline, row.ours, row.off)]
    return [lossless, row.metric, row.unit, *numbers, entry.claim.status.value]


def show(slug: str, /, *, json: Json = False) -> None:
    """Show one system: paper, settings, last claim.

    Args:
        slug: The system, for example token-recycling.
        json: Print one JSON object and nothing else.
    """
    info = registry.find(slug)
    settings = _settings(info)
    entry = shipped_ledger().read().get(info.slug)
    if json:
        values = _header(info, entry)
        values["settings"] = {name: default for name, _, default in settings}
        values["claim"] = entry.to_json() if entry else None
        print_json(values)
        return
    from rich.markdown import Markdown
    from rich.table import Table

    out = console()
    out.print(f"{info.slug}: {info.title}", style="bold")
    head = Table.grid(padding=(0, 2))
    head.add_row("paper", info.paper)
    head.add_row("idea", info.idea)
    head.add_row("differs", info.differs)
    if info.lossless is not None:
        head.add_row("lossless", "yes" if info.lossless else "no")
    head.add_row("class", f"{info.module}.{info.class_name}")
    out.print(head)
    if settings:
        out.print("\nSettings", style="bold")
        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in ("name", "type", "default"):
            table.add_column(column)
        for name, kind, default in settings:
            table.add_row(name, kind, repr(default) if default is not REQUIRED else REQUIRED)
        out.print(table)
    out.print("\nClaim", style="bold")
    if entry is None:
        out.print(f"not measured yet; measure it with: isthmus claim {info.slug}")
    else:
        out.print(Markdown(render_entry(entry)))


#: Shown in place of a default that a setting does not have.
REQUIRED = "(required)"


def _settings(info: SystemInfo) -> list[tuple[str, str, Any]]:
    """Name, type and default of each setting; this imports the system."""
    system = registry.load(info.slug)
    module = registry.load_module(info)
    kinds = [
        kind
        for name, kind in vars(module).items()
        if name.endswith("Settings")
        and isinstance(kind, type)
        and kind.__module__ == module.__name__
        and dataclasses.is_dataclass(kind)
    ]
    if not kinds and dataclasses.is_dataclass(system):
        kinds = [system]
    rows = []
    for kind in kinds:
        for spec in dataclasses.fields(kind):
            if not spec.init:
                continue
            default: Any = REQUIRED
            if spec.default is not dataclasses.MISSING:
                default = spec.default
            elif spec.default_factory is not dataclasses.MISSING:
                default = spec.default_factory()
            kind_name = spec.type if isinstance(spec.type, str) else _type_name(spec.type)
            rows.append((spec.name, kind_name, default))
    return rows


def _type_name(kind: object) -> str:
    return kind.__name__ if type(kind) is type else str(kind).replace("typing.", "")


def _header(info: SystemInfo, entry: Entry | None) -> dict[str, Any]:
    return {
        "slug": info.slug,
        "family": info.family,
        "class": f"{info.module}.{info.class_name}",
        "title": info.title,
        "paper": info.paper,
        "arxiv": info.arxiv,
        "year": info.year,
        "idea": info.idea,
        "differs": info.differs,
        "lossless": info.lossless,
        "status": entry.claim.status.value if entry else None,
    }


def _status(entry: Entry | None) -> str:
    return entry.claim.status.value if entry else "not measured yet"
