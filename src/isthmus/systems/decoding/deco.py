"""DeCo: when the last layers let habit speak, mix the most confident middle layer back in.

Paper: C. Wang, X. Chen, N. Zhang, B. Tian, H. Xu, S. Deng, H. Chen, "MLLM can see? Dynamic
    Correction Decoding for Hallucination Mitigation", 2024, arXiv:2410.11779
Idea: Middle layers often know that an object is absent while the last ones, full of language prior,
    name it. Among the tokens that the last layer finds likely, the most confident middle layer
    corrects its logits.
Differs: The captioner is a small model whose prior is planted in its last block, and its patches
    are symbols, not vectors. Layers are given as shares of the depth.

    V_c    <- top-p of the last layer, within its top-k
    z_i    <- head(norm(h_i)), layers a..b;   A <- argmax_i max_(v in V_c) softmax(z_i)[v] = m
    z'     <- z_L + alpha m z_A on V_c
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from isthmus.claims import Claim, Gate, Row, Ruler, Scale, judge
from isthmus.decoding.correction import Correction
from isthmus.decoding.dola import DoLa
from isthmus.decoding.model import Model
from isthmus.decoding.target import HubTarget
from isthmus.models.hub import load_checkpoint
from isthmus.workbench import captions


@dataclass(frozen=True)
class Settings:
    """Settings of the correction.

    Attributes:
        alpha: How much of the middle layer is mixed in; 0 switches the idea off.
        top_p: Probability of the candidates.
        top_k: Candidates at most.
        low: First middle layer, as a share of the depth (20 of 32).
        high: Last middle layer (28 of 32).
    """

    alpha: float = 0.6
    top_p: float = 0.9
    top_k: int = 20
    low: float = 0.625
    high: float = 0.875


class Deco(Correction):
    """The correction with its settings.

    Args:
        target: The model.
        settings: See :class:`Settings`.
        layers: Middle layers, instead of those of the settings.

    Raises:
        InvalidInputError: A setting out of range, or no layer between ``low`` and ``high``.
        UnsupportedModelError: The model's early layers cannot be read.
    """

    role: ClassVar[str] = "reshape"

    def __init__(
        self,
        target: HubTarget,
        settings: Settings | None = None,
        layers: Sequence[int] | None = None,
    ) -> None:
        self.settings = settings or Settings()
        super().__init__(target, **vars(self.settings), layers=layers)

    @classmethod
    def for_model(cls, model: Any) -> Deco:
        """For a loaded model."""
        return cls(model.target)


def claim(ruler: Ruler, scale: Scale = "small") -> Claim:
    """Objects that are named and not there, in scenes against a planted habit."""
    small = scale != "test"
    recipe = captions.RECIPE if small else replace(captions.RECIPE, steps=40)
    checkpoint = load_checkpoint(str(captions.reference(recipe)), dtype="float32")
    model = Model(checkpoint.model, checkpoint.tokenizer)
    rng = random.Random(11)
    scenes = [captions.counterfactual(rng) for _ in range(600 if small else 12)]
    layers = list(captions.EARLY)
    plain = captions.measure(model, scenes)
    ours = captions.measure(model, scenes, Deco(model.target, layers=layers))
    off = captions.measure(model, scenes, Deco(model.target, Settings(alpha=0.0), layers=layers))
    low = captions.measure(model, scenes, Deco(model.target, layers=[0, 1]))
    rival = captions.measure(model, scenes, DoLa(model.target, layers, norm=True))
    strengths = {
        a: captions.measure(
            model, scenes, Deco(model.target, Settings(alpha=a), layers=layers)
        ).chair_i
        for a in (0.3, 1.0, 2.0)
    }
    saved = 1 - ours.chair_i / plain.chair_i if plain.chair_i else None
    gates = (
        Gate("planted prior: CHAIR_i, greedy", plain.chair_i, ">=", 0.05),
        Gate("CHAIR_i, relative fall", saved, ">=", 0.5),
        Gate("recall lost, points", 100 * (plain.recall - ours.recall), "<=", 1),
        Gate("idea off: CHAIR_i as greedy", abs(off.chair_i - plain.chair_i), "<=", 1e-9),
    )
    direction = (Gate("CHAIR_i, relative fall", saved, ">", 0),)
    told = ", ".join(f"{a:g}: {value:.3f}" for a, value in strengths.items())
    return Claim(
        slug="deco",
        statement="Where the last block goes by habit, the most confident middle layer takes out "
        "at least half of the objects that are named and not there.",
        paper_figure="fewer hallucinated objects on CHAIR, POPE and MME than greedy, beam, DoLa, "
        "VCD and OPERA",
        rows=(
            Row(
                "CHAIR_i",
                "",
                plain.chair_i,
                ours.chair_i,
                off.chair_i,
                control=low.chair_i,
                note="baseline: greedy; control: layers 0 and 1",
            ),
            Row("CHAIR_s", "", plain.chair_s, ours.chair_s, off.chair_s, control=low.chair_s),
            Row("recall", "", plain.recall, ours.recall, off.recall, control=low.recall),
            Row(
                "CHAIR_i, DoLa",
                "",
                plain.chair_i,
                rival.chair_i,
                None,
                note=f"recall {rival.recall:.3f}",
            ),
        ),
        scale=scale,
        device="cpu",
        status=judge(gates, direction),
        gates=gates,
        seeds=(11,),
        notes=(f"CHAIR_i by alpha: {told}.",),
    )
