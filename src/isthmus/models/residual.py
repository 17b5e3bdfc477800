"""A residual convolutional network whose every stage halves the map."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from isthmus.nn.dense import conv


class Residual(nn.Module):
    """Convolutions beside a shortcut: two 3x3, or 1x1, 3x3 and 1x1 at a quarter of the width."""

    def __init__(self, inputs: int, outputs: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        if bottleneck:
            inner = outputs // 4
            self.body = nn.Sequential(
                conv(inputs, inner, 1),
                conv(inner, inner, 3, stride=stride),
                conv(inner, outputs, 1, act=False),
            )
        else:
            self.body = nn.Sequential(
                conv(inputs, outputs, 3, stride=stride), conv(outputs, outputs, 3, act=False)
            )
        same = stride == 1 and inputs == outputs
        self.shortcut = (
            nn.Identity() if same else conv(inputs, outputs, 1, stride=stride, act=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, H, W] to [B, C', H / stride, W / stride]."""
        return torch.relu(self.body(x) + self.shortcut(x))


class ResidualNet(nn.Module):
    """A stem of stride 2 and stages of stride 2 each; no pooling, as dense prediction wants it.

    Args:
        widths: Channels of each stage.
        depths: Residual blocks of each stage.
        stem: Channels of the stem.
        bottleneck: Whether blocks are of three convolutions; (256, 512, 1024, 2048) by
            (3, 4, 23, 3) is a ResNet-101.

    Example:
        >>> [f.shape[-1] for f in ResidualNet((4, 8), (1, 1), 4)(torch.zeros(2, 3, 32, 32))]
        [8, 4]
    """

    def __init__(
        self, widths: Sequence[int], depths: Sequence[int], stem: int = 64, bottleneck: bool = False
    ) -> None:
        super().__init__()
        self.stem = conv(3, stem, 3, stride=2)
        stages: list[nn.Module] = []
        inputs = stem
        for width, depth in zip(widths, depths, strict=True):
            blocks = [Residual(inputs, width, 2, bottleneck)]
            blocks += [Residual(width, width, 1, bottleneck) for _ in range(depth - 1)]
            stages.append(nn.Sequential(*blocks))
            inputs = width
        self.stages = nn.ModuleList(stages)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> list[Tensor]:
        """Pictures [B, 3, H, W] to the maps of all stages, the finest first."""
        x, maps = self.stem(x), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps
