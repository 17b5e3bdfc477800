"""Decoding strategies by name, each put together from the small roles: reshape, search, rerank.

A strategy is a frozen dataclass of settings with published defaults; ``pieces`` builds what it is
made of for one call. Those without a search run in the ordinary loop and go together with drafters,
processors, constraints and streaming; a search compares whole hypotheses after every token, so
nothing can be drafted for it.

>>> make("contrastive-search", {"k": "3"})
ContrastiveSearch(k=3, alpha=0.6)

To add one, write a subclass of :class:`Strategy` and name it in :data:`STRATEGIES`.
"""

from __future__ import annotations

import dataclasses
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args, get_origin

from transformers.generation import logits_process as lp

from isthmus.decoding import (
    beam,
    contrast,
    correction,
    dola,
    fsd,
    lookahead,
    rerank,
    truncation,
)
from isthmus.decoding.law import StableTopP
from isthmus.decoding.truncation import Warp
from isthmus.errors import InvalidInputError, UnknownNameError
from isthmus.roles import Rerank, Reshape, Search

TOGETHER = "every hypothesis is compared with the others after each token"
"""Why nothing is drafted for a search."""


@dataclass(frozen=True)
class Pieces:
    """What a strategy is made of, for one call.

    Attributes:
        reshapes: Changes of the law.
        temperature: 0 is greedy.
        options: Further options of :class:`isthmus.decoding.law.Law`.
        search: Who lives on; None is one answer in the ordinary loop.
        renormalize: Whether the search is shown a law that sums to 1 whatever was banned.
        rerank: Who chooses among the answers of the search; None gives its best.
    """

    reshapes: tuple[Reshape, ...] = ()
    temperature: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)
    search: Search | None = None
    renormalize: bool = False
    rerank: Rerank | None = None


class Strategy(ABC):
    """How tokens are chosen: settings that build their parts.

    Attributes:
        name: What users call it.
        rule: One line: what it does.
        alone: Why drafting does not go with it; empty where it does.
    """

    name: ClassVar[str]
    rule: ClassVar[str]
    alone: ClassVar[str] = ""

    @abstractmethod
    def pieces(self, model: Any) -> Pieces:
        """New parts for one call on a :class:`isthmus.decoding.model.Model`."""

    def as_generate(self, drafter: str = "none", *, draft_model: Any = None) -> Callable[..., Any]:
        """This strategy as a callable for transformers' ``generate(custom_generate=...)``.

        Args:
            drafter: Who drafts, where the strategy lets drafts in.
            draft_model: A draft model of transformers with the same vocabulary, or None.
        """
        from isthmus.decoding.custom_generate import custom_generate

        return custom_generate(drafter, draft_model=draft_model, strategy=self)


@dataclass(frozen=True)
class Greedy(Strategy):
    """The likeliest token."""

    name: ClassVar[str] = "greedy"
    rule: ClassVar[str] = "argmax z"

    def pieces(self, model: Any) -> Pieces:
        """Nothing is changed."""
        return Pieces()


@dataclass(frozen=True)
class Sample(Strategy):
    """Draw from the law behind a temperature and any truncations, in transformers' order."""

    name: ClassVar[str] = "sample"
    rule: ClassVar[str] = "draw from softmax(z / temperature), truncated as asked"

    temperature: float = 1.0
    top_h: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical: float = 1.0
    epsilon: float = 0.0
    eta: float = 0.0

    def pieces(self, model: Any) -> Pieces:
        """The truncations that are switched on, one after the other."""
        _within(self, "temperature", 0.0, 100.0, above=True)
        for name, high in (("top_k", 10**9), ("min_p", 1.0), ("epsilon", 1.0), ("eta", 1.0)):
            _within(self, name, 0, high)
        for name in ("top_h", "top_p", "typical"):
            _within(self, name, 0.0, 1.0, above=True)
        chain: list[Reshape] = []
        if self.top_h < 1.0:
            chain.append(truncation.top_h(self.top_h))
        if self.top_k:
            chain.append(Warp(lp.TopKLogitsWarper(self.top_k)))
        if self.top_p < 1.0:
            chain.append(Warp(StableTopP(self.top_p)))
        if self.min_p:
            chain.append(Warp(lp.MinPLogitsWarper(self.min_p)))
        if self.typical < 1.0:
            chain.append(truncation.typical(self.typical))
        if self.epsilon:
            chain.append(truncation.epsilon(self.epsilon))
        if self.eta:
            chain.append(truncation.eta(self.eta, model.target.device))
        return Pieces(tuple(chain), self.temperature)


@dataclass(frozen=True)
class TopK(Sample):
    """Draw among the k likeliest tokens."""

    name: ClassVar[str] = "top-k"
    rule: ClassVar[str] = "draw among the k likeliest tokens"
    top_k: int = 50


@dataclass(frozen=True)
class TopP(Sample):
    """Draw within the smallest set of this probability."""

    name: ClassVar[str] = "top-p"
    rule: ClassVar[str] = "draw within the smallest set of probability p (nucleus)"
    top_p: float = 0.95


@dataclass(frozen=True)
class MinP(Sample):
    """Draw among tokens that are not too far below the likeliest."""

    name: ClassVar[str] = "min-p"
    rule: ClassVar[str] = "draw among tokens of at least this share of the best one's probability"
    min_p: float = 0.05


@dataclass(frozen=True)
class TopH(Sample):
    """Draw from a set of bounded entropy."""

    name: ClassVar[str] = "top-h"
    rule: ClassVar[str] = "draw among the likeliest tokens with this share of the entropy"
    top_h: float = 0.4


@dataclass(frozen=True)
class TypicalSampling(Sample):
    """Draw among tokens about as surprising as the law expects."""

    name: ClassVar[str] = "typical"
    rule: ClassVar[str] = "draw within the set whose surprise is nearest the entropy"
    typical: float = 0.95


@dataclass(frozen=True)
class EpsilonSampling(Sample):
    """Draw among tokens of a least probability."""

    name: ClassVar[str] = "epsilon"
    rule: ClassVar[str] = "draw among tokens of at least this probability"
    epsilon: float = 3e-4


@dataclass(frozen=True)
class EtaSampling(Sample):
    """Draw among tokens above a threshold that falls with the entropy."""

    name: ClassVar[str] = "eta"
    rule: ClassVar[str] = "draw among tokens of at least min(e, sqrt(e) exp(-entropy))"
    eta: float = 3e-4


@dataclass(frozen=True)
class Mirostat(Strategy):
    """Draw so that the surprise stays at a target."""

    name: ClassVar[str] = "mirostat"
    rule: ClassVar[str] = "draw from a set steered so that the surprise stays at tau bits"

    tau: float = 3.0
    eta: float = 1.0
    version: Literal[1, 2] = 1
    temperature: float = 1.0

    def pieces(self, model: Any) -> Pieces:
        """Mirostat behind the temperature."""
        _within(self, "temperature", 0.0, 100.0, above=True)
        return Pieces((truncation.Mirostat(self.tau, self.eta, self.version),), self.temperature)


@dataclass(frozen=True)
class ContrastiveSearch(Strategy):
    """Greedy, away from states that the text has been in."""

    name: ClassVar[str] = "contrastive-search"
    rule: ClassVar[str] = "among the top k: (1 - alpha) p(v) - alpha max cos(h_v, h_j)"

    k: int = 5
    alpha: float = 0.6

    def pieces(self, model: Any) -> Pieces:
        """The look ahead."""
        return Pieces((lookahead.ContrastiveSearch(self.k, self.alpha),))


@dataclass(frozen=True)
class ContrastiveDecoding(Strategy):
    """What the model says more than a smaller one; the draft model is the amateur."""

    name: ClassVar[str] = "contrastive-decoding"
    rule: ClassVar[str] = "(1 + beta) z_expert - beta z_draft-model where p >= alpha max p"

    alpha: float = 0.1
    beta: float = 0.5
    amateur_temperature: float = 1.0
    original: bool = False
    temperature: float = 0.0

    def pieces(self, model: Any) -> Pieces:
        """The contrast with the model's draft model.

        Raises:
            InvalidInputError: There is no draft model.
        """
        if model.draft_model is None:
            raise InvalidInputError(
                f"{self.name} needs a weaker model to contrast with; give one with --draft-model "
                "(the embedded model has 'pycode-s')"
            )
        _within(self, "temperature", 0.0, 100.0)
        law = contrast.ContrastiveDecoding(
            model.draft_model,
            strength=self.beta,
            plausibility=self.alpha,
            temperature=self.amateur_temperature,
            original=self.original,
        )
        return Pieces((law,), self.temperature)


@dataclass(frozen=True)
class DoLa(Strategy):
    """What the last layer says more than the earlier one that differs most."""

    name: ClassVar[str] = "dola"
    rule: ClassVar[str] = "log q_L - log q_M, M the layer of the largest JSD, where p >= alpha max"

    layers: str | tuple[int, ...] = "high"
    alpha: float = 0.1
    norm: bool = False
    repetition_penalty: float = 1.2
    temperature: float = 0.0

    def pieces(self, model: Any) -> Pieces:
        """The contrast between layers."""
        _within(self, "temperature", 0.0, 100.0)
        layers: Any = self.layers
        law = dola.DoLa(model.target, layers, plausibility=self.alpha, norm=self.norm)
        return Pieces((law,), self.temperature, {"repetition_penalty": self.repetition_penalty})


@dataclass(frozen=True)
class DeCo(Strategy):
    """The most confident middle layer mixed into the last one."""

    name: ClassVar[str] = "deco"
    rule: ClassVar[str] = "z_L + alpha m z_A on candidates, A the middle layer that is surest (m)"

    alpha: float = 0.6
    top_p: float = 0.9
    top_k: int = 20
    low: float = 0.625
    high: float = 0.875
    temperature: float = 0.0

    def pieces(self, model: Any) -> Pieces:
        """The correction between layers."""
        _within(self, "temperature", 0.0, 100.0)
        law = correction.Correction(
            model.target, self.alpha, self.top_p, self.top_k, self.low, self.high
        )
        return Pieces((law,), self.temperature)


@dataclass(frozen=True)
class FSD(Strategy):
    """Greedy, away from what an n-gram model of the text so far predicts."""

    name: ClassVar[str] = "fsd"
    rule: ClassVar[str] = "among the top k: (1 - alpha) p(v) - alpha (n-gram prediction of v)"

    n: int = 3
    k: int = 5
    beta: float = 0.9
    alpha: float = 0.6

    def pieces(self, model: Any) -> Pieces:
        """The n-gram penalty."""
        return Pieces((fsd.FSD(self.n, self.k, self.beta, self.alpha),))


@dataclass(frozen=True)
class FSDVec(Strategy):
    """FSD that compares hidden states in place of tokens."""

    name: ClassVar[str] = "fsd-vec"
    rule: ClassVar[str] = "among the top k: (1 - alpha) p(v) - alpha max cos(h, h before v)"

    n: int = 2
    k: int = 5
    alpha: float = 0.4

    def pieces(self, model: Any) -> Pieces:
        """The penalty by hidden states."""
        return Pieces((fsd.FSDVec(self.n, self.k, self.alpha),))


@dataclass(frozen=True)
class Beam(Strategy):
    """Keep the best sums of log-probabilities."""

    name: ClassVar[str] = "beam"
    rule: ClassVar[str] = "keep the best sums of log p; final score logprob / length ** penalty"
    alone: ClassVar[str] = TOGETHER

    beams: int = 4
    length_penalty: float = 1.0
    early_stopping: Literal[False, True, "never"] = False

    def pieces(self, model: Any) -> Pieces:
        """The search."""
        found = beam.BeamSearch(
            self.beams, length_penalty=self.length_penalty, early_stopping=self.early_stopping
        )
        return Pieces(search=found)


@dataclass(frozen=True)
class DiverseBeam(Strategy):
    """Groups of beams that avoid each other's tokens."""

    name: ClassVar[str] = "diverse-beam"
    rule: ClassVar[str] = "groups of beams; group g loses lambda for each use of v by groups < g"
    alone: ClassVar[str] = TOGETHER

    beams: int = 4
    groups: int = 2
    diversity: float = 1.0
    length_penalty: float = 1.0
    early_stopping: Literal[False, True, "never"] = False

    def pieces(self, model: Any) -> Pieces:
        """The search."""
        found = beam.BeamSearch(
            self.beams,
            length_penalty=self.length_penalty,
            early_stopping=self.early_stopping,
            groups=self.groups,
            diversity=self.diversity,
        )
        return Pieces(search=found)


@dataclass(frozen=True)
class StochasticBeam(Strategy):
    """Different answers, drawn without replacement."""

    name: ClassVar[str] = "stochastic-beam"
    rule: ClassVar[str] = "draw whole answers without replacement (Gumbel top-k)"
    alone: ClassVar[str] = TOGETHER

    beams: int = 4
    temperature: float = 1.0

    def pieces(self, model: Any) -> Pieces:
        """The search."""
        _within(self, "temperature", 0.0, 100.0, above=True)
        return Pieces(
            (), self.temperature, search=beam.StochasticBeam(self.beams), renormalize=True
        )


@dataclass(frozen=True)
class MinimumBayesRisk(Strategy):
    """The one of many samples that the others agree with most."""

    name: ClassVar[str] = "mbr"
    rule: ClassVar[str] = "of n samples the one with the largest mean n-gram F1 against the others"
    alone: ClassVar[str] = "all samples are drawn together"

    n: int = 32
    epsilon: float = 0.02
    temperature: float = 1.0

    def pieces(self, model: Any) -> Pieces:
        """Epsilon sampling and a consensus."""
        _within(self, "temperature", 0.0, 100.0, above=True)
        _within(self, "epsilon", 0.0, 1.0)
        cut = (truncation.epsilon(self.epsilon),) if self.epsilon else ()
        return Pieces(
            cut,
            self.temperature,
            search=rerank.Samples(self.n),
            renormalize=True,
            rerank=rerank.Consensus(),
        )


STRATEGIES: dict[str, type[Strategy]] = {
    kind.name: kind
    for kind in (
        Greedy,
        Sample,
        TopK,
        TopP,
        MinP,
        TopH,
        TypicalSampling,
        EpsilonSampling,
        EtaSampling,
        Mirostat,
        ContrastiveSearch,
        ContrastiveDecoding,
        DoLa,
        DeCo,
        FSD,
        FSDVec,
        Beam,
        DiverseBeam,
        StochasticBeam,
        MinimumBayesRisk,
    )
}
"""All strategies by name."""


def settings_of(kind: type[Strategy]) -> dict[str, Any]:
    """Settings of a strategy and their defaults."""
    fields: Any = dataclasses.fields(kind)  # type: ignore[arg-type]
    return {f.name: f.default for f in fields}


def make(name: str, settings: Mapping[str, Any] | None = None) -> Strategy:
    """A strategy by name; settings may be given as text.

    Raises:
        UnknownNameError: No such strategy or setting.
        InvalidInputError: A setting of the wrong kind.

    Example:
        >>> make("beam", {"beams": 8, "early_stopping": "never"})
        Beam(beams=8, length_penalty=1.0, early_stopping='never')
    """
    if name not in STRATEGIES:
        raise UnknownNameError("strategy", name, STRATEGIES, "see `isthmus strategies`")
    kind = STRATEGIES[name]
    known, types = settings_of(kind), typing.get_type_hints(kind)
    given = {}
    for key, value in (settings or {}).items():
        if key not in known:
            raise UnknownNameError(f"setting of {name}", key, known)
        given[key] = _read(f"{key} of {name}", value, types[key])
    return kind(**given)


def choose(
    strategy: str | Strategy, options: Mapping[str, Any], neutral: Mapping[str, Any]
) -> tuple[Strategy, dict[str, Any]]:
    """A strategy from its name and a call's options, and the options that are left for the law.

    Args:
        strategy: Its name, or one that is made already.
        options: Options of a call, its settings among them.
        neutral: Values of the law's options that change nothing; these are left out.

    Raises:
        UnknownNameError: No such strategy or setting.
        InvalidInputError: The strategy decides on something that the options decide too.
    """
    kind = STRATEGIES.get(strategy) if isinstance(strategy, str) else type(strategy)
    if kind is None:
        raise UnknownNameError("strategy", str(strategy), STRATEGIES, "see `isthmus strategies`")
    known = settings_of(kind)
    given = {k: v for k, v in options.items() if k not in neutral or v != neutral[k]}
    law = {k: v for k, v in given.items() if k in LAW and k not in known}
    settings = {k: v for k, v in given.items() if k not in law}
    clash = sorted(law.keys() - {"repetition_penalty", "processors", "reshapes"})
    if clash:
        raise InvalidInputError(
            f"{kind.name} decides on its own which tokens are drawn, and {', '.join(clash)} is no "
            f"setting of it; its settings are {', '.join(known) or 'none'}"
        )
    if isinstance(strategy, str):
        return make(strategy, settings), law
    if settings:
        raise InvalidInputError(
            f"this {kind.name} is made already; set {', '.join(sorted(settings))} there"
        )
    return strategy, law


LAW = frozenset(
    (
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
        "processors",
        "reshapes",
        "greedy",
    )
)
"""Options of :class:`isthmus.decoding.law.Law`."""


def law_options(pieces: Pieces, rest: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the law of a strategy's pieces together with what the caller asked for."""
    reshapes = (*pieces.reshapes, *rest.get("reshapes", ()))
    return {
        **pieces.options,
        **rest,
        "temperature": pieces.temperature,
        "reshapes": reshapes,
    }


def from_generation_config(config: Any) -> Strategy:
    """The strategy that the flags of a transformers generation config ask for.

    Flags that transformers has moved out of its core (``penalty_alpha``, ``dola_layers``,
    ``num_beam_groups``) are read too, where a config still carries them.

    Raises:
        InvalidInputError: Sampling and beams together, which have no counterpart here.

    Example:
        >>> from transformers import GenerationConfig
        >>> from_generation_config(GenerationConfig(num_beams=3, length_penalty=0.5))
        Beam(beams=3, length_penalty=0.5, early_stopping=False)
    """

    def flag(name: str, default: Any) -> Any:
        value = getattr(config, name, None)
        return default if value is None else value

    beams, groups = flag("num_beams", 1), flag("num_beam_groups", 1)
    if beams > 1:
        if flag("do_sample", False):
            raise InvalidInputError("beams that sample have no counterpart; use stochastic-beam")
        ranking = {
            "beams": beams,
            "length_penalty": flag("length_penalty", 1.0),
            "early_stopping": flag("early_stopping", False),
        }
        if groups > 1:
            return DiverseBeam(**ranking, groups=groups, diversity=flag("diversity_penalty", 0.0))
        return Beam(**ranking)
    if flag("dola_layers", None) is not None:
        layers = config.dola_layers
        penalty = flag("repetition_penalty", 1.0)
        chosen = layers if isinstance(layers, str) else tuple(layers)
        return DoLa(layers=chosen, repetition_penalty=penalty)
    if flag("penalty_alpha", 0.0) > 0.0 and flag("top_k", 0) > 1:
        return ContrastiveSearch(k=config.top_k, alpha=config.penalty_alpha)
    if not flag("do_sample", False):
        return Greedy()
    return Sample(
        temperature=flag("temperature", 1.0),
        top_h=flag("top_h", 1.0),
        top_k=flag("top_k", 50),  # what transformers fills in
        top_p=flag("top_p", 1.0),
        min_p=flag("min_p", 0.0),
        typical=flag("typical_p", 1.0),
        epsilon=flag("epsilon_cutoff", 0.0),
        eta=flag("eta_cutoff", 0.0),
    )


def describe(value: Any) -> str:
    """A setting as users write it."""
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _within(strategy: Strategy, name: str, low: float, high: float, *, above: bool = False) -> None:
    value = getattr(strategy, name)
    if not low <= value <= high or (above and value == low):
        raise InvalidInputError(
            f"{name} of {strategy.name} must be {'above' if above else 'at least'} {low} and at "
            f"most {high}, got {value}"
        )


def _read(what: str, value: Any, kind: Any) -> Any:
    """A value of the kind of a setting, from that kind or from text."""
    text = value.strip() if isinstance(value, str) else value
    wanted = "a value"
    try:
        if get_origin(kind) is Literal:
            wanted = "one of " + ", ".join(describe(choice) for choice in get_args(kind))
            return next(c for c in get_args(kind) if describe(c) == describe(text))
        if kind is bool:
            wanted = "true or false"
            return {"true": True, "false": False}[describe(text)]
        if kind is int:
            wanted = "a whole number"
            if isinstance(text, (bool, float)):
                raise ValueError
            return int(text)
        if kind is float:
            wanted = "a number"
            if isinstance(text, bool):
                raise ValueError
            return float(text)
        wanted = "a word, or whole numbers with commas between"
        if isinstance(text, str):
            first = text.replace(",", "").replace(" ", "")
            return tuple(int(x) for x in text.split(",")) if first.isdigit() else text
        return tuple(int(x) for x in text)
    except (ValueError, TypeError, KeyError, StopIteration):
        raise InvalidInputError(f"{what} must be {wanted}, got {value!r}") from None
