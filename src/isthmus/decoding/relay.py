"""Models that take turns at writing one text: each catches up on what the others wrote.

No token is drafted or verified. Before a model goes on with a text it reads, in one forward, all
of it that it has not read yet; the caches of all models stay valid, and what is taken back is
forgotten by all of them::

    texts[b]  |---- read by the small model ----|
              |-- read by the large --|........ | <- read in one pass when its turn comes
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from isthmus.decoding.tree import TokenTree, chain_topology
from isthmus.errors import InvalidInputError, MismatchError
from isthmus.roles import Taps, Target


class Relay:
    """A batch of texts that several models read and write.

    Args:
        targets: The models; they must share one vocabulary.
        prompts: B prompts, int64 [T_b], at least one token each.
        watched: Models whose last hidden states are wanted too; see :meth:`states`.

    Attributes:
        texts: Token ids of each row so far.
        read: Tokens that each model has read, all rows together: what its compute is counted by.
        forwards: Forwards of each model.

    Raises:
        MismatchError: The vocabularies differ by more than padding rows.
        InvalidInputError: No prompt, or an empty one.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        prompts: Sequence[torch.Tensor],
        *,
        watched: Sequence[int] = (),
    ) -> None:
        sizes = [t.vocab_size for t in targets]
        if max(sizes) - min(sizes) > 512:
            raise MismatchError(
                f"the models have {' and '.join(map(str, sizes))} tokens; models that take turns "
                "must share one vocabulary"
            )
        if not prompts or min(len(p) for p in prompts) < 1:
            raise InvalidInputError("give prompts of at least one token")
        self.targets, self.vocab_size = list(targets), min(sizes)
        self.texts: list[list[int]] = [p.tolist() for p in prompts]
        self.sessions = [t.session(len(prompts)) for t in targets]
        self.read, self.forwards = [0] * len(targets), [0] * len(targets)
        self.taps = [Taps(final=True) if m in watched else None for m in range(len(targets))]
        self._logits: list[torch.Tensor | None] = [None] * len(targets)  # [B, V], as last read
        self._states: list[torch.Tensor | None] = [None] * len(targets)  # [B, D]

    def logits(self, model: int, rows: Sequence[int]) -> torch.Tensor:
        """Raw logits of a model after the texts of some rows, float [R, V].

        Args:
            model: Which model; it reads what is new to it, and nothing where nothing is.
            rows: Rows to ask about.
        """
        self._catch_up(model, rows)
        known = self._logits[model]
        assert known is not None
        return known[list(rows)]

    def states(self, model: int, rows: Sequence[int]) -> torch.Tensor:
        """Last hidden states of a watched model at the end of the texts of some rows, [R, D]."""
        self._catch_up(model, rows)
        known = self._states[model]
        assert known is not None, "only models that are watched keep their states"
        return known[list(rows)]

    def _catch_up(self, model: int, rows: Sequence[int]) -> None:
        session, target = self.sessions[model], self.targets[model]
        lengths = session.lengths
        rows = [b for b in rows if lengths[b] < len(self.texts[b])]
        if not rows:
            return
        wanted = set(rows)
        unread = [
            text[n:] if b in wanted else []
            for b, (text, n) in enumerate(zip(self.texts, lengths, strict=True))
        ]
        counts = torch.tensor([len(tokens) for tokens in unread])
        steps = torch.arange(int(counts.max()))
        tokens = torch.stack(
            [F.pad(torch.tensor(t, dtype=torch.int64), (0, len(steps) - len(t))) for t in unread]
        )
        valid = steps < counts[:, None]
        device = getattr(target, "device", tokens.device)
        tree = TokenTree(tokens, chain_topology(len(steps)), None if valid.all() else valid)
        scored = session.score(tree.to(device), taps=self.taps[model])
        session.keep(torch.where(valid, steps, -1).to(device))
        self.read[model] += int(counts.sum())
        self.forwards[model] += 1
        index = torch.tensor(rows)
        ends = index.to(device), (counts[index] - 1).to(device)
        logits = scored.logits[..., : self.vocab_size]
        self._logits[model] = self._remember(self._logits[model], index, logits[ends])
        if scored.features is not None and scored.features.final is not None:
            states = scored.features.final[ends]
            self._states[model] = self._remember(self._states[model], index, states)

    def _remember(
        self, known: torch.Tensor | None, index: torch.Tensor, new: torch.Tensor
    ) -> torch.Tensor:
        """Put new rows [R, X] into what is known of all rows [B, X]."""
        new = new.float().cpu() if new.dtype in (torch.float16, torch.bfloat16) else new.cpu()
        if known is None:
            known = new.new_zeros(len(self.texts), new.shape[-1])
        known[index] = new
        return known

    def append(self, row: int, token: int) -> None:
        """Write a token."""
        self.texts[row].append(token)

    def write(
        self,
        model: int,
        rows: Sequence[int],
        over: Callable[[list[int]], bool],
        limits: Sequence[int],
        temperature: float,
        generators: Sequence[torch.Generator],
    ) -> None:
        """Let a model write one passage of each row.

        Args:
            model: Which model.
            rows: Rows to write.
            over: Whether a passage, given its tokens so far, ends with the last of them.
            limits: Tokens that the text of each row may have, all B rows.
            temperature: 0 is greedy.
            generators: One a row, all B rows.
        """
        starts = [len(text) for text in self.texts]
        rows = list(rows)
        while rows:
            drawn = choose(self.logits(model, rows), temperature, [generators[b] for b in rows])
            for b, token in zip(rows, drawn, strict=True):
                self.append(b, token)
            rows = [
                b
                for b in rows
                if len(self.texts[b]) < limits[b] and not over(self.texts[b][starts[b] :])
            ]

    def take_back(self, row: int, length: int) -> None:
        """Cut the text of a row to ``length`` tokens, in the caches too."""
        self.take_back_rows({row: length})

    def take_back_rows(self, cuts: Mapping[int, int]) -> None:
        """:meth:`take_back` for several rows at once: lengths by row."""
        for row, length in cuts.items():
            del self.texts[row][length:]
        for session in self.sessions:
            lengths = session.lengths
            if any(lengths[row] >= length for row, length in cuts.items()):
                # the last token is left unread, so that every model can be asked what follows it
                session.truncate(
                    [min(n, cuts[b] - 1) if b in cuts else n for b, n in enumerate(lengths)]
                )


def choose(
    logits: torch.Tensor, temperature: float, generators: Sequence[torch.Generator]
) -> list[int]:
    """The next token of each row: the likeliest, or drawn with that row's generator.

    Args:
        logits: Raw logits [R, V].
        temperature: 0 is greedy.
        generators: One a row, so that a row's draws do not depend on the others.
    """
    if temperature == 0.0:
        best: list[int] = logits.argmax(-1).tolist()
        return best
    law = torch.softmax(logits.double() / temperature, -1)
    return [int(torch.multinomial(p, 1, generator=g)) for p, g in zip(law, generators, strict=True)]


class StepEnd:
    """Whether a step, given its tokens so far, ends with the last of them.

    Args:
        separator: What ends a step: text, or token ids where there is no tokenizer.
        tokenizer: Reads the tokens where the separator is text.
        end: Token that ends everything, or None.

    Raises:
        InvalidInputError: The separator is text and there is no tokenizer.

    Example:
        >>> over = StepEnd((7, 8), end=2)
        >>> over([3, 7]), over([3, 7, 8]), over([2])
        (False, True, True)
    """

    def __init__(
        self, separator: str | tuple[int, ...], tokenizer: Any = None, end: int | None = None
    ) -> None:
        if isinstance(separator, str) and tokenizer is None:
            raise InvalidInputError(
                "without a tokenizer, give the separator of steps as token ids, for example (198,)"
            )
        self.separator, self.tokenizer, self.end = separator, tokenizer, end

    def __call__(self, step: list[int]) -> bool:
        """See the class."""
        if step[-1] == self.end:
            return True
        tail = step[-len(self.separator) :]  # a token holds a part of it at least
        if isinstance(self.separator, str):
            return self.separator in self.tokenizer.decode(tail)
        return tuple(tail) == self.separator
