"""``isthmus bench train``: the training loop beside the Trainer of transformers."""

from __future__ import annotations

import time
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from isthmus.cli.output import console, print_json, quiet_transformers
from isthmus.errors import InvalidInputError

Words = Annotated[tuple[str, ...], Parameter(negative="")]


def train(
    slug: str,
    /,
    *,
    data: Words = (),
    scale: Literal["test", "small", "paper"] = "small",
    settings: Annotated[Words, Parameter(name="--set")] = (),
    batches: int = 60,
    repeats: int = 5,
    cpu_time: Annotated[bool, Parameter(negative="")] = False,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Compare training with transformers' Trainer: the same weights, examples and precision.

    A repeat learns once from the examples of some batches, float32 and AdamW on the CPU. Tokens
    that are padding do not count. The Trainer needs the package accelerate.

    Args:
        slug: A system that turns text into text, such as marian or nanot5.
        data: Files or folders of your own, hub:OWNER/NAME, or workbench:NAME; default what the
            scale says.
        scale: test (seconds), small, or paper.
        settings: Settings of the system, as name=value; may be given several times.
        batches: Batches of a repeat.
        repeats: Timed repeats after one warm-up; medians are shown.
        cpu_time: Count the processor time of this process instead of the time on the wall, which
            means little while other programs are busy. Set OMP_NUM_THREADS=1.
        json: Print one JSON object and nothing else on standard output.
    """
    quiet_transformers()
    from isthmus import registry
    from isthmus.claims import Provenance, Ruler
    from isthmus.settings import changed, pairs
    from isthmus.training.text_to_text import TextToText
    from isthmus.workbench.data import data as named_data
    from isthmus.workbench.train_bench import check_peer, train_bench
    from isthmus.workbench.trained import scale_of

    check_peer()
    system: Any = registry.load(slug)
    if not issubclass(system, TextToText):
        raise InvalidInputError(
            f"{slug} has no twin in transformers to train; marian and nanot5 have one"
        )
    told = scale_of(system, scale)
    chosen = changed(told.settings, pairs(settings), slug)
    records = named_data(data or told.data, system.reads)
    with console(stderr=True).status("") as status:

        def tell(name: str, done: int, total: int) -> None:
            status.update(f"{done}/{total} {name}")

        lines = train_bench(
            system,
            records,
            chosen,
            told.plan,
            batches=batches,
            repeats=repeats,
            ruler=Ruler(time.process_time if cpu_time else time.perf_counter, tell),
        )
    if json:
        found = {"system": slug, "data": records.name, "lines": [x.to_dict() for x in lines]}
        print_json(
            found
            | {"repeats": repeats, "cpu_time": cpu_time, "provenance": vars(Provenance.gather())}
        )
        return 0
    from rich.table import Table

    table = Table(
        title=f"training {slug} on {records.name}, float32, {repeats} repeats"
        + (", processor time" if cpu_time else "")
    )
    table.add_column("loop")
    for heading in ("tokens/s", "speed-up", "padding in", "padding out", "rows", "steps"):
        table.add_column(heading, justify="right")
    for line in lines:
        table.add_row(
            line.name,
            f"{line.tokens_per_s:,.0f}",
            str(line.speedup),
            f"{line.inputs:.1%}",
            f"{line.outputs:.1%}",
            f"{line.rows:.1f}",
            str(line.steps),
        )
    console().print(table)
    return 0
