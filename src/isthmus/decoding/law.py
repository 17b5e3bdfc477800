"""The law: from raw logits at a node to the distribution that a token is drawn from.

It is composed as transformers composes it: first the processors that read the prefix (repetition
penalty, forced and suppressed tokens, ...), then, when sampling, the warpers (temperature, top-k,
top-p, min-p, ...). The processors are transformers' own; this file only applies them to a tree,
where every node must see *its own path*. Reshapes (:class:`isthmus.roles.Reshape`) stand between
them by their stage. A decoder is lossless with respect to this processed law.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers.generation import logits_process as lp

from isthmus.decoding.tree import TokenTree, chain_topology
from isthmus.errors import InvalidInputError
from isthmus.roles import Context, Forkable, Reshape, Taps, Target

ROW_WISE = (
    lp.TemperatureLogitsWarper,
    lp.TopKLogitsWarper,
    lp.TopPLogitsWarper,
    lp.MinPLogitsWarper,
    lp.TypicalLogitsWarper,
    lp.EpsilonLogitsWarper,
    lp.EtaLogitsWarper,
    lp.SuppressTokensLogitsProcessor,
    lp.InfNanRemoveLogitsProcessor,
    lp.LogitNormalization,
)
"""Processors that look at the scores only, so all nodes go through in one call."""

STATEFUL = ("SynthIDTextWatermarkLogitsProcessor", "UnbatchedClassifierFreeGuidanceLogitsProcessor")
"""Processors of transformers that keep state between calls and cannot look at a tree."""


class Law:
    """Logits processing and sampling parameters of one request.

    Args:
        temperature: 0 is greedy decoding.
        top_k: Keep the k most likely tokens; 0 keeps all.
        top_p: Keep the smallest set of tokens with this much probability.
        min_p: Drop tokens below this share of the most likely one.
        repetition_penalty: 1 is none.
        processors: Any logits processors of transformers, called as ``p(ids [R, T], scores [R,
            V])``; applied before the warpers above.
        reshapes: Parts of a strategy: those that combine go first, those that mask stand before
            the warpers, those that truncate behind them.
        greedy: Overrides ``temperature == 0``; used when warpers come inside ``processors``.

    Raises:
        InvalidInputError: A value is out of range, or a processor keeps state between calls.

    Example:
        >>> import torch
        >>> law = Law(temperature=1.0, top_k=2)
        >>> law.row(torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[0]])).tolist()
        [[-inf, 1.0, 2.0]]
    """

    def __init__(
        self,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        processors: Sequence[Any] = (),
        reshapes: Sequence[Reshape] = (),
        greedy: bool | None = None,
    ) -> None:
        for name, value, low, high in (
            ("temperature", temperature, 0.0, 100.0),
            ("top_k", top_k, 0, 10**9),
            ("top_p", top_p, 0.0, 1.0),
            ("min_p", min_p, 0.0, 1.0),
            ("repetition_penalty", repetition_penalty, 1e-3, 100.0),
        ):
            if not low <= value <= high or (name == "top_p" and value == 0.0):
                raise InvalidInputError(f"{name} must be within {low} and {high}, got {value}")
        self.greedy = temperature == 0.0 if greedy is None else greedy
        self.reshapes = tuple(reshapes)
        self.taps = Taps()
        for reshape in self.reshapes:
            self.taps |= reshape.taps
        chain: list[Any] = self._at("combine")
        if repetition_penalty != 1.0:
            chain.append(lp.RepetitionPenaltyLogitsProcessor(penalty=repetition_penalty))
        chain += [*processors, *self._at("mask")]
        if not self.greedy:
            if temperature not in (0.0, 1.0):
                chain.append(lp.TemperatureLogitsWarper(temperature))
            if top_k:
                chain.append(lp.TopKLogitsWarper(top_k))
            if top_p < 1.0:
                chain.append(StableTopP(top_p))
            if min_p > 0.0:
                chain.append(lp.MinPLogitsWarper(min_p))
        chain += self._at("truncate")
        for processor in chain:
            if type(processor).__name__ in STATEFUL:
                raise InvalidInputError(
                    f"{type(processor).__name__} keeps state between calls, so it cannot look at "
                    "several draft tokens at once; decode with transformers instead"
                )
        self.processors = chain
        self._drafting: Law | None = None

    def _at(self, stage: str) -> list[Any]:
        return [reshape for reshape in self.reshapes if reshape.stage == stage]

    def begin(self, context: Context, target: Target, **inputs: Any) -> None:
        """Start the reshapes on new rows."""
        for reshape in self.reshapes:
            reshape.begin(context, target, **inputs)

    def forget(self, requests: Sequence[int]) -> None:
        """Let the reshapes forget requests that have left."""
        for reshape in self.reshapes:
            reshape.forget(requests)

    def fork(self, parents: Sequence[int], requests: Sequence[int]) -> None:
        """Let the reshapes follow hypotheses that are copied; see :class:`isthmus.roles.Forkable`.

        Raises:
            InvalidInputError: A reshape cannot.
        """
        for reshape in self.reshapes:
            if not isinstance(reshape, Forkable):
                raise InvalidInputError(
                    f"{type(reshape).__name__} cannot follow the hypotheses of a search; use it "
                    "with greedy decoding or sampling"
                )
            reshape.fork(parents, requests)

    @property
    def drafting(self) -> Law:
        """This law without the reshapes that draft tokens cannot go through.

        Those combine models, read the target's inner states, or keep what the target has said. A
        draft may be drawn from any law, so that nothing is lost by leaving them out.
        """
        if self._drafting is None:
            kept = [reshape for reshape in self.reshapes if for_drafts(reshape)]
            self._drafting = self
            if len(kept) < len(self.reshapes):
                left_out = [r for r in self.reshapes if not for_drafts(r)]
                small = self._drafting = copy.copy(self)
                small.reshapes, small.taps = tuple(kept), Taps()
                small.processors = [p for p in self.processors if p not in left_out]
                small._drafting = small
        return self._drafting

    @property
    def plain(self) -> bool:
        """Whether raw logits pass through unchanged."""
        return not self.processors

    def row(self, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Process logits [R, V] after the prefixes ids [R, T]; reshapes need a tree.

        Raises:
            InvalidInputError: There are reshapes.
        """
        if self.reshapes:
            raise InvalidInputError("a strategy that reshapes the law decodes in isthmus' own loop")
        for processor in self.processors:
            logits = processor(ids, logits)
        return logits

    def logits(self, logits: torch.Tensor, tree: TokenTree, context: Context) -> torch.Tensor:
        """Processed logits [B, N, V], float32 or wider; each node sees its own path."""
        if logits.dtype not in (torch.float32, torch.float64):
            logits = logits.float()
        if self.plain:
            return logits
        b, n, v = logits.shape
        flat = logits.reshape(b * n, v)
        prefixes: list[tuple[torch.Tensor, torch.Tensor]] | None = None
        for processor in self.processors:
            if processor in self.reshapes:
                flat = processor(flat.view(b, n, v), tree, context).reshape(b * n, v)
                continue
            if isinstance(processor, ROW_WISE):
                row_wise: Any = processor
                flat = row_wise(tree.tokens.new_zeros(b * n, 1), flat)
                continue
            if prefixes is None:
                prefixes = node_prefixes(tree, context)
            out = flat.clone()
            for where, ids in prefixes:
                out[where] = processor(ids, flat[where])
            flat = out
        return flat.view(b, n, v)

    def probs(self, logits: torch.Tensor, tree: TokenTree, context: Context) -> torch.Tensor:
        """Probabilities [B, N, V], exact zeros for banned tokens."""
        return torch.softmax(self.logits(logits, tree, context), -1)


class Laws:
    """The laws of requests that share a batch, each with its own.

    While rows that sample are at work, a row that does not has all its probability on its likeliest
    token, so that one acceptance rule serves both.

    Args:
        own: Law of every request; looked up as its row begins, and removed once it has left.

    Attributes:
        taps: None of their reshapes may read inner states.

    Example:
        >>> laws = Laws({0: Law(), 1: Law(temperature=1.0)})
        >>> laws.greedy
        True
    """

    taps = Taps()

    def __init__(self, own: dict[int, Law]) -> None:
        self._own = own
        self._active: dict[int, Law] = {}

    @property
    def greedy(self) -> bool:
        """Whether no row at work samples."""
        return all(law.greedy for law in self._active.values())

    @property
    def drafting(self) -> Laws:
        """The laws for a drafter's own logits; see :class:`isthmus.roles.Law`."""
        twin = Laws({})
        twin._active = {request: law.drafting for request, law in self._active.items()}
        return twin

    def begin(self, context: Context, target: Target, **inputs: Any) -> None:
        """Start on new rows.

        Raises:
            InvalidInputError: A reshape reads inner states.
        """
        for b, request in enumerate(context.requests):
            law = self._active[request] = self._own[request]
            if law.taps:
                raise InvalidInputError("a strategy that reads inner states cannot share a batch")
            law.begin(self._row(context, b, law), target, **inputs)

    def forget(self, requests: Sequence[int]) -> None:
        """Let go of requests that have left."""
        for request in requests:
            self._own.pop(request, None)
            law = self._active.pop(request, None)
            if law is not None:
                law.forget([request])

    @staticmethod
    def _row(context: Context, b: int, law: Law) -> Context:
        return replace(
            context,
            ids=context.ids[b : b + 1],
            lengths=[context.lengths[b]],
            prompt_lengths=[context.prompt_lengths[b]],
            requests=[context.requests[b]],
            law=law,
            features=None,
        )

    def logits(self, logits: torch.Tensor, tree: TokenTree, context: Context) -> torch.Tensor:
        """Processed logits [B, N, V], float32 or wider; each row by its own law."""
        mixed = not self.greedy
        rows = []
        for b, request in enumerate(context.requests):
            law = self._active[request]
            row = law.logits(logits[b : b + 1], tree.row(b), self._row(context, b, law))
            if mixed and law.greedy:
                best = row.argmax(-1, keepdim=True)
                row = torch.full_like(row, -torch.inf).scatter(-1, best, 0.0)
            rows.append(row)
        return torch.cat(rows)

    def probs(self, logits: torch.Tensor, tree: TokenTree, context: Context) -> torch.Tensor:
        """Probabilities [B, N, V], exact zeros for banned tokens."""
        return torch.softmax(self.logits(logits, tree, context), -1)


def for_drafts(reshape: Reshape) -> bool:
    """Whether a drafter's own logits can go through a reshape."""
    return not (reshape.taps or reshape.stage == "combine" or getattr(reshape, "hears", False))


class StableTopP(lp.TopPLogitsWarper):
    """Top-p with a stable sort: two sort orders of tied tokens would be two laws."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Mask every token outside the nucleus of scores [R, V]."""
        ordered, index = torch.sort(scores, descending=False, stable=True)
        remove = ordered.softmax(-1).cumsum(-1) <= 1 - self.top_p
        remove[..., -self.min_tokens_to_keep :] = False
        return scores.masked_fill(remove.scatter(1, index, remove), self.filter_value)


def node_prefixes(tree: TokenTree, context: Context) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Committed ids plus path of every node, grouped by length.

    Returns:
        Pairs (flat node index [R], ids [R, T]); a processor is called once a pair.
    """
    topology, out = tree.topology, []
    b, n = tree.tokens.shape
    depth = topology.depth.expand(b, -1)
    # tokens on the path of each node, root first: ancestors are in index order by construction
    order = torch.sort((~topology.ancestors).to(torch.uint8), dim=-1, stable=True).indices
    path = tree.tokens[:, None, :].expand(b, n, n).gather(2, order.expand(b, n, n))
    groups: dict[int, list[int]] = {}
    for row in range(b):
        for node, level in enumerate(depth[row].tolist()):
            groups.setdefault(context.lengths[row] + level, []).append(row * n + node)
    for length, members in groups.items():
        where = torch.tensor(members, device=tree.tokens.device)
        ids = tree.tokens.new_zeros(len(members), length)
        for i, member in enumerate(members):
            row, node = divmod(member, n)
            past = context.lengths[row] - 1  # the root is the last committed token
            ids[i, :past] = context.ids[row, :past]
            ids[i, past:] = path[row, node, : length - past]
        out.append((where, ids))
    return out


def chain_logits(logits: torch.Tensor, context: Context, drafted: torch.Tensor) -> torch.Tensor:
    """Processed logits [B, V] after the committed ids and a chain of drafted tokens [B, T].

    Used by drafters that draw from their own logits through the law of the request.
    """
    tokens = torch.cat([context.roots().to(drafted.device)[:, None], drafted], 1)
    tree = TokenTree(tokens, chain_topology(tokens.shape[1]))
    full = logits[:, None].expand(-1, tokens.shape[1], -1)
    return context.law.drafting.logits(full, tree, context)[:, -1]


def draw_next(
    law: torch.Tensor, context: Context, places: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The next token of a drafted chain: the likeliest, the one that shared noise picks, or a draw.

    Args:
        law: Processed logits of the drafter [B, V].
        context: Its law, noise and source of draws.
        places: Position of the token in each row.

    Returns:
        Tokens [B, 1], and the law [B, V] that they were drawn from; None for chosen tokens.
    """
    if context.law.greedy:
        return law.argmax(-1, keepdim=True), None
    if context.noise is not None:
        noise = [
            context.noise(request, place, law.shape[-1])
            for request, place in zip(context.requests, places, strict=True)
        ]
        law = torch.log_softmax(law, -1) + torch.stack(noise).to(law.device)
        return law.argmax(-1, keepdim=True), None
    q = torch.softmax(law, -1)
    return torch.multinomial(q, 1, generator=context.generator), q
