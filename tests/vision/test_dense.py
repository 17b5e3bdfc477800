"""Dense prediction: dilation for stride, the pyramid against transformers, and its ruler."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers as tf
from scipy import ndimage
from torch import nn

from isthmus.errors import InvalidInputError
from isthmus.metrics.segmentation import Confusion, trimap
from isthmus.models.residual import ResidualNet
from isthmus.nn.dense import (
    ASPP,
    PointwiseConv2d,
    SeparableConv2d,
    SkipDecoder,
    conv,
    make_atrous,
    upsample,
)


def settled(module: nn.Module) -> nn.Module:
    """A module whose batch norms have seen something."""
    generator = torch.Generator().manual_seed(1)
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.copy_(torch.randn(m.num_features, generator=generator) * 0.1)
            m.running_var.copy_(torch.rand(m.num_features, generator=generator) + 0.5)
    return module.eval()


@pytest.mark.parametrize("output_stride", [4, 8, 16])
@pytest.mark.parametrize("bottleneck", [False, True])
@torch.no_grad()
def test_dilation_gives_the_strided_map_at_its_positions(output_stride, bottleneck):
    torch.manual_seed(0)
    net = settled(ResidualNet((8, 8, 12, 16), (1, 2, 2, 2), 4, bottleneck))
    pictures = torch.randn(1, 3, 64, 96)
    strided = net(pictures)
    assert make_atrous(list(net.stages), output_stride, entered=2) == output_stride
    for dense, sparse, stride in zip(net(pictures), strided, (4, 8, 16, 32), strict=True):
        step = max(1, stride // output_stride)
        assert dense.shape[-1] == 96 // min(stride, output_stride)
        torch.testing.assert_close(dense[..., ::step, ::step], sparse)


@torch.no_grad()
def test_dilation_of_separable_stages() -> None:
    torch.manual_seed(0)
    stages = [
        settled(nn.Sequential(SeparableConv2d(3, 4, stride=2), SeparableConv2d(4, 4)))
        for _ in range(1)
    ] + [settled(nn.Sequential(SeparableConv2d(4, 4, stride=2), SeparableConv2d(4, 4)))]
    x = torch.randn(1, 3, 16, 16)
    before = stages[1](stages[0](x))
    make_atrous(stages, 2)
    torch.testing.assert_close(stages[1](stages[0](x))[..., ::2, ::2], before)


def test_dilation_is_refused_where_it_makes_no_sense() -> None:
    net = ResidualNet((4, 4), (1, 1), 4)
    with pytest.raises(InvalidInputError, match="use a stride between two stages"):
        make_atrous([conv(3, 3, stride=3)], 2)
    make_atrous(list(net.stages), 4, entered=2)
    with pytest.raises(InvalidInputError, match="dilated already"):
        make_atrous(list(net.stages), 4, entered=2)


@torch.no_grad()
def test_the_pyramid_without_rates_is_the_head_in_transformers() -> None:
    torch.manual_seed(0)
    config = tf.MobileNetV2Config(num_labels=5, depth_multiplier=0.25, image_size=32)
    theirs = settled(tf.MobileNetV2ForSemanticSegmentation(config)).segmentation_head
    channels = theirs.conv_pool.convolution.in_channels
    ours = ASPP(channels, (), 256).eval()
    for mine, other in (
        (ours.pool, theirs.conv_pool),
        (ours.branches[0], theirs.conv_aspp),
        (ours.project, theirs.conv_projection),
    ):
        mine[0].load_state_dict(other.convolution.state_dict())
        mine[1].load_state_dict(other.normalization.state_dict())
    classify = nn.Conv2d(256, 5, 1)
    classify.load_state_dict(theirs.classifier.convolution.state_dict())
    x = torch.randn(2, channels, 7, 5)
    torch.testing.assert_close(classify(ours(x)), theirs(x))


def test_weights_of_separable_convolutions() -> None:
    count = lambda m: sum(c.weight.numel() for c in m.modules() if isinstance(c, nn.Conv2d))  # noqa: E731
    assert count(SeparableConv2d(256, 256)) == 67_840 and count(conv(256, 256)) == 589_824
    # the decoder of the paper: 48 channels of 256 beside 256, then two 3x3
    decoder = SkipDecoder(256, 256, separable=False)
    assert count(decoder) == 256 * 48 + 304 * 256 * 9 + 256 * 256 * 9


def test_rates_reach_as_far_as_they_say() -> None:
    """Effective kernels of 3x3 at 6, 12 and 18 are 13, 25 and 37."""
    for rate, reach in ((6, 13), (12, 25), (18, 37)):
        branch = settled(conv(1, 1, dilation=rate))
        x = torch.zeros(1, 1, 41, 41, requires_grad=True)
        branch[0](x)[0, 0, 20, 20].backward()
        rows = x.grad[0, 0].abs().sum(1).nonzero().flatten()
        assert int(rows.max() - rows.min()) + 1 == reach


def test_enlarging_keeps_pixel_centres() -> None:
    """A ramp of pixel centres stays that ramp, away from the border."""
    centres = (torch.arange(6.0) + 0.5) * 16
    ramp = centres.expand(1, 1, 6, 6)
    wanted = torch.arange(96.0) + 0.5
    torch.testing.assert_close(upsample(ramp, (96, 96))[0, 0, 50, 8:-8], wanted[8:-8])


def test_confusion_against_counting() -> None:
    rng = np.random.default_rng(0)
    truth = torch.from_numpy(rng.integers(0, 4, (3, 9, 9)))
    truth[0, :3] = 255
    told = torch.from_numpy(rng.integers(0, 4, (3, 9, 9)))
    told[told == 3] = 2
    seen = Confusion(5)
    for t, p in zip(truth, told, strict=True):
        seen.add(t, p)
    kept = truth != 255
    ious = [
        float(
            ((truth == c) & (told == c) & kept).sum() / (((truth == c) | (told == c)) & kept).sum()
        )
        for c in range(4)
    ]
    assert seen.mean_iou() == pytest.approx(np.mean(ious)) and ious[3] == 0
    assert seen.iou()[4].isnan()
    assert seen.accuracy() == pytest.approx(float((truth == told)[kept].float().mean()))
    with pytest.raises(InvalidInputError, match="class 7 is out of range"):
        seen.add(torch.tensor([7]), torch.tensor([0]))
    with pytest.raises(InvalidInputError, match="differ in shape"):
        seen.add(truth, told[0])


def test_trimap_against_dilation_of_every_class() -> None:
    mask = torch.from_numpy(np.random.default_rng(0).integers(0, 3, (1, 4, 4)))
    mask = mask.repeat_interleave(5, 1).repeat_interleave(5, 2)
    for width in (1, 2):
        box = np.ones((2 * width + 1,) * 2)
        near = sum(ndimage.binary_dilation(mask[0].numpy() == c, box).astype(int) for c in range(3))
        assert np.array_equal(trimap(mask, width)[0].numpy(), near > 1)


def test_a_strided_pointwise_convolution_is_torchs_own():
    mine = PointwiseConv2d(3, 5, 1, stride=2)
    torchs = nn.Conv2d(3, 5, 1, stride=2)
    torchs.load_state_dict(mine.state_dict())
    x = torch.randn(2, 3, 7, 6, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(mine(x), torchs(x), atol=1e-6)
