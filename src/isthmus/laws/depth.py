"""What a translation costs by the depths of its two halves, and which depths are best.

An encoder of E layers reads the source once, a decoder of D layers runs at every one of the T
target tokens, and so does the output matrix (Kasai et al. 2020, 2006.10369, sec. 3)::

    time = E * c_enc + T * (D * c_dec + D * (D - 1) * c_crowd + c_out)

The term of c_crowd is not the paper's. All weights of the decoder are read again at every token,
and the more there are, the fewer are still in the cache: on a CPU each layer slows each other one.
The source passes an encoder layer once, which finds nothing of it in the cache either way.

>>> runs = [Run(1, 1, 10, 0.13), Run(3, 1, 10, 0.33), Run(1, 3, 10, 0.17)]
>>> cost = DepthCost.fit(runs)
>>> round(cost.encoder_s, 9), round(cost.decoder_s, 9), round(cost.output_s, 9)
(0.1, 0.002, 0.001)
>>> round(cost.seconds(12, 1, 10), 9), round(cost.seconds(6, 6, 10), 9)
(1.23, 0.73)
>>> crowded = DepthCost.fit([*runs, Run(1, 6, 10, 0.29)])
>>> round(crowded.decoder_s, 9), round(crowded.crowding_s, 9)
(0.0008, 0.0004)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from isthmus.errors import InvalidInputError


@dataclass(frozen=True)
class Run:
    """A measured translation of one batch.

    Attributes:
        encoder_layers: E.
        decoder_layers: D.
        tokens: Target tokens T of a row, which is how often the decoder ran.
        seconds: Time it took.
    """

    encoder_layers: int
    decoder_layers: int
    tokens: int
    seconds: float


@dataclass(frozen=True)
class DepthCost:
    """The costs, for one width, batch size and source length.

    Attributes:
        encoder_s: Seconds of one encoder layer over the source, c_enc.
        decoder_s: Seconds of one decoder layer, were it the only one, at one token, c_dec.
        output_s: Seconds of all else at one token, c_out: embedding, output matrix, choice of the
            token, and what the loop itself costs.
        crowding_s: Seconds by which each other decoder layer slows one at one token, c_crowd.
    """

    encoder_s: float
    decoder_s: float
    output_s: float
    crowding_s: float = 0.0

    @classmethod
    def fit(cls, runs: Sequence[Run]) -> DepthCost:
        """Least squares over relative errors, each cost at least 0.

        Crowding is found where at least three depths of the decoder were measured, and is none
        otherwise.

        Raises:
            InvalidInputError: The runs do not tell the other three costs apart: three runs whose
                depths do not lie on one line do.
        """
        if any(min(r.encoder_layers, r.decoder_layers, r.tokens) < 1 for r in runs):
            raise InvalidInputError("layers and tokens of a run are at least 1")
        if any(not r.seconds > 0 for r in runs):
            raise InvalidInputError("a run takes more than 0 seconds")
        a = np.array(
            [_counts(r.encoder_layers, r.decoder_layers, r.tokens) for r in runs], float
        ).reshape(-1, 4)
        b = np.array([r.seconds for r in runs])
        if np.linalg.matrix_rank(a[:, :3]) < 3:
            raise InvalidInputError(
                f"{len(runs)} runs do not tell three costs apart; measure three splits such as "
                "1-1, 6-1 and 1-6"
            )
        a, b = a / b[:, None], np.ones(len(b))
        free = [0, 1, 2, 3] if np.linalg.matrix_rank(a) == 4 else [0, 1, 2]
        while True:  # a cost that noise makes negative is none
            found, *_ = np.linalg.lstsq(a[:, free], b, rcond=None)
            kept = [i for i, x in zip(free, found, strict=True) if x >= 0]
            if kept == free:
                break
            free = kept
        costs = [0.0, 0.0, 0.0, 0.0]
        for i, x in zip(free, found, strict=True):
            costs[i] = float(x)
        return cls(*costs)

    def seconds(self, encoder_layers: int, decoder_layers: int, tokens: int) -> float:
        """Time of one batch, from its depths and the target tokens of a row."""
        costs = self.encoder_s, self.decoder_s, self.output_s, self.crowding_s
        counts = _counts(encoder_layers, decoder_layers, tokens)
        return sum(count * cost for count, cost in zip(counts, costs, strict=True))

    def output_share(self, encoder_layers: int, decoder_layers: int, tokens: int) -> float:
        """Share of the time that no choice of depths can save."""
        return tokens * self.output_s / self.seconds(encoder_layers, decoder_layers, tokens)

    def best(
        self, accuracy: Mapping[tuple[int, int], float], tokens: int, floor: float
    ) -> tuple[int, int]:
        """The fastest depths (E, D) among those that are accurate enough.

        Args:
            accuracy: Of every split that may be chosen.
            tokens: Target tokens of a row.
            floor: Least accuracy.

        Raises:
            InvalidInputError: No split reaches the floor.

        Example:
            >>> cost = DepthCost(0.1, 0.02, 0.01)
            >>> cost.best({(3, 3): 99.0, (5, 1): 98.5, (1, 5): 99.5}, 40, floor=98.0)
            (5, 1)
        """
        allowed = [split for split, found in accuracy.items() if found >= floor]
        if not allowed:
            best = max(accuracy.values(), default=float("nan"))
            raise InvalidInputError(f"no split reaches {floor:g}; the best one has {best:g}")
        return min(allowed, key=lambda s: (self.seconds(s[0], s[1], tokens), s))


def _counts(encoder_layers: int, decoder_layers: int, tokens: int) -> tuple[int, int, int, int]:
    """How often c_enc, c_dec, c_out and c_crowd are paid."""
    d = decoder_layers
    return encoder_layers, tokens * d, tokens, tokens * d * (d - 1)


def worst_error(cost: DepthCost, runs: Iterable[Run]) -> float:
    """Largest relative error of the predicted times."""
    return max(
        abs(cost.seconds(r.encoder_layers, r.decoder_layers, r.tokens) / r.seconds - 1)
        for r in runs
    )
