"""``isthmus strategies``: the ways of choosing tokens, as ``generate --strategy`` takes them."""

from typing import Annotated

from cyclopts import Parameter

from isthmus.cli.output import console, print_json
from isthmus.decoding.strategies import STRATEGIES, Sample, describe, settings_of


def strategies(*, json: Annotated[bool, Parameter(name="--json", negative="")] = False) -> None:
    """List the decoding strategies, their settings, and whether drafts go with them.

    Args:
        json: Print one JSON object and nothing else.
    """
    if json:
        rows = [
            {
                "strategy": name,
                "rule": kind.rule,
                "settings": {k: describe(v) for k, v in settings_of(kind).items()},
                "drafts": not kind.alone,
                "why_not": kind.alone,
            }
            for name, kind in STRATEGIES.items()
        ]
        print_json({"strategies": rows})
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("strategy", no_wrap=True)
    for column in ("settings", "rule", "drafts"):
        table.add_column(column, overflow="fold")
    of_sample = settings_of(Sample)
    for name, kind in STRATEGIES.items():
        own, tail = settings_of(kind), ""
        if kind is not Sample and issubclass(kind, Sample):  # which takes all truncations
            own, tail = {k: v for k, v in own.items() if v != of_sample[k]}, " (and as sample)"
        settings = " ".join(f"{k}={describe(v)}" for k, v in own.items()) + tail
        table.add_row(name, settings, kind.rule, f"no: {kind.alone}" if kind.alone else "yes")
    console().print(table)
