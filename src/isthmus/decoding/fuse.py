"""Asking for a fusion: which models speak along, with what weight, and how they are put together.

>>> sorted(MODES)
['contrast', 'lead', 'mixture', 'next-byte', 'product', 'proxy', 'route']

Models whose tokens write the same bytes are fused inside the ordinary loop, and drafts, drawing and
constraints go with it (:mod:`isthmus.decoding.fusion`). Others meet at the bytes of their texts
(:mod:`isthmus.decoding.byte_fusion`), in loops of their own.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from isthmus.decoding.byte_fusion import ByteMember, Leader, NextByte, lead_and_score
from isthmus.decoding.bytescorer import ByteScorer
from isthmus.decoding.bytevocab import ByteVocab
from isthmus.decoding.contrast import ContrastiveDecoding
from isthmus.decoding.fusion import Member, Mixture, Product, Proxy, Route, check_same_bytes
from isthmus.decoding.generation import Generation
from isthmus.decoding.prefixes import PrefixScorer
from isthmus.decoding.router import MaxProb
from isthmus.errors import InvalidInputError, MismatchError, UnknownNameError
from isthmus.roles import Reshape

if TYPE_CHECKING:
    from isthmus.decoding.model import Model

MODES = {
    "product": "(1 - sum w) log p + sum w log q",
    "mixture": "log ((1 - sum w) p + sum w q)",
    "contrast": "(1 + w) z - w z_other where z is plausible",
    "proxy": "z + w (z_first - z_second): what tuning changed in a small model",
    "route": "the other model's law where the model's best probability is below w",
    "lead": "beams of the model, ranked by (1 - w) its own and w the other's score of the bytes",
    "next-byte": "(1 - sum w) log p + sum w log q of the next byte, byte by byte",
}
"""Ways to fuse by name; w is the weight given with a model."""

BYTES = ("lead", "next-byte")
"""Those that ask for bytes, so that vocabularies may differ."""

_DEFAULTS = {"contrast": 0.5, "route": 0.5, "proxy": 1.0, "lead": 0.2}
_WIDTH = 5


@dataclass(frozen=True)
class Fuse:
    """Models to fuse with the one that is asked.

    Attributes:
        models: The others, loaded.
        weights: One for each; None is the default of the way: equal shares for product, mixture
            and next-byte, 0.2 together for lead, 0.5 for contrast and route, 1 for proxy.
        mode: A name in :data:`MODES`, or ``"auto"``: product where all tokens write the same
            bytes, lead elsewhere.

    Raises:
        UnknownNameError: No such way.
        InvalidInputError: The numbers of models do not fit, or a weight is out of range.
    """

    models: tuple[Model, ...]
    weights: tuple[float | None, ...]
    mode: str = "auto"

    def __post_init__(self) -> None:
        if self.mode not in (*MODES, "auto"):
            raise UnknownNameError("way to fuse", self.mode, ["auto", *MODES])
        count, given = len(self.models), [w for w in self.weights if w is not None]
        if not count or count != len(self.weights):
            raise InvalidInputError(
                f"there are {count} models to fuse, {len(self.weights)} weights"
            )
        wanted = {"contrast": 1, "route": 1, "proxy": 2}.get(self.mode, count)
        if count != wanted:
            raise InvalidInputError(f"{self.mode} fuses with {wanted} other models, got {count}")
        free = self.mode in ("contrast", "proxy")
        if min(given, default=0.0) < 0 or (not free and sum(given) > 1):
            raise InvalidInputError(
                f"weights of a fusion are 0 or more{'' if free else ' and 1 at most together'}, "
                f"got {', '.join(map(str, given))}"
            )

    @classmethod
    def of(cls, given: Any, mode: str = "auto") -> Fuse:
        """From what callers give: a model, a pair of a model and its weight, or a list of those."""
        if isinstance(given, Fuse):
            return given
        each = given if isinstance(given, list) else [given]
        pairs = [one if isinstance(one, tuple) else (one, None) for one in each]
        return cls(tuple(m for m, _ in pairs), tuple(w for _, w in pairs), mode)

    def way(self, model: Model) -> str:
        """The name of the way for a model, ``"auto"`` made out."""
        if self.mode != "auto":
            return self.mode
        try:
            for other in self.models:
                check_same_bytes(model.tokenizer, other.tokenizer)
        except MismatchError:
            return "lead"
        return "product"

    def shares(self, way: str) -> list[float]:
        """The weights, with defaults filled in."""
        count = len(self.models)
        default = _DEFAULTS.get(way, count / (count + 1)) / (1 if way == "proxy" else count)
        return [default if w is None else w for w in self.weights]

    def reshapes(self, model: Model) -> tuple[Reshape, ...]:
        """The fusion inside the ordinary loop; nothing where it has a loop of its own.

        Raises:
            MismatchError: The tokens of the models write different bytes.
        """
        way, vocab = self.way(model), model.tokenizer
        if way in BYTES:
            return ()
        shares = self.shares(way)
        members = [
            Member(m.target, w, vocab=m.tokenizer) for m, w in zip(self.models, shares, strict=True)
        ]
        for member in members:
            check_same_bytes(vocab, member.vocab)
        if way == "contrast":
            return (ContrastiveDecoding(members[0].model, strength=shares[0]),)
        if way == "proxy":
            return (Proxy(members[0], members[1], strength=shares[0], vocab=vocab),)
        if way == "route":
            return (Route(members[0], MaxProb(shares[0]), vocab=vocab),)
        kind = Product if way == "product" else Mixture
        return (kind(members, weight=1.0 - sum(shares), vocab=vocab),)

    def write(
        self,
        model: Model,
        prompt: Any,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> Generation:
        """Write by bytes.

        Args:
            model: The model that is asked: it leads, or is one of the members.
            prompt: Text or token ids.
            max_new_tokens: Budget; of bytes where bytes are written.
            temperature: 0 takes the likeliest; above 0 only bytes are drawn.
            generator: Source of draws.

        Raises:
            InvalidInputError: A model's texts cannot be scored by bytes, or a search is to draw.
        """
        if model.tokenizer is None:
            raise InvalidInputError("models are fused by bytes, and this one has no tokenizer")
        way, clock = self.way(model), time.perf_counter()
        vocab, ids = ByteVocab(model.tokenizer), model.encode(prompt)
        text = prompt.encode() if isinstance(prompt, str) else vocab.decode(ids.tolist())
        result = Generation(prompt_tokens=len(ids))
        if way == "lead":
            if temperature:
                raise InvalidInputError(
                    "lead keeps the best beams and draws nothing; leave the temperature out, or "
                    "fuse by next-byte"
                )
            forwards = self._lead(model, vocab, ids, text, max_new_tokens, result)
        else:
            forwards = self._bytes(model, text, max_new_tokens, temperature, generator, result)
        result.stats.new_tokens = len(result.tokens)
        result.stats.target_forwards = forwards
        result.stats.seconds = time.perf_counter() - clock
        return result

    def _lead(
        self,
        model: Model,
        vocab: ByteVocab,
        ids: torch.Tensor,
        text: bytes,
        budget: int,
        result: Generation,
    ) -> int:
        """Fill in the best hypothesis; returns the forwards of the leader."""
        if model.target.encoder_decoder:  # its prompt is a source, and no beginning
            (start,), inputs = model._sources([ids], None)
            text = b""
        else:
            start, inputs = ids, None
        prefixes = PrefixScorer(model.target, start.tolist(), **(inputs or {}))
        ends = model._ends(ignore_end=False)
        shares = self.shares("lead")
        found = lead_and_score(
            Leader(prefixes, vocab, ends),
            [
                ByteMember(ByteScorer.of(m), w, text)
                for m, w in zip(self.models, shares, strict=True)
                if w
            ],
            rate=sum(shares),
            width=_WIDTH,
            max_new_tokens=budget,
        )
        result.hypotheses, best = found, found[0]
        result.tokens, result.text = list(best.tokens), _text(best.trace["bytes"])
        result.finish_reason = "length" if len(best.tokens) >= budget else "stop"
        return prefixes.forwards

    def _bytes(
        self,
        model: Model,
        text: bytes,
        budget: int,
        temperature: float,
        generator: torch.Generator | None,
        result: Generation,
    ) -> int:
        """Fill in new bytes; returns the forwards of the model that is asked."""
        shares = self.shares("next-byte")
        fused = NextByte.of([model, *self.models], [1.0 - sum(shares), *shares])
        new = fused.generate(
            text, budget, generator if temperature else None, temperature=temperature or 1.0
        )
        result.text = _text(new)
        result.tokens = ByteVocab(model.tokenizer).encode(new)
        result.finish_reason = "length" if len(new) >= budget else "stop"
        return fused.members[0].scorer.prefixes.forwards


def _text(data: bytes) -> str:
    return data.decode(errors="replace")


def parse(specs: Sequence[str]) -> list[tuple[str, float | None]]:
    """Names of models and their weights from ``MODEL`` or ``MODEL:weight``.

    Raises:
        InvalidInputError: There is no name.

    Example:
        >>> parse(["pycode-s:0.3", "folder/of/a/model", "C:/model"])
        [('pycode-s', 0.3), ('folder/of/a/model', None), ('C:/model', None)]
    """
    out: list[tuple[str, float | None]] = []
    for spec in specs:
        name, colon, weight = spec.rpartition(":")
        try:
            pair = (name, float(weight)) if colon else (spec, None)
        except ValueError:  # a colon of its own
            pair = (spec, None)
        if not pair[0]:
            raise InvalidInputError(f"--fuse takes MODEL or MODEL:weight, got {spec!r}")
        out.append(pair)
    return out
