"""Texts that a target writes itself: what a drafter meets when it is used."""

from __future__ import annotations

from collections.abc import Callable

import torch

from isthmus.decoding.acceptance import Lossless
from isthmus.decoding.engine import Request, decode
from isthmus.decoding.law import Law
from isthmus.decoding.policy import Fixed
from isthmus.decoding.stopping import Stopper
from isthmus.decoding.target import HubTarget


def sampled_texts(
    target: HubTarget,
    prompts: torch.Tensor,
    new_tokens: int,
    *,
    law: Law | None = None,
    seed: int = 0,
    rows: int = 256,
    report: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """Prompts, each continued by the target; end tokens do not end a text.

    Args:
        target: A decoder-only target.
        prompts: int [W, T].
        new_tokens: Tokens to write after each prompt.
        law: How they are drawn; temperature 1 and top-k 10 when None.
        seed: Seed of the draws.
        rows: Texts written at a time.
        report: Called with the number of finished texts.

    Returns:
        int32 [W, T + new_tokens].
    """
    law = law or Law(temperature=1.0, top_k=10)
    generator = torch.Generator(target.device).manual_seed(seed)
    done: list[torch.Tensor] = []
    for start in range(0, len(prompts), rows):
        some = prompts[start : start + rows].long()
        requests = [Request(p.cpu(), Stopper(max_new_tokens=new_tokens)) for p in some]
        rounds = decode(
            target, requests, policy=Fixed(), acceptance=Lossless(), law=law, generator=generator
        )
        for _ in rounds:
            pass
        written = torch.tensor([r.result.tokens for r in requests])
        done.append(torch.cat([some.cpu(), written], 1).int())
        if report is not None:
            report(sum(map(len, done)))
    return torch.cat(done)
