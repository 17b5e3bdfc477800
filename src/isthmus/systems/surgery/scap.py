"""SCAP: skip the inputs of a layer that lie near their mode, and fold the mode into the bias.

Paper: V. S. Chua, Y. Pan, N. Jain, "Post-Training Statistical Calibration for Higher Activation
    Sparsity", 2024, arXiv:2412.07174
Idea: Inputs of a linear layer pile up around a mode. Those within a calibrated distance of it are
    taken for the mode itself: what they multiply is not read, and the mode's own share is a bias.
Differs: Thresholds are found again once the layers before are pruned, so that sparsity comes out as
    asked. How a budget is split between the first matrices and the last is chosen by the
    calibration loss where no split is given; the paper gives one for each model. The mode of
    shared inputs is chosen for both matrices together. No GPU kernel.

::

    x - mu, within tau of 0? ──yes──> skipped
                             └─no───> W (x - mu) ──> + (b + mu W 1) ──> y         eq. 2 and 3
    tau = quantile_s of the distances to mu; mu = 0, the median or the densest place  (section 3)
"""

from __future__ import annotations

import copy
import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from isthmus.claims import Claim, Gate, Row, Ruler, Scale, judge
from isthmus.errors import InvalidInputError
from isthmus.models.hub import load_checkpoint
from isthmus.surgery.base import (
    Change,
    Cost,
    Plan,
    Report,
    Steps,
    check_budget,
    fingerprint,
)
from isthmus.surgery.calibration import Calibration
from isthmus.surgery.inputs import (
    Group,
    Trial,
    density_mode,
    feed_forward_groups,
    skipped_units,
    thresholded,
)
from isthmus.workbench import pycode, reference
from isthmus.workbench.gelu_lm import gelu_lm
from isthmus.workbench.layer_bench import decode_speeds, thresholded_speed

SLUG = "scap"
MOST = 0.99
"""Sparsity of one matrix at most."""

SPLITS, HIGHEST = 5, 0.95
"""Splits that are tried: from equal sparsities to all in the last matrix, or 95 % there."""

NOTES = ("mode", "threshold", "error", "sparsity", "wanted")
DEVIATION = 0.1
"""How far the measured sparsity may be off before the report says so."""


@dataclass(frozen=True)
class Settings:
    """Settings.

    Attributes:
        centre: Shift inputs by their mode. Off, the mode is 0 and small inputs are skipped.
        ratio: Sparsity of the last matrix of a feed-forward as a share of that of the whole layer;
            0 tries :data:`SPLITS` of them.
        inputs: Prune the inputs of the first matrices, too; the paper does not after a GELU.
        rounds: How often thresholds are calibrated.
        bandwidth: Of the density, in standard deviations.
        tokens: Calibration tokens that are looked at.
        seed: Of their draw.
    """

    centre: bool = True
    ratio: float = 0.0
    inputs: bool = True
    rounds: int = 2
    bandwidth: float = 0.5
    tokens: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.tokens < 1 or self.ratio < 0 or self.bandwidth <= 0:
            raise InvalidInputError(
                "scap needs 1 round and 1 token or more, a ratio of 0 or more and a positive "
                f"bandwidth, got {self}"
            )


class Scap:
    """Prunes the inputs of feed-forward layers.

    The budget is the share of feed-forward weights that are read for one token. They all stay in
    memory: it is a model that decodes one text at a time that becomes faster.

    Args:
        settings: See :class:`Settings`.

    Example:
        Half of these inputs lie within 0.1 of their median 2, and none of them near 0.

        >>> x = torch.tensor([[2.0, 2.1, 1.9, 5.0, -4.0, 2.0, 7.0, -3.0]])
        >>> mode, threshold, _ = Scap().threshold(x, torch.ones(1, 8), 0.5)
        >>> mode, round(threshold, 4), int(((x - mode).abs() <= threshold).sum())
        (2.0, 0.1, 4)
    """

    role: ClassVar[str] = "surgery"
    keeps: ClassVar[str] = "feed-forward weights that are read for a token"

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()

    def threshold(self, x: Tensor, weight: Tensor, sparsity: float) -> tuple[float, float, float]:
        """Mode and threshold of some inputs, those with the smallest error of the output.

        Args:
            x: Inputs [n, C].
            weight: W [R, C].
            sparsity: s, the share of inputs that is skipped.

        Returns:
            mu, tau, and the squared error as a share of the output.
        """
        x = x.float()
        modes = [0.0]
        if self.settings.centre:
            modes += [float(x.median()), density_mode(x, self.settings.bandwidth)]
        found = []
        few = x[: max(1, len(x) // 2)]
        whole = float((few @ weight.float().T).square().sum())
        for mode in dict.fromkeys(modes):
            away = (x - mode).abs().flatten()
            # the last of those that are skipped, so that ties on it are skipped as well
            tau = float(away.kthvalue(max(1, round(sparsity * len(away)))).values)
            lost = torch.where((few - mode).abs() <= tau, few - mode, 0.0) @ weight.float().T
            found.append((mode, tau, float(lost.square().sum()) / max(whole, 1e-30)))
        return min(found, key=lambda each: each[2])

    def plan(
        self, model: Any, data: Calibration, budget: float, steps: Steps | None = None
    ) -> Plan:
        """Modes and thresholds; calibrated on a copy whose layers are pruned already."""
        check_budget(budget, self.keeps)
        s, steps = self.settings, steps or Steps()
        groups = feed_forward_groups(model, inputs=s.inputs)
        notes: dict[str, Any] = {}
        if budget < 1:
            weights = sum(g.weights for g in feed_forward_groups(model))
            shares = self._shares(groups, weights, budget)
            trial = Trial(model, groups)
            rows = trial.rows(data, s.tokens, s.seed)

            def choose() -> dict[str, Tensor]:
                few = replace(data, batches=data.batches[: max(1, len(data.batches) // 4)])
                losses = []
                for share in shares:
                    trial.set(self._thresholds(trial, rows, share))
                    losses.append(few.loss(trial.model) if len(shares) > 1 else 0.0)
                return {"split": torch.tensor(losses).argmin()[None]}

            share = shares[int(steps.do("split", choose)["split"])]

            def calibrate() -> dict[str, Tensor]:
                found = self._thresholds(trial, rows, share)
                for _ in range(s.rounds - 1):
                    trial.set(found)
                    found = self._thresholds(trial, trial.rows(data, s.tokens, s.seed), share)
                return {"thresholds": torch.tensor(found, dtype=torch.float64)}

            found = steps.do("thresholds", calibrate)["thresholds"].tolist()
            trial.set(found)
            measured = trial.sparsity(data)
            for group, (mode, tau, error) in zip(groups, found, strict=True):
                for path in group.paths if share[group.last] else ():
                    numbers = (mode, tau, error, measured[path], share[group.last])
                    notes[path] = dict(zip(NOTES, numbers, strict=True))
        who = (SLUG, budget, fingerprint(model), data.fingerprint, asdict(s), s.seed)
        return Plan(*who, notes={"sites": notes})

    def apply(self, model: Any, plan: Plan) -> Report:
        """Put layers with thresholds in the place of the linear ones."""
        plan.check(model, SLUG)
        changes, notes = [], []
        for path, note in plan.notes["sites"].items():
            before = Cost.of(model.get_submodule(path))
            layer = thresholded(model.get_submodule(path))
            layer.set(note["mode"], note["threshold"])
            model.set_submodule(path, layer)
            read = round(before.multiply_adds * (1 - note["sparsity"]))
            after = Cost(before.parameters, read, read, before.bits)
            changes.append(Change(path, before, after, note["error"]))
            got, wanted = note["sparsity"], note["wanted"]
            if abs(got - wanted) > DEVIATION:
                notes.append(f"{path} skips {got:.0%} and not {wanted:.0%}; calibrate on more data")
        if changes:
            notes.append("several texts at once share few zeros and are as fast as before")
        return Report(SLUG, tuple(changes), native=not changes, notes=tuple(notes))

    def _shares(
        self, groups: Sequence[Group], weights: int, budget: float
    ) -> list[tuple[float, float]]:
        """Sparsities of first and last matrices that keep the budget."""
        last = sum(g.weights for g in groups if g.last)
        first, skipped = weights - last, (1 - budget) * weights
        if not self.settings.inputs:
            shares = [(0.0, skipped / last)]
        else:
            even = 1 - budget
            lasts = [min(self.settings.ratio * even, MOST)]
            if not self.settings.ratio:
                end = max(even, min(HIGHEST, skipped / last))
                lasts = [even + (end - even) * i / (SPLITS - 1) for i in range(SPLITS)]
            shares = [(round((skipped - x * last) / first, 9), x) for x in dict.fromkeys(lasts)]
        shares = [each for each in shares if 0 <= each[0] <= MOST and each[1] <= MOST]
        if not shares:
            raise InvalidInputError(
                f"a budget of {budget:g} cannot be met: it asks some matrices to skip more than "
                f"{MOST:.0%} of their inputs; give a larger one, or another ratio"
            )
        return shares

    def _thresholds(
        self, trial: Trial, rows: Mapping[str, Tensor], share: tuple[float, float]
    ) -> list[tuple[float, float, float]]:
        """Mode, threshold and error of each group."""
        return [
            self.threshold(rows[g.paths[0]], trial.weight(g), share[g.last])
            if share[g.last]
            else (0.0, 0.0, 0.0)
            for g in trial.groups
        ]


# the claim --------------------------------------------------------------------------------------

POINTS = (0.3, 0.4, 0.5, 0.6)
"""Sparsities of whole feed-forwards; CATS reads a third of the weights whole: 70 % is beyond it."""
GELU_POINTS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Sparsities of the matrix behind a GELU."""
SPEED_POINTS = (0.3, 0.5, 0.7, 0.9)
SHAPES = {"small": ((4096, 11008), (11008, 4096)), "test": ((64, 96),)}
"""Inputs and outputs of the layers that are timed."""


def claim(ruler: Ruler, scale: Scale = "small") -> Claim:
    """Loss on small trained models, speed on layers of the paper's size."""
    size = "test" if scale == "test" else "small"
    gated = load_checkpoint(str(reference.reference("pycode-t")), dtype="float32")
    data, held_out = (_texts(split, gated.tokenizer, size) for split in ("train", "held-out"))
    data.check_apart(held_out)
    dense = held_out.loss(gated.model)
    ours, cats, taken = {}, {}, {}
    for point in POINTS if size == "small" else (0.5,):
        plan = Scap().plan(gated.model, data, 1 - point)
        ours[point] = _loss(gated.model, plan, held_out)
        taken[point] = statistics.fmean(n["sparsity"] for n in plan.notes["sites"].values())
        with skipped_units(gated.model, data, 1.5 * point):
            cats[point] = held_out.loss(gated.model)
    plain = Scap(Settings(centre=False)).plan(gated.model, data, 0.5)
    uncentred = _loss(gated.model, plain, held_out)

    other = load_checkpoint(str(gelu_lm(size)), dtype="float32")
    data, held_out = (_texts(split, other.tokenizer, size) for split in ("train", "held-out"))
    whole = held_out.loss(other.model)
    groups = feed_forward_groups(other.model)
    last = sum(g.weights for g in groups if g.last) / sum(g.weights for g in groups)
    curves: dict[bool, list[float]] = {True: [], False: []}
    errors: dict[bool, list[float]] = {True: [], False: []}
    for centre, s in itertools.product(curves, GELU_POINTS):
        surgeon = Scap(Settings(centre=centre, inputs=False))
        plan = surgeon.plan(other.model, data, 1 - s * last)
        curves[centre].append(_loss(other.model, plan, held_out))
        notes = plan.notes["sites"].values()
        errors[centre].append(statistics.fmean(n["error"] for n in notes))
    half = GELU_POINTS.index(0.5)
    gain = 100 * (_reach(curves[True], curves[False][half]) - 0.5)
    alike = 100 * (_reach(errors[True], errors[False][half]) - 0.5)

    found = [
        thresholded_speed(ruler, shape, SPEED_POINTS, repeats=20 if size == "small" else 1)
        for shape in SHAPES[size]
    ]
    speed = min(each.ours[0.5].median for each in found)
    gates = (
        *(
            Gate(
                f"loss at {point:.0%} sparsity less that of CATS, nats", o - cats[point], "<=", 0.0
            )
            for point, o in ours.items()
        ),
        Gate("sparsity behind a GELU that centring adds at equal loss, points", gain, ">=", 10.0),
        Gate("dense product over ours at 50 %, slower of both shapes", speed, ">=", 1.3),
    )
    direction = (
        *gates[: len(ours)],
        *(replace(g, bound=b) for g, b in zip(gates[-2:], (0, 1), strict=True)),
    )
    return Claim(
        slug=SLUG,
        statement="Skipping calibrated inputs of all feed-forward matrices costs less loss than "
        "skipping units by their gate at every sparsity, centring lets more be skipped behind a "
        "GELU, and what is skipped is not read.",
        paper_figure="1.5x extra decoding speed over CATS at equal quality (abstract)",
        rows=(
            *(
                Row(
                    f"held-out loss at {point:.0%} feed-forward sparsity",
                    "nats/token",
                    cats[point],
                    o,
                    uncentred if point == 0.5 else None,
                    ceiling=dense,
                    note=f"baseline: CATS; off: mode 0; measured sparsity {taken[point]:.1%}",
                )
                for point, o in ours.items()
            ),
            *(
                Row(f"loss behind a GELU, {s:.0%} of inputs skipped", "nats/token", b, a, b, whole)
                for s, a, b in zip(GELU_POINTS, curves[True], curves[False], strict=True)
            ),
            Row(
                "output error behind a GELU, half of the inputs skipped",
                "share",
                errors[False][half],
                errors[True][half],
                errors[False][half],
                note=f"at the error of mode 0, centring skips {alike:.0f} points more",
            ),
            *(each.row(0.5) for each in found),
            _decoding(ruler, size),
        ),
        scale=scale,
        device="cpu",
        status=judge(gates, direction),
        reason=""
        if gates[-2].passed
        else "half of the units behind the GELU of so small a model can go at no loss, centred or "
        "not; only the error of the layer's output tells them apart",
        gates=gates,
        seeds=(0,),
        notes=(
            "Loss: the embedded model of Python code (gated SiLU), and an OPT with a GELU trained "
            "for a minute; its rows have mode 0 as baseline, which is also the idea off.",
            "CATS skips 1.5 times as much of the two matrices that it does not read whole.",
            "Layers are timed on random weights and inputs, apart from quality, on "
            f"{torch.get_num_threads()} thread(s); the decoding of a whole model has no gate.",
        ),
    )


def _decoding(ruler: Ruler, size: str) -> Row:
    """A model of 100 million weights, as it is and with half of its feed-forwards skipped."""
    small = size == "small"
    place = reference.reference("pycode-100m" if small else "pycode-t")
    model = load_checkpoint(str(place), dtype="float32")
    texts = pycode.texts("train")[::50]
    data = Calibration.of_texts(texts, model.tokenizer, samples=4, length=64, batch=4)
    plan = Scap(Settings(ratio=1.0, rounds=1, tokens=256)).plan(model.model, data, 0.5)
    changed = copy.deepcopy(model.model)
    Scap().apply(changed, plan)
    arms = {"dense": model.model, "scap": changed}
    prompt, tokens, repeats = data.batches[0]["input_ids"][0, :2], *((16, 7) if small else (2, 1))
    found = decode_speeds(ruler, arms, prompt, tokens=tokens, repeats=repeats)
    return Row(
        "decoding at 50 % feed-forward sparsity" + (", pycode-100m" if small else ""),
        "ms/token",
        found["dense"][0],
        found["scap"][0],
        None,
        note=f"{found['scap'][1]}; width {model.model.config.hidden_size}",
    )


def _texts(split: pycode.Split, tokenizer: Any, size: str) -> Calibration:
    samples = {("small", "train"): 16, ("small", "held-out"): 24}.get((size, split), 2)
    length = 256 if size == "small" else 32
    texts = pycode.texts(split)[:: 1 if size == "small" else 50]
    return Calibration.of_texts(texts, tokenizer, samples=samples, length=length, source=split)


def _loss(model: Any, plan: Plan, held_out: Calibration) -> float:
    changed = copy.deepcopy(model)
    Scap().apply(changed, plan)
    return held_out.loss(changed)


def _reach(losses: Sequence[float], bar: float) -> float:
    """The sparsity at which a rising curve of losses reaches a bar, linear between points."""
    return float(np.interp(bar, np.maximum.accumulate(losses), GELU_POINTS))
