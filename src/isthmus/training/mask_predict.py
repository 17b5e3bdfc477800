"""Learning to translate in a few passes: masked targets, and their lengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from isthmus.decoding.masked import mask_predict
from isthmus.models.masked_translation import MaskedTranslation
from isthmus.roles import Loss
from isthmus.training.data import Data, Pair
from isthmus.training.text import Batch, PairLearner, padded_ids

LENGTH_SHARE = 0.1
"""Weight of the length's loss beside that of the tokens."""


class MaskedLearner(PairLearner):
    """Cross-entropy of masked target tokens, a uniform number of them, and of the length.

    Args:
        module: What learns.
        tokenizer: Of both sides.
        data: Pairs.
        identity: What decides the result besides the data.
        steps: Passes of a validation's translations.
        **options: As for :class:`~isthmus.training.text.PairLearner`.
    """

    network: MaskedTranslation

    def __init__(
        self,
        module: MaskedTranslation,
        tokenizer: Any,
        data: Data[Pair],
        identity: dict[str, Any],
        *,
        steps: int = 4,
        **options: Any,
    ) -> None:
        super().__init__(module, tokenizer, data, identity, **options)
        self.steps = steps

    def loss(self, batch: Batch) -> Loss:
        """Sum over masked tokens, the mean length loss with the weight of as many tokens."""
        source, target = batch
        network = self.network
        places = target != network.config.pad_id
        count = places.sum(1, keepdim=True)
        # U{1 .. N} places of each target
        wanted = 1 + (torch.rand(len(target), 1, device=target.device) * count).long()
        order = torch.rand(target.shape, device=target.device).masked_fill(~places, 2.0)
        masked = order.argsort(1).argsort(1) < wanted
        shown = torch.where(masked, network.mask_token, target)
        logits, lengths = self.module(source, shown, masked)
        smoothing = self.smoothing if self._learns else 0.0
        total = F.cross_entropy(
            logits, target[masked], reduction="sum", label_smoothing=smoothing
        ) + LENGTH_SHARE * len(logits) * F.cross_entropy(lengths, count[:, 0])
        return Loss(total, len(logits))

    def validate(self) -> dict[str, float]:
        """Nats a masked token, and the share of sources that mask-predict answers exactly."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the same places at every validation
            found = [
                self.loss(self._padded(self.valid[start : start + 128]))
                for start in range(0, len(self.valid), 128)
            ]
        loss = sum(float(f.total) for f in found) / sum(float(f.weight) for f in found)
        answers = fill_in(self.network, self.tokenizer, [p.source for p in self.judged], self.steps)
        right = sum(a == p.target for a, p in zip(answers, self.judged, strict=True))
        return {"loss": loss, "exact": right / max(1, len(self.judged))}


@torch.no_grad()
def fill_in(
    network: MaskedTranslation,
    tokenizer: Any,
    sources: Sequence[str],
    steps: int,
    candidates: int = 3,
    batch_size: int = 64,
) -> list[str]:
    """Translations by mask-predict.

    Args:
        network: The model.
        tokenizer: Of both sides.
        sources: Texts.
        steps: Passes.
        candidates: Likeliest lengths that are tried. The translation is taken whose mean
            log-probability of a token and log-probability of the length are largest together; the
            paper leaves the length out, which prefers lengths that nothing was trained on.
        batch_size: Sources at once.
    """
    answers: list[str] = []
    pad, device = network.config.pad_id, network.embedding.weight.device
    for start in range(0, len(sources), batch_size):
        source = padded_ids(tokenizer, sources[start : start + batch_size], pad).to(device)
        tokens, _ = fill_ids(network, source, steps, candidates)
        answers += tokenizer.batch_decode(tokens.tolist(), skip_special_tokens=True)
    return answers


def fill_ids(
    network: MaskedTranslation, source: torch.Tensor, steps: int, candidates: int = 3
) -> tuple[torch.Tensor, torch.Tensor]:
    """Translations int64 [B, T] of sources int64 [B, S], padded, and what chose them [B].

    See :func:`fill_in`.
    """
    memory = network.encode(source)
    logits = network.lengths(memory)
    logits[:, 0] = -torch.inf  # the end of a text is one of its tokens
    likely = torch.log_softmax(logits, -1).topk(candidates)
    lengths = likely.indices.flatten()  # [B * C]
    wide = type(memory)(*(x.repeat_interleave(candidates, 0) for x in (memory.states, memory.mask)))
    longest = int(lengths.max())
    places = torch.arange(longest, device=source.device) < lengths[:, None]
    pad, mask = network.config.pad_id, network.mask_token
    tokens, sure = mask_predict(lambda ids: network.fill(ids, wide), places, steps, mask, pad)
    sure = sure.view(-1, candidates) + likely.values
    best = sure.argmax(1)
    rows = torch.arange(len(source), device=source.device)
    return tokens.view(len(source), candidates, -1)[rows, best], sure[rows, best]
