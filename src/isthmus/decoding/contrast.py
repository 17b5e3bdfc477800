"""Contrastive laws: what a strong model says more than a weak one, and a rule that decodes it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from isthmus.decoding.acceptance import Lossless
from isthmus.decoding.companion import Accompanied, Companion
from isthmus.decoding.drafters import ModelDrafter
from isthmus.decoding.tree import TokenTree, chain_topology
from isthmus.errors import InvalidInputError, MismatchError
from isthmus.roles import Acceptance, Context, Shape, Step, Target, Verdict


def contrast(
    expert: torch.Tensor,
    amateur: torch.Tensor,
    *,
    strength: float = 0.5,
    plausibility: float = 0.1,
    original: bool = False,
) -> torch.Tensor:
    """Scores of the contrastive law (Li et al. 2022, 2210.15097; O'Brien, Lewis 2023, 2309.09117).

    Args:
        expert: Logits s_e [..., V].
        amateur: Logits s_a [..., V].
        strength: beta of the improved form ``(1 + beta) s_e - beta s_a``.
        plausibility: alpha; tokens below this share of the expert's best one are out.
        original: Use ``log p_e - log p_a`` instead.

    Returns:
        Scores [..., V], -inf outside the plausible set, which always holds the expert's best.

    Example:
        >>> expert, amateur = torch.tensor([2.0, 1.0, -3.0]), torch.tensor([2.0, 0.0, 0.0])
        >>> contrast(expert, amateur, strength=1.0).tolist()
        [2.0, 2.0, -inf]
    """
    log_e = torch.log_softmax(expert, -1)
    if original:
        log_a = torch.log_softmax(amateur, -1)
        scores = log_e - torch.where(log_a.isfinite(), log_a, 0.0)
    else:
        # a token that the amateur does not have is not contrasted
        scores = expert + strength * (expert - torch.where(amateur.isfinite(), amateur, expert))
    best = log_e.amax(-1, keepdim=True)
    # in logarithms log(0) = -inf keeps everything, and the best token always passes
    floor = best + torch.tensor(plausibility, dtype=log_e.dtype, device=log_e.device).log()
    return torch.where((log_e >= floor) & (log_e > -torch.inf), scores, -torch.inf)


class ContrastiveDecoding(Accompanied):
    """The contrastive law as a reshape: the amateur is asked at every node of a draft.

    Args:
        amateur: A weaker model with the same vocabulary.
        strength: beta of the improved form; 0 is the expert's own law, cut to the plausible set.
        plausibility: alpha.
        temperature: Of the amateur.
        original: The form ``log p_e - log p_a``; its authors give the amateur temperature 0.5.

    Raises:
        InvalidInputError: A number is out of range.
    """

    def __init__(
        self,
        amateur: Target,
        *,
        strength: float = 0.5,
        plausibility: float = 0.1,
        temperature: float = 1.0,
        original: bool = False,
    ) -> None:
        if strength < 0.0 or not 0.0 <= plausibility <= 1.0 or temperature <= 0.0:
            raise InvalidInputError(
                "contrastive decoding needs a strength of 0 or more, a plausibility within 0 and 1 "
                f"and a temperature above 0, got {strength}, {plausibility}, {temperature}"
            )
        super().__init__(Companion(amateur))
        self.strength, self.plausibility = strength, plausibility
        self.temperature, self.original = temperature, original

    def combine(self, logits: torch.Tensor, others: list[torch.Tensor]) -> torch.Tensor:
        """Contrastive scores [B, N, V]."""
        return contrast(
            logits,
            others[0].to(logits) / self.temperature,
            strength=self.strength,
            plausibility=self.plausibility,
            original=self.original,
        )


class Amateur(ModelDrafter):
    """A draft model that also lends its logits to the law: those of its own draft, and one more.

    Args:
        model: The draft model as a target, sharing the target's vocabulary.
        options: As for :class:`~isthmus.decoding.drafters.ModelDrafter`; chains only.

    Attributes:
        heard: Its raw logits at the root and at each drafted token but the last, [B, V] each.
        calls: Forwards for drafting.
        extra: Forwards that only served the law after a fully accepted draft.
    """

    def __init__(self, model: Target, **options: Any) -> None:
        super().__init__(model, **options)
        self.heard: list[torch.Tensor] = []
        self.calls = self.extra = 0

    def begin(self, context: Context, target: Target, **inputs: Any) -> None:
        """Start on new rows.

        Raises:
            MismatchError: The amateur's context is shorter than the target's.
        """
        ours, theirs = self.model.max_length, target.max_length
        if ours is not None and (theirs is None or ours < theirs):
            raise MismatchError(
                f"the amateur reads {ours} tokens and the expert {theirs or 'any number'}; the "
                "contrast needs both at every token, use an amateur with as long a context"
            )
        super().begin(context, target, **inputs)
        self.heard = []

    def propose(self, context: Context, shape: Shape) -> TokenTree:
        """A chain."""
        self.heard = []
        return super().propose(context, shape.capped(shape.nodes, shape.depth, 1))

    def _law(self, logits: torch.Tensor, context: Context, drafted: torch.Tensor) -> torch.Tensor:
        self.heard.append(logits)
        self.calls += 1
        return super()._law(logits, context, drafted)

    def after(self, context: Context, tree: TokenTree) -> torch.Tensor:
        """Logits [B, V] after the last node of a chain, by one more forward."""
        self.extra += 1
        block = self._unseen(context, 0)
        if block is not None:
            last = self._feed(block)
            if tree.nodes == 1:
                return last
        return self._feed(TokenTree(tree.tokens[:, -1:], chain_topology(1)))

    def observe(self, step: Step) -> None:
        """Forget what was rejected."""
        super().observe(step)
        self.heard = []


class Contrastive:
    """Decode the contrastive law of expert and amateur, exactly, by any exact rule.

    The amateur's logits at the drafted nodes are by-products of drafting. After a fully accepted
    draft one more amateur forward is needed, for the law of the token that the target adds.

    Args:
        amateur: The drafter whose model is the amateur.
        rule: An exact rule for what is at hand; it is shown contrastive scores for logits.
        options: Of :func:`contrast`.

    Raises:
        InvalidInputError: From ``accept``, for a tree that is no chain.
    """

    lossless = False

    def __init__(self, amateur: Amateur, rule: Acceptance | None = None, **options: Any) -> None:
        self.amateur, self.rule, self.options = amateur, rule or Lossless(), options
        self.noise = getattr(self.rule, "noise", None)

    def accept(self, tree: TokenTree, logits: torch.Tensor, context: Context) -> Verdict:
        """See :class:`isthmus.roles.Acceptance`."""
        if not tree.is_chain:
            raise InvalidInputError("contrastive acceptance knows the amateur's law on chains only")
        known = min(len(self.amateur.heard), tree.nodes)
        scores = logits
        if known:
            heard = torch.stack(self.amateur.heard[:known], 1).to(logits)
            scores = torch.cat(
                [contrast(logits[:, :known], heard, **self.options), logits[:, known:]], 1
            )
        if known == tree.nodes:
            return self.rule.accept(tree, scores, context)
        verdict = self.rule.accept(tree, scores, context)
        whole = (verdict.path >= 0).sum(1) == tree.nodes
        if not bool(whole.any()):
            return verdict
        # the law after the last node was missing: draw its token again, from the right law
        amateur = self.amateur.after(context, tree).to(logits)
        end = contrast(logits[:, -1], amateur, **self.options)[:, None]
        final = self.rule.accept(
            TokenTree.root(tree.tokens[:, -1]), end, _moved(context, tree)
        ).token
        return Verdict(verdict.path, torch.where(whole, final, verdict.token))


def _moved(context: Context, tree: TokenTree) -> Context:
    """The context as if the whole chain had been committed."""
    more = tree.nodes - 1
    if more == 0:
        return context
    ids = torch.nn.functional.pad(context.ids, (0, more))
    where = torch.tensor(context.lengths)[:, None] + torch.arange(more)
    ids.scatter_(1, where, tree.tokens[:, 1:].cpu())
    return replace(context, ids=ids, lengths=[n + more for n in context.lengths])
