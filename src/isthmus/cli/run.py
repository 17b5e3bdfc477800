"""``isthmus run``: a trained system on one input."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from isthmus.cli.output import console, print_json, quiet_transformers
from isthmus.errors import BrokenFileError, InvalidInputError


def run(
    system: str,
    given: str,
    /,
    *,
    out: Annotated[Path | None, Parameter(name=["--out", "-o"])] = None,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Run a trained system: a text, a sound or a picture in, what it makes of it out.

    Args:
        system: Folder made by isthmus train, or the name of a system, which is then trained at
            the scale small the first time, where none comes with isthmus.
        given: The input: a text, or the path of a file; - reads a text from standard input.
        out: File to write the result to.
        json: Print one JSON object and nothing else on standard output.
    """
    quiet_transformers()
    from isthmus.codecs.base import trainable
    from isthmus.training.system import TrainedSystem, read_config

    folder = Path(system)
    if not folder.is_dir():
        folder = _trained(trainable(system), system)
    kind: Any = trainable(read_config(folder)["system"])
    if not issubclass(kind, TrainedSystem):
        raise InvalidInputError(
            f"{folder} holds a drafter; use it with: isthmus generate --drafter {folder}"
        )
    answer = kind.from_pretrained(folder).run(sys.stdin.read() if given == "-" else given)
    if out is not None:
        try:
            if answer.save is not None:
                answer.save(out)
            else:
                out.write_text(f"{answer.text}\n", encoding="utf-8")
        except OSError as error:
            raise BrokenFileError(f"{out} cannot be written ({error.strerror})") from error
    if json:
        print_json({"system": kind.name, "text": answer.text, **answer.record})
    else:
        console().print(answer.text if out is None else f"{answer.text}\nwritten to {out}")
        if answer.save is not None and out is None:
            console(stderr=True).print("give -o FILE to keep it")
    return 0


def _trained(system: Any, slug: str) -> Path:
    from isthmus.training.system import TrainedSystem
    from isthmus.workbench.trained import at_hand, scale_of

    if not issubclass(system, TrainedSystem):
        raise InvalidInputError(f"{slug} is not trained, so it runs on no input; see: isthmus show")
    steps = scale_of(system, "small").plan.steps
    with console(stderr=True).status("") as status:
        return at_hand(
            system,
            report=lambda now: status.update(
                f"training {slug} once: step {now.step}/{steps}, loss {now.loss:.4f}"
            ),
        )
