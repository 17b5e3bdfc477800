"""Pictures as sequences of patches, and positions on their grid."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus.errors import InvalidInputError

Patch = int | tuple[int, int]
Order = Literal["channel-last", "channel-first"]


def _sides(patch: Patch) -> tuple[int, int]:
    return (patch, patch) if isinstance(patch, int) else patch


def grid_of(size: tuple[int, int], patch: Patch) -> tuple[int, int]:
    """Rows and columns of patches in a picture.

    Args:
        size: Its height and width.
        patch: Side of a patch, or its height and width.

    Raises:
        InvalidInputError: A side is not a multiple of the patch's.

    Example:
        >>> grid_of((48, 96), 16)
        (3, 6)
    """
    for name, side, p in zip(("height", "width"), size, _sides(patch), strict=True):
        if side % p or side < p:
            near = [n for n in (side // p * p, (side // p + 1) * p) if n]
            raise InvalidInputError(
                f"a {name} of {side} cannot be cut into patches of {p}; the nearest that can: "
                f"{' and '.join(map(str, near))}"
            )
    return size[0] // _sides(patch)[0], size[1] // _sides(patch)[1]


def patchify(pictures: Tensor, patch: Patch, order: Order = "channel-last") -> Tensor:
    """Cut pictures into patches, row by row.

    Args:
        pictures: [B, C, H, W].
        patch: Side of a patch, or its height and width.
        order: Whether the values of a patch run by (row, column, channel) or (channel, row,
            column).

    Returns:
        [B, N, values of a patch].

    Example:
        >>> patchify(torch.arange(8).view(1, 1, 2, 4), 2).tolist()
        [[[0, 1, 4, 5], [2, 3, 6, 7]]]
    """
    rows, columns = grid_of((pictures.shape[-2], pictures.shape[-1]), patch)
    (ph, pw), channels = _sides(patch), pictures.shape[1]
    x = pictures.reshape(-1, channels, rows, ph, columns, pw)
    axes = (0, 2, 4, 3, 5, 1) if order == "channel-last" else (0, 2, 4, 1, 3, 5)
    return x.permute(axes).reshape(len(pictures), rows * columns, -1)


def unpatchify(
    tokens: Tensor, grid: tuple[int, int], patch: Patch, order: Order = "channel-last"
) -> Tensor:
    """The inverse of :func:`patchify`.

    Args:
        tokens: [B, N, values of a patch].
        grid: Rows and columns of patches.
        patch: Side of a patch, or its height and width.
        order: As it was cut.

    Returns:
        [B, C, H, W].

    Raises:
        InvalidInputError: There are not as many patches as the grid has.
    """
    rows, columns = grid
    if tokens.shape[1] != rows * columns:
        raise InvalidInputError(f"{tokens.shape[1]} patches do not fill {rows} x {columns}")
    ph, pw = _sides(patch)
    shape, axes = (
        ((rows, columns, ph, pw, -1), (0, 5, 1, 3, 2, 4))
        if order == "channel-last"
        else ((rows, columns, -1, ph, pw), (0, 3, 1, 4, 2, 5))
    )
    x = tokens.reshape(len(tokens), *shape).permute(axes)
    return x.reshape(len(tokens), -1, rows * ph, columns * pw)


class PatchEmbed(nn.Module):
    """Patches as tokens: a convolution as wide as its stride, drawn as the linear layer it is.

    Args:
        channels: Channels of the pictures.
        width: Width D of the tokens.
        patch: Side of a patch, or its height and width.

    Example:
        >>> PatchEmbed(3, 8, 4)(torch.zeros(2, 3, 8, 12)).shape
        torch.Size([2, 6, 8])
    """

    def __init__(self, channels: int, width: int, patch: Patch) -> None:
        super().__init__()
        self.patch = _sides(patch)
        self.projection = nn.Conv2d(channels, width, self.patch, self.patch)
        nn.init.xavier_uniform_(self.projection.weight.view(width, -1))
        nn.init.zeros_(self.projection.bias)  # type: ignore[arg-type]

    def forward(self, pictures: Tensor) -> Tensor:
        """Pictures [B, C, H, W] to tokens [B, N, D]."""
        grid_of((pictures.shape[-2], pictures.shape[-1]), self.patch)
        tokens: Tensor = self.projection(pictures).flatten(2).transpose(1, 2)
        return tokens


def sincos2d(
    grid: tuple[int, int],
    width: int,
    *,
    class_token: bool = False,
    axis_first: Literal["row", "column"] = "row",
    temperature: float = 10_000.0,
) -> Tensor:
    """Fixed positions: half of the width for each axis, half of that sines and half cosines.

    Args:
        grid: Rows and columns.
        width: Width D, a multiple of 4.
        class_token: Whether a row of zeros for a class token comes first.
        axis_first: The axis of the first half; checkpoints of MAE have the column there.
        temperature: Longest wavelength over 2 pi.

    Returns:
        float32 [N, D], or [1 + N, D].

    Raises:
        InvalidInputError: The width is no multiple of 4.

    Example:
        >>> sincos2d((1, 2), 4, axis_first="column")[1].tolist()  # sin 1, cos 1 of column 1
        [0.8414709568023682, 0.5403022766113281, 0.0, 1.0]
    """
    if width % 4:
        raise InvalidInputError(f"positions on a grid need a width that 4 divides, got {width}")
    steps = torch.arange(width // 4, dtype=torch.float64) / (width // 4)
    rates = temperature**-steps
    row, column = (
        (torch.arange(n, dtype=torch.float64)[:, None] * rates) for n in grid
    )  # [n, D / 4]
    row = torch.cat([row.sin(), row.cos()], 1)[:, None].expand(-1, grid[1], -1)
    column = torch.cat([column.sin(), column.cos()], 1)[None].expand(grid[0], -1, -1)
    halves = [row, column] if axis_first == "row" else [column, row]
    table = torch.cat(halves, 2).reshape(-1, width)
    return torch.cat([table.new_zeros(int(class_token), width), table]).float()


def resize_positions(table: Tensor, grid: tuple[int, int], to: tuple[int, int]) -> Tensor:
    """Learned positions for another grid, by bicubic interpolation.

    Args:
        table: [N, D].
        grid: Rows and columns that it was learned for.
        to: Rows and columns that are wanted.

    Returns:
        [N', D].
    """
    if grid == to:
        return table
    plane = table.T.reshape(1, -1, *grid)
    return F.interpolate(plane, size=to, mode="bicubic")[0].flatten(1).T.contiguous()
