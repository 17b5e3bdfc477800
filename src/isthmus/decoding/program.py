"""Transformers as programs: the operations of one forward, in the order of the kernel.

A program is a list of operations on a few buffers, one row a node. It knows where the weights are
and holds a copy of them only where they are laid out (:meth:`Program.lay_out`).
:mod:`isthmus.decoding.lower` reads programs off models.

::

    EMBED ─▶ h ─┬─▶ NORM ─▶ LINEAR q, k, v ─▶ ROTATE ─▶ ATTEND ─▶ LINEAR ─▶ + h
                └─▶ NORM ─▶ LINEAR gate, up ─▶ LINEAR ─▶ + h   ... ─▶ NORM ─▶ LINEAR ─▶ logits
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import torch
import torch.nn.functional as F

from isthmus.errors import UnsupportedModelError


class Kind(IntEnum):
    """What an operation does."""

    EMBED = 0
    NORM = 1
    LINEAR = 2
    ROTATE = 3
    ATTEND = 4
    TAP = 5
    SPREAD = 6


ACTIVATIONS = {
    "silu": 1,
    "swish": 1,
    "gelu_pytorch_tanh": 2,
    "gelu_new": 2,
    "gelu": 3,
    "relu": 4,
}
"""Names in a config, as the kernel numbers them; 0 is none."""

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}

PANEL = 64
"""Outputs side by side in a panel, as the kernel has it."""

STREAM, NORMED, HEADS, INNER, LOGITS, SPREADS = range(6)
"""Buffers: residual stream, its norm or the attention's output, [q | k | v], MLP, logits, and what
relative positions add to scores."""


class Op(ctypes.Structure):
    """One operation, in the layout of ``native.c``."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("kind", "dtype", "activation", "layer")),
        *((name, ctypes.c_int32) for name in ("source", "target", "add", "wait")),
        *((name, ctypes.c_int64) for name in ("in_width", "out_width", "stride", "offset")),
        *((name, ctypes.c_void_p) for name in ("weight", "gate", "scale", "gate_scale", "bias")),
        ("bias_dtype", ctypes.c_int64),
        *((name, ctypes.c_float) for name in ("eps", "factor")),
        ("window", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("mean", "store", "whole", "biased")),
        *((name, ctypes.c_void_p) for name in ("panels", "gate_panels")),
    )


@dataclass(frozen=True)
class Screen:
    """Bounds of products with a weight matrix [O, K], O filled up to whole panels.

    Attributes:
        weights: Weights rounded to int8, [O / PANEL, K / 4, PANEL, 4].
        starts: -128 times the sum of each row of them, int32 [O].
        steps: What 1 of them stands for, float32 [O].
        errors: Norm of what rounding took from each row, float32 [O]; like the other two bounds
            with what float32 arithmetic may round.
        norms: Norm of each row, float32 [O].
        slack: What else a product may be off by, float32 [O].
        bias: Added to products, float32 [O]; -inf where there is no output.
    """

    weights: torch.Tensor
    starts: torch.Tensor
    steps: torch.Tensor
    errors: torch.Tensor
    norms: torch.Tensor
    slack: torch.Tensor
    bias: torch.Tensor


@dataclass
class Program:
    """The operations of a stack of layers and what they need to know.

    Attributes:
        ops: The operations in order; the last one makes the logits, if there are any.
        tensors: Every tensor whose address is in an operation, kept alive.
        sources: The parameters that the first of them were taken from.
        versions: How often each of those had been changed in place when the weights were laid out
            (:meth:`lay_out`); empty before.
        laid: Weights laid out.
        layers: Layers L.
        hidden_size: Width D of the residual stream.
        heads: Query heads.
        kv_heads: Key and value heads.
        head_dim: Width of a head.
        inner: Width of the MLP.
        vocab_size: Width V of the logits; 0 where there are none.
        rotary: The model's own module of cosines and sines, or None.
        buckets: Maps distances (key minus query, int64 [T]) to rows of a table of biases, or None.
        whole: Whether nodes see all nodes of their row, as in an encoder.
    """

    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocab_size: int = 0
    rotary: Any = None
    buckets: Callable[[torch.Tensor], torch.Tensor] | None = None
    whole: bool = False
    ops: list[Op] = field(default_factory=list)
    tensors: list[torch.Tensor] = field(default_factory=list)
    sources: list[torch.Tensor] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    laid: list[torch.Tensor] = field(default_factory=list)

    @property
    def stale(self) -> bool:
        """Whether a parameter has moved since, as ``model.to(...)`` does it.

        Or has changed in place since it was laid out.
        """
        pairs = zip(self.sources, self.tensors, strict=False)
        moved = any(source.data_ptr() != kept.data_ptr() for source, kept in pairs)
        return moved or self.versions != _versions(self.sources[: len(self.versions)])

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of each buffer but the logits."""
        heads = (self.heads + 2 * self.kv_heads) * self.head_dim
        return (
            self.hidden_size,
            max(self.hidden_size, self.heads * self.head_dim),
            heads,
            self.inner,
        )

    def add(self, kind: Kind, *, wait: bool = True, **fields: Any) -> Op:
        """Append an operation; tensors among the fields become addresses."""
        op = Op(kind=kind, wait=wait)
        for name, value in fields.items():
            if isinstance(value, torch.Tensor):
                if not value.is_contiguous():
                    raise UnsupportedModelError("a weight is not laid out row by row")
                self.tensors.append(value.detach())  # lives on when the parameter is given others
                self.sources.append(value)
                if name == "weight":
                    op.dtype = DTYPES[value.dtype]
                elif name == "bias":
                    op.bias_dtype = DTYPES[value.dtype]
                value = value.data_ptr()
            setattr(op, name, value)
        self.ops.append(op)
        return op

    def linear(
        self,
        module: Any,
        source: int,
        target: int,
        *,
        gate: Any = None,
        **fields: Any,
    ) -> None:
        """Append ``target = module(source)``, with a gated activation if there is a ``gate``."""
        out_width, in_width = module.weight.shape
        fields.setdefault("bias", module.bias)
        if fields["bias"] is None:
            del fields["bias"]
        if gate is not None:
            fields["gate"] = gate.weight
        self.add(
            Kind.LINEAR,
            source=source,
            target=target,
            weight=module.weight,
            in_width=in_width,
            out_width=out_width,
            **{"stride": out_width, **fields},
        )

    def norm(self, module: Any, source: int, target: int) -> None:
        """Append the norm of rows, with or without their mean."""
        width = module.weight.shape[0]
        mean = isinstance(module, torch.nn.LayerNorm)
        extra = {"bias": module.bias} if mean and module.bias is not None else {}
        self.add(
            Kind.NORM,
            source=source,
            target=target,
            weight=module.weight,
            eps=module.eps if mean else module.variance_epsilon,
            mean=mean,
            in_width=width,
            out_width=width,
            **extra,
        )

    def tap(self, source: int, layer: int) -> None:
        """Append a place where states may be taken."""
        width = self.hidden_size
        self.add(Kind.TAP, source=source, layer=layer, wait=False, in_width=width, out_width=width)

    def project(self, modules: Sequence[Any], source: int, offset: int = 0) -> None:
        """Append products into the buffer of heads, side by side from ``offset`` on."""
        for module in modules:
            self.linear(
                module,
                source,
                HEADS,
                stride=self.widths[HEADS],
                offset=offset,
                wait=module is modules[-1],
            )
            offset += module.weight.shape[0]

    def lay_out(self) -> None:
        """Give every product a copy of its weights in the kernel's own order.

        Products of several nodes read it at a fraction of the cost of rows; a parameter that
        changes later has to be laid out again, which :attr:`stale` says.
        """
        by_address = {t.data_ptr(): t for t in self.tensors}
        self.versions, self.laid = _versions(self.sources), []
        for op in self.ops:
            if op.kind == Kind.LINEAR:
                for name, place, _ in WEIGHTS:
                    if getattr(op, name):
                        self._lay(op, place, by_address[getattr(op, name)])

    @functools.cached_property
    def screen(self) -> Screen | None:
        """Bounds of the logits, of floats that were laid out; made when they are first needed."""
        head = self.ops[-1]
        if not self.vocab_size or not self.laid or head.dtype == DTYPES[torch.int8]:
            return None
        by_address = {t.data_ptr(): t for t in self.tensors}
        bias = by_address[head.bias] if head.bias else None
        return screened(by_address[head.weight], bias, head.factor or 1.0)

    def _lay(self, op: Op, place: str, weight: torch.Tensor) -> None:
        self.laid.append(panels(weight))
        setattr(op, place, self.laid[-1].data_ptr())

    def to_int8(self) -> None:
        """Give every product int8 weights, rounded to nearest with one scale a row."""
        by_address = {t.data_ptr(): t for t in self.tensors}
        laid, self.laid = bool(self.laid), []
        for op in self.ops:
            if op.kind != Kind.LINEAR:
                continue
            for name, place, scale in WEIGHTS:
                if getattr(op, name):
                    values, scales = rounded(by_address[getattr(op, name)])
                    self.tensors.append(scales)
                    setattr(op, scale, scales.data_ptr())
                    if laid:
                        self._lay(op, place, values)
                    else:
                        self.tensors.append(values)
                        setattr(op, name, values.data_ptr())
            op.dtype = DTYPES[torch.int8]


WEIGHTS = (("weight", "panels", "scale"), ("gate", "gate_panels", "gate_scale"))
"""Fields of an operation: weights, the same laid out, and the scales of int8 ones."""


def _versions(tensors: Sequence[torch.Tensor]) -> list[int]:
    """How often each was changed in place; tensors of inference mode do not count, nor change."""
    return [0 if t.is_inference() else t._version for t in tensors]


def panels(weight: torch.Tensor) -> torch.Tensor:
    """A weight matrix [O, K] as panels [ceil(O / PANEL), K, PANEL], the last filled with zeros.

    Example:
        >>> panels(torch.arange(130.0)[:, None]).shape
        torch.Size([3, 1, 64])
    """
    count = -(-weight.shape[0] // PANEL)
    full = F.pad(weight.detach(), (0, 0, 0, count * PANEL - weight.shape[0]))
    return full.view(count, PANEL, -1).transpose(1, 2).contiguous()


UNIT = 2.0**-24
"""Largest relative error of one rounding to float32."""


def screened(weight: torch.Tensor, bias: torch.Tensor | None, factor: float) -> Screen | None:
    """Bounds of ``factor * weight @ x + bias``; None where they might leave the range of float32.

    Args:
        weight: [O, K], K a multiple of 4.
        bias: Of O values, or None.
        factor: Of the products.
    """
    (rows, width), size = weight.shape, -(-weight.shape[0] // PANEL) * PANEL
    values = torch.zeros(size, width, dtype=torch.int8)
    steps, errors, norms = torch.zeros(3, size, dtype=torch.float64)
    for first in range(0, rows, 4096):  # doubles of all rows at once would be large
        some = slice(first, min(first + 4096, rows))
        exact = weight.detach()[some].double() * factor
        step = (exact.abs().amax(1) / 127).clamp(min=1e-30).float().double()
        whole = (exact / step[:, None]).round().clamp(-127, 127)
        values[some], steps[some], norms[some] = whole.to(torch.int8), step, exact.norm(dim=1)
        errors[some] = (exact - whole * step[:, None]).norm(dim=1)
    # always named: a model that is loaded in another thread changes the default dtype
    none = torch.zeros(rows, dtype=torch.float32)
    added = none if bias is None else bias.detach().flatten().float()
    if not bool((norms < 1e18).all()) or not bool((added.abs() < 1e18).all()):
        return None
    added = F.pad(added, (0, size - rows), value=-torch.inf)
    slack = torch.where(added.isfinite(), 8 * UNIT * added.abs(), 0.0).double() + width * 2.0**-110
    upward = 1 + 2.0**-18
    return Screen(
        values.view(-1, PANEL, width // 4, 4).transpose(1, 2).contiguous(),
        -128 * values.sum(1, dtype=torch.int32),
        steps.float(),
        ((errors + 8 * UNIT * (norms + errors)) * upward).float(),
        (norms * upward).float(),
        (slack * upward).float(),
        added,
    )


def rounded(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Int8 values [O, K] and float32 scales [O] of a weight matrix [O, K].

    Example:
        >>> values, scales = rounded(torch.tensor([[1.0, -2.54], [0.0, 0.0]]))
        >>> values.tolist(), round(scales[0].item(), 4)
        ([[50, -127], [0, 0]], 0.02)
    """
    values = weight.detach().float()
    scales = (values.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    return (values / scales[:, None]).round().to(torch.int8), scales
