"""RASP: programs in the terms of a transformer, and how many layers and heads they need.

Paper: G. Weiss, Y. Goldberg, E. Yahav, "Thinking Like Transformers", 2021, arXiv:2106.06981
Idea: A task that is written with a transformer's own operations shows how many layers and heads
    suffice for it; trained transformers of that size learn it, smaller ones do not.
Differs: Programs are Python expressions (:mod:`isthmus.lenses.rasp`), not a language of their own.
    Trained networks read a marker before the sequence, as the programs' selector width assumes.

    tokens, indices ──select──▶ who looks at whom ──aggregate──▶ new values, one layer higher
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from isthmus.claims import Claim, Gate, Row, Ruler, Scale, judge
from isthmus.errors import InvalidInputError, UnknownNameError
from isthmus.lenses.explanation import Array, Check, Explanation
from isthmus.lenses.rasp import (
    Op,
    Run,
    aggregate,
    heads,
    indices,
    layers_heads,
    length,
    select,
    selector_width,
    tokens,
)
from isthmus.training.loop import Plan, Trainer
from isthmus.workbench.tagging import Tagger

# programs (section 4 and appendix B), each with what it should give -------------------------------


def _same() -> Any:
    return select(tokens, tokens, "==")


def _before() -> Any:
    return select(indices, indices, "<")


def _until() -> Any:
    return select(indices, indices, "<=")


def _first() -> Op:
    first: Op = (aggregate(_same() & _before(), 1, default=0) == 0).named("first of its kind")
    return first


def reverse() -> Op:
    """The sequence backwards."""
    return aggregate(select(indices, length - indices - 1), tokens)


def histogram() -> Op:
    """How often each token occurs."""
    return selector_width(_same())


def double_histogram() -> Op:
    """How many different tokens occur as often as this one."""
    hist, first = histogram().named("histogram"), _first()
    return selector_width(select(hist, hist) & select(first, True))


def sort() -> Op:
    """The sequence in order; equal tokens stay as they come."""
    smaller = select(tokens, tokens, "<") | (_same() & _before())
    place = selector_width(smaller).named("place")
    return aggregate(select(place, indices), tokens)


def sort_by_frequency() -> Op:
    """The different tokens, most frequent first; ties as they come; then ``-``."""
    hist, first = histogram().named("histogram"), _first()
    rank = hist.map(lambda h, f: -h if f else 1, first).named("rank")
    earlier = select(rank, rank, "<") | (select(rank, rank) & _before())
    place = selector_width(earlier).named("place")
    kept = tokens.map(lambda t, f: t if f else "-", first).named("kept")
    return aggregate(select(place, indices), kept)


def _count_until(what: Op) -> Op:
    # A mean over the positions up to here, times how many those are, is a count.
    mean = aggregate(_until(), what.map(int))
    return mean.map(lambda m, i: round(m * (i + 1)), indices)


def dyck1() -> Op:
    """Whether each prefix of brackets is balanced (T), can still be (P), or cannot (F)."""
    balance = (_count_until(tokens == "(") - _count_until(tokens == ")")).named("balance")
    fallen = (_count_until(balance < 0) > 0).named("fallen")
    return balance.map(lambda b, f: "F" if f else "T" if b == 0 else "P", fallen)


def dyck2() -> Op:
    """The same for two kinds of brackets, which must match."""
    opens = tokens.map(lambda t: t in "([").named("opens")
    balance = (_count_until(opens) - _count_until(~opens)).named("balance")
    fallen = (_count_until(balance < 0) > 0).named("fallen")
    level = balance.map(lambda b, o: b if o else b + 1, opens).named("level")
    nth = selector_width(select(level, level) & _until()).named("nth of its level")
    partner = aggregate(select(level, level) & select(nth, nth - 1), tokens, default="")
    right = tokens.map(lambda t, p, o: bool(o) or p + t in ("()", "[]"), partner, opens)
    wrong = (_count_until(~right) > 0).named("wrong")
    return balance.map(lambda b, f, w: "F" if f or w else "T" if b == 0 else "P", fallen, wrong)


def _double(s: Sequence[str]) -> list[int]:
    often = Counter(Counter(s).values())
    return [often[Counter(s)[t]] for t in s]


def _by_frequency(s: Sequence[str]) -> list[str]:
    kinds = sorted(dict.fromkeys(s), key=lambda t: -Counter(s)[t])
    return [*kinds, *["-"] * (len(s) - len(kinds))]


def _balanced(s: Sequence[str]) -> list[str]:
    found, stack, broken = [], [], False
    for t in s:
        if t in "([":
            stack.append(t)
        elif not stack or stack.pop() + t not in ("()", "[]"):
            broken = True
        found.append("F" if broken else "P" if stack else "T")
    return found


@dataclass(frozen=True)
class Program:
    """A program, what it should give, and the size that the paper names.

    Attributes:
        name: Its name.
        make: Builds the expression.
        oracle: Plain Python for the same.
        alphabet: Tokens that it is tried on.
        size: Layers and heads.
    """

    name: str
    make: Callable[[], Op]
    oracle: Callable[[Sequence[str]], list[Any]]
    alphabet: str
    size: tuple[int, int]


PROGRAMS = {
    p.name: p
    for p in (
        Program("reverse", reverse, lambda s: list(s)[::-1], "abcdefgh", (2, 1)),
        Program("histogram", histogram, lambda s: [Counter(s)[t] for t in s], "abcdefgh", (1, 1)),
        Program("double-histogram", double_histogram, _double, "abcdefgh", (2, 2)),
        Program("sort", sort, sorted, "abcdefgh", (2, 1)),
        Program("sort-by-frequency", sort_by_frequency, _by_frequency, "abcdefgh", (3, 2)),
        Program("dyck1", dyck1, _balanced, "()", (2, 1)),
        Program("dyck2", dyck2, _balanced, "()[]", (4, 2)),
    )
}


@dataclass(frozen=True)
class Settings:
    """Settings.

    Attributes:
        layers: Layers that a network may have; 0 for as many as the program needs. Fewer take
            away what the program says is needed.
    """

    layers: int = 0


class Rasp:
    """Runs programs and says what they need.

    Args:
        settings: See :class:`Settings`.
    """

    role: ClassVar[str] = "lens"

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()

    def open(self, source: str) -> Program:
        """A program by name; ``reverse`` when empty.

        Raises:
            UnknownNameError: No such program.
        """
        if (source or "reverse") not in PROGRAMS:
            raise UnknownNameError("program", source, list(PROGRAMS))
        return PROGRAMS[source or "reverse"]

    def explain(self, subject: Program, given: str) -> Explanation:
        """Values at every position, and who looks at whom in each head.

        Raises:
            InvalidInputError: The input is empty, or too long to draw.
            MismatchError: The program does not give what it should.
        """
        if len(given) > 2_000:
            raise InvalidInputError(f"{len(given)} tokens give grids too large to draw; give fewer")
        if subject.name.startswith("dyck") and set(given) - set(subject.alphabet):
            raise InvalidInputError(f"{subject.name} reads {' '.join(subject.alphabet)} only")
        started = time.perf_counter()
        op, run = subject.make(), Run(given)
        out, wanted = run.value(op), subject.oracle(given)
        places = tuple(f"{i} {t}" for i, t in enumerate(given))
        needed = layers_heads(op)
        grids = {
            f"layer {head.layer}, head {n}": Array(
                run.grid(head.selector).astype(float), ("query", "key"), (places, places)
            )
            for n, head in enumerate(heads(op), 1)
        }
        steps = {each.name: run.value(each) for each in _named(op)}
        rows = [
            {"position": i, "token": t}
            | {name: str(values[i]) for name, values in steps.items()}
            | {"output": str(out[i])}
            for i, t in enumerate(given)
        ]
        wrong = sum(a != b for a, b in zip(out, wanted, strict=True))
        return Explanation(
            method="rasp",
            model={"class": f"program {subject.name}", "parameters": 0},
            inputs=[f"input: {given}", f"output: {' '.join(map(str, out))}"],
            target=f"{subject.name} needs {len(needed)} layers of {needed} heads",
            arrays=dict(reversed(grids.items())),
            tables={"values": rows},
            checks=[Check("positions where the program differs from plain Python", wrong, 0.0)],
            params=asdict(self.settings),
            seconds=time.perf_counter() - started,
        ).require()

    def learn(self, program: Program, plan: Plan, width: int = 64) -> float:
        """Share of held-out tokens that a trained network of the program's size gets right."""
        layers, heads = self.settings.layers or program.size[0], program.size[1]
        tagger = Tagger(program.alphabet, program.oracle, layers, heads, width, seed=plan.seed)
        Trainer(tagger, plan).run()
        return tagger.validate()["accuracy"]


def _named(op: Op) -> list[Op]:
    """Named s-ops inside a program, those that are needed first in front."""
    found: dict[int, Op] = {}

    def walk(each: Any) -> None:
        for part in each.parts:
            walk(part)
        # Not by "in": the operators of s-ops make new ones.
        base = {id(tokens), id(indices)}
        if isinstance(each, Op) and each.name and each.parts and id(each) not in base:
            found.setdefault(id(each), each)

    walk(op)
    return list(found.values())


def claim(ruler: Ruler, scale: Scale = "small") -> Claim:
    """Programs against plain Python, and networks of the predicted size against smaller ones."""
    del ruler  # nothing is timed
    small = scale != "test"
    rng = random.Random(0)
    wrong, counts = {}, {}
    for program in PROGRAMS.values():
        op = program.make()
        trials = [
            rng.choices(program.alphabet, k=rng.randint(1, 12))
            for _ in range(2_000 if small else 50)
        ]
        wrong[program.name] = sum(op.run(s) != program.oracle(s) for s in trials)
        needed = layers_heads(op)
        counts[program.name] = (len(needed), max(needed)) == program.size
    plan = Plan(
        3_000 if small else 20, learning_rate=1e-3, warmup_steps=200 if small else 2, clip_norm=1.0
    )
    width = 64 if small else 8
    whole, one = Rasp(), Rasp(Settings(layers=1))
    hist = whole.learn(PROGRAMS["histogram"], plan, width)
    (deep, flat), (deep_reverse, flat_reverse) = (
        [each.learn(PROGRAMS[name], plan, width) for each in (whole, one)]
        for name in ("double-histogram", "reverse")
    )
    gates = (
        Gate("programs that differ from plain Python", float(sum(wrong.values())), "==", 0.0),
        Gate("programs of the paper's size", sum(counts.values()) / len(counts), "==", 1.0),
        Gate("histogram, 1 layer", hist, ">=", 0.99),
        Gate("double histogram, 2 layers less 1", deep - flat, ">=", 0.05),
    )
    return Claim(
        slug="rasp",
        statement="A program in a transformer's own operations tells how many layers and heads "
        "suffice, and trained networks with fewer layers fall behind.",
        paper_figure="reverse 99.99 % with 2 layers of 1 head, histogram 100 % with 1, double "
        "histogram 99.6 % with 2 of 2 (table 1, read)",
        rows=(
            Row("histogram", "of tokens", None, hist, None, note="1 layer, 1 head"),
            Row("double histogram", "of tokens", None, deep, flat, note="2 layers; off: 1"),
            Row("reverse", "of tokens", None, deep_reverse, flat_reverse, note="2 layers; off: 1"),
        ),
        scale=scale,
        device="cpu",
        status=judge(gates, gates[:2]),
        gates=gates,
        seeds=(plan.seed,),
        notes=(
            f"{plan.steps} steps of 64 sequences of 3 to 12 tokens from 8 letters, width {width}",
            "with at most 12 tokens one layer can learn part of reversing position by position",
        ),
    )
