"""Codes at a fixed number of bits each: what a rate in bits a second counts."""

from __future__ import annotations

import numpy as np
import torch

from isthmus.errors import BrokenFileError, InvalidInputError


def bits_of(size: int) -> int:
    """Bits of a code of a codebook.

    Raises:
        InvalidInputError: The size is no power of two from 2 on.

    Example:
        >>> bits_of(1024), bits_of(8192)
        (10, 13)
    """
    if size < 2 or size & (size - 1):
        raise InvalidInputError(f"a codebook of fixed bits has 2, 4, 8 ... codes, got {size}")
    return size.bit_length() - 1


def pack_codes(codes: torch.Tensor, bits: int) -> bytes:
    r"""Codes one after another, the highest bit first, zeros up to the last byte.

    Args:
        codes: Whole numbers from 0 to 2^bits - 1, any shape.
        bits: Of each.

    Example:
        >>> pack_codes(torch.tensor([1, 2]), 10)
        b'\x00@ '
    """
    places = np.arange(bits - 1, -1, -1)
    split = (codes.reshape(-1, 1).numpy() >> places) & 1
    return np.packbits(split.astype(np.uint8)).tobytes()


def unpack_codes(data: bytes, count: int, bits: int) -> torch.Tensor:
    """The codes, int64 [count].

    Raises:
        BrokenFileError: More or fewer bytes than they take, or bits set behind them.
    """
    if len(data) != -(-count * bits // 8):
        raise BrokenFileError(f"{count} codes of {bits} bits are not {len(data)} bytes")
    split = np.unpackbits(np.frombuffer(data, np.uint8)).astype(np.int64)
    if split[count * bits :].any():
        raise BrokenFileError("bits are set behind the last code")
    places = 1 << np.arange(bits - 1, -1, -1, dtype=np.int64)
    return torch.from_numpy(split[: count * bits].reshape(count, bits) @ places)
