"""A masked diffusion language model: a bidirectional transformer that fills in masked tokens.

The absorbing kind (MDLM, Sahoo et al. 2024, 2406.07524): noise replaces tokens by a mask, and the
model learns to say what stood there. With masking rate s the loss on masked places is weighted by
1/s, which makes its mean over s a bound on the negative log-likelihood.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from isthmus.errors import InvalidInputError
from isthmus.nn.decoder import DecoderLayer, LayerSizes

LEAST_RATE = 0.05
"""Smallest masking rate of a training text; smaller ones weigh a few tokens beyond measure."""


class MaskedDiffusion(nn.Module):
    """Layers without a causal mask over V tokens and a mask, with tied embeddings.

    Args:
        vocab_size: Tokens V, the mask not counted.
        sizes: Widths and heads of a layer.
        num_layers: Layers.

    Attributes:
        mask_token: The mask, V; it is read and never predicted.

    Raises:
        InvalidInputError: There is no token or no layer.
    """

    def __init__(self, vocab_size: int, sizes: LayerSizes, num_layers: int) -> None:
        super().__init__()
        if vocab_size < 1 or num_layers < 1:
            raise InvalidInputError(
                f"a diffusion model needs tokens and layers, got {vocab_size} and {num_layers}"
            )
        self.vocab_size, self.mask_token = vocab_size, vocab_size
        self.embedding = nn.Embedding(vocab_size + 1, sizes.hidden_size)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.layers = nn.ModuleList(DecoderLayer(sizes) for _ in range(num_layers))
        self.norm = nn.RMSNorm(sizes.hidden_size, sizes.rms_norm_eps)

    def forward(
        self, ids: torch.Tensor, valid: torch.Tensor | None = None, *, causal: bool = False
    ) -> torch.Tensor:
        """Logits of what stands at each place (causal: of what follows it).

        Args:
            ids: Tokens and masks, int64 [B, N].
            valid: Places that are no padding, bool [B, N]; all of them when None.
            causal: See earlier places only: an autoregressive model of the same size.

        Returns:
            [B, N, V].
        """
        n = ids.shape[1]
        seen = torch.ones(1, n, n, dtype=torch.bool, device=ids.device)
        if causal:
            seen = seen.tril()
        if valid is not None:
            # padding sees itself, so that no row is empty
            own = torch.eye(n, dtype=torch.bool, device=ids.device)
            seen = (seen & valid[:, None, :]) | own
        x = self.embedding(ids)
        mask = torch.zeros(seen.shape, dtype=x.dtype, device=ids.device)
        mask.masked_fill_(~seen, torch.finfo(x.dtype).min)
        positions = torch.arange(n, device=ids.device)[None]
        for layer in self.layers:
            x = layer(x, positions, mask[:, None])
        return F.linear(self.norm(x), self.embedding.weight[: self.vocab_size])

    def loss(
        self, ids: torch.Tensor, free: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        """Diffusion loss in nats per token, a scalar.

        Args:
            ids: Texts, int64 [B, T].
            free: Places that noise may mask, bool [B, T]; the others are clamped to the text.
            generator: Source of the noise.
        """
        b = len(ids)
        # evenly spread rates: the same law for each text, less noise in their mean
        u = torch.rand(1, generator=generator, device=ids.device)
        rate = (u + torch.arange(b, device=ids.device) / b) % 1.0
        rate = rate[torch.randperm(b, generator=generator, device=ids.device)]
        rate = LEAST_RATE + (1 - LEAST_RATE) * rate[:, None]
        draw = torch.rand(ids.shape, generator=generator, device=ids.device)
        masked = (draw < rate) & free
        logits = self(torch.where(masked, self.mask_token, ids))
        nats = F.cross_entropy(logits.transpose(1, 2), ids, reduction="none")  # [B, T]
        weight = masked / rate / free.sum(1, keepdim=True).clamp(min=1)
        return (nats * weight).sum() / b
