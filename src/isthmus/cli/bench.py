"""``isthmus bench``: methods side by side, interleaved in one run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from isthmus.cli.output import console, print_json, quiet_transformers
from isthmus.errors import InvalidInputError


def decode(
    *,
    model: Annotated[str, Parameter(name=["--model", "-m"])] = "",
    draft_model: str = "",
    methods: tuple[str, ...] = (),
    peers: Annotated[bool, Parameter(negative="")] = False,
    prompts: int = 8,
    prompt_tokens: int = 96,
    prose: Annotated[bool, Parameter(negative="")] = False,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    repeats: int = 5,
    dtype: str = "auto",
    device: str = "auto",
    json: bool = False,
) -> int:
    """Compare decoding methods on one model and the same held-out code prompts, interleaved.

    The first method is the baseline, by default transformers' own greedy generation.

    Args:
        model: Folder or hub id of a checkpoint, or a reference model; default the embedded one.
        draft_model: Smaller model with the same vocabulary; adds speculative-sampling and
            transformers' assisted generation.
        methods: Methods to compare; give several times. Default: all that apply.
        peers: Add the other engines that are installed (see: isthmus bench peers), in the same
            class of precision and in int8. One alone is a method too: "ctranslate2 int8".
        prompts: Number of prompts, from held-out files of Python's standard library.
        prompt_tokens: Length of each prompt.
        prose: Take prompts from inside the docstrings of those files.
        max_new_tokens: Tokens to write for each; end tokens are ignored.
        temperature: 0 is greedy.
        repeats: Timed repeats after one warm-up; medians are shown.
        dtype: auto, float32, bfloat16, float16 or float64.
        device: auto, cpu, cuda ...
        json: Print one JSON object and nothing else on standard output.
    """
    if prompts < 1 or repeats < 1 or max_new_tokens < 1:
        raise InvalidInputError("prompts, repeats and max-new-tokens must be at least 1")
    quiet_transformers()
    from isthmus.api import load, locate
    from isthmus.claims import Provenance, Ruler
    from isthmus.workbench import peers as engines
    from isthmus.workbench import pycode
    from isthmus.workbench.bench import PEERS, WIDE, bench

    loaded = load(model, dtype=dtype, device=device, draft_model=draft_model)
    if loaded.tokenizer is None:
        raise InvalidInputError("the bench writes code prompts and needs a model with a tokenizer")
    offered = [p for p in PEERS if p != PEERS[2] or draft_model]
    if loaded.target.state_dtype != loaded.target.dtype:  # a fast forward, computing in float32
        offered = [PEERS[0], *(p + WIDE for p in offered)]
    chosen = list(methods) or [
        *offered,
        "none",
        "prompt-lookup",
        "token-recycling",
        *(["speculative-sampling"] if draft_model else []),
        "auto",
    ]
    number = str(loaded.target.dtype).removeprefix("torch.")
    if peers:
        missing = [name for name in engines.ENGINES if name not in engines.installed()]
        if missing:
            install = "isthmus bench peers --install"
            console(stderr=True).print(*(f"without {n}: {install} {n}" for n in missing), sep="\n")
        chosen += [m for m in engines.methods(number) if m not in chosen]
    ids = pycode.prompts(prompts, loaded.tokenizer, prompt_tokens, prose=prose)
    screen = console(stderr=True)
    with screen.status("") as status:

        def tell(name: str, done: int, total: int) -> None:
            status.update(f"{done}/{total} {name}")

        rows = bench(
            loaded,
            ids,
            chosen,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            repeats=repeats,
            ruler=Ruler(progress=tell),
            checkpoint=Path(locate(model)),
        )
    if json:
        print_json(
            {
                "model": model or "embedded",
                "dtype": number,
                "device": str(loaded.target.device),
                "max_new_tokens": max_new_tokens,
                "prose": prose,
                "temperature": temperature,
                "repeats": repeats,
                "methods": [r.to_dict() for r in rows],
                "provenance": vars(Provenance.gather()),
            }
        )
        return 0
    from rich.table import Table

    table = Table(
        title=f"{model or 'embedded model'}, {number}, {prompts} prompts, T = {temperature:g}"
    )
    table.add_column("method")
    table.add_column("numbers")
    for heading in ("tokens/s", "speed-up", "acceptance length", "forwards", "same output"):
        table.add_column(heading, justify="right")
    for row in rows:
        length = row.acceptance_length
        table.add_row(
            row.about or row.name,
            row.precision,
            f"{row.tokens_per_s:.{1 if row.tokens_per_s >= 10 else 3}f}",
            str(row.speedup),
            "" if length is None else f"{length:.2f}",
            "" if row.forwards is None else str(row.forwards),
            f"{row.same}/{prompts} ({row.agreeing:.0%})" if temperature == 0 else "sampled",
        )
    table.caption = "same output: prompts, and the share of tokens before the first difference"
    if loaded.target.why_general:
        table.caption += f"; module by module: {loaded.target.why_general}"
    console().print(table)
    return 0


def peers(*, install: str = "", json: bool = False) -> int:
    """List other decoding engines for ``isthmus bench decode --peers``, or install one.

    Each lives in a Python environment of its own in the user cache folder, with its converter:
    a gigabyte where the converter needs torch, and some minutes where pip has to compile.

    Args:
        install: Name of the engine to install, afresh if it is there already.
        json: Print one JSON object and nothing else on standard output.
    """
    from isthmus.workbench import peers as engines

    if install:
        engines.install(install)
    there = engines.installed()
    if json:
        print_json(
            {
                name: {
                    "installed": name in there,
                    "folder": str(engines.environment(name)),
                    "precisions": peer.precisions,
                    "requirements": peer.requirements,
                }
                for name, peer in engines.ENGINES.items()
            }
        )
        return 0
    from rich.table import Table

    table = Table()
    for heading in ("engine", "numbers", "installed"):
        table.add_column(heading)
    for name, peer in engines.ENGINES.items():
        state = str(engines.environment(name)) if name in there else f"no: --install {name}"
        table.add_row(name, ", ".join(peer.precisions), state)
    console().print(table)
    return 0


def family(
    *systems: str,
    target: str = "pycode-m",
    prompts: int = 16,
    prompt_tokens: int = 32,
    max_new_tokens: int = 24,
    seed: int = 0,
    json: bool = False,
) -> int:
    """Put the systems of the speculative family on one bench: one target, the same prompts.

    Drafters are trained on first use, some minutes each, and kept.

    Args:
        systems: Systems to compare; all of the family when none is named.
        target: Reference model that is decoded.
        prompts: Number of prompts, from held-out files of Python's standard library.
        prompt_tokens: Length of each prompt.
        max_new_tokens: Tokens to write for each; end tokens are ignored.
        seed: Seed of the draws at temperature 1, which all systems share.
        json: Print one JSON object and nothing else on standard output.
    """
    quiet_transformers()
    from rich.table import Table

    from isthmus.claims import Provenance
    from isthmus.workbench.family import family_bench

    with console(stderr=True).status("") as status:
        lines = family_bench(
            systems,
            target=target,
            prompts=prompts,
            prompt_tokens=prompt_tokens,
            max_new_tokens=max_new_tokens,
            seed=seed,
            report=status.update,
        )
    if json:
        found = {"target": target, "systems": [line.to_dict() for line in lines]}
        print_json(found | {"provenance": vars(Provenance.gather())})
        return 0
    table = Table(
        title=f"{target}, {prompts} prompts of {prompt_tokens} tokens, {max_new_tokens} new ones",
        caption="tokens/forward: acceptance length; time: seconds per token over plain decoding's",
    )
    table.add_column("system")
    table.add_column("lossless")
    for heading in ("tokens/forward", "forwards", "time", "same output"):
        table.add_column(heading, justify="right")
    for heading in ("T = 1: tokens/forward", "same output"):
        table.add_column(heading, justify="right")
    left_out = []
    for line in lines:
        if line.greedy is None:
            left_out.append(f"{line.name}: {line.reason}")
            continue
        table.add_row(
            line.name,
            "yes" if line.lossless else "no",
            f"{line.greedy.acceptance_length:.2f}",
            str(line.greedy.forwards),
            f"{line.slowdown:.2f}",
            f"{line.greedy.same}/{prompts}",
            f"{line.sampled.acceptance_length:.2f}" if line.sampled else "greedy only",
            f"{line.sampled.same}/{prompts}" if line.sampled else "",
        )
    console().print(table)
    if left_out:
        console().print("not on this bench:", *(f"  {each}" for each in left_out), sep="\n")
    return 0


def guide(
    *data: Path,
    model: Annotated[str, Parameter(name=["--model", "-m"])] = "",
    draft_model: str = "",
    batch: int = 1,
    prompts: int = 8,
    prompt_tokens: int = 96,
    max_new_tokens: int = 32,
    temperature: float = 0.0,
    dtype: str = "auto",
    device: str = "auto",
    json: bool = False,
) -> int:
    """Say which drafter fits a model and its texts, with the numbers that decided.

    The model writes a little after each prompt; every method is replayed on what it wrote, and
    forwards are timed at the batch size asked for.

    Args:
        data: Text files, .jsonl files with a field "text", or folders of them: texts of the kind
            that will be decoded. Default: source of Python's standard library.
        model: Folder or hub id of a checkpoint, or a reference model; default the embedded one.
        draft_model: Smaller model with the same vocabulary, if one could be used.
        batch: Prompts that will be decoded together.
        prompts: Number of prompts to probe with.
        prompt_tokens: Tokens of a prompt; longer texts are cut.
        max_new_tokens: Tokens to write after each.
        temperature: The temperature that will be used; 0 is greedy.
        dtype: auto, float32, bfloat16, float16 or float64.
        device: auto, cpu, cuda ...
        json: Print one JSON object and nothing else on standard output.
    """
    if min(batch, prompts, prompt_tokens, max_new_tokens) < 1:
        raise InvalidInputError("batch, prompts and numbers of tokens must be at least 1")
    quiet_transformers()
    from isthmus import registry
    from isthmus.api import load
    from isthmus.signals.text import read_texts
    from isthmus.workbench import pycode

    loaded = load(model, dtype=dtype, device=device, draft_model=draft_model)
    if loaded.tokenizer is None:
        raise InvalidInputError("the guide reads texts and needs a model with a tokenizer")
    if data:
        texts = read_texts(data)[:prompts]
        ids = [loaded.encode(text)[:prompt_tokens].tolist() for text in texts]
    else:
        ids = pycode.prompts(prompts, loaded.tokenizer, prompt_tokens)
    slug = "speculative-survey-closer"
    system: Any = registry.load(slug)
    settings = registry.load_module(registry.find(slug)).Settings(
        tokens=max_new_tokens, temperature=temperature
    )
    advisor = system(settings)
    with console(stderr=True).status("probing"):
        advice = advisor.advise(advisor.probe(loaded, ids, batch=batch))
    if json:
        print_json(vars(advice))
        return 0
    screen = console()
    options = ", ".join(f"{k}={v!r}" for k, v in advice.options.items())
    screen.print(f"advice: {advice.choice}", f"  generate(..., {options})", sep="\n")
    for reason in advice.reasons:
        screen.print(f"  {reason}")
    for name, why in advice.excluded.items():
        screen.print(f"  not {name}: {why}")
    return 0


def roofline(
    *,
    model: Annotated[str, Parameter(name=["--model", "-m"])] = "",
    cached: tuple[int, ...] = (),
    dtype: str = "auto",
    device: str = "auto",
    figure: Path | None = None,
    json: bool = False,
) -> int:
    """Measure what this machine can do, and how near the forwards of a model come to it.

    The floor of a forward is the time of reading the weights and the cache once, or of
    multiplying them, whichever is longer. Where a forward takes more than twice its floor, the
    rest is called overhead.

    Args:
        model: Folder or hub id of a checkpoint, or a reference model; default the embedded one.
        cached: Cached tokens that forwards are timed on; give several times. Default: 128, 512 and
            2048, as far as the model's context goes.
        dtype: auto, float32, bfloat16, float16 or float64.
        device: auto, cpu, cuda ...
        figure: Draw the roof and the forwards under it: a .png, .svg or .pdf file.
        json: Print one JSON object and nothing else on standard output.
    """
    quiet_transformers()
    from isthmus.api import load
    from isthmus.laws.forwards import check_picture, draw, forwards
    from isthmus.laws.roofline import dtype_name, roof_of

    if figure is not None:
        check_picture(figure)
    target = load(model, dtype=dtype, device=device).target
    number, name = dtype_name(target.dtype), model or "embedded model"
    with console(stderr=True).status("measuring the machine") as status:
        roof = roof_of(target.device, fresh=True)
        status.update("timing forwards")
        found = forwards(target, roof, cached=cached)
    if figure is not None:
        draw(figure, roof, found, number, title=f"{name}, {number}, on {roof.device}")
    if json:
        from isthmus.claims import Provenance

        rows = [each.to_dict() for each in found]
        machine = roof.to_dict() | {"ridge": roof.ridge(number)}
        print_json(
            {
                "model": model or "embedded",
                "dtype": number,
                "machine": machine,
                "forwards": rows,
                "provenance": vars(Provenance.gather()),
            }
        )
        return 0
    from rich.table import Table

    screen = console()
    screen.print(f"{roof.device}, {roof.threads} threads, torch {roof.torch}")
    lines = [(f"read {_size(size)} again and again", rate, "GB/s") for size, rate in roof.read] + [
        (f"multiply {kind}", rate, "GFLOP/s") for kind, rate in roof.products.items()
    ]
    for what, rate, unit in lines:
        screen.print(
            f"  {what}: {rate.best / 1e9:.1f} {unit}, quartiles {rate.low / 1e9:.1f} to "
            f"{rate.high / 1e9:.1f}{', noisy' if rate.noisy else ''}"
        )
    screen.print(f"  start an operation: {1e6 * roof.launch_s:.2f} us")
    screen.print(f"  memory decides below {roof.ridge(number):.1f} FLOP per byte in {number}")
    if target.why_general:
        screen.print(f"  module by module: {target.why_general}")
    if roof.noisy:
        screen.print("  other programs were using this machine; take all of this with care")
    table = Table(title=f"{name}, {number}, {_size(found[0].work.bytes)} a token")
    for heading in ("cached", "nodes", "floor ms", "measured ms", "efficiency"):
        table.add_column(heading, justify="right")
    table.add_column("what binds")
    for row in found:
        table.add_row(
            str(row.cached),
            str(row.nodes),
            f"{row.floor_ms:.2f}",
            f"{row.measured_ms:.2f}",
            f"{row.efficiency:.0%}",
            row.binds,
            end_section=row.nodes == 64,
        )
    screen.print(table)
    return 0


def growth(
    *,
    model: Annotated[tuple[str, ...], Parameter(name=["--model", "-m"])] = (),
    cached: tuple[int, ...] = (),
    rows: tuple[int, ...] = (),
    dtype: str = "auto",
    device: str = "auto",
    figure: Path | None = None,
    json: bool = False,
) -> int:
    """Time one new token as the model, the cached text and the batch grow, beside the floors.

    Args:
        model: Folders, hub ids or reference models; give several times. Default: the embedded one,
            pycode-100m and pycode-500m, which it was grown to.
        cached: Cached tokens; give several times. Batches are timed at the first. Default: 128,
            512, 1024 and 2048, as far as a model's context goes.
        rows: Batch sizes; give several times. Default: 1, 2, 4 ... 32.
        dtype: auto, float32, bfloat16, float16 or float64.
        device: auto, cpu, cuda ...
        figure: Draw the three curves: a .png, .svg or .pdf file.
        json: Print one JSON object and nothing else on standard output.
    """
    quiet_transformers()
    from isthmus.api import load
    from isthmus.laws.forwards import check_picture
    from isthmus.laws.growth import CACHED, ROWS, draw_growth, growth
    from isthmus.laws.roofline import dtype_name, roof_of

    if min((*cached, *rows), default=1) < 1:
        raise InvalidInputError("cached tokens and rows must be at least 1")
    if figure is not None:
        check_picture(figure)
    points, names = [], model or ("", "pycode-100m", "pycode-500m")
    roof = None
    with console(stderr=True).status("measuring the machine") as status:
        for each in names:
            name = each or "embedded model"
            target = load(each, dtype=dtype, device=device).target
            roof = roof or roof_of(target.device, fresh=True)
            status.update(f"timing {name}")
            lengths = sorted(cached) or CACHED
            points += growth({name: target}, roof, cached=lengths, rows=sorted(rows) or ROWS)
            number = dtype_name(target.dtype)
            del target
    assert roof is not None
    if figure is not None:
        draw_growth(figure, points, title=f"{number}, {roof.device}")
    if json:
        from isthmus.claims import Provenance

        print_json(
            {
                "machine": roof.to_dict(),
                "dtype": number,
                "points": [p.to_dict() for p in points],
                "provenance": vars(Provenance.gather()),
            }
        )
        return 0
    from rich.table import Table

    table = Table(title=f"one new token a row, {number}, {roof.memory.best / 1e9:.1f} GB/s")
    for heading in ("model", "weights", "cached", "rows", "floor ms", "measured ms", "ms a token"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for i, p in enumerate(points):
        table.add_row(
            p.model,
            _size(p.weights),
            str(p.cached),
            str(p.rows),
            f"{p.floor_ms:.2f}",
            f"{p.measured_ms:.2f}",
            f"{p.measured_ms / p.rows:.2f}",
            end_section=i + 1 == len(points) or points[i + 1].model != p.model,
        )
    console().print(table)
    return 0


def _size(count: float) -> str:
    """A number of bytes for people."""
    return f"{count / 2**20:.3g} MiB" if count < 2**30 else f"{count / 2**30:.3g} GiB"
