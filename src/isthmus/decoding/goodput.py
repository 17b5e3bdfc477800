"""Goodput: expected tokens over expected seconds, and the running figures that both come from.

Tokens are expected from acceptance rates, one a request, drawn to the average of all requests as
long as little is known of it (:class:`Means`); seconds from running linear fits (:class:`Fit`, and
:class:`Line` where every round counts and the clock is not to be trusted).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isthmus.errors import InvalidInputError

Array = NDArray[np.float64]


def expected_tokens(rate: Any, length: Any) -> Array:
    """Expected tokens of a round with a chain of draft tokens, the target's own one included.

    ``(1 - a^(k + 1)) / (1 - a)``: the draft tokens stand one after the other with chance a.

    Args:
        rate: Acceptance rates a within [0, 1], any shape.
        length: Draft tokens k, any shape that goes with it.

    Raises:
        InvalidInputError: A rate is no probability or a length is negative.

    Example:
        >>> expected_tokens(0.5, [0, 1, 2]).tolist(), float(expected_tokens(1.0, 4))
        ([1.0, 1.5, 1.75], 5.0)
    """
    a, k = np.asarray(rate, dtype=float), np.asarray(length, dtype=float)
    if a.size and not (a.min() >= 0.0 and a.max() <= 1.0):
        raise InvalidInputError(f"an acceptance rate lies within 0 and 1, got {rate}")
    if k.size and k.min() < 0:
        raise InvalidInputError(f"a draft has 0 tokens or more, got {length}")
    miss = 1.0 - a
    with np.errstate(divide="ignore", invalid="ignore"):
        tokens = (1.0 - a ** (k + 1.0)) / miss
    return np.asarray(np.where(miss < 1e-12, k + 1.0, tokens))


class Means:
    """Running means of every request, drawn to those of all requests before it.

    A request of which n observations (with forgetting) are known has the estimate
    ``(n mean + weight prior) / (n + weight)``; the prior is the running mean over all requests
    and stays when they leave.

    Args:
        start: Prior before anything is known, any shape; copied.
        weight: Observations that the prior counts for.
        memory: Observations that a request remembers.
        prior_memory: Observations that the prior remembers.

    Example:
        >>> means = Means(np.array(0.5), weight=1.0)
        >>> means.begin(1)
        >>> means.observe([1.0])
        >>> means.estimate().tolist()
        [0.75]
    """

    def __init__(
        self,
        start: Array,
        *,
        weight: float = 4.0,
        memory: float = 24.0,
        prior_memory: float = 64.0,
    ) -> None:
        self.prior = np.array(start, dtype=float)
        self.weight, self._keep, self._prior_memory = weight, 1.0 - 1.0 / memory, prior_memory
        self._prior_seen = np.zeros_like(self.prior)
        self.begin(0)

    def begin(self, rows: int) -> None:
        """Start on new requests and forget the ones before, but for what the prior keeps."""
        self.total = self.count = np.zeros((0, *self.prior.shape))
        self.join(rows)

    def join(self, rows: int) -> None:
        """Add new requests; what was seen so far becomes the prior of all, and it stays put."""
        self._fixed = self.prior.copy()
        self._fixed_seen = np.minimum(self._prior_seen, self.weight)
        fresh = np.zeros((rows, *self.prior.shape))
        self.total, self.count = np.append(self.total, fresh, 0), np.append(self.count, fresh, 0)

    def observe(self, values: Any, counts: Any = 1.0) -> None:
        """Add what was seen of every request.

        Args:
            values: Means of the new observations, [rows, ...].
            counts: How many observations of each entry there were; 0 leaves it as it is.
        """
        seen = np.broadcast_to(np.asarray(counts, dtype=float), self.total.shape)
        sums = np.where(seen > 0, values, 0.0) * seen
        fade = self._keep**seen
        self.total, self.count = self.total * fade + sums, self.count * fade + seen
        many = seen.sum(0)
        self._prior_seen = self._prior_seen + many
        mean = sums.sum(0) / np.maximum(many, 1e-9)
        share = np.minimum(1.0, many / np.clip(self._prior_seen, 1.0, self._prior_memory))
        self.prior = self.prior + share * (mean - self.prior)

    def estimate(self) -> Array:
        """The estimates of all requests, [rows, ...]."""
        estimate: Array = (self.total + self.weight * self._fixed) / (self.count + self.weight)
        return estimate

    def known(self) -> Array:
        """Observations behind the estimates, those of the prior up to its weight, [rows, ...]."""
        known: Array = self.count + self._fixed_seen
        return known

    def select(self, rows: Sequence[int]) -> None:
        """Keep only the given requests."""
        self.total, self.count = self.total[list(rows)], self.count[list(rows)]


class Fit:
    """Running least squares of seconds on a few features, older rounds fading.

    Args:
        start: First guess of the coefficients; it counts for one observation of size 1.
        memory: Observations that are remembered.

    Example:
        >>> line = Fit([0.0, 0.0])
        >>> for x in (1.0, 2.0, 3.0, 4.0) * 9:
        ...     line.observe([1.0, x], 2.0 + 0.5 * x)
        >>> round(line([1.0, 10.0]), 2)
        7.0
    """

    def __init__(self, start: Sequence[float], *, memory: float = 200.0) -> None:
        self.coefficients = np.array(start, dtype=float)
        n = len(self.coefficients)
        self._keep = 1.0 - 1.0 / memory
        self._square = np.eye(n) * 1e-3
        self._right = self._square @ self.coefficients

    def observe(self, features: Sequence[float], seconds: float) -> None:
        """Add one measured round."""
        x = np.asarray(features, dtype=float)
        self._square = self._keep * self._square + np.outer(x, x)
        self._right = self._keep * self._right + x * seconds
        ridge = 1e-6 * np.diag(np.diag(self._square)) + 1e-12 * np.eye(len(x))
        # toward what is known already, so that a feature that never varied stays as it was
        known = self._right + ridge @ self.coefficients
        self.coefficients = np.linalg.solve(self._square + ridge, known)

    def __call__(self, features: Any) -> Any:
        """Seconds of rounds with the given features [..., F]; never negative."""
        seconds = np.maximum(np.asarray(features, dtype=float) @ self.coefficients, 0.0)
        return float(seconds) if seconds.ndim == 0 else seconds


class Line:
    """Seconds as a fixed part and one for each unit of size, both 0 or more; older rounds fade.

    The first round runs in cold code and is as good as forgotten when there are others. A later one
    counts for at most three times what was expected: other programs make a round slow, none makes
    it fast.

    Args:
        memory: Rounds that are remembered.

    Example:
        >>> line = Line()
        >>> for x in (1.0, 2.0, 3.0, 4.0) * 9:
        ...     line.observe(x, 2.0 + 0.5 * x)
        >>> round(float(line(10.0)), 2)
        7.0
    """

    def __init__(self, *, memory: float = 64.0) -> None:
        self.fixed = self.slope = 0.0
        self._keep, self._rounds = 1.0 - 1.0 / memory, 0
        self._n = self._x = self._y = self._xx = self._xy = 0.0

    def observe(self, size: float, seconds: float) -> None:
        """Add one measured round."""
        if self._rounds > 1:
            seconds = min(seconds, 3.0 * (self.fixed + self.slope * size))
        keep = self._keep if self._rounds > 1 else 0.05
        self._rounds += 1
        self._n = self._n * keep + 1.0
        self._x, self._y = self._x * keep + size, self._y * keep + seconds
        self._xx, self._xy = self._xx * keep + size * size, self._xy * keep + size * seconds
        spread = self._n * self._xx - self._x * self._x
        if spread > 1e-9 * self._n * self._xx:  # sizes that never varied say nothing of the slope
            self.slope = max(0.0, (self._n * self._xy - self._x * self._y) / spread)
        self.fixed = (self._y - self.slope * self._x) / self._n
        if self.fixed < 0.0:
            self.fixed, self.slope = 0.0, self._xy / self._xx

    def __call__(self, size: Any) -> Any:
        """Seconds of rounds of the given sizes, any shape."""
        return self.fixed + self.slope * size
