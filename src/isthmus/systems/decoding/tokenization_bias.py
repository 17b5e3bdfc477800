"""Tokenization bias: what a prompt's last token hides, summed back in.

Paper: Phan, Havasi, Muckley, Ullrich. Understanding and Mitigating Tokenization Bias in Language
    Models. 2024. arXiv:2406.16829
Idea: A model that is given the tokens of a text knows that the last one was not merged with what
    follows; sum over all token sequences that cover the text and its next byte has no bias.
Differs: Bytes instead of characters. Prefixes are scored in one forward over a tree, and tokens of
    a small share of the probability are not looked at (a setting). Beside the byte sampler there is
    a cheaper one: draw one cover of the prompt, then decode by tokens, which has the same law.

    "ret" ── tokens [ret] alone ──────────────▶ "urn" never comes: that would have been [return]
          └─ covers [re|t·] [ret] [return] ──▶ P(u | ret) = P(retu) / P(ret)
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, ClassVar

import torch

from isthmus.claims import Claim, Gate, Row, Ruler, Scale, judge
from isthmus.decoding.bytescorer import END, ByteScorer, Covers
from isthmus.decoding.bytevocab import ByteVocab
from isthmus.decoding.generation import Generation
from isthmus.decoding.model import Model
from isthmus.decoding.prefixes import PrefixScorer
from isthmus.decoding.target import HubTarget
from isthmus.models.hub import load_checkpoint
from isthmus.roles import Target
from isthmus.workbench import chains, pycode
from isthmus.workbench.reference import reference

AHEAD = 8
"""Bytes after a prompt that the claim scores."""


@dataclass(frozen=True)
class Settings:
    """Settings.

    Attributes:
        covers: ``"all"`` is the method; ``"tokens"`` switches it off.
        tolerance: Share of the probability that is not looked at; see
            :class:`~isthmus.decoding.bytescorer.ByteScorer`.
    """

    covers: Covers = "all"
    tolerance: float = 1e-3


class TokenizationBias:
    """Bytes from a model of tokens, without the bias of a prompt's last token.

    Args:
        target: A decoder-only model.
        vocab: Bytes under its tokens.
        start: Tokens before every text.
        ends: Tokens that end one.
        settings: See :class:`Settings`.

    Example:
        "ab" is a token, so a model is never shown "a" before "b", and says that it cannot be:

        >>> from isthmus.workbench import chains
        >>> parts = chains.exact_model("longest", 6), chains.vocab("longest"), [chains.END]
        >>> round(float(TokenizationBias(*parts).next_byte(b"A")[ord("B")].exp()), 3)
        0.5
        >>> off = TokenizationBias(*parts, settings=Settings(covers="tokens"))
        >>> float(off.next_byte(b"A")[ord("B")].exp())
        0.0
    """

    role: ClassVar[str] = "strategy"

    def __init__(
        self,
        target: Target,
        vocab: ByteVocab,
        start: Sequence[int],
        ends: Sequence[int] = (),
        settings: Settings | None = None,
    ) -> None:
        self.settings = settings or Settings()
        self.vocab = vocab
        self.scorer, self._told = (
            ByteScorer(target, vocab, start, ends, covers=c, tolerance=self.settings.tolerance)
            for c in (self.settings.covers, "tokens")
        )
        self._start = list(start)
        self._model: Model | None = None

    @classmethod
    def for_model(cls, model: Model, settings: Settings | None = None) -> TokenizationBias:
        """The method on a loaded model.

        Raises:
            IsthmusError: Its texts cannot be scored by bytes; the message says why.
        """
        scorer = ByteScorer.of(model)
        made = cls(model.target, scorer.vocab, scorer.prefixes.start, scorer.ends, settings)
        made._model = model
        return made

    def next_byte(self, text: bytes) -> torch.Tensor:
        """Log-probabilities of the byte after a text and, last, of its end, [257]."""
        return self.scorer.next_byte(text)

    def sample(self, prompt: bytes, count: int, generator: torch.Generator | None = None) -> bytes:
        """Up to ``count`` bytes after a prompt; the likeliest ones without a generator."""
        text = prompt
        for _ in range(count):
            law = self.next_byte(text).exp()
            best = law.argmax() if generator is None else law.multinomial(1, generator=generator)
            if int(best) == END:
                break
            text += bytes([int(best)])
        return text[len(prompt) :]

    def generate(self, prompt: str, *, seed: int | None = None, **options: Any) -> Generation:
        """Answer a prompt that may end anywhere, inside a word too, by tokens and at full speed.

        One cover of the prompt is taken, drawn when the answer is sampled, and the model goes on
        from it with any drafter.

        Args:
            prompt: Text.
            seed: Of the draws.
            options: As for :meth:`isthmus.decoding.model.Model.generate`, without ``stop``.

        Returns:
            The answer; what the cover writes beyond the prompt is the beginning of its text.

        Raises:
            TypeError: The method was not made :meth:`for_model`.
        """
        if self._model is None:
            raise TypeError("generate needs a loaded model; use TokenizationBias.for_model")
        generator = None
        if options.get("temperature"):
            generator = torch.Generator().manual_seed(torch.seed() if seed is None else seed)
        cover = self.scorer.cover(prompt.encode(), generator)
        answer: Generation = self._model.generate(
            torch.tensor([*self._start, *cover]), seed=seed, **options
        )
        written = self.vocab.decode([*cover, *answer.tokens])
        answer.text = written.removeprefix(self.vocab.lead)[len(prompt.encode()) :].decode(
            errors="replace"
        )
        return answer

    def bias(self, text: bytes) -> list[float]:
        """Total variation between the law that is told by tokens and the right one, by prefix."""
        found = []
        for end in range(len(text) + 1):
            right, told = (s.next_byte(text[:end]).exp() for s in (self.scorer, self._told))
            found.append(0.5 * float((right - told).abs().sum()))
        return found


def branch_and_pass(vocab: ByteVocab, prefixes: PrefixScorer, text: bytes) -> float:
    """Probability that a text begins so, under longest-prefix cuts, in linear time (Algorithm 1).

    Args:
        vocab: A vocabulary that is cut by the longest word from the left.
        prefixes: The model.
        text: At least one byte.
    """
    total, passed, rest = 0.0, 1.0, text
    ids: list[int] = []
    while True:
        law = prefixes.score([ids])[1][0].exp()
        total += passed * float(law[vocab.starting(rest)].sum())  # branch: a word covers the rest
        first = vocab.encode(rest)[0]
        word = vocab.bytes(first) or b""
        if len(word) == len(rest):
            return total
        passed *= float(law[first])  # pass: the first word of the rest, and on
        ids, rest = [*ids, first], rest[len(word) :]


def chain_errors(method: TokenizationBias, contexts: Sequence[str]) -> list[float]:
    """Error of the probability of an A after each context of a chain, B being the rest."""
    errors = []
    for text in contexts:
        law = method.next_byte(text.encode()).exp()
        letters = law[[ord(c) for c in chains.LETTERS]]
        share = float(letters[0] / letters.sum())
        errors.append(abs(share - chains.after(text)))
    return errors


def cut_prompts(
    vocab: ByteVocab, count: int, seed: int = 0, context: int = 240
) -> list[tuple[bytes, bytes]]:
    """Held-out code cut inside a token of four or more bytes, and the bytes that follow."""
    rng = random.Random(seed)
    found: list[tuple[bytes, bytes]] = []
    documents = [t for t in pycode.texts("held-out") if len(t) > 4 * context]
    while len(found) < count:
        text = rng.choice(documents)
        begin = text.index("\n", rng.randrange(len(text) - 3 * context)) + 1
        piece = text[begin : begin + 2 * context].encode()
        at = 0
        for token in vocab.encode(piece):
            size = len(vocab.bytes(token) or b"")
            if at > context and size >= 4:
                cut = at + rng.randrange(2, size)
                found.append((piece[:cut], piece[cut : cut + AHEAD]))
                break
            at += size
    return found


def cut_bits(model: Model, prompts: Sequence[tuple[bytes, bytes]]) -> dict[str, float]:
    """Bits per byte after prompts cut inside a token: by tokens, after healing, without bias.

    Of the first two, all tokens count that write the bytes, canonical or not: the more, the better
    for them.
    """
    whole = ByteScorer.of(model)
    start, vocab = whole.prefixes.start, whole.vocab
    nats = {"tokens": 0.0, "healed": 0.0, "covers": 0.0}
    for prompt, ahead in prompts:
        ids = vocab.encode(prompt)
        last = vocab.bytes(ids[-1]) or b""
        told = ByteScorer(model.target, vocab, [*start, *ids], tolerance=1.0)
        healed = ByteScorer(model.target, vocab, [*start, *ids[:-1]], tolerance=1.0)
        nats["tokens"] -= told.logp(ahead)
        nats["healed"] -= healed.logp(last + ahead) - healed.logp(last)
        nats["covers"] -= whole.logp(prompt + ahead) - whole.logp(prompt)
    count = sum(len(ahead) for _, ahead in prompts)
    return {name: total / count / math.log(2) for name, total in nats.items()}


def claim(ruler: Ruler, scale: Scale = "small") -> Claim:
    """Recover the law of chains from models of their tokens; go on from prompts cut in a token.

    Args:
        ruler: Not used: nothing here is a speed.
        scale: ``"small"`` enumerates chains of 10 letters and scores 80 prompts.
    """
    del ruler
    small = scale != "test"
    length = 10 if small else 7
    deepest = 7 if small else 4
    texts = ["".join(t) for n in range(1, deepest + 1) for t in product("AB", repeat=n)]
    rows, gates = [], []
    off = Settings(covers="tokens", tolerance=0.0)
    for cut in ("longest", "merges"):
        parts = (chains.exact_model(cut, length), chains.vocab(cut), [chains.END], [chains.END])
        told = chain_errors(TokenizationBias(*parts, settings=off), texts)
        right = chain_errors(TokenizationBias(*parts, settings=Settings(tolerance=0.0)), texts)
        rows.append(
            Row(
                f"mean error of the next letter, exact model, {cut}",
                "",
                sum(told) / len(told),
                sum(right) / len(right),
                sum(told) / len(told),
                ceiling=0.0,
                note=f"{len(texts)} contexts; largest {max(right):.1e}",
            )
        )
        gates.append(Gate(f"largest error, exact model, {cut}", max(right), "<=", 1e-9))
        gates.append(Gate(f"mean error of tokens, {cut}", sum(told) / len(told), ">=", 0.05))
    model = load_checkpoint(str(chains.reference())).model
    contexts = [t[: 20 + i % 20] for i, t in enumerate(chains.draw(100 if small else 10, 40, 1))]
    trained = (HubTarget(model), chains.vocab("merges"), [chains.END], [chains.END])
    told, right = (
        chain_errors(TokenizationBias(*trained, settings=s), contexts) for s in (off, Settings())
    )
    errors = [sum(x) / len(x) for x in (told, right)]
    rows.append(
        Row(
            "mean error of the next letter, trained model",
            "",
            errors[0],
            errors[1],
            errors[0],
            ceiling=0.0,
            note=f"0.1M parameters, {len(contexts)} contexts",
        )
    )
    loaded = load_checkpoint(str(reference("pycode-t")))
    code = Model(loaded.model, loaded.tokenizer)
    prompts = cut_prompts(ByteVocab(loaded.tokenizer), 80 if small else 6)
    bits = cut_bits(code, prompts)
    rows.append(
        Row(
            f"bits per byte of the {AHEAD} bytes after a prompt cut inside a token",
            "bit",
            bits["tokens"],
            bits["covers"],
            bits["tokens"],
            control=bits["healed"],
            note=f"pycode-t, {len(prompts)} prompts; control: token healing, one token back",
        )
    )
    gates += [
        Gate("mean error, trained model", errors[1], "<=", 0.02),
        Gate("error over that of tokens, trained model", errors[1] / errors[0], "<=", 0.2),
        Gate("bits, covers over tokens", bits["covers"] / bits["tokens"], "<", 1.0),
        Gate("bits, covers over healing", bits["covers"] / bits["healed"], "<", 1.0),
    ]
    return Claim(
        slug="tokenization-bias",
        statement="Summing over the covers of a text recovers the law of what comes next, where "
        "the tokens of the text alone are biased.",
        paper_figure="Markov chains: transition probabilities recovered exactly, direct prompting "
        "fails",
        rows=tuple(rows),
        scale=scale,
        device="cpu",
        status=judge(gates, gates[:4]),
        gates=tuple(gates),
        notes=("Off and baseline are one: the tokens of the prompt, as models are usually asked.",),
        seeds=(0, 1),
    )
