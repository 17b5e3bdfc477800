"""Transformers as programs: the operations of one forward, in the order of the kernel.

A program is a list of operations on a few buffers, one row a node. It holds no copy of the
weights, only where they are. :mod:`isthmus.decoding.lower` reads programs off models.

::

    EMBED ─▶ h ─┬─▶ NORM ─▶ LINEAR q, k, v ─▶ ROTATE ─▶ ATTEND ─▶ LINEAR ─▶ + h
                └─▶ NORM ─▶ LINEAR gate, up ─▶ LINEAR ─▶ + h   ... ─▶ NORM ─▶ LINEAR ─▶ logits
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import torch

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
    )


@dataclass
class Program:
    """The operations of a stack of layers and what they need to know.

    Attributes:
        ops: The operations in order; the last one makes the logits, if there are any.
        tensors: Every tensor whose address is in an operation, kept alive.
        sources: The parameters that the first of them were taken from.
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

    @property
    def stale(self) -> bool:
        """Whether a parameter of the model has moved since, as ``model.to(...)`` does it."""
        pairs = zip(self.sources, self.tensors, strict=False)
        return any(source.data_ptr() != kept.data_ptr() for source, kept in pairs)

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

    def to_int8(self) -> None:
        """Give every product int8 weights, rounded to nearest with one scale a row."""
        by_address = {t.data_ptr(): t for t in self.tensors}
        for op in self.ops:
            if op.kind != Kind.LINEAR:
                continue
            for name, scale in (("weight", "scale"), ("gate", "gate_scale")):
                if getattr(op, name):
                    parts = rounded(by_address[getattr(op, name)])
                    self.tensors += parts
                    for field_name, part in zip((name, scale), parts, strict=True):
                        setattr(op, field_name, part.data_ptr())
            op.dtype = DTYPES[torch.int8]


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
