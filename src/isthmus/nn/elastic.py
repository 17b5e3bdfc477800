"""Elastic widths: hidden axes of which every prefix is a layer of its own.

::

    x ──W_in[:m, :]──> m hidden units ──W_out[:, :m]──> y        any m from 1 to the whole axis

An :class:`Axis` names the linears that write a hidden axis and those that read it. One set of
weights serves all widths: :func:`elastic` chooses a width of each axis for a while, and
:func:`extract` cuts a smaller model out, whose layers are ordinary linears with the very numbers
of the slice. Between writer and reader every unit must stand alone (an activation, a gate), as a
norm over the axis would see what is left out.

Nested widths: Yu et al., "Slimmable Neural Networks", 2019, arXiv:1812.08928; ordered for
transformers: Devvrit et al., "MatFormer", 2023, arXiv:2310.07707. Nested *depth* is
:mod:`isthmus.models.nested`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from isthmus.errors import InvalidInputError, UnsupportedModelError


@dataclass(frozen=True)
class Axis:
    """One hidden axis that can be cut.

    Attributes:
        size: Its units.
        writers: Paths of the linears whose outputs lie on it.
        readers: Paths of the linears whose inputs lie on it.
    """

    size: int
    writers: tuple[str, ...]
    readers: tuple[str, ...]


class ElasticLinear(nn.Linear):
    """A linear layer of which any leading block can be at work.

    Args:
        in_features: Inputs of the whole layer.
        out_features: Its outputs.
        bias: Whether it has a bias.

    Attributes:
        active: Outputs and inputs at work.

    Example:
        >>> layer = ElasticLinear(2, 3, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
        >>> layer.active = (2, 1)
        >>> layer(torch.tensor([10.0])).tolist()
        [10.0, 30.0]
        >>> layer.at(3, 1).weight.tolist()
        [[1.0], [3.0], [5.0]]
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)
        self.active = (out_features, in_features)

    @classmethod
    def of(cls, linear: nn.Linear) -> ElasticLinear:
        """The same layer, on the same parameters, at its whole width."""
        with torch.device("meta"):
            made = cls(linear.in_features, linear.out_features, linear.bias is not None)
        made.weight, made.bias = linear.weight, linear.bias
        return made.train(linear.training)

    def at(self, out_features: int, in_features: int) -> nn.Linear:
        """The leading block as a layer of its own, with weights of its own."""
        with torch.device("meta"):
            cut = nn.Linear(in_features, out_features, self.bias is not None)
        cut.weight = _own(self.weight[:out_features, :in_features], self.weight)
        if self.bias is not None:
            cut.bias = _own(self.bias[:out_features], self.bias)
        return cut.train(self.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [..., active inputs] to [..., active outputs]."""
        rows, columns = self.active
        bias = None if self.bias is None else self.bias[:rows]
        return F.linear(x, self.weight[:rows, :columns], bias)

    def extra_repr(self) -> str:
        """Sizes, and what of them is at work."""
        return f"{super().extra_repr()}, active={self.active}"


def make_elastic(model: nn.Module, axes: Sequence[Axis]) -> None:
    """Replace the linears of some axes by elastic ones on the same parameters.

    Names of parameters, and what the model computes, stay as they are.

    Args:
        model: Any model; changed in place.
        axes: Its axes.

    Raises:
        UnsupportedModelError: A path is no linear layer, or its size is not that of the axis.
    """
    for path, sides in _sides(axes).items():
        layer = model.get_submodule(path)
        if not isinstance(layer, nn.Linear):
            raise UnsupportedModelError(
                f"{path} is a {type(layer).__name__}; only nn.Linear can be made elastic"
            )
        for side, (index, real) in enumerate(
            zip(sides, (layer.out_features, layer.in_features), strict=True)
        ):
            if index is not None and axes[index].size != real:
                name = ("outputs", "inputs")[side]
                raise UnsupportedModelError(
                    f"{path} has {real} {name}, but its axis has {axes[index].size} units"
                )
        if not isinstance(layer, ElasticLinear):
            model.set_submodule(path, ElasticLinear.of(layer))


@contextmanager
def elastic(model: nn.Module, axes: Sequence[Axis], widths: Sequence[int]) -> Iterator[None]:
    """Let only the leading units of every axis work, as long as the block lasts.

    Gradients of what does not work are zero.

    Args:
        model: A model that :func:`make_elastic` has seen.
        axes: The axes.
        widths: Units of each axis that work.

    Raises:
        InvalidInputError: A width is out of range, or the model is not elastic.
    """
    chosen = _active(model, axes, widths)
    before = [layer.active for layer, _ in chosen.values()]
    for layer, active in chosen.values():
        layer.active = active
    try:
        yield
    finally:
        for (layer, _), active in zip(chosen.values(), before, strict=True):
            layer.active = active


def extract(model: nn.Module, axes: Sequence[Axis], widths: Sequence[int]) -> nn.Module:
    """Cut a smaller model out: a copy that never held what was left out.

    Args:
        model: A model that :func:`make_elastic` has seen; stays as it is.
        axes: The axes.
        widths: Units of each axis that are kept.

    Raises:
        InvalidInputError: As for :func:`elastic`.

    Returns:
        A model of the same class with ordinary linears; it computes what ``model`` computes within
        :func:`elastic`.
    """
    # what deepcopy finds in its memo it takes as copied already
    memo: dict[int, object] = {
        id(layer): layer.at(*active) for layer, active in _active(model, axes, widths).values()
    }
    return copy.deepcopy(model, memo)


def _active(
    model: nn.Module, axes: Sequence[Axis], widths: Sequence[int]
) -> dict[str, tuple[ElasticLinear, tuple[int, int]]]:
    """Every elastic layer with its active outputs and inputs, by path."""
    if len(widths) != len(axes):
        raise InvalidInputError(f"give one width for each of {len(axes)} axes, got {len(widths)}")
    for axis, width in zip(axes, widths, strict=True):
        if not 1 <= width <= axis.size:
            raise InvalidInputError(
                f"a width must be from 1 to the {axis.size} units of its axis, got {width}"
            )
    found = {}
    for path, (out, into) in _sides(axes).items():
        layer = model.get_submodule(path)
        if not isinstance(layer, ElasticLinear):
            raise InvalidInputError(f"{path} is not elastic; call make_elastic(model, axes) first")
        rows = layer.out_features if out is None else widths[out]
        columns = layer.in_features if into is None else widths[into]
        found[path] = (layer, (rows, columns))
    return found


def _sides(axes: Sequence[Axis]) -> dict[str, tuple[int | None, int | None]]:
    """Which axis the outputs and the inputs of each layer lie on."""
    sides: dict[str, tuple[int | None, int | None]] = {}
    for index, axis in enumerate(axes):
        for side, paths in enumerate((axis.writers, axis.readers)):
            for path in paths:
                both = list(sides.get(path, (None, None)))
                if both[side] is not None:
                    raise InvalidInputError(
                        f"{path} lies on two axes with its {('outputs', 'inputs')[side]}"
                    )
                both[side] = index
                sides[path] = (both[0], both[1])
    return sides


def _own(values: torch.Tensor, like: torch.Tensor) -> nn.Parameter:
    copied = values.detach().clone(memory_format=torch.contiguous_format)
    return nn.Parameter(copied, requires_grad=like.requires_grad)
