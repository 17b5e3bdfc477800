"""Translation with guided alignment: what is aligned is learnt from the pairs themselves.

::

    pairs ──IBM model 1──▶ t(target | source) ──▶ a [B, T, S] of every batch
    loss = cross-entropy + w * alignment loss of the first head of the last decoder layer
"""

from __future__ import annotations

from typing import Any

import torch

from isthmus.decoding.shortlist import Lexicon, learn_lexicon
from isthmus.errors import InvalidInputError
from isthmus.models.encoder_decoder import EncoderDecoder, shifted
from isthmus.objectives.alignment import HeadTap, alignment_loss
from isthmus.roles import Loss
from isthmus.training.text import Batch, PairLearner


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


class GuidedLearner(PairLearner):
    """A :class:`~isthmus.training.text.PairLearner` whose guided head learns to align.

    Args:
        *args: As there.
        weight: w of a target token's alignment beside its cross-entropy; Marian's is 0.1.
        lexicon: Probabilities of targets given single source tokens; learnt from the pairs when
            None.
        **options: As there.

    Raises:
        InvalidInputError: The weight is not positive.
    """

    def __init__(
        self, *args: Any, weight: float = 0.1, lexicon: Lexicon | None = None, **options: Any
    ) -> None:
        super().__init__(*args, **options)
        if not weight > 0:
            raise InvalidInputError(f"the weight of alignments must be positive, got {weight}")
        self.weight = weight
        self.lexicon = lexicon or learn_lexicon(self.train, self.network.config.vocab_size)

    def loss(self, batch: Batch) -> Loss:
        """Sum over target tokens; a validation reports cross-entropy alone."""
        source, target = batch
        if not self._learns:
            return super().loss(batch)
        with tapped(self.network) as tap:
            found = super().loss(batch)
        pad = self.network.config.pad_id
        wanted = self.lexicon.posteriors(source, target)
        counted = (source != pad)[:, None] & (target != pad)[:, :, None]
        nats = alignment_loss(tap.weights(source != pad), wanted * counted)
        found.sums["alignment"] = nats.detach()
        return Loss(found.total + self.weight * nats, found.weight, found.sums)
