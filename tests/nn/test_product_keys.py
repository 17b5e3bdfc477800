"""Product keys: the lookup is that of all n^2 sums, and only what is chosen learns."""

import pytest
import torch

from isthmus.errors import InvalidInputError
from isthmus.nn.product_keys import ProductKeys


@pytest.mark.parametrize("scores", ["softmax", "relu"])
def test_it_finds_what_a_search_over_all_pairs_finds(scores):
    torch.manual_seed(0)
    layer = ProductKeys(6, 5, 3, heads=2, key_size=4, scores=scores).double()
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    q = layer.query(x).view(2, 7, 2, 2, 4)
    wanted = torch.zeros_like(x)
    for head in range(2):
        a, b = (q[:, :, head, s] @ layer.keys[head, s].T for s in range(2))
        whole = (a[..., :, None] + b[..., None, :]).flatten(-2)  # all 25 sums
        best = whole.topk(3, -1)
        weights = best.values.softmax(-1) if scores == "softmax" else best.values.relu()
        wanted = wanted + (weights[..., None] * layer.values[best.indices]).sum(-2)
    assert torch.allclose(layer(x), wanted)
    assert torch.allclose(layer(x[:1, :1]), wanted[:1, :1]), "one token alone"


def test_only_chosen_values_learn():
    torch.manual_seed(0)
    layer = ProductKeys(6, 5, 2, heads=1, key_size=4)
    x = torch.randn(3, 6)
    chosen = set(layer.choose(x)[0].flatten().tolist())
    layer(x).square().sum().backward()
    moved = set(layer.values.grad.abs().sum(1).nonzero()[:, 0].tolist())
    assert moved == chosen and layer.keys.grad.abs().sum() > 0


def test_bad_sizes_are_refused():
    with pytest.raises(InvalidInputError, match="at most the 4 keys"):
        ProductKeys(8, 4, 5)
    with pytest.raises(InvalidInputError, match="softmax, relu"):
        ProductKeys(8, 4, 2, scores="sigmoid")
