"""GliDe with a CaPE: read the target's last keys and values; spend candidates where unsure.

Paper: Du, Jiang, Xu, Wu, Yu, Li, Li, Xu, Nie, Tu, You. GliDe with a CaPE: A Low-Hassle Method to
    Accelerate Speculative Decoding. 2024. arXiv:2402.02082
Idea: A small drafter that attends to what the target has cached need not read the text again; and
    the less sure it is of a draft token, the more candidates are verified in that token's place.
Differs: One layer as wide as the target. It is distilled from the target's law. The number of
    candidates follows the thresholds of the released code, as far as they are known.
Lossless: yes
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from isthmus.claims import Claim, Gate, Row, Ruler, Scale, judge
from isthmus.decoding.builders import Level
from isthmus.decoding.draft_cache import DraftCache
from isthmus.decoding.layers import Rotation, cached_layer, cached_mask, frozen, one_kind
from isthmus.decoding.target import HubTarget
from isthmus.decoding.trained import Batch, Fresh, TrainedDrafter
from isthmus.decoding.tree import TokenTree, Topology
from isthmus.errors import InvalidInputError
from isthmus.nn.decoder import Attention, GatedFeedForward, Store
from isthmus.nn.masks import additive
from isthmus.objectives.distillation import soft_cross_entropy
from isthmus.roles import Shape
from isthmus.training.drafting import Drafting, Recipe, greedy_drafting
from isthmus.workbench.drafters import curve_note, reference_drafter, same_answers, texts


@dataclass(frozen=True)
class Settings:
    """Settings of GliDe with a CaPE.

    Attributes:
        cross: Attend to the target's keys and values (GliDe); off, the same layer without.
        block: Places of a training text that cannot see each other's keys of the target, as
            drafted tokens cannot.
        edges: Probabilities up to which the first, second and third width holds.
        widths: Candidates in place of a draft token of that probability (CaPE); all equal, it is
            off.
        depth: Draft tokens.
    """

    cross: bool = True
    block: int = 5
    edges: tuple[float, ...] = (0.3, 0.6, 0.8)
    widths: tuple[int, ...] = (7, 5, 3, 1)
    depth: int = 5

    def __post_init__(self) -> None:
        if len(self.widths) != len(self.edges) + 1 or min(*self.widths, self.block, self.depth) < 1:
            raise InvalidInputError(
                "widths must be 1 or more and one more than edges, block and depth 1 or more, got "
                f"{self}"
            )


class CacheAttention(nn.Module):
    """Attention to keys and values of the target's last layer (sec. 3.1): only Wq and Wo are new.

    Args:
        target: Whose cache is read.
        width: Width D of the queries' rows.
    """

    def __init__(self, target: HubTarget, width: int) -> None:
        super().__init__()
        shape = one_kind(target)
        config: Any = target.config
        names = ("decoder_attention_heads", "num_attention_heads", "n_head", "num_heads")
        heads = next(n for n in (getattr(config, name, None) for name in names) if n)
        self.key_dim = shape.key_dim
        self.rotation = Rotation(target)  # the cached keys are rotated already
        self.q_proj = nn.Linear(width, heads * shape.key_dim, bias=False)
        self.o_proj = nn.Linear(heads * shape.value_dim, width, bias=False)

    def forward(
        self,
        x: torch.Tensor,
        positions: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """What rows x [B, N, D] at positions [B, N] find in the cache [B, H, S, d]; [B, N, D]."""
        q = self.q_proj(x).unflatten(-1, (-1, self.key_dim)).transpose(1, 2)
        out = F.scaled_dot_product_attention(
            self.rotation(q, positions),
            keys,
            values,
            attn_mask=mask,
            enable_gqa=q.shape[1] != keys.shape[1],
        )
        result: torch.Tensor = self.o_proj(out.transpose(1, 2).flatten(2))
        return result


class GlideCape(TrainedDrafter):
    """Self-attention on tokens, attention to the target's cache, feed-forward, its head."""

    name = "glide-cape"
    settings_type = Settings
    settings: Settings
    reads_cache = True

    def __init__(self, target: HubTarget, settings: Settings | None = None) -> None:
        super().__init__(target, settings)
        sizes = self.sizes
        width, eps = sizes.hidden_size, sizes.rms_norm_eps
        self.input_layernorm = nn.RMSNorm(width, eps)
        self.self_attn = Attention(sizes)
        if self.settings.cross:
            self.cross_attn = CacheAttention(target, width)
        self.post_attention_layernorm = nn.RMSNorm(width, eps)
        self.mlp = GatedFeedForward(width, sizes.intermediate_size)
        self.norm = nn.RMSNorm(width, eps)
        self._cache: DraftCache | None = None

    @property
    def default_shape(self) -> Shape:
        """The longest chain with the most candidates."""
        s = self.settings
        return Shape(s.depth * max(s.widths), s.depth, max(s.widths))

    @property
    def max_depth(self) -> int:
        """Draft tokens of the chain."""
        return self.settings.depth

    def attend(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor | None = None,
        store: Store | None = None,
    ) -> torch.Tensor:
        """Embeddings and self-attention: rows [B, N, D] of tokens [B, N]."""
        x = self.embed(tokens)
        out: torch.Tensor = x + self.self_attn(self.input_layernorm(x), positions, mask, store)
        return out

    def read(self, x: torch.Tensor) -> torch.Tensor:
        """Feed-forward, norm and head: logits [B, N, V] of rows [B, N, D]."""
        return self.head(self.norm(x + self.mlp(self.post_attention_layernorm(x))))

    def teach(self, ids: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Logits [B, T, V] at every place of a text at once.

        Args:
            ids: int64 [B, T].
            keys: The target's, of its last layer, [B, H, T, d].
            values: Likewise.
        """
        place = torch.arange(ids.shape[1], device=ids.device)
        x = self.attend(ids, place[None])
        if self.settings.cross:
            block = place // self.settings.block
            first = (block == 0)[:, None]  # sees nothing: its residual is left out below
            mask = additive((block < block[:, None]) | first, x.dtype)
            found = self.cross_attn(x, place[None], keys, values, mask)
            x = x + found.masked_fill(first, 0.0)
        return self.read(x)

    def loss(self, batch: Batch) -> torch.Tensor:
        """Cross-entropy to the target's law at the same place."""
        last = batch.past.layers[-1]
        with frozen(self.target.model):
            logits = self.teach(batch.ids, last.keys, last.values)
            return soft_cross_entropy(batch.target_logits, logits, batch.mask)

    def reset(self, batch: int) -> None:
        """An empty cache of its own."""
        self._cache = DraftCache(self.sizes, 1, batch, self.target.state_dtype, self.target.device)

    def absorb(self, fresh: Fresh) -> None:
        """Verified tokens; their keys in the target's cache are read where they are."""
        assert self._cache is not None
        positions, mask = self._cache.append(fresh.valid)
        self.attend(fresh.tokens, positions, mask, self._cache.store(0))
        self._cache.commit(fresh.valid)

    def expand(self, level: Level) -> torch.Tensor:
        """One pass of the layer over the tokens of a level."""
        assert self._cache is not None
        if level.depth == 0:
            self._cache.drop()
        positions, mask = self._cache.branch(level.parent)
        x = self.attend(level.tokens, positions, mask, self._cache.store(0))
        if self.settings.cross:
            cache = self.session.cache
            last = cached_layer(cache, self.target.num_layers - 1)
            x = x + self.cross_attn(x, positions, *last, cached_mask(cache, x.dtype))
        return self.read(x)

    def candidates(self, sure: torch.Tensor) -> torch.Tensor:
        """Candidates for draft tokens of probabilities ``sure`` [...] (sec. 3.2), int64."""
        edges = torch.tensor(self.settings.edges, device=sure.device, dtype=sure.dtype)
        widths = torch.tensor(self.settings.widths, device=sure.device)
        return widths[torch.bucketize(sure.contiguous(), edges)]

    def _tree(self, roots: torch.Tensor, shape: Shape) -> TokenTree:
        """A chain of best guesses with siblings; only the best guess is continued."""
        widest = min(max(self.settings.widths), shape.width)
        zero, tokens, real = torch.zeros_like(roots)[:, None], [roots[:, None]], []
        level = Level(roots[:, None], zero, torch.zeros_like(zero).float(), 0)
        rank = torch.arange(widest, device=roots.device)
        for depth in range(shape.depth):
            law = torch.softmax(self.expand(level)[:, 0].float(), -1)
            top = law.topk(widest, -1)
            tokens.append(top.indices)
            real.append(rank < self.candidates(top.values[:, :1]))
            level = Level(top.indices[:, :1], zero, level.score, depth + 1)
        topology = _comb(shape.depth, widest).to(roots.device)
        spine = (rank == 0).repeat(shape.depth).expand(len(roots), -1)
        beside = torch.cat(real, 1) & ~spine
        beside &= beside.cumsum(1) <= shape.nodes - shape.depth  # the chain comes first
        keep = F.pad(spine | beside, (1, 0), value=True)
        return TokenTree(torch.cat(tokens, 1), topology).prune(keep, closed=True)

    def select_state(self, rows: torch.Tensor) -> None:
        """Keep the given rows."""
        assert self._cache is not None
        self._cache.select(rows.tolist())


@lru_cache(maxsize=64)
def _comb(depth: int, width: int) -> Topology:
    """A chain in which every token has ``width - 1`` siblings without children."""
    parents = [0 if d == 0 else 1 + (d - 1) * width for d in range(depth) for _ in range(width)]
    return Topology.of([-1, *parents])


def with_widths(drafter: GlideCape, widths: tuple[int, ...]) -> GlideCape:
    """The same weights with other numbers of candidates."""
    twin = GlideCape(drafter.target, replace(drafter.settings, widths=widths))
    twin.load_state_dict(drafter.state_dict())
    return twin.to(drafter.norm.weight).eval()


def at_equal_cost(runs: list[Drafting], drafted: float) -> float:
    """Acceptance length at a number of verified tokens, on the line between the two nearest runs.

    Example:
        >>> at_equal_cost([Drafting(2.0, 4.0), Drafting(2.4, 8.0)], 6.0)
        2.2
    """
    order = sorted(runs, key=lambda r: r.drafted)
    low = max((r for r in order[:-1] if r.drafted <= drafted), default=order[0], key=_drafted)
    high = order[order.index(low) + 1]
    share = (drafted - low.drafted) / (high.drafted - low.drafted)
    return low.acceptance_length + share * (high.acceptance_length - low.acceptance_length)


def _drafted(run: Drafting) -> float:
    return run.drafted


def claim(ruler: Ruler, scale: Scale = "small") -> Claim:
    """Measure attention to the target's cache on two targets, and candidates at equal cost.

    ``sums-l`` works long sums whose digits have to be fetched from lines before; ``pycode-m``
    writes text whose next token mostly follows from the last few.

    Args:
        ruler: The clock; not used, nothing is timed.
        scale: ``"small"`` decodes 256 held-out texts of 16 tokens, ``"test"`` 8.
    """
    full = scale != "test"
    recipe, rows = (None, 256) if full else (Recipe(steps=12), 8)
    chain = Shape(4, 4, 1)
    tau: dict[tuple[str, bool], float] = {}
    drafters: dict[tuple[str, bool], TrainedDrafter] = {}
    for name in ("sums-l", "pycode-m"):
        held_out = texts(name, split="held-out")
        for cross in (True, False):
            key = name, cross
            drafters[key] = reference_drafter(
                "glide-cape", Settings(cross=cross), recipe=recipe, target=name
            )
            run = greedy_drafting(drafters[key], held_out, shape=chain, rows=rows)
            tau[key] = run.acceptance_length
    ours = drafters["pycode-m", True]
    assert isinstance(ours, GlideCape)
    held_out = texts("pycode-m", split="held-out")
    uniform = [
        greedy_drafting(other, held_out, shape=other.default_shape, rows=rows)
        for other in (with_widths(ours, (w,) * 4) for w in (2, 3, 4, 5, 7))
    ]
    cape = greedy_drafting(ours, held_out, shape=ours.default_shape, rows=rows)
    equal = at_equal_cost(uniform, cape.drafted)

    count = 24 if full else 2
    same = same_answers(ours, ours.default_shape, count)

    far = tau["sums-l", True] - tau["sums-l", False]
    wide = cape.acceptance_length - equal
    gates = (
        Gate("answers with the plain output", same, "==", count),
        Gate("acceptance length, worked sums, minus that without the cache", far, ">=", 0.1),
        Gate("acceptance length minus uniform widths, as many verified tokens", wide, ">=", 0.03),
    )
    unit = "tokens/forward"
    return Claim(
        slug="glide-cape",
        statement="A one-layer drafter that reads the target's cached keys and values is accepted "
        "further than the same layer without them where the next token must be fetched from afar, "
        "and candidates spent where it is unsure are worth more than the same number everywhere.",
        paper_figure="up to 2.17x for GliDe and 2.61x with CaPE on Vicuna (abstract)",
        rows=(
            Row(
                "acceptance length, chain of 4, worked sums",
                unit,
                1.0,
                tau["sums-l", True],
                tau["sums-l", False],
            ),
            Row(
                "acceptance length, chain of 4, Python code",
                unit,
                1.0,
                tau["pycode-m", True],
                tau["pycode-m", False],
            ),
            Row(
                "acceptance length with candidates, Python code",
                unit,
                equal,
                cape.acceptance_length,
                tau["pycode-m", True],
                note=f"{cape.drafted:.1f} draft tokens a round; baseline: uniform widths at as "
                "many; off: the chain of 4 alone",
            ),
            *(
                Row(
                    f"uniform width {w}",
                    unit,
                    run.acceptance_length,
                    None,
                    None,
                    note=f"{run.drafted:.1f} draft tokens a round",
                )
                for w, run in zip((2, 3, 4, 5, 7), uniform, strict=True)
            ),
        ),
        scale=scale,
        device="cpu",
        status=judge(
            gates,
            (gates[0], Gate("cache helps", far, ">", 0), Gate("unsure places help", wide, ">", 0)),
        ),
        notes=(
            "The acceptance length at as many verified tokens lies on the line between the two "
            "uniform widths around it.",
            curve_note(*drafters.values()),
        ),
        gates=gates,
        seeds=(0,),
    )
