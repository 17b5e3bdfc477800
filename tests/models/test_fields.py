"""Networks that are a video: shapes, hand values, and widths that meet a budget."""

import math

import pytest
import torch
from torch import nn

from isthmus.errors import InvalidInputError
from isthmus.models.fields import (
    Blocks,
    ContentField,
    ConvNeXtBlock,
    FrameEncoder,
    TimeField,
    UpBlock,
    budget,
    position_code,
    size,
    strides_for,
)


def test_an_up_block_by_hand():
    """With an identity for a convolution, channel 2 i + j becomes the place (i, j) of a square."""
    block = UpBlock(4, 1, 2, 1)
    with torch.no_grad():
        block.conv.weight.copy_(torch.eye(4)[:, :, None, None])
        block.conv.bias.zero_()
    x = torch.arange(4.0).view(1, 4, 1, 1)
    phi = [v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in range(4)]
    assert torch.allclose(block(x), torch.tensor(phi).view(1, 1, 2, 2), atol=1e-6)


def test_position_codes_by_hand():
    code = position_code(torch.tensor([0.0, 0.3]), 5)
    assert code.shape == (2, 10) and code[0].tolist() == [0.0] * 5 + [1.0] * 5
    want = [math.sin(1.25**i * math.pi * 0.3) for i in range(5)]
    assert torch.allclose(code[1, :5], torch.tensor(want), atol=1e-6)


def test_a_block_adds_to_what_comes_in_and_mixes_channels_per_place():
    block = ConvNeXtBlock(6)
    nn.init.zeros_(block.down.weight)
    nn.init.zeros_(block.down.bias)
    x = torch.randn(2, 6, 5, 7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(block(x), x)
    normed = block.norm(x)
    assert torch.allclose(normed.mean(1), torch.zeros(2, 5, 7), atol=1e-5)
    assert torch.allclose(normed.var(1, correction=0), torch.ones(2, 5, 7), atol=1e-2)


def test_shapes_of_both_fields():
    strides = (4, 2, 2)
    pictures = torch.rand(2, 3, 48, 64, generator=torch.Generator().manual_seed(0))
    embeddings = FrameEncoder(strides, 8, 5)(pictures)
    assert embeddings.shape == (2, 5, 3, 4)
    out = ContentField(Blocks(20, strides), 5)(embeddings)
    assert out.shape == pictures.shape and out.min() >= 0 and out.max() <= 1
    kernels = [b.conv.kernel_size[0] for b in ContentField(Blocks(20, strides), 5).decoder.blocks]
    assert kernels == [1, 3, 5]
    out = TimeField(Blocks(20, strides, 3, 3, 2.0), 16, (3, 4))(torch.tensor([0.0, 1.0]))
    assert out.shape == pictures.shape


@pytest.mark.parametrize("total", [50_000, 105_000, 1_500_000])
def test_budgets_are_met(total):
    for build in (
        lambda c: ContentField(Blocks(c, (4, 2, 2)), 16),
        lambda c: TimeField(Blocks(c, (4, 2, 2), 3, 3, 2.0), 128, (3, 4)),
    ):
        width = budget(total, build)
        off = {w: abs(size(build(w)) - total) for w in (max(1, width - 1), width, width + 1)}
        assert off[width] == min(off.values())
        assert off[width] <= (0.02 if total > 1e5 else 0.06) * total


def test_what_cannot_be_built_is_said():
    with pytest.raises(InvalidInputError, match="the smallest network has 11"):
        budget(5, lambda c: nn.Linear(10, c))
    for height, width in ((16, 16), (48, 64), (240, 320), (1080, 1920)):
        scale = math.prod(strides_for(height, width))
        assert 2 <= min(height, width) / scale <= 4
