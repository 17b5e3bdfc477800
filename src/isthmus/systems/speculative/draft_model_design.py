"""Draft model design: at equal size the faster draft model wins, not the better one.

Paper: Yan, Agarwal, Venkataraman. Decoding Speculative Decoding. 2024. arXiv:2402.01528
Idea: Throughput is tokens per round over the time of a round, and that time is mostly the draft
    model's latency, which grows with its depth: at equal parameters, wide and shallow wins.
Differs: The candidates are trained from scratch for the same short budget instead of being pruned
    from a larger relative and distilled. Acceptance is replayed on texts that the target wrote
    greedily, which is exact for greedy decoding.
Lossless: yes

    target ──texts──> replay each candidate ──> tau(gamma) ─┐
    clock ───────────> t_draft, t_verify(gamma + 1) ────────┴──> throughput(gamma) ──> best
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from isthmus.claims import Claim, Gate, Row, Ruler, Scale, judge
from isthmus.decoding.cost import measure_cost
from isthmus.decoding.target import HubTarget
from isthmus.decoding.tree import TokenTree
from isthmus.errors import InvalidInputError
from isthmus.folders import cache_folder
from isthmus.models.hub import load_checkpoint
from isthmus.workbench import pycode
from isthmus.workbench._training import Recipe
from isthmus.workbench.bench import answer, reference_model, repeats_itself
from isthmus.workbench.reference import fingerprint, train

SHAPES = {1: (128, 4, 800), 2: (128, 4, 320), 3: (112, 4, 272), 4: (96, 3, 312), 6: (96, 3, 168)}
"""Width, heads and feed-forward width by number of layers: about 0.9 million parameters each."""


@dataclass(frozen=True)
class Settings:
    """Settings of a search over draft models.

    Attributes:
        gammas: Numbers of draft tokens that are tried.
        latency: The mechanism: count the draft model's time; off, tau alone decides.
    """

    gammas: tuple[int, ...] = (1, 2, 3, 4, 6, 8)
    latency: bool = True


@dataclass(frozen=True)
class Candidate:
    """What was found out about one draft model.

    Attributes:
        name: Its name.
        layers: Its depth.
        parameters: Its size, embeddings counted once.
        step_s: Seconds of one draft token, t_d.
        nats: Loss on the prompts in nats per token.
        rate: Share of the target's tokens that it would have drafted right, alpha.
        tau: Tokens of a round by number of draft tokens.
        throughput: Tokens per second by number of draft tokens.
    """

    name: str
    layers: int
    parameters: int
    step_s: float
    nats: float
    rate: float
    tau: dict[int, float]
    throughput: dict[int, float]

    @property
    def gamma(self) -> int:
        """The number of draft tokens with the largest throughput."""
        return max(self.throughput, key=lambda g: self.throughput[g])

    @property
    def best(self) -> float:
        """The largest throughput in tokens per second."""
        return self.throughput[self.gamma]


class DraftModelDesign:
    """Search over draft models with a measured cost model.

    Args:
        settings: See :class:`Settings`.

    Raises:
        InvalidInputError: A number of draft tokens is below 1.
    """

    role: ClassVar[str] = "study"

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        if not self.settings.gammas or min(self.settings.gammas) < 1:
            raise InvalidInputError(f"gammas must be 1 or more, got {self.settings.gammas}")

    def choose(self, candidates: Sequence[Candidate]) -> Candidate:
        """The candidate with the largest throughput, or, with latency off, the largest tau."""
        if not candidates:
            raise InvalidInputError("there is no draft model to choose from")
        if self.settings.latency:
            return max(candidates, key=lambda c: c.best)
        return max(candidates, key=lambda c: max(c.tau.values()))

    def measure(
        self,
        target: HubTarget,
        models: Mapping[str, HubTarget],
        texts: Sequence[tuple[Sequence[int], Sequence[int]]],
        ruler: Ruler,
        *,
        repeats: int = 7,
    ) -> list[Candidate]:
        """Measure every candidate on the same texts and one interleaved clock.

        Args:
            target: The model to be sped up.
            models: Draft models by name.
            texts: Prompts and what the target wrote below them.
            ruler: The clock.
            repeats: Timed repeats.
        """
        verify = measure_cost(target)
        timed = ruler.compare({n: _steps(m) for n, m in models.items()}, repeats=repeats)
        out = []
        for name, model in models.items():
            found = [hits(model, prompt, written) for prompt, written in texts]
            step_s = timed[name].min_s / STEPS
            tau = {g: simulate([h for h, _ in found], g) for g in self.settings.gammas}
            out.append(
                Candidate(
                    name,
                    model.num_layers,
                    sum(p.numel() for p in model.model.parameters()),
                    step_s,
                    statistics.fmean(nats for _, nats in found),
                    statistics.fmean(bool(x) for h, _ in found for x in h),
                    tau,
                    {g: t / (g * step_s + verify(g + 1)) for g, t in tau.items()},  # eq. 1
                )
            )
        return out


def hits(
    model: HubTarget, prompt: Sequence[int], written: Sequence[int]
) -> tuple[list[bool], float]:
    """Where a draft model would have guessed the target's next token, from one forward.

    As long as its drafts are accepted, its prefix is the target's text, so the answer holds for
    any number of draft tokens.

    Args:
        model: The draft model.
        prompt: Token ids.
        written: The target's greedy continuation.

    Returns:
        One bool for each written token, and the loss on the prompt in nats per token.
    """
    ids = torch.tensor([[*prompt, *written]], device=model.device)
    logits = model.forward(ids).logits[0].float()
    n = len(prompt)
    right = logits[n - 1 : -1].argmax(-1) == ids[0, n:]
    nats = torch.nn.functional.cross_entropy(logits[: n - 1], ids[0, 1:n])
    return right.tolist(), float(nats)


def simulate(found: Sequence[Sequence[bool]], gamma: int) -> float:
    """Tokens per round of a chain of ``gamma`` drafts, replayed on recorded hits.

    Args:
        found: Hits of each text.
        gamma: Draft tokens a round.

    Example:
        >>> simulate([[True, True, False, True, True, True]], 1)
        1.5
        >>> simulate([[True, True, False, True, True, True]], 2)
        3.0
    """
    tokens = rounds = 0
    for row in found:
        at = 0
        while at < len(row):
            room = min(gamma, len(row) - at - 1)  # the last token needs no draft
            run = 0
            while run < room and row[at + run]:
                run += 1
            at += run + 1
            rounds += 1
        tokens += len(row)
    return tokens / max(1, rounds)


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's rank correlation of values without ties.

    Example:
        >>> rank_correlation([1, 2, 3], [10, 30, 20])
        0.5
    """
    ranks = [np.argsort(np.argsort(v)).astype(float).tolist() for v in (x, y)]
    return round(statistics.correlation(*ranks), 12)


STEPS = 24
"""One-token forwards in one timed run."""


def _steps(model: HubTarget) -> Any:
    """A run of one-token forwards with a cache, as drafting makes them."""

    def run() -> None:
        session = model.session(1)
        session.prefill([torch.zeros(96, dtype=torch.int64)])
        root = TokenTree.root(torch.zeros(1, dtype=torch.int64)).to(model.device)
        for _ in range(STEPS):
            session.score(root)
            session.keep(torch.zeros(1, 1, dtype=torch.int64, device=model.device))

    return run


def recipes(steps: int) -> list[Recipe]:
    """Five draft models of one size and one budget, 1 to 6 layers deep."""
    return [
        Recipe(
            name=f"draft-{layers}",
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=inner,
            head_dim=32,
            steps=steps,
            batch_size=4,
            sequence_length=256,
            warmup_steps=10,
        )
        for layers, (width, heads, inner) in SHAPES.items()
    ]


def trained(steps: int, layers: Sequence[int] = tuple(SHAPES)) -> dict[str, HubTarget]:
    """The draft models of these depths, trained on first use and kept in the cache folder."""
    found = {}
    for recipe in recipes(steps):
        if recipe.num_hidden_layers not in layers:
            continue
        folder = cache_folder() / "reference" / f"{recipe.name}-{fingerprint(recipe)}"
        if not (folder / "model.safetensors").exists():
            # a twelfth of the corpus is more than so short a training reads
            documents = pycode.texts("train")[::12]
            train(recipe, folder, documents=documents, held_out_windows=8)
        loaded = load_checkpoint(str(folder), dtype="float32", device="cpu")
        found[recipe.name] = HubTarget(loaded.model)
    return found


def claim(ruler: Ruler, scale: Scale = "small") -> Claim:
    """Measure what decides the throughput of five draft models of equal size.

    Args:
        ruler: The clock.
        scale: ``"small"`` trains for 200 steps of 1024 tokens and replays 48 texts of 20 tokens;
            ``"test"`` trains two of them for 2 and replays 2.
    """
    small = scale != "test"
    count, tokens, steps = (48, 20, 200) if small else (2, 8, 2)
    models = trained(steps) if small else trained(steps, (1, 6))
    model = reference_model("pycode-t")
    prompts = pycode.prompts(count, model.tokenizer, 96)
    plain = answer(model, prompts, "none", max_new_tokens=tokens)
    straight = [r for r, t in enumerate(plain.tokens) if not repeats_itself(t, size=4, times=2)]
    texts = [(prompts[r], plain.tokens[r]) for r in straight or range(count)]
    study, blind = DraftModelDesign(), DraftModelDesign(Settings(latency=False))
    found = study.measure(model.target, models, texts, ruler, repeats=7 if small else 2)
    ours, off = study.choose(found), blind.choose(found)
    layers = [float(c.layers) for c in found]
    times, nats = [c.step_s for c in found], [c.nats for c in found]
    best = [c.best for c in found]
    by_time, by_nats = rank_correlation(best, times), rank_correlation(best, nats)
    deeper = [c for c in found if c.layers > ours.layers]
    better = sum(c.nats < ours.nats or c.rate > ours.rate for c in deeper)
    sizes = [c.parameters for c in found]
    gates = (
        Gate("largest over smallest draft model", max(sizes) / min(sizes), "<=", 1.1),
        Gate("rank correlation of time and depth", rank_correlation(times, layers), ">=", 0.9),
        Gate("layers of the draft model with the best throughput", ours.layers, "<=", 2),
        Gate("deeper draft models that predict better", better, ">=", 1),
        Gate("|r| with time minus |r| with loss", abs(by_time) - abs(by_nats), ">", 0.0),
        Gate("texts without a repeated phrase", len(straight), ">=", count // 4),
    )
    return Claim(
        slug="draft-model-design",
        statement="Of five draft models of equal size a shallow one has the best throughput, and "
        "throughput follows latency more closely than it follows the loss.",
        paper_figure="a wide 796M draft gives up to 60 % more throughput for LLaMA-65B (111 % in "
        "the later version)",
        rows=(
            *(
                Row(
                    f"best throughput, {c.layers} layers",
                    "tokens/s",
                    None,
                    c.best,
                    None,
                    note=f"gamma {c.gamma}: tau {c.tau[c.gamma]:.2f}; t_d {c.step_s * 1e3:.2f} ms, "
                    f"alpha {c.rate:.3f}, {c.nats:.2f} nats, {c.parameters:,} parameters",
                )
                for c in found
            ),
            Row(
                "throughput of the chosen draft model",
                "tokens/s",
                None,
                ours.best,
                off.best,
                note=f"{ours.name}; off: chosen by tau alone, {off.name}",
            ),
            Row("rank correlation of throughput with t_d", "", None, by_time, None),
            Row("rank correlation of throughput with loss", "", None, by_nats, None),
        ),
        scale=scale,
        device="cpu",
        status=judge(gates, (*gates[:4], gates[5])),
        reason=""
        if all(g.passed for g in gates)
        else "trained for a minute each, the draft models rank alike by latency and by loss, which "
        "leaves open which of the two decides",
        notes=(
            f"Each draft model saw {steps * 1024:,} tokens.",
            f"{count - len(straight)} of {count} greedy texts repeat a phrase and are left out.",
        ),
        gates=gates,
        seeds=(0,),
    )
