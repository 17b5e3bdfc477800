"""Make Some Noise: a model tuned on corrupted inputs guesses well behind wrong guesses.

Paper: Wang, Li, Ma, Xu, Dong, Feng, Che. Make Some Noise: Unlocking Language Model Parallel
    Inference Capability through Noisy Training. 2024. arXiv:2406.17404
Idea: Replace a short span of every training input by earlier tokens and keep the clean labels;
    the model then predicts well from wrong recent tokens, which Jacobi decoding needs.
Differs: The tree of 63 guesses is calibrated from fixed rank weights, not the released list. Where
    no n-gram matches, the retrieval chain holds random earlier tokens instead of the text's first
    ones. Random guesses are unlike within a level. One noisy span for every text.
Lossless: yes

    round i:   root ── guesses for depth 1, 2, ... (top-10 each) and one retrieved chain
    verify:    root ── a accepted ── r1 ── r2 ── ...    rejected, but their logits are kept:
    round i+1:         new root  ──  top-10 of r1 ── top-10 of r2 ── ... ── random tokens
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch

from isthmus.claims import Claim, Gate, Row, Ruler, Scale, judge
from isthmus.decoding.builders import RankTree, beam_trie, calibrate
from isthmus.decoding.drafters import PromptLookup
from isthmus.decoding.policy import Fixed
from isthmus.decoding.tree import TokenTree
from isthmus.errors import InvalidInputError
from isthmus.roles import Context, Shape, Step, Target
from isthmus.training.drafting import Recipe
from isthmus.training.tuning import Loss, held_out_loss, label_loss, logits_of, next_tokens
from isthmus.workbench import pycode
from isthmus.workbench.drafters import texts
from isthmus.workbench.tuned import RECIPE, answer_together, tuned

RANK_WEIGHTS = (0.5, 0.16, 0.09, 0.06, 0.045, 0.035, 0.03, 0.025, 0.02, 0.018)
"""How often the guess of each rank is right, roughly; a level deeper, a fifth less often."""

DEPTH_DECAY = 0.8

UNKNOWN = -1
"""Mark of a guess that is not there."""


@dataclass(frozen=True)
class Settings:
    """Settings of Make Some Noise, with the paper's defaults.

    Attributes:
        noise_tokens: Length of the noisy span in training; 0 tunes plainly (the idea is off).
        top_k: Guesses kept for each depth.
        tree_nodes: Guesses drafted a round, those of the retrieved chain not counted.
        tree_depth: Levels of the guesses' tree.
        chain: Length of the retrieved chain, and levels that guesses are kept for.
        retrieval: Copy the chain from an earlier place; off, it holds random earlier tokens.
        max_ngram: Longest suffix to look for.
        seed: Seed of the random guesses.
    """

    noise_tokens: int = 5
    top_k: int = 10
    tree_nodes: int = 63
    tree_depth: int = 4
    chain: int = 5
    retrieval: bool = True
    max_ngram: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.top_k, self.tree_nodes, self.tree_depth, self.chain, self.max_ngram) < 1:
            raise InvalidInputError(f"sizes of make-some-noise must be at least 1, got {self}")
        if self.noise_tokens < 0 or self.top_k > len(RANK_WEIGHTS):
            raise InvalidInputError(
                f"noise_tokens must be 0 or more and top_k at most {len(RANK_WEIGHTS)}, got "
                f"{self.noise_tokens} and {self.top_k}"
            )


@lru_cache(maxsize=16)
def guess_tree(nodes: int, depth: int, top_k: int) -> RankTree:
    """The static tree of guesses: rank paths, the likeliest first.

    Example:
        >>> guess_tree(4, 4, 10).parents, guess_tree(4, 4, 10).ranks
        ((-1, 0, 1, 0, 0), (0, 0, 0, 1, 2))
    """
    level = torch.tensor(RANK_WEIGHTS[:top_k])
    decay = DEPTH_DECAY ** torch.arange(depth)[:, None]
    return RankTree.of(calibrate(level * decay, nodes))


@lru_cache(maxsize=64)
def leaves(settings: Settings, nodes: int, depth: int, width: int) -> torch.Tensor:
    """Rank paths to the leaves of the guesses' tree within a shape, int64 [W, D], -1 beyond."""
    tree = guess_tree(settings.tree_nodes, settings.tree_depth, settings.top_k)
    tree = tree.limit(nodes, depth, width)
    paths = [[tree.ranks[n] for n in path[1:]] for path in tree.topology.paths()]
    deepest = max(map(len, paths))
    return torch.tensor([[*p, *[UNKNOWN] * (deepest - len(p))] for p in paths])


def ahead_noise(ids: torch.Tensor, length: int, generator: torch.Generator) -> torch.Tensor:
    """Replace one span of every text by tokens drawn from before it (sec. 3.1).

    Args:
        ids: Texts int64 [B, T].
        length: Tokens of the span; 0 changes nothing.
        generator: Source of place and tokens.

    Returns:
        int64 [B, T]; the first token is never changed, so that every span has a prefix.

    Raises:
        InvalidInputError: The texts have no room for a span behind a first token.
    """
    if length == 0:
        return ids
    b, t = ids.shape
    if t <= length:
        raise InvalidInputError(f"texts of {t} tokens have no room for {length} noisy ones")
    device = ids.device
    start = torch.randint(1, t - length + 1, (b, 1), generator=generator, device=device)
    draw = torch.rand(b, length, generator=generator, device=device)
    source = (draw * start).long()  # uniform over 0 .. start - 1
    place = start + torch.arange(length, device=device)
    return ids.scatter(1, place, ids.gather(1, source))


class MakeSomeNoise:
    """TR-Jacobi decoding: a drafter without weights for a model tuned on noisy inputs.

    Args:
        settings: See :class:`Settings`.

    Example:
        >>> MakeSomeNoise().default_shape
        Shape(nodes=68, depth=5, width=11)
    """

    role: ClassVar[str] = "drafter"
    name = "make-some-noise"
    tuning_settings: ClassVar[tuple[str, ...]] = ("noise_tokens",)

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self._lookup = PromptLookup(max_ngram=self.settings.max_ngram)
        self._generator = torch.Generator().manual_seed(self.settings.seed)
        self._guesses = torch.empty(0, 0, 0, dtype=torch.int64)  # [B, chain, k], UNKNOWN if none

    @classmethod
    def fine_tuning(cls, model: Any, settings: Settings) -> Loss:
        """Noisy inputs, clean labels, the ordinary loss at every place (eq. 3)."""

        def loss(ids: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
            noisy = ahead_noise(ids, settings.noise_tokens, generator)
            return label_loss(logits_of(model, noisy), next_tokens(ids))

        return loss

    @property
    def default_shape(self) -> Shape:
        """The guesses and the retrieved chain: 68 nodes."""
        s = self.settings
        return Shape(s.tree_nodes + s.chain, max(s.chain, s.tree_depth), s.top_k + 1)

    def begin(self, context: Context, target: Target, **inputs: Any) -> None:
        """Start without guesses."""
        s = self.settings
        self._generator.manual_seed(s.seed)
        self._guesses = torch.full((context.batch, s.chain, s.top_k), UNKNOWN)
        self._lookup.begin(context, target, **inputs)

    def propose(self, context: Context, shape: Shape) -> TokenTree:
        """The retrieved chain, then the tree of guesses (sec. 3.2)."""
        s, roots = self.settings, context.roots()
        length = min(s.chain, shape.depth, shape.nodes)
        if length < 1:
            return TokenTree.root(roots)
        known = self._guesses[..., 0] != UNKNOWN  # [B, chain]
        chain = self._noise(context, (length,))
        if shape.width == 1:
            chain = torch.where(known[:, :length], self._guesses[:, :length, 0], chain)
        if s.retrieval:
            for b in range(context.batch):
                found = self._lookup.continuation(context.row(b).numpy(), length)
                chain[b, : len(found)] = torch.from_numpy(found)
        if shape.width == 1 or shape.nodes == length:
            return TokenTree.chain(roots, chain)
        ranks = leaves(s, shape.nodes - length, shape.depth, shape.width - 1)  # [W, D]
        depth = ranks.shape[1]
        guesses = torch.where(
            known[..., None], self._guesses, self._noise(context, (s.chain, s.top_k))
        )
        level = torch.arange(depth).clamp(max=s.chain - 1)
        beams = guesses[:, level, ranks.clamp(min=0)]  # [B, W, D]
        valid = (ranks >= 0) & (beams != UNKNOWN)
        # the chain comes first: where nothing is accepted, its logits foretell the next guesses
        width = max(length, depth)
        beams = torch.cat([_pad(chain[:, None], width, 0), _pad(beams, width, 0)], 1)
        real = torch.ones(len(chain), 1, length, dtype=torch.bool)
        return beam_trie(
            roots, beams, torch.cat([_pad(real, width, False), _pad(valid, width, False)], 1)
        )

    def _noise(self, context: Context, shape: tuple[int, ...]) -> torch.Tensor:
        """Tokens drawn from each row's own text, int64 [B, *shape]: the model sees through them."""
        u = torch.rand(context.batch, *shape, generator=self._generator, dtype=torch.float64)
        place = u.flatten(1) * torch.tensor(context.lengths)[:, None]
        return context.ids.gather(1, place.long()).view(u.shape)

    def observe(self, step: Step) -> None:
        """Keep the top-k at the nodes that follow the accepted ones on the best path."""
        s, tree, path = self.settings, step.tree, step.verdict.path
        b = tree.batch
        rows = torch.arange(b, device=path.device)
        node = path.gather(1, (path >= 0).sum(1, keepdim=True) - 1)[:, 0]
        first = tree.topology.children[..., 0].expand(b, -1)
        alive = torch.ones_like(node, dtype=torch.bool)
        guesses = torch.full((b, s.chain, s.top_k), UNKNOWN)
        k = min(s.top_k, step.logits.shape[-1])
        for level in range(s.chain):
            child = first.gather(1, node[:, None])[:, 0]
            alive = alive & (child >= 0) & tree.alive[rows, child.clamp(min=0)]
            if not bool(alive.any()):
                break
            node = torch.where(alive, child, node)
            best = step.logits[rows, node].topk(k, -1).indices
            guesses[:, level, :k] = torch.where(alive[:, None], best, UNKNOWN).cpu()
        self._guesses = guesses

    def select(self, rows: Sequence[int]) -> None:
        """Keep the guesses of the given rows."""
        self._guesses = self._guesses[list(rows)]
        self._lookup.select(rows)


def _pad(x: torch.Tensor, width: int, value: float) -> torch.Tensor:
    return torch.nn.functional.pad(x, (0, width - x.shape[-1]), value=value)


def claim(ruler: Ruler, scale: Scale = "small") -> Claim:
    """Tune a reference model with and without noise on the same tokens, decode with TR-Jacobi.

    Args:
        ruler: The clock; not used, no gate is a time.
        scale: ``"small"`` is 32 held-out prompts of 16 tokens, ``"test"`` 4 of 6 and a short
            training.
    """
    small = scale != "test"
    recipe = RECIPE if small else Recipe(steps=2, batch_size=2)
    count, new = (32, 16) if small else (4, 6)
    held_out = texts(length=96, split="held-out")
    noisy = tuned("make-some-noise", recipe=recipe)
    plain = tuned(None, recipe=recipe)
    prompts = pycode.prompts(count, noisy.tokenizer, 48)

    def tau(model: Any, settings: Settings, **sampling: Any) -> tuple[float, list[list[int]]]:
        drafter = MakeSomeNoise(settings)
        policy = Fixed(drafter, drafter.default_shape)
        out = answer_together(model, prompts, policy, max_new_tokens=new, **sampling)
        return out.acceptance_length(), out.tokens

    own, alone = Settings(), Settings(retrieval=False)
    length, answers = tau(noisy, own)
    length_plain, _ = tau(plain, own)
    bare, bare_plain = tau(noisy, alone)[0], tau(plain, alone)[0]
    sampled, sampled_plain = (tau(m, own, temperature=1.0)[0] for m in (noisy, plain))
    sampled_bare, sampled_bare_plain = (tau(m, alone, temperature=1.0)[0] for m in (noisy, plain))
    greedy = answer_together(noisy, prompts, "none", max_new_tokens=new).tokens
    same = sum(a == b for a, b in zip(answers, greedy, strict=True))
    rows = 256 if small else 8
    loss, loss_plain = (held_out_loss(m.target.model, held_out, rows=rows) for m in (noisy, plain))
    gates = (
        Gate("prompts with the model's own greedy output", same, "==", count),
        Gate("held-out loss over plain tuning", loss / loss_plain, "<=", 1.01),
        Gate("gain over plain tuning", length - length_plain, ">=", 0.05),
        Gate("gain of retrieval, noisy", length - bare, ">", 0.0),
        Gate("gain of retrieval, plain", length_plain - bare_plain, ">", 0.0),
    )
    direction = (
        gates[0],
        gates[1],
        Gate("gain over plain tuning, no retrieval", bare - bare_plain, ">", 0.0),
        Gate("gain over plain tuning, T = 1", sampled - sampled_plain, ">", 0.0),
    )
    unit = "tokens/forward"
    return Claim(
        slug="make-some-noise",
        statement="Tuning on noisy inputs raises the acceptance length of TR-Jacobi decoding by "
        "at least 0.05 over plain tuning on the same tokens, at a held-out loss within 1%.",
        paper_figure="2.3x to 2.7x on general and code tasks, scores kept (Table 1)",
        rows=(
            Row(
                "acceptance length, greedy",
                unit,
                1.0,
                length,
                length_plain,
                note="off: tuned without noise",
            ),
            Row(
                "acceptance length, greedy, no retrieval",
                unit,
                1.0,
                bare,
                bare_plain,
                note="off: tuned without noise",
            ),
            Row(
                "acceptance length, T = 1",
                unit,
                1.0,
                sampled,
                sampled_plain,
                note="off: tuned without noise",
            ),
            Row(
                "acceptance length, T = 1, no retrieval",
                unit,
                1.0,
                sampled_bare,
                sampled_bare_plain,
                note="off: tuned without noise",
            ),
            Row(
                "held-out loss",
                "nats/token",
                loss_plain,
                loss,
                loss_plain,
                note="baseline: tuned without noise",
            ),
        ),
        scale=scale,
        device="cpu",
        status=judge(gates, direction),
        notes=(
            f"Both models: {recipe.steps} steps of {recipe.batch_size} x "
            f"{recipe.sequence_length} tokens from the same checkpoint; outputs are compared with "
            "the same model's own.",
        ),
        gates=(*gates, *direction[2:]),
        seeds=(0,),
    )
