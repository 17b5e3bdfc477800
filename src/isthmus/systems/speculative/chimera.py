"""Chimera: a trigram encoder in place of the lower layers, one layer of full context on top.

Paper: Zeng, Yu, Pang, Wang, Zhuang, Shao, Zou. Chimera: A Lossless Decoding Method for Accelerating
    Large Language Models Inference by Fusing all Tokens. 2024. arXiv:2402.15758
Idea: Lower layers of a language model look at near tokens, so three embeddings stand in for them;
    one layer then looks at everything, and verified places enter it as the target's finished
    states.
Differs: A second pass of training on the drafter's own states is left out; instead a round starts
    every few places of a training text, so that drafted rows see drafted rows as they will. The
    weights of the two losses are not given in the paper; both count alike.
Lossless: yes
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from isthmus.claims import Claim, Gate, Row, Ruler, Scale, judge
from isthmus.decoding.builders import Level
from isthmus.decoding.draft_cache import DraftCache
from isthmus.decoding.layers import frozen, round_starts
from isthmus.decoding.target import HubTarget
from isthmus.decoding.trained import Batch, Fresh, TrainedDrafter
from isthmus.errors import InvalidInputError
from isthmus.nn.decoder import DecoderLayer, ResBlock
from isthmus.nn.masks import additive
from isthmus.objectives.distillation import masked_mean, soft_cross_entropy
from isthmus.roles import Shape
from isthmus.training.drafting import Recipe, acceptance_length
from isthmus.workbench.drafters import curve_note, reference_drafter, same_answers, texts


@dataclass(frozen=True)
class Settings:
    """Settings of Chimera.

    Attributes:
        trigram: Encode three tokens (half of the idea); off, the embedding of one.
        context: Use the layer of full context (the other half); off, the trigram alone.
        round_length: Places of a training text between two rounds.
        feature_weight: Weight of the distance between o_i and f_i.
        token_weight: Weight of the loss on the drafted law.
        top_k: Children of a node and nodes expanded on a level.
        depth: Levels.
        nodes: Draft nodes a round.
    """

    trigram: bool = True
    context: bool = True
    round_length: int = 5
    feature_weight: float = 1.0
    token_weight: float = 1.0
    top_k: int = 10
    depth: int = 5
    nodes: int = 60

    def __post_init__(self) -> None:
        if self.round_length < 1:
            raise InvalidInputError(f"round_length must be 1 or more, got {self.round_length}")


class Chimera(TrainedDrafter):
    """``o = layer([f_1 .. f_t; g_{t+1} ..])`` and logits ``H [o; g]``."""

    name = "chimera"
    settings_type = Settings
    settings: Settings

    def __init__(self, target: HubTarget, settings: Settings | None = None) -> None:
        super().__init__(target, settings)
        width = self.sizes.hidden_size
        if self.settings.trigram:
            self.block = ResBlock(3 * width)
            self.fuse = nn.Linear(3 * width, width, bias=False)
        if self.settings.context:
            self.layer = DecoderLayer(self.sizes)
        head = target.model.get_output_embeddings().weight.detach() * self._head_scale
        self.residual_head = nn.Linear(2 * width, len(head), bias=False)  # H [V, 2D]
        self.residual_head.weight.data.copy_(torch.cat([head, head], 1))
        self._cache: DraftCache | None = None
        self._recent = torch.empty(0, dtype=torch.int64)  # x_{t-1}, x_t; -1 where there is none
        self._trail = torch.empty(0, dtype=torch.int64)  # last three tokens of each node, [B, F, 3]

    @property
    def default_shape(self) -> Shape:
        """The tree of the settings."""
        return Shape(self.settings.nodes, self.settings.depth, self.settings.top_k)

    def branch(self) -> tuple[int, int]:
        """The best nodes of a level are expanded."""
        return self.settings.top_k, self.settings.top_k

    def encode(self, trail: torch.Tensor) -> torch.Tensor:
        """Trigram states g [..., D] of the last three tokens [..., 3], oldest first (sec. 3.2)."""
        if not self.settings.trigram:
            return self.embed(trail[..., -1])
        out: torch.Tensor = self.fuse(self.block(self.embed(trail).flatten(-2)))
        return out

    def logits(self, o: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        """The residual head (sec. 3.4): H [o; g]."""
        out: torch.Tensor = self.residual_head(torch.cat([o, g], -1))
        return out

    def two_streams(
        self, ids: torch.Tensor, features: torch.Tensor, start: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Every place of a text drafted at once.

        Args:
            ids: int64 [B, T].
            features: True features f [B, T, D].
            start: First unverified place of the round that each place is drafted in, int64 [T].

        Returns:
            o and g, both [B, T, D].
        """
        t = ids.shape[1]
        place = torch.arange(t, device=ids.device)
        back = torch.tensor([2, 1, 0], device=ids.device)
        g = self.encode(ids[:, (place[:, None] - back).clamp(min=0)])
        if not self.settings.context:
            return torch.zeros_like(g), g
        # f_j is verified before the round, g_j drafted within it: never both, so f_i leaks nothing
        verified = place < start[:, None]
        drafted = (place >= start[:, None]) & (place <= place[:, None])
        own = torch.eye(t, dtype=torch.bool, device=ids.device)  # f rows: their output is not used
        seen = torch.cat(
            [
                torch.cat([own, torch.zeros_like(own)], 1),
                torch.cat([verified, drafted], 1),
            ]
        )
        both = torch.cat([features, g], 1)
        mask = additive(seen, both.dtype)
        return self.layer(both, place.repeat(2)[None], mask)[:, t:], g

    def loss(self, batch: Batch) -> torch.Tensor:
        """Distance of o_i to f_i, and distillation of the logits."""
        s = self.settings
        start = round_starts(batch.ids.shape[1], s.round_length, batch.generator)
        with frozen(self.target.model):
            o, g = self.two_streams(batch.ids, batch.final, start)
        loss = s.token_weight * soft_cross_entropy(
            batch.target_logits, self.logits(o, g), batch.mask
        )
        if s.context:
            far = F.mse_loss(o, batch.final.detach(), reduction="none").mean(-1)
            loss = loss + s.feature_weight * masked_mean(far, batch.mask)
        return loss

    def reset(self, batch: int) -> None:
        """An empty cache and no token before."""
        target = self.target
        self._cache = DraftCache(self.sizes, 1, batch, target.state_dtype, target.device)
        self._recent = torch.full((batch, 2), -1, device=target.device)

    def absorb(self, fresh: Fresh) -> None:
        """Verified places enter as the target's features."""
        assert self._cache is not None
        positions, mask = self._cache.append(fresh.valid)
        if self.settings.context:
            self.layer(fresh.final, positions, mask, self._cache.store(0))
        self._cache.commit(fresh.valid)
        count = fresh.valid.sum(1, keepdim=True)
        known = torch.cat([self._recent, fresh.tokens], 1)
        self._recent = known.gather(1, torch.cat([count, count + 1], 1))

    def expand(self, level: Level) -> torch.Tensor:
        """Drafted places enter as trigram states."""
        assert self._cache is not None
        if level.depth == 0:
            self._cache.drop()
            # the first places of a text repeat its first token
            before = torch.where(self._recent < 0, self._recent[:, 1:], self._recent)
            before = before.clamp(min=0)[:, None]
        else:
            above = level.parent[..., None].expand(-1, -1, 3)
            before = self._trail.gather(1, above)[..., 1:]
        self._trail = torch.cat([before, level.tokens[..., None]], -1)
        g = self.encode(self._trail)
        o = torch.zeros_like(g)
        if self.settings.context:
            positions, mask = self._cache.branch(level.parent)
            o = self.layer(g, positions, mask, self._cache.store(0))
        return self.logits(o, g)

    def select_state(self, rows: torch.Tensor) -> None:
        """Keep the given rows."""
        assert self._cache is not None
        self._cache.select(rows.tolist())
        self._recent = self._recent[rows]


def parameters(drafter: nn.Module) -> int:
    """Trained numbers of a drafter."""
    return sum(p.numel() for p in drafter.parameters())


def claim(ruler: Ruler, scale: Scale = "small") -> Claim:
    """Measure on ``pycode-m``: the whole against either half.

    Args:
        ruler: The clock; not used, nothing is timed.
        scale: ``"small"`` decodes 256 held-out texts of 16 tokens, ``"test"`` 8.
    """
    full = scale != "test"
    recipe, rows = (None, 256) if full else (Recipe(steps=12), 8)
    ours = reference_drafter("chimera", recipe=recipe)
    near = reference_drafter("chimera", Settings(context=False), recipe=recipe)
    far = reference_drafter("chimera", Settings(trigram=False), recipe=recipe)
    medusa = reference_drafter("medusa", recipe=recipe)
    held_out, chain = texts(split="held-out"), Shape(4, 4, 1)
    tau = {
        name: acceptance_length(drafter, held_out, shape=chain, rows=rows)
        for name, drafter in (("ours", ours), ("near", near), ("far", far), ("medusa", medusa))
    }
    tree = ours.default_shape
    tau_tree = [acceptance_length(d, held_out, shape=tree, rows=rows) for d in (ours, medusa)]
    count = 24 if full else 2
    same = same_answers(ours, tree, count)

    gates = (
        Gate("answers with the plain output", same, "==", count),
        Gate("acceptance length minus trigram alone", tau["ours"] - tau["near"], ">=", 0.05),
        Gate("acceptance length minus context alone", tau["ours"] - tau["far"], ">=", 0.05),
        Gate("parameters over medusa's", parameters(ours) / parameters(medusa), "<", 1.0),
    )
    unit = "tokens/forward"
    return Claim(
        slug="chimera",
        statement="A trigram encoder under one layer of full context drafts chains that are "
        "accepted further than those of the encoder alone and of the layer alone, with fewer "
        "parameters than Medusa's heads.",
        paper_figure="2.7x average speed-up on Vicuna and LLaMA-2 (abstract)",
        rows=(
            Row(
                "acceptance length, greedy, chain of 4",
                unit,
                tau["medusa"],
                tau["ours"],
                tau["far"],
                note="baseline: medusa; off: no trigram, the embedding of one token",
            ),
            Row(
                "acceptance length, greedy, chain of 4",
                unit,
                tau["medusa"],
                tau["ours"],
                tau["near"],
                note="off: no context, the trigram alone",
            ),
            Row(
                "acceptance length, greedy, tree of 60",
                unit,
                tau_tree[1],
                tau_tree[0],
                None,
                note="baseline: medusa",
            ),
            Row(
                "trained parameters",
                "",
                parameters(medusa),
                parameters(ours),
                parameters(near),
                note="off: no context",
            ),
        ),
        scale=scale,
        device="cpu",
        status=judge(
            gates,
            (
                gates[0],
                Gate("trigram alone is behind", tau["ours"] - tau["near"], ">", 0),
                Gate("context alone is behind", tau["ours"] - tau["far"], ">", 0),
            ),
        ),
        notes=(curve_note(ours, near, far, medusa),),
        gates=gates,
        seeds=(0,),
    )
