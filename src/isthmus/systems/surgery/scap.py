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

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from isthmus.errors import InvalidInputError
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
from isthmus.surgery.inputs import Group, Trial, density_mode, feed_forward_groups, thresholded

SLUG = "scap"
MOST = 0.99
"""Sparsity of one matrix at most."""

RATIOS = (0.75, 1.0, 1.25, 1.5)
"""Sparsities of the last matrix that are tried, as shares of that of the whole layer."""

DEVIATION = 0.1
"""How far the measured sparsity may be off before the report says so."""


@dataclass(frozen=True)
class Settings:
    """Settings.

    Attributes:
        centre: Shift inputs by their mode. Off, the mode is 0 and small inputs are skipped.
        ratio: Sparsity of the last matrix of a feed-forward as a share of that of the whole layer;
            0 tries :data:`RATIOS`.
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
            shares = self._shares(
                groups, sum(g.weights for g in feed_forward_groups(model)), budget
            )
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
                    notes[path] = {
                        "mode": mode,
                        "threshold": tau,
                        "error": error,
                        "sparsity": measured[path],
                        "wanted": share[group.last],
                    }
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
            if abs(note["sparsity"] - note["wanted"]) > DEVIATION:
                notes.append(
                    f"{path} skips {note['sparsity']:.0%} of its inputs and not "
                    f"{note['wanted']:.0%}; calibrate on more data"
                )
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
            ratios = (self.settings.ratio,) if self.settings.ratio else RATIOS
            lasts = [min(ratio * (1 - budget), MOST) for ratio in ratios]
            shares = [((skipped - each * last) / first, each) for each in dict.fromkeys(lasts)]
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
