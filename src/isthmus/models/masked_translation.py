"""A conditional masked language model: the decoder sees both sides of what it fills in.

The network of mask-predict (Ghazvininejad et al. 2019, 1904.09324): an encoder-decoder whose
decoder has no causal mask, and a head that says how long the target will be, since all of it is
written at once.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from isthmus.models.encoder_decoder import Config, EncoderDecoder, Memory


class MaskedTranslation(EncoderDecoder):
    """An encoder-decoder that fills in masked targets of known length.

    Args:
        config: Of the network without the mask, which becomes one more token, the last one.

    Attributes:
        mask_token: The mask; it is read and never right.
        length: Head of the target's length, from the mean of the encoder's states.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(replace(config, vocab_size=config.vocab_size + 1))
        self.mask_token = config.vocab_size
        self.decoder.decoder = False  # nothing is hidden from a place but what is masked
        self.length = nn.Linear(config.hidden_size, config.max_length + 1)

    def lengths(self, memory: Memory) -> torch.Tensor:
        """Logits of the target's length in tokens, [B, max_length + 1]."""
        mask = memory.mask[..., None].to(memory.states.dtype)
        mean = (memory.states * mask).sum(1) / mask.sum(1).clamp(min=1)
        found: torch.Tensor = self.length(mean)
        return found

    def fill(
        self, target: torch.Tensor, memory: Memory, where: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits of what stands at each place.

        Args:
            target: Targets, some of whose places are masked, padded; int64 [B, T].
            memory: The encoded source.
            where: Places whose logits are wanted, bool [B, T]; all when None.

        Returns:
            [B, T, V + 1], or [N, V + 1] of the N chosen places in order.
        """
        states = self.decoder(self.embed(target), target != self.config.pad_id, memory)
        logits: torch.Tensor = self.head(states if where is None else states[where])
        return logits

    def forward(  # type: ignore[override]
        self, source: torch.Tensor, target: torch.Tensor, where: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of masked places given the source, and of the length; see :meth:`fill`."""
        memory = self.encode(source)
        return self.fill(target, memory, where), self.lengths(memory)
