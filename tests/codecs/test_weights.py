"""Weights as bytes: nearest whole numbers, exact symbols, and damaged bytes that are refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from isthmus.codecs.weights import Quantised, by_groups, pack, quantise, unpack
from isthmus.errors import BrokenFileError, InvalidInputError, IsthmusError


def network() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "wide": torch.randn(60, 80, generator=g),
        "rows": torch.randn(120, 400, generator=g) * torch.logspace(-2, 1, 120)[:, None],
        "bias": torch.randn(7, generator=g),
        "same": torch.full((5,), 0.25),
        "one": torch.tensor(3.0),
    }


@pytest.mark.parametrize("bits", [1, 6, 8])
def test_symbols_come_back_exactly(bits: int) -> None:
    tensors = network()
    found = {k: quantise(v, bits) for k, v in tensors.items()}
    back = unpack(pack(found), {k: v.shape for k, v in tensors.items()})
    for name, one in found.items():
        assert torch.equal(one.symbols, back[name].symbols) and one.axis == back[name].axis
        assert torch.equal(one.tensor(), back[name].tensor())
        assert one.symbols.max() < 1 << bits


def test_errors_are_half_a_step_and_statistics_follow_the_axis() -> None:
    x = network()["rows"]
    found = quantise(x, 8)
    assert found.axis == 0
    assert bool(((found.tensor() - x).abs() <= 0.51 * found.scale.float() + 2e-3 * x.abs()).all())
    assert quantise(x.T, 8).axis == 1 and quantise(network()["wide"], 8).axis is None


def test_bytes_are_near_the_entropy() -> None:
    x = torch.randn(200, 200, generator=torch.Generator().manual_seed(1))
    found = quantise(x, 5)
    share = np.bincount(found.symbols.flatten().numpy()) / x.numel()
    entropy = float(-(share[share > 0] * np.log2(share[share > 0])).sum()) * x.numel()
    assert entropy <= 8 * len(pack({"x": found})) <= 1.005 * entropy + 64 + 8 * (4 * 200 + 80)
    # few symbols: a law of the bank needs no counts, which would take a byte for each level
    few = quantise(x[:1, :90], 8)
    assert len(pack({"x": few})) < 100


def test_groups_by_hand() -> None:
    """One group from 0 to 3 in 2 bits is exact; statistics cost 32 bits for 4 weights."""
    x = torch.tensor([[0.0, 1.0, 2.0, 3.0], [0.0, 0.4, 2.0, 3.0]])
    back, bits = by_groups(x, 2, group=4)
    assert back.tolist() == [[0.0, 1.0, 2.0, 3.0], [0.0, 0.0, 2.0, 3.0]] and bits == 10.0
    with pytest.raises(InvalidInputError, match="groups of 3"):
        by_groups(x, 2, group=3)


def test_what_is_refused() -> None:
    for bad, bits in ((torch.tensor([torch.nan]), 8), (torch.zeros(0), 8), (torch.zeros(1), 13)):
        with pytest.raises(InvalidInputError):
            quantise(bad, bits)
    tensors = network()
    shapes = {k: v.shape for k, v in tensors.items()}
    data = pack({k: quantise(v, 6) for k, v in tensors.items()})
    with pytest.raises(BrokenFileError, match="other weights"):
        unpack(data, {k: s for k, s in shapes.items() if k != "wide"})
    with pytest.raises(BrokenFileError):
        unpack(data, {**shapes, "zz": (4,)})
    rng = np.random.default_rng(0)
    for _ in range(150):
        spoilt = bytearray(data)
        spoilt[rng.integers(min(300, len(data)))] = rng.integers(256)
        cut = bytes(spoilt)[: rng.integers(1, len(data))] if rng.random() < 0.5 else bytes(spoilt)
        try:
            assert all(isinstance(q, Quantised) for q in unpack(cut, shapes).values())
        except IsthmusError:
            continue
