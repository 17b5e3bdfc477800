"""Falcon: a drafter that emits k tokens a pass and learns by glancing at the answer.

Paper: Gao, Xie, Xiang, Ji. Falcon: Faster and Parallel Inference of Large Language Models through
    Enhanced Semi-Autoregressive Drafting and Custom-Designed Decoding Tree. 2024. arXiv:2412.12639
Idea: Blocks of k rows that see one another draft the next k features at once, so a draft takes a
    k-th of the passes. Trained in two looks: where the first goes wrong, the second is shown part
    of the answer, less and less of it (coupled sequential glancing distillation).
Differs: The recurrent layers run over positions, as in the paper; ``recurrent`` off, each position
    by itself, as the release does at batch size 1. The tree is best first instead of a fixed table
    of 8 levels, and within a block it does not know the token before. Rows that were shown their
    answer do not count in the loss. At decoding the last k verified rows are the block, whatever
    their number. The learning rate is the recipe's.
Lossless: yes

    f_1 f_2 | x_2 x_3 ──2 LSTM layers, 1 decoder layer──> f_3 f_4 ──head──> x_4 x_5
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from isthmus.claims import Claim, Gate, Row, Ruler, Scale, judge
from isthmus.decoding.builders import Level
from isthmus.decoding.draft_cache import DraftCache
from isthmus.decoding.feature_drafter import counted, relative_cost
from isthmus.decoding.policy import Fixed
from isthmus.decoding.target import HubTarget
from isthmus.decoding.trained import Batch, Fresh, TrainedDrafter
from isthmus.errors import InvalidInputError
from isthmus.nn.decoder import DecoderLayer
from isthmus.nn.masks import additive, relaxed_mask
from isthmus.objectives.distillation import (
    feature_noise,
    hard_cross_entropy,
    shifted,
    smooth_l1,
    soft_cross_entropy,
)
from isthmus.roles import Shape
from isthmus.training.drafting import Recipe, acceptance_length
from isthmus.workbench.bench import answer, repeats_itself
from isthmus.workbench.drafters import curve_note, reference_drafter, target_model, texts

State = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Settings:
    """Settings of Falcon.

    Attributes:
        block: Tokens k of a pass.
        glancing: Show part of the answer while training; off, plain distillation.
        glance: Share of the wrong places that is shown at the start, falling linearly to
            ``glance_floor`` at the end; the release goes from 0.45 to 0.1.
        glance_floor: That share at the end.
        recurrent: The first layers run over positions.
        layers: Recurrent layers.
        dropout: Between them.
        noise: Uniform noise on the training features.
        feature_weight: Weight of the feature loss.
        token_weight: Weight of the loss on the drafted distribution.
        hard_share: Share of the text itself in that loss; the rest is the target's law.
        top_k: Children of a node and nodes expanded on a level.
        depth: Levels.
        nodes: Draft nodes a round.
    """

    block: int = 2
    glancing: bool = True
    glance: float = 0.4
    glance_floor: float = 0.0
    recurrent: bool = True
    layers: int = 2
    dropout: float = 0.1
    noise: float = 0.2
    feature_weight: float = 1.0
    token_weight: float = 0.1
    hard_share: float = 0.1
    top_k: int = 10
    depth: int = 8
    nodes: int = 60


class Falcon(TrainedDrafter):
    """Recurrent layers and one decoder layer whose row i imitates ``f_{i+k}``.

    Raises:
        InvalidInputError: A block of less than one token.
    """

    name = "falcon"
    settings_type = Settings
    settings: Settings

    def __init__(self, target: HubTarget, settings: Settings | None = None) -> None:
        super().__init__(target, settings)
        s, width = self.settings, self.sizes.hidden_size
        if s.block < 1 or s.layers < 1:
            raise InvalidInputError(f"block and layers must be 1 or more, got {s}")
        self.lstm = nn.LSTM(
            2 * width, width, s.layers, dropout=s.dropout if s.layers > 1 else 0, batch_first=True
        )
        self.layer = DecoderLayer(self.sizes, input_norm=False)
        self._cache: DraftCache | None = None
        self._state: State = torch.empty(0), torch.empty(0)  # after the last verified row
        self._tail = torch.empty(0)  # the last k verified rows after the LSTM [B, k, D]
        self._held = torch.empty(0, dtype=torch.int64)  # how many of them are there [B]
        # of the draft: blocks of next features [B, F, k, D], the recurrent state behind each
        # block, the block above each node of the level, and the tokens drafted below that block
        self._blocks, self._behind = torch.empty(0), self._state
        self._of = self._names = self._held

    @property
    def default_shape(self) -> Shape:
        """The tree of the settings."""
        return Shape(self.settings.nodes, self.settings.depth, self.settings.top_k)

    def branch(self) -> tuple[int, int]:
        """Children of a node, and nodes expanded on a level."""
        return self.settings.top_k, self.settings.top_k

    def recur(
        self,
        tokens: torch.Tensor,
        feature: torch.Tensor,
        state: State | None = None,
        counts: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, State]:
        """Rows of the decoder layer from tokens [B, N] and the features behind them [B, N, D].

        Args:
            tokens: ``x_{i+1}``.
            feature: ``f_i``.
            state: Where the recurrence goes on from, two of [layers, B, D].
            counts: Real rows of each text, int64 [B]; all when None.

        Returns:
            [B, N, D], and the state after the last real row; a text without one keeps its state.
        """
        x = torch.cat([self.embed(tokens), feature], -1)
        if not self.settings.recurrent:
            alone, last = self.lstm(x.flatten(0, 1)[:, None])
            return alone.view(*x.shape[:2], -1), state or last
        if counts is None:
            out, after = self.lstm(x, state)
            return out, after
        packed = pack_padded_sequence(
            x, counts.clamp(min=1).cpu(), batch_first=True, enforce_sorted=False
        )
        rows, after = self.lstm(packed, state)
        out, _ = pad_packed_sequence(rows, batch_first=True, total_length=x.shape[1])
        if state is not None:
            some = (counts > 0)[:, None]
            after = torch.where(some, after[0], state[0]), torch.where(some, after[1], state[1])
        return out, after

    def forward(self, tokens: torch.Tensor, feature: torch.Tensor) -> torch.Tensor:
        """Features k places on, [B, T, D], of whole texts under the relaxed mask (sec. 3.2)."""
        length = tokens.shape[1]
        rows, _ = self.recur(tokens, feature)
        seen = relaxed_mask(length, self.settings.block, device=tokens.device)
        positions = torch.arange(length, device=tokens.device)[None]
        out: torch.Tensor = self.layer(rows, positions, additive(seen, rows.dtype))
        return out

    def glanced(self, batch: Batch, wrong: torch.Tensor) -> torch.Tensor:
        """Rows whose input is replaced by their answer, bool [B, T], on block starts only.

        Args:
            batch: With the progress of the training.
            wrong: Rows whose token was not drafted as the target has it, bool [B, T].
        """
        s = self.settings
        share = s.glance_floor + (s.glance - s.glance_floor) * (1 - batch.progress)
        count = (share * wrong.sum(1, keepdim=True)).round()
        start = torch.arange(wrong.shape[1], device=wrong.device) % s.block == 0
        draw = torch.rand(wrong.shape, generator=batch.generator, device=wrong.device)
        draw = torch.where(start & batch.before(s.block), draw, 2.0)
        return (draw.argsort(1).argsort(1) < count) & (draw < 2.0)

    def loss(self, batch: Batch) -> torch.Tensor:
        """Distillation after a glance at the answer (sec. 3.3)."""
        s = self.settings
        feature = feature_noise(batch.final, batch.generator, s.noise)
        tokens, k = shifted(batch.ids, 1), s.block
        law, mask = shifted(batch.target_logits, k), batch.before(k)
        if s.glancing:
            with torch.no_grad():
                drafted = self.head(self.forward(tokens, feature)).argmax(-1)
            shown = self.glanced(batch, (drafted != law.argmax(-1)) & mask)
            # both halves of the input at once: the row reads what it would have to say
            feature = torch.where(shown[..., None], shifted(batch.final, k), feature)
            tokens = torch.where(shown, shifted(tokens, k), tokens)
            mask = mask & ~shown
        g = self.forward(tokens, feature)
        logits = self.head(g)
        # the cross-entropy to the target's law is its KL divergence and a constant
        soft = soft_cross_entropy(law, logits, mask)
        label = mask & batch.before(k + 1)
        hard = hard_cross_entropy(shifted(batch.ids, k + 1), logits, label)
        token = (1 - s.hard_share) * soft + s.hard_share * hard
        near = smooth_l1(shifted(batch.final, k), g, mask)
        return s.feature_weight * near + s.token_weight * token

    def reset(self, batch: int) -> None:
        """Nothing is known."""
        device, dtype, s = self.target.device, self.target.state_dtype, self.settings
        width = self.sizes.hidden_size
        self._cache = DraftCache(self.sizes, 1, batch, dtype, device)
        zero = torch.zeros(s.layers, batch, width, device=device, dtype=dtype)
        self._state = zero, zero
        self._tail = zero.new_zeros(batch, s.block, width)
        self._held = torch.zeros(batch, dtype=torch.int64, device=device)

    def absorb(self, fresh: Fresh) -> None:
        """Go on with the recurrence; rows that leave the last block are stored for good.

        One decoder layer only: keys and values depend on the row alone, so the alignment of the
        blocks matters for the rows that ask, and those are always the last k.
        """
        assert self._cache is not None
        k, count = self.settings.block, fresh.valid.sum(1)
        out, self._state = self.recur(fresh.following, fresh.final, self._state, count)
        total = self._held + count
        held = total.clamp(max=k)
        gone = total - held
        place = torch.arange(k + out.shape[1], device=out.device)
        source = torch.where(
            place < self._held[:, None], place, (place - self._held[:, None] + k)
        ).clamp(max=len(place) - 1)
        rows = _take(torch.cat([self._tail, out], 1), source)
        if int(gone.max()):
            real = place[: int(gone.max())] < gone[:, None]
            positions, _ = self._cache.append(real)
            store = self._cache.store(0)
            self.layer.self_attn.remember(rows[:, : real.shape[1]], positions, store)
            self._cache.commit(real)
        self._tail = _take(rows, gone[:, None] + torch.arange(k, device=out.device))
        self._held = held

    def _absorb(self, fresh: Fresh) -> None:
        super()._absorb(fresh)
        self._ready = self._held == self.settings.block  # less than a block drafts nothing

    def expand(self, level: Level) -> torch.Tensor:
        """A pass on every k-th level; in between, the next feature of the node's block."""
        assert self._cache is not None
        k = self.settings.block
        if level.depth == 0:
            self._cache.drop()
            self._of = torch.zeros_like(level.tokens)
            self._names = level.tokens[..., None][..., :0]
            self._behind = self._state[0][:, :, None], self._state[1][:, :, None]
            self._pass(self._tail[:, None], self._of)
            return self.head(self._blocks[:, :, 0])
        self._of = self._of.gather(1, level.parent)
        above = _take(self._names, level.parent)
        self._names = torch.cat([above, level.tokens[..., None]], -1)  # [B, F, < k + 1]
        step = level.depth % k
        if step:
            rows = torch.arange(len(self._of), device=self._of.device)[:, None]
            return self.head(self._blocks[rows, self._of, step])
        b, f = level.tokens.shape
        index = self._of[None, ..., None].expand(self.settings.layers, -1, -1, self._tail.shape[-1])
        h, c = (x.gather(2, index).flatten(1, 2) for x in self._behind)  # [layers, B F, D]
        feature = _take(self._blocks.flatten(2), self._of).view(b * f, k, -1)
        out, (h, c) = self.recur(
            self._names.flatten(0, 1), feature, (h.contiguous(), c.contiguous())
        )
        self._behind = h.view(-1, b, f, h.shape[-1]), c.view(-1, b, f, c.shape[-1])
        self._pass(out.view(b, f, k, -1), self._of)
        self._of = torch.arange(f, device=level.tokens.device).expand(b, -1)
        self._names = self._names[..., :0]
        return self.head(self._blocks[:, :, 0])

    def _pass(self, rows: torch.Tensor, parent: torch.Tensor) -> None:
        """Run the layer over blocks [B, F, k, D] that see themselves and the blocks above."""
        assert self._cache is not None
        k = self.settings.block
        positions, mask = self._cache.branch(parent, k)
        g = self.layer(rows.flatten(1, 2), positions, mask, self._cache.store(0))
        self._blocks = g.view(rows.shape)

    def select_state(self, rows: torch.Tensor) -> None:
        """Keep the given rows."""
        assert self._cache is not None
        self._cache.select(rows.tolist())
        self._state = self._state[0][:, rows], self._state[1][:, rows]
        self._tail, self._held = self._tail[rows], self._held[rows]


def _take(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows ``x[b, index[b, j]]`` of x [B, N, D], [B, J, D]."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def claim(ruler: Ruler, scale: Scale = "small") -> Claim:
    """Measure blocks of 2 against EAGLE's single steps, with and without glancing, on ``pycode-m``.

    Args:
        ruler: The clock; not used, nothing is timed.
        scale: ``"small"`` decodes 256 held-out texts of 16 tokens, ``"test"`` 8.
    """
    full = scale != "test"
    rows, count = (256, 24) if full else (8, 2)
    recipe = None if full else Recipe(steps=12)
    model, held_out = target_model(), texts(split="held-out")
    ours = reference_drafter("falcon", recipe=recipe)
    off = reference_drafter("falcon", Settings(glancing=False), recipe=recipe)
    eagle = reference_drafter("eagle", recipe=recipe)
    assert isinstance(ours, Falcon)
    chain, tree = Shape(4, 4, 1), Shape(60, 6, 10)
    arms = {"ours": ours, "off": off, "eagle": eagle}
    tau = {
        (name, kind): acceptance_length(d, held_out, shape=shape, rows=rows)
        for name, d in arms.items()
        for kind, shape in (("chain", chain), ("tree", tree))
    }
    two = acceptance_length(eagle, held_out, shape=Shape(2, 2, 1), rows=rows)

    prompts = held_out[:count, :32].tolist()
    plain = answer(model, prompts, "none", max_new_tokens=16)
    same, passes = [], []
    for shape in (chain, tree):
        with counted(ours.layer) as calls:
            got = answer(model, prompts, Fixed(ours, shape), max_new_tokens=16)
        passes.append(len(calls) / sum(got.forwards))
        same += [a == b for a, b in zip(got.tokens, plain.tokens, strict=True)]
    loops = sum(repeats_itself(t, size=3, times=2) for t in plain.tokens)
    c, c_eagle = relative_cost(ours), relative_cost(eagle)
    gain = tau["ours", "chain"] - tau["off", "chain"]
    gates = (
        Gate("answers with the plain output, chain and tree", sum(same), "==", len(same)),
        Gate("drafter passes a round for a chain of 4", passes[0], "<=", 2.0),
        Gate("chain of 4 over eagle's", tau["ours", "chain"] / tau["eagle", "chain"], ">=", 0.7),
        Gate("chain of 4 minus eagle's of 2, as many passes", tau["ours", "chain"] - two, ">", 0.0),
        Gate("chain of 4 minus that without glancing (off)", gain, ">=", 0.03),
    )
    direction = (*gates[:3], Gate("chain of 4 minus that without glancing (off)", gain, ">", 0.0))
    unit = "tokens/forward"
    return Claim(
        slug="falcon",
        statement="Two tokens a pass keep most of EAGLE's acceptance length at half the passes, "
        "and glancing at the answer while training adds to it.",
        paper_figure="2.91x to 3.51x; 3.10x against EAGLE's 2.82x on MT-bench (Table 1); glancing "
        "adds 0.56 tokens/forward (Table 3)",
        rows=(
            Row(
                "acceptance length, greedy, chain of 4",
                unit,
                two,
                tau["ours", "chain"],
                tau["off", "chain"],
                ceiling=tau["eagle", "chain"],
                note="baseline: eagle's chain of 2, as many passes; ceiling: eagle's of 4, twice "
                "as many; off: no glancing",
            ),
            Row(
                "acceptance length, greedy, tree of 60, 6 levels",
                unit,
                None,
                tau["ours", "tree"],
                tau["off", "tree"],
                ceiling=tau["eagle", "tree"],
            ),
            Row("drafter passes a round, chain of 4", "", 4.0, passes[0], None),
            Row(
                "tokens per unit of time, chain of 4",
                "tokens/target forward",
                tau["eagle", "chain"] / (1 + 4 * c_eagle),
                tau["ours", "chain"] / (1 + 2 * c),
                tau["off", "chain"] / (1 + 2 * c),
                note=f"baseline: eagle; weights read by a pass: c = {c:.3f}, eagle {c_eagle:.3f}",
            ),
        ),
        scale=scale,
        device="cpu",
        status=judge(gates, direction),
        notes=(
            curve_note(*arms.values()),
            f"{loops} of {count} plain answers repeat themselves.",
        ),
        gates=gates,
        seeds=(0,),
    )
