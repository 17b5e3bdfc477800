"""FS-GEN: how often a large model has to step in when a small one writes, and where.

Paper: K. Zhang, J. Wang, N. Ding, B. Qi, E. Hua, X. Lv, B. Zhou. Fast and Slow Generating: An
    Empirical Study on Large and Small Language Models Collaborative Decoding. 2024.
    arXiv:2406.12295
Idea: Speculative, contrastive and proxy decoding are one scheme: a small model writes, a large one
    steps in at some tokens. How often follows from the ratio of their sizes; where, from how unsure
    the small one is.
Differs: Five models of Python made here instead of Qwen and Pythia on GSM8K, MMLU-STEM, MBPP
    and MT-Bench. The router that is trained is a logistic head with a hidden layer, not an SVM.
    Proxy tuning is a part (isthmus.decoding.fusion.Proxy) and not measured: no member of the family
    is tuned; speculative decoding writes what the oracle writes, and is not measured again.

    z_S ──router──▶ no:  argmax z_S
                    yes: argmax z_L, or z_S + beta (z_L - z_S) where z_L is plausible
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar, Literal

import torch

from isthmus.claims import Claim, Gate, Row, Ruler, Scale, judge
from isthmus.decoding.contrast import behind, contrast
from isthmus.decoding.fusion import Member, Route, check_same_bytes
from isthmus.decoding.law import Law
from isthmus.decoding.model import Model
from isthmus.decoding.router import Always, Never, Router, entropy, margin, top_probabilities
from isthmus.decoding.state_head import StateHead
from isthmus.decoding.tree import TokenTree
from isthmus.errors import InvalidInputError
from isthmus.laws.trends import Saturation, rank_correlation, saturation
from isthmus.metrics.separation import auroc
from isthmus.roles import Context
from isthmus.workbench import pycode
from isthmus.workbench.sizes import family


@dataclass(frozen=True)
class Settings:
    """Settings of the collaboration.

    Attributes:
        mode: What the large model does where it steps in: ``"oracle"`` says the token,
            ``"contrastive"`` is contrasted with the small one.
        alpha: Plausibility of the contrast.
        beta: Its strength; 1 is the large model.
        top: Probabilities of the small model that are recorded at each step.
        consult: Off, the large model is never asked.
    """

    mode: Literal["oracle", "contrastive"] = "oracle"
    alpha: float = 0.1
    beta: float = 1.5
    top: int = 100
    consult: bool = True


@dataclass(frozen=True)
class Trace:
    """What happened along fused texts.

    Attributes:
        tokens: Tokens that were written, int64 [B, T].
        small: Likeliest tokens of the small model at the same places, int64 [B, T].
        asked: Where the large model was asked, bool [B, T].
        top: Largest probabilities of the small model, [B, T, K].
        entropy: Of the small model, in nats, [B, T].
    """

    tokens: torch.Tensor
    small: torch.Tensor
    asked: torch.Tensor
    top: torch.Tensor
    entropy: torch.Tensor

    @property
    def mismatch(self) -> torch.Tensor:
        """Where the text is not what the small model would have written, bool [B, T]."""
        return self.tokens != self.small

    @property
    def frequency(self) -> float:
        """Collaboration frequency CF: share of such tokens."""
        return float(self.mismatch.float().mean())

    @property
    def unsure(self) -> dict[str, torch.Tensor]:
        """How unsure the small model was, three ways, [B, T] each; larger is less sure."""
        first, second = self.top[..., 0], self.top[..., 1]
        return {"probability": -first, "margin": second - first, "entropy": self.entropy}


class Recorded(Route):
    """The fused law, which keeps what the small model said at every step."""

    def __init__(self, member: Member, router: Router, settings: Settings) -> None:
        super().__init__(member, router)
        self.settings = settings
        self.steps: list[tuple[torch.Tensor, ...]] = []

    def __call__(self, logits: torch.Tensor, tree: TokenTree, context: Context) -> torch.Tensor:
        """See :class:`isthmus.roles.Reshape`."""
        fused = super().__call__(logits, tree, context)
        assert self.asked is not None
        root = logits[:, 0]
        top = top_probabilities(root, min(self.settings.top, root.shape[-1]))
        self.steps.append((root.argmax(-1), self.asked[:, 0], top, entropy(root)))
        return fused

    def combine(self, logits: torch.Tensor, others: list[torch.Tensor]) -> torch.Tensor:
        """The large model's logits, or the contrast of both."""
        s = self.settings
        if s.mode == "contrastive":
            # z_S + beta (z_L - z_S) is (1 + b) z_L - b z_S with b = beta - 1
            scores = contrast(
                others[0].to(logits), logits, strength=s.beta - 1, plausibility=s.alpha
            )
            others = [behind(scores, others[0].to(logits))]
        return super().combine(logits, others)


class FsGen:
    """A small model that writes and a large one that steps in.

    Args:
        small: The small model.
        large: The large one, with the same vocabulary.
        settings: See :class:`Settings`.

    Raises:
        InvalidInputError: The contrast is weaker than the large model alone.
        MismatchError: Their tokens write different bytes.
    """

    role: ClassVar[str] = "study"

    def __init__(self, small: Model, large: Model, settings: Settings | None = None) -> None:
        self.small, self.large, self.settings = small, large, settings or Settings()
        if self.settings.beta < 1:
            raise InvalidInputError(f"beta must be 1, the large model, or more; got {settings}")
        check_same_bytes(small.tokenizer, large.tokenizer)

    def write(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, router: Router | None = None
    ) -> Trace:
        """Write greedily, past end tokens, and record.

        Args:
            prompts: Token ids.
            max_new_tokens: Tokens T of each.
            router: Where the large model is asked; everywhere when None.
        """
        chosen = (router or Always()) if self.settings.consult else Never()
        part = Recorded(Member(self.large.target), chosen, self.settings)
        answers = self.small.generate(
            [list(p) for p in prompts],
            max_new_tokens=max_new_tokens,
            drafter="none",
            law=Law(reshapes=[part]),
            ignore_end=True,
        )
        small, asked, top, spread = (torch.stack(x, 1) for x in zip(*part.steps, strict=True))
        return Trace(torch.tensor([a.tokens for a in answers]), small, asked, top, spread)


def ratio_law(frequencies: Mapping[tuple[int, int], float], sizes: Sequence[int]) -> Saturation:
    """The law ``CF = b - a R ** -gamma`` of the ratio R of sizes, from pairs of small and large.

    Example:
        >>> law = ratio_law({(0, 1): 0.3, (1, 2): 0.4, (0, 2): 0.45}, [1, 2, 8])
        >>> [round(value, 3) for value in (law.a, law.gamma, law.b)]
        [0.4, 1.0, 0.5]
    """
    ratios = [sizes[large] / sizes[small] for small, large in frequencies]
    return saturation(ratios, list(frequencies.values()))


def closed(
    small: torch.Tensor, large: torch.Tensor, truth: torch.Tensor, asked: torch.Tensor
) -> tuple[float, float]:
    """What asking the large model gains in right tokens, and the whole gap, both over all tokens.

    Args:
        small: Tokens of the small model.
        large: Tokens of the large one.
        truth: The right ones.
        asked: Where the large one is asked.

    Example:
        >>> small, large = torch.tensor([1, 2, 3]), torch.tensor([4, 5, 3])
        >>> asked = torch.tensor([True, False, False])
        >>> closed(small, large, torch.tensor([4, 5, 6]), asked)
        (1.0, 2.0)
    """
    right_s, right_l = (small == truth).float(), (large == truth).float()
    return float((right_l - right_s)[asked].sum()), float((right_l - right_s).sum())


def most(scores: torch.Tensor, share: float) -> torch.Tensor:
    """Where the largest share of the scores stands, bool."""
    count = round(share * scores.numel())
    chosen = torch.zeros(scores.numel(), dtype=torch.bool)
    chosen[scores.flatten().topk(count).indices] = True
    return chosen.view_as(scores)


@torch.no_grad()
def read(model: Model, texts: torch.Tensor, start: int) -> torch.Tensor:
    """Logits [B, T, V] before each token of texts from a place on."""
    logits = model.target.forward(texts).logits[:, start - 1 : -1]
    return logits.clone()  # so that the rest can go


def learnt(trace: Trace) -> float:
    """AUROC of a head on the top probabilities for mismatch, fitted on half of the texts."""
    half = len(trace.tokens) // 2
    seen, labels = trace.top.log().clamp(min=-20.0), trace.mismatch
    if labels[:half].all() or not labels[:half].any():
        return float("nan")  # nothing to learn
    head = StateHead(seen.shape[-1], 8)
    head.fit(seen[:half].flatten(0, 1), labels[:half].flatten().float(), penalty=1e-2)
    with torch.no_grad():
        return auroc(head.logit(seen[half:]), labels[half:])


def claim(ruler: Ruler, scale: Scale = "small") -> Claim:
    """Measure how often and where larger models of a family step in for smaller ones.

    Args:
        ruler: Not used: nothing here is a speed.
        scale: ``"small"`` writes 200 x 40 tokens for each of ten pairs.
    """
    del ruler
    small = scale != "test"
    models = family(trained=small)
    sizes = [sum(p.numel() for p in m.target.model.parameters()) for m in models]
    count, width, new = (200, 96, 40) if small else (6, 8, 4)
    draws = torch.Generator().manual_seed(3)
    if small:
        tokenizer = models[0].tokenizer
        prompts = pycode.prompts(count, tokenizer, width, seed=3)
        texts = torch.tensor(pycode.prompts(count, tokenizer, width + new, seed=4))
    else:
        texts = torch.randint(1, 1024, (count, width + new), generator=draws)
        prompts = texts[:, :width].tolist()
    pairs = list(combinations(range(len(models)), 2))
    traces = {(i, j): FsGen(models[i], models[j]).write(prompts, new) for i, j in pairs}
    frequency = {pair: trace.frequency for pair, trace in traces.items()}
    law = ratio_law(frequency, sizes)
    ratios = [sizes[j] / sizes[i] for i, j in pairs]
    rank = rank_correlation(ratios, frequency.values())
    pooled = {
        kind: sum(auroc(t.unsure[kind], t.mismatch) for t in traces.values()) / len(traces)
        for kind in ("margin", "probability", "entropy")
    }
    heads = sum(learnt(t) for t in traces.values()) / len(traces)

    # the next tokens of held-out files, which both models read
    laws = [read(m, texts, width) for m in models]
    said, truth = [x.argmax(-1) for x in laws], texts[:, width:]
    gained = {"margin": 0.0, "entropy": 0.0, "random": 0.0, "where they differ": 0.0}
    gap = 0.0
    for i, j in pairs:
        asked = {
            "margin": most(-margin(laws[i]), 0.2),
            "entropy": most(entropy(laws[i]), 0.2),
            "random": most(torch.rand(truth.shape, generator=draws), 0.2),
            "where they differ": said[i] != said[j],
        }
        for name, where in asked.items():
            more, whole = closed(said[i], said[j], truth, where)
            gained[name] += more
        gap += whole
    share = {name: value / gap if gap else float("nan") for name, value in gained.items()}
    missed = torch.cat([t.mismatch for t in traces.values()]).float()
    in_fifth = {
        "margin": torch.cat([most(t.unsure["margin"], 0.2) for t in traces.values()]),
        "random": most(torch.rand(missed.shape, generator=draws), 0.2),
    }
    caught = {name: float(missed[where].sum() / missed.sum()) for name, where in in_fifth.items()}
    first, last = pairs[0][0], pairs[-1][1]
    off = FsGen(models[first], models[last], Settings(consult=False)).write(prompts, new)
    contrast_ = FsGen(models[first], models[last], Settings("contrastive")).write(prompts, new)
    alone = FsGen(models[last], models[last]).write(prompts, new)
    same = float((traces[first, last].tokens == alone.tokens).float().mean())
    early, late = (
        sum(float(t.mismatch[:, part].float().mean()) for t in traces.values()) / len(traces)
        for part in (slice(0, new // 4), slice(-(new // 4), None))
    )
    gates = (
        Gate("rank correlation of frequency and ratio of sizes", rank, ">=", 0.8),
        Gate("fit of the ratio law, R2", law.r2, ">=", 0.8),
        Gate("AUROC of the small model's margin for mismatch", pooled["margin"], ">=", 0.75),
        Gate("accuracy gap closed, least sure fifth", share["margin"], ">=", 0.6),
        Gate("accuracy gap closed, a random fifth", share["random"], "<=", 0.35),
        Gate("idea off: collaboration frequency", off.frequency, "==", 0.0),
    )
    direction = (
        Gate("rank correlation of frequency and ratio of sizes", rank, ">", 0.5),
        Gate("AUROC of the small model's margin for mismatch", pooled["margin"], ">", 0.6),
        Gate("mismatches in the least sure fifth over a fifth", caught["margin"] / 0.2, ">", 1.2),
        gates[-1],
    )
    status = judge(gates, direction)
    told = ", ".join(f"{sizes[j] / sizes[i]:.1f}: {frequency[i, j]:.3f}" for i, j in pairs)
    return Claim(
        slug="fs-gen",
        statement="How often a large model changes a small one's token grows with the ratio of "
        "their sizes by a saturating power law, and it does so where the small one is unsure.",
        paper_figure="collaboration frequency mostly below 20 %, by a scaling law of the ratio of "
        "sizes; mismatches sit where the small model is uncertain",
        rows=(
            Row(
                "collaboration frequency, largest ratio",
                "",
                frequency[pairs[0]],
                frequency[first, last],
                off.frequency,
                note=f"baseline: the first pair, ratio {ratios[0]:.1f}; ours: {max(ratios):.1f}; "
                f"contrastive, same pair: {contrast_.frequency:.3f}",
            ),
            Row("rank correlation of frequency and ratio", "", None, rank, 0.0),
            Row(
                "fit of CF = b - a R ** -gamma, R2",
                "",
                None,
                law.r2,
                None,
                note=f"a {law.a:.3f}, gamma {law.gamma:.3f}, b {law.b:.3f}",
            ),
            Row(
                "AUROC for mismatch, margin",
                "",
                0.5,
                pooled["margin"],
                None,
                control=pooled["entropy"],
                note=f"control: entropy; probability {pooled['probability']:.3f}, fitted head "
                f"{heads:.3f}; mean over pairs",
            ),
            Row(
                "accuracy gap closed by the least sure fifth",
                "",
                share["random"],
                share["margin"],
                0.0,
                ceiling=share["where they differ"],
                control=share["entropy"],
                note="held-out files; baseline: a random fifth; control: by entropy; ceiling: "
                "asked wherever the two differ",
            ),
            Row(
                "mismatches in the least sure fifth",
                "",
                caught["random"],
                caught["margin"],
                0.0,
                note="along the fused texts; baseline: a random fifth",
            ),
            Row("tokens as the large model alone writes", "", None, same, None),
        ),
        scale=scale,
        device="cpu",
        status=status,
        reason=""
        if status == "reproduced"
        else "models this small differ at a third to a half of all tokens, and what the large one "
        "gets right besides is spread over sure and unsure steps alike",
        gates=gates,
        seeds=(3,),
        notes=(
            f"Parameters: {', '.join(f'{n:,}' for n in sizes)}. Frequency by ratio: {told}.",
            f"Mismatch in the first quarter of the tokens {early:.3f}, in the last {late:.3f}.",
        ),
    )
