"""``isthmus train`` and ``isthmus export``: drafters of one's own model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from isthmus.cli.output import console, print_json, quiet_transformers
from isthmus.errors import InvalidInputError, UnknownNameError

WORKBENCH = "workbench"


def train(
    slug: str,
    /,
    *,
    out: Annotated[Path, Parameter(name=["--out", "-o"])],
    target: str = "",
    data: tuple[str, ...] = (WORKBENCH,),
    steps: int = 600,
    batch_size: int = 12,
    sequence_length: int = 96,
    learning_rate: float = 2e-3,
    validate_every: int = 200,
    settings: Annotated[tuple[str, ...], Parameter(name="--set", negative="")] = (),
    seed: int = 0,
    device: str = "auto",
    json: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Train a drafter for a model; the model itself stays as it is.

    An interrupted run (Ctrl-C) is saved beside the folder and goes on at the exact step when the
    same command is given again. The best weights by validation acceptance length are kept.

    Args:
        slug: A system whose drafter is trained, such as eagle or medusa.
        out: Folder to write; an older drafter there is replaced at the end.
        target: Folder or hub id of the model to draft for, or a reference model; default the
            embedded one.
        data: Text files, .jsonl files with a field "text", folders of them, or workbench (source
            of Python's standard library). A share of the texts is held out for validation.
        steps: Optimiser steps.
        batch_size: Texts a step.
        sequence_length: Tokens of a text.
        learning_rate: Peak learning rate.
        validate_every: Steps between validations.
        settings: Settings of the system, as name=value; may be given several times.
        seed: Seed of weights, data order and noise.
        device: auto, cpu, cuda ...
        json: Print one JSON object and nothing else on standard output.
    """
    quiet_transformers()
    import torch

    from isthmus import registry
    from isthmus.api import load
    from isthmus.decoding.trained import TrainedDrafter, check_replaceable, settings_from
    from isthmus.training.drafting import DraftTraining, Progress, Recipe

    system: Any = registry.load(slug)
    if not issubclass(system, TrainedDrafter):
        trained = [
            info.slug
            for info in registry.systems("speculative")
            if issubclass(registry.load(info.slug), TrainedDrafter)
        ]
        raise UnknownNameError("trained drafter", slug, trained)
    recipe = Recipe(
        steps=steps,
        batch_size=batch_size,
        sequence_length=sequence_length,
        learning_rate=learning_rate,
        validate_every=validate_every,
        seed=seed,
    )
    chosen = settings_from(system.settings_type, _pairs(settings))
    check_replaceable(out)
    model = load(target, dtype="float32", device=device)
    if model.target.encoder_decoder:
        raise InvalidInputError(
            "drafters are trained on plain texts, and an encoder-decoder needs a source for each; "
            "give a decoder-only target"
        )
    torch.manual_seed(seed)
    drafter = system(model.target, chosen).to(model.target.device)
    texts, held_out = _texts(model.tokenizer, data, sequence_length)
    state = out.with_name(f"{out.name}.unfinished.safetensors")
    run = DraftTraining(drafter, texts, held_out, recipe, state)
    screen = console(stderr=True)
    if run.step and not json:
        screen.print(f"going on at step {run.step} of {recipe.steps}")
    with screen.status("") as status:
        shown = 0

        def report(now: Progress) -> None:
            nonlocal shown
            status.update(f"step {now.step}/{now.steps}, loss {now.loss:.4f}")
            if len(run.curve) > shown:
                shown = len(run.curve)
                screen.print(
                    f"step {now.step}/{now.steps}: loss {now.loss:.4f}, acceptance length "
                    f"{now.acceptance_length:.3f}, {now.seconds:.0f} s"
                )

        try:
            run.run(report)
        except KeyboardInterrupt:
            screen.print(
                f"interrupted at step {run.step}; {state} keeps the run, give the same command "
                "again to go on"
            )
            raise
    drafter.save_pretrained(out)
    parameters = sum(p.numel() for p in drafter.parameters())
    if json:
        record = drafter.training_record
        print_json({"system": slug, "out": str(out), "parameters": parameters, **record})
        return 0
    console().print(
        f"{slug}: {parameters / 1e6:.2f} M parameters, acceptance length {run.best:.3f} "
        f"(chain of 4, greedy, held-out text); written to {out}\n"
        f"use it: isthmus generate --model {target or 'pycode-t'} --drafter {out} ..."
    )
    return 0


def export(
    drafter: Path,
    /,
    *,
    format: str,
    out: Annotated[Path, Parameter(name=["--out", "-o"])],
    target: str = "",
) -> int:
    """Write a trained drafter in a format that a serving engine loads.

    Args:
        drafter: Folder made by isthmus train.
        format: eagle, eagle3, peagle, medusa or mlp_speculator.
        out: Folder to write.
        target: The model that the drafter was trained for; default the embedded one.
    """
    quiet_transformers()
    from isthmus import registry
    from isthmus.api import load
    from isthmus.decoding.trained import read_config
    from isthmus.training.serving_formats import export as write

    system: Any = registry.load(read_config(drafter)["system"])
    loaded = load(target, dtype="float32", device="cpu")
    write(system.from_pretrained(drafter, loaded.target), format, out)
    for path in sorted(out.iterdir()):
        console().print(f"{path}  {path.stat().st_size:,} bytes")
    return 0


def _pairs(settings: tuple[str, ...]) -> dict[str, str]:
    pairs = {}
    for each in settings:
        name, equals, value = each.partition("=")
        if not equals or not name:
            raise InvalidInputError(f"--set takes name=value, got {each!r}")
        pairs[name] = value
    return pairs


def _texts(tokenizer: Any, data: tuple[str, ...], length: int) -> tuple[Any, Any]:
    """Training and held-out windows; every twentieth document of a user's own data is held out."""
    import numpy as np

    from isthmus.signals.text import read_texts
    from isthmus.training.drafting import windows
    from isthmus.workbench import pycode
    from isthmus.workbench.tokenizer import end_id

    if tokenizer is None:
        raise InvalidInputError("this checkpoint has no tokenizer, so no text can be read for it")
    end = end_id(tokenizer)

    def cut(documents: list[str]) -> Any:
        ids = [tokenizer(d, add_special_tokens=False).input_ids for d in documents]
        return windows(ids, length, end)

    if data == (WORKBENCH,):
        train, held_out = cut(pycode.texts("train")), cut(pycode.texts("held-out"))
    else:
        documents = read_texts([Path(d) for d in data])
        if len(documents) >= 20:
            held_out = cut(documents[::20])
            train = cut([d for i, d in enumerate(documents) if i % 20])
        else:
            both = cut(documents)
            if len(both) < 2:
                raise InvalidInputError(f"the data fill one text of {length} tokens; give more")
            share = max(1, len(both) // 20)
            train, held_out = both[:-share], both[-share:]
    order = np.random.default_rng(0).permutation(len(held_out))
    return train, held_out[order]
