"""ParallelSpec: the drafter fills mask slots, so that one pass drafts the whole chain.

Paper: Xiao, Zhang, Ge, Ouyang, Ordonez, Yu. ParallelSpec: Parallel Drafter for Efficient
    Speculative Decoding. 2024. arXiv:2410.05589
Idea: Replace the K steps of an autoregressive drafter by one pass over the last token and K - 1
    mask tokens, and train all places of a text and all depths at once.
Differs: The host is EAGLE. The root's own row drafts the first token and K - 1 mask slots the
    others, as in P-EAGLE (2602.01469), whose thinned training groups are used, too. The catch-up
    with verified tokens and the slots share one pass. The tree is the best-first one over the
    product of the slots' laws instead of a static one.
Lossless: yes

One round::

    [x_2; f_1] ... [x_{t+1}; f_t] [mask; h] [mask; h]   one pass
                        │            │         │
                     q(x_{t+2})   q(x_{t+3}) q(x_{t+4})
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from isthmus.claims import Claim, Gate, Row, Ruler, Scale, judge
from isthmus.decoding.builders import Level
from isthmus.decoding.feature_drafter import (
    FeatureDrafter,
    FusedLayer,
    TapLayer,
    counted,
    relative_cost,
    tap_layers,
    tapped,
)
from isthmus.decoding.policy import Fixed
from isthmus.decoding.target import HubTarget
from isthmus.decoding.trained import Batch, Fresh
from isthmus.errors import InvalidInputError
from isthmus.nn.masks import additive, rollout_mask
from isthmus.objectives.distillation import feature_noise, smooth_l1, soft_cross_entropy
from isthmus.roles import Shape
from isthmus.training.drafting import Recipe, acceptance_length
from isthmus.workbench.bench import answer, repeats_itself
from isthmus.workbench.drafters import curve_note, reference_drafter, target_model, texts


@dataclass(frozen=True)
class Settings:
    """Settings of ParallelSpec.

    Attributes:
        levels: Tokens K that a pass drafts.
        taught_slots: Train the mask slots (the idea); off, only the first token is trained.
        own_slots: A learned mask token for each slot; off, one for all.
        keep: Share of the places that are trained at each further depth, r^k of them.
        least: Smallest such share.
        noise: Uniform noise on the training features.
        feature_weight: Weight of the feature loss.
        token_weight: Weight of the loss on the drafted distribution.
        fused_layers: Decoder layers whose incoming states are read together (EAGLE-3's layer);
            none, the last hidden state.
        top_k: Children of a node and nodes of a level.
        nodes: Draft nodes a round.
    """

    levels: int = 4
    taught_slots: bool = True
    own_slots: bool = True
    keep: float = 0.7
    least: float = 0.2
    noise: float = 0.2
    feature_weight: float = 1.0
    token_weight: float = 0.1
    fused_layers: tuple[int, ...] = ()
    top_k: int = 10
    nodes: int = 60

    @classmethod
    def peagle(cls, layers: int) -> Settings:
        """P-EAGLE for a target of L decoder layers: the shape that serving engines load.

        Example:
            >>> Settings.peagle(32).fused_layers
            (2, 16, 29)
        """
        taps = tap_layers(layers)
        return cls(
            own_slots=False, noise=0.0, feature_weight=0.0, token_weight=1.0, fused_layers=taps
        )


class Parallelspec(FeatureDrafter):
    """EAGLE's layer over real rows and mask slots.

    Raises:
        InvalidInputError: Fewer levels than 1, a share outside 0 to 1, or features of fused layers
            are to be imitated.
    """

    name = "parallelspec"
    settings_type = Settings
    settings: Settings

    def __init__(self, target: HubTarget, settings: Settings | None = None) -> None:
        super().__init__(target, settings)
        s = self.settings
        if s.levels < 1 or not 0 <= s.least <= 1 or not 0 < s.keep <= 1:
            raise InvalidInputError(
                "levels must be 1 or more, keep and least shares from 0 to 1, got "
                f"{s.levels}, {s.keep} and {s.least}"
            )
        if s.fused_layers and s.feature_weight:
            raise InvalidInputError("fused layers leave no feature to imitate: feature_weight 0")
        width = self.sizes.hidden_size
        table = target.model.get_input_embeddings().weight.detach()
        head = target.model.get_output_embeddings()
        fused = bool(s.fused_layers)
        self.body = TapLayer(self.sizes, s.fused_layers, head) if fused else FusedLayer(self.sizes)
        self.taps = tapped(s.fused_layers)
        slots = max(1, s.levels - 1) if s.own_slots else 1
        self.mask_token = nn.Parameter(torch.randn(slots, width) * float(table.std()))
        self.mask_hidden = nn.Parameter(torch.zeros(3 * width if fused else width))
        self._fresh: Fresh | None = None  # verified, not run yet
        self._guess = torch.empty(0)  # next features [B, K, D] of the root's row and its slots

    @property
    def default_shape(self) -> Shape:
        """The tree of the settings."""
        return Shape(self.settings.nodes, self.settings.levels, self.settings.top_k)

    @property
    def max_depth(self) -> int:
        """One level a slot."""
        return self.settings.levels

    def branch(self) -> tuple[int, int]:
        """Children of a node, and nodes of a level."""
        return self.settings.top_k, self.settings.top_k

    def slot_rows(
        self, slot: torch.Tensor, embedded: torch.Tensor, feature: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put the mask token and its feature in place of real ones.

        Args:
            slot: Number of each row's slot, 0 for a real row, int64 [B or 1, N].
            embedded: Token embeddings of the real rows [B, N, D].
            feature: Their features [B, N, D].

        Returns:
            Embeddings and features [B, N, D].
        """
        real = (slot == 0)[..., None]
        which = (slot - 1).clamp(0, len(self.mask_token) - 1)
        hidden = self.mask_hidden
        if isinstance(self.body, TapLayer):  # it goes through the same fc
            hidden = self.body.fc(hidden)
        return torch.where(real, embedded, self.mask_token[which]), torch.where(
            real, feature, hidden
        )

    def group(self, length: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows to train on, as anchors and depths, both int64 [R].

        All places at depth 0 and about ``keep^k`` of them at depth k, nested: a row (i, k) brings
        all (i, j) below k, which it attends to. Rows whose label lies beyond the text are left out.
        """
        s = self.settings
        levels = s.levels if s.taught_slots else 1
        order = torch.randperm(length, generator=generator, device=generator.device)
        share = [max(s.least, s.keep**k) if k else 1.0 for k in range(levels)]
        anchor = torch.cat([order[: round(length * r)].sort().values for r in share])
        depth = torch.cat([order.new_full((round(length * r),), k) for k, r in enumerate(share)])
        known = anchor + depth + 1 < length
        return anchor[known], depth[known]

    def grouped(
        self, batch: Batch, feature: torch.Tensor, anchor: torch.Tensor, depth: torch.Tensor
    ) -> torch.Tensor:
        """Next features [B, R, D] of the given rows; row (i, k) imitates ``f_{i+k+1}``."""
        embedded = self.embed(batch.ids[:, anchor + 1])
        rows = self.slot_rows(depth[None], embedded, feature[:, anchor])
        mask = additive(rollout_mask(anchor, depth), feature.dtype)
        out: torch.Tensor = self.body(*rows, (anchor + depth)[None], mask)
        return out

    def loss(self, batch: Batch) -> torch.Tensor:
        """The host's loss over all places and depths."""
        s = self.settings
        feature = feature_noise(self.body.condense(batch.features), batch.generator, s.noise)
        anchor, depth = self.group(feature.shape[1], batch.generator)
        g = self.grouped(batch, feature, anchor, depth)
        label = anchor + depth + 1
        mask = batch.mask[:, label]
        law = batch.target_logits[:, label]
        loss = s.token_weight * soft_cross_entropy(law, self.logits(g), mask)
        if s.feature_weight:
            loss = loss + s.feature_weight * smooth_l1(batch.final[:, label], g, mask)
        return loss

    def reset(self, batch: int) -> None:
        """An empty cache, and nothing to run."""
        super().reset(batch)
        self._fresh = None
        self._guess = self.feature[:, None].repeat(1, self.settings.levels, 1)

    def absorb(self, fresh: Fresh) -> None:
        """Keep verified tokens for the pass of the next draft."""
        if self._fresh is not None:  # nothing was drafted since the last ones
            self.run(self._fresh)
        self._fresh = fresh

    def run(self, fresh: Fresh) -> None:
        """The one pass: verified tokens, and mask slots behind the last of each row."""
        assert self._cache is not None
        slots = self.settings.levels - 1
        feature = self.body.condense(fresh.features)
        count = fresh.valid.sum(1, keepdim=True)
        place = torch.arange(fresh.valid.shape[1] + slots, device=count.device)
        slot = (place - count + 1).clamp(min=0)  # rows that accepted less begin their slots earlier
        positions, mask = self._cache.append(place < count + slots)
        rows = self.slot_rows(
            slot,
            F.pad(self.embed(fresh.following), (0, 0, 0, slots)),
            F.pad(feature, (0, 0, 0, slots)),
        )
        g = self.body(*rows, positions, mask, self._cache.store(0))
        self._cache.commit(place < count)
        index = (count - 1).clamp(min=0) + torch.arange(slots + 1, device=count.device)
        guess = g.gather(1, index[..., None].expand(-1, -1, g.shape[-1]))
        some = (count > 0)[..., None]
        self._guess = torch.where(some, guess, self._guess)
        self._last = self._guess[:, :1]
        self.feature = torch.where(some[:, 0], fresh.at_last(feature), self.feature)

    def expand(self, level: Level) -> torch.Tensor:
        """What the slot of this depth says; the same for every node."""
        if self._fresh is not None:
            self.run(self._fresh)
            self._fresh = None
        logits = self.logits(self._guess[:, level.depth : level.depth + 1])
        return logits.expand(-1, level.tokens.shape[1], -1)

    def select_state(self, rows: torch.Tensor) -> None:
        """Keep the given rows."""
        super().select_state(rows)
        self._guess = self._guess[rows]
        if self._fresh is not None:
            fresh = self._fresh
            kept = fresh.features.map(lambda x: x[rows])
            self._fresh = Fresh(fresh.tokens[rows], fresh.following[rows], kept, fresh.valid[rows])


def claim(ruler: Ruler, scale: Scale = "small") -> Claim:
    """Measure one pass against K passes of the same layer, on ``pycode-m``.

    Args:
        ruler: The clock; not used, nothing is timed.
        scale: ``"small"`` decodes 256 held-out texts of 16 tokens, ``"test"`` 8.
    """
    full = scale != "test"
    rows, count = (256, 24) if full else (8, 2)
    recipe = None if full else Recipe(steps=12)
    model, held_out = target_model(), texts(split="held-out")
    ours = reference_drafter("parallelspec", recipe=recipe)
    off = reference_drafter("parallelspec", Settings(taught_slots=False), recipe=recipe)
    eagle = reference_drafter("eagle", recipe=recipe)
    medusa = reference_drafter("medusa", recipe=recipe)
    assert isinstance(ours, FeatureDrafter) and isinstance(eagle, FeatureDrafter)
    drafters = (ours, off, eagle, medusa)
    chain, tree = Shape(4, 4, 1), Shape(60, 4, 10)
    tau, off_tau, eagle_tau, medusa_tau = (
        acceptance_length(d, held_out, shape=chain, rows=rows) for d in drafters
    )
    trees = [acceptance_length(d, held_out, shape=tree, rows=rows) for d in drafters]

    prompts = held_out[:count, :32].tolist()
    plain = answer(model, prompts, "none", max_new_tokens=16)
    passes, same = [], []
    for drafter in (ours, eagle):
        with counted(drafter.body) as calls:
            got = answer(model, prompts, Fixed(drafter, chain), max_new_tokens=16)
        passes.append(len(calls) / sum(got.forwards))
        same += [a == b for a, b in zip(got.tokens, plain.tokens, strict=True)]
    loops = sum(repeats_itself(t, size=3, times=2) for t in plain.tokens)
    c = relative_cost(eagle)
    # tau / (1 + c) = tau_eagle / (1 + 4 c): dearer drafter passes favour one of them
    even = (eagle_tau - tau) / max(4 * tau - eagle_tau, 1e-9)
    gates = (
        Gate("answers with the plain output", sum(same), "==", len(same)),
        Gate("drafter passes a round over those of eagle", passes[0] / passes[1], "<=", 0.35),
        Gate("acceptance length over eagle's", tau / eagle_tau, ">=", 0.6),
        Gate("acceptance length minus medusa's", tau - medusa_tau, ">=", 0.08),
        Gate("acceptance length minus untaught slots (off)", tau - off_tau, ">=", 0.05),
        Gate("cost of a drafter pass from which one pass is faster", even, "<=", 0.25),
    )
    direction = (
        gates[0],
        gates[1],
        gates[2],
        Gate("acceptance length minus medusa's", tau - medusa_tau, ">", 0.0),
        # a chain lives on its first token, which is not a slot's; the slots show in a tree
        Gate("tree of 60 minus untaught slots (off)", trees[0] - trees[1], ">", 0.0),
    )
    unit = "tokens/forward"
    return Claim(
        slug="parallelspec",
        statement="One pass over mask slots drafts a chain of 4 that keeps most of the acceptance "
        "length of 4 passes, and more than that of independent heads.",
        paper_figure="up to 62% lower latency than the host; 2.84x on Llama-2-13B (abstract)",
        rows=(
            Row(
                "acceptance length, greedy, chain of 4",
                unit,
                medusa_tau,
                tau,
                off_tau,
                ceiling=eagle_tau,
                note="baseline: medusa; ceiling: eagle; off: slots that were not trained",
            ),
            Row(
                "acceptance length, greedy, tree of 60, 4 levels",
                unit,
                trees[3],
                trees[0],
                trees[1],
                ceiling=trees[2],
            ),
            Row("drafter passes a round", "", passes[1], passes[0], None, note="baseline: eagle"),
            Row(
                "tokens per unit of time, chain of 4",
                "tokens/target forward",
                eagle_tau / (1 + 4 * c),
                tau / (1 + c),
                off_tau / (1 + c),
                note=f"baseline: eagle; weights read by a pass c = {c:.3f}; even at c = {even:.3f}",
            ),
        ),
        scale=scale,
        device="cpu",
        status=judge(gates, direction),
        notes=(
            curve_note(*drafters),
            f"{loops} of {count} plain answers repeat themselves.",
        ),
        gates=(*gates, direction[4]),
        seeds=(0,),
    )
