"""Speed of translation engines at equal output, on the same weights and the same sources.

The protocol: every engine gets the same source ids and the same number of threads, decodes
greedily and writes the same number of tokens (an end token is a token like any other). Outputs are
compared token by token with those of transformers in float32. Engines take turns, after one round
that is not timed; medians are reported. Encoder time counts, loading and tokenising do not. One
sentence at a time (latency) and batches (throughput) are cells of their own, for an engine may be
fast at one of them only.

CTranslate2 runs in a process of its own and looks at the clock there
(:mod:`isthmus.workbench.peers`).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from isthmus.claims import Ratio, Ruler, Timing, ratio
from isthmus.decoding.fast import FastTarget, best_target
from isthmus.decoding.model import Model
from isthmus.errors import InvalidInputError, MismatchError, UnknownNameError
from isthmus.folders import kept
from isthmus.models.encoder_decoder import Config, EncoderDecoder
from isthmus.models.hub import no_progress_bars
from isthmus.workbench import peers
from isthmus.workbench.bench import SETTLE_S, agreeing

OWN = ("transformers", "isthmus", "isthmus int8")
"""Engines in this process; all decode in float32, int8 is that of the weights."""

PEER = "ctranslate2"

Batches = Sequence[Sequence[Sequence[int]]]
"""Source ids of sentences in batches."""

Engine = Callable[[Batches, int], tuple[list[list[int]], list[float]]]
"""Target ids of all sentences of some batches, a given number of each, and seconds of each batch.
"""


@dataclass
class Cell:
    """What one engine did at one batch size.

    Attributes:
        engine: Its name.
        batch: Sentences at once.
        about: Package and version of an engine outside.
        tokens: Target ids of each sentence.
        samples_s: Seconds over all batches, of each repeat.
        calls_s: Seconds of each batch of each repeat.
        speedup: Against the first engine, paired by repeat.
        same: Sentences whose output equals that of the first engine.
        agreeing: Share of the tokens before the first difference from it.
    """

    engine: str
    batch: int
    about: str = ""
    tokens: list[list[int]] = field(default_factory=list)
    samples_s: list[float] = field(default_factory=list)
    calls_s: list[float] = field(default_factory=list)
    speedup: Ratio = field(default_factory=lambda: Ratio(1.0, 1.0, 1.0))
    same: int = 0
    agreeing: float = 1.0

    @property
    def tokens_per_s(self) -> float:
        """Target tokens per second, encoder time included."""
        return sum(map(len, self.tokens)) / statistics.median(self.samples_s)

    def latency_ms(self, percent: float) -> float:
        """Time that so many percent of the batches stay within, in milliseconds."""
        calls = sorted(self.calls_s)
        return 1e3 * calls[min(len(calls) - 1, round(percent / 100 * (len(calls) - 1)))]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "engine": self.engine,
            "batch": self.batch,
            "about": self.about,
            "sentences": len(self.tokens),
            "tokens": sum(map(len, self.tokens)),
            "tokens_per_s": round(self.tokens_per_s, 1),
            "speedup": round(self.speedup.median, 3),
            "speedup_low": round(self.speedup.low, 3),
            "speedup_high": round(self.speedup.high, 3),
            "p50_ms": round(self.latency_ms(50), 3),
            "p95_ms": round(self.latency_ms(95), 3),
            "same_output": self.same,
            "agreeing": round(self.agreeing, 4),
        }


def engines() -> list[str]:
    """Names of the engines that can be timed here."""
    there = [f"{PEER} {p}" for p in peers.ENGINES[PEER].precisions] if peers.available(PEER) else []
    return [*OWN, *there]


def translation_bench(
    checkpoint: Path,
    sources: Sequence[Sequence[int]],
    names: Sequence[str],
    *,
    batches: Sequence[int] = (1, 32),
    alone: int = 8,
    new_tokens: int = 32,
    repeats: int = 5,
    ruler: Ruler | None = None,
) -> list[Cell]:
    """Time engines on one model.

    Args:
        checkpoint: Folder of an encoder-decoder of transformers.
        sources: Token ids of each source, its end included.
        names: Engines: of :data:`OWN`, ``"ctranslate2"`` or with its precision behind it; the
            first is what the others are compared with.
        batches: Sentences at once, a cell each.
        alone: Sentences of the cell of single sentences; all take part in the others.
        new_tokens: Tokens that every sentence gets.
        repeats: Timed rounds.
        ruler: The clock; it sets the order and what is reported.

    Returns:
        A cell for each batch size and engine.

    Raises:
        UnknownNameError: No such engine.
        InvalidInputError: It is not installed, or a number is out of range.
        MismatchError: An engine wrote another number of tokens.
        IsthmusError: It could not load the checkpoint.
    """
    if min((*batches, alone, new_tokens, len(sources)), default=0) < 1 or not names:
        raise InvalidInputError("the bench needs engines, sources, and numbers of at least 1")
    ruler = ruler or Ruler()
    cells: list[Cell] = []
    with ExitStack() as workers:
        made, about = _engines(checkpoint, names, workers)
        if any(about.values()):  # threads of other processes may spin for a while
            ruler = replace(ruler, progress=_rested(ruler.progress))
        for size in batches:
            some = list(sources[:alone] if size == 1 else sources)
            parts = [some[i : i + size] for i in range(0, len(some), size)]
            row = {name: Cell(name, size, about[name]) for name in made}

            def turn(name: str, row: dict[str, Cell], parts: Batches) -> Callable[[], None]:
                def run() -> None:
                    cell = row[name]
                    cell.tokens, calls = made[name](parts, new_tokens)
                    cell.calls_s += calls
                    cell.samples_s.append(sum(calls))

                return run

            ruler.compare({name: turn(name, row, parts) for name in made}, repeats=repeats)
            cells += _compared(row, len(parts), new_tokens)
    return cells


def _compared(row: dict[str, Cell], parts: int, new_tokens: int) -> list[Cell]:
    """Cells of one batch size without the warm-up, beside the first of them."""
    first = next(iter(row.values()))
    for cell in row.values():
        cell.samples_s, cell.calls_s = cell.samples_s[1:], cell.calls_s[parts:]
    for cell in row.values():
        wrong = {len(t) for t in cell.tokens} - {new_tokens}
        if wrong:
            raise MismatchError(
                f"{cell.engine} wrote {sorted(wrong)[0]} tokens where {new_tokens} were asked for, "
                "so its speed says nothing"
            )
        cell.speedup = ratio(Timing(tuple(first.samples_s)), Timing(tuple(cell.samples_s)))
        cell.same = sum(a == b for a, b in zip(cell.tokens, first.tokens, strict=True))
        cell.agreeing = agreeing(cell.tokens, first.tokens)
    return list(row.values())


def _engines(
    checkpoint: Path, names: Sequence[str], workers: ExitStack
) -> tuple[dict[str, Engine], dict[str, str]]:
    from transformers import AutoModelForSeq2SeqLM

    for name in names:
        if name not in OWN and name.split(" ")[0] != PEER:
            raise UnknownNameError("engine", name, [*OWN, PEER])
    with no_progress_bars():
        model = AutoModelForSeq2SeqLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    made: dict[str, Engine] = {}
    about: dict[str, str] = {}
    for name in names:
        parsed = peers.parse(name)
        about[name] = ""
        if parsed is not None:
            worker = peers.Worker(
                *parsed, checkpoint, threads=torch.get_num_threads(), task="translate"
            )
            workers.enter_context(worker)
            made[name], about[name] = worker.translate, worker.about
        elif name == "transformers":
            made[name] = _timed(partial(_theirs, model))
        else:
            target = best_target(model)
            if name.endswith("int8"):
                if not isinstance(target, FastTarget):
                    raise InvalidInputError(
                        f"{name} needs the compiled forward: {target.why_general}"
                    )
                target.to_int8()
            made[name] = _timed(partial(_ours, Model(target)))
    return made, about


def _timed(translate: Callable[[Sequence[Sequence[int]], int], list[list[int]]]) -> Engine:
    def run(batches: Batches, new_tokens: int) -> tuple[list[list[int]], list[float]]:
        tokens: list[list[int]] = []
        calls = []
        for batch in batches:
            start = time.perf_counter()
            tokens += translate(batch, new_tokens)
            calls.append(time.perf_counter() - start)
        return tokens, calls

    return run


def _theirs(model: Any, batch: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
    width = max(map(len, batch))
    pad = model.config.pad_token_id
    ids = torch.tensor([[*source, *[pad] * (width - len(source))] for source in batch])
    mask = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in batch])
    out = model.generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        num_beams=1,
        max_new_tokens=new_tokens,
        eos_token_id=None,
    )
    found: list[list[int]] = out[:, 1:].tolist()
    return found


def _ours(model: Model, batch: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
    found = model.generate(
        [torch.tensor(source) for source in batch],
        max_new_tokens=new_tokens,
        drafter="none",
        ignore_end=True,
    )
    return [each.tokens for each in found]


def _rested(
    progress: Callable[[str, int, int], None] | None,
) -> Callable[[str, int, int], None]:
    def report(name: str, done: int, total: int) -> None:
        if progress is not None:
            progress(name, done, total)
        time.sleep(SETTLE_S)

    return report


def random_translator(
    encoder_layers: int,
    decoder_layers: int,
    *,
    hidden_size: int = 256,
    vocab_size: int = 8_000,
    seed: int = 0,
) -> Path:
    """Folder of a Marian model with random weights: what it costs does not depend on them.

    Args:
        encoder_layers: Layers of the encoder.
        decoder_layers: Layers of the decoder.
        hidden_size: Width D, a multiple of 64; 256 makes 12-1 and 6-6 of 13 M parameters.
        vocab_size: Tokens V.
        seed: Seed of the weights.
    """
    config = Config.marian(
        vocab_size,
        hidden_size=hidden_size,
        encoder_layers=encoder_layers,
        decoder_layers=decoder_layers,
        num_attention_heads=hidden_size // 64,
        head_dim=64,
        intermediate_size=4 * hidden_size,
    )
    name = f"translator-{encoder_layers}-{decoder_layers}"
    with kept("untrained", name, [repr(config), seed, torch.__version__]) as folder:
        if not (folder / "config.json").exists():
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = EncoderDecoder(config)
            with no_progress_bars():
                model.to_hf().save_pretrained(folder)
        return folder


def random_sources(
    count: int, length: int, vocab_size: int, *, end: int = 1, seed: int = 0
) -> list[list[int]]:
    """Sources of ``length`` random tokens, the last one the end."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(end + 1, vocab_size, (count, length), generator=generator)
    ids[:, -1] = end
    found: list[list[int]] = ids.tolist()
    return found
