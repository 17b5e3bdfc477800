"""A two-pass decoder that is told where to look: content makes the memory, places ask it.

::

    what   [class, x_1, x_2 ..]  --- causal layers --- norm --- K, V      any order of places
                                                                |
    where  [place, place ..]     --- layers that read K, V -----+---> logits of each place

A query is one learned embedding, turned by the place that it asks for; queries do not see one
another. So any number of places can be asked for at once, in any order, and both passes can be
cached (ARPG, Li et al. 2025, 2503.10568).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import nn

from isthmus.errors import InvalidInputError
from isthmus.nn.decoder import DecoderLayer, GatedFeedForward, LayerSizes, Store, rotate


class Reader(nn.Module):
    """A layer whose queries read keys and values that are given, and not one another.

    Args:
        sizes: Widths and heads.
    """

    def __init__(self, sizes: LayerSizes) -> None:
        super().__init__()
        self.sizes = sizes
        width = sizes.num_attention_heads * sizes.head_dim
        self.input_layernorm = nn.RMSNorm(sizes.hidden_size, sizes.rms_norm_eps)
        self.q_proj = nn.Linear(sizes.hidden_size, width, bias=False)
        self.o_proj = nn.Linear(width, sizes.hidden_size, bias=False)
        self.post_attention_layernorm = nn.RMSNorm(sizes.hidden_size, sizes.rms_norm_eps)
        self.mlp = GatedFeedForward(sizes.hidden_size, sizes.intermediate_size)

    def forward(
        self,
        x: torch.Tensor,
        where: torch.Tensor,
        memory: tuple[torch.Tensor, torch.Tensor],
        causal: bool,
    ) -> torch.Tensor:
        """Map x [B, N, D] to [B, N, D].

        Args:
            x: One row for each query.
            where: Coordinates that are asked for, int64 [B, N, 2].
            memory: Keys and values [B, H, S, d].
            causal: Query i reads the first i + 1 only.
        """
        q = self.q_proj(self.input_layernorm(x))
        q = q.view(*x.shape[:2], -1, self.sizes.head_dim).transpose(1, 2)
        q = rotate(q, where, self.sizes.rope_theta)
        out = F.scaled_dot_product_attention(q, *memory, is_causal=causal)
        x = x + self.o_proj(out.transpose(1, 2).flatten(2))
        added: torch.Tensor = self.mlp(self.post_attention_layernorm(x))
        return x + added


class GuidedDecoder(nn.Module, PyTorchModelHubMixin):
    """Content layers, one projection to keys and values, and reading layers.

    Args:
        vocab_size: Image tokens V.
        classes: Classes C; class C means none, for guidance.
        width: Tokens in a row of the grid.
        hidden_size: Width D.
        num_layers: Layers L, half of them in each pass.
        num_heads: Heads; D is divided among them, by four channels or a multiple.
        intermediate_size: Width inside the feed-forward.
        rope_theta: Base of the rotary places.

    Raises:
        InvalidInputError: The layers cannot be halved, or a head cannot be halved twice.
    """

    def __init__(
        self,
        vocab_size: int,
        classes: int,
        width: int,
        hidden_size: int,
        num_layers: int,
        num_heads: int,
        intermediate_size: int,
        rope_theta: float = 10_000.0,
    ) -> None:
        super().__init__()
        if num_layers < 2 or num_layers % 2 or hidden_size % (4 * num_heads):
            raise InvalidInputError(
                "a guided decoder needs an even number of layers and heads of a multiple of 4 "
                f"channels, got {num_layers} layers and {hidden_size} / {num_heads} channels"
            )
        self.vocab_size, self.classes, self.width = vocab_size, classes, width
        head_dim = hidden_size // num_heads
        self.sizes = sizes = LayerSizes(
            hidden_size, num_heads, num_heads, head_dim, intermediate_size, rope_theta=rope_theta
        )
        self.embedding = nn.Embedding(vocab_size + classes + 1, hidden_size)
        self.query = nn.Parameter(torch.empty(hidden_size))
        half = range(num_layers // 2)
        self.content = nn.ModuleDict({"layers": nn.ModuleList(DecoderLayer(sizes) for _ in half)})
        self.memory_norm = nn.RMSNorm(hidden_size, sizes.rms_norm_eps)
        self.k_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.v_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.reading = nn.ModuleDict({"layers": nn.ModuleList(Reader(sizes) for _ in half)})
        self.norm = nn.RMSNorm(hidden_size, sizes.rms_norm_eps)
        self.head = nn.Linear(hidden_size, vocab_size, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.query, std=0.02)
        nn.init.zeros_(self.head.weight)

    @property
    def num_stores(self) -> int:
        """Stores that a cached run needs: one for each content layer and one for the memory."""
        return len(self._layers(self.content)) + 1

    @staticmethod
    def _layers(stack: Any) -> Any:
        return stack["layers"]

    def class_token(self, classes: torch.Tensor) -> torch.Tensor:
        """Token of each class, and of no class; int64 like the classes."""
        return self.vocab_size + classes

    def where(self, places: torch.Tensor) -> torch.Tensor:
        """Row and column [B, N, 2] of places [B, N]; the class, at place -1, is not turned."""
        at = places.clamp(min=0)
        return torch.stack([at // self.width, at % self.width], -1)

    def remember(
        self,
        tokens: torch.Tensor,
        places: torch.Tensor,
        stores: Sequence[Store] | None = None,
        mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Pass one: content becomes keys and values.

        Args:
            tokens: int64 [B, N].
            places: Their own places, int64 [B, N].
            stores: The past, :attr:`num_stores` of them; none where the tokens are all there is.
            mask: Additive [B or 1, 1, N, S + N]; causal over the tokens when None.

        Returns:
            The memory [B, H, S + N, d], keys turned by their places and values.
        """
        x, where = self.embedding(tokens), self.where(places)
        layers = self._layers(self.content)
        for i, layer in enumerate(layers):
            x = layer(x, where, mask, None if stores is None else stores[i])
        x = self.memory_norm(x)
        split = (*tokens.shape, -1, self.sizes.head_dim)
        k, v = (proj(x).view(split).transpose(1, 2) for proj in (self.k_proj, self.v_proj))
        k = rotate(k, where, self.sizes.rope_theta)  # once: what is stored is turned already
        return (k, v) if stores is None else stores[-1].update(k, v)

    def ask(
        self,
        places: torch.Tensor,
        memory: tuple[torch.Tensor, torch.Tensor],
        *,
        causal: bool = False,
    ) -> torch.Tensor:
        """Pass two: what stands at some places.

        Args:
            places: int64 [B, N].
            memory: Result of :meth:`remember`.
            causal: Query i reads the first i + 1 of the memory only.

        Returns:
            Logits [B, N, V].
        """
        x, where = self.query.expand(*places.shape, -1), self.where(places)
        for layer in self._layers(self.reading):
            x = layer(x, where, memory, causal)
        out: torch.Tensor = self.head(self.norm(x))
        return out

    def forward(
        self, tokens: torch.Tensor, classes: torch.Tensor, order: torch.Tensor
    ) -> torch.Tensor:
        """Logits of every place, each given the class and the tokens before it in an order.

        Args:
            tokens: In raster order, int64 [B, n].
            classes: int64 [B].
            order: A permutation of the places for each image, int64 [B, n].

        Returns:
            [B, n, V], in the given order.
        """
        shown = torch.cat([self.class_token(classes)[:, None], tokens.gather(1, order)[:, :-1]], 1)
        own = torch.cat([torch.full_like(order[:, :1], -1), order[:, :-1]], 1)
        return self.ask(order, self.remember(shown, own), causal=True)
