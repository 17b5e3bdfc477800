"""A model with its tokenizer, ready to decode: what :func:`isthmus.load` returns."""

from __future__ import annotations

import inspect
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, cast

import torch

from isthmus import registry
from isthmus.decoding.acceptance import Coupled, Lossless
from isthmus.decoding.bytevocab import ByteVocab
from isthmus.decoding.constrained import Constrained, Ending, Forced
from isthmus.decoding.constraint import Compiler, Grammar, Spec, as_spec
from isthmus.decoding.cost import Costs, cost
from isthmus.decoding.drafters import ModelDrafter, PromptLookup, Union
from isthmus.decoding.engine import Request, check_prompt, decode
from isthmus.decoding.exact import ExactTarget
from isthmus.decoding.fast import FastTarget, best_target
from isthmus.decoding.fuse import Fuse
from isthmus.decoding.generation import Generation
from isthmus.decoding.law import Law
from isthmus.decoding.policy import Auto, Fixed
from isthmus.decoding.search import search
from isthmus.decoding.stopping import Detokenizer, Stopper
from isthmus.decoding.strategies import Pieces, Strategy, choose, law_options
from isthmus.decoding.target import HubTarget
from isthmus.decoding.trained import read_config
from isthmus.errors import DeadEnd, InvalidInputError, UnknownNameError
from isthmus.roles import Acceptance, Policy, Reshape, Shape, Target

Wanted = Spec | Mapping[str, Any]
"""A constraint as callers give it; a mapping is a JSON Schema."""


@dataclass(frozen=True)
class Prompt:
    """One of many prompts, with what it does differently from the others.

    Attributes:
        prompt: Text or token ids, as for :meth:`Model.generate`.
        max_new_tokens: Its own budget.
        seed: Its own seed.
        constraint: Its own constraint.
    """

    prompt: str | torch.Tensor | Sequence[int]
    max_new_tokens: int | None = None
    seed: int | None = None
    constraint: Wanted | None = None


BUILT_IN = ("none", "auto", "prompt-lookup")

NEUTRAL = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "processors": ()}
"""Values of the sampling options that change nothing."""


def drafters() -> list[str]:
    """Names that ``drafter=`` takes."""
    return [*BUILT_IN, *registry.slugs("speculative")]


class Model:
    """A model with its tokenizer, ready to decode.

    Args:
        model: A model of transformers in eval mode, or a target made from one.
        tokenizer: Its tokenizer, or None to work with token ids.
        draft_model: A draft model with the same vocabulary, or None.
        exact: See :func:`load`.
        fast: Whether the compiled forward may be used, where the model has one.

    Attributes:
        target: The model as the engine sees it.
        tokenizer: As given.
        draft_model: As given, as a target.
        last: Result of the last finished :meth:`stream`.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        draft_model: Any = None,
        exact: bool = False,
        fast: bool = True,
    ) -> None:
        self.target = _target(model, fast)
        if exact and not isinstance(self.target, HubTarget):
            raise InvalidInputError("exact mode is for models of transformers; leave it out")
        if exact and not isinstance(self.target, FastTarget):  # which is exact as it is
            self.target = ExactTarget(self.target.model)
        self.tokenizer = tokenizer
        self.draft_model = None if draft_model is None else _target(draft_model, fast)
        self.last = Generation()
        self._policies: dict[str, Policy] = {}
        self._compilers: dict[tuple[int, ...], Compiler] = {}

    def generate(
        self,
        prompt: str | torch.Tensor | Sequence[Any],
        *,
        max_new_tokens: int = 128,
        drafter: str | Policy = "auto",
        num_draft_tokens: int | None = None,
        stop: Sequence[str] = (),
        seed: int | None = None,
        law: Law | None = None,
        acceptance: Acceptance | None = None,
        trace: bool = False,
        ignore_end: bool = False,
        inputs: dict[str, Any] | None = None,
        constraint: Wanted | None = None,
        strategy: str | Strategy | None = None,
        fuse: Any = None,
        fuse_mode: str = "auto",
        **sampling: Any,
    ) -> Any:
        """Decode one prompt or a batch.

        Args:
            prompt: Text, token ids int64 [T], or a list of either for a batch. For
                encoder-decoder models this is the source; see ``inputs``.
            max_new_tokens: Budget.
            drafter: ``"auto"``, ``"none"``, ``"prompt-lookup"``, a system's slug, the folder of a
                trained drafter, or a policy.
            num_draft_tokens: Draft nodes a round, where the drafter takes a number.
            stop: Strings that end the answer; the text is cut before them.
            seed: Seed of every random draw. With one, the text depends neither on the drafter
                nor on what the machine is busy with (:class:`~.acceptance.Coupled`), and is that
                of ``isthmus serve``; some drafters of drawn trees are the exception.
            law: A complete law, instead of ``sampling``.
            acceptance: Another acceptance rule than the exact one for what is at hand.
            trace: Keep the drafted tokens of every round.
            ignore_end: Do not stop at end tokens, for measurements.
            inputs: Encoder inputs of encoder-decoder models, as the model takes them, instead of
                ``prompt`` (for example ``input_features``); then ``prompt`` holds the decoder's
                start tokens and may be empty. For models that read images, what stands for the
                image placeholders of the prompt (``pixel_values``).
            constraint: What every answer has to be: a JSON Schema, or what one of the functions of
                :mod:`isthmus.decoding.constraint` returns.
            strategy: A decoding strategy, by name (see :mod:`isthmus.decoding.strategies`) or
                made already; its settings are then given like ``sampling``.
            fuse: Models that speak along: one from :func:`load`, a pair of it and its weight, or a
                list of those; see :mod:`isthmus.decoding.fuse`.
            fuse_mode: How; ``"auto"`` goes by their vocabularies.
            sampling: ``temperature``, ``top_k``, ``top_p``, ``min_p``, ``repetition_penalty``,
                ``processors``; see :class:`isthmus.decoding.law.Law`.

        Returns:
            A :class:`~isthmus.decoding.generation.Generation`, or a list of them for a batch.

        Raises:
            IsthmusError: Bad input; the message says what to do.
        """
        many = isinstance(prompt, (list, tuple)) and not _is_ids(prompt)
        fusion, sampling = self._fused(fuse, fuse_mode, law, sampling)
        if fusion is not None:
            _no(
                "a fusion of bytes",
                drafter=drafter not in ("auto", "none"),
                num_draft_tokens=num_draft_tokens,
                stop=stop,
                law=law,
                acceptance=acceptance,
                ignore_end=ignore_end,
                inputs=inputs,
                constraint=constraint,
                strategy=strategy,
            )
            _no("a fusion of bytes", **_changed(sampling))
            answers = [
                fusion.write(
                    self,
                    p,
                    max_new_tokens=max_new_tokens,
                    temperature=float(sampling.get("temperature", 0.0)),
                    generator=self._generator(seed),
                )
                for p in (prompt if many else [prompt])
            ]
            return answers if many else answers[0]
        if strategy is not None:
            pieces, sampling = self._strategy(strategy, drafter, law, sampling)
            if pieces.search is not None:
                _no("a search", stop=stop, acceptance=acceptance, num_draft_tokens=num_draft_tokens)
                searched = Law(**sampling)
                if constraint is not None:
                    grammar = self.compile(constraint, ignore_end=ignore_end)
                    searched = constrained_law(Constrained(grammar), sampling)
                found = self._search(
                    list(prompt) if many else [prompt],
                    pieces,
                    max_new_tokens=max_new_tokens,
                    seed=seed,
                    ignore_end=ignore_end,
                    inputs=inputs,
                    law=searched,
                )
                return found if many else found[0]
        strategy_type = own_loop(drafter)
        if strategy_type is not None:
            asked = {
                "stop": stop,
                "law": law,
                "acceptance": acceptance,
                "inputs": inputs,
                "num_draft_tokens": num_draft_tokens,
                "constraint": constraint,
            }
            given = [*(name for name, value in asked.items() if value), *_changed(sampling)]
            if given:
                raise InvalidInputError(
                    f"{drafter} has its own decoding loop and takes no {', '.join(given)}"
                )
            strategy = (
                strategy_type.for_folder(self, drafter)
                if Path(str(drafter)).is_dir()
                else strategy_type.for_model(self)
            )
            answers = [
                self._follow(
                    strategy,
                    p,
                    name=str(drafter),
                    max_new_tokens=max_new_tokens,
                    temperature=float(sampling.get("temperature", 0.0)),
                    seed=seed,
                )
                for p in (prompt if many else [prompt])
            ]
            return answers if many else answers[0]
        job = self._job(
            list(prompt) if many else [prompt],
            max_new_tokens=max_new_tokens,
            drafter=drafter,
            num_draft_tokens=num_draft_tokens,
            stop=stop,
            seed=seed,
            law=law,
            acceptance=acceptance,
            trace=trace,
            ignore_end=ignore_end,
            inputs=inputs,
            constraint=constraint,
            **sampling,
        )
        try:
            with closing(job.rounds) as rounds:
                for _ in rounds:
                    pass
        except KeyboardInterrupt:
            for request in job.requests:
                request.result.finish_reason = request.result.finish_reason or "interrupted"
                self._finish(request)
            error = KeyboardInterrupt()
            error.partial = [r.result for r in job.requests]  # type: ignore[attr-defined]
            raise error from None
        for request in job.requests:
            self._finish(request)
        results = [r.result for r in job.requests]
        return results if many else results[0]

    def generate_many(
        self,
        prompts: Iterable[str | torch.Tensor | Sequence[int] | Prompt],
        *,
        batch_size: int = 16,
        max_new_tokens: int = 128,
        drafter: str | Policy = "auto",
        num_draft_tokens: int | None = None,
        stop: Sequence[str] = (),
        seed: int | None = None,
        ignore_end: bool = False,
        constraint: Wanted | None = None,
        strategy: str | Strategy | None = None,
        fuse: Any = None,
        fuse_mode: str = "auto",
        **sampling: Any,
    ) -> Iterator[tuple[int, Generation]]:
        """Decode any number of prompts with continuous batching: a place is never left empty.

        Sampled answers come from noise that is keyed on the prompt's seed and the position
        (:class:`~isthmus.decoding.acceptance.Coupled`), so an answer depends neither on the
        drafter nor on who shares the batch, with two exceptions: forwards of unlike shapes round
        differently, which can turn a near tie, and drafters that bring their own acceptance rule
        draw from one generator for all.

        Args:
            prompts: Prompts, read only as places become free.
            batch_size: Rows at work at most.
            max_new_tokens: Budget of prompts without one of their own.
            drafter: As for :meth:`generate`.
            num_draft_tokens: As for :meth:`generate`.
            stop: Strings that end an answer.
            seed: Seed of the prompts without one of their own; each has its own noise.
            ignore_end: Do not stop at end tokens, for measurements.
            constraint: Constraint of prompts without one of their own.
            strategy: As for :meth:`generate`.
            fuse: As for :meth:`generate`.
            fuse_mode: As for :meth:`generate`.
            sampling: As for :meth:`generate`.

        Yields:
            Number of a prompt and its answer, as soon as it is finished. A prompt that cannot be
            answered does not hold up the others: its ``finish_reason`` is ``"error"`` and its note
            says why.

        Raises:
            IsthmusError: Bad options; the message says what to do.
        """
        if batch_size < 1:
            raise InvalidInputError(f"batch_size must be at least 1, got {batch_size}")
        asked = (p if isinstance(p, Prompt) else Prompt(p) for p in prompts)
        name = drafter if isinstance(drafter, str) else "custom"
        fusion, sampling = self._fused(fuse, fuse_mode, None, sampling)
        searches = False
        if strategy is not None and fusion is None:
            pieces, options = self._strategy(strategy, drafter, None, sampling)
            searches = pieces.search is not None
            if not searches:
                sampling, strategy = options, None
        if fusion is not None or searches or own_loop(drafter) is not None:
            for number, one in enumerate(asked):
                yield (
                    number,
                    self.generate(
                        one.prompt,
                        max_new_tokens=one.max_new_tokens or max_new_tokens,
                        drafter=drafter,
                        num_draft_tokens=num_draft_tokens,
                        stop=stop,
                        seed=seed if one.seed is None else one.seed,
                        constraint=one.constraint or constraint,
                        strategy=strategy,
                        fuse=fusion,
                        ignore_end=ignore_end,
                        **sampling,
                    ),
                )
            return
        policy = self.policy(drafter, num_draft_tokens)
        rule = rule_of(policy)
        shared = None if constraint is None else self.compile(constraint, ignore_end=ignore_end)
        grammars: dict[int, Grammar | None] = {}
        reshape = Constrained(shared, grammars)
        law, policy = constrained_law(reshape, sampling), Forced(policy, reshape)
        generator = self._generator(seed)
        seeds: dict[int, int] = {}
        noise = Coupled(generator.initial_seed(), seeds)
        numbers: dict[int, tuple[int, Request]] = {}
        refused: list[tuple[int, Generation]] = []
        place = count()
        self._request(torch.tensor([0]), max_new_tokens, name, stop, ignore_end)  # bad options

        def line() -> Iterator[Request]:
            for number, one in enumerate(asked):
                budget = max_new_tokens if one.max_new_tokens is None else one.max_new_tokens
                try:
                    (start,), inputs = self._sources([one.prompt], None)
                    grammar = shared
                    if one.constraint is not None:
                        grammar = self.compile(one.constraint, ignore_end=ignore_end)
                    request = self._request(start, budget, name, stop, ignore_end, grammar)
                    check_prompt(request, self.target.max_length)
                except InvalidInputError as error:
                    result = Generation(finish_reason="error", drafter=name, notes=[str(error)])
                    refused.append((number, result))
                    continue
                request.inputs = inputs or {}
                index = next(place)
                if one.seed is not None:
                    seeds[index] = one.seed
                numbers[index], grammars[index] = (number, request), grammar
                yield request

        for emitted in decode(
            self.target,
            line(),
            policy=policy,
            acceptance=rule or (Lossless() if law.greedy else noise),
            law=law,
            generator=generator,
            batch_size=batch_size,
        ):
            for index, _ in emitted:
                if numbers[index][1].result.finish_reason:
                    number, request = numbers.pop(index)
                    seeds.pop(index, None)
                    grammars.pop(index)
                    try:
                        self._finish(request)
                    except DeadEnd as error:
                        request.result.finish_reason = "error"
                        request.result.notes.append(str(error))
                    yield number, request.result
            yield from pop_all(refused)
        yield from pop_all(refused)

    def stream(
        self, prompt: str | torch.Tensor, **options: Any
    ) -> Generator[str, None, Generation]:
        """Decode one prompt and yield text as it is accepted.

        Args:
            prompt: Text or token ids int64 [T].
            options: As for :meth:`generate`.

        Yields:
            New text, never taken back. The generator's return value is the
            :class:`~isthmus.decoding.generation.Generation`.
        """
        known = inspect.signature(self._job).parameters
        own = {"strategy", "fuse", "fuse_mode"}
        given = {k: v for k, v in options.items() if k not in known and k not in own}
        fusion, given = self._fused(
            options.pop("fuse", None), options.pop("fuse_mode", "auto"), options.get("law"), given
        )
        options |= given
        whole = fusion is not None or own_loop(options.get("drafter", "auto")) is not None
        if fusion is not None:
            options["fuse"] = fusion
        strategy = options.get("strategy")
        if strategy is not None and not whole:
            pieces, sampling = self._strategy(
                strategy, options.get("drafter", "auto"), options.get("law"), given
            )
            whole = pieces.search is not None
            if not whole:
                options = {**{k: v for k, v in options.items() if k in known}, **sampling}
        if whole:
            self.last = self.generate(prompt, **options)
            yield self.last.text
            return self.last
        job = self._job([prompt], **options)
        result = job.requests[0].result
        stopper = job.requests[0].stopper
        if self.tokenizer is None:
            raise InvalidInputError("streaming text needs a tokenizer; use generate for token ids")
        detokenizer = Detokenizer(self.tokenizer)
        shown = 0
        hold = max((len(s) for s in stopper.stop), default=1) - 1
        try:
            with closing(job.rounds) as rounds:
                for emitted in rounds:
                    for _, tokens in emitted:
                        detokenizer.push(tokens, last=bool(result.finish_reason))
                    if result.finish_reason:
                        break
                    ready = max(shown, len(detokenizer.text) - hold)
                    if ready > shown:
                        yield detokenizer.text[shown:ready]
                        shown = ready
        finally:
            result.finish_reason = result.finish_reason or "interrupted"
            self._finish(job.requests[0])
            self.last = result
        if len(result.text) > shown:
            yield result.text[shown:]
        return result  # a generator's return value is the natural place for it

    def policy(self, name: str | Policy, num_draft_tokens: int | None = None) -> Policy:
        """The policy behind a drafter's name; ``auto`` keeps what it learned between calls.

        Raises:
            UnknownNameError: No such drafter.
            InvalidInputError: The drafter needs a draft model and there is none.
        """
        if not isinstance(name, str):
            return name
        if num_draft_tokens is not None and num_draft_tokens < 0:
            raise InvalidInputError(f"num_draft_tokens must be 0 or more, got {num_draft_tokens}")
        n = num_draft_tokens
        if name == "none":
            return Fixed()
        if name == "prompt-lookup":
            return Fixed(PromptLookup(), Shape(10 if n is None else n, 10 if n is None else n, 1))
        if name == "auto":
            if name not in self._policies:
                self._policies[name] = self._auto()
            return self._policies[name]
        system: Any
        if Path(name).is_dir():
            system = registry.load(read_config(name)["system"])
            # some need more of the model than its target
            part = (
                system.for_folder(self, name)
                if hasattr(system, "for_folder")
                else system.from_pretrained(name, self.target)
            )
        elif name in drafters():
            system = registry.load(name)
            part = self._build(system, name)
        else:
            hint = "or the folder of a drafter made by isthmus train"
            raise UnknownNameError("drafter", name, drafters(), hint)
        if system.role == "policy":
            policy: Policy = part
            return policy
        drafter, shape = part, part.default_shape
        if n is not None:
            shape = Shape(n, min(n, max(shape.depth, n if shape.width == 1 else 0)), shape.width)
        return Fixed(drafter, shape)

    def _build(self, system: Any, name: str) -> Any:
        if getattr(system, "role", "") not in ("drafter", "policy"):
            raise InvalidInputError(f"{name} is a system but no drafter; see `isthmus systems`")
        if hasattr(system, "for_model"):
            return system.for_model(self)
        if issubclass(system, ModelDrafter):
            if self.draft_model is None:
                raise InvalidInputError(
                    f"{name} needs a draft model; give one with --draft-model (the embedded model "
                    "has 'pycode-s')"
                )
            return system(self.draft_model)
        return system()

    def _follow(self, strategy: Any, prompt: Any, *, name: str, **options: Any) -> Generation:
        result: Generation = strategy.generate(self.encode(prompt), **options)
        result.drafter = name
        if self.tokenizer is not None and not result.text:
            result.text = self.tokenizer.decode(result.tokens, skip_special_tokens=True)
        return result

    def _auto(self) -> Policy:
        if self.target.reach == "step":
            return Fixed()
        recycling = registry.load("token-recycling")
        module = registry.load_module(registry.find("token-recycling"))
        lookup, recycle = PromptLookup(), recycling(module.Settings(keep=True))
        candidates: list[Any] = [lookup, recycle]
        if self.target.reach == "tree":
            # an n-gram of two or more that came before is surer than the table's best guess
            candidates.append(Union([PromptLookup(min_ngram=2), recycle]))
        if self.draft_model is not None:
            candidates.append(registry.load("speculative-sampling")(self.draft_model))
        return Auto(candidates, Costs(cost(self.target), partial(cost, self.target)))

    def encode(self, prompt: str | torch.Tensor | Sequence[int]) -> torch.Tensor:
        """Token ids int64 [T] of a prompt, as the tokenizer would feed its model.

        Raises:
            InvalidInputError: Empty text, or text without a tokenizer.
        """
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise InvalidInputError(
                    "this checkpoint has no tokenizer; give token ids instead of text"
                )
            if not prompt:
                raise InvalidInputError("the prompt is empty; give some text to continue")
            ids: torch.Tensor = self.tokenizer(prompt, return_tensors="pt").input_ids[0]
        else:
            ids = torch.as_tensor(prompt, dtype=torch.int64).flatten()
        if len(ids) == 0:
            raise InvalidInputError("the prompt is empty; give at least one token")
        if int(ids.max()) >= self.target.vocab_size or int(ids.min()) < 0:
            raise InvalidInputError(
                f"the prompt holds token ids outside the vocabulary of {self.target.vocab_size}"
            )
        return ids.cpu()

    def _fused(
        self, fuse: Any, mode: str, law: Law | None, sampling: dict[str, Any]
    ) -> tuple[Fuse | None, dict[str, Any]]:
        """A fusion that has a loop of its own, or the options of the law with the fusion in it."""
        if fuse is None:
            return None, sampling
        fusion = Fuse.of(fuse, mode)
        reshapes = fusion.reshapes(self)
        if not reshapes:
            return fusion, sampling
        if law is not None:
            raise InvalidInputError(
                "a fusion and a complete law do not go together; give the law the reshapes of "
                "isthmus.decoding.fusion"
            )
        return None, {**sampling, "reshapes": (*sampling.get("reshapes", ()), *reshapes)}

    def _strategy(
        self,
        strategy: str | Strategy,
        drafter: str | Policy,
        law: Law | None,
        sampling: dict[str, Any],
    ) -> tuple[Pieces, dict[str, Any]]:
        """Parts of a strategy, and the options of their law."""
        if law is not None:
            raise InvalidInputError("give a strategy or a complete law, not both")
        chosen, rest = choose(strategy, sampling, {**NEUTRAL, "temperature": 0.0})
        if chosen.alone and drafter not in ("auto", "none"):
            raise InvalidInputError(
                f"{chosen.name} takes no drafts: {chosen.alone}; leave the drafter out"
            )
        pieces = chosen.pieces(self)
        return pieces, law_options(pieces, rest)

    def _search(
        self,
        prompts: list[Any],
        pieces: Pieces,
        *,
        max_new_tokens: int,
        seed: int | None,
        ignore_end: bool,
        inputs: dict[str, Any] | None,
        law: Law,
    ) -> list[Generation]:
        """Best hypothesis of each prompt, the others beside it."""
        starts, inputs = self._sources(prompts, inputs)
        requests = [self._request(s, max_new_tokens, "none", (), ignore_end) for s in starts]
        for request in requests:
            check_prompt(request, self.target.max_length)
        assert pieces.search is not None
        clock = time.perf_counter()
        found = search(
            self.target,
            starts,
            pieces.search,
            max_new_tokens=min(r.stopper.max_new_tokens for r in requests),
            end_tokens=sorted(requests[0].stopper.end_tokens),
            law=law,
            generator=self._generator(seed),
            inputs=inputs,
            renormalize=pieces.renormalize,
            rerank=pieces.rerank,
        )
        for request, hypotheses in zip(requests, found, strict=True):
            result, best = request.result, hypotheses[0]
            result.prompt_tokens = len(request.prompt)
            result.tokens, result.hypotheses = list(best.tokens), hypotheses
            ended = best.tokens[-1] in request.stopper.end_tokens
            result.finish_reason = "stop" if ended else "length"
            result.stats.new_tokens = len(best.tokens)
            result.stats.target_forwards = max(len(h.tokens) for h in hypotheses)
            result.stats.seconds = time.perf_counter() - clock
            self._finish(request)
        return [request.result for request in requests]

    def _job(
        self,
        prompts: list[Any],
        *,
        max_new_tokens: int = 128,
        drafter: str | Policy = "auto",
        num_draft_tokens: int | None = None,
        stop: Sequence[str] = (),
        seed: int | None = None,
        law: Law | None = None,
        acceptance: Acceptance | None = None,
        trace: bool = False,
        ignore_end: bool = False,
        inputs: dict[str, Any] | None = None,
        constraint: Wanted | None = None,
        **sampling: Any,
    ) -> _Job:
        policy = self.policy(drafter, num_draft_tokens)
        rule = acceptance or rule_of(policy) or Lossless(seed)
        grammar = None
        if constraint is not None:
            if law is not None:
                raise InvalidInputError(
                    "a constraint and a complete law do not go together; give the law a "
                    "Constrained reshape, or sampling options"
                )
            grammar = self.compile(constraint, ignore_end=ignore_end)
            reshape = Constrained(grammar)
            law, policy = constrained_law(reshape, sampling), Forced(policy, reshape)
        law = law or Law(**sampling)
        starts, inputs = self._sources(prompts, inputs)
        name = drafter if isinstance(drafter, str) else "custom"
        requests = [
            self._request(start, max_new_tokens, name, stop, ignore_end, grammar)
            for start in starts
        ]
        rounds = decode(
            self.target,
            requests,
            policy=policy,
            acceptance=rule,
            law=law,
            generator=self._generator(seed),
            inputs=inputs,
            trace=trace,
        )
        return _Job(requests, rounds)

    def _request(
        self,
        start: torch.Tensor,
        budget: int,
        drafter: str,
        stop: Sequence[str],
        ignore_end: bool,
        grammar: Grammar | None = None,
    ) -> Request:
        if budget < 1:
            raise InvalidInputError(f"max_new_tokens must be at least 1, got {budget}")
        stopper = Stopper(
            max_new_tokens=budget,
            end_tokens=self._ends(ignore_end),
            stop=[stop] if isinstance(stop, str) else stop,
            criteria=None if grammar is None else Ending(grammar),
            tokenizer=self.tokenizer,
        )
        result = Generation(drafter=drafter)
        if self.target.reach == "step" and drafter != "none":
            name = type(self.target.model).__name__
            result.notes.append(f"{name} is exact one token at a time only; nothing is drafted")
        return Request(start, stopper, result)

    def _ends(self, ignore_end: bool) -> tuple[int, ...]:
        return () if ignore_end else self.target.end_tokens

    def compile(self, constraint: Wanted, *, ignore_end: bool = False) -> Grammar:
        """A constraint for this model's vocabulary, compiled now or before.

        Args:
            constraint: A JSON Schema, or what one of the functions of
                :mod:`isthmus.decoding.constraint` returns.
            ignore_end: As for :meth:`generate`; the answer ends with the constraint all the same.

        Raises:
            UnsupportedConstraint: It cannot be held; the message has the reason.
            InvalidInputError: There is no tokenizer.
            MissingExtraError: llguidance is not installed.
        """
        if self.tokenizer is None:
            raise InvalidInputError("a constraint needs a tokenizer; this model has none")
        ends = self._ends(ignore_end)
        if ends not in self._compilers:
            self._compilers[ends] = Compiler(
                ByteVocab(self.tokenizer), self.target.vocab_size, ends
            )
        return self._compilers[ends].compile(as_spec(constraint))

    def _generator(self, seed: int | None) -> torch.Generator:
        generator = torch.Generator(self.target.device)
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        return generator

    def _sources(
        self, prompts: list[Any], inputs: dict[str, Any] | None
    ) -> tuple[list[torch.Tensor], dict[str, Any] | None]:
        """Decoder start tokens and encoder inputs of each prompt."""
        if not self.target.encoder_decoder:
            if inputs and not getattr(self.target, "takes_images", False):
                raise InvalidInputError("only encoder-decoder models take encoder inputs")
            return [self.encode(p) for p in prompts], inputs
        if self.target.start_token is None:
            raise InvalidInputError(
                "this encoder-decoder model has no decoder_start_token_id in its generation "
                "config; set it before loading"
            )
        start = torch.tensor([self.target.start_token])
        if inputs is not None:
            rows = next(v.shape[0] for v in inputs.values() if torch.is_tensor(v))
            given = [p for p in prompts if not (isinstance(p, str) and not p) and p is not None]
            starts = [self.encode(p) for p in given] if given else [start] * rows
            return starts, {
                k: v.to(self.target.device) if torch.is_tensor(v) else v for k, v in inputs.items()
            }
        sources = [self.encode(p) for p in prompts]
        width = max(len(s) for s in sources)
        pad = self.target.model.config.pad_token_id or 0
        padded = [torch.nn.functional.pad(s, (0, width - len(s)), value=pad) for s in sources]
        mask = torch.stack([torch.arange(width) < len(s) for s in sources]).long()
        return [start] * len(sources), {
            "input_ids": torch.stack(padded).to(self.target.device),
            "attention_mask": mask.to(self.target.device),
        }

    def _finish(self, request: Request) -> None:
        result = request.result
        if request.stopper.text is not None:
            result.text = request.stopper.text
        elif self.tokenizer is not None:
            result.text = self.tokenizer.decode(result.tokens, skip_special_tokens=True)
        if isinstance(request.stopper.criteria, Ending):
            request.stopper.criteria.close(result)


def constrained_law(reshape: Constrained, sampling: dict[str, Any]) -> Law:
    """The law of some sampling options under a constraint."""
    others: tuple[Reshape, ...] = tuple(sampling.get("reshapes", ()))
    return Law(**{**sampling, "reshapes": (*others, reshape)})


def _changed(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """Sampling options that change something, besides the temperature."""
    left = {k: v for k, v in sampling.items() if k != "temperature"}
    return {k: v for k, v in left.items() if v != NEUTRAL.get(k)}


def _no(who: str, **options: Any) -> None:
    """Refuse options that do not go with something."""
    given = [name for name, value in options.items() if value]
    if given:
        raise InvalidInputError(f"{who} takes no {', '.join(given)}")


def pop_all(items: list[Any]) -> Iterator[Any]:
    """Empty a list from its front."""
    while items:
        yield items.pop(0)


class _Job:
    def __init__(self, requests: list[Request], rounds: Generator[Any]) -> None:
        self.requests, self.rounds = requests, rounds


def _target(model: Any, fast: bool) -> HubTarget:
    if isinstance(model, Target):  # what the engine asks of one; its other users want a HubTarget
        return cast(HubTarget, model)
    return best_target(model) if fast else HubTarget(model)


def _is_ids(prompt: Sequence[Any]) -> bool:
    return len(prompt) == 0 or isinstance(prompt[0], int)


def own_loop(drafter: str | Policy) -> Any:
    """The system of that name or folder, if it has a decoding loop of its own."""
    if not isinstance(drafter, str) or drafter in BUILT_IN:  # reading folders takes milliseconds
        return None
    slug = read_config(drafter)["system"] if Path(drafter).is_dir() else drafter
    if slug not in registry.slugs("speculative"):
        return None
    system = registry.load(slug)
    return system if getattr(system, "role", "") == "strategy" else None


def rule_of(policy: Any) -> Acceptance | None:
    """The acceptance rule that a policy or its drafter brings along, or None."""
    rules = (getattr(p, "acceptance", None) for p in (policy, getattr(policy, "drafter", None)))
    return next((rule for rule in rules if rule is not None), None)


def as_list(ends: Any) -> list[int]:
    """Token ids of a config field that holds one, several or none."""
    if ends is None:
        return []
    return [int(e) for e in ends] if isinstance(ends, (list, tuple)) else [int(ends)]
