"""Codes through the range coder, packet after packet."""

import pytest
import torch

from isthmus.codecs.laws import CodeCoder
from isthmus.models.code_lm import CodeLM


@pytest.mark.parametrize("with_lm", [True, False])
@pytest.mark.parametrize(("books", "channels"), [(1, 1), (3, 2)])
def test_packets_come_back(with_lm: bool, books: int, channels: int) -> None:
    torch.manual_seed(0)
    lm = CodeLM(3, 11, 8, 1, 2, 16, reach=4).eval() if with_lm else None
    codes = torch.randint(11, (books, channels, 13))
    writer, reader = (CodeCoder(lm, books, 11, channels) for _ in range(2))
    for packet in codes.split([5, 1, 7], 2):
        data = writer.encode(packet)
        assert torch.equal(reader.decode(data, packet.shape[2]), packet)


def test_a_model_that_knows_the_codes_saves_their_bits() -> None:
    torch.manual_seed(0)
    lm = CodeLM(1, 256, 8, 1, 2, 16, reach=4).eval()
    lm.offset.data[0, 7] = 6.0
    codes = torch.full((1, 1, 100), 7)
    packed, plain = (len(CodeCoder(m, 1, 256).encode(codes)) for m in (lm, None))
    assert plain <= 108 and packed < 40
