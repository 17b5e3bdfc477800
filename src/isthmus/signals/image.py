"""Images: files in and out by Pillow, as tensors; records of pictures and of their masks.

A picture is uint8 [3, H, W]. A mask is uint8 [H, W], the number of a class at every pixel;
:data:`IGNORED` marks pixels that nobody has labelled. Pillow is in the extra ``codec``.
"""

from __future__ import annotations

import colorsys
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from isthmus.errors import BrokenFileError, InvalidInputError, require

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".tif", ".tiff")
"""Files that are taken for pictures."""

IGNORED = 255
"""The class of pixels without a label."""

MAX_PIXELS = 1 << 26
"""A file that says it has more is refused before anything is decoded."""


@runtime_checkable
class Pictured(Protocol):
    """A record that has a picture."""

    def picture(self) -> Tensor:
        """The picture, uint8 [3, H, W]."""
        ...


@runtime_checkable
class Exact(Pictured, Protocol):
    """A record that has every value of a picture as it is in its file."""

    def pixels(self) -> Tensor:
        """The values, uint8 [C, H, W], or int32 for 16 bits."""
        ...


@runtime_checkable
class Masked(Pictured, Protocol):
    """A record that has a picture and a class for each of its pixels."""

    def mask(self) -> Tensor:
        """The classes, uint8 [H, W]."""
        ...


@dataclass(frozen=True)
class PictureFile:
    """A picture in a file, read when it is needed."""

    path: Path

    def picture(self) -> Tensor:
        """The picture, uint8 [3, H, W]."""
        return read_image(self.path)

    def pixels(self) -> Tensor:
        """Every value as it is, [C, H, W]; see :func:`read_pixels`."""
        return read_pixels(self.path)


@dataclass(frozen=True)
class MaskedFiles(PictureFile):
    """A picture and its mask, in two files."""

    mask_path: Path

    def mask(self) -> Tensor:
        """The classes, uint8 [H, W]."""
        return read_mask(self.mask_path)


def read_image(path: str | Path) -> Tensor:
    """Read a picture.

    Args:
        path: A file of any format that Pillow knows; transparent pixels lie on white, and the
            orientation that a camera noted is applied.

    Returns:
        uint8 [3, H, W].

    Raises:
        BrokenFileError: It is missing, no picture, cut short, or claims to be huge.
        MissingExtraError: Pillow is not installed.
    """
    with _opened(path) as image:
        image = require("PIL.ImageOps", "codec").exif_transpose(image)
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            white = require("PIL.Image", "codec").new("RGBA", image.size, "white")
            white.alpha_composite(image)
            image = white
        elif image.mode.startswith("I;16") or image.mode == "I":
            image = image.point(lambda v: v / 256).convert("L")
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()


def read_pixels(path: str | Path, *, deep: bool = True) -> Tensor:
    """Read every value of a picture: grey or RGB, with alpha where the file has it.

    Palettes are looked up, and the orientation that a camera noted is applied; colours of other
    spaces become RGB.

    Args:
        path: A file of any format that Pillow knows.
        deep: Whether 16-bit grey stays what it is; else it becomes 8 bits.

    Returns:
        uint8 [C, H, W], or int32 for 16 bits.

    Raises:
        BrokenFileError: It is missing, no picture, cut short, or claims to be huge.
        InvalidInputError: It has values that are no whole numbers of 16 bits.
    """
    with _opened(path) as image:
        image = require("PIL.ImageOps", "codec").exif_transpose(image)
        if image.mode.startswith("I") or image.mode == "F":
            values = np.array(image)
            if image.mode == "F" or values.min() < 0 or values.max() > 0xFFFF:
                raise InvalidInputError(f"{path} has values beyond 16 bits; store 8 or 16 bits")
            grey = torch.from_numpy(values.astype(np.int32))[None]
            return grey if deep else (grey >> 8).to(torch.uint8)
        clear = "transparency" in image.info
        if image.mode == "1":
            image = image.convert("L")
        elif image.mode == "P" or clear:
            image = image.convert("RGBA" if clear else "RGB")
        elif image.mode == "PA":
            image = image.convert("RGBA")
        elif image.mode not in ("L", "LA", "RGB", "RGBA"):
            image = image.convert("RGB")
        pixels = torch.from_numpy(np.array(image))
        return (pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)).contiguous()


def write_pixels(path: str | Path, pixels: Tensor, name: str = "") -> None:
    """Write every value of a picture in the format of the file's suffix.

    Args:
        path: The file.
        pixels: uint8 [C, H, W], C from 1 to 4, or int32 [1, H, W] of 16 bits.
        name: What messages call the file.

    Raises:
        InvalidInputError: The format has no alpha, no 16 bits, or is unknown.
        OSError: The file cannot be written.
    """
    path, name = Path(path), name or str(path)
    kind, planes = path.suffix.lower(), len(pixels)
    flat = kind in (".jpg", ".jpeg", ".bmp", ".ppm")
    if planes in (2, 4) and flat:
        raise InvalidInputError(f"{name}: {kind} has no alpha; write .png or .webp")
    if not 1 <= planes <= 4 or (pixels.dtype != torch.uint8 and planes > 1):
        raise InvalidInputError(
            f"{planes} planes of {pixels.dtype} are no picture; 1 to 4 planes of 8 bits, or one of "
            "16, are"
        )
    values: Any = pixels.permute(1, 2, 0).cpu().numpy()
    if planes == 1:
        values = values[..., 0]
    if pixels.dtype != torch.uint8:
        if kind not in (".png", ".tif", ".tiff"):
            raise InvalidInputError(f"{name}: {kind} has no 16 bits; write .png")
        values = values.astype(np.uint16)
    how: dict[str, Any] = {"lossless": True, "exact": True} if kind == ".webp" else {}
    if kind in (".jpg", ".jpeg"):
        how = {"quality": 95, "subsampling": 0}
    image = require("PIL.Image", "codec").fromarray(np.ascontiguousarray(values))
    try:
        image.save(path, **how)
    except ValueError as error:
        raise InvalidInputError(
            f"{name} has no suffix of a picture; use one of {', '.join(SUFFIXES)}"
        ) from error


def read_mask(path: str | Path) -> Tensor:
    """Read a mask: a picture whose grey value, or palette entry, is the class of a pixel.

    Returns:
        uint8 [H, W].

    Raises:
        BrokenFileError: As for :func:`read_image`, or its pixels have several values each.
    """
    with _opened(path) as image:
        if image.mode not in ("L", "P", "1"):
            raise BrokenFileError(
                f"{path} has pixels of the kind {image.mode}; a mask holds the number of a class "
                "at every pixel: 8-bit grey or palette"
            )
        return torch.from_numpy(np.array(image.convert("L") if image.mode == "1" else image))


def size_of(path: str | Path) -> tuple[int, int]:
    """Height and width that a file names, without decoding it.

    Raises:
        BrokenFileError: It is no picture.
    """
    with _opened(path, decode=False) as image:
        return int(image.height), int(image.width)


def write_image(path: str | Path, picture: Tensor) -> None:
    """Write a picture in the format of the file's suffix.

    Args:
        path: The file.
        picture: uint8 [3, H, W], or float [3, H, W] from 0 to 1.

    Raises:
        InvalidInputError: It is no such tensor, or the suffix stands for no format.
        OSError: The file cannot be written.
    """
    if picture.ndim != 3 or picture.shape[0] != 3:
        raise InvalidInputError(f"a picture is a tensor [3, H, W], got {list(picture.shape)}")
    if picture.is_floating_point():
        picture = (picture.clamp(0, 1) * 255).round().to(torch.uint8)
    image = require("PIL.Image", "codec").fromarray(picture.cpu().permute(1, 2, 0).numpy())
    _write(path, image)


def write_mask(path: str | Path, mask: Tensor) -> None:
    """Write a mask as a palette picture: viewers show colours, readers get the classes.

    Args:
        path: A file that ends in ``.png``.
        mask: Integers [H, W] from 0 to 255.

    Raises:
        InvalidInputError: It is no such tensor, or another suffix.
        OSError: The file cannot be written.
    """
    if Path(path).suffix.lower() != ".png":
        raise InvalidInputError(f"masks are written as .png, which keeps every value; got {path}")
    if mask.ndim != 2 or mask.is_floating_point():
        raise InvalidInputError(f"a mask is a tensor [H, W] of integers, got {list(mask.shape)}")
    image = require("PIL.Image", "codec").fromarray(mask.cpu().to(torch.uint8).numpy())
    image.putpalette([value for colour in palette(256) for value in colour])
    _write(path, image)


def palette(count: int) -> list[tuple[int, int, int]]:
    """Colours of classes: black for class 0, then hues a golden cut of the circle apart.

    Example:
        >>> palette(3)
        [(0, 0, 0), (230, 129, 46), (75, 46, 230)]
    """
    hues = [(0.075 + 0.618034 * i) % 1.0 for i in range(count - 1)]
    colours = [colorsys.hsv_to_rgb(h, 0.8, 0.9) for h in hues]
    return [(0, 0, 0), *((round(255 * r), round(255 * g), round(255 * b)) for r, g, b in colours)]


def resize(picture: Tensor, size: tuple[int, int]) -> Tensor:
    """A picture at another height and width.

    Args:
        picture: uint8 [3, H, W], resampled bilinearly without aliases, or a mask, integers
            [H, W], by the nearest pixel.
        size: Height and width.

    Example:
        >>> resize(torch.tensor([[1, 2], [3, 4]]), (1, 2)).shape
        torch.Size([1, 2])
    """
    if tuple(picture.shape[-2:]) == tuple(size):
        return picture
    if picture.ndim == 2:
        kept = F.interpolate(picture[None, None].float(), size=size, mode="nearest-exact")
        return kept[0, 0].to(picture.dtype)
    small = F.interpolate(picture[None].float(), size=size, mode="bilinear", antialias=True)
    return small[0].round().clamp(0, 255).to(picture.dtype)


def tiles(picture: Tensor, side: int) -> Tensor:
    """A picture cut into squares, its last rows and columns repeated up to whole ones.

    Args:
        picture: [C, H, W].
        side: Side of a square.

    Returns:
        [B, C side side], squares in raster order.

    Example:
        >>> tiles(torch.arange(6).view(1, 2, 3), 2).tolist()
        [[0, 1, 3, 4], [2, 2, 5, 5]]
    """
    down, across = -picture.shape[1] % side, -picture.shape[2] % side
    picture = torch.cat([picture, picture[:, -1:].expand(-1, down, -1)], 1)
    picture = torch.cat([picture, picture[..., -1:].expand(-1, -1, across)], 2)
    planes, height, width = picture.shape
    grid = picture.reshape(planes, height // side, side, width // side, side)
    return grid.permute(1, 3, 0, 2, 4).reshape(-1, planes * side * side).contiguous()


def untiled(squares: Tensor, shape: tuple[int, int, int], side: int) -> Tensor:
    """The picture [C, H, W] of that shape whose squares :func:`tiles` has cut."""
    planes, height, width = shape
    down, across = -(-height // side), -(-width // side)
    grid = squares.view(down, across, planes, side, side).permute(2, 0, 3, 1, 4)
    return grid.reshape(planes, down * side, across * side)[:, :height, :width].contiguous()


@contextlib.contextmanager
def _opened(path: str | Path, *, decode: bool = True) -> Iterator[Any]:
    image_module = require("PIL.Image", "codec")
    try:
        with image_module.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BrokenFileError(
                    f"{path} says it has {image.width} x {image.height} pixels; at most "
                    f"{MAX_PIXELS} are read"
                )
            if decode:
                image.load()
            yield image
    except FileNotFoundError as error:
        raise BrokenFileError(f"{path} is not there") from error
    except image_module.UnidentifiedImageError as error:
        raise BrokenFileError(f"{path} is no picture that Pillow can read") from error
    except image_module.DecompressionBombError as error:
        raise BrokenFileError(f"{path} says it is huge; at most {MAX_PIXELS} pixels") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise BrokenFileError(f"{path} cannot be read as a picture ({error})") from error


def _write(path: str | Path, image: Any) -> None:
    try:
        image.save(path)
    except ValueError as error:
        raise InvalidInputError(
            f"{path} has no suffix of a picture; use one of {', '.join(SUFFIXES)}"
        ) from error
