"""Reading and changing the inner values of a model, through hooks of torch and nothing else.

::

    with Trace(model, {"mid": Site("model.layers.3")}) as seen:
        model(**inputs)
    seen["mid"]                                     # what came out of that module [B, T, D]

    with Intervene(model, {site: zero}):
        model(**inputs)                             # as if that value were 0
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from isthmus.errors import InvalidInputError, UnknownNameError, UnsupportedModelError

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Site:
    """A value inside a model.

    Attributes:
        module: Path of a module, as in ``named_modules``.
        end: ``"in"`` for its first input, ``"out"`` for its output.
        item: Which one, where the output is a tuple.
    """

    module: str
    end: str = "out"
    item: int = 0

    def __str__(self) -> str:
        item = f"[{self.item}]" if self.item else ""
        return f"{self.module}.{self.end}{item}"


class _Hooks:
    """Hooks on sites, which are there only inside a ``with``.

    Args:
        model: Any module; in eval mode, because dropout would make values differ from call to call.
        sites: Sites by a name of one's own.

    Raises:
        InvalidInputError: The model is in training mode.
        UnknownNameError: It has no such module.
        UnsupportedModelError: It is compiled, and its hooks would not fire.
    """

    def __init__(self, model: nn.Module, sites: Mapping[str, Site]) -> None:
        if model.training and any(isinstance(m, nn.Dropout) and m.p for m in model.modules()):
            raise InvalidInputError("the model is in training mode; call model.eval() first")
        if isinstance(model, torch._dynamo.eval_frame.OptimizedModule):
            raise UnsupportedModelError(
                "hooks of a compiled model do not fire; give the model that was compiled"
            )
        self.model, self.sites = model, dict(sites)
        self._modules = dict(model.named_modules())
        for site in self.sites.values():
            if site.module not in self._modules:
                raise UnknownNameError("module", site.module, list(self._modules))
        self._handles: list[Any] = []

    def _on(self, name: str, value: Tensor) -> Tensor | None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        for name, site in self.sites.items():
            module = self._modules[site.module]
            if site.end == "in":
                hook = module.register_forward_pre_hook(_before(self._on, name), with_kwargs=True)
            else:
                hook = module.register_forward_hook(_after(self._on, name, site.item))
            self._handles.append(hook)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


class Trace(_Hooks):
    """What a model computes on the way.

    Args:
        model: Any module, in eval mode.
        sites: Sites by a name of one's own.
        grad: Keep values in the graph, so that gradients reach them.

    Raises:
        InvalidInputError: The model is in training mode.
        UnknownNameError: It has no such module.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU()).eval()
        >>> with Trace(model, {"before": Site("1", "in"), "after": Site("1")}) as seen:
        ...     _ = model(torch.ones(1, 2))
        >>> torch.equal(seen["before"].relu(), seen["after"])
        True
    """

    def __init__(self, model: nn.Module, sites: Mapping[str, Site], *, grad: bool = False) -> None:
        super().__init__(model, sites)
        self.grad = grad
        self.calls: dict[str, list[Tensor]] = {name: [] for name in self.sites}

    def _on(self, name: str, value: Tensor) -> None:
        self.calls[name].append(value if self.grad else value.detach())

    def __getitem__(self, name: str) -> Tensor:
        """The value of a site that was computed once.

        Raises:
            UnknownNameError: It was not asked for.
            UnsupportedModelError: The module was not called, or more than once; see ``calls``.
        """
        if name not in self.calls:
            raise UnknownNameError("site", name, list(self.calls))
        values = self.calls[name]
        if len(values) != 1:
            raise UnsupportedModelError(
                f"{self.sites[name]} was computed {len(values)} times, not once; "
                + ("see .calls for all of them" if values else "a fused path may go around it")
            )
        return values[0]


class Intervene(_Hooks):
    """Compute with other inner values.

    Args:
        model: Any module, in eval mode.
        changes: What becomes of the value at each site; see :func:`zero`, :func:`replaced` and
            :func:`project_out`.

    Raises:
        InvalidInputError: The model is in training mode.
        UnknownNameError: It has no such module.
    """

    def __init__(self, model: nn.Module, changes: Mapping[Site, Change]) -> None:
        super().__init__(model, {str(site): site for site in changes})
        self._changes = {str(site): change for site, change in changes.items()}

    def _on(self, name: str, value: Tensor) -> Tensor:
        return self._changes[name](value)


def zero(value: Tensor) -> Tensor:
    """Nothing in its place."""
    return torch.zeros_like(value)


def replaced(other: Tensor) -> Change:
    """Another value of that shape in its place, as from another trace.

    Raises (when computed):
        InvalidInputError: The shapes differ.
    """

    def change(value: Tensor) -> Tensor:
        if value.shape != other.shape:
            raise InvalidInputError(
                f"{list(other.shape)} cannot take the place of {list(value.shape)}"
            )
        return other.to(value)

    return change


def project_out(direction: Tensor) -> Change:
    """The value without its part along a direction [D]."""
    unit = direction / direction.norm()
    return lambda value: value - (value @ unit.to(value))[..., None] * unit.to(value)


def _before(on: Callable[[str, Tensor], Tensor | None], name: str) -> Any:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if args:
            new = on(name, args[0])
            return None if new is None else ((new, *args[1:]), kwargs)
        first = next(k for k, v in kwargs.items() if isinstance(v, Tensor))
        new = on(name, kwargs[first])
        return None if new is None else (args, kwargs | {first: new})

    return hook


def _after(on: Callable[[str, Tensor], Tensor | None], name: str, item: int) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if not isinstance(output, tuple):
            return on(name, output) if item == 0 else None
        if item >= len(output) or output[item] is None:
            return None
        new = on(name, output[item])
        return None if new is None else (*output[:item], new, *output[item + 1 :])

    return hook
