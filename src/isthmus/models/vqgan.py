"""VQGAN with one decoder for each size that its codebook is shrunk to.

::

    x ─▶ encoder ─▶ z ─▶ VQ of K codes ─▶ i ─┬─▶ decoder 0 ─▶ x'              K codes
                                             └─ map_l ─▶ i' ─▶ book_l, decoder l ─▶ x'   K_l codes

The encoder and the codebook learn first (P. Esser et al., "Taming Transformers for High-Resolution
Image Synthesis", 2021, arXiv 2012.09841); then k-means makes the smaller books of the large one,
and each decoder learns with its book, the encoder as it is (arXiv 2307.08265). There are no norms
over a picture, so that pictures of any size decode alike.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus.errors import InvalidInputError
from isthmus.models.audio_disc import Judged
from isthmus.models.code_lm import CodeLM
from isthmus.models.masked_grid import MaskedGrid
from isthmus.models.transform_codec import cosines
from isthmus.nn.quantize import VQ, weighted_kmeans
from isthmus.objectives.audio import feature_matching, hinge_discriminator, hinge_generator

_DELTA, _MOST, _FAINT, _NEAR = 1e-6, 1e4, 0.05, 0.05


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        first, second = (nn.Conv2d(width, width, 3, 1, 1) for _ in range(2))
        self.body = nn.Sequential(nn.SiLU(), first, nn.SiLU(), second)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.body(x)
        return out


class Encoder(nn.Module):
    """Pictures [B, 3, H, W] to vectors [B, dim, H / f, W / f].

    Beside the convolutions lies a shortcut, a block cosine transform: minutes teach such a net what
    takes hours from a random start.

    Args:
        widths: Channels after each halving; f is 2 to the power of how many there are.
        dim: Of the vectors.
    """

    def __init__(self, widths: Sequence[int], dim: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, width in itertools.pairwise((3, *widths)):
            layers += [nn.Conv2d(before, width, 4, 2, 1), _Residual(width)]
        last = nn.Conv2d(widths[-1], dim, 1)
        self.body = nn.Sequential(*layers, nn.SiLU(), last)
        side = 1 << len(widths)
        self.shortcut = nn.Conv2d(3, dim, side, side)
        _waves(self.shortcut, last, dim, side)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        z: Tensor = self.body(x) + self.shortcut(x)
        return z


class Decoder(nn.Module):
    """The way back of :class:`Encoder`, likewise with a shortcut.

    Args:
        widths: As there.
        dim: As there.
    """

    def __init__(self, widths: Sequence[int], dim: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(dim, widths[-1], 3, 1, 1), _Residual(widths[-1])]
        for before, width in itertools.pairwise((*reversed(widths), 3)):
            layers += [_Residual(before), nn.SiLU()]
            last = nn.Conv2d(before, 4 * width, 3, 1, 1)
            layers += [last, nn.PixelShuffle(2)]
        self.body = nn.Sequential(*layers)
        side = 1 << len(widths)
        self.shortcut = nn.ConvTranspose2d(dim, 3, side, side)
        _waves(self.shortcut, last, dim, side)

    def forward(self, z: Tensor) -> Tensor:
        """[B, dim, h, w] to [B, 3, h f, w f]."""
        x: Tensor = self.body(z) + self.shortcut(z)
        return x


@torch.no_grad()
def _waves(layer: Any, beside: nn.Conv2d, dim: int, side: int) -> None:
    """The shortcut is the transform, and what lies beside it begins near nothing.

    It stays as it is: one step of Adam along all its weights moves vectors by more than codes are
    apart.
    """
    beside.weight *= _FAINT
    assert beside.bias is not None
    beside.bias.zero_()
    found = cosines(dim, 3, side)
    layer.weight.zero_()[: len(found)] = found
    layer.bias.zero_()
    layer.requires_grad_(False)


class PatchDiscriminator(nn.Module):
    """Judges every patch of a picture (Isola et al., "Image-to-image translation", 2017).

    Args:
        width: Channels of the first layer.

    Example:
        >>> [(logits, features)] = PatchDiscriminator(4)(torch.zeros(2, 3, 32, 32))
        >>> logits.shape, len(features)
        (torch.Size([2, 1, 8, 8]), 3)
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            [
                nn.Conv2d(3, width, 4, 2, 1),
                nn.Conv2d(width, 2 * width, 4, 2, 1),
                nn.Conv2d(2 * width, 2 * width, 3, 1, 1),
            ]
        )
        self.last = nn.Conv2d(2 * width, 1, 3, 1, 1)

    def forward(self, x: Tensor) -> Judged:
        """Logits and features of pictures, as one scale."""
        features = []
        for conv in self.convs:
            x = F.leaky_relu(conv(x), 0.2)
            features.append(x)
        return [(self.last(x), features)]


class VQGAN(nn.Module):
    """All nets of the codec and what they learn from.

    Args:
        widths: See :class:`Encoder`.
        dim: D of the vectors.
        sizes: K of the codebook, and of the books that it is shrunk to, falling.
        judge: Width of the discriminator; 0 leaves it out.
        adversarial: Weight of its judgement, on top of the adaptive one.
        features: Weight of the distance of its features.
        decay: Of the codebook's averages.
        dead_below: See :class:`~isthmus.nn.quantize.VQ`.
        weighted: Whether k-means counts how often codes are used.
        lm: Of the model of codes in raster order: width, blocks, heads, inner width, reach.
        masker: Of the one that fills gaps: width, blocks, heads.

    Raises:
        InvalidInputError: Sizes that do not fall, or fewer than two codes.
    """

    maps: Tensor
    begun: Tensor

    def __init__(
        self,
        widths: Sequence[int],
        dim: int,
        sizes: Sequence[int],
        *,
        judge: int,
        adversarial: float,
        features: float,
        decay: float,
        dead_below: float,
        weighted: bool,
        lm: tuple[int, int, int, int, int],
        masker: tuple[int, int, int],
    ) -> None:
        super().__init__()
        if not sizes or min(sizes) < 2 or any(a <= b for a, b in itertools.pairwise(sizes)):
            raise InvalidInputError(f"sizes of codebooks fall, to 2 or more, got {tuple(sizes)}")
        self.sizes, self.weighted = tuple(sizes), weighted
        self.adversarial, self.features = adversarial, features
        self.encoder = Encoder(widths, dim)
        self.vq = VQ(dim, sizes[0], decay=decay, dead_below=dead_below)
        self.decoders = nn.ModuleList(Decoder(widths, dim) for _ in sizes)
        self.books = nn.ParameterList(torch.randn(size, dim) * 0.1 for size in sizes)
        for level, size in enumerate(sizes):
            self.register_buffer(f"centres{level}", self.books[level].detach().clone())
            self.register_buffer(f"counts{level}", torch.ones(size, dtype=torch.int64))
        every = torch.arange(sizes[0])
        self.register_buffer("maps", torch.stack([every % size for size in sizes]))
        self.register_buffer("begun", torch.tensor(False))
        self.discriminator = PatchDiscriminator(judge) if judge else None
        self.lm = CodeLM(1, sum(sizes), *lm[:4], reach=lm[4])
        self.masker = MaskedGrid(sum(sizes), *masker)

    def span(self, level: int) -> tuple[int, int]:
        """Where a level's codes lie among those of all levels, as both models of codes see them."""
        low = sum(self.sizes[:level])
        return low, low + self.sizes[level]

    @torch.no_grad()
    def start(self, pictures: Sequence[Tensor]) -> None:
        """The codebook begins as the k-means of all vectors of some pictures [B, 3, H, W].

        A batch is mostly plain ground; many of them have the rare vectors too. Vectors that are
        nearly alike count as one of their joint weight, or else the far ones would come first.
        """
        z = torch.cat([self.encoder(x - 0.5).movedim(1, -1).flatten(0, 2) for x in pictures])
        words, uses = torch.unique((z / _NEAR).round(), dim=0, return_counts=True)
        centres, labels = weighted_kmeans(words * _NEAR, uses.to(z.dtype), self.sizes[0])
        share = z.new_zeros(len(centres)).index_add_(0, labels, uses / len(pictures))
        self.vq.embed.copy_(centres)
        self.vq.count.copy_(share)
        self.vq.total.copy_(centres * share[:, None])
        self.vq.ready.fill_(True)

    @torch.no_grad()
    def shrink(self) -> None:
        """k-means of the codewords: maps, books and counts of all levels; decoders are copied."""
        words, used = self.vq.embed.detach(), self.vq.count.clamp(min=0)
        for level, size in enumerate(self.sizes):
            weights = used if self.weighted else torch.ones_like(used)
            centres, labels = weighted_kmeans(words, weights, size)
            self.maps[level] = labels
            self.books[level].copy_(centres)
            getattr(self, f"centres{level}").copy_(centres)
            counts = used.new_zeros(size).index_add_(0, labels, used)
            share = (counts / counts.sum() * 65536).round().long()
            getattr(self, f"counts{level}").copy_(1 + share)
            if level:
                self.decoders[level].load_state_dict(self.decoders[0].state_dict())
        self._look()
        self.begun.fill_(True)

    def _look(self) -> None:
        """Models of codes begin with what codes look like, so that levels learn from each other."""
        books = torch.cat([getattr(self, f"centres{level}") for level in range(len(self.sizes))])
        books = (books - books.mean(0)) / books.std().clamp(min=_DELTA)
        for into in (self.lm.embed[0], self.masker.embed.weight[:-1]):
            shape = (books.shape[1], into.shape[1])
            draw = torch.Generator().manual_seed(shape[1])
            into.copy_(books @ torch.randn(shape, generator=draw).to(books) / shape[0] ** 0.5)

    @torch.no_grad()
    def codes(self, x: Tensor, level: int) -> Tensor:
        """Codes int64 [B, h, w] of pictures [B, 3, H, W] of 0 to 1."""
        found: Tensor = self.maps[level][self.vq.encode(self.encoder(x - 0.5))]
        return found

    def pictures(self, codes: Tensor, level: int, *, tuned: bool = True) -> Tensor:
        """Pictures [B, 3, H, W], about 0 to 1, of codes [B, h, w].

        Args:
            codes: Of a level.
            level: Which one.
            tuned: Through its own book and decoder; else the centres of k-means go through the
                decoder of the whole codebook.
        """
        book = self.books[level] if tuned else getattr(self, f"centres{level}")
        if not self.begun and not level:
            book = self.vq.embed
        vectors = F.embedding(codes, book).movedim(-1, 1)
        out: Tensor = self.decoders[level if tuned else 0](vectors) + 0.5
        return out

    def forward(
        self,
        x: Tensor,
        level: int,
        *,
        gaps: int = 0,
        quantised: bool = True,
        judged: bool = False,
        whole: bool,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of pictures [B, 3, H, W] of 0 to 1, and what to report.

        Args:
            x: The pictures.
            level: Which book and decoder learn, and whose codes the causal model learns, once the
                encoder has.
            gaps: Of which level the masked model learns.
            quantised: Whether vectors become codes, while the encoder learns.
            judged: Whether the discriminator counts.
            whole: Whether the encoder and the codebook learn, rather than what comes after.
        """
        some = x[: max(1, len(x) // 2)]  # models of codes are cheaper than the rest
        if whole:
            z = self.encoder(some - 0.5)
            found = self.vq(z) if quantised else None
            y = self.decoders[0](z if found is None else found.z_q) + 0.5
            total, told = self._losses(some, y, judged)
            if found is not None:
                total = total + 0.25 * found.commit_loss
                told |= {"used": found.stats["used"].mean()}
            return total, told
        if not self.begun:
            self.shrink()
        every = self.codes(x, 0)
        codes, grid, (low, high) = self.maps[level][every], every.shape[1:], self.span(level)
        total, told = self._losses(some, self.pictures(codes[: len(some)], level), judged)
        flat = codes.flatten(1)
        logits = self.lm(flat[None] + low)[0, ..., low:high]
        nats = F.cross_entropy(logits.flatten(0, 1), flat.flatten())
        span = self.span(gaps)
        holes = self.masker.nats(
            self.maps[gaps][every].flatten(1) + span[0], (grid[0], grid[1]), span
        )
        told |= {"nats": nats.detach(), "gap_nats": holes.detach()}
        return total + nats + holes, told

    def _losses(self, x: Tensor, y: Tensor, judged: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """L1, the discriminator's features and judgement, and what it learns from itself."""
        l1 = (y - x).abs().mean()
        told = {"l1": l1.detach()}
        if not judged or self.discriminator is None:
            return l1, told
        real, fake = self.discriminator(x), self.discriminator(y)
        losses = (l1, feature_matching(real, fake), hinge_generator(fake))
        # eq. 7 of VQGAN, at the picture rather than at the last layer; so the codec's losses leave
        # the discriminator's weights alone
        grads = [torch.autograd.grad(loss, y, retain_graph=True)[0] for loss in losses]
        gradient = grads[0]
        for weight, grad in zip((self.features, self.adversarial), grads[1:], strict=True):
            scale = (grads[0].norm() / (grad.norm() + _DELTA)).clamp(max=_MOST)
            gradient = gradient + weight * scale * grad
        along = (y * gradient).sum()
        verdict = hinge_discriminator(self.discriminator(x), self.discriminator(y.detach()))
        told |= {"features": losses[1].detach(), "judge": verdict.detach()}
        return along + (l1 - along).detach() + verdict, told
