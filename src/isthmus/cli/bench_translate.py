"""``isthmus bench translate``: translation engines side by side, outputs compared."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from isthmus.cli.output import console, print_json, quiet_transformers
from isthmus.errors import InvalidInputError


def translate(
    *,
    model: Annotated[str, Parameter(name=["--model", "-m"])] = "",
    layers: tuple[str, ...] = (),
    engines: tuple[str, ...] = (),
    batch: tuple[int, ...] = (),
    data: tuple[str, ...] = (),
    sources: int = 32,
    alone: int = 8,
    source_tokens: int = 24,
    new_tokens: int = 32,
    threads: int = 0,
    repeats: int = 5,
    json: bool = False,
) -> int:
    """Compare engines on the same translation model, the same sources and as many target tokens.

    Greedy, in float32, int8 where a name says so; end tokens are ignored, so that all do equal
    work. Outputs are compared with those of the first engine, by default transformers.

    Args:
        model: Folder of an encoder-decoder, as ``isthmus train marian`` writes it. Default: random
            weights of the depths that ``layers`` names.
        layers: Depths of random models of 13 M parameters, as in 12-1; give several times.
            Default: 12-1 and 6-6.
        engines: Engines to compare; give several times. Default: transformers, isthmus, isthmus
            int8 and, where it is installed, ctranslate2 in float32 and int8.
        batch: Sentences at once; give several times. Default: 1 and 32.
        data: Pairs whose held-out sources are translated, as for ``isthmus train``; exact answers
            are counted. Default: random sources.
        sources: Number of sources.
        alone: How many of them are also translated one at a time.
        source_tokens: Tokens of a random source.
        new_tokens: Tokens to write for each.
        threads: Threads of every engine; default as torch has it.
        repeats: Timed repeats after one warm-up; medians are shown.
        json: Print one JSON object and nothing else on standard output.
    """
    if repeats < 1 or threads < 0 or min((sources, alone, source_tokens, new_tokens, *batch)) < 1:
        raise InvalidInputError("numbers of the bench must be at least 1")
    if model and layers:
        raise InvalidInputError("give a model or the layers of random ones, not both")
    if data and not model:
        raise InvalidInputError("data is translated by a trained model; name its folder (--model)")
    quiet_transformers()
    import torch

    from isthmus.claims import Provenance, Ruler
    from isthmus.workbench import peers
    from isthmus.workbench import translation as bench

    if threads:
        torch.set_num_threads(threads)
    chosen = list(engines) or bench.engines()
    tables = []
    with console(stderr=True).status("") as status:
        for name in (model,) if model else layers or ("12-1", "6-6"):
            folder = Path(name) if model else bench.random_translator(*_depths(name))
            ids, targets, tokenizer = _asked(folder, data, sources, source_tokens)

            def tell(engine: str, done: int, total: int, name: str = name) -> None:
                status.update(f"{name}: {done}/{total} {engine}")

            cells = bench.translation_bench(
                folder,
                ids,
                chosen,
                batches=batch or (1, 32),
                alone=alone,
                new_tokens=new_tokens,
                repeats=repeats,
                ruler=Ruler(progress=tell),
            )
            rights = [_right(cell.tokens, targets, tokenizer) for cell in cells]
            tables.append((name, cells, rights))
    if not engines and not peers.available(bench.PEER):
        console(stderr=True).print(
            f"without {bench.PEER}: isthmus bench peers --install {bench.PEER}"
        )
    if json:
        models = [
            {
                "model": name,
                "cells": [
                    cell.to_dict() | ({} if right is None else {"exact": right})
                    for cell, right in zip(cells, rights, strict=True)
                ],
            }
            for name, cells, rights in tables
        ]
        print_json(
            {
                "models": models,
                "threads": torch.get_num_threads(),
                "new_tokens": new_tokens,
                "repeats": repeats,
                "provenance": vars(Provenance.gather()),
            }
        )
        return 0
    from rich.table import Table

    for name, cells, rights in tables:
        kind = "trained" if model else "layers, random weights"
        table = Table(
            title=f"{name} {kind}, {torch.get_num_threads()} threads, {new_tokens} tokens each"
        )
        table.add_column("engine")
        exact = [] if rights[0] is None else ["exact"]
        headings = ("batch", "tokens/s", "speed-up", "p50 ms", "p95 ms", "same output", *exact)
        for heading in headings:
            table.add_column(heading, justify="right")
        for i, (cell, right) in enumerate(zip(cells, rights, strict=True)):
            table.add_row(
                f"{cell.engine} ({cell.about})" if cell.about else cell.engine,
                str(cell.batch),
                f"{cell.tokens_per_s:.0f}",
                str(cell.speedup),
                f"{cell.latency_ms(50):.1f}",
                f"{cell.latency_ms(95):.1f}",
                f"{cell.same}/{len(cell.tokens)} ({cell.agreeing:.0%})",
                *([] if right is None else [f"{right:.1%}"]),
                end_section=i + 1 == len(cells) or cells[i + 1].batch != cell.batch,
            )
        table.caption = "time of a batch within which 50 and 95 % stay; same: sentences, tokens"
        console().print(table)
    return 0


def _depths(name: str) -> tuple[int, int]:
    parts = name.split("-")
    if len(parts) != 2 or not all(p.isdigit() and int(p) > 0 for p in parts):
        raise InvalidInputError(f"layers are two numbers as in 12-1, not {name!r}")
    return int(parts[0]), int(parts[1])


def _asked(
    folder: Path, data: tuple[str, ...], count: int, length: int
) -> tuple[list[list[int]], list[str], Any]:
    """Source ids, and where there is data its targets and the tokenizer."""
    from transformers import AutoConfig

    from isthmus.models.hub import load_tokenizer
    from isthmus.workbench.data import data as named_data
    from isthmus.workbench.translation import random_sources

    if not (folder / "config.json").exists():
        raise InvalidInputError(
            f"{folder} is no folder of a model; train one: isthmus train marian"
        )
    config = AutoConfig.from_pretrained(folder)
    if not config.is_encoder_decoder:
        raise InvalidInputError(f"{folder} is no encoder-decoder; see: isthmus bench decode")
    if not data:
        end = config.eos_token_id
        return random_sources(count, length, config.vocab_size, end=end), [], None
    tokenizer = load_tokenizer(str(folder))
    if tokenizer is None:
        raise InvalidInputError(f"{folder} has no tokenizer, so it reads no data")
    pairs = list(named_data(data, "pairs").valid)[:count]
    if len(pairs) < count:
        raise InvalidInputError(f"there are {len(pairs)} held-out pairs, fewer than {count}")
    return [tokenizer(p.source).input_ids for p in pairs], [p.target for p in pairs], tokenizer


def _right(tokens: list[list[int]], targets: list[str], tokenizer: Any) -> float | None:
    """Share of exact answers, each cut at its end token."""
    if not targets:
        return None
    end = tokenizer.eos_token_id
    cut = [text[: text.index(end)] if end in text else text for text in tokens]
    said = [tokenizer.decode(text, skip_special_tokens=True) for text in cut]
    right: int = sum(a == b for a, b in zip(said, targets, strict=False))
    return right / len(said)
