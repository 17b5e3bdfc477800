"""Elastic layers: slices by hand, cuts bit for bit, no gradient beyond; sparse products."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from isthmus.errors import InvalidInputError, UnsupportedModelError
from isthmus.nn.elastic import Axis, ElasticLinear, elastic, extract, make_elastic
from isthmus.nn.sparse_gemv import SparseLinear, sparse_gemv


def chain() -> tuple[nn.Sequential, tuple[Axis, Axis]]:
    """Two hidden axes in a row: the middle linear reads one and writes the other."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, 12), nn.GELU(), nn.Linear(12, 8, bias=False), nn.ReLU(), nn.Linear(8, 3)
    )
    return model, (Axis(12, ("0",), ("2",)), Axis(8, ("2",), ("4",)))


def test_widths_slice_extract_and_come_back() -> None:
    model, axes = chain()
    x = torch.randn(7, 5)
    weights, whole = {k: v.clone() for k, v in model.state_dict().items()}, model(x)
    make_elastic(model, axes)
    make_elastic(model, axes)  # a second time changes nothing
    assert list(model.state_dict()) == list(weights) and torch.equal(model(x), whole)

    hidden = nn.functional.gelu(x @ weights["0.weight"][:4].T + weights["0.bias"][:4])
    hidden = (hidden @ weights["2.weight"][:6, :4].T).relu()
    with elastic(model, axes, (4, 6)):
        narrow = model(x)
        with elastic(model, axes, (12, 8)):
            assert torch.equal(model(x), whole)
        assert torch.equal(model(x), narrow)
    by_hand = hidden @ weights["4.weight"][:, :6].T + weights["4.bias"]
    torch.testing.assert_close(narrow, by_hand)
    assert torch.equal(model(x), whole)

    small = extract(model, axes, (4, 6))
    assert torch.equal(small(x), narrow)
    layers = [m for m in small.modules() if isinstance(m, nn.Linear)]
    assert [type(m) for m in layers] == [nn.Linear] * 3
    assert [tuple(m.weight.shape) for m in layers] == [(4, 5), (6, 4), (3, 6)]
    small[0].weight.data.zero_()  # type: ignore[index]
    assert torch.equal(model(x), whole)


def test_what_does_not_work_has_no_gradient() -> None:
    model, axes = chain()
    make_elastic(model, axes)
    with elastic(model, axes, (4, 6)):
        model(torch.randn(9, 5)).square().sum().backward()
    first, middle, last = (model[i].weight.grad for i in (0, 2, 4))
    assert isinstance(first, torch.Tensor) and isinstance(middle, torch.Tensor)
    assert isinstance(last, torch.Tensor) and (first[:4] != 0).any()
    for beyond in (first[4:], middle[6:], middle[:, 4:], last[:, 6:], model[0].bias.grad[4:]):  # type: ignore[index,union-attr]
        assert torch.count_nonzero(beyond) == 0


def test_what_cannot_be_elastic_is_refused_by_name() -> None:
    model, axes = chain()
    with pytest.raises(InvalidInputError, match=r"0 is not elastic; call make_elastic"):
        extract(model, axes, (4, 6))
    with pytest.raises(UnsupportedModelError, match="1 is a GELU"):
        make_elastic(model, [Axis(12, ("1",), ("2",))])
    with pytest.raises(UnsupportedModelError, match="2 has 12 inputs, but its axis has 8 units"):
        make_elastic(model, [Axis(8, (), ("2",))])
    with pytest.raises(InvalidInputError, match="lies on two axes with its inputs"):
        make_elastic(model, [Axis(12, ("0",), ("2",)), Axis(12, (), ("2",))])
    make_elastic(model, axes)
    for widths, message in (((4,), "one width for each of 2"), ((0, 6), "got 0"), ((4, 9), "9")):
        with pytest.raises(InvalidInputError, match=message), elastic(model, axes, widths):
            pass
    assert isinstance(model[0], ElasticLinear) and model[0].active == (12, 5)
    with pytest.raises(ZeroDivisionError), elastic(model, axes, (4, 6)):
        1 / 0  # noqa: B018
    assert model[0].active == (12, 5)


@pytest.mark.parametrize("bias", [True, False])
def test_the_sparse_product_is_the_dense_one(bias: bool) -> None:
    torch.manual_seed(1)
    dense = nn.Linear(40, 24, bias=bias)
    sparse = SparseLinear.of(dense.weight, dense.bias)
    for zeros in (0, 20, 39, 40):
        x = torch.randn(1, 1, 40)
        x[..., torch.randperm(40)[:zeros]] = 0
        with torch.no_grad():
            torch.testing.assert_close(sparse(x), dense(x))
            torch.testing.assert_close(
                sparse_gemv(x[0, 0], sparse.transposed, sparse.bias), dense(x)[0, 0]
            )
    batch = torch.randn(3, 40, requires_grad=True)
    torch.testing.assert_close(sparse(batch), dense(batch))
    sparse(batch).sum().backward()
    assert sparse.transposed.grad is not None and sparse.transposed.is_contiguous()


def test_few_zeros_take_the_dense_product(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, taken = SparseLinear(8, 4, most=0.5), []
    real = nn.functional.embedding_bag

    def seen(*args: object, **kwargs: object) -> torch.Tensor:
        taken.append(args)
        return real(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(nn.functional, "embedding_bag", seen)
    half = torch.tensor([1.0, 0, 1, 0, 1, 0, 1, 0])
    with torch.no_grad():
        layer(half)
        assert len(taken) == 1
        layer(half + torch.tensor([0.0, 1, 0, 0, 0, 0, 0, 0]))
        layer(half.expand(2, 8))
    layer(half)  # with a gradient
    assert len(taken) == 1
    with pytest.raises(InvalidInputError, match="most must be from 0 to 1"):
        SparseLinear(8, 4, most=1.5)
