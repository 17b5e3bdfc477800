"""Models that take turns at writing one text: each catches up on what the others wrote.

No token is drafted or verified. Before a model goes on with a text it reads, in one forward, all
of it that it has not read yet; the caches of all models stay valid, and what is taken back is
forgotten by all of them::

    texts[b]  |---- read by the small model ----|
              |-- read by the large --|........ | <- read in one pass when its turn comes
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from isthmus.decoding.tree import TokenTree, chain_topology
from isthmus.errors import InvalidInputError, MismatchError
from isthmus.roles import Target


class Relay:
    """A batch of texts that several models read and write.

    Args:
        targets: The models; they must share one vocabulary.
        prompts: B prompts, int64 [T_b], at least one token each.

    Attributes:
        texts: Token ids of each row so far.
        read: Tokens that each model has read, all rows together: what its compute is counted by.
        forwards: Forwards of each model.

    Raises:
        MismatchError: The vocabularies differ by more than padding rows.
        InvalidInputError: No prompt, or an empty one.
    """

    def __init__(self, targets: Sequence[Target], prompts: Sequence[torch.Tensor]) -> None:
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

    def logits(self, model: int, rows: Sequence[int]) -> torch.Tensor:
        """Raw logits of a model after the texts of some rows, float [R, V].

        Args:
            model: Which model.
            rows: Rows whose text has grown since this model was asked about them.
        """
        session, target = self.sessions[model], self.targets[model]
        wanted = set(rows)
        unread = [
            text[n:] if b in wanted else []
            for b, (text, n) in enumerate(zip(self.texts, session.lengths, strict=True))
        ]
        counts = torch.tensor([len(tokens) for tokens in unread])
        assert all(counts[b] for b in rows), "the last token of a text is read when it is asked for"
        steps = torch.arange(int(counts.max()))
        tokens = torch.stack(
            [F.pad(torch.tensor(t, dtype=torch.int64), (0, len(steps) - len(t))) for t in unread]
        )
        valid = steps < counts[:, None]
        device = getattr(target, "device", tokens.device)
        tree = TokenTree(tokens, chain_topology(len(steps)), None if valid.all() else valid)
        scored = session.score(tree.to(device)).logits
        session.keep(torch.where(valid, steps, -1).to(device))
        self.read[model] += int(counts.sum())
        self.forwards[model] += 1
        index = torch.tensor(list(rows))
        last = scored[index.to(device), (counts[index] - 1).to(device), : self.vocab_size]
        return last.float().cpu() if last.dtype in (torch.float16, torch.bfloat16) else last.cpu()

    def append(self, row: int, token: int) -> None:
        """Write a token."""
        self.texts[row].append(token)

    def take_back(self, row: int, length: int) -> None:
        """Cut the text of a row to ``length`` tokens, in the caches too."""
        del self.texts[row][length:]
        for session in self.sessions:
            lengths = session.lengths
            if lengths[row] >= length:
                # the last token is left unread, so that every model can be asked what follows it
                lengths = [min(n, length - 1) if b == row else n for b, n in enumerate(lengths)]
                session.truncate(lengths)


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
