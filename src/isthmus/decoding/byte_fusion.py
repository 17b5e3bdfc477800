"""Models with different vocabularies as one: they meet at the bytes of their texts.

*Next byte*: the laws of the next byte of all members are combined, and a byte is picked; exact,
one forward of every member a byte. *Lead and score*: one model proposes tokens in a beam, the
others score the bytes of what stands so far::

    leader   ── W hypotheses x W tokens ──┐
    followers ── P(bytes of hypothesis) ──┴─▶ (1 - r) · leader + r · followers ──▶ best W
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from isthmus.decoding.bytescorer import END, ByteScorer
from isthmus.decoding.bytevocab import ByteVocab
from isthmus.decoding.prefixes import PrefixScorer, Reshaped
from isthmus.errors import InvalidInputError
from isthmus.roles import Hypothesis

if TYPE_CHECKING:
    from isthmus.decoding.model import Model

FLOOR = -10.0
"""What a follower says about no text at all, in nats a token."""

SPREAD = 20
"""A beam ends when its hypotheses differ in length by more."""


@dataclass(frozen=True)
class ByteMember:
    """A model in a fusion of bytes.

    Attributes:
        scorer: The model.
        weight: Its weight; 0 leaves it out.
        prompt: What it reads before the text, and only it.
    """

    scorer: ByteScorer
    weight: float = 1.0
    prompt: bytes = b""


class NextByte:
    """The fused law of the next byte.

    Args:
        members: Models with any vocabularies.
        how: ``"product"`` adds weighted log-probabilities, ``"mixture"`` weighted probabilities;
            both renormalise over the 256 bytes and the end.

    Raises:
        InvalidInputError: There is no member with a weight, or a weight is negative in a mixture.

    Example:
        >>> from isthmus.decoding.bytevocab import ByteVocab
        >>> from isthmus.decoding.table import TableTarget
        >>> vocab = ByteVocab.of([b"a", b"b", b"ab", None])
        >>> one = ByteMember(ByteScorer(TableTarget(4, seed=1), vocab, [3], [3]))
        >>> fused = NextByte([one, one], "mixture").law(b"a")
        >>> bool(torch.allclose(fused, one.scorer.next_byte(b"a")))
        True
    """

    def __init__(
        self, members: Sequence[ByteMember], how: Literal["product", "mixture"] = "product"
    ) -> None:
        self.members = [m for m in members if m.weight]
        if not self.members:
            raise InvalidInputError("a fusion needs at least one member with a weight")
        if how not in ("product", "mixture"):
            raise InvalidInputError(f"bytes are fused by product or mixture, not {how!r}")
        if how == "mixture" and any(m.weight < 0 for m in self.members):
            raise InvalidInputError("a mixture takes no negative weights; use a product")
        self.how = how

    @classmethod
    def of(
        cls,
        models: Sequence[Model],
        weights: Sequence[float] = (),
        how: Literal["product", "mixture"] = "product",
    ) -> NextByte:
        """The fusion of loaded models, whatever their tokenizers.

        Args:
            models: Decoder-only models with tokenizers.
            weights: One for each; equal shares when empty.
            how: As above.

        Raises:
            InvalidInputError: The numbers of models and weights differ.
        """
        shares = list(weights) or [1 / max(1, len(models))] * len(models)
        if len(shares) != len(models):
            raise InvalidInputError(f"there are {len(models)} models and {len(shares)} weights")
        pairs = zip(models, shares, strict=True)
        return cls([ByteMember(ByteScorer.of(m), w) for m, w in pairs], how)

    def law(self, text: bytes) -> torch.Tensor:
        """Log-probabilities of the next byte and of the end, [257].

        Raises:
            InvalidInputError: The members agree on no byte at all.
        """
        laws = [m.scorer.next_byte(m.prompt + text).double() for m in self.members]
        weights = torch.tensor([m.weight for m in self.members], dtype=torch.float64)[:, None]
        each = torch.stack(laws)
        if self.how == "mixture":
            fused = (each + weights.log()).logsumexp(0)
        else:
            # what a member with a negative weight rules out is no reason for it
            fused = (weights * each).nan_to_num(posinf=-torch.inf).sum(0)
        if not bool(torch.isfinite(fused).any()):
            raise InvalidInputError(f"the models agree on no byte after {text[-40:]!r}")
        return fused.log_softmax(0)

    def generate(
        self,
        prompt: bytes,
        max_new_bytes: int,
        generator: torch.Generator | None = None,
        *,
        temperature: float = 1.0,
    ) -> bytes:
        """New bytes, one by one; the likeliest ones without a generator."""
        text = prompt
        for _ in range(max_new_bytes):
            law = (self.law(text) / temperature).softmax(0).cpu()
            byte = int(
                law.argmax() if generator is None else law.multinomial(1, generator=generator)
            )
            if byte == END:
                break
            text += bytes([byte])
        return text[len(prompt) :]


def softened(temperature: float, penalty: float = 1.0, window: int = 50) -> Reshaped | None:
    """Logits at a temperature, tokens of the last ``window`` ones penalised; None changes nothing.

    Args:
        temperature: Divides the logits.
        penalty: Divides positive logits of tokens that stand in the window, multiplies others.
        window: Tokens that are looked back.
    """
    if temperature == 1.0 and penalty == 1.0:
        return None

    def reshape(paths: list[list[int]], logits: torch.Tensor) -> torch.Tensor:
        logits = logits.clone()
        for row, path in zip(logits, paths, strict=True):
            if penalty != 1.0:
                seen = torch.tensor(sorted(set(path[-window:])))
                row[seen] = torch.where(row[seen] > 0, row[seen] / penalty, row[seen] * penalty)
        return logits / temperature

    return reshape


@dataclass
class Leader:
    """The model that proposes tokens.

    Attributes:
        prefixes: The model, with its start tokens and what it recognises.
        vocab: Bytes under its tokens.
        ends: Tokens that end a hypothesis.
    """

    prefixes: PrefixScorer
    vocab: ByteVocab
    ends: Sequence[int]


def lead_and_score(
    leader: Leader,
    followers: Sequence[ByteMember],
    *,
    rate: float,
    width: int = 5,
    max_new_tokens: int = 128,
) -> list[Hypothesis]:
    """Beam search of a leader whose hypotheses are scored by followers as bytes.

    A hypothesis is extended by the leader's likeliest tokens; followers score it as it stands
    before the new token, which costs one scoring a hypothesis and not one an extension.

    Args:
        leader: Proposes.
        followers: Score; their weights add up to the part that ``rate`` gives them.
        rate: Share r of the followers; 0 is the leader's own beam.
        width: Hypotheses W, and extensions of each.
        max_new_tokens: Longest hypothesis, in tokens of the leader.

    Returns:
        Hypotheses, best first; tokens without the end. ``trace`` holds their bytes.

    Raises:
        InvalidInputError: The rate lies outside 0 to 1, or another number is below 1.
    """
    if not 0.0 <= rate <= 1.0 or width < 1 or max_new_tokens < 1:
        raise InvalidInputError(
            f"rate must lie in 0 to 1, width and max_new_tokens be at least 1; got {rate}, {width} "
            f"and {max_new_tokens}"
        )
    whole = sum(m.weight for m in followers)
    said: dict[bytes, float] = {}

    def follow(text: bytes) -> float:
        if text not in said:
            said[text] = sum(m.weight / whole * _per_token(m, text) for m in followers)
        return said[text]

    open_: list[tuple[int, ...]] = [()]
    done: list[Hypothesis] = []
    for _ in range(max_new_tokens + 1):
        sums, laws = leader.prefixes.score([list(tokens) for tokens in open_])
        grown: list[tuple[float, float, tuple[int, ...], bool]] = []
        for tokens, total, law in zip(open_, sums, laws, strict=True):
            best = law.topk(min(width, len(law)))
            pairs = list(zip(best.values.tolist(), best.indices.tolist(), strict=True))
            if pairs[0][1] in leader.ends:
                pairs = pairs[:1]  # an end that is the likeliest stands alone
            else:
                pairs = [(p, token) for p, token in pairs if token not in leader.ends]
            heard = follow(leader.vocab.decode(tokens)) if rate else 0.0
            for gained, token in pairs:
                logprob = total + gained
                score = (1 - rate) * logprob / (len(tokens) + 1) + rate * heard
                ends = token in leader.ends
                grown.append((score, logprob, tokens if ends else (*tokens, token), ends))
        kept = sorted(
            [*grown, *((h.score, h.logprob, h.tokens, True) for h in done)], key=lambda g: -g[0]
        )[:width]
        done = [_hypothesis(leader, t, p, s) for s, p, t, ends in kept if ends]
        open_ = [t for _, _, t, ends in kept if not ends]
        lengths = [len(t) for t in open_] + [len(h.tokens) for h in done]
        if not open_ or max(lengths) - min(lengths) > SPREAD or max(lengths) >= max_new_tokens:
            break
    rest = [_hypothesis(leader, t, p, s) for s, p, t, ends in kept if not ends]
    return sorted(done, key=lambda h: -h.score) or sorted(rest, key=lambda h: -h.score)


def rescored(
    hypotheses: Sequence[Hypothesis], followers: Sequence[ByteMember], rate: float
) -> list[Hypothesis]:
    """Complete hypotheses of a leader's own beam, ranked by the same score afterwards."""
    whole = sum(m.weight for m in followers)

    def score(h: Hypothesis) -> float:
        heard = sum(m.weight / whole * _per_token(m, h.trace["bytes"]) for m in followers)
        return (1 - rate) * h.logprob / (len(h.tokens) + 1) + rate * heard

    return sorted(hypotheses, key=lambda h: -score(h))


def _per_token(member: ByteMember, text: bytes) -> float:
    if not text:
        return FLOOR
    scorer = member.scorer
    gained = scorer.logp(member.prompt + text) - scorer.logp(member.prompt)
    return gained / len(scorer.vocab.encode(text))


def _hypothesis(
    leader: Leader, tokens: tuple[int, ...], logprob: float, score: float
) -> Hypothesis:
    return Hypothesis(tokens, logprob, score, {"bytes": leader.vocab.decode(tokens)})
