"""A decoder in two parts: shallow layers that answer now, deep layers that may catch up later.

Every layer keeps its own cache, so the deep layers of several tokens can be run together after
their shallow ones were::

    tokens ──embed──> shallow(...) ──states──┬──head──> an early answer
                                             └──deep(stack of states)──head──> the full answer

For encoder-decoders whose decoder layers stand in a row and hand on one hidden state (BART and its
kin). That the parts equal the whole is verified when the split is made.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from isthmus.errors import InvalidInputError, UnsupportedModelError
from isthmus.models.hub import cache_argument


class SplitDecoder:
    """One model cut after a decoder layer.

    Args:
        model: An encoder-decoder of transformers in eval mode.
        exit_layer: Layers of the shallow part, at least 1 and fewer than all.

    Attributes:
        exit_layer: As given.
        num_layers: Decoder layers L.
        norms_first: Whether a layer norms what it reads (mBART) and not what it writes (BART).

    Raises:
        InvalidInputError: ``exit_layer`` leaves one part empty.
        UnsupportedModelError: The parts do not give what the whole model gives.
    """

    def __init__(self, model: Any, exit_layer: int) -> None:
        self.model = model
        if not bool(model.config.is_encoder_decoder) or model.main_input_name != "input_ids":
            raise UnsupportedModelError(
                f"{type(model).__name__} has no encoder that reads tokens; the split decoder is "
                "for encoder-decoders of text"
            )
        self.decoder = model.get_decoder()
        self.layers: Any = getattr(self.decoder, "layers", None)
        if self.layers is None or not hasattr(self.decoder, "embed_positions"):
            raise UnsupportedModelError(
                f"the decoder of {type(model).__name__} is not built like BART's, so it cannot be "
                "split"
            )
        self.num_layers = len(self.layers)
        if not 1 <= exit_layer < self.num_layers:
            raise InvalidInputError(
                f"the exit must stand after layer 1 to {self.num_layers - 1}, not {exit_layer}"
            )
        self.exit_layer = exit_layer
        # only networks that norm before each part need one more norm behind the last layer
        self.norms_first = getattr(self.decoder, "layer_norm", None) is not None
        self._verify()

    def session(self, source: torch.Tensor) -> SplitSession:
        """Read one source, int64 [T], and open a session on it."""
        return SplitSession(self, source)

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [B, N, V] of states [B, N, D] from either part: one norm and head for both."""
        norm = getattr(self.decoder, "layer_norm", None)
        logits: torch.Tensor = self.model.get_output_embeddings()(
            hidden if norm is None else norm(hidden)
        )
        bias = getattr(self.model, "final_logits_bias", None)
        return logits if bias is None else logits + bias

    def embed(self, tokens: torch.Tensor, start: int) -> torch.Tensor:
        """What enters the first layer: tokens [1, N] at the places from ``start`` on."""
        places = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        x = self.decoder.embed_tokens(tokens)
        x = x + self.decoder.embed_positions(tokens, start, position_ids=places)
        norm = getattr(self.decoder, "layernorm_embedding", None)
        out: torch.Tensor = x if norm is None else norm(x)
        return out

    @torch.no_grad()
    def _verify(self) -> None:
        device = next(self.model.parameters()).device
        generator = torch.Generator().manual_seed(0)
        size = self.model.config.vocab_size
        source = torch.randint(3, size, (5,), generator=generator).to(device)
        tokens = torch.randint(3, size, (1, 6), generator=generator).to(device)
        want = self.model(input_ids=source[None], decoder_input_ids=tokens, use_cache=False).logits
        try:
            session = self.session(source)
            first = session.shallow(tokens[:, :4])
            rest = [session.shallow(tokens[:, i : i + 1]) for i in (4, 5)]
            session.deep(first)
            got = self.head(session.deep(torch.cat(rest, 1)))
        except (AttributeError, TypeError, RuntimeError) as error:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} cannot be split into two parts ({error})"
            ) from error
        spread = float(want.max() - want.min()) or 1.0
        if float((got - want[:, 4:]).abs().max()) > 1e-3 * spread:
            raise UnsupportedModelError(
                f"the two parts of {type(self.model).__name__} do not give what the whole gives"
            )


class SplitSession:
    """One answer in the making; layers may know different numbers of its tokens.

    Args:
        split: The model.
        source: int64 [T].
    """

    def __init__(self, split: SplitDecoder, source: torch.Tensor) -> None:
        self.split = split
        self.states = split.model.get_encoder()(source[None]).last_hidden_state
        self.cache: Any = EncoderDecoderCache(DynamicCache(), DynamicCache())
        self.layer_calls = 0
        self.layer_tokens = 0

    def length(self, layer: int) -> int:
        """Tokens that a layer knows."""
        layers = self.cache.self_attention_cache.layers
        if layer >= len(layers) or layers[layer].keys is None:
            return 0
        return int(layers[layer].keys.shape[2])

    def shallow(self, tokens: torch.Tensor) -> torch.Tensor:
        """Run tokens [1, N] through the shallow layers; states [1, N, D]."""
        return self._run(self.split.embed(tokens, self.length(0)), range(self.split.exit_layer))

    def deep(self, hidden: torch.Tensor) -> torch.Tensor:
        """Run states [1, N, D] that left the shallow part through the deep layers, together."""
        return self._run(hidden, range(self.split.exit_layer, self.split.num_layers))

    def copy_up(self, hidden: torch.Tensor) -> None:
        """Give the deep layers keys of the shallow states [1, N, D] instead of computing theirs."""
        for index in range(self.split.exit_layer, self.split.num_layers):
            layer = self.split.layers[index]
            attention = layer.self_attn
            shape = (*hidden.shape[:2], -1, attention.head_dim)
            read = layer.self_attn_layer_norm(hidden) if self.split.norms_first else hidden
            keys = attention.k_proj(read).view(shape).transpose(1, 2)
            values = attention.v_proj(read).view(shape).transpose(1, 2)
            self.cache.self_attention_cache.update(keys, values, index)

    def truncate(self, length: int) -> None:
        """Let every layer forget tokens beyond the first ``length``."""
        for layer in self.cache.self_attention_cache.layers:
            if layer.keys is not None and layer.keys.shape[2] > length:
                layer.keys = layer.keys[:, :, :length]
                layer.values = layer.values[:, :, :length]

    def _run(self, hidden: torch.Tensor, indices: range) -> torch.Tensor:
        n, past = hidden.shape[1], self.length(indices[0])
        mask = None
        if n > 1:  # causal among themselves, behind everything that is cached
            seen = torch.ones(n, past + n, dtype=torch.bool, device=hidden.device).tril(past)
            mask = torch.zeros(seen.shape, dtype=hidden.dtype, device=hidden.device)
            mask = mask.masked_fill(~seen, torch.finfo(hidden.dtype).min)[None, None]
        for index in indices:
            layer = self.split.layers[index]
            cache = {cache_argument(layer): self.cache}
            hidden = layer(hidden, mask, self.states, use_cache=True, **cache)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        self.layer_calls += len(indices)
        self.layer_tokens += len(indices) * n
        return hidden
