"""The contract of a surgery: planning only reads, and keeping all is free."""

from __future__ import annotations

import copy
import math
import tempfile
from pathlib import Path
from typing import Any

import torch

from isthmus.errors import InvalidInputError, MismatchError
from isthmus.roles import Surgery
from isthmus.surgery.base import Plan, Report, Steps, fingerprint
from isthmus.surgery.calibration import Calibration


def check_surgery(
    surgery: Surgery,
    model: Any,
    data: Calibration,
    budget: float = 0.5,
    *,
    tolerance: float = 1e-4,
    may_stop: bool = True,
) -> Report:
    """Check that an operation keeps the contract of :class:`isthmus.roles.Surgery`.

    Planning changes nothing, says the same twice, takes finished pieces up again, and survives its
    files; a budget of 1 leaves the outputs; the plan is refused by another model; an impossible
    budget is refused; the changed model computes finite numbers, no hook of planning is left, and
    it keeps no more than before.

    Args:
        surgery: The operation.
        model: A small model of transformers in eval mode; it is not changed.
        data: Samples.
        budget: One that it can meet, below 1.
        tolerance: How far outputs may move at a budget of 1, as a share of the largest.
        may_stop: Whether a plan that is begun again with the pieces of another must be equal.

    Returns:
        The report of the operation at ``budget``.

    Raises:
        AssertionError: The contract is broken; the message says where.
    """
    assert isinstance(surgery, Surgery), "a surgery has plan(), apply() and keeps"
    assert surgery.keeps, "keeps must say what the budget is a share of"
    before, hooks = fingerprint(model), _hooks(model)
    with tempfile.TemporaryDirectory() as place:
        plan = surgery.plan(model, data, budget, Steps(Path(place) / "steps", "key"))
        assert fingerprint(model) == before, "planning changed the model"
        assert _hooks(model) == hooks, "planning left a hook"
        again = surgery.plan(model, data, budget, Steps(Path(place) / "steps", "key"))
        if may_stop:
            assert _same(plan, again), "the pieces that were kept make another plan"
        assert _same(plan, surgery.plan(model, data, budget)), "one model, two plans"
        plan.save(place)
        loaded = Plan.load(place)
    assert _same(plan, loaded), "the plan reads otherwise after a file"
    assert plan.budget == budget and plan.model == before, "the plan does not say what it is for"

    for wrong in (0.0, -0.5, 1.5, math.nan):
        try:
            surgery.plan(model, data, wrong)
        except InvalidInputError:
            continue
        raise AssertionError(f"a budget of {wrong} was not refused")

    one, two = copy.deepcopy(model), copy.deepcopy(model)
    report = surgery.apply(one, loaded)
    surgery.apply(two, plan)
    assert isinstance(report, Report), "apply() must give a Report"
    assert report.changes, "it reports no changes"
    outputs = _outputs(one, data)
    assert torch.equal(outputs, _outputs(two, data)), "one plan, two models"
    assert bool(torch.isfinite(outputs).all()), "the changed model computes no finite numbers"
    assert not torch.equal(outputs, _outputs(model, data)), "nothing has changed"
    kept = report.after.parameters * report.after.bits, report.after.active
    had = report.before.parameters * report.before.bits, report.before.active
    assert kept[0] < had[0] or kept[1] < had[1], "it neither stores nor uses less"
    try:
        surgery.apply(one, plan)
    except MismatchError:
        pass
    else:
        raise AssertionError("a model that is not the plan's was not refused")

    whole = copy.deepcopy(model)
    surgery.apply(whole, surgery.plan(model, data, 1.0))
    wanted, got = _outputs(model, data), _outputs(whole, data)
    error = float((got - wanted).abs().max() / wanted.abs().max())
    assert error <= tolerance, f"keeping everything moves the outputs by {error:.1e}"
    return report


def _same(one: Plan, two: Plan) -> bool:
    if one.key != two.key or one.tensors.keys() != two.tensors.keys():
        return False
    return all(torch.equal(value, two.tensors[name]) for name, value in one.tensors.items())


def _outputs(model: Any, data: Calibration) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(**batch).logits.float().flatten() for batch in data])


def _hooks(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
