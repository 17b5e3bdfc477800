"""A second model beside the target, for laws that combine models: an amateur, a partner, a guide.

Its session holds the same rows as the target's and follows them through whatever happens there:
tokens of a draft are scored before they stand, rows accept different numbers of them, finished rows
leave and others come, hypotheses of a search are copied::

    begin    prefill of the new rows' prompts
    score    keep what has been committed of the last tree, then run the new tree  [B, N, V]
    fork     copy rows after a search
    forget   nothing to do: rows that are not asked for again are dropped at the next score
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from isthmus.decoding.target import followed
from isthmus.decoding.tree import TokenTree
from isthmus.errors import MismatchError
from isthmus.roles import Context, Scores, Session, Stage, Taps, Target

PADDING = 512
"""Vocabularies that differ by less than this differ by padding rows of the logits."""


class Companion:
    """A model's session kept in step with the rows at work, for use inside a reshape.

    :class:`Accompanied` is a reshape that owns some. Asking again for the same tree costs nothing.

    Args:
        model: The companion, sharing the target's vocabulary unless ``same_vocabulary`` is off.
        prompt: Its own prompt, int64 [T], given a request's number and prompt; the same one when
            None. The answer so far follows it.
        taps: Its inner states to return too.
        same_vocabulary: Off, token ids are fed as they are and logits come back as wide as the
            model has them.

    Attributes:
        forwards: Forwards of the companion after the prompts.
    """

    def __init__(
        self,
        model: Target,
        *,
        prompt: Callable[[int, torch.Tensor], torch.Tensor] | None = None,
        taps: Taps | None = None,
        same_vocabulary: bool = True,
    ) -> None:
        self.model, self.prompt, self.taps = model, prompt, taps
        self.same_vocabulary = same_vocabulary
        self.forwards = 0
        self._width = model.vocab_size
        self._session: Session | None = None
        self._requests: list[int] = []  # row by row, as are the next two
        self._ahead: list[int] = []  # tokens that the own prompt is longer than the target's
        self._lengths: list[int] = []  # committed tokens when the last tree was scored
        self._last: list[int] = []  # last token of its own prompt
        self._tree: TokenTree | None = None
        self._asked: TokenTree | None = None  # the same one, as it was given
        self._scores: Scores | None = None

    def begin(self, context: Context, target: Target, **inputs: Any) -> None:
        """Read the prompts of new rows.

        Raises:
            MismatchError: Another vocabulary, or a context too short for prompt and answer.
        """
        ours, theirs = self.model.vocab_size, target.vocab_size
        if self.same_vocabulary:
            if abs(ours - theirs) > PADDING:
                raise MismatchError(
                    f"the companion model has {ours} tokens and the target {theirs}; they must "
                    "share one vocabulary"
                )
            self._width = theirs
        own = [self._own(request, context, b) for b, request in enumerate(context.requests)]
        budget = context.ids.shape[1] - 1 - max(context.prompt_lengths)
        longest = max(len(ids) for ids in own) + budget
        if self.model.max_length is not None and longest > self.model.max_length:
            raise MismatchError(
                f"the companion model reads {self.model.max_length} tokens and prompt and answer "
                f"may have {longest}; use one with a longer context or ask for fewer tokens"
            )
        reads = ("encoder_decoder", "takes_images")
        given = inputs if any(getattr(self.model, name, False) for name in reads) else {}
        fresh = self.model.session(context.batch, **given)
        if longest - budget > 1:
            fresh.prefill([ids[:-1] for ids in own])
        self._keep([0] * len(self._requests), None)  # a join leaves a draft behind
        self._take([b for b, r in enumerate(self._requests) if r not in context.requests])
        self._session = fresh if self._session is None else self._session.join(fresh)
        self._requests += context.requests
        self._ahead += [len(i) - n for i, n in zip(own, context.prompt_lengths, strict=True)]
        self._lengths += context.lengths
        self._last += [int(ids[-1]) for ids in own]

    def _own(self, request: int, context: Context, row: int) -> torch.Tensor:
        ids = context.ids[row, : context.prompt_lengths[row]]
        return ids if self.prompt is None else self.prompt(request, ids)

    def forget(self, requests: Sequence[int]) -> None:
        """Let go of requests that have left, as soon as the others are scored again."""
        if not {*self._requests} - {*requests}:
            self._take([])

    def fork(self, parents: Sequence[int], requests: Sequence[int]) -> None:
        """Follow hypotheses that are copied."""
        self._keep([1] * len(self._requests), None)  # the roots stand, whatever comes next
        place = {request: b for b, request in enumerate(self._requests)}
        self._take([place[parent] for parent in parents])
        self._requests = list(requests)

    def _take(self, rows: list[int]) -> None:
        """Hold the given rows only, in that order."""
        if rows == list(range(len(self._requests))):
            return
        self._keep([0] * len(self._requests), None)
        assert self._session is not None
        self._session = followed(self._session, rows) if rows else None
        for name in ("_requests", "_ahead", "_lengths", "_last"):
            old = getattr(self, name)
            setattr(self, name, [old[b] for b in rows])

    def _keep(self, counts: list[int], path: torch.Tensor | None) -> None:
        """Commit the first nodes of a path of the last tree: the roots' alone without a path."""
        tree, self._tree, self._scores = self._tree, None, None
        if tree is None or not any(counts):
            return
        assert self._session is not None
        if path is None:
            path = torch.zeros_like(tree.tokens[:, :1])
        steps = torch.arange(path.shape[1], device=path.device)
        limit = torch.tensor(counts, device=path.device)
        self._session.keep(torch.where(steps < limit[:, None], path, -1))

    def _step(self, context: Context) -> None:
        """Commit what stands of the last tree, drop rows that left, feed what was not in it."""
        place = {request: b for b, request in enumerate(context.requests)}
        if self._tree is not None:
            new = [
                context.ids[place[r], n : context.lengths[place[r]] - 1] if r in place else None
                for r, n in zip(self._requests, self._lengths, strict=True)
            ]
            width = max((len(t) for t in new if t is not None), default=0)
            empty = context.ids.new_full((width,), -1)
            rows = [empty if t is None else F.pad(t, (0, width - len(t)), value=-1) for t in new]
            path = self._tree.follow(torch.stack(rows))
            # a row that got no new token scores its root once more, so that it must not be kept
            still = [
                0 if r not in place or context.lengths[place[r]] == n else path.shape[1]
                for r, n in zip(self._requests, self._lengths, strict=True)
            ]
            self._keep(still, path)
        where = {request: b for b, request in enumerate(self._requests)}
        self._take([where[request] for request in context.requests])
        assert self._session is not None
        missing = [
            context.ids[b, n - self._ahead[b] : context.lengths[b] - 1]
            for b, n in enumerate(self._session.lengths)
        ]
        if any(len(tokens) for tokens in missing):
            self._session.prefill(missing)
            self.forwards += 1
        self._lengths = list(context.lengths)

    @torch.no_grad()
    def score(self, tree: TokenTree, context: Context) -> Scores:
        """What the companion says at every node of a tree: logits [B, N, V], on its device.

        Raises:
            MismatchError: A row that never began.
        """
        same = context.requests == self._requests and context.lengths == self._lengths
        if tree is self._asked and same and self._scores is not None:
            return self._scores
        unknown = {*context.requests} - {*self._requests}
        if unknown:
            raise MismatchError("the companion model was not told of these rows; call begin first")
        if same:
            self._keep([0] * len(self._requests), None)
        else:
            self._step(context)
        assert self._session is not None
        tokens = tree.tokens
        if self.prompt is not None:  # which may end in another token than the target's
            fresh = [n == p for n, p in zip(context.lengths, context.prompt_lengths, strict=True)]
            root = torch.where(torch.tensor(fresh), torch.tensor(self._last), context.roots())
            tokens = torch.cat([root.to(tokens.device)[:, None], tokens[:, 1:]], 1)
        bare = TokenTree(tokens, tree.topology, tree.valid)  # how it was drawn is no matter
        here = bare.to(getattr(self.model, "device", tree.tokens.device))
        scores = self._session.score(here, taps=self.taps)
        self.forwards += 1
        logits = scores.logits
        if self.same_vocabulary:
            extra = self._width - logits.shape[-1]
            logits = logits[..., : self._width]
            logits = F.pad(logits, (0, max(extra, 0)), value=-torch.inf)
        self._tree, self._asked = here, tree
        self._scores = Scores(logits, scores.features)
        return self._scores

    def logits(self, tree: TokenTree, context: Context) -> torch.Tensor:
        """Logits [B, N, V] at every node, float32 or wider, on the tree's device."""
        logits = self.score(tree, context).logits.to(tree.tokens.device)
        return logits if logits.dtype == torch.float64 else logits.float()


class Accompanied(ABC):
    """A reshape that combines the target's logits with those of companions.

    Attributes:
        companions: The other models.
    """

    stage: Stage = "combine"
    taps = Taps()

    def __init__(self, *companions: Companion) -> None:
        self.companions = companions

    @abstractmethod
    def combine(self, logits: torch.Tensor, others: list[torch.Tensor]) -> torch.Tensor:
        """New logits [B, N, V] from the target's and those of each companion."""

    def begin(self, context: Context, target: Target, **inputs: Any) -> None:
        """Start the companions on new rows."""
        for companion in self.companions:
            companion.begin(context, target, **inputs)

    def forget(self, requests: Sequence[int]) -> None:
        """Let the companions let go of requests that have left."""
        for companion in self.companions:
            companion.forget(requests)

    def fork(self, parents: Sequence[int], requests: Sequence[int]) -> None:
        """Let the companions follow hypotheses that are copied."""
        for companion in self.companions:
            companion.fork(parents, requests)

    def __call__(self, logits: torch.Tensor, tree: TokenTree, context: Context) -> torch.Tensor:
        """See :class:`isthmus.roles.Reshape`."""
        return self.combine(logits, [c.logits(tree, context) for c in self.companions])
