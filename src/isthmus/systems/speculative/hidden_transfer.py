"""Hidden Transfer: map a middle state to those of the next tokens and let the target refine them.

Paper: Wu, Liu, Gong, Wang, Li, Wang, Cai, Zhao. Parallel Decoding via Hidden Transfer for Lossless
    Large Language Model Acceleration. 2024. arXiv:2404.12022
Idea: Half-way up the target a linear map turns the state of one token into pseudo states of the
    tokens after it; the remaining layers, frozen, refine these along with the real ones, so that
    drafting shares the forward of the verification.
Differs: All maps are trained together (the paper trains one after the other), on texts whose real
    states are read once. Trees are the best ones by probability instead of a fixed table. A round
    that another drafter drafted leaves no pseudo states, and the next one drafts nothing.
Lossless: yes
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from isthmus.claims import Claim, Gate, Row, Ruler, Scale, judge
from isthmus.decoding.builders import Level
from isthmus.decoding.layers import LayerSlices, check_layer, frozen
from isthmus.decoding.target import HubTarget, SlotSession
from isthmus.decoding.trained import Batch, Fresh, TrainedDrafter
from isthmus.decoding.tree import TokenTree
from isthmus.errors import InvalidInputError
from isthmus.nn.masks import additive, rollout_mask
from isthmus.objectives.distillation import shifted, soft_cross_entropy
from isthmus.roles import Context, Features, Scores, Shape, Step, Taps, Target
from isthmus.training.drafting import Recipe, acceptance_length
from isthmus.workbench.drafters import curve_note, reference_drafter, same_answers, texts


@dataclass(frozen=True)
class Settings:
    """Settings of Hidden Transfer.

    Attributes:
        layers: Layer l_k before which the pseudo state of step k joins, 1 to L, never rising with
            k; empty, half of the layers for every step.
        steps: Draft steps K, where ``layers`` is empty.
        refine: Run pseudo states through the layers above (the idea); off, they meet the final norm
            and the head as they are.
        top_k: Children of a node and nodes expanded on a level.
        nodes: Draft nodes a round.
    """

    layers: tuple[int, ...] = ()
    steps: int = 3
    refine: bool = True
    top_k: int = 8
    nodes: int = 16

    def __post_init__(self) -> None:
        if self.steps < 1 or list(self.layers) != sorted(self.layers, reverse=True):
            raise InvalidInputError(
                "hidden-transfer needs 1 step or more, and layers that never rise from step to "
                f"step; got steps={self.steps}, layers={list(self.layers)}"
            )


class HiddenTransfer(TrainedDrafter):
    """Matrices ``T_k`` and nothing else: ``s_k = T_k h_i`` before layer l_k, at place i + k."""

    name = "hidden-transfer"
    settings_type = Settings
    settings: Settings
    reads_cache = True

    def __init__(self, target: HubTarget, settings: Settings | None = None) -> None:
        super().__init__(target, settings)
        s, count, width = self.settings, target.num_layers, self.sizes.hidden_size
        self.slices = LayerSlices(target)
        self.joins = s.layers or (max(1, count // 2),) * s.steps
        for layer in self.joins:
            check_layer(target, layer, "layers")
        self.taps = Taps(layers=tuple(sorted(set(self.joins))))
        self.transfer = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in self.joins)
        for matrix in self.transfer.parameters():
            nn.init.eye_(matrix)
        self._states: Any = None  # pseudo states of the last verified token, [B, K, D]
        self.shared: SharedPass | None = None

    @property
    def default_shape(self) -> Shape:
        """The tree of the settings."""
        return Shape(self.settings.nodes, len(self.joins), self.settings.top_k)

    @property
    def max_depth(self) -> int:
        """One level a step."""
        return len(self.joins)

    def branch(self) -> tuple[int, int]:
        """The best nodes of a level are expanded."""
        return self.settings.top_k, self.settings.top_k

    def joining(self, layer: int) -> list[int]:
        """Steps whose pseudo states join before a layer, from 1."""
        return [k for k, join in enumerate(self.joins, 1) if join == layer]

    def guess(self, states: torch.Tensor) -> torch.Tensor:
        """Logits [..., V] of pseudo states that have left the last layer, [..., D]."""
        return self.head(self.slices.finish(states))

    def rollout(self, batch: Batch) -> torch.Tensor:
        """Refined pseudo states [B, K, T, D] at every place of a text; row [k, i] for i + k + 1."""
        b, t = batch.ids.shape
        place, stages = torch.arange(t, device=batch.ids.device), sorted(set(self.joins))
        order: list[int] = []  # steps in the order in which they joined
        hidden = batch.features.layers[stages[0]][:, :0]
        for stage, stop in zip(stages, [*stages[1:], self.target.num_layers], strict=True):
            real = batch.features.layers[stage]
            fresh = self.joining(stage)
            hidden = torch.cat([hidden, *(self.transfer[k - 1](real) for k in fresh)], 1)
            order += fresh
            if not self.settings.refine or stage == stop:
                continue
            anchor = place.repeat(len(order))
            depth = torch.tensor(order, device=place.device).repeat_interleave(t)
            seen = rollout_mask(
                anchor, depth, torch.cat([place, anchor]), torch.cat([place * 0, depth])
            )
            where = (anchor + depth).expand(b, -1)
            if self.target.max_length is not None:
                where = where.clamp(max=self.target.max_length - 1)
            past = Joined(batch.past)
            hidden = self.slices.run(hidden, stage, stop, where, additive(seen, hidden.dtype), past)
        index = [order.index(k) for k in range(1, len(order) + 1)]
        return hidden.view(b, len(order), t, -1)[:, index]

    def loss(self, batch: Batch) -> torch.Tensor:
        """Cross-entropy of every step to the target's law at the place it stands for."""
        with frozen(self.target.model):
            states = self.rollout(batch)
            total = states.new_zeros(())
            for k in range(1, len(self.joins) + 1):
                law = shifted(batch.target_logits, k)
                logits = self.guess(states[:, k - 1])
                total = total + soft_cross_entropy(law, logits, batch.before(k))
        return total

    def reset(self, batch: int) -> None:
        """No pseudo states yet."""
        self._states = torch.zeros(
            batch,
            len(self.joins),
            self.sizes.hidden_size,
            device=self.target.device,
            dtype=self.target.dtype,
        )

    def begin(self, context: Context, target: Target, **inputs: Any) -> None:
        """Nothing can be drafted before the first shared forward."""
        super().begin(context, target, **inputs)
        self.shared = None
        self._ready = torch.zeros(context.batch, dtype=torch.bool, device=self.target.device)

    def absorb(self, fresh: Fresh) -> None:
        """Nothing: the next draft comes out of the shared forward."""

    def propose(self, context: Context, shape: Shape) -> TokenTree:
        """The draft that the last forward left; the next one will leave another."""
        tree = super().propose(context, shape)
        session = context.session
        self.shared = SharedPass(self, session) if isinstance(session, SlotSession) else None
        if self.shared is not None:
            self.shared.session.ahead = self.shared
        return tree

    def observe(self, step: Step) -> None:
        """Take over the pseudo states of the last accepted node."""
        states = None if self.shared is None else self.shared.states
        self.shared = None
        made = states is not None
        self._ready = torch.full((step.tree.batch,), made, device=self.target.device)
        if states is not None:
            last = (step.verdict.path >= 0).sum(1, keepdim=True) - 1
            node = step.verdict.path.gather(1, last)[:, 0]
            rows = torch.arange(len(node), device=node.device)
            self._states = states[rows, :, node]

    def expand(self, level: Level) -> torch.Tensor:
        """The step of this depth; its guess is the same for every node."""
        logits = self.guess(self._states[:, level.depth])
        return logits[:, None].expand(-1, level.tokens.shape[1], -1)

    def select_state(self, rows: torch.Tensor) -> None:
        """Keep the given rows."""
        self._states = self._states[rows]


class Joined:
    """The cache of a text for rows that come on top: read every time, changed never.

    Args:
        past: Keys and values of the real tokens.
    """

    def __init__(self, past: Any) -> None:
        self._past = past

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the real tokens and of the rows on top."""
        real = self._past.layers[layer]
        return torch.cat([real.keys, keys], 2), torch.cat([real.values, values], 2)


class SharedPass:
    """One forward that verifies a tree and prepares the draft below each of its nodes.

    Real nodes run through all layers. Before layer l_k every node spawns its pseudo state k, which
    sees what its node sees, and the smaller steps of the same node. N (1 + K) rows go through the
    upper layers; those of pseudo states are forgotten with the rejected nodes.

    Args:
        drafter: The matrices.
        session: The session that will score the tree.

    Attributes:
        states: Pseudo states that have left the last layer, [B, K, N, D].
        rows: Rows of the upper layers, pseudo ones included.
    """

    def __init__(self, drafter: HiddenTransfer, session: SlotSession) -> None:
        self.drafter, self.session = drafter, session
        self.states: torch.Tensor | None = None
        self.rows = 0

    @torch.no_grad()
    def finish(self, tree: TokenTree, taps: Taps | None) -> Scores | None:
        """See :class:`isthmus.decoding.layers.Ahead`."""
        drafter, cache, wanted = self.drafter, self.session.cache, taps or Taps()
        slices, target, n = drafter.slices, drafter.target, tree.nodes
        device = tree.tokens.device
        node, depth = torch.arange(n, device=device), torch.zeros(n, device=device).long()
        first = torch.tensor(cache.lengths, device=device)[:, None] + tree.topology.depth
        first = first.expand(tree.batch, -1)
        limit = (target.max_length or 1 << 30) - 1
        cache.reserve(n * (1 + len(drafter.joins)))
        hidden = slices.embed(tree.tokens, first.clamp(max=limit))
        order: list[int] = []
        layers: dict[int, torch.Tensor] = {}
        place, loose = 0, []
        for stop in sorted({0, *drafter.joins, *wanted.layers, target.num_layers}):
            if stop > place:
                where = (first[:, node] + depth).clamp(max=limit)
                mask = slices.mask(self.session, self._seen(tree, node, depth), where)
                hidden = slices.run(hidden, place, stop, where, mask, cache.hub)
            layers[stop], place = hidden[:, :n], stop
            fresh = drafter.joining(stop)
            pseudo = [drafter.transfer[k - 1](hidden[:, :n]) for k in fresh]
            order += fresh
            if not drafter.settings.refine:
                loose += pseudo
                continue
            hidden = torch.cat([hidden, *pseudo], 1)
            steps = [torch.full((n,), k, device=device) for k in fresh]
            depth = torch.cat([depth, *steps])
            node = torch.arange(n, device=device).repeat(1 + len(order))
        self.rows = hidden.shape[1]
        rows = torch.cat([hidden[:, n:], *loose], 1).view(tree.batch, len(order), n, -1)
        self.states = rows[:, [order.index(k) for k in range(1, len(order) + 1)]]
        final = slices.finish(hidden[:, :n])
        kept = {i: layers[i] for i in wanted.layers}
        features = Features(final if wanted.final else None, kept) if wanted else None
        return Scores(target.head(final), features)

    @staticmethod
    def _seen(tree: TokenTree, node: torch.Tensor, depth: torch.Tensor) -> torch.Tensor:
        """Who sees whom among real and pseudo rows, bool [R, M, M]."""
        above = tree.topology.ancestors[:, node][:, :, node] & (depth == 0)
        own = (node == node[:, None]) & (depth <= depth[:, None])
        return above | own


def claim(ruler: Ruler, scale: Scale = "small") -> Claim:
    """Measure on ``pycode-m``: against Medusa, without refinement, and from other layers.

    Args:
        ruler: The clock; not used, nothing is timed.
        scale: ``"small"`` decodes 256 held-out texts of 16 tokens, ``"test"`` 8.
    """
    full = scale != "test"
    recipe, rows = (None, 256) if full else (Recipe(steps=12), 8)
    held_out, chain = texts(split="held-out"), Shape(3, 3, 1)
    arms: dict[str, TrainedDrafter] = {
        "medusa": reference_drafter("medusa", recipe=recipe),
        "ours": reference_drafter("hidden-transfer", recipe=recipe),
        "off": reference_drafter("hidden-transfer", Settings(refine=False), recipe=recipe),
    }
    sweep = ((4, 4, 4), (4, 3, 2)) if full else ((4, 3, 2),)
    for layers in sweep:
        settings = Settings(layers=layers)
        arms[str(layers)] = reference_drafter("hidden-transfer", settings, recipe=recipe)
    tau = {
        name: acceptance_length(drafter, held_out, shape=chain, rows=rows)
        for name, drafter in arms.items()
    }
    ours = arms["ours"]
    assert isinstance(ours, HiddenTransfer)
    tree = ours.default_shape
    wide = {n: acceptance_length(arms[n], held_out, shape=tree, rows=rows) for n in [*arms][:3]}
    sizes = {name: sum(p.numel() for p in drafter.parameters()) for name, drafter in arms.items()}
    count = 24 if full else 2
    same = same_answers(ours, tree, count)

    behind = tau["ours"] - tau["off"]
    gates = (
        Gate("answers with the plain output", same, "==", count),
        Gate("acceptance length minus that of medusa", tau["ours"] - tau["medusa"], ">=", -0.1),
        Gate("acceptance length minus that without refinement", behind, ">", 0.0),
        Gate("parameters over medusa's", sizes["ours"] / sizes["medusa"], "<=", 0.2),
    )
    unit, k = "tokens/forward", ours.max_depth
    return Claim(
        slug="hidden-transfer",
        statement="Three matrices half-way up the target, whose pseudo states its own layers "
        "refine, draft within 0.1 tokens of Medusa's heads at a fraction of their size.",
        paper_figure="ahead of Medusa and of self-speculation among single-model methods "
        "(Vicuna, LLaMA-2-Chat 7B and 13B)",
        rows=(
            Row(
                "acceptance length, greedy, chain of 3",
                unit,
                tau["medusa"],
                tau["ours"],
                tau["off"],
                note="baseline: medusa; off: pseudo states go to the head unrefined",
            ),
            Row(
                f"acceptance length, greedy, tree of {tree.nodes}",
                unit,
                wide["medusa"],
                wide["ours"],
                wide["off"],
            ),
            *(
                Row(
                    f"chain of 3, transfer at layers {', '.join(map(str, layers))}",
                    unit,
                    None,
                    tau[str(layers)],
                    None,
                )
                for layers in sweep
            ),
            Row("trained parameters", "", sizes["medusa"], sizes["ours"], sizes["off"]),
            Row(
                "rows through the upper layers for each node verified",
                "",
                1.0,
                1.0 + k,
                1.0,
                note="the lower layers run one row a node; the price of drafting in the same "
                "forward",
            ),
        ),
        scale=scale,
        device="cpu",
        status=judge(gates, (gates[0], gates[2], gates[3])),
        notes=(
            f"Half-way up is layer {ours.target.num_layers // 2} of {ours.target.num_layers}.",
            curve_note(*arms.values()),
        ),
        gates=gates,
        seeds=(0,),
    )
