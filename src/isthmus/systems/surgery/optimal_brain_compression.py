r"""Optimal Brain Compression: the second-order surgeon, exactly, for pruning and rounding.

Paper: E. Frantar, S. P. Singh, D. Alistarh, "Optimal Brain Compression: A Framework for Accurate
    Post-Training Quantization and Pruning", 2022, arXiv:2208.11580
Idea: Layer by layer, take out (or round) the weight that costs least, let all others of its row
    make up for it exactly, and go on; one formula serves both, so both mix.
Differs: Where each layer may keep another share, layers weigh by relative errors; the paper
    searches their weights on the loss. Batch-norm statistics are not reset: the language models
    here have none. Final weights are one least-squares solve on the mask instead of stored traces;
    they are equal. Non-uniform bits are left out, non-uniform sparsity is in.

::

    calibration ──▶ H = 2 X X^T / N of each layer ──▶ order and cost of every weight ──┐
    W' = least squares on the mask  ◀──  mask: the cheapest weights of all rows  ◀─────┘
    rounded: the cheapest weight to its grid, the others make up for it, until all are
"""

from __future__ import annotations

import copy
import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from isthmus.claims import Claim, Gate, Row, Ruler, Scale, judge
from isthmus.errors import InvalidInputError
from isthmus.folders import EMBEDDED
from isthmus.models.hub import load_checkpoint
from isthmus.surgery import obs
from isthmus.surgery.base import (
    Change,
    Cost,
    Plan,
    Report,
    Site,
    Steps,
    check_budget,
    fingerprint,
    matrix,
    sites,
    write_matrix,
)
from isthmus.surgery.calibration import Calibration
from isthmus.surgery.levels import choose_levels
from isthmus.workbench import pycode, reference
from isthmus.workbench._training import build
from isthmus.workbench.tokenizer import load_tokenizer

SLUG = "optimal-brain-compression"
_LEVELS = torch.linspace(0.1, 1.0, 19, dtype=torch.float64)


@dataclass(frozen=True)
class Settings:
    """Settings.

    Attributes:
        second_order: Off, the smallest weights go, weights are rounded to the nearest value, and no
            other weight makes up for it.
        kind: ``prune``: the budget is the share of weights that stay. ``quantize``: it is the share
            of 16 bits that a weight keeps (0.25: 4 bits).
        pattern: ``any`` weight may go, or ``2:4`` (half of every four neighbours, which some
            hardware skips), or ``4`` neighbours at once.
        bits: Bits of the weights that pruning leaves; 0 does not round them.
        symmetric: Whether 0 lies in the middle of each grid.
        shares: ``even``: every layer keeps the same share; ``own``: layers that lose less keep
            less, the whole keeps the budget.
        fast: In the order of columns (SparseGPT, GPTQ): for layers of many inputs.
        damping: Share of the mean that is added to H; None is 0.01 and wants enough data.
    """

    second_order: bool = True
    kind: str = "prune"
    pattern: str = "any"
    bits: int = 0
    symmetric: bool = False
    shares: str = "even"
    fast: bool = False
    damping: float | None = None

    def __post_init__(self) -> None:
        choices = {
            "kind": ("prune", "quantize"),
            "pattern": ("any", "2:4", "4"),
            "shares": ("even", "own"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise InvalidInputError(
                    f"{name} is one of {', '.join(allowed)}, not {getattr(self, name)!r}"
                )
        plain = self.kind == "prune" and self.pattern == "any" and self.second_order
        if self.shares == "own" and (not plain or self.fast):
            raise InvalidInputError("shares=own goes with exact pruning of any weights only")


class OptimalBrainCompression:
    """Prunes or rounds the linear layers of a trained model, without training.

    Args:
        settings: See :class:`Settings`.

    Example:
        Two inputs that always come together: what one weight did, the other takes over.

        >>> x = torch.tensor([[1.0, 1.0], [2.0, 2.0]])
        >>> curvature = obs.Curvature.of(x.T @ x, 2, damping=1e-9)
        >>> one = torch.tensor([[1.0, 3.0]])
        >>> weight, kept = OptimalBrainCompression().shrink(one, curvature, 0.5)
        >>> weight.round(decimals=4).tolist(), kept.tolist()
        ([[0.0, 4.0]], [[False, True]])
    """

    role: ClassVar[str] = "surgery"
    keeps: ClassVar[str] = "weights of the linear layers (of their 16 bits, with kind=quantize)"

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()

    def shrink(
        self, weight: Tensor, curvature: obs.Curvature, budget: float
    ) -> tuple[Tensor, Tensor]:
        """New weights of one layer, float64 [R, C], and which are kept, bool [R, C].

        Args:
            weight: W [R, C].
            curvature: Of its inputs.
            budget: Share of its weights, or of their bits.

        Raises:
            InvalidInputError: A budget that the settings cannot meet.
        """
        s = self.settings
        w = weight.detach().double()
        mask = torch.ones_like(w, dtype=torch.bool)
        bits = s.bits
        if s.kind == "quantize":
            bits = self._bits(budget)
        elif s.pattern == "2:4":
            if budget != 0.5:
                raise InvalidInputError(f"2:4 keeps 0.5 of the weights, not {budget:g}")
            w, mask = self._pruned(w, curvature, 0.5, (2, 4))
        else:
            w, mask = self._pruned(w, curvature, budget, None)
        if bits:
            # the grid is fitted to the weights that are rounded, not to those before
            grid = obs.Grid.search(w, bits, symmetric=s.symmetric)
            pruned = None if bool(mask.all()) else mask
            if not s.second_order:
                w = grid.round(w) * mask
            elif s.fast:
                w = obs.gptq(w, curvature, grid, pruned)
            else:
                w = obs.quantize(w, curvature, grid, pruned)
        return w, mask

    def plan(
        self, model: Any, data: Calibration, budget: float, steps: Steps | None = None
    ) -> Plan:
        """The new matrices; statistics come from the model as it is, before any layer changes."""
        check_budget(budget, self.keeps)
        steps = steps or Steps()
        found = sites(model, "linear")
        if budget < 1 and self.settings.kind == "quantize":
            self._bits(budget)
        if not self.settings.fast:
            for site in found:
                obs.check_inputs(site.axes["in"], site.path)
        curvature = obs.curvatures(model, found, data, self.settings.damping)
        budgets = dict.fromkeys([s.path for s in found], budget)
        orders: dict[str, obs.Removal] = {}
        if self.settings.shares == "own" and budget < 1:
            budgets, orders = self._shares(model, found, curvature, budget, steps)
        tensors, notes = {}, {}
        for site in found if budget < 1 else ():
            weight = matrix(model.get_submodule(site.path)).detach()

            def make(site: Site = site, weight: Tensor = weight) -> dict[str, Tensor]:
                h = curvature(site)
                if site.path in orders:
                    new, mask = obs.prune(weight, h, budgets[site.path], order=orders[site.path])
                else:
                    new, mask = self.shrink(weight, h, budgets[site.path])
                error = _share(weight, new.to(weight), h)
                numbers = torch.tensor([error, h.damping, float(mask.sum())], dtype=torch.float64)
                return {"weight": new.to(weight), "numbers": numbers}

            made = steps.do(site.path, make)
            tensors[site.path] = made["weight"]
            error, damping, kept = made["numbers"].tolist()
            notes[site.path] = {"error": error, "damping": damping, "kept": int(kept)}
        who = (SLUG, budget, fingerprint(model), data.fingerprint, asdict(self.settings))
        return Plan(*who, notes=notes, tensors=tensors)

    def apply(self, model: Any, plan: Plan) -> Report:
        """Write the new matrices."""
        plan.check(model, SLUG)
        changes = []
        for path, weight in plan.tensors.items():
            module = model.get_submodule(path)
            before = Cost.of(module)
            write_matrix(module, weight)
            note = plan.notes[path]
            kind, width = plan.settings["kind"], before.bits
            bits = round(16 * plan.budget) if kind == "quantize" else plan.settings["bits"]
            if bits:  # a scale and a zero for each row, of 16 bits each
                width = bits + 32 * len(weight) / max(note["kept"], 1)
            kept = note["kept"] + before.parameters - weight.numel()
            after = Cost(kept, kept, note["kept"], width)
            changes.append(Change(path, before, after, note["error"]))
        note = "zeros and rounded values lie in dense matrices, which are as fast as before"
        return Report(SLUG, tuple(changes), notes=(note,) if changes else ())

    def _bits(self, budget: float) -> int:
        bits = round(budget * 16)
        if not math.isclose(bits, budget * 16) or not 1 <= bits < 16:
            raise InvalidInputError(
                f"a budget of {budget:g} is no whole number of 16 bits; give 0.1875 for 3 bits, "
                "0.25 for 4, 0.5 for 8"
            )
        return bits

    def _pruned(
        self, w: Tensor, curvature: obs.Curvature, keep: float, pattern: tuple[int, int] | None
    ) -> tuple[Tensor, Tensor]:
        block = 4 if self.settings.pattern == "4" else 1
        if self.settings.second_order and not self.settings.fast:
            return obs.prune(w, curvature, keep, block=block, pattern=pattern)
        if block != 1:
            raise InvalidInputError("pattern=4 goes with exact pruning only")
        if self.settings.second_order:
            return obs.sparsegpt(w, curvature, keep, pattern=pattern)
        mask = obs.smallest(w, keep, pattern)
        return w * mask, mask

    def _shares(
        self,
        model: Any,
        found: Sequence[Site],
        curvature: Callable[[Site], obs.Curvature],
        budget: float,
        steps: Steps,
    ) -> tuple[dict[str, float], dict[str, obs.Removal]]:
        """Section 6: what each layer keeps, from its error at every share."""
        orders, losses, costs = {}, [], []
        for site in found:
            weight = matrix(model.get_submodule(site.path)).detach()

            def make(site: Site = site, weight: Tensor = weight) -> dict[str, Tensor]:
                h = curvature(site)
                order = obs.removal(weight, h)
                whole = obs.increase(weight, torch.zeros_like(weight), h.hessian)
                kept = {"order": order.order.int(), "costs": order.costs}
                return kept | {"whole": torch.tensor([whole], dtype=torch.float64)}

            made = steps.do(f"order of {site.path}", make)
            order = obs.Removal(made["order"].long(), made["costs"])
            orders[site.path] = order
            gone = weight.numel() - (_LEVELS * weight.numel()).round().long()
            losses.append(order.curve()[gone] / made["whole"].clamp_min(1e-30))
            costs.append(_LEVELS * weight.numel())
        whole = sum(float(cost[-1]) for cost in costs)
        chosen = choose_levels(torch.stack(losses), torch.stack(costs), budget * whole)
        return {s.path: float(_LEVELS[i]) for s, i in zip(found, chosen, strict=True)}, orders


# the claim --------------------------------------------------------------------------------------

_MODEL = "pycode-s"
_SMALLER: dict[str, Any] = {
    "hidden_size": 16,
    "num_attention_heads": 1,
    "head_dim": 16,
    "intermediate_size": 24,
}
_TINY = replace(reference.RECIPES[_MODEL], **_SMALLER)
_WAYS = {
    "exact": Settings(),
    "columns": Settings(fast=True),  # SparseGPT, GPTQ
    "off": Settings(second_order=False),  # magnitude, nearest value
}
_JOBS: dict[str, tuple[float, dict[str, Any]]] = {
    "half": (0.5, {}),
    "2:4": (0.5, {"pattern": "2:4"}),
    "3 bits": (3 / 16, {"kind": "quantize"}),
    "4 bits": (4 / 16, {"kind": "quantize"}),
    "2 bits": (2 / 16, {"kind": "quantize"}),
}
_ONE_LAYER = ("4 bits", "2 bits")


def claim(ruler: Ruler, scale: Scale = "small") -> Claim:
    """Half of the weights, 2:4, and 4, 3 and 2 bits of a small model of Python code."""
    del ruler  # zeros and grids in dense files have no speed of their own to time
    small = scale != "test"
    if small:
        place = str(reference.reference(_MODEL))
        checkpoint = load_checkpoint(place, dtype="float32", device="cpu")
        model, tokenizer = checkpoint.model, checkpoint.tokenizer
    else:
        model = build(_TINY).eval()
        tokenizer = load_tokenizer(EMBEDDED / "pycode-t")

    def texts(split: pycode.Split, samples: int) -> Calibration:
        found, length = pycode.texts(split), 256 if small else 64
        return Calibration.of_texts(found, tokenizer, samples=samples, length=length, source=split)

    data, held_out = texts("train", 64 if small else 4), texts("held-out", 96 if small else 4)
    data.check_apart(held_out)
    dense = held_out.loss(model)
    found = sites(model, "linear")
    curvature = obs.curvatures(model, found, data)
    keys = [*itertools.product(_JOBS, _WAYS), ("half", "refitted")]
    changed = {key: copy.deepcopy(model) for key in keys}
    shares: dict[tuple[str, str], list[float]] = {key: [] for key in keys}
    for site in found:
        h, weight = curvature(site), matrix(model.get_submodule(site.path)).detach()
        for job, (budget, setting) in _JOBS.items():
            if job in _ONE_LAYER and site.layer != 1:
                continue
            for way, settings in _WAYS.items():
                surgeon = OptimalBrainCompression(replace(settings, **setting))
                new, mask = surgeon.shrink(weight, h, budget)
                made = {way: new}
                if (job, way) == ("half", "off"):
                    made["refitted"] = obs.refit(weight, mask, h)
                for name, each in made.items():
                    shares[job, name].append(_share(weight, each, h))
                    write_matrix(changed[job, name].get_submodule(site.path), each)
    errors = {key: statistics.fmean(values) for key, values in shares.items()}
    losses = {key: held_out.loss(each) - dense for key, each in changed.items()}
    return _judged(errors, losses, dense, scale)


def _judged(
    errors: dict[tuple[str, str], float],
    losses: dict[tuple[str, str], float],
    dense: float,
    scale: Scale,
) -> Claim:
    """Rows and gates."""
    names = {"half": ("exact", "SparseGPT", "magnitude"), "3 bits": ("exact", "GPTQ", "nearest")}
    gates = []
    for job, (exact, columns, off) in names.items():
        one = errors[job, "exact"]
        most = 0.7 if job == "half" else 0.6
        gates += [
            Gate(f"layer error, {job}, {exact} of {off}", one / errors[job, "off"], "<=", most),
            Gate(
                f"layer error, {job}, {exact} of {columns}", one / errors[job, "columns"], "<=", 1
            ),
        ]
        for a, b in itertools.pairwise(zip((exact, columns, off), _WAYS, strict=True)):
            more = losses[job, a[1]] - losses[job, b[1]]
            gates.append(Gate(f"nats lost, {job}, {a[0]} less {b[0]}", more, "<=", 0.0))
    rows = tuple(
        Row(
            f"{kind}, {job}",
            unit,
            numbers[job, "columns"],
            numbers[job, "exact"],
            numbers[job, "off"],
            control=numbers["half", "refitted"] if job == "half" else None,
            note="baseline: column order (SparseGPT, GPTQ); off: magnitude, nearest value"
            + ("; control: magnitude, refitted" if job == "half" else "")
            + ("; one layer" if job in _ONE_LAYER else ""),
        )
        for kind, unit, numbers in (("layer error", "share", errors), ("loss", "nats", losses))
        for job in _JOBS
        if kind != "loss" or job not in _ONE_LAYER
    )
    return Claim(
        slug=SLUG,
        statement="Removing or rounding weights one by one, exactly, loses less in every layer "
        "than the order of columns, and far less than magnitudes and nearest values.",
        paper_figure="ResNets and BERT stay within 1-2 % at 4 bits or 2:4 (tables 1 to 6, read)",
        rows=rows,
        scale=scale,
        device="cpu",
        status=judge(gates, (gates[0], gates[4])),
        gates=tuple(gates),
        seeds=(0,),
        notes=(
            f"the dense model's held-out loss is {dense:.3f} nats a token; rows of loss are added",
            "layer error: squared error of the outputs, as a share of them, mean over matrices",
        ),
    )


def _share(weight: Tensor, new: Tensor, h: obs.Curvature) -> float:
    """Error of a layer as a share of its output."""
    whole = obs.increase(weight, torch.zeros_like(weight), h.hessian)
    return obs.increase(weight, new, h.hessian) / max(whole, 1e-30)
