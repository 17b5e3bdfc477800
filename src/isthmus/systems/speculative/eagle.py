"""EAGLE: draft the target's features, one step behind the token that is already known.

Paper: Li, Wei, Zhang, Zhang. EAGLE: Speculative Sampling Requires Rethinking Feature Uncertainty.
    2024. arXiv:2401.15077
Idea: Autoregression on the target's last hidden states is easier than on tokens, once the token
    that was really sampled, one step ahead, tells which of the possible next features comes.
Differs: The tree is the dynamic one of EAGLE-2 (2406.16858) by default. Sampled trees are chosen
    trees verified by matching, which is exact for any chosen tree. The learning rate is the
    recipe's. ``Settings.eagle3`` gives the layer and the loss of EAGLE-3 (2503.01840), with the
    whole vocabulary.
Lossless: yes
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from isthmus.claims import Claim, Gate, Row, Ruler, Scale, judge
from isthmus.decoding.feature_drafter import (
    FeatureDrafter,
    FusedLayer,
    TapLayer,
    tap_layers,
    tapped,
)
from isthmus.decoding.policy import Fixed
from isthmus.decoding.target import HubTarget
from isthmus.decoding.trained import Batch
from isthmus.errors import InvalidInputError
from isthmus.objectives.distillation import feature_noise, shifted, smooth_l1, soft_cross_entropy
from isthmus.roles import Shape
from isthmus.training.drafting import Recipe, acceptance_length
from isthmus.workbench.bench import answer, repeats_itself
from isthmus.workbench.drafters import curve_note, reference_drafter, target_model, texts


@dataclass(frozen=True)
class Settings:
    """Settings of EAGLE.

    Attributes:
        shifted_token: Give the token one step ahead of the feature (the idea); off, the token at
            the feature's own place.
        use_token: Read tokens at all; off, features only.
        noise: Uniform noise on the training features, the paper's U(-0.1, 0.1) is 0.2.
        feature_weight: Weight of the feature loss (eq. 5: w_reg = 1).
        token_weight: Weight of the loss on the drafted distribution (w_cls = 0.1).
        top_k: Children of a node and nodes expanded on a level.
        depth: Levels.
        nodes: Draft nodes a round.
        fused_layers: Decoder layers whose incoming states are read together (EAGLE-3); none, the
            last hidden state.
        rollout: Draft steps that are trained, each on the features of the one before; 1 is plain
            teacher forcing.
        rollout_decay: Step k weighs ``rollout_decay ** (k - 1)``.
    """

    shifted_token: bool = True
    use_token: bool = True
    noise: float = 0.2
    feature_weight: float = 1.0
    token_weight: float = 0.1
    top_k: int = 10
    depth: int = 7
    nodes: int = 60
    fused_layers: tuple[int, ...] = ()
    rollout: int = 1
    rollout_decay: float = 0.8

    @classmethod
    def eagle3(cls, layers: int) -> Settings:
        """EAGLE-3 for a target of L decoder layers: fused layers, trained as it drafts.

        Example:
            >>> Settings.eagle3(32).fused_layers
            (2, 16, 29)
        """
        taps = tap_layers(layers)
        return cls(noise=0.0, feature_weight=0.0, token_weight=1.0, fused_layers=taps, rollout=5)


class Eagle(FeatureDrafter):
    """One decoder layer over ``[embedding of x_{i+1}; f_i]`` whose output imitates ``f_{i+1}``.

    Raises:
        InvalidInputError: ``rollout`` is below 1, or features of another layer are to be imitated.
    """

    name = "eagle"
    settings_type = Settings
    settings: Settings

    def __init__(self, target: HubTarget, settings: Settings | None = None) -> None:
        super().__init__(target, settings)
        s = self.settings
        if s.rollout < 1 or (s.fused_layers and s.feature_weight):
            raise InvalidInputError(
                "rollout must be 1 or more, and fused layers leave no feature to imitate "
                f"(feature_weight 0), got {s.rollout} and {s.feature_weight}"
            )
        head = target.model.get_output_embeddings()
        self.body = (
            TapLayer(self.sizes, s.fused_layers, head) if s.fused_layers else FusedLayer(self.sizes)
        )
        self.taps = tapped(s.fused_layers)
        self.token_ahead = s.shifted_token

    @property
    def default_shape(self) -> Shape:
        """The tree of the settings."""
        return Shape(self.settings.nodes, self.settings.depth, self.settings.top_k)

    def branch(self) -> tuple[int, int]:
        """EAGLE-2 expands the ``top_k`` best nodes of a level by ``top_k`` children each."""
        return self.settings.top_k, self.settings.top_k

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """The target's embeddings, or nothing where tokens are not to be used."""
        known = super().embed(tokens)
        return known if self.settings.use_token else torch.zeros_like(known)

    def loss(self, batch: Batch) -> torch.Tensor:
        """Feature regression plus a tenth of the distilled cross-entropy (eq. 3 to 5)."""
        s = self.settings
        f = feature_noise(self.body.condense(batch.features), batch.generator, s.noise)
        total = f.new_zeros(())
        for k, g in enumerate(self.rollout(batch, f, s.rollout), 1):  # g[:, i] imitates f_{i+k}
            mask, law = batch.before(k), shifted(batch.target_logits, k)
            loss = s.token_weight * soft_cross_entropy(law, self.logits(g), mask)
            if s.feature_weight:
                loss = loss + s.feature_weight * smooth_l1(shifted(batch.final, k), g, mask)
            total = total + s.rollout_decay ** (k - 1) * loss
        return total


def claim(ruler: Ruler, scale: Scale = "small") -> Claim:
    """Measure EAGLE against Medusa and against itself without its idea, all on ``pycode-m``.

    Every drafter sees the same texts in the same order. The chain of 4 decides; the tree of the
    paper and the noise are reported.

    Args:
        ruler: The clock; not used, nothing is timed.
        scale: ``"small"`` decodes 256 held-out texts of 16 tokens, ``"test"`` 8.
    """
    full = scale != "test"
    rows, count = (256, 24) if full else (8, 2)
    recipe = None if full else Recipe(steps=12)
    model, held_out = target_model(), texts(split="held-out")
    arms = {
        "eagle": Settings(),
        "token not shifted": Settings(shifted_token=False),
        "feature only": Settings(use_token=False),
        "no noise": Settings(noise=0.0),
    }
    trained = {name: reference_drafter("eagle", s, recipe=recipe) for name, s in arms.items()}
    trained["medusa"] = reference_drafter("medusa", recipe=recipe)
    tau = {name: acceptance_length(d, held_out, rows=rows) for name, d in trained.items()}
    tree = trained["eagle"].default_shape
    tau_tree = {
        name: acceptance_length(trained[name], held_out, shape=replace(tree, depth=d), rows=rows)
        for name, d in (("eagle", tree.depth), ("medusa", 4), ("token not shifted", tree.depth))
    }

    prompts = held_out[:count, :32].tolist()
    plain = answer(model, prompts, "none", max_new_tokens=16)
    same = [
        a == b
        for shape in (Shape(4, 4, 1), tree)
        for a, b in zip(
            answer(model, prompts, Fixed(trained["eagle"], shape), max_new_tokens=16).tokens,
            plain.tokens,
            strict=True,
        )
    ]
    loops = sum(repeats_itself(t, size=3, times=2) for t in plain.tokens)
    ours, off = tau["eagle"], tau["token not shifted"]
    gates = (
        Gate("answers with the plain output, chain and tree", sum(same), "==", len(same)),
        Gate("chain, over medusa", ours - tau["medusa"], ">=", 0.4),
        Gate("chain, over the token not shifted", ours - off, ">=", 0.4),
    )
    direction = (
        gates[0],
        Gate("chain, over medusa", ours - tau["medusa"], ">", 0.0),
        Gate("chain, over the token not shifted", ours - off, ">", 0.0),
    )
    unit = "tokens/forward"
    return Claim(
        slug="eagle",
        statement="A layer that goes from feature to feature and knows the token one step ahead "
        "is accepted further than independent heads, and than the same layer without that token.",
        paper_figure="3.94 tokens/forward, 2.90x, and 1.6x over Medusa, Vicuna-7B, MT-bench "
        "(Tables 1 and 2)",
        rows=(
            Row(
                "acceptance length, greedy, chain of 4",
                unit,
                tau["medusa"],
                ours,
                off,
                note=f"baseline: medusa; off: token not shifted; feature only "
                f"{tau['feature only']:.3f}",
            ),
            Row(
                "acceptance length, greedy, tree of 60",
                unit,
                tau_tree["medusa"],
                tau_tree["eagle"],
                tau_tree["token not shifted"],
            ),
            Row(
                "acceptance length, chain of 4, trained with feature noise",
                unit,
                tau["no noise"],
                ours,
                None,
                note="baseline: no noise; reported, not claimed",
            ),
        ),
        scale=scale,
        device="cpu",
        status=judge(gates, direction),
        notes=(
            *(f"{name}: {curve_note(drafter)}" for name, drafter in trained.items()),
            f"{loops} of {count} plain answers repeat themselves.",
        ),
        gates=gates,
        seeds=(0,),
    )
