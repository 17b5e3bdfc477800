"""Codecs of mel spectra: one codebook for what changes, one vector for what stays.

::

    mel [B, M, F] ─▶ MelEncoder ─▶ [B, D, F / 4] ─▶ codes ─▶ MelDecoder ─▶ mel [B, M, F]
    mel of elsewhere ─▶ ReferenceEncoder ─▶ g [B, G] ─┴──────────────┘

After H. Li and others, "Single-Codec", 2024 (arXiv 2406.07422): hybrid sampling adds what needs no
learning (means, repetition) to what is learnt (strided and transposed convolutions), resampling
blocks look at a slower copy of their input, and an LSTM in both directions stands on each side of
the quantizer.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from isthmus.errors import InvalidInputError
from isthmus.models.audio_disc import Judged
from isthmus.nn.conformer import ConformerBlock, relative_positions, valid_mask

LEVELS = 127
"""Steps of a component of g to each side of 0: 8 bits a component."""


class Form(NamedTuple):
    """Sizes of the nets, and which of their ideas are in use.

    Attributes:
        mels: M.
        width: Channels of encoder and decoder.
        dim: D of what is quantized.
        g_dim: G; 0 has no vector.
        blocks: Conformer blocks of the encoder, and convolution blocks of the decoder.
        heads: Of the attention.
        kernel: Of the convolutions.
        blstm: Whether LSTMs stand around the quantizer.
        hybrid: Whether means and repetitions are added where the rate changes.
        resampling: Whether there are resampling blocks.
        dropout: Of the conformer.
    """

    mels: int = 80
    width: int = 256
    dim: int = 256
    g_dim: int = 256
    blocks: int = 4
    heads: int = 4
    kernel: int = 5
    blstm: bool = True
    hybrid: bool = True
    resampling: bool = True
    dropout: float = 0.1


FACTOR = 4
"""Frames of a code."""


class Down(nn.Module):
    """A strided convolution, plus the mean of the frames where it is hybrid.

    Args:
        width: Channels.
        factor: Frames that become one.
        hybrid: Whether the mean is added.

    Example:
        >>> down = Down(1, 2)
        >>> _ = nn.init.zeros_(down.conv.weight), nn.init.zeros_(down.conv.bias)
        >>> down(torch.tensor([[[1.0, 3.0, 5.0, 5.0]]])).tolist()
        [[[2.0, 5.0]]]
    """

    def __init__(self, width: int, factor: int, *, hybrid: bool = True) -> None:
        super().__init__()
        self.factor, self.hybrid = factor, hybrid
        self.conv = nn.Conv1d(width, width, 2 * factor, factor, padding=factor // 2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, F] to [B, C, F / factor]."""
        y: Tensor = self.conv(x)
        return y + F.avg_pool1d(x, self.factor) if self.hybrid else y


class Up(nn.Module):
    """A transposed convolution, plus each frame repeated where it is hybrid; see :class:`Down`."""

    def __init__(self, width: int, factor: int, *, hybrid: bool = True) -> None:
        super().__init__()
        self.factor, self.hybrid = factor, hybrid
        self.conv = nn.ConvTranspose1d(width, width, 2 * factor, factor, padding=factor // 2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T] to [B, C, factor T]."""
        y: Tensor = self.conv(x)
        return y + x.repeat_interleave(self.factor, -1) if self.hybrid else y


class Local(nn.Module):
    """Norm, convolution, GELU, pointwise convolution, added to the input; g shifts the middle.

    Args:
        width: Channels.
        kernel: Odd.
        g_dim: Width of g; 0 for none.
    """

    def __init__(self, width: int, kernel: int, g_dim: int = 0) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, width)
        self.conv = nn.Conv1d(width, width, kernel, padding=kernel // 2)
        self.point = nn.Conv1d(width, width, 1)
        self.shift = nn.Linear(g_dim, width) if g_dim else None

    def forward(self, x: Tensor, g: Tensor | None = None) -> Tensor:
        """[B, C, F] to the same."""
        h = self.conv(self.norm(x))
        if self.shift is not None:
            h = h + self.shift(g)[..., None]
        y: Tensor = x + self.point(F.gelu(h))
        return y


class Resampled(nn.Module):
    """A resampling block: half the rate, local processing, back again, added to the input.

    Args:
        width: Channels.
        kernel: Odd.
        hybrid: See :class:`Down`.
    """

    def __init__(self, width: int, kernel: int, *, hybrid: bool = True) -> None:
        super().__init__()
        self.down, self.up = Down(width, 2, hybrid=hybrid), Up(width, 2, hybrid=hybrid)
        self.local = Local(width, kernel)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, F] to the same, F even."""
        y: Tensor = x + self.up(self.local(self.down(x)))
        return y


class Sequential(nn.Module):
    """An LSTM in both directions, added to its input.

    Args:
        width: Channels, even.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, width // 2, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T] to the same."""
        y: Tensor = self.lstm(x.transpose(1, 2))[0]
        return x + y.transpose(1, 2)


class ReferenceEncoder(nn.Module):
    """One vector for a stretch of spectrum: convolutions, then mean and deviation over its frames.

    Pooling forgets when things happened; it is the reason why g can hold what stays, only.

    Args:
        mels: M.
        width: Channels.
        g_dim: G.
        kernel: Odd.

    Example:
        >>> net = ReferenceEncoder(8, 4, 2).eval()
        >>> g = net(torch.zeros(3, 8, 20), torch.tensor([20, 7, 1]))
        >>> g.shape, bool((g.abs() <= 1).all())
        (torch.Size([3, 2]), True)
    """

    def __init__(self, mels: int, width: int, g_dim: int, kernel: int = 5) -> None:
        super().__init__()
        self.enter = nn.Conv1d(mels, width, kernel, padding=kernel // 2)
        self.middle = nn.ModuleList(
            nn.Conv1d(width, width, kernel, padding=kernel // 2) for _ in range(2)
        )
        self.leave = nn.Linear(2 * width, g_dim)

    def forward(self, mel: Tensor, frames: Tensor | None = None) -> Tensor:
        """The vector [B, G], each component from -1 to 1.

        Args:
            mel: [B, M, F].
            frames: Valid frames [B], 1 or more; all when None. What lies beyond does not matter.
        """
        if frames is None:
            frames = torch.full((len(mel),), mel.shape[2], device=mel.device)
        valid = valid_mask(frames, mel.shape[2])[:, None].to(mel.dtype)
        h = F.gelu(self.enter(mel * valid)) * valid
        for conv in self.middle:
            h = (h + F.gelu(conv(h))) * valid
        count = frames[:, None].to(mel.dtype)
        mean = h.sum(2) / count
        spread = (((h - mean[..., None]) * valid).square().sum(2) / count + 1e-5).sqrt()
        g: Tensor = torch.tanh(self.leave(torch.cat([mean, spread], 1)))
        return g


def rounded(g: Tensor) -> Tensor:
    """A vector on the grid that files hold, k / 127; gradients pass straight through.

    Example:
        >>> rounded(torch.tensor([0.5, -1.0])) * LEVELS
        tensor([  64., -127.])
    """
    return g + ((g * LEVELS).round() / LEVELS - g).detach()


class MelEncoder(nn.Module):
    """From spectra to what is quantized, a vector for every four frames.

    Args:
        form: Sizes.
    """

    def __init__(self, form: Form) -> None:
        super().__init__()
        _check(form)
        width, self.dropout = form.width, form.dropout
        self.enter = nn.Conv1d(form.mels, width, form.kernel, padding=form.kernel // 2)
        self.local = Local(width, form.kernel, form.g_dim)
        self.resampled = (
            Resampled(width, form.kernel, hybrid=form.hybrid) if form.resampling else None
        )
        self.down = Down(width, FACTOR, hybrid=form.hybrid)
        self.without = nn.Linear(form.g_dim, width, bias=False) if form.g_dim else None
        self.blocks = nn.ModuleList(
            ConformerBlock(width, form.heads, form.kernel, 2 * width, dropout=form.dropout)
            for _ in range(form.blocks)
        )
        self.lstm = Sequential(width) if form.blstm else None
        self.leave = nn.Conv1d(width, form.dim, 1)

    def forward(self, mel: Tensor, g: Tensor | None = None) -> Tensor:
        """[B, M, F] to [B, D, F / 4].

        Args:
            mel: Spectra, F a multiple of 4.
            g: What is taken away, [B, G].
        """
        x = self.local(self.enter(mel), g)
        if self.resampled is not None:
            x = self.resampled(x)
        x = self.down(x)
        if self.without is not None:
            x = x - self.without(g)[..., None]
        h = x.transpose(1, 2)  # [B, T, C]
        positions = relative_positions(h.shape[1], h.shape[2], h)
        valid = torch.ones(h.shape[:2], dtype=torch.bool, device=h.device)
        for block in self.blocks:
            h = block(h, positions, valid[:, None, None], valid)
        x = h.transpose(1, 2)
        if self.lstm is not None:
            x = self.lstm(x)
        y: Tensor = self.leave(x)
        return y


class MelDecoder(nn.Module):
    """From vectors of codes, and g, back to spectra.

    Args:
        form: Sizes.
    """

    def __init__(self, form: Form) -> None:
        super().__init__()
        _check(form)
        width, g_dim = form.width, form.g_dim
        self.enter = nn.Conv1d(form.dim, width, 1)
        self.lstm = Sequential(width) if form.blstm else None
        self.slow = nn.ModuleList(Local(width, form.kernel, g_dim) for _ in range(form.blocks))
        self.up = Up(width, FACTOR, hybrid=form.hybrid)
        self.resampled = (
            Resampled(width, form.kernel, hybrid=form.hybrid) if form.resampling else None
        )
        self.fast = nn.ModuleList(Local(width, form.kernel, g_dim) for _ in range(2))
        self.norm = nn.GroupNorm(1, width)
        self.leave = nn.Conv1d(width, form.mels, form.kernel, padding=form.kernel // 2)

    def forward(self, z: Tensor, g: Tensor | None = None) -> Tensor:
        """[B, D, T] and g [B, G] to [B, M, 4 T]."""
        x = self.enter(z)
        if self.lstm is not None:
            x = self.lstm(x)
        for block in self.slow:
            x = block(x, g)
        x = self.up(x)
        if self.resampled is not None:
            x = self.resampled(x)
        for block in self.fast:
            x = block(x, g)
        y: Tensor = self.leave(self.norm(x))
        return y


def _check(form: Form) -> None:
    if form.width % (2 * form.heads) or form.kernel % 2 == 0 or form.g_dim < 0:
        raise InvalidInputError(
            f"the width is a multiple of twice the heads, the kernel odd and g 0 or wider, got "
            f"{form.width}, {form.heads}, {form.kernel} and {form.g_dim}"
        )


class MelDiscriminator(nn.Module):
    """Convolutions over a spectrum as a picture; one logit for each small part of it.

    Args:
        width: Channels.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        wide = (1, width, width, width)
        self.convs = nn.ModuleList(
            weight_norm(nn.Conv2d(a, b, 5, 2, padding=2)) for a, b in itertools.pairwise(wide)
        )
        self.last = weight_norm(nn.Conv2d(width, 1, 3, padding=1))

    def forward(self, mel: Tensor) -> Judged:
        """Logits and features of spectra [B, M, F]."""
        h, features = mel[:, None], []
        for conv in self.convs:
            h = F.leaky_relu(conv(h), 0.2)
            features.append(h)
        return [(self.last(h), features)]
