"""Learner of a decoder with elastic widths: each batch teaches one width, or all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from isthmus.models.elastic_decoder import ElasticDecoder
from isthmus.roles import Loss
from isthmus.training.data import Data
from isthmus.training.seeds import batch_generator
from isthmus.training.text import rows

HELD_OUT = 64
"""Held-out rows that are looked at."""


class NestedLearner:
    """Next-token loss of prefixes of the feed-forwards.

    Units beyond the prefix get a gradient of zero, not none: moments of an optimiser decay, and
    what it has learnt of these units still moves them a little.

    Args:
        decoder: What learns.
        tokenizer: Its tokenizer.
        data: Texts.
        widths: Widths that are taught.
        odds: How often each is drawn.
        joint: Take the mean loss of all widths in every step instead of drawing one.
        length: Tokens of a row.
        batch_size: Rows of a batch.
        seed: Seed of order and draws.
        identity: What decides the result besides the data.
    """

    lower_is_better = True

    def __init__(
        self,
        decoder: ElasticDecoder,
        tokenizer: Any,
        data: Data[str],
        widths: Sequence[int],
        odds: Sequence[float],
        *,
        joint: bool,
        length: int,
        batch_size: int,
        seed: int,
        identity: dict[str, Any],
    ) -> None:
        self.decoder, self.seed, self.size, self.joint = decoder, seed, batch_size, joint
        self.module: Any = decoder.module
        self.widths, self.odds = tuple(widths), torch.tensor(odds)
        self.rows = rows(tokenizer, data.train, length + 1)
        held_out = rows(tokenizer, data.valid, length + 1)
        self.held_out = held_out[:: max(1, len(held_out) // HELD_OUT)][:HELD_OUT]
        self.identity = {**identity, "data": data.fingerprint}

    def batch(self, part: int) -> tuple[torch.Tensor, tuple[int, ...]]:
        """Rows int64 [B, T + 1], and the widths that are taught by them."""
        generator = batch_generator(self.seed, part)
        chosen = torch.randint(len(self.rows), (self.size,), generator=generator)
        drawn = int(torch.multinomial(self.odds, 1, generator=generator))
        return self.rows[chosen], self.widths if self.joint else (self.widths[drawn],)

    def loss(self, batch: tuple[torch.Tensor, tuple[int, ...]]) -> Loss:
        """Sum over tokens, mean over the widths: (1/g) sum_i L(M_i(x), y)."""
        ids, widths = batch
        total = torch.zeros((), device=ids.device)
        for width in widths:
            with self.decoder.at(width):
                total = total + next_token_loss(self.module, ids)
        return Loss(total / len(widths), ids[:, 1:].numel())

    def validate(self) -> dict[str, float]:
        """Mean over the widths that are taught, then each."""
        taught = [w for w, p in zip(self.widths, self.odds.tolist(), strict=True) if p]
        found = {f"loss of {w}": nats(self.decoder, w, self.held_out, self.module) for w in taught}
        return {"loss": sum(found.values()) / len(found), **found}


def next_token_loss(module: Any, ids: torch.Tensor) -> torch.Tensor:
    """Loss in nats of a causal model, summed over tokens; rows int64 [N, T + 1]."""
    logits = module(input_ids=ids[:, :-1], use_cache=False).logits.float()
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")


@torch.no_grad()
def nats(
    decoder: ElasticDecoder, widths: int | Sequence[int], ids: torch.Tensor, module: Any = None
) -> float:
    """Loss of a smaller model in nats a token, on rows int64 [N, T + 1].

    Args:
        decoder: The model.
        widths: Of all layers, or of each.
        ids: The rows.
        module: What to call in the place of the model: the same, wrapped by a trainer.
    """
    device = next(decoder.module.parameters()).device
    with decoder.at(widths):
        parts = torch.split(ids.to(device), 16)
        total = sum(float(next_token_loss(module or decoder.module, part)) for part in parts)
    return total / ids[:, 1:].numel()
