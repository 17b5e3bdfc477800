"""Models with one vocabulary as one law, and who says which token.

Every fusion is a reshape: the model at work scores a draft, the others score it too
(:class:`~isthmus.decoding.companion.Companion`), and what they say is combined at every node::

    product   sum w log p           mixture   log sum w p
    proxy     z + a (z_tuned - z_untuned)
    route     z, or where a router says so z of another model
    contrast  see isthmus.decoding.contrast

Models whose tokens write other bytes are refused, even where their vocabularies are equally large;
they meet in :mod:`isthmus.decoding.byte_fusion`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from isthmus.decoding.bytevocab import ByteVocab
from isthmus.decoding.companion import Accompanied, Companion
from isthmus.decoding.contrast import FAR
from isthmus.decoding.router import MaxProb, Router
from isthmus.decoding.tree import TokenTree
from isthmus.errors import InvalidInputError, MismatchError
from isthmus.models.hub import check_same_vocabulary
from isthmus.roles import Context, Target


@dataclass(frozen=True)
class Member:
    """A model in a fusion, beside the one at work.

    Attributes:
        model: The model.
        weight: Its weight.
        temperature: Divides its logits.
        prompt: Its own prompt; see :class:`~isthmus.decoding.companion.Companion`.
        vocab: Its tokenizer, or bytes under its tokens; None where nobody knows.
    """

    model: Target
    weight: float = 1.0
    temperature: float = 1.0
    prompt: Callable[[int, torch.Tensor], torch.Tensor] | None = None
    vocab: Any = None


def check_same_bytes(one: Any, other: Any) -> None:
    """Refuse two tokenizers whose equal ids stand for different bytes.

    Args:
        one: A tokenizer of transformers, a :class:`ByteVocab`, or None where nobody knows.
        other: Likewise.

    Raises:
        MismatchError: They differ.
    """
    if one is None or other is None:
        return
    ours, theirs = _table(one), _table(other)
    if ours is None and theirs is None:  # whole words, say: their names have to do
        check_same_vocabulary(one, other)
        return
    if ours is None or theirs is None:
        raise MismatchError("the tokens of one model write bytes, and those of the other do not")
    place = ours.differs(theirs)
    if place is not None:
        raise MismatchError(
            f"token {place} writes {ours.bytes(place)!r} in one model and {theirs.bytes(place)!r} "
            "in the other; models are fused token by token only where they share one vocabulary, "
            "others by their bytes"
        )


def _table(tokenizer: Any) -> ByteVocab | None:
    if isinstance(tokenizer, ByteVocab):
        return tokenizer
    try:
        return ByteVocab(tokenizer)
    except InvalidInputError:
        return None


class Fused(Accompanied):
    """Base of fusions with members.

    Args:
        members: The other models.
        vocab: Tokenizer of the model at work, or bytes under its tokens; None where nobody knows.

    Raises:
        InvalidInputError: There is no member, or a temperature is not above 0.
        MismatchError: A member's tokens write other bytes.
    """

    def __init__(self, members: Sequence[Member], vocab: Any = None) -> None:
        if not members or min(m.temperature for m in members) <= 0:
            raise InvalidInputError("a fusion needs a member, with a temperature above 0")
        for member in members:
            check_same_bytes(vocab, member.vocab)
        super().__init__(*(Companion(m.model, prompt=m.prompt) for m in members))
        self.members = tuple(members)

    def said(self, logits: torch.Tensor, others: list[torch.Tensor]) -> list[torch.Tensor]:
        """Logits of the members at their temperatures, [B, N, V] each."""
        pairs = zip(others, self.members, strict=True)
        return [x.to(logits) / m.temperature for x, m in pairs]


class Product(Fused):
    """Weighted log-probabilities added up: what all find likely.

    Args:
        members: The other models, with their weights.
        weight: Of the model at work.
        vocab: As for :class:`Fused`.
    """

    def __init__(
        self, members: Sequence[Member], *, weight: float = 1.0, vocab: Any = None
    ) -> None:
        super().__init__(members, vocab)
        self.weight = weight

    def combine(self, logits: torch.Tensor, others: list[torch.Tensor]) -> torch.Tensor:
        """Scores [B, N, V]."""
        weights = [self.weight, *(m.weight for m in self.members)]
        laws = [torch.log_softmax(x, -1) for x in (logits, *self.said(logits, others))]
        # what a member with a negative weight rules out is no reason for it
        parts = [
            (w * law).nan_to_num(posinf=-torch.inf)
            for w, law in zip(weights, laws, strict=True)
            if w
        ]
        return torch.stack(parts).sum(0)


class Mixture(Fused):
    """Weighted probabilities added up: what some find likely.

    Args:
        members: The other models, with their weights.
        weight: Of the model at work.
        vocab: As for :class:`Fused`.

    Raises:
        InvalidInputError: A weight is negative.
    """

    def __init__(
        self, members: Sequence[Member], *, weight: float = 1.0, vocab: Any = None
    ) -> None:
        super().__init__(members, vocab)
        if min(weight, *(m.weight for m in members)) < 0:
            raise InvalidInputError("a mixture takes no negative weights; use a product")
        self.weight = weight

    def combine(self, logits: torch.Tensor, others: list[torch.Tensor]) -> torch.Tensor:
        """Log-probabilities [B, N, V], up to a constant."""
        weights = logits.new_tensor([self.weight, *(m.weight for m in self.members)])
        laws = torch.stack(
            [torch.log_softmax(x, -1) for x in (logits, *self.said(logits, others))], -1
        )
        return (laws + weights.log()).logsumexp(-1)


class Proxy(Fused):
    """What tuning changed in a small model, added to a large one (proxy tuning).

    Args:
        tuned: The small model after tuning.
        untuned: The same before.
        strength: alpha; 0 changes nothing.
        vocab: As for :class:`Fused`.
    """

    def __init__(
        self,
        tuned: Member,
        untuned: Member,
        *,
        strength: float = 1.0,
        vocab: Any = None,
    ) -> None:
        super().__init__((tuned, untuned), vocab)
        self.strength = strength

    def combine(self, logits: torch.Tensor, others: list[torch.Tensor]) -> torch.Tensor:
        """Logits [B, N, V]."""
        tuned, untuned = self.said(logits, others)
        # padding that the small ones do not have is not changed
        return logits + self.strength * (tuned - untuned).nan_to_num(0.0, 0.0, 0.0)


class Route(Fused):
    """Another model says the token where a router says so; elsewhere it is not even asked.

    Args:
        member: The other model.
        router: Decides at every node.
        greedy: The other model's likeliest token is taken, even where tokens are drawn.
        keeps: Tokens that the model at work keeps to itself, such as the end.
        vocab: As for :class:`Fused`.

    Attributes:
        asked: Where the other model was asked in the last call, bool [B, N].
    """

    def __init__(
        self,
        member: Member,
        router: Router | None = None,
        *,
        greedy: bool = False,
        keeps: Sequence[int] = (),
        vocab: Any = None,
    ) -> None:
        super().__init__((member,), vocab)
        self.router, self.greedy, self.keeps = router or MaxProb(), greedy, list(keeps)
        self.taps = self.router.taps
        self.asked: torch.Tensor | None = None

    def __call__(self, logits: torch.Tensor, tree: TokenTree, context: Context) -> torch.Tensor:
        """See :class:`isthmus.roles.Reshape`."""
        self.asked = self.router(logits, tree, context)
        return super().__call__(logits, tree, context) if bool(self.asked.any()) else logits

    def combine(self, logits: torch.Tensor, others: list[torch.Tensor]) -> torch.Tensor:
        """Logits [B, N, V] of whoever says the token."""
        (theirs,) = self.said(logits, others)
        if self.keeps:
            kept = torch.tensor(self.keeps, device=theirs.device)
            theirs = theirs.index_fill(-1, kept, -torch.inf)
        if self.greedy:
            # far behind and not impossible: a constraint may still have to choose among them
            best = theirs.argmax(-1, keepdim=True)
            theirs = (torch.log_softmax(theirs, -1) - FAR).scatter(-1, best, 0.0)
        assert self.asked is not None
        return torch.where(self.asked[..., None], theirs, logits)
