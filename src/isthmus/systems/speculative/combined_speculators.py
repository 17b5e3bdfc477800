"""Combined token/embedding speculators: an n-stage MLP that takes in each drafted token.

Paper: Wertheimer, Rosenkranz, Parnell, Suneja, Ranganathan, Ganti, Srivatsa. Accelerating
    Production LLMs with Combined Token/Embedding Speculators. 2024. arXiv:2404.19124
Idea: The state starts as the target's hidden state and each stage mixes in the token that was just
    drafted, weighed so that the context keeps half of the variance: as cheap as heads, and no
    longer blind to its own draft.
Differs: The candidates of a round are the best joint paths, merged by prefix into one tree. The
    second training stage, on texts that the target writes itself, is a second run of the same
    trainer on other texts (:func:`isthmus.training.samples.sampled_texts`).
Lossless: yes
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from isthmus.claims import Claim, Gate, Row, Ruler, Scale, judge
from isthmus.decoding.builders import Level, beam_trie
from isthmus.decoding.heads import FeatureHeads, beam_paths
from isthmus.decoding.target import HubTarget
from isthmus.decoding.trained import Batch, TrainedDrafter
from isthmus.decoding.tree import TokenTree
from isthmus.errors import InvalidInputError
from isthmus.objectives.distillation import shifted
from isthmus.roles import Shape
from isthmus.training.drafting import DraftTraining, Recipe, acceptance_length
from isthmus.training.samples import sampled_texts
from isthmus.workbench.drafters import curve_note, reference_drafter, same_answers, texts


@dataclass(frozen=True)
class Settings:
    """Settings of the speculator.

    Attributes:
        stages: Stages n, one for each drafted token.
        inner: Width inside; the target's own when 0.
        tie_weights: All stages share embedding, norm and head, and all but the first their
            projection.
        scale_input: Normalise the target's hidden state first.
        use_state: Start from the target's hidden state; off, from nothing: tokens only.
        use_tokens: Take in the drafted tokens; off, context only.
        distil: Learn the target's law instead of the text.
        top_k: Children of a node at each stage.
        candidates: Joint paths that are verified.
    """

    stages: int = 3
    inner: int = 0
    tie_weights: bool = False
    scale_input: bool = False
    use_state: bool = True
    use_tokens: bool = True
    distil: bool = False
    top_k: tuple[int, ...] = (5, 4, 3)
    candidates: int = 5

    def __post_init__(self) -> None:
        if self.stages < 1 or len(self.top_k) != self.stages:
            raise InvalidInputError(
                f"top_k needs one number for each of {self.stages} stages, got {list(self.top_k)}"
            )


class ShiftedNorm(nn.Module):
    """Root mean square norm with a learned weight and bias.

    Args:
        width: Width D.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [..., D] to [..., D]."""
        out: torch.Tensor = F.rms_norm(x, self.weight.shape, self.weight, 1e-6) + self.bias
        return out


def token_weight(stages: int, inner: int) -> float:
    """Weight r of an embedding beside the projected state (sec. 3.2).

    The state is worth ``a = 0.5^(0.5/n)`` a stage, so its variance is halved after n of them; an
    embedding with entries of variance 1/inner is scaled by b to fill up the rest.

    Example:
        >>> round(token_weight(3, 1024), 4)
        11.536
    """
    a = math.pow(0.5, 0.5 / stages)
    return math.sqrt((1 - a**2) * inner / 2) / a


class CombinedSpeculators(FeatureHeads):
    """``z_k = gelu(norm_k(P_k z_{k-1} + r e_k[x_{t+k}]))``, logits ``H_k z_k``."""

    name = "combined-speculators"
    settings_type = Settings
    settings: Settings

    def __init__(self, target: HubTarget, settings: Settings | None = None) -> None:
        super().__init__(target, settings)
        s, width, vocab = self.settings, self.sizes.hidden_size, target.vocab_size
        inner = self.inner = s.inner or width
        own = 1 if s.tie_weights else s.stages
        self.emb = nn.ModuleList(nn.Embedding(vocab, inner) for _ in range(own))
        self.proj = nn.ModuleList(
            nn.Linear(inner if k else width, inner, bias=False)
            for k in range(min(2, s.stages) if s.tie_weights else s.stages)
        )
        self.ln = nn.ModuleList(ShiftedNorm(inner) for _ in range(own))
        self.lm_heads = nn.ModuleList(nn.Linear(inner, vocab, bias=False) for _ in range(own))
        for module in (*self.emb, *self.proj, *self.lm_heads):
            nn.init.normal_(module.weight, std=1 / math.sqrt(inner))
        self.ratio = token_weight(s.stages, inner)
        self._z = torch.empty(0)  # state of each node of the level [B, F, inner]

    @property
    def default_shape(self) -> Shape:
        """The candidates of the settings."""
        s = self.settings
        return Shape(s.candidates * s.stages, s.stages, max(s.top_k))

    @property
    def max_depth(self) -> int:
        """One level a stage."""
        return self.settings.stages

    def start(self, features: torch.Tensor) -> torch.Tensor:
        """``z_0`` from ``f_t``, both [..., D]."""
        if not self.settings.use_state:
            return torch.zeros_like(features)
        if self.settings.scale_input:
            return F.rms_norm(features, features.shape[-1:], None, 1e-6) / math.sqrt(2)
        return features

    def stage(self, k: int, z: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """``z_k`` [..., inner] from ``z_{k-1}`` and tokens [...]; k counts from 1."""
        tied = self.settings.tie_weights
        own = 0 if tied else k - 1
        mixed = self.proj[min(k - 1, 1) if tied else k - 1](z)
        if self.settings.use_tokens:
            mixed = mixed + self.ratio * self.emb[own](tokens)
        return F.gelu(self.ln[own](mixed))

    def guess(self, k: int, z: torch.Tensor) -> torch.Tensor:
        """Logits [..., V] of stage k."""
        logits: torch.Tensor = self.lm_heads[0 if self.settings.tie_weights else k - 1](z)
        return logits

    def loss(self, batch: Batch) -> torch.Tensor:
        """Cross-entropy of every stage behind the true tokens."""
        z, total = self.start(batch.final), batch.final.new_zeros(())
        for k in range(1, self.settings.stages + 1):
            z = self.stage(k, z, shifted(batch.ids, k))
            total = total + self.ahead_loss(batch, k, self.guess(k, z))
        return total

    def expand(self, level: Level) -> torch.Tensor:
        """Take in the level's tokens and guess their successors."""
        if level.depth == 0:
            before = self.start(self.feature)[:, None]
        else:
            above = level.parent[..., None].expand(-1, -1, self._z.shape[-1])
            before = self._z.gather(1, above)
        self._z = self.stage(level.depth + 1, before, level.tokens)
        return self.guess(level.depth + 1, self._z)

    def _tree(self, roots: torch.Tensor, shape: Shape) -> TokenTree:
        """The best joint paths among all combinations of each stage's candidates."""
        kept = max(1, min(self.settings.candidates, shape.nodes // shape.depth))
        branch = [min(k, shape.width) for k in self.settings.top_k[: shape.depth]]
        keep = [math.prod(branch[: i + 1]) for i in range(len(branch) - 1)]
        return beam_trie(roots, beam_paths(self.expand, roots, branch=branch, keep=[*keep, kept]))


def trained_on(
    drafter: TrainedDrafter, material: torch.Tensor, held_out: torch.Tensor, recipe: Recipe
) -> TrainedDrafter:
    """A copy of a drafter, trained further on other texts; all int [W, T]."""
    again = type(drafter)(drafter.target, drafter.settings)
    again.load_state_dict(drafter.state_dict())
    return DraftTraining(again, material, held_out, recipe).run()


def claim(ruler: Ruler, scale: Scale = "small") -> Claim:
    """Measure both inputs against each alone, and the second stage, on ``pycode-m``.

    Args:
        ruler: The clock; not used, nothing is timed.
        scale: ``"small"`` decodes 256 held-out texts of 16 tokens, ``"test"`` 8.
    """
    full = scale != "test"
    rows, count, written = (256, 16, 1200) if full else (8, 2, 12)
    recipe = None if full else Recipe(steps=8)
    settings = {
        "both": Settings(),
        "context": Settings(use_tokens=False),
        "tokens": Settings(use_state=False),
    }
    arms = {
        name: reference_drafter("combined-speculators", each, recipe=recipe)
        for name, each in settings.items()
    }
    corpus, held_out = texts(), texts(split="held-out")
    chain, drafter = Shape(3, 3, 1), arms["both"]
    tau = {name: acceptance_length(d, held_out, shape=chain, rows=rows) for name, d in arms.items()}
    paths = acceptance_length(drafter, held_out, shape=drafter.default_shape, rows=rows)

    # both go on for the same steps, one on the corpus, one on what the target writes
    own = sampled_texts(drafter.target, corpus[:written, :32], 64)
    unseen = sampled_texts(drafter.target, held_out[:rows, :32], 64, seed=1)
    further = Recipe(steps=200 if full else 2, validate_every=200, learning_rate=5e-4, seed=1)
    second, first = (
        acceptance_length(
            trained_on(drafter, material, unseen, further), unseen, shape=chain, rows=rows
        )
        for material in (own, corpus)
    )
    before = acceptance_length(drafter, unseen, shape=chain, rows=rows)

    same = same_answers(drafter, drafter.default_shape, count)
    gates = (
        Gate("answers with the plain output", same, "==", count),
        Gate("both minus context only", tau["both"] - tau["context"], ">=", 0.1),
        Gate("both minus tokens only", tau["both"] - tau["tokens"], ">=", 0.1),
        Gate("second stage minus more of the first", second - first, ">", 0.0),
    )
    direction = (
        *gates[::3],
        Gate("both minus context only, direction", tau["both"] - tau["context"], ">", 0.0),
        Gate("both minus tokens only, direction", tau["both"] - tau["tokens"], ">", 0.0),
    )
    unit = "tokens/forward"
    return Claim(
        slug="combined-speculators",
        statement="Hidden state and drafted tokens together are accepted at least 0.1 tokens per "
        "forward further than either alone, and a second stage on the target's own texts helps "
        "more on such texts than as many steps on the corpus.",
        paper_figure="2x to 3x on Llama-2, CodeLlama and Granite in an optimised server (sec. 4)",
        rows=(
            Row(
                "acceptance length, greedy, chain of 3",
                unit,
                1.0,
                tau["both"],
                tau["context"],
                control=tau["tokens"],
                note="off: context only; control: tokens only",
            ),
            Row("acceptance length, greedy, 5 joint paths", unit, tau["both"], paths, None),
            Row(
                "acceptance length on the target's own texts, chain of 3",
                unit,
                before,
                second,
                first,
                note="baseline: first stage; off: as many further steps on the corpus",
            ),
        ),
        scale=scale,
        device="cpu",
        status=judge(gates, direction),
        notes=(curve_note(*arms.values()),),
        gates=(*gates, *direction[2:]),
        seeds=(0, 1),
    )
