"""RASP: a language whose operations are what one layer of a transformer can do.

G. Weiss, Y. Goldberg, E. Yahav, "Thinking Like Transformers", 2021, arXiv:2106.06981, section 3.

An s-op is a function from a sequence to a sequence of the same length. Elementwise operations
are what a feed-forward does and cost nothing; ``select`` compares every position with every other
one, as a head does, and ``aggregate`` averages what is selected. Expressions are built with
Python's operators and run on any sequence::

    flip = select(indices, length - indices - 1, "==")      # row: query, column: key
    reverse = aggregate(flip, tokens)
    reverse.run("abc")                                       # ['c', 'b', 'a']
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from isthmus.errors import InvalidInputError, UnknownNameError

COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


class Expression:
    """A value that depends on the sequence; what it is made of decides layers and heads."""

    parts: tuple[Expression, ...] = ()
    name: str = ""

    def named(self, name: str) -> Self:
        """The same under a name, for pictures."""
        self.name = name
        return self

    @cached_property
    def depth(self) -> int:
        """Layers of attention below and in it."""
        return max((part.depth for part in self.parts), default=0)


class Op(Expression):
    """An s-op. Python's operators make new ones, elementwise."""

    def run(self, given: Sequence[Any]) -> list[Any]:
        """Values at every position of a sequence.

        Raises:
            InvalidInputError: The sequence is empty, or an operation does not fit its values.
        """
        return Run(given).value(self)

    def compute(self, run: Run) -> list[Any]:
        """Values from those of the parts."""
        raise NotImplementedError

    def map(self, function: Callable[..., Any], *others: Any) -> Op:
        """Elementwise: a feed-forward of these values.

        Args:
            function: Of one value each, at one position; it cannot see neighbours.
            others: Further s-ops or constants.
        """
        return _Map(function, (self, *map(lift, others)))

    def __add__(self, other: Any) -> Op:
        return self.map(operator.add, other)

    def __sub__(self, other: Any) -> Op:
        return self.map(operator.sub, other)

    def __mul__(self, other: Any) -> Op:
        return self.map(operator.mul, other)

    def __truediv__(self, other: Any) -> Op:
        return self.map(operator.truediv, other)

    def __radd__(self, other: Any) -> Op:
        return lift(other).map(operator.add, self)

    def __rsub__(self, other: Any) -> Op:
        return lift(other).map(operator.sub, self)

    def __rmul__(self, other: Any) -> Op:
        return lift(other).map(operator.mul, self)

    def __eq__(self, other: Any) -> Op:  # type: ignore[override]
        return self.map(operator.eq, other)

    def __ne__(self, other: Any) -> Op:  # type: ignore[override]
        return self.map(operator.ne, other)

    def __lt__(self, other: Any) -> Op:
        return self.map(operator.lt, other)

    def __gt__(self, other: Any) -> Op:
        return self.map(operator.gt, other)

    def __le__(self, other: Any) -> Op:
        return self.map(operator.le, other)

    def __ge__(self, other: Any) -> Op:
        return self.map(operator.ge, other)

    def __and__(self, other: Any) -> Op:
        return self.map(lambda a, b: bool(a and b), other)

    def __or__(self, other: Any) -> Op:
        return self.map(lambda a, b: bool(a or b), other)

    def __invert__(self) -> Op:
        return self.map(operator.not_)

    __hash__ = object.__hash__

    def __bool__(self) -> bool:
        raise InvalidInputError(
            "an s-op has a value only on a sequence; combine with &, | and ~, or call run()"
        )


class _Base(Op):
    def __init__(self, name: str, compute: Callable[[Sequence[Any]], list[Any]]) -> None:
        self.name, self._compute = name, compute

    def compute(self, run: Run) -> list[Any]:
        return self._compute(run.given)


class _Constant(Op):
    def __init__(self, value: Any) -> None:
        self.value, self.name = value, repr(value)

    def compute(self, run: Run) -> list[Any]:
        return [self.value] * len(run.given)


class _Map(Op):
    def __init__(self, function: Callable[..., Any], parts: tuple[Op, ...]) -> None:
        self.function, self.parts = function, parts

    def compute(self, run: Run) -> list[Any]:
        columns = [run.value(part) for part in self.parts]  # type: ignore[arg-type]
        try:
            return [self.function(*values) for values in zip(*columns, strict=True)]
        except (TypeError, ZeroDivisionError, ValueError, KeyError) as error:
            raise InvalidInputError(
                f"{self.name or 'an elementwise operation'} does not fit its values: {error}"
            ) from error


class Selector(Expression):
    """Which positions (columns, keys) each position (row, query) looks at."""

    def compute(self, run: Run) -> NDArray[np.bool_]:
        """Grid [n, n]."""
        raise NotImplementedError

    def __and__(self, other: Selector) -> Selector:
        return _Both(np.logical_and, (self, other))

    def __or__(self, other: Selector) -> Selector:
        return _Both(np.logical_or, (self, other))

    def __invert__(self) -> Selector:
        return _Both(np.logical_not, (self,))


class _Select(Selector):
    def __init__(self, keys: Op, queries: Op, compare: str) -> None:
        self.parts, self.compare = (keys, queries), compare

    def compute(self, run: Run) -> NDArray[np.bool_]:
        keys, queries = (run.value(part) for part in self.parts)  # type: ignore[arg-type]
        test = COMPARE[self.compare]
        try:
            return np.array([[bool(test(k, q)) for k in keys] for q in queries])
        except TypeError as error:
            raise InvalidInputError(
                f"select cannot compare these by {self.compare}: {error}"
            ) from error


class _Both(Selector):
    """Several grids in one head."""

    def __init__(self, function: Any, parts: tuple[Selector, ...]) -> None:
        self.function, self.parts = function, parts

    def compute(self, run: Run) -> NDArray[np.bool_]:
        grids = [run.grid(part) for part in self.parts]  # type: ignore[arg-type]
        found: NDArray[np.bool_] = self.function(*grids)
        return found


class _Aggregate(Op):
    def __init__(self, selector: Selector, values: Op, default: Any) -> None:
        self.selector, self.values, self.default = selector, values, default
        self.parts = (selector, values)

    @cached_property
    def depth(self) -> int:
        return 1 + max(self.selector.depth, self.values.depth)

    def compute(self, run: Run) -> list[Any]:
        grid, values = run.grid(self.selector), run.value(self.values)
        if all(isinstance(v, (int, float, bool)) for v in values):
            weights = grid.sum(1)
            sums = grid @ np.array(values, dtype=float)
            means = [s / w if w else self.default for s, w in zip(sums, weights, strict=True)]
            return [_plain(m) for m in means]
        found = []
        for row in grid:
            chosen = {values[i] for i in np.flatnonzero(row)}
            if len(chosen) > 1:
                raise InvalidInputError(
                    f"a head averages, and {', '.join(map(repr, sorted(map(str, chosen))))} have "
                    "no mean; select one of them"
                )
            found.append(chosen.pop() if chosen else self.default)
        return found


class _Width(_Aggregate):
    """How many positions are selected, from the mean of a mark at position 0.

    Position 0 is added to every selection; the mean of the mark is then 1 over the number of
    selected ones, itself counted (section 3.1 of the paper).
    """

    def __init__(self, selector: Selector) -> None:
        self.inner = selector
        marked = selector | select(indices, 0, "==")
        super().__init__(marked, indices == 0, 0)

    def compute(self, run: Run) -> list[Any]:
        mark = np.zeros(len(run.given))
        mark[0] = 1.0
        grid, inner = run.grid(self.selector), run.grid(self.inner)
        means = grid @ mark / grid.sum(1)
        # What stands at position 0 itself is told apart by a feed-forward.
        return [round(1 / m) - 1 + int(own) for m, own in zip(means, inner[:, 0], strict=True)]


tokens = _Base("tokens", list)
indices = _Base("indices", lambda given: list(range(len(given))))


def lift(value: Any) -> Op:
    """A constant as an s-op; an s-op stays one."""
    return value if isinstance(value, Op) else _Constant(value)


def select(keys: Any, queries: Any, compare: str = "==") -> Selector:
    """Every query looks at the keys that compare with it.

    Args:
        keys: S-op or constant, along columns.
        queries: S-op or constant, along rows.
        compare: ``key (compare) query``: a name of :data:`COMPARE`.

    Raises:
        UnknownNameError: No such comparison.
    """
    if compare not in COMPARE:
        raise UnknownNameError("comparison", compare, list(COMPARE))
    return _Select(lift(keys), lift(queries), compare)


def aggregate(selector: Selector, values: Any, default: Any = 0) -> Op:
    """The mean of what each position selects; ``default`` where it selects nothing.

    Values that are no numbers have a mean only where a single one is selected.
    """
    return _Aggregate(selector, lift(values), default)


def selector_width(selector: Selector) -> Op:
    """How many positions each position selects; one head."""
    return _Width(selector)


length = selector_width(select(1, 1, "==")).named("length")


class Run:
    """One sequence, on which every expression is computed once.

    Raises:
        InvalidInputError: The sequence is empty.
    """

    def __init__(self, given: Sequence[Any]) -> None:
        if not len(given):
            raise InvalidInputError("the sequence is empty; give at least one token")
        self.given = given
        self._values: dict[int, Any] = {}

    def value(self, op: Op) -> list[Any]:
        """Values of an s-op."""
        if id(op) not in self._values:
            self._values[id(op)] = op.compute(self)
        found: list[Any] = self._values[id(op)]
        return found

    def grid(self, selector: Selector) -> NDArray[np.bool_]:
        """Grid [n, n] of a selector."""
        if id(selector) not in self._values:
            self._values[id(selector)] = selector.compute(self)
        found: NDArray[np.bool_] = self._values[id(selector)]
        return found


@dataclass(frozen=True)
class Head:
    """One head of a program: a selector, in the layer where it is needed first.

    Attributes:
        layer: Counted from 1.
        selector: What it looks at.
        values: What it fetches, several values side by side.
    """

    layer: int
    selector: Selector
    values: tuple[Op, ...]


def heads(op: Op) -> list[Head]:
    """Heads that a program needs, layer by layer; equal selectors of a layer share one.

    ``depth(aggregate) = 1 + max(depth(selector), depth(values))``, and elementwise operations
    add nothing (section 4).
    """
    found: dict[tuple[int, Any], tuple[Selector, list[Op]]] = {}
    seen: set[int] = set()

    def walk(each: Expression) -> None:
        if id(each) in seen:
            return
        seen.add(id(each))
        if isinstance(each, _Aggregate):
            key = (each.depth, _key(each.selector))
            found.setdefault(key, (each.selector, []))[1].append(each)
        for part in each.parts:
            walk(part)

    walk(op)
    ordered = sorted(found.items(), key=lambda item: item[0][0])
    return [Head(layer, sel, tuple(ops)) for (layer, _), (sel, ops) in ordered]


def layers_heads(op: Op) -> list[int]:
    """Number of heads of every layer that a program needs.

    Example:
        >>> layers_heads(aggregate(select(indices, length - indices - 1), tokens))
        [1, 1]
    """
    needed = heads(op)
    return [sum(h.layer == i for h in needed) for i in range(1, op.depth + 1)]


def _key(each: Expression) -> Any:
    """What makes two expressions the same."""
    if isinstance(each, _Select):
        return ("select", each.compare, *map(_key, each.parts))
    if isinstance(each, _Both):
        return (each.function.__name__, *map(_key, each.parts))
    if isinstance(each, _Constant):
        return ("constant", each.value)
    if isinstance(each, _Map) and each.function in _OPERATORS:
        return (each.function.__name__, *map(_key, each.parts))
    return id(each)


_OPERATORS = {
    getattr(operator, name)
    for name in ("add", "sub", "mul", "truediv", "eq", "ne", "lt", "gt", "le", "ge", "not_")
}


def _plain(value: Any) -> Any:
    """Whole numbers without rounding of the mean."""
    if isinstance(value, (float, np.floating)) and math.isclose(value, round(value), abs_tol=1e-9):
        return round(value)
    return float(value) if isinstance(value, np.floating) else value
