"""FLOPs and bytes: counted on a real forward, and in closed form.

:func:`count` runs a function once and adds up what each operation multiplies and moves. On the
``meta`` device nothing is computed, so models that fit into no memory can be counted.
:class:`Footprint` holds the closed forms of one stack of a transformer: what one forward of N
tokens on S cached ones has to do at least.

>>> a, b = torch.empty(2, 3, device="meta"), torch.empty(3, 5, device="meta")
>>> table = count(torch.mm, a, b)
>>> table.flops, table.bytes, table.flops == matmul(2, 3, 5).flops
(60, 124, True)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.module_tracker import ModuleTracker

from isthmus.errors import InvalidInputError

if TYPE_CHECKING:
    from isthmus.decoding.target import HubTarget

_BY_ROW = {"embedding", "index_select", "gather", "index"}
"""Operations that read of their first input only as much as they return."""

_WRITE_ONLY = {"copy_", "fill_", "zero_"}
"""Operations that overwrite their first input without reading it."""

_NO_WORK = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}

_ONCE_A_TEXT = re.compile(r"\.(encoder_attn|EncDecAttention)\.(k|v|k_proj|v_proj)\.")
"""Keys and values of the encoder's output are computed once, not with every token."""


@dataclass(frozen=True)
class Work:
    """What has to be done.

    Attributes:
        flops: Floating-point operations, a multiply and an add counted as two.
        bytes: Bytes read and written.
    """

    flops: float
    bytes: float

    @property
    def intensity(self) -> float:
        """Arithmetic intensity in FLOPs per byte."""
        return self.flops / self.bytes if self.bytes else 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: float) -> Work:
        return Work(self.flops * times, self.bytes * times)


@dataclass(frozen=True)
class Op(Work):
    """One operation in one module, all calls together.

    Attributes:
        name: Name of the operation, for example ``"mm"``.
        module: Path of the module that called it.
        calls: Number of calls.
    """

    name: str = ""
    module: str = ""
    calls: int = 1


@dataclass(frozen=True)
class OpTable:
    """All operations of one run, in the order of their first call."""

    ops: tuple[Op, ...]

    @property
    def total(self) -> Work:
        """The work of all operations."""
        return Work(self.flops, self.bytes)

    @property
    def flops(self) -> float:
        """FLOPs of all operations."""
        return sum(op.flops for op in self.ops)

    @property
    def bytes(self) -> float:
        """Bytes of all operations."""
        return sum(op.bytes for op in self.ops)

    @property
    def calls(self) -> int:
        """Calls of all operations, those that do no work included."""
        return sum(op.calls for op in self.ops)


def count(run: Callable[..., object], *args: Any, **kwargs: Any) -> OpTable:
    """Run a function once and count the FLOPs and bytes of every operation of torch in it.

    Matrix products and convolutions have FLOPs, everything else has bytes only: those of its
    distinct inputs and of its outputs. Views cost nothing; embeddings read rows, not tables.
    Attention is counted as matrix products and a softmax, as it would run without a fused kernel.
    Work outside torch's dispatcher (a kernel called through ctypes) is not seen. On the ``meta``
    device give models of transformers a 4-D mask: they look at the values of others.

    Args:
        run: The function; a module of transformers, for example.
        args: What it takes.
        kwargs: What it takes.
    """
    mode = _Counting()
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), mode.modules, mode:
        run(*args, **kwargs)
    return OpTable(
        tuple(
            Op(flops, size, name, module, calls)
            for (module, name), (calls, flops, size) in mode.found.items()
        )
    )


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.modules = ModuleTracker()
        self.found: dict[tuple[str, str], tuple[int, int, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._overloadpacket not in flop_registry:
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        name = func._overloadpacket.__name__
        formula = flop_registry.get(func._overloadpacket)
        flops = int(formula(*args, **kwargs, out_val=out)) if formula else 0
        module = max(self.modules.parents - {"Global"}, key=len, default="")
        calls, known, size = self.found.get((module, name), (0, 0, 0))
        moved = 0 if func.is_view or name in _NO_WORK else _moved(name, args, kwargs, out)
        self.found[module, name] = (calls + 1, known + flops, size + moved)
        return out


def _moved(name: str, args: Any, kwargs: Any, out: Any) -> int:
    """Bytes that one call reads and writes."""
    written = list(_tensors(out))
    read = list(_tensors([args, kwargs]))
    if name in _BY_ROW:
        read = [*written, *read[1:]]
    elif name in _WRITE_ONLY:
        read = read[1:]
    elif name.startswith("_unsafe_view"):
        return 0
    return sum(_sizes(read).values()) + sum(_sizes(written).values())


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))


def _sizes(tensors: Sequence[torch.Tensor]) -> dict[Any, int]:
    """Bytes of each distinct tensor; what is repeated by a stride of 0 counts once."""
    sizes = {}
    for x in tensors:
        place = (x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride())
        own = 1
        for length, stride in zip(x.shape, x.stride(), strict=True):
            own *= length if stride else min(length, 1)
        sizes[place] = own * x.element_size()
    return sizes


def matmul(m: int, k: int, n: int, *, itemsize: int = 4) -> Work:
    """The work of (m, k) times (k, n): 2mkn FLOPs, each matrix moved once.

    Example:
        >>> matmul(1, 100, 100).intensity < 0.5 < matmul(100, 100, 100).intensity
        True
    """
    return Work(2 * m * k * n, (m * k + k * n + m * n) * itemsize)


def training(forward: Work) -> Work:
    """The work of a training step: the backward pass is twice the forward one."""
    return forward * 3


@dataclass(frozen=True)
class Footprint:
    """What one stack of a transformer holds, as far as time and memory go.

    Attributes:
        weights: Parameters that every token is multiplied with, P; of a mixture of experts those
            of the active experts.
        weight_bytes: Bytes of these weights as they are stored.
        row_bytes: Bytes of one row of the embeddings.
        cache_bytes: Bytes of keys and values of one token, all layers: 2·L·H_kv·d_head·b.
        attention: Width of queries and values, all layers and heads: 2·L·d for heads that make up
            the width d. Two tokens attend to each other in twice as many FLOPs.
        source_bytes: Bytes of keys and values of one token of the encoder's output.
        source_attention: Like ``attention``, for cross-attention.
        window: Tokens back that attention sees, or None for all.
    """

    weights: float
    weight_bytes: float
    row_bytes: float = 0
    cache_bytes: float = 0
    attention: float = 0
    source_bytes: float = 0
    source_attention: float = 0
    window: int | None = None

    @classmethod
    def of(cls, target: HubTarget) -> Footprint:
        """The footprint of a target's decoder with its language-model head."""
        model, layout = target.model, target.layout
        experts = _active_experts(target.config)
        weights = weight_bytes = 0.0
        head = model.get_output_embeddings()
        seen = set()
        for part in (model.get_decoder(), *([head] if head is not None else [])):
            for name, module in part.named_modules():
                tables = isinstance(module, nn.Embedding)
                for own, p in module.named_parameters(recurse=False):
                    path = f".{name}.{own}"
                    if tables or id(p) in seen or _ONCE_A_TEXT.search(path):
                        continue
                    seen.add(id(p))
                    share = experts if ".experts." in path else 1.0
                    weights += share * p.numel()
                    weight_bytes += share * p.numel() * p.element_size()
        itemsize = target.dtype.itemsize
        kv = [shape for shape in layout if shape is not None]
        width = sum(s.heads * (s.key_dim + s.value_dim) for s in kv)
        heads = getattr(target.config, "num_attention_heads", None) or (kv[0].heads if kv else 0)
        attention = sum(heads * (s.key_dim + s.value_dim) for s in kv)
        cross = target.encoder_decoder
        every_layer_slides = target.kinds and set(target.kinds) == {"sliding"}
        return cls(
            weights,
            weight_bytes,
            row_bytes=target.hidden_size * itemsize,
            cache_bytes=width * itemsize,
            attention=attention,
            source_bytes=width * itemsize if cross else 0,
            source_attention=attention if cross else 0,
            window=target.window if every_layer_slides else None,
        )

    def forward(self, nodes: int, cached: int = 0, *, batch: int = 1, source: int = 0) -> Work:
        """The least work of one forward: weights are read once, the cache once for each row.

        Args:
            nodes: Tokens N of each row that are computed: 1 for a step of plain decoding.
            cached: Tokens S of each row that are cached.
            batch: Rows B.
            source: Tokens of the encoder's output that each row attends to.

        Raises:
            InvalidInputError: There is nothing to compute.

        Example:
            >>> step = Footprint(weights=100, weight_bytes=200, cache_bytes=8, attention=4)
            >>> step.forward(1, cached=9)
            Work(flops=280, bytes=280)
        """
        if min(nodes, batch) < 1 or min(cached, source) < 0:
            raise InvalidInputError(
                f"a forward computes at least one token, got nodes {nodes}, batch {batch}, "
                f"cached {cached}, source {source}"
            )
        seen = cached if self.window is None else min(cached, self.window)
        attended = self.attention * nodes * (seen + nodes) + self.source_attention * nodes * source
        held = self.cache_bytes * (seen + nodes) + self.source_bytes * source
        return Work(
            batch * (2 * self.weights * nodes + 2 * attended),
            self.weight_bytes + batch * (held + self.row_bytes * nodes),
        )

    def generation(self, prompt: int, new: int, *, batch: int = 1) -> list[Work]:
        """The work of every forward of plain decoding: the prompt, then one token at a time."""
        steps = [self.forward(1, prompt + t, batch=batch) for t in range(new - 1)]
        return [self.forward(prompt, batch=batch), *steps]


def _active_experts(config: Any) -> float:
    """Share of the experts that one token runs through."""
    chosen = getattr(config, "num_experts_per_tok", None)
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    held = next((n for name in names if (n := getattr(config, name, None))), None)
    return chosen / held if chosen and held else 1.0
