"""Medusa: extra heads on the last hidden state guess the tokens further ahead.

Paper: Cai, Li, Geng, Peng, Lee, Chen, Dao. Medusa: Simple LLM Inference Acceleration Framework with
    Multiple Decoding Heads. 2024. arXiv:2401.10774
Idea: K small heads read one hidden state and guess the tokens 2 to K+1 ahead, all at once; a sparse
    tree of their best guesses is verified in one forward.
Differs: Heads on a frozen target only (Medusa-1). The tree is calibrated on what the heads got
    right while they were trained, not on a separate set, and grows to the size that is asked for.
    Verification is exact unless ``typical`` is set, which trades the law of the output for length.
Lossless: yes
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch
from torch import nn

from isthmus.claims import Claim, Gate, Row, Ruler, Scale, judge
from isthmus.decoding.acceptance import Typical
from isthmus.decoding.builders import Level
from isthmus.decoding.heads import FeatureHeads, RankShares, rank_hits
from isthmus.decoding.policy import Fixed
from isthmus.decoding.target import HubTarget
from isthmus.decoding.trained import Batch
from isthmus.decoding.tree import TokenTree
from isthmus.nn.decoder import ResBlock
from isthmus.objectives.distillation import shifted
from isthmus.roles import Acceptance, Shape
from isthmus.training.drafting import Recipe, acceptance_length, read
from isthmus.workbench.bench import answer, repeats_itself
from isthmus.workbench.drafters import curve_note, reference_drafter, target_model, texts


@dataclass(frozen=True)
class Settings:
    """Settings of Medusa.

    Attributes:
        heads: Heads K.
        blocks: Residual blocks of a head.
        decay: Head k weighs ``decay^k`` in the loss (eq. 1: 0.8).
        distil: Learn the target's law instead of the text.
        ahead: Every head is taught a token further ahead (the idea); off, all of them are taught
            the next token, which the target knows anyway.
        typical: Accept what is typical for the target (sec. 2.3.1) instead of the exact rule.
        eps: Hard threshold of typical acceptance.
        delta: Its entropy-dependent threshold.
        nodes: Draft nodes of the tree.
        depth: Its levels.
    """

    heads: int = 5
    blocks: int = 1
    decay: float = 0.8
    distil: bool = False
    ahead: bool = True
    typical: bool = False
    eps: float = 0.09
    delta: float = 0.3
    nodes: int = 63
    depth: int = 4


class Medusa(FeatureHeads):
    """K heads, each its own residual blocks and its own copy of the LM head."""

    name = "medusa"
    settings_type = Settings
    settings: Settings

    def __init__(self, target: HubTarget, settings: Settings | None = None) -> None:
        super().__init__(target, settings)
        s, width = self.settings, self.sizes.hidden_size
        self.blocks = nn.ModuleList(
            nn.Sequential(*(ResBlock(width) for _ in range(s.blocks))) for _ in range(s.heads)
        )
        self.lm_heads = nn.ModuleList(self.own_head() for _ in range(s.heads))
        self.ranks = RankShares(s.heads)
        self.acceptance: Acceptance | None = Typical(s.eps, s.delta) if s.typical else None

    @property
    def default_shape(self) -> Shape:
        """The tree of the settings."""
        return Shape(self.settings.nodes, self.settings.depth, 10)

    @property
    def max_depth(self) -> int:
        """One level a head."""
        return self.settings.heads

    def guess(self, k: int, features: torch.Tensor) -> torch.Tensor:
        """Logits [..., V] of head k, from 1, on features [..., D] (sec. 2.1.1)."""
        logits: torch.Tensor = self.lm_heads[k - 1](self.blocks[k - 1](features))
        return logits

    def loss(self, batch: Batch) -> torch.Tensor:
        """Cross-entropy of every head to its token (eq. 1)."""
        total = batch.final.new_zeros(())
        for k in range(1, self.settings.heads + 1):
            logits = self.guess(k, batch.final)
            self.ranks.learn(batch, k, logits)
            loss = self.ahead_loss(batch, k if self.settings.ahead else 0, logits)
            total = total + self.settings.decay**k * loss
        return total

    def expand(self, level: Level) -> torch.Tensor:
        """The head of this depth; its guess is the same for every node."""
        logits = self.guess(level.depth + 1, self.feature)
        return logits[:, None].expand(-1, level.tokens.shape[1], -1)

    def _tree(self, roots: torch.Tensor, shape: Shape) -> TokenTree:
        """The calibrated tree, filled with the best guesses of each head."""
        plan = self.ranks.plan(shape)
        depths = range(1, plan.topology.max_depth + 1)
        if not depths:
            return TokenTree.root(roots)
        logits = torch.stack([self.guess(k, self.feature) for k in depths], 1)  # [B, K, V]
        return plan.fill(roots, logits.topk(max(plan.ranks) + 1, -1).indices)


def head_accuracy(drafter: Medusa, held_out: torch.Tensor) -> list[float]:
    """Share of held-out places where each head's best guess is the target's own choice.

    Args:
        drafter: With its heads.
        held_out: Texts, int [W, T].
    """
    with torch.no_grad():
        batch = read(drafter, held_out.long(), torch.Generator().manual_seed(0))
        return [
            float(
                rank_hits(
                    drafter.guess(k, batch.final),
                    shifted(batch.target_logits.argmax(-1), k),
                    batch.before(k),
                    1,
                )
            )
            for k in range(1, drafter.settings.heads + 1)
        ]


def claim(ruler: Ruler, scale: Scale = "small") -> Claim:
    """Measure heads on ``pycode-m``: tree and chain, by depth, and beside heads taught nothing.

    Args:
        ruler: The clock; not used, nothing is timed.
        scale: ``"small"`` decodes 256 held-out texts of 16 tokens, ``"test"`` 8.
    """
    full = scale != "test"
    rows, count = (256, 24) if full else (8, 2)
    drafter = reference_drafter("medusa", recipe=None if full else Recipe(steps=12))
    model, held_out = target_model(), texts(split="held-out")
    assert isinstance(drafter, Medusa) and isinstance(model.target, HubTarget)
    off = Medusa(model.target, replace(drafter.settings, ahead=False)).eval()
    off.ranks.load_state_dict(drafter.ranks.state_dict())

    chain, tree = Shape(4, 4, 1), drafter.default_shape
    tau = {
        (name, kind): acceptance_length(part, held_out, shape=shape, rows=rows)
        for name, part in (("on", drafter), ("off", off))
        for kind, shape in (("chain", chain), ("tree", tree))
    }
    accuracy = head_accuracy(drafter, held_out[:rows])
    falls = min(a - b for a, b in itertools.pairwise(accuracy))

    prompts = held_out[:count, :32].tolist()
    policy = Fixed(drafter, tree)
    plain = answer(model, prompts, "none", max_new_tokens=16)
    exact = answer(model, prompts, policy, max_new_tokens=16)
    loose = answer(
        model, prompts, policy, max_new_tokens=16, acceptance=Typical(drafter.settings.eps)
    )
    same = sum(a == b for a, b in zip(exact.tokens, plain.tokens, strict=True))
    same_loose = sum(a == b for a, b in zip(loose.tokens, plain.tokens, strict=True))
    loops = sum(repeats_itself(t, size=3, times=2) for t in plain.tokens)

    gates = (
        Gate("answers with the plain output", same, "==", count),
        Gate("acceptance length, chain of 4", tau["on", "chain"], ">", 1.2),
        Gate("tree of 63 minus chain", tau["on", "tree"] - tau["on", "chain"], ">", 0.0),
        Gate("smallest fall of accuracy from head to head", falls, ">", 0.0),
        Gate(
            "chain minus chain of untaught heads",
            tau["on", "chain"] - tau["off", "chain"],
            ">=",
            0.05,
        ),
    )
    unit = "tokens/forward"
    return Claim(
        slug="medusa",
        statement="Heads on the last hidden state, trained for minutes on a frozen target, draft a "
        "chain that is accepted at more than 1.2 tokens per forward and a tree that is accepted "
        "further, and each head is less accurate than the one before.",
        paper_figure="more than 2.2x for Medusa-1 on Vicuna-7B (Table 1); about 2.3 tokens/forward "
        "in independent reruns",
        rows=(
            *(
                Row(
                    f"acceptance length, greedy, {kind}",
                    unit,
                    1.0,
                    tau["on", kind],
                    tau["off", kind],
                )
                for kind in ("chain", "tree")
            ),
            *(
                Row(f"accuracy of head {k}", "", None, share, None)
                for k, share in enumerate(accuracy, 1)
            ),
            Row(
                "acceptance length, typical acceptance, tree",
                unit,
                exact.acceptance_length(),
                loose.acceptance_length(),
                None,
                note=f"not lossless: {same_loose} of {count} answers equal plain greedy decoding",
            ),
        ),
        scale=scale,
        device="cpu",
        status=judge(gates, (gates[0], gates[2], gates[4])),
        notes=(
            curve_note(drafter),
            f"{loops} of {count} plain answers repeat themselves.",
        ),
        gates=gates,
        seeds=(0,),
    )
