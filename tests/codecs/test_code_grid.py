"""Grids of codes: who travels with whom, what is nearest, and codes beyond the edge."""

import itertools

import pytest
import torch

from isthmus.codecs.code_grid import GridCoder, GridPackets, dealt, nearest
from isthmus.codecs.container import Frame
from isthmus.errors import InvalidInputError
from isthmus.models.code_lm import CodeLM
from isthmus.models.masked_grid import MaskedGrid
from isthmus.nn.quantize import weighted_kmeans


def test_nearest_is_nearest() -> None:
    """Against all distances along the grid, one by one."""
    draw = torch.Generator().manual_seed(3)
    codes = torch.arange(2 * 6 * 7).view(2, 6, 7)
    gaps = torch.rand(codes.shape, generator=draw) < 0.7
    found = nearest(codes, gaps)
    assert torch.equal(found[~gaps], codes[~gaps])
    places = list(itertools.product(range(6), range(7)))
    for p, (r, c) in itertools.product(range(2), places):
        there = [
            (abs(r - y) + abs(c - x), int(codes[p, y, x])) for y, x in places if not gaps[p, y, x]
        ]
        best = min(there)[0]
        assert int(found[p, r, c]) in [code for far, code in there if far == best]
    with pytest.raises(InvalidInputError, match="nothing to fill"):
        nearest(codes, torch.ones_like(gaps))


@pytest.mark.parametrize("frames", [2, 5, 10])
def test_neighbours_travel_apart(frames: int) -> None:
    turn = dealt((1, 20, 20), frames)[0]
    assert (turn[1:] != turn[:-1]).all() and (turn[:, 1:] != turn[:, :-1]).all()
    assert torch.bincount(turn.flatten()).tolist() == [400 // frames] * frames


def test_codes_of_odd_grids_come_back() -> None:
    torch.manual_seed(0)
    along = GridCoder(CodeLM(1, 9, 8, 1, 2, 8, reach=16).eval(), 4, 5, 4)
    for shape in ((1, 1, 1), (2, 3, 9), (1, 6, 4)):
        codes = torch.randint(5, shape)
        assert torch.equal(along.decode(along.encode(codes), shape), codes)
        for packets in (GridPackets(7, 5), GridPackets(1, 5, None, along)):
            frames = [Frame.of(own, data) for own, data in packets.encode(codes)]
            found, gaps = packets.decode(frames, shape)
            assert torch.equal(found, codes) and not gaps.any()
    with pytest.raises(InvalidInputError, match="1 to 64 frames"):
        dealt((1, 2, 2), 65)


def test_rounds_fill_the_surest_first() -> None:
    """A model that is sure of 2 where its left neighbour is known, and else says 1."""

    class Chain(MaskedGrid):
        def forward(self, codes: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
            known = torch.cat([codes.new_zeros(len(codes), 1), codes[:, :-1]], 1) != self.mask
            return torch.where(
                known[..., None], torch.tensor([0.0, 0, 9]), torch.tensor([0.0, 1, 0])
            )

    net = Chain(3, 8, 1, 2)
    codes, gaps = torch.zeros(1, 4, dtype=torch.int64), torch.tensor([[False, True, True, True]])
    assert net.fill(codes, gaps, (1, 4), (0, 3)).tolist() == [[0, 2, 1, 1]]
    assert net.fill(codes, gaps, (1, 4), (0, 3), rounds=3).tolist() == [[0, 2, 2, 2]]
    with pytest.raises(InvalidInputError, match="1 pass"):
        net.fill(codes, gaps, (1, 4), (0, 3), rounds=0)


def test_kmeans_weighs_and_keeps_all_that_fit() -> None:
    rows = torch.tensor([[0.0], [1.0], [9.0], [11.0]])
    centres, labels = weighted_kmeans(rows, torch.tensor([1.0, 1.0, 3.0, 1.0]), 2)
    assert sorted(centres.flatten().tolist()) == [0.5, 9.5]
    assert labels[0] == labels[1] != labels[2] == labels[3]
    same, every = weighted_kmeans(rows, torch.ones(4), 4)
    assert torch.equal(same, rows) and every.tolist() == [0, 1, 2, 3]
    with pytest.raises(InvalidInputError, match="k-means"):
        weighted_kmeans(rows, -torch.ones(4), 2)
