"""Discriminators of sound: nets that tell real from decoded sound, and whose features compare them.

All take [B, N] and give logits and features of each of their scales.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from isthmus.errors import InvalidInputError

Judged = list[tuple[Tensor, list[Tensor]]]
"""Logits and features of each scale."""

SLOPE = 0.2


class _Stack(nn.Module):
    """Convolutions with leaky ReLUs between them, whose outputs are the features."""

    def __init__(self, convs: Sequence[nn.Module], slope: float = SLOPE) -> None:
        super().__init__()
        self.convs, self.slope = nn.ModuleList(weight_norm(conv) for conv in convs), slope

    def forward(self, h: Tensor) -> tuple[Tensor, list[Tensor]]:
        features = []
        for conv in self.convs[:-1]:
            h = F.leaky_relu(conv(h), self.slope)
            features.append(h)
        return self.convs[-1](h), features


class STFTDiscriminator(nn.Module):
    """Convolutions over the complex spectrum at several window lengths (EnCodec, section 3.4).

    3x9 to C channels; 3x9 of stride 2 along frequency and dilations 1, 2 and 4 along time; 3x3; and
    3x3 to one logit a place.

    Args:
        sizes: FFT sizes; hops are a quarter.
        channels: C.

    Example:
        >>> net = STFTDiscriminator((256, 128), 2)
        >>> [logit.shape for logit, _ in net(torch.zeros(1, 1024))]
        [torch.Size([1, 1, 17, 17]), torch.Size([1, 1, 33, 9])]
    """

    def __init__(
        self, sizes: Sequence[int] = (2048, 1024, 512, 256, 128), channels: int = 32
    ) -> None:
        super().__init__()
        self.sizes = tuple(sizes)

        def stack() -> _Stack:
            c = channels
            convs = [nn.Conv2d(2, c, (3, 9), padding=(1, 4))]
            convs += [
                nn.Conv2d(c, c, (3, 9), (1, 2), padding=(d, 4), dilation=(d, 1)) for d in (1, 2, 4)
            ]
            convs += [nn.Conv2d(c, c, 3, padding=1), nn.Conv2d(c, 1, 3, padding=1)]
            return _Stack(convs)

        self.stacks = nn.ModuleList(stack() for _ in self.sizes)

    def forward(self, x: Tensor) -> Judged:
        """Judge sounds [B, N].

        Raises:
            InvalidInputError: They are shorter than half the largest FFT.
        """
        if x.shape[-1] <= max(self.sizes) // 2:
            raise InvalidInputError(f"sounds need more than {max(self.sizes) // 2} samples")
        found = []
        for size, stack in zip(self.sizes, self.stacks, strict=True):
            window = torch.hann_window(size, device=x.device)
            spectrum = torch.stft(
                x, size, size // 4, window=window, normalized=True, return_complex=True
            )
            parts = torch.stack([spectrum.real, spectrum.imag], 1)  # [B, 2, F, T]
            found.append(stack(parts.transpose(2, 3)))
        return found


class PeriodDiscriminator(nn.Module):
    """Convolutions along every p-th sample (Kong et al., "HiFi-GAN", 2020).

    Args:
        periods: p of each scale.
        widths: Channels of the layers; all but the last have stride 3.
    """

    def __init__(
        self,
        periods: Sequence[int] = (2, 3, 5, 7, 11),
        widths: Sequence[int] = (32, 128, 512, 1024, 1024),
    ) -> None:
        super().__init__()
        self.periods = tuple(periods)

        def stack() -> _Stack:
            steps = [*[3] * (len(widths) - 1), 1]
            before = [1, *widths[:-1]]
            convs = [
                nn.Conv2d(a, b, (5, 1), (s, 1), padding=(2, 0))
                for a, b, s in zip(before, widths, steps, strict=True)
            ]
            return _Stack([*convs, nn.Conv2d(widths[-1], 1, (3, 1), padding=(1, 0))], 0.1)

        self.stacks = nn.ModuleList(stack() for _ in self.periods)

    def forward(self, x: Tensor) -> Judged:
        """Judge sounds [B, N]."""
        found = []
        for period, stack in zip(self.periods, self.stacks, strict=True):
            padded = F.pad(x[:, None], (0, -x.shape[-1] % period), "reflect")
            found.append(stack(padded.view(len(x), 1, -1, period)))
        return found


class ScaleDiscriminator(nn.Module):
    """Grouped convolutions over the sound and its averages over 2 and 4 samples (MelGAN).

    Args:
        scales: How many.
        widths: Channels; every layer but the first has stride 4.
    """

    def __init__(self, scales: int = 3, widths: Sequence[int] = (16, 64, 256, 1024)) -> None:
        super().__init__()
        self.scales = scales

        def stack() -> _Stack:
            convs = [nn.Conv1d(1, widths[0], 15, padding=7)]
            for a, b in itertools.pairwise(widths):
                convs.append(nn.Conv1d(a, b, 41, 4, padding=20, groups=max(1, a // 4)))
            convs.append(nn.Conv1d(widths[-1], widths[-1], 5, padding=2))
            return _Stack([*convs, nn.Conv1d(widths[-1], 1, 3, padding=1)])

        self.stacks = nn.ModuleList(stack() for _ in range(scales))

    def forward(self, x: Tensor) -> Judged:
        """Judge sounds [B, N]."""
        found, h = [], x[:, None]
        for stack in self.stacks:
            found.append(stack(h))
            h = F.avg_pool1d(h, 4, 2, 1)
        return found


class SeveralDiscriminators(nn.Module):
    """Discriminators side by side; their scales follow each other.

    Args:
        *parts: Of [B, N] each.

    Example:
        >>> both = PeriodDiscriminator((2,), (2,)), ScaleDiscriminator(2, (2,))
        >>> len(SeveralDiscriminators(*both)(torch.zeros(1, 64)))
        3
    """

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Judged:
        """Judge sounds [B, N]."""
        return [scale for part in self.parts for scale in part(x)]
