"""The loop that runs a search on a target: many hypotheses of each row, cut and copied every step.

It stands beside :mod:`isthmus.decoding.engine`: there one answer grows by several tokens a round,
here W answers grow by one token each. Speculation does not go with it: what lives on is decided
by comparing all W hypotheses after every single token.

One step::

    logits = session.score(newest token of B x W rows)     [B W, 1, V]
    law    = reshapes and processors on log-probabilities, as transformers does
    choice = search.step(law)                              parent, token [B, W]
    session.fork, law.fork                                 caches and states follow the parents
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from isthmus.decoding.law import Law
from isthmus.decoding.target import followed
from isthmus.decoding.tree import TokenTree
from isthmus.errors import InvalidInputError, UnsupportedModelError
from isthmus.roles import Context, Hypothesis, Rerank, Search, Session, Target


@torch.no_grad()
def search(
    target: Target,
    prompts: Sequence[torch.Tensor],
    search: Search,
    *,
    max_new_tokens: int,
    end_tokens: Sequence[int] = (),
    law: Law | None = None,
    generator: torch.Generator | None = None,
    inputs: dict[str, Any] | None = None,
    renormalize: bool = False,
    rerank: Rerank | None = None,
) -> list[list[Hypothesis]]:
    """Search the answers of several prompts.

    Args:
        target: The model.
        prompts: Token ids of each row, int64 [T_b] on the CPU; for encoder-decoder targets the
            decoder's start tokens.
        search: Who lives on.
        max_new_tokens: Longest answer; cut to the room that the longest prompt leaves.
        end_tokens: Tokens that end an answer.
        law: Reshapes and processors, applied to log-probabilities.
        generator: Source of every draw; a new one with seed 0 when None.
        inputs: Encoder inputs, first axis B.
        renormalize: Make log-probabilities of what the law gives, which transformers does not.
        rerank: Who chooses the answer that comes first, among those of a row.

    Returns:
        Answers of each row, best first.

    Raises:
        InvalidInputError: An empty prompt, no room, or a reshape that cannot follow hypotheses.
        UnsupportedModelError: The target holds too few rows.
        DeadEnd: The law left no token to any hypothesis of a row.
    """
    law = Law() if law is None else law
    if generator is None:
        generator = torch.Generator(getattr(target, "device", "cpu")).manual_seed(0)
    longest = max(len(p) for p in prompts)
    if min(len(p) for p in prompts) == 0:
        raise InvalidInputError("the prompt is empty; give at least one token")
    if target.max_length is not None:
        max_new_tokens = min(max_new_tokens, target.max_length - longest)
    if max_new_tokens < 1:
        raise InvalidInputError(
            f"a prompt of {longest} tokens leaves no room to answer in a context of "
            f"{target.max_length}"
        )
    count, width = len(prompts), search.width
    if target.max_batch is not None and count * width > target.max_batch:
        raise UnsupportedModelError(
            f"a search of {width} hypotheses needs a model that decodes {count * width} rows at "
            f"once, and this one holds {target.max_batch}"
        )
    session = target.session(count, **(inputs or {}))
    ids = torch.zeros(count, longest + max_new_tokens + 1, dtype=torch.int64)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    lengths = [len(p) for p in prompts]
    requests = [b * width for b in range(count)]  # of the first hypothesis of each row
    context = Context(ids, lengths, list(lengths), law, generator, requests, session=session)
    if longest > 1:
        context.features = session.prefill([p[:-1] for p in prompts], taps=law.taps)
    law.begin(context, target, **(inputs or {}))
    search.start(count, generator, end_tokens=end_tokens, max_new_tokens=max_new_tokens)
    while True:
        tree = TokenTree.root(context.roots()).to(getattr(target, "device", ids.device))
        scores = session.score(tree, taps=law.taps)
        context.features = scores.features
        logits = scores.logits
        wide = logits if logits.dtype == torch.float64 else logits.float()
        logprobs = law.logits(torch.log_softmax(wide, -1), tree, context)
        if renormalize:
            logprobs = torch.log_softmax(logprobs, -1)
        choice = search.step(logprobs.view(count, -1, logprobs.shape[-1]))
        if choice is None:
            found = search.finish()
            if rerank is not None:
                for hypotheses in found:
                    hypotheses.insert(0, hypotheses.pop(rerank.choose(hypotheses)))
            return found
        session.keep(torch.zeros_like(tree.tokens))
        before = context.batch // count
        first = torch.arange(count, device=choice.parent.device)[:, None] * before
        rows: list[int] = (choice.parent + first).flatten().tolist()
        session = _follow(context, session, rows, width)
        for row, token in enumerate(choice.token.flatten().tolist()):
            context.ids[row, context.lengths[row]] = token
        context.lengths = [n + 1 for n in context.lengths]


def _follow(context: Context, session: Session, rows: list[int], width: int) -> Session:
    """Copy rows, and the states of the law with them, after what the search took on."""
    parents = [context.requests[r] for r in rows]
    count = len(rows) // width
    requests = [b * width + w for b in range(count) for w in range(width)]
    session = followed(session, rows)
    if isinstance(context.law, Law):
        context.law.fork(parents, requests)
    context.session, context.requests = session, requests
    context.ids = context.ids[rows]
    context.lengths = [context.lengths[r] for r in rows]
    context.prompt_lengths = [context.prompt_lengths[r] for r in rows]
    return session
