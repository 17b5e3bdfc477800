"""Parts of dense prediction: separable convolutions, dilation for stride, pyramids, a decoder.

All upsampling is bilinear with ``align_corners=False``: pixel centres stay where they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus.errors import InvalidInputError


class PointwiseConv2d(nn.Conv2d):
    """A convolution of single pixels; with a stride, of those pixels alone.

    The gradient of torch's own strided one writes beyond its buffers on CPUs with AVX-512 (oneDNN
    in torch 2.13), so the pixels are chosen first.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Pixels [B, C, H, W] to [B, C', H / stride, W / stride], rounded up."""
        down, across = self.stride
        return F.conv2d(x[..., ::down, ::across], self.weight, self.bias, groups=self.groups)


def conv(
    inputs: int,
    outputs: int,
    kernel: int = 3,
    *,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    act: bool = True,
) -> nn.Sequential:
    """Convolution without bias that keeps the size, batch norm, and a rectifier.

    Example:
        >>> conv(2, 4, 3, dilation=6)(torch.zeros(1, 2, 9, 9)).shape
        torch.Size([1, 4, 9, 9])
    """
    reach = dilation * (kernel - 1) // 2
    kind = PointwiseConv2d if kernel == 1 else nn.Conv2d
    parts: list[nn.Module] = [
        kind(inputs, outputs, kernel, stride, reach, dilation, groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    return nn.Sequential(*parts, *([nn.ReLU(inplace=True)] if act else []))


class SeparableConv2d(nn.Sequential):
    """A convolution of each channel alone, then a mix at each pixel; norm and rectifier after both.

    Args:
        inputs: Channels in.
        outputs: Channels out.
        kernel: Side of the kernel.
        stride: Of the first convolution.
        dilation: Of the first convolution.

    Example:
        >>> sum(m.weight.numel() for m in SeparableConv2d(256, 256).modules()
        ...     if isinstance(m, nn.Conv2d))  # 256 9 + 256 256; one dense 3x3 has 589,824
        67840
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 3, *, stride: int = 1, dilation: int = 1
    ) -> None:
        super().__init__(
            conv(inputs, inputs, kernel, stride=stride, dilation=dilation, groups=inputs),
            conv(inputs, outputs, 1),
        )


def make_atrous(stages: Sequence[nn.Module], output_stride: int, *, entered: int = 1) -> int:
    """Turn the strides of the last stages into dilation; the weights stay as they are.

    At the positions that the strided network had, the dense one gives the same numbers.

    Args:
        stages: Parts of a network in order, each with at most one step of stride; within a stage,
            what is registered behind that step comes behind it.
        output_stride: Stride to stop at.
        entered: Stride of what the first stage reads.

    Returns:
        The stride of the last stage: ``output_stride``, or less.

    Raises:
        InvalidInputError: The stages step over that stride, or a stage was dilated before.
    """
    stride, dilation = entered, 1
    for number, stage in enumerate(stages):
        convs = [m for m in stage.modules() if isinstance(m, nn.Conv2d)]
        step = max((c.stride[0] for c in convs), default=1)
        if any(c.dilation[0] > 1 for c in convs):
            raise InvalidInputError(f"stage {number} is dilated already; make_atrous runs once")
        if stride < output_stride < stride * step:
            raise InvalidInputError(
                f"stage {number} goes from stride {stride} to {stride * step}, past "
                f"output_stride {output_stride}; use a stride between two stages"
            )
        held = stride * step > output_stride  # this stage trades its stride
        behind = dilation * (step if held else 1)
        last = max((i for i, c in enumerate(convs) if _steps(c)), default=-1)
        for i, c in enumerate(convs):
            rate = dilation if i <= last else behind
            if held:
                c.stride = (1, 1)
            if rate > 1:
                c.dilation = (rate, rate)
                c.padding = tuple(rate * int(p) for p in c.padding)
        dilation, stride = behind, stride if held else stride * step
    return stride


def _steps(c: nn.Conv2d) -> bool:
    """Whether a convolution steps; a 1x1 on a shortcut steps too, and has nothing to dilate."""
    return c.stride[0] > 1 and c.kernel_size[0] > 1


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: the same map at several reaches, and as a whole.

    Args:
        inputs: Channels in.
        rates: Dilation of each 3x3 branch; at 6, 12 and 18 they reach 13, 25 and 37 cells. A rate
            as large as the map leaves a 1x1.
        width: Channels of each branch and of the result.
        image_pool: Whether a branch sees the mean of the map.
        separable: Whether the 3x3 branches are separable.
        dropout: Of whole channels of the result.

    Example:
        >>> ASPP(8, (1, 2), 4).eval()(torch.zeros(1, 8, 5, 5)).shape
        torch.Size([1, 4, 5, 5])
    """

    def __init__(
        self,
        inputs: int,
        rates: Sequence[int] = (6, 12, 18),
        width: int = 256,
        *,
        image_pool: bool = True,
        separable: bool = True,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.pool = conv(inputs, width, 1) if image_pool else None
        branches: list[nn.Module] = [conv(inputs, width, 1)]
        for rate in rates:
            kind = SeparableConv2d if separable else conv
            branches.append(kind(inputs, width, 3, dilation=rate))
        self.branches = nn.ModuleList(branches)
        self.project = conv((len(branches) + image_pool) * width, width, 1)
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, H, W] to [B, width, H, W]."""
        seen = [branch(x) for branch in self.branches]
        if self.pool is not None:
            whole = self.pool(x.mean((2, 3), keepdim=True))  # [B, width, 1, 1]
            seen.insert(0, whole.expand(-1, -1, *x.shape[2:]))
        out: Tensor = self.dropout(self.project(torch.cat(seen, 1)))
        return out


class SkipDecoder(nn.Module):
    """DeepLab's decoder: a coarse map refined with one early map of the encoder.

    Args:
        inputs: Channels of the coarse map.
        skip: Channels of the early map.
        reduced: Channels that the early map is cut down to, so that it does not outweigh the rest.
        width: Channels of the result.
        separable: Whether its two 3x3 are separable.

    Example:
        >>> SkipDecoder(8, 4, 2, 6).eval()(torch.zeros(1, 8, 3, 3), torch.zeros(1, 4, 12, 12)).shape
        torch.Size([1, 6, 12, 12])
    """

    def __init__(
        self, inputs: int, skip: int, reduced: int = 48, width: int = 256, *, separable: bool = True
    ) -> None:
        super().__init__()
        kind = SeparableConv2d if separable else conv
        self.reduce = conv(skip, reduced, 1)
        self.refine = nn.Sequential(kind(inputs + reduced, width, 3), kind(width, width, 3))

    def forward(self, coarse: Tensor, early: Tensor) -> Tensor:
        """Maps [B, C, h, w] and [B, skip, H, W] to [B, width, H, W]."""
        out: Tensor = self.refine(
            torch.cat([upsample(coarse, early.shape[-2:]), self.reduce(early)], 1)
        )
        return out


def upsample(x: Tensor, size: Sequence[int]) -> Tensor:
    """A map at a larger size, bilinear between pixel centres.

    Example:
        >>> upsample(torch.tensor([[[[0.0, 4.0]]]]), (1, 4)).tolist()
        [[[[0.0, 1.0, 3.0, 4.0]]]]
    """
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)
