"""Translation with guided alignment, as it is given with the pairs or else learnt from them.

::

    given spans ─────────────────────────────────▶ a [B, T, S] of every batch
    pairs ──IBM model 1──▶ t(target | source) ──▶ a, where no pair has any
    loss = cross-entropy + w * alignment loss of the first head of the last decoder layer
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from isthmus.decoding.shortlist import Lexicon, learn_lexicon
from isthmus.errors import InvalidInputError
from isthmus.models.encoder_decoder import EncoderDecoder, shifted
from isthmus.objectives.alignment import HeadTap, alignment_loss
from isthmus.roles import Loss
from isthmus.training.data import Aligned, Data, Pair
from isthmus.training.text import Batch, PairLearner, padded_ids


def tapped(network: EncoderDecoder) -> HeadTap:
    """The head that is guided: the first one of the last decoder layer's cross-attention."""
    last: Any = network.decoder.layers[-1]
    return HeadTap(last.cross_attention.inner)


@torch.no_grad()
def aligned(network: EncoderDecoder, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """What the guided head looks at while a target is written.

    Args:
        network: The model.
        source: int64 [B, S], padded.
        target: int64 [B, T], with its end, padded.

    Returns:
        [B, T, S].
    """
    with tapped(network) as tap:
        network(source, shifted(target, network.config.pad_id))
    return tap.weights(source != network.config.pad_id)


def overlaps(offsets: Sequence[tuple[int, int]], spans: Sequence[range]) -> torch.Tensor:
    """Which tokens have a character of which span, bool [T, N].

    Args:
        offsets: First character of every token, and the one behind its last.
        spans: Characters.

    Example:
        >>> overlaps([(0, 2), (2, 3), (3, 3)], [range(1, 3)]).flatten().tolist()
        [True, True, False]
    """
    first, last = torch.tensor(offsets).unbind(1)
    begin, end = torch.tensor([[s.start, s.stop] for s in spans]).view(-1, 2).unbind(1)
    found: torch.Tensor = (first[:, None] < end) & (last[:, None] > begin)
    return found & (last > first)[:, None]


def given_alignment(tokenizer: Any, pair: Pair) -> torch.Tensor:
    """Which source tokens each target token is given, [T, S].

    Returns:
        Rows share a sum of 1 among the tokens of their spans; those of no span are 0.
    """
    source, target = tokenizer.backend_tokenizer.encode_batch(list(pair))
    spans = getattr(pair, "spans", ())
    read = overlaps(source.offsets, [span for span, _ in spans])  # [S, N]
    written = overlaps(target.offsets, [span for _, span in spans])  # [T, N]
    found = ((written[:, None] & read).any(-1)).float()
    return found / found.sum(-1, keepdim=True).clamp(min=1.0)


def alignment_error(network: EncoderDecoder, tokenizer: Any, pairs: Sequence[Pair]) -> float:
    """Share of target tokens whose head looks most at a source token that is not given for them.

    The right answer is given; tokens that no alignment is given for do not count.

    Args:
        network: The model.
        tokenizer: Of both sides.
        pairs: Pairs, :class:`~isthmus.training.data.Aligned`.
    """
    wrong = counted = 0
    for start in range(0, len(pairs), 64):
        some = pairs[start : start + 64]
        sides = [p.source for p in some], [p.target for p in some]
        ids = (padded_ids(tokenizer, side, network.config.pad_id) for side in sides)
        for best, pair in zip(aligned(network, *ids).argmax(-1), some, strict=True):
            told = given_alignment(tokenizer, pair)  # [T, S]
            counts = told.any(1)
            right = told.gather(1, best[: len(told), None])[:, 0] > 0
            counted += int(counts.sum())
            wrong += int((counts & ~right).sum())
    return wrong / counted


class GuidedLearner(PairLearner):
    """A :class:`~isthmus.training.text.PairLearner` whose guided head learns to align.

    What is given with any of the pairs is learnt, and of the others nothing; where no pair has an
    alignment, it is what IBM model 1 expects.

    Args:
        module: As there.
        tokenizer: As there.
        data: As there; pairs may be :class:`~isthmus.training.data.Aligned`.
        identity: As there.
        weight: w of a target token's alignment beside its cross-entropy; Marian's is 0.1.
        lexicon: Probabilities of targets given single source tokens, where nothing is given; learnt
            from the pairs when None.
        **options: As there.

    Raises:
        InvalidInputError: The weight is not positive.
    """

    def __init__(
        self,
        module: EncoderDecoder,
        tokenizer: Any,
        data: Data[Pair],
        identity: dict[str, Any],
        *,
        weight: float = 0.1,
        lexicon: Lexicon | None = None,
        **options: Any,
    ) -> None:
        super().__init__(module, tokenizer, data, identity, **options)
        if not weight > 0:
            raise InvalidInputError(f"the weight of alignments must be positive, got {weight}")
        self.weight = weight
        self.pairs = data.train
        self.given = any(isinstance(pair, Aligned) for pair in data.train)
        if not self.given:
            sides: Any = self.train
            self.lexicon = lexicon or learn_lexicon(sides, self.network.config.vocab_size)

    def batch(self, part: int) -> Batch:
        """Sources, targets and alignments, [B, T, S]."""
        source, target = super().batch(part)
        if self.given:
            wanted = torch.zeros(*target.shape, source.shape[1])
            for row, place in zip(wanted, self.sampler.rows(part), strict=True):
                told = given_alignment(self.tokenizer, self.pairs[place])
                row[: told.shape[0], : told.shape[1]] = told
            return source, target, wanted.to(source.device)
        pad = self.network.config.pad_id
        counted = (source != pad)[:, None] & (target != pad)[:, :, None]
        return source, target, self.lexicon.posteriors(source, target) * counted

    def loss(self, batch: Batch) -> Loss:
        """Sum over target tokens; a validation reports cross-entropy alone."""
        source, target, *wanted = batch  # a validation has no alignments
        if not self._learns:
            return super().loss((source, target))
        with tapped(self.network) as tap:
            found = super().loss((source, target))
        nats = alignment_loss(tap.weights(source != self.network.config.pad_id), wanted[0])
        found.sums["alignment"] = nats.detach()
        return Loss(found.total + self.weight * nats, found.weight, found.sums)
