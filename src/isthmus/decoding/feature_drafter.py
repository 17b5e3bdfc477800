"""Drafting on features: what EAGLE and the drafters after it share.

A *row* of the small layer takes a token and the feature one place behind it and gives the next
feature, from which a head reads the law of the token after::

    verified   [x_2; f_1] [x_3; f_2] ... [x_{t+1}; f_t] ──layer──> g_{t+1} ──head──> q(x_{t+2})
                 true features, cached for good                      │
    drafted                                 [x_{t+2}; g_{t+1}] ──layer──> g_{t+2} ──> q(x_{t+3})
                                              own features, forgotten before the next round

There are two such layers: :class:`FusedLayer` imitates the last hidden state of the target and
borrows its head; :class:`TapLayer` (EAGLE-3) reads three of its layers and has a head of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from isthmus.decoding.builders import Level
from isthmus.decoding.draft_cache import DraftCache
from isthmus.decoding.target import HubTarget
from isthmus.decoding.trained import Batch, Fresh, TrainedDrafter
from isthmus.errors import InvalidInputError
from isthmus.nn.decoder import Attention, DecoderLayer, GatedFeedForward, LayerSizes, Store
from isthmus.nn.masks import additive, rollout_mask
from isthmus.objectives.distillation import shifted
from isthmus.roles import Context, Features, Taps


class FusedLayer(nn.Module):
    """EAGLE's layer: ``fc [E x; f]`` into a decoder layer without input norm (2401.15077, fig. 6).

    Args:
        sizes: Sizes of the target's layers.
        feed_forward: Another feed-forward; SwiGLU when None.
    """

    def __init__(self, sizes: LayerSizes, feed_forward: nn.Module | None = None) -> None:
        super().__init__()
        self.fc = nn.Linear(2 * sizes.hidden_size, sizes.hidden_size, bias=False)
        self.layer = DecoderLayer(sizes, input_norm=False, feed_forward=feed_forward)

    def condense(self, features: Features) -> torch.Tensor:
        """``f``, the last hidden states as they are [B, N, D]."""
        assert features.final is not None
        return features.final

    def forward(
        self,
        embedded: torch.Tensor,
        feature: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor | None = None,
        store: Store | None = None,
    ) -> torch.Tensor:
        """Next features from tokens and features, both [B, N, D]; see :class:`Attention`."""
        out: torch.Tensor = self.layer(
            self.fc(torch.cat([embedded, feature], -1)), positions, mask, store
        )
        return out


class TapLayer(nn.Module):
    """EAGLE-3's layer: three tapped states condensed, a head of its own (2503.01840, sec. 3.1).

    Args:
        sizes: Sizes of the target's layers.
        layers: Decoder layers whose incoming states are read: low, middle, high.
        head: The target's head, which the drafter's own starts from.

    Raises:
        InvalidInputError: A layer is named twice, or there are not three.
    """

    def __init__(self, sizes: LayerSizes, layers: tuple[int, ...], head: nn.Module) -> None:
        super().__init__()
        if len(set(layers)) != 3:
            raise InvalidInputError(f"three different layers are tapped, got {list(layers)}")
        width = sizes.hidden_size
        self.layers = tuple(layers)
        self.fc = nn.Linear(3 * width, width, bias=False)
        self.input_layernorm = nn.RMSNorm(width, sizes.rms_norm_eps)
        self.hidden_norm = nn.RMSNorm(width, sizes.rms_norm_eps)
        self.self_attn = Attention(sizes, input_size=2 * width)
        self.post_attention_layernorm = nn.RMSNorm(width, sizes.rms_norm_eps)
        self.mlp = GatedFeedForward(width, sizes.intermediate_size)
        self.norm = nn.RMSNorm(width, sizes.rms_norm_eps)
        weight: Any = head.weight
        self.lm_head = nn.Linear(width, len(weight), bias=False)
        self.lm_head.weight.data.copy_(weight.detach())

    def condense(self, features: Features) -> torch.Tensor:
        """``fc [low; middle; high]`` [B, N, D]."""
        out: torch.Tensor = self.fc(torch.cat([features.layers[i] for i in self.layers], -1))
        return out

    def forward(
        self,
        embedded: torch.Tensor,
        feature: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor | None = None,
        store: Store | None = None,
    ) -> torch.Tensor:
        """Next features, before the norm of the head, from tokens and features [B, N, D]."""
        both = torch.cat([self.input_layernorm(embedded), self.hidden_norm(feature)], -1)
        x = feature + self.self_attn(both, positions, mask, store)
        out: torch.Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


def tap_layers(layers: int) -> tuple[int, int, int]:
    """The usual three of L decoder layers, or an even spread where those fall together.

    Example:
        >>> tap_layers(32), tap_layers(6)
        ((2, 16, 29), (1, 3, 5))
    """
    usual = (2, layers // 2, layers - 3)
    return usual if usual[0] < usual[1] < usual[2] else (layers // 6, layers // 2, layers - 1)


class FeatureDrafter(TrainedDrafter):
    """Base of drafters whose own layer goes from feature to feature.

    A subclass makes ``body`` (or overrides :meth:`step` and :meth:`logits`) and the loss.

    Args:
        target: The target.
        settings: The system's settings.

    Attributes:
        token_ahead: Rows take the token one place ahead of their feature; off, the token at the
            feature's own place.
        states: Features that a row predicts, side by side in what :meth:`step` returns.
        feature: ``f_t``, the target's own feature at the last verified token, [B, D].
    """

    body: Any
    token_ahead = True
    states = 1

    def __init__(self, target: HubTarget, settings: Any = None) -> None:
        super().__init__(target, settings)
        self._cache: DraftCache | None = None
        self.feature = torch.empty(0)
        self._last = self._g = torch.empty(0)  # next features of the root's and newest rows
        self._tokens = torch.empty(0, dtype=torch.int64)  # tokens of the newest level

    def step(
        self,
        tokens: torch.Tensor,
        feature: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor | None = None,
        store: Store | None = None,
    ) -> torch.Tensor:
        """Next features of rows with tokens [B, N] and features [B, N, D]."""
        out: torch.Tensor = self.body(self.embed(tokens), feature, positions, mask, store)
        return out

    def logits(self, g: torch.Tensor) -> torch.Tensor:
        """Logits [..., V] that predicted features are read as."""
        if isinstance(self.body, TapLayer):
            out: torch.Tensor = self.body.lm_head(self.body.norm(g))
            return out
        return self.head(g)

    def rollout(self, batch: Batch, feature: torch.Tensor, steps: int) -> list[torch.Tensor]:
        """Draft from every place of a text at once, as drafting will do it, given the true tokens.

        Args:
            batch: The texts.
            feature: True features of the first step [B, T, D].
            steps: Draft steps K; step 1 is plain teacher forcing.

        Returns:
            Of each step k, next features [B, T, ...]; row i imitates ``f_{i+k}``.
        """
        anchor = torch.arange(feature.shape[1], device=feature.device)
        zero, rows, outs = torch.zeros_like(anchor), _Rows(), []
        for k in range(steps):
            mask = None
            if k:  # keys: all rows so far; a query sees real ones and its own draft
                depths = torch.cat([zero + j for j in range(k + 1)])
                seen = rollout_mask(anchor, zero + k, anchor.repeat(k + 1), depths)
                mask = additive(seen, feature.dtype)
            tokens = shifted(batch.ids, k + int(self.token_ahead))
            outs.append(self.step(tokens, feature, (anchor + k)[None], mask, rows))
            feature = outs[-1]
        return outs

    def known(self, context: Context) -> torch.Tensor:
        """All that is known before drafting, ``[f_t; E x_{t+1}]`` [B, 2D]."""
        roots = context.roots().to(self.target.device)
        return torch.cat([self.feature, self.embed(roots)], -1)

    def law_of_first(self) -> torch.Tensor:
        """The drafter's law of the token after the root [B, V], which costs no step."""
        return torch.softmax(self.logits(self._last)[:, 0].float(), -1)

    def reset(self, batch: int) -> None:
        """An empty cache."""
        device, dtype = self.target.device, self.target.state_dtype
        self._cache = DraftCache(self.sizes, 1, batch, dtype, device)
        self.feature = torch.zeros(batch, self.sizes.hidden_size, device=device, dtype=dtype)
        self._last = self.feature[:, None].repeat(1, 1, self.states)

    def absorb(self, fresh: Fresh) -> None:
        """Run the layer over verified tokens with their true features."""
        assert self._cache is not None
        positions, mask = self._cache.append(fresh.valid)
        tokens = fresh.following if self.token_ahead else fresh.tokens
        feature = self.body.condense(fresh.features)
        g = self.step(tokens, feature, positions, mask, self._cache.store(0))
        self._cache.commit(fresh.valid)
        some = fresh.valid.any(1)[:, None]
        self.feature = torch.where(some, fresh.at_last(feature), self.feature)
        self._last = torch.where(some[..., None], fresh.at_last(g)[:, None], self._last)

    def expand(self, level: Level) -> torch.Tensor:
        """Feed the level's tokens beside the features that were predicted for them."""
        if level.depth == 0:
            assert self._cache is not None
            self._cache.drop()
            self._g, self._tokens = self._last, level.tokens
        else:
            self._g = self.descend(level)
        return self.logits(self._g)

    def descend(self, level: Level) -> torch.Tensor:
        """Next features [B, F, D] below the nodes of a drafted level."""
        assert self._cache is not None
        g = of_parents(self._g, level.parent)
        behind = self._tokens.gather(1, level.parent)
        tokens = level.tokens if self.token_ahead else behind
        self._tokens = level.tokens
        positions, mask = self._cache.branch(level.parent)
        return self.step(tokens, g, positions, mask, self._cache.store(0))

    def select_state(self, rows: torch.Tensor) -> None:
        """Keep the given rows."""
        assert self._cache is not None
        self._cache.select(rows.tolist())
        self.feature, self._last = self.feature[rows], self._last[rows]


def tapped(layers: tuple[int, ...]) -> Taps:
    """What a drafter of the EAGLE-3 kind taps; the last hidden state where no layers are named."""
    return Taps(layers=layers) if layers else Taps(final=True)


def of_parents(x: torch.Tensor, parent: torch.Tensor) -> torch.Tensor:
    """Rows of x [B, F, D] that belong to the parents [B, G], [B, G, D]."""
    return x.gather(1, parent[..., None].expand(-1, -1, x.shape[-1]))


def weights_read(target: HubTarget) -> int:
    """Weights that a forward of the target reads; of a table of embeddings it reads one row."""
    model: Any = target.model
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    whole = sum(p.numel() for p in model.parameters())
    return int(whole - (0 if table is head else table.numel()))


def relative_cost(drafter: TrainedDrafter) -> float:
    """Weights that a drafter's pass reads, over those of a target forward.

    A drafter without a head of its own reads the target's.
    """
    head = drafter.target.model.get_output_embeddings().weight
    borrows = not any("lm_head" in name for name, _ in drafter.named_parameters())
    own = sum(p.numel() for p in drafter.parameters()) + (head.numel() if borrows else 0)
    return float(own / weights_read(drafter.target))


@contextmanager
def counted(module: nn.Module) -> Iterator[list[int]]:
    """Note every call of a module; the length of what is yielded is their number."""
    calls: list[int] = []

    def note(*given: Any) -> None:
        calls.append(1)

    handle = module.register_forward_hook(note)
    try:
        yield calls
    finally:
        handle.remove()


class _Rows:
    """A store that keeps gradients: keys and values of one rollout."""

    def __init__(self) -> None:
        self._past: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Join them to what came before."""
        if self._past is not None:
            key_states = torch.cat([self._past[0], key_states], 2)
            value_states = torch.cat([self._past[1], value_states], 2)
        self._past = key_states, value_states
        return self._past
