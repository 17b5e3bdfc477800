"""Asymmetric pruning: layers go from the decoder, which writes, and stay in the encoder.

Paper: D. Campos, C. Zhai, "To Asymmetry and Beyond: Structured Pruning of Sequence to Sequence
    Models for Improved Inference Efficiency", 2023, arXiv:2304.02721
Idea: An encoder layer runs once a text and a decoder layer once a token: fewer decoder layers buy
    nearly all of the time, fewer encoder layers cost nearly all of the quality.
Differs: Beside layers spread evenly there is a greedy choice by calibration loss. Dates take the
    place of summaries, nats and exact answers that of Rouge-2; the grid is its corners.

::

    source ──▶ encoder 0 1 2 3 4 5 ──▶ decoder 0 . . . . 5 ──▶ text        6+2, then tuned again
                  once                       every token
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
from transformers import MBartConfig, MBartForConditionalGeneration

from isthmus.claims import Claim, Gate, Row, Ruler, Scale, judge, ratio
from isthmus.decoding.model import Model
from isthmus.errors import InvalidInputError, UnsupportedModelError
from isthmus.lenses.sites import stacks
from isthmus.models.hub import load_checkpoint
from isthmus.surgery.base import Change, Cost, Plan, Report, Steps, check_budget, fingerprint
from isthmus.surgery.blocks import bypassed, evenly, greedy, keep_blocks
from isthmus.surgery.calibration import Calibration
from isthmus.workbench import dates, reference
from isthmus.workbench._tasks import DatesCourse, TaskRecipe
from isthmus.workbench.courses import made

SLUG = "asymmetric-pruning"


@dataclass(frozen=True)
class Settings:
    """Settings.

    Attributes:
        side: Which layers go: ``decoder`` (the idea), ``encoder``, or ``both``.
        choice: ``even``: the layers that stay are spread evenly, first and last among them;
            ``greedy``: the least harmful goes, again and again.
    """

    side: str = "decoder"
    choice: str = "even"

    def __post_init__(self) -> None:
        for name, allowed in (
            ("side", ("decoder", "encoder", "both")),
            ("choice", ("even", "greedy")),
        ):
            if getattr(self, name) not in allowed:
                raise InvalidInputError(
                    f"{name} is one of {', '.join(allowed)}, not {getattr(self, name)!r}"
                )


class AsymmetricPruning:
    """Takes whole layers out of an encoder-decoder model.

    Args:
        settings: See :class:`Settings`.

    Example:
        >>> AsymmetricPruning().count(6, 1 / 3), evenly(6, 2)
        (2, [0, 5])
    """

    role: ClassVar[str] = "surgery"
    keeps: ClassVar[str] = "layers of the decoder (or of the side that is chosen)"

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()

    def count(self, layers: int, budget: float) -> int:
        """How many layers of a stack stay.

        Raises:
            InvalidInputError: None would, or all although the budget is below 1.
        """
        kept = round(budget * layers)
        if kept < 1 or (kept == layers and budget < 1):
            raise InvalidInputError(
                f"a budget of {budget:g} keeps {'no' if kept < 1 else 'all'} layers of {layers}; "
                f"give {1 / layers:.3g}, {2 / layers:.3g} ... or {(layers - 1) / layers:.3g}"
            )
        return kept

    def plan(
        self, model: Any, data: Calibration, budget: float, steps: Steps | None = None
    ) -> Plan:
        """Choose the layers that stay."""
        check_budget(budget, self.keeps)
        found = stacks(model)
        if set(found) != {"enc", "dec"}:
            raise UnsupportedModelError(
                f"{type(model).__name__} has no encoder and decoder to treat unlike; give an "
                "encoder-decoder model"
            )
        sides = {"decoder": ("dec",), "encoder": ("enc",), "both": ("enc", "dec")}
        counts = {s: self.count(len(found[s]), budget) for s in sides[self.settings.side]}
        notes: dict[str, Any] = {}
        if self.settings.choice == "even":
            keep = {s: evenly(len(found[s]), n) for s, n in counts.items()}
        else:
            keep, notes = self._greedy(model, data, found, counts, steps or Steps())
        tensors = {s: torch.tensor(numbers) for s, numbers in keep.items()}
        who = (SLUG, budget, fingerprint(model), data.fingerprint, asdict(self.settings))
        return Plan(*who, notes={"keep": keep, **notes}, tensors=tensors)

    def apply(self, model: Any, plan: Plan) -> Report:
        """Take the other layers out."""
        plan.check(model, SLUG)
        places = {s: layers[0].rsplit(".", 1)[0] for s, layers in stacks(model).items()}
        before = {s: Cost.of(model.get_submodule(path)) for s, path in places.items()}
        keep_blocks(model, {s: numbers.tolist() for s, numbers in plan.tensors.items()})
        changes = [
            Change(places[s], before[s], Cost.of(model.get_submodule(places[s])))
            for s in plan.tensors
        ]
        note = "tune the model again on its task: layers that were taken out are missed"
        return Report(SLUG, tuple(changes), notes=(note,) if plan.budget < 1 else ())

    def _greedy(
        self,
        model: Any,
        data: Calibration,
        found: dict[str, list[str]],
        counts: dict[str, int],
        steps: Steps,
    ) -> tuple[dict[str, list[int]], dict[str, Any]]:
        def loss(gone: tuple[str, ...]) -> float:
            with bypassed(model, gone):
                return data.loss(model)

        def allowed(gone: tuple[str, ...]) -> bool:
            return all(len(set(found[s]) - set(gone)) >= n for s, n in counts.items())

        candidates = [path for s in counts for path in found[s]]
        number = len(candidates) - sum(counts.values())
        went = greedy(candidates, loss, number, steps, allowed=allowed)
        keep = {
            s: [i for i, path in enumerate(found[s]) if path not in went.removed] for s in counts
        }
        return keep, {"removed": went.removed, "losses": went.losses, "gaps": went.gaps}


# the claim --------------------------------------------------------------------------------------

_WHOLE = replace(
    reference.RECIPES["dates-s"], name="dates-6-6", num_hidden_layers=6, steps=300
)  # the sizes of dates-s, six layers on either side
_AGAIN: dict[str, Any] = {
    "steps": 60,
    "muon_lr": 0.005,
    "adam_lr": 0.001,
    "warmup_steps": 5,
    "decay_share": 0.7,
}
_CELLS = {
    "6+6": (1.0, Settings()),
    "6+2": (1 / 3, Settings()),
    "2+6": (1 / 3, Settings(side="encoder")),
    "2+2": (1 / 3, Settings(side="both")),
    "6+1": (1 / 6, Settings()),
    "1+6": (1 / 6, Settings(side="encoder")),
    "6+2, greedy": (1 / 3, Settings(choice="greedy")),
}


class _Again(DatesCourse):
    """The same course for a model that has learnt before."""

    def __init__(self, recipe: TaskRecipe, model: Any) -> None:
        super().__init__(recipe)
        self.model = model

    def build(self) -> Any:
        """The model as it is."""
        return self.model


def claim(ruler: Ruler, scale: Scale = "small") -> Claim:
    """Prune a translator of dates on either side, tune it again, and time what is left."""
    small = scale != "test"
    assert isinstance(_WHOLE, TaskRecipe)
    whole = replace(_WHOLE, encoder_layers=6)
    tuning = replace(whole, **_AGAIN)
    if not small:
        tiny: dict[str, Any] = {
            "hidden_size": 24,
            "num_attention_heads": 1,
            "head_dim": 24,
            "batch_size": 8,
        }
        whole = replace(whole, name="dates-6-6-t", steps=4, intermediate_size=24, **tiny)
        tuning = replace(whole, steps=2)
    course, held_out = DatesCourse(whole), 400 if small else 10
    told = dates.examples(128 if small else 8, "train", seed="asymmetric")
    asked = dates.examples(held_out, "held-out", seed="asymmetric")

    def samples(examples: Sequence[Any], name: str) -> Calibration:
        pairs = [(e.source, e.target) for e in examples]
        return Calibration.of_pairs(
            pairs, course.tokenizer, course.start, samples=len(pairs), batch=64, source=name
        )

    data, valid = samples(told, "train"), samples(asked, "held-out")
    data.check_apart(valid)

    def learnt(recipe: TaskRecipe, start: Any, name: str) -> Any:
        """A model after its course, from fresh weights or from those of another."""
        recipe = replace(recipe, name=f"{whole.name}-{name}".replace(", ", "-"))
        what = DatesCourse(recipe) if start is None else _Again(recipe, start)
        known = "" if start is None else fingerprint(start)
        place = made(recipe, what, what.tokenizer, corpus=recipe.digest() + known, end=what.end)
        return load_checkpoint(str(place), dtype="float32", device="cpu").model

    first = learnt(whole, None, "whole")
    nats, exact = {}, {}
    for name, (budget, settings) in _CELLS.items():
        model, surgeon = copy.deepcopy(first), AsymmetricPruning(settings)
        surgeon.apply(model, surgeon.plan(model, data, budget))
        model = learnt(tuning, model, name)
        nats[name], exact[name] = valid.loss(model), _exact(model, valid)
    steps = whole.steps + tuning.steps
    scratch = learnt(replace(whole, num_hidden_layers=2, steps=steps), None, "scratch")
    nats["6+2, from scratch"], exact["6+2, from scratch"] = (
        valid.loss(scratch),
        _exact(scratch, valid),
    )
    return _judged(nats, exact, _speeds(ruler, small), scale)


def _exact(model: Any, data: Calibration) -> float:
    """Share of answers that are right: greedy decoding is, where every token told so far is."""
    right = []
    with torch.no_grad():
        for batch in data.batches:
            given = {k: v for k, v in batch.items() if k != "labels"}
            best = model(**given, use_cache=False).logits.argmax(-1)
            right.append(((best == batch["labels"]) | (batch["labels"] < 0)).all(1))
    return float(torch.cat(right).double().mean())


def _speeds(ruler: Ruler, small: bool) -> dict[str, float]:
    """Speed-up of decoding 40 tokens at batch 1, over 6+6; wider layers with random weights."""
    width = 512 if small else 32
    config = MBartConfig(
        vocab_size=1024,
        d_model=width,
        encoder_layers=6,
        decoder_layers=6,
        encoder_attention_heads=width // 32,
        decoder_attention_heads=width // 32,
        encoder_ffn_dim=2 * width,
        decoder_ffn_dim=2 * width,
        max_position_embeddings=128,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        whole = MBartForConditionalGeneration(config).eval()
    models, cuts = {}, {"6+6": {}, "6+1": {"dec": [0]}, "1+6": {"enc": [0]}}
    for name, keep in cuts.items():
        models[name] = copy.deepcopy(whole)
        keep_blocks(models[name], keep)
    engines = {name: Model(model) for name, model in models.items()}
    source = torch.arange(5, 21)

    def write(name: str) -> Callable[[], Any]:
        options: dict[str, Any] = {"drafter": "none", "ignore_end": True}
        return lambda: engines[name].generate(source, max_new_tokens=40, **options)

    timed = ruler.compare({name: write(name) for name in engines}, repeats=7 if small else 1)
    return {name: ratio(timed["6+6"], timed[name]).median for name in ("6+1", "1+6")}


def _judged(
    nats: dict[str, float], exact: dict[str, float], speed: dict[str, float], scale: Scale
) -> Claim:
    lost = {name: value - nats["6+6"] for name, value in nats.items()}
    share = lost["6+2"] / lost["2+6"] if lost["2+6"] > 0 else math.inf
    gates = (
        Gate("nats lost, 6+2 as a share of 2+6", share, "<=", 0.5),
        Gate("decoding, 6+1 over 6+6", speed["6+1"], ">=", 2.5),
        Gate("decoding, 1+6 over 6+6", speed["1+6"], "<=", 1.15),
        Gate("nats, 6+2 greedy less even", nats["6+2, greedy"] - nats["6+2"], "<=", 0.0),
    )
    rows = (
        Row("loss", "nats/token", nats["6+6"], nats["6+2"], nats["2+6"], control=nats["2+2"]),
        Row("exact", "of dates", exact["6+6"], exact["6+2"], exact["2+6"], control=exact["2+2"]),
        Row("loss, one layer", "nats/token", nats["6+6"], nats["6+1"], nats["1+6"]),
        Row("exact, one layer", "of dates", exact["6+6"], exact["6+1"], exact["1+6"]),
        Row("loss, greedy 6+2", "nats/token", nats["6+2"], nats["6+2, greedy"], None),
        Row(
            "loss, 6+2 from scratch",
            "nats/token",
            nats["6+2, from scratch"],
            nats["6+2"],
            None,
            note="baseline: a 6+2 model that never had more layers, as many steps in all",
        ),
        Row(
            "decoding",
            "x of 6+6",
            1.0,
            speed["6+1"],
            speed["1+6"],
            note="ours: 6+1, off: 1+6; 40 tokens at batch 1, 512 wide, random weights",
        ),
    )
    return Claim(
        slug=SLUG,
        statement="Layers of the decoder are cheap to lose and cost the time; layers of the "
        "encoder are dear and cost none.",
        paper_figure="nearly 3x at about 1 point of Rouge-2 (abstract)",
        rows=rows,
        scale=scale,
        device="cpu",
        status=judge(gates, (gates[1], gates[2], replace(gates[0], bound=1.0))),
        gates=gates,
        seeds=(0,),
        notes=(
            "baseline: 6+6, tuned as long; off: the encoder is pruned instead; control: both are",
            "every model was tuned for the same steps after the cut",
        ),
    )
