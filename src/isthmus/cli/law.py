"""``isthmus law fit``: a scaling law from a table of runs."""

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from isthmus.cli.output import console, print_json
from isthmus.errors import InvalidInputError


def fit(
    file: Path,
    /,
    *,
    loss: str = "loss",
    over: tuple[str, ...] = (),
    compute: str = "compute",
    where: tuple[str, ...] = (),
    form: str = "auto",
    predict: tuple[str, ...] = (),
    force: bool = False,
    draws: int = 500,
    seed: int = 0,
    output: Annotated[Path | None, Parameter(name=["--output", "-o"])] = None,
    json: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> int:
    """Fit how a loss falls with sizes, and test the law on the largest runs.

    Args:
        file: Runs, one a row: .csv or .tsv with a header, or .jsonl.
        loss: Column of the losses.
        over: Column of a variable; give several times. Default: every other column of numbers.
        compute: Column of what a run spent, which tells the largest runs; the product of the
            variables where there is none.
        where: Keep rows of one kind: COLUMN=VALUE.
        form: power, product, additive, or auto, the one that tells the largest runs best.
        predict: Sizes to predict, such as params=1e9,tokens=2e10; give several times.
        force: Predict further than 100 times beyond the runs, too.
        draws: Fits to runs drawn again, for the intervals.
        seed: Of the draws.
        output: Draw runs and law: a .png, .svg or .pdf file.
        json: Print one JSON object and nothing else.
    """
    from isthmus.laws.fit import FORMS, HeldOut, held_out, read_runs
    from isthmus.laws.fit import fit as fit_law
    from isthmus.laws.forwards import check_picture
    from isthmus.laws.law_picture import draw_law
    from isthmus.settings import pairs

    if output is not None:
        check_picture(output)
    asked = [_numbers(each) for each in predict]
    runs = read_runs(file, loss=loss, over=over, compute=compute, where=pairs(where, "--where"))
    tests: dict[str, HeldOut] = {}
    reasons: dict[str, str] = {}
    with console(stderr=True).status("fitting"):
        for name in FORMS if form == "auto" else (form,):
            if form == "auto" and name == "additive" and len(runs.variables) == 1:
                continue  # the same as product
            try:
                tests[name] = held_out(runs, name)
            except InvalidInputError as error:
                reasons[name] = str(error)
        if form == "auto" and not tests:
            raise InvalidInputError(next(iter(reasons.values())))
        best = min(tests, key=lambda n: tests[n].error) if form == "auto" else form
        law = fit_law(runs, best, draws=draws, seed=seed)
    told = [(sizes, law.predict(sizes, force=force)[0]) for sizes in asked]
    if output is not None:
        draw_law(output, law)
    if json:
        print_json(
            {
                **law.to_dict(),
                "held_out": {
                    n: vars(t) | {"baselines": dict(t.baselines)} for n, t in tests.items()
                },
                "predictions": [{"at": sizes} | vars(value) for sizes, value in told],
            }
        )
        return 0
    screen = console()
    screen.print(f"{len(runs)} runs over {', '.join(runs.variables)}")
    screen.print(f"{best}: {law}")
    for name, value in law.values.items():
        screen.print(f"  {name} = {value}")
    screen.print(
        f"  R2 {law.r2:.4f} of the log loss; {law.agreement:.0%} of the starts end in this law"
    )
    _tell(screen, tests, reasons, best)
    for sizes, value in told:
        screen.print(f"at {', '.join(f'{k} = {v:g}' for k, v in sizes.items())}: loss {value}")
    if len(runs.variables) > 1 and best != "additive":
        shares = law.split(1.0)
        screen.print(
            "best split of a total of sizes: "
            + ", ".join(f"{share:.0%} {name}" for name, share in shares.items())
        )
    if output is not None:
        screen.print(f"drawn in {output}")
    return 0


def _tell(screen: Any, tests: dict[str, Any], reasons: dict[str, str], best: str) -> None:
    """A table of how well each form, and each simple guess, tells the largest runs."""
    from rich.table import Table

    for name, why in reasons.items():
        screen.print(f"{name} was not tested on the largest runs: {why}")
    if not tests:
        return
    chosen = tests.get(best) or next(iter(tests.values()))
    table = Table(title=f"the {chosen.runs} largest runs, told by fits to the others")
    table.add_column("told by")
    for heading in ("log error", "inside 95 %"):
        table.add_column(heading, justify="right")
    for name, test in tests.items():
        table.add_row(name, f"{test.error:.4f}", f"{test.coverage:.0%}")
    for name in ("constant", "last"):
        table.add_row(name, f"{chosen.baselines[name]:.4f}", "")
    screen.print(table)


def _numbers(given: str) -> dict[str, float]:
    """``a=1,b=2`` as a mapping of numbers."""
    from isthmus.settings import pairs

    try:
        return {k: float(v) for k, v in pairs(given.split(","), "--predict").items()}
    except ValueError:
        raise InvalidInputError(f"--predict {given}: give sizes such as params=1e9") from None
