"""What a change to a model or to its use would gain, in closed form, before anything is run.

>>> round(float(expected_tokens(0.8, 4)), 4)  # of a chain of 4 that stands with chance 0.8 each
3.3616
>>> round(chain_gain(0.8, 4, 0.1), 3), best_chain(0.8, 0.1), best_chain(0.3, 0.5)
(2.401, 6, 0)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from isthmus.decoding.goodput import expected_tokens
from isthmus.errors import InvalidInputError
from isthmus.laws.opcount import Footprint, Work
from isthmus.laws.roofline import Roof

__all__ = [
    "Technique",
    "Workload",
    "advise",
    "best_chain",
    "chain_gain",
    "expected_tokens",
    "largest_batch",
    "page_waste",
    "time_to_first_s",
    "token_s",
]

MAX_CHAIN = 16
"""Longest draft that is considered."""


@dataclass(frozen=True)
class Workload:
    """What a model is to be used for.

    Attributes:
        prompt: Tokens of a prompt.
        new: Tokens to write after it.
        goal: ``"latency"`` is seconds of one request, ``"throughput"`` tokens/s of many.
        memory_bytes: What weights and cache may take.
        acceptance: Chance that a draft token stands, where there is a drafter.
        draft_cost: Time of a draft token over that of a target's forward.

    Raises:
        InvalidInputError: A number is out of range.
    """

    prompt: int
    new: int
    goal: Literal["latency", "throughput"] = "latency"
    memory_bytes: float = math.inf
    acceptance: float = 0.0
    draft_cost: float = 0.0

    def __post_init__(self) -> None:
        if min(self.prompt, self.new) < 1 or self.goal not in ("latency", "throughput"):
            raise InvalidInputError(
                "a workload has a prompt and new tokens of at least 1 and the goal latency or "
                f"throughput, got {self.prompt}, {self.new} and {self.goal!r}"
            )
        if not (0.0 <= self.acceptance <= 1.0 and self.draft_cost >= 0.0 < self.memory_bytes):
            raise InvalidInputError(
                "acceptance lies within 0 and 1, draft_cost is 0 or more and memory_bytes above "
                f"0, got {self.acceptance:g}, {self.draft_cost:g} and {self.memory_bytes:g}"
            )


@dataclass(frozen=True)
class Technique:
    """One thing that could be done.

    Attributes:
        name: What it is.
        gain: Predicted speed-up of what the workload asks for; below 1 it hurts.
        reason: Why, in one sentence.
        exact: Whether the model's output stays what it is.
        fits: Whether weights and cache stay within the workload's memory.
        measured: Speed-up that was measured, where it was.
    """

    name: str
    gain: float
    reason: str
    exact: bool = True
    fits: bool = True
    measured: float | None = field(default=None)

    @property
    def known(self) -> float:
        """The measured gain, else the predicted one."""
        return self.gain if self.measured is None else self.measured


def token_s(
    model: Footprint, roof: Roof, cached: int, *, dtype: str, batch: int = 1, nodes: int = 1
) -> float:
    """The least seconds of one forward of ``nodes`` tokens of each row on ``cached`` ones."""
    return roof.floor_s(model.forward(nodes, cached, batch=batch), dtype)


def time_to_first_s(
    model: Footprint, roof: Roof, prompt: int, *, dtype: str, heads: int = 0
) -> float:
    """The least seconds of reading a prompt.

    Args:
        model: The model.
        roof: The machine.
        prompt: Tokens T of the prompt.
        dtype: How numbers are stored.
        heads: Query heads of all layers whose attention is not fused: their scores [T, T] are
            written and read by a product, a mask, a softmax and a product, 8 passes; 0 is fused.
    """
    scores = Work(0, 8.0 * heads * prompt**2 * 4)
    reading = model.forward(prompt)
    return roof.floor_s(reading, dtype) + (roof.floor_s(scores, dtype) if heads else 0.0)


def chain_gain(acceptance: float, length: int, draft_cost: float, check_cost: float = 1.0) -> float:
    """Speed-up of speculative decoding: expected tokens over what a round costs.

    ``(1 - a^(g + 1)) / (1 - a) / (g c + v)``

    Args:
        acceptance: Chance a that a draft token stands.
        length: Draft tokens g.
        draft_cost: Time c of a draft token over that of a forward of one token.
        check_cost: Time v of a forward of g + 1 tokens over that of one; 1 where memory decides.
    """
    return float(expected_tokens(acceptance, length)) / (length * draft_cost + check_cost)


def best_chain(acceptance: float, draft_cost: float) -> int:
    """The whole number of draft tokens that gains most; 0 is plain decoding."""
    return max(range(MAX_CHAIN + 1), key=lambda g: chain_gain(acceptance, g, draft_cost))


def largest_batch(model: Footprint, tokens: int, memory_bytes: float) -> int:
    """Rows of so many tokens whose keys and values fit beside the weights; 0 if none does.

    Raises:
        InvalidInputError: A row takes nothing, or memory has no end.

    Example:
        >>> largest_batch(Footprint(7e9, 14e9, cache_bytes=2**19), 4096, 24e9)
        4
    """
    row = model.cache_bytes * tokens
    if not (row > 0 and math.isfinite(memory_bytes)):
        raise InvalidInputError(
            f"rows of {row:g} bytes in {memory_bytes:g} bytes of memory: give a model with a "
            "cache, at least one token and a finite memory"
        )
    return max(0, int((memory_bytes - model.weight_bytes) // row))


def page_waste(tokens: int, page: int = 16) -> float:
    """Share of a paged cache that is held and not used: less than one page of each text.

    Example:
        >>> page_waste(17, page=16)
        0.46875
    """
    held = math.ceil(tokens / page) * page
    return 1.0 - tokens / held


def advise(
    model: Footprint,
    roof: Roof,
    workload: Workload,
    *,
    dtype: str = "float32",
    measured: Mapping[str, float] | None = None,
) -> list[Technique]:
    """Rank what could be done for a workload; what was measured counts more than a prediction.

    A key-value cache and fused attention are taken to be in place. Prefill and generation are
    added up, not averaged.

    Args:
        model: The model as it is.
        roof: The machine.
        workload: What it is for.
        dtype: How numbers are stored.
        measured: Speed-ups that were measured, by the names of techniques.

    Returns:
        Techniques, the best first; those that do not fit into memory last.
    """
    w = workload
    length = w.prompt + w.new
    middle = w.prompt + (w.new - 1) // 2

    def request_s(m: Footprint, batch: int = 1) -> float:
        """Seconds of one request of a batch: the work is linear in the cached tokens."""
        prefill = roof.floor_s(m.forward(w.prompt, batch=batch), dtype)
        steps = (w.new - 1) * token_s(m, roof, middle, dtype=dtype, batch=batch)
        return (prefill + steps) / (batch if w.goal == "throughput" else 1)

    def fits(m: Footprint, batch: int = 1) -> bool:
        return m.weight_bytes + batch * m.cache_bytes * length <= w.memory_bytes

    whole = request_s(model)
    found: list[Technique] = []

    def add(name: str, seconds: float, reason: str, *, exact: bool, fits: bool) -> None:
        told = (measured or {}).get(name)
        found.append(Technique(name, whole / seconds, reason, exact, fits, told))

    bits = round(8 * model.weight_bytes / model.weights)
    for narrow in (16, 8, 4):
        if narrow < bits:
            m = replace(model, weight_bytes=model.weights * narrow / 8)
            why = f"a step reads {bits / narrow:g} times fewer bytes of weights"
            add(f"{narrow}-bit weights", request_s(m), why, exact=False, fits=fits(m))
    grouped = replace(model, cache_bytes=model.cache_bytes / 4)
    share = model.cache_bytes * length / (model.cache_bytes * length + model.weight_bytes)
    why = f"the cache is {share:.0%} of what a step reads at the end"
    add("a quarter of the kv heads", request_s(grouped), why, exact=False, fits=fits(grouped))
    window = replace(model, window=min(1024, w.prompt))
    why = f"a step looks back {window.window} tokens"
    add("sliding window", request_s(window), why, exact=False, fits=fits(window))
    half = _scaled(model, 0.5)
    why = "half the weights, half the cache, half the FLOPs"
    add("half the layers", request_s(half), why, exact=False, fits=fits(half))
    for batch in (8, 32):
        why = "weights are read once for all rows, until FLOPs decide"
        add(f"batch of {batch}", request_s(model, batch), why, exact=True, fits=fits(model, batch))
    if w.acceptance:
        chain = best_chain(w.acceptance, w.draft_cost)
        one = token_s(model, roof, middle, dtype=dtype)
        check = token_s(model, roof, middle, dtype=dtype, nodes=chain + 1) / one
        gain = chain_gain(w.acceptance, chain, w.draft_cost, check)
        prefill = time_to_first_s(model, roof, w.prompt, dtype=dtype)
        why = f"{float(expected_tokens(w.acceptance, chain)):.2f} tokens a pass, drafts of {chain}"
        seconds = prefill + (whole - prefill) / gain
        add("speculative decoding", seconds, why, exact=True, fits=fits(model))
    return sorted(found, key=lambda t: (not t.fits, -t.known))


def _scaled(model: Footprint, share: float) -> Footprint:
    """A model with a share of the layers."""
    return replace(
        model,
        weights=model.weights * share,
        weight_bytes=model.weight_bytes * share,
        cache_bytes=model.cache_bytes * share,
        attention=model.attention * share,
    )
