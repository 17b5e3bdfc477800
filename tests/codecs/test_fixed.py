"""Codes at a fixed number of bits."""

import pytest
import torch

from isthmus.codecs.fixed import bits_of, pack_codes, unpack_codes
from isthmus.errors import BrokenFileError, InvalidInputError


@pytest.mark.parametrize("bits", [1, 4, 10, 13])
def test_codes_come_back_and_take_their_bits(bits: int) -> None:
    draw = torch.Generator().manual_seed(bits)
    codes = torch.randint(1 << bits, (2, 35), generator=draw)
    data = pack_codes(codes, bits)
    # as one whole number, written by Python itself
    number = 0
    for code in codes.flatten().tolist():
        number = number << bits | code
    number <<= len(data) * 8 - 70 * bits
    assert data == number.to_bytes(-(-70 * bits // 8), "big")
    assert torch.equal(unpack_codes(data, 70, bits), codes.flatten())
    with pytest.raises(BrokenFileError, match="are not"):
        unpack_codes(data + b"x", 70, bits)
    assert unpack_codes(b"", 0, bits).shape == (0,)


def test_bits_behind_the_last_code_and_odd_codebooks_are_refused() -> None:
    with pytest.raises(BrokenFileError, match="behind the last"):
        unpack_codes(b"\xff\xff", 1, 10)
    for size in (0, 1, 12):
        with pytest.raises(InvalidInputError, match="2, 4, 8"):
            bits_of(size)
