"""A linear probe: can a label be read off vectors, and more than off their words alone?"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from torch import Tensor

from isthmus.errors import InvalidInputError, UnknownNameError, require

Kind = Literal["logistic", "ridge", "mlp"]
STRENGTHS = (0.01, 0.1, 1.0, 10.0)
"""C of logistic regression, of which the validation rows choose one."""


@dataclass(frozen=True)
class Probed:
    """What a probe found.

    Attributes:
        score: Accuracy, or R^2 of a ridge, on the test rows.
        validation: The same on the validation rows, which choose C.
        interval: 95 % bootstrap interval of the score.
        majority: Score of always saying the commonest label of training.
        selectivity: Score less that of the control task, where one was asked for.
        right: Which test rows were named right; of a ridge, none.
    """

    score: float
    validation: float
    interval: tuple[float, float]
    majority: float
    selectivity: float | None = None
    right: tuple[bool, ...] = ()


def probe(
    x: Tensor,
    y: Sequence[Any],
    split: Sequence[str],
    kind: Kind = "logistic",
    *,
    types: Sequence[str] | None = None,
    seed: int = 0,
) -> Probed:
    """Fit on training rows, choose on validation rows, score on test rows.

    Args:
        x: Vectors [N, D]; they are standardised by the training rows.
        y: Label of each row; numbers for ``"ridge"``.
        split: ``"train"``, ``"validation"`` or ``"test"`` of each row. Rows of one document must
            be of one part; only the caller can see to that.
        kind: ``"logistic"``, ``"ridge"`` or ``"mlp"`` (one hidden layer of 64).
        types: Type of each row, such as its word; the control task gives each type a random label.
        seed: Of the control, the perceptron and the bootstrap.

    Raises:
        InvalidInputError: Lengths differ, a part has no rows, or a label is not in training.
        UnknownNameError: No such kind.
        MissingExtraError: scikit-learn is not installed.
    """
    if kind not in ("logistic", "ridge", "mlp"):
        raise UnknownNameError("kind of probe", kind, ["logistic", "ridge", "mlp"])
    parts = {name: np.array([s == name for s in split]) for name in ("train", "validation", "test")}
    if not len(x) == len(y) == len(split):
        raise InvalidInputError(f"{len(x)} vectors, {len(y)} labels and {len(split)} parts differ")
    empty = [name for name, rows in parts.items() if not rows.any()]
    if empty:
        raise InvalidInputError(f"no rows for {', '.join(empty)}; give some of each part")
    labels = np.array(y)
    if kind != "ridge":
        unseen = set(labels.tolist()) - set(labels[parts["train"]].tolist())
        if unseen:
            raise InvalidInputError(f"{sorted(unseen)[0]!r} is not among the training labels")
    values = x.double().numpy()
    train = values[parts["train"]]
    spread = train.std(0)
    values = (values - train.mean(0)) / np.where(spread > 1e-12, spread, 1.0)
    told, validation = _fit(values, labels, parts, kind, seed)
    truth = labels[parts["test"]]
    draw = np.random.default_rng(seed)
    rows = draw.integers(0, len(truth), (1000, len(truth)))
    low, high = np.quantile([_score(truth[r], told[r], kind) for r in rows], [0.025, 0.975])
    common: Any = 0.0
    if kind == "ridge":
        common = np.full(len(truth), labels[parts["train"]].mean())
    else:
        names, counts = np.unique(labels[parts["train"]], return_counts=True)
        common = np.full(len(truth), names[counts.argmax()])
    score = _score(truth, told, kind)
    selectivity = None
    if types is not None and kind != "ridge":
        names = np.unique(labels)
        control = np.array([names[zlib.crc32(f"{seed}/{t}".encode()) % len(names)] for t in types])
        fooled, _ = _fit(values, control, parts, kind, seed)
        selectivity = score - _score(control[parts["test"]], fooled, kind)
    return Probed(
        score,
        validation,
        (float(low), float(high)),
        _score(truth, common, kind),
        selectivity,
        () if kind == "ridge" else tuple((truth == told).tolist()),
    )


def _fit(
    values: Any, labels: Any, parts: dict[str, Any], kind: Kind, seed: int
) -> tuple[Any, float]:
    """What the best probe says of the test rows, and its score on the validation rows."""
    linear: Any = require("sklearn.linear_model", "workbench")
    nets: Any = require("sklearn.neural_network", "workbench")
    made: dict[str, Any] = {
        "logistic": lambda c: linear.LogisticRegression(C=c, max_iter=1000),
        "ridge": lambda c: linear.Ridge(alpha=1 / c),
        "mlp": lambda c: nets.MLPClassifier((64,), alpha=0.01 / c, max_iter=300, random_state=seed),
    }
    best: tuple[float, Any] | None = None
    for strength in STRENGTHS:
        model = made[kind](strength).fit(values[parts["train"]], labels[parts["train"]])
        told = model.predict(values[parts["validation"]])
        score = _score(labels[parts["validation"]], told, kind)
        if best is None or score > best[0]:
            best = score, model
    assert best is not None
    return best[1].predict(values[parts["test"]]), best[0]


def _score(truth: Any, told: Any, kind: Kind) -> float:
    if kind != "ridge":
        return float((truth == told).mean())
    rest = ((truth - told) ** 2).sum()
    return float(1 - rest / max(((truth - truth.mean()) ** 2).sum(), 1e-30))
