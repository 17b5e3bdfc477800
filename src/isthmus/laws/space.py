"""Spaces of architectures: a network with choices left open, walked choice by choice.

::

    Chain(Repeat(Chain(Affine((16, 32)), Activation(("relu", "tanh"))), (1, 2)), Affine((10,)))
        at ()        ─▶ open: repeat 1, 2
        at (1,)      ─▶ open: affine 16, 32
        at (1, 0, 1, 1, 0) ─▶ a network: affine-16 tanh affine-32 relu affine-10

After Negrinho and Gordon, "DeepArchitect: Automatically Designing and Training Deep
Architectures", 2017, arXiv:1704.08792. Any space becomes a tree: what is still open depends on
what was chosen, choices come in order, and one that has a single value resolves itself. A network
is named by its picks, the numbers of the values that were chosen, and the same picks give the same
network again. Searchers over such trees are in :mod:`isthmus.laws.search`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from isthmus.errors import InvalidInputError

T = TypeVar("T")
Picks = tuple[int, ...]


class Take(Protocol):
    """Gives the value that is chosen of some; ends the walk where nothing was chosen yet."""

    def __call__(self, name: str, values: Sequence[T]) -> T:
        """Choose."""
        ...


@dataclass(frozen=True)
class Built:
    """A network, or a part of one, without open choices.

    Attributes:
        shape: Of its output, without the batch.
        words: What it consists of, in order.
        make: A new module, with random weights.
        hypers: Chosen hyper-parameters by name.
    """

    shape: tuple[int, ...]
    words: tuple[str, ...]
    make: Callable[[], nn.Module]
    hypers: dict[str, Any] = field(default_factory=dict)


class Part(Protocol):
    """A piece of a space."""

    def resolve(self, shape: tuple[int, ...], take: Take) -> Built:
        """Make all choices, for an input of a shape without its batch.

        Raises:
            InvalidInputError: The part cannot follow what comes before it.
        """
        ...


@dataclass(frozen=True)
class Choice:
    """What is open after some picks.

    Attributes:
        name: Of the choice.
        values: Two or more.
    """

    name: str
    values: tuple[Any, ...]


class _Open(Exception):  # noqa: N818 - nothing is wrong
    def __init__(self, choice: Choice) -> None:
        self.choice = choice


@dataclass(frozen=True)
class Space:
    """A space: a part and the shape of its input.

    Attributes:
        part: The whole, as one part.
        shape: Of the input, without the batch: (C, H, W) or (D,).

    Example:
        >>> space = Space(Chain(Affine((8, 16)), Optional(Activation(("relu", "tanh")))), (4,))
        >>> space.at(()).values, space.at((1, 1)).values
        ((8, 16), ('relu', 'tanh'))
        >>> space.at((1, 1, 0)).words, sum(1 for _ in space)
        (('affine-16', 'relu'), 6)
    """

    part: Part
    shape: tuple[int, ...]

    def at(self, picks: Sequence[int]) -> Choice | Built:
        """What is open after some picks, or the network that they name.

        Raises:
            InvalidInputError: A pick that is none of its choice's, or more picks than choices;
                parts that do not fit together.
        """
        rest = iter(picks)

        def take(name: str, values: Sequence[Any]) -> Any:
            if len(values) == 1:
                return values[0]
            pick = next(rest, None)
            if pick is None:
                raise _Open(Choice(name, tuple(values)))
            if not 0 <= pick < len(values):
                raise InvalidInputError(f"{name} has choices 0 to {len(values) - 1}, not {pick}")
            return values[pick]

        try:
            built = self.part.resolve(self.shape, take)
        except _Open as found:
            return found.choice
        if next(rest, None) is not None:
            raise InvalidInputError(f"{list(picks)} are more picks than the space has choices")
        return built

    def __iter__(self) -> Iterator[Picks]:
        """The picks of every network, in order."""
        stack: list[Picks] = [()]
        while stack:
            picks = stack.pop()
            found = self.at(picks)
            if isinstance(found, Built):
                yield picks
            else:
                stack += [(*picks, i) for i in reversed(range(len(found.values)))]

    def draw(self, generator: torch.Generator, picks: Picks = ()) -> Picks:
        """Picks of a network: uniform at each choice, which is not uniform over networks."""
        while isinstance(found := self.at(picks), Choice):
            many = len(found.values)
            picks = (*picks, int(torch.randint(many, (), generator=generator)))
        return picks


# parts --------------------------------------------------------------------------------------------


def _some(name: str, values: Sequence[Any]) -> None:
    if not values or len(set(values)) < len(values):
        raise InvalidInputError(f"{name} needs different values to choose from, got {values!r}")


def _picture(name: str, shape: tuple[int, ...]) -> tuple[int, int, int]:
    if len(shape) != 3:
        raise InvalidInputError(f"{name} needs pictures [C, H, W] and gets {list(shape)}")
    return shape[0], shape[1], shape[2]


@dataclass(frozen=True)
class Affine:
    """A linear layer of everything before it.

    Attributes:
        units: Widths to choose from.
    """

    units: tuple[int, ...]

    def __post_init__(self) -> None:
        _some("affine", self.units)

    def resolve(self, shape: tuple[int, ...], take: Take) -> Built:
        """See :class:`Part`."""
        units, inputs = take("affine", self.units), int(torch.Size(shape).numel())
        make = lambda: nn.Sequential(nn.Flatten(), nn.Linear(inputs, units))  # noqa: E731
        return Built((units,), (f"affine-{units}",), make)


@dataclass(frozen=True)
class Conv2d:
    """A convolution that keeps the size of pictures, but for its stride.

    Attributes:
        filters: Channels to choose from.
        sizes: Odd sides to choose from.
        strides: To choose from.
    """

    filters: tuple[int, ...]
    sizes: tuple[int, ...] = (3,)
    strides: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        for name in ("filters", "sizes", "strides"):
            _some(f"conv {name}", getattr(self, name))
        if not all(size % 2 for size in self.sizes):
            raise InvalidInputError(f"sides of a convolution are odd here, got {self.sizes}")

    def resolve(self, shape: tuple[int, ...], take: Take) -> Built:
        """See :class:`Part`."""
        channels, height, width = _picture("a convolution", shape)
        filters, size = take("filters", self.filters), take("size", self.sizes)
        stride = take("stride", self.strides)
        return Built(
            (filters, -(-height // stride), -(-width // stride)),
            (f"conv-{filters}-{size}-{stride}",),
            lambda: nn.Conv2d(channels, filters, size, stride, size // 2),
        )


@dataclass(frozen=True)
class MaxPool:
    """The largest value of each square.

    Attributes:
        sizes: Sides to choose from.
    """

    sizes: tuple[int, ...] = (2,)

    def __post_init__(self) -> None:
        _some("pool", self.sizes)

    def resolve(self, shape: tuple[int, ...], take: Take) -> Built:
        """See :class:`Part`."""
        channels, height, width = _picture("pooling", shape)
        size = take("pool", self.sizes)
        if min(height, width) < size:
            raise InvalidInputError(f"pictures of {height} x {width} have no squares of {size}")
        out = (channels, height // size, width // size)
        return Built(out, (f"pool-{size}",), lambda: nn.MaxPool2d(size))


_ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU, "silu": nn.SiLU}


@dataclass(frozen=True)
class Activation:
    """A function of every number.

    Attributes:
        kinds: Of relu, tanh, gelu and silu.
    """

    kinds: tuple[str, ...] = ("relu",)

    def __post_init__(self) -> None:
        _some("activation", self.kinds)
        if unknown := set(self.kinds) - set(_ACTIVATIONS):
            raise InvalidInputError(
                f"activations are {', '.join(_ACTIVATIONS)}, not {', '.join(sorted(unknown))}"
            )

    def resolve(self, shape: tuple[int, ...], take: Take) -> Built:
        """See :class:`Part`."""
        kind = take("activation", self.kinds)
        return Built(shape, (kind,), _ACTIVATIONS[kind])


@dataclass(frozen=True)
class Dropout:
    """Dropout.

    Attributes:
        shares: To choose from.
    """

    shares: tuple[float, ...]

    def __post_init__(self) -> None:
        _some("dropout", self.shares)

    def resolve(self, shape: tuple[int, ...], take: Take) -> Built:
        """See :class:`Part`."""
        share = take("dropout", self.shares)
        return Built(shape, (f"dropout-{share:g}",), lambda: nn.Dropout(share))


@dataclass(frozen=True)
class BatchNorm:
    """Norm over the batch, of channels of pictures or of numbers."""

    def resolve(self, shape: tuple[int, ...], take: Take) -> Built:
        """See :class:`Part`."""
        norm = nn.BatchNorm2d if len(shape) == 3 else nn.BatchNorm1d
        return Built(shape, ("norm",), lambda: norm(shape[0]))


@dataclass(frozen=True)
class Hyper:
    """A hyper-parameter of the training, such as a learning rate; no layer.

    Attributes:
        name: Its name.
        values: To choose from.
    """

    name: str
    values: tuple[Any, ...]

    def __post_init__(self) -> None:
        _some(self.name, self.values)

    def resolve(self, shape: tuple[int, ...], take: Take) -> Built:
        """See :class:`Part`."""
        value = take(self.name, self.values)
        return Built(shape, (f"{self.name}={value}",), nn.Identity, {self.name: value})


# parts of parts -----------------------------------------------------------------------------------


def _joined(shape: tuple[int, ...], parts: Sequence[Built]) -> Built:
    hypers = {name: value for part in parts for name, value in part.hypers.items()}
    return Built(
        parts[-1].shape if parts else shape,
        tuple(word for part in parts for word in part.words),
        lambda: nn.Sequential(*(part.make() for part in parts)),
        hypers,
    )


class Chain:
    """Parts one after the other.

    Args:
        *parts: The parts.
    """

    def __init__(self, *parts: Part) -> None:
        self.parts = parts

    def resolve(self, shape: tuple[int, ...], take: Take) -> Built:
        """See :class:`Part`."""
        made: list[Built] = []
        for part in self.parts:
            made.append(part.resolve(made[-1].shape if made else shape, take))
        return _joined(shape, made)


class Or:
    """One of some parts.

    Args:
        *parts: The parts.
    """

    def __init__(self, *parts: Part) -> None:
        if not parts:
            raise InvalidInputError("or needs a part to choose")
        self.parts = parts

    def resolve(self, shape: tuple[int, ...], take: Take) -> Built:
        """See :class:`Part`."""
        return self.parts[take("or", range(len(self.parts)))].resolve(shape, take)


def Optional(part: Part) -> Or:  # noqa: N802 - reads like the other parts
    """A part or nothing."""
    return Or(Chain(), part)


class MaybeSwap:
    """Two parts in either order.

    Args:
        first: Comes first unless they are swapped.
        second: The other one.
    """

    def __init__(self, first: Part, second: Part) -> None:
        self.parts = (first, second)

    def resolve(self, shape: tuple[int, ...], take: Take) -> Built:
        """See :class:`Part`."""
        swapped = take("swap", (False, True))
        return Chain(*(reversed(self.parts) if swapped else self.parts)).resolve(shape, take)


class Repeat:
    """A part some times, each with choices of its own.

    Args:
        part: The part.
        counts: How often, to choose from.
        tied: Whether all have the choices of the first (their weights are their own).
    """

    def __init__(self, part: Part, counts: tuple[int, ...], *, tied: bool = False) -> None:
        _some("repeat", counts)
        self.part, self.counts, self.tied = part, counts, tied

    def resolve(self, shape: tuple[int, ...], take: Take) -> Built:
        """See :class:`Part`."""
        count = take("repeat", self.counts)
        if not self.tied or not count:
            return Chain(*[self.part] * count).resolve(shape, take)
        kept: list[Any] = []

        def noted(name: str, values: Sequence[Any]) -> Any:
            kept.append(take(name, values))
            return kept[-1]

        made = [self.part.resolve(shape, noted)]
        for _ in range(count - 1):
            told = iter(kept)
            made.append(self.part.resolve(made[-1].shape, lambda name, values, t=told: next(t)))
        return _joined(shape, made)


class _Sum(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.part(x)
        return out


class Residual:
    """A part whose input is added to its output.

    Args:
        part: It keeps the shape.
    """

    def __init__(self, part: Part) -> None:
        self.part = part

    def resolve(self, shape: tuple[int, ...], take: Take) -> Built:
        """See :class:`Part`."""
        inner = self.part.resolve(shape, take)
        if inner.shape != shape:
            raise InvalidInputError(
                f"a residual part keeps its shape; {' '.join(inner.words)} makes "
                f"{list(inner.shape)} of {list(shape)}"
            )
        words = ("residual", *inner.words, "end")
        return Built(shape, words, lambda: _Sum(inner.make()), inner.hypers)


class _Beside(nn.ModuleList):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self], 1)


class Concat:
    """Parts that read the same input; their outputs lie side by side along channels.

    Args:
        *parts: They give pictures of one size, or numbers.
    """

    def __init__(self, *parts: Part) -> None:
        if not parts:
            raise InvalidInputError("concat needs a part")
        self.parts = parts

    def resolve(self, shape: tuple[int, ...], take: Take) -> Built:
        """See :class:`Part`."""
        made = [part.resolve(shape, take) for part in self.parts]
        for one, other in pairwise(made):
            if one.shape[1:] != other.shape[1:]:
                raise InvalidInputError(
                    f"parts side by side need pictures of one size, not {list(one.shape)} and "
                    f"{list(other.shape)}"
                )
        whole = _joined(shape, made)
        channels = sum(part.shape[0] for part in made)
        return Built(
            (channels, *made[0].shape[1:]),
            ("concat", *whole.words, "end"),
            lambda: _Beside(part.make() for part in made),
            whole.hypers,
        )
