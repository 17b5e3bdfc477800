"""Quantizers: vectors become codes of a codebook, and codes become vectors again.

::

    z [B, D, ...] ──encode──▶ codes ──decode──▶ z_q [B, D, ...]

All have one interface: called, they give a :class:`Quantized`, whose ``z_q`` lets gradients pass
straight through while training and is exactly ``decode(encode(z))`` otherwise. Codes of one
codebook are int64 [B, ...]; those of several stages are stacked in front, [n_q, B, ...].

Two faults of published code are avoided here. A dead code that is started anew gets vector, sum and
count together: where only the vector is replaced, the moving average of the same step puts the old
one back. A residual is what the *detached* code leaves: where the straight-through value is
subtracted, the commitment of later stages has no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus.errors import InvalidInputError


class Quantized(NamedTuple):
    """What a quantizer makes of vectors.

    Attributes:
        z_q: [B, D, ...]; while training, its gradient is that of z.
        codes: int64, [B, ...] or [n_q, B, ...].
        commit_loss: Scalar, to be added to the loss; 0 outside training.
        stats: By name, one number for each codebook, [n_q]: ``perplexity``, ``used`` (share of the
            codes that occur) and ``explained`` (share of the variance of z that it takes away).
    """

    z_q: Tensor
    codes: Tensor
    commit_loss: Tensor
    stats: dict[str, Tensor]


def _rows(z: Tensor) -> Tensor:
    """Vectors [B, D, ...] as rows [N, D]."""
    return z.movedim(1, -1).reshape(-1, z.shape[1])


def _shaped(rows: Tensor, like: Tensor) -> Tensor:
    """Rows [N, D] as vectors [B, D, ...] over the places of a tensor [B, ...]."""
    return rows.view(*like.shape, rows.shape[-1]).movedim(-1, 1)


def _passed(z: Tensor, q: Tensor, training: bool) -> Tensor:
    """The straight-through value; exactly q outside training."""
    return z + (q - z).detach() if training else q


@torch.no_grad()
def _stats(codes: Tensor, size: int, before: Tensor, after: Tensor, z: Tensor) -> dict[str, Tensor]:
    """Numbers of one codebook, each [1]."""
    share = torch.bincount(codes.reshape(-1), minlength=size).to(z.dtype) / max(1, codes.numel())
    entropy = -(share * share.clamp(min=1e-12).log()).sum()
    # energy about the mean, of which a codebook takes a share
    variance = (z - z.mean(0)).square().sum().clamp(min=1e-12)
    taken = (before - before.mean(0)).square().sum() - (after - after.mean(0)).square().sum()
    found = {"perplexity": entropy.exp(), "used": (share > 0).to(z.dtype).mean()}
    return {k: v[None] for k, v in (found | {"explained": taken / variance}).items()}


def _joined(stats: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {k: torch.cat([s[k] for s in stats]) for k in stats[0]}


def _several() -> bool:
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return there and torch.distributed.get_world_size() > 1


def _summed(x: Tensor) -> Tensor:
    """Summed over all processes."""
    if _several():
        torch.distributed.all_reduce(x)
    return x


def _of_first(x: Tensor) -> Tensor:
    """As the first process has it."""
    if _several():
        torch.distributed.broadcast(x, 0)
    return x


class VQ(nn.Module):
    """One codebook; each vector becomes its nearest code.

    By moving averages (van den Oord et al., 2017, appendix A): ``N <- g N + (1 - g) n``,
    ``m <- g m + (1 - g) sum z``, ``e = m / N``, with N smoothed by eps. Under several processes n
    and the sums are those of all of them. Or by gradient: codebook loss 1, commitment 0.25.

    Args:
        dim: D of the vectors.
        size: K, codes.
        code_dim: Width of the codes, between two projections; D without them when None.
        decay: g.
        eps: Smoothing of the counts.
        kmeans_init: Whether codes begin as the k-means of the first batch, else evenly within
            1 / K of 0; None is k-means for averages, and not for gradients.
        kmeans_iters: Rounds of it.
        dead_below: A code whose moving count falls below this starts anew at a vector of the
            batch; 0 never.
        learn: ``ema`` or ``grad``.
        metric: ``l2``, or ``cos`` for vectors and codes of length 1.

    Raises:
        InvalidInputError: An argument is out of range.

    Example:
        >>> vq = VQ(1, 3, kmeans_init=False).eval()
        >>> _ = vq.embed.copy_(torch.tensor([[-1.0], [0.0], [2.0]]))
        >>> vq(torch.tensor([[[0.9, 1.1, -7.0]]])).codes.tolist()
        [[1, 2, 0]]
    """

    embed: Tensor
    count: Tensor
    total: Tensor
    ready: Tensor

    def __init__(
        self,
        dim: int,
        size: int,
        code_dim: int | None = None,
        *,
        decay: float = 0.99,
        eps: float = 1e-5,
        kmeans_init: bool | None = None,
        kmeans_iters: int = 50,
        dead_below: float = 2.0,
        learn: Literal["ema", "grad"] = "ema",
        metric: Literal["l2", "cos"] = "l2",
    ) -> None:
        super().__init__()
        if size < 2 or dim < 1 or not 0 <= decay < 1:
            raise InvalidInputError(
                f"a codebook has 2 or more codes of 1 or more numbers and a decay below 1, got "
                f"{size}, {dim} and {decay}"
            )
        if learn not in ("ema", "grad") or metric not in ("l2", "cos"):
            raise InvalidInputError(
                f"learn is ema or grad, metric l2 or cos, got {learn}, {metric}"
            )
        width = code_dim or dim
        self.dim, self.size, self.decay, self.eps = dim, size, decay, eps
        self.kmeans_iters, self.dead_below = kmeans_iters, dead_below
        self.learn, self.metric = learn, metric
        self.down = nn.Linear(dim, width) if width != dim else nn.Identity()
        self.up = nn.Linear(width, dim) if width != dim else nn.Identity()
        embed = torch.empty(size, width).uniform_(-1 / size, 1 / size)
        if learn == "grad":
            self.embed = nn.Parameter(embed)
        else:
            self.register_buffer("embed", embed)
            self.register_buffer("count", torch.ones(size))
            self.register_buffer("total", embed.clone())
        kmeans = learn == "ema" if kmeans_init is None else kmeans_init
        self.register_buffer("ready", torch.tensor(not kmeans))

    def forward(self, z: Tensor) -> Quantized:
        """See :class:`Quantized`."""
        rows = _rows(z)
        x = self._unit(self.down(rows))
        if self.training and not self.ready:
            self._begin(x.detach())
        codes = self._nearest(x)
        q = F.embedding(codes, self._codes())
        loss = x.new_zeros(())
        if self.training:
            loss = F.mse_loss(x, q.detach())
            if self.learn == "grad":
                loss = 0.25 * loss + F.mse_loss(q, x.detach())
            else:
                self._follow(x.detach(), codes)
        out = self.up(_passed(x, q, self.training))
        stats = _stats(codes, self.size, rows, rows - out.detach(), rows)
        codes = codes.view(z.shape[0], *z.shape[2:])
        return Quantized(_shaped(out, codes), codes, loss, stats)

    @torch.no_grad()
    def encode(self, z: Tensor) -> Tensor:
        """Codes int64 [B, ...] of vectors [B, D, ...]."""
        return self._nearest(self._unit(self.down(_rows(z)))).view(z.shape[0], *z.shape[2:])

    def decode(self, codes: Tensor) -> Tensor:
        """Vectors [B, D, ...] of codes.

        Raises:
            InvalidInputError: A code is outside the codebook.
        """
        check_codes(codes, self.size)
        return _shaped(self.up(F.embedding(codes.reshape(-1), self._codes())), codes)

    def _unit(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) if self.metric == "cos" else x

    def _codes(self) -> Tensor:
        return self._unit(self.embed)

    def _nearest(self, x: Tensor) -> Tensor:
        e = self._codes().detach()
        return (x.detach() @ e.T - 0.5 * e.square().sum(1)).argmax(1)

    def _draw(self, x: Tensor, count: int) -> Tensor:
        """So many vectors of the first process's batch, by torch's generator."""
        if len(x) >= count:
            at = torch.randperm(len(x), device=x.device)[:count]
        else:
            at = torch.randint(len(x), (count,), device=x.device)
        return _of_first(x[at].contiguous())

    @torch.no_grad()
    def _begin(self, x: Tensor) -> None:
        """k-means of the first batch."""
        centres = self._draw(x, self.size)
        for _ in range(self.kmeans_iters):
            self.embed.copy_(centres)
            n, m = self._sums(x, self._nearest(x))
            centres = torch.where(n[:, None] > 0, m / n.clamp(min=1)[:, None], centres)
        self.embed.copy_(centres)
        self.ready.fill_(True)
        if self.learn == "grad":
            return
        n, _ = self._sums(x, self._nearest(x))
        self._restart(torch.ones_like(n, dtype=torch.bool), centres, n.clamp(min=1.0))

    def _sums(self, x: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """How many vectors each code has, and their sum, over all processes."""
        n = torch.bincount(codes, minlength=self.size).to(x.dtype)
        m = torch.zeros_like(self.embed, dtype=x.dtype).index_add_(0, codes, x)
        return _summed(n), _summed(m)

    @torch.no_grad()
    def _follow(self, x: Tensor, codes: Tensor) -> None:
        """A step of the moving averages, and codes that nobody uses started anew."""
        n, m = self._sums(x, codes)
        self.count.lerp_(n, 1 - self.decay)
        self.total.lerp_(m, 1 - self.decay)
        mass = self.count.sum()
        smoothed = (self.count + self.eps) / (mass + self.size * self.eps) * mass
        self.embed.copy_(self.total / smoothed[:, None])
        if self.dead_below:
            dead = self.count < self.dead_below
            if dead.any():
                fresh = self._draw(x, self.size)
                self._restart(dead, fresh, torch.full_like(self.count, self.dead_below))

    def _restart(self, where: Tensor, vectors: Tensor, counts: Tensor) -> None:
        """Vector, count and sum of some codes together."""
        self.embed[where] = vectors[where]
        self.count[where] = counts[where]
        self.total[where] = (vectors * counts[:, None])[where]


def check_codes(codes: Tensor, size: int) -> None:
    """Refuse codes outside a codebook.

    Raises:
        InvalidInputError: There is one.
    """
    if codes.numel() and not (int(codes.min()) >= 0 and int(codes.max()) < size):
        raise InvalidInputError(f"codes are from 0 to {size - 1}; one is outside")


@torch.no_grad()
def weighted_kmeans(
    rows: Tensor, weights: Tensor, count: int, rounds: int = 50
) -> tuple[Tensor, Tensor]:
    """Centres of weighted vectors, from a start without chance.

    The heaviest vector is the first centre; each next one is the vector of the largest weight times
    squared distance from the centres so far. Then Lloyd's rounds follow, until nothing changes.

    Args:
        rows: Vectors [N, D].
        weights: How much each counts, [N], not negative.
        count: Centres K'; all vectors as they are when there are no more than that.
        rounds: At most.

    Returns:
        Centres [K', D], and the nearest centre of each vector, int64 [N].

    Raises:
        InvalidInputError: No centre, or weights that do not fit.

    Example:
        >>> x = torch.tensor([[0.0], [1.0], [10.0]])
        >>> centres, labels = weighted_kmeans(x, torch.tensor([3.0, 1.0, 1.0]), 2)
        >>> centres.tolist(), labels.tolist()  # (3 * 0 + 1 * 1) / 4
        ([[0.25], [10.0]], [0, 0, 1])
    """
    if count < 1 or weights.shape != rows.shape[:1] or (weights < 0).any():
        raise InvalidInputError(
            f"k-means makes 1 or more centres of vectors with weights of 0 or more, got {count} of "
            f"{len(rows)} vectors and {tuple(weights.shape)} weights"
        )
    if count >= len(rows):
        return rows.clone(), torch.arange(len(rows), device=rows.device)
    weights = weights.to(rows.dtype).clamp(min=1e-6)
    chosen = [int(weights.argmax())]
    away = (rows - rows[chosen[0]]).square().sum(1)
    for _ in range(count - 1):
        chosen.append(int((weights * away).argmax()))
        away = torch.minimum(away, (rows - rows[chosen[-1]]).square().sum(1))
    centres, labels = rows[chosen], rows.new_zeros(0, dtype=torch.int64)
    for _ in range(rounds):
        before, labels = labels, torch.cdist(rows[None], centres[None])[0].argmin(1)
        if torch.equal(before, labels):
            break
        mass = torch.zeros(count, dtype=rows.dtype, device=rows.device).index_add_(
            0, labels, weights
        )
        total = torch.zeros_like(centres).index_add_(0, labels, rows * weights[:, None])
        centres = torch.where(mass[:, None] > 0, total / mass.clamp(min=1e-12)[:, None], centres)
    return centres, torch.cdist(rows[None], centres[None])[0].argmin(1)


class RVQ(nn.Module):
    """Codebooks in a row, each for what those before it have left.

    ::

        r_0 = z      i_l = Q_l(r_(l-1))      r_l = r_(l-1) - sg(q_l)      z_q = sum of q_l

    Args:
        dim: D.
        size: K of each codebook.
        n_q: Codebooks.
        **vq: Of each :class:`VQ`.

    Raises:
        InvalidInputError: No codebook.
    """

    def __init__(self, dim: int, size: int, n_q: int, **vq: Any) -> None:
        super().__init__()
        if n_q < 1:
            raise InvalidInputError(f"a residual quantizer has 1 or more codebooks, got {n_q}")
        self.size, self.n_q, self.least = size, n_q, 1
        self.projected = vq.get("code_dim") not in (None, dim)
        self.layers = nn.ModuleList(VQ(dim, size, **vq) for _ in range(n_q))

    def _given(self, z: Tensor, stage: int, left: Tensor) -> Tensor:
        """What a stage quantizes."""
        del z, stage
        return left

    def forward(self, z: Tensor, n_q: int | None = None) -> Quantized:
        """See :class:`Quantized`; with ``n_q``, by the first so many codebooks."""
        left, total = z, torch.zeros_like(z)
        codes, losses, stats, rows = [], [], [], _rows(z).detach()
        for stage in range(self._used(n_q)):
            found = self.layers[stage](self._given(z, stage, left))
            q = found.z_q.detach()
            before, left, total = left, left - q, total + q
            codes.append(found.codes)
            losses.append(found.commit_loss)
            stats.append(_stats(codes[-1], self.size, _rows(before), _rows(left).detach(), rows))
        z_q = _passed(z, total, self.training)
        if self.training and self.projected:
            # projections out of the codes learn from what is behind the quantizer
            z_q = z_q + sum(_learnt(layer, c) for layer, c in zip(self.layers, codes, strict=False))
        return Quantized(z_q, torch.stack(codes), torch.stack(losses).sum(), _joined(stats))

    @torch.no_grad()
    def encode(self, z: Tensor, n_q: int | None = None) -> Tensor:
        """Codes [n_q, B, ...]."""
        left, codes = z, []
        for stage in range(self._used(n_q)):
            layer = self.layers[stage]
            codes.append(layer.encode(self._given(z, stage, left)))  # type: ignore[operator]
            left = left - layer.decode(codes[-1])  # type: ignore[operator]
        return torch.stack(codes)

    def decode(self, codes: Tensor) -> Tensor:
        """Vectors [B, D, ...] of the codes of the first stages [n_q, B, ...]."""
        self._used(len(codes))
        total = torch.zeros((), device=codes.device)
        for layer, c in zip(self.layers, codes, strict=False):
            total = total + layer.decode(c)  # type: ignore[operator]
        return total

    def _used(self, n_q: int | None) -> int:
        n_q = self.n_q if n_q is None else n_q
        if not self.least <= n_q <= self.n_q:
            raise InvalidInputError(f"{self.least} to {self.n_q} codebooks can be used, not {n_q}")
        return n_q


def _learnt(layer: Any, codes: Tensor) -> Tensor:
    """Zero in value, with the gradient of a stage's projection out of its codes."""
    q = _shaped(layer.up(F.embedding(codes.reshape(-1), layer._codes().detach())), codes)
    return q - q.detach()


class MaskedChannelRVQ(RVQ):
    """Three codebooks for a third of the channels each, then residual ones.

    Stage l of 0, 1, 2 sees z with all but the l-th third of its channels set to 0; what the three
    leave goes through the rest in a row (Ji et al., "Language-Codec", 2024, arXiv 2402.12208).
    One path serves training and coding alike.

    Raises:
        InvalidInputError: Fewer than three codebooks or channels, here and in every call.
    """

    def __init__(self, dim: int, size: int, n_q: int, **vq: Any) -> None:
        super().__init__(dim, size, n_q, **vq)
        if n_q < 3 or dim < 3:
            raise InvalidInputError(f"3 or more codebooks and channels, got {n_q} and {dim}")
        self.least = 3
        self.cuts = (0, dim // 3, 2 * dim // 3, dim)

    def _given(self, z: Tensor, stage: int, left: Tensor) -> Tensor:
        if stage >= 3:
            return left
        channel = torch.arange(z.shape[1], device=z.device)
        inside = (channel >= self.cuts[stage]) & (channel < self.cuts[stage + 1])
        return z * inside.view(-1, *[1] * (z.ndim - 2)).to(z.dtype)


class GroupedRVQ(nn.Module):
    """Channels in groups, each with codebooks in a row (Yang et al., "HiFi-Codec", 2023).

    Codes are [groups * n_q, B, ...], all stages of the first group first.

    Args:
        dim: D, a multiple of the groups.
        size: K.
        groups: Groups.
        n_q: Codebooks of each group.
        **vq: Of each :class:`VQ`.

    Raises:
        InvalidInputError: D is no multiple of the groups.
    """

    def __init__(self, dim: int, size: int, groups: int, n_q: int, **vq: Any) -> None:
        super().__init__()
        if groups < 1 or dim % groups:
            raise InvalidInputError(f"{dim} channels cannot be split into {groups} equal groups")
        self.size, self.groups, self.stages, self.n_q = size, groups, n_q, groups * n_q
        self.layers = nn.ModuleList(RVQ(dim // groups, size, n_q, **vq) for _ in range(groups))

    def forward(self, z: Tensor, n_q: int | None = None) -> Quantized:
        """See :class:`Quantized`."""
        self._check(self.n_q if n_q is None else n_q)
        parts = z.chunk(self.groups, 1)
        found = [layer(part) for layer, part in zip(self.layers, parts, strict=True)]
        stats = _joined([f.stats for f in found])
        # each group's share of the variance of all
        energy = torch.stack([_variance(p) for p in parts]).repeat_interleave(self.stages)
        stats["explained"] = stats["explained"] * energy / _variance(z)
        return Quantized(
            torch.cat([f.z_q for f in found], 1),
            torch.cat([f.codes for f in found]),
            torch.stack([f.commit_loss for f in found]).mean(),
            stats,
        )

    @torch.no_grad()
    def encode(self, z: Tensor, n_q: int | None = None) -> Tensor:
        """Codes [groups * n_q, B, ...]."""
        self._check(self.n_q if n_q is None else n_q)
        parts = zip(self.layers, z.chunk(self.groups, 1), strict=True)
        return torch.cat([layer.encode(part) for layer, part in parts])  # type: ignore[operator]

    def decode(self, codes: Tensor) -> Tensor:
        """Vectors of all codes."""
        self._check(len(codes))
        parts = zip(self.layers, codes.chunk(self.groups), strict=True)
        return torch.cat([layer.decode(part) for layer, part in parts], 1)  # type: ignore[operator]

    def _check(self, n_q: int) -> None:
        if n_q != self.n_q:
            raise InvalidInputError(f"grouped codebooks are used all {self.n_q}, not {n_q}")


def _variance(z: Tensor) -> Tensor:
    rows = _rows(z.detach())
    return (rows - rows.mean(0)).square().sum().clamp(min=1e-12)


class FSQ(nn.Module):
    """Finite scalar quantization: every channel is rounded to one of a few levels.

    ::

        half = (L - 1) (1 + 1e-3) / 2     offset = 1/2 for even L, else 0
        b = tanh(z + atanh(offset / half)) half - offset        q = round(b) / (L // 2)

    Mentzer et al., "Finite Scalar Quantization", 2023 (arXiv 2309.15505). There is no codebook, and
    no loss of its own.

    Args:
        levels: L of each channel, 2 or more.

    Raises:
        InvalidInputError: A channel with fewer than 2 levels.

    Example:
        >>> fsq = FSQ([3, 2])
        >>> fsq.decode(torch.arange(6)[None]).squeeze(0).T.tolist()
        [[-1.0, -1.0], [0.0, -1.0], [1.0, -1.0], [-1.0, 0.0], [0.0, 0.0], [1.0, 0.0]]
    """

    levels: Tensor
    basis: Tensor

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        if not levels or min(levels) < 2:
            raise InvalidInputError(f"every channel has 2 or more levels, got {list(levels)}")
        self.size = math.prod(levels)
        counts = torch.tensor(list(levels))
        basis = torch.cat([counts.new_ones(1), counts.cumprod(0)[:-1]])
        self.register_buffer("levels", counts, persistent=False)
        self.register_buffer("basis", basis, persistent=False)

    def forward(self, z: Tensor) -> Quantized:
        """See :class:`Quantized`."""
        rows = _rows(z)
        b = self._bound(rows)
        q = _passed(b, b.round(), self.training) / (self.levels // 2)
        codes = self._index(b.round())
        stats = _stats(codes, self.size, rows, rows - q.detach(), rows)
        codes = codes.view(z.shape[0], *z.shape[2:])
        return Quantized(_shaped(q, codes), codes, z.new_zeros(()), stats)

    @torch.no_grad()
    def encode(self, z: Tensor) -> Tensor:
        """Codes int64 [B, ...]."""
        return self._index(self._bound(_rows(z)).round()).view(z.shape[0], *z.shape[2:])

    def decode(self, codes: Tensor) -> Tensor:
        """Vectors [B, D, ...]."""
        check_codes(codes, self.size)
        digits = codes.reshape(-1, 1) // self.basis % self.levels
        half = self.levels // 2
        return _shaped((digits - half).float() / half, codes)

    def _bound(self, z: Tensor) -> Tensor:
        if z.shape[1] != len(self.levels):
            raise InvalidInputError(f"vectors have {len(self.levels)} channels, not {z.shape[1]}")
        half = (self.levels - 1) * (1 + 1e-3) / 2
        offset = (self.levels % 2 == 0) * 0.5
        return torch.tanh(z + torch.atanh(offset / half)) * half - offset

    def _index(self, whole: Tensor) -> Tensor:
        return ((whole.long() + self.levels // 2) * self.basis).sum(1)


class LatentQuantize(nn.Module):
    """Latent quantization: every channel takes the nearest of a list of values that it learns.

    Hsu et al., "Disentanglement via Latent Quantization", 2023 (arXiv 2305.18378); values begin
    evenly from -1/2 to 1/2, losses are 0.1 commitment and 0.1 quantization.

    Args:
        levels: Values of each channel, 2 or more.
        commitment: Weight on the side of the vectors.
        quantization: Weight on the side of the values.

    Raises:
        InvalidInputError: A channel with fewer than 2 values.

    Example:
        >>> LatentQuantize([2, 3]).encode(torch.tensor([[[0.4], [0.1]]])).tolist()  # 1 + 2 * 1
        [[3]]
    """

    basis: Tensor

    def __init__(
        self, levels: Sequence[int], *, commitment: float = 0.1, quantization: float = 0.1
    ) -> None:
        super().__init__()
        if not levels or min(levels) < 2:
            raise InvalidInputError(f"every channel has 2 or more values, got {list(levels)}")
        self.levels, self.size = tuple(levels), math.prod(levels)
        self.commitment, self.quantization = commitment, quantization
        self.values = nn.ParameterList(nn.Parameter(torch.linspace(-0.5, 0.5, n)) for n in levels)
        steps = torch.tensor([1, *levels[:-1]]).cumprod(0)
        self.register_buffer("basis", steps, persistent=False)

    def forward(self, z: Tensor) -> Quantized:
        """See :class:`Quantized`."""
        rows = _rows(z)
        q, digits = self._nearest(rows)
        loss = z.new_zeros(())
        if self.training:
            loss = self.commitment * F.mse_loss(rows, q.detach())
            loss = loss + self.quantization * F.mse_loss(q, rows.detach())
        codes = (digits * self.basis).sum(1)
        stats = _stats(codes, self.size, rows, rows - q.detach(), rows)
        codes = codes.view(z.shape[0], *z.shape[2:])
        return Quantized(_shaped(_passed(rows, q, self.training), codes), codes, loss, stats)

    @torch.no_grad()
    def encode(self, z: Tensor) -> Tensor:
        """Codes int64 [B, ...]."""
        return (self._nearest(_rows(z))[1] * self.basis).sum(1).view(z.shape[0], *z.shape[2:])

    def decode(self, codes: Tensor) -> Tensor:
        """Vectors [B, D, ...]."""
        check_codes(codes, self.size)
        flat = codes.reshape(-1)
        parts = zip(self.values, self.basis.tolist(), self.levels, strict=True)
        return _shaped(torch.stack([v[flat // b % n] for v, b, n in parts], 1), codes)

    def _nearest(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest values [N, D], and which they are."""
        if rows.shape[1] != len(self.levels):
            raise InvalidInputError(
                f"vectors have {len(self.levels)} channels, not {rows.shape[1]}"
            )
        at = [(rows[:, d, None] - v.detach()).abs().argmin(1) for d, v in enumerate(self.values)]
        return torch.stack([v[i] for v, i in zip(self.values, at, strict=True)], 1), torch.stack(
            at, 1
        )
