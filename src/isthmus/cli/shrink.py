"""``isthmus shrink``: a trained model made smaller, beside what that costs and what it gains."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from isthmus.cli.output import console, print_json, quiet_transformers
from isthmus.errors import BrokenFileError, InvalidInputError, require

_NEW_TOKENS = 32


def shrink(
    model: str,
    /,
    *,
    method: str,
    budget: float,
    data: Annotated[tuple[str, ...], Parameter(name="--data")],
    out: Annotated[Path, Parameter(name=["--out", "-o"])],
    evaluate: Annotated[tuple[str, ...], Parameter(name="--evaluate")] = (),
    settings: Annotated[tuple[str, ...], Parameter(name="--set")] = (),
    tune: int = 0,
    rate: float = 1e-4,
    packed: Path | None = None,
    samples: int = 128,
    length: int = 512,
    repeats: int = 5,
    seed: int = 0,
    device: str = "auto",
    json: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Make a trained model smaller or sparser, and say what it costs and gains.

    The original is only read. Work is kept layer by layer beside OUT, so that the same command
    goes on after an interruption. Loss is measured on data that was not calibrated on, from the
    file that was written; speed in one run, both models by turns.

    Args:
        model: Folder or hub id of a checkpoint, or a reference model.
        method: A surgery; isthmus systems --family surgery lists them.
        budget: Share that is kept, above 0 and at most 1; the method says of what.
        data: What to calibrate on: files and folders, workbench:NAME or hub:NAME. A part of it is
            held out to evaluate on.
        out: Folder of the new model.
        evaluate: What to evaluate on instead of the held-out part.
        settings: A setting of the method, as name=value; may be given several times.
        tune: Steps of training after the cut, on the data that was calibrated on; zeros stay
            zeros and experts stay carved.
        rate: Peak of the learning rate of that training.
        packed: Folder for rounded weights as packed integers, which transformers and vLLM load
            (compressed-tensors); besides OUT, with a method's symmetric=true.
        samples: Samples to calibrate on, and to evaluate on.
        length: Tokens of a sample, for models that continue texts.
        repeats: Timed runs of each model; 0 times nothing.
        seed: Which samples.
        device: auto, cpu, cuda, cuda:1 ...
        json: Print one JSON object and nothing else on standard output.
    """
    quiet_transformers()
    import torch

    from isthmus.api import locate
    from isthmus.folders import check_replaceable
    from isthmus.models.hub import load_checkpoint
    from isthmus.settings import pairs
    from isthmus.surgery import export
    from isthmus.surgery.base import Steps, check_budget, fingerprint, plan_key
    from isthmus.surgery.packed import MARK, export_packed

    surgeon = export.surgeon(method, pairs(settings))
    check_budget(budget, surgeon.keeps)
    check_replaceable(out, (export.NATIVE, export.OWN), "model that isthmus shrank")
    if samples < 1 or length < 2 or repeats < 0:
        raise InvalidInputError("samples must be at least 1, length 2, and repeats 0")
    chosen = _values(surgeon)
    if tune < 0 or not rate > 0:
        raise InvalidInputError("tune takes steps, 0 or more, and rate is above 0")
    if tune and (chosen.get("kind") == "quantize" or chosen.get("bits")):
        raise InvalidInputError(
            "tuning would move rounded weights off their grid; leave --tune out, or only prune"
        )
    bits = round(16 * budget) if chosen.get("kind") == "quantize" else chosen.get("bits", 0)
    if packed is not None:
        check_replaceable(packed, (MARK,), "packed model")
        if not (bits and chosen.get("symmetric")) or bits > 8 or packed.resolve() == out.resolve():
            raise InvalidInputError(
                "--packed is another folder than OUT, for weights that the method rounds to 8 bits "
                "or fewer around 0; give --set kind=quantize --set symmetric=true"
            )
        require("compressed_tensors", "pack")
    place = locate(model)
    if Path(place).exists() and out.resolve() == Path(place).resolve():
        raise InvalidInputError(f"{out} is the original; choose another folder")
    if export.is_own(place):
        raise InvalidInputError(f"{place} was shrunk before; give the original")
    notes = console(stderr=True)
    checkpoint = load_checkpoint(place, dtype="float32", device=device)
    whole = checkpoint.model
    records = _records(checkpoint, data)
    calibration = _samples(checkpoint, records, "train", samples, length, seed)
    records = _records(checkpoint, evaluate) if evaluate else records
    held_out = _samples(checkpoint, records, "valid", samples, length, seed)
    calibration.check_apart(held_out)

    work = out.with_name(f".{out.name}.shrinking")
    key = plan_key(
        method, budget, fingerprint(whole), calibration.fingerprint, chosen, _seed(chosen)
    )
    plan = _kept(work, key)
    if plan is not None:
        notes.print(f"the plan in {work} is complete and is used again")
    else:
        with notes.status("planning") as status:
            steps = Steps(work / "steps", key, lambda name: status.update(f"planning: {name}"))
            plan = surgeon.plan(whole, calibration, budget, steps)
        plan.save(work)
    with notes.status("cutting"):
        small = copy.deepcopy(whole)
        report = surgeon.apply(small, plan)
        stored = _stored(place) or torch.float32
        before = {"loss": held_out.loss(whole)}
        cut = {"loss": held_out.loss(small)}
        record = {"budget": budget, "original": model, "calibration": calibration.source}
    if packed is not None:
        with notes.status("packing"):
            export_packed(small, checkpoint.tokenizer, list(plan.tensors), bits, packed)
    if tune:
        record |= {"tuned": tune, "rate": rate}
        with notes.status("tuning") as status:
            _tuned(small, report, calibration, tune, rate, seed, Steps(work / "steps", key), status)
    with notes.status("writing"):
        export.export(
            small,
            checkpoint.tokenizer,
            plan,
            report,
            out,
            original=whole,
            dtype=stored,
            notes=record,
            tuned=bool(tune),
        )
    shutil.rmtree(work, ignore_errors=True)
    del small
    with notes.status("measuring"):
        after = {"loss": held_out.loss(_again(out, device))}
        speeds = _speeds(place, str(out), held_out, repeats, device) if repeats else {}
    weights = sum(p.numel() for p in whole.parameters())
    before["bytes"] = (
        export.file_bytes(place) if Path(place).is_dir() else weights * stored.itemsize
    )
    after["bytes"] = export.file_bytes(out)
    if packed is not None:
        after["packed bytes"] = export.file_bytes(packed)
    result = {
        "method": method,
        "budget": budget,
        "keeps": surgeon.keeps,
        "before": before,
        "after": after,
        **({"cut": cut, "tuned": tune} if tune else {}),
        "speed": speeds,
        "evaluated on": held_out.source,
        "tokens": held_out.tokens,
        "report": report.to_dict(),
    }
    if json:
        print_json(result)
        return 0
    _show(result, report)
    console().print(f"written to {out}")
    return 0


def _records(checkpoint: Any, names: tuple[str, ...]) -> Any:
    """Texts, or pairs for a model with an encoder."""
    from isthmus.workbench.data import data

    if checkpoint.tokenizer is None:
        raise InvalidInputError(f"{checkpoint.source} has no tokenizer to read the data with")
    return data(names, "pairs" if checkpoint.model.config.is_encoder_decoder else "texts")


def _samples(checkpoint: Any, found: Any, part: str, samples: int, length: int, seed: int) -> Any:
    """Samples of one part of the data, as the model reads them."""
    from isthmus.surgery.calibration import Calibration

    module, tokenizer = checkpoint.model, checkpoint.tokenizer
    pairs = bool(module.config.is_encoder_decoder)
    records = found.train if part == "train" else found.valid
    named = f"{found.name}, {'to calibrate on' if part == 'train' else 'held out'}"
    if pairs:
        start = module.generation_config.decoder_start_token_id
        start = module.config.decoder_start_token_id if start is None else start
        return Calibration.of_pairs(
            records, tokenizer, start, samples=samples, seed=seed, source=named
        )
    longest = getattr(module.config, "max_position_embeddings", length) or length
    return Calibration.of_texts(
        records,
        tokenizer,
        samples=samples,
        length=min(length, longest),
        seed=seed,
        source=named,
    )


def _tuned(
    model: Any,
    report: Any,
    data: Any,
    count: int,
    rate: float,
    seed: int,
    steps: Any,
    status: Any,
) -> None:
    """Tune a model in place; a training that was finished before is taken up from the disk."""
    from isthmus.surgery.tuning import tune_cut

    def make() -> dict[str, Any]:
        def told(step: int, loss: float) -> None:
            status.update(f"tuning: step {step} of {count}, loss {loss:.4f}")

        tune_cut(model, report, data, count, rate=rate, seed=seed, report=told)
        return dict(model.named_parameters())

    made = steps.do(f"tuned {count} {rate!r} {seed}", make)
    model.load_state_dict(made, strict=False)


def _values(surgeon: Any) -> dict[str, Any]:
    from dataclasses import asdict

    settings = getattr(surgeon, "settings", None)
    return {} if settings is None else asdict(settings)


def _seed(settings: dict[str, Any]) -> int:
    return int(settings.get("seed", 0))


def _kept(work: Path, key: str) -> Any:
    """The plan of an interrupted run, if it is whole and of these very inputs."""
    from isthmus.surgery.base import PLAN, Plan

    if not (work / PLAN).exists():
        return None
    try:
        plan = Plan.load(work)
    except BrokenFileError:
        return None
    return plan if plan.key == key else None


def _stored(place: str) -> Any:
    """The dtype of the original's file."""
    import torch
    from transformers import AutoConfig

    return getattr(torch, str(AutoConfig.from_pretrained(place).dtype).removeprefix("torch."), None)


def _again(out: Path, device: str) -> Any:
    """The model that was written, in float32."""
    from isthmus import api

    return api.load(out, dtype="float32", device=device).target.model


def _speeds(place: str, out: str, held_out: Any, repeats: int, device: str) -> dict[str, Any]:
    """Prefill and decode, original and result by turns, batch 1."""
    import torch

    from isthmus import api
    from isthmus.claims import Ruler, ratio
    from isthmus.decoding.fast import FastTarget
    from isthmus.decoding.model import Model
    from isthmus.models.hub import load_checkpoint

    models = {
        name: api.load(source, device=device)
        for name, source in (("before", place), ("after", out))
    }
    first = next(iter(held_out))
    ids = first["input_ids"][0]
    ids = ids[first["attention_mask"][0].bool()]
    limit = models["before"].target.max_length
    if limit is not None and not models["before"].target.encoder_decoder:
        ids = ids[: max(1, limit - _NEW_TOKENS)]
    found: dict[str, Any] = {"prompt tokens": len(ids), "threads": torch.get_num_threads()}

    def write(name: str, tokens: int) -> Callable[[], object]:
        return lambda: models[name].generate(
            ids, max_new_tokens=tokens, drafter="none", ignore_end=True
        )

    longest = _NEW_TOKENS
    if limit is not None and models["before"].target.encoder_decoder:
        longest = min(longest, limit - 1)
    kinds = {name: isinstance(each.target, FastTarget) for name, each in models.items()}
    names, rows = ["before", "after"], [("first token", 1), (f"{longest} tokens", longest)]
    if kinds["before"] and not kinds["after"]:
        # one's own shape runs through torch: the original is timed there too, to compare cuts
        models["torch"] = Model(
            load_checkpoint(place, dtype="float32", device=device).model, fast=False
        )
        names.append("torch")
        found["note"] = (
            "the original has a fast forward and the result has none: rows named torch compare "
            "both without it"
        )
    for what, tokens in rows:
        timed = Ruler().compare({n: write(n, tokens) for n in names}, repeats=repeats)
        for base in names[::2]:
            speedup = ratio(timed[base], timed["after"])
            found[what if base == "before" else f"{what}, torch"] = {
                "before_ms": 1000 * timed[base].median_s,
                "after_ms": 1000 * timed["after"].median_s,
                "speedup": speedup.median,
                "low": speedup.low,
                "high": speedup.high,
            }
    return found


def _show(result: dict[str, Any], report: Any) -> None:
    from rich.table import Table

    before, after = result["before"], result["after"]
    table = Table("", "before", "after", "", box=None, pad_edge=False, header_style="")
    lost = after["loss"] - before["loss"]
    table.add_row(
        "loss, nats/token", f"{before['loss']:.4f}", f"{after['loss']:.4f}", f"{lost:+.4f}"
    )
    if "cut" in result:
        cut = result["cut"]["loss"]
        table.add_row(
            f"... after the cut, before {result['tuned']} steps",
            "",
            f"{cut:.4f}",
            f"{cut - before['loss']:+.4f}",
        )
    share = after["bytes"] / max(before["bytes"], 1)
    table.add_row(
        "weights in files", f"{before['bytes']:,} B", f"{after['bytes']:,} B", f"{share:.1%}"
    )
    if "packed bytes" in after:
        share = after["packed bytes"] / max(before["bytes"], 1)
        table.add_row("... as packed integers", "", f"{after['packed bytes']:,} B", f"{share:.1%}")
    for name in ("parameters", "active", "multiply_adds"):
        had, has = getattr(report.before, name), getattr(report.after, name)
        share = has / max(had, 1)
        table.add_row(
            f"{name.replace('_', '-')}, changed places", f"{had:,}", f"{has:,}", f"{share:.1%}"
        )
    for name, row in result["speed"].items():
        if isinstance(row, dict):
            table.add_row(
                name,
                f"{row['before_ms']:.1f} ms",
                f"{row['after_ms']:.1f} ms",
                f"{row['speedup']:.2f}x [{row['low']:.2f}, {row['high']:.2f}]",
            )
    errors = [c for c in report.changes if c.error is not None]
    to = console()
    to.print(f"{result['method']}: {result['budget']:g} of the {result['keeps']}")
    to.print(table)
    if errors:
        worst = max(errors, key=lambda c: c.error)
        mean = sum(c.error for c in errors) / len(errors)
        to.print(
            f"output error of {len(errors)} places: {mean:.2%} on average, "
            f"{worst.error:.2%} at {worst.path}"
        )
    to.print(f"evaluated on {result['evaluated on']} ({result['tokens']:,} tokens)")
    for note in (*report.notes, *([result["speed"]["note"]] if "note" in result["speed"] else [])):
        to.print(f"note: {note}")
