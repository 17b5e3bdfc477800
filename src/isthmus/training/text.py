"""Learners of encoder-decoders on text: pairs of texts, and rows of one long text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from isthmus.decoding.model import Model
from isthmus.decoding.target import HubTarget
from isthmus.errors import InvalidInputError
from isthmus.models.encoder_decoder import EncoderDecoder, shifted
from isthmus.roles import Loss
from isthmus.training.buckets import Buckets2D, BucketSampler, Profile, batch_sizes
from isthmus.training.data import Data, Pair

Batch = tuple[torch.Tensor, ...]
"""Sources and targets, and what else a learner asks for."""


def tokenize(tokenizer: Any, texts: Sequence[str]) -> list[torch.Tensor]:
    """Token ids of texts, each with its end, int64 [T] each."""
    found = tokenizer.backend_tokenizer.encode_batch_fast(list(texts))
    return [torch.tensor(e.ids) for e in found]


def padded_ids(tokenizer: Any, texts: Sequence[str], pad: int) -> torch.Tensor:
    """Token ids of texts, int64 [B, T]."""
    return pad_sequence(tokenize(tokenizer, texts), True, pad)


class PairLearner:
    """Cross-entropy of a target given its source, in batches of like lengths.

    Args:
        module: What learns.
        tokenizer: Of both sides.
        data: Pairs.
        identity: What decides the result besides the data: the system and its settings.
        tokens: Tokens of a batch at most, padding included.
        label_smoothing: Share of the target law that is spread over all tokens.
        judged: Held-out pairs that are decoded at a validation.
        seed: Seed of the order.

    Attributes:
        profile: What the batches of an epoch are made of.

    Raises:
        InvalidInputError: A text is longer than the model allows, or than a batch.
    """

    lower_is_better = True

    def __init__(
        self,
        module: EncoderDecoder,
        tokenizer: Any,
        data: Data[Pair],
        identity: dict[str, Any],
        *,
        tokens: int = 2048,
        label_smoothing: float = 0.0,
        judged: int = 200,
        seed: int = 0,
    ) -> None:
        self.module: Any = module
        self.network, self.tokenizer = module, tokenizer
        self.identity = {**identity, "data": data.fingerprint, "tokens": tokens}
        self.smoothing, self.seed = label_smoothing, seed
        self.judged = list(data.valid[:judged])
        longest = module.config.max_length if module.config.position == "sinusoidal" else tokens
        self.train = _ids(tokenizer, data.train, longest)
        self.valid = _ids(tokenizer, data.valid, longest)
        lengths = np.array([[len(s), len(t)] for s, t in self.train])
        buckets = Buckets2D.estimate(lengths[:, 0], lengths[:, 1], parts=12)
        sizes = batch_sizes(buckets.bounds, lambda i, o, n: n * (i + o) <= tokens, tolerance=0)
        self.sampler = BucketSampler(
            buckets.assign(lengths[:, 0], lengths[:, 1], strict=False), sizes, seed
        )
        self.profile = Profile.of(lengths[:, 0], lengths[:, 1], self.sampler.epoch())

    def batch(self, part: int) -> Batch:
        """Sources and targets, int64 [B, S] and [B, T], padded."""
        return self._padded([self.train[row] for row in self.sampler.rows(part)])

    def loss(self, batch: Batch) -> Loss:
        """Sum over target tokens."""
        source, target = batch
        where = target != self.network.config.pad_id
        logits = self.module(source, shifted(target, self.network.config.pad_id), where)
        wanted = target[where]
        total = F.cross_entropy(
            logits, wanted, reduction="sum", label_smoothing=self.smoothing if self._learns else 0.0
        )
        return Loss(total, len(wanted))

    def validate(self) -> dict[str, float]:
        """Nats a token, and the share of sources that greedy decoding answers exactly."""
        total = weight = 0.0
        order = sorted(self.valid, key=lambda pair: len(pair[0]))
        for start in range(0, len(order), 128):
            found = self.loss(self._padded(order[start : start + 128]))
            total, weight = total + float(found.total), weight + float(found.weight)
        right = 0
        # a sharded module has no weights to hand out
        if self.judged and not hasattr(self.network.embedding.weight, "full_tensor"):
            longest = max(len(target) for _, target in self.valid[: len(self.judged)])
            sources = [p.source for p in self.judged]
            answers = translate(self.network, self.tokenizer, sources, longest)
            right = sum(a == p.target for a, p in zip(answers, self.judged, strict=True))
        return {"loss": total / weight, "exact": right / max(1, len(self.judged))}

    @property
    def _learns(self) -> bool:
        return bool(self.module.training)

    def _padded(self, pairs: Sequence[Batch]) -> Batch:
        pad = self.network.config.pad_id
        source, target = (pad_sequence([p[side] for p in pairs], True, pad) for side in (0, 1))
        device = self.network.embedding.weight.device
        return source.to(device), target.to(device)


def translate(
    module: EncoderDecoder, tokenizer: Any, sources: Sequence[str], longest: int
) -> list[str]:
    """Greedy answers, in order, of a model that is still being trained.

    Args:
        module: The model.
        tokenizer: Of both sides.
        sources: Texts.
        longest: Tokens of an answer at most.
    """
    model = Model(HubTarget(module.to_hf()), tokenizer)
    found = model.generate_many(sources, batch_size=64, max_new_tokens=longest, drafter="none")
    answers = dict(found)
    return [answers[i].text for i in range(len(sources))]


def _ids(tokenizer: Any, pairs: Sequence[Pair], longest: int) -> list[Batch]:
    sources = tokenize(tokenizer, [p.source for p in pairs])
    targets = tokenize(tokenizer, [p.target for p in pairs])
    for pair, *both in zip(pairs, sources, targets, strict=True):
        if max(map(len, both)) > longest:
            raise InvalidInputError(
                f"a pair of {len(both[0])} and {len(both[1])} tokens is longer than {longest} "
                f"({pair.source[:40]!r}); leave it out, or raise max_length"
            )
    return list(zip(sources, targets, strict=True))


def rows(tokenizer: Any, texts: Sequence[str], length: int) -> torch.Tensor:
    """One long text, cut into rows: int64 [N, length].

    Args:
        tokenizer: Ends every text.
        texts: The texts in their order.
        length: Tokens of a row.

    Raises:
        InvalidInputError: The texts do not fill one row.
    """
    stream = torch.cat(tokenize(tokenizer, texts))
    count = len(stream) // length
    if not count:
        raise InvalidInputError(
            f"the texts have {len(stream)} tokens, fewer than one row of {length}; give more"
        )
    return stream[: count * length].view(count, length)
