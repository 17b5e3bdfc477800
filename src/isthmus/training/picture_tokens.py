"""Learning to go on with pictures that are sequences of tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from isthmus.errors import InvalidInputError
from isthmus.roles import Loss
from isthmus.signals.image import Pictured
from isthmus.training.data import Data
from isthmus.training.pictures import drawn

END, IGNORED = 0, -100
JUDGED = 128
"""Held-out pictures that validation reads."""
POOL = 16
"""Batches that share a draw, in which pictures of like lengths lie together."""


class TokenLearner:
    """Next-token loss of a causal model of transformers; a picture stands between two ends (id 0).

    Args:
        module: The model.
        ids: Tokens of a picture, uint8 [C, H, W].
        data: Pictures.
        batch_size: Pictures of a batch.
        context: Tokens that the model sees.
        seed: Of their order.
        settings: What else decides what is learnt.

    Raises:
        InvalidInputError: A picture has more tokens than the model sees.
    """

    lower_is_better = True

    def __init__(
        self,
        module: Any,
        ids: Callable[[Tensor], list[int]],
        data: Data[Pictured],
        batch_size: int,
        context: int,
        seed: int,
        settings: Mapping[str, Any],
    ) -> None:
        self.module, self.ids, self.data = module, ids, data
        self.batch_size, self.context, self.seed = batch_size, context, seed
        self.identity = {"settings": dict(settings), "data": data.fingerprint}
        self.valid = [self._whole(r) for r in data.valid[:JUDGED]]
        self._pool: tuple[int, list[Tensor]] = (-1, [])

    def _whole(self, record: Pictured) -> Tensor:
        """Ids [T] between two ends."""
        found = [END, *self.ids(record.picture()), END]
        if len(found) > self.context:
            raise InvalidInputError(
                f"{record!r:.60} has {len(found)} tokens and the model sees {self.context}; give "
                f"--set context={2 * len(found)}, or smaller pictures"
            )
        return torch.tensor(found)

    def batch(self, part: int) -> Tensor:
        """Ids [B, T] of pictures of like lengths; padding is -100."""
        pool, place = divmod(part, POOL)
        if self._pool[0] != pool:
            records = drawn(self.data.train, POOL * self.batch_size, pool, self.seed)
            self._pool = pool, sorted((self._whole(r) for r in records), key=len)
        rng = np.random.default_rng([self.seed, pool])
        start = int(rng.permutation(POOL)[place]) * self.batch_size
        return _padded(self._pool[1][start : start + self.batch_size])

    def loss(self, batch: Tensor) -> Loss:
        """Nats of all tokens."""
        logits = self.module(input_ids=batch[:, :-1].clamp(min=0)).logits
        wanted = batch[:, 1:].flatten()
        nats = F.cross_entropy(logits.flatten(0, 1), wanted, ignore_index=IGNORED, reduction="sum")
        return Loss(nats, (wanted != IGNORED).sum())

    def validate(self) -> dict[str, float]:
        """Bits of a held-out picture."""
        rows = [self.valid[i : i + 32] for i in range(0, len(self.valid), 32)]
        nats = sum(float(self.loss(_padded(r)).total) for r in rows)
        return {"bits_per_picture": nats / float(np.log(2)) / len(self.valid)}


def _padded(rows: Sequence[Tensor]) -> Tensor:
    return pad_sequence(list(rows), batch_first=True, padding_value=IGNORED)
