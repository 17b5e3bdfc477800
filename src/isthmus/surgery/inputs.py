"""Layers that skip some of their inputs: what is pruned together, and a copy to try it on.

::

    feed_forward_groups(model) ──▶ Trial(model, groups).set(modes, thresholds) ──▶ rows, sparsity

Thresholds of one layer change what the next one reads. So they are found on a copy of the model
whose layers are pruned already, and the model itself is only read.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus.lenses.trace import Intervene
from isthmus.lenses.trace import Site as Place
from isthmus.nn.sparse_gemv import ThresholdedLinear
from isthmus.surgery.base import Site, activation, matrix, sites
from isthmus.surgery.calibration import Calibration, Reservoir, capture


@dataclass(frozen=True)
class Group:
    """Matrices that share their inputs, and so a mode and a threshold.

    Attributes:
        paths: Module paths.
        last: Whether they read the hidden units.
        weights: Numbers in them.
    """

    paths: tuple[str, ...]
    last: bool
    weights: int


def density_mode(values: Tensor, bandwidth: float = 0.5, grid: int = 2000) -> float:
    """The place where a Gaussian kernel density of values [n] is highest.

    Args:
        values: The values.
        bandwidth: Standard deviation of the kernel, in standard deviations of the values.
        grid: Places looked at, evenly from the smallest value to the largest.

    Example:
        >>> round(density_mode(torch.tensor([0.0, 0.0, 0.0, 1.0]), bandwidth=0.1), 2)
        0.0
    """
    x = values.flatten().double()
    low, high = float(x.min()), float(x.max())
    if low == high:
        return low
    counts = torch.histc(x, grid, low, high)
    step = (high - low) / grid
    reach = torch.arange(-grid, grid + 1, dtype=torch.float64) * step
    kernel = (-0.5 * (reach / (bandwidth * x.std())) ** 2).exp()
    size = 4 * grid  # room for the whole convolution
    density = torch.fft.irfft(torch.fft.rfft(counts, size) * torch.fft.rfft(kernel, size), size)
    best = int(density[grid : 2 * grid].argmax())
    return low + (best + 0.5) * step


def feed_forward_groups(model: nn.Module, *, inputs: bool = True) -> tuple[Group, ...]:
    """Matrices of all feed-forward layers, those that share inputs together.

    Args:
        model: A model of transformers.
        inputs: Include the first matrices, which read the input of the layer.

    Raises:
        UnsupportedModelError: There are none that isthmus knows.
    """
    groups = []
    for site in sites(model, "ffn"):
        first = tuple(path for name, path in site.parts.items() if name != "down")
        for paths, last in ((first, False), ((site.parts["down"],), True)):
            count = sum(matrix(model.get_submodule(p)).numel() for p in paths)
            if last or inputs:
                groups.append(Group(paths, last, count))
    return tuple(groups)


def thresholded(linear: nn.Module) -> ThresholdedLinear:
    """A linear layer (or a Conv1D of transformers) with a threshold, still 0."""
    bias: Any = getattr(linear, "bias", None)
    return ThresholdedLinear.of(matrix(linear), bias).train(linear.training)


class Trial:
    """A copy of a model with thresholds to try.

    Args:
        model: The model, which is only read.
        groups: What is pruned.
    """

    def __init__(self, model: nn.Module, groups: Sequence[Group]) -> None:
        self.groups = tuple(groups)
        self.layers = {p: thresholded(model.get_submodule(p)) for g in groups for p in g.paths}
        # what deepcopy finds in its memo it takes as copied already
        memo: dict[int, Any] = {id(model.get_submodule(p)): m for p, m in self.layers.items()}
        self.model: Any = copy.deepcopy(model, memo)
        self.places = tuple(Site(p, "linear") for p in self.layers)

    def set(self, found: Sequence[Sequence[float]]) -> None:
        """Choose mode and threshold of every group."""
        for group, (mode, tau, *_) in zip(self.groups, found, strict=True):
            for path in group.paths:
                self.layers[path].set(mode, tau)

    def weight(self, group: Group) -> Tensor:
        """Matrices of a group on top of each other [R, C]."""
        return torch.cat([self.layers[p].transposed.detach().mT for p in group.paths])

    def rows(self, data: Calibration, tokens: int, seed: int = 0) -> dict[str, Tensor]:
        """Inputs of some tokens at every place [n, C], with the thresholds there are."""
        found = capture(self.model, self.places, data, lambda: Reservoir(tokens, seed))
        return {path: each.rows for path, each in found.items()}

    def sparsity(self, data: Calibration) -> dict[str, float]:
        """Share of inputs that each place skips."""
        layers: Iterator[ThresholdedLinear] = iter(self.layers.values())
        # made in the order of the places
        found = capture(self.model, self.places, data, lambda: _Skipped(next(layers)))
        return {path: each.skipped / max(each.count, 1) for path, each in found.items()}


class _Skipped:
    """Counts the inputs that a layer skips."""

    def __init__(self, layer: ThresholdedLinear) -> None:
        self.layer, self.skipped, self.count = layer, 0, 0

    def add(self, x: Tensor) -> None:
        """See :class:`isthmus.surgery.calibration.Reducer`."""
        self.skipped += int(((x - self.layer.mode).abs() <= self.layer.threshold).sum())
        self.count += x.numel()


@contextmanager
def skipped_units(model: nn.Module, data: Calibration, sparsity: float) -> Iterator[None]:
    """Skip hidden units whose activated gate is small, while the context lasts (CATS).

    Of a gated layer the first matrix is then read whole, and of the two others the rows and columns
    of what is left. Thresholds come from the model with the layers before pruned already.

    Source: D. Lee et al., "CATS: Contextually-Aware Thresholding for Sparsity in Large Language
    Models", 2024, arXiv:2404.08763.

    Args:
        model: A model of transformers.
        data: Samples without padding.
        sparsity: Share of units that is skipped.
    """
    names = {id(module): path for path, module in model.named_modules()}
    with ExitStack() as stack:
        for site in sites(model, "ffn"):
            act: Any = activation(model, site)
            place, seen = Place(names[id(act)]), Reservoir(1024)

            def look(value: Tensor, seen: Reservoir = seen) -> Tensor:
                seen.add(value.detach().flatten(0, -2))
                return value

            with Intervene(model, {place: look}), torch.no_grad():
                for batch in data:
                    model(**batch)
            away = seen.rows.abs().float().flatten()
            tau = float(away.kthvalue(max(1, round(sparsity * len(away)))).values)
            skip = functools.partial(F.hardshrink, lambd=tau)
            stack.enter_context(Intervene(model, {place: skip}))
        yield
