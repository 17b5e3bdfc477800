"""Structured outputs: how much of JSON Schema an engine holds, what it costs, what it is worth.

Paper: Geng, Cooper, Moskal, Jenkins, Berman, Ranchin, West, Horvitz, Nori. Generating Structured
    Outputs from Language Models: Benchmark and Studies (JSONSchemaBench). 2025. arXiv:2501.10868
Idea: Judge constrained decoding by three measures: coverage (declared, empirical and true),
    efficiency (compile time, mask time, forced text) and the quality of what is written.
Differs: The schemas are the official test suite's (a slice that is shipped), forty of our own in
    the benchmark's ten styles, and those of function heads, instead of 9,558 from the wild. True
    coverage is judged on the suite's instances, written with one space after separators and keys
    in the given order. Quality is measured on one small model that was tuned to call functions.
    Peers other than xgrammar, which is measured where it is installed, are left out.

    schema ──compile──> grammar ──mask of each node──> law ──> answer ──jsonschema──> valid?
                           └── text without a choice ──> drafted for free
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import quantiles
from typing import Any, ClassVar

import numpy as np
import torch

from isthmus.claims import Claim, Gate, Row, Ruler, Scale, judge, ratio
from isthmus.decoding.bytevocab import ByteVocab
from isthmus.decoding.constrained import Constrained
from isthmus.decoding.constraint import (
    Compiler,
    Spec,
    State,
    UnsupportedConstraint,
    choice,
    json_schema,
    validation_error,
)
from isthmus.decoding.generation import Generation
from isthmus.decoding.law import Law
from isthmus.decoding.model import Model, Prompt
from isthmus.testing.statistics import goodness_of_fit
from isthmus.workbench import calls, schemas
from isthmus.workbench.bench import reference_model
from isthmus.workbench.calls import Call
from isthmus.workbench.json_schema_suite import Coverage, Engine, coverage, suite


@dataclass(frozen=True)
class Settings:
    """Settings of structured outputs.

    Attributes:
        constrain: The idea; off, the model writes what it likes.
        canonical: Text that admits no choice is written in its canonical tokens and drafted.
        lenient: Hold what can be held of schemas that cannot be held exactly.
    """

    constrain: bool = True
    canonical: bool = True
    lenient: bool = False


@dataclass(frozen=True)
class Quality:
    """What the answers to some calls are worth.

    Attributes:
        finished: Share of answers that ended by themselves.
        valid: Share of the finished ones that validate.
        exact: Share of all answers whose arguments are right.
        tokens: Tokens written.
        forwards: Target forwards that took.
        forced: Tokens that the constraint had drafted.
    """

    finished: float
    valid: float
    exact: float
    tokens: int
    forwards: int
    forced: int


class StructuredOutputs:
    """Measures constrained decoding of one model.

    Args:
        model: The model, with its tokenizer.
        settings: See :class:`Settings`.
    """

    role: ClassVar[str] = "study"

    def __init__(self, model: Model, settings: Settings | None = None) -> None:
        self.model, self.settings = model, settings or Settings()

    def spec(self, schema: Any, *, spaced: bool = False) -> Spec:
        """A schema as these settings ask for it."""
        spec = json_schema(schema, lenient=self.settings.lenient, spaced=spaced)
        return replace(spec, canonical=self.settings.canonical)

    def engine(self, schema: Any) -> Callable[[str], bool]:
        """Our own engine, for :func:`coverage`."""
        return self.model.compile(self.spec(schema, spaced=True)).accepts

    def answer(self, asked: Sequence[Call], *, seed: int = 0, **sampling: Any) -> list[Generation]:
        """Answers to calls, one by one, with nothing but forced text drafted."""
        return [
            self.model.generate(
                ids,
                max_new_tokens=96,
                drafter="none",
                constraint=self.spec(one.schema) if self.settings.constrain else None,
                seed=seed,
                **sampling,
            )
            for ids, one in zip(calls.encoded(self.model, asked), asked, strict=True)
        ]

    def quality(self, asked: Sequence[Call], answers: Sequence[Generation]) -> Quality:
        """Marks of the answers to calls."""
        ended = [r.finish_reason == "stop" for r in answers]
        pairs = zip(ended, asked, answers, strict=True)
        valid = [valid_text(one.schema, r.text) for end, one, r in pairs if end]
        rounds = [one for r in answers for one in r.rounds if one.drafter == "constraint"]
        return Quality(
            sum(ended) / len(asked),
            sum(valid) / max(1, len(valid)),
            calls.exact(asked, [r.text for r in answers]),
            sum(r.stats.new_tokens for r in answers),
            sum(r.stats.target_forwards for r in answers),
            sum(one.accepted for one in rounds),
        )

    def unforced(self, asked: Sequence[Call]) -> list[Generation]:
        """The same law without drafts: what forced text saves is seen against these."""
        return [
            self.model.generate(
                ids,
                max_new_tokens=96,
                drafter="none",
                law=Law(reshapes=[Constrained(self.model.compile(self.spec(one.schema)))]),
            )
            for ids, one in zip(calls.encoded(self.model, asked), asked, strict=True)
        ]

    def fit(self, draws: int, seed: int) -> float:
        """Whether masked sampling draws from the renormalised law: the p-value of a chi-square.

        Args:
            draws: Samples of one token.
            seed: Seed of the draws.
        """
        spec = replace(choice(["(", "[", "a", "b", "1"]), canonical=False)
        start = self.model.compile(spec).start()
        tokens = allowed(start)
        ids = self.model.encode("def f(x):\n    return ")
        logits = self.model.target.forward(ids[None]).logits[0, -1]
        expected = torch.softmax(logits[tokens].double(), -1) * draws
        results = self.model.generate(
            [ids] * draws,
            constraint=spec,
            max_new_tokens=1,
            temperature=1.0,
            drafter="none",
            seed=seed,
        )
        counts = [sum(r.tokens[0] == token for r in results) for token in tokens]
        return goodness_of_fit(counts, expected.tolist())

    def walker(self, schema: Any, seed: int = 0) -> Callable[[], object]:
        """A function that takes one step on random walks through a schema: a mask and a token."""
        grammar = self.model.compile(self.spec(schema))
        source, state = np.random.default_rng(seed), grammar.start()

        def step() -> None:
            nonlocal state
            tokens = allowed(state)
            token = int(tokens[source.integers(len(tokens))])
            state = grammar.start() if token in grammar.ends else state.advance(token)

        return step


def allowed(state: State) -> list[int]:
    """Tokens that may follow a state."""
    assert state.mask is not None
    bits = np.unpackbits(state.mask.view(np.uint8), bitorder="little")
    tokens: list[int] = bits[: state.grammar.size].nonzero()[0].tolist()
    return tokens


def valid_text(schema: Any, text: str) -> bool:
    """Whether jsonschema has nothing against a text."""
    return not validation_error(json.dumps(schema), text)


def xgrammar(model: Model) -> Engine | None:
    """The peer, where it is installed."""
    if importlib.util.find_spec("xgrammar") is None:
        return None
    peer: Any = importlib.import_module("xgrammar")
    info = peer.TokenizerInfo.from_huggingface(model.tokenizer, vocab_size=model.target.vocab_size)
    compiler = peer.GrammarCompiler(info)

    def engine(schema: Any) -> Callable[[str], bool]:
        try:
            compiled = compiler.compile_json_schema(json.dumps(schema), any_whitespace=False)
        except (RuntimeError, ValueError) as error:
            raise UnsupportedConstraint(str(error).splitlines()[0]) from error

        def accepts(text: str) -> bool:
            matcher = peer.GrammarMatcher(compiled, terminate_without_stop_token=True)
            return bool(matcher.accept_string(text) and matcher.is_completed())

        return accepts

    return engine


def claim(ruler: Ruler, scale: Scale = "small") -> Claim:
    """Measure coverage, efficiency and quality.

    Args:
        ruler: The clock.
        scale: ``"test"`` asks less.
    """
    small = scale != "test"
    model = calls.tuned_model() if small else reference_model("pycode-t")
    ours = StructuredOutputs(model)
    free = StructuredOutputs(model, Settings(constrain=False))
    loose = StructuredOutputs(model, Settings(lenient=True, canonical=False))
    strict = StructuredOutputs(model, Settings(canonical=False))

    groups = suite() if small else suite()[:20]
    held, tried = coverage(groups, strict.engine), coverage(groups, loose.engine)
    engine = xgrammar(model)
    peer = None if engine is None else coverage(groups, engine)

    asked = calls.calls(150 if small else 8, seed=1)
    bound, unbound, slow = ours.answer(asked), free.answer(asked), ours.unforced(asked)
    mine, theirs, off = (ours.quality(asked, r) for r in (bound, unbound, slow))
    hot = ours.quality(asked, ours.answer(asked, temperature=1.5))
    same = sum(a.tokens == b.tokens for a, b in zip(bound, slow, strict=True)) / len(asked)

    own = [schema for group in schemas.own().values() for schema in group]
    written = model.generate_many(
        [Prompt("x = ", constraint=schema) for schema in own],
        temperature=1.5,
        drafter="none",
        seed=0,
        max_new_tokens=200 if small else 20,
    )
    ended = [valid_text(own[i], r.text) for i, r in written if r.finish_reason == "stop"]
    fit = ours.fit(800 if small else 100, seed=0)

    fresh = Compiler(ByteVocab(model.tokenizer), model.target.vocab_size)  # remembers nothing yet
    first = {str(i): partial(fresh.compile, ours.spec(s)) for i, s in enumerate(own)}
    once = ruler.compare(first, repeats=1, warmup=0)
    compile_ms = [1e3 * timing.median_s for timing in once.values()]
    steps = ruler.compare(
        {str(i): ours.walker(s) for i, s in enumerate(own)}, repeats=60 if small else 5, warmup=5
    )
    mask_us = [1e6 * s for timing in steps.values() for s in timing.samples_s]
    some = asked[: 20 if small else 2]
    timed = ruler.compare(
        {"free": lambda: free.answer(some), "ours": lambda: ours.answer(some)},
        repeats=3 if small else 1,
    )
    faster = ratio(timed["free"], timed["ours"])

    share, saved = mine.forced / mine.tokens, 1 - mine.forwards / off.forwards
    gates = (
        Gate("finished answers that validate, calls", mine.valid, "==", 1),
        Gate("finished answers that validate, calls at temperature 1.5", hot.valid, "==", 1),
        Gate("finished answers that validate, own schemas at 1.5", _mean(ended), "==", 1),
        Gate("finished answers that validate, unconstrained", theirs.valid, "<", 0.9),
        Gate("right arguments, gain over unconstrained", mine.exact - theirs.exact, ">=", 0),
        Gate("forced share of the tokens", share, ">=", 0.1),
        Gate("forwards saved, less the forced share", saved - share, ">=", -1e-9),
        Gate("answers that forced drafts leave unchanged", same, "==", 1),
        Gate("invalid instances let through, strict", held.under, "==", 0),
        Gate("chi-square of masked sampling, p-value", fit, ">=", 0.001),
    )
    cuts = quantiles(mask_us, n=100)

    def row(metric: str, unit: str, pick: Callable[[Coverage], float], note: str = "") -> Row:
        other = None if peer is None else pick(peer)
        return Row(metric, unit, other, pick(held), pick(tried), note=note)

    legend = "baseline: xgrammar; ours: strict; off: lenient"
    return Claim(
        slug="structured-outputs",
        statement="Constrained answers always validate, are no less often right, and need fewer "
        "forwards, because much of their text admits no choice.",
        paper_figure="about half the time per token, coverage differs twofold between engines, "
        "up to 4 % more tasks solved",
        rows=(
            row("schemas declared", "", lambda c: c.declared, f"suite of {held.groups}; {legend}"),
            row("schemas held exactly", "", lambda c: c.exact),
            row("compliance", "", lambda c: c.compliance),
            row("invalid instances let through", "", lambda c: c.under),
            row("valid instances refused", "", lambda c: c.over),
            Row("finished answers that validate", "", theirs.valid, mine.valid, theirs.valid),
            Row("right arguments", "", theirs.exact, mine.exact, theirs.exact),
            Row("answers that end", "", theirs.finished, mine.finished, theirs.finished),
            Row(
                "tokens per forward", "", theirs.tokens / theirs.forwards,
                mine.tokens / mine.forwards, off.tokens / off.forwards,
                note="off: the same constraint, forced text not drafted",
            ),
            Row("forced share of the tokens", "", None, share, None),
            Row("time for 20 answers", "s", timed["free"].median_s, timed["ours"].median_s, None,
                note=f"{faster} faster"),
            Row("compile, own schemas", "ms", None, float(np.median(compile_ms)), None,
                note=f"worst {max(compile_ms):.1f}"),
            Row("mask and step, own schemas", "us", None, float(np.mean(mask_us)), None,
                note=f"p50 {cuts[49]:.0f}, p90 {cuts[89]:.0f}, p99 {cuts[98]:.0f}, "
                f"worst {max(mask_us):.0f}"),
            Row("own schemas that end and validate at 1.5", "", None, _mean(ended), None,
                note=f"{len(ended)} of {len(own)} ended within the budget"),
        ),
        scale=scale,
        device="cpu",
        status=judge(gates, (gates[0], Gate("forced", share, ">", 0))),
        gates=gates,
        notes=()
        if peer
        else ("xgrammar is not installed here, so the engine table has no peer.",),
        seeds=(0, 1),
    )  # fmt: skip


def _mean(values: Sequence[bool]) -> float:
    return sum(values) / max(1, len(values))
