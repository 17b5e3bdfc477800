"""Byte models on two scales: a large transformer over patches, a small one inside each patch.

A text of T bytes is cut into K patches of P bytes (Yu et al. 2023, "MEGABYTE", section 2)::

    bytes    x0 x1 x2 x3 | x4 x5 x6 x7 | x8 ...         P = 4
    global   (pad patch)   x0 x1 x2 x3   x4 x5 x6 x7      one place a patch, shifted by one patch
               |             |             |
    local    (pad) x0 x1 x2 (pad) x4 x5 x6 (pad) x8 ...   shifted by one byte inside its patch
    predicts x0 x1 x2 x3 | x4 x5 x6 x7 | x8 ...

So the global state of patch k knows the patches before it only, and the local place (k, p) the
bytes before it only. With P = 1 and no local layers this is a plain byte transformer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from isthmus.errors import InvalidInputError
from isthmus.nn.decoder import DecoderLayer, LayerSizes, Store
from isthmus.nn.feed_forward import FeedForward
from isthmus.nn.masks import additive


@dataclass(frozen=True)
class PatchSizes:
    """Sizes of a byte model on two scales.

    Attributes:
        patch_size: Bytes of a patch, P.
        byte_size: Width of a byte in the global model, D_G; that model is P D_G wide.
        global_layers: Its layers.
        global_heads: Its heads.
        local_size: Width of the local model, D_L.
        local_layers: Its layers.
        local_heads: Its heads.
        max_length: Bytes of a text at most, T; a multiple of P.
        rotary: Rotary positions in both models, instead of a learned position of each byte.
        kernels: Widths of causal convolutions over the bytes before they are cut into patches
            (section 2.3); the paper's are 3, 5 and 7, none are used by default.
        overlap: Last keys of the patch before that the local model sees too, r (section 2.3).
        global_model: Whether patches see each other; off, each is written from itself alone.
        vocab_size: 256 bytes and what else there is.

    Raises:
        InvalidInputError: Sizes that do not go together.
    """

    patch_size: int = 8
    byte_size: int = 256
    global_layers: int = 24
    global_heads: int = 32
    local_size: int = 1024
    local_layers: int = 24
    local_heads: int = 16
    max_length: int = 8192
    rotary: bool = False
    kernels: tuple[int, ...] = ()
    overlap: int = 0
    global_model: bool = True
    vocab_size: int = 258

    def __post_init__(self) -> None:
        if min(self.patch_size, self.byte_size, self.local_size, self.max_length) < 1:
            raise InvalidInputError("patch_size, the widths and max_length must be at least 1")
        if self.max_length % self.patch_size:
            raise InvalidInputError(
                f"max_length must be a multiple of patch_size, got {self.max_length} and "
                f"{self.patch_size}"
            )
        if not 0 <= self.overlap <= self.patch_size:
            raise InvalidInputError(
                f"overlap must lie between 0 and patch_size ({self.patch_size}), got {self.overlap}"
            )
        for name, width, heads in (
            ("global", self.global_size, self.global_heads),
            ("local", self.local_size, self.local_heads),
        ):
            if heads < 1 or width % heads or (width // heads) % 2:
                raise InvalidInputError(
                    f"the {name} model is {width} wide, which {heads} heads do not divide into "
                    "even parts; choose another number of heads"
                )

    @property
    def global_size(self) -> int:
        """Width of the global model, P D_G."""
        return self.patch_size * self.byte_size

    def flops(self, length: int) -> float:
        """FLOPs a byte of a forward over a text, in closed form; training takes three times that.

        Layers of width D have 12 D^2 weights, each of which is a multiplication and an addition;
        attention to n keys is two products of 2 n D. The global model runs once for P bytes, so
        its share of a byte falls with P (section 3)::

            [2 m_G + 4 K W L_G] / P  +  2 m_L + 4 (P + r) D_L L_L

        Args:
            length: Bytes of the text, T.

        Example:
            >>> flat = PatchSizes(1, 4, 1, 1, 4, 0, 1, max_length=8, vocab_size=10)
            >>> flat.flops(8) == 2 * 12 * 16 + 4 * 8 * 4 + 2 * 16 + 2 * 40
            True
        """
        p, wide, narrow = self.patch_size, self.global_size, self.local_size
        patches = -(-length // p)
        across = self.global_layers * (24 * wide**2 + 4 * patches * wide) if patches else 0
        inside = self.local_layers * (24 * narrow**2 + 4 * (p + self.overlap) * narrow)
        convolved = sum(2 * k * self.byte_size**2 for k in self.kernels)
        ends = 2 * self.byte_size * narrow + 2 * narrow * self.vocab_size
        if not self.global_model:
            across, convolved = 0, 0
        padded = patches * p / length
        return padded * (across / p + convolved + inside + ends)


class BytePatches(nn.Module):
    """The network.

    Args:
        sizes: See :class:`PatchSizes`.

    Example:
        >>> network = BytePatches(PatchSizes(4, 4, 1, 2, 8, 1, 2, max_length=16))
        >>> network(torch.zeros(1, 10, dtype=torch.int64)).shape
        torch.Size([1, 10, 258])
    """

    def __init__(self, sizes: PatchSizes) -> None:
        super().__init__()
        self.sizes = sizes
        p, d, narrow = sizes.patch_size, sizes.byte_size, sizes.local_size
        self.byte_embedding = nn.Embedding(sizes.vocab_size, d)
        self.byte_positions = None if sizes.rotary else nn.Embedding(sizes.max_length, d)
        self.convolutions = nn.ModuleList(nn.Conv1d(d, d, k) for k in sizes.kernels)
        self.global_pad = nn.Parameter(torch.zeros(p * d))
        self.global_layers = _stack(sizes.global_layers, sizes.global_size, sizes.global_heads)
        self.global_norm = nn.RMSNorm(sizes.global_size, 1e-6)
        self.to_local = nn.Linear(d, narrow)
        self.local_embedding = nn.Embedding(sizes.vocab_size, narrow)
        self.local_pad = nn.Parameter(torch.zeros(narrow))
        self.local_layers = _stack(sizes.local_layers, narrow, sizes.local_heads)
        self.local_norm = nn.RMSNorm(narrow, 1e-6)
        self.head = nn.Linear(narrow, sizes.vocab_size, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Law of every byte given those before it.

        Args:
            ids: int64 [B, T]; T need not be a multiple of P, what fills the last patch up is
                seen by no byte of the text.

        Returns:
            Logits [B, T, V]; those at place t are of byte t and do not depend on it.

        Raises:
            InvalidInputError: The text is longer than ``max_length``, or empty.
        """
        (batch, length), p = ids.shape, self.sizes.patch_size
        if not 0 < length <= self.sizes.max_length:
            raise InvalidInputError(
                f"texts of 1 to {self.sizes.max_length} bytes are read at once, got {length}"
            )
        ids = F.pad(ids, (0, -length % p))
        place = torch.arange(ids.shape[1], device=ids.device)
        first = self.global_pad.expand(batch, 1, -1)
        # patch k is told of patches 0 .. k - 1: a pad in front, the last one dropped
        patches = torch.cat(
            [first, self.embed(ids[:, :-p], place[None, :-p], len(place) // p - 1)], 1
        )
        told = self.across(patches, place[None, : len(place) // p])
        x = self.local_inputs(told.flatten(1, 2), F.pad(ids[:, :-1], (1, 0)), place[None])
        x = x.reshape(-1, p, x.shape[-1])  # [B K, P, D_L]
        rows = place.view(-1, p).repeat(batch, 1)
        store, mask = None, None
        if self.sizes.overlap:
            store = _Overlap(batch, self.sizes.overlap)
            mask = store.mask(p, len(place) // p, x)
        logits = self.inside(x, rows, mask, [store] * len(self.local_layers))
        return logits.view(batch, len(place), -1)[:, :length]

    def embed(self, ids: torch.Tensor, place: torch.Tensor, count: int) -> torch.Tensor:
        """Patches of bytes (section 2.2).

        Args:
            ids: The bytes of ``count`` patches, and :attr:`reach` or more before them where the
                text does not begin with them, int64 [B, T].
            place: Their places in the text, int64 [B or 1, T]; those below 0 are before it.
            count: Patches K wanted: the last ones.

        Returns:
            [B, K, P D_G].
        """
        if not self.sizes.global_model or not count:
            return self.global_pad.expand(len(ids), count, -1)
        x = self.byte_embedding(ids)  # [B, K P, D_G]
        if self.byte_positions is not None:
            x = x + self.byte_positions(place.clamp(0, self.sizes.max_length - 1))
        for convolution, width in zip(self.convolutions, self.sizes.kernels, strict=True):
            seen = F.pad((x * (place >= 0)[..., None]).transpose(1, 2), (width - 1, 0))
            x = x + F.gelu(convolution(seen)).transpose(1, 2)
        own: torch.Tensor = x[:, x.shape[1] - count * self.sizes.patch_size :]
        return own.reshape(len(ids), count, self.sizes.global_size)

    def across(
        self,
        patches: torch.Tensor,
        place: torch.Tensor,
        mask: torch.Tensor | None = None,
        stores: Sequence[Store | None] = (),
    ) -> torch.Tensor:
        """What the global model tells the local one (section 2.2).

        Args:
            patches: [B, N, P D_G].
            place: Which patch each of them tells of, int64 [B or 1, N].
            mask: As for :meth:`isthmus.nn.decoder.Attention.forward`.
            stores: The past of each layer.

        Returns:
            [B, N, P, D_L].
        """
        s = self.sizes
        if s.global_model:
            patches = _run(self.global_layers, patches, place, mask, stores, s.rotary)
        states = self.global_norm(patches).unflatten(-1, (s.patch_size, s.byte_size))
        told: torch.Tensor = self.to_local(states)
        return told

    def local_inputs(
        self, told: torch.Tensor, before: torch.Tensor, place: torch.Tensor
    ) -> torch.Tensor:
        """What the global model tells of a byte, and the byte before it in its patch.

        Args:
            told: [B, N, D_L].
            before: Byte before each of them, int64 [B, N].
            place: Place of each of them, int64 [B or 1, N].

        Returns:
            [B, N, D_L].
        """
        first = (place % self.sizes.patch_size == 0)[..., None]
        return told + torch.where(first, self.local_pad, self.local_embedding(before))

    def inside(
        self,
        x: torch.Tensor,
        place: torch.Tensor,
        mask: torch.Tensor | None = None,
        stores: Sequence[Store | None] = (),
    ) -> torch.Tensor:
        """The local model (section 2.2): logits [B, N, V] of bytes given their inputs [B, N, D_L].

        Args:
            x: Inputs.
            place: Places of the bytes in the text, int64 [B or 1, N].
            mask: As for :meth:`isthmus.nn.decoder.Attention.forward`.
            stores: The past of each layer.
        """
        x = _run(self.local_layers, x, place, mask, stores, self.sizes.rotary)
        logits: torch.Tensor = self.head(self.local_norm(x))
        return logits

    @property
    def reach(self) -> int:
        """Bytes before a patch that its embedding depends on, through the convolutions."""
        return sum(k - 1 for k in self.sizes.kernels)


@torch.no_grad()
def nats_of(network: BytePatches, ids: torch.Tensor, *, strided: bool = False) -> torch.Tensor:
    """Negative log-likelihood of every byte given those before it, in nats, [B, T].

    Args:
        network: The network.
        ids: int64 [B, T].
        strided: A second pass begins half a patch later, and every byte is taken from the pass
            where it stands in the first half of its patch (section 2.3). The first patch, of
            which the second pass has not seen the beginning, is left to the first one.
    """

    def taken(part: torch.Tensor) -> torch.Tensor:
        logits = network(part)
        return F.cross_entropy(logits.flatten(0, 1), part.flatten(), reduction="none").view_as(part)

    first, patch = taken(ids), network.sizes.patch_size
    half = patch // 2
    if not strided or not half or ids.shape[1] <= patch:
        return first
    place = torch.arange(ids.shape[1], device=ids.device)
    late = (place % patch >= half) & (place >= patch)
    return torch.where(late, F.pad(taken(ids[:, half:]), (half, 0)), first)


def judged(network: BytePatches, ids: torch.Tensor, *, strided: bool = False) -> torch.Tensor:
    """Nats of every byte of a long text, read in pieces of ``max_length``, float [N].

    The last piece may be shorter; nothing is padded, so nothing but bytes is counted.
    """
    length = network.sizes.max_length
    whole = len(ids) // length * length
    device = network.head.weight.device
    rows = ids[:whole].view(-1, length).long().to(device)
    parts = [
        nats_of(network, r, strided=strided).flatten() for r in torch.split(rows, 32) if len(r)
    ]
    if whole < len(ids):
        rest = ids[whole:].long().to(device)
        parts.append(nats_of(network, rest[None], strided=strided)[0])
    return torch.cat(parts)


def by_place(nats: torch.Tensor, patch: int, length: int) -> list[float]:
    """Mean bits at each place of a patch, of pieces of ``length`` bytes, [P].

    Example:
        >>> by_place(torch.tensor([1.0, 3.0, 1.0, 3.0, 1.0]) * math.log(2), 2, 4)
        [1.0, 3.0]
    """
    place = torch.arange(len(nats), device=nats.device) % length % patch
    return [round(float(nats[place == p].mean()) / math.log(2), 4) for p in range(patch)]


class _Overlap:
    """Puts the last r keys of the patch before in front of those of each patch."""

    def __init__(self, batch: int, overlap: int) -> None:
        self.batch, self.overlap = batch, overlap

    def update(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._joined(keys), self._joined(values)

    def _joined(self, x: torch.Tensor) -> torch.Tensor:  # [B K, H, P, d] -> [B K, H, r + P, d]
        last = x.view(self.batch, -1, *x.shape[1:])[:, :-1, :, x.shape[2] - self.overlap :]
        before = F.pad(last, (0, 0, 0, 0, 0, 0, 1, 0)).flatten(0, 1)
        return torch.cat([before, x], 2)

    def mask(self, patch: int, patches: int, like: torch.Tensor) -> torch.Tensor:
        """Additive [B K, 1, P, r + P]: the first patch has none before it."""
        own = torch.ones(patch, patch, dtype=torch.bool, device=like.device).tril()
        seen = F.pad(own, (self.overlap, 0), value=True).repeat(patches, 1, 1)
        seen[0, :, : self.overlap] = False
        return additive(seen, like.dtype).repeat(self.batch, 1, 1, 1)


def _stack(layers: int, width: int, heads: int) -> nn.ModuleList:
    sizes = LayerSizes(width, heads, heads, width // heads, 4 * width)
    return nn.ModuleList(
        DecoderLayer(sizes, feed_forward=FeedForward(width, 4 * width, "gelu", bias=False))
        for _ in range(layers)
    )


def _run(
    layers: nn.ModuleList,
    x: torch.Tensor,
    place: torch.Tensor,
    mask: torch.Tensor | None,
    stores: Sequence[Store | None],
    rotary: bool,
) -> torch.Tensor:
    if not rotary:
        place = torch.zeros_like(place)  # turned by nothing
    for index, layer in enumerate(layers):
        x = layer(x, place, mask, stores[index] if stores else None)
    return x
