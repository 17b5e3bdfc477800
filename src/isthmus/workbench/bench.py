"""One bench for decoding methods: same model, same prompts, interleaved, outputs compared.

Every method of isthmus and of transformers decodes the same prompts in turn on one clock
(:class:`isthmus.claims.Ruler`), and so do other engines in processes of their own
(:mod:`isthmus.workbench.peers`). Token counts come from the token ids, never from decoded text.
"""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from isthmus.claims import Ratio, Ruler, ratio
from isthmus.decoding.drafters import ModelDrafter
from isthmus.decoding.model import Model
from isthmus.decoding.policy import Fixed
from isthmus.errors import InvalidInputError, UnknownNameError
from isthmus.models.hub import load_checkpoint
from isthmus.roles import Acceptance, Policy, Shape
from isthmus.workbench import peers
from isthmus.workbench.reference import reference

PEERS = ("transformers", "transformers prompt lookup", "transformers assisted")
"""What transformers itself offers for the same job; " float32" behind a name widens the weights."""

WIDE = " float32"

SETTLE_S = 0.25
"""Pause before each run beside other processes: their threads may spin that long after a run."""


def reference_model(name: str, draft: str = "", *, dtype: str = "float32") -> Model:
    """A reference model of the workbench, with a draft model if named, on the CPU.

    Claims compare methods, so target and drafters run on the same footing: module by module.

    Raises:
        UnknownNameError: No such reference model.
    """

    def hub(each: str) -> Any:
        return load_checkpoint(str(reference(each)), dtype=dtype, device="cpu")

    checkpoint = hub(name)
    draft_model = hub(draft).model if draft else None
    return Model(checkpoint.model, checkpoint.tokenizer, draft_model=draft_model, fast=False)


@dataclass
class Contestant:
    """What one method did over all prompts.

    Attributes:
        name: The method.
        precision: Numbers that it computes with.
        about: Package and version of another engine.
        tokens: New tokens of each prompt, of the last run.
        forwards: Target forwards after the prefill; None where the peer does not say.
        drafted: Draft tokens scored.
        median_s: Seconds over all prompts, median of the repeats.
        speedup: Against the first contestant, paired by repeat.
        same: Prompts whose output equals the first contestant's, or that of transformers in
            float32 where it takes part.
        agreeing: Share of the tokens that come before the first difference from it.
        overhead: Share of the time outside target and drafter, or outside another engine's
            process; None for transformers.
    """

    name: str
    precision: str = ""
    about: str = ""
    tokens: list[list[int]] = field(default_factory=list)
    forwards: int | None = None
    drafted: int | None = None
    median_s: float = 0.0
    speedup: Ratio = field(default_factory=lambda: Ratio(1.0, 1.0, 1.0))
    same: int = 0
    agreeing: float = 1.0
    overhead: float | None = None

    @property
    def new_tokens(self) -> int:
        """Tokens emitted over all prompts."""
        return sum(len(t) for t in self.tokens)

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second, prefill included."""
        return self.new_tokens / max(self.median_s, 1e-9)

    @property
    def acceptance_length(self) -> float | None:
        """Tokens per target forward."""
        return None if self.forwards is None else self.new_tokens / max(1, self.forwards)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        length = self.acceptance_length
        return {
            "method": self.name,
            "precision": self.precision,
            "about": self.about,
            "new_tokens": self.new_tokens,
            "tokens_per_s": round(self.tokens_per_s, 2),
            "median_s": round(self.median_s, 4),
            "speedup": round(self.speedup.median, 3),
            "speedup_low": round(self.speedup.low, 3),
            "speedup_high": round(self.speedup.high, 3),
            "acceptance_length": None if length is None else round(length, 3),
            "target_forwards": self.forwards,
            "drafted": self.drafted,
            "same_output": self.same,
            "agreeing": round(self.agreeing, 4),
            "prompts": len(self.tokens),
            "overhead": None if self.overhead is None else round(self.overhead, 4),
        }


def bench(
    model: Model,
    prompts: Sequence[Sequence[int]],
    methods: Sequence[str],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    repeats: int = 5,
    ruler: Ruler | None = None,
    checkpoint: Path | None = None,
) -> list[Contestant]:
    """Decode the same prompts with several methods, interleaved.

    Args:
        model: The model, and its draft model where a method needs one.
        prompts: Token ids of each prompt.
        methods: Names of drafters, of :data:`PEERS` and of other engines, such as
            ``"ctranslate2 int8"``; the first is what the others are compared with.
        max_new_tokens: Tokens of each prompt; end tokens are ignored so that all do equal work.
        temperature: 0 is greedy; otherwise outputs are not compared.
        repeats: Timed repeats after one warm-up.
        ruler: The clock.
        checkpoint: Folder of the model, for other engines.

    Raises:
        UnknownNameError: No such method.
        InvalidInputError: Another engine is not installed, there is no folder for it, or it was
            asked to sample.
        IsthmusError: Another engine failed.
    """
    ids = [torch.tensor([list(p)], dtype=torch.int64) for p in prompts]
    contestants = {name: Contestant(name) for name in methods}
    hub = model.target.model
    wide = copy.deepcopy(hub).float() if any(m.endswith(WIDE) for m in methods) else hub
    ruler = ruler or Ruler()
    with ExitStack() as workers:
        runs = {}
        for name, contestant in contestants.items():
            engine = peers.parse(name)
            if engine is None:
                kind, peer = name.removesuffix(WIDE), wide if name.endswith(WIDE) else hub
                contestant.precision = str(peer.dtype).removeprefix("torch.")
                if kind in PEERS:
                    options = _peer_options(kind, model, max_new_tokens, temperature)
                    runs[name] = _run_peer(peer, contestant, ids, options)
                    continue
                contestant.precision = getattr(model.target, "weights", "") or contestant.precision
                runs[name] = _run(model, contestant, ids, max_new_tokens, temperature)
                continue
            if checkpoint is None or temperature > 0:
                raise InvalidInputError(
                    f"{name} decodes greedily from the folder of a checkpoint; give one as the "
                    "model, and temperature 0"
                )
            worker = peers.Worker(*engine, checkpoint, threads=torch.get_num_threads())
            workers.enter_context(worker)
            contestant.precision, contestant.about = engine[1], worker.about
            runs[name] = _run_worker(worker, contestant, prompts, max_new_tokens)
        if any(contestant.about for contestant in contestants.values()):
            ruler = replace(ruler, progress=_settling(ruler.progress))
        timings = ruler.compare(runs, repeats=repeats)
    # without a unit for it bfloat16 rounds more in transformers than here
    first = contestants.get(PEERS[0] + WIDE, contestants[methods[0]])
    for name, contestant in contestants.items():
        contestant.median_s = timings[name].median_s
        contestant.speedup = ratio(timings[methods[0]], timings[name])
        pairs = list(zip(contestant.tokens, first.tokens, strict=True))
        contestant.same = sum(a == b for a, b in pairs)
        contestant.agreeing = agreeing(contestant.tokens, first.tokens)
    return list(contestants.values())


def agreeing(tokens: Sequence[Sequence[int]], first: Sequence[Sequence[int]]) -> float:
    """Share of the tokens of texts ``first`` that come before the first difference from them.

    Example:
        >>> agreeing([[1, 2, 3], [4, 9]], [[1, 2, 3], [4, 5]])
        0.8
    """
    before = sum(_common(a, b) for a, b in zip(tokens, first, strict=True))
    return before / max(1, sum(map(len, first)))


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens before the first difference."""
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


def _settling(
    progress: Callable[[str, int, int], None] | None,
) -> Callable[[str, int, int], None]:
    """The same report, and time for other processes to come to rest."""

    def report(name: str, done: int, total: int) -> None:
        if progress is not None:
            progress(name, done, total)
        time.sleep(SETTLE_S)

    return report


def _run_worker(
    worker: peers.Worker, out: Contestant, prompts: Sequence[Sequence[int]], budget: int
) -> Callable[[], None]:
    def run() -> None:
        start = time.perf_counter()
        answers = [worker.generate(list(prompt), budget) for prompt in prompts]
        out.tokens = [tokens for tokens, _ in answers]
        out.overhead = 1 - sum(s for _, s in answers) / (time.perf_counter() - start)

    return run


def repeats_itself(tokens: Sequence[int], size: int = 8, times: int = 3) -> bool:
    """Whether a text runs in a loop: some n-gram of ``size`` tokens occurs more than ``times``.

    An undertrained model loops under greedy decoding, which flatters every drafter that looks
    things up; claims leave such answers out and say how many.

    Example:
        >>> repeats_itself([1, 2, 3, 4] * 8), repeats_itself(list(range(32)))
        (True, False)
    """
    grams = Counter(tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1))
    return max(grams.values(), default=0) > times


@dataclass(frozen=True)
class Answers:
    """Answers of one method to a list of prompts.

    Attributes:
        tokens: New tokens of each prompt.
        lengths: Acceptance length on each prompt.
        forwards: Target forwards on each prompt.
    """

    tokens: list[list[int]]
    lengths: list[float]
    forwards: list[int]

    def acceptance_length(self, rows: Sequence[int] | None = None) -> float:
        """Tokens per target forward over the given prompts, over all of them when None."""
        chosen = range(len(self.tokens)) if rows is None else rows
        return sum(len(self.tokens[r]) for r in chosen) / sum(self.forwards[r] for r in chosen)


def answer(
    model: Model,
    prompts: Sequence[Sequence[int]],
    policy: str | Policy,
    *,
    max_new_tokens: int,
    seed: int = 0,
    acceptance: Acceptance | None = None,
    batch: int = 1,
    **sampling: Any,
) -> Answers:
    """Decode prompts in batches of ``batch``, ignoring end tokens, and keep the counts."""
    results = [
        result
        for first in range(0, len(prompts), batch)
        for result in model.generate(
            [torch.tensor(list(prompt)) for prompt in prompts[first : first + batch]],
            max_new_tokens=max_new_tokens,
            drafter=policy,
            acceptance=acceptance,
            ignore_end=True,
            seed=seed + first,
            **sampling,
        )
    ]
    return Answers(
        [r.tokens for r in results],
        [r.stats.acceptance_length for r in results],
        [r.stats.target_forwards for r in results],
    )


def acceptance_rates(model: Model, prompts: Sequence[Sequence[int]], tokens: int) -> list[float]:
    """Share of the draft model's tried tokens that stand, of each prompt, at temperature 1."""
    assert model.draft_model is not None
    policy = Fixed(ModelDrafter(model.draft_model), Shape(4, 4, 1))
    rates = []
    for row, prompt in enumerate(prompts):
        ids = torch.tensor(list(prompt))
        options: dict[str, Any] = {"temperature": 1.0, "ignore_end": True, "seed": row}
        rounds = model.generate(ids, max_new_tokens=tokens, drafter=policy, **options).rounds
        stood = sum(r.accepted for r in rounds)
        rates.append(stood / max(1, stood + sum(r.accepted < r.nodes for r in rounds)))
    return rates


def _run(
    model: Model, out: Contestant, ids: list[torch.Tensor], budget: int, temperature: float
) -> Callable[[], None]:
    policy = model.policy(out.name)

    def run() -> None:
        results = [
            model.generate(
                prompt[0],
                max_new_tokens=budget,
                drafter=policy,
                temperature=temperature,
                ignore_end=True,
                seed=0,
            )
            for prompt in ids
        ]
        out.tokens = [r.tokens for r in results]
        out.forwards = sum(r.stats.target_forwards for r in results)
        out.drafted = sum(r.stats.drafted for r in results)
        seconds = sum(r.stats.seconds for r in results)
        out.overhead = sum(r.stats.overhead * r.stats.seconds for r in results) / seconds

    return run


def _peer_options(kind: str, model: Model, budget: int, temperature: float) -> dict[str, Any]:
    options: dict[str, Any] = {
        "max_new_tokens": budget,
        "do_sample": temperature > 0,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    if temperature > 0:
        options |= {"temperature": temperature, "top_k": 0}
    if kind == "transformers prompt lookup":
        options["prompt_lookup_num_tokens"] = 10
    elif kind == "transformers assisted":
        if model.draft_model is None:
            raise UnknownNameError("method", kind, [], hint="- it needs a draft model")
        options["assistant_model"] = model.draft_model.model
    return options


def _run_peer(
    hub: Any, out: Contestant, ids: list[torch.Tensor], options: dict[str, Any]
) -> Callable[[], None]:
    def run() -> None:
        calls = 0

        def count(module: Any, args: Any, output: Any) -> None:
            nonlocal calls
            calls += 1

        handle = hub.register_forward_hook(count)
        try:
            torch.manual_seed(0)
            rows = [
                hub.generate(
                    prompt.to(hub.device), attention_mask=torch.ones_like(prompt), **options
                )
                for prompt in ids
            ]
        finally:
            handle.remove()
        out.forwards = calls
        out.tokens = [r[0, p.shape[1] :].tolist() for r, p in zip(rows, ids, strict=True)]

    return run
