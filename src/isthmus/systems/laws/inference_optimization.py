"""Which technique makes inference faster: predicted from the machine, then measured.

Paper: Park, Budhathoki, Chen, Kuebler, Huang, Kleindessner, Huan, Cevher, Wang, Karypis. Inference
    Optimization of Foundation Models on AI Accelerators. 2024. arXiv:2407.09111
Idea: Reading a prompt is bound by arithmetic and writing by memory, so what each technique gains
    follows from the FLOPs and bytes it saves, before anything is run.
Differs: The tutorial reports others' figures for accelerators. Here each technique is predicted
    from the roof of the machine at hand and, where it can be made without training, measured
    beside what it replaces. Mixtures of experts, tensor parallelism, paged caches and early exits
    are not measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from isthmus.claims import Claim, Gate, Row, Ruler, Scale, judge, ratio
from isthmus.decoding.goodput import expected_tokens
from isthmus.decoding.model import Model
from isthmus.decoding.target import HubTarget
from isthmus.laws.advice import (
    Technique,
    Workload,
    advise,
    chain_gain,
    time_to_first_s,
    token_s,
)
from isthmus.laws.opcount import Footprint
from isthmus.laws.roofline import Roof, dtype_name, measure
from isthmus.laws.trends import rank_correlation
from isthmus.workbench import pycode, untrained
from isthmus.workbench.bench import answer, reference_model
from isthmus.workbench.untrained import generating

CHAIN = 4
"""Draft tokens of the chain that is measured; its acceptance comes from shorter ones."""

TRIED = 3
"""Best predictions that are measured before advice is given."""

ADVISED = (
    "batch of 8",
    "half the layers",
    "half the width",
    "a quarter of the kv heads",
    "16-bit weights",
)
"""Techniques that are not in place and work on one and the same model."""


@dataclass(frozen=True)
class Settings:
    """Settings.

    Attributes:
        memory: Whether bytes take time; off, gains are predicted from FLOPs alone.
        dtype: How numbers are stored.
    """

    memory: bool = True
    dtype: str = "float32"


class InferenceOptimization:
    """A guide to techniques, for one machine.

    Args:
        roof: The machine; see :func:`isthmus.laws.roofline.roof_of`.
        settings: See :class:`Settings`.
    """

    role: ClassVar[str] = "study"

    def __init__(self, roof: Roof, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self.roof = roof if self.settings.memory else roof.without_wall()

    def advise(
        self, target: HubTarget, workload: Workload, measured: Mapping[str, float] | None = None
    ) -> list[Technique]:
        """Rank techniques for a model and a workload; see :func:`isthmus.laws.advice.advise`.

        Args:
            target: The model as it is.
            workload: What it is for.
            measured: Speed-ups that were measured, by the names of techniques.
        """
        return advise(
            Footprint.of(target),
            self.roof,
            workload,
            dtype=dtype_name(target.dtype),
            measured=measured,
        )

    def step_s(self, model: Footprint, cached: int, **forward: int) -> float:
        """The least seconds of one forward."""
        return token_s(model, self.roof, cached, dtype=self.settings.dtype, **forward)

    def first_s(self, model: Footprint, prompt: int, heads: int = 0) -> float:
        """The least seconds of reading a prompt, with ``heads`` heads that are not fused."""
        return time_to_first_s(model, self.roof, prompt, dtype=self.settings.dtype, heads=heads)


@dataclass(frozen=True)
class Pair:
    """A technique and what it replaces, to be timed and predicted.

    Attributes:
        without: Name of the run that it replaces.
        run: The run with it.
        gain: Its predicted speed-up, by a guide.
        tokens: Tokens that its run writes for one of the other run.
    """

    without: str
    run: Callable[[], object]
    gain: Callable[[InferenceOptimization], float]
    tokens: float = 1.0


def recomputing(target: HubTarget, length: int) -> Callable[[], object]:
    """Write one token without a cache: all tokens before it are run again."""
    ids = torch.ones(1, length, dtype=torch.int64)

    def run() -> object:
        return target.forward(ids, last_only=True)

    return run


def techniques(
    size: tuple[int, int], lengths: tuple[int, int, int], new: int
) -> tuple[dict[str, Callable[[], object]], dict[str, Pair]]:
    """Seven techniques on untrained models.

    Args:
        size: Width and layers of the model.
        lengths: Cached tokens of short, middle and long texts.
        new: Tokens that a run writes.

    Returns:
        Runs of the model as it is, and the techniques by name.
    """
    width, layers = size
    short, middle, long = lengths
    make: Any = untrained.decoder
    context = 2 * long
    plain = make(width, layers, context=context)
    unfused = make(width, layers, context=context)
    unfused.set_attn_implementation("eager")
    variants = {
        "a quarter of the kv heads": make(
            width, layers, context=context, kv_heads=max(1, width // 256)
        ),
        "half the layers": make(width, layers // 2, context=context),
        "half the width": make(width // 2, layers, context=context),
        "16-bit weights": make(width, layers, context=context).bfloat16(),
    }
    base = Model(plain).target
    whole = Footprint.of(base)
    before: dict[str, Callable[[], object]] = {
        "no cache": recomputing(base, middle + 1),
        "prompt, unfused": untrained.encoding(unfused, long),
        f"step after {short}": generating(base, new, short),
        f"step after {long}": generating(base, new, long),
    }
    pairs: dict[str, Pair] = {
        "key-value cache": Pair(
            "no cache",
            generating(base, new, middle),
            lambda g: g.first_s(whole, middle + 1) / g.step_s(whole, middle),
            tokens=new,
        ),
        "fused attention": Pair(
            "prompt, unfused",
            untrained.encoding(plain, long),
            lambda g: g.first_s(whole, long, layers * width // 64) / g.first_s(whole, long),
        ),
        "batch of 8": Pair(
            f"step after {short}",
            generating(base, new, short, batch=8),
            lambda g: 8 * g.step_s(whole, short) / g.step_s(whole, short, batch=8),
            tokens=8,
        ),
    }
    for name, model in variants.items():
        at = long if name == "a quarter of the kv heads" else short
        target = Model(model).target
        gain = _smaller(whole, Footprint.of(target), at)
        pairs[name] = Pair(f"step after {at}", generating(target, new, at), gain)
    return before, pairs


def _smaller(
    whole: Footprint, changed: Footprint, cached: int
) -> Callable[[InferenceOptimization], float]:
    return lambda guide: guide.step_s(whole, cached) / guide.step_s(changed, cached)


def acceptance_of(length: float, chain: int) -> float:
    """The acceptance rate whose expected tokens of a chain are ``length``, by bisection.

    Example:
        >>> round(acceptance_of(3.3616, 4), 4)
        0.8
    """
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if expected_tokens(middle, chain) < length else (low, middle)
    return low


def claim(ruler: Ruler, scale: Scale = "small") -> Claim:
    """Predict eight techniques and measure them: seven on untrained models, speculation on code.

    Args:
        ruler: The clock.
        scale: ``"small"`` is a model of 85M parameters and the reference model; ``"test"`` is far
            smaller.
    """
    small = scale != "test"
    size, lengths, new = ((768, 12), (16, 256, 1024), 8) if small else ((256, 2), (4, 16, 32), 2)
    repeats = 5 if small else 1
    roof = measure(dtypes=["float32"], budget_s=6.0 if small else 0.2)
    guide = InferenceOptimization(roof)
    flops_only = InferenceOptimization(roof, Settings(memory=False))

    before, pairs = techniques(size, lengths, new)
    times = ruler.compare(
        {**before, **{name: pair.run for name, pair in pairs.items()}}, repeats=repeats
    )
    predicted = {name: pair.gain(guide) for name, pair in pairs.items()}
    blind = {name: pair.gain(flops_only) for name, pair in pairs.items()}
    spread = {name: ratio(times[pair.without], times[name]) for name, pair in pairs.items()}
    gains = {name: spread[name].median * pair.tokens for name, pair in pairs.items()}
    notes = {
        name: f"[{r.low * pairs[name].tokens:.2f}, {r.high * pairs[name].tokens:.2f}]"
        for name, r in spread.items()
    }

    spec = _speculate(ruler, small, repeats=3 if small else 1)
    name = "speculative decoding"
    predicted[name], blind[name] = (spec.predict(g) for g in (guide, flops_only))
    gains[name], notes[name] = spec.gain, spec.note

    order = sorted(ADVISED, key=lambda n: -predicted[n])
    advised = max(order[:TRIED], key=lambda n: gains[n])
    reached = gains[advised] / max(gains[n] for n in ADVISED)
    ranks = [rank_correlation(p.values(), gains.values()) for p in (predicted, blind)]
    right = sum((predicted[n] > 1) == (gains[n] > 1) for n in gains)
    formula = spec.expected / spec.tokens_a_pass
    gates = (
        Gate("rank correlation of predicted and measured gains", ranks[0], ">=", 0.7),
        Gate("gains with the right sign, of 8", right, ">=", 7),
        Gate("the advised technique over the best one", reached, ">=", 0.9),
        Gate("tokens a pass, formula over measured, lower", formula, ">=", 0.85),
        Gate("tokens a pass, formula over measured, upper", formula, "<=", 1.15),
    )
    direction = Gate("rank correlation, direction", ranks[0], ">", 0.0)
    status = judge(gates, [direction, *gates[3:]])
    wrong = [n for n in gains if (predicted[n] > 1) != (gains[n] > 1)]
    return Claim(
        slug="inference-optimization",
        statement="What a technique gains is predicted in order and in sign by the bytes and FLOPs "
        "it saves, and the advice drawn from it is near the best.",
        paper_figure="a tutorial without figures of its own; (1 - a^(g+1)) / (1 - a) expected "
        "tokens of a draft of g",
        rows=(
            *(
                Row(f"speed-up, {n}", "x", predicted[n], gains[n], blind[n], note=notes[n])
                for n in sorted(gains, key=lambda n: -predicted[n])
            ),
            Row("rank correlation over 8 techniques", "", None, ranks[0], ranks[1]),
            Row(
                "tokens a pass",
                "tokens/forward",
                spec.expected,
                spec.tokens_a_pass,
                1.0,
                note=f"baseline: the formula with acceptance {spec.acceptance:.3f}, taken from "
                f"drafts of 2 on other prompts; ours: measured with drafts of {CHAIN}",
            ),
        ),
        scale=scale,
        device="cpu",
        status=status,
        reason=""
        if status == "reproduced"
        else f"wrong in sign: {', '.join(wrong) or 'none'}; what a step takes beside reading and "
        "multiplying is not predicted",
        notes=(
            "Baseline is the predicted gain, ours the measured one, off the one that FLOPs alone "
            "predict.",
            f"Advised after measuring the {TRIED} best predictions: {advised}.",
            f"Memory {roof.memory.best / 1e9:.3g} GB/s, spread {roof.memory.spread:.2f}; float32 "
            f"products {roof.peak('float32').best / 1e9:.3g} GFLOP/s; {roof.threads} threads.",
            "Quality is not compared: the models are untrained, and a smaller one is a worse one.",
        ),
        gates=(*gates, direction),
        seeds=(0,),
    )


@dataclass(frozen=True)
class _Speculation:
    """Speculative decoding with a draft model, measured."""

    target: Footprint
    draft: Footprint
    acceptance: float
    expected: float
    tokens_a_pass: float
    gain: float
    note: str

    def predict(self, guide: InferenceOptimization) -> float:
        one = guide.step_s(self.target, 64)
        check = guide.step_s(self.target, 64, nodes=CHAIN + 1) / one
        return chain_gain(self.acceptance, CHAIN, guide.step_s(self.draft, 64) / one, check)


def _speculate(ruler: Ruler, small: bool, *, repeats: int) -> _Speculation:
    model = reference_model("pycode-t", "pycode-s")
    count, new = (12, 32) if small else (2, 8)
    prompts = pycode.prompts(2 * count, model.tokenizer, 48)
    seen, held_out = prompts[:count], prompts[count:]

    def run(chosen: Sequence[Sequence[int]], draft_tokens: int) -> Any:
        policy = (
            model.policy("speculative-sampling", draft_tokens)
            if draft_tokens
            else model.policy("none")
        )
        return answer(model, chosen, policy, max_new_tokens=new)

    acceptance = acceptance_of(run(seen, 2).acceptance_length(), 2)
    found = run(held_out, CHAIN).acceptance_length()
    times = ruler.compare(
        {"plain": lambda: run(held_out, 0), "draft": lambda: run(held_out, CHAIN)}, repeats=repeats
    )
    speedup = ratio(times["plain"], times["draft"])
    assert model.draft_model is not None
    return _Speculation(
        Footprint.of(model.target),
        Footprint.of(model.draft_model),
        acceptance,
        float(expected_tokens(acceptance, CHAIN)),
        found,
        speedup.median,
        f"[{speedup.low:.2f}, {speedup.high:.2f}], pycode-t with pycode-s",
    )
