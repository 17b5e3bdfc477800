"""Jakiro: two experts whose gated sum is the next feature and whose difference the one after.

Paper: Huang, Yang, Liu, Zhang, Wang, Cui. Jakiro: Boosting Speculative Decoding with Decoupled
    Multi-Head via MoE. 2025. arXiv:2502.06282
Idea: The feed-forward of EAGLE's layer becomes two experts with two gates. The sum of the experts
    drafts the next token; their contrast drafts the token after it from the same pass, so the last
    level of a draft costs no pass.
Differs: The released model's way of mixing the experts, not the abstract's, which speaks of
    separate candidates. The last level reads the second state of each node's own parent row; the
    release reads rows by place. The learning rate is the recipe's.
Lossless: yes

    r ──> expert 1, expert 2 ──> r + w_1 e_1 + w_2 e_2  ──head──> q(next)
                            └──> r + w'_M e_M - w'_m e_m ──head──> q(next but one)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from isthmus.claims import Claim, Gate, Row, Ruler, Scale, judge
from isthmus.decoding.builders import Level
from isthmus.decoding.feature_drafter import (
    FeatureDrafter,
    FusedLayer,
    counted,
    of_parents,
    relative_cost,
)
from isthmus.decoding.policy import Fixed
from isthmus.decoding.target import HubTarget
from isthmus.decoding.trained import Batch
from isthmus.decoding.tree import TokenTree
from isthmus.nn.decoder import GatedFeedForward, Store
from isthmus.objectives.distillation import feature_noise, shifted, smooth_l1, soft_cross_entropy
from isthmus.roles import Context, Shape
from isthmus.training.drafting import Recipe, acceptance_length
from isthmus.workbench.bench import answer, repeats_itself
from isthmus.workbench.drafters import curve_note, reference_drafter, target_model, texts


@dataclass(frozen=True)
class Settings:
    """Settings of Jakiro.

    Attributes:
        second_token: Draft the last level from the second state (the idea); off, by a pass.
        contrast: The second state is the difference of the experts; off, a second sum.
        expert_size: Width inside an expert; the target's hidden size when None.
        second_weight: Weight of the second state's loss.
        noise: Uniform noise on the training features.
        feature_weight: Weight of the feature loss.
        token_weight: Weight of the loss on the drafted distribution.
        top_k: Children of a node and nodes expanded on a level.
        depth: Levels.
        nodes: Draft nodes a round.
    """

    second_token: bool = True
    contrast: bool = True
    expert_size: int | None = None
    second_weight: float = 0.5
    noise: float = 0.2
    feature_weight: float = 1.0
    token_weight: float = 0.1
    top_k: int = 10
    depth: int = 7
    nodes: int = 60


class DecoupledExperts(nn.Module):
    """Two experts under two pairs of gates.

    Args:
        width: Width D outside.
        inner: Width inside an expert.
        contrast: Whether the second output is a difference.
    """

    def __init__(self, width: int, inner: int, contrast: bool = True) -> None:
        super().__init__()
        self.experts = nn.ModuleList(GatedFeedForward(width, inner) for _ in range(2))
        self.router = nn.Linear(width, 4, bias=False)
        self.contrast = contrast

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [B, N, D] to what is added for the next and the second token, [2, B, N, D]."""
        out = torch.stack([expert(x) for expert in self.experts], -2)  # [B, N, 2, D]
        logits = self.router(x)
        first, second = (torch.softmax(pair, -1) for pair in logits.split(2, -1))
        if self.contrast:  # the stronger expert minus the weaker one, each with its weight
            second = torch.where(second == second.amax(-1, keepdim=True), second, -second)
        return torch.stack([(gate[..., None] * out).sum(-2) for gate in (first, second)])


class Jakiro(FeatureDrafter):
    """EAGLE with decoupled experts; a row gives two features, side by side."""

    name = "jakiro"
    settings_type = Settings
    settings: Settings
    states = 2

    def __init__(self, target: HubTarget, settings: Settings | None = None) -> None:
        super().__init__(target, settings)
        s, width = self.settings, self.sizes.hidden_size
        self.body = FusedLayer(
            self.sizes, DecoupledExperts(width, s.expert_size or width, s.contrast)
        )
        self._levels = self.max_depth

    @property
    def default_shape(self) -> Shape:
        """The tree of the settings."""
        return Shape(self.settings.nodes, self.settings.depth, self.settings.top_k)

    def branch(self) -> tuple[int, int]:
        """As EAGLE-2."""
        return self.settings.top_k, self.settings.top_k

    def step(
        self,
        tokens: torch.Tensor,
        feature: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor | None = None,
        store: Store | None = None,
    ) -> torch.Tensor:
        """Both features of each row, [B, N, 2D]; the first one is fed back."""
        first = feature[..., : self.sizes.hidden_size]
        both = super().step(tokens, first, positions, mask, store)  # [2, B, N, D]
        return torch.cat([both[0], both[1]], -1)

    def logits(self, g: torch.Tensor) -> torch.Tensor:
        """Logits of the next token [..., V]."""
        return super().logits(g[..., : self.sizes.hidden_size])

    def second_logits(self, g: torch.Tensor) -> torch.Tensor:
        """Logits of the token after the next one [..., V]."""
        return super().logits(g[..., self.sizes.hidden_size :])

    def loss(self, batch: Batch) -> torch.Tensor:
        """EAGLE's loss on both states, the second one against what is one further."""
        s, width = self.settings, self.sizes.hidden_size
        (g,) = self.rollout(batch, feature_noise(batch.final, batch.generator, s.noise), 1)
        total = g.new_zeros(())
        for shift, weight, state, logits in (
            (1, 1.0, g[..., :width], self.logits(g)),
            (2, s.second_weight, g[..., width:], self.second_logits(g)),
        ):
            mask = batch.before(shift)
            feature = smooth_l1(shifted(batch.final, shift), state, mask)
            token = soft_cross_entropy(shifted(batch.target_logits, shift), logits, mask)
            total = total + weight * (s.feature_weight * feature + s.token_weight * token)
        return total

    def propose(self, context: Context, shape: Shape) -> TokenTree:
        """Remember which level is the last."""
        self._levels = min(shape.depth, shape.nodes, self.max_depth)
        return super().propose(context, shape)

    def expand(self, level: Level) -> torch.Tensor:
        """The last level comes from the second states of the parents' rows, without a pass."""
        if self.settings.second_token and 0 < level.depth == self._levels - 1:
            return self.second_logits(of_parents(self._g, level.parent))
        return super().expand(level)


def claim(ruler: Ruler, scale: Scale = "small") -> Claim:
    """Measure Jakiro against EAGLE with as many active weights, on ``pycode-m``.

    Args:
        ruler: The clock; not used, nothing is timed.
        scale: ``"small"`` decodes 256 held-out texts of 16 tokens, ``"test"`` 8.
    """
    full = scale != "test"
    rows, count = (256, 24) if full else (8, 2)
    recipe = None if full else Recipe(steps=12)
    model, held_out = target_model(), texts(split="held-out")
    eagle = reference_drafter("eagle", recipe=recipe)
    half = eagle.sizes.intermediate_size // 2  # two experts as wide as EAGLE's feed-forward
    ours = reference_drafter("jakiro", Settings(expert_size=half), recipe=recipe)
    added = reference_drafter("jakiro", Settings(expert_size=half, contrast=False), recipe=recipe)
    assert isinstance(ours, FeatureDrafter) and isinstance(eagle, FeatureDrafter)

    def tau(drafter: FeatureDrafter, levels: int, nodes: int = 0) -> float:
        shape = Shape(nodes or levels, levels, 10 if nodes else 1)
        return acceptance_length(drafter, held_out, shape=shape, rows=rows)

    assert isinstance(added, FeatureDrafter)
    chains = {
        "ours": tau(ours, 4),
        "off": tau(eagle, 3),  # what the same three passes give without the second state
        "eagle": tau(eagle, 4),
        "sum": tau(added, 4),
    }
    trees = {"ours": tau(ours, 5, 60), "off": tau(eagle, 4, 60), "eagle": tau(eagle, 5, 60)}

    prompts = held_out[:count, :32].tolist()
    plain = answer(model, prompts, "none", max_new_tokens=16)
    passes, same = [], []
    for drafter in (ours, eagle):
        with counted(drafter.body) as calls:
            got = answer(model, prompts, Fixed(drafter, Shape(4, 4, 1)), max_new_tokens=16)
        passes.append((len(calls) - count) / sum(got.forwards))  # less one of each prompt
        same += [a == b for a, b in zip(got.tokens, plain.tokens, strict=True)]
    loops = sum(repeats_itself(t, size=3, times=2) for t in plain.tokens)
    c, c_eagle = relative_cost(ours), relative_cost(eagle)
    speed = {
        "ours": chains["ours"] / (1 + 3 * c),
        "off": chains["off"] / (1 + 3 * c_eagle),
        "eagle": chains["eagle"] / (1 + 4 * c_eagle),
    }
    gates = (
        Gate("answers with the plain output", sum(same), "==", len(same)),
        Gate("drafter passes a round, eagle's minus ours", passes[1] - passes[0], ">=", 0.7),
        Gate("chain of 4 minus eagle's", chains["ours"] - chains["eagle"], ">=", -0.1),
        Gate("tree of 5 levels minus eagle's", trees["ours"] - trees["eagle"], ">=", -0.1),
        Gate("chain of 4 minus eagle's of 3 (off)", chains["ours"] - chains["off"], ">", 0.0),
    )
    unit = "tokens/forward"
    return Claim(
        slug="jakiro",
        statement="The contrast of two experts drafts the last token of a chain without a pass, "
        "and as far as EAGLE drafts it with one.",
        paper_figure="above EAGLE-2 on Vicuna and LLaMA (Table 1)",
        rows=(
            Row(
                "acceptance length, greedy, chain of 4",
                unit,
                chains["eagle"],
                chains["ours"],
                chains["off"],
                control=chains["sum"],
                note="baseline: eagle, a pass more; off: eagle with as many passes, a level less; "
                "control: a second sum instead of the difference",
            ),
            Row(
                "acceptance length, greedy, tree of 60, 5 levels",
                unit,
                trees["eagle"],
                trees["ours"],
                trees["off"],
            ),
            Row("drafter passes a round, chain of 4", "", passes[1], passes[0], None),
            Row(
                "tokens per unit of time, chain of 4",
                "tokens/target forward",
                speed["eagle"],
                speed["ours"],
                speed["off"],
                note=f"weights read by a pass: c = {c:.3f}, eagle {c_eagle:.3f}",
            ),
        ),
        scale=scale,
        device="cpu",
        status=judge(gates, (gates[0], gates[1], gates[4])),
        notes=(
            curve_note(ours, eagle, added),
            f"{loops} of {count} plain answers repeat themselves.",
        ),
        gates=gates,
        seeds=(0,),
    )
