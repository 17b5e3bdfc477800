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

import torch

from isthmus.claims import Claim, Gate, Row, Ruler, Scale, judge
from isthmus.decoding.contrast import behind
from isthmus.decoding.dola import DoLa
from isthmus.decoding.early_logits import EarlyLogits
from isthmus.decoding.model import Model
from isthmus.decoding.reshape import Pure
from isthmus.decoding.target import HubTarget
from isthmus.decoding.tree import TokenTree
from isthmus.errors import InvalidInputError
from isthmus.models.hub import load_checkpoint
from isthmus.roles import Context
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


def candidates(logits: torch.Tensor, top_p: float, top_k: int) -> torch.Tensor:
    """The smallest set of likeliest tokens with that much probability, at most k, bool [..., V].

    Example:
        >>> candidates(torch.tensor([0.5, 0.3, 0.15, 0.05]).log(), 0.7, 3).tolist()
        [True, True, False, False]
    """
    values, index = torch.softmax(logits, -1).topk(min(top_k, logits.shape[-1]), dim=-1)
    inside = values.cumsum(-1) - values < top_p
    return torch.zeros_like(logits, dtype=torch.bool).scatter(-1, index, inside)


class Deco(Pure):
    """The correction as a reshape; drafts go with it, for its law at a node needs nothing else.

    Args:
        target: The model.
        settings: See :class:`Settings`.
        layers: Middle layers, instead of those of the settings.

    Attributes:
        anchors: Layer A of every node in the last call, int64 [B, N].

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
        self.settings = given = settings or Settings()
        if not (0 < given.top_p <= 1 and given.top_k >= 1 and 0 <= given.low <= given.high <= 1):
            raise InvalidInputError(f"deco needs 0 < top_p <= 1 and 0 <= low <= high <= 1: {given}")
        count = target.num_layers
        if layers is None:
            layers = [i for i in range(count) if given.low <= i / count <= given.high]
        if not layers:
            raise InvalidInputError(
                f"no layer of {count} lies between {given.low} and {given.high} of the depth; "
                "widen low and high"
            )
        self.early = EarlyLogits(target, layers)
        self.taps = self.early.taps
        self.anchors: torch.Tensor | None = None

    @classmethod
    def for_model(cls, model: Any) -> Deco:
        """For a loaded model."""
        return cls(model.target)

    def __call__(self, logits: torch.Tensor, tree: TokenTree, context: Context) -> torch.Tensor:
        """See :class:`isthmus.roles.Reshape`."""
        assert context.features is not None
        early = self.early(context.features).to(logits)  # [B, N, J, V]
        among = candidates(logits, self.settings.top_p, self.settings.top_k)
        sure = torch.softmax(early, -1).masked_fill(~among[:, :, None], 0.0).amax(-1)
        most, best = sure.max(-1)  # [B, N]
        self.anchors = torch.tensor(self.early.layers, device=best.device)[best]
        anchor = early.gather(2, best[..., None, None].expand(-1, -1, 1, early.shape[-1]))
        mixed = logits + self.settings.alpha * most[..., None] * anchor[:, :, 0]
        return behind(mixed.masked_fill(~among, -torch.inf), logits)


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
