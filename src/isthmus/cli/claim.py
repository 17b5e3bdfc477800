"""``isthmus claim``: measure again what the papers of systems claim."""

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from isthmus import __version__, registry
from isthmus.claims import Claim, Entry, Ledger, Provenance, Ruler, Scale, render_entry
from isthmus.cli.output import console, print_error, print_json
from isthmus.errors import InvalidInputError, IsthmusError
from isthmus.registry import SystemInfo

Flag = Parameter(negative="")


def claim(
    slug: str | None = None,
    /,
    *,
    family: str | None = None,
    every: Annotated[bool, Parameter(name="--all", negative="")] = False,
    scale: Scale = "small",
    json: Annotated[bool, Flag] = False,
    ledger: Path | None = None,
    resume: Annotated[bool, Flag] = False,
) -> int:
    """Measure again what the papers of systems claim.

    Each result is recorded as soon as it is there, so an interrupted run loses only the claim it
    was at. In a checkout of isthmus, docs/ledger.json is the ledger unless another is named, and
    runs at scale test are recorded only where one is named.

    Args:
        slug: One system.
        family: All systems of this family.
        every: All systems.
        scale: Size of the measurement: test (seconds), small (minutes on two CPU cores), or
            small-gpu.
        json: Print one JSON object and nothing else on standard output.
        ledger: JSON file that the results are recorded in.
        resume: Leave out systems that the ledger already holds at this version of isthmus and
            this scale.

    Returns:
        0, or 2 where a system could not be measured. A claim that was not reproduced is a result,
        not an error.
    """
    chosen = _choose(slug, family, every)
    book = _ledger(ledger, scale)
    if book is not None:
        book.check_writable()
    elif resume:
        raise InvalidInputError(
            "--resume needs a ledger to look at; name one with --ledger PATH"
            + (" (runs at scale test have none of their own)" if scale == "test" else "")
        )
    done = book.read() if book is not None and resume else {}
    skipped = [info.slug for info in chosen if _is_current(done.get(info.slug), scale)]
    measured: dict[str, Entry] = {}
    failed: dict[str, str] = {}
    todo = [info for info in chosen if info.slug not in skipped]
    for number, info in enumerate(todo, start=1):
        try:
            entry = _measure(info, scale, f"{number}/{len(todo)} {info.slug}")
        except Exception as error:
            # One system's bug must not end a run over many; alone, it shows its traceback.
            if slug is not None:
                raise
            failed[info.slug] = str(error) if isinstance(error, IsthmusError) else f"bug: {error!r}"
            print_error(f"{info.slug}: {failed[info.slug]}")
            continue
        if book is not None:
            entry = book.record(entry.claim, entry.provenance)
        measured[info.slug] = entry
        if not json:
            _show(entry)
    if json:
        claims = {name: entry.to_json() for name, entry in measured.items()}
        print_json({"schema": 1, "claims": claims, "skipped": skipped, "failed": failed})
    else:
        _summary(measured, skipped, failed, book)
    return 2 if failed else 0


def _choose(slug: str | None, family: str | None, every: bool) -> list[SystemInfo]:
    if (slug is not None) + (family is not None) + every != 1:
        raise InvalidInputError(
            "say what to measure: one system (isthmus claim SLUG), one family (--family NAME) or "
            "everything (--all)"
        )
    return [registry.find(slug)] if slug is not None else registry.systems(family)


def _ledger(path: Path | None, scale: Scale) -> Ledger | None:
    """The ledger named, or that of the checkout one stands in, or none."""
    if path is not None:
        return Ledger(path)
    if scale == "test":
        return None
    project = Path("pyproject.toml")
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if '\nname = "isthmus"\n' in project.read_text(encoding="utf-8"):
            return Ledger(Path("docs") / "ledger.json")
    return None


def _is_current(entry: Entry | None, scale: Scale) -> bool:
    return (
        entry is not None and entry.provenance.isthmus == __version__ and entry.claim.scale == scale
    )


def _measure(info: SystemInfo, scale: Scale, label: str) -> Entry:
    module = registry.load_module(info)
    run = getattr(module, "claim", None)
    if not callable(run):
        raise InvalidInputError(f"{info.slug} has no claim to measure: {info.path} lacks claim()")
    start = time.perf_counter()
    # Standard output is the result's alone, whatever a system or a library prints on its way.
    with contextlib.redirect_stdout(sys.stderr), _progress(label) as ruler:
        claim = run(ruler, scale=scale)
    if not isinstance(claim, Claim) or claim.slug != info.slug:
        raise InvalidInputError(f"claim() in {info.path} must return a Claim of {info.slug!r}")
    seconds = time.perf_counter() - start
    return Entry(claim, Provenance.gather(seeds=claim.seeds, seconds=seconds))


@contextlib.contextmanager
def _progress(label: str) -> Iterator[Ruler]:
    """A ruler that shows on a terminal how far it is."""
    out = console(stderr=True)
    if not out.is_terminal:
        yield Ruler()
        return
    with out.status(label) as status:

        def tell(name: str, done: int, total: int) -> None:
            status.update(f"{label}: timing {name} ({done}/{total})")

        yield Ruler(progress=tell)


def _show(entry: Entry) -> None:
    from rich.markdown import Markdown

    out = console()
    out.print(entry.claim.slug, style="bold")
    out.print(Markdown(render_entry(entry)))


def _summary(
    measured: dict[str, Entry], skipped: list[str], failed: dict[str, str], book: Ledger | None
) -> None:
    parts = [f"measured {len(measured)}"]
    parts += [f"skipped {len(skipped)}"] if skipped else []
    parts += [f"failed {len(failed)}: {', '.join(failed)}"] if failed else []
    kept: Any = f"recorded in {book.path}" if book is not None else "not recorded"
    console().print(f"{'; '.join(parts)}; {kept}")
