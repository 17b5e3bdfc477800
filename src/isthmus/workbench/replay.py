"""Replay: how well would a drafter have done on a text that the target wrote already?

A text is recorded once, with the target's logits at each of its positions. After that any drafter
can be run against it through the usual loop at no forward of the target::

    record(model, prompts) ──texts, logits──> replay(model, policy, ...) ──> rounds, nodes, seconds

What stands beside the text was never scored. There the replay answers with the logits after the
last place where the same token stood. A drafter that learns from committed text alone is therefore
replayed exactly, one that learns from rejected nodes approximately.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from isthmus.decoding.acceptance import Coupled, Lossless
from isthmus.decoding.engine import Request, decode
from isthmus.decoding.generation import Generation
from isthmus.decoding.law import Law
from isthmus.decoding.model import Model
from isthmus.decoding.stopping import Stopper
from isthmus.decoding.tree import TokenTree
from isthmus.errors import InvalidInputError, UnsupportedModelError
from isthmus.roles import Features, Policy, Reach, Scores, Session, Taps


@dataclass(frozen=True)
class Text:
    """A prompt, what the target wrote below it, and its logits.

    Attributes:
        ids: Prompt and answer, int64 [T].
        prompt: Tokens of the prompt.
        logits: The target's logits at every token but the last, float [T - 1, V].
    """

    ids: torch.Tensor
    prompt: int
    logits: torch.Tensor

    @property
    def answer(self) -> torch.Tensor:
        """The tokens written, int64."""
        return self.ids[self.prompt :]


def record(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[Text]:
    """Let the target write, greedily or with coupled draws, and keep its logits.

    Args:
        model: The model; decoder-only.
        prompts: Token ids of each prompt.
        max_new_tokens: Tokens of each text.
        temperature: 0 is greedy.
        seed: Seed of the coupled draws.

    Raises:
        InvalidInputError: The model has an encoder.
    """
    if model.target.encoder_decoder:
        raise InvalidInputError("texts of encoder-decoder models cannot be replayed yet")
    texts = []
    for prompt in prompts:
        out = model.generate(
            torch.tensor(list(prompt)),
            max_new_tokens=max_new_tokens,
            drafter="none",
            acceptance=Coupled(seed) if temperature > 0 else None,
            ignore_end=True,
            temperature=temperature,
            seed=0,
        )
        ids = torch.tensor([*prompt, *out.tokens])
        logits = model.target.forward(ids[None, :-1].to(model.target.device)).logits[0].cpu()
        texts.append(Text(ids, len(prompt), logits))
    return texts


def replay(
    policy: Policy, texts: Sequence[Text], *, temperature: float = 0.0, seed: int = 0
) -> list[Generation]:
    """Run a policy against recorded texts; temperature and seed are those of the recording.

    Args:
        policy: Who drafts, and how much.
        texts: What :func:`record` gave.
        temperature: As recorded.
        seed: As recorded.

    Returns:
        One result a text: its rounds, nodes and drafting times are what matters.
    """
    results = []
    for text in texts:
        request = Request(
            text.ids[: text.prompt], Stopper(max_new_tokens=len(text.ids) - text.prompt)
        )
        rounds = decode(
            ReplayTarget(text),
            [request],
            policy=policy,
            acceptance=Coupled(seed) if temperature > 0 else Lossless(),
            law=Law(temperature=temperature),
            generator=torch.Generator().manual_seed(0),
        )
        for _ in rounds:
            pass
        results.append(request.result)
    return results


class ReplayTarget:
    """A target that knows one text.

    Args:
        text: What it knows.
    """

    max_length: int | None = None
    max_batch: int | None = 1
    max_nodes = 1024
    reach: Reach = "tree"

    def __init__(self, text: Text) -> None:
        self.text, self.vocab_size = text, text.logits.shape[-1]

    def session(self, batch: int, **inputs: Any) -> ReplaySession:
        """A session at the beginning of the text."""
        return ReplaySession(self.text)


class ReplaySession:
    """A place in a recorded text.

    Args:
        text: The text.
    """

    def __init__(self, text: Text) -> None:
        self.text, self._length = text, 0
        # where each token stood last in what is committed
        self._latest = torch.full((text.logits.shape[-1],), -1, dtype=torch.int64)

    @property
    def lengths(self) -> list[int]:
        """Committed tokens."""
        return [self._length]

    def prefill(self, rows: Sequence[torch.Tensor], *, taps: Taps | None = None) -> Features | None:
        """Go on by as many tokens."""
        self._go(len(rows[0]))
        return None

    def _go(self, count: int) -> None:
        end = min(self._length + count, len(self.text.logits))
        places = torch.arange(self._length, end)
        for place, token in zip(places.tolist(), self.text.ids[places].tolist(), strict=True):
            self._latest[token] = place
        self._length += count

    def score(self, tree: TokenTree, *, taps: Taps | None = None) -> Scores:
        """Logits at the nodes that stand in the text, the nearest known ones at the others."""
        last = len(self.text.logits) - 1
        place = (self._length + tree.topology.depth).expand_as(tree.tokens).clamp(max=last)
        strays = tree.tokens != self.text.ids[place]
        stray = (tree.topology.ancestors & strays[:, None, :]).any(-1)
        known = self._latest[tree.tokens]
        beside = torch.where(known >= 0, known, min(self._length, last))
        return Scores(self.text.logits[torch.where(stray, beside, place)])

    def keep(self, path: torch.Tensor) -> None:
        """Go on by the kept nodes."""
        self._go(int((path >= 0).sum()))

    def truncate(self, lengths: Sequence[int]) -> None:
        """Go back."""
        self._length = min(self._length, int(lengths[0]))

    def fork(self, rows: Sequence[int]) -> ReplaySession:
        """A copy of this place."""
        twin = ReplaySession(self.text)
        twin._length, twin._latest = self._length, self._latest.clone()
        return twin

    def join(self, other: Session) -> ReplaySession:
        """One text is one row.

        Raises:
            UnsupportedModelError: Always.
        """
        raise UnsupportedModelError("a recorded text is replayed one row at a time")


def copy_rate(text: Text) -> float:
    """Share of the written tokens that followed the same trigram before, where one stood before.

    Example:
        >>> copy_rate(Text(torch.tensor([1, 2, 3, 4, 1, 2, 3, 4, 9]), 7, torch.zeros(8, 10)))
        0.5
    """
    ids, hits = text.ids.tolist(), 0
    seen: dict[tuple[int, ...], int] = {}
    for i in range(3, len(ids)):
        gram = tuple(ids[i - 3 : i])
        hits += i >= text.prompt and seen.get(gram) == ids[i]
        seen[gram] = ids[i]
    return hits / max(1, len(ids) - text.prompt)


def entropy(text: Text) -> float:
    """Mean entropy of the target's law over the written tokens, in nats."""
    law = torch.log_softmax(text.logits[text.prompt - 1 :].float(), -1)
    return float(-(law.exp() * law).sum(-1).mean())
