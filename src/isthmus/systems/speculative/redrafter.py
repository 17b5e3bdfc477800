"""ReDrafter: one small recurrent head, beam search, and beams merged by prefix.

Paper: Zhang, Wang, Cheng, Wang, Huang, Kiefer, Yang. Recurrent Drafter for Fast Speculative
    Decoding in Large Language Models. 2024. arXiv:2403.09919
Idea: One recurrent head serves every step, so it can draft any length; beam search finds the paths
    and shared prefixes are merged before verification, so no static tree has to be tuned.
Differs: Learns the target's law at every place of the text instead of texts that the target
    writes from there. Sampled trees are verified by matching, not by one draw of noise for each
    beam, which would change the law of the output.
Lossless: yes
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from isthmus import registry
from isthmus.claims import Claim, Gate, Row, Ruler, Scale, judge
from isthmus.decoding.builders import Level, beam_trie
from isthmus.decoding.heads import FeatureHeads, beam_paths
from isthmus.decoding.target import HubTarget
from isthmus.decoding.trained import Batch
from isthmus.decoding.tree import TokenTree
from isthmus.nn.decoder import ResBlock
from isthmus.objectives.distillation import shifted
from isthmus.roles import Shape
from isthmus.training.drafting import Recipe, acceptance_length, greedy_drafting
from isthmus.workbench.drafters import curve_note, reference_drafter, same_answers, texts


@dataclass(frozen=True)
class Settings:
    """Settings of ReDrafter.

    Attributes:
        unroll: Steps T that the head is trained for.
        blocks: Residual blocks before the LM head.
        recurrent: A learned recurrence over the drafted tokens (the idea); off, their embeddings
            are added up.
        distil: Learn the target's law instead of the text.
        width: Beams.
        length: Tokens of a beam, the root counted as in the paper.
        cut: Successors of a beam that are looked at.
    """

    unroll: int = 5
    blocks: int = 1
    recurrent: bool = True
    distil: bool = True
    width: int = 10
    length: int = 4
    cut: int = 50


class Redrafter(FeatureHeads):
    """A head on ``[f_t; s_k]`` with the recurrent state s of the tokens drafted so far."""

    name = "redrafter"
    settings_type = Settings
    settings: Settings

    def __init__(self, target: HubTarget, settings: Settings | None = None) -> None:
        super().__init__(target, settings)
        width = self.sizes.hidden_size
        self.state = nn.Linear(width, width)  # U and b
        self.token = nn.Linear(width, width, bias=False)  # W
        self.blocks = nn.Sequential(*(ResBlock(2 * width) for _ in range(self.settings.blocks)))
        self.lm_head = nn.Linear(2 * width, target.vocab_size, bias=False)
        if not self.settings.recurrent:
            for p in (*self.state.parameters(), *self.token.parameters()):
                p.requires_grad_(False)
        self._s = torch.empty(0)  # s of each node of the level [B, F, D]

    @property
    def default_shape(self) -> Shape:
        """The beams of the settings."""
        depth = self.settings.length - 1
        return Shape(self.settings.width * depth, depth, self.settings.width)

    def step(self, s: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        """``s_k = silu(U s_{k-1} + b + W E x_{t+k})`` (sec. 3.1); all [..., D]."""
        if not self.settings.recurrent:
            return s + known
        return F.silu(self.state(s) + self.token(known))

    def guess(self, features: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        """Logits [..., V] from ``f_t`` and s, both [..., D]."""
        logits: torch.Tensor = self.lm_head(self.blocks(torch.cat([features, s], -1)))
        return logits

    def loss(self, batch: Batch) -> torch.Tensor:
        """The head unrolled from every place of the text at once."""
        f, known = batch.final, self.embed(batch.ids)
        s, total = torch.zeros_like(f), f.new_zeros(())
        for k in range(1, self.settings.unroll + 1):
            s = self.step(s, shifted(known, k))
            total = total + self.ahead_loss(batch, k, self.guess(f, s))
        return total

    def expand(self, level: Level) -> torch.Tensor:
        """Take in the level's tokens and guess their successors."""
        known = self.embed(level.tokens)
        if level.depth == 0:
            before = torch.zeros_like(known)  # the state is of the round, not of the text
        else:
            before = self._s.gather(1, level.parent[..., None].expand_as(known))
        self._s = self.step(before, known)
        return self.guess(self.feature[:, None].expand_as(self._s), self._s)

    def _tree(self, roots: torch.Tensor, shape: Shape) -> TokenTree:
        """Beam search, then the trie of the beams; as many beams as always fit the shape."""
        width = max(1, min(self.settings.width, shape.nodes // shape.depth))
        branch = min(width, shape.width, self.settings.cut)
        levels = range(shape.depth)
        beams = beam_paths(
            self.expand, roots, branch=[branch for _ in levels], keep=[width for _ in levels]
        )
        return beam_trie(roots, beams)


def claim(ruler: Ruler, scale: Scale = "small") -> Claim:
    """Measure beams of several widths, the recurrence, and the size of the head on ``pycode-m``.

    All arms learn the target's law from the same texts: ReDrafter, the same with summed embeddings
    (off), and Medusa.

    Args:
        ruler: The clock; not used, nothing is timed.
        scale: ``"small"`` decodes 256 held-out texts of 16 tokens, ``"test"`` 8.
    """
    full = scale != "test"
    rows, count = (256, 32) if full else (8, 2)
    recipe = None if full else Recipe(steps=8)
    medusa_settings = registry.load_module(registry.find("medusa")).Settings(distil=True)
    medusa = reference_drafter("medusa", medusa_settings, recipe=recipe)
    off = reference_drafter("redrafter", Settings(recurrent=False), recipe=recipe)
    drafter = reference_drafter("redrafter", recipe=recipe)
    held_out = texts(split="held-out")

    depth, widths = 4, (1, 4, 16)
    beams = {}
    for width in widths:
        part = Redrafter(drafter.target, replace(drafter.settings, width=width)).eval()
        part.load_state_dict(drafter.state_dict())
        beams[width] = part
    tau = {
        (name, width): acceptance_length(
            part, held_out, shape=Shape(width * depth, depth, width), rows=rows
        )
        for name, arms in (("beams", beams), ("off", {1: off}), ("medusa", {1: medusa}))
        for width, part in arms.items()
    }
    wide = Shape(16 * depth, depth, 16)
    same = same_answers(beams[16], wide, count)
    # near the end of a text the beams are shorter; those rounds only lower the count
    nodes = greedy_drafting(beams[16], held_out, shape=wide, rows=rows).drafted
    parameters = {
        d.name: sum(p.numel() for p in d.parameters() if p.requires_grad) for d in (drafter, medusa)
    }
    share = parameters["redrafter"] / parameters["medusa"]

    gates = (
        Gate("answers with the plain output", same, "==", count),
        Gate("4 beams minus 1", tau["beams", 4] - tau["beams", 1], ">", 0.0),
        Gate("16 beams minus 4", tau["beams", 16] - tau["beams", 4], ">", 0.0),
        Gate("nodes of the trie of 16 beams over 16 x 4", nodes / (16 * depth), "<=", 0.7),
        Gate("recurrence minus sum, chain", tau["beams", 1] - tau["off", 1], ">=", 0.1),
        Gate("chain minus Medusa's", tau["beams", 1] - tau["medusa", 1], ">=", 0.05),
        Gate("parameters over Medusa's", share, "<", 1.0),
    )
    unit = "tokens/forward"
    return Claim(
        slug="redrafter",
        statement="One recurrent head, smaller than Medusa's five, is accepted further; more beams "
        "are accepted further still, merging their prefixes saves 30% of the nodes, and the "
        "recurrence is worth 0.1 tokens per forward.",
        paper_figure="up to 2.8x on an H100 (Vicuna), 2.3x on Apple silicon",
        rows=(
            Row(
                "acceptance length, greedy, chain of 4",
                unit,
                tau["medusa", 1],
                tau["beams", 1],
                tau["off", 1],
                note="baseline: Medusa; off: sum of embeddings",
            ),
            *(
                Row(f"acceptance length, greedy, {w} beams of 4", unit, 1.0, tau["beams", w], None)
                for w in widths[1:]
            ),
            Row("nodes of the trie of 16 beams", "nodes", 16.0 * depth, nodes, None),
            Row(
                "parameters",
                "",
                float(parameters["medusa"]),
                float(parameters["redrafter"]),
                None,
                note="baseline: Medusa",
            ),
        ),
        scale=scale,
        device="cpu",
        status=judge(gates, (*gates[:3], *gates[5:])),
        notes=(curve_note(drafter, off, medusa),),
        gates=gates,
        seeds=(0,),
    )
