"""Kangaroo: the target's own first layers draft, and stop as soon as they are unsure.

Paper: Liu, Tang, Liu, Ni, Tang, Han, Wang. Kangaroo: Lossless Self-Speculative Decoding via Double
    Early Exiting. 2024. arXiv:2404.18911
Idea: A single attention layer on top of the target's first layers is a good drafter that shares
    their work with the verification, and a draft ends at its first unsure token.
Differs: Sampled drafts are verified with the exact rule (the paper decodes greedily). On a target
    of few layers the exit is after the second or the one before the last. In exact mode the
    verification repeats the first layers, because its forwards have a fixed shape.
Lossless: yes
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from isthmus.claims import Claim, Gate, Row, Ruler, Scale, judge
from isthmus.decoding.builders import Level
from isthmus.decoding.draft_cache import DraftCache
from isthmus.decoding.layers import LayerSlices, ShallowRun, check_layer, frozen
from isthmus.decoding.target import HubTarget
from isthmus.decoding.trained import Batch, Fresh, TrainedDrafter
from isthmus.decoding.tree import TokenTree
from isthmus.nn.decoder import Attention, Store
from isthmus.objectives.distillation import soft_cross_entropy
from isthmus.roles import Context, Shape, Taps
from isthmus.training.drafting import Drafting, Recipe, greedy_drafting
from isthmus.workbench.drafters import curve_note, reference_drafter, same_answers, texts


@dataclass(frozen=True)
class Settings:
    """Settings of Kangaroo.

    Attributes:
        exit_layer: Layers of the target that draft, l.
        adapter: Put the attention layer on top of them (the idea); off, only a norm.
        threshold: A draft ends after a token whose probability is below this, eta; 0 never.
        steps: Draft tokens at most, gamma.
    """

    exit_layer: int = 2
    adapter: bool = True
    threshold: float = 0.6
    steps: int = 6


class Kangaroo(TrainedDrafter):
    """Layers 1 to l of the target, then ``h + Attention(norm h)``, then a norm and its head."""

    name = "kangaroo"
    settings_type = Settings
    settings: Settings

    def __init__(self, target: HubTarget, settings: Settings | None = None) -> None:
        super().__init__(target, settings)
        self.slices = LayerSlices(target)
        check_layer(target, self.settings.exit_layer, "exit_layer")
        self.exit = max(1, min(self.settings.exit_layer, target.num_layers - 1))
        self.taps = Taps(layers=(self.exit,))
        width, eps = self.sizes.hidden_size, self.sizes.rms_norm_eps
        if self.settings.adapter:
            self.input_layernorm = nn.RMSNorm(width, eps)
            self.self_attn = Attention(self.sizes)
        self.norm = nn.RMSNorm(width, eps)
        self.norm.weight.data.copy_(self.slices.norm.weight.detach())
        self._cache: DraftCache | None = None
        self._run: ShallowRun | None = None
        self._tops: list[torch.Tensor] = []  # probability of the likeliest child, a step, [B]

    @property
    def default_shape(self) -> Shape:
        """A chain."""
        return Shape(self.settings.steps, self.settings.steps, 1)

    @property
    def max_depth(self) -> int:
        """Steps gamma."""
        return self.settings.steps

    def adapt(
        self,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor | None = None,
        store: Store | None = None,
    ) -> torch.Tensor:
        """Logits [B, N, V] from the states that leave layer l, [B, N, D] (sec. 3.1)."""
        if self.settings.adapter:
            normed = self.input_layernorm(hidden)
            hidden = hidden + self.self_attn(normed, positions, mask, store)
        return self.head(self.norm(hidden))

    def loss(self, batch: Batch) -> torch.Tensor:
        """Cross-entropy to the target's law at the same place (eq. 3)."""
        hidden = batch.features.layers[self.exit]
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        with frozen(self.target.model):
            return soft_cross_entropy(
                batch.target_logits, self.adapt(hidden, positions), batch.mask
            )

    def reset(self, batch: int) -> None:
        """An empty cache of the adapter; that of the first layers is the target's own."""
        self._cache = DraftCache(self.sizes, 1, batch, self.target.state_dtype, self.target.device)

    def absorb(self, fresh: Fresh) -> None:
        """Run the adapter over verified tokens."""
        assert self._cache is not None
        positions, mask = self._cache.append(fresh.valid)
        if self.settings.adapter:
            hidden = self.input_layernorm(fresh.features.layers[self.exit])
            self.self_attn(hidden, positions, mask, self._cache.store(0))
        self._cache.commit(fresh.valid)

    def propose(self, context: Context, shape: Shape) -> TokenTree:
        """A chain that ends in each row after its first unsure token (Alg. 1)."""
        self._run, self._tops = None, []
        tree = super().propose(context, Shape(shape.nodes, shape.depth, 1))
        if self._run is not None:
            self.session.ahead = self._run  # verification goes on from the shallow states
        if tree.nodes < 3:
            return tree
        sure = torch.stack(self._tops[: tree.nodes - 2], 1) >= self.settings.threshold
        keep = torch.cat([sure.new_ones(len(sure), 2), sure.cumprod(1).bool()], 1)
        return tree.prune(keep & tree.alive, closed=True)

    def expand(self, level: Level) -> torch.Tensor:
        """Run a token through the first layers and the adapter."""
        assert self._cache is not None
        if level.depth == 0:
            self._cache.drop()
            self._run = ShallowRun(self.slices, self.session, self.exit)
        assert self._run is not None
        hidden = self._run.step(level.tokens)
        positions, mask = self._cache.branch(level.parent)
        logits = self.adapt(hidden, positions, mask, self._cache.store(0))
        self._tops.append(torch.softmax(logits[:, 0].float(), -1).amax(-1))
        return logits

    def stops(self, logits: torch.Tensor) -> bool:
        """Whether every row has drafted an unsure token before this step."""
        tops = torch.stack(self._tops[:-1])
        return bool((tops < self.settings.threshold).any(0).all())

    def select_state(self, rows: torch.Tensor) -> None:
        """Keep the given rows."""
        assert self._cache is not None
        self._cache.select(rows.tolist())


def work(drafter: Kangaroo, drafted: float) -> float:
    """Work of one round in target forwards: shallow passes with the adapter, then the rest once.

    The root and every draft token take layers 1 to l and the adapter one after the other; the
    other layers run once for all of them, and many tokens there are taken to cost what one does.

    Args:
        drafter: Its sizes count.
        drafted: Draft tokens of the round.
    """
    layers: Any = drafter.target.layers
    a_layer = sum(p.numel() for p in layers[0].parameters())
    adapter = sum(p.numel() for p in drafter.parameters()) / a_layer
    count = drafter.target.num_layers
    shallow = (1 + drafted) * (drafter.exit + adapter)
    return float((shallow + count - drafter.exit) / count)


def with_policy(drafter: Kangaroo, threshold: float, steps: int) -> Kangaroo:
    """The same weights with another rule for the end of a draft."""
    s = drafter.settings
    twin = Kangaroo(drafter.target, Settings(s.exit_layer, s.adapter, threshold, steps))
    twin.load_state_dict(drafter.state_dict())
    return twin.to(drafter.norm.weight).eval()


def claim(ruler: Ruler, scale: Scale = "small") -> Claim:
    """Measure on ``pycode-m``: with and without the adapter, with and without the threshold.

    Args:
        ruler: The clock; not used, work is counted in layers.
        scale: ``"small"`` decodes 256 held-out texts of 16 tokens, ``"test"`` 8.
    """
    full = scale != "test"
    recipe, rows = (None, 256) if full else (Recipe(steps=12), 8)
    ours = reference_drafter("kangaroo", recipe=recipe)
    off = reference_drafter("kangaroo", Settings(adapter=False), recipe=recipe)
    medusa = reference_drafter("medusa", recipe=recipe)
    assert isinstance(ours, Kangaroo) and isinstance(off, Kangaroo)
    held_out, chain = texts(split="held-out"), Shape(6, 6, 1)

    def draft(drafter: TrainedDrafter) -> Drafting:
        return greedy_drafting(drafter, held_out, shape=chain, rows=rows)

    def score(drafter: Kangaroo, run: Drafting) -> float:
        return run.acceptance_length / work(drafter, run.drafted)

    fixed = {gamma: draft(with_policy(ours, 0.0, gamma)) for gamma in (1, 2, 4, 6)}
    worth = {gamma: score(ours, run) for gamma, run in fixed.items()}
    best = max(worth, key=lambda gamma: worth[gamma])
    stopping, stopping_off = draft(ours), draft(off)
    long, bare, heads = fixed[6], draft(with_policy(off, 0.0, 6)), draft(medusa)
    lengths = [run.acceptance_length for run in (long, bare, heads)]
    gain = score(ours, stopping) / worth[best]
    sizes = [sum(p.numel() for p in d.parameters()) for d in (ours, medusa)]
    count = 24 if full else 2
    same = same_answers(ours, chain, count)

    gates = (
        Gate("answers with the plain output", same, "==", count),
        Gate("acceptance length minus that without adapter", lengths[0] - lengths[1], ">=", 0.5),
        Gate("acceptance length minus that of medusa", lengths[0] - lengths[2], ">", 0.0),
        Gate("tokens per work, threshold over best fixed length", gain, ">=", 1.0),
    )
    unit = "tokens/forward"
    return Claim(
        slug="kangaroo",
        statement="An attention layer on top of the target's first two layers raises the length of "
        "their accepted drafts by half a token or more, past that of Medusa's far larger heads, "
        "and ending a draft at its first unsure token is worth at least the best fixed length.",
        paper_figure="up to 1.68x on Spec-Bench (Vicuna-7B), ahead of Medusa-1 with 88.7% fewer "
        "parameters (abstract)",
        rows=(
            Row(
                "acceptance length, greedy, chain of 6",
                unit,
                lengths[2],
                lengths[0],
                lengths[1],
                note="baseline: medusa, whose five heads draft five",
            ),
            Row(
                "acceptance length, threshold 0.6",
                unit,
                None,
                stopping.acceptance_length,
                stopping_off.acceptance_length,
                note=f"{stopping.drafted:.2f} draft tokens a round",
            ),
            Row(
                "tokens per forward's worth of work",
                "x",
                worth[best],
                score(ours, stopping),
                score(off, stopping_off),
                note="baseline: the best fixed length; "
                + ", ".join(f"{gamma}: {x:.3f}" for gamma, x in worth.items()),
            ),
            Row("trained parameters", "", sizes[1], sizes[0], None, note="baseline: medusa"),
        ),
        scale=scale,
        device="cpu",
        status=judge(
            gates,
            (
                gates[0],
                Gate("without adapter is behind", lengths[0] - lengths[1], ">", 0),
                gates[2],
            ),
        ),
        notes=(
            f"The exit is after layer {ours.exit} of {ours.target.num_layers}: each draft token "
            f"costs {work(ours, 1) - work(ours, 0):.2f} target forwards by layer count, so the "
            "acceptance length alone flatters.",
            "Work counts a layer run on several tokens at once as a layer run on one.",
            curve_note(ours, off, medusa),
        ),
        gates=gates,
        seeds=(0,),
    )
