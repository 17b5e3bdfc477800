r"""Scaling laws: how a loss falls with sizes, with intervals, and tested on what was held out.

A law is a sum of terms, each a power of some variables, so that its logarithm is

::

    log L(x) = logsumexp_i (a_i - sum_j alpha_ij log x_j)         the floor E is a term without x

    power     A x^-alpha y^-beta            product   E + A x^-alpha y^-beta
    additive  E + A x^-alpha + B y^-beta

It is fitted by the sum of Huber losses of log residuals, from a grid of starts (J. Hoffmann et al.,
"Training Compute-Optimal Large Language Models", 2022, arXiv:2203.15556, appendix D.3). The sum is
taken in units of the Huber threshold: on a mean the search ends too early (T. Besiroglu et al.,
2024, arXiv:2404.10102). Intervals come from fits to runs drawn again.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from isthmus.errors import BrokenFileError, InvalidInputError, UnknownNameError, require

FORMS = ("power", "product", "additive")
MIXED = ("tokenizer", "test_set")
"""Columns that must hold one value: losses of several of them are not comparable."""
DELTA = 1e-3
"""Log residual from which the Huber loss grows linearly."""
DRAWS = 500
_SEEDS, _FAR = 3, 100.0

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Runs:
    """Losses of trainings of several sizes.

    Attributes:
        variables: Names of what was varied.
        x: Their values [N, J], above 0.
        loss: Losses [N], above 0.
        compute: What decides which runs are the largest [N]; the product of the variables where
            it was not measured.
    """

    variables: tuple[str, ...]
    x: Array
    loss: Array
    compute: Array

    @classmethod
    def of(
        cls,
        variables: Mapping[str, ArrayLike],
        loss: ArrayLike,
        compute: ArrayLike | None = None,
    ) -> Runs:
        """Runs from columns.

        Raises:
            InvalidInputError: Columns of unequal length, or a value that is not above 0.
        """
        columns = [np.asarray(values, dtype=float) for values in variables.values()]
        losses = np.asarray(loss, dtype=float)
        spent = np.prod(columns, axis=0) if compute is None else np.asarray(compute, dtype=float)
        named = dict(zip((*variables, "loss", "compute"), (*columns, losses, spent), strict=True))
        if not columns or losses.ndim != 1:
            raise InvalidInputError("give the losses of runs and at least one variable")
        for name, values in named.items():
            if values.shape != losses.shape:
                raise InvalidInputError(
                    f"{name} has {values.size} values for {losses.size} losses; give one a run"
                )
            bad = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
            if len(bad):
                raise InvalidInputError(
                    f"run {bad[0] + 1}: {name} is {values[bad[0]]:g}; a law needs numbers above 0, "
                    "so leave runs out that diverged"
                )
        return cls(tuple(variables), np.stack(columns, 1), losses, spent)

    def __len__(self) -> int:
        return len(self.loss)

    def take(self, rows: Any) -> Runs:
        """Some of the runs, by numbers or a mask."""
        return Runs(self.variables, self.x[rows], self.loss[rows], self.compute[rows])

    def split(self, share: float = 0.25) -> tuple[Runs, Runs]:
        """The smaller runs, and those that spent more than the others: a quarter of the sizes."""
        size = np.log(self.compute).round(9)  # products of the same sizes differ in last digits
        sizes = np.unique(size)
        large = size >= sizes[max(len(sizes) - max(1, round(share * len(sizes))), 0)]
        return self.take(~large), self.take(large)


def read_runs(
    path: str | Path,
    *,
    loss: str = "loss",
    over: Sequence[str] = (),
    compute: str = "compute",
    where: Mapping[str, str] | None = None,
) -> Runs:
    """Read runs from a table: .csv, .tsv, or .jsonl with one object a line.

    Args:
        path: The file.
        loss: Column of the losses.
        over: Columns of the variables; every other column of numbers by default.
        compute: Column of what a run spent; need not be there.
        where: Keep only rows whose column holds this value.

    Raises:
        BrokenFileError: It cannot be read, or a row does not fit.
        UnknownNameError: It has no such column.
        InvalidInputError: It mixes tokenizers or test sets, or holds no runs.
    """
    rows = _rows(Path(path))
    names = list(rows[0])
    for name in (loss, *over, *(where or {})):
        if name not in names:
            raise UnknownNameError(f"column of {path}", name, names)
    kept = [r for r in rows if all(str(r[k]) == v for k, v in (where or {}).items())]
    if not kept:
        raise InvalidInputError(f"{path} has no row where {where}; see its columns")
    for name in MIXED:
        values = sorted({str(row.get(name, "")) for row in kept})
        if len(values) > 1:
            raise InvalidInputError(
                f"{path} mixes {name} {', '.join(values)}, whose losses are not comparable; "
                f"choose one with --where {name}={values[0]}"
            )
    out = {loss, compute, "seed", "seconds", *MIXED, *(where or {})}
    chosen = tuple(over) or tuple(n for n in names if n not in out and _numeric(kept, n))
    if not chosen:
        raise InvalidInputError(f"{path} has no column of numbers besides {loss}; name one by over")
    columns = {name: _column(kept, name, path) for name in (*chosen, loss)}
    spent = _column(kept, compute, path) if compute in names else None
    return Runs.of({name: columns[name] for name in chosen}, columns[loss], spent)


@dataclass(frozen=True)
class Value:
    """A number with its 95 % interval.

    Attributes:
        value: The number.
        low: Lower end.
        high: Upper end.
        identified: Whether the runs tell it: the interval touches no bound of the search and
            spans less than a factor of ten.
    """

    value: float
    low: float
    high: float
    identified: bool = True

    def __str__(self) -> str:
        doubt = "" if self.identified else ", not identified by these runs"
        return f"{self.value:.4g} ({self.low:.4g} to {self.high:.4g}{doubt})"


@dataclass(frozen=True)
class HeldOut:
    """How well fits to the smaller runs tell the largest ones.

    Attributes:
        runs: Runs held out.
        error: Mean absolute log error of the law.
        coverage: Share of them inside the law's 95 % interval.
        baselines: Errors of ``constant`` (the median), ``last`` (the loss of the largest run
            seen) and ``power`` (a law without floor).
    """

    runs: int
    error: float
    coverage: float
    baselines: Mapping[str, float]


@dataclass(frozen=True)
class ScalingLaw:
    """A law fitted to runs.

    Attributes:
        form: A name of :data:`FORMS`.
        runs: What it was fitted to.
        values: Parameters by name: ``E`` where the form has a floor, ``A`` (and ``B`` ...), and
            ``alpha:VARIABLE``.
        agreement: Share of the starts that ended in this law.
        r2: Share of the variance of log losses that it explains.
        aicc: Corrected criterion of Akaike, for comparing forms on the same runs.
        draws: Parameters [R, P] of the fits to runs drawn again.
    """

    form: str
    runs: Runs
    values: Mapping[str, Value]
    agreement: float
    r2: float
    aicc: float
    theta: Array
    draws: Array

    def predict(self, x: Mapping[str, ArrayLike], *, force: bool = False) -> list[Value]:
        """Losses at sizes, with intervals that hold the scatter of single runs.

        Args:
            x: Values of every variable.
            force: Also where a size is more than 100 times outside the runs.

        Raises:
            InvalidInputError: A variable is missing or unknown, or too far away.

        Example:
            >>> n = np.array([1e5, 2e5, 4e5, 8e5, 1.6e6, 3.2e6])
            >>> law = fit(Runs.of({"n": n}, 1.5 + 40 * n**-0.5), "product", draws=20)
            >>> round(law.predict({"n": 1e7})[0].value, 4)
            1.5126
        """
        names = self.runs.variables
        if set(x) != set(names):
            raise InvalidInputError(f"the law is over {', '.join(names)}; give each of them once")
        points = np.stack(np.broadcast_arrays(*(np.atleast_1d(_floats(x[n])) for n in names)), 1)
        for name, asked, seen in zip(names, points.T, self.runs.x.T, strict=True):
            far = (asked > _FAR * seen.max()) | (asked < seen.min() / _FAR)
            if not (np.isfinite(asked).all() and (asked > 0).all()) or (far.any() and not force):
                raise InvalidInputError(
                    f"{name} = {asked[far][0] if far.any() else asked[0]:g} is too far from the "
                    f"runs, {seen.min():g} to {seen.max():g}; train larger ones, or force it"
                )
        design = _design(self.form, points)
        scatter = np.log(self.runs.loss) - _log_law(_design(self.form, self.runs.x), self.theta)
        middle = _log_law(design, self.theta)
        drawn = np.stack([_log_law(design, theta) for theta in self.draws])  # [R, N]
        noisy = (drawn[:, None] + scatter[:, None]).reshape(-1, len(points))
        low, high = np.exp(np.percentile(noisy, (2.5, 97.5), axis=0))
        return [Value(*each) for each in zip(np.exp(middle).tolist(), low, high, strict=True)]

    def split(self, total: float) -> dict[str, float]:
        """Best shares of a total size: of a product law, in proportion to the exponents.

        B. Ghorbani et al., "Scaling Laws for Neural Machine Translation", 2021,
        arXiv:2109.07740, section 3: ``N_j = N p_j / sum(p)`` minimises the product under
        ``sum(N_j) = N``.

        Raises:
            InvalidInputError: The law is additive, or none of its exponents is above 0.
        """
        powers = [self.values[f"alpha:{name}"].value for name in self.runs.variables]
        if self.form == "additive" or sum(powers) <= 0:
            raise InvalidInputError("only a product of falling powers has this split of a total")
        return {
            n: total * p / sum(powers) for n, p in zip(self.runs.variables, powers, strict=True)
        }

    def __str__(self) -> str:
        value = {name: f"{each.value:.4g}" for name, each in self.values.items()}
        powers = [f"{n}^-{value[f'alpha:{n}']}" for n in self.runs.variables]
        floor = [value["E"]] if "E" in value else []
        if self.form == "additive":
            terms = [f"{value[chr(65 + i)]} {power}" for i, power in enumerate(powers)]
        else:
            terms = [" ".join([value["A"], *powers])]
        return "loss = " + " + ".join(floor + terms)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "form": self.form,
            "law": str(self),
            "values": {name: asdict(each) for name, each in self.values.items()},
            "runs": len(self.runs),
            "agreement": self.agreement,
            "r2": self.r2,
            "aicc": self.aicc,
        }


def fit(runs: Runs, form: str = "product", *, draws: int = DRAWS, seed: int = 0) -> ScalingLaw:
    """Fit a law.

    Args:
        runs: Losses of runs.
        form: A name of :data:`FORMS`.
        draws: Fits to runs drawn again, for the intervals. Where every size was trained three
            times or more, seeds are drawn inside the sizes, otherwise runs.
        seed: Of the draws.

    Raises:
        InvalidInputError: Too few different sizes for this form.
        MissingExtraError: scipy is not installed.
        UnknownNameError: No such form.
    """
    if form not in FORMS:
        raise UnknownNameError("form of law", form, FORMS)
    design = _design(form, runs.x)
    target = np.log(runs.loss)
    count = design.shape[-1]
    sizes, size_of = np.unique(runs.x, axis=0, return_inverse=True)
    if len(sizes) < count + 2:
        raise InvalidInputError(
            f"the form {form} has {count} parameters and needs runs of {count + 2} different "
            f"sizes; there are {len(sizes)}: train more, or fit a simpler form"
        )
    centre = np.log(runs.x).mean(0)
    middle = _design(form, np.exp(np.log(runs.x) - centre))
    bounds = _bounds(form, runs)
    ones = np.ones(len(runs))
    found = [_minimise(middle, target, ones, start, bounds) for start in _starts(form, runs)]
    best_value, best = min(found, key=lambda each: each[0])
    agreeing = [value for value, _ in found if value <= best_value + 1e-3 * max(best_value, 1e-3)]

    rng = np.random.default_rng(seed)
    inside = np.bincount(size_of.ravel()).min() >= _SEEDS
    drawn = [best]
    while len(drawn) <= draws:
        weights = _weights(size_of.ravel(), rng, inside)
        if len(np.unique(size_of.ravel()[weights > 0])) >= count:
            drawn.append(_minimise(middle, target, weights, best, bounds)[1])
    shift = _shift(form, centre)
    thetas = np.stack(drawn) @ shift.T
    theta, others = thetas[0], thetas[1:] if draws else thetas

    residual = target - _log_law(design, theta)
    n, rss = len(runs), float((residual**2).sum())
    spread = float(((target - target.mean()) ** 2).sum())
    aicc = (
        n * math.log(max(rss, 1e-300) / n) + 2 * count + 2 * count * (count + 1) / (n - count - 1)
    )
    return ScalingLaw(
        form,
        runs,
        _values(form, runs.variables, theta, others, np.stack(drawn), bounds),
        len(agreeing) / len(found),
        1 - rss / spread if spread else 0.0,
        aicc,
        theta,
        others,
    )


def held_out(runs: Runs, form: str, *, share: float = 0.25, draws: int = 200) -> HeldOut:
    """Fit without the largest runs and predict them.

    Raises:
        InvalidInputError: What is left is too little for this form.
    """
    small, large = runs.split(share)
    law = fit(small, form, draws=draws)
    asked = dict(zip(runs.variables, large.x.T, strict=True))
    told = law.predict(asked, force=True)

    def error(guess: Any) -> float:
        return float(np.abs(np.log(guess) - np.log(large.loss)).mean())

    inside = [v.low <= y <= v.high for v, y in zip(told, large.loss, strict=True)]
    power = fit(small, "power", draws=0).predict(asked, force=True)
    last = small.loss[small.compute == small.compute.max()].mean()
    return HeldOut(
        len(large),
        error([v.value for v in told]),
        float(np.mean(inside)),
        {
            "constant": error(np.median(small.loss)),
            "last": error(last),
            "power": error([v.value for v in power]),
        },
    )


def profile_floor(law: ScalingLaw, floors: ArrayLike) -> list[float]:
    """How much worse the best law with a given floor E is: twice the fall of the log-likelihood.

    The scale of the residuals is fitted too (Laplace, which the Huber loss is beyond
    :data:`DELTA`). Floors with less than 3.84 are inside the 95 % interval.

    Raises:
        InvalidInputError: The law has no floor.
    """
    if "E" not in law.values:
        raise InvalidInputError("this law has no floor E; fit the form product or additive")
    design, target = _design(law.form, law.runs.x), np.log(law.runs.loss)
    free = _bounds(law.form, law.runs)
    # In original units a_i is not near zero, which the search does not mind from the best start.
    wide = [(None, None) if i and b[0] is None else b for i, b in enumerate(free)]
    ones, fell = np.ones(len(target)), []
    best, _ = _minimise(design, target, ones, law.theta, wide)
    for floor in np.atleast_1d(_floats(floors)):
        e = math.log(max(floor, 1e-300))
        start = np.concatenate([[e], law.theta[1:]])
        value, _ = _minimise(design, target, ones, start, [(e, e), *wide[1:]])
        fell.append(2 * len(target) * math.log(max(value, 1e-12) / max(min(best, value), 1e-12)))
    return fell


# the search -------------------------------------------------------------------------------------


def _terms(form: str, variables: int) -> list[tuple[int, ...]]:
    """Variables of every term; the floor has none."""
    floor: list[tuple[int, ...]] = [()] if form != "power" else []
    if form == "additive":
        return floor + [(j,) for j in range(variables)]
    return [*floor, tuple(range(variables))]


def _design(form: str, x: Array) -> Array:
    """Exponents of the terms are linear in the parameters: this times theta [N, terms, P]."""
    terms = _terms(form, x.shape[1])
    design = np.zeros((len(x), len(terms), len(terms) + x.shape[1]))
    for i, term in enumerate(terms):
        design[:, i, i] = 1.0
        for j in term:
            design[:, i, len(terms) + j] = -np.log(x[:, j])
    return design


def _log_law(design: Array, theta: Array) -> Array:
    exponents = design @ theta
    top = exponents.max(-1, keepdims=True)
    total: Array = top[:, 0] + np.log(np.exp(exponents - top).sum(-1))
    return total


def _minimise(
    design: Array, target: Array, weights: Array, start: Array, bounds: Sequence[Any]
) -> tuple[float, Array]:
    """Least weighted sum of Huber losses, in units of DELTA squared, and where it is."""

    def objective(theta: Array) -> tuple[float, Array]:
        exponents = design @ theta
        top = exponents.max(-1, keepdims=True)
        parts = np.exp(exponents - top)
        total = parts.sum(-1, keepdims=True)
        r = (top[:, 0] + np.log(total[:, 0]) - target) / DELTA
        near = np.clip(r, -1, 1)
        value = float((weights * near * (r - near / 2)).sum())
        slope = np.einsum("n,nt,ntp->p", weights * near / DELTA, parts / total, design)
        return value, slope

    optimize: Any = require("scipy.optimize", "law")
    found = optimize.minimize(
        objective,
        start,
        jac=True,
        method="L-BFGS-B",
        bounds=bounds,
        options={"gtol": 1e-10, "ftol": 1e-13, "maxiter": 2000},
    )
    return float(found.fun), np.asarray(found.x)


def _bounds(form: str, runs: Runs) -> list[tuple[float | None, float | None]]:
    lowest = math.log(runs.loss.min())
    terms = len(_terms(form, len(runs.variables)))
    floor: list[tuple[float | None, float | None]] = [(lowest - 14, lowest)]
    free: list[tuple[float | None, float | None]] = [(None, None)]
    steps: list[tuple[float | None, float | None]] = [(0.0, 10.0)] * len(runs.variables)
    return (free if form == "power" else floor) + free * (terms - 1) + steps


def _starts(form: str, runs: Runs) -> list[Array]:
    """At least 100 places to begin, for centred logarithms of the variables."""
    variables = len(runs.variables)
    falling = len(_terms(form, variables)) - (form != "power")
    shares = (0.0,) if form == "power" else (0.02, 0.3, 0.6, 0.8, 0.95)
    each = max(2, math.ceil((100 / len(shares)) ** (1 / variables)))
    starts = []
    for share, alphas in itertools.product(
        shares, itertools.product(np.linspace(0, 2, each), repeat=variables)
    ):
        floor = share * runs.loss.min()
        height = math.log((float(np.median(runs.loss)) - floor) / falling)
        head = [] if form == "power" else [math.log(floor)]
        starts.append(np.array([*head, *[height] * falling, *alphas]))
    return starts


def _shift(form: str, centre: Array) -> Array:
    """The matrix that turns parameters for centred logarithms into those for the variables."""
    terms = _terms(form, len(centre))
    matrix = np.eye(len(terms) + len(centre))
    for i, term in enumerate(terms):
        for j in term:
            matrix[i, len(terms) + j] = centre[j]
    return matrix


def _weights(size_of: NDArray[Any], rng: np.random.Generator, inside: bool) -> Array:
    """How often each run is drawn."""
    n = len(size_of)
    if not inside:
        return np.bincount(rng.integers(0, n, n), minlength=n).astype(float)
    weights = np.zeros(n)
    for size in range(size_of.max() + 1):
        rows = np.flatnonzero(size_of == size)
        np.add.at(weights, rng.choice(rows, len(rows)), 1.0)
    return weights


def _values(
    form: str,
    variables: tuple[str, ...],
    theta: Array,
    draws: Array,
    searched: Array,
    bounds: Sequence[tuple[float | None, float | None]],
) -> dict[str, Value]:
    """Parameters in their own units, with percentiles of the draws."""
    terms = _terms(form, len(variables))
    falling = len(terms) - (form != "power")
    heights = [chr(ord("A") + i) for i in range(falling)]
    names = ([] if form == "power" else ["E"]) + heights + [f"alpha:{n}" for n in variables]
    values = {}
    for i, name in enumerate(names):
        ends = np.percentile(draws[:, i], (2.5, 97.5))
        at = np.percentile(searched[:, i], (2.5, 97.5))
        bound = [b for b in bounds[i] if b is not None]
        touches = any(abs(end - b) < 1e-6 for end in at for b in bound)
        middle, low, high = float(theta[i]), *(float(v) for v in ends)
        if i < len(terms):
            middle, low, high = (math.exp(min(v, 700.0)) for v in (middle, low, high))
        wide = high > 10 * low if low > 0 else True
        values[name] = Value(middle, low, high, not (touches or wide))
    return values


# tables -----------------------------------------------------------------------------------------


def _floats(values: ArrayLike) -> Array:
    return np.asarray(values, dtype=float)


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() in (".jsonl", ".ndjson"):
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
            # a sweep keeps what diverged, which no law is about
            rows = [row for row in rows if not (isinstance(row, dict) and row.get("diverged"))]
        else:
            tab = "\t" if path.suffix.lower() == ".tsv" else ","
            rows = list(csv.DictReader(text.splitlines(), delimiter=tab, strict=True))
    except (OSError, ValueError, csv.Error) as error:
        raise BrokenFileError(f"{path} cannot be read as a table of runs: {error}") from error
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise BrokenFileError(f"{path} holds no runs; give a table with a header and a row each")
    for number, row in enumerate(rows, 1):
        if row.keys() != rows[0].keys() or None in row or None in row.values():
            raise BrokenFileError(f"{path}, run {number}: its columns are not those of the first")
    return rows


def _numeric(rows: Sequence[Mapping[str, Any]], name: str) -> bool:
    try:
        return all(
            not isinstance(row[name], bool) and math.isfinite(float(row[name])) for row in rows
        )
    except (TypeError, ValueError):
        return False


def _column(rows: Sequence[Mapping[str, Any]], name: str, path: str | Path) -> Array:
    values = []
    for number, row in enumerate(rows, 1):
        try:
            values.append(float(row[name]))
        except (TypeError, ValueError) as error:
            raise BrokenFileError(
                f"{path}, run {number}: {name} is {row[name]!r}, not a number"
            ) from error
    return np.array(values)
