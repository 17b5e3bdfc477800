"""What every operation on a trained model is made of: sites, a plan, a report.

::

    sites(model, kind) ──▶ plan (only reads) ──▶ apply (changes) ──▶ report ──▶ surgery.export
                             plan.json, plan.safetensors: made once, looked at, used again

A plan belongs to one model: it carries the model's fingerprint, and another model is refused. The
operations themselves are systems that play :class:`isthmus.roles.Surgery`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from isthmus import folders
from isthmus.errors import (
    BrokenFileError,
    InvalidInputError,
    MismatchError,
    UnknownNameError,
    UnsupportedModelError,
)
from isthmus.lenses import sites as site_maps
from isthmus.lenses.trace import Site as Place
from isthmus.lenses.trace import Trace

Kind = Literal["linear", "ffn", "attention", "block", "ssm", "moe", "norm"]
"""What a site is: a matrix, a feed-forward layer, an attention layer, a layer of a stack, a
state-space mixer, a layer of experts, a norm."""

PLAN, TENSORS = "plan.json", "plan.safetensors"

_FFN: tuple[dict[str, str], ...] = (
    {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"},  # Llama, Mistral, Qwen, Gemma
    {"gate_up": "gate_up_proj", "down": "down_proj"},  # Phi-3, GLM
    {"up": "c_fc", "down": "c_proj"},  # GPT-2
    {"up": "fc1", "down": "fc2"},  # OPT, BART, Whisper, ViT
    {"gate": "wi_0", "up": "wi_1", "down": "wo"},  # T5 1.1
    {"up": "wi", "down": "wo"},  # T5
    {"up": "intermediate.dense", "down": "output.dense"},  # BERT
    {"up": "dense_h_to_4h", "down": "dense_4h_to_h"},  # GPT-NeoX, Falcon
    {"up": "up_proj", "down": "down_proj"},  # MPT
)
_ATTENTION: tuple[dict[str, str], ...] = (
    {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"},  # Llama and kin, ViT
    {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"},  # OPT, BART, Whisper
    {"qkv": "qkv_proj", "o": "o_proj"},  # Phi-3
    {"qkv": "c_attn", "o": "c_proj"},  # GPT-2
    {"q": "q", "k": "k", "v": "v", "o": "o"},  # T5
    {"q": "self.query", "k": "self.key", "v": "self.value", "o": "output.dense"},  # BERT
    {"qkv": "query_key_value", "o": "dense"},  # GPT-NeoX, Falcon
    {"qkv": "Wqkv", "o": "out_proj"},  # MPT
)
_ACTIVATIONS = ("act_fn", "activation_fn", "act", "intermediate.intermediate_act_fn")


@dataclass(frozen=True)
class Site:
    """One place in a model.

    Attributes:
        path: Module path; of a feed-forward layer, the module that holds its matrices.
        kind: What it is.
        parts: Module paths of its parts: ``gate``, ``up`` (or ``gate_up`` in one matrix) and
            ``down`` of a feed-forward layer; ``q``, ``k``, ``v`` (or ``qkv``) and ``o`` of an
            attention layer.
        axes: Sizes: ``in`` and ``out`` of a matrix; ``model`` and ``hidden`` of a feed-forward
            layer (and ``experts`` of one with experts); ``model`` and ``inner`` of attention.
        stack: ``"enc"`` or ``"dec"`` in a model with an encoder, else ``""``.
        layer: Number of the layer it lies in, counted within its stack; -1 outside of all.
    """

    path: str
    kind: Kind
    parts: Mapping[str, str] = field(default_factory=dict, hash=False)
    axes: Mapping[str, int] = field(default_factory=dict, hash=False)
    stack: str = ""
    layer: int = -1

    @property
    def reads(self) -> str:
        """Path of the module whose first input is the site's input."""
        for name in ("gate", "gate_up", "up", "q", "qkv"):
            if name in self.parts:
                return self.parts[name]
        return self.path


def sites(
    model: nn.Module,
    kind: Kind,
    *,
    paths: Sequence[str] | None = None,
    probe: Mapping[str, Any] | None = None,
) -> tuple[Site, ...]:
    """All places of a kind in a model's layers, in order.

    Feed-forward layers are found by the names that families of transformers give them, and run
    once: what their matrices and activation compute must be what the model computes.

    Args:
        model: A model of transformers in eval mode; with ``paths``, any module.
        kind: Which places.
        paths: Modules to take instead of searching.
        probe: Arguments of one small forward for models that do not read tokens.

    Raises:
        UnknownNameError: A path of ``paths`` leads nowhere, or there is no such kind.
        UnsupportedModelError: There are none, or they do not compute what their names say.
    """
    if kind not in get_args(Kind):
        raise UnknownNameError("kind of site", kind, get_args(Kind))
    found: list[Site] = []
    for path, stack, layer in _candidates(model, kind, paths):
        site = _site(model, path, kind, stack, layer)
        if site is not None:
            found.append(site)
        elif paths is not None:
            raise UnsupportedModelError(f"{path} is no {kind} that isthmus knows: {_inside(model)}")
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no {kind} layer that isthmus knows; its layers hold "
            f"{_inside(model)}; give module paths (paths=...)"
        )
    if kind == "ffn":
        _verify(model, found, probe)
    return tuple(found)


def matrix(module: nn.Module) -> Tensor:
    """The weight of a linear layer or convolution as [out, in], a view of the module's own.

    Raises:
        UnsupportedModelError: It has no such weight.
    """
    if isinstance(module, nn.Linear):
        return module.weight
    if type(module).__name__ == "Conv1D":
        kept: Tensor = module.get_parameter("weight").t()  # GPT-2 keeps [in, out]
        return kept
    if isinstance(module, nn.Conv2d) and module.groups == 1:
        return module.weight.flatten(1)
    raise UnsupportedModelError(f"{type(module).__name__} is no linear layer of one matrix")


@torch.no_grad()
def write_matrix(module: nn.Module, value: Tensor) -> None:
    """Put new numbers [out, in] in the place of :func:`matrix`.

    Raises:
        InvalidInputError: Another shape.
    """
    own = matrix(module)
    if value.shape != own.shape:
        raise InvalidInputError(
            f"a matrix of {list(value.shape)} does not fit into {list(own.shape)}"
        )
    own.copy_(value.to(own))


def activation(model: nn.Module, site: Site) -> Callable[[Tensor], Tensor]:
    """The activation of a feed-forward layer.

    Raises:
        UnsupportedModelError: It is not found.
    """
    for name in _ACTIVATIONS:
        found: Any = model.get_submodule(site.path)
        for step in name.split("."):
            found = getattr(found, step, None)
        if callable(found):
            return found  # type: ignore[no-any-return]
    raise UnsupportedModelError(
        f"the activation of {site.path} is not found under {', '.join(_ACTIVATIONS)}"
    )


def hidden(model: nn.Module, site: Site, x: Tensor) -> Tensor:
    """Hidden units of a feed-forward layer: act(gate x) * up x, or act(up x), [..., F].

    Args:
        model: The model.
        site: A site of the kind ``ffn``.
        x: Inputs of the layer [..., D].
    """
    act = activation(model, site)
    part = {name: model.get_submodule(path) for name, path in site.parts.items()}
    if "gate_up" in part:
        gate, up = part["gate_up"](x).chunk(2, -1)
    else:
        up = part["up"](x)
        gate = part["gate"](x) if "gate" in part else None
    units: Tensor = act(up) if gate is None else act(gate) * up
    return units


def fingerprint(model: nn.Module) -> str:
    """Hash of a model's class and of all its weights and persistent buffers."""
    state = hashlib.sha256(type(model).__name__.encode())
    seen: set[int] = set()
    for name, value in model.state_dict().items():
        if value.data_ptr() in seen and value.numel():
            continue  # tied
        seen.add(value.data_ptr())
        state.update(f"{name}{list(value.shape)}{value.dtype}".encode())
        flat = value.detach().cpu().contiguous().flatten()
        state.update(memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else b"")
    return state.hexdigest()[:16]


def check_budget(budget: float, what: str) -> float:
    """A budget is the share of something that is kept.

    Raises:
        InvalidInputError: Not above 0 and at most 1.
    """
    if not (math.isfinite(budget) and 0 < budget <= 1):
        raise InvalidInputError(
            f"a budget of {budget:g} is impossible; give the share of {what} that is kept, above 0 "
            "and at most 1"
        )
    return float(budget)


@dataclass(frozen=True)
class Plan:
    """What is to be done to one model, before anything is done.

    Attributes:
        method: Slug of the system.
        budget: Share that is kept.
        model: Fingerprint of the model.
        calibration: Fingerprint of the data; empty where none was read.
        settings: The method's settings.
        seed: Of all draws.
        notes: What else there is to say, as JSON values: predicted errors, choices by layer.
        tensors: Indices, masks, scales, new weights: whatever ``apply`` needs.
    """

    method: str
    budget: float
    model: str
    calibration: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    notes: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Hash of all that a plan depends on: equal keys, equal plans."""
        return plan_key(
            self.method, self.budget, self.model, self.calibration, self.settings, self.seed
        )

    def check(self, model: nn.Module, method: str) -> None:
        """Refuse what the plan was not made for.

        Raises:
            MismatchError: Another method or another model.
        """
        if self.method != method:
            raise MismatchError(f"the plan is one of {self.method}, not of {method}")
        found = fingerprint(model)
        if found != self.model:
            raise MismatchError(
                f"the plan was made for the model {self.model}, and this is {found}; plan again"
            )

    def save(self, folder: str | Path) -> None:
        """Write ``plan.safetensors`` and then ``plan.json``, each as a whole.

        Raises:
            BrokenFileError: The folder cannot be written.
        """
        folder = Path(folder)
        with folders.writable(folder):
            write_tensors(folder / TENSORS, self.tensors)
        values = {k: v for k, v in asdict_plain(self).items() if k != "tensors"}
        values["sha256"] = folders.digest(folder / TENSORS)
        folders.replace_text(folder / PLAN, json.dumps(values, indent=1, sort_keys=True) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read a plan.

        Raises:
            BrokenFileError: A file is missing, damaged, or belongs to another plan.
        """
        folder = Path(folder)
        try:
            values = json.loads((folder / PLAN).read_text(encoding="utf-8"))
            right = values.pop("sha256") == folders.digest(folder / TENSORS)
            tensors = load_file(folder / TENSORS) if right else {}
            plan = cls(**values, tensors=tensors)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise BrokenFileError(f"{folder} holds no whole plan ({error}); plan again") from error
        if not right:
            raise BrokenFileError(f"{folder / TENSORS} was altered or cut short; plan again")
        return plan


def plan_key(
    method: str,
    budget: float,
    model: str,
    calibration: str,
    settings: Mapping[str, Any],
    seed: int,
) -> str:
    """See :attr:`Plan.key`."""
    words = [method, budget, model, calibration, _plain(settings), seed]
    return hashlib.sha256(json.dumps(words, sort_keys=True).encode()).hexdigest()[:16]


class Steps:
    """Work in pieces, each kept on disk as soon as it is done, so that it can be taken up again.

    Args:
        folder: Where; None keeps nothing.
        key: All that the work depends on (:func:`plan_key`); pieces of another key are not used.
        report: Called with the name of each piece before it is done or taken up.

    Example:
        >>> steps = Steps()
        >>> steps.do("layer 0", lambda: {"mask": torch.ones(2)})["mask"]
        tensor([1., 1.])
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        key: str = "",
        report: Callable[[str], None] | None = None,
    ) -> None:
        self.folder = None if folder is None else Path(folder)
        self.key, self.report = key, report

    def do(self, name: str, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors of a piece: those kept, or those that ``make`` gives, which are kept then.

        Raises:
            BrokenFileError: The folder cannot be written.
        """
        if self.report is not None:
            self.report(name)
        if self.folder is None:
            return dict(make())
        digest = hashlib.sha256(f"{self.key}/{name}".encode()).hexdigest()[:16]
        path = self.folder / f"{digest}.safetensors"
        if path.exists():
            try:
                return load_file(path)
            except (OSError, SafetensorError):
                path.unlink(missing_ok=True)  # cut short: done again
        made = dict(make())
        with folders.writable(self.folder):
            write_tensors(path, made)
        return made


@dataclass(frozen=True)
class Cost:
    """What a place costs.

    Attributes:
        parameters: Numbers that are stored; a removed weight is none.
        active: Of these, used for one token.
        multiply_adds: Products for one token.
        bits: Bits a stored parameter, scales and the like shared out over all.
    """

    parameters: int
    active: int
    multiply_adds: int
    bits: float

    @classmethod
    def of(cls, module: nn.Module) -> Cost:
        """Of a module as it stands; vectors (norms, biases) are added and not multiplied."""
        own = list(module.parameters())
        count = sum(p.numel() for p in own)
        products = sum(p.numel() for p in own if p.ndim > 1)
        bits = sum(p.numel() * p.element_size() * 8 for p in own) / max(count, 1)
        return cls(count, count, products, bits)

    def __add__(self, other: Cost) -> Cost:
        stored = self.parameters + other.parameters
        bits = self.parameters * self.bits + other.parameters * other.bits
        return Cost(
            stored,
            self.active + other.active,
            self.multiply_adds + other.multiply_adds,
            bits / max(stored, 1),
        )


@dataclass(frozen=True)
class Change:
    """What became of one place.

    Attributes:
        path: Module path in the original.
        before: Its cost before.
        after: Its cost afterwards.
        error: Squared error of its output as a share of the output, where it was measured.
    """

    path: str
    before: Cost
    after: Cost
    error: float | None = None


@dataclass(frozen=True)
class Report:
    """What an operation did.

    Attributes:
        method: Slug of the system.
        changes: By place.
        native: Whether the changed model saves and loads as a model of transformers; otherwise
            only isthmus loads it (:mod:`isthmus.surgery.export`).
        notes: One sentence each.
    """

    method: str
    changes: tuple[Change, ...]
    native: bool = True
    notes: tuple[str, ...] = ()

    @property
    def before(self) -> Cost:
        """All places before."""
        return _total(c.before for c in self.changes)

    @property
    def after(self) -> Cost:
        """All places afterwards."""
        return _total(c.after for c in self.changes)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, with totals."""
        return asdict(self) | {"before": asdict(self.before), "after": asdict(self.after)}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file as a whole.

    Raises:
        OSError: It cannot be written.
    """
    part = folders.temporary(path)
    try:
        save_file({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, part)
        part.chmod(0o644)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def asdict_plain(value: Any) -> dict[str, Any]:
    """Fields of a dataclass; mappings as dicts, tuples as lists, tensors as they are."""
    return {name: _plain(getattr(value, name)) for name in value.__dataclass_fields__}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


def _total(costs: Iterator[Cost]) -> Cost:
    total = Cost(0, 0, 0, 0.0)
    for cost in costs:
        total = total + cost
    return total


# finding ----------------------------------------------------------------------------------------


def _candidates(
    model: nn.Module, kind: Kind, paths: Sequence[str] | None
) -> Iterator[tuple[str, str, int]]:
    """Module paths that may be of a kind, with their stack and layer."""
    modules = dict(model.named_modules())
    try:
        stacks = site_maps.stacks(model)
    except UnsupportedModelError:
        if paths is None:
            raise
        stacks = {}
    layers = {path: (s, i) for s, stack in stacks.items() for i, path in enumerate(stack)}
    if paths is not None:
        for path in paths:
            if path not in modules:
                raise UnknownNameError("module", path, modules)
            above = next((k for k in layers if path == k or path.startswith(k + ".")), None)
            stack, layer = layers[above] if above else ("", -1)
            yield path, stack, layer
        return
    for above, (stack, layer) in layers.items():
        if kind == "block":
            yield above, stack, layer
            continue
        for path in modules:
            if path == above or path.startswith(above + "."):
                yield path, stack, layer


def _site(model: nn.Module, path: str, kind: Kind, stack: str, layer: int) -> Site | None:
    module = model.get_submodule(path)
    parts: dict[str, str] = {}
    axes: dict[str, int] = {}
    if kind == "linear":
        try:
            rows, columns = matrix(module).shape
        except UnsupportedModelError:
            return None
        axes = {"in": columns, "out": rows}
    elif kind == "ffn":
        parts = _parts(model, path, _FFN)
        shapes = {name: matrix(model.get_submodule(p)).shape for name, p in parts.items()}
        if not parts or hasattr(module, "A_log"):
            return None
        width = shapes["gate_up"][0] // 2 if "gate_up" in shapes else shapes["up"][0]
        if shapes["down"][1] != width or shapes.get("gate", (width,))[0] != width:
            return None
        axes = {"model": shapes["down"][0], "hidden": width}
    elif kind == "attention":
        parts = _parts(model, path, _ATTENTION)
        if not parts:
            return None
        rows, columns = matrix(model.get_submodule(parts["o"])).shape
        axes = {"model": rows, "inner": columns}
    elif kind == "ssm":
        if not (hasattr(module, "A_log") and hasattr(module, "in_proj")):
            return None
    elif kind == "moe":
        down: Any = getattr(getattr(module, "experts", None), "down_proj", None)
        if not isinstance(down, nn.Parameter) or down.ndim != 3:
            return None
        axes = dict(zip(("experts", "model", "hidden"), down.shape, strict=True))
    elif kind == "norm":
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter) or weight.ndim != 1:
            return None
        axes = {"model": len(weight)}
    return Site(path, kind, parts, axes, stack, layer)


def _parts(model: nn.Module, path: str, table: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Full paths of the first row of a table whose modules are all there, and are matrices."""
    module = model.get_submodule(path)
    inside = dict(module.named_modules())
    for row in table:
        if not all(name in inside for name in row.values()):
            continue
        try:
            for name in row.values():
                matrix(inside[name])
        except UnsupportedModelError:
            continue
        return {part: f"{path}.{name}" if path else name for part, name in row.items()}
    return {}


def _verify(model: nn.Module, found: Sequence[Site], probe: Mapping[str, Any] | None) -> None:
    """Run the model once and compare hidden units, layer by layer.

    Raises:
        UnsupportedModelError: They are not what parts and activation give.
    """
    given = {f"in {s.path}": Place(s.reads, "in") for s in found}
    wanted = {f"hidden {s.path}": Place(s.parts["down"], "in") for s in found}
    with torch.no_grad():
        with Trace(model, given | wanted) as seen:
            model(**(site_maps.probe_of(model) if probe is None else probe))
        for site in found:
            x, h = seen[f"in {site.path}"], seen[f"hidden {site.path}"]
            error = float((hidden(model, site, x) - h).abs().max() / h.abs().max().clamp_min(1e-30))
            if error > site_maps.TOLERANCE[h.dtype]:
                raise UnsupportedModelError(
                    f"{site.path} computes something else than its parts say (off by {error:.1e})"
                )


def _inside(model: nn.Module) -> str:
    """What the layers hold, for messages."""
    try:
        first = next(iter(site_maps.stacks(model).values()))[0]
    except UnsupportedModelError:
        first = ""
    module = model.get_submodule(first)
    rows = [f"{n} ({type(m).__name__})" for n, m in module.named_modules() if n]
    return ", ".join(rows[:24]) + (" ..." if len(rows) > 24 else "")
