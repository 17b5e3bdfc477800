"""Decoders as programs: the operations of one forward, read off a model of transformers.

A program is a list of operations on a few buffers, one row a node. It holds no copy of the
weights, only where they are. What can be lowered is found by shape, not by name: a decoder whose
parts have the names below and whose every parameter is used. Whether the program computes what the
model computes is checked by running both (:mod:`isthmus.decoding.fast`).

::

    EMBED ─▶ h ─┬─▶ NORM ─▶ LINEAR q, k, v ─▶ ROTATE ─▶ ATTEND ─▶ LINEAR ─▶ + h
                └─▶ NORM ─▶ LINEAR gate, up ─▶ LINEAR ─▶ + h   ... ─▶ NORM ─▶ LINEAR ─▶ logits
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
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


ACTIVATIONS = {
    "silu": 1,
    "gelu_pytorch_tanh": 2,
    "gelu_new": 2,
    "gelu": 3,
    "relu": 4,
}
"""Names in a config, as the kernel numbers them; 0 is none."""

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}

STREAM, NORMED, HEADS, INNER, LOGITS = range(5)
"""Buffers: residual stream, its norm or the attention's output, [q | k | v], MLP, logits."""


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
    )


@dataclass
class Program:
    """The operations of a decoder and what they need to know.

    Attributes:
        ops: The operations in order; the last one makes the logits.
        tensors: Every tensor whose address is in an operation, kept alive.
        sources: The parameters that the first of them were taken from.
        layers: Decoder layers L.
        hidden_size: Width D of the residual stream.
        heads: Query heads.
        kv_heads: Key and value heads.
        head_dim: Width of a head.
        inner: Width of the MLP.
        vocab_size: Width V of the logits.
        rotary: The model's own module of cosines and sines.
    """

    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocab_size: int
    rotary: Any
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
        if gate is not None:
            fields["gate"] = gate.weight
        if module.bias is not None:
            fields["bias"] = module.bias
        self.add(
            Kind.LINEAR,
            source=source,
            target=target,
            weight=module.weight,
            in_width=in_width,
            out_width=out_width,
            **{"stride": out_width, **fields},
        )

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


def lower(model: Any, windows: Sequence[int]) -> Program:
    """Read the program of a decoder-only model off its modules.

    Args:
        model: A causal model of transformers: RMS norms, rotary positions, gated MLPs (Llama,
            Mistral, Qwen2, Qwen3 and what is built like them), on the CPU, float32 or bfloat16.
        windows: Keys that each layer sees, counted from the query; 0 is all of them.

    Raises:
        UnsupportedModelError: The model is built in another way; the message says where.
    """
    config, base = model.config, getattr(model, "model", None)
    if base is None or not hasattr(base, "layers") or not hasattr(base, "rotary_emb"):
        raise UnsupportedModelError("its decoder has no layers with rotary positions")
    rope = getattr(base.rotary_emb, "rope_type", None)
    if rope not in ("default", "linear", "llama3", "yarn"):
        raise UnsupportedModelError(f"its rotary positions are of type {rope!r}")
    dtypes = {p.dtype for p in model.parameters()}
    if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.bfloat16}:
        raise UnsupportedModelError("its weights are not all float32 or all bfloat16")
    if next(model.parameters()).device.type != "cpu":
        raise UnsupportedModelError("it is not on the CPU")
    if config.hidden_act not in ACTIVATIONS:
        raise UnsupportedModelError(f"its activation is {config.hidden_act!r}")
    try:
        program = _llama(model, windows)
    except AttributeError as error:
        raise UnsupportedModelError(f"its layers are built in another way ({error})") from error
    read = {t.data_ptr() for t in program.tensors}
    left = [name for name, p in model.named_parameters() if p.data_ptr() not in read]
    if left:
        raise UnsupportedModelError(f"it has more parameters than a Llama has, such as {left[0]}")
    return program


def _llama(model: Any, windows: Sequence[int]) -> Program:
    config, base = model.config, model.model
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = base.layers[0].self_attn.head_dim
    head = model.get_output_embeddings()
    program = Program(
        layers=len(base.layers),
        hidden_size=config.hidden_size,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        inner=base.layers[0].mlp.down_proj.weight.shape[1],
        vocab_size=head.weight.shape[0],
        rotary=base.rotary_emb,
    )
    width = program.hidden_size
    everywhere: dict[str, Any] = {"in_width": width, "out_width": width}
    program.add(
        Kind.EMBED, target=STREAM, weight=base.embed_tokens.weight, factor=1.0, **everywhere
    )
    for index, layer in enumerate(base.layers):
        attention, mlp = layer.self_attn, layer.mlp
        program.add(Kind.TAP, source=STREAM, layer=index, wait=False, **everywhere)
        _norm(program, layer.input_layernorm, STREAM, NORMED)
        offset = 0
        for name in ("q_proj", "k_proj", "v_proj"):
            module = getattr(attention, name)
            program.linear(
                module,
                NORMED,
                HEADS,
                stride=program.widths[HEADS],
                offset=offset,
                wait=name == "v_proj",
            )
            offset += module.weight.shape[0]
        q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        norms = (
            {"weight": q_norm.weight, "gate": k_norm.weight, "eps": q_norm.variance_epsilon}
            if q_norm is not None and k_norm is not None
            else {}
        )
        program.add(Kind.ROTATE, source=HEADS, layer=index, **norms)
        program.add(
            Kind.ATTEND,
            source=HEADS,
            target=NORMED,
            layer=index,
            factor=attention.scaling,
            window=windows[index],
        )
        program.linear(attention.o_proj, NORMED, STREAM, add=True)
        _norm(program, layer.post_attention_layernorm, STREAM, NORMED)
        activation = ACTIVATIONS[config.hidden_act]
        program.linear(mlp.up_proj, NORMED, INNER, gate=mlp.gate_proj, activation=activation)
        program.linear(mlp.down_proj, INNER, STREAM, add=True)
    program.add(Kind.TAP, source=STREAM, layer=program.layers, wait=False, **everywhere)
    _norm(program, base.norm, STREAM, NORMED)
    program.add(Kind.TAP, source=NORMED, layer=program.layers + 1, wait=False, **everywhere)
    program.linear(head, NORMED, LOGITS)
    return program


def _norm(program: Program, module: Any, source: int, target: int) -> None:
    width = module.weight.shape[0]
    program.add(
        Kind.NORM,
        source=source,
        target=target,
        weight=module.weight,
        eps=module.variance_epsilon,
        in_width=width,
        out_width=width,
    )
