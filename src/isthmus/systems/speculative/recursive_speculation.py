"""Recursive speculative decoding: siblings drawn without replacement waste no node.

Paper: Jeon, Gagrani, Goel, Park, Lee, Lott. Recursive Speculative Decoding: Accelerating LLM
    Inference via Sampling Without Replacement. 2024. arXiv:2402.14160
Idea: Draw the children of a node without replacement (the k largest of log q + Gumbel noise, or a
    stochastic beam over a whole level) and verify them one after the other, each against what the
    earlier rejections left of p and q.
Differs: Greedy decoding drops the noise: top-k children, or plain beam search. A level re-scores
    its ancestors instead of keeping them cached.
Lossless: yes

    log q of W nodes ──+ Gumbel, conditioned on the parent──> W largest ──> next level
    target ──> p ──accept x_1?──no──> p_2 = norm((p - q)+), q_2 = q without x_1 ──accept x_2?──> ...
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from isthmus.claims import Claim, Gate, Row, Ruler, Scale, judge
from isthmus.decoding.acceptance import KSequential, Rejection
from isthmus.decoding.drafters import ModelDrafter, gumbel_noise, gumbel_top_k
from isthmus.decoding.law import Law
from isthmus.decoding.policy import Fixed
from isthmus.decoding.table import TableTarget
from isthmus.decoding.tree import Draw, TokenTree, Topology
from isthmus.errors import InvalidInputError
from isthmus.roles import Acceptance, Context, Shape, Target
from isthmus.testing.statistics import string_test
from isthmus.workbench import pycode
from isthmus.workbench.bench import answer, reference_model


@dataclass(frozen=True)
class Settings:
    """Settings of recursive speculative decoding.

    Attributes:
        tree: ``"beam"`` is RSD-S, a stochastic beam; ``"constant"`` is RSD-C, the same number of
            children for every node of a level.
        width: Beam width W of RSD-S.
        depth: Levels L of RSD-S.
        branching: Children b_0, b_1, ... on each level of RSD-C.
        replacement: The mechanism switched off: children drawn with replacement, in RSD-C's
            shape, or for RSD-S as W chains side by side.
    """

    tree: Literal["beam", "constant"] = "beam"
    width: int = 4
    depth: int = 3
    branching: tuple[int, ...] = (2, 2, 2)
    replacement: bool = False


class RecursiveSpeculation(ModelDrafter):
    """A draft model that draws trees without replacement.

    Args:
        model: The draft model as a target, sharing the target's vocabulary.
        settings: See :class:`Settings`.

    Raises:
        InvalidInputError: An unknown tree, or a size below 1.

    Example:
        >>> RecursiveSpeculation(TableTarget(5), Settings(tree="constant")).default_shape
        Shape(nodes=14, depth=3, width=2)
    """

    role: ClassVar[str] = "drafter"
    name = "recursive-speculation"

    def __init__(self, model: Target, settings: Settings | None = None) -> None:
        chosen = self.settings = settings or Settings()
        if chosen.tree not in ("beam", "constant"):
            raise InvalidInputError(f"tree must be 'beam' or 'constant', got {chosen.tree!r}")
        if min(chosen.width, chosen.depth) < 1:
            raise InvalidInputError(
                f"width and depth must be 1 or more, got {chosen.width} and {chosen.depth}"
            )
        branching = chosen.branching if chosen.tree == "constant" else (chosen.width, 1)
        draw: Draw = "iid" if chosen.replacement else "without"
        super().__init__(model, branching=branching, draw=draw)

    @property
    def default_shape(self) -> Shape:
        """All nodes of the tree."""
        chosen = self.settings
        if chosen.tree == "beam":
            return Shape(chosen.width * chosen.depth, chosen.depth, chosen.width)
        levels = [math.prod(chosen.branching[: i + 1]) for i in range(len(chosen.branching))]
        return Shape(sum(levels), len(levels), max(chosen.branching))

    def propose(self, context: Context, shape: Shape) -> TokenTree:
        """RSD-C (alg. 3) or RSD-S (alg. 5)."""
        if self.settings.tree == "constant":
            shape = shape.capped(shape.nodes, len(self.settings.branching))
        if self.settings.tree == "constant" or self.settings.replacement:
            return super().propose(context, shape.capped(shape.nodes, self.default_shape.depth))
        return self._beam(context, shape.capped(shape.nodes, self.settings.depth))

    def _beam(self, context: Context, shape: Shape) -> TokenTree:
        """A stochastic beam: on each level the W largest perturbed path probabilities."""
        shape = self.ready(context, shape)
        device = getattr(self.model, "device", context.ids.device)
        roots = context.roots().to(device)
        if shape.nodes == 0:
            return TokenTree.root(roots)
        width = max(1, min(self.settings.width, shape.width, shape.nodes // shape.depth))
        rows = torch.arange(len(roots), device=device)[:, None]
        greedy = context.law.greedy
        tree = TokenTree.root(roots)
        parent = roots.new_full((len(roots), 1), -1)
        place = torch.zeros_like(parent)  # nodes of the last level, [B, F]
        phi = value = torch.zeros(len(roots), 1, dtype=torch.float64, device=device)
        q: torch.Tensor | None = None
        for _ in range(shape.depth):
            law = self.laws(context, tree)[rows, place]  # [B, F, V]
            q = law.new_zeros(len(roots), 1, self._vocab) if q is None else q
            q[rows, place] = torch.softmax(law, -1)
            phi = phi[..., None] + torch.log_softmax(law.double(), -1)
            value = phi if greedy else condition(phi, value, context.generator)
            # sorted by value, so siblings stand in the order in which they were drawn
            top = value.flatten(1).topk(min(width, value[0].numel()), -1, sorted=True)
            above, token = top.indices // self._vocab, top.indices % self._vocab
            phi, value = phi.flatten(1).gather(1, top.indices), top.values
            parent = torch.cat([parent, place.gather(1, above)], 1)
            place = torch.arange(tree.nodes, parent.shape[1], device=device).expand_as(token)
            tokens = torch.cat([tree.tokens, token], 1)
            q = torch.cat([q, q.new_zeros(*token.shape, self._vocab)], 1)
            # a path that the draft model excludes was not drawn; it only fills up the level
            valid = torch.cat([tree.alive, phi > -torch.inf], 1)
            tree = TokenTree(tokens, Topology(parent), None if bool(valid.all()) else valid)
        if greedy:
            return tree
        return TokenTree(tree.tokens, tree.topology, tree.valid, "without", q)


def condition(phi: torch.Tensor, parent: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Perturbed values of children, given that the largest of them is their parent's (sec. 3.2.2).

    The stable form of ``G = -log(exp(-parent) - exp(-Z) + exp(-G~))`` with ``G~ = phi + Gumbel``
    and Z their maximum (Kool et al. 2019, 1903.06059, appendix B.3).

    Args:
        phi: Path log-probabilities of the children, float64 [..., V].
        parent: Perturbed value of each parent [...].
        generator: Source of the noise.

    Returns:
        Values float64 [..., V]; the largest of each row is the parent's.
    """
    free = phi + gumbel_noise(phi.shape, generator, phi.device)
    most = free.amax(-1, keepdim=True)
    over = parent[..., None] - free + torch.log1p(-torch.exp(free - most))
    value = parent[..., None] - over.clamp(min=0.0) - torch.log1p(torch.exp(-over.abs()))
    return torch.where(phi > -torch.inf, value, -torch.inf)


def level_acceptance(
    p: torch.Tensor, q: torch.Tensor, k: int, draw: Draw, generator: torch.Generator
) -> torch.Tensor:
    """Chance that one of k children stands, averaged over the uniform numbers but not the draw.

    Args:
        p: Target laws float64 [R, V].
        q: Draft laws float64 [R, V].
        k: Children of each node.
        draw: ``"iid"`` or ``"without"``.
        generator: Source of the draws.

    Returns:
        Chances [R].

    Example:
        >>> p = torch.tensor([[0.5, 0.5, 0.0]]); q = torch.tensor([[0.5, 0.0, 0.5]])
        >>> level_acceptance(p, p, 1, "iid", torch.Generator()).tolist()
        [1.0]
    """
    if draw == "iid":
        drawn = torch.multinomial(q, k, True, generator=generator)
    else:
        drawn = gumbel_top_k(q.log(), k, generator)
    failed = torch.ones_like(p[:, 0])
    for x in drawn.unbind(1):
        x = x[:, None]
        ratio = p.gather(1, x) / q.gather(1, x).clamp(min=1e-300)
        # an exhausted support draws nothing
        stands = torch.where(q.gather(1, x) > 0, ratio.clamp(max=1.0), 0.0)[:, 0]
        failed = failed * (1.0 - stands)
        rest = (p - q).clamp(min=0.0)
        mass = rest.sum(-1, keepdim=True)
        p = torch.where(mass > 1e-14, rest / mass.clamp(min=1e-14), p)
        if draw == "without":
            left = q.scatter(1, x, 0.0)
            q = left / left.sum(-1, keepdim=True).clamp(min=1e-14)
    return 1.0 - failed


def _chi_square(settings: Settings, rule: Acceptance, rows: int) -> float:
    """P of the joint law on a model whose answers can be enumerated."""
    target, draft = TableTarget(5, seed=1, sharpness=1.2), TableTarget(5, seed=2)
    drafter = RecursiveSpeculation(draft, settings)
    law = Law(temperature=0.8, top_p=0.9)
    policy = Fixed(drafter, drafter.default_shape)
    return string_test(policy, target=target, law=law, acceptance=rule, rows=rows).p


def claim(ruler: Ruler, scale: Scale = "small") -> Claim:
    """Measure what drawing without replacement gains, with ``pycode-t`` and ``pycode-xs``.

    The draft model is a weak one, so that width pays. Arms at the same number of nodes: a chain,
    trees drawn with replacement (off) under recursive rejection and under k-sequential selection,
    RSD-C, RSD-S.

    Args:
        ruler: The clock.
        scale: ``"small"`` is 64 prompts of 24 tokens, ``"test"`` 4 of 8 with tiny law tests.
    """
    full = scale != "test"
    count, tokens, draws = (64, 24, 6000) if full else (4, 8, 800)
    constant, off = Settings(tree="constant"), Settings(tree="constant", replacement=True)
    beam = Settings()
    law_of = {
        "RSD-C": _chi_square(constant, Rejection(), draws),
        "RSD-S": _chi_square(beam, Rejection(), draws),
        "with replacement": _chi_square(off, Rejection(), draws),
        "k-sequential": _chi_square(off, KSequential(), draws),
    }
    broken = _chi_square(constant, Rejection(renormalise=False), draws)

    model = reference_model("pycode-t", "pycode-xs")
    assert model.draft_model is not None
    draft = model.draft_model
    prompts = pycode.prompts(count, model.tokenizer, 96)

    def tau(settings: Settings, temperature: float, rule: Acceptance | None = None) -> float:
        drafter = RecursiveSpeculation(draft, settings)
        return answer(
            model,
            prompts,
            Fixed(drafter, drafter.default_shape),
            max_new_tokens=tokens,
            acceptance=rule,
            temperature=temperature,
            batch=16,
        ).acceptance_length()

    def children(temperature: float) -> dict[Draw, float]:
        """Share of rounds in which one of four children stands, on sampled text."""
        generator = torch.Generator().manual_seed(0)
        found: dict[Draw, list[torch.Tensor]] = {"iid": [], "without": []}
        some = prompts[: max(2, count // 4)]
        text = answer(
            model, some, "none", max_new_tokens=tokens, temperature=temperature, batch=16
        ).tokens
        for prompt, new in zip(some, text, strict=True):
            ids = torch.tensor([[*prompt, *new]])
            p, q = (
                torch.softmax(m.forward(ids).logits[0, -tokens:].double() / temperature, -1)
                for m in (model.target, draft)
            )
            q = q[:, : p.shape[1]]
            for draw, shares in found.items():
                for _ in range(8):
                    shares.append(level_acceptance(p, q, 4, draw, generator))
        return {draw: float(torch.cat(shares).mean()) for draw, shares in found.items()}

    temperatures = (1.0, 0.7, 0.4) if full else (1.0, 0.4)
    first = {t: children(t) for t in temperatures}
    line = Settings(tree="constant", branching=(1,) * 14)
    arms = {"chain": line, "off": off, "RSD-C": constant, "RSD-S": beam}
    taus = {(n, t): tau(s, t) for n, s in arms.items() for t in temperatures}
    sequential = {t: tau(off, t, KSequential()) for t in temperatures}
    by_budget = {
        nodes: {
            "off": tau(Settings("constant", branching=shape, replacement=True), 0.4),
            "RSD-C": tau(Settings("constant", branching=shape), 0.4),
            "RSD-S": tau(Settings(width=width, depth=len(shape)), 0.4),
        }
        for nodes, shape, width in ((6, (2, 2), 3), (30, (2, 2, 2, 2), 7))
        if full
    }

    gain = {t: first[t]["without"] - first[t]["iid"] for t in temperatures}
    wide = {t: taus["RSD-C", t] / taus["off", t] for t in temperatures}
    kept = Gate("smallest chi-square p of the four arms", min(law_of.values()), ">", 1e-4)
    seen = Gate("chi-square p without renormalising q", broken, "<", 1e-4)
    gates = [
        kept,
        seen,
        Gate("four children, without over with replacement, T = 1", gain[1.0], ">=", 0.0),
        Gate("four children, without over with replacement, T = 0.4", gain[0.4], ">=", 0.06),
        Gate("acceptance length, RSD-C over replacement, T = 0.4", wide[0.4], ">", 1.0),
    ]
    if full:
        gates += [
            Gate("four children, without over with replacement, T = 0.7", gain[0.7], ">=", 0.02),
            Gate("acceptance length, RSD-C over replacement, T = 0.7", wide[0.7], ">", 1.0),
        ]
    direction = [
        kept,
        Gate("four children, T = 0.4, without over with", gain[0.4], ">", 0.0),
        Gate("acceptance length, T = 0.4, RSD-C over replacement", wide[0.4], ">", 1.0),
    ]
    unit = "tokens/forward"
    return Claim(
        slug="recursive-speculation",
        statement="Children drawn without replacement are accepted more often than as many drawn "
        "with replacement, the more so the colder the law, and the output keeps its law.",
        paper_figure="ahead of SpecTr and SpecInfer at every draft length, Llama 2, OPT (Fig. 4)",
        rows=(
            *(
                Row(
                    f"one of four children stands, T = {t:g}",
                    "",
                    shares["iid"],
                    shares["without"],
                    shares["iid"],
                    note="baseline and off: drawn with replacement",
                )
                for t, shares in first.items()
            ),
            *(
                Row(
                    f"acceptance length, 14 nodes, T = {t:g}",
                    unit,
                    taus["off", t],
                    taus["RSD-C", t],
                    taus["off", t],
                    control=taus["chain", t],
                    note=f"RSD-S, 12 nodes: {taus['RSD-S', t]:.3f}; k-sequential: "
                    f"{sequential[t]:.3f}; baseline and off: with replacement; control: a chain",
                )
                for t in temperatures
            ),
            *(
                Row(
                    f"acceptance length, {nodes} nodes, T = 0.4",
                    unit,
                    found["off"],
                    found["RSD-C"],
                    found["off"],
                    note=f"RSD-S: {found['RSD-S']:.3f}",
                )
                for nodes, found in by_budget.items()
            ),
            Row(
                "chi-square p of the joint law, RSD-S",
                "",
                law_of["with replacement"],
                law_of["RSD-S"],
                broken,
                note=f"RSD-C {law_of['RSD-C']:.3f}; k-sequential {law_of['k-sequential']:.3f}; "
                "off: q is not renormalised after a rejection",
            ),
        ),
        scale=scale,
        device="cpu",
        status=judge(gates, direction),
        gates=tuple(gates),
        seeds=(0,),
    )
