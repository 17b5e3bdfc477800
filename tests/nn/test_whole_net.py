"""Networks of whole numbers: against plain integers, in any order of summation, and in training."""

import itertools

import pytest
import torch

from isthmus.errors import InvalidInputError
from isthmus.nn.whole_net import WholeConv, WholeConvolution, WholeNet, bounded, rounded, run


def net(seed: int = 0) -> WholeNet:
    torch.manual_seed(seed)
    made = WholeNet(
        [
            WholeConvolution(3, 16, 5, step_in=1.0),
            WholeConvolution(16, 32, shuffle=2),
            WholeConvolution(8, 5, 1, step_out=0.25, low=-900, high=900),
        ]
    )
    for layer in made.layers:
        torch.nn.init.normal_(layer.conv.bias, std=0.3)  # type: ignore[operator,union-attr,arg-type]
    return made


def test_a_frozen_layer_is_what_python_integers_give() -> None:
    layer = net().layers[0].frozen()  # type: ignore[operator]
    x = torch.randint(-40, 40, (1, 3, 4, 6), generator=torch.Generator().manual_seed(1))
    found = layer(x.double())
    padded = torch.nn.functional.pad(x, (2, 2, 2, 2)).tolist()[0]
    weight, bias = layer.weight.long().tolist(), layer.bias.long().tolist()
    times, shift = layer.multiplier.long().tolist(), layer.shift.long().tolist()
    for c, i, j in itertools.product(range(16), range(4), range(6)):
        acc = bias[c] + sum(
            weight[c][k][a][b] * padded[k][i + a][j + b]
            for k, a, b in itertools.product(range(3), range(5), range(5))
        )
        wanted = (acc * times[c] + shift[c] // 2) // shift[c]
        assert int(found[0, c, i, j]) == min(255, max(0, wanted))


def test_the_order_of_channels_changes_nothing() -> None:
    """Another order of summation: a network of real numbers ends in other last bits."""
    layers = net().frozen()
    x = torch.randint(-99, 99, (2, 3, 8, 8), generator=torch.Generator().manual_seed(2))
    order = torch.randperm(16, generator=torch.Generator().manual_seed(3))
    first, second, last = layers
    swapped = WholeConv(
        first.weight[order], first.bias[order], first.multiplier[order], first.shift[order], 0, 255
    )
    after = WholeConv(
        second.weight[:, order], second.bias, second.multiplier, second.shift, 0, 255, 2
    )
    assert torch.equal(run(layers, x), run([swapped, after, last], x))
    real = torch.nn.functional.conv2d(x.float(), torch.rand(16, 3, 5, 5))
    weight = torch.rand(4, 16, 1, 1)
    a = torch.nn.functional.conv2d(real, weight)
    b = torch.nn.functional.conv2d(real[:, order], weight[:, order])
    assert not torch.equal(a, b)


def test_training_on_the_grid_is_what_will_be_frozen() -> None:
    made = net()
    x = torch.randint(-9, 9, (2, 3, 16, 16), generator=torch.Generator().manual_seed(4)).float()
    with torch.no_grad():
        exact, free = made(x, True), made(x)
    whole = run(made.frozen(), x) * 0.25
    assert float((exact - whole).abs().max()) <= 0.25  # a rounded multiplier, once in a while
    assert float((exact != whole).double().mean()) < 0.01
    assert 0 < float((exact - free).abs().mean()) < 0.3


def test_it_comes_back_from_its_integers() -> None:
    layers = net().frozen()
    again = [WholeConv.of(layer.tensors()) for layer in layers]
    x = torch.randint(-99, 99, (1, 3, 8, 8), generator=torch.Generator().manual_seed(2))
    assert torch.equal(run(layers, x), run(again, x))
    assert {str(t.dtype) for t in layers[0].tensors().values()} <= {
        "torch.int8",
        "torch.int32",
        "torch.int64",
    }


def test_gradients_reach_all_weights_on_the_grid() -> None:
    made = net()
    made(torch.randn(1, 3, 8, 8).round(), True).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in made.parameters())


def test_bounds_let_gradients_lead_back() -> None:
    x = torch.tensor([-2.0, -2.0, 0.5, 3.0, 3.0], requires_grad=True)
    (bounded(x, 0.0, 1.0) * torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0])).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [0.0, -1.0, 1.0, 1.0, 0.0]
    y = torch.tensor([0.4], requires_grad=True)
    rounded(y).sum().backward()
    assert y.grad is not None and y.grad.item() == 1.0 and rounded(y).item() == 0.0


def test_bad_shapes_are_refused() -> None:
    for kernel, outputs in ((2, 4), (3, 6)):
        with pytest.raises(InvalidInputError, match="kernel is odd"):
            WholeConvolution(1, outputs, kernel, shuffle=2)
