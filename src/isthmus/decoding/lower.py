"""From a model of transformers to programs of the kernel.

A family is recognised by its shape, not by its name: parts that have the names below, and no
parameter that is left unused. Whether a program computes what the model computes is checked by
running both (:mod:`isthmus.decoding.fast`).

* Llama, Mistral, Qwen2, Qwen3: RMS norms, rotary positions, gated MLPs;
* T5, mT5: RMS norms, relative positions, MLPs gated or not;
* BART, Marian, Pegasus, mBART, Whisper's decoder: norms with a mean before or after each part, a
  table of positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from isthmus.decoding.program import (
    ACTIVATIONS,
    HEADS,
    INNER,
    LOGITS,
    NORMED,
    SPREADS,
    STREAM,
    Kind,
    Program,
)
from isthmus.errors import UnsupportedModelError

Module = Any


@dataclass(frozen=True)
class Attention:
    """Projections of an attention; ``across`` reads the encoder's output."""

    q: Module
    k: Module
    v: Module
    o: Module
    scaling: float
    window: int = 0
    q_norm: Module = None
    k_norm: Module = None
    across: bool = False


@dataclass(frozen=True)
class Mlp:
    """Two products with an activation between them, or three with a gate."""

    up: Module
    down: Module
    activation: str
    gate: Module = None


@dataclass(frozen=True)
class Stack:
    """Layers as what they have in common: parts with a norm each, added to the stream.

    Attributes:
        heads: Query heads.
        kv_heads: Key and value heads.
        head_dim: Width of a head.
        tokens: Table of token embeddings.
        layers: Of each layer, its parts with their norms.
        last: Norm after the last layer; where there is none, norms follow parts instead of
            preceding them.
        factor: Of token embeddings.
        places: Table of positions, or None.
        first_place: Its row of position 0.
        entry: Norm of what enters the first layer, or None.
        rotary: Module of cosines and sines, or None.
        relative: Attention that holds the table of relative positions, or None.
    """

    heads: int
    kv_heads: int
    head_dim: int
    tokens: Module
    layers: list[list[tuple[Module, Attention | Mlp]]]
    last: Module = None
    factor: float = 1.0
    places: Module = None
    first_place: int = 0
    entry: Module = None
    rotary: Module = None
    relative: Module = None


@dataclass
class Lowered:
    """Programs of one model.

    Attributes:
        decoder: From tokens to logits.
        encoder: From tokens to the encoder's output, where there is one that can be lowered.
        bridge: From the encoder's output to the keys and values that the decoder reads.
        why_no_encoder: Why the encoder stays the model's own.
    """

    decoder: Program
    encoder: Program | None = None
    bridge: Program | None = None
    why_no_encoder: str = ""
    programs: list[Program] = field(init=False)

    def __post_init__(self) -> None:
        self.programs = [p for p in (self.decoder, self.encoder, self.bridge) if p is not None]

    @property
    def stale(self) -> bool:
        """Whether a parameter of the model has moved since."""
        return any(program.stale for program in self.programs)


def lower(model: Any, windows: Sequence[int]) -> Lowered:
    """Read the programs of a model off its modules.

    Args:
        model: A causal or encoder-decoder model of transformers of one of the families above, on
            the CPU, float32 or bfloat16.
        windows: Keys that each decoder layer sees, counted from the query; 0 is all of them.

    Raises:
        UnsupportedModelError: The model is built in another way; the message says where.
    """
    dtypes = {p.dtype for p in model.parameters()}
    if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.bfloat16}:
        raise UnsupportedModelError("its weights are not all float32 or all bfloat16")
    if next(model.parameters()).device.type != "cpu":
        raise UnsupportedModelError("it is not on the CPU")
    try:
        if model.config.is_encoder_decoder:
            lowered = _pair(model)
        else:
            stack = _llama(model, windows)
            lowered = Lowered(_program(stack, head=model.get_output_embeddings()))
    except AttributeError as error:
        raise UnsupportedModelError(f"its layers are built in another way ({error})") from error
    read = {t.data_ptr() for program in lowered.programs for t in program.tensors}
    if model.config.is_encoder_decoder:
        # a table that was shared once may be there and unused
        spare = [getattr(model.base_model, "shared", None)]
        spare += [] if lowered.encoder else [model.get_encoder()]
        read |= {p.data_ptr() for module in spare if module for p in module.parameters()}
    left = [name for name, p in model.named_parameters() if p.data_ptr() not in read]
    if left:
        raise UnsupportedModelError(f"it has parameters that the kernel would not use: {left[0]}")
    return lowered


def _pair(model: Any) -> Lowered:
    """Programs of an encoder-decoder model."""
    decoder, encoder = model.get_decoder(), model.get_encoder()
    family: Callable[..., Stack] = _t5 if hasattr(decoder, "block") else _bart
    stack = family(decoder, model.config)
    factor = 0.0
    if getattr(model.config, "scale_decoder_outputs", False):
        factor = float(model.config.d_model) ** -0.5
    program = _program(
        stack,
        head=model.get_output_embeddings(),
        head_bias=getattr(model, "final_logits_bias", None),
        head_factor=factor,
    )
    why, own = "", None
    try:
        own = _program(family(encoder, model.config), whole=True)
    except (AttributeError, UnsupportedModelError) as error:
        why = str(error)
    return Lowered(program, own, _bridge(stack), why)


def _llama(model: Any, windows: Sequence[int]) -> Stack:
    config, base = model.config, getattr(model, "model", None)
    if base is None or not hasattr(base, "layers") or not hasattr(base, "rotary_emb"):
        raise UnsupportedModelError("its decoder has no layers with rotary positions")
    rope = getattr(base.rotary_emb, "rope_type", None)
    if rope not in ("default", "linear", "llama3", "yarn"):
        raise UnsupportedModelError(f"its rotary positions are of type {rope!r}")
    layers: list[list[tuple[Module, Attention | Mlp]]] = []
    for layer, window in zip(base.layers, windows, strict=True):
        inner, mlp = layer.self_attn, layer.mlp
        attention = Attention(
            inner.q_proj,
            inner.k_proj,
            inner.v_proj,
            inner.o_proj,
            inner.scaling,
            window,
            getattr(inner, "q_norm", None),
            getattr(inner, "k_norm", None),
        )
        gated = Mlp(mlp.up_proj, mlp.down_proj, config.hidden_act, mlp.gate_proj)
        layers.append([(layer.input_layernorm, attention), (layer.post_attention_layernorm, gated)])
    return Stack(
        config.num_attention_heads,
        config.num_key_value_heads,
        base.layers[0].self_attn.head_dim,
        base.embed_tokens,
        layers,
        base.norm,
        rotary=base.rotary_emb,
    )


def _t5(stack: Any, config: Any) -> Stack:
    first = stack.block[0].layer[0].SelfAttention
    layers: list[list[tuple[Module, Attention | Mlp]]] = []
    for block in stack.block:
        parts: list[tuple[Module, Attention | Mlp]] = []
        for layer in block.layer:
            if hasattr(layer, "DenseReluDense"):
                mlp = layer.DenseReluDense
                gated = hasattr(mlp, "wi_1")
                up, gate = (mlp.wi_1, mlp.wi_0) if gated else (mlp.wi, None)
                parts.append((layer.layer_norm, Mlp(up, mlp.wo, config.dense_act_fn, gate)))
                continue
            across = hasattr(layer, "EncDecAttention")
            inner = layer.EncDecAttention if across else layer.SelfAttention
            attention = Attention(inner.q, inner.k, inner.v, inner.o, 1.0, across=across)
            parts.append((layer.layer_norm, attention))
        layers.append(parts)
    return Stack(
        first.n_heads,
        first.n_heads,
        first.key_value_proj_dim,
        stack.embed_tokens,
        layers,
        stack.final_layer_norm,
        relative=first,
    )


def _bart(stack: Any, config: Any) -> Stack:
    first, places = stack.layers[0].self_attn, stack.embed_positions
    layers: list[list[tuple[Module, Attention | Mlp]]] = []
    for layer in stack.layers:
        parts: list[tuple[Module, Attention | Mlp]] = []
        for name in ("self_attn", "encoder_attn"):
            inner = getattr(layer, name, None)
            if inner is not None:
                across = name == "encoder_attn"
                projections = inner.q_proj, inner.k_proj, inner.v_proj, inner.out_proj
                attention = Attention(*projections, inner.scaling, across=across)
                parts.append((getattr(layer, f"{name}_layer_norm"), attention))
        mlp = Mlp(layer.fc1, layer.fc2, config.activation_function)
        layers.append([*parts, (layer.final_layer_norm, mlp)])
    scales = (getattr(each, "embed_scale", None) for each in (stack.embed_tokens, stack))
    return Stack(
        first.num_heads,
        first.num_heads,
        first.head_dim,
        stack.embed_tokens,
        layers,
        getattr(stack, "layer_norm", None),
        factor=next((scale for scale in scales if scale is not None), 1.0),
        places=places,
        first_place=getattr(places, "offset", 0),
        entry=getattr(stack, "layernorm_embedding", None),
    )


def _empty(stack: Stack, **extra: Any) -> Program:
    inner = [part.up for layer in stack.layers for _, part in layer if isinstance(part, Mlp)]
    return Program(
        layers=len(stack.layers),
        hidden_size=stack.tokens.weight.shape[1],
        heads=stack.heads,
        kv_heads=stack.kv_heads,
        head_dim=stack.head_dim,
        inner=max(up.weight.shape[0] for up in inner),
        **extra,
    )


def _program(
    stack: Stack,
    *,
    head: Module = None,
    head_bias: torch.Tensor | None = None,
    head_factor: float = 0.0,
    whole: bool = False,
) -> Program:
    """Write down a stack: with a head that of a decoder, else that of an encoder."""
    relative = stack.relative
    program = _empty(
        stack,
        vocab_size=0 if head is None else head.weight.shape[0],
        rotary=stack.rotary,
        buckets=None if relative is None else _buckets(relative),
        whole=whole,
    )
    width = program.hidden_size
    places = {} if stack.places is None else {"gate": stack.places.weight}
    program.add(
        Kind.EMBED,
        target=STREAM,
        weight=stack.tokens.weight,
        factor=stack.factor,
        offset=stack.first_place,
        in_width=width,
        out_width=width,
        wait=relative is None,
        **places,
    )
    if relative is not None:
        program.add(Kind.SPREAD, target=SPREADS, weight=relative.relative_attention_bias.weight)
    if stack.entry is not None:
        program.norm(stack.entry, STREAM, STREAM)
    before = stack.last is not None
    source = NORMED if before else STREAM
    for index, parts in enumerate(stack.layers):
        program.tap(STREAM, index)
        for norm, part in parts:
            if before:
                program.norm(norm, STREAM, NORMED)
            if isinstance(part, Mlp):
                _mlp(program, part, source)
            else:
                _attention(program, part, source, index)
            if not before:
                program.norm(norm, STREAM, STREAM)
    program.tap(STREAM, program.layers)
    if before:
        program.norm(stack.last, STREAM, NORMED)
    program.tap(source, program.layers + 1)
    if head is not None:
        extra = {"bias": head_bias} if head_bias is not None else {}
        program.linear(head, source, LOGITS, factor=head_factor, **extra)
    return program


def _attention(program: Program, part: Attention, source: int, layer: int) -> None:
    whole = program.whole or part.across
    if part.across:
        program.project([part.q], source)
    else:
        program.project([part.q, part.k, part.v], source)
        norms = (
            {
                "weight": part.q_norm.weight,
                "gate": part.k_norm.weight,
                "eps": part.q_norm.variance_epsilon,
            }
            if part.q_norm is not None and part.k_norm is not None
            else {}
        )
        # an encoder keeps its keys for the one layer only
        program.add(
            Kind.ROTATE,
            source=HEADS,
            layer=0 if program.whole else layer,
            whole=program.whole,
            **norms,
        )
    program.add(
        Kind.ATTEND,
        source=HEADS,
        target=NORMED,
        layer=0 if program.whole else layer,
        factor=part.scaling,
        window=part.window,
        store=int(part.across),
        whole=whole,
        biased=program.buckets is not None and not part.across,
    )
    program.linear(part.o, NORMED, STREAM, add=True)


def _mlp(program: Program, part: Mlp, source: int) -> None:
    if part.activation not in ACTIVATIONS:
        raise UnsupportedModelError(f"its activation is {part.activation!r}")
    number = ACTIVATIONS[part.activation]
    program.linear(part.up, source, INNER, gate=part.gate, activation=number)
    program.linear(part.down, INNER, STREAM, add=True)


def _bridge(stack: Stack) -> Program:
    """Keys and values of the encoder's output for each decoder layer."""
    program = _empty(stack)
    for index, parts in enumerate(stack.layers):
        for _, part in parts:
            if isinstance(part, Attention) and part.across:
                offset = stack.heads * stack.head_dim
                program.project([part.k, part.v], NORMED, offset)
                program.add(Kind.ROTATE, source=HEADS, layer=index, whole=True)
    return program


def _buckets(attention: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """Maps distances, key minus query, to rows of T5's table."""
    count = attention.relative_attention_num_buckets
    find = partial(
        attention._relative_position_bucket,
        bidirectional=not attention.is_decoder,
        num_buckets=count,
        max_distance=attention.relative_attention_max_distance,
    )
    return lambda distances: find(distances).clamp(0, count - 1)
