"""A clip to be learnt by heart: handwritten digits drift over a photograph that does not move.

Like the moving digits of video prediction, on a ground with texture. Places change by parts of a
pixel, and every digit bounces off the edges.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from isthmus.workbench.digits import whole
from isthmus.workbench.photographs import photograph

SIDE = 16
"""Side of a digit in pixels."""


def drifting(
    frames: int = 24, height: int = 48, width: int = 64, *, digits: int = 3, seed: int = 0
) -> Tensor:
    """One clip, uint8 [frames, 3, height, width].

    Args:
        frames: Pictures.
        height: Of a picture, 16 or more.
        width: Likewise.
        digits: How many drift.
        seed: Of what is drawn.
    """
    draw = torch.Generator().manual_seed(seed)
    ground = torch.from_numpy(photograph("coffee")).permute(2, 0, 1).float() / 255
    ground = F.interpolate(ground[None], (height, width), mode="area")[0]
    room = torch.tensor([height - SIDE, width - SIDE]).float()
    start = torch.rand(digits, 2, generator=draw) * room
    speed = 3 * torch.rand(digits, 2, generator=draw) - 1.5  # pixels a picture
    colour = 0.3 + 0.7 * torch.rand(digits, 3, 1, 1, generator=draw)
    learnt = whole("learn")
    which = torch.randint(len(learnt), (digits,), generator=draw)
    shapes = F.interpolate(learnt[which][:, None].float() / 16, (SIDE, SIDE), mode="bilinear")
    time = torch.arange(frames)[:, None, None]
    walked = start + time * speed
    place = room - (walked.remainder(2 * room) - room).abs()  # [T, digits, 2], off the edges
    out = ground.expand(frames, -1, -1, -1)
    for d in range(digits):
        mask = _placed(shapes[d], place[:, d], height, width)
        out = out * (1 - mask) + colour[d] * mask
    return (255 * out).round().to(torch.uint8)


def _placed(shape: Tensor, corner: Tensor, height: int, width: int) -> Tensor:
    """A shape [1, S, S] with its corner at places [T, 2], between pixels too: [T, 1, H, W]."""
    rows = (torch.arange(height) - corner[:, :1]) / (SIDE - 1) * 2 - 1  # [T, H]
    columns = (torch.arange(width) - corner[:, 1:]) / (SIDE - 1) * 2 - 1
    grid = torch.stack(
        [
            columns[:, None, :].expand(-1, height, -1),
            rows[:, :, None].expand(-1, -1, width),
        ],
        -1,
    )
    many = shape[None].expand(len(corner), -1, -1, -1)
    return F.grid_sample(many, grid, align_corners=True).clamp(0, 1)
