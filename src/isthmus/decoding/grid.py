"""Image tokens on a grid: any number of them in one forward, each at its true position.

Text grows at its end; an image may grow in many places at once. So a token is fed together with
its position, and the cache is addressed by position: what is fed at a position takes the place of
what stood there before::

    positions   0       1  2  3  4    5  6  7  8    9 ..
                prompt  row 0         row 1         row 2
    one pass:                    x          x       x         each sees what is earlier in raster
                                                              order, those of the same pass too

Images of one batch may be at different places: position -1 marks a token that is not there.
"""

from __future__ import annotations

import torch

from isthmus.decoding.cache import SlotCache
from isthmus.decoding.drafters import gumbel_noise
from isthmus.decoding.law import ROW_WISE, Law
from isthmus.decoding.target import HubTarget
from isthmus.errors import InvalidInputError
from isthmus.nn.masks import additive


class PlaceCache:
    """Keys and values of B images, addressed by the position of their token.

    Args:
        slots: The empty cache that holds them.

    Attributes:
        positions: Position of each slot, -1 where its token has been replaced, int64 [B, S].
    """

    def __init__(self, slots: SlotCache) -> None:
        self.slots = slots
        self.positions = torch.zeros(slots.batch, 0, dtype=torch.int64, device=slots.device)

    def open(self, positions: torch.Tensor) -> torch.Tensor:
        """Make room for the tokens of a pass.

        Args:
            positions: int64 [B, N], -1 where there is no token.

        Returns:
            Which slots are earlier in raster order, bool [B, N, S + N]; a token sees itself.
        """
        self.slots.reserve(positions.shape[1])
        again = (self.positions[:, :, None] == positions[:, None]).any(-1)
        self.positions = torch.cat([self.positions.masked_fill(again, -1), positions], 1)
        keys = self.positions[:, None]
        own = torch.arange(keys.shape[2], device=positions.device) == (
            self.slots.used + torch.arange(positions.shape[1], device=positions.device)[:, None]
        )
        return own | ((keys >= 0) & (keys <= positions[..., None]))

    def close(self) -> None:
        """Keep what the pass has written."""
        self.slots.used = self.positions.shape[1]


class GridSession:
    """A decoder of transformers at work on B images.

    Args:
        target: The decoder; it must take positions.
        batch: Images B.

    Attributes:
        passes: Forwards so far.

    Raises:
        InvalidInputError: The decoder scores no trees, so it cannot hold several open ends.
    """

    def __init__(self, target: HubTarget, batch: int) -> None:
        if target.reach != "tree":
            raise InvalidInputError(
                f"{type(target.model).__name__} cannot place several tokens in one forward; use a "
                "decoder with rotary or learned positions and full attention"
            )
        self.target = target
        slots = SlotCache(target.layout, batch, target.state_dtype, target.device)
        self.cache = PlaceCache(slots)
        self.passes = 0

    @torch.no_grad()
    def feed(
        self, tokens: torch.Tensor, positions: torch.Tensor, seen: torch.Tensor | None = None
    ) -> torch.Tensor:
        """One pass.

        Args:
            tokens: int64 [B, N]; anything where there is no token.
            positions: int64 [B, N], -1 where there is no token.
            seen: Who sees which slot, bool [B, N, S + N]; what is earlier in raster order if None.

        Returns:
            Logits [B, N, V] of what follows each token.

        Raises:
            InvalidInputError: A position lies beyond the decoder's context.
        """
        limit = self.target.max_length
        if limit is not None and int(positions.max()) >= limit:
            raise InvalidInputError(
                f"position {int(positions.max())} lies beyond the decoder's {limit} positions"
            )
        earlier = self.cache.open(positions)
        scores = self.target.forward(
            tokens.clamp(min=0),
            positions=positions.clamp(min=0),
            mask=additive(earlier if seen is None else seen, self.target.dtype),
            cache=self.cache.slots.hub,
        )
        self.cache.close()
        self.passes += 1
        return scores.logits


class PlaceDraws:
    """Draws that are keyed by the place of a token, whenever and in whatever company it is drawn.

    Two orders of decoding that see the same at every place so give the same image.

    Args:
        seed: Key of all draws.
        batch: Images B.
        law: Temperature and truncations; plain sampling when None.

    Raises:
        InvalidInputError: The law has parts that read what stands before a token.

    Example:
        >>> draws = PlaceDraws(0, 1)
        >>> together = draws.pick(torch.zeros(1, 2, 5), torch.tensor([[3, 8]]))
        >>> together[0, 1] == draws.pick(torch.zeros(1, 1, 5), torch.tensor([[8]]))[0, 0]
        tensor(True)
    """

    def __init__(self, seed: int, batch: int, law: Law | None = None) -> None:
        self.law = law or Law(temperature=1.0)
        if self.law.reshapes or not all(isinstance(p, ROW_WISE) for p in self.law.processors):
            raise InvalidInputError(
                "places of a grid have no text before them; give temperature, top_k, top_p, min_p"
            )
        self._seed, self._batch = seed, batch

    def _fill(self, keys: torch.Tensor, width: int) -> torch.Tensor:
        """Gumbel noise [B, N, width] of the keys [B, N]; any integers from 0 on."""
        noise = torch.zeros(*keys.shape, width, dtype=torch.float64)
        for key in sorted(set(keys.flatten().tolist())):
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + key + 1)
            drawn = gumbel_noise((self._batch, width), generator)[:, None]
            noise = torch.where((keys == key)[..., None], drawn, noise)
        return noise

    def logprobs(self, logits: torch.Tensor) -> torch.Tensor:
        """The law at each place, float64 [B, N, V], from logits of that shape."""
        flat = self.law.row(logits.flatten(0, 1).double(), logits.new_zeros(1, dtype=torch.int64))
        if self.law.greedy:
            flat = torch.zeros_like(flat).masked_fill(
                flat != flat.amax(-1, keepdim=True), -torch.inf
            )
        return torch.log_softmax(flat, -1).view(logits.shape)

    def pick(self, logits: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Draw from logits [B, N, V]; a greedy law leaves the likeliest token alone.

        Args:
            logits: As the decoder gives them.
            keys: What each draw is keyed by, int64 [B, N].

        Returns:
            int64 [B, N].
        """
        return self.of(self.logprobs(logits), keys)

    def of(self, logprobs: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Draw from log-probabilities [B, N, V], which need not be normalised; int64 [B, N]."""
        return (logprobs + self._fill(keys, logprobs.shape[-1])).argmax(-1)

    def uniform(self, keys: torch.Tensor) -> torch.Tensor:
        """Numbers between 0 and 1, float64 [B, N]."""
        return torch.exp(-torch.exp(-self._fill(keys, 1)))[..., 0]


def in_raster_order(
    target: HubTarget, prompts: torch.Tensor, size: tuple[int, int], draws: PlaceDraws, levels: int
) -> torch.Tensor:
    """Plain decoding: one token in each pass, row by row.

    Args:
        target: A decoder that was trained on prompts and then tokens in raster order.
        prompts: int64 [B, P].
        size: Height H and width W in tokens.
        draws: Source of the draws.
        levels: Only tokens below this number are image tokens.

    Returns:
        int64 [B, H, W].
    """
    session, length = GridSession(target, len(prompts)), prompts.shape[1]
    positions = torch.arange(length, device=prompts.device).expand_as(prompts)
    tokens = [prompts]
    for place in range(size[0] * size[1]):
        logits = session.feed(tokens[-1], positions)[:, -1:, :levels]
        tokens.append(draws.pick(logits, torch.full_like(prompts[:, :1], place)))
        positions = torch.full_like(prompts[:, :1], length + place)
    return torch.cat(tokens[1:], 1).view(-1, *size)
