"""A drafter as a callable for transformers' ``generate(custom_generate=...)``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.generation.logits_process import (
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

from isthmus.decoding.acceptance import Lossless
from isthmus.decoding.engine import Request, decode
from isthmus.decoding.law import ROW_WISE, Law
from isthmus.decoding.model import Model, as_list, drafters
from isthmus.decoding.search import search
from isthmus.decoding.stopping import Stopper
from isthmus.decoding.strategies import Strategy, choose, law_options
from isthmus.errors import InvalidInputError, UnknownNameError


def custom_generate(
    name: str = "auto",
    *,
    draft_model: Any = None,
    strategy: str | Strategy | None = None,
    **settings: Any,
) -> Callable[..., torch.Tensor]:
    """A drafter, or a strategy, as a callable for transformers' ``generate(custom_generate=...)``.

    Example::

        model.generate(**inputs, max_new_tokens=64, custom_generate=isthmus.custom_generate("auto"))

    Logits processors, warpers, stopping criteria and the generation config are the ones that
    transformers prepared, so the output is what ``generate`` would have given without it.

    Args:
        name: A drafter's name; see :func:`drafters`.
        draft_model: A draft model of transformers with the same vocabulary, or None.
        strategy: A decoding strategy, by name or made already; it decides how tokens are chosen,
            behind the processors that transformers prepared.
        settings: Settings of the strategy.

    Returns:
        A function that transformers calls; it returns int64 [B, T] sequences.

    Raises:
        UnknownNameError: No such drafter, strategy or setting.
        InvalidInputError: Settings that the strategy does not take, or a drafter where nothing can
            be drafted.
    """
    chosen = None
    if strategy is not None or settings:
        chosen, _ = choose(strategy or "greedy", settings, {})
        if chosen.alone and name not in ("auto", "none"):
            raise InvalidInputError(f"{chosen.name} takes no drafts: {chosen.alone}; use 'none'")
    if name not in drafters():
        raise UnknownNameError("drafter", name, drafters())
    made: dict[int, Model] = {}  # one facade for each model, so that `auto` keeps what it learned

    def run(
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: Any = (),
        stopping_criteria: Any = (),
        generation_config: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        if id(model) not in made:
            made[id(model)] = Model(model, draft_model=draft_model)
        return _transformers_generate(
            made[id(model)],
            name,
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            kwargs,
            chosen,
        )

    return run


def _transformers_generate(
    facade: Model,
    name: str,
    input_ids: torch.Tensor,
    processors: Any,
    criteria: Any,
    config: Any,
    kwargs: dict[str, Any],
    strategy: Strategy | None = None,
) -> torch.Tensor:
    """Run the engine on what transformers' ``generate`` prepared; returns int64 [B, T]."""
    if config.num_beams > 1:
        raise InvalidInputError(
            "num_beams is transformers' own search; set num_beams=1 and give custom_generate "
            'strategy="beam"'
        )
    if config.return_dict_in_generate:
        raise InvalidInputError(
            "custom_generate returns sequences; set return_dict_in_generate=False"
        )
    batch, width = input_ids.shape
    mask = None if facade.target.encoder_decoder else kwargs.get("attention_mask")
    rows = [input_ids[b] if mask is None else input_ids[b][mask[b].bool()] for b in range(batch)]
    inputs = None
    if facade.target.encoder_decoder:
        names = ("encoder_outputs", "attention_mask")
        inputs = {k: kwargs[k] for k in names if kwargs.get(k) is not None}
    others = [
        c for c in criteria if type(c).__name__ not in ("MaxLengthCriteria", "EosTokenCriteria")
    ]
    device = input_ids.device

    def criterion(row: torch.Tensor) -> Callable[[list[int]], bool] | None:
        if not others:
            return None

        def met(new: list[int]) -> bool:
            ids = torch.cat([row, torch.tensor(new, device=device)])[None]
            return any(bool(torch.as_tensor(c(ids, None)).any()) for c in others)

        return met

    requests = [
        Request(
            row.cpu(),
            Stopper(
                max_new_tokens=config.max_length - width,
                end_tokens=as_list(config.eos_token_id),
                criteria=criterion(row),
            ),
        )
        for row in rows
    ]
    # the seed comes from torch's global state, as every draw of `generate` does
    generator = torch.Generator(device).manual_seed(int(torch.randint(2**62, (1,))))
    streamer = kwargs.get("streamer")
    prepared = _unpadded(processors, padded=any(len(r) < width for r in rows))
    pieces, law = None, Law(processors=prepared, greedy=not config.do_sample)
    if strategy is not None:
        pieces = strategy.pieces(facade)
        law = Law(**law_options(pieces, {"processors": prepared}))
    if pieces is not None and pieces.search is not None:
        if others:
            raise InvalidInputError("a search takes no stopping criteria but length and end tokens")
        new = [
            list(answers[0].tokens)
            for answers in search(
                facade.target,
                [row.cpu() for row in rows],
                pieces.search,
                max_new_tokens=config.max_length - width,
                end_tokens=as_list(config.eos_token_id),
                law=law,
                generator=generator,
                inputs=inputs,
                renormalize=pieces.renormalize,
                rerank=pieces.rerank,
            )
        ]
        return _padded(input_ids, new, config)
    for emitted in decode(
        facade.target,
        requests,
        policy=facade.policy(name),
        acceptance=Lossless(),
        law=law,
        generator=generator,
        inputs=inputs,
    ):
        if streamer is not None:
            for _, tokens in emitted:
                streamer.put(torch.tensor(tokens))
    if streamer is not None:
        streamer.end()
    return _padded(input_ids, [r.result.tokens for r in requests], config)


def _padded(input_ids: torch.Tensor, new: list[list[int]], config: Any) -> torch.Tensor:
    """Prompts and answers as transformers returns them, int64 [B, T]."""
    pad = config.pad_token_id
    pad = as_list(config.eos_token_id)[0] if pad is None and config.eos_token_id else pad or 0
    longest = max(len(tokens) for tokens in new)
    rows = [tokens + [pad] * (longest - len(tokens)) for tokens in new]
    return torch.cat([input_ids, torch.tensor(rows, device=input_ids.device)], 1)


def _unpadded(processors: Any, *, padded: bool) -> list[Any]:
    """Processors prepared for left-padded rows, for rows whose padding is gone.

    Raises:
        InvalidInputError: A processor counts positions of a padded batch.
    """
    out = []
    for processor in processors:
        if isinstance(processor, RepetitionPenaltyLogitsProcessor):
            processor = RepetitionPenaltyLogitsProcessor(processor.penalty)
        elif padded and not isinstance(processor, (*ROW_WISE, NoRepeatNGramLogitsProcessor)):
            raise InvalidInputError(
                f"{type(processor).__name__} may count the padding of this batch; decode one "
                "prompt at a time, or prompts of equal length"
            )
        out.append(processor)
    return out
