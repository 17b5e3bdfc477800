"""The wave U-Net: lengths, look-ahead, streaming."""

import pytest
import torch

from isthmus.errors import InvalidInputError
from isthmus.nn.unet1d import WaveUNet, conv_step, transposed_step


def net(**options: object) -> WaveUNet:
    torch.manual_seed(0)
    made = WaveUNet(hidden=4, depth=3, kernel=8, stride=4, **options)  # type: ignore[arg-type]
    return made.double().eval()


@torch.no_grad()
@pytest.mark.parametrize("causal", [True, False])
def test_length_is_kept_at_every_length(causal: bool) -> None:
    unet = net(causal=causal)
    for length in [*range(1, 70), 255, 256, 257, 1000, 4999]:
        out = unet(torch.randn(1, length, dtype=torch.float64))
        assert out.shape == (1, length) and torch.isfinite(out).all()


@torch.no_grad()
@pytest.mark.parametrize("packets", [[1000], [1] * 1000, [7, 0, 300, 64, 1, 628]])
def test_packets_of_any_size_give_the_whole(packets: list[int]) -> None:
    unet = net()
    x = torch.randn(2, 1000, dtype=torch.float64)
    state, out = unet.init_state(), []
    for packet in x.split(packets, 1):
        y, state = unet.step(packet, state)
        out.append(y)
    said = sum(y.shape[1] for y in out)
    assert 1000 - said <= unet.lookahead
    y, state = unet.step(x.new_zeros(2, unet.padded_length(1000) - 1000), state)
    found = torch.cat([*out, y], 1)[:, :1000]
    torch.testing.assert_close(found, unet(x), atol=1e-12, rtol=0)


@torch.no_grad()
def test_packets_give_the_whole_at_long_strides() -> None:
    torch.manual_seed(0)
    unet = WaveUNet(hidden=4, depth=2, kernel=16, stride=8).double().eval()
    x = torch.randn(2, 500, dtype=torch.float64)
    state, out = unet.init_state(), []
    for packet in torch.nn.functional.pad(x, (0, unet.padded_length(500) - 500)).split(37, 1):
        y, state = unet.step(packet, state)
        out.append(y)
    torch.testing.assert_close(torch.cat(out, 1)[:, :500], unet(x), atol=1e-12, rtol=0)


def test_nothing_beyond_the_lookahead_matters() -> None:
    unet = net()
    latest = []
    for seed in range(4):  # a ReLU may hide one path or another
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(1, 500, dtype=torch.float64, generator=generator).requires_grad_()
        for sample in (128, 129, 191, 192):
            (gradient,) = torch.autograd.grad(unet(x)[0, sample], x)
            latest.append(int(gradient[0].nonzero().max()) - sample)
    assert max(latest) == unet.lookahead


def test_one_layer_by_hand() -> None:
    conv = torch.nn.Conv1d(1, 1, 2, 1, bias=False)
    up = torch.nn.ConvTranspose1d(1, 1, 2, 1)
    with torch.no_grad():
        conv.weight[:] = torch.tensor([1.0, 10.0])
        up.weight[:], up.bias[:] = torch.tensor([1.0, 10.0]), 0.5  # type: ignore[index]
    y, pending = conv_step(conv, torch.tensor([[[1.0, 2.0, 3.0]]]), None)
    assert y.tolist() == [[[21.0, 32.0]]] and pending.tolist() == [[[3.0]]]
    y, tail = transposed_step(up, torch.tensor([[[1.0, 2.0]]]), None)
    assert y.tolist() == [[[1.5, 12.5]]] and tail.tolist() == [[[20.0]]]


def test_the_first_weights_have_one_size() -> None:
    unet = WaveUNet(hidden=16, depth=3)
    plain = torch.nn.Conv1d(1, 16, 8, 4)
    assert float(plain.weight.detach().std()) == pytest.approx(0.2, rel=0.1)
    first = unet.encoder[0].conv.weight.detach()
    assert float(first.std()) == pytest.approx(0.02**0.5, rel=0.1)


def test_the_published_size() -> None:
    parameters = sum(p.numel() for p in WaveUNet(hidden=48).parameters())
    assert parameters == pytest.approx(18.9e6, rel=0.01)
    assert WaveUNet(hidden=48).hop == 1024


def test_refusals() -> None:
    with pytest.raises(InvalidInputError, match="stride within its kernel"):
        WaveUNet(kernel=2, stride=4)
    with pytest.raises(InvalidInputError, match="cannot stream"):
        net(causal=False).init_state()
