"""Hydra heads: Medusa's heads, told which tokens were drafted before.

Paper: Ankner, Parthasarathy, Nrusimha, Rinard, Ragan-Kelley, Brandon. Hydra: Sequentially-Dependent
    Draft Heads for Medusa Decoding. 2024. arXiv:2402.05109
Idea: Head k reads the embeddings of the tokens on its own path besides the last hidden state, so
    children of unlike parents are unlike.
Differs: Further blocks of a head are blocks of their own (the released code repeats one). Hydra++
    is ``blocks=4, prefix_layer=True, distil=True``; its longer training is left to the recipe. The
    tree is calibrated on what the heads got right while they were trained.
Lossless: yes
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from isthmus import registry
from isthmus.claims import Claim, Gate, Row, Ruler, Scale, judge
from isthmus.decoding.builders import Level
from isthmus.decoding.draft_cache import DraftCache
from isthmus.decoding.heads import FeatureHeads, RankShares, fill_by_level
from isthmus.decoding.target import HubTarget
from isthmus.decoding.trained import Batch, Fresh
from isthmus.decoding.tree import TokenTree
from isthmus.nn.decoder import DecoderLayer, ResBlock
from isthmus.objectives.distillation import shifted
from isthmus.roles import Shape
from isthmus.training.drafting import Recipe, acceptance_length
from isthmus.workbench.drafters import curve_note, reference_drafter, same_answers, texts


@dataclass(frozen=True)
class Settings:
    """Settings of Hydra.

    Attributes:
        heads: Heads K.
        blocks: Residual blocks of a head.
        prefix_layer: Run a decoder layer over the hidden states first (sec. 4.3).
        distil: Learn the target's law instead of the text.
        use_tokens: Read the drafted tokens (the idea); off, the last hidden state only, as Medusa.
        nodes: Draft nodes of the tree.
    """

    heads: int = 4
    blocks: int = 1
    prefix_layer: bool = False
    distil: bool = False
    use_tokens: bool = True
    nodes: int = 63


class HydraHeads(FeatureHeads):
    """Heads on ``[f_t; E x_{t+1}; ...; E x_{t+k}]``."""

    name = "hydra-heads"
    settings_type = Settings
    settings: Settings

    def __init__(self, target: HubTarget, settings: Settings | None = None) -> None:
        super().__init__(target, settings)
        s, width = self.settings, self.sizes.hidden_size
        self.blocks = nn.ModuleList(
            nn.Sequential(
                ResBlock(width, (k + 1) * width), *(ResBlock(width) for _ in range(s.blocks - 1))
            )
            for k in range(1, s.heads + 1)
        )
        self.lm_heads = nn.ModuleList(self.own_head() for _ in range(s.heads))
        self.ranks = RankShares(s.heads)
        self.prefix = DecoderLayer(self.sizes) if s.prefix_layer else None
        self._cache: DraftCache | None = None
        self._path = torch.empty(0)  # embeddings on the way to each node of the level [B, F, k*D]

    @property
    def default_shape(self) -> Shape:
        """The tree of the settings."""
        return Shape(self.settings.nodes, self.settings.heads, 10)

    @property
    def max_depth(self) -> int:
        """One level a head."""
        return self.settings.heads

    def guess(self, k: int, features: torch.Tensor, path: torch.Tensor) -> torch.Tensor:
        """Logits of head k, from 1 (sec. 3).

        Args:
            k: Head.
            features: ``f_t`` [..., D].
            path: Embeddings of ``x_{t+1} .. x_{t+k}``, one after the other, [..., k*D].

        Returns:
            [..., V].
        """
        if not self.settings.use_tokens:
            path = torch.zeros_like(path)
        hidden = self.blocks[k - 1](torch.cat([features, path], -1))
        logits: torch.Tensor = self.lm_heads[k - 1](hidden)
        return logits

    def loss(self, batch: Batch) -> torch.Tensor:
        """Cross-entropy of every head behind the true tokens."""
        f = batch.final
        if self.prefix is not None:
            f = self.prefix(f, torch.arange(f.shape[1], device=f.device)[None])
        known = self.embed(batch.ids)
        total = f.new_zeros(())
        for k in range(1, self.settings.heads + 1):
            path = torch.cat([shifted(known, step) for step in range(1, k + 1)], -1)
            logits = self.guess(k, f, path)
            self.ranks.learn(batch, k, logits)
            total = total + self.ahead_loss(batch, k, logits)
        return total

    def reset(self, batch: int) -> None:
        """No feature, an empty cache."""
        super().reset(batch)
        if self.prefix is not None:
            target = self.target
            self._cache = DraftCache(self.sizes, 1, batch, target.state_dtype, target.device)

    def absorb(self, fresh: Fresh) -> None:
        """Remember the last feature, as the prefix layer sees it where there is one."""
        if self.prefix is None or self._cache is None:
            super().absorb(fresh)
            return
        positions, mask = self._cache.append(fresh.valid)
        states = self.prefix(fresh.final, positions, mask, self._cache.store(0))
        self._cache.commit(fresh.valid)
        self.remember(fresh, states)

    def select_state(self, rows: torch.Tensor) -> None:
        """Keep the given rows."""
        super().select_state(rows)
        if self._cache is not None:
            self._cache.select(rows.tolist())

    def expand(self, level: Level) -> torch.Tensor:
        """The head of this depth on every path of the level."""
        known = self.embed(level.tokens)
        if level.depth:
            above = level.parent[..., None].expand(-1, -1, self._path.shape[-1])
            known = torch.cat([self._path.gather(1, above), known], -1)
        self._path = known
        features = self.feature[:, None].expand(-1, known.shape[1], -1)
        return self.guess(level.depth + 1, features, known)

    def _tree(self, roots: torch.Tensor, shape: Shape) -> TokenTree:
        """The calibrated tree, filled level by level."""
        return fill_by_level(self.expand, roots, self.ranks.plan(shape))


def claim(ruler: Ruler, scale: Scale = "small") -> Claim:
    """Measure heads with and without the drafted tokens on ``pycode-m``.

    All arms learn the target's law from the same texts: Medusa, Hydra, Hydra without tokens (off)
    and Hydra++.

    Args:
        ruler: The clock; not used, nothing is timed.
        scale: ``"small"`` decodes 256 held-out texts of 16 tokens, ``"test"`` 8.
    """
    full = scale != "test"
    rows, count = (256, 16) if full else (8, 2)
    recipe = None if full else Recipe(steps=8)
    settings = Settings(distil=True)
    medusa = registry.load_module(registry.find("medusa")).Settings(distil=True)
    arms = {
        "medusa": reference_drafter("medusa", medusa, recipe=recipe),
        "off": reference_drafter("hydra-heads", replace(settings, use_tokens=False), recipe=recipe),
        "hydra": reference_drafter("hydra-heads", settings, recipe=recipe),
        "hydra++": reference_drafter(
            "hydra-heads", replace(settings, blocks=4, prefix_layer=True), recipe=recipe
        ),
    }
    held_out = texts(split="held-out")
    shapes = {"chain of 4": Shape(4, 4, 1), "chain of 1": Shape(1, 1, 1), "tree": Shape(63, 4, 10)}
    tau = {
        (arm, kind): acceptance_length(drafter, held_out, shape=shape, rows=rows)
        for arm, drafter in arms.items()
        for kind, shape in shapes.items()
    }
    same = same_answers(arms["hydra++"], shapes["tree"], count)

    def gain(kind: str, arm: str = "hydra") -> float:
        return tau[arm, kind] - tau["medusa", kind]

    deeper = gain("chain of 4") - gain("chain of 1")
    gates = (
        Gate("answers with the plain output", same, "==", count),
        Gate("Hydra minus Medusa, chain of 4", gain("chain of 4"), ">=", 0.2),
        Gate("part of it from depths 2 to 4", deeper, ">", 0.0),
        Gate("Hydra minus Medusa, tree", gain("tree"), ">", 0.0),
        Gate(
            "Hydra minus Hydra without tokens, chain of 4",
            tau["hydra", "chain of 4"] - tau["off", "chain of 4"],
            ">=",
            0.2,
        ),
    )
    unit = "tokens/forward"
    return Claim(
        slug="hydra-heads",
        statement="Heads that read the drafted tokens are accepted at least 0.2 tokens per forward "
        "further than Medusa's after the same training, and part of the gain lies beyond the first "
        "drafted token.",
        paper_figure="1.11x Medusa's throughput, 1.31x for Hydra++ (2.70x plain decoding)",
        rows=tuple(
            Row(
                f"acceptance length, greedy, {kind}{', Hydra++' if arm == 'hydra++' else ''}",
                unit,
                tau["medusa", kind],
                tau[arm, kind],
                tau["off", kind],
                note="baseline: Medusa",
            )
            for arm in ("hydra", "hydra++")
            for kind in shapes
        ),
        scale=scale,
        device="cpu",
        status=judge(gates, (gates[0], Gate("Hydra minus Medusa", gain("chain of 4"), ">=", 0.1))),
        notes=(curve_note(*arms.values()),),
        gates=gates,
        seeds=(0,),
    )
