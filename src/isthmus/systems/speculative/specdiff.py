"""Speculative diffusion decoding: a masked diffusion model drafts a whole block at once.

Paper: Christopher, Bartoldson, Ben-Nun, Cardei, Kailkhura, Fioretto. Speculative Diffusion
    Decoding: Accelerating Language Generation through Diffusion. 2024. arXiv:2408.05636
Idea: A discrete diffusion model fills a block of masks in a few denoising steps, so drafting time
    depends on the steps and not on the length; the autoregressive target verifies.
Differs: The diffusion model is small, begins with layers of the target, reads a window of the
    text, and is trained half on whole texts, half on a block behind a clamped prefix. Blocks that
    were not unmasked from left to right are verified by matching: their stored law is not the
    law of a token given those before it, so min(1, p/q) would be biased.
Lossless: yes

    text ...  x  m  m  m  m      one pass: laws of all masks, a share of them becomes tokens
              x  a  b  m  m      next pass: the laws of the rest, given a and b
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from isthmus.claims import Claim, Gate, Row, Ruler, Scale, judge
from isthmus.decoding.law import Law, chain_logits, draw_next
from isthmus.decoding.policy import Fixed
from isthmus.decoding.target import HubTarget
from isthmus.decoding.trained import Batch, TrainedDrafter
from isthmus.decoding.tree import TokenTree
from isthmus.errors import InvalidInputError, MismatchError
from isthmus.models.masked_diffusion import MaskedDiffusion
from isthmus.roles import Context, Shape, Step, Taps, Target
from isthmus.training.drafting import Recipe, acceptance_length
from isthmus.training.tuning import label_loss, next_tokens
from isthmus.workbench.drafters import reference_drafter, target_model, texts
from isthmus.workbench.tuned import answer_together


@dataclass(frozen=True)
class Settings:
    """Settings of speculative diffusion decoding.

    Attributes:
        block: Tokens gamma of a draft (the paper's are 10 to 30, for longer answers).
        steps: Denoising steps T.
        order: ``"left-to-right"`` or ``"confidence"``: which masks become tokens first.
        window: Tokens of the text that the model reads.
        layers: Its layers.
        diffuse: Draft by diffusion (the idea); off, the same network drafts one token a pass.
    """

    block: int = 8
    steps: int = 1
    order: str = "left-to-right"
    window: int = 64
    layers: int = 2
    diffuse: bool = True

    def __post_init__(self) -> None:
        if min(self.block, self.steps, self.window, self.layers) < 1:
            raise InvalidInputError(f"sizes of specdiff must be at least 1, got {self}")
        if self.order not in ("left-to-right", "confidence"):
            raise InvalidInputError(
                f"order must be 'left-to-right' or 'confidence', got {self.order!r}"
            )


class Specdiff(TrainedDrafter):
    """Drafter whose block comes from a masked diffusion model."""

    name = "specdiff"
    settings_type: ClassVar[type] = Settings
    settings: Settings
    taps = Taps(final=True)

    def __init__(self, target: HubTarget, settings: Settings | None = None) -> None:
        super().__init__(target, settings)
        count = self.settings.layers
        self.net = MaskedDiffusion(target.vocab_size, self.sizes, count)
        self._begin_with(target, count)

    @torch.no_grad()
    def _begin_with(self, target: HubTarget, count: int) -> None:
        """Copy evenly spaced layers of the target where they are built alike."""
        table = target.model.get_input_embeddings().weight
        self.net.embedding.weight[:-1] = table
        self.net.embedding.weight[-1] = table.mean(0)
        last = target.num_layers - 1
        for i, layer in enumerate(self.net.layers):
            source = target.layers[round(i * last / max(1, count - 1))].state_dict()
            own = layer.state_dict()
            if {k: v.shape for k, v in own.items()} == {k: v.shape for k, v in source.items()}:
                layer.load_state_dict(source)

    @property
    def default_shape(self) -> Shape:
        """A chain of one block."""
        return Shape(self.settings.block, self.settings.block, 1)

    def loss(self, batch: Batch) -> torch.Tensor:
        """Diffusion loss on whole texts and on the block at their end; plain when switched off."""
        ids = batch.ids
        if not self.settings.diffuse:
            return label_loss(self.net(ids, causal=True), next_tokens(ids))
        free = batch.mask.clone()
        half = (len(ids) + 1) // 2
        free[:half, : -self.settings.block] = False
        return self.net.loss(ids, free, batch.generator)

    def begin(self, context: Context, target: Target, **inputs: Any) -> None:
        """Nothing to take in: every pass reads the text anew.

        Raises:
            MismatchError: The drafter was made for another target.
        """
        if target is not self.target:
            raise MismatchError(
                "this specdiff drafter is bound to another target; load it with "
                "Specdiff.from_pretrained(folder, target)"
            )
        self.eval()

    def observe(self, step: Step) -> None:
        """Nothing to catch up with."""

    def select(self, rows: Sequence[int]) -> None:
        """Nothing is kept from round to round."""

    @torch.no_grad()
    def propose(self, context: Context, shape: Shape) -> TokenTree:
        """One block below each root."""
        s, device = self.settings, self.target.device
        roots = context.roots().to(device)
        length = min(s.block, shape.depth, shape.nodes)
        if length < 1:
            return TokenTree.root(roots)
        text, valid = self._window(context)
        if s.diffuse and s.order == "confidence" and s.steps > 1:
            return TokenTree.chain(roots, self._by_confidence(text, valid, length))
        drafted, laws = roots.new_zeros(len(roots), 0), []
        share = -(-length // s.steps) if s.diffuse else 1
        for start in range(0, length, share):
            logits = self._pass(torch.cat([text, drafted], 1), valid, length - start)
            for i in range(min(share, length - start)):
                # left to right, so this is the law of a token given those before it
                law = chain_logits(logits[:, i], context, drafted)
                token, q = draw_next(law, context, [n + start + i for n in context.lengths])
                if q is not None:
                    laws.append(q)
                drafted = torch.cat([drafted, token], 1)
        return TokenTree.chain(roots, drafted, q=torch.stack(laws, 1) if laws else None)

    def _window(self, context: Context) -> tuple[torch.Tensor, torch.Tensor]:
        """The last tokens of each row, at the right end of [B, W], and which are real."""
        lengths = torch.tensor(context.lengths)[:, None]
        width = min(self.settings.window, int(lengths.max()))
        place = lengths - width + torch.arange(width)
        text = context.ids.gather(1, place.clamp(min=0))
        return text.to(self.target.device), (place >= 0).to(self.target.device)

    def _pass(self, text: torch.Tensor, valid: torch.Tensor, masks: int) -> torch.Tensor:
        """Laws of the next places: of all masks [B, masks, V], or of one token when switched off.

        The text is clamped: what stands there is given in every pass.
        """
        more = text.shape[1] - valid.shape[1]
        if not self.settings.diffuse:
            known = torch.nn.functional.pad(valid, (0, more), value=True)
            alone: torch.Tensor = self.net(text, known, causal=True)
            return alone[:, -1:].float()
        full = torch.nn.functional.pad(text, (0, masks), value=self.net.mask_token)
        known = torch.nn.functional.pad(valid, (0, more + masks), value=True)
        laws: torch.Tensor = self.net(full, known)
        return laws[:, -masks:].float()

    def _by_confidence(self, text: torch.Tensor, valid: torch.Tensor, length: int) -> torch.Tensor:
        """Unmask the surest places first; a chosen block [B, length]."""
        s, mask = self.settings, self.net.mask_token
        block = text.new_full((len(text), length), mask)
        known = torch.nn.functional.pad(valid, (0, length), value=True)
        for step in range(s.steps):
            logits = self.net(torch.cat([text, block], 1), known)[:, -length:].float()
            sure, token = torch.softmax(logits, -1).max(-1)
            done = length * step // s.steps
            count = length * (step + 1) // s.steps - done
            best = sure.masked_fill(block != mask, -1.0).topk(count, -1).indices
            block = block.scatter(1, best, token.gather(1, best))
        return block


def passes(drafter: Specdiff, texts: torch.Tensor) -> int:
    """How often the network runs for one draft, counted on a few texts, int [W, T]."""
    calls = 0

    def count(module: Any, args: Any, output: Any) -> None:
        nonlocal calls
        calls += 1

    lengths = [texts.shape[1]] * len(texts)
    rows = list(range(len(texts)))
    context = Context(texts.long(), lengths, lengths, Law(), torch.Generator(), rows)
    handle = drafter.net.register_forward_hook(count)
    try:
        drafter.propose(context, drafter.default_shape)
    finally:
        handle.remove()
    return calls


def claim(ruler: Ruler, scale: Scale = "small") -> Claim:
    """Train a diffusion drafter and an autoregressive one of the same network, and compare.

    Args:
        ruler: The clock; not used, no gate is a time.
        scale: ``"small"`` is 64 held-out contexts of 16 tokens, ``"test"`` 4 of 4 and a short
            training.
    """
    small = scale != "test"
    recipe = Recipe(steps=300, validate_every=150) if small else Recipe(steps=2, batch_size=2)
    rows, new = (64, 16) if small else (4, 4)
    ours: Any = reference_drafter("specdiff", Settings(), recipe=recipe)
    other: Any = reference_drafter("specdiff", Settings(diffuse=False), recipe=recipe)
    held_out, block = texts(length=96, split="held-out"), Settings().block

    def arm(drafter: Any, **change: Any) -> tuple[float, int]:
        """Acceptance length, and passes of the drafter's network a round."""
        kept, drafter.settings = drafter.settings, replace(drafter.settings, **change)
        shape = drafter.default_shape
        tau = acceptance_length(drafter, held_out, shape=shape, new_tokens=new, rows=rows)
        count = passes(drafter, held_out[:2])
        drafter.settings = kept
        return tau, count

    def speed(measured: tuple[float, int], price: float) -> float:
        """Tokens per target forward's worth of time, if a pass costs ``price`` of one."""
        return measured[0] / (1 + price * measured[1])

    one, two = arm(ours), arm(ours, steps=2)
    surest = arm(ours, steps=2, order="confidence")
    chains = {n: arm(other, block=n) for n in (1, 2, 4, block)}
    best = max((one, two, surest), key=lambda m: m[0])
    chain = chains[block]
    share = sum(p.numel() for p in ours.net.parameters()) / sum(
        p.numel() for p in ours.target.model.parameters()
    )
    model = target_model()
    prompts = [row[:32].long() for row in held_out[:rows]]
    sampled = {
        name: answer_together(
            model, prompts, Fixed(d, d.default_shape), max_new_tokens=new, temperature=1.0
        ).acceptance_length()
        for name, d in (("ours", ours), ("off", other))
    }
    plain = answer_together(model, prompts, "none", max_new_tokens=new).tokens
    greedy = answer_together(model, prompts, Fixed(ours, ours.default_shape), max_new_tokens=new)
    same = sum(a == b for a, b in zip(greedy.tokens, plain, strict=True))
    low = 0.2
    gates = (
        Gate("prompts with the plain output", same, "==", len(prompts)),
        Gate("passes over autoregressive, T = 2", two[1] / chain[1], "<=", 0.25),
        Gate("acceptance length", best[0], ">=", 1.3),
        Gate("S over autoregressive, c = 0.2", speed(best, low) / speed(chain, low), ">", 1.0),
        Gate("S over autoregressive, c by size", speed(best, share) / speed(chain, share), ">", 1),
    )
    direction = (*gates[:2], Gate("acceptance length", best[0], ">", 1.1), *gates[3:])
    unit, other_best = "tokens/forward", max(chains.values(), key=lambda m: speed(m, share))
    curves = [[c[2] for c in d.training_record["curve"]] for d in (ours, other)]
    return Claim(
        slug="specdiff",
        statement="A masked diffusion drafter needs a quarter of the passes of an autoregressive "
        "one of its size for 8 draft tokens, is accepted at 1.3 tokens per forward or more, and "
        "wins where a pass costs a fifth of a target forward or more.",
        paper_figure="up to 8.7x over plain decoding, 2.5x over speculative decoding",
        rows=(
            Row(
                "acceptance length, T = 1",
                unit,
                1.0,
                one[0],
                chain[0],
                note="off: autoregressive, 8 passes",
            ),
            Row("acceptance length, T = 2, left to right", unit, 1.0, two[0], chain[0]),
            Row("acceptance length, T = 2, surest first", unit, 1.0, surest[0], chain[0]),
            Row(
                "acceptance length, temperature 1, T = 1",
                unit,
                1.0,
                sampled["ours"],
                sampled["off"],
            ),
            Row("passes for a draft of 8, T = 1", "passes", chain[1], one[1], chain[1]),
            Row(
                "S at c = 0.2",
                "x",
                1.0,
                speed(best, low),
                speed(chain, low),
                control=max(speed(m, low) for m in chains.values()),
                note="control: autoregressive at its best length",
            ),
            Row(
                f"S at c = {share:.2f}, the share of the target's size",
                "x",
                1.0,
                speed(best, share),
                speed(chain, share),
                control=speed(other_best, share),
                note="control: autoregressive at its best length",
            ),
        ),
        scale=scale,
        device="cpu",
        status=judge(gates, direction),
        notes=(
            "S = tau / (1 + c n) with n passes a round. A pass counts alike for both, as where "
            "reading the weights decides; the diffusion model keeps no cache, so its pass computes "
            f"up to {Settings().window + block} places against one.",
            f"Acceptance while training: diffusion {curves[0]}, autoregressive {curves[1]}.",
        ),
        gates=gates,
        seeds=(0,),
    )
