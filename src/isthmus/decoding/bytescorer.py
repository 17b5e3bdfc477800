"""Probabilities of bytes under a model of tokens.

A text can be the beginning of many token sequences: the *covers* of a text are the token sequences
that may begin a canonical text, whose bytes start with the text and whose last token writes its
last byte. They exclude each other and leave nothing out, so the probability of a text is the sum
over its covers, and the law of its next byte follows::

    text "ret"      [r|et]·  [ret]·  [re|turn]  [return]  [retry] ...      P("ret") = sum of all
    next byte       what each writes after "ret": ·  ·  "u"  "u"  "r"

All covers share a few prefixes, which one forward over a tree scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Literal

import torch

from isthmus.decoding.bytevocab import ByteVocab
from isthmus.decoding.prefixes import PrefixScorer, Reshaped
from isthmus.errors import InvalidInputError
from isthmus.roles import Target

if TYPE_CHECKING:
    from isthmus.decoding.model import Model

END = 256
"""Place of the end of the text among the next bytes."""

Covers = Literal["all", "boundaries", "tokens"]
"""Which covers are summed; see :class:`ByteScorer`."""


@dataclass(frozen=True)
class Reading:
    """What a model says about one text.

    Attributes:
        logp: Log-probability that a text begins so, in nats.
        next_byte: Log-probabilities of the byte after it and, last, of its end, [257].
        tokens: Canonical tokens of the text.
    """

    logp: float
    next_byte: torch.Tensor
    tokens: int


@dataclass(frozen=True)
class _Candidates:
    """Prefixes of a text and the tokens that go on from them.

    Attributes:
        length: Bytes of the text.
        places: Where each prefix ends, and its tokens.
        sums: Log-probability of each prefix.
        laws: Log-probabilities of what follows each, [K, V].
        whole: Prefixes that end with the text, its own cut first.
        token: Tokens that reach beyond the end of the text, int64 [C].
        byte: The byte that each writes after it, int64 [C].
        owner: The prefix that each goes on from, int64 [C].
        mass: Log-probability of each with its prefix, [C].
    """

    length: int
    places: list[tuple[int, list[int]]]
    sums: list[float]
    laws: torch.Tensor
    whole: list[int]
    token: torch.Tensor
    byte: torch.Tensor
    owner: torch.Tensor
    mass: torch.Tensor


class ByteScorer:
    """Probabilities of bytes under a model of tokens.

    Args:
        target: A decoder-only model.
        vocab: Bytes under its tokens.
        start: Tokens before the text, at least one: its begin token, or a prompt that is cut as
            it should be.
        ends: Tokens that end a text.
        covers: ``"all"`` is exact. ``"boundaries"`` takes the tokens of the text itself and what
            strictly extends their last ones, without a look at what is canonical: cheaper, and
            without bound where tokens merge otherwise. ``"tokens"`` takes the tokens of the text
            and no other cover, which is how models are usually prompted.
        tolerance: Share of the probability on tokens that are not looked at and pass for
            canonical; 0 looks at all of them.
        reshape: Changes logits before they are normalised (temperature, penalties).

    Raises:
        InvalidInputError: The tokenizer changes texts, so that bytes are not those of its tokens.
        UnsupportedModelError: The model scores one token at a time only.

    Example:
        A table of two letters: whatever the law, its next bytes sum to one.

        >>> from isthmus.decoding.table import TableTarget
        >>> scorer = ByteScorer(TableTarget(4), ByteVocab.of([b"a", b"b", b"ab", None]), [3], [3])
        >>> round(float(scorer.next_byte(b"ba").exp().sum()), 6)
        1.0
    """

    def __init__(
        self,
        target: Target,
        vocab: ByteVocab,
        start: Sequence[int],
        ends: Sequence[int] = (),
        *,
        covers: Covers = "all",
        tolerance: float = 1e-3,
        reshape: Reshaped | None = None,
    ) -> None:
        if vocab.normalises:
            raise InvalidInputError(
                f"the tokenizer changes texts ({', '.join(vocab.normalises)}), so their bytes "
                "cannot be told from its tokens; use a tokenizer that does not"
            )
        if covers not in ("all", "boundaries", "tokens"):
            raise InvalidInputError(f"covers must be all, boundaries or tokens, not {covers!r}")
        self.vocab, self.covers, self.tolerance = vocab, covers, tolerance
        self.ends = list(ends)
        self.prefixes = PrefixScorer(target, start, reshape)
        begins = all(vocab.bytes(token) is None for token in start)
        self._lead = vocab.lead if begins else b""
        self._width = target.vocab_size
        self._firsts = [i for i in vocab.starting(b"") if i < self._width]

    @classmethod
    def of(cls, model: Model, **options: object) -> ByteScorer:
        """The scorer of a loaded model, for texts from their beginning.

        Raises:
            InvalidInputError: It has no tokenizer, or no token that begins a text.
        """
        if model.tokenizer is None or model.target.encoder_decoder:
            raise InvalidInputError("bytes are scored with a decoder-only model and its tokenizer")
        begin = model.tokenizer.bos_token_id
        begin = model.tokenizer.eos_token_id if begin is None else begin
        if begin is None:
            raise InvalidInputError("the tokenizer has no token that begins or ends a text")
        ends = model.target.end_tokens
        return cls(model.target, ByteVocab(model.tokenizer), [begin], ends, **options)  # type: ignore[arg-type]

    def logp(self, text: bytes) -> float:
        """Log-probability that a text begins with these bytes, in nats."""
        covers, _ = self._covers(self._candidates(self._lead + text, ahead=False))
        return float(covers.logsumexp(0))

    def next_byte(self, text: bytes) -> torch.Tensor:
        """Log-probabilities of the byte after a text and, last, of its end, [257]."""
        return self.read(text).next_byte

    def read(self, text: bytes) -> Reading:
        """Both at once, for the price of one.

        Raises:
            InvalidInputError: The model gives the text no probability at all.
        """
        found = self._candidates(self._lead + text)
        covers, _ = self._covers(found)
        # the first of those that end with the text is its own cut, the only one that may end it
        own = found.whole[0]
        ending = [found.sums[own] + float(found.laws[own, end]) for end in self.ends]
        mass = torch.cat([found.mass, found.mass.new_tensor(ending)])
        byte = torch.cat([found.byte, torch.full((len(ending),), END)])
        top = mass.max()
        if not bool(torch.isfinite(top)):
            raise InvalidInputError(f"the model gives no probability to {text[-40:]!r}")
        law = mass.new_zeros(END + 1).index_add(0, byte, (mass - top).exp())
        tokens = len(found.places[own][1])
        return Reading(float(covers.logsumexp(0)), (law / law.sum()).log(), tokens)

    def cover(self, text: bytes, generator: torch.Generator | None = None) -> list[int]:
        """One cover of a text, drawn by its probability: tokens to go on from without bias.

        Decoding from the tokens of a prompt forgets that its last ones might have been merged with
        what follows. Going on from a drawn cover, whose last token may reach beyond the prompt, is
        a draw from the model's law of texts that begin with the prompt.

        Args:
            text: The prompt.
            generator: Source of the draw; the likeliest cover when None.

        Returns:
            Tokens without the start tokens.

        Raises:
            InvalidInputError: The model gives the text no probability at all.
        """
        found = self._candidates(self._lead + text, ahead=False)
        mass, chosen = self._covers(found)
        if not bool(torch.isfinite(mass).any()):
            raise InvalidInputError(f"the model gives no probability to {text[-40:]!r}")
        if generator is None:
            k = int(mass.argmax())
        else:
            k = int(torch.multinomial(mass.softmax(0).cpu(), 1, generator=generator))
        if k >= len(chosen):
            return found.places[found.whole[k - len(chosen)]][1]
        j = int(chosen[k])
        return [*found.places[int(found.owner[j])][1], int(found.token[j])]

    def _covers(self, found: _Candidates) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability of each cover, and the candidates that the first of them are."""
        beyond = torch.tensor([at < found.length for at, _ in found.places])[found.owner]
        chosen = beyond.nonzero()[:, 0]
        whole = found.mass.new_tensor([found.sums[k] for k in found.whole])
        return torch.cat([found.mass[chosen], whole]), chosen

    def _candidates(self, text: bytes, *, ahead: bool = True) -> _Candidates:
        """All tokens that go on from a place in the text and reach beyond its end.

        Without ``ahead``, from places before its end only: all that covers are made of.
        """
        places = self._places(text)
        sums, laws = self.prefixes.score([prefix for _, prefix in places])
        tokens: list[int] = []
        bytes_: list[int] = []
        owners: list[int] = []
        for k, (at, _) in enumerate(places):
            known = len(text) - at
            if not known and not ahead:
                continue
            for i in self.vocab.starting(text[at:]) if known else self._firsts:
                word = self.vocab.bytes(i) or b""
                if len(word) > known and i < self._width:
                    tokens.append(i)
                    bytes_.append(word[known])
                    owners.append(k)
        token, byte, owner = (torch.tensor(x, dtype=torch.int64) for x in (tokens, bytes_, owners))
        mass = torch.tensor(sums, dtype=laws.dtype)[owner] + laws[owner, token]
        if self.covers == "all":
            fit = self._canonical(places, token, owner, mass)
            token, byte, owner, mass = token[fit], byte[fit], owner[fit], mass[fit]
        whole = [k for k, (at, _) in enumerate(places) if at == len(text)]
        return _Candidates(len(text), places, sums, laws, whole, token, byte, owner, mass)

    def _places(self, text: bytes) -> list[tuple[int, list[int]]]:
        """Where the last token of a cover may begin, and the tokens before that place."""
        own = self.vocab.encode(text)
        if self.covers == "tokens":
            return [(len(text), own)]
        if self.covers == "boundaries":
            offsets = accumulate((len(self.vocab.bytes(i) or b"") for i in own), initial=0)
            return [(at, own[:k]) for k, at in enumerate(offsets)]
        ends = [
            at
            for at in range(max(0, len(text) - self.vocab.longest), len(text))
            if self.vocab.starting(text[at:])
        ]
        found: dict[tuple[int, ...], int] = {tuple(own): len(text)}
        for at, ids in zip(ends, self.vocab.encode_all([text[:at] for at in ends]), strict=True):
            found[tuple(ids)] = at
        # cuts that only what follows the text brings about
        wanted = {*ends, len(text)}
        for ids in self.vocab.encode_all([text + probe for probe in self.vocab.probes]):
            at = 0
            for k in range(len(ids) + 1):
                if at in wanted:
                    found.setdefault(tuple(ids[:k]), at)
                at += len(self.vocab.bytes(ids[k]) or b"") if k < len(ids) else 0
        return [(at, list(ids)) for ids, at in found.items()]

    def _canonical(
        self,
        places: list[tuple[int, list[int]]],
        token: torch.Tensor,
        owner: torch.Tensor,
        mass: torch.Tensor,
    ) -> torch.Tensor:
        """Which of the candidates may begin a canonical text, bool."""
        share = mass.softmax(0)
        order = share.argsort(descending=True)
        # what is looked at: all but the tail whose share is tolerated
        tail = share[order].flip(0).cumsum(0).flip(0)
        asked = order[(tail > self.tolerance) & (share[order] > 0)]
        fit = torch.ones(len(mass), dtype=torch.bool)
        for k in sorted(set(owner[asked].tolist())):
            mine = asked[owner[asked] == k]
            fit[mine] = torch.tensor(self.vocab.may_begin(places[k][1], token[mine].tolist()))
        return fit
