"""Lexical shortlists: logits of the few tokens that a source can ask for.

::

    lexicon: source token ─▶ its likeliest target tokens
    source ─▶ all of these, the most frequent tokens, the source's own ─▶ rows of the output matrix

With a large vocabulary and a small decoder most of a step is the output matrix. A shortlist, as in
Marian (Junczys-Dowmunt et al. 2018, 1804.00344), multiplies only the rows that may be wanted. All
other tokens get no probability, so the law is another one; where the best token is on the list,
greedy decoding chooses the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from isthmus.decoding.acceptance import likeliest
from isthmus.decoding.fast import FastSession, FastTarget
from isthmus.decoding.native import Kernel
from isthmus.decoding.program import LOGITS, STREAM, Kind, Program
from isthmus.decoding.tree import TokenTree
from isthmus.errors import BrokenFileError, InvalidInputError
from isthmus.roles import Features, Scores, Session, Taps


@dataclass(frozen=True)
class Lexicon:
    """Probabilities of target tokens given single source tokens, those that are not 0.

    Attributes:
        source: Source tokens, int64 [N].
        target: Target tokens, int64 [N].
        probs: p(target given source), float32 [N].
    """

    source: torch.Tensor
    target: torch.Tensor
    probs: torch.Tensor

    def best(self, vocab_size: int, count: int, threshold: float = 0.0) -> torch.Tensor:
        """The likeliest target tokens of every source token, int64 [V, count], filled up with 0.

        Args:
            vocab_size: Source tokens V.
            count: Targets of each at most.
            threshold: Least probability.

        Example:
            >>> pair = torch.tensor([4, 4, 4]), torch.tensor([7, 8, 9])
            >>> Lexicon(*pair, torch.tensor([0.2, 0.5, 0.3])).best(5, 2)[4].tolist()
            [8, 9]
        """
        kept = self.probs >= threshold
        source, target, probs = self.source[kept], self.target[kept], self.probs[kept]
        order = torch.argsort(probs, descending=True, stable=True)
        order = order[torch.argsort(source[order], stable=True)]
        source, target = source[order], target[order]
        starts = torch.searchsorted(source, torch.arange(vocab_size))
        rank = torch.arange(len(source)) - starts[source]
        table = torch.zeros(vocab_size, count, dtype=torch.int64)
        among = rank < count
        table[source[among], rank[among]] = target[among]
        return table

    def posteriors(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Which source token each target token comes from, [B, T, S]; model 1's expectation.

        Args:
            source: int64 [B, S].
            target: int64 [B, T].

        Returns:
            Rows of sum 1; 0 where the lexicon has none of the pairs.

        Example:
            >>> lexicon = Lexicon(torch.tensor([4, 5]), torch.tensor([7, 7]),
            ...                   torch.tensor([0.6, 0.2]))
            >>> found = lexicon.posteriors(torch.tensor([[5, 4]]), torch.tensor([[7, 8]]))
            >>> [[round(p, 2) for p in row] for row in found[0].tolist()]
            [[0.25, 0.75], [0.0, 0.0]]
        """
        if not len(self.source):
            return torch.zeros(*target.shape, source.shape[1], device=source.device)
        size = int(max(self.source.max(), self.target.max(), source.max(), target.max())) + 1
        keys, order = (self.source * size + self.target).sort()
        keys, probs = keys.to(source.device), self.probs[order].to(source.device)
        asked = source[:, None] * size + target[:, :, None]  # [B, T, S]
        place = torch.searchsorted(keys, asked).clamp(max=len(keys) - 1)
        found = probs[place] * (keys[place] == asked)
        return found / found.sum(-1, keepdim=True).clamp(min=torch.finfo(found.dtype).tiny)

    def save(self, path: Path, tokenizer: Any) -> None:
        """Write lines ``target source probability``, the likeliest first."""
        order = torch.argsort(self.probs, descending=True, stable=True)
        columns = (self.target[order].tolist(), self.source[order].tolist())
        words = [tokenizer.convert_ids_to_tokens(column) for column in columns]
        lines = zip(*words, self.probs[order].tolist(), strict=True)
        path.write_text("".join(f"{t} {s} {p:.6g}\n" for t, s, p in lines), encoding="utf-8")

    @classmethod
    def load(cls, path: Path, tokenizer: Any) -> Lexicon:
        """Read what :meth:`save` or Marian's tools write.

        Raises:
            BrokenFileError: It cannot be read, or a line is none of the above.
        """
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise BrokenFileError(f"{path} cannot be read: {error}") from error
        known = tokenizer.get_vocab()
        entries: list[tuple[int, int, float]] = []
        for number, line in enumerate(lines, 1):
            try:
                target, source, prob = line.split(" ")
                entries.append((known[source], known[target], float(prob)))
            except (ValueError, KeyError) as error:
                raise BrokenFileError(
                    f"{path}, line {number}: {line[:60]!r} is not a target token, a source token "
                    "and a probability"
                ) from error
        sources, targets, probs = zip(*entries, strict=True) if entries else ((), (), ())
        return cls(
            torch.tensor(sources, dtype=torch.int64),
            torch.tensor(targets, dtype=torch.int64),
            torch.tensor(probs, dtype=torch.float32),
        )


def learn_lexicon(
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], vocab_size: int, iterations: int = 5
) -> Lexicon:
    """IBM model 1 with an empty source word (Brown et al. 1993), by expectation-maximisation.

    Args:
        pairs: Source and target ids, int64 [S] and [T] each.
        vocab_size: Tokens V of both sides together.
        iterations: Passes.

    Raises:
        InvalidInputError: There are no pairs.

    Example:
        >>> the, house, das, haus, buch, book = range(2, 8)
        >>> texts = [([das, haus], [the, house]), ([das, buch], [the, book])]
        >>> pairs = [(torch.tensor(s), torch.tensor(t)) for s, t in texts]
        >>> learn_lexicon(pairs, 8, 20).best(8, 1)[[das, haus, buch]].flatten().tolist()
        [2, 3, 7]
    """
    if not pairs:
        raise InvalidInputError("a lexicon is learnt from pairs; give at least one")
    nobody = torch.tensor([vocab_size])
    keys, places, place = [], [], 0
    for source, target in pairs:
        words = torch.cat([nobody, source])
        keys.append((words[None] * vocab_size + target[:, None]).flatten())
        here = torch.arange(place, place + len(target))
        places.append(here.repeat_interleave(len(words)))
        place += len(target)
    cell, which = torch.unique(torch.cat(keys), return_inverse=True)
    where = torch.cat(places)  # the target place that a cell may explain
    source = cell // vocab_size
    probs = torch.full((len(cell),), 1 / vocab_size, dtype=torch.float64)
    for _ in range(iterations):
        share = probs[which]
        total = torch.zeros(place, dtype=torch.float64).index_add_(0, where, share)
        counts = torch.zeros(len(cell), dtype=torch.float64)
        counts.index_add_(0, which, share / total[where])
        sums = torch.zeros(vocab_size + 1, dtype=torch.float64).index_add_(0, source, counts)
        probs = counts / sums[source]
    real = source < vocab_size
    return Lexicon(source[real], (cell % vocab_size)[real], probs[real].float())


@dataclass(frozen=True)
class Shortlist:
    """Which target tokens a source may ask for.

    Attributes:
        lexicon: Of single tokens.
        vocab_size: Tokens V.
        first: Lowest ids that are always allowed: special tokens and the most frequent ones.
        best: Likeliest targets of every source token.
        threshold: Least probability of these.
        shared: Whether a source's own tokens are allowed, as where both sides share a vocabulary.

    Raises:
        InvalidInputError: It would be empty, or the lexicon is of another vocabulary.
    """

    lexicon: Lexicon
    vocab_size: int
    first: int = 100
    best: int = 100
    threshold: float = 0.0
    shared: bool = True

    def __post_init__(self) -> None:
        if self.first < 2 or self.best < 1:
            raise InvalidInputError(
                "a shortlist holds at least the 2 special tokens and 1 target of each source "
                f"token, got first={self.first} and best={self.best}"
            )
        ids = torch.cat([self.lexicon.source, self.lexicon.target])
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab_size:
            raise InvalidInputError(
                f"the lexicon holds token {int(ids.max())}, outside a vocabulary of "
                f"{self.vocab_size}; learn it with this model's tokenizer"
            )
        table = self.lexicon.best(self.vocab_size, self.best, self.threshold)
        object.__setattr__(self, "table", table)

    def allowed(self, source: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Tokens that sources int64 [B, S] may ask for, bool [B, V].

        Args:
            source: The sources.
            mask: Which places hold a token, [B, S]; all when None.
        """
        table: torch.Tensor = self.table  # type: ignore[attr-defined]
        wanted = table[source]
        if mask is not None:  # padding depends on who else is there, and asks for nothing
            source = source.masked_fill(mask == 0, 0)
            wanted = wanted.masked_fill(mask[..., None] == 0, 0)
        found = torch.zeros(len(source), self.vocab_size, dtype=torch.bool)
        found[:, : self.first] = True
        found.scatter_(1, wanted.flatten(1), True)
        if self.shared:
            found.scatter_(1, source, True)
        return found


class ShortlistTarget(FastTarget):
    """A compiled encoder-decoder whose logits are those of a shortlist, and -inf elsewhere.

    What a row becomes does not depend on the others. Sources that come as other than token ids
    have all logits.

    Args:
        model: The model, as for :class:`~isthmus.decoding.fast.FastTarget`.
        shortlist: The shortlist.

    Raises:
        UnsupportedModelError: The model has no compiled forward.
        InvalidInputError: It has no encoder, or another vocabulary.
    """

    def __init__(self, model: Any, shortlist: Shortlist) -> None:
        self.shortlist: Shortlist | None = None  # what is checked first is the whole model
        super().__init__(model)
        if not self.encoder_decoder or self.vocab_size != shortlist.vocab_size:
            raise InvalidInputError(
                f"a shortlist of {shortlist.vocab_size} tokens fits encoder-decoders with that "
                f"vocabulary; this model has {self.vocab_size} tokens"
            )
        self.shortlist = shortlist
        self.rows: torch.Tensor = model.get_output_embeddings().weight.detach()
        bias = getattr(model, "final_logits_bias", None)
        self.row_bias = None if bias is None else bias.detach().flatten()

    def session(self, batch: int, **inputs: Any) -> Session:
        """Open a session; see :meth:`HubTarget.session`."""
        session = super().session(batch, **inputs)
        if self.shortlist is not None and "input_ids" in inputs:
            assert isinstance(session, ShortlistSession)
            mask = inputs.get("attention_mask")
            session.allowed = self.shortlist.allowed(inputs["input_ids"], mask)
        return session

    def opened(self, batch: int, encoded: dict[str, Any]) -> FastSession:
        """A session of this target's kind."""
        return ShortlistSession(self, batch, encoded)

    def part(self, ids: torch.Tensor) -> Kernel:
        """The output matrix of some tokens, int64 [U]."""
        whole = self.kernel.program
        program = Program(
            0, whole.hidden_size, whole.heads, whole.kv_heads, whole.head_dim, whole.inner, len(ids)
        )
        weight = self.rows[ids]
        bias = {} if self.row_bias is None else {"bias": self.row_bias[ids]}
        program.add(
            Kind.LINEAR,
            source=STREAM,
            target=LOGITS,
            weight=weight,
            in_width=weight.shape[1],
            out_width=len(ids),
            stride=len(ids),
            factor=self.kernel.ops[-1].factor,
            **bias,
        )
        if whole.laid:  # sums are taken in the same order
            program.lay_out()
        if self.weights:
            program.to_int8()
        return Kernel(program)


class ShortlistSession(FastSession):
    """A session whose rows have a shortlist each."""

    target: ShortlistTarget
    allowed: torch.Tensor | None = None
    _kernel: Kernel | None = None

    def choose(self, tree: TokenTree, *, taps: Taps | None = None) -> Scores:
        """The likeliest tokens of the shortlists."""
        if self.allowed is None:
            return super().choose(tree, taps=taps)
        some, features = self._listed(tree, taps)
        best = likeliest(some)
        if not bool(some.gather(2, best[..., None]).isfinite().all()):
            return Scores(self._spread(some), features)  # who reads logits says what is wrong
        return Scores(torch.empty(0), features, self._ids[best])

    def _run(self, tree: TokenTree, *, taps: Taps | None = None, last_only: bool = False) -> Scores:
        if self.allowed is None or last_only:
            return super()._run(tree, taps=taps, last_only=last_only)
        some, features = self._listed(tree, taps)
        return Scores(self._spread(some), features)

    def _listed(self, tree: TokenTree, taps: Taps | None) -> tuple[torch.Tensor, Features | None]:
        """Logits [B, N, U] of the tokens on any list, -inf where a row's has it not."""
        assert self.allowed is not None
        if self._kernel is None:
            self._ids = self.allowed.any(0).nonzero()[:, 0]
            self._banned = ~self.allowed[:, None, self._ids]
            self._kernel = self.target.part(self._ids)
        asked = Taps(final=True) | (taps or Taps())
        found = super()._run(tree, taps=asked, last_only=True).features
        assert found is not None and found.final is not None
        some = self._kernel.head(found.final).masked_fill_(self._banned, -torch.inf)
        return some, found if taps else None

    def _spread(self, some: torch.Tensor) -> torch.Tensor:
        """The same as logits [B, N, V] of all tokens."""
        logits = some.new_full((*some.shape[:2], self.target.vocab_size), -torch.inf)
        return logits.index_copy_(2, self._ids, some)

    def reorder(self, rows: Sequence[int]) -> None:
        """Put the rows into another order; see :meth:`SlotSession.reorder`."""
        super().reorder(rows)
        self._allow(None if self.allowed is None else self.allowed[list(rows)])

    def fork(self, rows: Sequence[int]) -> ShortlistSession:
        """Copies of the given rows."""
        twin = super().fork(rows)
        assert isinstance(twin, ShortlistSession)
        return twin._allow(None if self.allowed is None else self.allowed[list(rows)])

    def join(self, other: Session) -> ShortlistSession:
        """Copies of the rows of both sessions, this one's first.

        Raises:
            MismatchError: The other session is that of another target.
        """
        twin = super().join(other)
        assert isinstance(twin, ShortlistSession) and isinstance(other, ShortlistSession)
        if self.allowed is None or other.allowed is None:
            every = [s for s in (self, other) if s.allowed is None]
            for session in every:
                session.allowed = torch.ones(len(session.lengths), self.target.vocab_size).bool()
        return twin._allow(torch.cat([self.allowed, other.allowed]))  # type: ignore[list-item]

    def _allow(self, allowed: torch.Tensor | None) -> ShortlistSession:
        self.allowed, self._kernel = allowed, None
        return self
