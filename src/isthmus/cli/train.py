"""``isthmus train`` and ``isthmus export``: systems for your data, drafters for your model."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from isthmus.cli.output import console, print_json, quiet_transformers
from isthmus.errors import InvalidInputError, MissingExtraError, UnknownNameError

WORKBENCH = "workbench"

Words = Annotated[tuple[str, ...], Parameter(negative="")]


def train(
    slug: str,
    /,
    *,
    out: Annotated[Path, Parameter(name=["--out", "-o"])],
    data: Words = (),
    scale: Literal["test", "small", "paper"] = "small",
    settings: Annotated[Words, Parameter(name="--set")] = (),
    plan: Words = (),
    skip_bad: int = 0,
    target: str = "",
    steps: int | None = None,
    learning_rate: float | None = None,
    seed: int | None = None,
    device: str = "auto",
    devices: int = 1,
    nodes: int = 1,
    strategy: Literal["auto", "ddp", "fsdp"] = "auto",
    json: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Train a system on your data, or a drafter for your model.

    An interrupted run (Ctrl-C, even kill -9) goes on when the same command is given again. The
    weights that did best on held-out data are kept.

    Args:
        slug: A system that is trained, such as marian or eagle (list: isthmus systems).
        out: Folder to write; an older system there is replaced at the end. Metrics go beside it.
        data: Files or folders of your own, hub:OWNER/NAME, or workbench:NAME; default what the
            scale says. A share is held out.
        scale: test (seconds), small (minutes on two cores), or paper (the published settings).
        settings: Settings of the system, as name=value; may be given several times.
        plan: Settings of the training, as name=value: precision, ema, validate_every; a
            drafter's are batch_size, sequence_length ...
        skip_bad: Records that may be left out because they cannot be used.
        target: Drafters: folder or hub id of the model to draft for; default the embedded one.
        steps: The same as --plan steps=...; so are the next two.
        learning_rate: Peak learning rate.
        seed: Seed of weights, data order and noise.
        device: auto, cpu, cuda ...
        devices: Processes on this machine.
        nodes: Machines; start each with torchrun.
        strategy: ddp, or fsdp, which shards the weights.
        json: Print one JSON object and nothing else on standard output.
    """
    quiet_transformers()
    from isthmus import registry
    from isthmus.codecs.base import trainable
    from isthmus.decoding.trained import TrainedDrafter
    from isthmus.settings import pairs
    from isthmus.training.system import TrainedSystem

    system: Any = trainable(slug)
    told, planned = pairs(settings), pairs(plan, "--plan")
    short = {"steps": steps, "learning_rate": learning_rate, "seed": seed}
    planned |= {name: str(value) for name, value in short.items() if value is not None}
    if issubclass(system, TrainedSystem):
        if target:
            raise InvalidInputError(f"{slug} is no drafter; leave --target out")
        placed = {"accelerator": device, "devices": devices, "nodes": nodes, "strategy": strategy}
        return _system(system, out, data, scale, told, planned, skip_bad, placed, json)
    if issubclass(system, TrainedDrafter):
        return _drafter(system, out, data or (WORKBENCH,), target, told, planned, device, json)
    kinds = (TrainedSystem, TrainedDrafter)
    known = [i.slug for i in registry.systems() if issubclass(registry.load(i.slug), kinds)]
    raise UnknownNameError("system that is trained", slug, known)


def _system(
    system: Any,
    out: Path,
    data: tuple[str, ...],
    scale: str,
    told: dict[str, str],
    planned: dict[str, str],
    skip_bad: int,
    placed: dict[str, Any],
    json: bool,
) -> int:
    """Train a system on data."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    from isthmus.settings import changed
    from isthmus.training.buckets import Profile
    from isthmus.training.loop import Progress
    from isthmus.training.plot import plot
    from isthmus.training.system import metrics_file, train
    from isthmus.workbench.data import data as named_data
    from isthmus.workbench.trained import scale_of

    chosen = scale_of(system, scale)
    settings = changed(chosen.settings, told, system.name)
    plan = changed(chosen.plan, planned, "--plan")
    records = named_data(data or chosen.data, system.reads, skip_bad=skip_bad)
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    screen = console(stderr=True)
    if first:
        for line in records.left_out:
            screen.print(f"left out: {line}")
        screen.print(
            f"{system.name} on {records.name}: {len(records.train)} records to learn from, "
            f"{len(records.valid)} held out, {plan.steps} steps"
        )
    columns = ("{task.description}", "{task.fields[loss]}")
    bar = Bar(
        TextColumn(columns[0]),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(columns[1]),
        TimeRemainingColumn(),
        console=screen,
        disable=not first or not screen.is_terminal,
    )
    with bar:
        task = bar.add_task(system.name, total=plan.steps, loss="")

        def report(now: Progress) -> None:
            bar.update(task, completed=now.step, loss=f"loss {now.loss:.4f}")
            if now.validation is not None:
                said = ", ".join(f"{k} {v:.4g}" for k, v in now.validation.items())
                screen.print(f"step {now.step}: loss {now.loss:.4f}, {said}, {now.seconds:.0f} s")

        try:
            made = train(system, records, settings, plan, out=out, report=report, **placed)
        except KeyboardInterrupt:
            if first:
                screen.print("interrupted; give the same command again to go on")
            raise
    if not first:
        return 0
    with contextlib.suppress(MissingExtraError):
        plot(metrics_file(out), out.with_name(f"{out.name}.metrics.png"))
    parameters = sum(p.numel() for p in made.module.parameters())
    if json:
        print_json(
            {"system": system.name, "out": str(out), "parameters": parameters, **made.record}
        )
        return 0
    best = next(c for c in made.record["validation"] if c["step"] == made.record["best_step"])
    said = ", ".join(f"{k} {v:.4g}" for k, v in best.items() if k != "step")
    if "batches" in made.record:
        console().print(f"batches: {Profile(**made.record['batches'])}")
    console().print(
        f"{system.name}: {parameters / 1e6:.2f} M parameters, {said} at step {best['step']}; "
        f"written to {out}\nuse it: isthmus run {out} INPUT"
    )
    return 0


def _drafter(
    system: Any,
    out: Path,
    data: tuple[str, ...],
    target: str,
    told: dict[str, str],
    planned: dict[str, str],
    device: str,
    json: bool,
) -> int:
    """Train a drafter for a model; the model itself stays as it is."""
    import torch

    from isthmus.api import load
    from isthmus.decoding.trained import check_replaceable
    from isthmus.settings import changed
    from isthmus.training.drafting import DraftTraining, Progress, Recipe

    slug = system.name
    recipe = changed(Recipe(), planned, "--plan")
    chosen = changed(system.settings_type(), told, slug)
    check_replaceable(out)
    model = load(target, dtype="float32", device=device)
    if model.target.encoder_decoder:
        raise InvalidInputError(
            "drafters are trained on plain texts, and an encoder-decoder needs a source for each; "
            "give a decoder-only target"
        )
    torch.manual_seed(recipe.seed)
    drafter = system(model.target, chosen).to(model.target.device)
    texts, held_out = _texts(model.tokenizer, data, recipe.sequence_length)
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
