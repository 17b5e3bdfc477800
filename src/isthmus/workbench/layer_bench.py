"""How long one token takes: single layers of a large model's shape, and whole small models.

Contestants take turns in one process (:class:`isthmus.claims.Ruler`), on the threads that torch has
been given. Weights and inputs of single layers are random: their speed says nothing of
quality.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from isthmus.claims import Ratio, Row, Ruler, ratio
from isthmus.decoding.model import Model
from isthmus.nn.sparse_gemv import ThresholdedLinear


@dataclass(frozen=True)
class LayerSpeed:
    """One layer at batch 1.

    Attributes:
        shape: Inputs and outputs.
        dense_ms: Median of the dense product in float32.
        ours: Dense over ours, by the share of inputs that is skipped.
        int8_ms: Median of the dynamic int8 layer of torch; None where it is not to be had.
    """

    shape: tuple[int, int]
    dense_ms: float
    ours: dict[float, Ratio]
    int8_ms: float | None

    def row(self, sparsity: float) -> Row:
        """A line of a claim: the dense product against ours at one share of skipped inputs."""
        return Row(
            f"one token through {self.shape[0]} x {self.shape[1]}, {sparsity:.0%} skipped",
            "ms",
            self.dense_ms,
            self.dense_ms / self.ours[sparsity].median,
            None,
            control=self.int8_ms,
            note="control: int8; "
            + ", ".join(f"{s:.0%} skipped {r}" for s, r in self.ours.items()),
        )


@torch.no_grad()
def thresholded_speed(
    ruler: Ruler, shape: tuple[int, int], sparsities: Sequence[float], *, repeats: int = 20
) -> LayerSpeed:
    """Time a layer with thresholds against the dense one on the same weights and input.

    Args:
        ruler: The clock.
        shape: Inputs and outputs.
        sparsities: Shares of inputs to skip.
        repeats: Timed runs of each.
    """
    generator = torch.Generator().manual_seed(0)
    dense = nn.Linear(*shape, bias=False)
    dense.weight.data.normal_(generator=generator)
    ours = ThresholdedLinear.of(dense.weight)
    x = torch.randn(1, 1, shape[0], generator=generator)
    size = x.abs().flatten()

    def run(threshold: float) -> torch.Tensor:
        ours.threshold = threshold
        return ours(x)  # type: ignore[no-any-return]

    arms: dict[str, Any] = {"dense": lambda: dense(x)}
    for s in sparsities:
        tau = float(size.kthvalue(max(1, round(s * len(size)))).values)
        arms[f"{s}"] = lambda tau=tau: run(tau)
    int8 = _int8(dense)
    if int8 is not None:
        arms["int8"] = lambda: int8(x)
    found = ruler.compare(arms, repeats=repeats, warmup=2)
    return LayerSpeed(
        shape,
        1e3 * found["dense"].median_s,
        {s: ratio(found["dense"], found[f"{s}"]) for s in sparsities},
        1e3 * found["int8"].median_s if int8 is not None else None,
    )


def _int8(linear: nn.Linear) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that its int8 layers will move
        try:
            quantize: Any = torch.ao.quantization.quantize_dynamic
            return quantize(nn.Sequential(linear), {nn.Linear}, dtype=torch.qint8)
        except (AttributeError, RuntimeError):
            return None


def decode_speeds(
    ruler: Ruler, models: Mapping[str, Any], prompt: torch.Tensor, *, tokens: int, repeats: int
) -> dict[str, tuple[float, Ratio]]:
    """Milliseconds a token of plain decoding, one text at a time, and the first model's over each.

    Args:
        ruler: The clock.
        models: Causal models of transformers by name.
        prompt: int64 [T]; a short one, as its forward is timed with the rest.
        tokens: New tokens of a run.
        repeats: Timed runs of each.
    """
    ready = {name: Model(model, fast=False) for name, model in models.items()}
    arms = {
        name: lambda each=each: each.generate(
            prompt, drafter="none", max_new_tokens=tokens, ignore_end=True
        )
        for name, each in ready.items()
    }
    found = ruler.compare(arms, repeats=repeats, warmup=1)
    first = next(iter(found.values()))
    return {name: (1e3 * t.median_s / tokens, ratio(first, t)) for name, t in found.items()}
